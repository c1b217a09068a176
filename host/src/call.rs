//! Calls of [`Attention`] and of [`Reporting`]: they make plans and run them.

use std::sync::{RwLockReadGuard, RwLockWriteGuard};

use crate::element::Element;
use crate::error::Error;
use crate::features;
use crate::layout::{TensorInfo, contiguous_strides};
use crate::options::Attention;
use crate::output::{Gradients, Output, Statistics};
use crate::plan::{Plan, Results, TableGradients};
use crate::problem::{BackwardInputs, BackwardProblem, GradientOutputs, Outputs, Problem};
use crate::progress::{Progress, Reporter};
use crate::tensor::{Storage, Tensor};
use crate::trace;

/// Alignment of a workspace's address in bytes, which is that of all memory that a device allocates.
const WORKSPACE_ALIGN: usize = 64;

/// An [`Attention`] whose calls report progress, made by [`Attention::on_progress`].
#[derive(Clone, Debug)]
pub struct Reporting<F> {
    attention: Attention,
    /// Callback for progress; `None` discards reports.
    report: Option<F>,
}

impl Attention {
    /// Returns this attention with calls that report progress to `report`.
    ///
    /// ```
    /// # use flash_attention::{Attention, Device, Tensor};
    /// # let q = Tensor::from_slice(&Device::cpu(), [1, 1, 64, 8], &[0.5_f32; 512])?;
    /// # let (k, v) = (q.clone(), q.clone());
    /// let attention = Attention::new().on_progress(|progress| {
    ///     eprint!("\r{:3.0} %", 100.0 * progress.fraction());
    /// });
    /// let output = attention.forward(&q, &k, &v)?;
    /// # Ok::<(), flash_attention::Error>(())
    /// ```
    ///
    /// The CPU and the emulator report. A GPU, where a call returns once its work is launched, does not. A call that
    /// succeeds reports at least once. `done` grows from one report to the next, which come at most a hundred times a
    /// second. It equals `total` only in the last report, which comes when the results are complete. A call that
    /// fails may report, but never its end.
    ///
    /// `report` runs on the thread that has just finished a unit of work, never on two threads at a time for one
    /// call, and the other threads do not wait for it. Until the last report it must not read or write the results,
    /// which are locked. If it panics, the call does the rest of its work without reports, and then the panic
    /// continues on the calling thread. Results are the same bits with and without reports.
    pub fn on_progress<F: Fn(Progress) + Sync>(self, report: F) -> Reporting<F> {
        Reporting {
            attention: self,
            report: Some(report),
        }
    }

    /// Runs the forward pass. The results are new contiguous tensors on the inputs' device.
    ///
    /// q is `[batch, heads_q, seqlen_q, head_dim]`; k and v are `[batch, heads_kv, seqlen_k, head_dim]`, and each of
    /// their heads serves `heads_q / heads_kv` query heads. All strides but the last are free. On a GPU the call
    /// returns once the work is launched; reading a result waits for it.
    ///
    /// ```compile_fail
    /// # use flash_attention::{Attention, Device, Tensor};
    /// # let device = Device::cpu();
    /// let q = Tensor::from_slice(&device, [1, 1, 1, 8], &[0.0_f32; 8])?;
    /// let k = Tensor::from_slice(&device, [1, 1, 1, 8], &[half::f16::ZERO; 8])?;
    /// Attention::new().forward(&q, &k, &k)?; // tensors of two dtypes: does not compile
    /// # Ok::<(), flash_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// The errors of [`Problem::new`] and [`Plan::new`], before anything is allocated; then [`Error::OutOfMemory`]
    /// and the errors of the launch.
    pub fn forward<T: Element>(&self, q: &Tensor<T>, k: &Tensor<T>, v: &Tensor<T>) -> Result<Output<T>, Error> {
        self.silent().forward(q, k, v)
    }

