//! Tests of the CPU device's memory: it allocates tiles for each thread, for any sequence length.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use flash_attention::half::bf16;
use flash_attention::{Attention, Device, Element, Gradients, Output, Tensor};

/// The system's allocator, with a count of the bytes.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

fn count(bytes: usize) {
    let held = HELD.fetch_add(bytes, Ordering::Relaxed) + bytes;
    PEAK.fetch_max(held, Ordering::Relaxed);
}

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: passed on to the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: passed on to the caller.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: passed on to the caller.
        unsafe { System.dealloc(pointer, layout) };
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Returns the largest number of bytes that `work` holds at a time.
fn peak_of(work: impl FnOnce()) -> usize {
    let before = HELD.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    work();
    PEAK.load(Ordering::Relaxed) - before
}

/// Returns the bytes of forward and of backward besides their tensors and, in backward, an f32 per query.
fn peaks<T: Element>(threads: usize, heads: usize, seqlen: usize, head_dim: usize) -> [usize; 2] {
    let device = Device::cpu_with_threads(threads).expect("threads");
    let shape = [1, heads, seqlen, head_dim];
    let zeros = || Tensor::<T>::zeros(&device, shape).expect("it fits");
    let [q, k, v, dout, out, dq, dk, dv] = [(); 8].map(|()| zeros());
    let lse = Tensor::<f32>::zeros(&device, &shape[..3]).expect("it fits");
    let mut output = Output::new(out, lse);
    let mut gradients = Gradients::new(dq, dk, dv);
    let attention = Attention::new();
    let Output { out, lse, .. } = &mut output;
    let forward = peak_of(|| attention.forward_into(&q, &k, &v, out, lse).expect("valid"));
    let backward = peak_of(|| {
        let result = attention.backward_into(&q, &k, &v, &output, &dout, &mut gradients);
        result.expect("valid");
    });
    [forward, backward - 4 * heads * seqlen]
}

/// A single test, since two at a time would count each other's bytes.
#[test]
fn extra_memory_is_tiles_for_each_thread() {
    const MIB: usize = 1 << 20;
    for threads in [1, 2, 4] {
        for (heads, seqlen, head_dim) in [(1, 512, 64), (1, 4096, 64), (8, 1024, 64), (2, 1024, 128)] {
            let [forward, backward] = peaks::<f32>(threads, heads, seqlen, head_dim);
            let case = format!("{threads} threads, {heads} x {seqlen} x {head_dim}: {forward}, {backward} bytes");
            assert!(forward <= threads * MIB, "{case}");
            assert!(backward <= threads * 2 * MIB, "{case}");
            // In 16 bits the dQ of a head is accumulated in f32, for one head per thread and one more.
            let sums = (threads + 1) * seqlen * head_dim * 4;
            let [forward, backward] = peaks::<bf16>(threads, heads, seqlen, head_dim);
            assert!(forward <= threads * MIB, "bf16, {case}: {forward}");
            assert!(backward <= threads * 3 * MIB + sums, "bf16, {case}: {backward}");
        }
    }
    // Keys that are split over threads: a partial output for each segment, at most 16 per tile.
    for seqlen in [8192, 65536] {
        let device = Device::cpu_with_threads(4).expect("threads");
        let (q, k) = ([1, 1, 40, 64], [1, 1, seqlen, 64]);
        let (q, k) = (Tensor::<f32>::zeros(&device, q), Tensor::<f32>::zeros(&device, k));
        let (q, k) = (q.expect("it fits"), k.expect("it fits"));
        let peak = peak_of(|| drop(Attention::new().forward(&q, &k, &k).expect("valid")));
        assert!(peak <= 4 * MIB, "{seqlen} keys: {peak} bytes");
    }
}
