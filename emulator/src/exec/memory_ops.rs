//! Loads, stores and fences.

use super::access::{Access, Act, Target, effective};
use super::alu::truncate;
use super::warp::{Warp, lanes};
use super::{Cluster, Flow, Step};
use crate::check::event::Fence;
use crate::counters::{sectors, wavefronts};
use crate::isa::types::{Addr, Order, Slot, Space};
use crate::isa::{Instr, Memory};

/// Buffer size for the widest store (`st.v8.b32` and `st.v4.b64` have 32 bytes), with room to spare.
const MAX_STORE: usize = 64;

/// Addresses of one instruction in one state space, for the counters.
#[derive(Default)]
pub(crate) struct Touched {
    global: Vec<u64>,
    shared: Vec<u64>,
}

impl Touched {
    #[inline]
    pub fn add(&mut self, target: Target, address: u64) {
        match target {
            Target::Global { .. } => self.global.push(address),
            Target::Shared { at, .. } => self.shared.push(at as u64),
            Target::Local { .. } | Target::Param { .. } => {}
        }
    }
}

impl<'m> Cluster<'m> {
    pub fn memory(&mut self, warp: &mut Warp, instr: &Instr, op: &Memory, mask: u32) -> Step {
        match op {
            Memory::Load {
                addr,
                order,
                bytes,
                signed,
                dst_bits,
                dsts,
                guess: _,
            } => {
                let extend = signed.then_some(*dst_bits);
                self.load(warp, instr, mask, addr, *order, *bytes, extend, dsts)
            }
            Memory::Store {
                addr,
                order,
                bytes,
                srcs,
            } => self.store(warp, instr, mask, addr, *order, *bytes, srcs),
            Memory::Atomic { .. } => self.atomic(warp, instr, op, mask),
            Memory::Fence { async_proxy, device } => {
                self.watch.fence(Fence {
                    warp: warp.id,
                    cta: warp.cta,
                    async_proxy: *async_proxy,
                    device: *device,
                });
                Ok(Flow::Next)
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a load is all of these")]
    fn load(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        mask: u32,
        addr: &Addr,
        order: Order,
        bytes: u32,
        extend: Option<u32>,
        dsts: &[Slot],
    ) -> Step {
        let base = *warp.frame().row(addr.base);
        let size = bytes as usize;
        let total = size * dsts.len();
        let site = self.site(warp);
        let mut touched = Touched::default();
        for lane in lanes(mask) {
            let access = Access {
                lane,
                address: effective(addr, base[lane]),
                space: addr.space,
                bytes: total,
                align: total.next_power_of_two() as u64,
                write: false,
            };
            let Some(target) = self.locate(warp, instr, access)? else {
                for dst in dsts {
                    warp.frame_mut().row_mut(*dst)[lane] = 0;
                }
                continue;
            };
            let act = Act {
                order,
                ..Act::of(access)
            };
            self.observe(warp, instr, site, access, target, act);
            touched.add(target, access.address);
            let extended = |value: u64| match extend {
                Some(bits) => {
                    let shift = 64 - bytes * 8;
                    truncate(bits, ((value << shift) as i64 >> shift) as u64)
                }
                None => value,
            };
            let lacks = self.lacks(warp, lane, target, total);
            for (index, dst) in dsts.iter().enumerate() {
                let value = self.peek(warp, lane, target, index * size, size);
                warp.frame_mut().row_mut(*dst)[lane] = extended(value);
                if lacks {
                    let (bits, origin) = self.undefined(warp, lane, target, (index * size, size), instr.line);
                    warp.frame_mut().set_undefined(*dst, lane, extended(bits), origin);
                }
            }
        }
        self.count_access(&touched, total as u64, false);
        Ok(Flow::Next)
    }

    /// Reads up to 8 bytes at an offset from the location of an access.
    #[inline]
    pub fn peek(&self, warp: &Warp, lane: usize, target: Target, offset: usize, bytes: usize) -> u64 {
        match target {
            Target::Global { allocation, at } => self.ctx.view.allocations[allocation].load(at + offset, bytes),
            Target::Shared { cta, at } => self.ctas[cta].shared.load(at + offset, bytes),
            Target::Local { at } => warp.local.load(lane, at + offset, bytes),
            Target::Param { at } => {
                let from = at + offset;
                crate::memory::shared::load(&self.ctx.launch.params[from..from + bytes])
            }
        }
    }

    /// Writes up to 8 bytes at an offset from the location of an access.
    #[inline]
    pub fn poke(&mut self, warp: &mut Warp, lane: usize, target: Target, offset: usize, bytes: usize, value: u64) {
        match target {
            Target::Global { allocation, at } => {
                let memory = &self.ctx.view.allocations[allocation];
                memory.store(at + offset, bytes, value);
                memory.mark(at + offset, bytes);
            }
            Target::Shared { cta, at } => self.ctas[cta].shared.store(at + offset, bytes, value),
            Target::Local { at } => warp.local.store(lane, at + offset, bytes, value),
            Target::Param { .. } => {}
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a store is all of these")]
    fn store(
        &mut self,
        warp: &mut Warp,
        instr: &Instr,
        mask: u32,
        addr: &Addr,
        order: Order,
        bytes: u32,
        srcs: &[Slot],
    ) -> Step {
        let base = *warp.frame().row(addr.base);
        let size = bytes as usize;
        let total = size * srcs.len();
        let site = self.site(warp);
        let shadowed = warp.frame().shadow.is_some();
        let mut touched = Touched::default();
        for lane in lanes(mask) {
            let access = Access {
                lane,
                address: effective(addr, base[lane]),
                space: addr.space,
                bytes: total,
                align: total.next_power_of_two() as u64,
                write: true,
            };
            let Some(target) = self.locate(warp, instr, access)? else {
                continue;
            };
            let mut stored = [0u8; MAX_STORE];
            for (index, src) in srcs.iter().enumerate() {
                let value = warp.frame().row(*src)[lane].to_le_bytes();
                stored[index * size..][..size].copy_from_slice(&value[..size]);
            }
            let act = Act {
                order,
                stored: &stored[..total],
                ..Act::of(access)
            };
            self.observe(warp, instr, site, access, target, act);
            touched.add(target, access.address);
            for (index, src) in srcs.iter().enumerate() {
                let value = warp.frame().row(*src)[lane];
                self.poke(warp, lane, target, index * size, size, value);
                if shadowed && let Some(undefined) = warp.frame().undefined(*src, lane, size) {
                    self.stain(warp, instr, lane, target, index * size, undefined);
                }
            }
        }
        self.count_access(&touched, total as u64, true);
        Ok(Flow::Next)
    }

    /// Adds a warp's access to the counters.
    pub fn count_access(&mut self, touched: &Touched, bytes: u64, write: bool) {
        let counters = &mut self.counters;
        if !touched.global.is_empty() {
            let n = touched.global.len() as u64 * bytes;
            let sectors = sectors(&touched.global, bytes);
            if write {
                counters.global_written_bytes += n;
                counters.global_written_sectors += sectors;
            } else {
                counters.global_read_bytes += n;
                counters.global_read_sectors += sectors;
            }
        }
        if !touched.shared.is_empty() {
            let n = touched.shared.len() as u64 * bytes;
            if write {
                counters.shared_written_bytes += n;
            } else {
                counters.shared_read_bytes += n;
            }
            let (passes, least) = wavefronts(&touched.shared, bytes);
            counters.shared_wavefronts += passes;
            counters.shared_bank_conflicts += passes - least;
        }
    }
}

/// Returns true if an access in `space` may reach global memory.
pub(crate) fn may_be_global(space: Space) -> bool {
    matches!(space, Space::Global | Space::Generic)
}
