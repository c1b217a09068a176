//! A backward problem: a forward problem with its results, and the gradient of the output.

use flash_attention_kernels::abi::StridedTensor;
use flash_attention_kernels::entries::Dtype;

use super::*;
use crate::program::Derivative;

/// A valid backward problem.
#[derive(Clone, Debug, PartialEq)]
pub struct BackwardProblem {
    forward: Problem,
    tensors: BackwardTensors,
    deterministic: bool,
    table_gradients: bool,
    derivative: Option<Arc<Derivative>>,
}

/// Location of the tensors that only a backward pass has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct BackwardTensors {
    /// Gradient of the output.
    pub dout: StridedTensor,
    /// Gradient of q. The addresses of dq, dk and dv are 0 until they are allocated.
    pub dq: StridedTensor,
    /// Gradient of k.
    pub dk: StridedTensor,
    /// Gradient of v.
    pub dv: StridedTensor,
    /// Address of forward's lse.
    pub lse: StridedTensor,
    /// Addresses of forward's row_max and row_sum, if they are there.
    pub statistics: Option<[StridedTensor; 2]>,
}

/// Inputs of a backward pass besides q, k and v: the results of forward, and the gradient of its output.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct BackwardInputs<'a> {
    /// Forward's output, `[batch, heads_q, seqlen_q, head_dim_v]`.
    pub out: &'a TensorInfo,
    /// Forward's log-sum-exp, f32 `[batch, heads_q, seqlen_q]`, any strides. On a GPU a launch copies it to the workspace unless it is
    /// contiguous.
    pub lse: &'a TensorInfo,
    /// Forward's row_max and row_sum, as lse, if they are there.
    pub statistics: Option<[&'a TensorInfo; 2]>,
    /// Gradient of the output, with the shape of out.
    pub dout: &'a TensorInfo,
}

/// The caller's memory for gradients, each with the shape of its tensor, a contiguous last axis, and any other
/// strides that do not overlap.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct GradientOutputs<'a> {
    /// Gradient of q.
    pub dq: &'a TensorInfo,
    /// Gradient of k.
    pub dk: &'a TensorInfo,
    /// Gradient of v.
    pub dv: &'a TensorInfo,
}

impl<'a> BackwardInputs<'a> {
    /// Collects the results of the forward pass, without statistics, and the gradient of its output.
    pub fn new(out: &'a TensorInfo, lse: &'a TensorInfo, dout: &'a TensorInfo) -> Self {
        Self {
            out,
            lse,
            statistics: None,
            dout,
        }
    }
}

impl<'a> GradientOutputs<'a> {
    /// Collects the memory for the gradients of q, k and v.
    pub fn new(dq: &'a TensorInfo, dk: &'a TensorInfo, dv: &'a TensorInfo) -> Self {
        Self { dq, dk, dv }
    }
}

impl BackwardProblem {
    /// Checks a backward problem; `gradients` are the caller's tensors, or `None` for new contiguous ones.
    ///
    /// Layouts cannot show that out and lse come from a forward pass over these q, k and v with these options. If
    /// they do not, the gradients are meaningless or not finite, but nothing worse happens.
    ///
    /// # Errors
    /// The errors of [`Problem::new`] for q, k and v; then these errors, in their order, for out, lse and dout; then
    /// for the caller's gradients also [`Error::OverlappingStrides`] and [`Error::Aliased`]; then [`Error::Program`]
    /// if the score program has no derivative.
    pub fn new(
        attention: &Attention,
        q: &TensorInfo,
        k: &TensorInfo,
        v: &TensorInfo,
        from_above: BackwardInputs<'_>,
        gradients: Option<GradientOutputs<'_>>,
    ) -> Result<Self, Error> {
        Self::of(attention, [q, k, v], from_above, gradients, None)
    }

    /// Checks the backward problem of a batch whose sequences lie anywhere in q and in k and v, for GPUs.
    ///
    /// # Errors
    /// The errors of [`new`](Self::new).
    pub(crate) fn of_sequences(
        attention: &Attention,
        inputs: [&TensorInfo; 3],
        from_above: BackwardInputs<'_>,
        gradients: GradientOutputs<'_>,
        placed: Placed,
    ) -> Result<Self, Error> {
        Self::of(attention, inputs, from_above, Some(gradients), Some(placed))
    }

