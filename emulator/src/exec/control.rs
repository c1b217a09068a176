//! Branches, calls, returns and exits of threads.

use super::warp::{Frame, Group, Lanes, Wait, Warp, lanes};
use super::{Cluster, Flow, Step};
use crate::check::definedness::Row;
use crate::error::Error;
use crate::isa::types::{PRED_TRUE, Slot};
use crate::isa::{CallTarget, Control, Instr, Passed};
use crate::isa::{Preload, Special};
use crate::memory::local;
use crate::memory::origin::{Origin, bits_of_bytes, bytes_of_bits};

/// First function address, far from all memory; each function index adds one step.
pub(crate) const FUNCTION_BASE: u64 = 0x5_0000_0000;
const FUNCTION_STEP: u64 = 16;

/// Deepest nesting of calls.
const MAX_DEPTH: u32 = 256;

impl<'m> Cluster<'m> {
    pub(super) fn control(&mut self, warp: &mut Warp, instr: &Instr, op: &Control, mask: u32) -> Step {
        match op {
            Control::Bra { target } => {
                let group = warp.group();
                if mask == group.mask {
                    group.pc = *target;
                } else {
                    group.pc += 1;
                    warp.split(mask, *target);
                }
                Ok(Flow::Moved)
            }
            Control::Brx { index, targets } => self.branch_indexed(warp, instr, mask, *index, targets),
            Control::Call { .. } => self.call(warp, instr, op, mask),
            Control::Ret => {
                self.ret(warp, mask);
                Ok(Flow::Moved)
            }
            Control::Exit => {
                self.exit(warp, mask);
                Ok(Flow::Moved)
            }
            Control::Trap => Err(Error::Trap {
                file: self.ctx.program.source.file.clone(),
                line: instr.line,
                block: self.block_name(warp.cta),
                warp: warp.index,
                lanes: mask,
            }),
            Control::Nanosleep => {
                let until = self.tick + 1 + self.rng.below(64);
                let group = warp.group();
                group.pc += 1;
                group.wait = Wait::Sleep { until };
                Ok(Flow::Moved)
            }
            Control::Alloca { dst, size, align } => self.alloca(warp, instr, mask, (*dst, *size, *align)),
            Control::StackSave { dst } => {
                let top = warp.local_top;
                for lane in lanes(mask) {
                    warp.frame_mut().row_mut(*dst)[lane] = top[lane];
                }
                Ok(Flow::Next)
            }
            Control::StackRestore { src } => {
                let row = *warp.frame().row(*src);
                let floor = warp.frame().base;
                for lane in lanes(mask) {
                    warp.local_top[lane] = row[lane].clamp(floor[lane], warp.local_top[lane].max(floor[lane]));
                }
                Ok(Flow::Next)
            }
        }
    }

    /// Moves the lanes of `mask` from the current group to `pc`; the others continue at the next instruction.
    fn detach(&mut self, warp: &mut Warp, mask: u32, pc: u32) {
        let group = warp.group();
        if mask == group.mask {
            group.pc = pc;
        } else {
            warp.split(mask, pc);
        }
    }

    fn branch_indexed(&mut self, warp: &mut Warp, instr: &Instr, mask: u32, index: Slot, targets: &[u32]) -> Step {
        let row = *warp.frame().row(index);
        let rest = warp.group().mask & !mask;
        let mut left = mask;
        while left != 0 {
            let which = row[left.trailing_zeros() as usize];
            let same = lanes(left).filter(|lane| row[*lane] == which);
            let same = same.fold(0, |m, lane| m | 1 << lane);
            let Some(target) = targets.get(which as usize) else {
                let message = format!("branch index {which}, but the list has {} targets", targets.len());
                return Err(self.fault(warp, instr.line, message));
            };
            left &= !same;
            if left == 0 && rest == 0 {
                warp.group().pc = *target;
            } else {
                self.detach(warp, same, *target);
            }
        }
        if rest != 0 {
            warp.group().pc += 1;
        }
        Ok(Flow::Moved)
    }

    /// Ends the lanes of `mask`.
    fn exit(&mut self, warp: &mut Warp, mask: u32) {
        warp.live &= !mask;
        self.ctas[warp.cta].live_threads -= mask.count_ones();
        self.progress += 1;
        let group = *warp.group();
        let mut frame = Some(group.frame);
        while let Some(index) = frame {
            let inner = warp.frame_at_mut(index);
            inner.inside &= !mask;
            frame = inner.caller.map(|(caller, _)| caller);
            if inner.inside == 0 {
                warp.frames[index as usize] = None;
            }
        }
        if group.mask == mask {
            warp.remove_current();
        } else {
            let group = warp.group();
            group.mask &= !mask;
            group.pc += 1;
        }
        self.exited(warp.cta);
    }

