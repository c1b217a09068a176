//! Random programs as trees, made for a device, whose memory their tables are in.

use flash_attention::half::{bf16, f16};
use flash_attention::program::{At, Index, Score, Table, Truth};
use flash_attention::{Attention, Device};
use proptest::prelude::*;

use super::tensor;
use crate::files;

/// A random score.
#[derive(Clone, Debug)]
pub enum ScoreTree {
    /// The score that comes in.
    Score,
    /// A constant, in sixteenths.
    Number(i8),
    /// An index as a score.
    OfIndex(Box<IndexTree>),
    /// An element of the table of f32, f16 or bf16 `[heads, 40]`, at a clamped index.
    Load(u8, Box<IndexTree>),
    /// One of the functions of one score, by number. Arguments are kept where results are moderate.
    One(u8, Box<Self>),
    /// One of the functions of two scores, by number.
    Two(u8, Box<Self>, Box<Self>),
    /// The second if the first holds, else the third.
    Select(Box<TruthTree>, Box<Self>, Box<Self>),
    /// The smaller of two by comparison and select: a truth of scores whose threshold is no step.
    Smaller(Box<Self>, Box<Self>),
}

/// A random index.
#[derive(Clone, Debug)]
pub enum IndexTree {
    /// A coordinate, or a distance, by number.
    Coordinate(u8),
    /// A number.
    Number(i8),
    /// An element of the table of i32 or u32 `[40]`, at a clamped index.
    Load(bool, Box<Self>),
    /// One of the functions of one index, by number.
    One(u8, Box<Self>),
    /// One of the functions of two indices, by number.
    Two(u8, Box<Self>, Box<Self>),
    /// Quotient or remainder by a positive number.
    Divided(bool, Box<Self>, u8),
    /// The floor of an index times some sixteenths.
    Floor(Box<Self>, i8),
    /// The second if the first holds, else the third.
    Select(Box<TruthTree>, Box<Self>, Box<Self>),
}

/// A random truth, of indices alone.
#[derive(Clone, Debug)]
pub enum TruthTree {
    /// A truth.
    Constant(bool),
    /// One of the six comparisons, by number.
    Compare(u8, Box<IndexTree>, Box<IndexTree>),
    /// One of the six comparisons of indices as scores.
    CompareScores(u8, Box<IndexTree>, i8),
    /// And, or, exclusive or, by number.
    Two(u8, Box<Self>, Box<Self>),
    /// Not.
    Not(Box<Self>),
}

/// A random program: what happens to scores, and what hides pairs.
#[derive(Clone, Debug)]
pub struct Trees {
    /// Closures of scores, one after the other.
    pub scores: Vec<ScoreTree>,
    /// Masks, anded.
    pub masks: Vec<TruthTree>,
}

/// Tables that trees read.
struct Tables {
    f32s: Table<f32, 2>,
    f16s: Table<f16, 2>,
    bf16s: Table<bf16, 2>,
    i32s: Table<i32, 1>,
    u32s: Table<u32, 1>,
}

impl Tables {
    fn new(device: &Device, heads: usize) -> Self {
        let floats = files::normal(heads * 40, 0.7, 31);
        let shape = [heads, 40];
        let f16s: Vec<f16> = floats.iter().map(|&x| f16::from_f32(x)).collect();
        let bf16s: Vec<bf16> = floats.iter().map(|&x| bf16::from_f32(x)).collect();
        let i32s: Vec<i32> = (0..40).map(|i| i * 17 % 23 - 9).collect();
        let u32s: Vec<u32> = (0..40).map(|i| i * 13 % 31).collect();
        Self {
            f32s: Table::new(&tensor(device, &shape, &floats)).expect("two axes"),
            f16s: Table::new(&tensor(device, &shape, &f16s)).expect("two axes"),
            bf16s: Table::new(&tensor(device, &shape, &bf16s)).expect("two axes"),
            i32s: Table::new(&tensor(device, &[40], &i32s)).expect("one axis"),
            u32s: Table::new(&tensor(device, &[40], &u32s)).expect("one axis"),
        }
    }
}

impl Trees {
    /// Returns the attention that the trees are, with tables on a device.
    pub fn attention(&self, attention: Attention, heads: usize, device: &Device) -> Attention {
        let tables = Tables::new(device, heads);
        let attention = self.scores.iter().fold(attention, |attention, tree| {
            // Scores stay where exponentials of their differences are numbers.
            attention.score(|s, at| tree.trace(s, at, &tables).max(-24.0).min(24.0))
        });
        let masks = self.masks.iter();
        masks.fold(attention, |attention, tree| {
            attention.mask(|at| tree.trace(at, &tables))
        })
    }
}

