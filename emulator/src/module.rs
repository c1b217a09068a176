//! A PTX module, decoded and ready to launch.

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::decode::op::{Instr, Passed};
use crate::decode::types::Slot;
use crate::decode::{self, Symbols};
use crate::error::Error;
use crate::memory::window::{RESERVED_FOR_GROUPS, SHARED_BASE};
use crate::parse::{self, ast};

/// A PTX module: its kernels, functions and variables.
#[derive(Debug)]
pub struct Module {
    file: String,
    lines: Vec<Box<str>>,
    target: String,
    /// Tells the instances of modules apart in a device memory.
    pub(crate) id: u64,
    pub(crate) functions: Vec<Function>,
    pub(crate) variables: Vec<Variable>,
    /// Opcode names with their modifiers, by `Instr::name`.
    pub(crate) names: Vec<String>,
    entries: Vec<Entry>,
}

/// A kernel of a module.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Its name in the text.
    pub name: String,
    /// Its parameters, in order.
    pub params: Vec<Parameter>,
    /// Bytes of the parameter buffer.
    pub param_bytes: u32,
    /// `.maxntid`: most threads a block may have, by dimension.
    pub max_threads: Option<[u32; 3]>,
    /// `.reqntid`: the block shape it was compiled for.
    pub required_threads: Option<[u32; 3]>,
    /// `.reqnctapercluster`: the cluster shape it was compiled for.
    pub required_cluster: Option<[u32; 3]>,
    /// `.maxnreg`: registers a thread may use.
    pub max_registers: Option<u32>,
    /// Line of its declaration.
    pub line: u32,
    pub(crate) function: u32,
}

/// One kernel parameter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameter {
    /// Its name in the text.
    pub name: String,
    /// Byte offset in the parameter buffer.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
    /// Alignment in bytes.
    pub align: u32,
}

/// A value put in a row when a frame is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Preload {
    Bits(u64),
    Special(Special),
    /// Address in local memory of an offset in the frame.
    Frame(u64),
    /// Address of a module variable in its own space, plus an offset.
    Variable(u32, i64),
    FunctionAddress(u32),
}

/// Special registers that do not change while a thread runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Special {
    Tid(u8),
    Ntid(u8),
    Ctaid(u8),
    Nctaid(u8),
    ClusterId(u8),
    NclusterId(u8),
    ClusterCtaid(u8),
    ClusterNctaid(u8),
    ClusterCtarank,
    ClusterNctarank,
    IsExplicitCluster,
    LaneId,
    WarpId,
    NwarpId,
    SmId,
    NsmId,
    GridId,
    LanemaskEq,
    LanemaskLe,
    LanemaskLt,
    LanemaskGe,
    LanemaskGt,
    TotalSmem,
    DynamicSmem,
    /// An offset into the shared memory that is kept for the system, and for cooperative groups.
    ReservedSmem(u16),
    /// Upper (1) or lower (2) half of the address of the workspace in which a grid synchronises.
    GridWorkspace(u8),
    Zero,
}

impl Special {
    /// The register named, `%` included.
    pub fn parse(name: &str) -> Option<Special> {
        let name = name.strip_prefix('%')?;
        if let Some((base, axis)) = name.rsplit_once('.') {
            let axis = match axis {
                "x" => 0,
                "y" => 1,
                "z" => 2,
                _ => return None,
            };
            return Some(match base {
                "tid" => Special::Tid(axis),
                "ntid" => Special::Ntid(axis),
                "ctaid" => Special::Ctaid(axis),
                "nctaid" => Special::Nctaid(axis),
                "clusterid" => Special::ClusterId(axis),
                "nclusterid" => Special::NclusterId(axis),
                "cluster_ctaid" => Special::ClusterCtaid(axis),
                "cluster_nctaid" => Special::ClusterNctaid(axis),
                _ => return None,
            });
        }
        Some(match name {
            "cluster_ctarank" => Special::ClusterCtarank,
            "cluster_nctarank" => Special::ClusterNctarank,
            "is_explicit_cluster" => Special::IsExplicitCluster,
            "laneid" => Special::LaneId,
            "warpid" => Special::WarpId,
            "nwarpid" => Special::NwarpId,
            "smid" => Special::SmId,
            "nsmid" => Special::NsmId,
            "gridid" => Special::GridId,
            "lanemask_eq" => Special::LanemaskEq,
            "lanemask_le" => Special::LanemaskLe,
            "lanemask_lt" => Special::LanemaskLt,
            "lanemask_ge" => Special::LanemaskGe,
            "lanemask_gt" => Special::LanemaskGt,
            "total_smem_size" | "aggr_smem_size" => Special::TotalSmem,
            "dynamic_smem_size" => Special::DynamicSmem,
            "reserved_smem_offset_begin" | "reserved_smem_offset_0" => Special::ReservedSmem(0),
            "reserved_smem_offset_1" => Special::ReservedSmem(RESERVED_FOR_GROUPS as u16),
            "reserved_smem_offset_end" | "reserved_smem_offset_cap" => Special::ReservedSmem(SHARED_BASE as u16),
            "envreg1" => Special::GridWorkspace(1),
            "envreg2" => Special::GridWorkspace(2),
            "current_graph_exec" => Special::Zero,
            _ => return None,
        })
    }
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
    /// Where a called function finds its arguments and leaves its results.
    pub formals: Vec<Passed>,
    pub returns: Vec<Passed>,
    pub frame_bytes: u64,
    pub frame_align: u64,
    pub calls: Vec<u32>,
    pub calls_indirectly: bool,
    pub address_taken: Vec<u32>,
    /// Module variables it names.
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

/// Where a module variable lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VariableSpace {
    Global,
    Const,
    Shared,
}

