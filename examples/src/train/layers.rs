//! Layers without attention: embedding, linear map, layer norm, GELU.

use ndarray::{Array1, Array2, ArrayView1, Axis, Zip};
use rand::RngExt;
use rand::rngs::StdRng;
use rand_distr::StandardNormal;

use super::linalg::product;

/// Returns normally distributed numbers with mean 0.
fn normal(rng: &mut StdRng, rows: usize, columns: usize, deviation: f32) -> Array2<f32> {
    Array2::from_shape_simple_fn((rows, columns), || deviation * rng.sample::<f32, _>(StandardNormal))
}

/// A vector for each token of the vocabulary and for each position; the row of a token is their sum.
#[derive(Clone, Debug)]
pub struct Embedding {
    tokens: Array2<f32>,
    positions: Array2<f32>,
}

impl Embedding {
    /// Makes random vectors.
    pub fn new(rng: &mut StdRng, vocabulary: usize, context: usize, width: usize) -> Self {
        Self {
            tokens: normal(rng, vocabulary, width, 0.02),
            positions: normal(rng, context, width, 0.02),
        }
    }

    /// Returns one row for each of `tokens`, which are consecutive sequences of `seqlen` tokens.
    pub fn forward(&self, tokens: &[usize], seqlen: usize) -> Array2<f32> {
        let mut rows = self.tokens.select(Axis(0), tokens);
        for (i, mut row) in rows.rows_mut().into_iter().enumerate() {
            row += &self.positions.row(i % seqlen);
        }
        rows
    }

    /// Returns the gradient of both tables.
    pub fn backward(&self, tokens: &[usize], seqlen: usize, drows: &Array2<f32>) -> Self {
        let mut gradient = Self {
            tokens: Array2::zeros(self.tokens.raw_dim()),
            positions: Array2::zeros(self.positions.raw_dim()),
        };
        for ((i, drow), &token) in drows.rows().into_iter().enumerate().zip(tokens) {
            let mut of_token = gradient.tokens.row_mut(token);
            of_token += &drow;
            let mut of_position = gradient.positions.row_mut(i % seqlen);
            of_position += &drow;
        }
        gradient
    }

    pub(super) fn parameters(&mut self) -> Vec<&mut [f32]> {
        vec![slice2(&mut self.tokens), slice2(&mut self.positions)]
    }
}

/// Linear map: `x weight + bias`.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Array2<f32>,
    bias: Array1<f32>,
}

impl Linear {
    /// Makes a random map from `inputs` to `outputs` elements, with weights of this standard deviation.
    pub fn new(rng: &mut StdRng, inputs: usize, outputs: usize, deviation: f32) -> Self {
        Self {
            weight: normal(rng, inputs, outputs, deviation),
            bias: Array1::zeros(outputs),
        }
    }

    /// Maps each row.
    pub fn forward(&self, x: &Array2<f32>) -> Array2<f32> {
        product(x.view(), self.weight.view()) + &self.bias
    }

    /// Returns the gradients of x and of the parameters.
    pub fn backward(&self, x: &Array2<f32>, dy: &Array2<f32>) -> (Array2<f32>, Self) {
        let dx = product(dy.view(), self.weight.t());
        let gradient = Self {
            weight: product(x.t(), dy.view()),
            bias: dy.sum_axis(Axis(0)),
        };
        (dx, gradient)
    }

    pub(super) fn parameters(&mut self) -> Vec<&mut [f32]> {
        vec![slice2(&mut self.weight), slice1(&mut self.bias)]
    }
}

/// Layer norm: shifts and scales each row to mean 0 and variance 1, then scales and shifts each column by learned
/// values.
#[derive(Clone, Debug)]
pub struct LayerNorm {
    gain: Array1<f32>,
    bias: Array1<f32>,
}

/// Values that a [`LayerNorm`] saves for backward.
#[derive(Clone, Debug)]
pub struct Normalized {
    /// Rows of mean 0 and variance 1.
    rows: Array2<f32>,
    /// Factor by which each row was multiplied.
    inv_deviation: Array1<f32>,
}

impl LayerNorm {
    /// Added to the variance, so that a constant row is not divided by 0.
    const EPSILON: f32 = 1e-5;

    /// Makes a norm that leaves columns unchanged.
    pub fn new(width: usize) -> Self {
        Self {
            gain: Array1::ones(width),
            bias: Array1::zeros(width),
        }
    }

    /// Returns the result, and the values saved for backward.
    pub fn forward(&self, x: &Array2<f32>) -> (Array2<f32>, Normalized) {
        let mut rows = x.clone();
        let mut inv_deviation = Array1::zeros(x.nrows());
        Zip::from(rows.rows_mut())
            .and(&mut inv_deviation)
            .par_for_each(|mut row, inv_deviation| {
                row -= mean(&row.view());
                let variance = row.dot(&row) / row.len() as f32;
                *inv_deviation = (variance + Self::EPSILON).sqrt().recip();
                row *= *inv_deviation;
            });
        let y = &rows * &self.gain + &self.bias;
        (y, Normalized { rows, inv_deviation })
    }

