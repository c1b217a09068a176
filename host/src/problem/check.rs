//! Checks of the tensors of a problem, each for one kind of [`Error`].

use flash_attention_kernels::entries::Dtype;
use flash_attention_kernels::mask::MAX_SEQLEN;

use super::quantized::FP8_HEAD_DIM_MULTIPLE;
use super::{Elements, HEAD_DIM_MULTIPLE, LATENT_HEAD_DIMS, MAX_HEAD_DIM};
use crate::error::Error;
use crate::layout::{Sharing, TensorInfo, contiguous_strides};
use crate::program::Program;

/// Names of the axes of q, k, v and out; lse has the first three.
const AXES: [&str; 4] = ["batch", "heads", "seqlen", "head_dim"];

/// Names of the tensors that hold one f32 per query: lse, and those of [`Statistics`](crate::Statistics).
pub(crate) const ROWS: [&str; 3] = ["lse", "row_max", "row_sum"];

/// A tensor with its name in error messages.
pub(crate) type Named<'a> = (&'static str, &'a TensorInfo);

/// Lists the tensors that hold one f32 per query, with their names.
pub(super) fn of_rows<'a>(lse: &'a TensorInfo, statistics: Option<[&'a TensorInfo; 2]>) -> Vec<Named<'a>> {
    let tensors = [lse].into_iter().chain(statistics.into_iter().flatten());
    ROWS.into_iter().zip(tensors).collect()
}

/// Returns true if the tensor of this name holds one f32 per query.
fn is_of_rows(argument: &str) -> bool {
    ROWS.contains(&argument)
}

pub(super) fn check_rank(tensors: &[Named<'_>]) -> Result<(), Error> {
    let rank = |argument| if is_of_rows(argument) { 3 } else { 4 };
    tensors
        .iter()
        .try_for_each(|&tensor| check_rank_of(tensor, rank(tensor.0)))
}

/// Checks that a tensor has this number of axes.
pub(super) fn check_rank_of((argument, tensor): Named<'_>, expected: usize) -> Result<(), Error> {
    match tensor.shape().len() {
        rank if rank == expected => Ok(()),
        rank => Err(Error::Rank {
            argument,
            shape: tensor.shape().to_vec(),
            rank,
            expected,
        }),
    }
}

/// Checks that the elements of a tensor lie in order without gaps.
pub(super) fn check_contiguous((argument, tensor): Named<'_>) -> Result<(), Error> {
    if tensor.is_contiguous() {
        return Ok(());
    }
    Err(Error::NotContiguous {
        argument,
        strides: tensor.strides().to_vec(),
        expected: contiguous_strides(tensor.shape()),
    })
}

pub(super) fn check_shapes_agree(
    &[q, k, v]: &[Named<'_>; 3],
    out: Option<Named<'_>>,
    of_rows: &[Named<'_>],
    one_batch: bool,
) -> Result<(), Error> {
    agree(k, q, if one_batch { &[0, 3] } else { &[3] })?; // heads and seqlen are k's own
    agree(v, k, &[0, 1, 2])?; // head_dim is v's own
    out.map_or(Ok(()), |out| agree_with_out(out, q, v))?;
    of_rows.iter().try_for_each(|&tensor| agree(tensor, q, &[0, 1, 2]))
}

/// Checks that a tensor has the shape of out: rows as q, head_dim as v.
pub(super) fn agree_with_out(tensor: Named<'_>, q: Named<'_>, v: Named<'_>) -> Result<(), Error> {
    agree(tensor, q, &[0, 1, 2])?;
    agree(tensor, v, &[3])
}

/// Checks that `argument` has the size of `model` along these axes.
pub(super) fn agree((argument, tensor): Named<'_>, (other, model): Named<'_>, axes: &[usize]) -> Result<(), Error> {
    for &axis in axes {
        let (got, expected) = (tensor.shape()[axis], model.shape()[axis]);
        if got != expected {
            return Err(Error::ShapeMismatch {
                argument,
                axis: AXES[axis],
                got,
                other,
                expected,
            });
        }
    }
    Ok(())
}

/// Checks that tensors have the dtype of the first, which is q, and those of rows f32; returns that dtype.
pub(super) fn check_dtypes(tensors: &[Named<'_>]) -> Result<Dtype, Error> {
    let dtype = tensors[0].1.dtype().of_attention().unwrap_or(Dtype::F32);
    check_dtypes_of(tensors, dtype)
}

/// Checks that tensors have this dtype, and those of rows f32; returns it.
pub(super) fn check_dtypes_of(tensors: &[Named<'_>], dtype: Dtype) -> Result<Dtype, Error> {
    for &(argument, tensor) in tensors {
        let expected = if is_of_rows(argument) { Dtype::F32 } else { dtype };
        if tensor.dtype() != expected {
            return Err(Error::DtypeMismatch {
                argument,
                got: tensor.dtype(),
                expected: expected.into(),
            });
        }
    }
    Ok(dtype)
}

/// Checks that tensors lie on the device of the first, which is q.
pub(super) fn check_devices(tensors: &[Named<'_>]) -> Result<(), Error> {
    let q = tensors[0].1;
    for &(argument, tensor) in tensors {
        if tensor.device() != q.device() {
            let (got, expected) = (tensor.device().to_string(), q.device().to_string());
            return Err(Error::DeviceMismatch {
                argument,
                got,
                other: tensors[0].0,
                expected,
            });
        }
    }
    Ok(())
}

pub(super) fn check_heads(q: &TensorInfo, k: &TensorInfo) -> Result<(), Error> {
    let (heads_q, heads_kv) = (q.shape()[1], k.shape()[1]);
    if heads_q.is_multiple_of(heads_kv) {
        Ok(())
    } else {
        Err(Error::HeadsNotDivisible { heads_q, heads_kv })
    }
}

pub(super) fn check_head_dims(q: Named<'_>, v: Named<'_>, elements: Elements) -> Result<(), Error> {
    let (is_quantized, is_cpu) = (matches!(elements, Elements::Quantized(_)), q.1.device().is_cpu());
    let multiple_of = if is_quantized && !is_cpu {
        FP8_HEAD_DIM_MULTIPLE
    } else {
        HEAD_DIM_MULTIPLE
    };
    let head_dim = |(_, tensor): Named<'_>| tensor.shape()[3];
    let is_latent = head_dim(q) > MAX_HEAD_DIM && head_dim(v) < head_dim(q);
    // GPUs have kernels of the tensor cores for it.
    let is_served = is_cpu || q.1.dtype() != Dtype::F32;
    let limits = if is_latent && is_served {
        LATENT_HEAD_DIMS
    } else {
        [MAX_HEAD_DIM; 2]
    };
    for (tensor, max) in [q, v].into_iter().zip(limits) {
        let head_dim = head_dim(tensor);
        if !(1..=max).contains(&head_dim) || !head_dim.is_multiple_of(multiple_of) {
            return Err(Error::HeadDim {
                argument: tensor.0,
                head_dim,
                multiple_of,
                max,
            });
        }
    }
    Ok(())
}

pub(crate) fn check_last_axis((argument, tensor): Named<'_>) -> Result<(), Error> {
    match tensor.strides()[3] {
        1 => Ok(()),
        stride => Err(Error::LastAxisStride {
            argument,
            stride,
            strides: tensor.strides().to_vec(),
        }),
    }
}

pub(super) fn check_seqlen((argument, tensor): Named<'_>) -> Result<(), Error> {
    let (seqlen, max) = (tensor.shape()[2], MAX_SEQLEN as usize);
    if seqlen <= max {
        Ok(())
    } else {
        Err(Error::SequenceTooLong { argument, seqlen, max })
    }
}

/// Refuses a result that shares memory with a table.
pub(super) fn check_tables_apart(program: &Program, outputs: &[Named<'_>]) -> Result<(), Error> {
    for table in program.tables().iter().chain(program.sinks()) {
        check_written(&[(table.name, &table.info())], outputs)?;
    }
    Ok(())
}

/// Checks that every element that is written has memory of its own.
pub(crate) fn check_written(inputs: &[Named<'_>], outputs: &[Named<'_>]) -> Result<(), Error> {
    for &(argument, output) in outputs {
        if output.overlaps_itself() {
            return Err(Error::OverlappingStrides {
                argument,
                shape: output.shape().to_vec(),
                strides: output.strides().to_vec(),
            });
        }
    }
    for (index, &(argument, output)) in outputs.iter().enumerate() {
        let others = inputs.iter().chain(&outputs[..index]);
        for &(other, tensor) in others {
            match output.sharing(tensor) {
                Sharing::Apart => {}
                Sharing::Shared => return Err(Error::Aliased { argument, other }),
                Sharing::Unproven => return Err(Error::Interleaved { argument, other }),
            }
        }
    }
    Ok(())
}
