//! Operands are written to a byte array element by element through [`Descriptor::address`], which has its own tests
//! against the manual's examples. The product is compared with a triple loop.

use super::super::swizzle::Swizzle;
use super::Accumulator as Acc;
use super::Element::*;
use super::*;
use std::collections::HashSet;

type NoRegisters = fn(usize, usize) -> u32;

/// Returns small integers, for which every sum is exact in f32.
fn value(seed: usize, i: usize, j: usize) -> f32 {
    ((i * 31 + j * 17 + seed * 7 + i * j) % 7) as f32 - 3.0
}

fn encode(element: Element, x: f32) -> Vec<u8> {
    use crate::numeric::format;
    let e = |f: format::Format| f.encode(f64::from(x), crate::numeric::Rounding::NearestEven, false);
    match element {
        F16 => (e(format::F16) as u16).to_le_bytes().to_vec(),
        Bf16 => (e(format::BF16) as u16).to_le_bytes().to_vec(),
        Tf32 => (x.to_bits() | 0xabc).to_le_bytes().to_vec(),
        E4m3 => vec![e(format::E4M3) as u8],
        E5m2 => vec![e(format::E5M2) as u8],
        S8 => vec![x as i8 as u8],
        _ => vec![x.abs() as u8],
    }
}

fn decoded(element: Element, x: f32) -> f32 {
    if element == U8 { x.abs() } else { x }
}

/// Makes a descriptor whose atoms are dense and do not overlap, for `mn` x 32 bytes of k.
fn dense(swizzle: Swizzle, transposed: bool, start: u32) -> Descriptor {
    let atom = swizzle.span() * 8;
    let (leading, stride) = match (transposed, swizzle) {
        // The leading offset is unused for swizzled K-major operands: this value would break any use of it.
        (false, Swizzle::None) => (16 * 1024, atom),
        (false, _) => (0x3fff0, atom),
        (true, Swizzle::None) => (16 * 1024, atom),
        (true, _) => (2 * atom, atom),
    };
    Descriptor {
        start,
        leading,
        stride,
        base_offset: 0,
        swizzle,
    }
}

struct Case {
    op: Wgmma,
    swizzle: Swizzle,
    a_in_registers: bool,
}

fn check(case: &Case) {
    let Case {
        op,
        swizzle,
        a_in_registers: from_registers,
    } = case;
    let (n, k) = (op.n, op.k());
    let mut memory = vec![0xffu8; 1 << 17];
    let a_descriptor = dense(*swizzle, op.transpose_a, 0);
    let b_descriptor = dense(*swizzle, op.transpose_b, 64 * 1024);
    let mut registers = vec![[0u32; 4]; THREADS];
    let major = |transposed: bool| if transposed { Major::Mn } else { Major::K };
    let mut put = |descriptor: Descriptor, element: Element, transposed, mn, k, x| {
        let bytes = encode(element, x);
        let at = descriptor.address(major(transposed), bytes.len(), mn, k) as usize;
        memory[at..at + bytes.len()].copy_from_slice(&bytes);
    };
    for row in 0..M {
        for i in 0..k {
            put(a_descriptor, op.a, op.transpose_a, row, i, value(1, row, i));
        }
    }
    for column in 0..n {
        for i in 0..k {
            put(b_descriptor, op.b, op.transpose_b, column, i, value(2, i, column));
        }
    }
    for (thread, registers) in registers.iter_mut().enumerate() {
        for (index, register) in registers.iter_mut().enumerate() {
            for part in 0..op.a.pack() {
                let (row, i) = super::a_in_registers(op.a.pack(), thread, index, part);
                for (byte, x) in encode(op.a, value(1, row, i)).into_iter().enumerate() {
                    *register |= u32::from(x) << (part * op.a.bits() + byte * 8);
                }
            }
        }
    }
    let read = |address: u32| <[u8; 16]>::try_from(&memory[address as usize..][..16]).unwrap();
    let left = || match from_registers {
        true => Left::Registers(|thread: usize, index: usize| registers[thread][index]),
        false => Left::Shared(a_descriptor),
    };
    for accumulate in [false, true] {
        let mut got = vec![0f32; M * n];
        if op.d == Acc::S32 {
            let mut sums = vec![5i32; M * n];
            op.multiply_i32(left(), b_descriptor, read, accumulate, &mut sums)
                .unwrap();
            got.iter_mut().zip(sums).for_each(|(x, y)| *x = y as f32);
        } else {
            got.fill(5.0);
            op.multiply_f32(left(), b_descriptor, read, accumulate, &mut got)
                .unwrap();
        }
        let sign = if op.negate_a != op.negate_b { -1.0 } else { 1.0 };
        for row in 0..M {
            for column in 0..n {
                let dot: f32 = (0..k)
                    .map(|i| decoded(op.a, value(1, row, i)) * decoded(op.b, value(2, i, column)))
                    .sum();
                let want = sign * dot + if accumulate { 5.0 } else { 0.0 };
                assert_eq!(
                    got[row * n + column],
                    want,
                    "{op:?} {swizzle:?} ({row}, {column}) {accumulate}"
                );
            }
        }
    }
}

