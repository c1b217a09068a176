//! [`Case`]: an attention problem, solved on a device and compared with the oracle.

use std::fmt::Debug;

use flash_attention::reference::{self, Dims};
use flash_attention::{Attention, Device, Dtype, Element};

use crate::layout::{Input, Layout, Poisoned};
use crate::{Allowances, compare, devices, files, largest_error};

/// An attention problem, with everything that may vary.
#[derive(Clone, Debug)]
pub struct Case {
    /// Element type.
    pub dtype: Dtype,
    /// Mask and scale.
    pub attention: Attention,
    /// `[batch, heads_q, seqlen_q, head_dim]`.
    pub q: [usize; 4],
    /// Shape of k, and of v except its head_dim: `[batch, heads_kv, seqlen_k, head_dim]`.
    pub kv: [usize; 4],
    /// head_dim of v and out.
    pub head_dim_v: usize,
    /// Memory of q, k, v and out.
    pub layouts: [Layout; 4],
    /// Standard deviation of the normal distribution that inputs are drawn from.
    pub deviation: f32,
    /// Seed of the inputs.
    pub seed: u64,
    /// Errors allowed beside the rule; none unless a test names them.
    pub allowances: Allowances,
}

/// Inputs of a case in logical order, contiguous.
#[derive(Clone, Debug)]
pub struct Inputs<T> {
    /// Queries.
    pub q: Vec<T>,
    /// Keys.
    pub k: Vec<T>,
    /// Values.
    pub v: Vec<T>,
}

/// Forward results of a device, in logical order.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome<T> {
    /// Attention output.
    pub out: Vec<T>,
    /// Log-sum-exp.
    pub lse: Vec<f32>,
}

/// Expected results of a case, and their bounds.
struct Expected {
    out: Vec<f64>,
    lse: Vec<f64>,
    /// Largest errors allowed for out and lse.
    bounds: [f64; 2],
}

/// Runs an expression with the element type of a dtype: `for_dtype!(case.dtype, T => solve::<T>(&case))`.
#[macro_export]
macro_rules! for_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            ::flash_attention::Dtype::F32 => {
                type $T = f32;
                $body
            }
            ::flash_attention::Dtype::F16 => {
                type $T = ::flash_attention::half::f16;
                $body
            }
            ::flash_attention::Dtype::Bf16 => {
                type $T = ::flash_attention::half::bf16;
                $body
            }
        }
    };
}

impl Case {
    /// Makes a case of full attention with the default scale over contiguous tensors of normal numbers.
    pub fn new(dtype: Dtype, q: [usize; 4], kv: [usize; 4]) -> Self {
        Self {
            dtype,
            attention: Attention::new(),
            q,
            kv,
            head_dim_v: kv[3],
            layouts: [Layout::default(); 4],
            deviation: 1.0,
            seed: 1,
            allowances: Allowances::default(),
        }
    }

    /// Makes a case of one batch entry and one head.
    pub fn one_head(dtype: Dtype, seqlen_q: usize, seqlen_k: usize, head_dim: usize) -> Self {
        Self::new(dtype, [1, 1, seqlen_q, head_dim], [1, 1, seqlen_k, head_dim])
    }

    /// Returns this case with another head_dim of v and out.
    #[must_use]
    pub fn with_head_dim_v(self, head_dim_v: usize) -> Self {
        Self { head_dim_v, ..self }
    }

    /// Returns the shape of v.
    pub fn v_shape(&self) -> [usize; 4] {
        let [batch, heads, seqlen, _] = self.kv;
        [batch, heads, seqlen, self.head_dim_v]
    }

    /// Returns the shape of out.
    pub fn out_shape(&self) -> [usize; 4] {
        let [batch, heads, seqlen, _] = self.q;
        [batch, heads, seqlen, self.head_dim_v]
    }

    /// Returns this case with other options.
    #[must_use]
    pub fn with(self, attention: Attention) -> Self {
        Self { attention, ..self }
    }

    /// Returns this case with the causal mask on or off.
    #[must_use]
    pub fn masked(self, causal: bool) -> Self {
        if causal {
            let attention = self.attention.causal();
            Self { attention, ..self }
        } else {
            self
        }
    }

    /// Returns this case with other layouts of q, k, v and out.
    #[must_use]
    pub fn laid_out(self, layouts: [Layout; 4]) -> Self {
        Self { layouts, ..self }
    }

    /// Returns this case with errors allowed beside the rule.
    #[must_use]
    pub fn allowing(self, allowances: Allowances) -> Self {
        Self { allowances, ..self }
    }

    /// Solves the case on every device and checks each error against its bound.
    ///
    /// # Panics
    /// If a device fails, or an error exceeds its bound; the message has the index and both values.
    pub fn check(&self) {
        self.check_on(devices().all());
    }

