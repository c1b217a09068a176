//! Decodes parsed text to typed instructions, once per module.
//!
//! Each function is decoded on its own: names become register rows, immediates and special registers become rows that
//! are filled when a frame is made, and labels become instruction indices. An unknown instruction does not stop
//! decoding. It is recorded, and the launch of any entry that can reach it is refused.

mod asynchronous;
mod compare;
mod control;
mod convert;
mod declare;
mod float;
mod integer;
mod matrix;
mod memory;
mod modifiers;
mod operand;
mod scope;
mod video;
mod warp;
mod wmma;

use std::collections::HashMap;

use crate::isa::types::{Order, PRED_SINK, PRED_TRUE, Pred, SINK, Slot};
use crate::isa::{self, AtomicOp, Instr, Memory, Op, Preload};
use crate::parse::ast::{self, Instruction, Statement};
use crate::program::{Function, Program, Source, Unknown};
use modifiers::Modifiers;
use scope::{Entity, Scope};

/// The reason why an instruction cannot be decoded.
#[derive(Debug)]
pub(crate) struct Failure(pub String);

pub(crate) fn fail<T>(message: impl Into<String>) -> Result<T, Failure> {
    Err(Failure(message.into()))
}

/// Names that all functions of a module share.
#[derive(Default)]
pub(crate) struct Symbols {
    /// Module variables and function-level static ones, by index into `Program::variables`.
    pub variables: HashMap<String, u32>,
    pub functions: HashMap<String, u32>,
    /// Interned opcode names.
    pub names: Vec<String>,
    name_index: HashMap<String, u32>,
}

impl Symbols {
    fn intern(&mut self, name: &str) -> u32 {
        if let Some(index) = self.name_index.get(name) {
            return *index;
        }
        let index = self.names.len() as u32;
        self.names.push(name.to_owned());
        self.name_index.insert(name.to_owned(), index);
        index
    }
}

/// Decodes a module. A declaration that makes no sense is an error with its line; unknown instructions are recorded
/// in their function.
pub(crate) fn program(parsed: &ast::Module<'_>, source: Source) -> Result<Program, (u32, String, Source)> {
    let mut symbols = declare::symbols(parsed);
    let first_static = parsed.variables.len() as u32;
    let mut statics = Vec::new();
    let mut functions = Vec::new();
    for declared in &parsed.functions {
        // A definition replaces the declaration of the same name.
        if symbols.functions.get(declared.name) != Some(&(functions.len() as u32)) {
            functions.push(Function::new(declared.name, false, declared.line));
            continue;
        }
        functions.push(function(declared, &mut symbols, &mut statics, first_static));
    }
    let mut variables = Vec::new();
    for variable in parsed.variables.iter().chain(&statics) {
        match declare::variable(variable, &symbols) {
            Ok(made) => variables.push(made),
            Err(message) => return Err((variable.line, message, source)),
        }
    }
    let entries = functions.iter().enumerate();
    let entries = entries.filter(|(_, f)| f.is_entry && f.has_body);
    let entries = entries.map(|(index, f)| declare::entry(index, f)).collect();
    Ok(Program {
        source,
        target: parsed.target.to_owned(),
        functions,
        variables,
        names: symbols.names,
        entries,
    })
}

/// Decodes a function with a body. Its static variables are added to `statics` and become variables of the module.
fn function<'a>(
    parsed: &ast::Function<'a>,
    symbols: &mut Symbols,
    statics: &mut Vec<ast::Variable<'a>>,
    next_variable: u32,
) -> Function {
    let mut decoder = Decoder::new(parsed, symbols, statics, next_variable);
    decoder.formals(parsed);
    if let Some(body) = &parsed.body {
        decoder.block(body);
    }
    decoder.finish(parsed)
}

pub(crate) struct Decoder<'s, 'a> {
    symbols: &'s mut Symbols,
    statics: &'s mut Vec<ast::Variable<'a>>,
    next_variable: u32,
    is_entry: bool,
    out: Function,
    scopes: Vec<Scope<'a>>,
    /// Instruction index of each label id, once the label has been decoded.
    labels: Vec<Option<u32>>,
    preloaded: HashMap<Preload, Slot>,
    reads: Vec<Slot>,
    writes: Vec<Slot>,
    line: u32,
}

impl<'s, 'a> Decoder<'s, 'a> {
    fn new(
        parsed: &ast::Function<'a>,
        symbols: &'s mut Symbols,
        statics: &'s mut Vec<ast::Variable<'a>>,
        next_variable: u32,
    ) -> Self {
        let mut out = Function::new(parsed.name, parsed.is_entry, parsed.line);
        out.value_rows = SINK + 1;
        out.pred_rows = PRED_SINK + 1;
        Self {
            symbols,
            statics,
            next_variable,
            is_entry: parsed.is_entry,
            out,
            scopes: vec![Scope::default()],
            labels: Vec::new(),
            preloaded: HashMap::new(),
            reads: Vec::new(),
            writes: Vec::new(),
            line: parsed.line,
        }
    }

