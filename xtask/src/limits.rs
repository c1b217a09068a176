//! Checks of main loops: the number of products computed from the tiles, and limits from one table.

use crate::machine_code::Loop;
use crate::step::Step;
use crate::table::Row;
use flash_attention_kernels::entries::{Arch, Pass};

/// Limits of one pass at one head_dim, summed over its main loops, for 64 x 64 scores shared by four warps: stall
/// cycles, and instructions of one warp other than products. They hold for f16 and bf16, full and causal, on every
/// GPU architecture, for the unmasked path.
struct Limit(Arch, Pass, u32, [u32; 2]);

/// Values of ptxas 13.5.37. If a kernel improves, lower its limit. `benches/results/sass.md` shows those of
/// FlashAttention-3 beside them.
#[rustfmt::skip]
const LIMITS: &[Limit] = &[
    Limit(Arch::Sm90a, Pass::Forward, 64, [416, 208]),
    Limit(Arch::Sm90a, Pass::Forward, 96, [430, 209]),
    Limit(Arch::Sm90a, Pass::Forward, 128, [472, 236]),
    Limit(Arch::Sm90a, Pass::Forward, 192, [551, 220]),
    Limit(Arch::Sm90a, Pass::Forward, 256, [653, 260]),
    Limit(Arch::Sm90a, Pass::BackwardDqkv, 64, [633, 289]),
    Limit(Arch::Sm90a, Pass::BackwardDqkv, 96, [819, 371]),
    Limit(Arch::Sm90a, Pass::BackwardDqkv, 128, [867, 390]),
    Limit(Arch::Sm90a, Pass::BackwardDqkv, 192, [2060, 748]),
    Limit(Arch::Sm90a, Pass::BackwardDqkv, 256, [2084, 802]),
    Limit(Arch::Sm80, Pass::Forward, 32, [478, 191]),
    Limit(Arch::Sm80, Pass::Forward, 64, [756, 264]),
    Limit(Arch::Sm80, Pass::Forward, 96, [1050, 301]),
    Limit(Arch::Sm80, Pass::Forward, 128, [1310, 307]),
    Limit(Arch::Sm80, Pass::Forward, 192, [1842, 384]),
    Limit(Arch::Sm80, Pass::Forward, 256, [2517, 575]),
    Limit(Arch::Sm80, Pass::BackwardDq, 32, [838, 221]),
    Limit(Arch::Sm80, Pass::BackwardDq, 64, [1207, 265]),
    Limit(Arch::Sm80, Pass::BackwardDq, 96, [1842, 362]),
    Limit(Arch::Sm80, Pass::BackwardDq, 128, [2204, 396]),
    Limit(Arch::Sm80, Pass::BackwardDq, 192, [3028, 504]),
    Limit(Arch::Sm80, Pass::BackwardDq, 256, [5116, 872]),
    Limit(Arch::Sm80, Pass::BackwardDkv, 32, [1035, 305]),
    Limit(Arch::Sm80, Pass::BackwardDkv, 64, [1604, 362]),
    Limit(Arch::Sm80, Pass::BackwardDkv, 96, [2494, 502]),
    Limit(Arch::Sm80, Pass::BackwardDkv, 128, [2830, 552]),
    Limit(Arch::Sm80, Pass::BackwardDkv, 192, [5824, 1018]),
    Limit(Arch::Sm80, Pass::BackwardDkv, 256, [9424, 1740]),
];

/// Limits of the forward kernels over e4m3 inputs, by head_dim.
#[rustfmt::skip]
const FP8_LIMITS: &[(u32, [u32; 2])] = &[
    (64, [455, 220]),
    (96, [453, 227]),
    (128, [453, 236]),
    (192, [485, 206]),
    (256, [637, 266]),
];

/// Limits of kernels in clusters, of which a warp releases each slot in every block.
#[rustfmt::skip]
const CLUSTER_LIMITS: &[Limit] = &[
    Limit(Arch::Sm90a, Pass::Forward, 128, [476, 214]),
    Limit(Arch::Sm90a, Pass::Forward, 192, [540, 224]),
    Limit(Arch::Sm90a, Pass::Forward, 256, [656, 266]),
];