    fn of(
        attention: &Attention,
        [q, k, v]: [&TensorInfo; 3],
        from_above: BackwardInputs<'_>,
        gradients: Option<GradientOutputs<'_>>,
        placed: Option<Placed>,
    ) -> Result<Self, Error> {
        let forward = match placed {
            Some(placed) => Problem::of_sequences(attention, [q, k, v], None, placed)?,
            None => Problem::new(attention, q, k, v, None)?,
        };
        let BackwardInputs {
            out,
            lse,
            statistics,
            dout,
        } = from_above;
        let (of_rows, q_named) = (of_rows(lse, statistics), ("q", q));
        let outputs = [("out", out), ("dout", dout)];
        let results: Vec<_> = gradients.map_or(Vec::new(), |g| {
            vec![("dq", g.dq, q_named), ("dk", g.dk, ("k", k)), ("dv", g.dv, ("v", v))]
        });
        let written: Vec<Named<'_>> = results.iter().map(|&(name, tensor, _)| (name, tensor)).collect();
        let named: Vec<Named<'_>> = outputs.into_iter().chain(written.iter().copied()).collect();
        let all: Vec<Named<'_>> = [q_named]
            .into_iter()
            .chain(named.iter().copied())
            .chain(of_rows.iter().copied())
            .collect();

        check_rank(&all)?;
        outputs
            .iter()
            .try_for_each(|&tensor| agree_with_out(tensor, q_named, ("v", v)))?;
        results
            .iter()
            .try_for_each(|&(name, tensor, model)| agree((name, tensor), model, &[0, 1, 2, 3]))?;
        of_rows
            .iter()
            .try_for_each(|&tensor| agree(tensor, q_named, &[0, 1, 2]))?;
        check_dtypes(&all)?;
        check_devices(&all)?;
        named.iter().try_for_each(|&tensor| check_last_axis(tensor))?;
        let read = [q_named, ("k", k), ("v", v), ("out", out), ("dout", dout)];
        let read: Vec<Named<'_>> = read.into_iter().chain(of_rows.iter().copied()).collect();
        check_written(&read, &written)?;

        let derivative = match forward.program() {
            Some(program) => Some(Arc::new(program.derivative(attention.has_table_gradients())?)),
            None => None,
        };
        if let Some(program) = forward.program() {
            check_tables_apart(program, &written)?;
        }
        let new = |like: &TensorInfo| TensorInfo::contiguous(like.device(), like.dtype(), like.shape(), 0);
        let (new_q, new_k, new_v) = (new(q)?, new(k)?, new(v)?);
        let (dq, dk, dv) = gradients.map_or((&new_q, &new_k, &new_v), |g| (g.dq, g.dk, g.dv));
        let tensors = BackwardTensors {
            dout: strided(dout),
            dq: strided(dq),
            dk: strided(dk),
            dv: strided(dv),
            lse: strided(lse),
            statistics: statistics.map(|tensors| tensors.map(strided)),
        };
        Ok(Self {
            forward: Problem {
                out: strided(out),
                ..forward
            },
            tensors,
            derivative,
            deterministic: attention.is_deterministic(),
            table_gradients: attention.has_table_gradients(),
        })
    }

    /// Returns the forward problem, whose `out` is forward's output.
    pub fn forward(&self) -> &Problem {
        &self.forward
    }

    /// True if the gradients of the score program's tables are asked for, sinks included.
    pub fn table_gradients(&self) -> bool {
        self.table_gradients
    }

    /// Returns the derivatives of the score program, if there is one.
    pub fn derivative(&self) -> Option<&Arc<Derivative>> {
        self.derivative.as_ref()
    }

    pub(crate) fn tensors(&self) -> &BackwardTensors {
        &self.tensors
    }

    /// Returns true if gradients must be bitwise reproducible.
    pub fn deterministic(&self) -> bool {
        self.deterministic
    }

    /// Returns the bytes of delta, one f32 per query.
    pub(crate) fn delta_bytes(&self) -> u64 {
        if !self.forward.has_pairs() {
            return 0;
        }
        let rows = self.forward.batch * self.forward.heads_q * self.forward.seqlen_q as usize;
        (rows * Dtype::F32.bytes()) as u64
    }
}
