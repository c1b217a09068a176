//! Calls over ragged batches: a [`Sequences`] says where each sequence lies in packed tensors.

use super::{
    Call, Order, PACKED, Queries, check_rank, check_results, check_shape, empty_output, forward_on_cpu,
    forward_one_by_one, forward_placed, is_cpu, packed, part, plan_placed, plans, refuse_one_by_one, reordered, rows,
};
use crate::call::{Backward, backward_arguments, backward_batch, check_lse, check_workspace, named, plan_backward};
use crate::element::Element;
use crate::error::Error;
use crate::options::Attention;
use crate::output::{Gradients, Output};
use crate::plan::{self, Plan};
use crate::problem::{Named, check_written};
use crate::program::TableSource;
use crate::sequences::{Piece, Sequences};
use crate::tensor::Tensor;

impl Sequences {
    /// Reads offsets from tensors, `[batch + 1]` each, in any strides. Waits for the work that produces them.
    ///
    /// # Errors
    /// The errors of [`new`](Self::new) and [`Tensor::to_vec`]; [`Error::Rank`] for tensors of other axes.
    pub fn of_tensors(cu_seqlens_q: &Tensor<i32>, cu_seqlens_k: &Tensor<i32>) -> Result<Self, Error> {
        check_rank("cu_seqlens_q", cu_seqlens_q, 1)?;
        check_rank("cu_seqlens_k", cu_seqlens_k, 1)?;
        Self::new(&cu_seqlens_q.to_vec()?, &cu_seqlens_k.to_vec()?)
    }
}

