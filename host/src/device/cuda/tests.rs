//! The CUDA device on a driver that only records its calls: which calls are made, in what order and on what stream.
//! `tests/tests/suite/gpus.rs` tests on a GPU what the calls do.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use flash_attention_kernels::abi::TensorMap;

use super::*;
use crate::batch::NewKeys;
use crate::options::Attention;
use crate::output::{Gradients, Output, Statistics};
use crate::plan::{Plan, TileMap};
use crate::problem::Problem;
use crate::rotary::Rotary;
use crate::sequences::{KvCache, Sequences};
use crate::tensor::Tensor;

const STREAM: usize = 0xf00;
const SHAPE: [usize; 4] = [1, 2, 256, 64];

/// A driver that records its calls and does nothing else.
#[derive(Default)]
struct Recorder {
    log: Mutex<Vec<String>>,
    allocated: AtomicU64,
    /// Number of allocations that will still fail as out of memory.
    full: AtomicUsize,
    /// True while the stream is captured.
    captures: AtomicBool,
    /// Addresses that were freed.
    freed: Mutex<Vec<u64>>,
}

impl Recorder {
    fn note(&self, queue: Queue, what: impl std::fmt::Display) {
        lock(&self.log).push(format!("{what} on {:#x}", queue.stream.addr()));
    }

    /// Returns the calls recorded since the last `take`.
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut lock(&self.log))
    }
}

impl Calls for Recorder {
    fn alloc(&self, queue: Queue, bytes: usize) -> Result<u64, DriverError> {
        self.note(queue, format_args!("alloc {bytes}"));
        let take = |left: usize| left.checked_sub(1);
        if self
            .full
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
            .is_ok()
        {
            return Err(DriverError {
                call: "cuMemAlloc",
                code: sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY,
                message: "full".to_owned(),
            });
        }
        let offset = self
            .allocated
            .fetch_add(bytes.next_multiple_of(256) as u64, Ordering::Relaxed);
        Ok(0x7000_0000 + offset)
    }
    unsafe fn free(&self, queue: Queue, address: u64) -> Result<(), DriverError> {
        lock(&self.freed).push(address);
        self.note(queue, "free");
        Ok(())
    }
    fn trim(&self, queue: Queue) -> Result<(), DriverError> {
        self.note(queue, "trim");
        Ok(())
    }
    fn free_bytes(&self, _queue: Queue) -> Result<u64, DriverError> {
        Ok(77)
    }
    unsafe fn upload(&self, queue: Queue, _address: u64, _data: &[u8]) -> Result<(), DriverError> {
        self.note(queue, "upload");
        Ok(())
    }
    unsafe fn download(&self, queue: Queue, _address: u64, _data: &mut [u8]) -> Result<(), DriverError> {
        self.note(queue, "download");
        Ok(())
    }
    unsafe fn zero(&self, queue: Queue, _address: u64, _bytes: usize) -> Result<(), DriverError> {
        self.note(queue, "zero");
        Ok(())
    }
    fn load(&self, queue: Queue, ptx: &str, name: &str, _shared_bytes: u32) -> Result<Function, DriverError> {
        assert!(ptx.contains(name), "the PTX of {name}");
        self.note(queue, format_args!("load {name}"));
        Ok(Function(std::ptr::without_provenance_mut(1)))
    }
    fn encode(&self, tile: &TileMap) -> Result<TensorMap, DriverError> {
        Ok(TensorMap([tile.address; 16]))
    }
    unsafe fn launch(
        &self,
        queue: Queue,
        _function: Function,
        geometry: Geometry,
        _params: &[&[u8]],
    ) -> Result<(), DriverError> {
        match geometry.cluster {
            1 => self.note(queue, format_args!("launch {:?}", geometry.grid)),
            blocks => self.note(
                queue,
                format_args!("launch {:?} in clusters of {blocks}", geometry.grid),
            ),
        }
        Ok(())
    }
    fn is_capturing(&self, _queue: Queue) -> Result<bool, DriverError> {
        Ok(self.captures.load(Ordering::Relaxed))
    }
    fn synchronize(&self, queue: Queue) -> Result<(), DriverError> {
        self.note(queue, "synchronize");
        Ok(())
    }
}

