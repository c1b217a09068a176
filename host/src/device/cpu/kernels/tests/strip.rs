//! Tests of the loops of score programs: operations over strips, reads of tables, and dropout.

use super::*;
use crate::program::DataType;
use crate::program::strip::{Line, Operation, Slot, Space};

/// Runs one operation over numbers, or the bits of integers, as the strips of programs do.
fn operate(kernels: &Kernels, operation: Operation, operands: &[Vec<f32>], tables: &[Table]) -> Vec<f32> {
    let (width, count) = (kernels.strip_lanes, operands[0].len());
    let rows = count.div_ceil(width);
    let register = rows * width;
    let mut memory = vec![0.0; (operands.len() + 1) * register];
    for (to, from) in memory.chunks_mut(register).skip(1).zip(operands) {
        to[..count].copy_from_slice(from);
    }
    let slot = |index| Slot {
        space: Space::Strip,
        index,
    };
    let slots: Vec<Slot> = (1..=operands.len() as u16).map(slot).collect();
    let lines = [Line::new(operation, slot(0), &slots)];
    let registers = Registers {
        first: memory.as_mut_ptr(),
        register,
        row: width,
    };
    let strip = Strip {
        lines: &lines,
        rows,
        spaces: [registers; 6],
        tables,
    };
    // SAFETY: the processor has the instructions, and the registers have as many rows.
    unsafe { (kernels.strip)(&strip) };
    memory.truncate(count);
    memory
}

fn of_words(words: impl IntoIterator<Item = i32>) -> Vec<f32> {
    words.into_iter().map(|x| f32::from_bits(x as u32)).collect()
}

#[test]
fn functions_of_programs_are_within_a_few_units_in_the_last_place() {
    type Case = (Operation, fn(f64) -> f64, f32, f32, f64);
    let cases: [Case; 5] = [
        (Operation::Exp, f64::exp, -103.0, 88.7, 2.0),
        (Operation::Log, f64::ln, 1e-3, 30.0, 2.0),
        (Operation::Tanh, f64::tanh, -10.0, 10.0, 8.0),
        (Operation::Sqrt, f64::sqrt, 0.0, 1e6, 0.5),
        (Operation::Reciprocal, f64::recip, 0.1, 1e6, 0.5),
    ];
    each(|kernels| {
        for (operation, f, low, high, units) in cases {
            let inputs: Vec<f32> = (0..1 << 17)
                .map(|i| low + (high - low) * (i as f32 / 131_071.0))
                .collect();
            let outputs = operate(kernels, operation, std::slice::from_ref(&inputs), &[]);
            for (x, got) in inputs.into_iter().zip(outputs) {
                let want = f(f64::from(x));
                // A unit in the last place of the nearest f32.
                let magnitude = (want.abs() as f32).max(f32::MIN_POSITIVE);
                let unit = f64::from(magnitude.next_up() - magnitude);
                let error = (f64::from(got) - want).abs() / unit;
                assert!(error <= units + 0.01, "{operation:?} of {x:e} = {want:e}, got {got:e}");
            }
        }
    });
}

#[test]
fn functions_of_programs_of_the_special_values() {
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let values = vec![
        0.0,
        -0.0,
        1.0,
        -1.0,
        inf,
        -inf,
        nan,
        f32::MAX,
        f32::MIN_POSITIVE / 4.0,
        200.0,
        -200.0,
    ];
    type Case = (Operation, fn(f32) -> f32);
    let cases: [Case; 4] = [
        (Operation::Exp, f32::exp),
        (Operation::Log, f32::ln),
        (Operation::Tanh, f32::tanh),
        (Operation::Floor, f32::floor),
    ];
    each(|kernels| {
        for (operation, f) in cases {
            let got = operate(kernels, operation, std::slice::from_ref(&values), &[]);
            for (&x, got) in values.iter().zip(got) {
                let want = f(x);
                let close = (got - want).abs() <= 2e-6 * want.abs();
                assert!(
                    got == want || got.is_nan() && want.is_nan() || close,
                    "{operation:?} of {x}: {got}"
                );
            }
        }
        for (operation, pick) in [
            (Operation::Min, f32::min as fn(f32, f32) -> f32),
            (Operation::Max, f32::max),
        ] {
            let (x, y) = (vec![1.0, nan, 2.0, nan, -inf], vec![2.0, 3.0, nan, nan, inf]);
            let got = operate(kernels, operation, &[x.clone(), y.clone()], &[]);
            for ((x, y), got) in x.into_iter().zip(y).zip(got) {
                let want = pick(x, y);
                assert!(
                    got == want || got.is_nan() && want.is_nan(),
                    "{operation:?} of {x}, {y}: {got}"
                );
            }
        }
        let floats = vec![0.5, -0.5, 3e9, -3e9, nan, 2_147_483_520.0, -2_147_483_648.0, inf, -7.25];
        let words = operate(kernels, Operation::ToIndex, std::slice::from_ref(&floats), &[]);
        for (x, word) in floats.into_iter().zip(words) {
            assert_eq!(word.to_bits() as i32, x.floor() as i32, "{x}");
        }
    });
}

