//! Names: the declarations of a block of a function body, and the location of parameters and variables.

use std::collections::HashMap;

use super::{Decoder, Failure, fail};
use crate::isa::Passed;
use crate::isa::Preload;
use crate::isa::types::{Slot, Ty};
use crate::parse::ast;
use crate::program::Parameter;

/// Meaning of a name.
#[derive(Debug, Clone)]
pub(super) enum Entity<'a> {
    Register(Register),
    /// Bytes of the function's frame, in local memory.
    Frame {
        offset: u32,
        size: u32,
    },
    /// Bytes of the kernel's parameters.
    KernelParam {
        offset: u32,
    },
    /// Index into the module's variables.
    Variable(u32),
    Label(u32),
    Targets(Vec<&'a str>),
    Prototype,
}

/// A declared register; its rows are consecutive.
#[derive(Debug, Clone, Copy)]
pub(super) struct Register {
    pub slot: Slot,
    pub bits: u32,
    /// Number of elements of a vector register.
    pub vector: u32,
    pub is_pred: bool,
}

/// Names of one block.
#[derive(Default)]
pub(super) struct Scope<'a> {
    pub names: HashMap<&'a str, Entity<'a>>,
    /// `%r<100>`: prefix to type and count. A register gets its rows at its first use.
    pub ranges: HashMap<&'a str, (Ty, u32, u64)>,
}

fn align_up(offset: u64, align: u64) -> u64 {
    offset.next_multiple_of(align.max(1))
}

impl<'a> Decoder<'_, 'a> {
    fn declare(&mut self, name: &'a str, entity: Entity<'a>) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.names.insert(name, entity);
        }
    }

    pub(super) fn lookup(&self, name: &str) -> Option<&Entity<'a>> {
        self.scopes.iter().rev().find_map(|s| s.names.get(name))
    }

    pub(super) fn declare_registers(&mut self, decl: &ast::RegisterDecl<'a>) {
        let Some(ty) = Ty::parse(decl.ty.trim_start_matches('.')) else {
            self.unknown(format!("register type `{}` is not known", decl.ty));
            return;
        };
        if let Some(count) = decl.count {
            if let Some(scope) = self.scopes.last_mut() {
                scope.ranges.insert(decl.name, (ty, decl.vector, count));
            }
            return;
        }
        let register = self.new_register(ty, decl.vector);
        self.declare(decl.name, Entity::Register(register));
    }

    fn new_register(&mut self, ty: Ty, vector: u32) -> Register {
        let slot = if ty == Ty::Pred {
            let slot = self.out.pred_rows;
            self.out.pred_rows += vector;
            slot
        } else {
            self.value_row(vector * ty.bits().div_ceil(64))
        };
        Register {
            slot,
            bits: ty.bits(),
            vector,
            is_pred: ty == Ty::Pred,
        }
    }

    /// Returns the register `name`. The first use of a member of a range gives it its rows.
    pub(super) fn register(&mut self, name: &'a str) -> Option<Register> {
        let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
        for at in (0..self.scopes.len()).rev() {
            if let Some(entity) = self.scopes[at].names.get(name) {
                let Entity::Register(register) = entity else {
                    return None;
                };
                return Some(*register);
            }
            // The digits may belong partly to the prefix (`%r1<5>` declares %r10 … %r14).
            for split in name.len() - digits..name.len() {
                let (prefix, index) = name.split_at(split);
                let Some((ty, vector, count)) = self.scopes[at].ranges.get(prefix).copied() else {
                    continue;
                };
                let in_range = index.parse::<u64>().is_ok_and(|i| i < count);
                if in_range {
                    let register = self.new_register(ty, vector);
                    self.scopes[at].names.insert(name, Entity::Register(register));
                    return Some(register);
                }
            }
        }
        None
    }

    pub(super) fn frame_bytes(&mut self, size: u64, align: u64) -> u32 {
        // The size of a frame is checked where frames are made; a size that does not fit is refused there.
        let offset = align_up(self.out.frame_bytes, align.max(8));
        self.out.frame_bytes = offset.saturating_add(size);
        self.out.frame_align = self.out.frame_align.max(align);
        u32::try_from(offset).unwrap_or(u32::MAX)
    }

    pub(super) fn declare_variable(&mut self, variable: &ast::Variable<'a>) {
        match variable.space {
            "local" | "param" => {
                if !variable.init.is_empty() {
                    self.unknown("initialised local variables are not supported".into());
                }
                let offset = self.frame_bytes(variable.size, variable.align);
                let size = u32::try_from(variable.size).unwrap_or(u32::MAX);
                self.declare(variable.name, Entity::Frame { offset, size });
            }
            _ if variable.is_extern && self.symbols.variables.contains_key(variable.name) => {}
            _ => {
                let index = self.next_variable + self.statics.len() as u32;
                self.statics.push(variable.clone());
                self.declare(variable.name, Entity::Variable(index));
            }
        }
    }

    /// Places formal parameters: those of a kernel in the parameter buffer, those of a function in its frame.
    pub(super) fn formals(&mut self, parsed: &ast::Function<'a>) {
        let mut at = 0;
        for parameter in &parsed.params {
            if parsed.is_entry {
                at = align_up(at, parameter.align);
                let offset = u32::try_from(at).unwrap_or(u32::MAX);
                let size = u32::try_from(parameter.size).unwrap_or(u32::MAX);
                self.declare(parameter.name, Entity::KernelParam { offset });
                self.out.params.push(Parameter {
                    name: parameter.name.to_owned(),
                    offset,
                    size,
                    align: parameter.align as u32,
                });
                at = at.saturating_add(parameter.size);
            } else {
                let passed = self.formal(parameter);
                self.out.formals.push(passed);
            }
        }
        for parameter in &parsed.returns {
            let passed = self.formal(parameter);
            self.out.returns.push(passed);
        }
    }

    fn formal(&mut self, parameter: &ast::Parameter<'a>) -> Passed {
        let size = u32::try_from(parameter.size).unwrap_or(u32::MAX);
        if let Some(ty) = parameter.register {
            let ty = Ty::parse(ty.trim_start_matches('.')).unwrap_or(Ty::B32);
            let register = self.new_register(ty, 1);
            self.declare(parameter.name, Entity::Register(register));
            return Passed::Register { slot: register.slot };
        }
        let offset = self.frame_bytes(parameter.size, parameter.align);
        self.declare(parameter.name, Entity::Frame { offset, size });
        Passed::Bytes { offset, size }
    }

    /// Returns the row that holds the address of a symbol.
    pub(super) fn symbol_address(&mut self, name: &str, offset: i64) -> Result<Slot, Failure> {
        let preload = match self.lookup(name) {
            Some(Entity::Frame { offset: at, .. }) => Preload::Frame((i64::from(*at) + offset) as u64),
            Some(Entity::KernelParam { offset: at }) => Preload::Bits((i64::from(*at) + offset) as u64),
            Some(Entity::Variable(index)) => Preload::Variable(*index, offset),
            Some(_) => return fail(format!("`{name}` is not an address")),
            None => match self.symbols.variables.get(name) {
                Some(index) => Preload::Variable(*index, offset),
                None => match self.symbols.functions.get(name) {
                    Some(index) => {
                        let index = *index;
                        self.out.address_taken.push(index);
                        Preload::FunctionAddress(index)
                    }
                    None => return fail(format!("`{name}` is not declared")),
                },
            },
        };
        if let Preload::Variable(index, _) = preload {
            self.out.variables.insert(index);
        }
        Ok(self.preload(preload))
    }
}