impl ScoreTree {
    fn trace<'g>(&self, s: Score<'g>, at: At<'g>, tables: &Tables) -> Score<'g> {
        let of = |tree: &Self| tree.trace(s, at, tables);
        match self {
            Self::Score => s,
            Self::Number(n) => s * 0.0 + f32::from(*n) / 16.0,
            Self::OfIndex(i) => i.trace(at, tables).max(-64).min(64).to_score() * 0.125,
            Self::Load(which, i) => {
                let i = i.trace(at, tables);
                match which % 3 {
                    0 => tables.f32s.at_clamped(at.head, i),
                    1 => tables.f16s.at_clamped(at.head, i),
                    _ => tables.bf16s.at_clamped(at.head, i),
                }
            }
            Self::One(op, x) => {
                let x = of(x);
                match op % 9 {
                    0 => -x,
                    1 => x.abs(),
                    2 => x.min(2.0).exp(),
                    3 => (x.abs() + 0.5).log(),
                    4 => x.tanh(),
                    5 => (x.abs() + 0.25).sqrt(),
                    6 => (x.abs() + 0.5).reciprocal(),
                    7 => x * 0.5,
                    _ => (at.distance() * 0.25).floor() * 0.125 + x,
                }
            }
            Self::Two(op, x, y) => {
                let (x, y) = (of(x), of(y));
                match op % 6 {
                    0 => x + y,
                    1 => x - y,
                    2 => x * y.tanh(),
                    3 => x / (y.abs() + 1.0),
                    4 => x.min(y),
                    _ => x.max(y),
                }
            }
            Self::Select(condition, x, y) => condition.trace(at, tables).select(of(x), of(y)),
            Self::Smaller(x, y) => {
                let (x, y) = (of(x), of(y));
                x.less_than(y).select(x, y)
            }
        }
    }
}

impl IndexTree {
    fn trace<'g>(&self, at: At<'g>, tables: &Tables) -> Index<'g> {
        let of = |tree: &Self| tree.trace(at, tables);
        match self {
            Self::Coordinate(which) => match which % 9 {
                0 => at.batch,
                1 => at.head,
                2 => at.kv_head,
                3 => at.query,
                4 => at.key,
                5 => at.seqlen_q,
                6 => at.seqlen_k,
                7 => at.distance(),
                _ => at.distance_top_left(),
            },
            Self::Number(n) => at.constant((*n).into()),
            Self::Load(true, i) => tables.i32s.at_clamped(of(i)),
            Self::Load(false, i) => tables.u32s.at_clamped(of(i)),
            Self::One(op, x) => match op % 3 {
                0 => -of(x),
                1 => of(x).abs(),
                _ => !of(x),
            },
            Self::Two(op, x, y) => {
                let (x, y) = (of(x), of(y));
                match op % 10 {
                    0 => x + y,
                    1 => x - y,
                    2 => x * y,
                    3 => x.min(y),
                    4 => x.max(y),
                    5 => x & y,
                    6 => x | y,
                    7 => x ^ y,
                    8 => x << (y & 3),
                    _ => x >> (y & 3),
                }
            }
            Self::Divided(true, x, n) => of(x) / (i32::from(*n) + 1),
            Self::Divided(false, x, n) => of(x) % (i32::from(*n) + 1),
            Self::Floor(x, n) => (of(x).max(-999).min(999).to_score() * (f32::from(*n) / 16.0)).to_index(),
            Self::Select(condition, x, y) => condition.trace(at, tables).select(of(x), of(y)),
        }
    }
}

