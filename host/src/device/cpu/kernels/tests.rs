//! Tests of the inner loops of every instruction set that the processor has, against their definitions.

mod few;
mod strip;

use super::*;

/// Runs a test with the kernels of every instruction set the processor has.
fn each(test: impl Fn(&'static Kernels)) {
    for &instructions in available() {
        println!("{instructions}");
        test(kernels(instructions));
    }
}

/// Whole numbers, so small that every sum of their products is exact.
fn whole(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7 + seed) % 11) as f32 - 5.0).collect()
}

#[test]
fn exp2_is_within_one_and_a_half_units_in_the_last_place() {
    each(|kernels| {
        let inputs: Vec<f32> = (0..1 << 18).map(|i| 0.5 - 126.5 * i as f32 / 262_143.0).collect();
        let mut outputs = inputs.clone();
        // SAFETY: the processor has the instructions, and the count is a multiple of every register's lanes.
        unsafe { (kernels.exp2)(outputs.as_mut_ptr(), outputs.len()) };
        for (x, got) in inputs.into_iter().zip(outputs) {
            let want = f64::from(x).exp2();
            let error = (f64::from(got) - want).abs();
            assert!(
                error <= 1.5 * f64::from(f32::EPSILON) * want,
                "2^{x} = {want}, got {got}"
            );
        }
    });
}

#[test]
fn exp2_of_the_special_values() {
    each(|kernels| {
        let mut values = [0.0, -0.0, -1.0, -126.0, -127.0, -1e30, f32::NEG_INFINITY, f32::NAN].repeat(2);
        // SAFETY: as above.
        unsafe { (kernels.exp2)(values.as_mut_ptr(), values.len()) };
        assert_eq!(values[..7], [1.0, 1.0, 0.5, f32::MIN_POSITIVE, 0.0, 0.0, 0.0]);
        assert!(values[7].is_nan());
    });
}

#[test]
fn exp2_of_whole_numbers_is_exact() {
    each(|kernels| {
        let mut values: Vec<f32> = (-143..=0).map(|x| x as f32).collect();
        // SAFETY: as above.
        unsafe { (kernels.exp2)(values.as_mut_ptr(), values.len()) };
        for (x, got) in (-143..=0).zip(values) {
            let want = if x < -126 { 0.0 } else { 2.0_f32.powi(x) };
            assert_eq!(got, want, "2^{x}");
        }
    });
}

#[test]
fn products_are_the_sums_of_their_definition() {
    each(|kernels| {
        let panel = kernels.panel;
        for (rows, inner, columns) in [(8, 1, kernels.lanes), (16, 5, panel), (24, 8, panel + kernels.lanes)] {
            for (transposed, accumulate) in [(false, false), (true, false), (false, true), (true, true)] {
                let a_stride = if transposed { rows } else { inner };
                let (a, b) = (whole(rows * inner, 1), whole(inner * columns, 2));
                let before = whole(rows * columns, 3);
                let mut c = before.clone();
                // SAFETY: the processor has the instructions, and the matrices are of these sizes.
                unsafe {
                    (kernels.product)(&Product {
                        rows,
                        inner,
                        columns,
                        a: a.as_ptr(),
                        a_stride,
                        transposed,
                        b: b.as_ptr(),
                        b_stride: columns,
                        c: c.as_mut_ptr(),
                        c_stride: columns,
                        accumulate,
                    });
                }
                for (index, got) in c.into_iter().enumerate() {
                    let (row, column) = (index / columns, index % columns);
                    let a = |i: usize| a[if transposed { i * rows + row } else { row * inner + i }];
                    let sum: f32 = (0..inner).map(|i| a(i) * b[i * columns + column]).sum();
                    let want = sum + if accumulate { before[index] } else { 0.0 };
                    assert_eq!(
                        got, want,
                        "({row}, {column}) of {rows} x {inner} x {columns}, {transposed}"
                    );
                }
            }
        }
    });
}

