//! Runs of plans that were made for given tensors, with the tensors locked against other threads.

use std::sync::{RwLockReadGuard, RwLockWriteGuard};

use crate::device::{Device, Run};
use crate::element::Element;
use crate::error::Error;
use crate::features;
use crate::layout::contiguous_strides;
use crate::output::{Gradients, Output, Statistics};
use crate::plan::{self, BackwardResults, ForwardResults, Launch, PassType, Plan, Rotary, TableGradients};
use crate::problem::Named;
use crate::program::TableSource;
use crate::progress::Reporter;
use crate::tensor::{Storage, Tensor};
use crate::trace;

/// Alignment of a workspace's address in bytes, which is that of all memory that a device allocates.
const WORKSPACE_ALIGN: usize = 64;

/// In debug builds, refuses an lse that no forward pass over finite numbers writes.
pub(crate) fn check_lse(lse: &Tensor<f32>) -> Result<(), Error> {
    if cfg!(debug_assertions)
        && let Some(index) = lse.to_vec()?.iter().position(|x| x.is_nan())
    {
        return Err(Error::NotANumber { argument: "lse", index });
    }
    Ok(())
}

/// q, k and v with their names.
pub(crate) fn named<T: Element>([q, k, v]: [&Tensor<T>; 3]) -> [Named<'_>; 3] {
    [("q", q.info()), ("k", k.info()), ("v", v.info())]
}

/// All tensors of a backward pass but its workspace, with their names: q first, the gradients last.
pub(crate) fn backward_arguments<'a, T: Element>(
    inputs: [&'a Tensor<T>; 3],
    output: &'a Output<T>,
    dout: &'a Tensor<T>,
    gradients: &'a Gradients<T>,
) -> Vec<Named<'a>> {
    let mut arguments = named(inputs).to_vec();
    arguments.extend(output.named());
    arguments.push(("dout", dout.info()));
    arguments.extend(gradients.named());
    arguments
}

/// Refuses memory that cannot be the workspace of these plans beside the other arguments, the first of which is q. A new workspace is
/// always right.
pub(crate) fn check_workspace<'a, P: PassType + 'a>(
    workspace: Option<&Tensor<f32>>,
    plans: impl IntoIterator<Item = &'a Plan<P>>,
    others: &[Named<'_>],
) -> Result<(), Error> {
    let Some(workspace) = workspace.map(Tensor::info) else {
        return Ok(());
    };
    let argument = "workspace";
    if workspace.device() != others[0].1.device() {
        return Err(Error::DeviceMismatch {
            argument,
            got: workspace.device().to_string(),
            other: others[0].0,
            expected: others[0].1.device().to_string(),
        });
    }
    if !workspace.is_contiguous() {
        return Err(Error::NotContiguous {
            argument,
            strides: workspace.strides().to_vec(),
            expected: contiguous_strides(workspace.shape()),
        });
    }
    let (bytes, mut needed) = (workspace.span_bytes() as u64, 0_u64);
    for plan in plans {
        needed = needed.next_multiple_of(WORKSPACE_ALIGN as u64) + plan.workspace_bytes();
        if let Some(table) = tables_of(plan).find(|table| workspace.shares_bytes_with(&table.info())) {
            return Err(Error::Aliased {
                argument,
                other: table.name,
            });
        }
    }
    if bytes < needed {
        return Err(Error::Workspace { bytes, needed });
    }
    let (address, align) = (workspace.address(), WORKSPACE_ALIGN);
    if !address.is_multiple_of(align as u64) {
        return Err(Error::Address { address, align });
    }
    match others.iter().find(|(_, other)| workspace.shares_bytes_with(other)) {
        Some(&(other, _)) => Err(Error::Aliased { argument, other }),
        None => Ok(()),
    }
}

/// The caller's workspace, or else a new one of so many bytes, which lives in `ours`.
fn workspace_of<'a>(
    theirs: Option<&'a mut Tensor<f32>>,
    ours: &'a mut Option<Tensor<f32>>,
    device: &Device,
    bytes: u64,
) -> Result<&'a Tensor<f32>, Error> {
    match theirs {
        Some(workspace) => Ok(workspace),
        None => Ok(ours.insert(Tensor::empty(device, [bytes as usize / size_of::<f32>()])?)),
    }
}

/// Bytes of a plan's part of a workspace that plans share.
fn aligned_bytes(plan: &Plan<impl PassType>) -> u64 {
    plan.workspace_bytes().next_multiple_of(WORKSPACE_ALIGN as u64)
}

