//! Calls over batches that are no rectangle. Nothing is padded.
//!
//! The CPU runs the problems of a batch in one pass over their tasks, longest first. It reads pages, and reads and writes lse,
//! row_max and row_sum, in place. A forward pass on a GPU is one launch over the tiles of all sequences, and a second one if there are
//! splits; a backward pass is one launch for delta, one for dQ and one for dK and dV. Only where kernels for Hopper are forced do GPUs
//! launch kernels a sequence. The keys of several pages, and lse, row_max and row_sum of packed queries, pass through the host there,
//! once a call.

mod append;
mod cached;
mod ragged;

pub use append::NewKeys;

use std::ops::Range;

use self::cached::{gathered, layout_of_gathered};
use crate::call::{forward_batch, named};
use crate::device::DeviceKind;
use crate::element::{Element, Scalar};
use crate::error::Error;
use crate::layout::TensorInfo;
use crate::options::Attention;
use crate::output::{Output, Statistics};
use crate::plan::Plan;
use crate::problem::Problem;
use crate::sequences::{Pages, Placed};
use crate::tensor::Tensor;
use flash_attention_kernels::entries::Dtype;

/// The call with one sequence of a batch.
struct Call<T: Element> {
    attention: Attention,
    queries: Queries,
    /// Views of the sequence, `[1, heads, seqlen, head_dim]` each. Where k and v are in pages, the views repeat one row of their
    /// first page.
    q: Tensor<T>,
    k: Tensor<T>,
    v: Tensor<T>,
    /// The pages of the sequence and the k and v that have them, `[pages, page_size, heads_kv, head_dim]`; `None` if all keys are
    /// in one page.
    pages: Option<(Pages, [Tensor<T>; 2])>,
}

impl<T: Element> Call<T> {
    /// The plan for new contiguous results, or for those of `output`. Pages are not read.
    fn plan(&self, output: Option<&Output<T>>) -> Result<Plan, Error> {
        let outputs = output.map(Output::outputs);
        let (attention, q, device) = (&self.attention, self.q.info(), self.q.device().info());
        let problem = match &self.pages {
            Some(_) if !is_cpu(&self.q) => {
                let [k, v] = [layout_of_gathered(&self.k)?, layout_of_gathered(&self.v)?];
                Problem::new(attention, q, &k, &v, outputs)?
            }
            pages => {
                let problem = Problem::new(attention, q, self.k.info(), self.v.info(), outputs)?;
                match pages {
                    Some((pages, tensors)) => {
                        let strides = tensors
                            .each_ref()
                            .map(|tensor| [tensor.strides()[0], tensor.strides()[1]]);
                        problem.with_pages(pages.clone(), strides)
                    }
                    None => problem,
                }
            }
        };
        Plan::new(&problem, &device)
    }

    /// k and v for a device that reads no pages: those of several pages are copied through the host.
    fn without_pages(&self) -> Result<[Tensor<T>; 2], Error> {
        let Some((pages, [k, v])) = &self.pages else {
            return Ok([self.k.clone(), self.v.clone()]);
        };
        let keys = self.k.shape()[2];
        Ok([gathered(k, pages, keys)?, gathered(v, pages, keys)?])
    }
}

/// The plans of a forward pass over a batch with new results.
fn plans<T: Element>(calls: &[Call<T>]) -> Result<Vec<Plan>, Error> {
    let plan = |call: &Call<T>| Ok(call.plan(None)?.in_batch(calls.len()));
    calls.iter().map(plan).collect()
}

/// The queries of one sequence in the tensors of a batch: q, out, dout and dq; lse, row_max and row_sum.
#[derive(Clone, Debug)]
enum Queries {
    /// Rows of `[total_q, heads, head_dim]` and `[heads, total_q]`.
    Packed(Range<usize>),
    /// Entry of `[batch, heads, seqlen_q, head_dim]` and `[batch, heads, seqlen_q]`.
    Entry(usize),
    /// All entries of these.
    Entries,
}

impl Queries {
    /// The vectors of these queries, `[1, heads, seqlen_q, head_dim]`.
    fn vectors<T: Element>(&self, tensor: &Tensor<T>) -> Result<Tensor<T>, Error> {
        match self {
            Self::Packed(range) => rows(tensor, range),
            Self::Entry(index) => tensor.narrow(0, *index, 1),
            Self::Entries => Ok(tensor.clone()),
        }
    }

    /// The numbers of these queries, `[1, heads, seqlen_q]`, in a tensor of this order.
    fn numbers(&self, tensor: &Tensor<f32>, order: Order) -> Result<Tensor<f32>, Error> {
        match (self, order) {
            (Self::Packed(range), Order::ByHead) => tensor.narrow(1, range.start, range.len())?.unsqueeze(0),
            (Self::Packed(range), Order::BySequence) => {
                let heads = tensor.shape()[0];
                let address = tensor.address() + (heads * range.start * size_of::<f32>()) as u64;
                let info = TensorInfo::contiguous(tensor.device().id(), Dtype::F32, [1, heads, range.len()], address)?;
                Ok(Tensor::seen_through(info, tensor.owner()))
            }
            (Self::Entry(index), _) => tensor.narrow(0, *index, 1),
            (Self::Entries, _) => Ok(tensor.clone()),
        }
    }

