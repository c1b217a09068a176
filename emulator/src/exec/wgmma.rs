//! `wgmma.mma_async`: products of a warpgroup, in the background.
//!
//! Each warp of the group computes its own 16 rows, which do not depend on the other three warps. A product reads its
//! shared operands when it lands, at a time between issue and wait. Products of a warp land in order.

mod registers;

use std::collections::VecDeque;

use self::registers::{Owned, Role};
use super::warp::{Frame, Warp};
use super::{Cluster, Flow, Step};
use crate::check::event::{Effect, Engine, MemoryAccess, Place};
use crate::error::Error;
use crate::isa::types::{Order, Slot, Ty};
use crate::isa::window;
use crate::isa::{Instr, Wgmma, WgmmaA, WgmmaOp};
use crate::numeric::float32::canonical;
use crate::numeric::format;
use crate::report::FindingKind;
use crate::schedule::Landing;
use crate::tensor::descriptor::{CHUNK_BYTES, Descriptor, Major};
use crate::tensor::fragment;

/// Number of rows that a warp computes.
const ROWS: usize = 16;

#[derive(Debug, Clone)]
struct Product {
    op: Wgmma,
    frame: u32,
    a: Left,
    b: Descriptor,
    accumulate: bool,
    landing: Landing,
    step: u32,
    line: u32,
}

#[derive(Debug, Clone)]
enum Left {
    Shared(Descriptor),
    Registers(Box<[[u32; 32]; 4]>),
}

/// Products of a warp in flight.
#[derive(Debug, Default)]
pub(crate) struct WgmmaQueue {
    /// Products that were issued and have not landed, in order.
    flying: VecDeque<Product>,
    /// Rows of accumulators and register operands that products own, with the line and step of the product.
    owned: Vec<Owned>,
    open_step: u32,
    open_any: bool,
    /// Last step of each committed group.
    groups: VecDeque<u32>,
    /// Time of the last `wgmma.fence`.
    fenced_at: u64,
    /// Number of instructions of the warp, by which register writes are timed.
    now: u64,
}

fn bytes_of(ty: Ty) -> usize {
    match ty {
        Ty::Tf32 => 4,
        Ty::E4m3 | Ty::E5m2 | Ty::S8 | Ty::U8 => 1,
        _ => 2,
    }
}

fn decode(ty: Ty, bits: u32) -> f32 {
    match ty {
        Ty::F16 => format::f16_to_f32(bits as u16),
        Ty::Bf16 => format::bf16_to_f32(bits as u16),
        Ty::E4m3 => format::e4m3_to_f32(bits as u8),
        Ty::E5m2 => format::e5m2_to_f32(bits as u8),
        // Exact: the value has eight bits.
        Ty::S8 => f32::from(bits as i8),
        Ty::U8 => f32::from(bits as u8),
        _ => format::tf32_to_f32(bits),
    }
}

fn major(transposed: bool) -> Major {
    if transposed { Major::Mn } else { Major::K }
}

impl<'m> Cluster<'m> {
    pub(super) fn wgmma(&mut self, warp: &mut Warp, instr: &Instr, op: &WgmmaOp, mask: u32) -> Step {
        match op {
            WgmmaOp::Fence => {
                warp.wgmma.fenced_at = warp.wgmma.now;
                Ok(Flow::Next)
            }
            WgmmaOp::Commit => {
                let step = if warp.wgmma.open_any { warp.wgmma.open_step } else { 0 };
                warp.wgmma.groups.push_back(step);
                warp.wgmma.open_any = false;
                Ok(Flow::Next)
            }
            WgmmaOp::Wait { left } => {
                let mut done = 0;
                while warp.wgmma.groups.len() > *left as usize {
                    done = warp.wgmma.groups.pop_front().map_or(done, |s| s.max(done));
                }
                while warp.wgmma.flying.front().is_some_and(|p| p.step <= done) {
                    self.land_first(warp)?;
                }
                warp.wgmma.owned.retain(|o| o.step > done);
                if done > 0 {
                    self.watch.complete(warp.id, Engine::Wgmma, done);
                }
                Ok(Flow::Next)
            }
            WgmmaOp::Mma(op) => self.issue(warp, instr, op, mask),
        }
    }

