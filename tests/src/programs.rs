//! Score programs for the suite: named features by name, and random programs as trees, both made for a device, whose
//! memory their tables are in.

use flash_attention::half::{bf16, f16};
use flash_attention::program::{At, Index, Score, Table, Truth};
use flash_attention::reference::{self, AllGradients, Dims};
use flash_attention::{Attention, Device, Dtype, Element, Error, Gradients, Scalar, Tensor};
use proptest::prelude::*;

use crate::{Case, Mismatch, compare, files, largest_error};

/// Named features that combine freely.
pub const FEATURES: [&str; 13] = [
    "causal",
    "window",
    "alibi",
    "softcap",
    "bias",
    "sinks",
    "documents",
    "prefix",
    "chunked",
    "dilated",
    "top_left",
    "dropout",
    "block_mask",
];

/// Returns an attention with one more named feature, for the sizes of a case.
///
/// # Panics
/// If the device fails, or there is no such feature.
pub fn with_feature(attention: Attention, name: &str, case: &Case, device: &Device) -> Attention {
    let ([batch, heads, seqlen_q, _], seqlen_k) = (case.q, case.kv[2]);
    let floats = |shape: &[usize], salt| tensor(device, shape, &files::normal(shape.iter().product(), 0.5, salt));
    let ids = |shape: &[usize], run: usize| {
        let ids: Vec<i32> = (0..shape.iter().product())
            .map(|i| (i % shape[1] / run) as i32)
            .collect();
        tensor(device, shape, &ids)
    };
    match name {
        "causal" => attention.causal(),
        "window" => attention.window(seqlen_k / 3, seqlen_k / 5),
        "alibi" => attention.alibi(&floats(&[batch, heads], 21)),
        "softcap" => attention.softcap(2.5),
        "bias" => attention.bias(&floats(&[1, heads, seqlen_q, seqlen_k], 22)),
        "sinks" => attention.sinks(&floats(&[heads], 23)),
        "documents" => attention.documents(&ids(&[batch, seqlen_q], 21), &ids(&[1, seqlen_k], 25)),
        "prefix" => attention.prefix(seqlen_k / 4),
        "chunked" => attention.chunked(seqlen_k / 2 + 1),
        "dilated" => attention.dilated(2),
        "top_left" => attention.top_left(),
        "dropout" => attention.dropout(0.15, 0x0123_4567_89ab_cdef),
        "block_mask" => {
            let block = [16, 24];
            let tiles = batch * heads * seqlen_q.div_ceil(block[0]) * seqlen_k.div_ceil(block[1]);
            let visible: Vec<bool> = (0..tiles).map(|i| i * 7 % 10 < 7).collect();
            let seqlen = [seqlen_q, seqlen_k];
            let blocks = flash_attention::program::BlockMask::from_dense([batch, heads], seqlen, block, &visible);
            let blocks = blocks.expect("as many as there are tiles");
            attention.block_mask(&blocks, device).expect("a small table")
        }
        other => panic!("no feature {other}"),
    }
}

fn tensor<T: Scalar>(device: &Device, shape: &[usize], elements: &[T]) -> Tensor<T> {
    Tensor::from_slice(device, shape, elements).expect("a small tensor")
}

/// A random score.
#[derive(Clone, Debug)]
pub enum ScoreTree {
    /// The score that comes in.
    Score,
    /// A number of sixteenths.
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

/// Passes that a device runs of an attention, those that it does not refuse as unsupported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Supported {
    /// The forward pass.
    pub forward: bool,
    /// The backward pass, with the gradients of tables.
    pub backward: bool,
}

