//! Launch of an entry: validates the launch, lays out shared memory, and runs the blocks on the host's cores.

mod blocks;

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;

use crate::check::global_race::{self, GlobalShadow};
use crate::error::Error;
use crate::exec::Context;
use crate::isa::{AtomicTy, Memory, Op, Preload, Special, WgmmaOp, window};
use crate::memory::{DeviceMemory, DevicePtr};
use crate::program::{Entry, Program, Relocation, VariableSpace};
use crate::report::Report;
use crate::request::{Launch, Options};

/// Runs a kernel to its end; `id` names the module in `memory`. See [`Module::launch`](crate::Module::launch).
pub(crate) fn run(
    program: &Program,
    id: u64,
    memory: &DeviceMemory,
    launch: &Launch<'_>,
    options: &Options,
    ended: &(dyn Fn(u64) + Sync),
) -> Result<Report, Error> {
    let Some(entry) = program.entry(launch.entry) else {
        let names: Vec<&str> = program.entries.iter().map(|e| e.name.as_str()).collect();
        return Err(Error::NoEntry {
            name: launch.entry.to_owned(),
            file: program.source.file.clone(),
            available: if names.is_empty() {
                "none".into()
            } else {
                names.join(", ")
            },
        });
    };
    let reachable = program.reachable(entry.function);
    program.refuse_unknown(&reachable)?;
    validate(entry, launch)?;
    let addresses = memory.module_variables(id, || program.place_variables(memory))?;
    let (variables, shared_end) = program.shared_layout(&reachable, &addresses, launch.shared_bytes);
    let used = shared_end - window::SHARED_BASE;
    let most = options
        .max_shared_bytes
        .unwrap_or_else(|| shared_limit(&program.target));
    if used > u64::from(most) {
        return Err(refused(
            launch,
            "shared memory",
            format!("{used} bytes"),
            format!("a block of {} has at most {most}", program.target),
        ));
    }
    let traits = program.traits(&reachable);
    let workspace = traits.grid_workspace.then(|| grid_workspace(memory)).transpose()?;
    let view = memory.snapshot();
    let blocks: u64 = launch.grid.iter().map(|n| u64::from(*n)).product();
    let watch = options.checks.global_races && blocks > 1 && blocks <= global_race::MAX_BLOCKS;
    let shadow = watch.then(|| GlobalShadow::new(view.allocations.iter().map(|a| a.len())));
    let context = Context {
        program,
        launch,
        entry: entry.function,
        checks: options.checks,
        max_findings: options.max_findings,
        seed: options.seed,
        view,
        shadow,
        variables,
        workspace: workspace.map_or(0, |ptr| ptr.0),
        shared_start: if traits.reserved_shared {
            window::RESERVED_FOR_GROUPS
        } else {
            window::SHARED_BASE
        },
        shared_end,
        registers: registers_per_thread(entry),
        limit: options.max_instructions,
        executed: AtomicU64::new(0),
        uses_wgmma: traits.wgmma,
    };
    let size: u64 = launch.cluster.iter().map(|n| u64::from(*n)).product();
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let threads = if traits.ordered {
        1
    } else {
        options.threads.unwrap_or(cores).max(1)
    };
    let outcome = blocks::run_clusters(&context, blocks / size, threads, traits.ordered, &|| ended(size));
    if let Some(ptr) = workspace {
        memory.free(ptr)?;
    }
    outcome
}

impl Program {
    fn refuse_unknown(&self, reachable: &[u32]) -> Result<(), Error> {
        let first = reachable
            .iter()
            .find_map(|f| self.functions[*f as usize].unknown.first());
        match first {
            None => Ok(()),
            Some(unknown) => Err(Error::UnknownInstruction {
                file: self.source.file.clone(),
                line: unknown.line,
                message: unknown.message.clone(),
                text: self.source.line(unknown.line),
            }),
        }
    }

