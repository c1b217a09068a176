//! Adam (Kingma and Ba, 2014): steps in units of the recent size of each gradient.

/// The running means of the optimiser.
#[derive(Clone, Debug, Default)]
pub struct Adam {
    steps: i32,
    /// Running means of the gradient and of its square, for each element of each tensor.
    means: Vec<Vec<(f32, f32)>>,
}

impl Adam {
    const KEEP_MEAN: f32 = 0.9;
    const KEEP_SQUARE: f32 = 0.99;
    const EPSILON: f32 = 1e-8;

    /// Moves every parameter against its gradient by about `learning_rate`. Both lists have the same order in every
    /// call.
    pub fn step<'a>(
        &mut self,
        learning_rate: f32,
        parameters: impl IntoIterator<Item = &'a mut [f32]>,
        gradients: impl IntoIterator<Item = &'a mut [f32]>,
    ) {
        self.steps += 1;
        // The means start at 0, so they are divided by the weight of the gradients in them.
        let mean_weight = 1.0 - Self::KEEP_MEAN.powi(self.steps);
        let square_weight = 1.0 - Self::KEEP_SQUARE.powi(self.steps);
        for (i, (parameters, gradients)) in parameters.into_iter().zip(gradients).enumerate() {
            if i == self.means.len() {
                self.means.push(vec![(0.0, 0.0); parameters.len()]);
            }
            for ((parameter, &mut gradient), (mean, square)) in
                parameters.iter_mut().zip(gradients).zip(&mut self.means[i])
            {
                *mean += (1.0 - Self::KEEP_MEAN) * (gradient - *mean);
                *square += (1.0 - Self::KEEP_SQUARE) * (gradient * gradient - *square);
                let size = (*square / square_weight).sqrt() + Self::EPSILON;
                *parameter -= learning_rate * (*mean / mean_weight) / size;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Adam;

    #[test]
    fn first_step_is_the_learning_rate_against_the_sign() {
        let mut parameters = [1.0, 1.0, 1.0];
        Adam::default().step(0.1, [&mut parameters[..]], [&mut [1e-3, -50.0, 0.0][..]]);
        for (got, want) in parameters.iter().zip([0.9, 1.1, 1.0]) {
            assert!((got - want).abs() < 1e-5_f32, "{got} {want}");
        }
    }

    #[test]
    fn finds_the_bottom_of_a_bowl() {
        let mut adam = Adam::default();
        let mut point = [3.0_f32, -2.0];
        for _ in 0..500 {
            let mut gradient = [2.0 * (point[0] - 1.0), 20.0 * (point[1] - 1.0)];
            adam.step(0.05, [&mut point[..]], [&mut gradient[..]]);
        }
        assert!(point.iter().all(|x| (x - 1.0).abs() < 1e-2), "{point:?}");
    }
}
