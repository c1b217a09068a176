//! Splits text into tokens.
//!
//! A PTX word includes its dots: `mov.u32`, `%tid.x`, `.reg` and `.shared::cta` are one token each, so the parser
//! needs few token kinds. A token borrows from the text and has its line.

/// One token of PTX.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Token<'a> {
    /// Identifier, opcode with modifiers, directive, register.
    Word(&'a str),
    /// Integer literal, as its 64 bits.
    Int(u64),
    /// `0f…` literal, or a decimal with a point rounded to single: the bits.
    F32(u32),
    /// `0d…` literal: the bits.
    F64(u64),
    /// Quoted text, without the quotes.
    Text(&'a str),
    /// Any single punctuation character.
    Punct(u8),
    /// After the last token.
    End,
}

impl std::fmt::Display for Token<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Token::Word(w) => write!(f, "`{w}`"),
            Token::Int(i) => write!(f, "`{i}`"),
            Token::F32(b) => write!(f, "`0f{b:08X}`"),
            Token::F64(b) => write!(f, "`0d{b:016X}`"),
            Token::Text(t) => write!(f, "\"{t}\""),
            Token::Punct(p) => write!(f, "`{}`", *p as char),
            Token::End => write!(f, "the end of the text"),
        }
    }
}

/// A malformed token.
#[derive(Debug)]
pub(crate) struct LexError {
    pub line: u32,
    pub message: String,
}

/// Splits `text` into tokens with their lines, counted from 1. The last is always [`Token::End`].
pub(crate) fn tokens(text: &str) -> Result<Vec<(Token<'_>, u32)>, LexError> {
    let mut lexer = Lexer {
        text,
        bytes: text.as_bytes(),
        at: 0,
        line: 1,
    };
    let mut out = Vec::with_capacity(text.len() / 4);
    loop {
        lexer.skip_blank()?;
        let line = lexer.line;
        let token = lexer.token()?;
        out.push((token, line));
        if token == Token::End {
            return Ok(out);
        }
    }
}

struct Lexer<'a> {
    text: &'a str,
    bytes: &'a [u8],
    at: usize,
    line: u32,
}

fn is_word_start(c: u8) -> bool {
    c.is_ascii_alphabetic() || matches!(c, b'_' | b'$' | b'%' | b'.')
}

fn is_word(c: u8) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, b'_' | b'$' | b'%' | b'.')
}

impl<'a> Lexer<'a> {
    fn peek(&self, ahead: usize) -> u8 {
        self.bytes.get(self.at + ahead).copied().unwrap_or(0)
    }

    fn error<T>(&self, message: impl Into<String>) -> Result<T, LexError> {
        Err(LexError {
            line: self.line,
            message: message.into(),
        })
    }

    fn skip_blank(&mut self) -> Result<(), LexError> {
        loop {
            match self.peek(0) {
                b'\n' => {
                    self.line += 1;
                    self.at += 1;
                }
                b' ' | b'\t' | b'\r' | 0x0b | 0x0c => self.at += 1,
                b'/' if self.peek(1) == b'/' => {
                    while self.at < self.bytes.len() && self.peek(0) != b'\n' {
                        self.at += 1;
                    }
                }
                b'/' if self.peek(1) == b'*' => self.skip_comment()?,
                // Some tools pass PTX as a C string; the final NUL is not part of the text.
                0 if self.at < self.bytes.len() => self.at += 1,
                _ => return Ok(()),
            }
        }
    }

    fn skip_comment(&mut self) -> Result<(), LexError> {
        self.at += 2;
        while self.at < self.bytes.len() {
            if self.peek(0) == b'*' && self.peek(1) == b'/' {
                self.at += 2;
                return Ok(());
            }
            if self.peek(0) == b'\n' {
                self.line += 1;
            }
            self.at += 1;
        }
        self.error("comment is not closed")
    }

