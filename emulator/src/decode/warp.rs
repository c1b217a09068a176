//! Instructions in which lanes, warps or blocks synchronise: shuffles, votes, barriers, mbarriers.

use super::modifiers::Modifiers;
use super::operand::{count, operand};
use super::{Decoder, Failure, fail};
use crate::isa::types::{PRED_SINK, SINK, Slot, Ty};
use crate::isa::{BarrierOp, BarrierRed, MbarrierOp, Op, Phase, ReduxOp, ShflMode, VoteMode, WarpOp};
use crate::parse::ast::{Instruction, Operand};

type Decoded = Result<Option<Op>, Failure>;

fn need(m: &mut Modifiers<'_>, word: &str) -> Result<(), Failure> {
    if m.take(word) {
        return Ok(());
    }
    fail(format!("`.{word}` is missing"))
}

impl<'a> Decoder<'_, 'a> {
    pub(super) fn warp(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Decoded {
        let op = match i.opcode {
            "shfl" => Op::Warp(self.shfl(i, m)?),
            "vote" => Op::Warp(self.vote(i, m)?),
            "match" => Op::Warp(self.matching(i, m)?),
            "redux" => Op::Warp(self.redux(i, m)?),
            "activemask" => {
                m.ty()?;
                let dst = self.dst_of(operand(i, 0)?, Ty::B32)?;
                Op::Warp(WarpOp::Activemask { dst })
            }
            "elect" => Op::Warp(self.elect(i, m)?),
            "bar" | "barrier" if m.take("warp") => {
                need(m, "sync")?;
                count(i, 1..=1)?;
                let members = self.src(operand(i, 0)?, Ty::B32)?;
                Op::Warp(WarpOp::Sync { members })
            }
            "barrier" if m.take("cluster") => Op::Barrier(self.cluster_barrier(m)?),
            "bar" | "barrier" => Op::Barrier(self.barrier(i, m)?),
            "setmaxnreg" => Op::Barrier(self.set_max_registers(i, m)?),
            "mbarrier" => Op::Mbarrier(self.mbarrier(i, m)?),
            _ => return Ok(None),
        };
        Ok(Some(op))
    }

    fn shfl(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<WarpOp, Failure> {
        need(m, "sync")?;
        let mode = m.need(
            "the mode",
            &[
                ("up", ShflMode::Up),
                ("down", ShflMode::Down),
                ("bfly", ShflMode::Bfly),
                ("idx", ShflMode::Idx),
            ],
        )?;
        if m.ty()?.bits() != 32 {
            return fail("only b32 is known");
        }
        count(i, 5..=5)?;
        let (dst, p) = self.dst_and_pred(operand(i, 0)?)?;
        Ok(WarpOp::Shfl {
            mode,
            dst,
            p,
            a: self.src(operand(i, 1)?, Ty::B32)?,
            b: self.src(operand(i, 2)?, Ty::B32)?,
            c: self.src(operand(i, 3)?, Ty::B32)?,
            members: self.src(operand(i, 4)?, Ty::B32)?,
        })
    }

    /// Decodes `d` or `d|p`.
    fn dst_and_pred(&mut self, operand: &Operand<'a>) -> Result<(Slot, Slot), Failure> {
        match operand {
            Operand::Pair(d, p) => Ok((self.dst_of(d, Ty::B32)?, self.pred_dst(p)?)),
            d => Ok((self.dst_of(d, Ty::B32)?, PRED_SINK)),
        }
    }

    fn vote(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<WarpOp, Failure> {
        need(m, "sync")?;
        let mode = m.need(
            "the mode",
            &[
                ("all", VoteMode::All),
                ("any", VoteMode::Any),
                ("uni", VoteMode::Uni),
                ("ballot", VoteMode::Ballot),
            ],
        )?;
        let ty = m.ty()?;
        count(i, 3..=3)?;
        let dst = match (mode, ty) {
            (VoteMode::Ballot, Ty::B32) => self.dst_of(operand(i, 0)?, Ty::B32)?,
            (VoteMode::All | VoteMode::Any | VoteMode::Uni, Ty::Pred) => self.pred_dst(operand(i, 0)?)?,
            _ => return fail("the mode and the type do not go together"),
        };
        Ok(WarpOp::Vote {
            mode,
            dst,
            src: self.pred(operand(i, 1)?)?,
            members: self.src(operand(i, 2)?, Ty::B32)?,
        })
    }

    fn matching(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<WarpOp, Failure> {
        let all = m.need("`.any` or `.all`", &[("any", false), ("all", true)])?;
        need(m, "sync")?;
        let ty = m.ty()?;
        count(i, 3..=3)?;
        let (dst, p) = self.dst_and_pred(operand(i, 0)?)?;
        let a = self.src(operand(i, 1)?, ty)?;
        let members = self.src(operand(i, 2)?, Ty::B32)?;
        let bits = ty.bits();
        Ok(if all {
            WarpOp::MatchAll {
                bits,
                dst,
                p,
                a,
                members,
            }
        } else {
            WarpOp::MatchAny { bits, dst, a, members }
        })
    }

    fn redux(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<WarpOp, Failure> {
        need(m, "sync")?;
        let op = m.need(
            "the operation",
            &[
                ("add", ReduxOp::Add),
                ("min", ReduxOp::Min),
                ("max", ReduxOp::Max),
                ("and", ReduxOp::And),
                ("or", ReduxOp::Or),
                ("xor", ReduxOp::Xor),
            ],
        )?;
        let ty = m.ty()?;
        if !matches!(ty, Ty::B32 | Ty::U32 | Ty::S32) {
            return fail("only b32, u32 and s32 are known");
        }
        count(i, 3..=3)?;
        Ok(WarpOp::Redux {
            op,
            signed: ty.signed(),
            dst: self.dst_of(operand(i, 0)?, ty)?,
            a: self.src(operand(i, 1)?, ty)?,
            members: self.src(operand(i, 2)?, Ty::B32)?,
        })
    }

    fn elect(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<WarpOp, Failure> {
        need(m, "sync")?;
        count(i, 2..=2)?;
        let (dst, p) = self.dst_and_pred(operand(i, 0)?)?;
        Ok(WarpOp::Elect {
            dst,
            p,
            members: self.src(operand(i, 1)?, Ty::B32)?,
        })
    }

    fn cluster_barrier(&mut self, m: &mut Modifiers<'a>) -> Result<BarrierOp, Failure> {
        for order in ["release", "relaxed", "acquire"] {
            m.take(order);
        }
        let arrive = m.need("`.arrive` or `.wait`", &[("arrive", true), ("wait", false)])?;
        let aligned = m.take("aligned");
        Ok(if arrive {
            BarrierOp::ClusterArrive { aligned }
        } else {
            BarrierOp::ClusterWait { aligned }
        })
    }

    fn barrier(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<BarrierOp, Failure> {
        m.take("cta");
        let aligned = m.take("aligned") || i.opcode == "bar";
        if m.take("arrive") {
            count(i, 2..=2)?;
            return Ok(BarrierOp::Arrive {
                id: self.src(operand(i, 0)?, Ty::B32)?,
                count: self.src(operand(i, 1)?, Ty::B32)?,
                aligned,
            });
        }
        if m.take("sync") {
            count(i, 1..=2)?;
            return Ok(BarrierOp::Sync {
                id: self.src(operand(i, 0)?, Ty::B32)?,
                count: match i.operands.get(1) {
                    Some(operand) => Some(self.src(operand, Ty::B32)?),
                    None => None,
                },
                aligned,
            });
        }
        need(m, "red")?;
        let op = m.need(
            "the reduction",
            &[
                ("and", BarrierRed::And),
                ("or", BarrierRed::Or),
                ("popc", BarrierRed::Popc),
            ],
        )?;
        m.ty()?;
        count(i, 3..=4)?;
        let dst = if op == BarrierRed::Popc {
            self.dst_of(operand(i, 0)?, Ty::B32)?
        } else {
            self.pred_dst(operand(i, 0)?)?
        };
        let last = i.operands.len() - 1;
        Ok(BarrierOp::Red {
            op,
            id: self.src(operand(i, 1)?, Ty::B32)?,
            count: if last == 3 {
                Some(self.src(operand(i, 2)?, Ty::B32)?)
            } else {
                None
            },
            aligned,
            dst,
            src: self.pred(operand(i, last)?)?,
        })
    }

    fn set_max_registers(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<BarrierOp, Failure> {
        let increase = m.need("`.inc` or `.dec`", &[("inc", true), ("dec", false)])?;
        need(m, "sync")?;
        need(m, "aligned")?;
        m.ty()?;
        let count = self.literal(operand(i, 0)?)?;
        if !(24..=256).contains(&count) || count % 8 != 0 {
            return fail("the register count is a multiple of 8 from 24 to 256");
        }
        Ok(BarrierOp::SetMaxReg {
            increase,
            count: count as u32,
        })
    }

    fn mbarrier(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<MbarrierOp, Failure> {
        let action = m.next().unwrap_or("");
        for word in ["release", "acquire", "relaxed", "cta", "cluster"] {
            m.take(word);
        }
        if action == "pending_count" {
            m.ty()?;
            count(i, 2..=2)?;
            return Ok(MbarrierOp::PendingCount {
                dst: self.dst_of(operand(i, 0)?, Ty::B32)?,
                state: self.src(operand(i, 1)?, Ty::B64)?,
            });
        }
        let mut expect_tx = false;
        let mut no_complete = false;
        let mut parity = false;
        match action {
            "arrive" | "arrive_drop" => {
                expect_tx = m.take("expect_tx");
                no_complete = m.take("noComplete");
            }
            "test_wait" | "try_wait" => parity = m.take("parity"),
            _ => {}
        }
        let space = super::memory::space(m);
        if m.ty()? != Ty::B64 {
            return fail("the type is b64");
        }
        match action {
            "init" => {
                count(i, 2..=2)?;
                Ok(MbarrierOp::Init {
                    addr: self.addr(operand(i, 0)?, space)?,
                    count: self.src(operand(i, 1)?, Ty::B32)?,
                })
            }
            "inval" => Ok(MbarrierOp::Inval {
                addr: self.addr(operand(i, 0)?, space)?,
            }),
            "expect_tx" => Ok(MbarrierOp::ExpectTx {
                addr: self.addr(operand(i, 0)?, space)?,
                bytes: self.src(operand(i, 1)?, Ty::B32)?,
            }),
            "complete_tx" => Ok(MbarrierOp::CompleteTx {
                addr: self.addr(operand(i, 0)?, space)?,
                bytes: self.src(operand(i, 1)?, Ty::B32)?,
            }),
            "arrive" | "arrive_drop" => {
                let drop = action == "arrive_drop";
                self.arrive(i, space, expect_tx, no_complete, drop)
            }
            "test_wait" | "try_wait" => {
                let suspends = action == "try_wait";
                count(i, 3..=3 + usize::from(suspends))?;
                let third = operand(i, 2)?;
                Ok(MbarrierOp::Wait {
                    done: self.pred_dst(operand(i, 0)?)?,
                    addr: self.addr(operand(i, 1)?, space)?,
                    phase: if parity {
                        Phase::Parity(self.src(third, Ty::B32)?)
                    } else {
                        Phase::Token(self.src(third, Ty::B64)?)
                    },
                })
            }
            _ => fail(format!("`mbarrier.{action}` is not known")),
        }
    }

    fn arrive(
        &mut self,
        i: &Instruction<'a>,
        space: crate::isa::types::Space,
        expect_tx: bool,
        no_complete: bool,
        drop: bool,
    ) -> Result<MbarrierOp, Failure> {
        // The state operand may be left out for a remote barrier.
        let at = usize::from(!matches!(operand(i, 0)?, Operand::Address { .. }));
        count(i, at + 1..=at + 2)?;
        let state = if at == 1 { self.dst(operand(i, 0)?)?.slot } else { SINK };
        let third = match i.operands.get(at + 1) {
            Some(operand) => Some(self.src(operand, Ty::B32)?),
            None => None,
        };
        if (expect_tx || no_complete) && third.is_none() {
            return fail("the count is missing");
        }
        Ok(MbarrierOp::Arrive {
            addr: self.addr(operand(i, at)?, space)?,
            count: if expect_tx { None } else { third },
            expect: if expect_tx { third } else { None },
            drop,
            state,
        })
    }
}
