//! [`Plan`]: the kernel, the tiles, the number of blocks and the cost of a problem on a device.
//!
//! A plan is a pure function of a [`Problem`] and a [`DeviceInfo`]: it can be made, printed and tested where there is
//! no such device. Nothing else chooses anything. Its pass, [`Forward`] or [`Backward`], is in its type.

mod choose;
mod cost;
mod cpu;
mod display;
mod forward;
mod launch;
mod lists;
mod pass;
mod quantized;
mod rows;
mod tile_map;

use std::sync::Arc;

pub use flash_attention_kernels::entries::Entry;
use flash_attention_kernels::entries::{Arch, Pass};

use choose::choose;
pub use cost::Cost;
pub use cpu::CpuPath;
use forward::{Choice, statistics_written};
use launch::KeySplits;
pub(crate) use launch::Rotary;
pub use launch::{BackwardMaps, BackwardParameters, ForwardMaps, ForwardParameters, Launch, TableGradients};
#[cfg(any(feature = "cuda", feature = "emulator"))]
pub(crate) use launch::{ModuleKey, ModuleText, Template};
pub use pass::{AnyPlan, Backward, BackwardResults, Forward, ForwardResults, PassType};
use rows::{RowCopies, row_tensors};
pub use tile_map::TileMap;

use crate::error::Error;
use crate::problem::{BackwardProblem, BackwardTensors, Problem};
use crate::program::{Coordinate, Derivative};
use crate::target::DeviceInfo;

/// Largest number of blocks of one launch along x.
pub const MAX_BLOCKS: u32 = i32::MAX as u32;

/// The plan of one problem on one device, for a forward pass or, as `Plan<Backward>`, for a backward pass.
#[derive(Clone, Debug)]
pub struct Plan<P: PassType = Forward> {
    problem: Problem,
    pass: P,
    device: DeviceInfo,
    cpu: Option<CpuPath>,
    tiles: Tiles,
    launches: Vec<Launch<P>>,
    workspace_bytes: u64,
    splits: Option<KeySplits>,
    cost: Cost,
}

/// Tile sizes of a block: the unit in which memory is read and the mask is applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Number of queries that a block of a GPU, or a task of the CPU, owns; in the CPU's backward pass, number of
    /// queries that it streams at a time.
    pub block_m: u32,
    /// Number of keys that it streams at a time; in the CPU's backward pass, number of keys that a task owns.
    pub block_n: u32,
    /// Number of query heads packed into a tile: the first query of each, then the second. `block_m` counts all of
    /// them.
    pub packed_heads: u32,
    /// Number of neighbouring tiles of queries whose blocks, a cluster, load each tile of keys together, so that it is read
    /// once for all of them. 1 where each block loads its own.
    pub cluster: u32,
}

impl Plan {
    /// Plans a forward pass for a device.
    ///
    /// # Errors
    /// [`Error::NoKernel`] if the device runs no compiled kernel that serves the problem, [`Error::GridTooLarge`].
    pub fn new(problem: &Problem, device: &DeviceInfo) -> Result<Self, Error> {
        let mut cpu = None;
        let choice = match *device {
            DeviceInfo::Cpu { threads, instructions } => {
                let (path, tiles) = CpuPath::forward(problem, instructions, threads);
                cpu = Some(path);
                Choice {
                    tiles,
                    launches: Vec::new(),
                    workspace_bytes: 0,
                    splits: None,
                    cost: Cost::forward(problem, tiles, &[], statistics_written(problem)),
                }
            }
            DeviceInfo::Gpu { multiprocessors, .. } => {
                let choice = match (problem.placed(), problem.scales()) {
                    (_, Some(scales)) => quantized::forward(problem, scales, device, multiprocessors)?,
                    (Some(placed), None) => {
                        let entry = choose(problem, Pass::Forward, device, false)?;
                        forward::of_sequences(problem, placed, entry, multiprocessors)?
                    }
                    (None, None) => forward::of_rectangle(problem, device, multiprocessors)?,
                };
                choice.with_row_copies(problem)?
            }
        };
        Ok(Self {
            problem: problem.clone(),
            pass: Forward,
            device: *device,
            cpu,
            tiles: choice.tiles,
            launches: choice.launches,
            workspace_bytes: choice.workspace_bytes,
            splits: choice.splits,
            cost: choice.cost,
        })
    }

    /// Returns this plan of a forward pass as one of a batch of so many, which together have more tasks than one: on the CPU each
    /// task then takes more queries.
    pub(crate) fn in_batch(mut self, plans: usize) -> Self {
        if let DeviceInfo::Cpu { threads, instructions } = self.device {
            (_, self.tiles) = CpuPath::forward(&self.problem, instructions, threads.div_ceil(plans.max(1)));
            let statistics = statistics_written(&self.problem);
            self.cost = Cost::forward(&self.problem, self.tiles, &self.launches, statistics);
        }
        self
    }
}

