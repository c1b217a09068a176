//! Scalar video instructions: `vadd`, `vsub`, `vabsdiff`, `vmin`, `vmax`, `vset`, `vshl`, `vshr` and `vmad` (PTX ISA,
//! "Scalar Video Instructions").
//!
//! Each operand is a byte, a half or the whole of a 32-bit word, extended by its type. The operation works on the
//! extended values, and `.sat` clamps its result. The result is then combined with `c`: by a second operation, or by
//! replacing a byte or half of `c`.

/// Part of a 32-bit word that is an operand or the result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// All 32 bits.
    Word,
    /// `.b0` to `.b3`.
    Byte(u32),
    /// `.h0`, `.h1`.
    Half(u32),
}

impl Part {
    /// Returns the width in bits.
    pub const fn bits(self) -> u32 {
        match self {
            Part::Word => 32,
            Part::Byte(_) => 8,
            Part::Half(_) => 16,
        }
    }

    const fn shift(self) -> u32 {
        match self {
            Part::Word => 0,
            Part::Byte(index) => 8 * index,
            Part::Half(index) => 16 * index,
        }
    }

    /// Returns the value of this part of a word.
    const fn select(self, word: u32, signed: bool) -> i64 {
        let up = word << (32 - self.bits() - self.shift());
        let down = 32 - self.bits();
        if signed {
            (up as i32 >> down) as i64
        } else {
            (up >> down) as i64
        }
    }

    /// Replaces this part of `word` by the low bits of `value`.
    const fn replace(self, word: u32, value: u32) -> u32 {
        let mask = (u32::MAX >> (32 - self.bits())) << self.shift();
        (word & !mask) | (value << self.shift() & mask)
    }
}

/// Comparison of a `vset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the modifiers'")]
pub enum Comparison {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
}

/// First operation of a scalar video instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// `vadd`
    Add,
    /// `vsub`
    Sub,
    /// `vabsdiff`
    AbsDiff,
    /// `vmin`
    Min,
    /// `vmax`
    Max,
    /// `vset`: 1 if the comparison holds, else 0.
    Set(Comparison),
    /// `vshl`, `vshr`: amounts of 32 and more act as 32, or modulo 32 if `wrap`.
    Shift {
        /// `vshr`.
        right: bool,
        /// True for `.wrap`, false for `.clamp`.
        wrap: bool,
    },
    /// `vmad`: the product plus `c`, shifted right.
    Mad {
        /// True if the product is negated, and true if `c` is.
        negate: [bool; 2],
        /// `.po`: true to add one.
        plus_one: bool,
        /// Bits of the shift: 0, 7 or 15.
        scale: u32,
    },
}

/// Combines the clamped result with `c`, as a 32-bit operation of the result's signedness.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the modifiers'")]
pub enum Second {
    Add,
    Min,
    Max,
}

/// A scalar video instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScalarVideo {
    /// First operation.
    pub operation: Operation,
    /// Signedness of the result, of a and of b.
    pub signed: [bool; 3],
    /// Part of `d` that is written (the rest is `c`), and parts of a and b that are read.
    pub parts: [Part; 3],
    /// True to clamp the result to the range of its part.
    pub saturate: bool,
    /// Second operation.
    pub second: Option<Second>,
}

impl ScalarVideo {
    /// Returns the result for words a, b and c; `c` is 0 if the instruction has none.
    pub fn apply(&self, a: u32, b: u32, c: u32) -> u32 {
        let [_, a_signed, b_signed] = self.signed;
        let [to, a_part, b_part] = self.parts;
        let (x, y) = (a_part.select(a, a_signed), b_part.select(b, b_signed));
        let value = match self.operation {
            Operation::Add => x + y,
            Operation::Sub => x - y,
            Operation::AbsDiff => (x - y).abs(),
            Operation::Min => x.min(y),
            Operation::Max => x.max(y),
            Operation::Set(comparison) => i64::from(match comparison {
                Comparison::Eq => x == y,
                Comparison::Ne => x != y,
                Comparison::Lt => x < y,
                Comparison::Le => x <= y,
                Comparison::Gt => x > y,
                Comparison::Ge => x >= y,
            }),
            Operation::Shift { right, wrap } => {
                let amount = if wrap { y & 31 } else { y.min(32) };
                // 32 bits shifted by up to 32 fit in 64 bits, except for the sign of the largest unsigned values.
                let wide = if right {
                    i128::from(x) >> amount
                } else {
                    i128::from(x) << amount
                };
                return self.finish(wide, to, c);
            }
            Operation::Mad {
                negate,
                plus_one,
                scale,
            } => return self.multiply(i128::from(x) * i128::from(y), c, negate, plus_one, scale),
        };
        self.finish(i128::from(value), to, c)
    }

    fn multiply(&self, product: i128, c: u32, negate: [bool; 2], plus_one: bool, scale: u32) -> u32 {
        let [_, a_signed, b_signed] = self.signed;
        let [negate_product, negate_c] = negate;
        let signed = a_signed || b_signed || negate_product || negate_c;
        let c = if signed { i128::from(c as i32) } else { i128::from(c) };
        let product = if negate_product { -product } else { product };
        let c = if negate_c { -c } else { c };
        let sum = (product + c + i128::from(plus_one)) >> scale;
        let result = if self.saturate { clamp(sum, 32, signed) } else { sum };
        result as u32
    }

    fn finish(&self, value: i128, to: Part, c: u32) -> u32 {
        let signed = self.signed[0];
        let value = if self.saturate {
            clamp(value, to.bits(), signed)
        } else {
            value
        };
        let word = value as u32;
        match self.second {
            None => to.replace(c, word),
            Some(Second::Add) => word.wrapping_add(c),
            Some(Second::Min) if signed => (word as i32).min(c as i32) as u32,
            Some(Second::Max) if signed => (word as i32).max(c as i32) as u32,
            Some(Second::Min) => word.min(c),
            Some(Second::Max) => word.max(c),
        }
    }
}

fn clamp(value: i128, bits: u32, signed: bool) -> i128 {
    if signed {
        value.clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    } else {
        value.clamp(0, (1 << bits) - 1)
    }
}