/// Runs a forward plan that was made for exactly the tensors of these inputs and results, in a new workspace or in a checked one.
pub(super) fn forward<T: Element>(
    plan: &Plan,
    (device, inputs): (&Device, &[&Storage]),
    output: &mut Output<T>,
    workspace: Option<&mut Tensor<f32>>,
    reporter: Reporter<'_>,
) -> Result<(), Error> {
    let _span = trace::enter(plan, device);
    let mut ours = None;
    let workspace = workspace_of(workspace, &mut ours, device, plan.workspace_bytes())?;
    let mut memory = Memory::default();
    memory.written.push(workspace.storage());
    let results = memory.of_forward(plan, inputs, output, workspace.address());
    let guards = memory.lock();
    // SAFETY: the plan's problem was proven from the descriptions of the inputs, and of the outputs or, for new
    // outputs, from the contiguous layout with which they were allocated. All are borrowed for the call and on one
    // device, the outputs overlap nothing, and the guards keep out other threads. The workspace has the plan's size. One of ours
    // is freed when the call returns, and a device frees memory only after the work launched before has finished.
    let result = unsafe { device.backend().run(Run::Forward(plan, results), &reporter) };
    drop(guards);
    ended(result, reporter)
}

/// A forward plan of a batch, its inputs and its results.
pub(crate) type Forward<'a, T> = (Plan, [&'a Tensor<T>; 3], &'a Output<T>);

