//! `wmma`: the older matrix instructions, whose fragments have a layout that only they define.

use super::access::{Access, Act, effective};
use super::memory_ops::Touched;
use super::warp::{Warp, lanes};
use super::{Cluster, Flow, Step};
use crate::isa::types::Slot;
use crate::isa::{Instr, WmmaOp};
use crate::memory::origin::Origin;
use crate::tensor::mma::{Fragment, MAX_REGISTERS};
use crate::tensor::wmma::Wmma;

impl<'m> Cluster<'m> {
    pub(super) fn wmma(&mut self, warp: &mut Warp, instr: &Instr, op: &WmmaOp, mask: u32) -> Step {
        match op {
            WmmaOp::Mma { wmma, d, a, b, c } => {
                let [a, b, c] = [a, b, c].map(|slots| gather(warp, slots));
                let result = wmma.execute(&a, &b, &c);
                let result = result.map_err(|e| self.fault(warp, instr.line, e.to_string()))?;
                let shape = wmma.shape;
                self.counters.tensor_flops += (2 * shape.m * shape.n * shape.k) as u64;
                for (index, slot) in d.iter().enumerate() {
                    let row = warp.frame_mut().row_mut(*slot);
                    for lane in lanes(mask) {
                        row[lane] = result[lane][index];
                    }
                }
                Ok(Flow::Next)
            }
            WmmaOp::Move { .. } => self.wmma_move(warp, instr, op, mask),
        }
    }

    /// Executes `wmma.load` and `wmma.store`: moves elements between memory and the fragment, one by one.
    fn wmma_move(&mut self, warp: &mut Warp, instr: &Instr, op: &WmmaOp, mask: u32) -> Step {
        let WmmaOp::Move {
            wmma,
            operand,
            column_major,
            addr,
            stride,
            rows,
            store,
        } = op
        else {
            return Ok(Flow::Next);
        };
        let bytes = wmma.bits(*operand) / 8;
        let pack = wmma.pack(*operand);
        let (height, width) = wmma.size(*operand);
        let default = if *column_major { height } else { width };
        let site = self.site(warp);
        let mut touched = Touched::default();
        for lane in lanes(mask) {
            let base = effective(addr, warp.frame().row(addr.base)[lane]);
            let stride = stride.map_or(default, |s| warp.frame().row(s)[lane] as u32 as usize);
            for (register, row) in rows.iter().enumerate() {
                let mut value = if *store { warp.frame().row(*row)[lane] } else { 0 };
                let stored = warp.frame().undefined(*row, lane, 8).filter(|_| *store);
                let mut loaded = (0, Origin::default());
                for part in 0..pack {
                    let (r, c) = wmma.element(*operand, lane, register * pack + part);
                    let index = Wmma::memory_index(*column_major, stride, r, c);
                    let access = Access {
                        lane,
                        address: base.wrapping_add((index * bytes) as u64),
                        space: addr.space,
                        bytes,
                        align: bytes as u64,
                        write: *store,
                    };
                    let Some(target) = self.locate(warp, instr, access)? else {
                        continue;
                    };
                    self.observe(warp, instr, site, access, target, Act::of(access));
                    touched.add(target, access.address);
                    let shift = part * bytes * 8;
                    if *store {
                        self.poke(warp, lane, target, 0, bytes, value >> shift);
                        if let Some((bits, origin)) = stored {
                            let bits = bits >> shift & u64::MAX >> (64 - 8 * bytes);
                            self.stain(warp, instr, lane, target, 0, (bits, origin));
                        }
                    } else {
                        value |= self.peek(warp, lane, target, 0, bytes) << shift;
                        if self.lacks(warp, lane, target, bytes) {
                            let (bits, origin) = self.undefined(warp, lane, target, (0, bytes), instr.line);
                            loaded = (loaded.0 | bits << shift, origin);
                        }
                    }
                }
                if !store {
                    warp.frame_mut().row_mut(*row)[lane] = value;
                    if loaded.0 != 0 {
                        warp.frame_mut().set_undefined(*row, lane, loaded.0, loaded.1);
                    }
                }
            }
        }
        self.count_access(&touched, bytes as u64, *store);
        Ok(Flow::Next)
    }
}

/// Collects the registers of all lanes in a fragment.
pub(super) fn gather(warp: &Warp, slots: &[Slot]) -> Fragment {
    let mut fragment: Fragment = [[0; MAX_REGISTERS]; 32];
    for (index, slot) in slots.iter().enumerate().take(MAX_REGISTERS) {
        for (lane, value) in warp.frame().row(*slot).iter().enumerate() {
            fragment[lane][index] = *value;
        }
    }
    fragment
}