    /// The queries of all sequences in q, packed or as a batch.
    fn all<T: Element>(q: &Tensor<T>) -> Self {
        match *q.shape() {
            [total_q, _, _] => Self::Packed(0..total_q),
            _ => Self::Entries,
        }
    }
}

/// Orders of the numbers of packed queries in a tensor `[heads, total_q]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    /// The order of the axes.
    ByHead,
    /// Sequence after sequence, each `[heads, seqlen_q]`, as kernels take them; the tensor is contiguous.
    BySequence,
}

/// New results of the queries in q, packed or as a batch, with `head_dim` elements in a row of out.
fn empty_output<T: Element>(q: &Tensor<T>, head_dim: usize) -> Result<Output<T>, Error> {
    let (out_shape, rows_shape) = match *q.shape() {
        [total_q, heads, _] => (vec![total_q, heads, head_dim], vec![heads, total_q]),
        [batch, heads, seqlen_q, _] => (vec![batch, heads, seqlen_q, head_dim], vec![batch, heads, seqlen_q]),
        _ => unreachable!("q has three or four axes"),
    };
    Output::empty(q.device(), &out_shape, &rows_shape)
}

/// Runs the forward pass of all sequences at once, on a GPU, in a new workspace or in the caller's. q is packed or a batch, and the
/// results have its layout; k and v are `[entries, heads_kv, rows, head_dim]` or `[pages, heads_kv, page_size, head_dim]`.
fn forward_placed<T: Element>(
    attention: &Attention,
    q: &Tensor<T>,
    [k, v]: [Tensor<T>; 2],
    placed: Placed,
    output: &mut Output<T>,
    workspace: Option<&mut Tensor<f32>>,
) -> Result<(), Error> {
    let all = Queries::all(q);
    let mut views = part(output, &all, Order::ByHead)?;
    let mut others = named([q, &k, &v]).to_vec();
    others.extend(output.named());
    attention.forward_placed([&all.vectors(q)?, &k, &v], &mut views, placed, (workspace, &others))
}

/// Plans what [`forward_placed`] runs.
fn plan_placed<T: Element>(
    attention: &Attention,
    q: &Tensor<T>,
    [k, v]: [Tensor<T>; 2],
    placed: Placed,
) -> Result<Vec<Plan>, Error> {
    let q = Queries::all(q).vectors(q)?;
    Ok(vec![attention.plan_placed([&q, &k, &v], None, placed)?])
}

/// Runs the forward pass of each call on the CPU, which needs no workspace. q holds the queries of all of them, packed or as a batch,
/// and the results have its layout.
fn forward_on_cpu<T: Element>(q: &Tensor<T>, calls: &[Call<T>], output: &Output<T>) -> Result<(), Error> {
    let parts: Vec<_> = calls
        .iter()
        .map(|call| part(output, &call.queries, Order::ByHead))
        .collect::<Result<_, _>>()?;
    let plan = |(call, part): (&'_ Call<T>, &'_ Output<T>)| Ok(call.plan(Some(part))?.in_batch(calls.len()));
    let plans = calls.iter().zip(&parts).map(plan).collect::<Result<Vec<_>, Error>>()?;
    let runs = plans.into_iter().zip(calls).zip(&parts);
    let runs: Vec<_> = runs
        .map(|((plan, call), part)| (plan, [&call.q, &call.k, &call.v], part))
        .collect();
    forward_batch(q.device(), &runs)
}

/// Runs the forward pass of each call on a device whose kernels take one sequence.
fn forward_one_by_one<T: Element>(q: &Tensor<T>, calls: &[Call<T>], output: Output<T>) -> Result<Output<T>, Error> {
    plans(calls)?;
    for call in calls {
        let mut part = part(&output, &call.queries, Order::BySequence)?;
        let [k, v] = call.without_pages()?;
        call.attention.forward_into_output(&call.q, &k, &v, &mut part)?;
    }
    match q.shape().len() {
        3 => reordered(&output, calls, Order::ByHead),
        _ => Ok(output),
    }
}

/// Rows of a packed `[total, heads, head_dim]` tensor as `[1, heads, seqlen, head_dim]`.
fn rows<T: Element>(packed: &Tensor<T>, rows: &Range<usize>) -> Result<Tensor<T>, Error> {
    packed.narrow(0, rows.start, rows.len())?.transpose(0, 1)?.unsqueeze(0)
}

/// Tells if the tensor's device is the CPU, which takes a batch at once, and pages.
fn is_cpu<T: Element>(tensor: &Tensor<T>) -> bool {
    tensor.device().kind() == DeviceKind::Cpu
}