    fn block(&mut self, statements: &[Statement<'a>]) {
        let mut scope = Scope::default();
        for statement in statements {
            match statement {
                Statement::Label(name) => {
                    scope.names.insert(name, Entity::Label(self.labels.len() as u32));
                    self.labels.push(None);
                }
                Statement::Targets { name, list } => {
                    scope.names.insert(name, Entity::Targets(list.clone()));
                }
                Statement::Prototype(name) => {
                    scope.names.insert(name, Entity::Prototype);
                }
                _ => {}
            }
        }
        self.scopes.push(scope);
        for statement in statements {
            self.statement(statement);
        }
        self.scopes.pop();
    }

    fn statement(&mut self, statement: &Statement<'a>) {
        match statement {
            Statement::Registers(decl) => self.declare_registers(decl),
            Statement::Variable(variable) => self.declare_variable(variable),
            Statement::Label(name) => {
                let at = self.out.code.len() as u32;
                if let Some(Entity::Label(id)) = self.scopes.last().and_then(|s| s.names.get(name)) {
                    self.labels[*id as usize] = Some(at);
                }
            }
            Statement::Instruction(instruction) => self.add(instruction),
            Statement::Block(inner) => self.block(inner),
            Statement::Targets { .. } | Statement::Prototype(_) => {}
        }
    }

    fn add(&mut self, instruction: &Instruction<'a>) {
        self.line = instruction.line;
        self.reads.clear();
        self.writes.clear();
        let (guard, op) = match self.decode(instruction) {
            Ok(decoded) => decoded,
            Err(Failure(message)) => {
                self.unknown(message);
                (None, Op::Nop)
            }
        };
        let mut name = instruction.opcode.to_owned();
        for modifier in &instruction.modifiers {
            name.push('.');
            name.push_str(modifier);
        }
        let name = self.symbols.intern(&name);
        let flops = float::flops(&op);
        self.out.code.push(Instr {
            op,
            guard,
            line: instruction.line,
            name,
            flops,
            reads: self.reads.as_slice().into(),
            writes: self.writes.as_slice().into(),
        });
    }

    fn unknown(&mut self, message: String) {
        let line = self.line;
        self.out.unknown.push(Unknown { line, message });
    }

    fn decode(&mut self, i: &Instruction<'a>) -> Result<(Option<Pred>, Op), Failure> {
        let guard = match i.guard {
            Some((name, negated)) => Some(Pred {
                slot: self.pred_register(name)?,
                negated,
            }),
            None => None,
        };
        let mut modifiers = Modifiers::new(&i.modifiers);
        let op = self.family(i, &mut modifiers)?;
        modifiers.finish()?;
        Ok((guard, op))
    }

    fn family(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Op, Failure> {
        let families = [
            Self::integer,
            Self::float,
            Self::convert,
            Self::memory,
            Self::control,
            Self::warp,
            Self::asynchronous,
            Self::matrix,
        ];
        for family in families {
            if let Some(op) = family(self, i, m)? {
                return Ok(op);
            }
        }
        fail(format!("opcode `{}` is not known", i.opcode))
    }

    /// Ends the body with an implicit return and turns label ids into instruction indices.
    fn finish(mut self, parsed: &ast::Function<'a>) -> Function {
        let end = self.out.code.len() as u32;
        let name = self.symbols.intern("ret");
        self.out.code.push(Instr {
            op: Op::Control(isa::Control::Ret),
            guard: None,
            line: self.line.max(parsed.line),
            name,
            flops: 0,
            reads: Box::default(),
            writes: Box::default(),
        });
        let labels = &self.labels;
        let place = |id: u32| labels.get(id as usize).copied().flatten().unwrap_or(end);
        for instr in &mut self.out.code {
            match &mut instr.op {
                Op::Control(isa::Control::Bra { target }) => *target = place(*target),
                Op::Control(isa::Control::Brx { targets, .. }) => {
                    for target in targets.iter_mut() {
                        *target = place(*target);
                    }
                }
                _ => {}
            }
        }
        mark_guesses(&mut self.out.code);
        self.out.directives = parsed.directives;
        self.out.has_body = parsed.body.is_some();
        self.out
    }

    /// Returns the row preloaded with this value.
    fn preload(&mut self, value: Preload) -> Slot {
        if let Some(slot) = self.preloaded.get(&value) {
            return *slot;
        }
        let slot = self.value_row(1);
        self.preloaded.insert(value, slot);
        self.out.preloads.push((slot, value));
        slot
    }

    fn constant(&mut self, bits: u64) -> Slot {
        self.preload(Preload::Bits(bits))
    }

    fn value_row(&mut self, rows: u32) -> Slot {
        let slot = self.out.value_rows;
        self.out.value_rows += rows;
        slot
    }

    fn always(&self) -> Pred {
        Pred {
            slot: PRED_TRUE,
            negated: false,
        }
    }
}

/// Marks the ordinary loads that are followed in the text by a compare-and-swap on the same address register and
/// offset, with no write of that register in between.
fn mark_guesses(code: &mut [Instr]) {
    // Address registers and offsets of the compare-and-swaps below the current line.
    let mut swapped: Vec<(Slot, i64)> = Vec::new();
    for instr in code.iter_mut().rev() {
        match &mut instr.op {
            Op::Memory(Memory::Atomic {
                op: AtomicOp::Cas,
                addr,
                ..
            }) => swapped.push((addr.base, addr.offset)),
            Op::Memory(Memory::Load { addr, order, guess, .. }) if *order == Order::Weak => {
                *guess = swapped.contains(&(addr.base, addr.offset));
            }
            _ => {}
        }
        swapped.retain(|(base, _)| !instr.writes.contains(base));
    }
}