impl Plan<Backward> {
    /// Plans a backward pass for a device: first delta, then the gradients, in one of two forms.
    ///
    /// In the first form, on the CPU and with the portable kernels, each element of dQ, dK and dV is one sum in a fixed
    /// order. On a GPU a kernel for dQ and another for dK and dV both compute scores, so they take seven products, or
    /// eight where dK and dV do not fit in the registers together ([`Entry::two_walks`]).
    ///
    /// In the second form, with Hopper's own kernels, one kernel takes five products. Its blocks own keys and add to dQ
    /// in f32 in the workspace: in all `4 * seqlen_q * seqlen_k * head_dim / block_n` bytes per head. The order of
    /// additions is not fixed, so the last bits of dQ differ from run to run. With `.deterministic()` each block waits
    /// for its turn, in the order of the tile scheduler. `benches/results/hopper_model.md` predicts the cost of
    /// waiting, which is not measured yet.
    ///
    /// # Errors
    /// The errors of [`Plan::new`], and on a GPU [`Error::Unsupported`] for the deterministic gradient of a table that
    /// several pairs read at one element.
    pub fn backward(problem: &BackwardProblem, device: &DeviceInfo) -> Result<Self, Error> {
        let forward = problem.forward();
        refuse_gradients(problem, device)?;
        let statistics = if problem.tensors().statistics.is_some() { 2 } else { 1 };
        let (mut cpu, mut copied) = (None, 0);
        let (tiles, launches, workspace_bytes) = match *device {
            DeviceInfo::Cpu { instructions, .. } => {
                let (path, tiles) = CpuPath::backward(forward, instructions);
                cpu = Some(path);
                (tiles, Vec::new(), problem.delta_bytes())
            }
            DeviceInfo::Gpu { multiprocessors, .. } => {
                let (tiles, mut launches, mut workspace_bytes) = backward_launches(problem, device, multiprocessors)?;
                let BackwardTensors { lse, statistics, .. } = *problem.tensors();
                let rows = row_tensors(lse, statistics);
                copied = RowCopies::before_backward(forward, rows, &mut launches, &mut workspace_bytes)?;
                (tiles, launches, workspace_bytes)
            }
        };
        Ok(Self {
            problem: forward.clone(),
            pass: Backward {
                tensors: *problem.tensors(),
                derivative: problem.derivative().cloned(),
                table_gradients: problem.table_gradients(),
            },
            device: *device,
            cpu,
            tiles,
            cost: match device {
                DeviceInfo::Cpu { .. } => Cost::cpu_backward(forward, tiles, statistics),
                DeviceInfo::Gpu { .. } => Cost::backward(forward, &launches, statistics).with_copies(copied),
            },
            launches,
            workspace_bytes,
            splits: None,
        })
    }

    /// Returns the tensors of the backward pass.
    pub(crate) fn tensors(&self) -> &BackwardTensors {
        &self.pass.tensors
    }

    /// True if the backward pass gives the gradients of the score program's tables.
    pub fn table_gradients(&self) -> bool {
        self.pass.table_gradients
    }

    /// The derivatives of the score program, if there is one. Those by tables are there if their gradients are asked
    /// for.
    pub fn derivative(&self) -> Option<&Arc<Derivative>> {
        self.pass.derivative.as_ref()
    }
}

impl<P: PassType> Plan<P> {
    /// Returns the problem that this plan was made for.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// Returns the bytes of device memory needed while the plan runs, besides inputs, results and lists of work.
    ///
    /// Forward needs them for the partial results of splits. Backward on the CPU needs one f32 per query. On a GPU it
    /// needs three f32 per query and one u32 per 16 queries. Where dQ is accumulated it needs one f32 for each of its
    /// elements, with queries in whole tiles of 64 and head_dim in whole 64s, and in deterministic mode one u32 for each
    /// 64 x 64 square.
    ///
    /// On a GPU lse, row_max and row_sum that are not contiguous `[batch, heads_q, seqlen_q]` have a contiguous copy each, behind all of
    /// that: the bytes so far, rounded up to a multiple of 16, and 4 for each query of each head.
    pub fn workspace_bytes(&self) -> u64 {
        self.workspace_bytes
    }

    /// Returns the device that this plan was made for.
    pub fn device(&self) -> &DeviceInfo {
        &self.device
    }

    /// Returns what the CPU computes the plan with; `None` on a GPU, which has [`launches`](Self::launches).
    pub fn cpu_path(&self) -> Option<&CpuPath> {
        self.cpu.as_ref()
    }

    /// Returns the tile sizes.
    pub fn tiles(&self) -> Tiles {
        self.tiles
    }

    /// Returns the kernels to launch, in order; none on the CPU.
    pub fn launches(&self) -> &[Launch<P>] {
        &self.launches
    }

