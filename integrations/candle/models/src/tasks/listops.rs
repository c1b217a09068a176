//! ListOps (Nangia and Bowman, 2018) at the lengths of Long Range Arena (Tay et al., 2020): the value of an expression such as
//! `[MAX 4 3 [MIN 2 3 ] 1 0 ]`, a digit.

use candle_core::{Device, Result};
use rand::Rng;
use rand::rngs::StdRng;

use super::{Batch, HeldOut, Task, classified};

/// Operators over a list of digits. Their tokens follow those of the digits, 0 to 9.
const OPERATORS: [fn(&mut [u32]) -> u32; 4] = [
    |digits| digits.iter().copied().max().unwrap_or_default(),
    |digits| digits.iter().copied().min().unwrap_or_default(),
    |digits| {
        digits.sort_unstable();
        let middle = digits.len() / 2;
        match digits.len() % 2 {
            0 => (digits[middle - 1] + digits[middle]) / 2,
            _ => digits[middle],
        }
    },
    |digits| digits.iter().sum::<u32>() % 10,
];
const FIRST_OPERATOR: u32 = 10;
const CLOSE: u32 = 14;
/// Token before each expression, at which the model is read.
const FIRST: u32 = 15;
/// Token after an expression that is shorter than the context.
const PAD: u32 = 16;

/// Deepest nesting, and most operands of an operator, as in Long Range Arena.
const MAX_DEPTH: usize = 10;
const MAX_OPERANDS: usize = 10;
/// Chance of an operand to be a digit.
const DIGIT: f64 = 0.75;

/// Expressions of a quarter of the context up to all of it.
#[derive(Clone, Debug)]
pub struct ListOps {
    context: usize,
    device: Device,
}

impl ListOps {
    /// Expressions of at most `context - 1` tokens after one more.
    ///
    /// # Errors
    /// A context of fewer than 16 tokens.
    pub fn new(context: usize, device: &Device) -> Result<Self> {
        if context < 16 {
            candle_core::bail!("context is {context}; an expression needs 16 tokens")
        }
        Ok(Self {
            context,
            device: device.clone(),
        })
    }

    /// Tokens of an expression, padded to the context, and its value.
    fn example(&self, rng: &mut StdRng) -> (Vec<u32>, u32) {
        loop {
            let mut tokens = vec![FIRST];
            let value = expression(rng, MAX_DEPTH, self.context, &mut tokens);
            if (self.context / 4..=self.context).contains(&tokens.len()) {
                tokens.resize(self.context, PAD);
                return (tokens, value);
            }
        }
    }
}

/// Appends an operator with its operands and returns the value. Past `most` tokens only closing ones are appended.
fn expression(rng: &mut StdRng, depth: usize, most: usize, tokens: &mut Vec<u32>) -> u32 {
    let operator = rng.random_range(0..OPERATORS.len());
    tokens.push(FIRST_OPERATOR + operator as u32);
    let mut operands = Vec::new();
    for _ in 0..rng.random_range(2..=MAX_OPERANDS) {
        let nested = depth > 1 && tokens.len() < most && !rng.random_bool(DIGIT);
        operands.push(if nested {
            expression(rng, depth - 1, most, tokens)
        } else {
            let digit = rng.random_range(0..10);
            tokens.push(digit);
            digit
        });
    }
    tokens.push(CLOSE);
    OPERATORS[operator](&mut operands)
}

impl Task for ListOps {
    fn vocabulary(&self) -> usize {
        PAD as usize + 1
    }

    fn classes(&self) -> Option<usize> {
        Some(10)
    }

    fn positions(&self) -> usize {
        self.context
    }

    fn draw(&self, rng: &mut StdRng, _: usize, batch: usize) -> Result<Batch> {
        let examples: Vec<_> = (0..batch).map(|_| self.example(rng)).collect();
        classified(&examples, &self.device)
    }

    fn held_out(&self, count: usize) -> Result<Vec<HeldOut>> {
        HeldOut::only(count, |_, rng| classified(&[self.example(rng)], &self.device))
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    /// Value of the expression at the start of `tokens`, and the tokens after it.
    fn value(tokens: &[u32]) -> (u32, &[u32]) {
        let operator = tokens[0];
        if operator < FIRST_OPERATOR {
            return (operator, &tokens[1..]);
        }
        let (mut rest, mut operands) = (&tokens[1..], Vec::new());
        while rest[0] != CLOSE {
            let (operand, after) = value(rest);
            operands.push(operand);
            rest = after;
        }
        operands.sort_unstable();
        let middle = operands.len() / 2;
        let value = match operator - FIRST_OPERATOR {
            0 => operands[operands.len() - 1],
            1 => operands[0],
            2 if operands.len() % 2 == 0 => (operands[middle - 1] + operands[middle]) / 2,
            2 => operands[middle],
            _ => operands.iter().sum::<u32>() % 10,
        };
        (value, &rest[1..])
    }

    #[test]
    fn expressions_fit_and_have_the_stated_value() -> Result<()> {
        for context in [16, 100, 2000] {
            let task = ListOps::new(context, &Device::Cpu)?;
            for seed in 0..20 {
                let (tokens, stated) = task.example(&mut StdRng::seed_from_u64(seed));
                assert_eq!(tokens.len(), context);
                assert_eq!(tokens[0], FIRST);
                let (got, padding) = value(&tokens[1..]);
                assert_eq!(got, stated);
                assert!(padding.iter().all(|&token| token == PAD));
            }
        }
        Ok(())
    }
}