    fn issue(&mut self, warp: &mut Warp, instr: &Instr, op: &Wgmma, mask: u32) -> Step {
        let lane = mask.trailing_zeros() as usize;
        self.check_fence(warp, instr, op);
        let step = self.watch.issue(warp.id, Engine::Wgmma);
        let frame = warp.frame();
        let b = Descriptor::decode(frame.row(op.b)[lane]);
        let accumulate = frame.pred(op.scale_d) >> lane & 1 != 0;
        let a = match &op.a {
            WgmmaA::Descriptor(slot) => Left::Shared(Descriptor::decode(frame.row(*slot)[lane])),
            WgmmaA::Registers(slots) => {
                let rows = std::array::from_fn(|i| frame.row(slots[i]).map(|v| v as u32));
                Left::Registers(Box::new(rows))
            }
        };
        let index = warp.group().frame;
        let mut own = |rows: &[Slot], role| {
            warp.wgmma.owned.push(Owned {
                frame: index,
                rows: rows.into(),
                role,
                step,
                line: instr.line,
            });
        };
        own(&op.d, Role::Accumulator);
        if let WgmmaA::Registers(rows) = &op.a {
            own(rows, Role::Operand);
        }
        let product = Product {
            op: op.clone(),
            frame: index,
            a,
            b,
            accumulate,
            landing: self.temper.landing(&mut self.rng, self.tick),
            step,
            line: instr.line,
        };
        self.watch_operands(warp, instr, &product)?;
        self.counters.tensor_flops += 2 * (ROWS as u64) * u64::from(op.n) * u64::from(op.k);
        warp.wgmma.open_step = step;
        warp.wgmma.open_any = true;
        warp.wgmma.flying.push_back(product);
        self.land_products(warp)?;
        Ok(Flow::Next)
    }

    /// Checks the shared addresses of the 16-byte chunks that a product reads.
    fn watch_operands(&mut self, warp: &Warp, instr: &Instr, product: &Product) -> Result<(), Error> {
        let op = &product.op;
        let k = op.k as usize;
        let mut chunks: Vec<u32> = Vec::new();
        let b = product.b.chunks(major(op.trans_b), bytes_of(op.b_ty), op.n as usize, k);
        chunks.extend(b.map(|(address, ..)| address));
        if let Left::Shared(a) = &product.a {
            let first = warp.index as usize % 4 * ROWS;
            let all = a.chunks(major(op.trans_a), bytes_of(op.a_ty), 64, k);
            chunks.extend(
                all.filter(|(_, m, _)| (first..first + ROWS).contains(m))
                    .map(|(address, ..)| address),
            );
        }
        self.counters.shared_read_bytes += (chunks.len() * CHUNK_BYTES) as u64;
        let site = self.site(warp);
        let actor = self.actor(warp);
        for address in chunks {
            let at = address as usize;
            if (at as u64) < window::SHARED_BASE || at + CHUNK_BYTES > self.ctas[warp.cta].shared.len() {
                let end = self.ctas[warp.cta].shared.len();
                let place = (None, Some(at as u64));
                let message = format!("wgmma reads 16 bytes of shared memory at {at:#x}; the block has up to {end:#x}");
                if !self.report(FindingKind::OutOfBounds, instr.line, actor, place, || message.clone()) {
                    return Err(self.fault(warp, instr.line, message));
                }
                continue;
            }
            if let Some(missing) = self.ctas[warp.cta].shared.first_uninitialized(at, CHUNK_BYTES) {
                self.report(
                    FindingKind::Uninitialized,
                    instr.line,
                    actor,
                    (None, Some(missing as u64)),
                    || "wgmma reads shared memory that was never written".to_owned(),
                );
            }
            let cta = warp.cta;
            let memory = &self.ctas[cta].shared;
            self.watch.access(&MemoryAccess {
                warp: warp.id,
                engine: Engine::Wgmma,
                actor,
                site,
                line: instr.line,
                lane: None,
                place: Place::Shared { cta, at, memory },
                bytes: CHUNK_BYTES,
                effect: Effect::Read,
                order: Order::Weak,
                stored: &[],
            });
        }
        Ok(())
    }

    /// Lands the products that are due. A product never lands before an earlier one.
    pub(super) fn land_products(&mut self, warp: &mut Warp) -> Result<(), Error> {
        while warp.wgmma.flying.front().is_some_and(|p| p.landing.due(self.tick)) {
            self.land_first(warp)?;
        }
        Ok(())
    }

