//! Block masks: what intervals say of tiles against every pair in them, and block-sparse attention from outside.

use flash_attention::program::{BlockMask, Coverage, Pair};
use flash_attention::reference::{self, Dims};
use flash_attention::{Attention, Device, Error, Tensor};

use crate::program::numbers;

fn tensor(shape: [usize; 4]) -> Tensor<f32> {
    let data = vec![0.0; shape.iter().product()];
    Tensor::from_slice(&Device::cpu(), shape, &data).expect("a small tensor")
}

fn ids(shape: [usize; 2], of: impl Fn(usize) -> i32) -> Tensor<i32> {
    let data: Vec<i32> = (0..shape[0] * shape[1]).map(of).collect();
    Tensor::from_slice(&Device::cpu(), shape, &data).expect("a small tensor")
}

/// The coverage of every tile, from all of its pairs.
fn brute_force(attention: &Attention, [batch, heads, q, k]: [usize; 4], [m, n]: [usize; 2]) -> Vec<Coverage> {
    let evaluator = attention.evaluator().expect("a valid program");
    let sees = |batch: usize, head: usize, query: usize, key: usize| {
        let [query, key, seqlen_q, seqlen_k] = [query, key, q, k].map(|x| x as i32);
        let pair = Pair {
            batch: batch as i32,
            head: head as i32,
            kv_head: head as i32,
            query,
            key,
            seqlen_q,
            seqlen_k,
        };
        let causal = !attention.is_causal() || key <= query + seqlen_k - seqlen_q;
        causal && evaluator.as_ref().is_none_or(|evaluator| evaluator.sees(&pair))
    };
    let mut tiles = Vec::new();
    for (batch, head) in (0..batch * heads).map(|i| (i / heads, i % heads)) {
        for (row, column) in (0..q.div_ceil(m) * k.div_ceil(n)).map(|i| (i / k.div_ceil(n), i % k.div_ceil(n))) {
            let queries = row * m..(row * m + m).min(q);
            let keys = column * n..(column * n + n).min(k);
            let pairs = queries.flat_map(|query| keys.clone().map(move |key| (query, key)));
            let seen: Vec<bool> = pairs.map(|(query, key)| sees(batch, head, query, key)).collect();
            tiles.push(match seen.iter().filter(|seen| **seen).count() {
                0 => Coverage::Empty,
                count if count == seen.len() => Coverage::Full,
                _ => Coverage::Partial,
            });
        }
    }
    tiles
}

#[test]
fn tiles_of_coordinate_masks_are_exact() {
    let masks = [
        Attention::new(),
        Attention::new().causal(),
        Attention::new().window(20, 3),
        Attention::new().window(None, 5).causal(),
        Attention::new().prefix(23),
        Attention::new().top_left(),
        Attention::new().prefix(30).window(40, 10),
        Attention::new().mask(|at| at.key.less_than(9) | at.query.at_least(50)),
    ];
    for attention in masks {
        for (q, k) in [(70, 70), (33, 90), (90, 33)] {
            for block in [[16, 16], [16, 8], [7, 32], [100, 100]] {
                let (queries, keys) = (tensor([1, 1, q, 8]), tensor([1, 1, k, 8]));
                let blocks = attention.blocks_of(&queries, &keys, block).expect("a valid problem");
                assert_eq!(
                    blocks.tiles(),
                    brute_force(&attention, [1, 1, q, k], block),
                    "{attention:?} {q} {k} {block:?}"
                );
            }
        }
    }
}

#[test]
fn no_tile_of_any_mask_is_wrong_and_sorted_documents_are_exact() {
    let sorted = (
        ids([2, 70], |i| (i % 70 / 13) as i32),
        ids([1, 70], |i| (i / 13) as i32),
    );
    let mixed = ids([1, 70], |i| (i * 7 % 5) as i32);
    let masks = [
        (true, Attention::new().documents(&sorted.0, &sorted.1)),
        (true, Attention::new().documents(&sorted.0, &sorted.1).causal()),
        (false, Attention::new().documents(&mixed, &mixed)),
        (false, Attention::new().chunked(20)),
        (false, Attention::new().dilated(3)),
        (
            false,
            Attention::new().mask(|at| (at.query ^ at.key).less_than(9) | (at.key + at.head).equals(3)),
        ),
        (
            false,
            Attention::new().mask(|at| !((at.query * at.key) % 5).at_most(at.batch)),
        ),
    ];
    for (exact, attention) in masks {
        let q = tensor([2, 3, 70, 8]);
        let blocks = attention.blocks_of(&q, &q, [16, 8]).expect("a valid problem");
        let [batch, heads] = blocks.batch_and_heads();
        let want = brute_force(&attention, [batch, heads, 70, 70], [16, 8]);
        for (got, want) in blocks.tiles().iter().zip(&want) {
            assert!(
                got == want || *got == Coverage::Partial,
                "{attention:?}: {got:?} {want:?}"
            );
        }
        assert!(!exact || blocks.tiles() == want, "{attention:?}");
        assert_eq!(blocks.tiles().len(), want.len());
    }
}

