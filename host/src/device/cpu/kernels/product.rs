//! Products of matrices: what describes them, and those of f32. Products of pairs of bf16 are in `bf16.rs`, written
//! for the processors that have them.

use std::hint::black_box;

use super::Terms;
use crate::device::cpu::vector::Vector;

/// Multiple of the rows of a product, and so of the keys of a tile and of head_dim.
pub(in crate::device::cpu) const ROWS: usize = 8;

/// Product `c = a b` or `c += a b`. Elements of `a` are read one by one, rows of `b` and `c` as whole registers.
pub(in crate::device::cpu) struct Product {
    /// Number of rows of a and c, a multiple of [`ROWS`].
    pub rows: usize,
    /// Number of columns of a and rows of b.
    pub inner: usize,
    /// Columns of b and c, a multiple of the lanes of a register.
    pub columns: usize,
    pub a: *const f32,
    /// Elements of a from one row to the next; if a is transposed, from one column to the next.
    pub a_stride: usize,
    /// True if a is stored by columns.
    pub transposed: bool,
    pub b: *const f32,
    pub b_stride: usize,
    pub c: *mut f32,
    pub c_stride: usize,
    /// True for `c += a b`, false for `c = a b`.
    pub accumulate: bool,
}

/// Block size of bf16 pair products: 16 lanes of a register, 16 rows of a tile.
pub(in crate::device::cpu) const SIDE: usize = 16;

/// Product `c = a b` or `c += a b` of bf16 pairs, or of numbers split into bf16 parts (see `parts.rs`).
#[cfg_attr(
    not(any(target_arch = "aarch64", target_arch = "x86_64")),
    expect(dead_code, reason = "no other processor has products of pairs")
)]
pub(in crate::device::cpu) struct PairProduct {
    /// Number of rows of a and c, a multiple of [`SIDE`].
    pub rows: usize,
    /// Number of words of a row of a, and of rows of b; a multiple of [`SIDE`].
    pub inner: usize,
    /// Columns of b and c, a multiple of the lanes of a register.
    pub columns: usize,
    pub a: *const u32,
    /// Words, or f32, from one row to the next.
    pub a_stride: usize,
    /// Number of words from one part to the next.
    pub a_part: usize,
    pub b: *const u32,
    pub b_stride: usize,
    pub b_part: usize,
    /// Products of parts of a and b that are added.
    pub terms: Terms,
    pub c: *mut f32,
    pub c_stride: usize,
    /// True for `c += a b`, false for `c = a b`.
    pub accumulate: bool,
}

/// Products of bf16 pairs on one kind of processor. A word holds two neighbours along the inner axis.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct Pairs {
    /// Called by a thread before its first product, and after its last.
    pub begin: unsafe fn(),
    pub end: unsafe fn(),
    /// Product function; unsafe like the functions of `Kernels`.
    pub product: unsafe fn(&PairProduct),
}

/// Runs [`Product`].
#[inline(always)]
pub(super) unsafe fn product<V: Vector>(p: &Product) {
    let hidden = &Hidden::of::<V>(p);
    // SAFETY: passed on to the caller.
    unsafe {
        if p.transposed {
            columns::<V, true>(p, hidden);
        } else {
            columns::<V, false>(p, hidden);
        }
    }
}

/// Runs [`Product`] for `a` as it is stored.
#[inline(always)]
unsafe fn columns<V: Vector, const TRANSPOSED: bool>(p: &Product, hidden: &Hidden) {
    let mut column = 0;
    while column < p.columns {
        // Four registers are two and two, so that none is left over.
        let registers = match (p.columns - column) / V::LANES {
            4 => 2,
            left => left.min(V::COLUMNS),
        };
        // SAFETY: the columns are within b and c.
        unsafe {
            let (b, c) = (p.b.add(column), p.c.add(column));
            match registers {
                3 => rows::<V, 3, TRANSPOSED>(p, hidden, b, c),
                2 => rows::<V, 2, TRANSPOSED>(p, hidden, b, c),
                _ => rows::<V, 1, TRANSPOSED>(p, hidden, b, c),
            }
        }
        column += registers * V::LANES;
    }
}

/// Runs [`Product`] for `N` registers of columns.
#[inline(always)]
unsafe fn rows<V: Vector, const N: usize, const TRANSPOSED: bool>(
    p: &Product,
    hidden: &Hidden,
    b: *const f32,
    c: *mut f32,
) {
    let mut row = 0;
    while row < p.rows {
        let rows = match p.rows - row {
            // Four and four, so that no two are left over.
            8 if V::ROWS == 6 => 4,
            left => left.min(V::ROWS),
        };
        // SAFETY: rows and inner are those of a, b and c, and rows are a multiple of 8: blocks have 4, 6 or `V::ROWS`
        // of them.
        unsafe {
            let c = c.add(row * p.c_stride);
            let a = p.a.add(row * if TRANSPOSED { 1 } else { p.a_stride });
            match rows {
                4 => block::<V, 4, N, TRANSPOSED>(p, hidden, a, b, c),
                6 => block::<V, 6, N, TRANSPOSED>(p, hidden, a, b, c),
                // Blocks of eight rows. Other instruction sets have no registers for them.
                _ if V::ROWS == 8 => block::<V, 8, N, TRANSPOSED>(p, hidden, a, b, c),
                _ => std::hint::unreachable_unchecked(),
            }
        }
        row += rows;
    }
}

