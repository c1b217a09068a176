//! Compares the product through the fragments with a triple loop over matrices that the test fills itself.

use super::Accumulator as Acc;
use super::Element::*;
use super::*;

struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        self.0 >> 33
    }
}

/// Returns the bits of a small value of a type, for which every sum is exact, and the value.
fn small(element: Element, draw: u64) -> (u64, f64) {
    let n = draw % 7;
    let value = n as f64 - 3.0;
    let halves = [0xc200u64, 0xc000, 0xbc00, 0, 0x3c00, 0x4000, 0x4200];
    match element {
        F16 => (halves[n as usize], value),
        Bf16 => (u64::from((value as f32).to_bits() >> 16), value),
        // The low bits of a tf32 register are ignored.
        Tf32 => (u64::from((value as f32).to_bits()) | draw >> 4 & 0x1fff, value),
        F64 => (value.to_bits(), value),
        E4m3 => ([0xc4u64, 0xc0, 0xb8, 0, 0x38, 0x40, 0x44][n as usize], value),
        E5m2 => (halves[n as usize] >> 8, value),
        S8 => (value as i8 as u8 as u64, value),
        U8 => (draw & 0xff, (draw & 0xff) as f64),
        S4 => (value as i8 as u8 as u64 & 0xf, value),
        U4 => (draw & 0xf, (draw & 0xf) as f64),
        B1 => (draw & 1, (draw & 1) as f64),
    }
}

fn check(op: Mma) {
    let Shape { m, n, k } = op.shape;
    let mut numbers = Numbers(k as u64 * 77 + m as u64);
    let [ra, rb, rc, rd] = op.registers();
    let mut a = [[0u64; 8]; 32];
    let mut b = [[0u64; 8]; 32];
    let mut c = [[0u64; 8]; 32];
    let mut left = vec![vec![0f64; k]; m];
    let mut right = vec![vec![0f64; n]; k];
    let mut start = vec![vec![0f64; n]; m];
    for lane in 0..32 {
        for register in 0..ra {
            for part in 0..op.a.pack() {
                let (row, col) = fragment::a(op.a.pack(), m, lane, register, part);
                let (bits, value) = small(op.a, numbers.next());
                a[lane][register] |= bits << (part * op.a.bits() % 64);
                left[row][col] = value;
            }
        }
        for register in 0..rb {
            for part in 0..op.b.pack() {
                let (row, col) = fragment::b(op.b.pack(), lane, register, part);
                let (bits, value) = small(op.b, numbers.next());
                b[lane][register] |= bits << (part * op.b.bits() % 64);
                right[row][col] = value;
            }
        }
        for index in 0..m / 4 {
            let (row, col) = fragment::c(lane, index);
            let value = (numbers.next() % 9) as f64 - 4.0;
            start[row][col] = value;
            match op.c {
                Acc::F16 => c[lane][index / 2] |= u64::from(f32_to_f16(value as f32)) << (16 * (index % 2)),
                Acc::F32 => c[lane][index] = u64::from((value as f32).to_bits()),
                Acc::F64 => c[lane][index] = value.to_bits(),
                Acc::S32 => c[lane][index] = u64::from(value as i32 as u32),
            }
        }
    }
    let d = op.execute(&a, &b, &c).unwrap();
    for lane in 0..32 {
        assert!(d[lane][rd..].iter().all(|&x| x == 0) && rc <= 8);
        for index in 0..m / 4 {
            let (row, col) = fragment::c(lane, index);
            let products = (0..k).map(|i| match (op.a, op.bit_op) {
                (B1, BitOp::Xor) => f64::from(left[row][i] != right[i][col]),
                _ => left[row][i] * right[i][col],
            });
            let want = start[row][col] + products.sum::<f64>();
            let got = match op.d {
                Acc::F16 => f64::from(f16_to_f32((d[lane][index / 2] >> (16 * (index % 2))) as u16)),
                Acc::F32 => f64::from(f32::from_bits(d[lane][index] as u32)),
                Acc::F64 => f64::from_bits(d[lane][index]),
                Acc::S32 => f64::from(d[lane][index] as i32),
            };
            assert_eq!(got, want, "{op:?} row {row} column {col}");
        }
    }
}

