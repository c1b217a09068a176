//! Expected values were computed by hand, or by the bit-by-bit loops of the manual's semantics.

use super::IntType::*;
use super::*;

fn words() -> Vec<u64> {
    let mut out = vec![
        0,
        1,
        2,
        0x7fff,
        0x8000,
        0xffff,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        1 << 63,
        u64::MAX,
    ];
    let mut state = 5u64;
    for _ in 0..40 {
        state = state
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        out.push(state);
    }
    out
}

#[test]
fn products() {
    for a in words() {
        for b in words() {
            let (x, y) = (a as u32, b as u32);
            assert_eq!(mul(MulPart::Hi, U32, a, b), (u64::from(x) * u64::from(y)) >> 32);
            let signed = i64::from(x as i32) * i64::from(y as i32);
            assert_eq!(mul(MulPart::Wide, S32, a, b), signed as u64);
            assert_eq!(mul(MulPart::Hi, S32, a, b), (signed >> 32) as u64);
            assert_eq!(
                mul(MulPart::Hi, U64, a, b),
                ((u128::from(a) * u128::from(b)) >> 64) as u64
            );
            assert_eq!(mul(MulPart::Lo, S32, a, b), x.wrapping_mul(y) as i32 as u64);
            assert_eq!(
                mad(MulPart::Wide, U32, a, b, 7, false),
                (u64::from(x) * u64::from(y)).wrapping_add(7)
            );
        }
    }
    assert_eq!(mad(MulPart::Hi, S32, 0x4000_0000, 16, 0x7fff_ffff, true), 0x7fff_ffff);
    assert_eq!(mad(MulPart::Wide, S16, 0xffff, 2, 0, false), (-2i64) as u64);
    assert_eq!(mul24(false, S32, 0x00ff_ffff, 3), (-3i64) as u64);
    assert_eq!(mul24(true, U32, 0x00ff_ffff, 0x00ff_ffff), 0xffff_fe00);
}

#[test]
fn division_never_panics() {
    for ty in [U16, S16, U32, S32, U64, S64] {
        for a in words() {
            for b in words() {
                let (q, r) = (div(ty, a, b), rem(ty, a, b));
                if ty.value(b) != 0 {
                    assert_eq!(ty.value(q.wrapping_mul(b).wrapping_add(r)), ty.value(a));
                } else {
                    assert_eq!((q, r), (ty.extend(u64::MAX), ty.extend(u64::MAX)));
                }
            }
        }
    }
    assert_eq!(div(S32, 0x8000_0000, 0xffff_ffff), 0x8000_0000u32 as i32 as u64);
    assert_eq!(rem(S32, (-7i32) as u32 as u64, 3), (-1i64) as u64);
}

#[test]
fn carries_chain_to_wide_arithmetic() {
    for a in words() {
        for b in words() {
            let (low, carry) = add_carry(U32, a & 0xffff_ffff, b & 0xffff_ffff, false);
            let (high, out) = add_carry(U32, a >> 32, b >> 32, carry);
            assert_eq!(high << 32 | low, a.wrapping_add(b));
            assert_eq!(out, a.checked_add(b).is_none());
            let (low, borrow) = sub_borrow(U32, a & 0xffff_ffff, b & 0xffff_ffff, false);
            let (high, out) = sub_borrow(U32, a >> 32, b >> 32, borrow);
            assert_eq!(high << 32 | low, a.wrapping_sub(b));
            assert_eq!(out, a < b);
        }
    }
    assert_eq!(sub_borrow(U64, 0, u64::MAX, true), (0, true));
    assert_eq!(mad_carry(MulPart::Lo, U32, 0xffff_ffff, 1, 1, false), (0, true));
}

