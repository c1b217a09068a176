//! Floating-point arithmetic over the rows of a frame. [`numeric`](crate::numeric) defines each operation.

use super::alu::{map, map2, map3};
use super::warp::Frame;
use crate::isa::types::{FloatMode, FloatTy, Slot};
use crate::isa::{Alu, Cmp, Float1, Float2, MinMax};
use crate::numeric::Rounding;
use crate::numeric::approx::{self, Function};
use crate::numeric::float16::{self, Clamp, Half, HalfMode};
use crate::numeric::float32::{self, Mixed, Mode};
use crate::numeric::float64;
use crate::numeric::format;
use crate::numeric::minmax::{Extremum, MinMaxMode};

#[inline]
fn single(x: u64) -> f32 {
    f32::from_bits(x as u32)
}

#[inline]
fn bits(x: f32) -> u64 {
    u64::from(x.to_bits())
}

#[inline]
fn double(x: u64) -> f64 {
    f64::from_bits(x)
}

fn mode32(mode: FloatMode) -> Mode {
    Mode {
        rounding: mode.rounding,
        ftz: mode.ftz,
        sat: mode.sat,
    }
}

fn mode16(mode: FloatMode, relu: bool) -> HalfMode {
    HalfMode {
        ftz: mode.ftz,
        clamp: match (mode.sat, relu) {
            (true, _) => Clamp::Saturate,
            (false, true) => Clamp::Relu,
            (false, false) => Clamp::None,
        },
    }
}

fn min_max_mode(kind: MinMax, ftz: bool) -> MinMaxMode {
    MinMaxMode {
        ftz,
        nan: kind.nan,
        xorsign_abs: kind.xorsign_abs,
    }
}

/// Returns the half-precision format of a type, and true if it is packed.
fn half(ty: FloatTy) -> Option<(Half, bool)> {
    match ty {
        FloatTy::F16 => Some((Half::F16, false)),
        FloatTy::F16x2 => Some((Half::F16, true)),
        FloatTy::Bf16 => Some((Half::Bf16, false)),
        FloatTy::Bf16x2 => Some((Half::Bf16, true)),
        FloatTy::F32 | FloatTy::F64 => None,
    }
}

pub(super) fn execute(f: &mut Frame, mask: u32, alu: &Alu) {
    match alu {
        Alu::Float1 { op, ty, mode, dst, a } => float1(f, mask, *op, *ty, *mode, *dst, *a),
        Alu::Float2 {
            op,
            ty,
            mode,
            dst,
            a,
            b,
        } => match ty {
            FloatTy::F32 => float2_single(f, mask, *op, *mode, *dst, [*a, *b]),
            FloatTy::F64 => float2_double(f, mask, *op, *mode, *dst, [*a, *b]),
            _ => float2_half(f, mask, (*op, *ty, *mode), *dst, [*a, *b]),
        },
        Alu::MinMax3 {
            max,
            abs,
            kind,
            mode,
            dst,
            a,
            b,
            c,
        } => {
            let which = if *max { Extremum::Max } else { Extremum::Min };
            let how = min_max_mode(*kind, mode.ftz);
            let abs = *abs;
            map3(f, mask, *dst, [*a, *b, *c], |x, y, z| {
                let [x, y, z] = [x, y, z].map(|v| {
                    let v = single(v);
                    if abs { v.abs() } else { v }
                });
                let first = float32::min_max(which, x, y, how);
                bits(float32::min_max(which, first, z, how))
            });
        }
        Alu::Fma { .. } => fma(f, mask, alu),
        Alu::MixedFma {
            bf16,
            mode,
            dst,
            a,
            b,
            c,
        } => {
            let half = if *bf16 { Half::Bf16 } else { Half::F16 };
            let mode = mode32(*mode);
            map3(f, mask, *dst, [*a, *b, *c], |x, y, z| {
                let (x, y) = (half.decode(x as u16), half.decode(y as u16));
                bits(float32::mixed(Mixed::Fma, x, y, single(z), mode))
            });
        }
        Alu::MixedAdd {
            bf16,
            subtract,
            mode,
            dst,
            a,
            c,
        } => {
            let half = if *bf16 { Half::Bf16 } else { Half::F16 };
            let mode = mode32(*mode);
            let op = if *subtract { Mixed::Sub } else { Mixed::Add };
            map2(f, mask, *dst, [*a, *c], |x, z| {
                bits(float32::mixed(op, half.decode(x as u16), 1.0, single(z), mode))
            });
        }
        Alu::TestP { op, ty, dst, a } => {
            let row = *f.row(*a);
            let mut value = 0;
            for (lane, x) in row.iter().enumerate() {
                let holds = match ty {
                    FloatTy::F64 => float64::testp(*op, double(*x)),
                    _ => float32::testp(*op, single(*x)),
                };
                value |= u32::from(holds) << lane;
            }
            f.set_pred(*dst, mask, value);
        }
        _ => unreachable!("only floating-point instructions come here"),
    }
}