#[test]
fn lists_are_rows_and_columns_of_the_tiles() {
    let q = tensor([1, 1, 64, 8]);
    let blocks = Attention::new()
        .window(8, 0)
        .blocks_of(&q, &q, [16, 16])
        .expect("a valid problem");
    let full_list: Vec<_> = blocks.keys_of(0, 0, 2).collect();
    assert_eq!(full_list, [(1, Coverage::Partial), (2, Coverage::Partial)]);
    let transposed: Vec<_> = blocks.queries_of(0, 0, 2).collect();
    assert_eq!(transposed, [(2, Coverage::Partial), (3, Coverage::Partial)]);
    assert_eq!(blocks.density(), 7.0 / 16.0);
    let picture = "4 x 4 tiles of 16 queries x 16 keys, 43.8 % computed\n▒···\n▒▒··\n·▒▒·\n··▒▒";
    assert_eq!(blocks.to_string(), picture);
    assert_eq!(blocks.to_svg().matches("#9a9a9a").count(), 7);
}

#[test]
fn a_given_block_mask_is_the_attention_of_its_visible_tiles() {
    let visible = [
        true, false, true, false, true, false, false, true, false, true, true, true,
    ];
    let blocks = BlockMask::from_dense([1, 2], [20, 25], [10, 10], &visible).expect("6 tiles a head");
    let csr = BlockMask::from_csr([1, 2], [20, 25], [10, 10], &[0, 2, 3, 4, 7], &[0, 2, 1, 1, 2, 0, 1]);
    assert_eq!(csr.expect("rising offsets"), blocks);
    let attention = Attention::new()
        .block_mask(&blocks, &Device::cpu())
        .expect("a small table");
    let by_hand = Attention::new().mask(|at| {
        let (row, column) = (at.query / 10, at.key / 10);
        let first = (row.equals(0) & column.differs_from(1)) | (row.equals(1) & column.equals(1));
        let second = (row.equals(0) & column.equals(1)) | row.equals(1);
        (at.head.equals(0) & first) | (at.head.equals(1) & second)
    });
    let shapes = ([2, 2, 20, 8], [2, 2, 25, 8]);
    let [q, k, v] =
        [(shapes.0, 1), (shapes.1, 2), (shapes.1, 3)].map(|(shape, seed)| numbers(shape.iter().product(), seed));
    let of = |attention: &Attention| {
        let evaluator = attention.evaluator().expect("a valid program");
        reference::forward(
            &Dims::with_program(attention, shapes.0, shapes.1, evaluator),
            &q,
            &k,
            &v,
        )
    };
    assert_eq!(of(&attention), of(&by_hand));
    let (q, k) = (tensor(shapes.0), tensor(shapes.1));
    let again = attention.blocks_of(&q, &k, [10, 10]).expect("a valid problem");
    assert_eq!(again, blocks, "the mask of a block mask has its tiles");
}

#[test]
fn bad_block_masks_are_typed_errors() {
    let refused = [
        (
            BlockMask::from_dense([1, 1], [20, 25], [10, 10], &[true; 5]),
            "`data` has 5 elements, shape [1, 1, 2, 3] needs 6",
        ),
        (
            BlockMask::from_dense([1, 1], [20, 25], [0, 10], &[]),
            "`block_mask` is [1, 1] of [20, 25] in tiles of [0, 10], expected sizes of at least 1",
        ),
        (
            BlockMask::from_csr([1, 1], [20, 25], [10, 10], &[0, 1, 1], &[3]),
            "`columns` has 3 for row 0, expected rising numbers up to 2",
        ),
        (
            BlockMask::from_csr([1, 1], [20, 25], [10, 10], &[0, 2, 1], &[0, 1]),
            "`offsets` has 1 for row 1, expected rising numbers up to 1",
        ),
    ];
    for (result, sentence) in refused {
        assert_eq!(result.expect_err(sentence).to_string(), sentence);
    }
    let blocks = BlockMask::from_dense([1, 3], [20, 20], [10, 10], &[true; 12]).expect("4 tiles a head");
    let attention = Attention::new()
        .block_mask(&blocks, &Device::cpu())
        .expect("a small table");
    let q = tensor([1, 4, 20, 8]);
    let error = attention.blocks(&q, &q).expect_err("three heads of four");
    assert!(matches!(error, Error::Program(_)), "{error}");
    assert_eq!(
        error.to_string(),
        "`block_mask` has 3 entries on axis 1, the index reaches 0 ..= 3"
    );
}