/// Runs forward plans of one batch, each of which was made for exactly its tensors. No two results share memory.
pub(crate) fn forward_batch<T: Element>(device: &Device, calls: &[Forward<'_, T>]) -> Result<(), Error> {
    let (mut memory, mut runs) = (Memory::default(), Vec::new());
    for (plan, inputs, output) in calls {
        let results = memory.of_forward(plan, &inputs.map(Tensor::storage), output, 0);
        runs.push(Run::Forward(plan, results));
    }
    let _spans: Vec<_> = calls.iter().map(|(plan, ..)| trace::enter(plan, device)).collect();
    let guards = memory.lock();
    // SAFETY: the reasons given in `forward`, of each call; the results are views of different parts of the batch's.
    let result = unsafe { device.backend().run_batch(&runs, &Reporter::silent()) };
    drop(guards);
    result
}

/// A backward plan of a batch, its inputs q, k, v, out and dout, the results of forward, and its gradients.
pub(crate) type Backward<'a, T> = (
    Plan<plan::Backward>,
    [&'a Tensor<T>; 5],
    &'a Output<T>,
    &'a Gradients<T>,
);

/// Runs backward plans of one batch without gradients of tables, each of which was made for exactly its tensors. No two
/// results share memory. The workspace is new, or one that [`check_workspace`] let pass.
pub(crate) fn backward_batch<T: Element>(
    device: &Device,
    calls: &[Backward<'_, T>],
    workspace: Option<&mut Tensor<f32>>,
) -> Result<(), Error> {
    let mut ours = None;
    let workspace = workspace_of(
        workspace,
        &mut ours,
        device,
        calls.iter().map(|(plan, ..)| aligned_bytes(plan)).sum(),
    )?;
    let (mut memory, mut runs) = (Memory::default(), Vec::new());
    memory.written.push(workspace.storage());
    let mut place = workspace.address();
    for (plan, inputs, output, gradients) in calls {
        let own = (place, TableGradients::default());
        let results = memory.of_backward(plan, *inputs, output, gradients, own);
        runs.push(Run::Backward(plan, results));
        place += aligned_bytes(plan);
    }
    let _spans: Vec<_> = calls.iter().map(|(plan, ..)| trace::enter(plan, device)).collect();
    let guards = memory.lock();
    // SAFETY: the reasons given in `backward`, of each call; the results are views of different parts of the batch's, and
    // each plan has its own part of the workspace.
    let result = unsafe { device.backend().run_batch(&runs, &Reporter::silent()) };
    drop(guards);
    result
}

/// Runs a backward plan that was made for exactly these tensors, in a new workspace or in a checked one.
pub(super) fn backward<T: Element>(
    plan: &Plan<plan::Backward>,
    inputs: [&Tensor<T>; 5],
    output: &Output<T>,
    gradients: &mut Gradients<T>,
    workspace: Option<&mut Tensor<f32>>,
    reporter: Reporter<'_>,
) -> Result<(), Error> {
    let device = inputs[0].device();
    let _span = trace::enter(plan, device);
    let mut ours = None;
    let workspace = workspace_of(workspace, &mut ours, device, plan.workspace_bytes())?;
    let program = plan.problem().program();
    let tables = match program {
        Some(program) if plan.table_gradients() => gradients.make_tables(program)?,
        _ => TableGradients::default(),
    };
    let mut memory = Memory::default();
    memory.written.push(workspace.storage());
    let results = memory.of_backward(plan, inputs, output, gradients, (workspace.address(), tables));
    let guards = memory.lock();
    // SAFETY: the reasons given in `forward`; the workspace has the plan's size. A workspace of ours is freed when
    // the call returns, and a device frees memory only after the work launched before has finished.
    let result = unsafe { device.backend().run(Run::Backward(plan, results), &reporter) };
    drop(guards);
    ended(result, reporter)
}

/// Moves tokens between two tensors, which share no memory, as a launch that was made for them describes it.
pub(crate) fn move_tokens<T: Element>(launch: &Launch<Rotary>, from: &Tensor<T>, to: &Tensor<T>) -> Result<(), Error> {
    let mut memory = Memory::default();
    memory.read.push(from.storage());
    memory.written.push(to.storage());
    let _guards = memory.lock();
    // SAFETY: the caller took the launch's rows from the tensors and checked the positions. Both tensors are borrowed for the call
    // and share no memory, and the guards keep out other threads.
    unsafe { from.device().backend().move_tokens(launch) }
}

/// Reports the end of a call, after its tensors were unlocked.
fn ended(result: Result<(), Error>, reporter: Reporter<'_>) -> Result<(), Error> {
    match result {
        Ok(()) => reporter.end(),
        Err(_) => reporter.abandon(),
    }
    result
}

/// Memory that calls read and write.
#[derive(Default)]
struct Memory<'a> {
    read: Vec<&'a Storage>,
    written: Vec<&'a Storage>,
}

impl<'a> Memory<'a> {
    /// Adds the memory of a forward pass, except its workspace, and returns the addresses of its results.
    fn of_forward<T: Element>(
        &mut self,
        plan: &'a Plan,
        inputs: &[&'a Storage],
        Output { out, lse, statistics }: &'a Output<T>,
        workspace: u64,
    ) -> ForwardResults {
        let statistics = statistics
            .as_ref()
            .map(|Statistics { row_max, row_sum }| [row_max, row_sum]);
        self.read.extend(inputs);
        self.read.extend(tables_of(plan).map(features::storage));
        self.written.extend([out.storage(), lse.storage()]);
        self.written
            .extend(statistics.into_iter().flatten().map(Tensor::storage));
        ForwardResults {
            out: out.address(),
            lse: lse.address(),
            statistics: statistics.map(|tensors| tensors.map(Tensor::address)),
            workspace,
        }
    }

    /// Adds the memory of a backward pass, except its workspace, and returns the addresses of its results.
    fn of_backward<T: Element>(
        &mut self,
        plan: &'a Plan<plan::Backward>,
        inputs: [&'a Tensor<T>; 5],
        output: &'a Output<T>,
        gradients: &'a Gradients<T>,
        (workspace, tables): (u64, TableGradients),
    ) -> BackwardResults {
        self.read.extend(inputs.map(Tensor::storage));
        self.read.push(output.lse.storage());
        if let Some(Statistics { row_max, row_sum }) = &output.statistics {
            self.read.extend([row_max, row_sum].map(Tensor::storage));
        }
        self.read.extend(tables_of(plan).map(features::storage));
        let Gradients { dq, dk, dv, .. } = gradients;
        self.written.extend([dq, dk, dv].map(Tensor::storage));
        let of_tables = gradients.tables.iter().map(|(_, gradient)| gradient.storage());
        self.written.extend(of_tables);
        BackwardResults {
            dq: dq.address(),
            dk: dk.address(),
            dv: dv.address(),
            workspace,
            tables,
        }
    }

    /// Locks each storage once, for writing if it belongs to an output. It locks in the order of addresses, so that
    /// two calls cannot wait for each other.
    fn lock(&self) -> Guards<'a> {
        let written = self.written.iter().map(|&storage| (storage, true));
        let read = self.read.iter().map(|&storage| (storage, false));
        let mut storages: Vec<(&Storage, bool)> = written.chain(read).collect();
        storages.sort_by_key(|&(storage, written)| (std::ptr::from_ref(storage).addr(), !written));
        storages.dedup_by(|(later, _), (earlier, _)| std::ptr::eq(*later, *earlier));
        let mut guards = Guards::default();
        for (storage, written) in storages {
            if written {
                guards._write.push(storage.write());
            } else {
                guards._read.push(storage.read());
            }
        }
        guards
    }
}

/// The tables that a plan's program reads.
fn tables_of(plan: &Plan<impl PassType>) -> impl Iterator<Item = &TableSource> {
    let program = plan.problem().program().into_iter();
    program.flat_map(|program| program.tables().iter().chain(program.sinks()))
}

/// Guards that keep other threads from writing storages, or from reading storages that are being written.
#[derive(Default)]
struct Guards<'a> {
    _read: Vec<RwLockReadGuard<'a, ()>>,
    _write: Vec<RwLockWriteGuard<'a, ()>>,
}