/// Checks forward and backward of a case on a device, tables' gradients included, as far as the device supports them.
///
/// # Panics
/// If the device fails in another way, or an error exceeds its bound: twice that of standard attention, plus 1e-5; for gradients
/// of tables that of [`check_table_gradients`]. In halves, backward is held against the oracle's gradients from the output that
/// the device gave.
pub fn check_program<T: Element>(case: &Case, device: &Device) -> Supported {
    let inputs = case.inputs::<T>();
    let [q, k, v] = [(case.q, &inputs.q), (case.kv, &inputs.k), (case.kv, &inputs.v)]
        .map(|(shape, elements)| tensor(device, &shape, elements));
    let attention = case.attention.clone().table_gradients();
    let unsupported = |error: Error| match error {
        Error::Unsupported { .. } => false,
        error => panic!("{case:?} on {device}: {error}"),
    };
    if !attention.plan(&q, &k, &v).map_or_else(unsupported, |_| true) {
        return Supported {
            forward: false,
            backward: false,
        };
    }
    case.check_on([device]);
    let output = attention
        .forward(&q, &k, &v)
        .unwrap_or_else(|error| panic!("{case:?} on {device}: {error}"));
    let dout_elements = case.dout::<T>();
    let dout = tensor(device, &case.q, &dout_elements);
    let planned = attention.plan_backward(&q, &k, &v, &output, &dout);
    if !planned.map_or_else(unsupported, |_| true) {
        return Supported {
            forward: true,
            backward: false,
        };
    }
    let gradients = attention.backward(&q, &k, &v, &output, &dout);
    let gradients = gradients.unwrap_or_else(|error| panic!("{case:?} on {device}: {error}"));
    let dims = case.dims();
    let [wide_q, wide_k, wide_v, wide_dout] = [&inputs.q, &inputs.k, &inputs.v, &dout_elements]
        .map(|elements| elements.iter().map(|x| x.to_f64()).collect::<Vec<_>>());
    let out: Vec<f64> = output.out.to_vec().expect("read").iter().map(|x| x.to_f64()).collect();
    let wide = [&wide_q[..], &wide_k, &wide_v];
    let exact = reference::backward_with_tables(&dims, &wide_q, &wide_k, &wide_v, &wide_dout, true);
    let from_out = reference::backward_from(&dims, wide, &out, &wide_dout, true);
    let standard =
        reference::standard_backward_with_tables(&dims, &inputs.q, &inputs.k, &inputs.v, &dout_elements, true);
    // In halves out is rounded, and delta with it: a backward pass is judged by what it was given.
    let want = if case.dtype == Dtype::F32 { &exact } else { &from_out };
    let standard = Standard {
        gradients: &standard,
        exact: &exact,
    };
    let name = format!("{case:?} on {device}");
    check_all(&name, case, &dims, &gradients, want, &standard);
    Supported {
        forward: true,
        backward: true,
    }
}

/// Standard attention's gradients and the exact ones: their distance is what a dtype costs.
#[derive(Clone, Copy, Debug)]
pub struct Standard<'a, T> {
    /// Gradients of standard attention in the dtype.
    pub gradients: &'a AllGradients<T>,
    /// Gradients of the oracle.
    pub exact: &'a AllGradients<f64>,
}

fn check_all<T: Element>(
    name: &str,
    case: &Case,
    dims: &Dims,
    got: &Gradients<T>,
    want: &AllGradients<f64>,
    standard: &Standard<'_, T>,
) {
    let must = |result: Result<(), Mismatch>| {
        if let Err(mismatch) = result {
            panic!("{name}\n{mismatch}");
        }
    };
    let Standard { gradients, exact } = standard;
    let of_inputs = [
        ("dq", case.q, &got.dq, &want.dq, largest_error(&gradients.dq, &exact.dq)),
        (
            "dk",
            case.kv,
            &got.dk,
            &want.dk,
            largest_error(&gradients.dk, &exact.dk),
        ),
        (
            "dv",
            case.kv,
            &got.dv,
            &want.dv,
            largest_error(&gradients.dv, &exact.dv),
        ),
    ];
    for (what, shape, got, want, error) in of_inputs {
        must(compare(
            what,
            &shape,
            &got.to_vec().expect("read"),
            want,
            2.0 * error + 1e-5,
        ));
    }
    check_table_gradients(name, case, dims, got, want, standard);
}