    fn token(&mut self) -> Result<Token<'a>, LexError> {
        let c = self.peek(0);
        if self.at >= self.bytes.len() {
            return Ok(Token::End);
        }
        if c.is_ascii_digit() {
            return self.number();
        }
        if is_word_start(c) {
            return Ok(Token::Word(self.word()));
        }
        if c == b'"' {
            return self.quoted();
        }
        if !c.is_ascii_graphic() {
            return self.error(format!("unexpected byte {c:#04x}"));
        }
        self.at += 1;
        Ok(Token::Punct(c))
    }

    fn word(&mut self) -> &'a str {
        let start = self.at;
        let directive = self.peek(0) == b'.';
        self.at += 1;
        loop {
            // `.reg.b32` is two words, like `.reg .b32`.
            if directive && self.peek(0) == b'.' {
                return &self.text[start..self.at];
            }
            if is_word(self.peek(0)) {
                self.at += 1;
            } else if self.peek(0) == b':' && self.peek(1) == b':' && is_word(self.peek(2)) {
                self.at += 2;
            } else {
                return &self.text[start..self.at];
            }
        }
    }

    fn quoted(&mut self) -> Result<Token<'a>, LexError> {
        let start = self.at + 1;
        self.at = start;
        while self.at < self.bytes.len() && self.peek(0) != b'"' {
            if self.peek(0) == b'\n' {
                return self.error("string is not closed on its line");
            }
            self.at += 1 + usize::from(self.peek(0) == b'\\');
        }
        if self.at >= self.bytes.len() {
            return self.error("string is not closed");
        }
        let text = &self.text[start..self.at];
        self.at += 1;
        Ok(Token::Text(text))
    }

    fn number(&mut self) -> Result<Token<'a>, LexError> {
        let start = self.at;
        while self.peek(0).is_ascii_alphanumeric() {
            self.at += 1;
        }
        let decimal = self.bytes[start..self.at].iter().all(u8::is_ascii_digit);
        let fraction = decimal && self.peek(0) == b'.' && self.peek(1).is_ascii_digit();
        if fraction {
            self.at += 1;
            while self.peek(0).is_ascii_alphanumeric() {
                self.at += 1;
            }
        }
        let exponent = matches!(self.bytes[self.at - 1], b'e' | b'E')
            && !self.text[start..].starts_with("0x")
            && matches!(self.peek(0), b'+' | b'-')
            && self.peek(1).is_ascii_digit();
        if exponent {
            self.at += 1;
            while self.peek(0).is_ascii_digit() {
                self.at += 1;
            }
        }
        let word = &self.text[start..self.at];
        match literal(word) {
            Some(token) => Ok(token),
            None => self.error(format!("malformed number `{word}`")),
        }
    }
}

/// Returns the value of a numeric literal (PTX ISA, "Constants").
fn literal(word: &str) -> Option<Token<'static>> {
    let hex = |digits: &str| u64::from_str_radix(digits, 16).ok();
    if let Some(bits) = word.strip_prefix("0f").or(word.strip_prefix("0F")) {
        return (bits.len() == 8).then(|| hex(bits).map(|b| Token::F32(b as u32)))?;
    }
    if let Some(bits) = word.strip_prefix("0d").or(word.strip_prefix("0D")) {
        return (bits.len() == 16).then(|| hex(bits).map(Token::F64))?;
    }
    let digits = word.strip_suffix(['U', 'u']).unwrap_or(word);
    if let Some(h) = digits.strip_prefix("0x").or(digits.strip_prefix("0X")) {
        return hex(h).map(Token::Int);
    }
    if let Some(b) = digits.strip_prefix("0b").or(digits.strip_prefix("0B")) {
        return u64::from_str_radix(b, 2).ok().map(Token::Int);
    }
    if digits.bytes().all(|c| c.is_ascii_digit()) {
        let octal = digits.len() > 1 && digits.starts_with('0');
        let radix = if octal { 8 } else { 10 };
        return u64::from_str_radix(digits, radix).ok().map(Token::Int);
    }
    let value: f64 = word.parse().ok()?;
    Some(Token::F64(value.to_bits()))
}