    /// Runs the forward pass and writes the results to the caller's tensors: `out` with a contiguous last axis and
    /// any other strides that do not overlap, `lse` contiguous. Neither may share memory with an input.
    ///
    /// # Errors
    /// The errors of [`forward`](Self::forward). Nothing has been written then, unless the device failed.
    pub fn forward_into<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        out: &mut Tensor<T>,
        lse: &mut Tensor<f32>,
    ) -> Result<(), Error> {
        self.silent().forward_into(q, k, v, out, lse)
    }

    /// Runs the forward pass and writes the results to an output of the caller's tensors: `out` and `lse` with the
    /// layouts of [`forward_into`](Self::forward_into) and, if the output has statistics, `row_max` and `row_sum`
    /// with the layout of lse.
    ///
    /// # Errors
    /// The errors of [`forward_into`](Self::forward_into).
    pub fn forward_into_output<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &mut Output<T>,
    ) -> Result<(), Error> {
        self.silent().forward_into_output(q, k, v, output)
    }

    /// Returns the plan of [`forward`](Self::forward): kernel, tiles, grid and cost. Allocates nothing.
    ///
    /// # Errors
    /// The errors of [`Problem::new`] and [`Plan::new`].
    pub fn plan<T: Element>(&self, q: &Tensor<T>, k: &Tensor<T>, v: &Tensor<T>) -> Result<Plan, Error> {
        Plan::new(
            &Problem::new(self, q.info(), k.info(), v.info(), None)?,
            &q.device().info(),
        )
    }

    /// Runs the backward pass: computes the gradients of q, k and v, in new contiguous tensors, from the output of
    /// [`forward`](Self::forward) and its gradient. Scores are recomputed from q, k and lse. Besides the results it
    /// allocates [`Plan::workspace_bytes`].
    ///
    /// Debug builds refuse an lse that holds NaN, and on a GPU wait for the lse to check it. In release builds the
    /// gradients that depend on it become NaN.
    ///
    /// # Errors
    /// The errors of [`BackwardProblem::new`] and [`Plan::backward`], before anything is allocated; then
    /// [`Error::OutOfMemory`] and the errors of the launch.
    pub fn backward<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &Output<T>,
        dout: &Tensor<T>,
    ) -> Result<Gradients<T>, Error> {
        self.silent().backward(q, k, v, output, dout)
    }

    /// Runs the backward pass and writes the results to the caller's tensors, which have a contiguous last axis, any
    /// other strides that do not overlap, and no memory shared with an input or with each other.
    ///
    /// # Errors
    /// The errors of [`backward`](Self::backward). Nothing has been written then, unless the device failed.
    pub fn backward_into<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &Output<T>,
        dout: &Tensor<T>,
        gradients: &mut Gradients<T>,
    ) -> Result<(), Error> {
        self.silent().backward_into(q, k, v, output, dout, gradients)
    }

    /// Runs [`backward_into`](Self::backward_into) in a workspace of the caller: any contiguous f32 tensor of at
    /// least [`Plan::workspace_bytes`], at an address that is a multiple of 64, which shares no memory with another
    /// argument. Its content is undefined before and after.
    ///
    /// The call allocates nothing, but for gradients of tables where they are asked for, and, on a GPU, waits for
    /// nothing, so that a stream it works on can be captured in a CUDA graph. An lse that holds a NaN is not refused.
    ///
    /// ```
    /// # use flash_attention::{Attention, Device, Tensor};
    /// # let device = Device::cpu();
    /// # let q = Tensor::from_slice(&device, [1, 1, 64, 8], &[0.5_f32; 512])?;
    /// # let (k, v, dout) = (q.clone(), q.clone(), q.clone());
    /// let attention = Attention::new().causal();
    /// let output = attention.forward(&q, &k, &v)?;
    /// let mut gradients = attention.backward(&q, &k, &v, &output, &dout)?;
    /// let bytes = attention.plan_backward(&q, &k, &v, &output, &dout)?.workspace_bytes();
    /// let mut workspace = Tensor::empty(&device, [bytes as usize / 4])?;
    /// for _ in 0..3 {
    ///     attention.backward_into_with(&q, &k, &v, &output, &dout, &mut gradients, &mut workspace)?;
    /// }
    /// # Ok::<(), flash_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// The errors of [`backward_into`](Self::backward_into). [`Error::Workspace`] if the workspace is too small.
    /// [`Error::NotContiguous`], [`Error::DeviceMismatch`], [`Error::Address`] or [`Error::Aliased`] if it breaks
    /// another of these conditions.
    #[expect(clippy::too_many_arguments, reason = "five inputs, the results, and the workspace")]
    pub fn backward_into_with<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &Output<T>,
        dout: &Tensor<T>,
        gradients: &mut Gradients<T>,
        workspace: &mut Tensor<f32>,
    ) -> Result<(), Error> {
        self.silent()
            .backward_into_with(q, k, v, output, dout, gradients, workspace)
    }

    /// Returns the plan of [`backward`](Self::backward). Allocates nothing.
    ///
    /// # Errors
    /// The errors of [`BackwardProblem::new`] and [`Plan::backward`].
    pub fn plan_backward<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &Output<T>,
        dout: &Tensor<T>,
    ) -> Result<Plan, Error> {
        let above = above(output, dout);
        let problem = BackwardProblem::new(self, q.info(), k.info(), v.info(), above, None)?;
        Plan::backward(&problem, &q.device().info())
    }

    /// The forward pass into all the results of `output`.
    pub(crate) fn forward_to<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &mut Output<T>,
    ) -> Result<(), Error> {
        let Output { out, lse, statistics } = output;
        let mut outputs = Outputs::new(out.info(), lse.info());
        outputs.statistics =
            (statistics.as_ref()).map(|Statistics { row_max, row_sum }| [row_max.info(), row_sum.info()]);
        let problem = Problem::new(self, q.info(), k.info(), v.info(), Some(outputs))?;
        let plan = Plan::new(&problem, &q.device().info())?;
        forward(&plan, [q, k, v], out, lse, statistics.as_mut(), Reporter::silent())
    }

    /// The same attention, which tells nobody.
    fn silent(&self) -> Reporting<fn(Progress)> {
        Reporting {
            attention: self.clone(),
            report: None,
        }
    }
}

