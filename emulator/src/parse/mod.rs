//! Parses tokens to [`ast`]: module-level directives and functions. Statements and operands are in [`body`],
//! declarations in [`declare`].

pub(crate) mod ast;
mod body;
mod declare;

use crate::lex::{self, Token};
use ast::{Directives, Function, Module};

/// Syntax error: a line and a message.
#[derive(Debug)]
pub(crate) struct SyntaxError {
    pub line: u32,
    pub message: String,
}

type Result<T> = std::result::Result<T, SyntaxError>;

/// Deepest nesting of blocks; deeper text is refused, so that none can exhaust the stack.
const MAX_NESTING: u32 = 64;

/// Parses a module.
pub(crate) fn module(text: &str) -> Result<Module<'_>> {
    let tokens = lex::tokens(text).map_err(|e| SyntaxError {
        line: e.line,
        message: e.message,
    })?;
    let mut parser = Parser {
        tokens,
        at: 0,
        depth: 0,
    };
    parser.module()
}

struct Parser<'a> {
    tokens: Vec<(Token<'a>, u32)>,
    at: usize,
    depth: u32,
}

impl<'a> Parser<'a> {
    fn peek(&self) -> Token<'a> {
        self.tokens[self.at].0
    }

    fn peek_at(&self, ahead: usize) -> Token<'a> {
        let last = self.tokens.len() - 1;
        self.tokens[(self.at + ahead).min(last)].0
    }

    fn line(&self) -> u32 {
        self.tokens[self.at].1
    }

    fn next(&mut self) -> Token<'a> {
        let token = self.peek();
        if self.at + 1 < self.tokens.len() {
            self.at += 1;
        }
        token
    }

    fn fail<T>(&self, message: impl Into<String>) -> Result<T> {
        Err(SyntaxError {
            line: self.line(),
            message: message.into(),
        })
    }

    fn is(&self, punct: u8) -> bool {
        self.peek() == Token::Punct(punct)
    }

    fn accept(&mut self, punct: u8) -> bool {
        let yes = self.is(punct);
        if yes {
            self.next();
        }
        yes
    }

    fn expect(&mut self, punct: u8) -> Result<()> {
        if self.accept(punct) {
            return Ok(());
        }
        self.fail(format!("expected `{}`, found {}", punct as char, self.peek()))
    }

    fn is_word(&self, word: &str) -> bool {
        self.peek() == Token::Word(word)
    }

    fn accept_word(&mut self, word: &str) -> bool {
        let yes = self.is_word(word);
        if yes {
            self.next();
        }
        yes
    }

    fn word(&mut self, what: &str) -> Result<&'a str> {
        match self.peek() {
            Token::Word(w) => {
                self.next();
                Ok(w)
            }
            other => self.fail(format!("expected {what}, found {other}")),
        }
    }

    fn int(&mut self, what: &str) -> Result<u64> {
        match self.peek() {
            Token::Int(i) => {
                self.next();
                Ok(i)
            }
            other => self.fail(format!("expected {what}, found {other}")),
        }
    }

    fn small(&mut self, what: &str) -> Result<u32> {
        let value = self.int(what)?;
        u32::try_from(value).or_else(|_| self.fail(format!("{what} {value} is too large")))
    }

    fn module(&mut self) -> Result<Module<'a>> {
        let mut module = Module::default();
        loop {
            match self.peek() {
                Token::End => return Ok(module),
                Token::Punct(b';') => {
                    self.next();
                }
                Token::Word(".version") => {
                    self.next();
                    module.version = self.version()?;
                }
                Token::Word(".target") => {
                    self.next();
                    module.target = self.word("a target")?;
                    while self.accept(b',') {
                        self.word("a target option")?;
                    }
                }
                Token::Word(".address_size") => {
                    self.next();
                    let bits = self.int("an address size")?;
                    if bits != 64 {
                        return self.fail(format!("address size {bits}: only 64 is supported"));
                    }
                }
                Token::Word(".alias") => {
                    self.next();
                    let name = self.word("a name")?;
                    self.expect(b',')?;
                    module.aliases.push((name, self.word("a name")?));
                    self.expect(b';')?;
                }
                Token::Word(w) if w.starts_with('.') || w.starts_with('@') => {
                    self.declaration(&mut module)?;
                }
                other => return self.fail(format!("expected a directive, found {other}")),
            }
        }
    }

    /// Checks the version. The lexer returns `8.0` as a decimal number; its value does not matter.
    fn version(&mut self) -> Result<&'a str> {
        match self.next() {
            Token::F64(_) | Token::Int(_) => Ok("given"),
            other => self.fail(format!("expected a version, found {other}")),
        }
    }

    fn declaration(&mut self, module: &mut Module<'a>) -> Result<()> {
        if self.debug_directive()? {
            return Ok(());
        }
        let mut is_extern = false;
        loop {
            match self.peek() {
                Token::Word(".extern") => {
                    is_extern = true;
                    self.next();
                }
                Token::Word(".visible" | ".weak" | ".common") => {
                    self.next();
                }
                Token::Word(".entry" | ".func") => {
                    let function = self.function()?;
                    module.functions.push(function);
                    return Ok(());
                }
                Token::Word(".global" | ".const" | ".shared") => {
                    let list = self.variables(is_extern)?;
                    module.variables.extend(list);
                    return Ok(());
                }
                other => {
                    return self.fail(format!("expected a variable or a function, found {other}"));
                }
            }
        }
    }

    /// Skips `.file`, `.loc`, `.section` and `.pragma`; returns true if there was one.
    fn debug_directive(&mut self) -> Result<bool> {
        match self.peek() {
            Token::Word(".file") => {
                self.next();
                self.int("a file number")?;
                let Token::Text(_) = self.next() else {
                    return self.fail("expected a file name");
                };
                while self.accept(b',') {
                    self.int("a number")?;
                }
            }
            Token::Word(".loc") => {
                let line = self.line();
                while self.line() == line && self.peek() != Token::End {
                    self.next();
                }
            }
            Token::Word(".pragma") => {
                self.next();
                while !self.is(b';') && self.peek() != Token::End {
                    self.next();
                }
                self.expect(b';')?;
            }
            Token::Word(".section") => {
                self.next();
                self.word("a section name")?;
                self.expect(b'{')?;
                while !self.is(b'}') {
                    if self.peek() == Token::End {
                        return self.fail("section is not closed");
                    }
                    self.next();
                }
                self.next();
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn function(&mut self) -> Result<Function<'a>> {
        let line = self.line();
        let is_entry = self.word("a function")? == ".entry";
        self.attributes()?;
        let returns = if self.is(b'(') { self.parameters()? } else { Vec::new() };
        let name = self.word("a function name")?;
        let params = if self.is(b'(') { self.parameters()? } else { Vec::new() };
        let directives = self.function_directives()?;
        let body = if self.accept(b';') {
            None
        } else {
            self.expect(b'{')?;
            Some(self.statements()?)
        };
        Ok(Function {
            name,
            is_entry,
            returns,
            params,
            directives,
            body,
            line,
        })
    }

    fn attributes(&mut self) -> Result<()> {
        while self.accept_word(".attribute") {
            self.expect(b'(')?;
            while !self.accept(b')') {
                if self.next() == Token::End {
                    return self.fail("attribute is not closed");
                }
            }
        }
        Ok(())
    }

    fn function_directives(&mut self) -> Result<Directives> {
        let mut out = Directives::default();
        loop {
            let Token::Word(word) = self.peek() else {
                return Ok(out);
            };
            if self.debug_directive()? {
                continue;
            }
            match word {
                ".maxntid" => out.max_threads = Some(self.triple()?),
                ".reqntid" => out.required_threads = Some(self.triple()?),
                ".reqnctapercluster" => out.required_cluster = Some(self.triple()?),
                ".maxnreg" => {
                    self.next();
                    out.max_registers = Some(self.small("a register count")?);
                }
                ".minnctapersm" | ".maxnctapersm" | ".maxclusterrank" => {
                    self.next();
                    self.int("a count")?;
                }
                ".noreturn"
                | ".explicitcluster"
                | ".blocksareclusters"
                | ".unified"
                | ".abi_preserve"
                | ".abi_preserve_control" => {
                    self.next();
                    if let Token::Int(_) = self.peek() {
                        self.next();
                    }
                }
                ".attribute" => self.attributes()?,
                _ => return self.fail(format!("unknown function directive `{word}`")),
            }
        }
    }

    fn triple(&mut self) -> Result<[u32; 3]> {
        self.next();
        let mut out = [1; 3];
        out[0] = self.small("a size")?;
        for size in &mut out[1..] {
            if !self.accept(b',') {
                break;
            }
            *size = self.small("a size")?;
        }
        Ok(out)
    }
}
