//! Memory that the rows of a table share, filled once with normal numbers.
//!
//! All rows have tensors of the same number of elements, and each views this memory in its own shape. There are
//! several sets of inputs, used in turn, so that a run does not find its inputs in L2 from the run before.

use std::sync::Arc;

use flash_attention::plan::AnyPlan;
use flash_attention::{Attention, Device, Element, Error, Gradients, Output, Tensor};

use crate::Failure;
use crate::row::{Pass, Row};

/// Number of normal numbers on the host. Tensors are filled from them, each starting at another place.
const POOL: usize = (1 << 21) + 7;

/// Largest number of input sets; for small inputs this is not enough to exceed the cache.
const MOST_SETS: usize = 64;

/// Inputs of one run as flat tensors (q, k, v, dout), and their forward results.
struct Set<T: Element> {
    inputs: [Tensor<T>; 4],
    out: Tensor<T>,
    lse: Tensor<f32>,
}

/// Memory for tensors of up to a number of elements.
pub struct Arena<T: Element> {
    device: Device,
    elements: usize,
    sets: Vec<Set<T>>,
    gradients: [Tensor<T>; 3],
}

/// Tensors of a row in an arena.
pub struct Bound<T: Element> {
    attention: Attention,
    pass: Pass,
    /// q, k, v, dout, and the output, of every set.
    pub sets: Vec<([Tensor<T>; 4], Output<T>)>,
    /// Memory for the gradients.
    pub gradients: Gradients<T>,
}

impl<T: Element> Arena<T> {
    /// Makes an arena for tensors of `elements` elements, with at least two sets of inputs, and enough that they have
    /// `rotate_bytes` together.
    ///
    /// # Errors
    /// The error of the device if it has no room.
    pub fn new(device: &Device, elements: usize, rotate_bytes: usize) -> Result<Self, Error> {
        let sets = rotate_bytes.div_ceil(3 * elements * size_of::<T>()).clamp(2, MOST_SETS);
        let pool = normal_numbers::<T>(POOL);
        let mut drawn = 0;
        let mut draw = || {
            // Starts far apart, and never equal.
            let start = drawn * 379_009 % pool.len();
            drawn += 1;
            let data: Vec<T> = pool[start..]
                .iter()
                .chain(pool.iter().cycle())
                .take(elements)
                .copied()
                .collect();
            Tensor::from_slice(device, [elements], &data)
        };
        let empty = || Tensor::zeros(device, [elements]);
        let sets = (0..sets).map(|_| {
            Ok(Set {
                inputs: [draw()?, draw()?, draw()?, draw()?],
                out: empty()?,
                // A head has at least 8 elements.
                lse: Tensor::zeros(device, [elements.div_ceil(8)])?,
            })
        });
        Ok(Self {
            device: device.clone(),
            elements,
            sets: sets.collect::<Result<_, Error>>()?,
            gradients: [empty()?, empty()?, empty()?],
        })
    }

    /// Returns true if tensors of this shape fit.
    pub fn holds(&self, shape: [usize; 4]) -> bool {
        shape.iter().product::<usize>() <= self.elements
    }

    /// Views the arena in a row's shape. For a backward pass, forward has been run on every set.
    ///
    /// # Errors
    /// The error of the forward pass.
    pub fn bind(&mut self, row: &Row, shape: [usize; 4], attention: Attention) -> Result<Bound<T>, Error> {
        let attention = if row.causal { attention.causal() } else { attention };
        let attention = match row.pass {
            Pass::Deterministic => attention.deterministic(),
            Pass::Forward | Pass::Backward => attention,
        };
        let view = |flat: &Tensor<T>| view(&self.device, flat, &shape);
        let mut sets = Vec::new();
        for set in &self.sets {
            let [q, k, v, dout] = &set.inputs;
            let inputs = [view(q)?, view(k)?, view(v)?, view(dout)?];
            let mut output = Output::new(view(&set.out)?, self::view(&self.device, &set.lse, &shape[..3])?);
            if row.pass != Pass::Forward {
                let [q, k, v, _] = &inputs;
                attention.forward_into(q, k, v, &mut output.out, &mut output.lse)?;
            }
            sets.push((inputs, output));
        }
        let [dq, dk, dv] = &self.gradients;
        let gradients = Gradients::new(view(dq)?, view(dk)?, view(dv)?);
        Ok(Bound {
            attention,
            pass: row.pass,
            sets,
            gradients,
        })
    }
}