#[test]
fn integers_of_programs_are_those_of_rust() {
    type Case = (Operation, fn(i32, i32) -> i32);
    let cases: [Case; 15] = [
        (Operation::AddWords, i32::wrapping_add),
        (Operation::SubtractWords, i32::wrapping_sub),
        (Operation::MultiplyWords, i32::wrapping_mul),
        (Operation::Quotient, |x, y| if y > 0 { x.div_euclid(y) } else { 0 }),
        (Operation::Remainder, |x, y| if y > 0 { x.rem_euclid(y) } else { x }),
        (Operation::MinWords, |x, y| x.min(y)),
        (Operation::MaxWords, |x, y| x.max(y)),
        (Operation::ShiftLeft, |x, y| x.wrapping_shl(y as u32)),
        (Operation::ShiftRight, |x, y| x.wrapping_shr(y as u32)),
        (Operation::LessWords, |x, y| -i32::from(x < y)),
        (Operation::LessOrEqualWords, |x, y| -i32::from(x <= y)),
        (Operation::EqualWords, |x, y| -i32::from(x == y)),
        (Operation::And, |x, y| x & y),
        (Operation::Or, |x, y| x | y),
        (Operation::Xor, |x, y| x ^ y),
    ];
    let few = [
        0,
        1,
        -1,
        2,
        7,
        31,
        33,
        1000,
        -1000,
        i32::MAX,
        i32::MIN,
        i32::MIN + 1,
        65_537,
        5,
        -7,
    ];
    let (x, y): (Vec<i32>, Vec<i32>) = few.into_iter().flat_map(|x| few.map(|y| (x, y))).unzip();
    each(|kernels| {
        for (operation, f) in cases {
            let operands = [of_words(x.iter().copied()), of_words(y.iter().copied())];
            let got = operate(kernels, operation, &operands, &[]);
            for ((&x, &y), got) in x.iter().zip(&y).zip(got) {
                assert_eq!(got.to_bits() as i32, f(x, y), "{operation:?} of {x} and {y}");
            }
        }
        type One = (Operation, fn(i32) -> i32);
        let one: [One; 3] = [
            (Operation::NegateWord, i32::wrapping_neg),
            (Operation::AbsWord, i32::wrapping_abs),
            (Operation::Not, |x| !x),
        ];
        for (operation, f) in one {
            let got = operate(kernels, operation, &[of_words(few)], &[]);
            for (x, got) in few.into_iter().zip(got) {
                assert_eq!(got.to_bits() as i32, f(x), "{operation:?} of {x}");
            }
        }
        let numbers = operate(kernels, Operation::ToScore, &[of_words(few)], &[]);
        assert_eq!(numbers, few.map(|x| x as f32));
    });
}

#[test]
fn tables_of_every_type_are_read_by_their_strides() {
    let words: Vec<u32> = (0..60).map(|i| (i as f32 * 0.5).to_bits()).collect();
    let f16s: Vec<u16> = (0..60).map(|i| half::f16::from_f32(i as f32 * 0.5).to_bits()).collect();
    let bf16s: Vec<u16> = (0..60)
        .map(|i| half::bf16::from_f32(i as f32 * 0.5).to_bits())
        .collect();
    let (i, j): (Vec<i32>, Vec<i32>) = (0..4).flat_map(|i| (0..5).map(move |j| (i, j))).unzip();
    each(|kernels| {
        for (element, first) in [
            (DataType::F32, words.as_ptr().cast()),
            (DataType::F16, f16s.as_ptr().cast()),
            (DataType::Bf16, bf16s.as_ptr().cast()),
        ] {
            let table = Table {
                first,
                element,
                rank: 2,
                last: [3, 4, 0, 0],
                strides: [2, 9, 0, 0],
            };
            let operands = [of_words(i.iter().copied()), of_words(j.iter().copied())];
            let got = operate(kernels, Operation::Load { table: 0 }, &operands, &[table]);
            for ((i, j), got) in i.iter().zip(&j).zip(got) {
                assert_eq!(got, (2 * i + 9 * j) as f32 * 0.5, "{element:?} [{i}, {j}]");
            }
            let outside = [of_words([-1, 9]), of_words([2, 7])];
            let got = operate(kernels, Operation::Load { table: 0 }, &outside, &[table]);
            assert_eq!(got, [9.0, 21.0]);
        }
    });
}

#[test]
fn kept_weights_are_those_of_the_generator() {
    let dropout = crate::program::Dropout {
        probability: 0.4,
        seed: 0x1234_5678_9abc_def0,
    };
    each(|kernels| {
        for (first_query, first_key, keys) in [(0, 0, 64), (16, 64, 40), (60, 128, 64), (7, 3, 5), (100, 30, 33)] {
            let width = kernels.strip_lanes;
            let mut kept = vec![1; keys * width];
            // SAFETY: the processor has the instructions, and there is a truth for each key and lane.
            unsafe {
                (kernels.keep)(&Keep {
                    keys,
                    first_query,
                    first_key,
                    batch: 3,
                    head: 5,
                    seed: dropout.key(),
                    threshold: dropout.threshold(),
                    kept: kept.as_mut_ptr(),
                });
            }
            for (place, kept) in kept.into_iter().enumerate() {
                let (key, query) = (first_key + (place / width) as u32, first_query + (place % width) as u32);
                let want = if dropout.keeps(3, 5, query, key) { u32::MAX } else { 0 };
                assert_eq!(kept, want, "({query}, {key})");
            }
        }
    });
}
