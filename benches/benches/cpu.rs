//! Speed of the CPU device: `cargo bench -p benches --bench cpu [-- NAME]`. `FLASH_ATTENTION_CPU` chooses the
//! instruction set.
//!
//! Items are FLOPs (see `Shape::forward_flops`), so items per second are FLOP/s.

use benches::{Problem, Shape};
use divan::Bencher;
use divan::counter::ItemsCount;
use flash_attention::{Device, Dtype};

fn main() {
    eprintln!("{}", Device::cpu().name());
    divan::main();
}

/// Shapes measured: causal mask, batch, heads, lengths of queries and keys, head_dim.
const SHAPES: [(bool, [usize; 5]); 8] = [
    (false, [1, 12, 512, 512, 64]),
    (false, [1, 12, 2048, 2048, 64]),
    (false, [1, 8, 4096, 4096, 128]),
    (false, [1, 2, 16384, 16384, 64]),
    (true, [1, 12, 512, 512, 64]),
    (true, [1, 12, 2048, 2048, 64]),
    (false, [1, 1, 1, 16384, 64]),
    (false, [1, 32, 1, 4096, 128]),
];

/// A row of the table; its text is the name of the benchmark.
#[derive(Clone, Copy)]
struct Row(Shape);

impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Shape {
            dtype,
            causal,
            batch,
            heads,
            seqlen_q,
            seqlen_k,
            head_dim,
        } = self.0;
        let mask = if causal { "causal" } else { "full" };
        let name = dtype.name();
        write!(f, "{name} {mask} {batch}x{heads}x{seqlen_q}x{seqlen_k}x{head_dim}")
    }
}

/// Iterates over all dtypes of all shapes.
fn rows() -> impl Iterator<Item = Row> {
    SHAPES
        .into_iter()
        .flat_map(|(causal, [batch, heads, seqlen_q, seqlen_k, head_dim])| {
            [Dtype::F32, Dtype::Bf16, Dtype::F16].map(|dtype| {
                Row(Shape {
                    dtype,
                    causal,
                    batch,
                    heads,
                    seqlen_q,
                    seqlen_k,
                    head_dim,
                })
            })
        })
}

/// Makes the problem of a row and solves it once, so that first accesses to memory are not measured.
fn prepare(row: Row) -> Box<dyn Problem> {
    let mut problem = row
        .0
        .problem(&Device::cpu())
        .expect("the machine has room for the shape");
    problem.forward().expect("a valid problem");
    problem
}

#[divan::bench(args = rows(), max_time = 2)]
fn forward(bencher: Bencher<'_, '_>, row: Row) {
    let mut problem = prepare(row);
    bencher
        .counter(ItemsCount::new(row.0.forward_flops() as u64))
        .bench_local(|| problem.forward().expect("a valid problem"));
}

#[divan::bench(args = rows().filter(|row| row.0.seqlen_q > 1), max_time = 2)]
fn forward_and_backward(bencher: Bencher<'_, '_>, row: Row) {
    let mut problem = prepare(row);
    bencher
        .counter(ItemsCount::new((3.5 * row.0.forward_flops()) as u64))
        .bench_local(|| {
            problem.forward().expect("a valid problem");
            problem.backward().expect("a valid problem")
        });
}
