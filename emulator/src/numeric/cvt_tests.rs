//! Expected values come from the host's own conversions, or were computed by hand.

use super::*;

const RN: CvtMode = CvtMode {
    rounding: CvtRounding::Float(Rounding::NearestEven),
    ftz: false,
    sat: false,
    relu: false,
    satfinite: false,
};

fn int_mode(rounding: IntegerRounding) -> CvtMode {
    CvtMode {
        rounding: CvtRounding::Integer(rounding),
        ..CvtMode::default()
    }
}

fn f32_to(to: Scalar, x: f32, rounding: IntegerRounding) -> i64 {
    cvt(to, Scalar::F32, u64::from(x.to_bits()), int_mode(rounding)) as i64
}

#[test]
fn integers_wrap_or_saturate_and_extend() {
    let plain = CvtMode::default();
    let sat = CvtMode { sat: true, ..plain };
    assert_eq!(cvt(Scalar::S8, Scalar::S32, 200, plain), (-56i64) as u64);
    assert_eq!(cvt(Scalar::U8, Scalar::S32, -1i32 as u32 as u64, plain), 255);
    assert_eq!(cvt(Scalar::S8, Scalar::S32, 200, sat), 127);
    assert_eq!(cvt(Scalar::U8, Scalar::S32, -5i32 as u32 as u64, sat), 0);
    assert_eq!(cvt(Scalar::S64, Scalar::S32, 0xffff_ffff, plain), u64::MAX);
    assert_eq!(cvt(Scalar::U64, Scalar::U32, 0xffff_ffff, plain), 0xffff_ffff);
    assert_eq!(cvt(Scalar::S32, Scalar::U64, u64::MAX, sat), 0x7fff_ffff);
    assert_eq!(cvt(Scalar::U64, Scalar::S64, u64::MAX, sat), 0);
    assert_eq!(cvt(Scalar::S32, Scalar::U16, 0xabcd_8000, plain), 0x8000);
}

#[test]
fn floats_to_integers_round_clamp_and_map_nan() {
    use IntegerRounding::*;
    for (x, ties, zero, down, up) in [(2.5f32, 2, 2, 2, 3), (-2.5, -2, -2, -3, -2), (3.5, 4, 3, 3, 4)] {
        assert_eq!(f32_to(Scalar::S32, x, NearestEven), ties);
        assert_eq!(f32_to(Scalar::S32, x, TowardZero), zero);
        assert_eq!(f32_to(Scalar::S32, x, Down), down);
        assert_eq!(f32_to(Scalar::S32, x, Up), up);
    }
    assert_eq!(f32_to(Scalar::S32, 3e9, TowardZero), i64::from(i32::MAX));
    assert_eq!(f32_to(Scalar::U32, -3.0, TowardZero), 0);
    assert_eq!(f32_to(Scalar::U8, 300.0, TowardZero), 255);
    assert_eq!(f32_to(Scalar::S64, f32::NEG_INFINITY, TowardZero), i64::MIN);
    assert_eq!(f32_to(Scalar::U64, f32::INFINITY, TowardZero) as u64, u64::MAX);
    assert_eq!(f32_to(Scalar::S32, f32::NAN, TowardZero), 0);
    assert_eq!(f32_to(Scalar::U64, f32::NAN, TowardZero) as u64, 1 << 63);
    let nan = f64::NAN.to_bits();
    assert_eq!(
        cvt(Scalar::S32, Scalar::F64, nan, int_mode(TowardZero)) as i64,
        i64::from(i32::MIN)
    );
    assert_eq!(cvt(Scalar::U32, Scalar::F64, nan, int_mode(TowardZero)), 1 << 31);
    let ftz = CvtMode {
        ftz: true,
        ..int_mode(Up)
    };
    assert_eq!(cvt(Scalar::S32, Scalar::F32, 1, ftz), 0);
    assert_eq!(cvt(Scalar::S32, Scalar::F32, 1, int_mode(Up)), 1);
    assert_eq!(cvt(Scalar::S32, Scalar::F16, 0xc100, int_mode(NearestEven)) as i64, -2);
}

#[test]
fn integers_to_floats_round_once() {
    let mut state = 3u64;
    for i in 0..200_000u64 {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        let x = if i % 3 == 0 {
            (1 << (i % 63)) | (1 << (state % 63)) | (state & 1)
        } else {
            state >> (i % 40)
        };
        let got = cvt(Scalar::F32, Scalar::U64, x, RN);
        assert_eq!(got, u64::from((x as f32).to_bits()), "{x}");
        let got = cvt(Scalar::F32, Scalar::S64, x, RN);
        assert_eq!(got, u64::from((x as i64 as f32).to_bits()), "{x}");
        assert_eq!(cvt(Scalar::F64, Scalar::S64, x, RN), (x as i64 as f64).to_bits());
    }
    let up = CvtMode {
        rounding: CvtRounding::Float(Rounding::Up),
        ..RN
    };
    assert_eq!(
        cvt(Scalar::F32, Scalar::S32, 16777217, up),
        u64::from(16777218f32.to_bits())
    );
    assert_eq!(cvt(Scalar::F16, Scalar::U32, 70000, RN), 0x7c00);
    assert_eq!(cvt(Scalar::F16, Scalar::S32, 0, RN), 0);
    // 2^63 + 2^39 + 1 is just above a tie of f32; rounded to the nearest f64 first it would become the tie.
    assert_eq!(cvt(Scalar::F32, Scalar::U64, (1 << 63) + (1 << 39) + 1, RN) & 1, 1);
}

