//! Constants of the hardware, with their sources.

use std::fmt::Write as _;

use benches::row::Pass;

/// A constant of the hardware, with its source.
pub struct Constant(&'static str, pub f64, &'static str);

pub const MULTIPROCESSORS: Constant = Constant("multiprocessors", 132.0, "NVIDIA H100 whitepaper, SXM5");
pub const PEAK: Constant = Constant(
    "dense f16 peak, TFLOP/s",
    989.4,
    "NVIDIA H100 whitepaper, SXM5, at boost",
);
pub const TENSOR: Constant = Constant("tensor operations a clock and SM", 4096.0, "the same: 4 x 512 FMA");
pub const MATMUL: Constant = Constant(
    "matmul of random data, TFLOP/s",
    798.0,
    "measured elsewhere: bf16 8192^3, H200, power-limited",
);
pub const MUFU: Constant = Constant(
    "exponentials a clock and SM",
    16.0,
    "CUDA C++ Programming Guide, throughput table, 9.0",
);
pub const ISSUE: Constant = Constant("warp instructions a clock and SM", 4.0, "the same: 4 schedulers");
pub const SHARED: Constant = Constant(
    "shared memory, bytes a clock and SM",
    128.0,
    "the same: 32 banks of 4 bytes",
);
const HBM: Constant = Constant("device memory, TB/s", 4.3, "measured elsewhere: copy, H200");
pub const L2: Constant = Constant(
    "L2 cache, TB/s",
    5.5,
    "about that of H100 PCIe in public microbenchmarks; SXM may have more",
);
const LAUNCH: Constant = Constant("from one kernel to the next, us", 2.0, "assumed");
pub const TURN: Constant = Constant(
    "from one block's turn at a sum to the next, us",
    2.0,
    "assumed: a reduction that ends, and a flag through the L2 cache",
);

const CONSTANTS: [Constant; 11] = [
    MULTIPROCESSORS,
    PEAK,
    TENSOR,
    MATMUL,
    MUFU,
    ISSUE,
    SHARED,
    HBM,
    L2,
    LAUNCH,
    TURN,
];

/// Returns the boost clock in cycles a second.
pub fn hertz() -> f64 {
    PEAK.1 * 1e12 / (MULTIPROCESSORS.1 * TENSOR.1)
}

/// Returns the seconds of the kernels before and after a backward pass, which read and write the workspace and three tensors once.
pub fn seconds_around(pass: Pass, workspace_bytes: f64, tensor_bytes: f64) -> f64 {
    match pass {
        Pass::Forward => 0.0,
        _ => (2.0 * workspace_bytes + 3.0 * tensor_bytes) / (HBM.1 * 1e12) + 2.0 * LAUNCH.1 * 1e-6,
    }
}

/// Writes the constants as a table.
pub fn table() -> String {
    let mut text = String::from("| constant | value | source |\n| --- | --- | --- |\n");
    for Constant(name, value, source) in CONSTANTS {
        let _ = writeln!(text, "| {name} | {value} | {source} |");
    }
    text
}