    fn alloca(&mut self, warp: &mut Warp, instr: &Instr, mask: u32, what: (Slot, Slot, u64)) -> Step {
        let (dst, size, align) = what;
        let sizes = *warp.frame().row(size);
        for lane in lanes(mask) {
            let start = warp.local_top[lane].next_multiple_of(align.max(1));
            let end = start.saturating_add(sizes[lane]);
            if end > local::LIMIT {
                return Err(self.fault(warp, instr.line, "a thread's local memory is used up"));
            }
            warp.local.grow(lane, start, end);
            warp.local_top[lane] = end;
            warp.frame_mut().row_mut(dst)[lane] = start;
        }
        Ok(Flow::Next)
    }

    fn call(&mut self, warp: &mut Warp, instr: &Instr, op: &Control, mask: u32) -> Step {
        let Control::Call { target, args, .. } = op else {
            return Ok(Flow::Next);
        };
        let group = *warp.group();
        let mut left = mask;
        while left != 0 {
            let (callee, same) = match target {
                CallTarget::Direct(index) => (*index, left),
                CallTarget::Indirect(slot) => {
                    let row = warp.frame_at(group.frame).row(*slot);
                    let first = row[left.trailing_zeros() as usize];
                    let same = lanes(left).filter(|lane| row[*lane] == first);
                    let same = same.fold(0, |m, lane| m | 1 << lane);
                    let index = first.wrapping_sub(FUNCTION_BASE) / FUNCTION_STEP;
                    let known = first >= FUNCTION_BASE && (index as usize) < self.ctx.program.functions.len();
                    if !known {
                        return Err(self.fault(warp, instr.line, format!("call of {first:#x}, which is no function")));
                    }
                    (index as u32, same)
                }
            };
            left &= !same;
            self.enter(warp, instr, group, callee, same, args)?;
        }
        let rest = group.mask & !mask;
        if rest == 0 {
            // All lanes moved to frames of their own groups, so the caller's group is empty.
            let at = warp.groups.iter().position(|g| g.mask == 0);
            if let Some(at) = at {
                warp.groups.swap_remove(at);
                warp.current = warp.groups.len() - 1;
            }
        } else {
            warp.group().pc += 1;
        }
        Ok(Flow::Moved)
    }

    fn enter(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        group: Group,
        callee: u32,
        mask: u32,
        args: &[Passed],
    ) -> Result<(), Error> {
        let function = &self.ctx.program.functions[callee as usize];
        if !function.has_body {
            let message = format!("call of `{}`, which this module does not define", function.name);
            return Err(self.fault(warp, instr.line, message));
        }
        if group.depth + 1 > MAX_DEPTH || args.len() != function.formals.len() {
            let message = format!("call of `{}` too deep or with {} arguments", function.name, args.len());
            return Err(self.fault(warp, instr.line, message));
        }
        let frame = self.make_frame(warp, callee, mask, Some((group.frame, group.pc + 1)));
        let Some(mut frame) = frame else {
            return Err(self.fault(warp, instr.line, "a thread's local memory is used up"));
        };
        frame.call_pc = group.pc;
        let caller_base = warp.frame_at(group.frame).base;
        let call = self.ctx.checks.uninitialized.then_some(instr.line);
        for (arg, formal) in args.iter().zip(&function.formals) {
            let caller = match &warp.frames[group.frame as usize] {
                Some(caller) => caller,
                None => continue,
            };
            let row = match arg {
                Passed::Register { slot } => Some((*caller.row(*slot), undefined_row(caller, *slot))),
                Passed::Bytes { .. } => None,
            };
            let bases = (&caller_base, &frame.base.clone());
            pass(warp, (mask, call), (*arg, row), *formal, bases, &mut frame);
        }
        let index = place(warp, frame);
        let part = Group {
            pc: 0,
            frame: index,
            depth: group.depth + 1,
            mask,
            wait: Wait::Ready,
            forced: false,
            resumed: false,
        };
        warp.group().mask &= !mask;
        warp.groups.push(part);
        warp.slice = 1;
        Ok(())
    }

