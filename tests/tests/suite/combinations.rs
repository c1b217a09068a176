//! Features in combination on every device, forward and backward: each alone, every pair, all but one, and all, in every dtype, at
//! head_dims that fill those of the kernels and that do not, where query heads share keys.
//!
//! These are some 21,000 cases, numbered. A run draws [`DRAWN`] of them, always the same unless `PROPTEST_RNG_SEED` says otherwise. The
//! variable [`CHOICE`] runs more: `COMBINATIONS=500` or `COMBINATIONS=all`, and by their numbers `COMBINATIONS=at:17,20300`.

use std::any::Any;
use std::fmt;
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};

use flash_attention::{Attention, Device, Dtype};
use flash_attention_tests::programs::{CLOSURES, FEATURES, check_program, with_feature};
use flash_attention_tests::{Case, devices, for_dtype};
use rand::SeedableRng as _;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom as _, index};

/// Name of the environment variable that says which combinations run.
const CHOICE: &str = "COMBINATIONS";

/// Number of combinations that a run draws.
const DRAWN: usize = 16;

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// For each head_dim that kernels are compiled for, that one and a smaller one.
const HEAD_DIMS: [usize; 13] = [8, 24, 32, 40, 64, 72, 96, 104, 128, 160, 192, 200, 256];

/// Query heads of each key head.
const GROUPS: [usize; 4] = [1, 2, 3, 4];

/// Most multiplications of one case's products of queries and keys; the emulator does about 100 million a second.
const MOST: usize = 8_000_000;

/// Names of features that are used together.
type Names = Vec<&'static str>;

/// Each feature alone, every pair, all but one, and all.
fn sets() -> Vec<Names> {
    let all: Names = FEATURES.into_iter().chain(CLOSURES).collect();
    let mut sets: Vec<Names> = all.iter().map(|&name| vec![name]).collect();
    for (i, &second) in all.iter().enumerate() {
        sets.extend(all[..i].iter().map(|&first| vec![first, second]));
    }
    for &left_out in &all {
        sets.push(all.iter().copied().filter(|&name| name != left_out).collect());
    }
    sets.push(all);
    sets
}

/// A set of features with the sizes of a problem.
struct Combination {
    number: usize,
    names: Names,
    case: Case,
}

impl Combination {
    /// Returns the number of combinations.
    fn count(sets: &[Names]) -> usize {
        sets.len() * DTYPES.len() * HEAD_DIMS.len() * GROUPS.len()
    }

    /// Returns the combination of a number. What the number does not say, lengths and the head_dim of values, is drawn from it.
    fn new(sets: &[Names], number: usize) -> Self {
        let mut rest = number;
        let mut digit = |base: usize| {
            let digit = rest % base;
            rest /= base;
            digit
        };
        let (dtype, head_dim, group) = (digit(DTYPES.len()), digit(HEAD_DIMS.len()), digit(GROUPS.len()));
        let names = sets[digit(sets.len())].clone();
        let (dtype, head_dim, group) = (DTYPES[dtype], HEAD_DIMS[head_dim], GROUPS[group]);
        let rng = &mut StdRng::seed_from_u64(number as u64);
        let mut pick = |sizes: &[usize]| *sizes.choose(rng).expect("there are some");
        let (seqlen_q, seqlen_k) = (pick(&[1, 17, 45, 64, 70, 150]), pick(&[5, 33, 64, 75, 140, 203]));
        let (mut batch, mut heads_kv) = (pick(&[1, 2, 2]), pick(&[1, 2]));
        let head_dim_v = pick(&[head_dim, head_dim, head_dim, 8, 48, 136]);
        // Work is padded to tiles.
        let of_head = seqlen_q.next_multiple_of(64) * seqlen_k.next_multiple_of(64) * (head_dim + head_dim_v);
        if batch * heads_kv * group * of_head > MOST {
            heads_kv = 1;
        }
        if batch * heads_kv * group * of_head > MOST {
            batch = 1;
        }
        let (q, kv) = (
            [batch, heads_kv * group, seqlen_q, head_dim],
            [batch, heads_kv, seqlen_k, head_dim],
        );
        let case = Case {
            head_dim_v,
            seed: number as u64,
            ..Case::new(dtype, q, kv)
        };
        Self { number, names, case }
    }

    fn attention(&self, device: &Device) -> Attention {
        let add = |attention, name: &&str| with_feature(attention, name, &self.case, device);
        self.names.iter().fold(Attention::new(), add)
    }

    /// Checks the combination on a device.
    fn check(&self, device: &Device) {
        let case = self.case.clone().with(self.attention(device));
        for_dtype!(case.dtype, T => check_program::<T>(&case, device));
    }
}

impl fmt::Display for Combination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Case { dtype, q, kv, .. } = &self.case;
        let (number, names) = (self.number, self.names.join(" + "));
        write!(f, "{number}, {names}: {dtype:?} {q:?} {kv:?} {}", self.case.head_dim_v)
    }
}

/// Returns the numbers of the combinations that run.
fn chosen(count: usize) -> Vec<usize> {
    let choice = std::env::var(CHOICE).ok();
    let number = |text: &str| -> usize {
        let number = text.trim().parse();
        number
            .unwrap_or_else(|_| panic!("{CHOICE}={text}: a number of combinations, `all`, or `at:` and their numbers"))
    };
    let drawn = match choice.as_deref() {
        Some("all") => return (0..count).collect(),
        Some(text) if text.starts_with("at:") => return text[3..].split(',').map(number).collect(),
        Some(text) => number(text).min(count),
        None => DRAWN,
    };
    let seed =
        std::env::var("PROPTEST_RNG_SEED").map_or(1, |seed| seed.parse().expect("PROPTEST_RNG_SEED is a number"));
    let _ = writeln!(
        std::io::stderr(),
        "{drawn} of {count} combinations of PROPTEST_RNG_SEED={seed}"
    );
    index::sample(&mut StdRng::seed_from_u64(seed), count, drawn).into_vec()
}

/// The text of a panic.
fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or(panic.downcast_ref::<&str>().copied())
        .unwrap_or("a panic without a text")
}

#[test]
fn features_combine() {
    let sets = sets();
    let numbers = chosen(Combination::count(&sets));
    let mut failures = Vec::new();
    for &number in &numbers {
        let combination = Combination::new(&sets, number);
        eprintln!("{combination}");
        for device in devices().all() {
            // Every combination is tried, so that one run names all that fail.
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| combination.check(device))) {
                failures.push(format!("{combination} on {device}\n{}", message(&*panic)));
            }
        }
    }
    assert!(
        failures.is_empty(),
        "{} failures of {} combinations\n{}",
        failures.len(),
        numbers.len(),
        failures.join("\n")
    );
}

/// Tests the sizes of features: also where all are used, some pairs are visible, or nothing is tested.
#[test]
fn every_set_leaves_pairs() {
    let sets = sets();
    let device = Device::cpu();
    for (i, names) in sets.iter().enumerate() {
        let of_set = Combination::new(&sets, i * Combination::count(&sets) / sets.len());
        assert_eq!(&of_set.names, names);
        let combination = Combination {
            case: Case::new(Dtype::F32, [2, 4, 45, 8], [2, 2, 75, 8]),
            ..of_set
        };
        let case = combination.case.clone().with(combination.attention(&device));
        let lse = case.run::<f32>(&device, &case.inputs()).1.lse;
        let seeing = lse.iter().filter(|lse| lse.is_finite()).count();
        assert!(
            8 * seeing > lse.len(),
            "{combination}: {seeing} of {} queries see a key",
            lse.len()
        );
    }
}
