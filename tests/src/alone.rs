//! The results of one sequence of a batch, against the oracle and those of a call of its own.

use flash_attention::device::DeviceKind;
use flash_attention::reference::Dims;
use flash_attention::{Attention, Element, Error, Gradients, Output, Sequences, Statistics, Tensor};

use crate::{Inputs, compare};

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

/// Checks out and lse of a sequence, q, k and v `[1, heads, seqlen, head_dim]`: the errors against the oracle, head by head, and, if
/// results do not depend on the batch, that they are the bits of a call alone. Results that are equal but wrong do not pass.
///
/// # Panics
/// If a result is wrong, with `name` in the message, or a call fails.
pub fn check_sequence<T: Element>(
    name: &str,
    attention: &Attention,
    inputs: [&Tensor<T>; 3],
    (out, lse): (&[T], &[f32]),
    depends_on_batch: bool,
) {
    let shape = |tensor: &Tensor<T>| -> [usize; 4] { tensor.shape().try_into().expect("four axes") };
    let evaluator = attention.evaluator().expect("a program");
    let [shape_q, shape_k, [.., head_dim_v]] = inputs.map(shape);
    let dims = Dims::with_program(attention, shape_q, shape_k, evaluator).with_head_dim_v(head_dim_v);
    let shape_of_out = [&shape_q[..3], &[head_dim_v]].concat();
    let [q, k, v] = inputs.map(|tensor| tensor.to_vec().expect("it is there"));
    let numbers = Inputs { q, k, v };
    let (want_out, want_lse) = numbers.oracle(&dims);
    let [out_bound, lse_bound] = numbers.bounds(&dims, &want_out, &want_lse);
    let of_out = compare("out", &shape_of_out, out, &want_out, out_bound);
    let of_lse = compare("lse", &shape_of_out[..3], lse, &want_lse, lse_bound);
    if let Some(mismatch) = of_out.err().or(of_lse.err()) {
        panic!("{name}\n{mismatch}");
    }
    if depends_on_batch {
        return;
    }
    let [q, k, v] = inputs;
    let alone = forward_alone(attention, q, k, v).expect("a call alone");
    let of = |numbers: &[T]| -> Vec<f64> { numbers.iter().map(|x| x.to_f64()).collect() };
    assert_eq!(of(out), of(&alone.out.to_vec().expect("it is there")), "out of {name}");
    let bits = |numbers: &[f32]| -> Vec<u32> { numbers.iter().map(|x| x.to_bits()).collect() };
    assert_eq!(
        bits(lse),
        bits(&alone.lse.to_vec().expect("it is there")),
        "lse of {name}"
    );
}