fn context(compute_capability: (u32, u32)) -> Arc<Context> {
    Arc::new(Context {
        ordinal: 3,
        name: "a GPU on paper".to_owned(),
        info: DeviceInfo::gpu(compute_capability, 132, 227 * 1024),
        pool: Some(std::ptr::without_provenance_mut(8)),
        functions: Modules::new(),
    })
}

/// Makes a device on a foreign stream of a context.
fn device(
    context: &Arc<Context>,
    stream: usize,
    owner: Option<Arc<dyn Any + Send + Sync>>,
) -> (Device, &'static Recorder) {
    let recorder: &'static Recorder = Box::leak(Box::default());
    let handle = std::ptr::without_provenance_mut(16);
    let stream = std::ptr::without_provenance_mut(stream);
    let cuda = Cuda::new(context.clone(), handle, stream, recorder, owner);
    (Device::new(DeviceKind::Cuda, Box::new(cuda)), recorder)
}

/// Makes a tensor in foreign memory.
fn foreign<T: crate::element::Element>(device: &Device, address: u64, shape: &[usize]) -> Tensor<T> {
    let strides = crate::layout::contiguous_strides(shape);
    // SAFETY: the device never reads nor writes any memory.
    unsafe { Tensor::from_raw_parts(device, address, shape, strides, None) }.expect("an aligned address")
}

/// Makes q, k, v and dout, the forward results, and gradients, all in foreign memory.
fn tensors(device: &Device) -> ([Tensor<half::f16>; 4], Output<half::f16>, Gradients<half::f16>) {
    let at = |index: u64| foreign(device, index << 20, &SHAPE);
    let output = Output::new(at(5), foreign(device, 6 << 20, &SHAPE[..3]));
    let gradients = Gradients::new(at(7), at(8), at(9));
    ([at(1), at(2), at(3), at(4)], output, gradients)
}

fn launches<P: PassType>(plan: &Plan<P>) -> Vec<String> {
    let note = |launch: &Launch<P>| format!("launch {:?} on {STREAM:#x}", launch.grid);
    plan.launches().iter().map(note).collect()
}

/// Tests that a CUDA graph can capture such a call: it launches on the foreign stream and makes no other call.
#[test]
fn calls_in_the_callers_memory_only_launch_and_on_the_foreign_stream() {
    for capability in [(8, 0), (9, 0)] {
        let (device, recorder) = device(&context(capability), STREAM, None);
        let ([q, k, v, dout], mut output, mut gradients) = tensors(&device);
        for attention in [Attention::new().causal(), Attention::new().deterministic()] {
            let plan = attention.plan(&q, &k, &v).expect("valid");
            let backward = attention.plan_backward(&q, &k, &v, &output, &dout).expect("valid");
            for plan in [AnyPlan::from(&plan), AnyPlan::from(&backward)] {
                device.prepare(plan).expect("the recorder loads everything");
            }
            let loaded = recorder.take();
            assert!(loaded.iter().all(|call| call.starts_with("load ")), "{loaded:?}");

            attention
                .forward_into(&q, &k, &v, &mut output.out, &mut output.lse)
                .expect("valid");
            assert_eq!(recorder.take(), launches(&plan));

            let words = backward.workspace_bytes() as usize / 4;
            let mut workspace = foreign(&device, 10 << 20, &[words]);
            attention
                .backward_into_with(&q, &k, &v, &output, &dout, &mut gradients, &mut workspace)
                .expect("valid");
            assert_eq!(recorder.take(), launches(&backward));
        }
    }
}