    /// Returns the lanes of `mask` to their caller and passes results back.
    fn ret(&mut self, warp: &mut Warp, mask: u32) {
        let group = *warp.group();
        let frame = warp.frame_at(group.frame);
        let Some((caller, pc)) = frame.caller else {
            return self.exit(warp, mask);
        };
        let (function, call_pc, base) = (frame.function, frame.call_pc, frame.base);
        let returns = &self.ctx.program.functions[function as usize].returns;
        let caller_function = warp.frame_at(caller).function;
        let call = &self.ctx.program.functions[caller_function as usize].code[call_pc as usize];
        let line = self.ctx.checks.uninitialized.then_some(call.line);
        if let crate::isa::Op::Control(Control::Call { returns: to, .. }) = &call.op {
            for (from, to) in returns.iter().zip(to.iter()) {
                let row = match from {
                    Passed::Register { slot } => {
                        let frame = warp.frame_at(group.frame);
                        Some((*frame.row(*slot), undefined_row(frame, *slot)))
                    }
                    Passed::Bytes { .. } => None,
                };
                let Some(mut target) = warp.frames[caller as usize].take() else {
                    continue;
                };
                let to_base = target.base;
                pass(warp, (mask, line), (*from, row), *to, (&base, &to_base), &mut target);
                warp.frames[caller as usize] = Some(target);
            }
        }
        for lane in lanes(mask) {
            warp.local_top[lane] = base[lane];
        }
        let inner = warp.frame_at_mut(group.frame);
        inner.inside &= !mask;
        if inner.inside == 0 {
            warp.frames[group.frame as usize] = None;
        }
        let back = Group {
            pc,
            frame: caller,
            depth: group.depth - 1,
            mask,
            wait: Wait::Ready,
            forced: false,
            resumed: false,
        };
        if group.mask == mask {
            *warp.group() = back;
        } else {
            warp.group().mask &= !mask;
            warp.group().pc += 1;
            warp.groups.push(back);
        }
    }

    /// Makes a frame for the lanes of `mask`, with its preloaded rows; `None` if local memory is exhausted.
    pub(crate) fn make_frame(
        &mut self,
        warp: &mut Warp,
        function: u32,
        mask: u32,
        caller: Option<(u32, u32)>,
    ) -> Option<Box<Frame>> {
        let decoded = &self.ctx.program.functions[function as usize];
        let mut base = [0; 32];
        for lane in lanes(mask) {
            let start = warp.local_top[lane].next_multiple_of(decoded.frame_align);
            let end = start.checked_add(decoded.frame_bytes)?;
            if end > local::LIMIT {
                return None;
            }
            if decoded.frame_bytes > 0 {
                warp.local.grow(lane, start, end);
            }
            base[lane] = start;
            warp.local_top[lane] = end;
        }
        let mut preds = vec![0; decoded.pred_rows as usize];
        preds[PRED_TRUE as usize] = u32::MAX;
        let mut frame = Box::new(Frame {
            function,
            values: vec![[0; 32]; decoded.value_rows as usize],
            preds,
            carry: 0,
            base,
            caller,
            call_pc: 0,
            inside: mask,
            written: if self.ctx.uses_wgmma {
                vec![0; decoded.value_rows as usize]
            } else {
                Vec::new()
            },
            shadow: None,
        });
        for (slot, preload) in &decoded.preloads {
            let row = self.preload(warp, *preload, &base);
            *frame.row_mut(*slot) = row;
        }
        Some(frame)
    }

    fn preload(&self, warp: &Warp, preload: Preload, base: &Lanes) -> Lanes {
        match preload {
            Preload::Bits(bits) => [bits; 32],
            Preload::Special(special) => self.special(warp, special),
            Preload::Frame(offset) => base.map(|b| b.wrapping_add(offset)),
            Preload::Variable(index, offset) => [self.ctx.variables[index as usize].wrapping_add_signed(offset); 32],
            Preload::FunctionAddress(index) => [function_address(index); 32],
        }
    }

    fn special(&self, warp: &Warp, special: Special) -> Lanes {
        let launch = self.ctx.launch;
        let cta = &self.ctas[warp.cta];
        let (block, grid, cluster) = (launch.block, launch.grid, launch.cluster);
        let at = |axis: u8| usize::from(axis);
        let wide = |x: u32| u64::from(x);
        let in_cluster = |axis: u8| cta.coordinates[at(axis)] % cluster[at(axis)];
        let size: u32 = cluster.iter().product();
        if let Special::Tid(axis) = special {
            return std::array::from_fn(|lane| {
                let linear = u64::from(warp.index) * 32 + lane as u64;
                let (x, y) = (wide(block[0]), wide(block[1]));
                match axis {
                    0 => linear % x,
                    1 => linear / x % y,
                    _ => linear / x / y,
                }
            });
        }
        let by_lane = |f: fn(u32) -> u32| std::array::from_fn(|lane| u64::from(f(lane as u32)));
        match special {
            Special::LaneId => return by_lane(|l| l),
            Special::LanemaskEq => return by_lane(|l| 1 << l),
            Special::LanemaskLt => return by_lane(|l| (1 << l) - 1),
            Special::LanemaskLe => return by_lane(|l| u32::MAX >> (31 - l)),
            Special::LanemaskGe => return by_lane(|l| u32::MAX << l),
            Special::LanemaskGt => return by_lane(|l| !(u32::MAX >> (31 - l))),
            _ => {}
        }
        let value = match special {
            Special::Ntid(axis) => wide(block[at(axis)]),
            Special::Ctaid(axis) => wide(cta.coordinates[at(axis)]),
            Special::Nctaid(axis) => wide(grid[at(axis)]),
            Special::ClusterId(axis) => wide(cta.coordinates[at(axis)] / cluster[at(axis)]),
            Special::NclusterId(axis) => wide(grid[at(axis)] / cluster[at(axis)]),
            Special::ClusterCtaid(axis) => wide(in_cluster(axis)),
            Special::ClusterNctaid(axis) => wide(cluster[at(axis)]),
            Special::ClusterCtarank => warp.cta as u64,
            Special::ClusterNctarank => wide(size),
            Special::IsExplicitCluster => u64::from(size > 1),
            Special::WarpId => wide(warp.index),
            Special::NwarpId => self.warps_per_cta as u64,
            Special::SmId => wide(cta.linear % 132),
            Special::NsmId => 132,
            Special::TotalSmem => self.ctx.shared_end,
            Special::DynamicSmem => wide(launch.shared_bytes),
            Special::GridWorkspace(1) => self.ctx.workspace >> 32,
            Special::GridWorkspace(_) => self.ctx.workspace & 0xffff_ffff,
            Special::ReservedSmem(offset) => u64::from(offset),
            _ => 0,
        };
        [value; 32]
    }
}