fn float1(f: &mut Frame, mask: u32, op: Float1, ty: FloatTy, mode: FloatMode, d: Slot, a: Slot) {
    match ty {
        FloatTy::F32 => float1_single(f, mask, op, mode, d, a),
        FloatTy::F64 => float1_double(f, mask, op, mode, d, a),
        _ => {
            let Some((half, _)) = half(ty) else { return };
            let ftz = mode.ftz;
            map(f, mask, d, a, |x| {
                let of = |x: u16| match op {
                    Float1::Abs => half.abs(x, ftz),
                    Float1::Neg => half.neg(x, ftz),
                    Float1::TanhApprox => half.tanh(x),
                    _ => half.ex2(x, ftz),
                };
                halves(ty, float16::map1(x as u32, of))
            });
        }
    }
}

/// Keeps a packed result as it is and clears the upper half of a scalar one.
fn halves(ty: FloatTy, value: u32) -> u64 {
    match ty {
        FloatTy::F16x2 | FloatTy::Bf16x2 => u64::from(value),
        _ => u64::from(value & 0xffff),
    }
}

fn float1_single(f: &mut Frame, mask: u32, op: Float1, mode: FloatMode, d: Slot, a: Slot) {
    let m = mode32(mode);
    let approx = |f: &mut Frame, function| {
        map(f, mask, d, a, |x| bits(approx::apply(function, single(x), mode.ftz)));
    };
    match op {
        Float1::Abs => map(f, mask, d, a, |x| bits(float32::abs(single(x), mode.ftz))),
        Float1::Neg => map(f, mask, d, a, |x| bits(float32::neg(single(x), mode.ftz))),
        Float1::Rcp => map(f, mask, d, a, |x| bits(float32::rcp(single(x), m))),
        Float1::Sqrt => map(f, mask, d, a, |x| bits(float32::sqrt(single(x), m))),
        Float1::RcpApprox => approx(f, Function::Rcp),
        Float1::SqrtApprox => approx(f, Function::Sqrt),
        Float1::RsqrtApprox => approx(f, Function::Rsqrt),
        Float1::SinApprox => approx(f, Function::Sin),
        Float1::CosApprox => approx(f, Function::Cos),
        Float1::Lg2Approx => approx(f, Function::Lg2),
        Float1::Ex2Approx => approx(f, Function::Ex2),
        Float1::TanhApprox => approx(f, Function::Tanh),
    }
}

fn float1_double(f: &mut Frame, mask: u32, op: Float1, mode: FloatMode, d: Slot, a: Slot) {
    let of = |x: f64| match op {
        Float1::Abs => float64::abs(x),
        Float1::Neg => float64::neg(x),
        Float1::Rcp => float64::rcp(x, mode.rounding),
        Float1::Sqrt => float64::sqrt(x, mode.rounding),
        Float1::RcpApprox => approx::rcp_f64(x),
        Float1::RsqrtApprox if mode.ftz => approx::rsqrt_ftz_f64(x),
        _ => approx::rsqrt_f64(x),
    };
    map(f, mask, d, a, |x| of(double(x)).to_bits());
}

fn float2_single(f: &mut Frame, mask: u32, op: Float2, mode: FloatMode, d: Slot, s: [Slot; 2]) {
    let m = mode32(mode);
    let extremum = |f: &mut Frame, which, kind| {
        let how = min_max_mode(kind, mode.ftz);
        map2(f, mask, d, s, |x, y| {
            bits(float32::min_max(which, single(x), single(y), how))
        });
    };
    // The most frequent mode as a constant, so that its loop has no branches.
    const PLAIN: Mode = Mode {
        rounding: Rounding::NearestEven,
        ftz: false,
        sat: false,
    };
    let plain = m == PLAIN;
    match op {
        Float2::Add if plain => map2(f, mask, d, s, |x, y| bits(float32::add(single(x), single(y), PLAIN))),
        Float2::Mul if plain => map2(f, mask, d, s, |x, y| bits(float32::mul(single(x), single(y), PLAIN))),
        Float2::Add => map2(f, mask, d, s, |x, y| bits(float32::add(single(x), single(y), m))),
        Float2::Sub => map2(f, mask, d, s, |x, y| bits(float32::sub(single(x), single(y), m))),
        Float2::Mul => map2(f, mask, d, s, |x, y| bits(float32::mul(single(x), single(y), m))),
        Float2::Div => map2(f, mask, d, s, |x, y| bits(float32::div(single(x), single(y), m))),
        Float2::DivApprox => map2(f, mask, d, s, |x, y| {
            bits(approx::div_approx(single(x), single(y), mode.ftz))
        }),
        Float2::DivFull => map2(f, mask, d, s, |x, y| {
            bits(approx::div_full(single(x), single(y), mode.ftz))
        }),
        Float2::Min(kind) => extremum(f, Extremum::Min, kind),
        Float2::Max(kind) => extremum(f, Extremum::Max, kind),
        Float2::Copysign => map2(f, mask, d, s, |x, y| bits(float32::copysign(single(x), single(y)))),
    }
}

