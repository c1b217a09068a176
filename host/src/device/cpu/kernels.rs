//! The inner loops, written once over [`Vector`] and compiled once for each instruction set.
//!
//! Queries are lanes: a panel holds one quantity for `Kernels::panel` queries side by side, so that a softmax is
//! arithmetic between whole registers and a row of keys or values enters a product as scalars, in the order in which
//! memory has it. Every element of a product is one sum in order of its inner index: results depend neither on how
//! rows are grouped nor on which lane a query has.

use std::sync::OnceLock;

use flash_attention_kernels::entries::Dtype;

#[cfg(target_arch = "x86_64")]
use super::pairs;
#[cfg(target_arch = "x86_64")]
use super::vector::{Avx2, Avx512};
use super::vector::{Portable, Vector};

/// Registers that a panel is wide.
const WIDTH: usize = 3;

/// What the rows of a product, and so the keys of a tile and a head_dim, are a multiple of.
pub(super) const ROWS: usize = 8;

/// Lanes of the widest register: rows of tiles that are read in whole registers are a multiple of this.
pub(super) const MAX_LANES: usize = 16;

/// `c (+)= a b`, for a matrix `a` whose elements are read one by one, and rows of whole registers `b` and `c`.
pub(super) struct Product {
    /// Rows of a and c, a multiple of [`ROWS`].
    pub rows: usize,
    /// Columns of a, rows of b.
    pub inner: usize,
    /// Columns of b and c, a multiple of the lanes of a register.
    pub columns: usize,
    pub a: *const f32,
    /// Elements of a from one row to the next; or, where a is transposed, from one column to the next.
    pub a_stride: usize,
    /// Whether a is stored by columns.
    pub transposed: bool,
    pub b: *const f32,
    pub b_stride: usize,
    pub c: *mut f32,
    pub c_stride: usize,
    /// Whether c is added to.
    pub accumulate: bool,
}

/// Products of pairs go by so many rows and columns: the lanes of a register, the rows of a tile.
pub(super) const SIDE: usize = 16;

/// `c (+)= a b` over pairs of bf16.
pub(super) struct PairProduct {
    /// Rows of a and c, a multiple of [`SIDE`].
    pub rows: usize,
    /// Words of a row of a, rows of b; a multiple of [`SIDE`].
    pub inner: usize,
    /// Columns of b and c: [`SIDE`] or twice that.
    pub columns: usize,
    pub a: *const u32,
    /// Words, or f32, from one row to the next.
    pub a_stride: usize,
    pub b: *const u32,
    pub b_stride: usize,
    pub c: *mut f32,
    pub c_stride: usize,
    /// Whether c is added to.
    pub accumulate: bool,
}

/// How one kind of processor multiplies pairs of bf16, of which a word holds two neighbours along the inner axis.
#[derive(Clone, Copy)]
pub(super) struct Pairs {
    /// To be called by a thread before its first product, and after its last.
    pub begin: unsafe fn(),
    pub end: unsafe fn(),
    /// Unsafe as the functions of `Kernels` are.
    pub product: unsafe fn(&PairProduct),
}

/// One tile of keys passing one panel of queries: scores become exponentials relative to the largest score so far.
pub(super) struct Softmax {
    /// Keys of the tile.
    pub keys: usize,
    /// Queries, a multiple of the lanes of a register.
    pub lanes: usize,
    /// `keys x stride`.
    pub scores: *mut f32,
    pub stride: usize,
    /// How many keys of the tile each query sees; null if all.
    pub visible: *const f32,
    pub scale_log2: f32,
    /// The largest score of each query so far, and the sum of exponentials relative to it.
    pub max: *mut f32,
    pub sum: *mut f32,
    /// `head_dim x stride`: what was summed before, to be made relative to the new largest score.
    pub output: *mut f32,
    pub head_dim: usize,
    /// `keys / 2 x stride`: the exponentials of two keys a word, as bf16; null if they are wanted as f32 alone. Where both
    /// are wanted is where `visible` is not null.
    pub pairs: *mut u32,
}

/// One tile of keys passing one query, where there are too few queries for lanes: here lanes are elements of a head.
pub(super) struct One {
    /// Keys of the tile that the query sees.
    pub keys: usize,
    pub dtype: Dtype,
    /// The rows of K and V as they lie in memory.
    pub k: *const u8,
    pub k_stride_bytes: usize,
    pub v: *const u8,
    pub v_stride_bytes: usize,
    pub head_dim: usize,
    /// In whole registers, zeros past head_dim.
    pub query: *const f32,
    /// Room for the keys in whole registers.
    pub scores: *mut f32,
    pub scale_log2: f32,
    pub max: *mut f32,
    pub sum: *mut f32,
    /// In whole registers.
    pub output: *mut f32,
}