/// Returns the address that stands for a function.
pub(crate) fn function_address(index: u32) -> u64 {
    FUNCTION_BASE + u64::from(index) * FUNCTION_STEP
}

/// Puts a frame in a free place of the warp.
pub(crate) fn place(warp: &mut Warp, frame: Box<Frame>) -> u32 {
    let free = warp.frames.iter().position(Option::is_none);
    match free {
        Some(at) => {
            warp.frames[at] = Some(frame);
            at as u32
        }
        None => {
            warp.frames.push(Some(frame));
            warp.frames.len() as u32 - 1
        }
    }
}

/// Returns the undefined bits of a register, if there are any.
fn undefined_row(frame: &Frame, slot: Slot) -> Option<Row> {
    frame.shadow.as_ref().map(|shadow| *shadow.row(slot))
}

/// Copies an argument or a result between two frames, for the lanes of a mask, at the line of the call (no line if
/// undefined values are not tracked). Bytes lie in local memory, at the bases of their frames.
fn pass(
    warp: &mut Warp,
    of: (u32, Option<u32>),
    from: (Passed, Option<(Lanes, Option<Row>)>),
    to: Passed,
    bases: (&Lanes, &Lanes),
    target: &mut Frame,
) {
    let (mask, line) = of;
    for lane in lanes(mask) {
        match (from, to) {
            ((Passed::Bytes { offset: a, size }, _), Passed::Bytes { offset: b, size: room }) => {
                let from = bases.0[lane] as usize + a as usize;
                let to = bases.1[lane] as usize + b as usize;
                warp.local.copy(lane, from, to, size.min(room) as usize);
            }
            ((Passed::Bytes { offset, size }, _), Passed::Register { slot }) => {
                let from = bases.0[lane] as usize + offset as usize;
                let n = (size as usize).min(8);
                if from + n > warp.local.len(lane) {
                    continue;
                }
                target.row_mut(slot)[lane] = warp.local.load(lane, from, n);
                let missing = (0..n).filter(|i| warp.local.first_uninitialized(lane, from + i, 1).is_some());
                let missing = missing.fold(0, |m: u8, i| m | 1 << i);
                if let Some(line) = line
                    && (missing != 0 || target.shadow.is_some())
                {
                    let fresh = Origin { line, computed: false };
                    let origin = warp.local.origin(lane, from, n).unwrap_or(fresh);
                    target.set_undefined(slot, lane, bits_of_bytes(missing), origin);
                }
            }
            ((Passed::Register { .. }, Some((row, undefined))), Passed::Bytes { offset, size }) => {
                let to = bases.1[lane] as usize + offset as usize;
                let n = (size as usize).min(8);
                if to + n > warp.local.len(lane) {
                    continue;
                }
                warp.local.store(lane, to, n, row[lane]);
                if let Some(undefined) = undefined {
                    let bytes = bytes_of_bits(undefined.bits[lane]);
                    for index in (0..n).filter(|i| bytes >> i & 1 != 0) {
                        warp.local.unmark(lane, to + index, undefined.origin[lane]);
                    }
                }
            }
            ((Passed::Register { .. }, Some((row, undefined))), Passed::Register { slot }) => {
                target.row_mut(slot)[lane] = row[lane];
                let undefined = undefined.map(|u| (u.bits[lane], u.origin[lane]));
                let (bits, origin) = undefined.unwrap_or_default();
                if bits != 0 || target.shadow.is_some() {
                    target.set_undefined(slot, lane, bits, origin);
                }
            }
            ((Passed::Register { .. }, None), _) => {}
        }
    }
}