#[test]
fn a_kernel_in_clusters_is_launched_with_their_size() {
    let (device, recorder) = device(&context((9, 0)), STREAM, None);
    let at = |index: u64| foreign::<half::f16>(&device, index << 20, &[1, 3, 256, 128]);
    let ([q, k, v, mut out], mut lse) = ([1, 2, 3, 4].map(at), foreign(&device, 5 << 20, &[1, 3, 256]));
    let attention = Attention::new();
    let plan = attention.plan(&q, &k, &v).expect("valid");
    device.prepare(&plan).expect("the recorder loads everything");
    recorder.take();
    attention.forward_into(&q, &k, &v, &mut out, &mut lse).expect("valid");
    let launch = format!("launch [6, 1, 1] in clusters of 2 on {STREAM:#x}");
    assert_eq!(recorder.take(), [launch]);
}

/// Tests that ragged and cached calls with results and workspace of the caller launch once for all sequences, and a second time where
/// keys are split.
#[test]
fn batches_in_the_callers_memory_only_launch() {
    let (device, recorder) = device(&context((9, 0)), STREAM, None);
    let at = |index: u64, shape: &[usize]| foreign::<half::f16>(&device, index << 24, shape);
    let output = |shape: &[usize], rows: &[usize]| Output::new(at(5, shape), foreign(&device, 6 << 24, rows));
    let workspace = |bytes: u64| foreign::<f32>(&device, 10 << 24, &[bytes as usize / 4]);
    let attention = Attention::new().causal();
    let prepared = |plan: AnyPlan<'_>| {
        device.prepare(plan).expect("the recorder loads everything");
        recorder.take();
        match plan {
            AnyPlan::Forward(plan) => (launches(plan), plan.workspace_bytes()),
            AnyPlan::Backward(plan) => (launches(plan), plan.workspace_bytes()),
        }
    };

    let packed = [48, 2, 64];
    let [q, k, v, dout] = [1, 2, 3, 4].map(|index| at(index, &packed));
    let sequences = Sequences::new(&[0, 30, 48], &[0, 30, 48]).expect("offsets grow");
    let mut of_packed = output(&packed, &[2, 48]);
    let plans = attention.plan_ragged(&q, &k, &v, &sequences).expect("valid");
    let [plan] = &plans[..] else {
        panic!("one plan for all sequences")
    };
    let (expected, bytes) = prepared(plan.into());
    attention
        .forward_ragged_into(&q, &k, &v, &sequences, &mut of_packed, Some(&mut workspace(bytes)))
        .expect("valid");
    assert_eq!(recorder.take(), expected);
    assert_eq!(expected.len(), 1);

    let mut gradients = Gradients::new(at(7, &packed), at(8, &packed), at(9, &packed));
    let plans = attention.plan_backward_ragged(&q, &k, &v, &of_packed, &dout, &sequences, &gradients);
    let plans = plans.expect("valid");
    let [plan] = &plans[..] else {
        panic!("one plan for all sequences")
    };
    let (expected, bytes) = prepared(plan.into());
    let (gradients, own) = (&mut gradients, &mut workspace(bytes));
    attention
        .backward_ragged_into(&q, &k, &v, &of_packed, &dout, &sequences, gradients, Some(own))
        .expect("valid");
    assert_eq!(recorder.take(), expected);
    assert_eq!(expected.len(), 3);

    let (q, shape) = (at(1, &[2, 2, 1, 64]), [300, 16, 1, 64]);
    let (k, v, table) = (at(2, &shape), at(3, &shape), (0..300).collect::<Vec<i32>>());
    let cache = KvCache::paged([300, 16], &table, &[2400, 17]).expect("pages");
    let plans = attention.plan_cached(&q, &k, &v, &cache).expect("valid");
    let [plan] = &plans[..] else {
        panic!("one plan for all sequences")
    };
    let (expected, bytes) = prepared(plan.into());
    let mut of_cached = output(&[2, 2, 1, 64], &[2, 2, 1]);
    attention
        .forward_cached_into(&q, &k, &v, &cache, &mut of_cached, Some(&mut workspace(bytes)))
        .expect("valid");
    assert_eq!(recorder.take(), expected);
    assert_eq!(expected.len(), 2, "a second launch combines splits");
}