    /// Checks the case like [`check`](Self::check), on these devices.
    ///
    /// # Panics
    /// Under the conditions of [`check`](Self::check).
    pub fn check_on<'a>(&self, devices: impl IntoIterator<Item = &'a Device>) {
        for_dtype!(self.dtype, T => self.check_as::<T>(devices.into_iter()));
    }

    fn check_as<'a, T: Element>(&self, devices: impl Iterator<Item = &'a Device>) {
        self.check_of(&self.inputs::<T>(), devices);
    }

    /// Solves the case from these inputs, and checks each result with the rule.
    ///
    /// # Panics
    /// If a device fails, or a result differs by more than the rule allows.
    pub fn check_of<'a, T: Element>(&self, inputs: &Inputs<T>, devices: impl IntoIterator<Item = &'a Device>) {
        let mut expected = None;
        for device in devices {
            let (placed, outcome) = self.run(device, inputs);
            // Broadcasting repeats some of the drawn elements; it does so equally on all devices.
            let expected = expected.get_or_insert_with(|| Expected::of(self, &placed));
            expected.check(&format!("{self:?} on {device}"), self, &outcome);
        }
    }

    /// Draws the inputs from the seed.
    pub fn inputs<T: Element>(&self) -> Inputs<T> {
        let draw = |shape: [usize; 4], salt| {
            files::normal(shape.iter().product(), self.deviation, self.seed * 3 + salt)
                .into_iter()
                .map(T::from_f32)
                .collect()
        };
        Inputs {
            q: draw(self.q, 0),
            k: draw(self.kv, 1),
            v: draw(self.v_shape(), 2),
        }
    }

    /// Solves the case on one device. Returns the inputs as placed (broadcast ones repeat) and the result.
    ///
    /// # Panics
    /// If the device fails, or memory next to an output was written.
    pub fn run<T: Element>(&self, device: &Device, inputs: &Inputs<T>) -> (Inputs<T>, Outcome<T>) {
        fn must<V, E: Debug>(case: &Case, device: &Device, result: Result<V, E>) -> V {
            result.unwrap_or_else(|error| panic!("{case:?} on {device}: {error:#?}"))
        }
        let [q, k, v] = [(self.q, &inputs.q), (self.kv, &inputs.k), (self.v_shape(), &inputs.v)];
        let place = |layout: Layout, (shape, elements): ([usize; 4], &Vec<T>)| -> Input<T> {
            must(self, device, layout.input(device, shape, elements))
        };
        let (q, k, v) = (
            place(self.layouts[0], q),
            place(self.layouts[1], k),
            place(self.layouts[2], v),
        );
        let mut out: Poisoned<T> = must(self, device, self.layouts[3].output(device, self.out_shape()));
        let mut lse: Poisoned<f32> = must(self, device, Poisoned::contiguous(device, &self.q[..3]));
        let result = self
            .attention
            .forward_into(&q.tensor, &k.tensor, &v.tensor, &mut out.tensor, &mut lse.tensor);
        must(self, device, result);
        let outcome = Outcome {
            out: must(self, device, out.read()),
            lse: must(self, device, lse.read()),
        };
        let placed = Inputs {
            q: q.elements,
            k: k.elements,
            v: v.elements,
        };
        (placed, outcome)
    }

    /// Returns the sizes and options for the reference.
    pub fn dims(&self) -> Dims {
        let program = self.attention.evaluator().expect("a program that the device took");
        Dims::with_program(&self.attention, self.q, self.kv, program).with_head_dim_v(self.head_dim_v)
    }
}

impl<T: Element> Inputs<T> {
    /// Returns the f64 oracle's `(out, lse)`.
    pub fn oracle(&self, dims: &Dims) -> (Vec<f64>, Vec<f64>) {
        let widen = |elements: &[T]| elements.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
        reference::forward(dims, &widen(&self.q), &widen(&self.k), &widen(&self.v))
    }

    /// Returns the largest errors allowed for out and lse: twice those of standard attention in the same dtype, plus 1e-5.
    pub fn bounds(&self, dims: &Dims, out: &[f64], lse: &[f64]) -> [f64; 2] {
        self.standard_errors(dims, out, lse).map(|error| 2.0 * error + 1e-5)
    }

    /// Returns the largest errors of standard attention in the same dtype: of out, and of lse.
    pub(crate) fn standard_errors(&self, dims: &Dims, out: &[f64], lse: &[f64]) -> [f64; 2] {
        let (standard_out, standard_lse) = reference::standard(dims, &self.q, &self.k, &self.v);
        [largest_error(&standard_out, out), largest_error(&standard_lse, lse)]
    }
}

impl Expected {
    fn of<T: Element>(case: &Case, inputs: &Inputs<T>) -> Self {
        let dims = case.dims();
        let (out, lse) = inputs.oracle(&dims);
        let bounds = case.allowances.bounds(inputs, &dims, &out, &lse);
        Self { out, lse, bounds }
    }

    fn check<T: Element>(&self, name: &str, case: &Case, outcome: &Outcome<T>) {
        let [out_bound, lse_bound] = self.bounds;
        let out = compare("out", &case.out_shape(), &outcome.out, &self.out, out_bound);
        let lse = compare("lse", &case.q[..3], &outcome.lse, &self.lse, lse_bound);
        if let Some(mismatch) = out.err().or(lse.err()) {
            panic!("{name}\n{mismatch}");
        }
    }
}