#[test]
fn transposes_are_those_of_their_definition() {
    each(|kernels| {
        for (rows, columns) in [(1, 1), (16, 16), (5, 40), (40, 3), (33, 24)] {
            let (stride, to_stride) = (48, 64);
            let from: Vec<f32> = (0..(rows + 15) * stride).map(|i| i as f32).collect();
            let mut to = vec![-1.0; (columns + 15) * to_stride];
            // SAFETY: there is room for whole registers at every end.
            unsafe { (kernels.transpose)(from.as_ptr(), stride, rows, to.as_mut_ptr(), to_stride, columns) };
            for row in 0..rows {
                for column in 0..columns {
                    let got = to[column * to_stride + row];
                    assert_eq!(
                        got,
                        from[row * stride + column],
                        "({row}, {column}) of {rows} x {columns}"
                    );
                }
            }
            assert!(
                to[columns * to_stride..].iter().all(|&x| x == -1.0),
                "rows past the last column"
            );
        }
    });
}

#[test]
fn conversions_are_those_of_half() {
    use half::{bf16, f16};
    each(|kernels| {
        let mut values: Vec<f32> = (0..1000_u32)
            .map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9)))
            .collect();
        values.extend([
            0.0,
            -0.0,
            1.0 + 1.0 / 256.0,
            65520.0,
            65519.0,
            1e-8,
            f32::INFINITY,
            f32::NAN,
            3.4e38,
        ]);
        let mut bits = vec![0_u16; values.len()];
        let mut back = vec![0.0_f32; values.len()];
        for dtype in [Dtype::F16, Dtype::Bf16] {
            // SAFETY: the processor has the instructions; all runs are as long as `values`.
            unsafe {
                (kernels.narrow)(dtype, values.as_ptr(), values.len(), bits.as_mut_ptr().cast());
                (kernels.widen)(dtype, bits.as_ptr().cast(), bits.len(), back.as_mut_ptr());
            }
            for ((&value, &bits), &back) in values.iter().zip(&bits).zip(&back) {
                let (want, wide) = match dtype {
                    Dtype::F16 => (f16::from_f32(value).to_bits(), f16::from_bits(bits).to_f32()),
                    _ => (bf16::from_f32(value).to_bits(), bf16::from_bits(bits).to_f32()),
                };
                assert!(
                    bits == want || value.is_nan() && back.is_nan(),
                    "{value:e} as {dtype:?}"
                );
                assert!(
                    back.to_bits() == wide.to_bits() || wide.is_nan() && back.is_nan(),
                    "{bits:#x}"
                );
            }
        }
    });
}

/// Numbers as parts, by `pair_columns`, of which the first two of 32 neighbours are 16 apart in memory.
fn parts_of(kernels: &Kernels, numbers: &[f32], parts: usize) -> Vec<Vec<f32>> {
    let part = numbers.len() / 2;
    let mut words = vec![0_u32; parts * part];
    // SAFETY: the processor has the instructions, and the sizes are those of the runs.
    unsafe {
        (kernels.pair_columns)(&Pairing {
            from: numbers.as_ptr(),
            stride: 0,
            rows: 1,
            columns: numbers.len(),
            apart: SIDE,
            to: words.as_mut_ptr(),
            to_stride: 0,
            parts,
            part,
        });
    }
    let number = |words: &[u32], i: usize| {
        let word = words[i / 32 * 16 + i % 16];
        f32::from_bits(if i % 32 < 16 { word << 16 } else { word & 0xffff_0000 })
    };
    let of_part = |words: &[u32]| (0..numbers.len()).map(|i| number(words, i)).collect();
    words.chunks(part).map(of_part).collect()
}

fn may_be_split(kernels: &Kernels, numbers: &[f32]) -> bool {
    // SAFETY: the processor has the instructions, and there are so many numbers.
    unsafe { (kernels.may_be_split)(numbers.as_ptr(), numbers.len()) }
}

#[test]
fn every_f16_is_the_sum_of_two_parts() {
    each(|kernels| {
        let all: Vec<f32> = (0..=u16::MAX).map(|bits| half::f16::from_bits(bits).to_f32()).collect();
        let parts = parts_of(kernels, &all, 2);
        for (i, &x) in all.iter().enumerate() {
            assert_eq!(may_be_split(kernels, &[x; 8]), x.is_finite(), "{x:e}");
            if x.is_finite() {
                assert_eq!(parts[0][i] + parts[1][i], x, "{x:e}");
                assert!(parts[1][i].abs() <= x.abs() / 256.0, "{x:e}");
            }
        }
    });
}

