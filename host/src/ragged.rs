//! Calls over ragged batches: a [`Sequences`] says where each sequence lies in packed tensors.
//!
//! Each sequence is a call of its own over views of the packed tensors, longest first. Nothing is padded, and a
//! sequence's results are the same bits whatever else is in the batch.
//!
//! The CPU reads and writes lse, row_max and row_sum in place. A GPU's kernels take them contiguous a sequence, so there
//! they pass through the host, `12 * heads_q * total_q` bytes a call.

use std::ops::Range;

use crate::device::DeviceKind;
use crate::element::{Element, Scalar};
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
    /// The forward pass over a ragged batch: `out` is `[total_q, heads_q, head_dim]`, `lse` is `[heads_q, total_q]`.
    ///
    /// q is `[total_q, heads_q, head_dim]`; k and v are `[total_k, heads_kv, head_dim]`. Masks, programs and causal alignment
    /// see each sequence by itself; `at.batch` is its number, and dropout draws with a seed that is larger by it. Rows of q
    /// that belong to no sequence have `out = 0` and `lse = -inf`.
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
        let calls = self.calls(q, k, v, sequences)?;
        for call in &calls {
            call.plan()?;
        }
        let of_rows = || Tensor::empty(q.device(), [q.shape()[1], q.shape()[0]]);
        let output = Output {
            out: Tensor::empty(q.device(), q.shape())?,
            lse: of_rows()?,
            statistics: Some(Statistics {
                row_max: of_rows()?,
                row_sum: of_rows()?,
            }),
        };
        let in_place = takes_strided_lse(q);
        let mut parts = Vec::new();
        for call in &calls {
            let mut part = part(&output, &call.piece.queries, |view| match in_place {
                true => Ok(view),
                false => Tensor::empty(view.device(), view.shape()),
            })?;
            call.attention
                .forward_into_output(&call.q, &call.k, &call.v, &mut part)?;
            parts.push(part);
        }
        if in_place {
            return Ok(output);
        }
        let packed = |numbers: fn(&Output<T>) -> Option<&Tensor<f32>>| {
            let pieces = calls.iter().map(|call| &call.piece);
            packed_rows(&output.lse, pieces.zip(parts.iter().filter_map(numbers)))
        };
        Ok(Output {
            lse: packed(|part| Some(&part.lse))?,
            statistics: Some(Statistics {
                row_max: packed(|part| Some(&part.statistics.as_ref()?.row_max))?,
                row_sum: packed(|part| Some(&part.statistics.as_ref()?.row_sum))?,
            }),
            out: output.out,
        })
    }

    /// The backward pass over a ragged batch, from what [`forward_ragged`](Self::forward_ragged) gave and the gradient of its
    /// output, `[total_q, heads_q, head_dim]`. Gradients of tables are sums over the sequences, made on the host. Rows that
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
        let calls = self.calls(q, k, v, sequences)?;
        check_output(output, dout, q)?;
        let in_place = takes_strided_lse(q);
        let mut parts = Vec::new();
        for call in &calls {
            let part = part(output, &call.piece.queries, |view| match in_place {
                true => Ok(view),
                false => view.contiguous(),
            })?;
            let dout = rows(dout, &call.piece.queries)?;
            call.attention.plan_backward(&call.q, &call.k, &call.v, &part, &dout)?;
            parts.push((part, dout));
        }
        let mut gradients = Gradients::new(
            Tensor::empty(q.device(), q.shape())?,
            Tensor::empty(k.device(), k.shape())?,
            Tensor::empty(v.device(), v.shape())?,
        );
        let mut of_tables: Vec<(TableSource, Vec<f32>)> = Vec::new();
        for (call, (output, dout)) in calls.iter().zip(&parts) {
            let Call {
                piece,
                attention,
                q,
                k,
                v,
            } = call;
            let mut of_piece = Gradients::new(
                rows(&gradients.dq, &piece.queries)?,
                rows(&gradients.dk, &piece.keys)?,
                rows(&gradients.dv, &piece.keys)?,
            );
            attention.backward_into(q, k, v, output, dout, &mut of_piece)?;
            add_up(&mut of_tables, &of_piece)?;
        }
        for (table, sums) in of_tables {
            let gradient = Tensor::from_slice(q.device(), &table.shape, &sums)?;
            gradients.tables.push((table, gradient));
        }
        if let Some(program) = self.program()? {
            gradients.name_tables(program);
        }
        Ok(gradients)
    }

    /// Plans of [`forward_ragged`](Self::forward_ragged), one a sequence, in the order in which they run. Allocates nothing.
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
        self.calls(q, k, v, sequences)?.iter().map(Call::plan).collect()
    }

    /// The calls that a ragged batch consists of, at least one, in the order in which they run.
    fn calls<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        sequences: &Sequences,
    ) -> Result<Vec<Call<T>>, Error> {
        check_rank("q", q, PACKED.len())?;
        check_rank("k", k, PACKED.len())?;
        check_shape("v", v, PACKED, "k", k.shape())?;
        let call = |piece: Piece| {
            Ok(Call {
                attention: self.of_sequence(piece.sequence),
                q: rows(q, &piece.queries)?,
                k: rows(k, &piece.keys)?,
                v: rows(v, &piece.keys)?,
                piece,
            })
        };
        let pieces = sequences.pieces(q.shape()[0], k.shape()[0])?;
        pieces.into_iter().map(call).collect()
    }
}

