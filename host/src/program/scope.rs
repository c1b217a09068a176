//! Instructions that stand in place of one marker, and the registers that they use.

use std::collections::HashMap;

use super::text::Memory;
use super::{NodeId, Type};

/// The kinds of registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Class {
    B16,
    B32,
    B64,
    Predicate,
}

impl Class {
    const ALL: [Self; 4] = [Self::B16, Self::B32, Self::B64, Self::Predicate];

    pub fn of(type_: Type) -> Self {
        if type_ == Type::Truth {
            Self::Predicate
        } else {
            Self::B32
        }
    }

    /// Returns the type as PTX spells it, and the prefix of the names of a scope's registers of that type.
    pub fn spelled(self) -> (&'static str, &'static str) {
        match self {
            Self::B16 => ("b16", "%score_s"),
            Self::B32 => ("b32", "%score_t"),
            Self::B64 => ("b64", "%score_w"),
            Self::Predicate => ("pred", "%score_p"),
        }
    }
}

/// Code in place of a marker.
#[derive(Debug, Default)]
pub(super) struct Scope {
    /// Instructions, each with the node that it computes, if any.
    pub lines: Vec<(String, Option<NodeId>)>,
    registers: [usize; 4],
    pub values: HashMap<(NodeId, Place), String>,
    pub addresses: HashMap<(NodeId, Memory, Place), String>,
    pub slots: HashMap<usize, String>,
    /// Node that the next instructions compute.
    pub node: Option<NodeId>,
}

impl Scope {
    /// Returns the declarations of its registers, one for each class that it uses.
    pub fn declarations(&self) -> Vec<String> {
        let used = Class::ALL.iter().zip(self.registers).filter(|&(_, count)| count > 0);
        used.map(|(class, count)| {
            let (type_, name) = class.spelled();
            format!("\t.reg .{type_} {name}<{count}>;")
        })
        .collect()
    }

    pub fn register(&mut self, class: Class) -> String {
        let count = &mut self.registers[class as usize];
        *count += 1;
        format!("{}{}", class.spelled().1, *count - 1)
    }

    pub fn put(&mut self, instruction: String) {
        self.lines.push((format!("\t{instruction}"), self.node));
    }

    /// Adds an instruction, and returns the new register that holds its result.
    pub fn result(&mut self, class: Class, operation: &str, operands: &[&str]) -> String {
        let register = self.register(class);
        self.put(format!("{operation} {register}, {};", operands.join(", ")));
        register
    }
}

/// The pair, row or column for which a value was computed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Place {
    All,
    Row(u32),
    Column(u32),
    Pair(u32, u32),
}