#[test]
fn every_shape_and_type_multiplies() {
    let all = [F16, Bf16, Tf32, F64, E4m3, E5m2, S8, U8, S4, U4, B1];
    let accumulators = [Acc::F16, Acc::F32, Acc::F64, Acc::S32];
    let mut count = 0;
    for (m, k) in [8, 16]
        .into_iter()
        .flat_map(|m| [4, 8, 16, 32, 64, 128, 256].map(|k| (m, k)))
    {
        for a in all {
            for b in all {
                for acc in accumulators {
                    for bit_op in [BitOp::Xor, BitOp::And] {
                        let op = Mma {
                            bit_op,
                            ..Mma::new(Shape { m, n: 8, k }, a, b, acc, acc)
                        };
                        if op.check().is_ok() && !op.is_volta() {
                            check(op);
                            count += usize::from(bit_op == BitOp::Xor);
                        }
                    }
                }
            }
        }
    }
    // f16 2x2, bf16 2, tf32 2, f64 4, fp8 2*4*2, int8 3*4, int4 3*4, b1 3.
    assert_eq!(count, 4 + 2 + 2 + 4 + 16 + 12 + 12 + 3);
}

#[test]
fn volta_multiplies_in_every_layout() {
    for (a_column_major, b_column_major) in [(false, false), (false, true), (true, false), (true, true)] {
        for (c, d) in [(Acc::F16, Acc::F16), (Acc::F16, Acc::F32), (Acc::F32, Acc::F32)] {
            let shape = Shape { m: 8, n: 8, k: 4 };
            let op = Mma {
                a_column_major,
                b_column_major,
                ..Mma::new(shape, F16, F16, c, d)
            };
            // A(row, k) = row + 1 of product p if k == 0; B(k, column) = column + p if k == 0; C = 100.
            let mut regs = [[[0u64; 8]; 32]; 3];
            for lane in 0..32 {
                let p = volta::product(lane);
                for i in 0..4 {
                    let mut put = |which: usize, value: f32| {
                        regs[which][lane][i / 2] |= u64::from(f32_to_f16(value)) << (16 * (i % 2));
                    };
                    let (row, k) = volta::a(a_column_major, lane, i);
                    put(0, if k == 0 { row as f32 + 1.0 } else { 0.0 });
                    let (k, column) = volta::b(b_column_major, lane, i);
                    put(1, if k == 0 { (column + p) as f32 } else { 5.0 });
                }
                for i in 0..8 {
                    write_float(c, &mut regs[2][lane], i, 100.0);
                }
            }
            let result = op.execute(&regs[0], &regs[1], &regs[2]).unwrap();
            for (lane, registers) in result.iter().enumerate() {
                for i in 0..8 {
                    let (row, column) = if d == Acc::F16 {
                        volta::c_f16(lane, i)
                    } else {
                        volta::c_f32(lane, i)
                    };
                    let want = 100.0 + (row as f32 + 1.0) * (column + volta::product(lane)) as f32;
                    assert_eq!(read_float(d, registers, i), want);
                }
            }
        }
    }
    assert!(
        Mma::new(Shape { m: 8, n: 8, k: 4 }, F16, F16, Acc::F32, Acc::F16)
            .check()
            .is_err()
    );
}

#[test]
fn integer_overflow_wraps_or_saturates() {
    let op = Mma::new(Shape { m: 16, n: 8, k: 32 }, U8, U8, Acc::S32, Acc::S32);
    let ones = [[u64::from(u32::MAX); 8]; 32];
    let c = [[0x7fff_ff00u64; 8]; 32];
    let sum = 0x7fff_ff00u32.wrapping_add(32 * 255 * 255);
    assert_eq!(op.execute(&ones, &ones, &c).unwrap()[3][1], u64::from(sum));
    let op = Mma { satfinite: true, ..op };
    assert_eq!(op.execute(&ones, &ones, &c).unwrap()[3][1], 0x7fff_ffff);
}

#[test]
fn f64_rounds_in_the_mode_given_and_nan_is_canonical() {
    let op = Mma::new(Shape { m: 8, n: 8, k: 4 }, F64, F64, Acc::F64, Acc::F64);
    let a = [[1e-30f64.to_bits(); 8]; 32];
    let c = [[1f64.to_bits(); 8]; 32];
    assert_eq!(op.execute(&a, &a, &c).unwrap()[0][0], 1f64.to_bits());
    let up = Mma {
        rounding: Rounding::Up,
        ..op
    };
    assert!(f64::from_bits(up.execute(&a, &a, &c).unwrap()[0][0]) > 1.0);
    let op = Mma::new(Shape { m: 16, n: 8, k: 16 }, F16, F16, Acc::F32, Acc::F32);
    let nan = [[0xfe00_fe00u64; 8]; 32];
    assert_eq!(op.execute(&nan, &nan, &c).unwrap()[0][0], 0x7fff_ffff);
    assert_eq!(op.flops(), 4096);
}
