//! The backward half of a [`Case`]: forward, then gradients into poisoned memory, held to the oracle.

use std::fmt::Debug;

use flash_attention::reference;
use flash_attention::{Attention, Device, Element, Gradients, Output, Statistics};

use crate::layout::{Input, Layout, Poisoned};
use crate::{Case, Inputs, compare, devices, files, for_dtype, largest_error};

/// What a backward pass gave, in logical order.
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
    /// dq, dk and dv, named.
    pub fn named(&self) -> [(&'static str, &[T]); 3] {
        [("dq", &self.dq), ("dk", &self.dk), ("dv", &self.dv)]
    }

    /// Its bits, so that equal means equal.
    pub fn bits(&self) -> Vec<u64> {
        let bits = |x: &T| x.to_f64().to_bits();
        self.named()
            .iter()
            .flat_map(|(_, gradient)| gradient.iter().map(bits))
            .collect()
    }
}

/// A case on a device, forward done, ready for backward.
#[derive(Debug)]
pub struct Prepared<T: Element> {
    /// The options of the calls.
    pub attention: Attention,
    /// q, k and v as placed.
    pub inputs: [Input<T>; 3],
    /// What forward gave.
    pub output: Output<T>,
    /// The gradient of the output, as placed.
    pub dout: Input<T>,
    /// Where gradients are to go: dq, dk, dv, which hold NaN.
    pub gradients: [Poisoned<T>; 3],
}

impl Case {
    /// The gradient of the output, drawn from the seed.
    pub fn dout<T: Element>(&self) -> Vec<T> {
        files::normal(self.q.iter().product(), 1.0, self.seed * 3 + 1_000_003)
            .into_iter()
            .map(T::from_f32)
            .collect()
    }

    /// Solves the case both ways on every device and holds dq, dk and dv to the rule.
    ///
    /// # Panics
    /// If a device fails, or is further off than the rule allows.
    pub fn check_gradients(&self) {
        self.check_gradients_on(devices().all());
    }

    /// As [`check_gradients`](Self::check_gradients), on some devices.
    ///
    /// # Panics
    /// As [`check_gradients`](Self::check_gradients).
    pub fn check_gradients_on<'a>(&self, devices: impl IntoIterator<Item = &'a Device>) {
        for_dtype!(self.dtype, T => self.check_gradients_as::<T>(devices.into_iter()));
    }

    fn check_gradients_as<'a, T: Element>(&self, devices: impl Iterator<Item = &'a Device>) {
        let (inputs, dout) = (self.inputs::<T>(), self.dout::<T>());
        let mut expected = None;
        for device in devices {
            let (placed, outcome) = self.run_backward(device, &inputs, &dout);
            // Broadcasting makes other elements than were drawn; all devices make the same.
            let (oracle, bounds) = expected.get_or_insert_with(|| {
                let oracle = placed.0.oracle_gradients(self, &placed.1);
                let bounds = placed.0.gradient_bounds(self, &placed.1, &oracle);
                (oracle, bounds)
            });
            let shapes = [self.q, self.kv, self.kv];
            for (i, (name, gradient)) in outcome.named().into_iter().enumerate() {
                if let Err(mismatch) = compare(name, &shapes[i], gradient, &oracle[i], bounds[i]) {
                    panic!("{self:?} on {device}\n{mismatch}");
                }
            }
        }
    }

    /// Places the case on a device and runs forward. dout lies as q does, and dq, dk and dv as q, k and v do, without
    /// repeats.
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
            place(layouts[2], self.kv, &inputs.v),
        ];
        let out: Poisoned<T> = self.must(device, layouts[3].output(device, self.q));
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
            dout: place(layouts[0], self.q, dout),
            gradients: [room(0, self.q), room(1, self.kv), room(2, self.kv)],
        }
    }

    /// Solves the case both ways on one device. Gives q, k, v and dout as placed (broadcast ones repeat) and the
    /// gradients.
    ///
    /// # Panics
    /// If the device fails, or memory next to a gradient was written to.
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
    /// Runs backward and reads what it wrote.
    ///
    /// # Errors
    /// Those of `Attention::backward_into`.
    ///
    /// # Panics
    /// If memory next to a gradient was written to.
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
    /// The f64 oracle's gradients, `[dq, dk, dv]`.
    pub fn oracle_gradients(&self, case: &Case, dout: &[T]) -> [Vec<f64>; 3] {
        let [q, k, v, dout] =
            [&self.q[..], &self.k, &self.v, dout].map(|data| data.iter().map(|x| x.to_f64()).collect::<Vec<_>>());
        reference::backward(&case.dims(), &q, &k, &v, &dout)
    }

    /// Twice the error of standard attention's gradients in the same dtype, plus 1e-5: what dq, dk and dv may be off by.
    pub fn gradient_bounds(&self, case: &Case, dout: &[T], oracle: &[Vec<f64>; 3]) -> [f64; 3] {
        let standard = reference::standard_backward(&case.dims(), &self.q, &self.k, &self.v, dout);
        std::array::from_fn(|i| 2.0 * largest_error(&standard[i], &oracle[i]) + 1e-5)
    }
}
