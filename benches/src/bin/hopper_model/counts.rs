//! Counts the work of a step of the main loops, by executing the PTX on the emulator.

use benches::row::Pass;
use flash_attention::device::EmulatorOptions;
use flash_attention::half::f16;
use flash_attention::plan::Entry;
use flash_attention::ptx_emulator::{Checks, Counters};
use flash_attention::{Arch, Attention, Device, Gradients, Tensor};
use flash_attention_kernels::entries;

use crate::Failure;
use crate::record::{Loop, main_loops};

/// A row of the table of speed; both sequences have the same length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    pub pass: Pass,
    pub batch: usize,
    pub heads: usize,
    pub seqlen: usize,
    pub head_dim: usize,
    pub causal: bool,
}

impl Shape {
    /// Makes a row with 16k tokens and hidden size 2048.
    pub fn of_table(pass: Pass, head_dim: usize, seqlen: usize, causal: bool) -> Self {
        let (batch, heads) = ((16384 / seqlen).max(1), (2048 / head_dim).max(1));
        Self {
            pass,
            batch,
            heads,
            seqlen,
            head_dim,
            causal,
        }
    }

    /// Returns the FLOPs as the field counts them.
    pub fn flops(&self) -> f64 {
        let full = 4.0 * (self.batch * self.heads * self.head_dim) as f64 * (self.seqlen as f64).powi(2);
        full * if self.causal { 0.5 } else { 1.0 } * if self.pass == Pass::Forward { 1.0 } else { 2.5 }
    }
}

/// Work of a call's main loops per pair of a query and a key, summed over all kernels of the call.
#[derive(Clone, Copy, Debug)]
pub struct Counts {
    pub tensor_flops: f64,
    /// Exponentials of lanes.
    pub exponentials: f64,
    /// Instructions issued by warps, including exponentials, without products.
    pub issued: f64,
    /// Bytes through shared memory: 128 for each wavefront of a warp, the bytes of bulk copies, and the operands of
    /// products.
    pub shared_bytes: f64,
}

/// Returns the products of 64 rows that one warpgroup issues in a step: columns, steps along k, and true if A is in
/// shared memory too.
pub fn products(entry: &Entry) -> Vec<(u32, u32, bool)> {
    let (d, m, n) = (entry.head_dim, entry.block_m, entry.block_n);
    let (of_queries, of_keys) = ((m, d / 16, true), (n, d / 16, true));
    match entry.pass {
        entries::Pass::Forward => vec![of_keys, (d, n / 16, false)],
        // Warpgroups share the keys of a tile's scores, and the slices of each gradient.
        entries::Pass::BackwardDqkv if d > 128 => {
            let groups = entry.threads / 128 - 1;
            let (share, slices) = ((n / groups, d / 16, true), d / 64 / groups);
            let gradient = (n, slices * m / 16, true);
            vec![share, share, gradient, gradient, (64, slices * n / 16, true)]
        }
        entries::Pass::BackwardDqkv => {
            let dq = (64, n / 16, true);
            vec![of_queries, of_queries, (d, m / 16, false), (d, m / 16, false), dq]
        }
        _ => vec![],
    }
}

/// Returns (operations, bytes of operands in shared memory) of these products per pair of a query and a key.
fn products_of_pair(entry: &Entry) -> (f64, f64) {
    let groups = (entry.threads / 128 - 1) as f64;
    let pairs = f64::from(entry.block_m * entry.block_n) / groups;
    let all = products(entry);
    let flops: u32 = all.iter().map(|&(n, steps, _)| 2 * 64 * n * 16 * steps).sum();
    let bytes: u32 = all
        .iter()
        .map(|&(n, steps, a)| steps * (n * 32 + if a { 64 * 32 } else { 0 }))
        .sum();
    (f64::from(flops) / pairs, f64::from(bytes) / pairs)
}

/// Returns the instructions other than products that warps issue per pair, and the exponentials among them, from the
/// machine code. They cannot be counted in PTX: ptxas removes moves and folds address arithmetic, and makes a predicated
/// instruction of a branch for one lane, after which the emulator runs the warp in two groups for a while.
fn issued_for_pair(entry: &Entry) -> Result<[f64; 2], Failure> {
    let loops = main_loops(entry.name)?;
    let warps = f64::from(entry.threads / 32 - 4);
    let for_pair = |of_warp: u32| f64::from(of_warp) * warps / f64::from(entry.block_m * entry.block_n);
    Ok([
        for_pair(loops.iter().map(Loop::others).sum()),
        for_pair(loops.iter().map(Loop::exponentials).sum()),
    ])
}