impl<F: Fn(Progress) + Sync> Reporting<F> {
    /// Runs [`Attention::forward`] and reports progress.
    ///
    /// # Errors
    /// The errors of [`Attention::forward`].
    pub fn forward<T: Element>(&self, q: &Tensor<T>, k: &Tensor<T>, v: &Tensor<T>) -> Result<Output<T>, Error> {
        let plan = self.attention.plan(q, k, v)?;
        let mut out = Tensor::empty(q.device(), q.shape())?;
        let mut lse = Tensor::empty(q.device(), &q.shape()[..3])?;
        let mut statistics = Statistics {
            row_max: Tensor::empty(q.device(), &q.shape()[..3])?,
            row_sum: Tensor::empty(q.device(), &q.shape()[..3])?,
        };
        let of_rows = Some(&mut statistics);
        forward(&plan, [q, k, v], &mut out, &mut lse, of_rows, self.reporter())?;
        Ok(Output {
            out,
            lse,
            statistics: Some(statistics),
        })
    }

    /// Runs [`Attention::forward_into`] and reports progress.
    ///
    /// # Errors
    /// The errors of [`Attention::forward_into`].
    pub fn forward_into<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        out: &mut Tensor<T>,
        lse: &mut Tensor<f32>,
    ) -> Result<(), Error> {
        self.forward_to([q, k, v], out, lse, None)
    }

    /// Runs [`Attention::forward_into_output`] and reports progress.
    ///
    /// # Errors
    /// The errors of [`Attention::forward_into_output`].
    pub fn forward_into_output<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &mut Output<T>,
    ) -> Result<(), Error> {
        let Output { out, lse, statistics } = output;
        self.forward_to([q, k, v], out, lse, statistics.as_mut())
    }

    fn forward_to<T: Element>(
        &self,
        inputs: [&Tensor<T>; 3],
        out: &mut Tensor<T>,
        lse: &mut Tensor<f32>,
        statistics: Option<&mut Statistics>,
    ) -> Result<(), Error> {
        let outputs = Outputs {
            statistics: statistics.as_deref().map(Statistics::infos),
            ..Outputs::new(out.info(), lse.info())
        };
        let [q, k, v] = inputs.map(Tensor::info);
        let problem = Problem::new(&self.attention, q, k, v, Some(outputs))?;
        let plan = Plan::new(&problem, &inputs[0].device().info())?;
        forward(&plan, inputs, out, lse, statistics, self.reporter())
    }

    /// Runs [`Attention::backward`] and reports progress.
    ///
    /// # Errors
    /// The errors of [`Attention::backward`].
    pub fn backward<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &Output<T>,
        dout: &Tensor<T>,
    ) -> Result<Gradients<T>, Error> {
        let plan = self.attention.plan_backward(q, k, v, output, dout)?;
        check_lse(&output.lse)?;
        let mut gradients = Gradients::new(
            Tensor::empty(q.device(), q.shape())?,
            Tensor::empty(k.device(), k.shape())?,
            Tensor::empty(v.device(), v.shape())?,
        );
        let inputs = [q, k, v, &output.out, dout];
        backward(&plan, inputs, output, &mut gradients, None, self.reporter())?;
        Ok(gradients)
    }

    /// Runs [`Attention::backward_into`] and reports progress.
    ///
    /// # Errors
    /// The errors of [`Attention::backward_into`].
    pub fn backward_into<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &Output<T>,
        dout: &Tensor<T>,
        gradients: &mut Gradients<T>,
    ) -> Result<(), Error> {
        let plan = self.plan_backward_into(q, k, v, output, dout, gradients)?;
        check_lse(&output.lse)?;
        let inputs = [q, k, v, &output.out, dout];
        backward(&plan, inputs, output, gradients, None, self.reporter())
    }

    /// Runs [`Attention::backward_into_with`] and reports progress.
    ///
    /// # Errors
    /// The errors of [`Attention::backward_into_with`].
    #[expect(clippy::too_many_arguments, reason = "five inputs, the results, and the workspace")]
    pub fn backward_into_with<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &Output<T>,
        dout: &Tensor<T>,
        gradients: &mut Gradients<T>,
        workspace: &mut Tensor<f32>,
    ) -> Result<(), Error> {
        let plan = self.plan_backward_into(q, k, v, output, dout, gradients)?;
        let others = [
            ("q", q.info()),
            ("k", k.info()),
            ("v", v.info()),
            ("out", output.out.info()),
            ("lse", output.lse.info()),
            ("dout", dout.info()),
            ("dq", gradients.dq.info()),
            ("dk", gradients.dk.info()),
            ("dv", gradients.dv.info()),
        ];
        check_workspace(workspace.info(), plan.workspace_bytes(), &others)?;
        let inputs = [q, k, v, &output.out, dout];
        backward(&plan, inputs, output, gradients, Some(workspace), self.reporter())
    }

    fn plan_backward_into<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &Output<T>,
        dout: &Tensor<T>,
        gradients: &Gradients<T>,
    ) -> Result<Plan, Error> {
        let outputs = GradientOutputs::new(gradients.dq.info(), gradients.dk.info(), gradients.dv.info());
        let above = above(output, dout);
        let problem = BackwardProblem::new(&self.attention, q.info(), k.info(), v.info(), above, Some(outputs))?;
        Plan::backward(&problem, &q.device().info())
    }

    fn reporter(&self) -> Reporter<'_> {
        self.report
            .as_ref()
            .map_or_else(Reporter::silent, |report| Reporter::new(report))
    }
}

