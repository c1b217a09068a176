//! Products of matrices: what describes them, and those of f32. Products of pairs of bf16 are in `bf16.rs`, written
//! for the processors that have them.

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
    /// Number of parts of a and b.
    pub parts: usize,
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
                3 => rows::<V, 3>(p, b, c),
                2 => rows::<V, 2>(p, b, c),
                _ => rows::<V, 1>(p, b, c),
            }
        }
        column += registers * V::LANES;
    }
}

/// Runs [`Product`] for `N` registers of columns.
#[inline(always)]
unsafe fn rows<V: Vector, const N: usize>(p: &Product, b: *const f32, c: *mut f32) {
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
            let a = p.a.add(row * if p.transposed { 1 } else { p.a_stride });
            match (p.transposed, rows) {
                (false, 4) => block::<V, 4, N, false>(p, a, b, c),
                (true, 4) => block::<V, 4, N, true>(p, a, b, c),
                (false, 6) => block::<V, 6, N, false>(p, a, b, c),
                (true, 6) => block::<V, 6, N, true>(p, a, b, c),
                // Blocks of eight rows. Other instruction sets have no registers for them.
                (false, _) if V::ROWS == 8 => block::<V, 8, N, false>(p, a, b, c),
                (true, _) if V::ROWS == 8 => block::<V, 8, N, true>(p, a, b, c),
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
    a: *const f32,
    mut b: *const f32,
    c: *mut f32,
) {
    // SAFETY: passed on to the caller.
    unsafe {
        let mut sums = [[V::splat(0.0); N]; M];
        let mut i = 0;
        for _ in 0..p.inner / V::STEPS {
            for _ in 0..V::STEPS {
                step::<V, M, N, TRANSPOSED>(p, a, i, b, &mut sums);
                b = b.add(p.b_stride);
                i += 1;
            }
        }
        for i in i..p.inner {
            step::<V, M, N, TRANSPOSED>(p, a, i, b, &mut sums);
            b = b.add(p.b_stride);
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

/// Adds column `i` of `a` times the row of `b` at `b`.
#[inline(always)]
unsafe fn step<V: Vector, const M: usize, const N: usize, const TRANSPOSED: bool>(
    p: &Product,
    a: *const f32,
    i: usize,
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
            let factor = if TRANSPOSED {
                V::splat(*a.add(i * p.a_stride + m))
            } else {
                V::broadcast(a.add(m * p.a_stride), i)
            };
            for (sum, b) in sums.iter_mut().zip(b_row) {
                *sum = factor.fma(b, *sum);
            }
        }
    }
}