/// The results of these queries, as those of a call of their own, in the results of a batch with numbers in this order.
fn part<T: Element>(output: &Output<T>, queries: &Queries, order: Order) -> Result<Output<T>, Error> {
    output_of(queries.vectors(&output.out)?, output, |tensor| {
        queries.numbers(tensor, order)
    })
}

/// Results with the numbers of packed queries in the other order, copied through the host.
fn reordered<T: Element>(output: &Output<T>, calls: &[Call<T>], to: Order) -> Result<Output<T>, Error> {
    output_of(output.out.clone(), output, |tensor| {
        let (heads, total) = (tensor.shape()[0], tensor.shape()[1]);
        let numbers = tensor.to_vec()?;
        let mut reordered = vec![0.0; numbers.len()];
        for call in calls {
            let Queries::Packed(range) = &call.queries else {
                continue;
            };
            for head in 0..heads {
                let by_head = head * total + range.start;
                let by_sequence = heads * range.start + head * range.len();
                let (from, to) = match to {
                    Order::ByHead => (by_sequence, by_head),
                    Order::BySequence => (by_head, by_sequence),
                };
                reordered[to..][..range.len()].copy_from_slice(&numbers[from..][..range.len()]);
            }
        }
        Tensor::from_slice(tensor.device(), tensor.shape(), &reordered)
    })
}

/// Results of this out, with lse, row_max and row_sum made of those of `output`.
fn output_of<T: Element>(
    out: Tensor<T>,
    output: &Output<T>,
    numbers: impl Fn(&Tensor<f32>) -> Result<Tensor<f32>, Error>,
) -> Result<Output<T>, Error> {
    let statistics = match &output.statistics {
        Some(Statistics { row_max, row_sum }) => Some(Statistics {
            row_max: numbers(row_max)?,
            row_sum: numbers(row_sum)?,
        }),
        None => None,
    };
    Ok(Output {
        out,
        lse: numbers(&output.lse)?,
        statistics,
    })
}

/// Refuses results of other shapes than those of queries, packed or as a batch, and values of this head_dim.
fn check_results<T: Element>(q: &Tensor<T>, head_dim: usize, output: &Output<T>) -> Result<(), Error> {
    let rows: Vec<Size> = match *q.shape() {
        [total, heads, _] => vec![("total", "q", total), ("heads", "q", heads)],
        [batch, heads, seqlen, _] => vec![("batch", "q", batch), ("heads", "q", heads), ("seqlen", "q", seqlen)],
        _ => unreachable!("q has three or four axes"),
    };
    let of_out = [&rows[..], &[("head_dim", "v", head_dim)]].concat();
    check_shape("out", &output.out, &of_out)?;
    let of_rows: Vec<Size> = match rows[..] {
        [total, heads] => vec![heads, total],
        _ => rows,
    };
    check_shape("lse", &output.lse, &of_rows)?;
    if let Some(Statistics { row_max, row_sum }) = &output.statistics {
        check_shape("row_max", row_max, &of_rows)?;
        check_shape("row_sum", row_sum, &of_rows)?;
    }
    Ok(())
}

/// Refuses results in the caller's memory where kernels for Hopper are forced, which take one sequence.
fn refuse_one_by_one<T: Element>(attention: &Attention, q: &Tensor<T>) -> Result<(), Error> {
    if is_cpu(q) || attention.takes_placed(q) {
        return Ok(());
    }
    Err(Error::Unsupported {
        feature: "a batch with results in the caller's memory".to_owned(),
        device: q.device().to_string(),
        reason: "Hopper's own kernels take one sequence; leave out `.arch(Arch::Sm90a)`",
    })
}

/// Axes of q, k, v, out and dout of packed sequences.
const PACKED: [&str; 3] = ["total", "heads", "head_dim"];

/// Size of an axis: its name, the tensor from which it follows, and that tensor's size.
type Size = (&'static str, &'static str, usize);

/// Returns the sizes of a packed tensor with the rows of one tensor and the head_dim of v, both of three axes.
fn packed<T: Element>((other, rows): (&'static str, &Tensor<T>), v: &Tensor<T>) -> [Size; 3] {
    let [total, heads, head_dim] = PACKED;
    [
        (total, other, rows.shape()[0]),
        (heads, other, rows.shape()[1]),
        (head_dim, "v", v.shape()[2]),
    ]
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

/// Refuses a tensor whose axes have other sizes.
fn check_shape<T: Scalar>(argument: &'static str, tensor: &Tensor<T>, sizes: &[Size]) -> Result<(), Error> {
    check_rank(argument, tensor, sizes.len())?;
    let mut axes = tensor.shape().iter().zip(sizes);
    match axes.find(|(got, (.., expected))| *got != expected) {
        Some((&got, &(axis, other, expected))) => Err(Error::ShapeMismatch {
            argument,
            axis,
            got,
            other,
            expected,
        }),
        None => Ok(()),
    }
}