/// Returns the products of one warpgroup's step that a Hopper kernel must have, computed from its tiles, in units of
/// 64 rows and depth 16, or 32 of e4m3. There is one number for each main loop, and none for a kernel without products.
///
/// ptxas 13 neither rotates nor unrolls these loops, so each appears in the code as one loop with exactly its step.
fn products_of_step(entry: &Row) -> Vec<u32> {
    let depth = if entry.quantized { 32 } else { 16 };
    let (head_dim, queries, keys) = (entry.head_dim / depth, entry.block_m / depth, entry.block_n / depth);
    match entry.pass {
        // Q K^T along head_dim, P V along keys.
        Some(Pass::Forward) => vec![head_dim + keys],
        // Q K^T, dO V^T of a share of the keys; dO^T P, Q^T dS and dS K of slices of 64 columns.
        Some(Pass::BackwardDqkv) if entry.head_dim > 128 => {
            let slices = entry.head_dim / 64 / (entry.threads / 128 - 1);
            vec![2 * head_dim + slices * (2 * queries + keys)]
        }
        // K Q^T, V dO^T; P^T dO, dS^T Q; a square of dS K along all keys.
        Some(Pass::BackwardDqkv) => vec![2 * head_dim + 2 * queries + keys],
        _ => vec![],
    }
}

/// Loops of one kernel.
pub struct Loops<'a> {
    /// Main loops: for each expected number of products, the loop with the fewest other instructions.
    pub main: Vec<&'a Loop>,
    /// The other loops, which apply the mask.
    pub masked: Vec<&'a Loop>,
}