/// Adds a partial softmax to another, each relative to its own largest score: what two runs of keys make of a panel.
pub(super) struct Merge {
    pub lanes: usize,
    pub stride: usize,
    pub head_dim: usize,
    pub scale_log2: f32,
    pub max: *mut f32,
    pub sum: *mut f32,
    pub output: *mut f32,
    pub other_max: *const f32,
    pub other_sum: *const f32,
    pub other_output: *const f32,
}

/// Scores of one panel become probabilities, and dP becomes dS: `p = exp(scale * s - lse)` and `ds = p * (dp - delta)`.
pub(super) struct Backpropagate {
    pub keys: usize,
    pub lanes: usize,
    pub scores: *mut f32,
    pub dp: *mut f32,
    pub stride: usize,
    /// How many keys of the tile each query sees; null if all.
    pub visible: *const f32,
    pub scale: f32,
    /// Of each query; an lse of plus infinity makes every probability 0.
    pub lse: *const f32,
    pub delta: *const f32,
}

/// The inner loops of one instruction set. Each is unsafe: the processor must have the instructions, and pointers must
/// point to as many elements as the sizes beside them say.
#[derive(Clone, Copy)]
pub(super) struct Kernels {
    /// What people call the instruction set.
    pub name: &'static str,
    /// f32 in a register.
    pub lanes: usize,
    /// Queries of a panel.
    pub panel: usize,
    /// Whether a product is rounded once, together with the sum it is added to.
    pub fused: bool,
    pub product: unsafe fn(&Product),
    /// For bf16, where that is faster than widening to f32.
    pub pairs: Option<&'static Pairs>,
    /// (from, stride, pairs of rows, columns, to, stride): words of two neighbours of a column, as bf16. Columns are a
    /// multiple of `lanes`.
    pub pair_rows: unsafe fn(*const f32, usize, usize, usize, *mut u32, usize),
    pub softmax: unsafe fn(&Softmax),
    pub one: unsafe fn(&One),
    pub merge: unsafe fn(&Merge),
    pub backpropagate: unsafe fn(&Backpropagate),
    /// (dtype, elements, how many, widened).
    pub widen: unsafe fn(Dtype, *const u8, usize, *mut f32),
    /// (dtype, elements, how many, rounded).
    pub narrow: unsafe fn(Dtype, *const f32, usize, *mut u8),
    /// (from, stride, rows, to, stride, columns): writes the transpose. Whole registers are read, and written: what is past
    /// the columns of `from`, up to a multiple of [`MAX_LANES`], must exist; so must what is past the rows in `to`.
    pub transpose: unsafe fn(*const f32, usize, usize, *mut f32, usize, usize),
    /// (x, y, count, in order, sums): of `lanes` columns of two tiles, `lanes` wide, the sums of products of so many rows, a
    /// multiple of 8; either in the order of `product`, or as eight sums that are then added up, which is more exact.
    pub dot: unsafe fn(*const f32, *const f32, usize, bool, *mut f32),
    #[cfg(test)]
    exp2: unsafe fn(*mut f32, usize),
}

impl Kernels {
    /// `x * y + sum`, rounded as in the sums of `product`.
    pub(super) fn multiply_add(&self, x: f32, y: f32, sum: f32) -> f32 {
        if self.fused { x.mul_add(y, sum) } else { x * y + sum }
    }
}

/// An instruction set that the library has inner loops for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Isa {
    #[cfg(target_arch = "x86_64")]
    Amx,
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    Portable,
}

impl Isa {
    /// Those this processor has, the best first.
    pub(super) fn available() -> &'static [Self] {
        static AVAILABLE: OnceLock<Vec<Isa>> = OnceLock::new();
        AVAILABLE.get_or_init(|| {
            let mut available = Vec::new();
            #[cfg(target_arch = "x86_64")]
            {
                let avx2 = is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c");
                if avx2 && is_x86_feature_detected!("avx512f") {
                    available.push(Self::Avx512);
                    // What is faster goes first: tiles where there are any.
                    if pairs::has_avx512_bf16() {
                        available.insert(usize::from(!pairs::prefers_avx512_bf16()), Self::Avx512Bf16);
                    }
                    if pairs::has_amx() {
                        available.insert(0, Self::Amx);
                    }
                }
                if avx2 {
                    available.push(Self::Avx2);
                }
            }
            available.push(Self::Portable);
            available
        })
    }

    /// Its name in `FLASH_ATTENTION_CPU`.
    pub(super) fn key(self) -> &'static str {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => "amx",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => "avx512bf16",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        }
    }

    /// Its inner loops.
    pub(super) fn kernels(self) -> &'static Kernels {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Amx => {
                const {
                    &Kernels {
                        name: "AVX-512 and AMX",
                        pairs: Some(&pairs::AMX),
                        ..avx512::KERNELS
                    }
                }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => {
                const {
                    &Kernels {
                        name: "AVX-512 and AVX512-BF16",
                        pairs: Some(&pairs::AVX512_BF16),
                        ..avx512::KERNELS
                    }
                }
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => &avx512::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => &avx2::KERNELS,
            Self::Portable => &portable::KERNELS,
        }
    }
}

