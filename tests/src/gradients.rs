//! The backward part of a [`Case`]: forward, then gradients in poisoned memory, compared with the oracle.

use std::fmt::Debug;

use flash_attention::reference;
use flash_attention::{Attention, Device, Element, Gradients, Output, Statistics};

use crate::layout::{Input, Layout, Poisoned};
use crate::{Case, Inputs, compare, devices, files, for_dtype, largest_error};

/// Gradients of a device, in logical order.
#[derive(Clone, Debug, PartialEq)]
pub struct GradientsOutcome<T> {
    /// Gradient of q.
    pub dq: Vec<T>,
    /// Gradient of k.
    pub dk: Vec<T>,
    /// Gradient of v.
    pub dv: Vec<T>,
}

impl<T: Element> GradientsOutcome<T> {
    /// Returns dq, dk and dv with their names.
    pub fn named(&self) -> [(&'static str, &[T]); 3] {
        [("dq", &self.dq), ("dk", &self.dk), ("dv", &self.dv)]
    }

    /// Returns the bits of all gradients, for comparisons to the bit.
    pub fn bits(&self) -> Vec<u64> {
        let bits = |x: &T| x.to_f64().to_bits();
        self.named()
            .iter()
            .flat_map(|(_, gradient)| gradient.iter().map(bits))
            .collect()
    }
}

/// A case on a device after its forward pass, ready for backward.
#[derive(Debug)]
pub struct Prepared<T: Element> {
    /// Options of the calls.
    pub attention: Attention,
    /// q, k and v as placed on the device.
    pub inputs: [Input<T>; 3],
    /// Forward results.
    pub output: Output<T>,
    /// Gradient of the output, as placed on the device.
    pub dout: Input<T>,
    /// Memory for dq, dk and dv, filled with NaN.
    pub gradients: [Poisoned<T>; 3],
}

impl Case {
    /// Draws the gradient of the output from the seed.
    pub fn dout<T: Element>(&self) -> Vec<T> {
        files::normal(self.out_shape().iter().product(), 1.0, self.seed * 3 + 1_000_003)
            .into_iter()
            .map(T::from_f32)
            .collect()
    }

    /// Runs forward and backward on every device and checks dq, dk and dv against their bounds.
    ///
    /// # Panics
    /// If a device fails, or an error exceeds its bound.
    pub fn check_gradients(&self) {
        self.check_gradients_on(devices().all());
    }

    /// Checks gradients like [`check_gradients`](Self::check_gradients), on these devices.
    ///
    /// # Panics
    /// Under the conditions of [`check_gradients`](Self::check_gradients).
    pub fn check_gradients_on<'a>(&self, devices: impl IntoIterator<Item = &'a Device>) {
        for_dtype!(self.dtype, T => self.check_gradients_as::<T>(devices.into_iter()));
    }

