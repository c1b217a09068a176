//! `mma.sync`, `ldmatrix` and the other matrix instructions of a whole warp.

use super::access::{Access, Act, Target, effective};
use super::memory_ops::Touched;
use super::warp::{FULL, Warp, lanes};
use super::wmma::gather;
use super::{Cluster, Flow, Step, warp_ops};
use crate::isa::types::{Addr, Slot};
use crate::isa::{AsyncOp, BarrierOp, Instr, Op, TensorOp, WarpOp};
use crate::memory::origin::Origin;
use crate::report::FindingKind;
use crate::tensor::matrix::{self, Matrix};

/// Returns the lanes that must execute `op` together, if it is such an instruction.
#[inline]
pub(crate) fn required_lanes(warp: &Warp, op: &Op, mask: u32) -> Option<u32> {
    match op {
        Op::Tensor(_) | Op::Wmma(_) | Op::Wgmma(_) => Some(warp.live),
        Op::Barrier(
            BarrierOp::Sync { aligned, .. }
            | BarrierOp::Arrive { aligned, .. }
            | BarrierOp::Red { aligned, .. }
            | BarrierOp::ClusterArrive { aligned }
            | BarrierOp::ClusterWait { aligned },
        ) => aligned.then_some(warp.live),
        Op::Barrier(BarrierOp::SetMaxReg { .. }) | Op::Async(AsyncOp::PublishMap { .. }) => Some(warp.live),
        Op::Warp(op) => {
            let slot = warp_ops::members_of(op)?;
            let members = warp.frame().row(slot)[mask.trailing_zeros() as usize] as u32;
            Some(warp.expected(members))
        }
        Op::Alu(_) | Op::Control(_) | Op::Memory(_) | Op::Mbarrier(_) | Op::Async(_) | Op::Nop => None,
    }
}

impl<'m> Cluster<'m> {
    /// Returns true if all lanes that an instruction needs are here. Otherwise the group waits for them.
    pub(super) fn converged(&mut self, warp: &mut Warp, instr: &Instr, required: u32, mask: u32) -> bool {
        let group = *warp.group();
        let is_sync = matches!(instr.op, Op::Warp(WarpOp::Sync { .. }));
        let missing = required & !group.mask;
        if missing != 0 && !group.forced {
            let wait = if is_sync {
                super::warp::Wait::WarpSync { members: required }
            } else {
                super::warp::Wait::Converge { required }
            };
            warp.group().wait = wait;
            return false;
        }
        warp.group().forced = false;
        let aligned = !matches!(instr.op, Op::Warp(_));
        let absent = required & !mask;
        if aligned && absent != 0 {
            let actor = self.actor(warp);
            let lane = absent.trailing_zeros() as usize;
            let elsewhere = warp
                .groups
                .iter()
                .find(|g| g.mask & absent != 0 && g.mask != group.mask);
            let place = elsewhere.map(|g| {
                let function = warp.frame_at(g.frame).function;
                let pc = g.pc;
                self.line_at(crate::check::event::Site { function, pc })
            });
            self.report(
                FindingKind::BarrierDivergence,
                instr.line,
                actor,
                (Some(lane), None),
                || {
                    let place = place.map_or(String::new(), |line| format!(", which are at line {line}"));
                    format!(
                        "an aligned instruction is executed by lanes {mask:#010x} without lanes {absent:#010x}{place}"
                    )
                },
            );
        }
        true
    }

    pub(super) fn tensor(&mut self, warp: &mut Warp, instr: &Instr, op: &TensorOp, mask: u32) -> Step {
        match op {
            TensorOp::Mma { mma, d, a, b, c } => {
                let [a, b, c] = [a, b, c].map(|slots| gather(warp, slots));
                let result = mma.execute(&a, &b, &c);
                let result = result.map_err(|e| self.fault(warp, instr.line, e.to_string()))?;
                self.counters.tensor_flops += mma.flops();
                let f = warp.frame_mut();
                for (index, slot) in d.iter().enumerate() {
                    let row = f.row_mut(*slot);
                    for lane in lanes(mask) {
                        row[lane] = result[lane][index];
                    }
                }
                Ok(Flow::Next)
            }
            TensorOp::Ldmatrix { addr, trans, dsts } => self.ldmatrix(warp, instr, mask, addr, *trans, dsts),
            TensorOp::Stmatrix { addr, trans, srcs } => self.stmatrix(warp, instr, mask, addr, *trans, srcs),
            TensorOp::Movmatrix { dst, src } => {
                let source = warp.frame().row(*src).map(|v| v as u32);
                *warp.frame_mut().row_mut(*dst) = matrix::transpose(&source).map(u64::from);
                Ok(Flow::Next)
            }
        }
    }