impl Attention {
    /// The forward pass over a ragged batch: `out` is `[total_q, heads_q, head_dim_v]`, `lse` is `[heads_q, total_q]`.
    ///
    /// q is `[total_q, heads_q, head_dim]`, k is `[total_k, heads_kv, head_dim]`, v is `[total_k, heads_kv, head_dim_v]`.
    /// Masks, programs and causal alignment see each sequence by itself; `at.batch` is its number, and dropout draws with a seed
    /// that is larger by it. Rows of q that belong to no sequence have `out = 0` and `lse = -inf`,
    /// or the logit of their head's sink.
    ///
    /// ```
    /// use flash_attention::{Attention, Device, Sequences, Tensor};
    ///
    /// let device = Device::cpu();
    /// let tokens = Tensor::from_slice(&device, [10, 2, 8], &[0.5_f32; 160])?; // 10 tokens, 2 heads, head_dim 8
    /// let sequences = Sequences::new(&[0, 3, 10], &[0, 3, 10])?; // of 3 and 7 tokens
    /// let output = Attention::new().causal().forward_ragged(&tokens, &tokens, &tokens, &sequences)?;
    /// assert_eq!(output.out.shape(), [10, 2, 8]);
    /// assert_eq!(output.lse.shape(), [2, 10]);
    /// # Ok::<(), flash_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Rank`] unless q, k and v have three axes, [`Error::Sequence`] if a sequence ends beyond q or k, and the errors
    /// of [`forward`](Self::forward), before anything is launched.
    pub fn forward_ragged<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        sequences: &Sequences,
    ) -> Result<Output<T>, Error> {
        check_ranks(q, k, v)?;
        let mut output = empty_output(q, v.shape()[2])?;
        if !self.takes_placed(q) && !is_cpu(q) {
            let (_, calls) = self.pieces(q, k, v, sequences)?;
            return forward_one_by_one(q, &calls, output);
        }
        self.forward_ragged_into(q, k, v, sequences, &mut output, None)?;
        Ok(output)
    }

    /// Runs [`forward_ragged`](Self::forward_ragged) and writes the results to tensors of the caller: `out` with a contiguous last axis
    /// and any other strides that do not overlap, `lse` and, if the output has statistics, `row_max` and `row_sum` with any strides that
    /// do not overlap. None may share memory with an input.
    ///
    /// With a workspace of the caller's, a contiguous f32 tensor of at least [`Plan::workspace_bytes`] of the plan of
    /// [`plan_ragged`](Self::plan_ragged) on a GPU, at an address that is a multiple of 64, the call allocates nothing but lists of work,
    /// which [`Device::prepare`](crate::Device::prepare) loads before, and waits for nothing. Its content is undefined before and after.
    /// The CPU needs none. On a GPU each of lse, row_max and row_sum that is not contiguous needs more, as [`Plan::workspace_bytes`] says,
    /// and a list that the first such call loads.
    ///
    /// # Errors
    /// The errors of [`forward_ragged`](Self::forward_ragged); [`Error::ShapeMismatch`] for results of other shapes;
    /// [`Error::OverlappingStrides`], [`Error::Aliased`] and [`Error::Interleaved`] for results that may share memory;
    /// [`Error::Workspace`], [`Error::NotContiguous`], [`Error::DeviceMismatch`] and [`Error::Address`] for a workspace that breaks a
    /// condition; [`Error::Unsupported`] if Hopper's own kernels are forced.
    pub fn forward_ragged_into<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        sequences: &Sequences,
        output: &mut Output<T>,
        workspace: Option<&mut Tensor<f32>>,
    ) -> Result<(), Error> {
        check_ranks(q, k, v)?;
        refuse_one_by_one(self, q)?;
        check_results(q, v.shape()[2], output)?;
        check_written(&named([q, k, v]), &output.named())?;
        if self.takes_placed(q) {
            let placed = sequences.placed(q.shape()[0], k.shape()[0])?;
            return forward_placed(self, q, [whole(k)?, whole(v)?], placed, output, workspace);
        }
        let (_, calls) = self.pieces(q, k, v, sequences)?;
        forward_on_cpu(q, &calls, output)
    }

    /// The backward pass over a ragged batch, from what [`forward_ragged`](Self::forward_ragged) gave and the gradient of its
    /// output, `[total_q, heads_q, head_dim_v]`. Gradients of tables are sums over the sequences. Rows that
    /// belong to no sequence, and keys that do not count, have zeros.
    ///
    /// # Errors
    /// [`Error::Rank`] and [`Error::Sequence`] as for [`forward_ragged`](Self::forward_ragged), [`Error::ShapeMismatch`] unless
    /// the output's tensors have the shapes that it gives, and the errors of [`backward`](Self::backward), before anything is
    /// launched.
    pub fn backward_ragged<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &Output<T>,
        dout: &Tensor<T>,
        sequences: &Sequences,
    ) -> Result<Gradients<T>, Error> {
        let empty = |like: &Tensor<T>| Tensor::empty(like.device(), like.shape());
        let mut gradients = Gradients::new(empty(q)?, empty(k)?, empty(v)?);
        let batch = BackwardBatch {
            inputs: [q, k, v],
            output,
            dout,
            sequences,
        };
        self.backward_batch(&batch, &mut gradients, None)?;
        Ok(gradients)
    }

    /// Runs [`backward_ragged`](Self::backward_ragged) and writes the gradients of q, k and v to tensors of the caller, which have a
    /// contiguous last axis, any other strides that do not overlap, and no memory shared with an input or with each other.
    ///
    /// With a workspace of the caller's, a contiguous f32 tensor at an address that is a multiple of 64, the call allocates nothing but
    /// lists of work, which [`Device::prepare`](crate::Device::prepare) loads before, and gradients of tables, and on a GPU waits for
    /// nothing. It has at least the sum of [`Plan::workspace_bytes`] of the plans of
    /// [`plan_backward_ragged`](Self::plan_backward_ragged), each rounded up to a multiple of 64. Its content is undefined before and
    /// after. An lse that holds a NaN is not refused then.
    ///
    /// # Errors
    /// The errors of [`backward_ragged`](Self::backward_ragged); [`Error::ShapeMismatch`], [`Error::OverlappingStrides`],
    /// [`Error::Aliased`] and [`Error::Interleaved`] for gradients of other shapes, or that may share memory; [`Error::Workspace`],
    /// [`Error::NotContiguous`], [`Error::DeviceMismatch`] and [`Error::Address`] for a workspace that breaks a condition;
    /// [`Error::Unsupported`] if Hopper's own kernels are forced.
    #[expect(
        clippy::too_many_arguments,
        reason = "five inputs, the batch, the results, and the workspace"
    )]
    pub fn backward_ragged_into<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &Output<T>,
        dout: &Tensor<T>,
        sequences: &Sequences,
        gradients: &mut Gradients<T>,
        workspace: Option<&mut Tensor<f32>>,
    ) -> Result<(), Error> {
        let batch = BackwardBatch {
            inputs: [q, k, v],
            output,
            dout,
            sequences,
        };
        refuse_one_by_one(self, q)?;
        batch.check(gradients)?;
        self.backward_batch(&batch, gradients, workspace)
    }

    /// Plans of [`backward_ragged_into`](Self::backward_ragged_into), one a sequence, in the order in which they run; on a GPU one for
    /// all. Allocates nothing.
    ///
    /// # Errors
    /// The errors of [`backward_ragged_into`](Self::backward_ragged_into).
    #[expect(clippy::too_many_arguments, reason = "five inputs, the batch, and the results")]
    pub fn plan_backward_ragged<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &Output<T>,
        dout: &Tensor<T>,
        sequences: &Sequences,
        gradients: &Gradients<T>,
    ) -> Result<Vec<BackwardPlan>, Error> {
        let batch = BackwardBatch {
            inputs: [q, k, v],
            output,
            dout,
            sequences,
        };
        refuse_one_by_one(self, q)?;
        batch.check(gradients)?;
        if self.takes_placed(q) {
            return Ok(vec![self.plan_in_one(&batch, &batch.views(gradients)?)?]);
        }
        let (pieces, calls) = self.pieces(q, k, v, sequences)?;
        let (_, plans) = parts(&batch, (&pieces, &calls), (output, Order::ByHead), gradients)?;
        Ok(plans)
    }

    /// The backward pass over a batch, with gradients of its shapes.
    fn backward_batch<T: Element>(
        &self,
        batch: &BackwardBatch<'_, T>,
        gradients: &mut Gradients<T>,
        workspace: Option<&mut Tensor<f32>>,
    ) -> Result<(), Error> {
        let ([q, k, v], output) = (batch.inputs, batch.output);
        if self.takes_placed(q) {
            return self.backward_in_one(batch, gradients, workspace);
        }
        let (pieces, calls) = self.pieces(q, k, v, batch.sequences)?;
        check_output(output, batch.dout, [q, v])?;
        let by_sequence;
        let of_rows = if is_cpu(q) {
            (output, Order::ByHead)
        } else {
            by_sequence = reordered(output, &calls, Order::BySequence)?;
            (&by_sequence, Order::BySequence)
        };
        let (mut parts, plans) = parts(batch, (&pieces, &calls), of_rows, gradients)?;
        check_workspace(workspace.as_deref(), &plans, &batch.arguments(gradients))?;
        if workspace.is_none() {
            check_lse(&output.lse)?;
        }
        if is_cpu(q) && !self.has_table_gradients() {
            let runs = plans.into_iter().zip(&calls).zip(&parts);
            let runs: Vec<Backward<'_, T>> = runs
                .map(|((plan, call), (output, dout, gradients))| {
                    let inputs = [&call.q, &call.k, &call.v, &output.out, dout];
                    (plan, inputs, output, gradients)
                })
                .collect();
            return backward_batch(q.device(), &runs, workspace);
        }
        gradients.tables = backward_one_by_one(&calls, &mut parts, workspace)?;
        self.program()?
            .iter()
            .for_each(|program| gradients.name_tables(program));
        Ok(())
    }

    /// The backward pass over all sequences at once, on a GPU.
    fn backward_in_one<T: Element>(
        &self,
        batch: &BackwardBatch<'_, T>,
        gradients: &mut Gradients<T>,
        workspace: Option<&mut Tensor<f32>>,
    ) -> Result<(), Error> {
        let mut views = batch.views(gradients)?;
        let plan = self.plan_in_one(batch, &views)?;
        check_workspace(workspace.as_deref(), [&plan], &batch.arguments(gradients))?;
        if workspace.is_none() {
            check_lse(&batch.output.lse)?;
        }
        let [q, k, v] = batch.inputs.map(whole);
        let output = part(batch.output, &Queries::all(batch.inputs[0]), Order::ByHead)?;
        let dout = whole(batch.dout)?;
        Self::backward_placed(&plan, [&q?, &k?, &v?], &output, &dout, &mut views, workspace)?;
        gradients.tables = views.tables;
        self.program()?
            .iter()
            .for_each(|program| gradients.name_tables(program));
        Ok(())
    }

    /// Plans what [`backward_in_one`](Self::backward_in_one) runs.
    fn plan_in_one<T: Element>(
        &self,
        batch: &BackwardBatch<'_, T>,
        views: &Gradients<T>,
    ) -> Result<BackwardPlan, Error> {
        let [q, k, v] = batch.inputs;
        check_ranks(q, k, v)?;
        check_output(batch.output, batch.dout, [q, v])?;
        let placed = batch.sequences.placed(q.shape()[0], k.shape()[0])?;
        let output = part(batch.output, &Queries::all(q), Order::ByHead)?;
        let inputs = [&whole(q)?, &whole(k)?, &whole(v)?];
        self.plan_backward_placed(inputs, &output, &whole(batch.dout)?, views, placed)
    }

    /// Plans of [`forward_ragged`](Self::forward_ragged), one a sequence, in the order in which they run; on a GPU one for all.
    /// Allocates nothing.
    ///
    /// # Errors
    /// The errors of [`forward_ragged`](Self::forward_ragged).
    pub fn plan_ragged<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        sequences: &Sequences,
    ) -> Result<Vec<Plan>, Error> {
        if self.takes_placed(q) {
            check_ranks(q, k, v)?;
            let placed = sequences.placed(q.shape()[0], k.shape()[0])?;
            return plan_placed(self, q, [whole(k)?, whole(v)?], placed);
        }
        let (_, calls) = self.pieces(q, k, v, sequences)?;
        plans(&calls)
    }

    /// The pieces of a ragged batch, at least one, and the call with each, in the order in which they run.
    fn pieces<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        sequences: &Sequences,
    ) -> Result<(Vec<Piece>, Vec<Call<T>>), Error> {
        check_ranks(q, k, v)?;
        let call = |piece: &Piece| {
            Ok(Call {
                attention: self.of_sequence(piece.sequence),
                queries: Queries::Packed(piece.queries.clone()),
                q: rows(q, &piece.queries)?,
                k: rows(k, &piece.keys)?,
                v: rows(v, &piece.keys)?,
                pages: None,
            })
        };
        let pieces = sequences.pieces(q.shape()[0], k.shape()[0])?;
        let calls: Result<_, Error> = pieces.iter().map(call).collect();
        Ok((pieces, calls?))
    }
}