impl TruthTree {
    fn trace<'g>(&self, at: At<'g>, tables: &Tables) -> Truth<'g> {
        match self {
            Self::Constant(truth) => at.key.at_least(0) & *truth,
            Self::Compare(op, x, y) => {
                let (x, y) = (x.trace(at, tables), y.trace(at, tables));
                match op % 6 {
                    0 => x.less_than(y),
                    1 => x.at_most(y),
                    2 => x.greater_than(y),
                    3 => x.at_least(y),
                    4 => x.equals(y),
                    _ => x.differs_from(y),
                }
            }
            Self::CompareScores(op, x, n) => {
                let x = x.trace(at, tables).max(-999).min(999) * 0.25;
                let n = f32::from(*n) / 16.0;
                match op % 6 {
                    0 => x.less_than(n),
                    1 => x.at_most(n),
                    2 => x.greater_than(n),
                    3 => x.at_least(n),
                    4 => x.equals(n),
                    _ => x.differs_from(n),
                }
            }
            Self::Two(op, x, y) => {
                let (x, y) = (x.trace(at, tables), y.trace(at, tables));
                match op % 3 {
                    0 => x & y,
                    1 => x | y,
                    _ => x ^ y,
                }
            }
            Self::Not(x) => !x.trace(at, tables),
        }
    }
}

fn index() -> impl Strategy<Value = IndexTree> + Clone {
    let leaf = prop_oneof![
        5 => any::<u8>().prop_map(IndexTree::Coordinate),
        1 => (-20_i8..40).prop_map(IndexTree::Number),
    ];
    leaf.prop_recursive(3, 8, 2, |inner| {
        let boxed = || inner.clone().prop_map(Box::new);
        let condition = (any::<u8>(), boxed(), boxed());
        prop_oneof![
            1 => (any::<bool>(), boxed()).prop_map(|(which, i)| IndexTree::Load(which, i)),
            2 => (any::<u8>(), boxed()).prop_map(|(op, x)| IndexTree::One(op, x)),
            6 => (any::<u8>(), boxed(), boxed()).prop_map(|(op, x, y)| IndexTree::Two(op, x, y)),
            2 => (any::<bool>(), boxed(), any::<u8>()).prop_map(|(op, x, n)| IndexTree::Divided(op, x, n % 40)),
            1 => (boxed(), any::<i8>()).prop_map(|(x, n)| IndexTree::Floor(x, n)),
            1 => (condition, boxed(), boxed()).prop_map(|((op, a, b), x, y)| {
                IndexTree::Select(Box::new(TruthTree::Compare(op, a, b)), x, y)
            }),
        ]
    })
}

fn truth() -> impl Strategy<Value = TruthTree> + Clone {
    let boxed = || index().prop_map(Box::new);
    let leaf = prop_oneof![
        1 => any::<bool>().prop_map(TruthTree::Constant),
        8 => (any::<u8>(), boxed(), boxed()).prop_map(|(op, x, y)| TruthTree::Compare(op, x, y)),
        2 => (any::<u8>(), boxed(), any::<i8>()).prop_map(|(op, x, n)| TruthTree::CompareScores(op, x, n)),
    ];
    leaf.prop_recursive(2, 4, 2, |inner| {
        let boxed = || inner.clone().prop_map(Box::new);
        prop_oneof![
            3 => (any::<u8>(), boxed(), boxed()).prop_map(|(op, x, y)| TruthTree::Two(op, x, y)),
            1 => boxed().prop_map(TruthTree::Not),
        ]
    })
}

fn score() -> impl Strategy<Value = ScoreTree> {
    let leaf = prop_oneof![
        6 => Just(ScoreTree::Score),
        1 => (-32_i8..32).prop_map(ScoreTree::Number),
        2 => index().prop_map(|i| ScoreTree::OfIndex(Box::new(i))),
        2 => (any::<u8>(), index()).prop_map(|(which, i)| ScoreTree::Load(which, Box::new(i))),
    ];
    leaf.prop_recursive(4, 12, 2, |inner| {
        let boxed = || inner.clone().prop_map(Box::new);
        prop_oneof![
            4 => (any::<u8>(), boxed()).prop_map(|(op, x)| ScoreTree::One(op, x)),
            6 => (any::<u8>(), boxed(), boxed()).prop_map(|(op, x, y)| ScoreTree::Two(op, x, y)),
            1 => (truth(), boxed(), boxed()).prop_map(|(c, x, y)| ScoreTree::Select(Box::new(c), x, y)),
            1 => (boxed(), boxed()).prop_map(|(x, y)| ScoreTree::Smaller(x, y)),
        ]
    })
}

/// Draws a program of bounded depth, from every kind of operation.
pub fn trees() -> impl Strategy<Value = Trees> {
    (
        proptest::collection::vec(score(), 0..3),
        proptest::collection::vec(truth(), 0..3),
    )
        .prop_map(|(scores, masks)| Trees { scores, masks })
}
