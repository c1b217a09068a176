//! Speed on an elementwise kernel (y = a x + y over a million floats), on one host thread.
//!
//! The item count is thread instructions, so the printed throughput is the number in the README.

use divan::Bencher;
use divan::counter::ItemsCount;
use ptx_emulator::{Checks, DeviceMemory, Launch, Module, Options};

const N: u32 = 1 << 20;
/// Instructions every thread executes.
const PER_THREAD: u32 = 17;

const SAXPY: &str = "
.version 7.0
.target sm_80
.address_size 64
.visible .entry saxpy(.param .u64 x, .param .u64 y, .param .f32 a, .param .u32 n) {
    .reg .b32 %r<6>;
    .reg .f32 %f<6>;
    .reg .b64 %rd<6>;
    .reg .pred %p<2>;
    ld.param.u64 %rd1, [x];
    ld.param.u64 %rd4, [y];
    ld.param.f32 %f1, [a];
    ld.param.u32 %r5, [n];
    mov.u32 %r1, %tid.x;
    mov.u32 %r2, %ctaid.x;
    mov.u32 %r3, %ntid.x;
    mad.lo.s32 %r4, %r2, %r3, %r1;
    setp.ge.u32 %p1, %r4, %r5;
    @%p1 bra DONE;
    mul.wide.u32 %rd2, %r4, 4;
    add.s64 %rd3, %rd1, %rd2;
    add.s64 %rd5, %rd4, %rd2;
    ld.global.f32 %f2, [%rd3];
    ld.global.f32 %f4, [%rd5];
    fma.rn.f32 %f3, %f2, %f1, %f4;
    st.global.f32 [%rd5], %f3;
DONE:
    ret;
}";

fn main() {
    divan::main();
}

fn saxpy(bencher: Bencher, checks: Checks) {
    let module = Module::parse(SAXPY, "saxpy.ptx").expect("the kernel parses");
    let memory = DeviceMemory::new();
    let [x, y] = [0; 2].map(|_| memory.alloc(4 * N as usize).expect("memory"));
    for ptr in [x, y] {
        memory.write(ptr, &vec![0; 4 * N as usize]).expect("a copy");
    }
    let mut params = Vec::new();
    params.extend(x.0.to_le_bytes());
    params.extend(y.0.to_le_bytes());
    params.extend(2f32.to_le_bytes());
    params.extend(N.to_le_bytes());
    let launch = Launch {
        entry: "saxpy",
        grid: [N / 256, 1, 1],
        block: [256, 1, 1],
        cluster: [1, 1, 1],
        shared_bytes: 0,
        params: &params,
    };
    let options = Options {
        checks,
        threads: Some(1),
        ..Options::default()
    };
    bencher
        .counter(ItemsCount::new(N * PER_THREAD))
        .bench(|| module.launch(&memory, &launch, &options).expect("it runs"));
}

#[divan::bench(sample_count = 5)]
fn all_checks(bencher: Bencher) {
    saxpy(bencher, Checks::all());
}

#[divan::bench(sample_count = 5)]
fn no_checks(bencher: Bencher) {
    saxpy(bencher, Checks::none());
}
