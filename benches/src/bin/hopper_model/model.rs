//! Converts counts to seconds: the time of each resource, the part that the schedule exposes, and the distribution of
//! work over multiprocessors.

use std::convert::Infallible;
use std::fmt::Write as _;

use benches::row::Pass;
use flash_attention::device::DeviceInfo;
use flash_attention::half::f16;
use flash_attention::plan::{
    Backward, BackwardParameters, BackwardResults, Cost, Entry, ForwardParameters, ForwardResults, Launch, PassType,
    Plan, TableGradients, TileMap,
};
use flash_attention::problem::{BackwardInputs, BackwardProblem, Problem, TensorInfo};
use flash_attention::{Attention, Device, Dtype, Element};
use flash_attention_kernels::abi::{TensorMap, WorkList};
use flash_attention_kernels::deal::Deal;
use flash_attention_kernels::entries;
use flash_attention_kernels::mask::Mask;

use crate::Failure;
use crate::calibration;
use crate::counts::{Counts, Shape, products};
use crate::hardware::{
    self, ISSUE, L2, MATMUL, MUFU, MULTIPROCESSORS, PEAK, SHARED, TENSOR, TURN, hertz, seconds_around,
};
use crate::peer::{CALLS, Published};

/// The published calls of a pass with a full mask, to which the model is fitted.
fn fitted(pass: Pass) -> impl Iterator<Item = &'static Published> {
    CALLS.iter().filter(move |call| call.pass == pass && !call.causal)
}

/// Returns the cycles of a peer's step: on the tensor cores, of other instructions, and of the whole step as
/// published.
fn peer(call: &Published) -> [f64; 3] {
    let [m, n] = call.tile.map(f64::from);
    // Per pair one exponential, and: maximum, multiply-add, sum and half a conversion (forward), or multiply-add,
    // difference, product and two half conversions (backward). The rescaling of the output, and the path of dQ and dS
    // through shared memory, are left out.
    let others = if call.pass == Pass::Forward {
        3.5 * m * n + m * f64::from(call.head_dim)
    } else {
        4.0 * m * n
    };
    let vector = vector(m * n, (m * n + others) / 32.0);
    [call.tensor_cycles([m, n]), vector, call.step_cycles()]
}

/// Returns the cycles of instructions that are no products. Other instructions can be issued during the 8 cycles of
/// an exponential, but those of one warp depend on each other: maximum, exponentials, sum.
fn vector(exponentials: f64, issued: f64) -> f64 {
    exponentials / MUFU.1 + (issued - exponentials / 32.0) / ISSUE.1
}

/// Returns the fraction of the other instructions that no product hides: the mean over the published forward speeds.
fn exposed() -> f64 {
    let forward = fitted(Pass::Forward).map(peer);
    forward
        .map(|[tensor, vector, whole]| (whole - tensor) / vector)
        .sum::<f64>()
        / 3.0
}

/// Returns the additional cycles of a step of the five-product backward: the mean over the published speeds.
fn wait() -> f64 {
    let backward = fitted(Pass::Backward).map(peer);
    backward
        .map(|[tensor, vector, whole]| whole - tensor - exposed() * vector)
        .sum::<f64>()
        / 2.0
}