    fn land_first(&mut self, warp: &mut Warp) -> Result<(), Error> {
        let Some(product) = warp.wgmma.flying.pop_front() else {
            return Ok(());
        };
        let op = &product.op;
        let (n, k) = (op.n as usize, op.k as usize);
        let left = self.left(warp, &product);
        let right = self.operand(warp, &product.b, op.b_ty, major(op.trans_b), (n, k));
        if warp.frames[product.frame as usize].is_none() {
            let message = "wgmma accumulators went out of use before the product was waited for";
            return Err(self.fault(warp, product.line, message));
        }
        let frame = warp.frame_at_mut(product.frame);
        if op.d_ty == Ty::S32 {
            integer_sums(frame, &product, &left, &right);
            return Ok(());
        }
        let half = op.d_ty == Ty::F16;
        for lane in 0..32 {
            for register in 0..op.d.len() {
                let parts = if half { 2 } else { 1 };
                let old = frame.row(op.d[register])[lane] as u32;
                let mut bits = 0u32;
                for part in 0..parts {
                    let element = register * parts + part;
                    let (row, column) = fragment::c(lane, element % 4);
                    let column = element / 4 * 8 + column;
                    let mut sum = match (product.accumulate, half) {
                        (false, _) => 0.0,
                        (true, true) => format::f16_to_f32((old >> (16 * part)) as u16),
                        (true, false) => f32::from_bits(old),
                    };
                    let (x, y) = (&left[row * k..][..k], &right[column * k..][..k]);
                    for (x, y) in x.iter().zip(y) {
                        sum += if op.negate_a != op.negate_b { -x * y } else { x * y };
                    }
                    bits |= if half {
                        u32::from(format::f32_to_f16(sum)) << (16 * part)
                    } else {
                        canonical(sum).to_bits()
                    };
                }
                frame.row_mut(op.d[register])[lane] = u64::from(bits);
            }
        }
        Ok(())
    }

    /// Returns the warp's 16 rows of A, each of k values.
    fn left(&self, warp: &Warp, product: &Product) -> Vec<f32> {
        let op = &product.op;
        let k = op.k as usize;
        match &product.a {
            Left::Shared(descriptor) => {
                let all = self.operand(warp, descriptor, op.a_ty, major(op.trans_a), (64, k));
                let first = warp.index as usize % 4 * ROWS * k;
                all[first..first + ROWS * k].to_vec()
            }
            Left::Registers(rows) => {
                let mut out = vec![0.0; ROWS * k];
                let bits = bytes_of(op.a_ty) * 8;
                let pack = 32 / bits;
                for lane in 0..32 {
                    for (register, row) in rows.iter().enumerate() {
                        for part in 0..pack {
                            let (m, at) = fragment::a(pack, 16, lane, register, part);
                            let value = (u64::from(row[lane]) >> (bits * part)) as u32;
                            let value = if bits == 32 { value } else { value & ((1 << bits) - 1) };
                            out[m * k + at] = decode(op.a_ty, value);
                        }
                    }
                }
                out
            }
        }
    }

    /// Returns an operand in shared memory as `mn` rows of k values.
    fn operand(&self, warp: &Warp, descriptor: &Descriptor, ty: Ty, major: Major, size: (usize, usize)) -> Vec<f32> {
        let (mn, k) = size;
        let bytes = bytes_of(ty);
        let shared = &self.ctas[warp.cta].shared;
        let mut out = vec![0.0; mn * k];
        for (address, row, column) in descriptor.chunks(major, bytes, mn, k) {
            let at = address as usize;
            if at + CHUNK_BYTES > shared.len() {
                continue;
            }
            for (index, element) in shared.bytes(at, CHUNK_BYTES).chunks_exact(bytes).enumerate() {
                let value = decode(ty, crate::memory::shared::load(element) as u32);
                let (row, column) = match major {
                    Major::K => (row, column + index),
                    Major::Mn => (row + index, column),
                };
                out[row * k + column] = value;
            }
        }
        out
    }
}

/// Adds a product of integers to its accumulators, wrapping or saturating.
fn integer_sums(frame: &mut Frame, product: &Product, left: &[f32], right: &[f32]) {
    let op = &product.op;
    let k = op.k as usize;
    for (register, row) in op.d.iter().enumerate() {
        for lane in 0..32 {
            let (m, n) = fragment::c(lane, register % 4);
            let (x, y) = (&left[m * k..][..k], &right[(register / 4 * 8 + n) * k..][..k]);
            let old = frame.row(*row)[lane] as u32 as i32;
            let mut sum = if product.accumulate { i64::from(old) } else { 0 };
            for (x, y) in x.iter().zip(y) {
                sum += (*x as i64) * (*y as i64);
            }
            let sum = if op.satfinite {
                sum.clamp(i64::from(i32::MIN), i64::from(i32::MAX)) as i32
            } else {
                sum as i32
            };
            frame.row_mut(*row)[lane] = u64::from(sum as u32);
        }
    }
}
