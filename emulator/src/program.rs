//! A decoded module: the input of the executor.

use std::collections::BTreeSet;

use crate::isa::types::Slot;
use crate::isa::{Instr, Passed, Preload};
use crate::parse::ast;

/// Functions, kernels and variables of a module, and the text they came from.
#[derive(Debug)]
pub(crate) struct Program {
    pub source: Source,
    /// `.target` of the module.
    pub target: String,
    pub functions: Vec<Function>,
    pub variables: Vec<Variable>,
    /// Opcode names with their modifiers, by `Instr::name`.
    pub names: Vec<String>,
    pub entries: Vec<Entry>,
}

/// Text of a module, for messages.
#[derive(Debug)]
pub(crate) struct Source {
    /// Name of the file.
    pub file: String,
    lines: Vec<Box<str>>,
}

impl Source {
    pub fn new(text: &str, file: &str) -> Self {
        Self {
            file: file.to_owned(),
            lines: text.lines().map(Into::into).collect(),
        }
    }

    /// Returns the text of a line, counted from 1 and trimmed; empty if there is no such line.
    pub fn line(&self, line: u32) -> String {
        let text = self.lines.get((line as usize).wrapping_sub(1));
        let text = text.map_or("", |t| t.trim());
        // A line of generated PTX can have a megabyte.
        text.chars().take(200).collect()
    }
}

impl Program {
    /// Returns the kernel of this name.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|e| e.name == name)
    }

    /// Returns the functions that can run when `entry` is launched, `entry` first.
    pub(crate) fn reachable(&self, entry: u32) -> Vec<u32> {
        let mut seen = vec![false; self.functions.len()];
        let mut order = vec![entry];
        seen[entry as usize] = true;
        let mut at = 0;
        while at < order.len() {
            let function = &self.functions[order[at] as usize];
            let mut next: Vec<u32> = function.calls.clone();
            next.extend(&function.address_taken);
            if function.calls_indirectly {
                // An indirect call may reach any function whose address an initialiser holds.
                let all = self.variables.iter().flat_map(|v| &v.relocations);
                next.extend(all.filter_map(|(_, target, _)| match target {
                    Relocation::Function(index) => Some(*index),
                    Relocation::Variable(_) => None,
                }));
            }
            for index in next {
                if !seen[index as usize] {
                    seen[index as usize] = true;
                    order.push(index);
                }
            }
            at += 1;
        }
        order
    }
}

/// A kernel of a module.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Name in the text.
    pub name: String,
    /// Parameters, in order.
    pub params: Vec<Parameter>,
    /// Size of the parameter buffer, in bytes.
    pub param_bytes: u32,
    /// `.maxntid`: largest block shape.
    pub max_threads: Option<[u32; 3]>,
    /// `.reqntid`: block shape that the kernel was compiled for.
    pub required_threads: Option<[u32; 3]>,
    /// `.reqnctapercluster`: cluster shape that the kernel was compiled for.
    pub required_cluster: Option<[u32; 3]>,
    /// `.maxnreg`: largest number of registers of a thread.
    pub max_registers: Option<u32>,
    /// Line of the declaration.
    pub line: u32,
    pub(crate) function: u32,
}

/// A kernel parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Name in the text.
    pub name: String,
    /// Byte offset in the parameter buffer.
    pub offset: u32,
    /// Size in bytes.
    pub size: u32,
    /// Alignment in bytes.
    pub align: u32,
}

/// An instruction that could not be decoded.
#[derive(Debug, Clone)]
pub(crate) struct Unknown {
    pub line: u32,
    pub message: String,
}

/// A decoded function or kernel.
#[derive(Debug)]
pub(crate) struct Function {
    pub name: String,
    pub is_entry: bool,
    pub has_body: bool,
    pub line: u32,
    pub code: Vec<Instr>,
    pub value_rows: u32,
    pub pred_rows: u32,
    pub preloads: Vec<(Slot, Preload)>,
    /// Kernel parameters.
    pub params: Vec<Parameter>,
    /// Location of a called function's arguments and results.
    pub formals: Vec<Passed>,
    pub returns: Vec<Passed>,
    pub frame_bytes: u64,
    pub frame_align: u64,
    pub calls: Vec<u32>,
    pub calls_indirectly: bool,
    pub address_taken: Vec<u32>,
    /// Module variables that the function names.
    pub variables: BTreeSet<u32>,
    pub unknown: Vec<Unknown>,
    pub directives: ast::Directives,
}

impl Function {
    pub fn new(name: &str, is_entry: bool, line: u32) -> Self {
        Self {
            name: name.to_owned(),
            is_entry,
            has_body: false,
            line,
            code: Vec::new(),
            value_rows: 0,
            pred_rows: 0,
            preloads: Vec::new(),
            params: Vec::new(),
            formals: Vec::new(),
            returns: Vec::new(),
            frame_bytes: 0,
            frame_align: 8,
            calls: Vec::new(),
            calls_indirectly: false,
            address_taken: Vec::new(),
            variables: BTreeSet::new(),
            unknown: Vec::new(),
            directives: ast::Directives::default(),
        }
    }
}

/// State space of a module variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VariableSpace {
    Global,
    Const,
    Shared,
}

/// A variable of the module, or a static variable of a function.
#[derive(Debug, Clone)]
pub(crate) struct Variable {
    pub name: String,
    pub space: VariableSpace,
    pub size: u64,
    pub align: u64,
    /// True for dynamic shared memory, or a symbol defined elsewhere.
    pub is_extern: bool,
    /// Bytes of the initialiser, from the start of the variable; empty if there is none.
    pub init: Vec<u8>,
    /// 8-byte addresses to write over `init`: offset, symbol, addend.
    pub relocations: Vec<(u64, Relocation, u64)>,
}

/// Symbol whose address an initialiser holds.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Relocation {
    Variable(u32),
    Function(u32),
}