fn float2_double(f: &mut Frame, mask: u32, op: Float2, mode: FloatMode, d: Slot, s: [Slot; 2]) {
    let r = mode.rounding;
    let of = |x, y| match op {
        Float2::Add => float64::add(x, y, r),
        Float2::Sub => float64::sub(x, y, r),
        Float2::Mul => float64::mul(x, y, r),
        Float2::Min(_) => float64::min_max(Extremum::Min, x, y),
        Float2::Max(_) => float64::min_max(Extremum::Max, x, y),
        Float2::Copysign => float64::copysign(x, y),
        Float2::Div | Float2::DivApprox | Float2::DivFull => float64::div(x, y, r),
    };
    map2(f, mask, d, s, |x, y| of(double(x), double(y)).to_bits());
}

fn float2_half(f: &mut Frame, mask: u32, what: (Float2, FloatTy, FloatMode), d: Slot, s: [Slot; 2]) {
    let (op, ty, mode) = what;
    let Some((half, _)) = half(ty) else { return };
    let m = mode16(mode, false);
    let of = |x: u16, y: u16| match op {
        Float2::Add => half.add(x, y, m),
        Float2::Sub => half.sub(x, y, m),
        Float2::Min(kind) => half.min_max(Extremum::Min, x, y, min_max_mode(kind, mode.ftz)),
        Float2::Max(kind) => half.min_max(Extremum::Max, x, y, min_max_mode(kind, mode.ftz)),
        _ => half.mul(x, y, m),
    };
    map2(f, mask, d, s, |x, y| halves(ty, float16::map2(x as u32, y as u32, of)));
}

fn fma(f: &mut Frame, mask: u32, alu: &Alu) {
    let Alu::Fma {
        ty,
        mode,
        relu,
        oob,
        dst,
        a,
        b,
        c,
    } = alu
    else {
        return;
    };
    let (d, s) = (*dst, [*a, *b, *c]);
    match ty {
        FloatTy::F32 => {
            let m = mode32(*mode);
            map3(f, mask, d, s, |x, y, z| {
                bits(float32::fma(single(x), single(y), single(z), m))
            });
        }
        FloatTy::F64 => {
            let r = mode.rounding;
            map3(f, mask, d, s, |x, y, z| {
                float64::fma(double(x), double(y), double(z), r).to_bits()
            });
        }
        _ => {
            let Some((half, _)) = half(*ty) else { return };
            let m = mode16(*mode, *relu);
            let (ty, oob) = (*ty, *oob);
            map3(f, mask, d, s, |x, y, z| {
                let of = |x, y, z| {
                    if oob {
                        half.fma_oob(x, y, z, m)
                    } else {
                        half.fma(x, y, z, m)
                    }
                };
                halves(ty, float16::map3(x as u32, y as u32, z as u32, of))
            });
        }
    }
}

/// Returns the lanes in which a comparison of element `part` holds.
pub(super) fn compare(f: &Frame, cmp: Cmp, ty: FloatTy, ftz: bool, s: [Slot; 2], part: u32) -> u32 {
    let (x, y) = (f.row(s[0]), f.row(s[1]));
    let value = |bits: u64| match ty {
        FloatTy::F64 => double(bits),
        FloatTy::F32 => {
            let x = single(bits);
            f64::from(if ftz { format::flush_f32(x) } else { x })
        }
        _ => {
            let half = half(ty).map_or(Half::F16, |(half, _)| half);
            let bits = (bits >> (16 * part)) as u16;
            let bits = if ftz {
                half.format().flush(u32::from(bits)) as u16
            } else {
                bits
            };
            f64::from(half.decode(bits))
        }
    };
    let mut out = 0;
    for lane in 0..32 {
        let (a, b) = (value(x[lane]), value(y[lane]));
        let unordered = a.is_nan() || b.is_nan();
        let holds = match cmp {
            Cmp::Eq => a == b,
            Cmp::Ne => a != b && !unordered,
            Cmp::Lt => a < b,
            Cmp::Le => a <= b,
            Cmp::Gt => a > b,
            Cmp::Ge => a >= b,
            Cmp::Equ => a == b || unordered,
            Cmp::Neu => a != b,
            Cmp::Ltu => a < b || unordered,
            Cmp::Leu => a <= b || unordered,
            Cmp::Gtu => a > b || unordered,
            Cmp::Geu => a >= b || unordered,
            Cmp::Num => !unordered,
            Cmp::Nan => unordered,
        };
        out |= u32::from(holds) << lane;
    }
    out
}
