//! Function bodies: statements, instructions, operands.

use super::ast::{Instruction, Operand, Statement};
use super::{MAX_NESTING, Parser, Result};
use crate::lex::Token;

impl<'a> Parser<'a> {
    /// Parses statements up to and including the closing brace.
    pub(super) fn statements(&mut self) -> Result<Vec<Statement<'a>>> {
        self.depth += 1;
        if self.depth > MAX_NESTING {
            return self.fail("blocks are nested too deeply");
        }
        let mut out = Vec::new();
        while !self.accept(b'}') {
            self.statement(&mut out)?;
        }
        self.depth -= 1;
        Ok(out)
    }

    fn statement(&mut self, out: &mut Vec<Statement<'a>>) -> Result<()> {
        if self.debug_directive()? {
            return Ok(());
        }
        match self.peek() {
            Token::Punct(b';') => {
                self.next();
            }
            Token::Punct(b'{') => {
                self.next();
                out.push(Statement::Block(self.statements()?));
            }
            Token::Word(".reg") => {
                out.extend(self.registers()?.into_iter().map(Statement::Registers));
            }
            Token::Word(".local" | ".shared" | ".param" | ".global" | ".const") => {
                out.extend(self.variables(false)?.into_iter().map(Statement::Variable));
            }
            Token::Word(".extern") => {
                self.next();
                out.extend(self.variables(true)?.into_iter().map(Statement::Variable));
            }
            Token::Word(name) if self.peek_at(1) == Token::Punct(b':') => {
                self.next();
                self.next();
                self.labelled(name, out)?;
            }
            Token::Word(_) | Token::Punct(b'@') => {
                out.push(Statement::Instruction(self.instruction()?));
            }
            other => return self.fail(format!("expected a statement, found {other}")),
        }
        Ok(())
    }

    fn labelled(&mut self, name: &'a str, out: &mut Vec<Statement<'a>>) -> Result<()> {
        match self.peek() {
            Token::Word(".branchtargets" | ".calltargets") => {
                self.next();
                let mut list = vec![self.word("a target")?];
                while self.accept(b',') {
                    list.push(self.word("a target")?);
                }
                self.expect(b';')?;
                out.push(Statement::Targets { name, list });
            }
            Token::Word(".callprototype") => {
                self.next();
                if self.is(b'(') {
                    self.parameters()?;
                }
                self.word("`_`")?;
                if self.is(b'(') {
                    self.parameters()?;
                }
                self.accept_word(".noreturn");
                self.expect(b';')?;
                out.push(Statement::Prototype(name));
            }
            _ => out.push(Statement::Label(name)),
        }
        Ok(())
    }

    fn instruction(&mut self) -> Result<Instruction<'a>> {
        let line = self.line();
        let mut guard = None;
        if self.accept(b'@') {
            let negated = self.accept(b'!');
            guard = Some((self.word("a guard predicate")?, negated));
        }
        let word = self.word("an instruction")?;
        if word.starts_with('.') {
            return self.fail(format!("unknown directive `{word}`"));
        }
        let mut parts = word.split('.');
        let opcode = parts.next().unwrap_or(word);
        let mut modifiers: Vec<&str> = parts.collect();
        // Modifiers may be separate words: `mov .u32`.
        while let Token::Word(word) = self.peek()
            && let Some(modifier) = word.strip_prefix('.')
        {
            self.next();
            modifiers.push(modifier);
        }
        let mut operands = Vec::new();
        if !self.is(b';') {
            operands.push(self.operand()?);
            while self.accept(b',') {
                operands.push(self.operand()?);
            }
        }
        self.expect(b';')?;
        Ok(Instruction {
            line,
            guard,
            opcode,
            modifiers,
            operands,
        })
    }

    fn operand(&mut self) -> Result<Operand<'a>> {
        self.depth += 1;
        if self.depth > MAX_NESTING {
            return self.fail("operands are nested too deeply");
        }
        let first = self.simple_operand()?;
        self.depth -= 1;
        if self.accept(b'|') {
            let second = self.simple_operand()?;
            return Ok(Operand::Pair(Box::new(first), Box::new(second)));
        }
        Ok(first)
    }

    fn simple_operand(&mut self) -> Result<Operand<'a>> {
        match self.peek() {
            Token::Punct(b'!') => {
                self.next();
                let name = self.word("a predicate")?;
                Ok(Operand::Not(Box::new(Operand::Name(name))))
            }
            Token::Punct(b'-') => {
                self.next();
                self.negative()
            }
            Token::Punct(b'~') => {
                self.next();
                Ok(Operand::Int(!self.int("an integer")?))
            }
            Token::Punct(b'{') => {
                self.next();
                Ok(Operand::Vector(self.operand_list(b'}')?))
            }
            Token::Punct(b'(') => {
                self.next();
                Ok(Operand::List(self.operand_list(b')')?))
            }
            Token::Punct(b'[') => {
                self.next();
                self.address()
            }
            Token::Int(i) => {
                self.next();
                Ok(Operand::Int(i))
            }
            Token::F32(b) => {
                self.next();
                Ok(Operand::F32(b))
            }
            Token::F64(b) => {
                self.next();
                Ok(Operand::F64(b))
            }
            Token::Word(name) => {
                self.next();
                if self.is(b'+') || self.is(b'-') {
                    let offset = self.signed_offset()?;
                    return Ok(Operand::Sum(name, offset));
                }
                Ok(Operand::Name(name))
            }
            other => self.fail(format!("expected an operand, found {other}")),
        }
    }

    fn negative(&mut self) -> Result<Operand<'a>> {
        match self.next() {
            Token::Int(i) => Ok(Operand::Int(i.wrapping_neg())),
            Token::F32(b) => Ok(Operand::F32(b ^ (1 << 31))),
            Token::F64(b) => Ok(Operand::F64(b ^ (1 << 63))),
            Token::Word(name) => Ok(Operand::Negative(Box::new(Operand::Name(name)))),
            other => self.fail(format!("expected a number or a register, found {other}")),
        }
    }

    fn operand_list(&mut self, close: u8) -> Result<Vec<Operand<'a>>> {
        let mut out = Vec::new();
        while !self.accept(close) {
            out.push(self.operand()?);
            if !self.is(close) {
                self.expect(b',')?;
            }
        }
        Ok(out)
    }

    /// Reads an address in brackets, after the opening one.
    fn address(&mut self) -> Result<Operand<'a>> {
        let base = match self.peek() {
            Token::Word(name) => {
                self.next();
                Operand::Name(name)
            }
            Token::Int(i) => {
                self.next();
                Operand::Int(i)
            }
            other => return self.fail(format!("expected an address, found {other}")),
        };
        let offset = self.signed_offset()?;
        let mut coordinates = None;
        if self.accept(b',') {
            self.expect(b'{')?;
            coordinates = Some(self.operand_list(b'}')?);
        }
        self.expect(b']')?;
        Ok(Operand::Address {
            base: Box::new(base),
            offset,
            coordinates,
        })
    }
}