    /// Allocates and initialises the module's global and constant variables.
    fn place_variables(&self, memory: &DeviceMemory) -> Result<Vec<u64>, Error> {
        let mut addresses = vec![0; self.variables.len()];
        for (address, variable) in addresses.iter_mut().zip(&self.variables) {
            if variable.space == VariableSpace::Shared || variable.is_extern {
                continue;
            }
            let size = variable.size as usize;
            let ptr = memory.alloc_named(size, Some(variable.name.clone()))?;
            *address = ptr.0;
            // Variables without an initialiser start at zero.
            let mut bytes = variable.init.clone();
            bytes.resize(size, 0);
            memory.write(ptr, &bytes)?;
        }
        for (address, variable) in addresses.iter().zip(&self.variables) {
            for (offset, symbol, addend) in &variable.relocations {
                let target = match symbol {
                    Relocation::Variable(index) => addresses[*index as usize],
                    Relocation::Function(index) => crate::exec::function_address(*index),
                };
                let value = target.wrapping_add(*addend).to_le_bytes();
                memory.write(crate::memory::DevicePtr(address + offset), &value)?;
            }
        }
        Ok(addresses)
    }

    /// Adds the addresses of shared variables to `addresses`; also returns the end of the block's shared memory.
    fn shared_layout(&self, reachable: &[u32], addresses: &[u64], dynamic: u32) -> (Vec<u64>, u64) {
        let named = reachable.iter().flat_map(|f| &self.functions[*f as usize].variables);
        let named: BTreeSet<u32> = named.copied().collect();
        let mut out = addresses.to_vec();
        let mut at = window::SHARED_BASE;
        let shared = |index: &&u32| self.variables[**index as usize].space == VariableSpace::Shared;
        let mut dynamic_align = 16;
        for index in named.iter().filter(shared) {
            let variable = &self.variables[*index as usize];
            if variable.is_extern {
                dynamic_align = dynamic_align.max(variable.align);
                continue;
            }
            at = at.next_multiple_of(variable.align.max(1));
            out[*index as usize] = at;
            at += variable.size;
        }
        if dynamic > 0
            || named
                .iter()
                .filter(shared)
                .any(|i| self.variables[*i as usize].is_extern)
        {
            at = at.next_multiple_of(dynamic_align);
        }
        for index in named.iter().filter(shared) {
            if self.variables[*index as usize].is_extern {
                out[*index as usize] = at;
            }
        }
        (out, at + u64::from(dynamic))
    }

    fn traits(&self, reachable: &[u32]) -> Traits {
        let mut traits = Traits::default();
        for function in reachable {
            let reserved = |(_, p): &(_, Preload)| matches!(p, Preload::Special(Special::ReservedSmem(_)));
            traits.reserved_shared |= self.functions[*function as usize].preloads.iter().any(reserved);
            let workspace = |(_, p): &(_, Preload)| matches!(p, Preload::Special(Special::GridWorkspace(_)));
            traits.grid_workspace |= self.functions[*function as usize].preloads.iter().any(workspace);
            for instr in &self.functions[*function as usize].code {
                match &instr.op {
                    Op::Wgmma(WgmmaOp::Mma(_)) => traits.wgmma = true,
                    Op::Memory(Memory::Atomic { dsts, ty, addr, .. }) => {
                        let global = crate::exec::may_be_global(addr.space);
                        let order_matters = dsts.is_some() || !matches!(ty, AtomicTy::Int(_));
                        traits.ordered |= global && order_matters;
                    }
                    Op::Memory(Memory::Load { addr, order, .. } | Memory::Store { addr, order, .. }) => {
                        let global = crate::exec::may_be_global(addr.space);
                        traits.ordered |= global && order.is_strong();
                    }
                    Op::Async(op) => traits.ordered |= op.reduces_floats(),
                    _ => {}
                }
            }
        }
        traits
    }
}

/// Properties of a kernel that determine how it is run.
#[derive(Default)]
struct Traits {
    wgmma: bool,
    /// True if the order of blocks may change results (sums of floats, tickets, flags): they then run one after
    /// another.
    ordered: bool,
    /// True if the kernel uses the shared memory that is reserved for cooperative groups.
    reserved_shared: bool,
    /// True if the kernel synchronises the grid through the workspace that a driver provides.
    grid_workspace: bool,
}