impl<T: Element> Bound<T> {
    /// Launches the row's pass, with the sets in turn.
    ///
    /// # Errors
    /// The error of the call.
    pub fn run(&mut self, turn: usize) -> Result<(), Error> {
        let turn = turn % self.sets.len();
        let ([q, k, v, dout], output) = &mut self.sets[turn];
        match self.pass {
            Pass::Forward => {
                let Output { out, lse, .. } = output;
                self.attention.forward_into(q, k, v, out, lse)
            }
            Pass::Backward | Pass::Deterministic => {
                let gradients = &mut self.gradients;
                self.attention.backward_into(q, k, v, output, dout, gradients)
            }
        }
    }

    /// Returns the names of the kernels that the row's pass launches, in order.
    ///
    /// # Errors
    /// The error of planning.
    pub fn kernels(&self) -> Result<Vec<&'static str>, Failure> {
        let ([q, k, v, dout], output) = &self.sets[0];
        let entries = match self.pass {
            Pass::Forward => AnyPlan::from(&self.attention.plan(q, k, v)?).entries(),
            Pass::Backward | Pass::Deterministic => {
                AnyPlan::from(&self.attention.plan_backward(q, k, v, output, dout)?).entries()
            }
        };
        Ok(entries.iter().map(|entry| entry.name).collect())
    }

    /// Returns the softmax scale.
    pub fn scale(&self) -> f64 {
        let head_dim = self.gradients.dq.shape()[3];
        self.attention.scale_for(head_dim).into()
    }
}

/// Views the first elements of a flat tensor in another shape.
fn view<T: Element>(device: &Device, flat: &Tensor<T>, shape: &[usize]) -> Result<Tensor<T>, Error> {
    assert!(shape.iter().product::<usize>() <= flat.shape()[0]);
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    let owner = Arc::new(flat.clone());
    // SAFETY: the shape fits in the flat tensor, which is initialised and lives as long as its clone, the owner. Only
    // this device uses it, in the order of its stream.
    unsafe { Tensor::from_raw_parts(device, flat.address(), shape, strides, Some(owner)) }
}

/// Returns normally distributed numbers, the same on every run.
fn normal_numbers<T: Element>(len: usize) -> Vec<T> {
    let mut state = 1_u64;
    let mut uniform = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        // In (0, 1].
        ((state >> 11) + 1) as f64 / (1_u64 << 53) as f64
    };
    let mut numbers = Vec::with_capacity(len + 1);
    while numbers.len() < len {
        let (radius, angle) = ((-2.0 * uniform().ln()).sqrt(), std::f64::consts::TAU * uniform());
        numbers.extend([T::from_f64(radius * angle.cos()), T::from_f64(radius * angle.sin())]);
    }
    numbers.truncate(len);
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_normal() {
        let numbers = normal_numbers::<f32>(100_001);
        let n = numbers.len() as f64;
        let mean = numbers.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let square = numbers.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / n;
        let fourth = numbers.iter().map(|&x| f64::from(x).powi(4)).sum::<f64>() / n;
        assert!(
            mean.abs() < 0.02 && (square - 1.0).abs() < 0.03 && (fourth - 3.0).abs() < 0.2,
            "{mean} {square} {fourth}"
        );
    }

    #[test]
    fn inputs_are_as_many_as_asked_for() {
        let arena = |rotate| {
            Arena::<f32>::new(&Device::cpu(), 1000, rotate)
                .expect("small")
                .sets
                .len()
        };
        assert_eq!([0, 24_000, 24_001, 60_000, 6_000_000].map(arena), [2, 2, 3, 5, 64]);
    }
}
