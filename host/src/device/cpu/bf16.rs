//! Products of bf16 by processor instructions: AVX512-BF16 and the tiles of AMX on x86-64, BFMMLA on aarch64.
//!
//! All multiply pairs: a word holds two neighbours along the inner axis. Sums are f32.

#[cfg(target_arch = "aarch64")]
mod arm;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(target_arch = "aarch64")]
pub(super) use arm::{NEON_BF16, has_neon_bf16};
#[cfg(target_arch = "x86_64")]
pub(super) use x86::{AMX, AVX512_BF16, has_amx, has_avx512_bf16, is_of_amd, prefers_avx512_bf16};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::cpu::kernels::{PairProduct, Pairs, Terms, terms};

    /// Lists the ways in which this processor multiplies pairs.
    fn kinds() -> Vec<(&'static str, &'static Pairs)> {
        let mut kinds: Vec<(&'static str, &'static Pairs)> = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if has_avx512_bf16() {
                kinds.push(("AVX512-BF16", &AVX512_BF16));
            }
            if has_amx() {
                kinds.push(("AMX", &AMX));
            }
        }
        #[cfg(target_arch = "aarch64")]
        if has_neon_bf16() {
            kinds.push(("BFMMLA", &NEON_BF16));
        }
        kinds
    }

    #[test]
    fn products_of_pairs_are_those_of_their_definition() {
        for (name, pairs) in kinds() {
            println!("{name}");
            // On aarch64 registers are narrower than 16 columns.
            let narrow: &[_] = if cfg!(target_arch = "aarch64") {
                &[(16, 16, 4), (32, 32, 20)]
            } else {
                &[]
            };
            let sizes = [(16, 16, 16), (32, 32, 32), (48, 16, 32), (64, 64, 16), (48, 16, 80)];
            for &(rows, inner, columns) in sizes.iter().chain(narrow) {
                // Small whole numbers, so that every sum is exact.
                let value = |i: usize| half::bf16::from_f32((i * 7 % 11) as f32 - 5.0);
                let word = |i: usize| u32::from(value(2 * i).to_bits()) | u32::from(value(2 * i + 1).to_bits()) << 16;
                let a: Vec<u32> = (0..3 * rows * inner).map(word).collect();
                let b: Vec<u32> = (0..3 * inner * columns).map(|i| word(3 * i)).collect();
                let all = [Terms::One, Terms::Three, Terms::Four, Terms::Six];
                for (kind, accumulate) in all.into_iter().flat_map(|kind| [(kind, false), (kind, true)]) {
                    let mut c: Vec<f32> = (0..rows * columns).map(|i| i as f32).collect();
                    // SAFETY: the processor has the instructions, and the matrices are of these sizes.
                    unsafe {
                        (pairs.begin)();
                        (pairs.product)(&PairProduct {
                            rows,
                            inner,
                            columns,
                            a: a.as_ptr(),
                            a_stride: inner,
                            a_part: rows * inner,
                            b: b.as_ptr(),
                            b_stride: columns,
                            b_part: inner * columns,
                            terms: kind,
                            c: c.as_mut_ptr(),
                            c_stride: columns,
                            accumulate,
                        });
                        (pairs.end)();
                    }
                    let halves = |word: u32| [f32::from_bits(word << 16), f32::from_bits(word & 0xffff_0000)];
                    for (i, got) in c.into_iter().enumerate() {
                        let (row, column) = (i / columns, i % columns);
                        let term = |k: usize, (of_a, of_b): (usize, usize)| {
                            let x = halves(a[(of_a * rows + row) * inner + k]);
                            let y = halves(b[(of_b * inner + k) * columns + column]);
                            x[0] * y[0] + x[1] * y[1]
                        };
                        let product = |k: usize| terms(kind as usize).iter().map(|&of| term(k, of)).sum::<f32>();
                        let before = if accumulate { i as f32 } else { 0.0 };
                        let want = before + (0..inner).map(product).sum::<f32>();
                        assert_eq!(got, want, "{name} ({row}, {column}), {kind:?}");
                    }
                }
            }
        }
    }

    /// Tests that the terms are all products of parts down to the required size, each once: of two f16 numbers all.
    #[test]
    fn terms_are_the_products_that_matter() {
        for (kind, parts) in [(Terms::One, 1), (Terms::Three, 2), (Terms::Four, 2), (Terms::Six, 3)] {
            let list = terms(kind as usize);
            assert_eq!(list.len(), kind as usize);
            let mut all: Vec<_> = list.to_vec();
            all.sort();
            let of_b = |of_a| if kind == Terms::Four { parts } else { parts - of_a };
            let each = (0..parts).flat_map(|of_a| (0..of_b(of_a)).map(move |of_b| (of_a, of_b)));
            assert_eq!(all, each.collect::<Vec<_>>());
            let share = |two: &[(usize, usize)]| two[0].0 == two[1].0 || two[0].1 == two[1].1;
            assert!(list.windows(2).all(share), "a part in common with the one before");
        }
    }
}