/// Allocates the workspace that a driver gives the grid of a cooperative launch: its size, and a barrier.
fn grid_workspace(memory: &DeviceMemory) -> Result<DevicePtr, Error> {
    const BYTES: u32 = 16;
    let ptr = memory.alloc_named(BYTES as usize, Some("the grid's workspace".into()))?;
    let mut bytes = [0; BYTES as usize];
    bytes[..4].copy_from_slice(&BYTES.to_le_bytes());
    memory.write(ptr, &bytes)?;
    Ok(ptr)
}

fn refused(launch: &Launch<'_>, argument: &'static str, value: String, limit: String) -> Error {
    Error::Launch {
        entry: launch.entry.to_owned(),
        argument,
        value,
        limit,
    }
}

fn validate(entry: &Entry, launch: &Launch<'_>) -> Result<(), Error> {
    let show = |v: [u32; 3]| format!("{},{},{}", v[0], v[1], v[2]);
    let threads: u64 = launch.block.iter().map(|n| u64::from(*n)).product();
    if threads == 0 || threads > 1024 || launch.block[2] > 64 {
        let limit = "a block has 1 to 1024 threads, at most 64 in z".into();
        return Err(refused(launch, "block", show(launch.block), limit));
    }
    if launch.grid.contains(&0) || launch.grid[0] > i32::MAX as u32 || launch.grid[1..].iter().any(|n| *n > 65535) {
        let limit = "a grid has 1 to 2147483647 blocks in x and 1 to 65535 in y and z".into();
        return Err(refused(launch, "grid", show(launch.grid), limit));
    }
    let blocks: u64 = launch.grid.iter().map(|n| u64::from(*n)).product();
    if blocks > u64::from(u32::MAX) {
        let limit = "the emulator numbers blocks in 32 bits".into();
        return Err(refused(launch, "grid", show(launch.grid), limit));
    }
    let cluster: u64 = launch.cluster.iter().map(|n| u64::from(*n)).product();
    let divides = launch
        .grid
        .iter()
        .zip(launch.cluster)
        .all(|(g, c)| c != 0 && g % c == 0);
    if cluster == 0 || cluster > 16 || !divides {
        let limit = "a cluster has 1 to 16 blocks and divides the grid".into();
        return Err(refused(launch, "cluster", show(launch.cluster), limit));
    }
    if let Some(max) = entry.max_threads {
        let most: u64 = max.iter().map(|n| u64::from(*n)).product();
        if threads > most {
            let limit = format!("`.maxntid` allows {most} threads");
            return Err(refused(launch, "block", show(launch.block), limit));
        }
    }
    if let Some(required) = entry.required_threads
        && required != launch.block
    {
        let limit = format!("`.reqntid` demands {}", show(required));
        return Err(refused(launch, "block", show(launch.block), limit));
    }
    if let Some(required) = entry.required_cluster
        && required != launch.cluster
    {
        let limit = format!("`.reqnctapercluster` demands {}", show(required));
        return Err(refused(launch, "cluster", show(launch.cluster), limit));
    }
    if launch.params.len() != entry.param_bytes as usize {
        let limit = format!("the kernel's parameters are {} bytes", entry.param_bytes);
        return Err(refused(
            launch,
            "params",
            format!("{} bytes", launch.params.len()),
            limit,
        ));
    }
    Ok(())
}

/// Returns the largest shared memory of a block on a target, in bytes (CUDA programming guide, "Compute
/// Capabilities").
fn shared_limit(target: &str) -> u32 {
    let digits: String = target.chars().filter(char::is_ascii_digit).collect();
    match digits.parse().unwrap_or(0) {
        0..=69 => 48 << 10,
        70..=72 => 96 << 10,
        75 => 64 << 10,
        86 | 89 | 120..=129 => 99 << 10,
        80..=88 => 163 << 10,
        _ => 227 << 10,
    }
}

/// Returns the registers with which a thread starts, if the entry's directives determine it (a multiprocessor has
/// 65,536).
fn registers_per_thread(entry: &Entry) -> Option<u32> {
    let threads = entry.required_threads.or(entry.max_threads);
    let by_threads = threads.map(|t| {
        let threads: u32 = t.iter().product::<u32>().clamp(1, 1024).next_multiple_of(32);
        (65536 / threads / 8 * 8).min(255)
    });
    match (entry.max_registers, by_threads) {
        (Some(max), _) => Some(max),
        (None, by_threads) => by_threads,
    }
}