/// Runs a call on the emulator at two lengths of each sequence. The work that grows with the product of both is that
/// of the main loops; prologues, epilogues and the kernels around them cancel.
///
/// # Errors
/// If the emulator's products differ from those of the tiles.
pub fn measure(pass: Pass, head_dim: usize) -> Result<Counts, Failure> {
    let entries = run(pass, head_dim, 1, 1)?.1;
    let main = || entries.iter().copied().filter(|entry| !products(entry).is_empty());
    let whole = |a: usize, b: u32| a / gcd(a, b as usize) * b as usize;
    let q = main().fold(1, |length, entry| whole(length, entry.block_m));
    let k = main().fold(1, |length, entry| whole(length, entry.block_n));
    // The first tile of a loop is peeled or waits for nothing, so start from two. An odd number of tiles of queries has no clusters,
    // where blocks receive what others read.
    let runs = [(3 * q, 2 * k), (q, k), (3 * q, k), (q, 2 * k)].map(|(q, k)| run(pass, head_dim, q, k));
    let [both, neither, queries, keys] = runs.map(|run| run.map(|(counters, _)| counters));
    let (both, neither, queries, keys) = (both?, neither?, queries?, keys?);
    let pairs = (2 * q * k) as f64;
    let bilinear = |f: &dyn Fn(&Counters) -> u64| {
        (f(&both) as f64 + f(&neither) as f64 - f(&queries) as f64 - f(&keys) as f64) / pairs
    };
    let tiles = main()
        .map(products_of_pair)
        .fold((0.0, 0.0), |a, b| (a.0 + b.0, a.1 + b.1));
    let tensor_flops = bilinear(&|c| c.tensor_flops);
    if (tensor_flops / tiles.0 - 1.0).abs() > 1e-9 {
        return Err(format!(
            "{pass:?}, {head_dim}: {tensor_flops} operations a pair, {} by the tiles",
            tiles.0
        )
        .into());
    }
    let (mut issued, mut exponentials) = (0.0, 0.0);
    for entry in main() {
        let [of_all, of_exponentials] = issued_for_pair(entry)?;
        issued += of_all;
        exponentials += of_exponentials;
    }
    let bulk = bilinear(&|c| c.global_read_bytes + c.global_written_bytes);
    Ok(Counts {
        tensor_flops,
        exponentials: 32.0 * exponentials,
        issued,
        shared_bytes: tiles.1 + bulk + 128.0 * bilinear(&|c| c.shared_wavefronts),
    })
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Returns the counters of one call for a single head without a mask, and the kernels of its plan.
fn run(
    pass: Pass,
    head_dim: usize,
    seqlen_q: usize,
    seqlen_k: usize,
) -> Result<(Counters, Vec<&'static Entry>), Failure> {
    let mut options = EmulatorOptions::new(Arch::Sm90a);
    options.launch.checks = Checks::none();
    let device = Device::emulator_with(options);
    let ones =
        |seqlen: usize| Tensor::from_slice(&device, [1, 1, seqlen, head_dim], &vec![f16::ONE; seqlen * head_dim]);
    let (q, k, v) = (ones(seqlen_q)?, ones(seqlen_k)?, ones(seqlen_k)?);
    let attention = match pass {
        Pass::Deterministic => Attention::new().deterministic(),
        _ => Attention::new(),
    };
    let output = attention.forward(&q, &k, &v)?;
    let entries = if pass == Pass::Forward {
        attention.plan(&q, &k, &v)?.entries().collect()
    } else {
        device.reset_counters();
        let _: Gradients<f16> = attention.backward(&q, &k, &v, &output, &q)?;
        attention.plan_backward(&q, &k, &v, &output, &q)?.entries().collect()
    };
    Ok((device.counters().ok_or("the emulator counts")?, entries))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forward_has_an_exponential_a_pair_and_two_a_step_for_rescaling() {
        for name in ["hopper_forward_f16_d64", "hopper_forward_f16_d128"] {
            let entry = entries::ENTRIES
                .iter()
                .find(|entry| entry.name == name)
                .expect("compiled");
            let [issued, exponentials] = issued_for_pair(entry).expect("recorded");
            // 128 lanes share 64 rows.
            let of_lane = f64::from(entry.block_n / 2);
            assert_eq!(32.0 * exponentials, (of_lane + 2.0) / of_lane, "{name}");
            assert!(issued > 4.0 * exponentials, "{name}");
        }
    }
}