    /// Returns the gradients of x and of the parameters.
    pub fn backward(&self, saved: &Normalized, dy: &Array2<f32>) -> (Array2<f32>, Self) {
        // The norm removes a row's mean and size from x, so both are removed from the gradient of x.
        let mut dx = dy * &self.gain;
        Zip::from(dx.rows_mut())
            .and(saved.rows.rows())
            .and(&saved.inv_deviation)
            .par_for_each(|mut dx, row, &inv_deviation| {
                dx -= mean(&dx.view());
                let along_row = dx.dot(&row) / row.len() as f32;
                dx.scaled_add(-along_row, &row);
                dx *= inv_deviation;
            });
        let gradient = Self {
            gain: (dy * &saved.rows).sum_axis(Axis(0)),
            bias: dy.sum_axis(Axis(0)),
        };
        (dx, gradient)
    }

    pub(super) fn parameters(&mut self) -> Vec<&mut [f32]> {
        vec![slice1(&mut self.gain), slice1(&mut self.bias)]
    }
}

/// GELU in GPT-2's form with tanh: `x (1 + tanh u) / 2`, which equals `x sigmoid(2 u)`.
pub fn gelu(x: &Array2<f32>) -> Array2<f32> {
    let mut y = x.clone();
    y.par_mapv_inplace(|x| x * sigmoid_and_slope(x).0);
    y
}

/// Returns the gradient of GELU's input.
pub fn gelu_backward(x: &Array2<f32>, dy: &Array2<f32>) -> Array2<f32> {
    let mut dx = dy.clone();
    Zip::from(&mut dx).and(x).par_for_each(|d, &x| {
        let (sigmoid, slope) = sigmoid_and_slope(x);
        *d *= sigmoid + x * sigmoid * (1.0 - sigmoid) * slope;
    });
    dx
}

/// Returns `sigmoid(2 u)` and the derivative of `2 u`, where `u = sqrt(2 / pi) (x + 0.044715 x^3)`.
fn sigmoid_and_slope(x: f32) -> (f32, f32) {
    const TWO_SQRT_2_OVER_PI: f32 = 2.0 * std::f32::consts::FRAC_2_SQRT_PI * std::f32::consts::FRAC_1_SQRT_2;
    const CUBIC: f32 = 0.044_715;
    let twice_u = TWO_SQRT_2_OVER_PI * x * (1.0 + CUBIC * x * x);
    let slope = TWO_SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x);
    (1.0 / (1.0 + (-twice_u).exp()), slope)
}

fn mean(row: &ArrayView1<f32>) -> f32 {
    row.sum() / row.len() as f32
}

fn slice1(array: &mut Array1<f32>) -> &mut [f32] {
    array.as_slice_memory_order_mut().expect("parameters own their memory")
}

fn slice2(array: &mut Array2<f32>) -> &mut [f32] {
    array.as_slice_memory_order_mut().expect("parameters own their memory")
}

#[cfg(test)]
mod tests {
    use super::super::finite_differences::{check, matrix, random, weighted_sum};
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn embedding() {
        let mut rng = StdRng::seed_from_u64(1);
        let layer = Embedding::new(&mut rng, 5, 4, 6);
        let tokens = [0, 3, 3, 1, 4, 3, 0, 0]; // token 2 does not occur: its gradient is 0
        let weights = random(2, 8, 6);
        let mut gradient = layer.backward(&tokens, 4, &weights);
        assert!(gradient.tokens.row(2).iter().all(|&d| d == 0.0));
        let loss = |layer: &Embedding| weighted_sum(&layer.forward(&tokens, 4), &weights);
        check(layer, Embedding::parameters, &mut gradient, loss);
    }

    #[test]
    fn linear() {
        let mut rng = StdRng::seed_from_u64(3);
        let layer = Linear::new(&mut rng, 5, 7, 1.0);
        let (x, weights) = (random(4, 6, 5), random(5, 6, 7));
        let (mut dx, mut gradient) = layer.backward(&x, &weights);
        check(x.clone(), matrix, &mut dx, |x| {
            weighted_sum(&layer.forward(x), &weights)
        });
        let loss = |layer: &Linear| weighted_sum(&layer.forward(&x), &weights);
        check(layer.clone(), Linear::parameters, &mut gradient, loss);
    }

    #[test]
    fn layer_norm() {
        let mut layer = LayerNorm::new(9);
        layer.gain.assign(&random(6, 1, 9).row(0));
        let (x, weights) = (random(7, 4, 9), random(8, 4, 9));
        let (mut dx, mut gradient) = layer.backward(&layer.forward(&x).1, &weights);
        check(x.clone(), matrix, &mut dx, |x| {
            weighted_sum(&layer.forward(x).0, &weights)
        });
        let loss = |layer: &LayerNorm| weighted_sum(&layer.forward(&x).0, &weights);
        check(layer.clone(), LayerNorm::parameters, &mut gradient, loss);
    }

    #[test]
    fn gelu_is_odd_part_plus_half_x_and_has_the_right_slope() {
        let x = Array2::from_shape_vec((1, 5), vec![-20.0, -1.0, 0.0, 1.0, 20.0]).expect("five numbers");
        let y = gelu(&x);
        for (got, want) in y.iter().zip([0.0, -0.158_808, 0.0, 0.841_192, 20.0]) {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
        let (x, weights) = (random(9, 5, 8), random(10, 5, 8));
        let mut dx = gelu_backward(&x, &weights);
        check(x, matrix, &mut dx, |x| weighted_sum(&gelu(x), &weights));
    }
}
