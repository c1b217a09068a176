//! Findings of a cluster, with the place and the text of their instructions.

use super::Checks;
use super::clock::Agent;
use super::event::{Actor, ENGINES, Engine, Site};
use super::guess::{Guesses, Location};
use super::watch::Setting;
use crate::isa::{Instr, Memory, Op};
use crate::program::Program;
use crate::report::{Finding, FindingKind, Findings};

/// Findings of a cluster.
pub(crate) struct Reports<'m> {
    program: &'m Program,
    checks: Checks,
    /// Coordinates of the cluster's blocks.
    blocks: Vec<[u32; 3]>,
    warps_per_block: usize,
    pub findings: Findings,
    /// Reads that are races unless they prove to be guesses.
    pub guesses: Guesses,
}

/// A read that races with an update: its instruction, the reading agent or block, and the memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct RacingRead {
    pub site: Site,
    pub reader: u32,
    pub location: Location,
}

impl<'m> Reports<'m> {
    pub(super) fn new(setting: Setting<'m>) -> Self {
        Self {
            program: setting.program,
            checks: setting.checks,
            blocks: setting.blocks,
            warps_per_block: setting.warps_per_block,
            findings: Findings::new(setting.max_findings),
            guesses: Guesses::default(),
        }
    }

    /// Adds a finding made by `actor` at `line`; returns false if the check for such findings is off.
    pub fn report(
        &mut self,
        kind: FindingKind,
        line: u32,
        actor: Actor,
        at: (Option<usize>, Option<u64>),
        message: impl FnOnce() -> String,
    ) -> bool {
        if !self.checks.covers(kind) {
            return false;
        }
        let Self { program, blocks, .. } = self;
        let make = || finding(program, blocks, kind, line, actor, at, message());
        self.findings.add(kind, line, make);
        true
    }

    /// Reports a race of a read with an update. It becomes a finding unless the read proves to be the first guess of a
    /// compare-and-swap loop.
    pub(super) fn report_guess(
        &mut self,
        kind: FindingKind,
        line: u32,
        actor: Actor,
        at: (Option<usize>, Option<u64>),
        read: RacingRead,
        message: impl FnOnce() -> String,
    ) {
        let RacingRead { site, reader, location } = read;
        let op = self.instr(site).map(|instr| &instr.op);
        if matches!(op, Some(Op::Memory(Memory::Load { guess: true, .. }))) {
            return;
        }
        let found = finding(self.program, &self.blocks, kind, line, actor, at, message());
        if let Some(found) = self.guesses.add(site, reader, location, found) {
            self.findings.add(kind, line, || found);
        }
    }

    fn instr(&self, site: Site) -> Option<&'m Instr> {
        let function = self.program.functions.get(site.function as usize);
        function.and_then(|f| f.code.get(site.pc as usize))
    }

    /// Returns the line of an instruction.
    pub fn line_at(&self, site: Site) -> u32 {
        self.instr(site).map_or(0, |instr| instr.line)
    }

    /// Returns the coordinates of a block of the cluster as text.
    pub fn block_name(&self, cta: usize) -> String {
        let [x, y, z] = self.blocks[cta];
        format!("{x},{y},{z}")
    }

    /// Describes an agent of the race detector.
    pub(super) fn agent_name(&self, agent: Agent) -> String {
        let id = agent as usize / ENGINES;
        let warp = id % self.warps_per_block;
        let block = self.block_name((id / self.warps_per_block).min(self.blocks.len() - 1));
        let what = match Engine::of(agent) {
            Engine::Warp => "",
            Engine::CpAsync => "an asynchronous copy (cp.async) of ",
            Engine::Bulk => "a bulk copy of ",
            Engine::Wgmma => "a wgmma of ",
        };
        if self.blocks.len() > 1 {
            format!("{what}warp {warp} of block {block}")
        } else {
            format!("{what}warp {warp}")
        }
    }
}

fn finding(
    program: &Program,
    blocks: &[[u32; 3]],
    kind: FindingKind,
    line: u32,
    actor: Actor,
    at: (Option<usize>, Option<u64>),
    message: String,
) -> Finding {
    Finding {
        kind,
        file: program.source.file.clone(),
        line,
        text: program.source.line(line),
        block: blocks[actor.cta],
        warp: actor.warp,
        lane: at.0.map(|lane| lane as u32),
        address: at.1,
        message,
    }
}