    /// Returns the kernels, in the order of their launches; none on the CPU.
    pub fn entries(&self) -> impl Iterator<Item = &'static Entry> {
        self.launches.iter().map(|launch| launch.entry)
    }

    /// Returns the bytes and operations.
    pub fn cost(&self) -> Cost {
        self.cost
    }
}

/// Refuses the deterministic gradient of a table on a GPU, unless no two pairs add to one element.
fn refuse_gradients(problem: &BackwardProblem, device: &DeviceInfo) -> Result<(), Error> {
    let forward = problem.forward();
    let (Some(program), Some(derivative)) = (forward.program(), problem.derivative()) else {
        return Ok(());
    };
    let asked = matches!(device, DeviceInfo::Gpu { .. }) && problem.table_gradients() && problem.deterministic();
    let sizes = [
        (
            Coordinate::Batch,
            forward
                .placed()
                .map_or(forward.batch(), |placed| placed.sequences.len()),
        ),
        (Coordinate::Head, forward.heads_q()),
        (Coordinate::Query, forward.seqlen_q() as usize),
        (Coordinate::Key, forward.seqlen_k() as usize),
    ];
    match program.shared_gradient(derivative, sizes).filter(|_| asked) {
        Some(table) => Err(Error::Unsupported {
            feature: format!("a deterministic gradient of `{table}`"),
            device: "a GPU".to_owned(),
            reason: "several pairs add to one element, in the order in which blocks finish; leave out `.deterministic()` or \
                     `.table_gradients()`",
        }),
        None => Ok(()),
    }
}

/// Tiles, launches and bytes of workspace of a backward pass on a GPU.
type BackwardChoice = (Tiles, Vec<Launch<Backward>>, u64);

/// Makes the launches of a backward pass on a GPU, in order, and the bytes of their workspace.
fn backward_launches(
    problem: &BackwardProblem,
    device: &DeviceInfo,
    multiprocessors: u32,
) -> Result<BackwardChoice, Error> {
    let forward = problem.forward();
    if !forward.has_pairs() {
        return launches_without_pairs(problem, device);
    }
    let BackwardTensors { dout, dq, dk, dv, .. } = *problem.tensors();
    let hopper = forward.placed().is_none()
        && tile_map::fit(
            forward,
            forward.input_type(),
            &[forward.q(), dout, dq],
            &[forward.k(), forward.v(), dk, dv],
        );
    let choose = |pass| choose(forward, pass, device, hopper);
    let first = choose(Pass::BackwardPreprocess)?;
    if first.arch == Arch::Sm80 {
        let (exponents, workspace_bytes) = launch::portable_exponents(problem);
        let launches = [first, choose(Pass::BackwardDq)?, choose(Pass::BackwardDkv)?]
            .map(|entry| Launch::backward(problem, entry, exponents))
            .into_iter()
            .collect::<Result<Vec<_>, Error>>()?;
        return Ok((Tiles::of(launches[1].entry), launches, workspace_bytes));
    }
    let all = choose(Pass::BackwardDqkv)?;
    let (sums, workspace_bytes) = launch::query_sums(problem, all);
    let edge = |entry| Launch::query_sums(problem, entry, sums);
    let launches = vec![
        edge(first)?,
        Launch::hopper_backward(problem, all, sums, multiprocessors)?,
        edge(choose(Pass::BackwardPostprocess)?)?,
    ];
    Ok((Tiles::of(launches[1].entry), launches, workspace_bytes))
}

/// The portable kernels that write zeros where there are only queries, or only keys.
fn launches_without_pairs(problem: &BackwardProblem, device: &DeviceInfo) -> Result<BackwardChoice, Error> {
    let forward = problem.forward();
    let choose = |pass| choose(forward, pass, device, false);
    let (passes, (exponents, workspace_bytes)) = if forward.has_queries() {
        let passes: &[Pass] = &[Pass::BackwardPreprocess, Pass::BackwardDq];
        (passes, launch::portable_exponents(problem))
    } else if forward.has_keys() {
        (&[Pass::BackwardDkv][..], launch::exponents(0, 0))
    } else {
        (&[][..], launch::exponents(0, 0))
    };
    let launch = |&pass: &Pass| Launch::backward(problem, choose(pass)?, exponents);
    let launches = passes.iter().map(launch).collect::<Result<Vec<_>, Error>>()?;
    let tiles = Tiles::of(choose(Pass::BackwardDq)?);
    Ok((tiles, launches, workspace_bytes))
}

impl Tiles {
    fn of(entry: &Entry) -> Self {
        Self {
            block_m: entry.block_m,
            block_n: entry.block_n,
            packed_heads: 1,
            cluster: entry.cluster,
        }
    }

    /// The tiles of a kernel as the first of its launches, if there is one, takes them.
    fn of_launches(entry: &Entry, launches: &[Launch]) -> Self {
        Self {
            packed_heads: launches.first().map_or(1, Launch::packed_heads),
            ..Self::of(entry)
        }
    }
}