    fn check_gradients_as<'a, T: Element>(&self, devices: impl Iterator<Item = &'a Device>) {
        self.check_gradients_of(&self.inputs::<T>(), &self.dout::<T>(), devices);
    }

    /// Solves the case forward and backward from these inputs, and checks dq, dk and dv with the rule.
    ///
    /// # Panics
    /// If a device fails, or a result differs by more than the rule allows.
    pub fn check_gradients_of<'a, T: Element>(
        &self,
        inputs: &Inputs<T>,
        dout: &[T],
        devices: impl IntoIterator<Item = &'a Device>,
    ) {
        let mut expected = None;
        for device in devices {
            let (placed, outcome) = self.run_backward(device, inputs, dout);
            // Broadcasting repeats some of the drawn elements; it does so equally on all devices.
            let (oracle, bounds) = expected.get_or_insert_with(|| {
                let oracle = placed.0.oracle_gradients(self, &placed.1);
                let bounds = (self.allowances).gradient_bounds(self, &placed.0, &placed.1, &oracle);
                (oracle, bounds)
            });
            let shapes = [self.q, self.kv, self.v_shape()];
            for (i, (name, gradient)) in outcome.named().into_iter().enumerate() {
                if let Err(mismatch) = compare(name, &shapes[i], gradient, &oracle[i], bounds[i]) {
                    panic!("{self:?} on {device}\n{mismatch}");
                }
            }
        }
    }

    /// Places the case on a device and runs forward. dout has the layout of q, and dq, dk and dv those of q, k and v
    /// without broadcasting.
    ///
    /// # Panics
    /// If the device fails.
    pub fn prepare_backward<T: Element>(&self, device: &Device, inputs: &Inputs<T>, dout: &[T]) -> Prepared<T> {
        let place = |layout: Layout, shape: [usize; 4], elements: &[T]| -> Input<T> {
            self.must(device, layout.input(device, shape, elements))
        };
        let layouts = self.layouts;
        let [q, k, v] = [
            place(layouts[0], self.q, &inputs.q),
            place(layouts[1], self.kv, &inputs.k),
            place(layouts[2], self.v_shape(), &inputs.v),
        ];
        let out: Poisoned<T> = self.must(device, layouts[3].output(device, self.out_shape()));
        let of_rows = || {
            self.must(device, Poisoned::<f32>::contiguous(device, &self.q[..3]))
                .tensor
        };
        let mut output = Output::new(out.tensor, of_rows());
        output.statistics = Some(Statistics {
            row_max: of_rows(),
            row_sum: of_rows(),
        });
        let result = self
            .attention
            .forward_into_output(&q.tensor, &k.tensor, &v.tensor, &mut output);
        self.must(device, result);
        let room = |i: usize, shape| -> Poisoned<T> {
            let layout = Layout {
                broadcast: None,
                ..layouts[i]
            };
            self.must(device, layout.output(device, shape))
        };
        Prepared {
            attention: self.attention.clone(),
            inputs: [q, k, v],
            output,
            dout: place(layouts[0], self.out_shape(), dout),
            gradients: [room(0, self.q), room(1, self.kv), room(2, self.v_shape())],
        }
    }

    /// Runs forward and backward on one device. Returns q, k, v and dout as placed (broadcast ones repeat) and the
    /// gradients.
    ///
    /// # Panics
    /// If the device fails, or memory next to a gradient was written.
    pub fn run_backward<T: Element>(
        &self,
        device: &Device,
        inputs: &Inputs<T>,
        dout: &[T],
    ) -> ((Inputs<T>, Vec<T>), GradientsOutcome<T>) {
        let prepared = self.prepare_backward(device, inputs, dout);
        let outcome = self.must(device, prepared.backward());
        let [q, k, v] = prepared.inputs.map(|input| input.elements);
        ((Inputs { q, k, v }, prepared.dout.elements), outcome)
    }

    fn must<V, E: Debug>(&self, device: &Device, result: Result<V, E>) -> V {
        result.unwrap_or_else(|error| panic!("{self:?} on {device}: {error:#?}"))
    }
}

impl<T: Element> Prepared<T> {
    /// Runs backward and reads the gradients.
    ///
    /// # Errors
    /// The errors of `Attention::backward_into`.
    ///
    /// # Panics
    /// If memory next to a gradient was written.
    pub fn backward(&self) -> Result<GradientsOutcome<T>, flash_attention::Error> {
        let [q, k, v] = self.inputs.each_ref().map(|input| &input.tensor);
        let [dq, dk, dv] = self.gradients.each_ref().map(|poisoned| poisoned.tensor.clone());
        let mut gradients = Gradients::new(dq, dk, dv);
        self.attention
            .backward_into(q, k, v, &self.output, &self.dout.tensor, &mut gradients)?;
        let [dq, dk, dv] = &self.gradients;
        Ok(GradientsOutcome {
            dq: dq.read()?,
            dk: dk.read()?,
            dv: dv.read()?,
        })
    }
}

impl<T: Element> Inputs<T> {
    /// Returns the f64 oracle's gradients, `[dq, dk, dv]`.
    pub fn oracle_gradients(&self, case: &Case, dout: &[T]) -> [Vec<f64>; 3] {
        let [q, k, v, dout] =
            [&self.q[..], &self.k, &self.v, dout].map(|data| data.iter().map(|x| x.to_f64()).collect::<Vec<_>>());
        reference::backward(&case.dims(), &q, &k, &v, &dout)
    }

    /// Returns the largest errors allowed for dq, dk and dv: twice those of standard attention in the same dtype, plus 1e-5.
    pub fn gradient_bounds(&self, case: &Case, dout: &[T], oracle: &[Vec<f64>; 3]) -> [f64; 3] {
        (self.standard_gradient_errors(case, dout, oracle)).map(|error| 2.0 * error + 1e-5)
    }

    /// Returns the largest errors of standard attention's gradients in the same dtype.
    pub(crate) fn standard_gradient_errors(&self, case: &Case, dout: &[T], oracle: &[Vec<f64>; 3]) -> [f64; 3] {
        let standard = reference::standard_backward(&case.dims(), &self.q, &self.k, &self.v, dout);
        std::array::from_fn(|i| largest_error(&standard[i], &oracle[i]))
    }
}
