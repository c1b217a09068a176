//! [`Reporting`]: calls that report progress.

use super::plan_backward;
use super::run::{backward, backward_arguments, check_lse, check_workspace, forward, named};
use crate::element::Element;
use crate::error::Error;
use crate::options::Attention;
use crate::output::{Gradients, Output};
use crate::plan::Plan;
use crate::problem::{Problem, out_shape};
use crate::progress::{Progress, Reporter};
use crate::tensor::Tensor;

/// An [`Attention`] whose calls report progress, made by [`Attention::on_progress`].
#[derive(Clone, Debug)]
pub struct Reporting<F> {
    pub(super) attention: Attention,
    /// Callback for progress; `None` discards reports.
    pub(super) report: Option<F>,
}

impl<F: Fn(Progress) + Sync> Reporting<F> {
    /// Runs [`Attention::forward`] and reports progress.
    ///
    /// # Errors
    /// The errors of [`Attention::forward`].
    pub fn forward<T: Element>(&self, q: &Tensor<T>, k: &Tensor<T>, v: &Tensor<T>) -> Result<Output<T>, Error> {
        let plan = self.attention.plan(q, k, v)?;
        let mut output = Output::empty(q.device(), &out_shape(q.shape(), v.shape()), &q.shape()[..3])?;
        let inputs = (q.device(), &[q, k, v].map(Tensor::storage)[..]);
        forward(&plan, inputs, &mut output, None, self.reporter())?;
        Ok(output)
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
        self.forward_into_output(q, k, v, &mut Output::new(out.clone(), lse.clone()))
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
        self.forward_in([q, k, v], output, None)
    }

    /// Runs [`Attention::forward_into_with`] and reports progress.
    ///
    /// # Errors
    /// The errors of [`Attention::forward_into_with`].
    pub fn forward_into_with<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &mut Output<T>,
        workspace: &mut Tensor<f32>,
    ) -> Result<(), Error> {
        self.forward_in([q, k, v], output, Some(workspace))
    }

    /// The forward pass with results in the caller's memory, in a new workspace or in the caller's.
    fn forward_in<T: Element>(
        &self,
        inputs: [&Tensor<T>; 3],
        output: &mut Output<T>,
        workspace: Option<&mut Tensor<f32>>,
    ) -> Result<(), Error> {
        let [q, k, v] = inputs.map(Tensor::info);
        let problem = Problem::new(&self.attention, q, k, v, Some(output.outputs()))?;
        let device = inputs[0].device();
        let plan = Plan::new(&problem, &device.info())?;
        let mut others = named(inputs).to_vec();
        others.extend(output.named());
        check_workspace(workspace.as_deref(), [&plan], &others)?;
        let inputs = (device, &inputs.map(Tensor::storage)[..]);
        forward(&plan, inputs, output, workspace, self.reporter())
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
        let plan = plan_backward(&self.attention, [q, k, v], output, dout, Some(gradients))?;
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
        let plan = plan_backward(&self.attention, [q, k, v], output, dout, Some(gradients))?;
        let others = backward_arguments([q, k, v], output, dout, gradients);
        check_workspace(Some(workspace), [&plan], &others)?;
        let inputs = [q, k, v, &output.out, dout];
        backward(&plan, inputs, output, gradients, Some(workspace), self.reporter())
    }

    pub(super) fn reporter(&self) -> Reporter<'_> {
        self.report
            .as_ref()
            .map_or_else(Reporter::silent, |report| Reporter::new(report))
    }
}