#[test]
fn every_f32_that_may_be_split_is_the_sum_of_three_parts() {
    each(|kernels| {
        let drawn = (0..1 << 18).map(|i: u32| f32::from_bits(i.wrapping_mul(0x9e37_79b9)));
        let edges = [
            0.0,
            -0.0,
            1.0 - f32::EPSILON / 2.0,
            1.0 + f32::EPSILON,
            1.998_046_8,
            2_f32.powi(-45),
        ];
        let numbers: Vec<f32> = drawn.chain(edges.into_iter().cycle().take(32)).collect();
        let parts = parts_of(kernels, &numbers, 3);
        let mut split = 0;
        for (i, &x) in numbers.iter().enumerate() {
            let fits = x == 0.0 || (2_f32.powi(-45)..2_f32.powi(50)).contains(&x.abs());
            assert_eq!(may_be_split(kernels, &[x; 8]), fits, "{x:e}");
            if fits {
                let sum: f64 = parts.iter().map(|part| f64::from(part[i])).sum();
                assert_eq!(sum, f64::from(x), "{x:e}");
                assert!(parts[1][i].abs() <= x.abs() / 256.0 && parts[2][i].abs() <= x.abs() / 65536.0);
                split += 1;
            }
        }
        assert!(split > 1 << 16);
    });
}

#[test]
fn one_number_that_may_not_be_split_is_found_wherever_it_is() {
    each(|kernels| {
        for bad in [
            f32::NAN,
            f32::from_bits(0x7f80_0001),
            f32::INFINITY,
            -1e-20,
            1e-40,
            f32::MAX,
        ] {
            for place in 0..40 {
                let mut numbers = [1.0_f32; 40];
                assert!(may_be_split(kernels, &numbers));
                numbers[place] = bad;
                assert!(!may_be_split(kernels, &numbers), "{bad:e} at {place}");
            }
        }
    });
}

#[test]
fn a_nan_stays_one_in_parts() {
    each(|kernels| {
        for parts in [2, 3] {
            for bits in [0x7fc0_0000, 0xffc0_0000, 0x7fff_ffff, 0x7fc0_0001] {
                let parts = parts_of(kernels, &[f32::from_bits(bits); 32], parts);
                assert!(parts.iter().map(|part| part[0]).sum::<f32>().is_nan(), "{bits:#x}");
            }
        }
    });
}

#[test]
fn pairs_are_those_of_their_definition() {
    each(|kernels| {
        // Numbers of three parts, of which the first 8 bits, the next and the last are told apart.
        let number = |i: usize| (1 + i % 100) as f32 + 1.0 / (3 + i) as f32;
        for (rows, columns, apart) in [(8, 16, 1), (8, 48, SIDE), (40, 16, SIDE), (64, 32, 1), (72, 16, SIDE)] {
            let from: Vec<f32> = (0..rows * columns).map(number).collect();
            let words = usize::next_multiple_of(rows, 2 * apart) / 2;
            for parts in 1..=3 {
                let part = words * columns;
                let mut to = vec![0_u32; parts * part];
                // SAFETY: the processor has the instructions, and the matrices are of these sizes.
                unsafe {
                    (kernels.pair_rows)(&Pairing {
                        from: from.as_ptr(),
                        stride: columns,
                        rows,
                        columns,
                        apart,
                        to: to.as_mut_ptr(),
                        to_stride: columns,
                        parts,
                        part,
                    });
                }
                for (index, halves) in to[..part]
                    .iter()
                    .map(|word| [word << 16, word & 0xffff_0000])
                    .enumerate()
                {
                    let (word, column) = (index / columns, index % columns);
                    let low = word / apart * 2 * apart + word % apart;
                    for (row, got) in [low, low + apart].into_iter().zip(halves) {
                        let want = if row < rows {
                            half::bf16::from_f32(from[row * columns + column])
                        } else {
                            half::bf16::ZERO
                        };
                        assert_eq!(
                            f32::from_bits(got),
                            want.to_f32(),
                            "({row}, {column}) of {rows} x {columns}, {parts}"
                        );
                    }
                }
            }
        }
    });
}