/// Prediction for a call.
#[derive(Clone, Copy, Debug)]
pub struct Prediction {
    pub tflops: f64,
    /// TFLOP/s with the replayed steps.
    pub replayed: f64,
    /// TFLOP/s with perfect overlap: the busiest resource alone.
    pub ceiling: f64,
    /// The busiest resource, and its share of the predicted time.
    pub busiest: (&'static str, f64),
    /// Steps of the longest block over the mean of all multiprocessors.
    pub imbalance: f64,
}

/// Predicts a row of the table.
///
/// # Errors
/// If the library has no plan for it.
pub fn predict(shape: &Shape, counts: &Counts) -> Result<Prediction, Failure> {
    let plan = plan(shape)?;
    let hertz = hertz();
    let MainKernel { entry, list } = &plan.main;
    let step = step_cycles(counts, f64::from(entry.block_m * entry.block_n));
    let (longest, mean) = steps_of_blocks(&plan.main, shape);
    let wait = if shape.pass == Pass::Forward { 0.0 } else { wait() };
    // The first scores, the last products and the store of a tile do not overlap: one more step.
    let mut seconds = longest * (whole_step(step) + wait) / hertz;
    let mut replayed = longest * calibration::step_cycles(entry)? / hertz;
    if shape.pass == Pass::Deterministic {
        let tiles = list.tiles_per_head.get();
        let following = if shape.causal { tiles.div_ceil(2) } else { tiles };
        let turns = f64::from(following.min(list.blocks) - 1) * TURN.1 * 1e-6;
        seconds += turns;
        replayed += turns;
    }
    let [tensor, vector, shared] = step.map(|cycles| mean * cycles / hertz);
    let cost = plan.cost;
    let limits = [
        ("tensor cores", tensor),
        ("issue and MUFU", vector),
        ("shared memory", shared),
        ("L2", (cost.bytes_read + cost.bytes_written) as f64 / (L2.1 * 1e12)),
    ];
    let tensor = (shape.batch * shape.heads * shape.seqlen * shape.head_dim * 2) as f64;
    let around = seconds_around(shape.pass, plan.workspace_bytes as f64, tensor);
    let busiest = limits
        .into_iter()
        .fold(("", 0.0), |most, limit| if limit.1 > most.1 { limit } else { most });
    let [seconds, replayed] = [seconds, replayed].map(|seconds| seconds.max(limits[3].1) + around);
    Ok(Prediction {
        tflops: shape.flops() / seconds / 1e12,
        replayed: shape.flops() / replayed / 1e12,
        ceiling: shape.flops() / busiest.1 / 1e12,
        busiest: (busiest.0, busiest.1 / seconds),
        imbalance: longest / mean,
    })
}

/// Returns the cycles of a step of `pairs` on the tensor cores, of other instructions (the busiest of their pipes),
/// and of shared memory.
fn step_cycles(counts: &Counts, pairs: f64) -> [f64; 3] {
    [
        counts.tensor_flops / TENSOR.1,
        vector(counts.exponentials, counts.issued),
        counts.shared_bytes / SHARED.1,
    ]
    .map(|cycles| cycles * pairs)
}

/// Returns the cycles of a step: its products and the exposed part of the rest, but at least the time of each
/// resource, where the tensor cores run at the rate that the power limit allows.
fn whole_step([tensor, vector, shared]: [f64; 3]) -> f64 {
    (tensor + exposed() * vector)
        .max(tensor * PEAK.1 / MATMUL.1)
        .max(vector)
        .max(shared)
}

/// Returns the steps of the longest block, with one more for each of its tiles, and the mean of all blocks without
/// these.
fn steps_of_blocks(MainKernel { entry, list }: &MainKernel, shape: &Shape) -> (f64, f64) {
    let owns_keys = entry.pass != entries::Pass::Forward;
    let (own, streamed) = if owns_keys {
        (entry.block_n, entry.block_m)
    } else {
        (entry.block_m, entry.block_n)
    };
    let length = shape.seqlen as u32;
    let steps = |tile: u32| {
        let own = own * entry.cluster;
        let (first, rows) = (tile * own, own.min(length - tile * own));
        let blocks = match (owns_keys, shape.causal) {
            (false, false) => Mask::<false>::new(length, length).key_blocks(first, rows, streamed),
            (false, true) => Mask::<true>::new(length, length).key_blocks(first, rows, streamed),
            (true, false) => Mask::<false>::new(length, length).query_blocks(first, rows, streamed),
            (true, true) => Mask::<true>::new(length, length).query_blocks(first, rows, streamed),
        };
        f64::from(blocks.end - blocks.begin)
    };
    let busy: Vec<f64> = (0..list.blocks)
        .map(|block| {
            let whole = |deal: Deal| steps(deal.tile) + 1.0;
            match (shape.causal, owns_keys) {
                (false, _) => list.deal::<false, false>(block).map(whole).sum(),
                (true, false) => list.deal::<true, false>(block).map(whole).sum(),
                (true, true) => list.deal::<true, true>(block).map(whole).sum(),
            }
        })
        .collect();
    // A tile of the list is one for each block of a cluster. Without a mask all have as many steps.
    let all: f64 = (0..list.tiles_per_head.get()).map(steps).sum::<f64>() * f64::from(list.heads * entry.cluster);
    (busy.into_iter().fold(0.0, f64::max), all / MULTIPROCESSORS.1)
}

/// A kernel with products, and the tiles that its blocks share.
struct MainKernel {
    entry: &'static Entry,
    list: WorkList,
}

/// Numbers of a plan that the model needs.
struct Planned {
    main: MainKernel,
    cost: Cost,
    workspace_bytes: u64,
}

impl Planned {
    fn new<P: PassType>(
        plan: &Plan<P>,
        work_list: impl Fn(&Launch<P>) -> Result<WorkList, Failure>,
    ) -> Result<Self, Failure> {
        let launch = plan
            .launches()
            .iter()
            .find(|launch| !products(launch.entry).is_empty())
            .ok_or("no kernel of the plan multiplies")?;
        let (entry, list) = (launch.entry, work_list(launch)?);
        Ok(Self {
            main: MainKernel { entry, list },
            cost: plan.cost(),
            workspace_bytes: plan.workspace_bytes(),
        })
    }
}

/// Stands for a tensor map, which the model does not read.
fn no_map(_: &TileMap) -> Result<TensorMap, Infallible> {
    Ok(TensorMap([0; 16]))
}

fn not_hoppers(entry: &Entry) -> Failure {
    format!("{} is no kernel for Hopper", entry.name).into()
}

fn forward_work(launch: &Launch) -> Result<WorkList, Failure> {
    let results = ForwardResults {
        out: 0,
        lse: 0,
        statistics: None,
        workspace: 0,
    };
    match launch.params(results, no_map)? {
        ForwardParameters::Hopper(params, _) => Ok(params.work),
        _ => Err(not_hoppers(launch.entry)),
    }
}

fn backward_work(launch: &Launch<Backward>) -> Result<WorkList, Failure> {
    let results = BackwardResults {
        dq: 0,
        dk: 0,
        dv: 0,
        workspace: 0,
        tables: TableGradients::default(),
    };
    match launch.params(results, no_map)? {
        BackwardParameters::Hopper(params, _) => Ok(params.work),
        _ => Err(not_hoppers(launch.entry)),
    }
}

/// Makes the library's plan for a row on a Hopper GPU, over tensors without memory.
fn plan(shape: &Shape) -> Result<Planned, Failure> {
    let hopper = DeviceInfo::gpu((9, 0), MULTIPROCESSORS.1 as u32, 227 * 1024);
    let device = Device::cpu();
    let tensor =
        |index: u64, dtype: Dtype, shape: &[usize]| TensorInfo::contiguous(device.id(), dtype, shape, index << 40);
    let dims = [shape.batch, shape.heads, shape.seqlen, shape.head_dim];
    let infos = (1..6)
        .map(|index| tensor(index, f16::DTYPE, &dims))
        .collect::<Result<Vec<_>, _>>()?;
    let [q, k, v, out, dout] = &infos[..] else {
        return Err("five tensors".into());
    };
    let lse = tensor(6, Dtype::F32, &dims[..3])?;
    let attention = if shape.causal {
        Attention::new().causal()
    } else {
        Attention::new()
    };
    match shape.pass {
        Pass::Forward => {
            let problem = Problem::new(&attention, q, k, v, None)?;
            Planned::new(&Plan::new(&problem, &hopper)?, forward_work)
        }
        Pass::Backward | Pass::Deterministic => {
            let attention = if shape.pass == Pass::Backward {
                attention
            } else {
                attention.deterministic()
            };
            let above = BackwardInputs::new(out, &lse, dout);
            let problem = BackwardProblem::new(&attention, q, k, v, above, None)?;
            Planned::new(&Plan::backward(&problem, &hopper)?, backward_work)
        }
    }
}

/// Describes the constants and the quality of the fit.
pub fn about() -> String {
    let mut text = hardware::table();
    let _ = writeln!(
        text,
        "\nFitted: {:.3} of other instructions exposed, {:.0} cycles of waiting a step of five products.\n",
        exposed(),
        wait()
    );
    text += "| FA3, 16k, full | published | by the fit |\n| --- | --- | --- |\n";
    for call in [Pass::Forward, Pass::Backward].into_iter().flat_map(fitted) {
        let [tensor, vector, _] = peer(call);
        let wait = if call.pass == Pass::Backward { wait() } else { 0.0 };
        let fit = call.speed(tensor + exposed() * vector + wait);
        let _ = writeln!(
            text,
            "| {} {} | {} | {fit:.0} |",
            call.pass.title(),
            call.head_dim,
            call.tflops()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_by_hand() {
        // 64 x 64 pairs at head_dim 64, forward: each has 4 x 64 operations, one exponential and 1/8 of an
        // instruction.
        let counts = Counts {
            tensor_flops: 256.0,
            exponentials: 1.0,
            issued: 0.125,
            shared_bytes: 1.0,
        };
        let step = step_cycles(&counts, 4096.0);
        assert_eq!(step, [256.0, 256.0 + 96.0, 32.0]);
        assert_eq!(whole_step(step), 256.0 + exposed() * 352.0);
        // A step is never faster than shared memory, nor than its matrix products.
        assert_eq!(whole_step([256.0, 0.0, 900.0]), 900.0);
        assert_eq!(whole_step([798.0, 0.0, 0.0]), 989.4);
    }

    #[test]
    fn tiles_are_dealt_out_as_the_kernels_take_them() {
        let shape = |causal| Shape {
            pass: Pass::Forward,
            batch: 1,
            heads: 1,
            seqlen: 1024,
            head_dim: 128,
            causal,
        };
        let steps = |causal| {
            let plan = plan(&shape(causal)).expect("planned");
            steps_of_blocks(&plan.main, &shape(causal))
        };
        // 8 tiles of 128 queries, one a block of threads; 6 blocks of 176 keys, or under a causal mask 8 of 128.
        assert_eq!(steps(false), (7.0, 48.0 / 132.0));
        assert_eq!(steps(true), (9.0, 36.0 / 132.0));
    }
}
