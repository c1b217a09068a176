//! Shuffles, votes, matches and reductions among the lanes of a warp.

use super::alu::truncate;
use super::warp::{Warp, lanes};
use super::{Cluster, Flow, Step};
use crate::isa::types::Slot;
use crate::isa::{Instr, ReduxOp, VoteMode, WarpOp};
use crate::report::FindingKind;

/// Returns the row that holds the member mask of an instruction that has one.
pub(super) fn members_of(op: &WarpOp) -> Option<Slot> {
    match op {
        WarpOp::Shfl { members, .. }
        | WarpOp::Vote { members, .. }
        | WarpOp::MatchAny { members, .. }
        | WarpOp::MatchAll { members, .. }
        | WarpOp::Redux { members, .. }
        | WarpOp::Elect { members, .. }
        | WarpOp::Sync { members } => Some(*members),
        WarpOp::Activemask { .. } => None,
    }
}

impl<'m> Cluster<'m> {
    pub(super) fn warp_op(&mut self, warp: &mut Warp, instr: &Instr, op: &WarpOp, mask: u32) -> Step {
        if let WarpOp::Activemask { dst } = op {
            let row = warp.frame_mut().row_mut(*dst);
            for lane in lanes(mask) {
                row[lane] = u64::from(mask);
            }
            return Ok(Flow::Next);
        }
        let Some(slot) = members_of(op) else {
            return Ok(Flow::Next);
        };
        // Lanes of one group may have different masks: the lanes of each mask perform an operation of their own.
        let rows = *warp.frame().row(slot);
        let mut left = mask;
        while left != 0 {
            let members = rows[left.trailing_zeros() as usize] as u32;
            let same = lanes(left).filter(|l| rows[*l] as u32 == members);
            let same = same.fold(0, |m, l| m | 1 << l);
            left &= !same;
            self.check_members(warp, instr, members, same);
            exchange(warp, op, same);
        }
        Ok(Flow::Next)
    }

    fn check_members(&mut self, warp: &Warp, instr: &Instr, members: u32, here: u32) {
        let strangers = here & !members;
        let actor = self.actor(warp);
        if strangers != 0 {
            let lane = strangers.trailing_zeros() as usize;
            self.report(
                FindingKind::BarrierDivergence,
                instr.line,
                actor,
                (Some(lane), None),
                || format!("executed by a lane that is not in its member mask {members:#010x}"),
            );
        }
        let missing = warp.expected(members) & !here;
        if missing != 0 {
            let lane = missing.trailing_zeros() as usize;
            self.report(
                FindingKind::BarrierDivergence,
                instr.line,
                actor,
                (Some(lane), None),
                || format!("the member mask {members:#010x} names lanes {missing:#010x}, which do not execute it"),
            );
        }
    }
}

/// Performs one operation among the lanes `here`.
fn exchange(warp: &mut Warp, op: &WarpOp, here: u32) {
    let f = warp.frame_mut();
    match op {
        WarpOp::Shfl {
            mode, dst, p, a, b, c, ..
        } => {
            let (source, b, c) = (*f.row(*a), *f.row(*b), *f.row(*c));
            let (out, valid) = mode.shuffle(&source, &b, &c, here);
            let row = f.row_mut(*dst);
            for lane in lanes(here) {
                row[lane] = out[lane];
            }
            f.set_pred(*p, here, valid);
        }
        WarpOp::Vote { mode, dst, src, .. } => {
            let votes = f.pred(*src) & here;
            let answer = match mode {
                VoteMode::All => votes == here,
                VoteMode::Any => votes != 0,
                VoteMode::Uni => votes == here || votes == 0,
                VoteMode::Ballot => {
                    let row = f.row_mut(*dst);
                    for lane in lanes(here) {
                        row[lane] = u64::from(votes);
                    }
                    return;
                }
            };
            f.set_pred(*dst, here, if answer { u32::MAX } else { 0 });
        }
        WarpOp::MatchAny { bits, dst, a, .. } => {
            let source = f.row(*a).map(|v| truncate(*bits, v));
            let row = f.row_mut(*dst);
            for lane in lanes(here) {
                let same = lanes(here).filter(|l| source[*l] == source[lane]);
                row[lane] = same.fold(0, |m, l| m | 1 << l);
            }
        }
        WarpOp::MatchAll { bits, dst, p, a, .. } => {
            let source = f.row(*a).map(|v| truncate(*bits, v));
            let first = source[here.trailing_zeros() as usize];
            let all = lanes(here).all(|l| source[l] == first);
            let row = f.row_mut(*dst);
            for lane in lanes(here) {
                row[lane] = if all { u64::from(here) } else { 0 };
            }
            f.set_pred(*p, here, if all { u32::MAX } else { 0 });
        }
        WarpOp::Redux { op, signed, dst, a, .. } => {
            let source = *f.row(*a);
            let values = lanes(here).map(|l| source[l] as u32);
            let result = values.reduce(|x, y| reduce(*op, *signed, x, y));
            let row = f.row_mut(*dst);
            for lane in lanes(here) {
                row[lane] = u64::from(result.unwrap_or(0));
            }
        }
        WarpOp::Elect { dst, p, .. } => {
            let leader = here.trailing_zeros();
            let row = f.row_mut(*dst);
            for lane in lanes(here) {
                row[lane] = u64::from(leader);
            }
            f.set_pred(*p, here, 1 << leader);
        }
        WarpOp::Sync { .. } | WarpOp::Activemask { .. } => {}
    }
}

fn reduce(op: ReduxOp, signed: bool, x: u32, y: u32) -> u32 {
    match op {
        ReduxOp::Add => x.wrapping_add(y),
        ReduxOp::Min if signed => (x as i32).min(y as i32) as u32,
        ReduxOp::Max if signed => (x as i32).max(y as i32) as u32,
        ReduxOp::Min => x.min(y),
        ReduxOp::Max => x.max(y),
        ReduxOp::And => x & y,
        ReduxOp::Or => x | y,
        ReduxOp::Xor => x ^ y,
    }
}
