//! Calls over ragged batches: a [`Sequences`] says where each sequence lies in packed tensors.

use super::{
    Call, Order, PACKED, Queries, check_rank, check_shape, forward, forward_placed, is_cpu, packed, part, plan_placed,
    plans, reordered, rows,
};
use crate::call::{Backward, backward_batch, check_lse, plan_backward};
use crate::element::Element;
use crate::error::Error;
use crate::options::Attention;
use crate::output::{Gradients, Output, Statistics};
use crate::plan::Plan;
use crate::program::TableSource;
use crate::sequences::{Piece, Sequences};
use crate::tensor::Tensor;

impl Sequences {
    /// Reads offsets from tensors, `[batch + 1]` each, in any strides. Waits for the work that produces them.
    ///
    /// # Errors
    /// The errors of [`new`](Self::new) and [`Tensor::to_vec`].
    pub fn of_tensors(cu_seqlens_q: &Tensor<i32>, cu_seqlens_k: &Tensor<i32>) -> Result<Self, Error> {
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
        if self.takes_placed(q) {
            check_ranks(q, k, v)?;
            let placed = sequences.placed(q.shape()[0], k.shape()[0])?;
            return forward_placed(self, q, [whole(k)?, whole(v)?], placed);
        }
        let (_, calls) = self.pieces(q, k, v, sequences)?;
        forward(q, v.shape()[2], &calls)
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
        if self.takes_placed(q) {
            return self.backward_in_one(q, [k, v], output, dout, sequences);
        }
        let (pieces, calls) = self.pieces(q, k, v, sequences)?;
        check_output(output, dout, [q, v])?;
        let by_sequence;
        let (output, order) = if is_cpu(q) {
            (output, Order::ByHead)
        } else {
            by_sequence = reordered(output, &calls, Order::BySequence)?;
            (&by_sequence, Order::BySequence)
        };
        let mut gradients = Gradients::new(
            Tensor::empty(q.device(), q.shape())?,
            Tensor::empty(k.device(), k.shape())?,
            Tensor::empty(v.device(), v.shape())?,
        );
        let (mut parts, mut plans): (Vec<Part<T>>, _) = (Vec::new(), Vec::new());
        for (piece, call) in pieces.iter().zip(&calls) {
            let of_piece = Gradients::new(
                rows(&gradients.dq, &piece.queries)?,
                rows(&gradients.dk, &piece.keys)?,
                rows(&gradients.dv, &piece.keys)?,
            );
            let (output, dout) = (part(output, &call.queries, order)?, call.queries.vectors(dout)?);
            let inputs = [&call.q, &call.k, &call.v];
            plans.push(plan_backward(&call.attention, inputs, &output, &dout, Some(&of_piece))?);
            parts.push((output, dout, of_piece));
        }
        if is_cpu(q) && !self.has_table_gradients() {
            check_lse(&output.lse)?;
            let runs = plans.into_iter().zip(&calls).zip(&parts);
            let runs: Vec<Backward<'_, T>> = runs
                .map(|((plan, call), (output, dout, gradients))| {
                    let inputs = [&call.q, &call.k, &call.v, &output.out, dout];
                    (plan, inputs, output, gradients)
                })
                .collect();
            backward_batch(q.device(), &runs)?;
            return Ok(gradients);
        }
        gradients.tables = backward_one_by_one(&calls, &mut parts)?;
        if let Some(program) = self.program()? {
            gradients.name_tables(program);
        }
        Ok(gradients)
    }

    /// The backward pass over all sequences at once, on a GPU.
    fn backward_in_one<T: Element>(
        &self,
        q: &Tensor<T>,
        [k, v]: [&Tensor<T>; 2],
        output: &Output<T>,
        dout: &Tensor<T>,
        sequences: &Sequences,
    ) -> Result<Gradients<T>, Error> {
        check_ranks(q, k, v)?;
        check_output(output, dout, [q, v])?;
        let placed = sequences.placed(q.shape()[0], k.shape()[0])?;
        let empty = |like: &Tensor<T>| Tensor::empty(like.device(), like.shape());
        let mut gradients = Gradients::new(empty(q)?, empty(k)?, empty(v)?);
        let mut views = Gradients::new(whole(&gradients.dq)?, whole(&gradients.dk)?, whole(&gradients.dv)?);
        let all = Queries::all(q);
        let inputs = [&whole(q)?, &whole(k)?, &whole(v)?];
        check_lse(&output.lse)?;
        self.backward_placed(
            inputs,
            &part(output, &all, Order::ByHead)?,
            &whole(dout)?,
            &mut views,
            placed,
        )?;
        gradients.tables = views.tables;
        if let Some(program) = self.program()? {
            gradients.name_tables(program);
        }
        Ok(gradients)
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

/// The results, the gradient of out, and the gradients of one call.
type Part<T> = (Output<T>, Tensor<T>, Gradients<T>);

/// Runs the backward pass of each call, and returns the gradients of tables: sums over the calls, made on the host.
fn backward_one_by_one<T: Element>(
    calls: &[Call<T>],
    parts: &mut [Part<T>],
) -> Result<Vec<(TableSource, Tensor<f32>)>, Error> {
    let mut sums: Vec<(TableSource, Vec<f32>)> = Vec::new();
    for (call, (output, dout, gradients)) in calls.iter().zip(&mut *parts) {
        let Call { attention, q, k, v, .. } = call;
        attention.backward_into(q, k, v, output, dout, gradients)?;
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
    for (argument, tensor) in [("out", &output.out), ("dout", dout)] {
        check_shape(argument, tensor, &packed(("q", q), v))?;
    }
    let [total, heads, _] = packed(("q", q), v);
    let mut numbers = vec![("lse", &output.lse)];
    if let Some(Statistics { row_max, row_sum }) = &output.statistics {
        numbers.extend([("row_max", row_max), ("row_sum", row_sum)]);
    }
    for (argument, tensor) in numbers {
        check_shape(argument, tensor, &[heads, total])?;
    }
    Ok(())
}