/// Inputs of a backward pass over packed sequences.
struct BackwardBatch<'a, T: Element> {
    inputs: [&'a Tensor<T>; 3],
    output: &'a Output<T>,
    dout: &'a Tensor<T>,
    sequences: &'a Sequences,
}

impl<T: Element> BackwardBatch<'_, T> {
    /// All tensors but the workspace, with their names: q first, the gradients last.
    fn arguments<'a>(&'a self, gradients: &'a Gradients<T>) -> Vec<Named<'a>> {
        backward_arguments(self.inputs, self.output, self.dout, gradients)
    }

    /// Refuses gradients of other shapes, or that may share memory with a tensor.
    fn check(&self, gradients: &Gradients<T>) -> Result<(), Error> {
        let [q, k, v] = self.inputs;
        check_ranks(q, k, v)?;
        let of = [
            ("dq", &gradients.dq, "q", q),
            ("dk", &gradients.dk, "k", k),
            ("dv", &gradients.dv, "v", v),
        ];
        for (argument, gradient, other, tensor) in of {
            let [total, heads, head_dim] = PACKED;
            let shape = tensor.shape();
            let sizes = [
                (total, other, shape[0]),
                (heads, other, shape[1]),
                (head_dim, other, shape[2]),
            ];
            check_shape(argument, gradient, &sizes)?;
        }
        let arguments = self.arguments(gradients);
        let (inputs, gradients) = arguments.split_at(arguments.len() - 3);
        check_written(inputs, gradients)
    }

    /// The gradients with four axes.
    fn views(&self, gradients: &Gradients<T>) -> Result<Gradients<T>, Error> {
        let [q, k, v] = self.inputs;
        check_ranks(q, k, v)?;
        Ok(Gradients::new(
            whole(&gradients.dq)?,
            whole(&gradients.dk)?,
            whole(&gradients.dv)?,
        ))
    }
}