/// Tests that few queries of a rectangle, with results and workspace of the caller, launch twice where their keys are split.
#[test]
fn few_queries_in_the_callers_memory_only_launch() {
    for capability in [(8, 0), (9, 0)] {
        let (device, recorder) = device(&context(capability), STREAM, None);
        let at = |index: u64, shape: &[usize]| foreign::<half::f16>(&device, index << 24, shape);
        let (q, k, v) = (
            at(1, &[2, 8, 1, 64]),
            at(2, &[2, 2, 2000, 64]),
            at(3, &[2, 2, 2000, 64]),
        );
        let mut output = Output::new(at(4, &[2, 8, 1, 64]), foreign(&device, 5 << 24, &[2, 8, 1]));
        let attention = Attention::new().causal();
        let plan = attention.plan(&q, &k, &v).expect("valid");
        device.prepare(&plan).expect("the recorder loads everything");
        recorder.take();
        let mut workspace = foreign(&device, 6 << 24, &[plan.workspace_bytes() as usize / 4]);
        attention
            .forward_into_with(&q, &k, &v, &mut output, &mut workspace)
            .expect("valid");
        assert_eq!(recorder.take(), launches(&plan));
        assert_eq!(plan.launches().len(), 2, "{plan}");
    }
}

/// Tests that lse, row_max and row_sum of other strides, in the caller's memory with a workspace, take launches and nothing else, and
/// that the next layer uploads no list.
#[test]
fn rows_with_gaps_in_the_callers_memory_only_launch() {
    for capability in [(8, 0), (9, 0)] {
        let (device, recorder) = device(&context(capability), STREAM, None);
        let ([q, k, v, dout], _, mut gradients) = tensors(&device);
        let rows = |index: u64| {
            let all: Tensor<f32> = foreign(&device, index << 20, &[SHAPE[0], SHAPE[2], SHAPE[1], 2]);
            let rows = all.select(3, 1).and_then(|rows| rows.transpose(1, 2));
            rows.expect("in range")
        };
        let mut output = Output::new(foreign(&device, 5 << 20, &SHAPE), rows(11));
        let (row_max, row_sum) = (rows(12), rows(13));
        output.statistics = Some(Statistics { row_max, row_sum });
        let attention = Attention::new().causal();
        let problem = Problem::new(&attention, q.info(), k.info(), v.info(), Some(output.outputs()));
        let plan = Plan::new(&problem.expect("valid"), &device.info()).expect("a kernel");
        let backward = attention.plan_backward(&q, &k, &v, &output, &dout).expect("valid");
        let contiguous = attention.plan(&q, &k, &v).expect("valid");
        assert_eq!(plan.launches().len(), contiguous.launches().len() + 3, "{plan}");
        device.prepare(&plan).expect("the recorder loads everything");
        device.prepare(&backward).expect("the recorder loads everything");
        recorder.take();
        let workspace = |bytes: u64| foreign::<f32>(&device, 10 << 20, &[bytes as usize / 4]);
        let mut own = workspace(plan.workspace_bytes());
        (attention.forward_into_with(&q, &k, &v, &mut output, &mut own)).expect("valid");
        assert_eq!(recorder.take(), launches(&plan));
        let mut own = workspace(backward.workspace_bytes());
        (attention.backward_into_with(&q, &k, &v, &output, &dout, &mut gradients, &mut own)).expect("valid");
        assert_eq!(recorder.take(), launches(&backward));
    }
}