impl<'a> Loops<'a> {
    /// Sorts loops; they come with the fewest other instructions first.
    pub fn of(loops: &'a [Loop]) -> Self {
        let is_first = |&(at, found): &(usize, &Loop)| {
            let mut earlier = loops[..at].iter();
            earlier.all(|other| other.products() != found.products())
        };
        let (main, masked): (Vec<_>, Vec<_>) = loops.iter().enumerate().partition(is_first);
        let loops = |found: Vec<(usize, &'a Loop)>| found.into_iter().map(|(_, found)| found).collect();
        Self {
            main: loops(main),
            masked: loops(masked),
        }
    }

    /// Returns one step of each main loop.
    pub fn steps(&self) -> Vec<Step> {
        self.main.iter().map(|found| Step::of(&found.leanest)).collect()
    }
}

/// Returns the stall cycles and the instructions other than products of a kernel's main loops for 64 x 64 scores.
pub fn for_scores(entry: &Row, steps: &[Step]) -> [f64; 2] {
    let stalls: u32 = steps.iter().map(|step| step.stalls).sum();
    let others: u32 = steps.iter().map(Step::others).sum();
    [stalls, others].map(|sum| f64::from(sum) / tiles(entry))
}

/// Returns the number of 64 x 64 tiles that four multiplying warps of a kernel share in a step.
pub fn tiles(entry: &Row) -> f64 {
    let loading = if entry.arch == Arch::Sm90a { 4 } else { 0 };
    let fours = f64::from(entry.threads / 32 - loading) / 4.0;
    f64::from(entry.block_m * entry.block_n) / 4096.0 / fours
}

/// Describes main loops with other products than their tiles require, or above their limit.
pub fn fault(entry: &Row, loops: &[Loop]) -> Option<String> {
    let steps = Loops::of(loops).steps();
    let mut found: Vec<u32> = steps.iter().map(|step| step.instructions - step.others()).collect();
    found.sort_by(|a, b| b.cmp(a));
    let wanted = products_of_step(entry);
    if entry.arch == Arch::Sm90a && found != wanted {
        return Some(format!("the main loops have {found:?} products, not {wanted:?}"));
    }
    if steps.is_empty() {
        return None;
    }
    let key = (entry.arch, entry.pass?, entry.head_dim);
    let of = |limits: &[Limit]| {
        let limit = limits.iter().find(|limit| (limit.0, limit.1, limit.2) == key);
        limit.map(|limit| limit.3)
    };
    let limit = match (entry.quantized, entry.cluster) {
        (true, _) => FP8_LIMITS.iter().find(|limit| limit.0 == key.2).map(|limit| limit.1),
        (false, 1) => of(LIMITS),
        (false, _) => of(CLUSTER_LIMITS),
    };
    match limit {
        Some(limit) => over(for_scores(entry, &steps), limit),
        None => Some("has no limit in xtask/src/limits.rs".to_owned()),
    }
}

/// Describes values above their limits.
fn over(values: [f64; 2], limits: [u32; 2]) -> Option<String> {
    let names = ["cycles of stalls", "instructions beside the products"];
    let mut all = names.iter().zip(values).zip(limits);
    let ((name, value), limit) = all.find(|((_, value), limit)| *value > f64::from(*limit))?;
    Some(format!(
        "{value:.1} {name} for 64 x 64 scores in the main loop, {limit} allowed"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine_code::Instruction;
    use crate::table::tables;

    fn row(name: &str) -> Row {
        let rows: Vec<_> = tables().into_iter().flat_map(|table| table.rows).collect();
        let row = rows.into_iter().find(|row| row.name == name);
        Row {
            head_dim: 64,
            block_m: 64,
            block_n: 128,
            threads: 256,
            ..row.expect("in a table")
        }
    }

    fn a_loop(products: usize, others: usize) -> Loop {
        let way: Vec<_> = [("HGMMA.64x64x16.F32 R24, gdesc[UR8], R24", products), ("NOP", others)]
            .iter()
            .flat_map(|&(text, times)| std::iter::repeat_n(Instruction::unscheduled(text), times))
            .collect();
        Loop {
            longest: way.clone(),
            leanest: way,
        }
    }

    #[test]
    fn products_follow_from_tiles() {
        let steps = |name: &str| {
            let row = row(name);
            (products_of_step(&row), products_of_step(&Row { head_dim: 128, ..row }))
        };
        assert_eq!(steps("hopper_forward_f16_d64"), (vec![12], vec![16]));
        assert_eq!(steps("hopper_backward_dqkv_f16_d64"), (vec![24], vec![32]));
        let wide = tables().into_iter().flat_map(|table| table.rows);
        let wide = wide.filter(|row| row.name.starts_with("hopper_backward_dqkv_f16_d") && row.head_dim > 128);
        let wide: Vec<_> = wide.map(|row| products_of_step(&row)).collect();
        assert_eq!(wide, [vec![38], vec![38], vec![58], vec![58]]);
        assert_eq!(steps("hopper_forward_fp8_f16_d64"), (vec![6], vec![8]));
    }

    #[test]
    fn main_loops_are_the_leanest_of_each_walk() {
        let all = [a_loop(12, 100), a_loop(12, 200), a_loop(8, 300)];
        let loops = Loops::of(&all);
        assert_eq!(loops.main, [&all[0], &all[2]]);
        assert_eq!(loops.masked, [&all[1]]);
    }

    #[test]
    fn loops_are_held_to_tiles_and_limits() {
        let forward = row("hopper_forward_f16_d64");
        let says = |row: &Row, loops: &[Loop], words: &str| fault(row, loops).expect("a fault").contains(words);
        assert!(says(&forward, &[a_loop(11, 1)], "[11] products, not [12]"));
        assert!(says(&forward, &[], "[] products"));
        assert_eq!(fault(&forward, &[a_loop(12, 1)]), None);
        // 64 x 128 scores of one warpgroup: two tiles.
        assert!(says(&forward, &[a_loop(12, 2000)], "1000.0 instructions beside"));
        let unknown = Row {
            head_dim: 16,
            block_n: 16,
            ..forward
        };
        assert!(says(&unknown, &[a_loop(2, 1)], "no limit"));
        assert_eq!(over([10.0, 20.0], [10, 20]), None);
        assert!(
            over([10.1, 20.0], [10, 20])
                .expect("a fault")
                .starts_with("10.1 cycles")
        );
    }

    #[test]
    fn a_pass_has_one_limit_a_head_dim() {
        let key = |limit: &Limit| (limit.0, limit.1, limit.2);
        for limits in [LIMITS, CLUSTER_LIMITS] {
            let twice = |(at, limit): (usize, &Limit)| limits[..at].iter().any(|other| key(other) == key(limit));
            assert!(!limits.iter().enumerate().any(twice));
        }
    }
}
