//! The parsed form of a module: the text's structure, without meaning.
//!
//! Every instruction has the same form (guard, opcode, modifiers, operands, line). [`decode`](crate::decode)
//! determines the meaning of an opcode and the operands that it takes.

/// A module.
#[derive(Debug, Default)]
pub(crate) struct Module<'a> {
    pub version: &'a str,
    pub target: &'a str,
    pub functions: Vec<Function<'a>>,
    pub variables: Vec<Variable<'a>>,
    /// `.alias name, target;`
    pub aliases: Vec<(&'a str, &'a str)>,
}

/// A `.entry` or a `.func`; one without a body is a declaration.
#[derive(Debug)]
pub(crate) struct Function<'a> {
    pub name: &'a str,
    pub is_entry: bool,
    pub returns: Vec<Parameter<'a>>,
    pub params: Vec<Parameter<'a>>,
    pub directives: Directives,
    pub body: Option<Vec<Statement<'a>>>,
    pub line: u32,
}

/// Performance and cluster directives of an entry.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Directives {
    pub max_threads: Option<[u32; 3]>,
    pub required_threads: Option<[u32; 3]>,
    pub required_cluster: Option<[u32; 3]>,
    pub max_registers: Option<u32>,
}

/// A formal parameter. `size` is its size in bytes, including arrays.
#[derive(Debug, Clone)]
pub(crate) struct Parameter<'a> {
    pub name: &'a str,
    pub size: u64,
    pub align: u64,
    /// Type word of an old-style register parameter (`.reg` instead of `.param`).
    pub register: Option<&'a str>,
}

/// A variable declaration in any addressable space.
#[derive(Debug, Clone)]
pub(crate) struct Variable<'a> {
    pub name: &'a str,
    /// `global`, `shared`, `const`, `local` or `param`.
    pub space: &'a str,
    /// Bytes of one element in an initialiser (each part of a vector counts).
    pub element: u64,
    pub size: u64,
    pub align: u64,
    pub is_extern: bool,
    pub init: Vec<Init<'a>>,
    pub line: u32,
}

/// One scalar of an initialiser, at a byte offset.
#[derive(Debug, Clone)]
pub(crate) struct Init<'a> {
    pub offset: u64,
    pub value: InitValue<'a>,
}

/// Value of an initialiser.
#[derive(Debug, Clone, Copy)]
pub(crate) enum InitValue<'a> {
    Bits(u64),
    /// Address of a symbol plus an offset; `generic(sym)` is the same address here.
    Address {
        symbol: &'a str,
        offset: u64,
    },
}

/// A statement of a function body.
#[derive(Debug)]
pub(crate) enum Statement<'a> {
    Registers(RegisterDecl<'a>),
    Variable(Variable<'a>),
    Label(&'a str),
    Instruction(Instruction<'a>),
    Block(Vec<Statement<'a>>),
    /// `name: .branchtargets a, b;` or `.calltargets`.
    Targets {
        name: &'a str,
        list: Vec<&'a str>,
    },
    /// `name: .callprototype (…) _ (…);`. It is ignored: the call itself lists its arguments.
    Prototype(&'a str),
}

/// `.reg .b32 %r<10>;` or `.reg .v2 .f32 %f;`
#[derive(Debug)]
pub(crate) struct RegisterDecl<'a> {
    pub ty: &'a str,
    pub vector: u32,
    pub name: &'a str,
    /// `Some(n)` for `name<n>`, which declares name0 … name(n-1).
    pub count: Option<u64>,
}

/// An instruction.
#[derive(Debug)]
pub(crate) struct Instruction<'a> {
    pub line: u32,
    /// Guard predicate, and true if it is negated.
    pub guard: Option<(&'a str, bool)>,
    pub opcode: &'a str,
    /// Modifiers, separated by dots; `::` stays within one.
    pub modifiers: Vec<&'a str>,
    pub operands: Vec<Operand<'a>>,
}

/// An operand.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Operand<'a> {
    /// Register, special register, symbol, label or `_`.
    Name(&'a str),
    Int(u64),
    F32(u32),
    F64(u64),
    /// `!p`
    Not(Box<Operand<'a>>),
    /// `-r` of a register (`vmad`).
    Negative(Box<Operand<'a>>),
    /// `{a, b, …}`
    Vector(Vec<Operand<'a>>),
    /// `[base + offset]`, with `{c0, …}` coordinates for tensor copies.
    Address {
        base: Box<Operand<'a>>,
        offset: i64,
        coordinates: Option<Vec<Operand<'a>>>,
    },
    /// `symbol + offset` outside brackets.
    Sum(&'a str, i64),
    /// `a | b`
    Pair(Box<Operand<'a>>, Box<Operand<'a>>),
    /// `(a, b)` of a call.
    List(Vec<Operand<'a>>),
}