/// A call with one sequence of a ragged batch.
struct Call<T: Element> {
    piece: Piece,
    attention: Attention,
    /// Views of the sequence's rows, `[1, heads, seqlen, head_dim]`.
    q: Tensor<T>,
    k: Tensor<T>,
    v: Tensor<T>,
}

impl<T: Element> Call<T> {
    fn plan(&self) -> Result<Plan, Error> {
        self.attention.plan(&self.q, &self.k, &self.v)
    }
}

/// Rows of a packed `[total, heads, head_dim]` tensor as `[1, heads, seqlen, head_dim]`.
fn rows<T: Element>(packed: &Tensor<T>, rows: &Range<usize>) -> Result<Tensor<T>, Error> {
    packed.narrow(0, rows.start, rows.len())?.transpose(0, 1)?.unsqueeze(0)
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

/// Tells if the tensor's device takes lse, row_max and row_sum of any strides.
fn takes_strided_lse<T: Element>(tensor: &Tensor<T>) -> bool {
    tensor.device().kind() == DeviceKind::Cpu
}

/// The results of these queries, as those of a call of their own. `place` makes lse, row_max and row_sum, `[1, heads, seqlen_q]`,
/// from views of the packed ones.
fn part<T: Element>(
    output: &Output<T>,
    queries: &Range<usize>,
    place: impl Fn(Tensor<f32>) -> Result<Tensor<f32>, Error>,
) -> Result<Output<T>, Error> {
    let of_rows = |packed: &Tensor<f32>| place(packed.narrow(1, queries.start, queries.len())?.unsqueeze(0)?);
    let statistics = match &output.statistics {
        Some(Statistics { row_max, row_sum }) => Some(Statistics {
            row_max: of_rows(row_max)?,
            row_sum: of_rows(row_sum)?,
        }),
        None => None,
    };
    Ok(Output {
        out: rows(&output.out, queries)?,
        lse: of_rows(&output.lse)?,
        statistics,
    })
}

/// A tensor like `model`, `[heads, total_q]`, of the numbers of its pieces, `[1, heads, seqlen_q]` each.
fn packed_rows<'a>(
    model: &Tensor<f32>,
    pieces: impl Iterator<Item = (&'a Piece, &'a Tensor<f32>)>,
) -> Result<Tensor<f32>, Error> {
    let (heads, total) = (model.shape()[0], model.shape()[1]);
    let mut numbers = vec![0.0; heads * total];
    for (Piece { queries, .. }, tensor) in pieces.filter(|(piece, _)| !piece.queries.is_empty()) {
        for (head, row) in tensor.to_vec()?.chunks(queries.len()).enumerate() {
            numbers[head * total..][queries.clone()].copy_from_slice(row);
        }
    }
    Tensor::from_slice(model.device(), model.shape(), &numbers)
}

/// Axes of q, k, v, out and dout of a ragged batch.
const PACKED: &[&str] = &["total", "heads", "head_dim"];

/// Refuses results and a gradient that are not those of a forward pass over q.
fn check_output<T: Element>(output: &Output<T>, dout: &Tensor<T>, q: &Tensor<T>) -> Result<(), Error> {
    check_shape("out", &output.out, PACKED, "q", q.shape())?;
    check_shape("dout", dout, PACKED, "q", q.shape())?;
    let of_rows = [q.shape()[1], q.shape()[0]];
    let mut numbers = vec![("lse", &output.lse)];
    if let Some(Statistics { row_max, row_sum }) = &output.statistics {
        numbers.extend([("row_max", row_max), ("row_sum", row_sum)]);
    }
    for (argument, tensor) in numbers {
        check_shape(argument, tensor, &["heads", "total"], "q", &of_rows)?;
    }
    Ok(())
}

fn check_rank<T: Scalar>(argument: &'static str, tensor: &Tensor<T>, expected: usize) -> Result<(), Error> {
    let shape = tensor.shape();
    if shape.len() == expected {
        return Ok(());
    }
    Err(Error::Rank {
        argument,
        shape: shape.to_vec(),
        rank: shape.len(),
        expected,
    })
}

/// Refuses a tensor of another shape than `expected`, which follows from `other`.
fn check_shape<T: Scalar>(
    argument: &'static str,
    tensor: &Tensor<T>,
    axes: &[&'static str],
    other: &'static str,
    expected: &[usize],
) -> Result<(), Error> {
    check_rank(argument, tensor, axes.len())?;
    let sizes = tensor.shape().iter().zip(expected);
    match axes.iter().zip(sizes).find(|(_, (got, expected))| got != expected) {
        Some((&axis, (&got, &expected))) => Err(Error::ShapeMismatch {
            argument,
            axis,
            got,
            other,
            expected,
        }),
        None => Ok(()),
    }
}
