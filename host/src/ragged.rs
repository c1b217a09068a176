//! Calls over ragged batches: a [`Sequences`] says where each sequence lies in packed tensors.
//!
//! Each sequence is a problem of its own over views of the packed tensors, longest first. Nothing is padded, and a
//! sequence's results are the same bits whatever else is in the batch.
//!
//! The CPU reads and writes lse, row_max and row_sum in place. A GPU's kernels take them contiguous a sequence, so there
//! they pass through the host, `12 * heads_q * total_q` bytes a call.

use std::ops::Range;

use crate::element::Element;
use crate::error::Error;
use crate::options::Attention;
use crate::output::{Gradients, Output, Statistics};
use crate::plan::Plan;
use crate::program::TableSource;
use crate::sequences::{Piece, Sequences};
use crate::target::DeviceInfo;
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
    /// see each sequence by itself; `at.batch` is its number, and dropout draws with a seed that is larger by it. Rows of q that belong to no sequence have `out = 0` and `lse = -inf`.
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
        let pieces = pieces(q, k, v, sequences)?;
        for piece in &pieces {
            let [q, k, v] = inputs([q, k, v], piece)?;
            self.of_sequence(piece.sequence).plan(&q, &k, &v)?;
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
        let mut parts = Vec::new();
        for piece in &pieces {
            let [q, k, v] = inputs([q, k, v], piece)?;
            let mut part = part(&output, &piece.queries)?;
            if !takes_strided_lse(&q) {
                part = with_of_rows(part, |view| Tensor::empty(view.device(), view.shape()))?;
            }
            self.of_sequence(piece.sequence).forward_to(&q, &k, &v, &mut part)?;
            parts.push(part);
        }
        if takes_strided_lse(q) {
            return Ok(output);
        }
        let packed = |numbers: fn(&Output<T>) -> Option<&Tensor<f32>>| {
            let parts = pieces.iter().zip(parts.iter().filter_map(numbers));
            packed_rows(&output.lse, parts)
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
    /// output, `[total_q, heads_q, head_dim]`. Gradients of tables are sums over the sequences, made on the host. Rows that belong to no sequence, and keys that do not count, have zeros.
    ///
    /// # Errors
    /// [`Error::Rank`] and [`Error::Sequence`] as for [`forward_ragged`](Self::forward_ragged), and the errors of
    /// [`backward`](Self::backward), before anything is launched.
    pub fn backward_ragged<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &Output<T>,
        dout: &Tensor<T>,
        sequences: &Sequences,
    ) -> Result<Gradients<T>, Error> {
        let pieces = pieces(q, k, v, sequences)?;
        for (argument, tensor, model) in [("out", &output.out, q), ("dout", dout, q)] {
            check_shape(argument, tensor, "q", model)?;
        }
        let mut outputs = Vec::new();
        for piece in &pieces {
            let [q, k, v] = inputs([q, k, v], piece)?;
            let (output, dout) = (in_place_or_copied(output, &piece.queries)?, rows(dout, &piece.queries)?);
            self.of_sequence(piece.sequence)
                .plan_backward(&q, &k, &v, &output, &dout)?;
            outputs.push(output);
        }
        let mut gradients = Gradients::new(
            Tensor::empty(q.device(), q.shape())?,
            Tensor::empty(k.device(), k.shape())?,
            Tensor::empty(v.device(), v.shape())?,
        );
        let mut of_tables: Vec<(TableSource, Vec<f32>)> = Vec::new();
        for (piece, output) in pieces.iter().zip(&outputs) {
            let mut of_piece = Gradients::new(
                rows(&gradients.dq, &piece.queries)?,
                rows(&gradients.dk, &piece.keys)?,
                rows(&gradients.dv, &piece.keys)?,
            );
            let [q, k, v] = inputs([q, k, v], piece)?;
            let dout = rows(dout, &piece.queries)?;
            self.of_sequence(piece.sequence)
                .backward_into(&q, &k, &v, output, &dout, &mut of_piece)?;
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

    /// How [`forward_ragged`](Self::forward_ragged) would compute this: a plan a sequence, in the order in which they run.
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
        let pieces = pieces(q, k, v, sequences)?;
        let plan = |piece: &Piece| {
            let [q, k, v] = inputs([q, k, v], piece)?;
            self.of_sequence(piece.sequence).plan(&q, &k, &v)
        };
        pieces.iter().map(plan).collect()
    }
}

/// The problems of a ragged batch, of tensors that agree.
fn pieces<T: Element>(q: &Tensor<T>, k: &Tensor<T>, v: &Tensor<T>, sequences: &Sequences) -> Result<Vec<Piece>, Error> {
    for (argument, tensor) in [("q", q), ("k", k), ("v", v)] {
        let rank = tensor.shape().len();
        if rank != 3 {
            return Err(Error::Rank {
                argument,
                shape: tensor.shape().to_vec(),
                rank,
                expected: 3,
            });
        }
    }
    check_shape("v", v, "k", k)?;
    sequences.pieces(q.shape()[0], k.shape()[0])
}

/// The queries, keys and values of a problem.
fn inputs<T: Element>([q, k, v]: [&Tensor<T>; 3], piece: &Piece) -> Result<[Tensor<T>; 3], Error> {
    Ok([rows(q, &piece.queries)?, rows(k, &piece.keys)?, rows(v, &piece.keys)?])
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
    matches!(tensor.device().info(), DeviceInfo::Cpu { .. })
}

/// The results of these queries for a backward pass; lse, row_max and row_sum are copies where a device needs them contiguous.
fn in_place_or_copied<T: Element>(output: &Output<T>, queries: &Range<usize>) -> Result<Output<T>, Error> {
    let part = part(output, queries)?;
    if takes_strided_lse(&part.out) {
        Ok(part)
    } else {
        with_of_rows(part, |view| view.contiguous())
    }
}

/// Replaces lse, row_max and row_sum, in this order.
fn with_of_rows<T: Element>(
    output: Output<T>,
    mut replace: impl FnMut(&Tensor<f32>) -> Result<Tensor<f32>, Error>,
) -> Result<Output<T>, Error> {
    Ok(Output {
        lse: replace(&output.lse)?,
        statistics: match &output.statistics {
            Some(Statistics { row_max, row_sum }) => Some(Statistics {
                row_max: replace(row_max)?,
                row_sum: replace(row_sum)?,
            }),
            None => None,
        },
        out: output.out,
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

/// The results of these queries, as those of a problem of their own.
fn part<T: Element>(output: &Output<T>, queries: &Range<usize>) -> Result<Output<T>, Error> {
    let of_rows = |packed: &Tensor<f32>| packed.narrow(1, queries.start, queries.len())?.unsqueeze(0);
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

/// Refuses a tensor of another shape than its model.
fn check_shape<T: Element>(
    argument: &'static str,
    tensor: &Tensor<T>,
    other: &'static str,
    model: &Tensor<T>,
) -> Result<(), Error> {
    const AXES: [&str; 3] = ["total", "heads", "head_dim"];
    let rank = tensor.shape().len();
    if rank != AXES.len() {
        return Err(Error::Rank {
            argument,
            shape: tensor.shape().to_vec(),
            rank,
            expected: AXES.len(),
        });
    }
    for (axis, name) in AXES.into_iter().enumerate() {
        let (got, expected) = (tensor.shape()[axis], model.shape()[axis]);
        if got != expected {
            return Err(Error::ShapeMismatch {
                argument,
                axis: name,
                got,
                other,
                expected,
            });
        }
    }
    Ok(())
}
