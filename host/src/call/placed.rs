//! Calls on a GPU over batches that are no rectangle, each of one launch, or of two if there are splits.

use super::above;
use super::run::{backward, check_workspace, forward};
use crate::device::DeviceKind;
use crate::element::Element;
use crate::error::Error;
use crate::options::Attention;
use crate::output::{Gradients, Output};
use crate::plan::{self, Plan};
use crate::problem::{BackwardProblem, GradientOutputs, Named, Problem};
use crate::progress::Reporter;
use crate::sequences::Placed;
use crate::tensor::Tensor;
use flash_attention_kernels::entries::Arch;

impl Attention {
    /// Tells if calls over placed sequences run on a tensor's device: on GPUs, unless kernels for Hopper are forced, which take a
    /// sequence a launch.
    pub(crate) fn takes_placed<T: Element>(&self, tensor: &Tensor<T>) -> bool {
        tensor.device().kind() != DeviceKind::Cpu && self.forced_arch() != Some(Arch::Sm90a)
    }

    /// Plans the forward pass over placed sequences, from views of the whole tensors with four axes, with a batch axis of 1 where
    /// sequences are packed. Without an output its tensors are new ones.
    ///
    /// # Errors
    /// The errors of [`Problem::new`] and [`Plan::new`].
    pub(crate) fn plan_placed<T: Element>(
        &self,
        [q, k, v]: [&Tensor<T>; 3],
        output: Option<&Output<T>>,
        placed: Placed,
    ) -> Result<Plan, Error> {
        let outputs = output.map(Output::outputs);
        let problem = Problem::of_sequences(self, [q.info(), k.info(), v.info()], outputs, placed)?;
        Plan::new(&problem, &q.device().info())
    }

    /// The forward pass over placed sequences, in a new workspace or in one beside `others`, the other arguments.
    ///
    /// # Errors
    /// The errors of [`plan_placed`](Self::plan_placed), of the workspace, and of the launch.
    pub(crate) fn forward_placed<T: Element>(
        &self,
        inputs: [&Tensor<T>; 3],
        output: &mut Output<T>,
        placed: Placed,
        (workspace, others): (Option<&mut Tensor<f32>>, &[Named<'_>]),
    ) -> Result<(), Error> {
        let plan = self.plan_placed(inputs, Some(output), placed)?;
        check_workspace(workspace.as_deref(), [&plan], others)?;
        let inputs = (inputs[0].device(), &inputs.map(Tensor::storage)[..]);
        forward(&plan, inputs, output, workspace, Reporter::silent())
    }

    /// Plans the backward pass over placed sequences, from views like those of [`forward_placed`](Self::forward_placed), for new
    /// contiguous gradients or for these.
    ///
    /// # Errors
    /// The errors of [`BackwardProblem::new`] and [`Plan::backward`].
    pub(crate) fn plan_backward_placed<T: Element>(
        &self,
        [q, k, v]: [&Tensor<T>; 3],
        output: &Output<T>,
        dout: &Tensor<T>,
        gradients: &Gradients<T>,
        placed: Placed,
    ) -> Result<Plan<plan::Backward>, Error> {
        let inputs = [q, k, v].map(Tensor::info);
        let results = GradientOutputs::new(gradients.dq.info(), gradients.dk.info(), gradients.dv.info());
        let problem = BackwardProblem::of_sequences(self, inputs, above(output, dout), results, placed)?;
        Plan::backward(&problem, &q.device().info())
    }

    /// The backward pass of a plan of [`plan_backward_placed`](Self::plan_backward_placed) for these tensors, in a new workspace or in one
    /// that was checked. It writes the gradients of q, k and v, and makes those of tables.
    ///
    /// # Errors
    /// The errors of the launch.
    pub(crate) fn backward_placed<T: Element>(
        plan: &Plan<plan::Backward>,
        [q, k, v]: [&Tensor<T>; 3],
        output: &Output<T>,
        dout: &Tensor<T>,
        gradients: &mut Gradients<T>,
        workspace: Option<&mut Tensor<f32>>,
    ) -> Result<(), Error> {
        let inputs = [q, k, v, &output.out, dout];
        backward(plan, inputs, output, gradients, workspace, Reporter::silent())
    }
}
