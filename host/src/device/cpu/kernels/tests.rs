//! The inner loops of every instruction set that the processor has, against their definitions.

use super::*;

/// Runs a test with the kernels of every instruction set the processor has.
fn each(test: impl Fn(&'static Kernels)) {
    for isa in Isa::available() {
        println!("{}", isa.kernels().name);
        test(isa.kernels());
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
