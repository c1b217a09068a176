//! Calls over quantised inputs.

use super::Reporting;
use super::run::forward;
use crate::element::Half;
use crate::error::Error;
use crate::options::Attention;
use crate::output::Output;
use crate::plan::Plan;
use crate::problem::Problem;
use crate::progress::{Progress, Reporter};
use crate::quantized::Quantized;

impl Attention {
    /// Runs the forward pass over [`F8E4M3`](crate::F8E4M3) inputs. The results are those of [`forward`](Self::forward), with
    /// `out` in f16 or bf16.
    ///
    /// Shapes are those of [`forward`](Self::forward), where v has the head_dim of k: any multiple of 8 up to 256, on a GPU any
    /// multiple of 16. There is no backward pass. The CPU multiplies the dequantised numbers in f32. Hopper (compute capability
    /// 9.0) multiplies codes, for which it rounds weights to e4m3 too; it takes a positive scale, and rows at multiples of 16
    /// bytes. `docs/numbers.md` has the errors.
    ///
    /// # Errors
    /// The errors of [`Problem::of_quantized`] and [`Plan::new`], before anything is allocated; then [`Error::OutOfMemory`] and
    /// the errors of the launch. [`Error::NoKernel`] on a device without FP8 kernels.
    pub fn forward_fp8<O: Half>(&self, q: &Quantized, k: &Quantized, v: &Quantized) -> Result<Output<O>, Error> {
        self.silent().forward_fp8(q, k, v)
    }

    /// Runs [`forward_fp8`](Self::forward_fp8) and writes the results to an output of the caller's tensors, as
    /// [`forward_into_output`](Self::forward_into_output) does.
    ///
    /// # Errors
    /// The errors of [`forward_fp8`](Self::forward_fp8). Nothing has been written then, unless the device failed.
    pub fn forward_fp8_into<O: Half>(
        &self,
        q: &Quantized,
        k: &Quantized,
        v: &Quantized,
        output: &mut Output<O>,
    ) -> Result<(), Error> {
        self.silent().forward_fp8_into(q, k, v, output)
    }

    /// Returns the plan of [`forward_fp8`](Self::forward_fp8). Allocates nothing.
    ///
    /// # Errors
    /// The errors of [`Problem::of_quantized`] and [`Plan::new`].
    pub fn plan_fp8<O: Half>(&self, q: &Quantized, k: &Quantized, v: &Quantized) -> Result<Plan, Error> {
        self.plan_fp8_to::<O>([q, k, v], None)
    }

    fn plan_fp8_to<O: Half>(&self, [q, k, v]: [&Quantized; 3], output: Option<&Output<O>>) -> Result<Plan, Error> {
        let outputs = output.map(Output::outputs);
        let problem = Problem::of_quantized(self, q.info(), k.info(), v.info(), O::DTYPE, outputs)?;
        Plan::new(&problem, &q.device().info())
    }
}

impl<F: Fn(Progress) + Sync> Reporting<F> {
    /// Runs [`Attention::forward_fp8`] and reports progress.
    ///
    /// # Errors
    /// The errors of [`Attention::forward_fp8`].
    pub fn forward_fp8<O: Half>(&self, q: &Quantized, k: &Quantized, v: &Quantized) -> Result<Output<O>, Error> {
        let plan = self.attention.plan_fp8::<O>(q, k, v)?;
        let mut output = Output::empty(q.device(), q.shape(), &q.shape()[..3])?;
        run(&plan, [q, k, v], &mut output, self.reporter())?;
        Ok(output)
    }

    /// Runs [`Attention::forward_fp8_into`] and reports progress.
    ///
    /// # Errors
    /// The errors of [`Attention::forward_fp8_into`].
    pub fn forward_fp8_into<O: Half>(
        &self,
        q: &Quantized,
        k: &Quantized,
        v: &Quantized,
        output: &mut Output<O>,
    ) -> Result<(), Error> {
        let plan = self.attention.plan_fp8_to([q, k, v], Some(output))?;
        run(&plan, [q, k, v], output, self.reporter())
    }
}

/// Runs a plan that was made for exactly these tensors.
fn run<O: Half>(
    plan: &Plan,
    inputs: [&Quantized; 3],
    output: &mut Output<O>,
    reporter: Reporter<'_>,
) -> Result<(), Error> {
    let storages = inputs.map(|input| [input.data().storage(), input.scales().storage()]);
    forward(
        plan,
        (inputs[0].device(), storages.as_flattened()),
        output,
        None,
        reporter,
    )
}