/// Tests that lists of work of a captured call, which another call has loaded, are not freed when later calls need room.
#[test]
fn lists_of_a_captured_call_stay() {
    for is_captured in [true, false] {
        let (device, recorder) = device(&context((8, 0)), STREAM, None);
        let at = |index: u64| foreign::<half::f16>(&device, index << 24, &[100, 2, 64]);
        let [q, k, v] = [1, 2, 3].map(at);
        let mut output = Output::new(at(4), foreign(&device, 5 << 24, &[2, 100]));
        let mut workspace = foreign::<f32>(&device, 6 << 24, &[0]);
        let mut call = |first| {
            let sequences = Sequences::new(&[0, first, 100], &[0, first, 100]).expect("offsets grow");
            let workspace = Some(&mut workspace);
            (Attention::new().forward_ragged_into(&q, &k, &v, &sequences, &mut output, workspace)).expect("valid");
        };
        call(0);
        recorder.captures.store(is_captured, Ordering::Relaxed);
        call(0);
        recorder.captures.store(false, Ordering::Relaxed);
        (1..100).for_each(&mut call);
        let first = 0x7000_0000;
        assert_eq!(lock(&recorder.freed).contains(&first), !is_captured);
    }
}

/// Tests that a step of new keys launches twice, for keys and for values, and that the next layer uploads nothing.
#[test]
fn new_keys_stay_on_the_device() {
    let (device, recorder) = device(&context((8, 0)), STREAM, None);
    let at = |index: u64, shape: &[usize]| foreign::<half::f16>(&device, index << 24, shape);
    let new = at(1, &[2, 2, 1, 64]);
    let pages = [30, 16, 2, 64];
    let rotary = Rotary::new(64, 10_000.0).expect("an even number");
    let cache =
        KvCache::paged([30, 16], &(0..30).collect::<Vec<_>>(), &[200, 17]).and_then(|cache| cache.append(&[1, 1]));
    let cache = cache.expect("room");
    let launches = [
        format!("launch [2, 1, 1] on {STREAM:#x}"),
        format!("launch [2, 1, 1] on {STREAM:#x}"),
    ];
    for layer in 0..3 {
        let (mut k, mut v) = (at(2 + 2 * layer, &pages), at(3 + 2 * layer, &pages));
        (cache.write(&NewKeys::new(&new, &new).rotary(&rotary), &mut k, &mut v)).expect("valid");
        let mut calls = recorder.take();
        if layer == 0 {
            calls.retain(|call| call.starts_with("launch"));
        }
        assert_eq!(calls, launches, "layer {layer}");
    }
}

#[test]
fn a_call_without_a_workspace_allocates_and_frees_it_in_stream_order() {
    let (device, recorder) = device(&context((9, 0)), STREAM, None);
    let ([q, k, v, dout], output, mut gradients) = tensors(&device);
    let attention = Attention::new();
    let plan = attention.plan_backward(&q, &k, &v, &output, &dout).expect("valid");
    device.prepare(&plan).expect("the recorder loads everything");
    recorder.take();
    attention
        .backward_into(&q, &k, &v, &output, &dout, &mut gradients)
        .expect("valid");
    let alloc = format!("alloc {} on {STREAM:#x}", plan.workspace_bytes());
    let mut expected = vec![alloc];
    expected.extend(launches(&plan));
    expected.push(format!("free on {STREAM:#x}"));
    // Debug builds read lse first.
    let calls = recorder.take();
    assert!(calls.ends_with(&expected), "{calls:?}");
}

#[test]
fn devices_on_streams_of_one_context_load_a_kernel_once() {
    let context = context((8, 0));
    let [first, second] = [STREAM, STREAM + 16].map(|stream| device(&context, stream, None));
    assert_ne!(first.0, second.0);
    for ((device, recorder), loads) in [(first, 1), (second, 0)] {
        let ([q, k, v, _], ..) = tensors(&device);
        let plan = Attention::new().plan(&q, &k, &v).expect("valid");
        device.prepare(&plan).expect("the recorder loads everything");
        assert_eq!(recorder.take().len(), loads);
    }
}