/// The plan of a call's backward pass.
type BackwardPlan = Plan<plan::Backward>;

/// The results, the gradient of out, and the gradients of one call.
type Part<T> = (Output<T>, Tensor<T>, Gradients<T>);

/// The parts of each call of a backward pass, from results with numbers in this order, and the plans of the calls.
fn parts<T: Element>(
    batch: &BackwardBatch<'_, T>,
    (pieces, calls): (&[Piece], &[Call<T>]),
    (output, order): (&Output<T>, Order),
    gradients: &Gradients<T>,
) -> Result<(Vec<Part<T>>, Vec<BackwardPlan>), Error> {
    let (mut parts, mut plans) = (Vec::new(), Vec::new());
    for (piece, call) in pieces.iter().zip(calls) {
        let of_piece = Gradients::new(
            rows(&gradients.dq, &piece.queries)?,
            rows(&gradients.dk, &piece.keys)?,
            rows(&gradients.dv, &piece.keys)?,
        );
        let (output, dout) = (part(output, &call.queries, order)?, call.queries.vectors(batch.dout)?);
        let inputs = [&call.q, &call.k, &call.v];
        plans.push(plan_backward(&call.attention, inputs, &output, &dout, Some(&of_piece))?);
        parts.push((output, dout, of_piece));
    }
    Ok((parts, plans))
}

