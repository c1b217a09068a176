//! Queries that share what is read have the bits of each alone, wherever rows lie.

use half::{bf16, f16};

use super::super::{Few, Kernels, Listed, MAX_LANES, Query, Rows, Strided, TOGETHER};
use super::each;
use flash_attention_kernels::entries::Dtype;

/// Attention of some queries over one tile of keys.
struct Case {
    dtype: Dtype,
    keys: usize,
    head_dim: usize,
    head_dim_v: usize,
}

/// Largest score, sum, key with the largest score and output of a query.
type State = (u32, u32, u32, Vec<u32>);

/// How the places of rows are given.
#[derive(Clone, Copy, Debug)]
enum Places {
    Strided,
    Paged,
    Listed,
}

impl Case {
    /// Bytes of rows of numbers without a pattern.
    fn rows(&self, count: usize, width: usize, seed: u32) -> Vec<u8> {
        let numbers = numbers(count * width, seed);
        let bytes = |x: &f32| match self.dtype {
            Dtype::F32 => x.to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(*x).to_le_bytes().to_vec(),
            Dtype::Bf16 => bf16::from_f32(*x).to_le_bytes().to_vec(),
        };
        numbers.iter().flat_map(bytes).collect()
    }

    /// Attends queries that follow each other in memory, all at once.
    fn attend(&self, kernels: &Kernels, queries: &[f32], places: Places) -> Vec<State> {
        let [depth, depth_v] = [self.head_dim, self.head_dim_v].map(|head_dim| head_dim.next_multiple_of(MAX_LANES));
        let count = queries.len() / depth;
        let (k, v) = (
            self.rows(self.keys, self.head_dim, 1),
            self.rows(self.keys, self.head_dim_v, 2),
        );
        let mut addresses = [Vec::new(), Vec::new()];
        let mut place = |rows: &[u8], of: usize| {
            let stride = rows.len() / self.keys;
            let strided = Strided(rows.as_ptr(), stride);
            // The list has the addresses a row before each.
            addresses[of] = (rows.chunks(stride).map(|row| row.as_ptr().wrapping_sub(stride))).collect();
            let listed = Listed(addresses[of].as_ptr(), stride);
            match places {
                Places::Strided => Rows::Strided {
                    rows: strided,
                    later: strided,
                },
                Places::Paged => Rows::Paged {
                    rows: listed,
                    later: strided,
                },
                Places::Listed => Rows::Listed {
                    rows: listed,
                    later: listed,
                },
            }
        };
        let (k, v) = (place(&k, 0), place(&v, 1));
        let (mut max, mut sum, mut best) = (vec![0.5_f32; count], vec![1.0_f32; count], vec![7_u32; count]);
        let mut output = numbers(depth_v, 3).repeat(count);
        let mut scores = vec![0.0; 2 * TOGETHER * self.keys.next_multiple_of(MAX_LANES)];
        // SAFETY: each query has its place in each.
        let places: Vec<Query> = (0..count)
            .map(|row| unsafe {
                Query {
                    query: queries.as_ptr().add(row * depth),
                    max: max.as_mut_ptr().add(row),
                    sum: sum.as_mut_ptr().add(row),
                    best: best.as_mut_ptr().add(row),
                    output: output.as_mut_ptr().add(row * depth_v),
                }
            })
            .collect();
        // SAFETY: the processor has the instructions, the rows exist, and there is room for scores.
        unsafe {
            (kernels.few)(&Few {
                keys: self.keys,
                dtype: self.dtype,
                k,
                v,
                head_dim: self.head_dim,
                head_dim_v: self.head_dim_v,
                queries: &places,
                scores: scores.as_mut_ptr(),
                scale_log2: 0.7,
                first_key: 100,
                into_l1: false,
            });
        }
        let outputs = output.chunks(depth_v).map(|row| &row[..self.head_dim_v]);
        let bits = |row: &[f32]| row.iter().map(|x| x.to_bits()).collect();
        let states = max.iter().zip(&sum).zip(&best).zip(outputs);
        states
            .map(|(((max, sum), best), output)| (max.to_bits(), sum.to_bits(), *best, bits(output)))
            .collect()
    }
}

/// Numbers without a pattern, in -1 .. 1.
fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

#[test]
fn queries_together_have_the_bits_of_each_alone() {
    each(|kernels| {
        for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            for (keys, head_dim, head_dim_v) in [(1, 8, 8), (5, 24, 40), (16, 64, 64), (63, 128, 72), (64, 136, 256)] {
                let case = Case {
                    dtype,
                    keys,
                    head_dim,
                    head_dim_v,
                };
                let depth = head_dim.next_multiple_of(MAX_LANES);
                // Four, two and one of them share rows. Elements past head_dim are zeros.
                let mut queries = numbers(7 * depth, 4);
                for query in queries.chunks_mut(depth) {
                    query[head_dim..].fill(0.0);
                }
                let alone: Vec<State> = (queries.chunks(depth))
                    .flat_map(|query| case.attend(kernels, query, Places::Strided))
                    .collect();
                assert!(
                    alone.iter().any(|(max, ..)| f32::from_bits(*max) > 0.5),
                    "a score is the largest"
                );
                for places in [Places::Strided, Places::Paged, Places::Listed] {
                    let together = case.attend(kernels, &queries, places);
                    assert_eq!(together, alone, "{dtype:?}, {keys} keys, {places:?}");
                }
            }
        }
    });
}