/// Checks the gradients of a case's float tables and sinks against `want`.
///
/// Each error is at most twice that of standard attention, which adds in f64, plus 1e-5, plus what n additions in f32 may do. An
/// addition rounds by an error that is uniform over half a unit in the last place, 0.42 * 2^-24 of the sum in the mean square.
/// Sums that grow evenly to their result are `1 / sqrt(3)` of it in the mean square. So n errors have a standard deviation of
/// `0.25 * sqrt(n) * 2^-24` of the result, whatever the order is; three of them are allowed.
///
/// # Panics
/// If a gradient is missing, or an error exceeds its bound.
pub fn check_table_gradients<T: Element>(
    name: &str,
    case: &Case,
    dims: &Dims,
    got: &Gradients<T>,
    want: &AllGradients<f64>,
    Standard { gradients, exact }: &Standard<'_, T>,
) {
    let Some(evaluator) = &dims.program else { return };
    let must = |result: Result<(), Mismatch>| {
        if let Err(mismatch) = result {
            panic!("{name}\n{mismatch}");
        }
    };
    let bound = |terms: usize, standard: &[f64], exact: &[f64]| {
        let roundings = 0.75 * (terms as f64).sqrt() * f64::from(f32::EPSILON) / 2.0;
        2.0 * distance(standard, exact) + 1e-5 + roundings * largest(exact)
    };
    let tables = evaluator.program().tables();
    for (i, table) in tables.iter().enumerate().filter(|(_, table)| table.element.is_float()) {
        let gradient = got
            .gradient_of(table)
            .expect("the gradient of a table of floats")
            .to_vec();
        let terms = exact.table_terms[i].iter().copied().max().unwrap_or(0);
        let bound = bound(terms, &gradients.tables[i], &exact.tables[i]);
        must(compare(
            table.name,
            &table.shape,
            &gradient.expect("read"),
            &want.tables[i],
            bound,
        ));
    }
    if let (Some(want), Some(exact), Some(standard)) = (&want.sinks, &exact.sinks, &gradients.sinks) {
        let sinks = got
            .sinks
            .as_ref()
            .expect("the gradient of sinks")
            .to_vec()
            .expect("read");
        let bound = bound(case.q[0] * case.q[2], standard, exact);
        must(compare("dsinks", &[want.len()], &sinks, want, bound));
    }
}

fn largest(numbers: &[f64]) -> f64 {
    numbers.iter().fold(0.0, |largest, x| x.abs().max(largest))
}

fn distance(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).fold(0.0, |largest, (x, y)| (x - y).abs().max(largest))
}

/// Checks the oracle's gradients of a case, tables' included, against differences of its forward pass in f64. An element
/// near a kink, where the differences to the left and right disagree, has no slope and is left out.
///
/// # Panics
/// If a gradient is no slope, or more than a fifth of the elements are near kinks.
pub fn check_slopes(case: &Case) {
    let inputs = case.inputs::<f32>();
    let widen = |elements: &[f32]| elements.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let tensors = [widen(&inputs.q), widen(&inputs.k), widen(&inputs.v)];
    let dout = widen(&case.dout::<f32>());
    let dims = case.dims();
    let loss = |dims: &Dims, [q, k, v]: &[Vec<f64>; 3]| -> f64 {
        let (out, _) = reference::forward(dims, q, k, v);
        out.iter().zip(&dout).map(|(x, y)| x * y).sum()
    };
    let [q, k, v] = &tensors;
    let gradients = reference::backward_with_tables(&dims, q, k, v, &dout, true);
    let (step, middle) = (1e-6, loss(&dims, &tensors));
    let (mut checked, mut kinks) = (0, 0);
    let mut check = |name: String, got: f64, moved: &dyn Fn(f64) -> f64| {
        let (left, right) = ((middle - moved(-step)) / step, (moved(step) - middle) / step);
        checked += 1;
        if (left - right).abs() > 1e-3 * (1.0 + left.abs()) {
            kinks += 1;
            return;
        }
        let want = (left + right) / 2.0;
        assert!(
            (got - want).abs() <= 1e-4 * (1.0 + want.abs()),
            "{name}: {got} {want} of {case:?}"
        );
    };
    for (which, gradient) in [&gradients.dq, &gradients.dk, &gradients.dv].into_iter().enumerate() {
        for element in (0..gradient.len()).step_by(1 + gradient.len() / 12) {
            check(format!("input {which}, {element}"), gradient[element], &|by| {
                let mut moved = tensors.clone();
                moved[which][element] += by;
                loss(&dims, &moved)
            });
        }
    }
    if let Some(evaluator) = &dims.program {
        for (table, gradient) in gradients.tables.iter().enumerate() {
            let is_float = evaluator.program().tables()[table].element.is_float();
            for element in (0..gradient.len()).step_by(5).filter(|_| is_float) {
                check(format!("table {table}, {element}"), gradient[element], &|by| {
                    let mut tables = evaluator.tables().to_vec();
                    tables[table].values[element] += by;
                    let program = std::sync::Arc::new(evaluator.program().clone());
                    let moved = flash_attention::program::Evaluator::new(program, tables, None);
                    let dims = Dims {
                        program: Some(moved),
                        ..dims.clone()
                    };
                    loss(&dims, &tensors)
                });
            }
        }
    }
    assert!(5 * kinks <= checked, "{kinks} kinks of {checked}: {case:?}");
}