/// A variable of the module, or a static one of a function.
#[derive(Debug, Clone)]
pub(crate) struct Variable {
    pub name: String,
    pub space: VariableSpace,
    pub size: u64,
    pub align: u64,
    /// Dynamic shared memory, or a symbol defined elsewhere.
    pub is_extern: bool,
    /// Bytes of the initialiser, from the start; empty if there is none.
    pub init: Vec<u8>,
    /// 8-byte addresses to write over `init`: offset, symbol, addend.
    pub relocations: Vec<(u64, Relocation, u64)>,
}

/// The symbol whose address an initialiser holds.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Relocation {
    Variable(u32),
    Function(u32),
}

impl Module {
    /// Reads PTX. `file` is the name used in messages.
    ///
    /// # Errors
    ///
    /// [`Error::Syntax`] names the line that is not PTX. Instructions that are PTX but not known here
    /// are reported by [`launch`](Self::launch), and only for entries that can reach them.
    pub fn parse(text: &str, file: &str) -> Result<Module, Error> {
        let lines: Vec<Box<str>> = text.lines().map(Into::into).collect();
        let syntax = |line: u32, message: String| Error::Syntax {
            file: file.to_owned(),
            line,
            message,
            text: line_of(&lines, line),
        };
        let parsed = parse::module(text).map_err(|e| syntax(e.line, e.message))?;
        if parsed.version.is_empty() || parsed.target.is_empty() {
            return Err(syntax(1, "`.version` or `.target` is missing".into()));
        }
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let mut symbols = symbols(&parsed);
        let first_static = parsed.variables.len() as u32;
        let mut statics = Vec::new();
        let mut functions = Vec::new();
        for function in &parsed.functions {
            // A declaration gives way to the definition of the same name.
            if symbols.functions.get(function.name) != Some(&(functions.len() as u32)) {
                functions.push(Function::new(function.name, false, function.line));
                continue;
            }
            let decoded = decode::function(function, &mut symbols, &mut statics, first_static);
            functions.push(decoded);
        }
        let mut variables = Vec::new();
        for variable in parsed.variables.iter().chain(&statics) {
            let made = self::variable(variable, &symbols).map_err(|message| syntax(variable.line, message))?;
            variables.push(made);
        }
        let entries = functions.iter().enumerate();
        let entries = entries.filter(|(_, f)| f.is_entry && f.has_body);
        let entries = entries.map(|(index, f)| entry(index, f)).collect();
        Ok(Module {
            file: file.to_owned(),
            target: parsed.target.to_owned(),
            lines,
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            functions,
            variables,
            names: symbols.names,
            entries,
        })
    }

    /// The kernel of that name.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.iter().find(|e| e.name == name)
    }

    /// All kernels, in the order of the text.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The `.target` of the module, such as `sm_90a`.
    pub fn target(&self) -> &str {
        &self.target
    }

    /// The name given to [`parse`](Self::parse).
    pub fn file(&self) -> &str {
        &self.file
    }

    /// The text of a one-based line, trimmed; empty if there is none.
    pub fn line(&self, line: u32) -> String {
        line_of(&self.lines, line)
    }

    /// Functions that can run once `entry` is launched, itself first.
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
                // Anything whose address some initialiser holds may be the target.
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

fn line_of(lines: &[Box<str>], line: u32) -> String {
    let text = lines.get((line as usize).wrapping_sub(1));
    let text = text.map_or("", |t| t.trim());
    // One line of generated PTX can be a megabyte.
    text.chars().take(200).collect()
}

fn symbols(parsed: &ast::Module<'_>) -> Symbols {
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

fn variable(parsed: &ast::Variable<'_>, symbols: &Symbols) -> Result<Variable, String> {
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

fn entry(index: usize, function: &Function) -> Entry {
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
