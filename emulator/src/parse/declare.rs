//! Declarations: parameters, variables with their initialisers, registers.

use super::ast::{Init, InitValue, Parameter, RegisterDecl, Variable};
use super::{Parser, Result};
use crate::lex::Token;

/// Largest variable in bytes; a larger one is taken for a mistake in the text.
const MAX_VARIABLE: u64 = 1 << 32;
/// Largest number of scalars in one initialiser.
const MAX_INIT: usize = 1 << 24;

/// Returns the bytes of a fundamental type word such as `.b32`; a predicate counts as one byte.
pub(crate) fn type_bytes(word: &str) -> Option<u64> {
    Some(match word {
        ".b8" | ".u8" | ".s8" | ".pred" => 1,
        ".b16" | ".u16" | ".s16" | ".f16" | ".bf16" => 2,
        ".b32" | ".u32" | ".s32" | ".f32" | ".f16x2" | ".bf16x2" => 4,
        ".b64" | ".u64" | ".s64" | ".f64" | ".f32x2" => 8,
        ".b128" => 16,
        _ => return None,
    })
}

impl<'a> Parser<'a> {
    /// Parses `( .param .b64 a, .param .align 8 .b8 b[16] )`.
    pub(super) fn parameters(&mut self) -> Result<Vec<Parameter<'a>>> {
        self.expect(b'(')?;
        let mut out = Vec::new();
        while !self.accept(b')') {
            out.push(self.parameter()?);
            if !self.is(b')') {
                self.expect(b',')?;
            }
        }
        Ok(out)
    }

    fn parameter(&mut self) -> Result<Parameter<'a>> {
        let in_register = match self.word("`.param` or `.reg`")? {
            ".param" => false,
            ".reg" => true,
            other => return self.fail(format!("expected `.param` or `.reg`, found `{other}`")),
        };
        let mut align = 0;
        let mut ty = None;
        loop {
            match self.peek() {
                Token::Word(".align") => {
                    self.next();
                    let value = self.alignment()?;
                    // The alignment of the memory that a `.ptr` parameter points to does not matter here.
                    if ty.is_none() {
                        align = value;
                    }
                }
                Token::Word(".ptr" | ".global" | ".const" | ".local" | ".shared" | ".generic") => {
                    self.next();
                }
                Token::Word(w) if w.starts_with('.') => {
                    if type_bytes(w).is_none() {
                        return self.fail(format!("unknown parameter type `{w}`"));
                    }
                    ty = Some(w);
                    self.next();
                }
                _ => break,
            }
        }
        let Some(ty) = ty else {
            return self.fail("parameter has no type");
        };
        let element = type_bytes(ty).unwrap_or(0);
        let name = self.word("a parameter name")?;
        let count = self.dimensions()?.unwrap_or(1);
        let size = self.bounded(element, count)?;
        Ok(Parameter {
            name,
            size,
            align: if align == 0 { element } else { align },
            register: in_register.then_some(ty),
        })
    }

    fn alignment(&mut self) -> Result<u64> {
        let value = self.int("an alignment")?;
        if !value.is_power_of_two() || value > 1 << 20 {
            return self.fail(format!("alignment {value} is not a usable power of two"));
        }
        Ok(value)
    }

    fn bounded(&self, element: u64, count: u64) -> Result<u64> {
        match element.checked_mul(count) {
            Some(size) if size <= MAX_VARIABLE => Ok(size),
            _ => self.fail(format!("{count} elements of {element} bytes are too many")),
        }
    }

    /// Returns the product of `[a][b]…`: `None` without brackets, 0 for `[]`.
    fn dimensions(&mut self) -> Result<Option<u64>> {
        let mut total = None;
        while self.accept(b'[') {
            let size = if self.is(b']') { 0 } else { self.int("a size")? };
            self.expect(b']')?;
            total = Some(self.bounded(total.unwrap_or(1), size)?);
        }
        Ok(total)
    }

    /// Parses `.shared .align 16 .b8 a[64], b[64];`.
    pub(super) fn variables(&mut self, is_extern: bool) -> Result<Vec<Variable<'a>>> {
        let space = self.word("a state space")?.trim_start_matches('.');
        let space = space.split("::").next().unwrap_or(space);
        let (mut align, mut vector, mut ty) = (0, 1, None);
        loop {
            match self.peek() {
                Token::Word(".align") => {
                    self.next();
                    align = self.alignment()?;
                }
                Token::Word(".attribute") => self.attributes()?,
                Token::Word(".v2") => {
                    vector = 2;
                    self.next();
                }
                Token::Word(".v4") => {
                    vector = 4;
                    self.next();
                }
                Token::Word(w) if w.starts_with('.') => {
                    if type_bytes(w).is_none() {
                        return self.fail(format!("unknown variable type `{w}`"));
                    }
                    ty = Some(w);
                    self.next();
                }
                _ => break,
            }
        }
        let Some(scalar) = ty.and_then(type_bytes) else {
            return self.fail("variable has no type");
        };
        let mut out = Vec::new();
        loop {
            let line = self.line();
            let name = self.word("a variable name")?;
            let count = self.dimensions()?;
            let mut init = Vec::new();
            if self.accept(b'=') {
                self.initialiser(scalar, 0, &mut init)?;
            }
            let written = init.iter().map(|i| i.offset + scalar).max().unwrap_or(0);
            let mut size = self.bounded(scalar * vector, count.unwrap_or(1))?;
            if count == Some(0) && !is_extern {
                size = written;
            }
            if written > size {
                return self.fail(format!("initialiser of `{name}` is longer than it"));
            }
            out.push(Variable {
                name,
                space,
                element: scalar,
                size,
                align: if align == 0 { scalar * vector } else { align },
                is_extern,
                init,
                line,
            });
            if self.accept(b';') {
                return Ok(out);
            }
            self.expect(b',')?;
        }
    }

    fn initialiser(&mut self, scalar: u64, offset: u64, out: &mut Vec<Init<'a>>) -> Result<()> {
        // Nested braces follow the dimensions; the scalars are consecutive in memory.
        let mut depth = 0u32;
        let mut at = offset;
        loop {
            if self.accept(b'{') {
                depth += 1;
            } else if self.is(b'}') && depth > 0 {
                self.next();
                depth -= 1;
            } else if self.is(b',') && depth > 0 {
                self.next();
            } else {
                let value = self.init_value(scalar)?;
                if out.len() >= MAX_INIT {
                    return self.fail("initialiser is too long");
                }
                out.push(Init { offset: at, value });
                at += scalar;
            }
            if depth == 0 {
                return Ok(());
            }
        }
    }

    fn init_value(&mut self, scalar: u64) -> Result<InitValue<'a>> {
        let negative = self.accept(b'-');
        match self.next() {
            Token::Int(i) => {
                let value = if negative { i.wrapping_neg() } else { i };
                Ok(InitValue::Bits(value))
            }
            Token::F32(bits) => {
                let bits = if negative { bits ^ (1 << 31) } else { bits };
                Ok(InitValue::Bits(u64::from(bits)))
            }
            Token::F64(bits) => {
                let bits = if negative { bits ^ (1 << 63) } else { bits };
                let narrow = (f64::from_bits(bits) as f32).to_bits();
                Ok(InitValue::Bits(if scalar == 4 { u64::from(narrow) } else { bits }))
            }
            Token::Word(word) if !negative => {
                let generic = word == "generic";
                let symbol = if generic {
                    self.expect(b'(')?;
                    let symbol = self.word("a symbol")?;
                    self.expect(b')')?;
                    symbol
                } else {
                    word
                };
                let offset = self.signed_offset()? as u64;
                Ok(InitValue::Address { symbol, offset })
            }
            other => self.fail(format!("expected a constant, found {other}")),
        }
    }

    /// Parses `+4`, `-4`, `+-4` or nothing.
    pub(super) fn signed_offset(&mut self) -> Result<i64> {
        let mut negative = false;
        let mut any = false;
        loop {
            if self.accept(b'+') {
                any = true;
            } else if self.accept(b'-') {
                any = true;
                negative = !negative;
            } else {
                break;
            }
        }
        if !any {
            return Ok(0);
        }
        let value = self.int("an offset")? as i64;
        Ok(if negative { value.wrapping_neg() } else { value })
    }

    /// Parses `.reg .b32 %r<10>, %tmp;`.
    pub(super) fn registers(&mut self) -> Result<Vec<RegisterDecl<'a>>> {
        self.next();
        let mut vector = 1;
        let mut ty = self.word("a register type")?;
        if let ".v2" | ".v4" = ty {
            vector = if ty == ".v2" { 2 } else { 4 };
            ty = self.word("a register type")?;
        }
        if type_bytes(ty).is_none() {
            return self.fail(format!("unknown register type `{ty}`"));
        }
        let mut out = Vec::new();
        loop {
            let name = self.word("a register name")?;
            let mut count = None;
            if self.accept(b'<') {
                count = Some(self.int("a register count")?);
                self.expect(b'>')?;
            }
            out.push(RegisterDecl {
                ty,
                vector,
                name,
                count,
            });
            if self.accept(b';') {
                return Ok(out);
            }
            self.expect(b',')?;
        }
    }
}
