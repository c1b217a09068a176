//! Dot-modifiers of one instruction, taken one by one.
//!
//! Decoding takes the modifiers that it understands. If any are left at the end, the instruction is unknown, so no
//! modifier is ignored by accident.

use super::{Failure, fail};
use crate::isa::types::Ty;
use crate::numeric::{IntegerRounding, Rounding};

pub(crate) struct Modifiers<'a> {
    left: Vec<&'a str>,
}

impl<'a> Modifiers<'a> {
    pub fn new(words: &[&'a str]) -> Self {
        Self { left: words.to_vec() }
    }

    /// Takes `word` at any position; true if it was present.
    pub fn take(&mut self, word: &str) -> bool {
        match self.left.iter().position(|w| *w == word) {
            Some(at) => {
                self.left.remove(at);
                true
            }
            None => false,
        }
    }

    /// Takes the first word of `table` that is present.
    pub fn one_of<T: Copy>(&mut self, table: &[(&str, T)]) -> Option<T> {
        for (word, value) in table {
            if self.take(word) {
                return Some(*value);
            }
        }
        None
    }

    /// Takes the first word of `table` that is present, or fails.
    pub fn need<T: Copy>(&mut self, what: &str, table: &[(&str, T)]) -> Result<T, Failure> {
        match self.one_of(table) {
            Some(value) => Ok(value),
            None => fail(format!("{what} is missing or not known")),
        }
    }

    /// Takes the first modifier that is left.
    pub fn next(&mut self) -> Option<&'a str> {
        (!self.left.is_empty()).then(|| self.left.remove(0))
    }

    /// Takes the first modifier for which `f` returns a value.
    pub fn find<T>(&mut self, f: impl Fn(&str) -> Option<T>) -> Option<T> {
        for at in 0..self.left.len() {
            if let Some(value) = f(self.left[at]) {
                self.left.remove(at);
                return Some(value);
            }
        }
        None
    }

    /// Takes the first type word.
    pub fn ty(&mut self) -> Result<Ty, Failure> {
        match self.find(Ty::parse) {
            Some(ty) => Ok(ty),
            None => fail("the type is missing or not known"),
        }
    }

    /// Takes a floating-point rounding modifier.
    pub fn rounding(&mut self) -> Option<Rounding> {
        self.one_of(&[
            ("rn", Rounding::NearestEven),
            ("rna", Rounding::NearestAway),
            ("rz", Rounding::TowardZero),
            ("rm", Rounding::Down),
            ("rp", Rounding::Up),
        ])
    }

    /// Takes a round-to-integer modifier.
    pub fn integer_rounding(&mut self) -> Option<IntegerRounding> {
        self.one_of(&[
            ("rni", IntegerRounding::NearestEven),
            ("rzi", IntegerRounding::TowardZero),
            ("rmi", IntegerRounding::Down),
            ("rpi", IntegerRounding::Up),
        ])
    }

    /// Fails if a modifier was not taken.
    pub fn finish(&self) -> Result<(), Failure> {
        match self.left.first() {
            None => Ok(()),
            Some(word) => fail(format!("modifier `.{word}` is not known here")),
        }
    }
}