#[test]
fn bit_fields_follow_the_manuals_loops() {
    for a in words() {
        for start in [0u32, 1, 7, 31, 32, 33, 63, 64, 100, 255, 256] {
            for length in [0u32, 1, 5, 31, 32, 33, 63, 64, 65, 255] {
                for ty in [U32, S32, U64, S64] {
                    let msb = ty.bits() - 1;
                    let (pos, len) = (start & 0xff, length & 0xff);
                    let sign_at = (pos + len).wrapping_sub(1).min(msb);
                    let sign = if !ty.signed() || len == 0 { 0 } else { a >> sign_at & 1 };
                    let want = (0..=msb).fold(0, |d, i| {
                        d | (if i < len && pos + i <= msb {
                            a >> (pos + i) & 1
                        } else {
                            sign
                        }) << i
                    });
                    assert_eq!(
                        bfe(ty, a, start, length),
                        ty.extend(want),
                        "{ty:?} {a:#x} {start} {length}"
                    );
                    let mut want = 0x5555_aaaa_1234_8888u64;
                    for i in (0..len).take_while(|i| pos + i <= msb) {
                        want = want & !(1 << (pos + i)) | (a >> i & 1) << (pos + i);
                    }
                    let got = bfi(ty, a, 0x5555_aaaa_1234_8888, start, length);
                    assert_eq!(got, ty.extend(want), "{ty:?} {a:#x} {start} {length}");
                }
            }
        }
    }
}

#[test]
fn finding_bits() {
    assert_eq!(bfind(U32, 0, false), u32::MAX);
    assert_eq!(bfind(U32, 0x10, false), 4);
    assert_eq!(bfind(U32, 0x10, true), 27);
    assert_eq!(bfind(S32, 0xffff_ffff, false), u32::MAX);
    assert_eq!(bfind(S32, 0xffff_fffe, false), 0);
    assert_eq!(bfind(S64, 1, true), 63);
    assert_eq!(clz(U32, 0), 32);
    assert_eq!(clz(U64, 1), 63);
    assert_eq!(popc(U32, u64::MAX), 32);
    assert_eq!(brev(U32, 1), 1 << 31);
    assert_eq!(brev(U64, 1), 1 << 63);
    assert_eq!(fns(0xaaaa_aaaa, 0, 1), 1);
    assert_eq!(fns(0xaaaa_aaaa, 0, 2), 3);
    assert_eq!(fns(0xaaaa_aaaa, 31, -1), 31);
    assert_eq!(fns(0xaaaa_aaaa, 30, -1), 29);
    assert_eq!(fns(0xaaaa_aaaa, 1, 0), 1);
    assert_eq!(fns(0xaaaa_aaaa, 2, 0), u32::MAX);
    assert_eq!(fns(0, 0, i32::MIN), u32::MAX);
}

#[test]
fn masks_and_extensions() {
    assert_eq!(szext(Overflow::Clamp, true, 0xff, 8), 0xffff_ffff);
    assert_eq!(szext(Overflow::Clamp, false, 0xffff, 8), 0xff);
    assert_eq!(szext(Overflow::Clamp, true, 0x1234, 40), 0x1234);
    assert_eq!(szext(Overflow::Wrap, true, 0xff, 40), 0xffff_ffff);
    assert_eq!(szext(Overflow::Wrap, false, 0xff, 32), 0);
    assert_eq!(bmsk(Overflow::Clamp, 4, 8), 0xff0);
    assert_eq!(bmsk(Overflow::Clamp, 0, 32), u32::MAX);
    assert_eq!(bmsk(Overflow::Clamp, 0, 99), u32::MAX);
    assert_eq!(bmsk(Overflow::Clamp, 32, 1), 0);
    assert_eq!(bmsk(Overflow::Wrap, 33, 33), 2);
    assert_eq!(bmsk(Overflow::Wrap, 30, 8), 0xc000_0000);
    assert_eq!(bmsk(Overflow::Wrap, 0, 32), 0);
}

#[test]
fn dot_products() {
    assert_eq!(dp4a(false, false, 0x0102_03ff, 0x0101_0101, 10), 10 + 1 + 2 + 3 + 255);
    assert_eq!(dp4a(true, true, 0x0102_03ff, 0x0101_0101, 10), 10 + 1 + 2 + 3 - 1);
    assert_eq!(dp4a(true, false, 0x0000_00ff, 0x0000_00ff, 0), (-255i32) as u32);
    assert_eq!(dp2a(false, true, true, 0xffff_0002, 0x0000_0305, 1), 1 + 10 - 3);
    assert_eq!(
        dp2a(true, false, false, 0xffff_0002, 0x0305_0000, 1),
        1 + 10 + 3 * 0xffff
    );
}