#[test]
fn full_memory_is_trimmed_once_and_then_an_error() {
    let (device, recorder) = device(&context((8, 0)), STREAM, None);
    recorder.full.store(1, Ordering::Relaxed);
    assert!(Tensor::<f32>::empty(&device, [4]).is_ok());
    let calls = recorder.take();
    let expected = ["alloc 16", "synchronize", "trim", "alloc 16", "free"].map(|call| format!("{call} on {STREAM:#x}"));
    assert_eq!(calls, expected);
    recorder.full.store(2, Ordering::Relaxed);
    let error = Tensor::<f32>::empty(&device, [4]).expect_err("full");
    assert!(
        matches!(&error, Error::OutOfMemory { device, requested: 16, free: Some(77) } if device == "cuda:3"),
        "{error}"
    );
}

/// An owner that records when it is dropped.
struct Owner(&'static Recorder);

impl Drop for Owner {
    fn drop(&mut self) {
        lock(&self.0.log).push("owner".to_owned());
    }
}

#[test]
fn memory_with_an_owner_is_waited_for_before_the_owner_goes() {
    let (device, recorder) = device(&context((8, 0)), STREAM, None);
    let owner: Arc<dyn Any + Send + Sync> = Arc::new(Owner(recorder));
    // SAFETY: the device never reads nor writes any memory.
    let tensor = unsafe { Tensor::<f32>::from_raw_parts(&device, 64, [4], [1], Some(owner)) }.expect("aligned");
    drop(tensor.narrow(0, 1, 2).expect("in range"));
    assert!(recorder.take().is_empty());
    drop(tensor);
    assert_eq!(
        recorder.take(),
        [format!("synchronize on {STREAM:#x}"), "owner".to_owned()]
    );
}

#[test]
fn the_owner_of_a_stream_goes_with_the_last_user_of_the_device() {
    let log: &'static Recorder = Box::leak(Box::default());
    let (device, _) = device(&context((8, 0)), STREAM, Some(Arc::new(Owner(log))));
    assert_eq!(device.cuda_stream().map(<*mut c_void>::addr), Some(STREAM));
    let tensor = Tensor::<f32>::empty(&device, [4]).expect("the recorder has memory");
    drop(device);
    assert!(log.take().is_empty());
    drop(tensor);
    assert_eq!(log.take(), ["owner"]);
}

#[test]
fn a_workspace_that_will_not_do_is_refused() {
    let (device, recorder) = device(&context((9, 0)), STREAM, None);
    let ([q, k, v, dout], output, mut gradients) = tensors(&device);
    let attention = Attention::new();
    let plan = attention.plan_backward(&q, &k, &v, &output, &dout).expect("valid");
    let words = plan.workspace_bytes() as usize / 4;
    let mut refusal = |mut workspace: Tensor<f32>| {
        attention
            .backward_into_with(&q, &k, &v, &output, &dout, &mut gradients, &mut workspace)
            .expect_err("not a workspace")
            .to_string()
    };
    let needed = 4 * words;
    let small = refusal(foreign(&device, 10 << 20, &[words - 1]));
    assert_eq!(
        small,
        format!("`workspace` has {} bytes, the plan needs {needed}", needed - 4)
    );
    let odd = refusal(foreign(&device, (10 << 20) + 32, &[words]));
    assert_eq!(odd, "`address` is 0xa00020, expected a non-null multiple of 64");
    let shared = refusal(foreign(&device, 8 << 20, &[words]));
    assert_eq!(
        shared,
        "`workspace` shares memory with `dk`, an output needs memory of its own"
    );
    let strided = foreign::<f32>(&device, 10 << 20, &[words, 2])
        .select(1, 0)
        .expect("in range");
    assert!(refusal(strided).starts_with("`workspace` has strides [2], expected [1]"));
    let other = Tensor::empty(&self::device(&context((9, 0)), STREAM, None).0, [words]).expect("memory");
    assert!(refusal(other).starts_with("`workspace` is on cuda:3, expected cuda:3"));
    assert!(recorder.take().is_empty(), "refused before anything is done");
}
