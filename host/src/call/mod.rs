//! Calls of [`Attention`] and of [`Reporting`], which make plans and run them.

mod placed;
mod quantized;
mod reporting;
mod run;

pub use reporting::Reporting;
pub(crate) use run::{
    Backward, backward_arguments, backward_batch, check_lse, check_workspace, forward_batch, move_tokens, named,
};

use crate::element::Element;
use crate::error::Error;
use crate::options::Attention;
use crate::output::{Gradients, Output, Statistics};
use crate::plan::{self, Plan};
use crate::problem::{BackwardInputs, BackwardProblem, GradientOutputs, Problem};
use crate::progress::Progress;
use crate::tensor::Tensor;

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
    /// q is `[batch, heads_q, seqlen_q, head_dim]`, k is `[batch, heads_kv, seqlen_k, head_dim]`, v is `[batch, heads_kv,
    /// seqlen_k, head_dim_v]`, and each head of k and v serves `heads_q / heads_kv` query heads. All strides but the last
    /// are free. On a GPU the call returns once the work is launched; reading a result waits for it.
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
    /// any other strides that do not overlap, `lse` with any strides that do not overlap. Neither may share memory with an input.
    ///
    /// The call allocates nothing, with one exception: where a GPU splits the keys of few queries, or lse is not contiguous there, it
    /// allocates [`Plan::workspace_bytes`] and lists of work until it ends. [`forward_into_with`](Self::forward_into_with) takes a
    /// workspace of the caller instead.
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

    /// Runs [`forward_into_output`](Self::forward_into_output) in a workspace of the caller: any contiguous f32 tensor of at least
    /// [`Plan::workspace_bytes`] of the [`plan`](Self::plan), at an address that is a multiple of 64, which shares no memory with
    /// another argument. Its content is undefined before and after. Plans whose keys are not split, and those of the CPU, need none.
    ///
    /// On a GPU lse, row_max and row_sum that are not contiguous need more, as [`Plan::workspace_bytes`] says. The plan with that is
    /// [`Plan::new`] of a [`Problem::new`] with these [`Outputs`](crate::problem::Outputs).
    ///
    /// The call allocates nothing but lists of work, which [`Device::prepare`](crate::Device::prepare) loads before, and, on a GPU,
    /// waits for nothing, so that a stream it works on can be captured in a CUDA graph.
    ///
    /// ```
    /// # use flash_attention::{Attention, Device, Output, Tensor};
    /// # let device = Device::cpu();
    /// # let q = Tensor::from_slice(&device, [1, 1, 1, 8], &[0.5_f32; 8])?;
    /// # let k = Tensor::from_slice(&device, [1, 1, 64, 8], &[0.5_f32; 512])?;
    /// # let v = k.clone();
    /// let attention = Attention::new();
    /// let bytes = attention.plan(&q, &k, &v)?.workspace_bytes();
    /// let mut workspace = Tensor::empty(&device, [bytes as usize / 4])?;
    /// let mut output = Output::new(Tensor::empty(&device, [1, 1, 1, 8])?, Tensor::empty(&device, [1, 1, 1])?);
    /// for _ in 0..3 {
    ///     attention.forward_into_with(&q, &k, &v, &mut output, &mut workspace)?;
    /// }
    /// # Ok::<(), flash_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// The errors of [`forward_into`](Self::forward_into). [`Error::Workspace`] if the workspace is too small.
    /// [`Error::NotContiguous`], [`Error::DeviceMismatch`], [`Error::Address`] or [`Error::Aliased`] if it breaks
    /// another of these conditions.
    pub fn forward_into_with<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &mut Output<T>,
        workspace: &mut Tensor<f32>,
    ) -> Result<(), Error> {
        self.silent().forward_into_with(q, k, v, output, workspace)
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
    /// The call allocates nothing except gradients of tables, if they are requested, and on a GPU waits for
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
    ) -> Result<Plan<plan::Backward>, Error> {
        plan_backward(self, [q, k, v], output, dout, None)
    }

    /// Returns this attention with calls that do not report.
    fn silent(&self) -> Reporting<fn(Progress)> {
        Reporting {
            attention: self.clone(),
            report: None,
        }
    }
}

/// Returns the plan of a backward pass that writes `gradients`, or new contiguous ones if there are none.
pub(crate) fn plan_backward<T: Element>(
    attention: &Attention,
    inputs: [&Tensor<T>; 3],
    output: &Output<T>,
    dout: &Tensor<T>,
    gradients: Option<&Gradients<T>>,
) -> Result<Plan<plan::Backward>, Error> {
    let outputs = gradients.map(|Gradients { dq, dk, dv, .. }| GradientOutputs::new(dq.info(), dk.info(), dv.info()));
    let [q, k, v] = inputs.map(Tensor::info);
    let problem = BackwardProblem::new(attention, q, k, v, above(output, dout), outputs)?;
    Plan::backward(&problem, &inputs[0].device().info())
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