#[test]
fn permutes_match_the_manuals_table() {
    let (a, b) = (0x3322_1100, 0x7766_5544);
    let table: [(Permute, [u32; 4]); 6] = [
        (Permute::Forward4, [0x3210, 0x4321, 0x5432, 0x6543]),
        (Permute::Backward4, [0x5670, 0x6701, 0x7012, 0x0123]),
        (Permute::Replicate8, [0x0000, 0x1111, 0x2222, 0x3333]),
        (Permute::EdgeClampLeft, [0x3210, 0x3211, 0x3222, 0x3333]),
        (Permute::EdgeClampRight, [0x0000, 0x1110, 0x2210, 0x3210]),
        (Permute::Replicate16, [0x1010, 0x3232, 0x1010, 0x3232]),
    ];
    for (mode, selectors) in table {
        for (c, generic) in (0..).zip(selectors) {
            assert_eq!(
                prmt(mode, a, b, c),
                prmt(Permute::Generic, a, b, generic),
                "{mode:?} {c}"
            );
        }
    }
    assert_eq!(prmt(Permute::Generic, a, b, 0x7531), 0x7755_3311);
    assert_eq!(prmt(Permute::Generic, 0x80, 0, 0x1808), 0x00ff_80ff);
}

#[test]
fn shifts_clamp() {
    assert_eq!(shl(U32, 1, 31), 1 << 31);
    assert_eq!(shl(U32, 1, 32), 0);
    assert_eq!(shl(S32, 1, 31), 0x8000_0000u32 as i32 as u64);
    assert_eq!(shr(U32, 0x8000_0000, 31), 1);
    assert_eq!(shr(U32, 0x8000_0000, 99), 0);
    assert_eq!(shr(S32, 0x8000_0000, 99), u64::MAX);
    assert_eq!(shr(U64, u64::MAX, 64), 0);
    assert_eq!(shr(S16, 0x8000, 3), (-4096i64) as u64);
    assert_eq!(shf(true, Overflow::Wrap, 0x8000_0001, 0x8000_0001, 1), 3);
    assert_eq!(shf(false, Overflow::Wrap, 0x8000_0001, 0x8000_0001, 33), 0xc000_0000);
    assert_eq!(shf(true, Overflow::Clamp, 5, 9, 32), 5);
    assert_eq!(shf(false, Overflow::Clamp, 5, 9, 99), 9);
    assert_eq!(shf(true, Overflow::Clamp, 5, 9, 0), 9);
}

#[test]
fn logic_tables() {
    let (a, b, c) = (0xf0f0_1234, 0xcccc_5678, 0xaaaa_9abc);
    assert_eq!(lop3(a, b, c, 0x80), a & b & c);
    assert_eq!(lop3(a, b, c, 0xfe), a | b | c);
    assert_eq!(lop3(a, b, c, 0x40), a & b & !c);
    assert_eq!(lop3(a, b, c, 0x1a), (a & b | c) ^ a);
    assert_eq!(lop3(a, b, c, 0x96), a ^ b ^ c);
    for table in 0..=255u8 {
        let got = lop3(0xf0, 0xcc, 0xaa, table) & 0xff;
        assert_eq!(got, u32::from(table), "the table is the function applied to f0, cc, aa");
    }
    assert_eq!(cnot(U32, 1 << 32), 1);
}

#[test]
fn extremes_and_packed_halves() {
    assert_eq!(min(S32, 0xffff_ffff, 1, false), u64::MAX);
    assert_eq!(min(S32, 0xffff_ffff, 1, true), 0);
    assert_eq!(max(U32, 0xffff_ffff, 1, false), 0xffff_ffff);
    assert_eq!(abs(S32, 0x8000_0000), 0x8000_0000u32 as i32 as u64);
    assert_eq!(neg(S16, 1), u64::MAX);
    assert_eq!(sad(S32, 5, (-3i32) as u32 as u64, 1), 9);
    assert_eq!(sad(U32, 3, 5, 1), 3);
    assert_eq!(add(S32, 0x7fff_ffff, 1, true), 0x7fff_ffff);
    assert_eq!(sub(S32, 0x8000_0000, 1, true), 0x8000_0000u32 as i32 as u64);
    assert_eq!(
        map16x2(0x0001_ffff, 0x0002_0001, |a, b| add(U16, a, b, false)),
        0x0003_0000
    );
    assert_eq!(
        map16x2(0x8000_0005, 0x0001_fffe, |a, b| max(S16, a, b, false)),
        0x0001_0005
    );
    assert_eq!(
        map16x2(0x8000_0005, 0x0001_fffe, |a, b| min(S16, a, b, true)),
        0x0000_0000
    );
}
