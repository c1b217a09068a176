//! Instructions of operations on one value and on two.

use crate::program::scope::{Class, Scope};
use crate::program::text::{Factor, Slot};
use crate::program::{Binary, NodeId, Type, Unary};

use super::stage::Stage;
use super::{Point, Printer, real};

impl Printer<'_> {
    pub(super) fn unary(&self, operation: Unary, type_: Type, x: &str, scope: &mut Scope) -> String {
        let is_score = type_ == Type::Score;
        let plain = |name: &str, scope: &mut Scope| scope.result(Class::B32, name, &[x]);
        match operation {
            Unary::Negate => plain(if is_score { "neg.f32" } else { "neg.s32" }, scope),
            Unary::Abs => plain(if is_score { "abs.f32" } else { "abs.s32" }, scope),
            Unary::Exp => self.exp(x, scope),
            Unary::Log => {
                let log2 = plain("lg2.approx.f32", scope);
                scope.result(Class::B32, "mul.rn.f32", &[&log2, &real(std::f32::consts::LN_2)])
            }
            Unary::Tanh => self.tanh(x, scope),
            Unary::Sqrt => plain("sqrt.approx.f32", scope),
            Unary::Reciprocal => plain("rcp.approx.f32", scope),
            Unary::Floor => plain("cvt.rmi.f32.f32", scope),
            Unary::ToScore => plain("cvt.rn.f32.s32", scope),
            Unary::ToIndex => plain("cvt.rmi.s32.f32", scope),
            Unary::Not if type_ == Type::Truth => scope.result(Class::Predicate, "not.pred", &[x]),
            Unary::Not => plain("not.b32", scope),
        }
    }

    /// e^x as `2^(x * log2(e))`. The rounding of the product makes the power wrong by about `|x| * 2^-24` of it.
    pub(super) fn exp(&self, x: &str, scope: &mut Scope) -> String {
        let log2_e = real(std::f32::consts::LOG2_E);
        let exponent = scope.result(Class::B32, "mul.rn.f32", &[x, &log2_e]);
        scope.result(Class::B32, "ex2.approx.f32", &[&exponent])
    }

    /// The hyperbolic tangent. `tanh.approx` is right to 2^-11, as 16-bit scores are; else `1 - 2 / (1 + e^2x)`.
    fn tanh(&self, x: &str, scope: &mut Scope) -> String {
        if !self.exact {
            return scope.result(Class::B32, "tanh.approx.f32", &[x]);
        }
        let exponent = scope.result(Class::B32, "mul.rn.f32", &[x, &real(2.0 * std::f32::consts::LOG2_E)]);
        let power = scope.result(Class::B32, "ex2.approx.f32", &[&exponent]);
        let sum = scope.result(Class::B32, "add.rn.f32", &[&power, &real(1.0)]);
        let inverse = scope.result(Class::B32, "rcp.approx.f32", &[&sum]);
        scope.result(Class::B32, "fma.rn.f32", &[&inverse, &real(-2.0), &real(1.0)])
    }

    pub(super) fn binary(
        &mut self,
        operation: Binary,
        x: NodeId,
        y: NodeId,
        point: Point<'_>,
        scope: &mut Scope,
    ) -> String {
        match self.type_of(x) {
            Type::Score => self.binary_of_scores(operation, x, y, point, scope),
            Type::Index => {
                let (x, y) = (self.value(x, point, scope), self.value(y, point, scope));
                binary_of_indices(operation, &x, &y, scope)
            }
            Type::Truth => {
                let (x, y) = (self.value(x, point, scope), self.value(y, point, scope));
                let name = match operation {
                    Binary::And => "and.pred",
                    Binary::Or => "or.pred",
                    Binary::Xor => "xor.pred",
                    _ => unreachable!("{operation:?} of truths is not traced"),
                };
                scope.result(Class::Predicate, name, &[&x, &y])
            }
        }
    }

    fn binary_of_scores(
        &mut self,
        operation: Binary,
        x: NodeId,
        y: NodeId,
        point: Point<'_>,
        scope: &mut Scope,
    ) -> String {
        let name = match operation {
            Binary::Add | Binary::Subtract => {
                let signs = if operation == Binary::Add {
                    (false, false)
                } else {
                    (false, true)
                };
                for (product, other, minus, less) in [(x, y, signs.0, signs.1), (y, x, signs.1, signs.0)] {
                    if let Some([a, b]) = self.product(product, minus, point, scope) {
                        let mut other = self.value(other, point, scope);
                        if less {
                            other = scope.result(Class::B32, "neg.f32", &[&other]);
                        }
                        return scope.result(Class::B32, "fma.rn.f32", &[&a, &b, &other]);
                    }
                }
                if operation == Binary::Add {
                    "add.rn.f32"
                } else {
                    "sub.rn.f32"
                }
            }
            Binary::Multiply => "mul.rn.f32",
            Binary::Divide if self.stage(y) == Stage::Call => {
                let x = self.value(x, point, scope);
                let inverse = self.slot(Slot::Product(vec![Factor::Inverse(y)]), Class::B32, scope);
                return scope.result(Class::B32, "mul.rn.f32", &[&x, &inverse]);
            }
            Binary::Divide => "div.full.f32",
            Binary::Min => "min.f32",
            Binary::Max => "max.f32",
            _ => unreachable!("{operation:?} of scores is not traced"),
        };
        let (x, y) = (self.value(x, point, scope), self.value(y, point, scope));
        scope.result(Class::B32, name, &[&x, &y])
    }
}

fn binary_of_indices(operation: Binary, x: &str, y: &str, scope: &mut Scope) -> String {
    let name = match operation {
        Binary::Add => "add.s32",
        Binary::Subtract => "sub.s32",
        Binary::Multiply => "mul.lo.s32",
        Binary::Min => "min.s32",
        Binary::Max => "max.s32",
        Binary::And => "and.b32",
        Binary::Or => "or.b32",
        Binary::Xor => "xor.b32",
        Binary::Divide | Binary::Remainder => return euclid(operation, x, y, scope),
        Binary::ShiftLeft | Binary::ShiftRight => {
            let by = scope.result(Class::B32, "and.b32", &[y, "31"]);
            let name = if operation == Binary::ShiftLeft {
                "shl.b32"
            } else {
                "shr.s32"
            };
            return scope.result(Class::B32, name, &[x, &by]);
        }
    };
    scope.result(Class::B32, name, &[x, y])
}

/// The Euclidean quotient or remainder, for a positive divisor.
fn euclid(operation: Binary, x: &str, y: &str, scope: &mut Scope) -> String {
    let quotient = scope.result(Class::B32, "div.s32", &[x, y]);
    let product = scope.result(Class::B32, "mul.lo.s32", &[&quotient, y]);
    let rest = scope.result(Class::B32, "sub.s32", &[x, &product]);
    let below = scope.result(Class::Predicate, "setp.lt.s32", &[&rest, "0"]);
    let (value, name, by) = match operation {
        Binary::Divide => (quotient, "sub.s32", "1"),
        _ => (rest, "add.s32", y),
    };
    let moved = scope.result(Class::B32, name, &[&value, by]);
    scope.result(Class::B32, "selp.b32", &[&moved, &value, &below])
}