/// Collects out, lse, statistics and dout for validation.
fn above<'a, T: Element>(output: &'a Output<T>, dout: &'a Tensor<T>) -> BackwardInputs<'a> {
    BackwardInputs {
        out: output.out.info(),
        lse: output.lse.info(),
        statistics: output.statistics.as_ref().map(Statistics::infos),
        dout: dout.info(),
    }
}

/// In debug builds, refuses an lse that no forward pass over finite numbers writes.
fn check_lse(lse: &Tensor<f32>) -> Result<(), Error> {
    if cfg!(debug_assertions)
        && let Some(index) = lse.to_vec()?.iter().position(|x| x.is_nan())
    {
        return Err(Error::NotANumber { argument: "lse", index });
    }
    Ok(())
}

/// Refuses memory that cannot be a workspace of `needed` bytes beside the other arguments, the first of which is q.
fn check_workspace(workspace: &TensorInfo, needed: u64, others: &[(&'static str, &TensorInfo)]) -> Result<(), Error> {
    let argument = "workspace";
    if workspace.device() != others[0].1.device() {
        return Err(Error::DeviceMismatch {
            argument,
            got: workspace.device().to_string(),
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
    let bytes = workspace.span_bytes() as u64;
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

/// Runs a forward plan that was made for exactly these tensors.
fn forward<T: Element>(
    plan: &Plan,
    inputs: [&Tensor<T>; 3],
    out: &mut Tensor<T>,
    lse: &mut Tensor<f32>,
    statistics: Option<&mut Statistics>,
    reporter: Reporter<'_>,
) -> Result<(), Error> {
    let _span = trace::enter(plan, inputs[0].device());
    let statistics = statistics.map(|Statistics { row_max, row_sum }| [&*row_max, row_sum]);
    let written: Vec<&Storage> = [out.storage(), lse.storage()]
        .into_iter()
        .chain(statistics.into_iter().flatten().map(Tensor::storage))
        .collect();
    let read: Vec<&Storage> = inputs.map(Tensor::storage).into_iter().chain(tables_of(plan)).collect();
    let guards = Guards::lock(&read, &written);
    let results = Results::Forward {
        out: out.address(),
        lse: lse.address(),
        statistics: statistics.map(|tensors| tensors.map(Tensor::address)),
    };
    // SAFETY: the plan's problem was proven from the descriptions of the inputs, and of the outputs or, for new
    // outputs, from the contiguous layout with which they were allocated. All are borrowed for the call and on one
    // device, the outputs overlap nothing, and the guards keep out other threads.
    let result = unsafe { inputs[0].device().backend().run(plan, results, &reporter) };
    drop(guards);
    ended(result, reporter)
}

/// Runs a backward plan that was made for exactly these tensors, in a new workspace or in a checked one.
fn backward<T: Element>(
    plan: &Plan,
    inputs: [&Tensor<T>; 5],
    output: &Output<T>,
    gradients: &mut Gradients<T>,
    workspace: Option<&mut Tensor<f32>>,
    reporter: Reporter<'_>,
) -> Result<(), Error> {
    let device = inputs[0].device();
    let _span = trace::enter(plan, device);
    let ours;
    let workspace = match workspace {
        Some(workspace) => &*workspace,
        None => {
            let words = plan.workspace_bytes() / size_of::<f32>() as u64;
            ours = Tensor::empty(device, [words as usize])?;
            &ours
        }
    };
    let [q, k, v, out, dout] = inputs.map(Tensor::storage);
    let program = plan.problem().program();
    let tables = match program {
        Some(program) if plan.table_gradients() => gradients.make_tables(program)?,
        _ => TableGradients::default(),
    };
    let Gradients { dq, dk, dv, .. } = &*gradients;
    let statistics = output.statistics.as_ref();
    let of_rows = statistics
        .into_iter()
        .flat_map(|Statistics { row_max, row_sum }| [row_max, row_sum]);
    let read: Vec<&Storage> = [q, k, v, out, dout, output.lse.storage()]
        .into_iter()
        .chain(of_rows.map(Tensor::storage))
        .chain(tables_of(plan))
        .collect();
    let of_tables = gradients.tables.iter().map(|(_, gradient)| gradient.storage());
    let written: Vec<&Storage> = [dq.storage(), dk.storage(), dv.storage(), workspace.storage()]
        .into_iter()
        .chain(of_tables)
        .collect();
    let guards = Guards::lock(&read, &written);
    let results = Results::Backward {
        dq: dq.address(),
        dk: dk.address(),
        dv: dv.address(),
        workspace: workspace.address(),
        tables,
    };
    // SAFETY: the reasons given in `forward`; the workspace has the plan's size. A workspace of ours is freed when
    // the call returns, and a device frees memory only after the work launched before has finished.
    let result = unsafe { device.backend().run(plan, results, &reporter) };
    drop(guards);
    ended(result, reporter)
}

/// The memory of the tables that a plan's program reads.
fn tables_of(plan: &Plan) -> impl Iterator<Item = &Storage> {
    let program = plan.problem().program().into_iter();
    program
        .flat_map(|program| program.tables().iter().chain(program.sinks()))
        .map(features::storage)
}

/// Reports the end of a call, after its tensors were unlocked.
fn ended(result: Result<(), Error>, reporter: Reporter<'_>) -> Result<(), Error> {
    match result {
        Ok(()) => reporter.end(),
        Err(_) => reporter.abandon(),
    }
    result
}

/// Guards that keep other threads from writing storages, or from reading storages that are being written.
struct Guards<'a> {
    _read: Vec<RwLockReadGuard<'a, ()>>,
    _write: Vec<RwLockWriteGuard<'a, ()>>,
}

impl<'a> Guards<'a> {
    /// Locks each storage once, for writing if it belongs to an output. It locks in the order of addresses, so that
    /// two calls cannot wait for each other.
    fn lock(inputs: &[&'a Storage], outputs: &[&'a Storage]) -> Self {
        let mut storages: Vec<(&Storage, bool)> = outputs
            .iter()
            .map(|&s| (s, true))
            .chain(inputs.iter().map(|&s| (s, false)))
            .collect();
        storages.sort_by_key(|&(storage, written)| (std::ptr::from_ref(storage).addr(), !written));
        storages.dedup_by(|(later, _), (earlier, _)| std::ptr::eq(*later, *earlier));
        let mut guards = Self {
            _read: Vec::new(),
            _write: Vec::new(),
        };
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
