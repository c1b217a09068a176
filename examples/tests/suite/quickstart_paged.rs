//! Tests of the quickstart over paged caches, against attention computed here, key by key.

use safetensors::{Dtype, SafeTensors};

use crate::quickstart::{Scratch, printed, quickstart, refused};
use crate::quickstart_features::numbers;

const PAGES: [usize; 4] = [5, 8, 2, 16];
const HEADS: usize = 4;
/// Keys of each sequence, and their pages; the first page is shared.
const USED: [i32; 3] = [19, 0, 9];
const TABLE: [[i32; 3]; 3] = [[4, 0, 2], [-1, -1, -1], [4, 3, 77]];

/// Full attention of one query to the keys of a sequence: out and lse.
fn attend(q: &[f32], k: &[f32], v: &[f32], sequence: usize, kv_head: usize) -> (Vec<f64>, f64) {
    let [_, page_size, heads, head_dim] = PAGES;
    let (mut sum, mut out) = (0.0, vec![0.0; head_dim]);
    for key in 0..USED[sequence] as usize {
        let page = TABLE[sequence][key / page_size] as usize;
        let row = ((page * page_size + key % page_size) * heads + kv_head) * head_dim;
        let products = q.iter().zip(&k[row..]).map(|(q, k)| f64::from(q * k));
        let weight = (products.sum::<f64>() / 4.0).exp();
        sum += weight;
        (0..head_dim).for_each(|d| out[d] += weight * f64::from(v[row + d]));
    }
    let scale = if sum > 0.0 { 1.0 / sum } else { 0.0 };
    (out.iter().map(|x| x * scale).collect(), f64::ln(sum))
}

/// A file whose sequences have these numbers of queries, and the right out and lse in its layout.
fn file(name: &str, queries: [usize; 3], packed: bool) -> (Scratch, Vec<f64>, Vec<f64>) {
    let head_dim = PAGES[3];
    let total: usize = queries.iter().sum();
    let q = numbers(&[total, HEADS, head_dim], 1);
    let [k, v] = [2, 3].map(|seed| numbers(&PAGES, seed));
    let (mut out, mut lse, mut first) = (vec![0.0; q.len()], vec![0.0; total * HEADS], 0);
    for (sequence, &count) in queries.iter().enumerate() {
        for (query, head) in (0..count).flat_map(|query| (0..HEADS).map(move |head| (query, head))) {
            let (row, of_lse) = match packed {
                true => ((first + query) * HEADS + head, head * total + first + query),
                false => [first * HEADS + head * count + query; 2].into(),
            };
            let place = row * head_dim..(row + 1) * head_dim;
            let (of_query, sum) = attend(&q[place.clone()], &k, &v, sequence, head / 2);
            out[place].copy_from_slice(&of_query);
            lse[of_lse] = sum;
        }
        first += count;
    }
    let floats = |numbers: &[f32]| -> Vec<u8> { numbers.iter().flat_map(|x| x.to_le_bytes()).collect() };
    let integers = |numbers: &[i32]| -> Vec<u8> { numbers.iter().flat_map(|x| x.to_le_bytes()).collect() };
    let (q_shape, lse_shape) = match packed {
        true => (vec![total, HEADS, head_dim], vec![HEADS, total]),
        false => (vec![3, HEADS, queries[0], head_dim], vec![3, HEADS, queries[0]]),
    };
    let narrow = |numbers: &[f64]| -> Vec<f32> { numbers.iter().map(|&x| x as f32).collect() };
    let mut contents = vec![
        ("q", Dtype::F32, q_shape.clone(), floats(&q)),
        ("k", Dtype::F32, PAGES.to_vec(), floats(&k)),
        ("v", Dtype::F32, PAGES.to_vec(), floats(&v)),
        ("block_table", Dtype::I32, vec![3, 3], integers(&TABLE.concat())),
        ("seqused_k", Dtype::I32, vec![3], integers(&USED)),
        ("out", Dtype::F32, q_shape, floats(&narrow(&out))),
        ("lse", Dtype::F32, lse_shape, floats(&narrow(&lse))),
    ];
    if packed {
        let offsets = [0, queries[0], queries[0] + queries[1], total].map(|x| x as i32);
        contents.push(("cu_seqlens_q", Dtype::I32, vec![4], integers(&offsets)));
    }
    (Scratch::holding(name, &contents), out, lse)
}

#[test]
fn paged_caches_are_read_through_their_table() {
    for (queries, packed) in [([1, 1, 1], false), ([5, 5, 5], false), ([7, 1, 2], true)] {
        for device in ["cpu", "emulator:sm_80", "emulator:sm_90a"] {
            let (input, out, lse) = file("paged-input", queries, packed);
            let results = Scratch::new("paged-output");
            let arguments = [input.path(), "--device", device, "--paged", "--output", results.path()];
            let output = quickstart(&arguments);
            let text = printed(&output);
            assert_eq!(output.status.code(), Some(0), "{text}{output:?}");
            let cache = "paged     paged cache of 3 sequences of 0 to 19 keys (28 in all), in 4 of 5 pages of 8 keys";
            assert!(text.contains(cache), "{text}");
            let bytes = std::fs::read(results.path()).expect("it was written");
            let written = SafeTensors::deserialize(&bytes).expect("safetensors");
            for (name, want) in [("out", &out), ("lse", &lse)] {
                let got = written.tensor(name).expect("it was written");
                let of = |chunk: &[u8]| f32::from_le_bytes(chunk.try_into().expect("four bytes"));
                let got: Vec<f32> = got.data().chunks_exact(4).map(of).collect();
                assert_eq!(got.len(), want.len());
                for (got, want) in got.iter().zip(want) {
                    let same = f64::from(*got) == *want || (f64::from(*got) - want).abs() < 1e-5;
                    assert!(same, "{name} on {device}: {got}, want {want}");
                }
            }
        }
    }
}

#[test]
fn paged_files_without_a_cache_are_refused() {
    let tensors = ["q", "k", "v"].map(|name| (name, Dtype::F32, &[1, 8, 1, 8][..]));
    let input = Scratch::with("paged-missing", &tensors);
    let sentence = refused(&[input.path(), "--device", "cpu", "--paged"]);
    assert!(
        sentence.contains("no tensor `block_table`, which --paged needs"),
        "{sentence}"
    );
    let sentence = refused(&[input.path(), "--device", "cpu", "--paged", "--backward"]);
    assert!(
        sentence.contains("--paged") && sentence.contains("--backward"),
        "{sentence}"
    );
}
