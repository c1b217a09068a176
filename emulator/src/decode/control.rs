//! Branches, calls, and other instructions that change the instruction pointer.

use super::modifiers::Modifiers;
use super::operand::{count, operand};
use super::scope::Entity;
use super::{Decoder, Failure, fail};
use crate::isa::types::Ty;
use crate::isa::{CallTarget, Control, Op, Passed};
use crate::parse::ast::{Instruction, Operand};

type Decoded = Result<Option<Op>, Failure>;

impl<'a> Decoder<'_, 'a> {
    pub(super) fn control(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Decoded {
        let control = match i.opcode {
            "bra" => {
                m.take("uni");
                count(i, 1..=1)?;
                let Operand::Name(name) = operand(i, 0)? else {
                    return fail("expected a label");
                };
                let target = self.label(name)?;
                Control::Bra { target }
            }
            "brx" => self.brx(i, m)?,
            "call" => self.call(i, m)?,
            "ret" => {
                m.take("uni");
                count(i, 0..=0)?;
                if self.is_entry { Control::Exit } else { Control::Ret }
            }
            "exit" => Control::Exit,
            "trap" | "brkpt" => Control::Trap,
            "nanosleep" => {
                m.ty()?;
                self.src(operand(i, 0)?, Ty::B32)?;
                Control::Nanosleep
            }
            "alloca" => {
                m.ty()?;
                count(i, 2..=3)?;
                let align = match i.operands.get(2) {
                    Some(operand) => self.literal(operand)?,
                    None => 8,
                };
                if !align.is_power_of_two() || align > 1 << 20 {
                    return fail("the alignment is not a usable power of two");
                }
                Control::Alloca {
                    dst: self.dst_of(operand(i, 0)?, Ty::B32)?,
                    size: self.src(operand(i, 1)?, Ty::B32)?,
                    align,
                }
            }
            "stacksave" => {
                m.ty()?;
                let dst = self.dst_of(operand(i, 0)?, Ty::B32)?;
                Control::StackSave { dst }
            }
            "stackrestore" => {
                m.ty()?;
                let src = self.src(operand(i, 0)?, Ty::B32)?;
                Control::StackRestore { src }
            }
            "pmevent" => {
                m.take("mask");
                return Ok(Some(Op::Nop));
            }
            "griddepcontrol" => {
                // Launches never overlap here, so both halves always hold.
                m.need("the action", &[("launch_dependents", ()), ("wait", ())])?;
                return Ok(Some(Op::Nop));
            }
            _ => return Ok(None),
        };
        Ok(Some(Op::Control(control)))
    }

    /// Returns the label's id, which `finish` turns into an instruction index.
    fn label(&self, name: &str) -> Result<u32, Failure> {
        match self.lookup(name) {
            Some(Entity::Label(id)) => Ok(*id),
            _ => fail(format!("`{name}` is not a label")),
        }
    }

    fn brx(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Control, Failure> {
        if !m.take("idx") {
            return fail("`.idx` is missing");
        }
        m.take("uni");
        count(i, 2..=2)?;
        let index = self.src(operand(i, 0)?, Ty::U32)?;
        let Operand::Name(name) = operand(i, 1)? else {
            return fail("expected a list of branch targets");
        };
        let Some(Entity::Targets(list)) = self.lookup(name).cloned() else {
            return fail(format!("`{name}` is not a list of branch targets"));
        };
        let targets: Result<Vec<u32>, _> = list.iter().map(|l| self.label(l)).collect();
        Ok(Control::Brx {
            index,
            targets: targets?.into(),
        })
    }

    fn call(&mut self, i: &Instruction<'a>, m: &mut Modifiers<'a>) -> Result<Control, Failure> {
        m.take("uni");
        let mut rest = i.operands.as_slice();
        let mut returns = Vec::new();
        if let [Operand::List(list), tail @ ..] = rest {
            returns = self.passed_list(list)?;
            rest = tail;
        }
        let [Operand::Name(name), tail @ ..] = rest else {
            return fail("expected a function");
        };
        let mut args = Vec::new();
        let mut tail = tail;
        if let [Operand::List(list), after @ ..] = tail {
            args = self.passed_list(list)?;
            tail = after;
        }
        let target = match self.symbols.functions.get(*name) {
            Some(index) => {
                self.out.calls.push(*index);
                CallTarget::Direct(*index)
            }
            None if tail.len() == 1 => {
                self.out.calls_indirectly = true;
                CallTarget::Indirect(self.src(&Operand::Name(name), Ty::B64)?)
            }
            None => return fail(format!("function `{name}` is not declared")),
        };
        Ok(Control::Call {
            target,
            args: args.into(),
            returns: returns.into(),
        })
    }

    fn passed_list(&mut self, list: &[Operand<'a>]) -> Result<Vec<Passed>, Failure> {
        list.iter().map(|o| self.passed(o)).collect()
    }
}
