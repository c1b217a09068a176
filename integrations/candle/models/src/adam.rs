//! AdamW whose moments can be saved, so that training resumes where it stopped. candle_nn's has none to save.

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor, Var};

/// Decay of the moments' means.
const BETAS: [f64; 2] = [0.9, 0.95];
/// Added to the root of the second moment.
const EPSILON: f64 = 1e-8;
/// Share of a weight that is taken off in a step, times the learning rate. Vectors (biases, norms) are spared.
const WEIGHT_DECAY: f64 = 0.1;

/// The optimizer of named variables.
#[derive(Debug)]
pub struct AdamW {
    variables: Vec<Weight>,
    steps: usize,
}

#[derive(Debug)]
struct Weight {
    name: String,
    var: Var,
    moments: [Tensor; 2],
}

impl AdamW {
    /// An optimizer that has made no step.
    ///
    /// # Errors
    /// candle's errors for the moments' memory.
    pub fn new(variables: Vec<(String, Var)>) -> Result<Self> {
        let variables = variables
            .into_iter()
            .map(|(name, var)| {
                let moments = [var.zeros_like()?, var.zeros_like()?];
                Ok(Weight { name, var, moments })
            })
            .collect::<Result<_>>()?;
        Ok(Self { variables, steps: 0 })
    }

    /// Device of the variables.
    pub fn device(&self) -> &Device {
        self.variables
            .first()
            .map_or(&Device::Cpu, |weight| weight.var.device())
    }

    /// Steps made so far.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// One step against the gradients, which are scaled down to a norm of 1 where theirs, all together, is more.
    ///
    /// # Errors
    /// A variable has no gradient, or candle's errors.
    pub fn step(&mut self, gradients: &GradStore, learning_rate: f64) -> Result<()> {
        let gradient = |weight: &Weight| match gradients.get(&weight.var) {
            Some(gradient) => Ok(gradient.clone()),
            None => candle_core::bail!("{} has no gradient", weight.name),
        };
        let mut squares = 0.0;
        for weight in &self.variables {
            squares += f64::from(gradient(weight)?.sqr()?.sum_all()?.to_scalar::<f32>()?);
        }
        let clip = squares.sqrt().max(1.0).recip();
        self.steps += 1;
        let unbias = BETAS.map(|beta| (1.0 - beta.powi(self.steps as i32)).recip());
        for weight in &mut self.variables {
            let gradient = (gradient(weight)? * clip)?;
            let [first, second] = &weight.moments;
            let first = ((first * BETAS[0])? + (&gradient * (1.0 - BETAS[0]))?)?;
            let second = ((second * BETAS[1])? + (gradient.sqr()? * (1.0 - BETAS[1]))?)?;
            let scale = ((&second * unbias[1])?.sqrt()? + EPSILON)?;
            let change = ((&first * (learning_rate * unbias[0]))? / scale)?;
            let decay = if weight.var.rank() > 1 {
                learning_rate * WEIGHT_DECAY
            } else {
                0.0
            };
            weight.var.set(&((weight.var.as_tensor() * (1.0 - decay))? - change)?)?;
            weight.moments = [first.detach(), second.detach()];
        }
        Ok(())
    }

    /// Weights, moments and the number of steps, by names.
    ///
    /// # Errors
    /// candle's errors.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        let mut state = HashMap::new();
        for Weight { name, var, moments } in &self.variables {
            state.insert(name.clone(), var.as_tensor().clone());
            for (moment, number) in moments.iter().zip(1..) {
                state.insert(format!("moment{number}.{name}"), moment.clone());
            }
        }
        let steps = Tensor::new(self.steps as u32, &Device::Cpu)?;
        state.insert("steps".to_owned(), steps);
        Ok(state)
    }

    /// Takes over what [`state`](Self::state) gave.
    ///
    /// # Errors
    /// A tensor is missing or has another shape.
    pub fn restore(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        let find = |name: &str| match state.get(name) {
            Some(tensor) => Ok(tensor.clone()),
            None => candle_core::bail!("the checkpoint has no {name}"),
        };
        for Weight { name, var, moments } in &mut self.variables {
            var.set(&find(name)?)?;
            for (moment, number) in moments.iter_mut().zip(1..) {
                *moment = find(&format!("moment{number}.{name}"))?;
            }
        }
        self.steps = find("steps")?.to_scalar::<u32>()? as usize;
        Ok(())
    }
}
