//! Declarations of the module: the names its functions see, its variables, its kernels.

use std::collections::HashMap;

use super::Symbols;
use crate::parse::ast;
use crate::program::{Entry, Function, Relocation, Variable, VariableSpace};

pub(super) fn symbols(parsed: &ast::Module<'_>) -> Symbols {
    let mut symbols = Symbols::default();
    for (index, variable) in parsed.variables.iter().enumerate() {
        symbols.variables.insert(variable.name.to_owned(), index as u32);
    }
    for (index, function) in parsed.functions.iter().enumerate() {
        let name = function.name.to_owned();
        if function.body.is_some() || !symbols.functions.contains_key(&name) {
            symbols.functions.insert(name, index as u32);
        }
    }
    let mut aliases = HashMap::new();
    for (name, target) in &parsed.aliases {
        if let Some(index) = symbols.functions.get(*target) {
            aliases.insert((*name).to_owned(), *index);
        }
    }
    symbols.functions.extend(aliases);
    symbols
}

pub(super) fn variable(parsed: &ast::Variable<'_>, symbols: &Symbols) -> Result<Variable, String> {
    let space = match parsed.space {
        "global" => VariableSpace::Global,
        "const" => VariableSpace::Const,
        "shared" => VariableSpace::Shared,
        other => return Err(format!("a variable in `{other}` does not belong here")),
    };
    let mut init = Vec::new();
    let mut relocations = Vec::new();
    for value in &parsed.init {
        let at = value.offset as usize;
        let width = parsed.element as usize;
        if init.len() < at + width {
            init.resize(at + width, 0);
        }
        match value.value {
            ast::InitValue::Bits(bits) => {
                let bytes = u128::from(bits).to_le_bytes();
                init[at..at + width].copy_from_slice(&bytes[..width]);
            }
            ast::InitValue::Address { symbol, offset } => {
                if width != 8 {
                    return Err(format!("the address of `{symbol}` needs 8 bytes"));
                }
                let target = match symbols.variables.get(symbol) {
                    Some(index) => Relocation::Variable(*index),
                    None => match symbols.functions.get(symbol) {
                        Some(index) => Relocation::Function(*index),
                        None => return Err(format!("`{symbol}` is not declared")),
                    },
                };
                relocations.push((value.offset, target, offset));
            }
        }
    }
    Ok(Variable {
        name: parsed.name.to_owned(),
        space,
        size: parsed.size,
        align: parsed.align,
        is_extern: parsed.is_extern,
        init,
        relocations,
    })
}

pub(super) fn entry(index: usize, function: &Function) -> Entry {
    let end = function.params.last().map_or(0, |p| p.offset.saturating_add(p.size));
    Entry {
        name: function.name.clone(),
        params: function.params.clone(),
        param_bytes: end,
        max_threads: function.directives.max_threads,
        required_threads: function.directives.required_threads,
        required_cluster: function.directives.required_cluster,
        max_registers: function.directives.max_registers,
        line: function.line,
        function: index as u32,
    }
}
