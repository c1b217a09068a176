//! The results of one sequence of a batch in a call of its own.

use flash_attention::device::DeviceKind;
use flash_attention::{Attention, Element, Error, Gradients, Output, Sequences, Statistics, Tensor};

/// The forward pass over one sequence, q, k and v `[1, heads, seqlen, head_dim]`, by the kernels that a batch of sequences takes: on a
/// GPU these round in another order than those of a rectangle.
///
/// # Errors
/// The errors of the call.
pub fn forward_alone<T: Element>(
    attention: &Attention,
    q: &Tensor<T>,
    k: &Tensor<T>,
    v: &Tensor<T>,
) -> Result<Output<T>, Error> {
    if q.device().kind() == DeviceKind::Cpu {
        return attention.forward(q, k, v);
    }
    let packed = |tensor: &Tensor<T>| tensor.select(0, 0)?.transpose(0, 1);
    let ends = |tensor: &Tensor<T>| [0, tensor.shape()[2] as i32];
    let sequences = Sequences::new(&ends(q), &ends(k))?;
    let output = attention.forward_ragged(&packed(q)?, &packed(k)?, &packed(v)?, &sequences)?;
    let rows = |tensor: &Tensor<f32>| tensor.unsqueeze(0);
    let mut alone = Output::new(output.out.transpose(0, 1)?.unsqueeze(0)?, rows(&output.lse)?);
    if let Some(Statistics { row_max, row_sum }) = &output.statistics {
        alone.statistics = Some(Statistics {
            row_max: rows(row_max)?,
            row_sum: rows(row_sum)?,
        });
    }
    Ok(alone)
}

/// The backward pass over one sequence, like [`forward_alone`], whose output it takes.
///
/// # Errors
/// The errors of the call.
pub fn backward_alone<T: Element>(
    attention: &Attention,
    [q, k, v]: [&Tensor<T>; 3],
    output: &Output<T>,
    dout: &Tensor<T>,
) -> Result<Gradients<T>, Error> {
    if q.device().kind() == DeviceKind::Cpu {
        return attention.backward(q, k, v, output, dout);
    }
    let packed = |tensor: &Tensor<T>| tensor.select(0, 0)?.transpose(0, 1);
    let rows = |tensor: &Tensor<f32>| tensor.select(0, 0);
    let ends = |tensor: &Tensor<T>| [0, tensor.shape()[2] as i32];
    let sequences = Sequences::new(&ends(q), &ends(k))?;
    let mut alone = Output::new(packed(&output.out)?, rows(&output.lse)?);
    if let Some(Statistics { row_max, row_sum }) = &output.statistics {
        alone.statistics = Some(Statistics {
            row_max: rows(row_max)?,
            row_sum: rows(row_sum)?,
        });
    }
    let gradients = attention.backward_ragged(
        &packed(q)?,
        &packed(k)?,
        &packed(v)?,
        &alone,
        &packed(dout)?,
        &sequences,
    )?;
    let batch = |tensor: &Tensor<T>| tensor.transpose(0, 1)?.unsqueeze(0);
    Ok(Gradients::new(
        batch(&gradients.dq)?,
        batch(&gradients.dk)?,
        batch(&gradients.dv)?,
    ))
}