/// The inner loops for one instruction set: each of the functions below, compiled with its features.
macro_rules! instruction_set {
    ($module:ident, $vector:ty, $name:literal $(, $features:literal)?) => {
        mod $module {
            use super::*;

            pub(super) const KERNELS: Kernels = Kernels {
                name: $name,
                lanes: <$vector>::LANES,
                panel: WIDTH * <$vector>::LANES,
                fused: <$vector>::FUSED,
                product,
                pairs: None,
                pair_rows,
                softmax,
                one,
                merge,
                backpropagate,
                widen,
                narrow,
                transpose,
                dot,
                #[cfg(test)]
                exp2,
            };

            $(#[target_feature(enable = $features)])?
            unsafe fn product(p: &Product) {
                // SAFETY: passed on to the caller, as in all that follow.
                unsafe { super::product::<$vector>(p) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn pair_rows(
                from: *const f32,
                stride: usize,
                pairs: usize,
                columns: usize,
                to: *mut u32,
                to_stride: usize,
            ) {
                for pair in 0..pairs {
                    for column in (0..columns).step_by(<$vector>::LANES) {
                        // SAFETY: as above.
                        unsafe {
                            let low = from.add(2 * pair * stride + column);
                            let (low, high) = (<$vector>::load(low), <$vector>::load(low.add(stride)));
                            low.store_pairs(high, to.add(pair * to_stride + column));
                        }
                    }
                }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn softmax(s: &Softmax) {
                // SAFETY: as above.
                unsafe { super::softmax::<$vector>(s) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn one(o: &One) {
                // SAFETY: as above.
                unsafe {
                    match o.dtype {
                        Dtype::F32 => super::one::<$vector, 0>(o),
                        Dtype::F16 => super::one::<$vector, 1>(o),
                        Dtype::Bf16 => super::one::<$vector, 2>(o),
                    }
                }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn merge(m: &Merge) {
                // SAFETY: as above.
                unsafe { super::merge::<$vector>(m) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn backpropagate(b: &Backpropagate) {
                // SAFETY: as above.
                unsafe { super::backpropagate::<$vector>(b) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn widen(dtype: Dtype, from: *const u8, count: usize, to: *mut f32) {
                // SAFETY: as above.
                unsafe { super::widen::<$vector>(dtype, from, count, to) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn narrow(dtype: Dtype, from: *const f32, count: usize, to: *mut u8) {
                // SAFETY: as above.
                unsafe { super::narrow::<$vector>(dtype, from, count, to) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn transpose(
                from: *const f32,
                stride: usize,
                rows: usize,
                to: *mut f32,
                to_stride: usize,
                columns: usize,
            ) {
                // SAFETY: as above.
                unsafe { super::transpose::<$vector>(from, stride, rows, to, to_stride, columns) }
            }
            $(#[target_feature(enable = $features)])?
            unsafe fn dot(x: *const f32, y: *const f32, count: usize, in_order: bool, sums: *mut f32) {
                // SAFETY: as above.
                unsafe { super::dot::<$vector>(x, y, count, in_order, sums) }
            }
            #[cfg(test)]
            $(#[target_feature(enable = $features)])?
            unsafe fn exp2(x: *mut f32, count: usize) {
                for i in (0..count).step_by(<$vector>::LANES) {
                    // SAFETY: as above.
                    unsafe { <$vector>::load(x.add(i)).exp2().store(x.add(i)) }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
instruction_set!(avx512, Avx512, "AVX-512", "avx512f,avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
instruction_set!(avx2, Avx2, "AVX2", "avx2,fma,f16c");
instruction_set!(portable, Portable, "portable");

/// [`Product`].
#[inline(always)]
unsafe fn product<V: Vector>(p: &Product) {
    let mut column = 0;
    while column < p.columns {
        // Two and two, where one would be left over.
        let registers = match (p.columns - column) / V::LANES {
            4 => 2,
            left => left.min(WIDTH),
        };
        // SAFETY: the columns are within b and c.
        unsafe {
            let (b, c) = (p.b.add(column), p.c.add(column));
            match registers {
                3 => rows::<V, 3>(p, b, c),
                2 => rows::<V, 2>(p, b, c),
                _ => rows::<V, 1>(p, b, c),
            }
        }
        column += registers * V::LANES;
    }
}

/// [`Product`], `N` registers of columns.
#[inline(always)]
unsafe fn rows<V: Vector, const N: usize>(p: &Product, b: *const f32, c: *mut f32) {
    // SAFETY: rows and inner are those of a, b and c; `V::ROWS` divides the rows.
    unsafe {
        for row in (0..p.rows).step_by(V::ROWS) {
            let c = c.add(row * p.c_stride);
            match (p.transposed, V::ROWS) {
                (false, 4) => block::<V, 4, N, false>(p, p.a.add(row * p.a_stride), b, c),
                (true, 4) => block::<V, 4, N, true>(p, p.a.add(row), b, c),
                (false, _) => block::<V, 8, N, false>(p, p.a.add(row * p.a_stride), b, c),
                (true, _) => block::<V, 8, N, true>(p, p.a.add(row), b, c),
            }
        }
    }
}

/// `M` rows by `N` registers of c, which stay in registers for the whole sum.
#[inline(always)]
unsafe fn block<V: Vector, const M: usize, const N: usize, const TRANSPOSED: bool>(
    p: &Product,
    a: *const f32,
    mut b: *const f32,
    c: *mut f32,
) {
    // SAFETY: passed on to the caller.
    unsafe {
        let mut sums = [[V::splat(0.0); N]; M];
        if p.accumulate {
            for (m, sums) in sums.iter_mut().enumerate() {
                for (n, sum) in sums.iter_mut().enumerate() {
                    *sum = V::load(c.add(m * p.c_stride + n * V::LANES));
                }
            }
        }
        for i in 0..p.inner {
            let mut b_row = [V::splat(0.0); N];
            for (n, b_row) in b_row.iter_mut().enumerate() {
                *b_row = V::load(b.add(n * V::LANES));
            }
            for (m, sums) in sums.iter_mut().enumerate() {
                let place = if TRANSPOSED {
                    i * p.a_stride + m
                } else {
                    m * p.a_stride + i
                };
                let factor = V::splat(*a.add(place));
                for (sum, b) in sums.iter_mut().zip(b_row) {
                    *sum = factor.fma(b, *sum);
                }
            }
            b = b.add(p.b_stride);
        }
        for (m, sums) in sums.iter().enumerate() {
            for (n, sum) in sums.iter().enumerate() {
                sum.store(c.add(m * p.c_stride + n * V::LANES));
            }
        }
    }
}

/// [`Softmax`].
///
/// While every score of a query is minus infinity, any finite number serves as the largest: exponentials are 0 relative to
/// it, where relative to minus infinity they would be NaN.
#[inline(always)]
unsafe fn softmax<V: Vector>(s: &Softmax) {
    // SAFETY: passed on to the caller.
    unsafe {
        let scale = V::splat(s.scale_log2);
        let minus_infinity = V::splat(f32::NEG_INFINITY);
        for lane in (0..s.lanes).step_by(V::LANES) {
            let scores = s.scores.add(lane);
            if !s.visible.is_null() {
                let visible = V::load(s.visible.add(lane));
                for key in 0..s.keys {
                    let score = scores.add(key * s.stride);
                    let seen = visible.select_greater(V::splat(key as f32), V::load(score), minus_infinity);
                    seen.store(score);
                }
            }
            let old = V::load(s.max.add(lane));
            // Several at a time, since each waits for the one before it.
            let mut largest = [old; 4];
            for key in (0..s.keys).step_by(4) {
                for (i, largest) in largest.iter_mut().enumerate() {
                    *largest = V::load(scores.add((key + i) * s.stride)).max(*largest);
                }
            }
            let max = largest[0].max(largest[1]).max(largest[2].max(largest[3]));
            max.store(s.max.add(lane));
            let origin = max.select_greater(minus_infinity, max, V::splat(0.0));
            // The difference first: it is exact near 0, where exponentials are large.
            let mut sum = V::splat(0.0);
            if s.pairs.is_null() {
                for key in 0..s.keys {
                    let score = scores.add(key * s.stride);
                    let x = V::load(score).sub(origin).mul(scale).exp2();
                    sum = sum.add(x);
                    x.store(score);
                }
            } else {
                for pair in 0..s.keys / 2 {
                    let first = scores.add(2 * pair * s.stride);
                    let second = first.add(s.stride);
                    let x = V::load(first).sub(origin).mul(scale).exp2();
                    let y = V::load(second).sub(origin).mul(scale).exp2();
                    sum = sum.add(x).add(y);
                    x.store_pairs(y, s.pairs.add(pair * s.stride + lane));
                    if !s.visible.is_null() {
                        x.store(first);
                        y.store(second);
                    }
                }
            }
            let rescale = old.sub(origin).mul(scale).exp2();
            let total = V::load(s.sum.add(lane)).fma(rescale, sum);
            total.store(s.sum.add(lane));
            if !all_one::<V>(rescale) {
                for d in 0..s.head_dim {
                    let output = s.output.add(d * s.stride + lane);
                    V::load(output).mul(rescale).store(output);
                }
            }
        }
    }
}

/// Whether every lane is 1.
#[inline(always)]
unsafe fn all_one<V: Vector>(x: V) -> bool {
    let mut lanes = [0.0_f32; MAX_LANES];
    // SAFETY: no register is longer.
    unsafe { x.store(lanes.as_mut_ptr()) };
    lanes[..V::LANES].iter().all(|&lane| lane == 1.0)
}

/// [`Merge`].
#[inline(always)]
unsafe fn merge<V: Vector>(m: &Merge) {
    // SAFETY: passed on to the caller.
    unsafe {
        let scale = V::splat(m.scale_log2);
        let minus_infinity = V::splat(f32::NEG_INFINITY);
        for lane in (0..m.lanes).step_by(V::LANES) {
            let (left, right) = (V::load(m.max.add(lane)), V::load(m.other_max.add(lane)));
            let max = left.max(right);
            max.store(m.max.add(lane));
            let origin = max.select_greater(minus_infinity, max, V::splat(0.0));
            let of_left = left.sub(origin).mul(scale).exp2();
            let of_right = right.sub(origin).mul(scale).exp2();
            let (sum, other_sum) = (V::load(m.sum.add(lane)), V::load(m.other_sum.add(lane)));
            sum.mul(of_left).add(other_sum.mul(of_right)).store(m.sum.add(lane));
            for d in 0..m.head_dim {
                let place = d * m.stride + lane;
                let (output, other) = (V::load(m.output.add(place)), V::load(m.other_output.add(place)));
                output.mul(of_left).add(other.mul(of_right)).store(m.output.add(place));
            }
        }
    }
}

/// [`Backpropagate`].
#[inline(always)]
unsafe fn backpropagate<V: Vector>(b: &Backpropagate) {
    // SAFETY: passed on to the caller.
    unsafe {
        let (scale, log2_e) = (V::splat(b.scale), V::splat(std::f32::consts::LOG2_E));
        let zero = V::splat(0.0);
        for lane in (0..b.lanes).step_by(V::LANES) {
            let negative_lse = zero.sub(V::load(b.lse.add(lane)));
            let delta = V::load(b.delta.add(lane));
            let masked = !b.visible.is_null();
            let visible = if masked { V::load(b.visible.add(lane)) } else { zero };
            for key in 0..b.keys {
                let place = key * b.stride + lane;
                // The difference first, rounded once: near 0, where probabilities are large, it keeps all its bits.
                let exponent = V::load(b.scores.add(place)).fma(scale, negative_lse);
                let mut p = exponent.mul(log2_e).exp2();
                let mut ds = p.mul(V::load(b.dp.add(place)).sub(delta));
                if masked {
                    let key = V::splat(key as f32);
                    p = visible.select_greater(key, p, zero);
                    ds = visible.select_greater(key, ds, zero);
                }
                p.store(b.scores.add(place));
                ds.store(b.dp.add(place));
            }
        }
    }
}

/// Widens `count` elements.
#[inline(always)]
unsafe fn widen<V: Vector>(dtype: Dtype, from: *const u8, count: usize, to: *mut f32) {
    // SAFETY: passed on to the caller.
    unsafe {
        let halves = from.cast::<u16>();
        match dtype {
            Dtype::F32 => std::ptr::copy_nonoverlapping(from, to.cast(), 4 * count),
            Dtype::F16 => widen_halves::<V, false>(halves, count, to),
            Dtype::Bf16 => widen_halves::<V, true>(halves, count, to),
        }
    }
}

#[inline(always)]
unsafe fn widen_halves<V: Vector, const BF16: bool>(from: *const u16, count: usize, to: *mut f32) {
    // SAFETY: passed on to the caller; the rest passes through arrays that are long enough.
    unsafe {
        let whole = count / V::LANES * V::LANES;
        for i in (0..whole).step_by(V::LANES) {
            load_half::<V, BF16>(from.add(i)).store(to.add(i));
        }
        if whole < count {
            let (mut narrow, mut wide) = ([0_u16; MAX_LANES], [0.0_f32; MAX_LANES]);
            std::ptr::copy_nonoverlapping(from.add(whole), narrow.as_mut_ptr(), count - whole);
            load_half::<V, BF16>(narrow.as_ptr()).store(wide.as_mut_ptr());
            std::ptr::copy_nonoverlapping(wide.as_ptr(), to.add(whole), count - whole);
        }
    }
}

// Not closures: those are not inlined for certain, and what is not inlined has no vectors.
#[inline(always)]
unsafe fn load_half<V: Vector, const BF16: bool>(from: *const u16) -> V {
    // SAFETY: passed on to the caller.
    unsafe { if BF16 { V::load_bf16(from) } else { V::load_f16(from) } }
}

#[inline(always)]
unsafe fn store_half<V: Vector, const BF16: bool>(x: V, to: *mut u16) {
    // SAFETY: passed on to the caller.
    unsafe { if BF16 { x.store_bf16(to) } else { x.store_f16(to) } }
}

/// Rounds `count` elements.
#[inline(always)]
unsafe fn narrow<V: Vector>(dtype: Dtype, from: *const f32, count: usize, to: *mut u8) {
    // SAFETY: passed on to the caller.
    unsafe {
        let halves = to.cast::<u16>();
        match dtype {
            Dtype::F32 => std::ptr::copy_nonoverlapping(from.cast(), to, 4 * count),
            Dtype::F16 => narrow_to_halves::<V, false>(from, count, halves),
            Dtype::Bf16 => narrow_to_halves::<V, true>(from, count, halves),
        }
    }
}

#[inline(always)]
unsafe fn narrow_to_halves<V: Vector, const BF16: bool>(from: *const f32, count: usize, to: *mut u16) {
    // SAFETY: as for `widen_halves`.
    unsafe {
        let whole = count / V::LANES * V::LANES;
        for i in (0..whole).step_by(V::LANES) {
            store_half::<V, BF16>(V::load(from.add(i)), to.add(i));
        }
        if whole < count {
            let (mut narrow, mut wide) = ([0_u16; MAX_LANES], [0.0_f32; MAX_LANES]);
            std::ptr::copy_nonoverlapping(from.add(whole), wide.as_mut_ptr(), count - whole);
            store_half::<V, BF16>(V::load(wide.as_ptr()), narrow.as_mut_ptr());
            std::ptr::copy_nonoverlapping(narrow.as_ptr(), to.add(whole), count - whole);
        }
    }
}

/// Block by block.
#[inline(always)]
unsafe fn transpose<V: Vector>(
    from: *const f32,
    stride: usize,
    rows: usize,
    to: *mut f32,
    to_stride: usize,
    columns: usize,
) {
    for row in (0..rows).step_by(V::LANES) {
        for column in (0..columns).step_by(V::LANES) {
            // SAFETY: passed on to the caller.
            unsafe {
                let (from, to) = (from.add(row * stride + column), to.add(column * to_stride + row));
                V::transpose(
                    from,
                    stride,
                    V::LANES.min(rows - row),
                    to,
                    to_stride,
                    V::LANES.min(columns - column),
                );
            }
        }
    }
}

/// Sums of products of columns.
#[inline(always)]
unsafe fn dot<V: Vector>(x: *const f32, y: *const f32, count: usize, in_order: bool, to: *mut f32) {
    // SAFETY: passed on to the caller.
    unsafe {
        let mut sums = [V::splat(0.0); 8];
        for i in 0..count {
            let sum = &mut sums[if in_order { 0 } else { i % 8 }];
            *sum = V::load(x.add(i * V::LANES)).fma(V::load(y.add(i * V::LANES)), *sum);
        }
        for width in [4, 2, 1] {
            for i in 0..width {
                sums[i] = sums[i].add(sums[i + width]);
            }
        }
        sums[0].store(to);
    }
}

/// [`One`], for a dtype: 0 is f32, 1 f16, 2 bf16.
#[inline(always)]
unsafe fn one<V: Vector, const DTYPE: u8>(o: &One) {
    // SAFETY: passed on to the caller.
    unsafe {
        for key in 0..o.keys {
            let row = o.k.add(key * o.k_stride_bytes);
            let ahead = row.wrapping_add(AHEAD * o.k_stride_bytes);
            let mut sums = V::splat(0.0);
            let mut d = 0;
            while d + V::LANES <= o.head_dim {
                V::prefetch(ahead.wrapping_add(d * bytes::<DTYPE>()));
                let k = whole::<V, DTYPE>(row.add(d * bytes::<DTYPE>()));
                sums = k.fma(V::load(o.query.add(d)), sums);
                d += V::LANES;
            }
            if d < o.head_dim {
                sums = last::<V, DTYPE>(row, d, o.head_dim).fma(V::load(o.query.add(d)), sums);
            }
            *o.scores.add(key) = sums.sum();
        }
        for key in o.keys..o.keys.next_multiple_of(V::LANES) {
            *o.scores.add(key) = f32::NEG_INFINITY;
        }
        let old = *o.max;
        let mut largest = V::splat(old);
        for key in (0..o.keys).step_by(V::LANES) {
            largest = V::load(o.scores.add(key)).max(largest);
        }
        let mut lanes = [0.0_f32; MAX_LANES];
        largest.store(lanes.as_mut_ptr());
        let max = lanes[..V::LANES]
            .iter()
            .fold(old, |max, &x| if x > max { x } else { max });
        *o.max = max;
        let origin = V::splat(if max == f32::NEG_INFINITY { 0.0 } else { max });
        let scale = V::splat(o.scale_log2);
        let mut sums = V::splat(0.0);
        for key in (0..o.keys).step_by(V::LANES) {
            let exponential = V::load(o.scores.add(key)).sub(origin).mul(scale).exp2();
            sums = sums.add(exponential);
            exponential.store(o.scores.add(key));
        }
        let rescale = V::splat(old).sub(origin).mul(scale).exp2();
        rescale.store(lanes.as_mut_ptr());
        *o.sum = *o.sum * lanes[0] + sums.sum();
        let mut d = 0;
        while d < o.head_dim {
            if d + 4 * V::LANES <= o.head_dim {
                weigh::<V, DTYPE, 4>(o, d, rescale);
                d += 4 * V::LANES;
            } else {
                weigh::<V, DTYPE, 1>(o, d, rescale);
                d += V::LANES;
            }
        }
    }
}

/// Adds exponentials times values to `N` registers of the output, from element `first` of the head.
#[inline(always)]
unsafe fn weigh<V: Vector, const DTYPE: u8, const N: usize>(o: &One, first: usize, rescale: V) {
    // SAFETY: passed on to the caller; the output has room for whole registers.
    unsafe {
        let mut sums = [rescale; N];
        for (n, sum) in sums.iter_mut().enumerate() {
            *sum = V::load(o.output.add(first + n * V::LANES)).mul(rescale);
        }
        for key in 0..o.keys {
            let row = o.v.add(key * o.v_stride_bytes);
            let exponential = V::splat(*o.scores.add(key));
            if first + N * V::LANES > o.head_dim {
                sums[0] = last::<V, DTYPE>(row, first, o.head_dim).fma(exponential, sums[0]); // N is 1
                continue;
            }
            let row = row.add(first * bytes::<DTYPE>());
            let ahead = row.wrapping_add(AHEAD * o.v_stride_bytes);
            for (n, sum) in sums.iter_mut().enumerate() {
                let place = n * V::LANES * bytes::<DTYPE>();
                V::prefetch(ahead.wrapping_add(place));
                *sum = whole::<V, DTYPE>(row.add(place)).fma(exponential, *sum);
            }
        }
        for (n, sum) in sums.iter().enumerate() {
            sum.store(o.output.add(first + n * V::LANES));
        }
    }
}

/// Rows between one that is read and one that is asked for, to be there when its turn comes.
const AHEAD: usize = 16;

const fn bytes<const DTYPE: u8>() -> usize {
    if DTYPE == 0 { 4 } else { 2 }
}

/// What a row has from element `first` on, less than a register, and zeros.
#[inline(always)]
unsafe fn last<V: Vector, const DTYPE: u8>(row: *const u8, first: usize, head_dim: usize) -> V {
    let mut elements = [0.0_f32; MAX_LANES];
    // SAFETY: the elements are there, says the caller, and fewer than the array's.
    unsafe {
        let (from, count) = (row.add(first * bytes::<DTYPE>()), (head_dim - first) * bytes::<DTYPE>());
        std::ptr::copy_nonoverlapping(from, elements.as_mut_ptr().cast(), count);
        whole::<V, DTYPE>(elements.as_ptr().cast())
    }
}

/// A whole register of elements.
#[inline(always)]
unsafe fn whole<V: Vector, const DTYPE: u8>(from: *const u8) -> V {
    // SAFETY: passed on to the caller.
    unsafe {
        match DTYPE {
            0 => V::load(from.cast()),
            1 => V::load_f16(from.cast()),
            _ => V::load_bf16(from.cast()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs a test with the kernels of every instruction set the processor has.
    fn each(test: impl Fn(&'static Kernels)) {
        for isa in Isa::available() {
            println!("{}", isa.kernels().name);
            test(isa.kernels());
        }
    }

    /// Whole numbers, so small that every sum of their products is exact.
    fn whole(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7 + seed) % 11) as f32 - 5.0).collect()
    }

    #[test]
    fn exp2_is_within_one_and_a_half_units_in_the_last_place() {
        each(|kernels| {
            let inputs: Vec<f32> = (0..1 << 18).map(|i| 0.5 - 126.5 * i as f32 / 262_143.0).collect();
            let mut outputs = inputs.clone();
            // SAFETY: the processor has the instructions, and the count is a multiple of every register's lanes.
            unsafe { (kernels.exp2)(outputs.as_mut_ptr(), outputs.len()) };
            for (x, got) in inputs.into_iter().zip(outputs) {
                let want = f64::from(x).exp2();
                let error = (f64::from(got) - want).abs();
                assert!(
                    error <= 1.5 * f64::from(f32::EPSILON) * want,
                    "2^{x} = {want}, got {got}"
                );
            }
        });
    }

    #[test]
    fn exp2_of_the_special_values() {
        each(|kernels| {
            let mut values = [0.0, -0.0, -1.0, -126.0, -127.0, -1e30, f32::NEG_INFINITY, f32::NAN].repeat(2);
            // SAFETY: as above.
            unsafe { (kernels.exp2)(values.as_mut_ptr(), values.len()) };
            assert_eq!(values[..7], [1.0, 1.0, 0.5, f32::MIN_POSITIVE, 0.0, 0.0, 0.0]);
            assert!(values[7].is_nan());
        });
    }

    #[test]
    fn products_are_the_sums_of_their_definition() {
        each(|kernels| {
            let panel = kernels.panel;
            for (rows, inner, columns) in [(8, 1, kernels.lanes), (16, 5, panel), (24, 8, panel + kernels.lanes)] {
                for (transposed, accumulate) in [(false, false), (true, false), (false, true), (true, true)] {
                    let a_stride = if transposed { rows } else { inner };
                    let (a, b) = (whole(rows * inner, 1), whole(inner * columns, 2));
                    let before = whole(rows * columns, 3);
                    let mut c = before.clone();
                    // SAFETY: the processor has the instructions, and the matrices are of these sizes.
                    unsafe {
                        (kernels.product)(&Product {
                            rows,
                            inner,
                            columns,
                            a: a.as_ptr(),
                            a_stride,
                            transposed,
                            b: b.as_ptr(),
                            b_stride: columns,
                            c: c.as_mut_ptr(),
                            c_stride: columns,
                            accumulate,
                        });
                    }
                    for (index, got) in c.into_iter().enumerate() {
                        let (row, column) = (index / columns, index % columns);
                        let a = |i: usize| a[if transposed { i * rows + row } else { row * inner + i }];
                        let sum: f32 = (0..inner).map(|i| a(i) * b[i * columns + column]).sum();
                        let want = sum + if accumulate { before[index] } else { 0.0 };
                        assert_eq!(
                            got, want,
                            "({row}, {column}) of {rows} x {inner} x {columns}, {transposed}"
                        );
                    }
                }
            }
        });
    }

    #[test]
    fn transposes_are_those_of_their_definition() {
        each(|kernels| {
            for (rows, columns) in [(1, 1), (16, 16), (5, 40), (40, 3), (33, 24)] {
                let (stride, to_stride) = (48, 64);
                let from: Vec<f32> = (0..(rows + 15) * stride).map(|i| i as f32).collect();
                let mut to = vec![-1.0; (columns + 15) * to_stride];
                // SAFETY: there is room for whole registers at every end.
                unsafe { (kernels.transpose)(from.as_ptr(), stride, rows, to.as_mut_ptr(), to_stride, columns) };
                for row in 0..rows {
                    for column in 0..columns {
                        let got = to[column * to_stride + row];
                        assert_eq!(
                            got,
                            from[row * stride + column],
                            "({row}, {column}) of {rows} x {columns}"
                        );
                    }
                }
                assert!(
                    to[columns * to_stride..].iter().all(|&x| x == -1.0),
                    "rows past the last column"
                );
            }
        });
    }

    #[test]
    fn conversions_are_those_of_half() {
        use half::{bf16, f16};
        each(|kernels| {
            let mut values: Vec<f32> = (0..1000_u32)
                .map(|i| f32::from_bits(i.wrapping_mul(0x9e37_79b9)))
                .collect();
            values.extend([
                0.0,
                -0.0,
                1.0 + 1.0 / 256.0,
                65520.0,
                65519.0,
                1e-8,
                f32::INFINITY,
                f32::NAN,
                3.4e38,
            ]);
            let mut bits = vec![0_u16; values.len()];
            let mut back = vec![0.0_f32; values.len()];
            for dtype in [Dtype::F16, Dtype::Bf16] {
                // SAFETY: the processor has the instructions; all runs are as long as `values`.
                unsafe {
                    (kernels.narrow)(dtype, values.as_ptr(), values.len(), bits.as_mut_ptr().cast());
                    (kernels.widen)(dtype, bits.as_ptr().cast(), bits.len(), back.as_mut_ptr());
                }
                for ((&value, &bits), &back) in values.iter().zip(&bits).zip(&back) {
                    let (want, wide) = match dtype {
                        Dtype::F16 => (f16::from_f32(value).to_bits(), f16::from_bits(bits).to_f32()),
                        _ => (bf16::from_f32(value).to_bits(), bf16::from_bits(bits).to_f32()),
                    };
                    assert!(
                        bits == want || value.is_nan() && back.is_nan(),
                        "{value:e} as {dtype:?}"
                    );
                    assert!(
                        back.to_bits() == wide.to_bits() || wide.is_nan() && back.is_nan(),
                        "{bits:#x}"
                    );
                }
            }
        });
    }
}