    /// Returns the row of 16 bytes at a lane's address.
    fn matrix_row(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        addr: &Addr,
        lane: usize,
        stored: Option<&[u8; 16]>,
        touched: &mut Touched,
    ) -> Result<Option<Target>, crate::error::Error> {
        let access = Access {
            lane,
            address: effective(addr, warp.frame().row(addr.base)[lane]),
            space: addr.space,
            bytes: 16,
            align: 16,
            write: stored.is_some(),
        };
        let site = self.site(warp);
        let target = self.locate(warp, instr, access)?;
        if let Some(target) = target {
            let bytes = stored.map_or(&[][..], |s| s);
            let act = Act {
                stored: bytes,
                ..Act::of(access)
            };
            self.observe(warp, instr, site, access, target, act);
            touched.add(target, access.address);
        }
        Ok(target)
    }

    fn ldmatrix(&mut self, warp: &mut Warp, instr: &Instr, mask: u32, addr: &Addr, trans: bool, dsts: &[Slot]) -> Step {
        let mut touched = Touched::default();
        let mut results = [[0u32; 32]; 4];
        let mut undefined = [None; 4];
        for (index, result) in results.iter_mut().enumerate().take(dsts.len()) {
            let mut tile = Matrix::default();
            let mut missing: Option<(Matrix, Origin)> = None;
            for (row, out) in tile.iter_mut().enumerate() {
                let lane = matrix::address_lane(index, row);
                let target = self.matrix_row(warp, instr, addr, lane, None, &mut touched)?;
                let Some(target) = target else { continue };
                for (word, out) in out.chunks_exact_mut(4).enumerate() {
                    let value = self.peek(warp, lane, target, word * 8, 8);
                    for (part, out) in out.iter_mut().enumerate() {
                        *out = (value >> (16 * part)) as u16;
                    }
                }
                if self.lacks(warp, lane, target, 16) {
                    for word in 0..2 {
                        let (bits, origin) = self.undefined(warp, lane, target, (word * 8, 8), instr.line);
                        let (rows, _) = missing.get_or_insert_with(|| (Matrix::default(), origin));
                        for (part, out) in rows[row][word * 4..][..4].iter_mut().enumerate() {
                            *out = (bits >> (16 * part)) as u16;
                        }
                    }
                }
            }
            *result = matrix::distribute(&tile, trans);
            undefined[index] = missing.map(|(tile, origin)| (matrix::distribute(&tile, trans), origin));
        }
        for (dst, result) in dsts.iter().zip(&results) {
            let row = warp.frame_mut().row_mut(*dst);
            for lane in lanes(mask & FULL) {
                row[lane] = u64::from(result[lane]);
            }
        }
        for (dst, undefined) in dsts.iter().zip(&undefined) {
            let Some((bits, origin)) = undefined else { continue };
            for lane in lanes(mask & FULL) {
                warp.frame_mut()
                    .set_undefined(*dst, lane, u64::from(bits[lane]), *origin);
            }
        }
        self.count_access(&touched, 16, false);
        Ok(Flow::Next)
    }

    fn stmatrix(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        _mask: u32,
        addr: &Addr,
        trans: bool,
        srcs: &[Slot],
    ) -> Step {
        let mut touched = Touched::default();
        for (index, src) in srcs.iter().enumerate() {
            let registers = warp.frame().row(*src).map(|v| v as u32);
            let tile = matrix::collect(&registers, trans);
            let undefined = warp.frame().undefined_tile(*src, trans);
            for (row, values) in tile.iter().enumerate() {
                let lane = matrix::address_lane(index, row);
                let mut bytes = [0; 16];
                for (out, value) in bytes.chunks_exact_mut(2).zip(values) {
                    out.copy_from_slice(&value.to_le_bytes());
                }
                let target = self.matrix_row(warp, instr, addr, lane, Some(&bytes), &mut touched)?;
                let Some(target) = target else { continue };
                for (word, part) in bytes.chunks_exact(8).enumerate() {
                    self.poke(warp, lane, target, word * 8, 8, crate::memory::shared::load(part));
                    if let Some((tile, origin)) = &undefined {
                        let parts = tile[row][word * 4..][..4].iter().rev();
                        let bits = parts.fold(0, |bits, part| bits << 16 | u64::from(*part));
                        self.stain(warp, instr, lane, target, word * 8, (bits, *origin));
                    }
                }
            }
        }
        self.count_access(&touched, 16, true);
        Ok(Flow::Next)
    }
}