#[test]
fn every_type_layout_and_swizzle_multiplies() {
    for swizzle in [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128] {
        for (a, b, d) in [
            (F16, F16, Acc::F32),
            (F16, F16, Acc::F16),
            (Bf16, Bf16, Acc::F32),
            (Tf32, Tf32, Acc::F32),
            (E4m3, E5m2, Acc::F32),
            (E5m2, E4m3, Acc::F16),
            (S8, U8, Acc::S32),
            (U8, S8, Acc::S32),
        ] {
            for n in [8, 176] {
                for flags in 0..16 {
                    let op = Wgmma {
                        transpose_a: flags & 1 != 0,
                        transpose_b: flags & 2 != 0,
                        negate_a: flags & 4 != 0,
                        negate_b: flags & 12 == 12,
                        ..Wgmma::new(n, a, b, d)
                    };
                    // An MN-major atom is `span` bytes wide; only whole atoms are dense.
                    let whole = !op.transpose_b || (n * 2).is_multiple_of(swizzle.span() as usize);
                    if op.check().is_ok() && whole {
                        check(&Case {
                            op,
                            swizzle,
                            a_in_registers: flags & 1 == 0 && flags & 8 != 0,
                        });
                    }
                }
            }
        }
    }
}

#[test]
fn accumulators_are_a_bijection_and_match_the_manual() {
    for n in [8, 96, 256] {
        let all: HashSet<_> = (0..THREADS)
            .flat_map(|t| (0..n / 2).map(move |i| accumulator(t, i)))
            .collect();
        assert_eq!(all.len(), M * n);
        assert!(all.iter().all(|&(row, column)| row < M && column < n));
    }
    // Warp 2, lane 5, d6: rows of warp 2 start at 32, d6 is in the lower half of the second group of eight columns.
    assert_eq!(accumulator(69, 6), (32 + 1 + 8, 8 + 2));
    let op = Wgmma::new(32, F16, F16, Acc::F16);
    let mut sums: Vec<f32> = (0..M * 32).map(|i| i as f32).collect();
    let mut registers = vec![[0u32; 8]; THREADS];
    op.scatter_f32(&sums, |thread, index, bits| registers[thread][index] = bits);
    let before = std::mem::replace(&mut sums, vec![0.0; M * 32]);
    op.gather_f32(|thread, index| registers[thread][index], &mut sums);
    assert_eq!(sums, before);
}

#[test]
fn chunks_list_what_is_read() {
    let op = Wgmma {
        transpose_b: true,
        ..Wgmma::new(128, Bf16, Bf16, Acc::F32)
    };
    let d = Descriptor {
        start: 1024,
        leading: 2048,
        stride: 1024,
        base_offset: 0,
        swizzle: Swizzle::B128,
    };
    let seen = std::cell::RefCell::new(HashSet::new());
    let read = |address| {
        seen.borrow_mut().insert(address);
        [0; 16]
    };
    let mut sums = vec![0.0; M * 128];
    op.multiply_f32(Left::<NoRegisters>::Shared(d), d, read, true, &mut sums)
        .unwrap();
    let listed: HashSet<_> = op.chunks_of_a(d).chain(op.chunks_of_b(d)).collect();
    assert_eq!(seen.into_inner(), listed);
}

#[test]
fn unsupported_combinations_are_errors() {
    for op in [
        Wgmma::new(12, F16, F16, Acc::F32),
        Wgmma::new(264, F16, F16, Acc::F32),
        Wgmma::new(64, Bf16, Bf16, Acc::F16),
        Wgmma::new(40, S8, S8, Acc::S32),
        Wgmma {
            transpose_b: true,
            ..Wgmma::new(64, Tf32, Tf32, Acc::F32)
        },
        Wgmma {
            negate_a: true,
            ..Wgmma::new(64, S8, S8, Acc::S32)
        },
        Wgmma::new(64, B1, B1, Acc::S32),
    ] {
        assert_eq!(op.check(), Err(UnsupportedWgmma(op)));
    }
}

#[test]
fn integers_saturate_only_when_asked() {
    let op = Wgmma::new(8, U8, U8, Acc::S32);
    let d = dense(Swizzle::None, false, 0);
    for (satfinite, want) in [(false, i32::MIN + 32 * 255 * 255 - 1), (true, i32::MAX)] {
        let op = Wgmma { satfinite, ..op };
        let mut sums = vec![i32::MAX; M * 8];
        op.multiply_i32(Left::<NoRegisters>::Shared(d), d, |_| [255; 16], true, &mut sums)
            .unwrap();
        assert_eq!(sums[17], want);
    }
}