/// `M` rows by `N` registers of c, which stay in registers for the whole sum.
#[inline(always)]
unsafe fn block<V: Vector, const M: usize, const N: usize, const TRANSPOSED: bool>(
    p: &Product,
    hidden: &Hidden,
    a: *const f32,
    mut b: *const f32,
    c: *mut f32,
) {
    // SAFETY: passed on to the caller.
    unsafe {
        let mut sums = [[V::splat(0.0); N]; M];
        let mut a = Elements::<TRANSPOSED>::new(a, p.a_stride, hidden);
        for _ in 0..p.inner / V::STEPS {
            step(&a, b, &mut sums);
            if V::STEPS == 2 {
                step(&a.after(1), b.add(p.b_stride), &mut sums);
            }
            a = a.after(V::STEPS);
            b = b.add(hidden.steps_of_b);
        }
        if !p.inner.is_multiple_of(V::STEPS) {
            step(&a, b, &mut sums);
        }
        for (m, sums) in sums.iter().enumerate() {
            for (n, sum) in sums.iter().enumerate() {
                let to = c.add(m * p.c_stride + n * V::LANES);
                // A sum of sums: its rounding grows with the number of blocks, not of elements.
                let sum = if p.accumulate { V::load(to).add(*sum) } else { *sum };
                sum.store(to);
            }
        }
    }
}

/// Adds a column of `a` times the row of `b` at `b`.
#[inline(always)]
unsafe fn step<V: Vector, const M: usize, const N: usize, const TRANSPOSED: bool>(
    a: &Elements<TRANSPOSED>,
    b: *const f32,
    sums: &mut [[V; N]; M],
) {
    // SAFETY: passed on to the caller.
    unsafe {
        let mut b_row = [V::splat(0.0); N];
        for (n, b_row) in b_row.iter_mut().enumerate() {
            *b_row = V::load(b.add(n * V::LANES));
        }
        for (m, sums) in sums.iter_mut().enumerate() {
            let factor = a.broadcast::<V>(m);
            for (sum, b) in sums.iter_mut().zip(b_row) {
                *sum = factor.fma(b, *sum);
            }
        }
    }
}

/// Multiples of a product's strides, of which the compiler does not know what they are multiples of.
struct Hidden {
    three_rows: usize,
    six_rows: usize,
    /// Of a transposed `a`.
    two_columns: usize,
    /// Rows of b that a loop moves on.
    steps_of_b: usize,
}

impl Hidden {
    #[inline(always)]
    fn of<V: Vector>(p: &Product) -> Self {
        black_box(Self {
            three_rows: 3 * p.a_stride,
            six_rows: 6 * p.a_stride,
            two_columns: 2 * p.a_stride,
            steps_of_b: V::STEPS * p.b_stride,
        })
    }
}

/// A column of up to eight rows of `a`.
///
/// Intel's processors add addresses on ports that multiply, too. So the loop over columns adds few: two of three rows are reached from
/// the first by an index register, and [`Hidden`] keeps the compiler from computing the rest in the loop. Measured on a Xeon, products
/// alone became 1 to 3 % faster.
#[derive(Clone, Copy)]
struct Elements<const TRANSPOSED: bool> {
    /// Rows 0, 3 and 6; if `a` is transposed, in this column.
    thirds: [*const f32; 3],
    /// Number of the column, unless `a` is transposed.
    column: usize,
    stride: usize,
    two_strides: usize,
}

impl<const TRANSPOSED: bool> Elements<TRANSPOSED> {
    #[inline(always)]
    fn new(a: *const f32, stride: usize, hidden: &Hidden) -> Self {
        Self {
            thirds: [a, a.wrapping_add(hidden.three_rows), a.wrapping_add(hidden.six_rows)],
            column: 0,
            stride,
            two_strides: if TRANSPOSED { hidden.two_columns } else { 2 * stride },
        }
    }

    /// Returns the elements `columns` further, up to two.
    #[inline(always)]
    fn after(self, columns: usize) -> Self {
        if !TRANSPOSED {
            let column = self.column + columns;
            return Self { column, ..self };
        }
        let thirds = self.thirds.map(|row| self.strides(row, columns));
        Self { thirds, ..self }
    }

    /// Returns an address `count` strides after `from`, up to two.
    #[inline(always)]
    fn strides(&self, from: *const f32, count: usize) -> *const f32 {
        from.wrapping_add(match count {
            0 => 0,
            1 => self.stride,
            _ => self.two_strides,
        })
    }

    /// Loads the element of row `m` to every lane.
    #[inline(always)]
    unsafe fn broadcast<V: Vector>(&self, m: usize) -> V {
        // SAFETY: passed on to the caller.
        unsafe {
            if TRANSPOSED {
                V::splat(*self.thirds[0].add(m))
            } else {
                V::broadcast(self.strides(self.thirds[m / 3], m % 3), self.column)
            }
        }
    }
}