#[test]
fn floats_to_floats() {
    let bits = |x: f32| u64::from(x.to_bits());
    assert_eq!(cvt(Scalar::F16, Scalar::F32, bits(1.0), RN), 0x3c00);
    assert_eq!(cvt(Scalar::F32, Scalar::F16, 0xc000, CvtMode::default()), bits(-2.0));
    assert_eq!(cvt(Scalar::F16, Scalar::F32, bits(f32::NAN), RN), 0x7fff);
    assert_eq!(
        cvt(Scalar::F64, Scalar::F32, bits(0.1), CvtMode::default()),
        f64::from(0.1f32).to_bits()
    );
    assert_eq!(cvt(Scalar::F32, Scalar::F64, f64::NAN.to_bits(), RN), 0x7fff_ffff);
    let rpi = int_mode(IntegerRounding::Up);
    assert_eq!(cvt(Scalar::F32, Scalar::F32, bits(-0.5), rpi), 1 << 31);
    assert_eq!(cvt(Scalar::F16, Scalar::F16, 0x3e00, rpi), 0x4000);
    let sat = CvtMode {
        sat: true,
        ..CvtMode::default()
    };
    assert_eq!(cvt(Scalar::F32, Scalar::F32, bits(3.0), sat), bits(1.0));
    assert_eq!(cvt(Scalar::F32, Scalar::F32, bits(f32::NAN), sat), 0);
    let relu = CvtMode {
        relu: true,
        satfinite: true,
        ..RN
    };
    assert_eq!(cvt(Scalar::F16, Scalar::F32, bits(-1.0), relu), 0);
    assert_eq!(cvt(Scalar::F16, Scalar::F32, bits(1e6), relu), 0x7bff);
    let ftz = CvtMode { ftz: true, ..RN };
    assert_eq!(cvt(Scalar::F32, Scalar::F64, (-1e-40f64).to_bits(), ftz), 1 << 31);
    assert_eq!(cvt(Scalar::Bf16, Scalar::F32, bits(1.0 + 2f32.powi(-8)), RN), 0x3f80);
    let rz = CvtMode {
        rounding: CvtRounding::Float(Rounding::TowardZero),
        ..RN
    };
    assert_eq!(cvt(Scalar::F32, Scalar::F64, 1e300f64.to_bits(), rz), bits(f32::MAX));
}

#[test]
fn packed_forms_put_a_on_top() {
    let rn = NarrowMode::default();
    assert_eq!(cvt_half2_from_f32(Half::F16, 1.0, 2.0, rn), 0x3c00_4000);
    assert_eq!(
        cvt_half2_from_f32(Half::Bf16, 1.0, -2.0, NarrowMode { relu: true, ..rn }),
        0x3f80_0000
    );
    assert_eq!(cvt_fp8x2_from_f32(Fp8::E4m3, 1.0, 1000.0, false), 0x387e);
    assert_eq!(cvt_fp8x2_from_f32(Fp8::E5m2, f32::NAN, -1.0, true), 0x7f00);
    assert_eq!(cvt_fp8x2_from_half2(Fp8::E4m3, Half::F16, 0x3c00_c000, false), 0x38c0);
    assert_eq!(cvt_f16x2_from_fp8x2(Fp8::E4m3, 0x38c0, false), 0x3c00_c000);
    assert_eq!(cvt_f16x2_from_fp8x2(Fp8::E5m2, 0x7fc0, true), 0x7fff_0000);
    for bits in 0..=255u16 {
        let wide = cvt_f16x2_from_fp8x2(Fp8::E4m3, bits | bits << 8, false);
        let back = cvt_fp8x2_from_half2(Fp8::E4m3, Half::F16, wide, false);
        let want = if bits & 0x7f == 0x7f { 0x7f7f } else { bits | bits << 8 };
        assert_eq!(back, want);
    }
}

#[test]
fn tf32_keeps_ten_fraction_bits() {
    let rna = NarrowMode {
        rounding: Rounding::NearestAway,
        ..NarrowMode::default()
    };
    assert_eq!(cvt_tf32_from_f32(1.0 + 2f32.powi(-11), rna), 0x3f80_2000);
    assert_eq!(
        cvt_tf32_from_f32(1.0 + 2f32.powi(-11), NarrowMode::default()),
        0x3f80_0000
    );
    assert_eq!(cvt_tf32_from_f32(f32::NAN, rna), 0x7fff_ffff);
    assert_eq!(cvt_tf32_from_f32(f32::MAX, rna), 0x7f80_0000);
    assert_eq!(
        cvt_tf32_from_f32(f32::MAX, NarrowMode { satfinite: true, ..rna }),
        0x7f7f_e000
    );
}

#[test]
fn pack_saturates_and_shifts_in() {
    assert_eq!(cvt_pack(PackType::S16, 100_000, -100_000, 9), 0x7fff_8000);
    assert_eq!(cvt_pack(PackType::U8, 300, -1, 0x1234_5678), 0x5678_ff00);
    assert_eq!(cvt_pack(PackType::S4, -9, 7, 0x1), 0x187);
    assert_eq!(cvt_pack(PackType::U2, 1, 9, 0), 0b0111);
}
