//! The passes, as types. A [`Plan`] and its [launches](super::Launch) are of one pass and take the results
//! of that pass alone: those of the other do not compile.

use std::fmt::Debug;
use std::sync::Arc;

use super::launch::{BackwardParameters, ForwardParameters, TableGradients, Template};
use super::{Cost, Entry, Plan};
use crate::problem::BackwardTensors;
use crate::program::Derivative;

/// A pass: [`Forward`] or [`Backward`]. The moves of a rotary embedding have launches too, but no plans. There are no
/// other implementations.
pub trait PassType: Clone + Debug {
    /// Parameters of the pass's kernels.
    type Parameters: Copy + Debug + Template<Self::Results>;
    /// Device addresses of a call's results and workspace.
    type Results: Copy + Debug;
    /// Name of the pass, as a printed plan has it.
    const NAME: &'static str;
}

/// The forward pass.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Forward;

/// The backward pass, with what its plan has beside that of a forward pass.
#[derive(Clone, Debug)]
pub struct Backward {
    pub(super) tensors: BackwardTensors,
    pub(super) derivative: Option<Arc<Derivative>>,
    pub(super) table_gradients: bool,
}

impl PassType for Forward {
    type Parameters = ForwardParameters;
    type Results = ForwardResults;
    const NAME: &'static str = "forward";
}

impl PassType for Backward {
    type Parameters = BackwardParameters;
    type Results = BackwardResults;
    const NAME: &'static str = "backward";
}

/// Device addresses of the results and the workspace of a forward pass.
#[derive(Clone, Copy, Debug)]
pub struct ForwardResults {
    /// Address of the output.
    pub out: u64,
    /// Address of the log-sum-exp.
    pub lse: u64,
    /// Addresses of row_max and row_sum, if they are wanted.
    pub statistics: Option<[u64; 2]>,
    /// Address of the workspace, [`Plan::workspace_bytes`] large.
    pub workspace: u64,
}

impl ForwardResults {
    /// The addresses of lse, row_max and row_sum; 0 of those that are not wanted.
    pub(super) fn rows(&self) -> [u64; 3] {
        let [row_max, row_sum] = self.statistics.unwrap_or_default();
        [self.lse, row_max, row_sum]
    }
}

/// Device addresses of the results and the workspace of a backward pass.
#[derive(Clone, Copy, Debug)]
pub struct BackwardResults {
    /// Gradient of q.
    pub dq: u64,
    /// Gradient of k.
    pub dk: u64,
    /// Gradient of v.
    pub dv: u64,
    /// Address of the workspace, [`Plan::workspace_bytes`] large.
    pub workspace: u64,
    /// Gradients of the score program's tables.
    pub tables: TableGradients,
}

/// A plan of either pass.
#[derive(Clone, Copy, Debug)]
pub enum AnyPlan<'a> {
    /// A plan of a forward pass.
    Forward(&'a Plan),
    /// A plan of a backward pass.
    Backward(&'a Plan<Backward>),
}

impl AnyPlan<'_> {
    /// Returns [`Plan::workspace_bytes`].
    pub fn workspace_bytes(&self) -> u64 {
        match self {
            Self::Forward(plan) => plan.workspace_bytes(),
            Self::Backward(plan) => plan.workspace_bytes(),
        }
    }

    /// Returns [`Plan::cost`].
    pub fn cost(&self) -> Cost {
        match self {
            Self::Forward(plan) => plan.cost(),
            Self::Backward(plan) => plan.cost(),
        }
    }

    /// Returns [`Plan::entries`].
    pub fn entries(&self) -> Vec<&'static Entry> {
        match self {
            Self::Forward(plan) => plan.entries().collect(),
            Self::Backward(plan) => plan.entries().collect(),
        }
    }
}

impl<'a> From<&'a Plan> for AnyPlan<'a> {
    fn from(plan: &'a Plan) -> Self {
        Self::Forward(plan)
    }
}

impl<'a> From<&'a Plan<Backward>> for AnyPlan<'a> {
    fn from(plan: &'a Plan<Backward>) -> Self {
        Self::Backward(plan)
    }
}