/// Runs the backward pass of each call, in a new workspace or in a checked one, and returns the gradients of tables: sums over the calls,
/// made on the host.
fn backward_one_by_one<T: Element>(
    calls: &[Call<T>],
    parts: &mut [Part<T>],
    mut workspace: Option<&mut Tensor<f32>>,
) -> Result<Vec<(TableSource, Tensor<f32>)>, Error> {
    let mut sums: Vec<(TableSource, Vec<f32>)> = Vec::new();
    for (call, (output, dout, gradients)) in calls.iter().zip(&mut *parts) {
        let Call { attention, q, k, v, .. } = call;
        match workspace.as_deref_mut() {
            Some(workspace) => attention.backward_into_with(q, k, v, output, dout, gradients, workspace)?,
            None => attention.backward_into(q, k, v, output, dout, gradients)?,
        }
        add_up(&mut sums, gradients)?;
    }
    let Some(Call { q, .. }) = calls.first() else {
        return Ok(Vec::new());
    };
    sums.into_iter()
        .map(|(table, sums)| {
            let gradient = Tensor::from_slice(q.device(), &table.shape, &sums)?;
            Ok((table, gradient))
        })
        .collect()
}

/// Refuses q, k and v that are no packed tensors.
fn check_ranks<T: Element>(q: &Tensor<T>, k: &Tensor<T>, v: &Tensor<T>) -> Result<(), Error> {
    check_rank("q", q, PACKED.len())?;
    check_rank("k", k, PACKED.len())?;
    check_rank("v", v, PACKED.len())?;
    check_shape("v", v, &packed(("k", k), v))
}

/// All rows of a packed `[total, heads, head_dim]` tensor as `[1, heads, total, head_dim]`.
fn whole<T: Element>(packed: &Tensor<T>) -> Result<Tensor<T>, Error> {
    rows(packed, &(0..packed.shape()[0]))
}

/// Adds the gradients of tables that one sequence gave to the sums.
fn add_up<T: Element>(sums: &mut Vec<(TableSource, Vec<f32>)>, gradients: &Gradients<T>) -> Result<(), Error> {
    for (index, (table, gradient)) in gradients.tables.iter().enumerate() {
        let gradient = gradient.to_vec()?;
        match sums.get_mut(index) {
            Some((_, sums)) => sums.iter_mut().zip(gradient).for_each(|(sum, x)| *sum += x),
            None => sums.push((table.clone(), gradient)),
        }
    }
    Ok(())
}

/// Refuses results and a gradient that are not those of a forward pass over q and v.
fn check_output<T: Element>(output: &Output<T>, dout: &Tensor<T>, [q, v]: [&Tensor<T>; 2]) -> Result<(), Error> {
    check_results(q, v.shape()[2], output)?;
    check_shape("dout", dout, &packed(("q", q), v))
}
