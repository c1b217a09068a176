//! Register tiles of a warpgroup: each warp holds 16 of 64 rows, laid out like accumulators of `mma.sync`.

use super::fragment;
use super::fragments::{Fragments, Packed};
use super::panels::{PANEL_COLUMNS, Panels};
use super::register::{Accumulator, Part, RowValues, Rows, ScoreTile};
use crate::ptx::{matrix, matrix::Half, memory, sreg, wgmma, wgmma::WarpgroupMma};
use core::marker::PhantomData;

/// Scores of 64 rows, from two tiles in shared memory.
pub trait WarpgroupScores: ScoreTile + Accumulator<Rows = Rows<1, 2>> {
    /// One f32 for each column that a lane holds part of.
    type Columns: Copy;

    /// Issues `a b^T`, over the whole length of their rows.
    ///
    /// # Safety
    /// The contract of [`WarpgroupMma::product`].
    unsafe fn product(a: Panels, b: Panels) -> Self;

    /// Pins the accumulators; see [`WarpgroupMma::pin`].
    fn pin(&mut self);

    /// Converts the scores to the left operand of a product. They are rounded here, not after the fence before the
    /// product.
    fn pinned_operand(&self) -> Self::Operand;

    /// Makes an operand of zeros, to be filled part by part.
    fn no_operand() -> Self::Operand;

    /// Converts a part of the columns like [`pinned_operand`](Self::pinned_operand).
    fn pin_operand_in(&self, part: Part, operand: &mut Self::Operand);

    /// The largest of `value` and this lane's part of one of its two rows.
    fn max_row(&self, row: usize, value: f32) -> f32;

    /// Each element of a part in one of this lane's two rows: `x = f(x)`.
    fn map_row_in(&mut self, part: Part, row: usize, f: impl Fn(f32) -> f32);

    /// Loads the values of a part's columns from f32s in shared memory; the others are 0.
    ///
    /// # Safety
    /// The contract of [`Accumulator::map_columns`].
    unsafe fn columns_in(part: Part, columns: u32) -> Self::Columns;

    /// Each element of a part with its column's value: `x = f(column value, x)`.
    fn map_columns_in(&mut self, part: Part, columns: Self::Columns, f: impl Fn(f32, f32) -> f32);

    /// Combines each element of a part with that of another tile: `x = f(other, x)`.
    fn zip_in(&mut self, part: Part, other: &Self, f: impl Fn(f32, f32) -> f32);

    /// Writes this lane's part of the operand to `target`, from column `first_column` on; `first_row` is that of the warp.
    ///
    /// # Safety
    /// The contract of [`WarpgroupOutput::write`].
    unsafe fn write(operand: &Self::Operand, target: Panels, first_row: u32, first_column: u32, lane: u32);
}

/// Outputs of 64 rows: accumulators of products of probabilities with values.
pub trait WarpgroupOutput<Operand>: Accumulator {
    /// Issues `self += a b`.
    ///
    /// # Safety
    /// The contract of [`WarpgroupMma::product`].
    unsafe fn add_product(&mut self, a: &Operand, b: Panels) {
        // SAFETY: the caller's contract.
        unsafe { self.add_product_in(Part::WHOLE, a, b) }
    }

    /// Issues the part of `self += a b` with these columns of `a` and rows of `b`.
    ///
    /// # Safety
    /// The contract of [`WarpgroupMma::product`].
    unsafe fn add_product_in(&mut self, part: Part, a: &Operand, b: Panels);

    /// Pins the accumulators; see [`WarpgroupMma::pin`].
    fn pin(&mut self);

    /// Writes this lane's part, rounded to the element type, to `target`; `first_row` is that of the warp.
    ///
    /// # Safety
    /// Only this warpgroup accesses `target`.
    unsafe fn write(&self, target: Panels, first_row: u32, lane: u32);
}

impl<T: Half, const N: usize> WarpgroupScores for Fragments<T, 1, N>
where
    [[f32; 4]; N]: WarpgroupMma<T>,
{
    type Columns = [[f32; 2]; N];

    #[inline(always)]
    unsafe fn product(a: Panels, b: Panels) -> Self {
        // SAFETY (whole body): the caller's contract.
        unsafe {
            let mut sum = <[[f32; 4]; N]>::product(a.along_rows(0), b.along_rows(0));
            for k in 1..a.k_steps() {
                sum.add_product(a.along_rows(k), b.along_rows(k));
            }
            Self([sum], PhantomData)
        }
    }

    #[inline(always)]
    fn pin(&mut self) {
        self.0[0].pin();
    }

    #[inline(always)]
    fn pinned_operand(&self) -> Packed<1, N> {
        let mut packed = self.operand();
        for n in 0..N {
            wgmma::pin_words(&mut packed.0[0][n]);
        }
        packed
    }

    #[inline(always)]
    fn no_operand() -> Packed<1, N> {
        Packed([[[0; 2]; N]; 1])
    }

    #[inline(always)]
    fn pin_operand_in(&self, part: Part, operand: &mut Packed<1, N>) {
        for n in 0..N {
            if part.contains(n, N) {
                let [a, b, c, d] = self.0[0][n];
                operand.0[0][n] = [T::pack(a, b), T::pack(c, d)];
                wgmma::pin_words(&mut operand.0[0][n]);
            }
        }
    }

    #[inline(always)]
    fn max_row(&self, row: usize, value: f32) -> f32 {
        Fragments::max_row(self, row, value)
    }

    #[inline(always)]
    fn map_row_in(&mut self, part: Part, row: usize, f: impl Fn(f32) -> f32) {
        for n in 0..N {
            if part.contains(n, N) {
                for e in [row * 2, row * 2 + 1] {
                    self.0[0][n][e] = f(self.0[0][n][e]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn columns_in(part: Part, columns: u32) -> [[f32; 2]; N] {
        let (_, first) = fragment::accumulator(sreg::lane_id(), 0);
        let mut values = [[0.0; 2]; N];
        for n in 0..N {
            if part.contains(n, N) {
                // SAFETY: the caller's contract; columns are in pairs.
                values[n] = unsafe { memory::ld_shared_v2(columns + (n as u32 * 8 + first) * 4) };
            }
        }
        values
    }

    #[inline(always)]
    fn map_columns_in(&mut self, part: Part, columns: [[f32; 2]; N], f: impl Fn(f32, f32) -> f32) {
        for n in 0..N {
            if part.contains(n, N) {
                for e in 0..4 {
                    self.0[0][n][e] = f(columns[n][e % 2], self.0[0][n][e]);
                }
            }
        }
    }

    #[inline(always)]
    fn zip_in(&mut self, part: Part, other: &Self, f: impl Fn(f32, f32) -> f32) {
        for n in 0..N {
            if part.contains(n, N) {
                for e in 0..4 {
                    self.0[0][n][e] = f(other.0[0][n][e], self.0[0][n][e]);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn write(operand: &Packed<1, N>, target: Panels, first_row: u32, first_column: u32, lane: u32) {
        // SAFETY: the caller's contract.
        unsafe { write_fragments(operand, target, first_row, first_column, lane) }
    }
}

impl<T: Half, const N: usize, const K: usize> WarpgroupOutput<Packed<1, K>> for Fragments<T, 1, N>
where
    [[f32; 4]; N]: WarpgroupMma<T>,
{
    #[inline(always)]
    unsafe fn add_product_in(&mut self, part: Part, a: &Packed<1, K>, b: Panels) {
        for k in 0..K / 2 {
            if part.contains(k, K / 2) {
                // SAFETY: the caller's contract.
                unsafe { self.0[0].add_registers(a.fragment(0, k), b.down_rows(k as u32)) }
            }
        }
    }

    #[inline(always)]
    fn pin(&mut self) {
        self.0[0].pin();
    }

    #[inline(always)]
    unsafe fn write(&self, target: Panels, first_row: u32, lane: u32) {
        // SAFETY: the caller's contract.
        unsafe { write_fragments(&self.operand(), target, first_row, 0, lane) }
    }
}

/// Writes a warp's 16 rows of 16-bit elements, 16 columns at a time, and the last 8 of an odd number of fragments: lane `l`
/// supplies the address of row `l % 16` of one half.
#[inline(always)]
unsafe fn write_fragments<const N: usize>(
    packed: &Packed<1, N>,
    target: Panels,
    first_row: u32,
    first_column: u32,
    lane: u32,
) {
    let address = |column| target.chunk(first_row + lane % 16, first_column + column);
    // SAFETY (whole body): the caller's contract.
    for k in 0..N / 2 {
        unsafe { matrix::stmatrix_x4(address(k as u32 * 16 + lane / 16 * 8), packed.fragment(0, k)) }
    }
    if N % 2 == 1 {
        unsafe { matrix::stmatrix_x2(address(N as u32 * 8 - 8), packed.0[0][N - 1]) }
    }
}

/// Sums of products of a warpgroup with slices of a tile, 64 columns each. The slices are the rows here: the transpose of
/// a gradient of keys or values.
pub trait WarpgroupSlices: Copy {
    /// Makes sums of zero.
    fn zero() -> Self;

    /// Issues `self[slice] += a[slice]^T b` for one of the slices, of which `first` is the first.
    ///
    /// # Safety
    /// The contract of [`WarpgroupMma::product`].
    unsafe fn add_product(&mut self, slice: u32, a: Panels, first: u32, b: Panels);

    /// Pins the accumulators; see [`WarpgroupMma::pin`].
    fn pin(&mut self);

    /// Combines each element with its coordinates in the transposed tile, less the warp's first column: `x = f(row, column, x)`.
    /// Slice `first` is the first of these sums.
    fn map_coordinates(&mut self, first: u32, f: impl Fn(u32, u32, f32) -> f32);

    /// Multiplies each element by a factor.
    fn scale(&mut self, factor: f32);

    /// Writes this lane's part, rounded to the element type and transposed, to slices `first ..` of `target`.
    ///
    /// # Safety
    /// Only this warpgroup accesses these slices.
    unsafe fn write(&self, target: Panels, first: u32, warp: u32, lane: u32);
}

impl<T: Half, const N: usize, const SLICES: usize> WarpgroupSlices for [Fragments<T, 1, N>; SLICES]
where
    [[f32; 4]; N]: WarpgroupMma<T>,
{
    #[inline(always)]
    fn zero() -> Self {
        [Fragments::zero(); SLICES]
    }

    #[inline(always)]
    unsafe fn add_product(&mut self, slice: u32, a: Panels, first: u32, b: Panels) {
        let a = a.panel(first + slice);
        for k in 0..a.row_steps() {
            // SAFETY: the caller's contract.
            unsafe { self[slice as usize].0[0].add_product_down(a.down_rows(k), b.down_rows(k)) }
        }
    }

    #[inline(always)]
    fn pin(&mut self) {
        for slice in 0..SLICES {
            self[slice].0[0].pin();
        }
    }

    #[inline(always)]
    fn map_coordinates(&mut self, first: u32, f: impl Fn(u32, u32, f32) -> f32) {
        for slice in 0..SLICES {
            let columns = (first + slice as u32) * PANEL_COLUMNS;
            self[slice].map_coordinates(|row, column, x| f(column, columns + row, x));
        }
    }

    #[inline(always)]
    fn scale(&mut self, factor: f32) {
        for slice in 0..SLICES {
            self[slice].map_rows(Rows::splat(factor), |factor, x| x * factor);
        }
    }

    #[inline(always)]
    unsafe fn write(&self, target: Panels, first: u32, warp: u32, lane: u32) {
        for slice in 0..SLICES {
            let (packed, target) = (self[slice].operand(), target.panel(first + slice as u32));
            // 16 rows of the target at a time. Lanes 8i .. 8i + 8 supply the rows of a square of 8, i = 0 and 1 side by side.
            for k in 0..N / 2 {
                let row = k as u32 * 16 + lane / 16 * 8 + lane % 8;
                let address = target.chunk(row, warp * 16 + lane / 8 % 2 * 8);
                // SAFETY: the caller's contract.
                unsafe { matrix::stmatrix_x4_trans(address, packed.fragment(0, k)) }
            }
        }
    }
}

/// A 64 x 64 sum of a warpgroup, of products of tiles along their rows.
pub trait WarpgroupSquare: Sized {
    /// Issues `a^T b`, summed over all pairs of tiles, one panel each.
    ///
    /// # Safety
    /// The contract of [`WarpgroupMma::product`].
    unsafe fn product<const PAIRS: usize>(pairs: [(Panels, Panels); PAIRS]) -> Self;

    /// Issues `a b`, over the whole length of the rows of a; b is one panel.
    ///
    /// # Safety
    /// The contract of [`WarpgroupMma::product`].
    unsafe fn product_across(a: Panels, b: Panels) -> Self;

    /// Issues another `a b` in the same registers.
    ///
    /// # Safety
    /// The contract of [`WarpgroupMma::product`]; `add` is 0.
    unsafe fn restart_across(&mut self, a: Panels, b: Panels, add: u32);

    /// Pins the accumulators; see [`WarpgroupMma::pin`].
    fn pin(&mut self);

    /// Adds this thread's part to a square in device memory, in the order of registers.
    ///
    /// # Safety
    /// `target` has room for a square, which other threads access by additions alone.
    unsafe fn add_to(&self, target: u64, thread: u32);

    /// Writes this thread's part to `target`, in the order of registers, not of rows; `thread` is its index in the
    /// warpgroup.
    ///
    /// # Safety
    /// `target` is a 16-byte aligned shared-window address of [`SQUARE_BYTES`] bytes that only this warpgroup
    /// accesses.
    unsafe fn write(&self, target: u32, thread: u32);
}

/// Size of an f32 square, in bytes.
pub const SQUARE_BYTES: u32 = 64 * 64 * 4;

/// The square, in f32.
pub struct Square<T>([[f32; 4]; 8], PhantomData<T>);

/// Returns the place of registers `quad` of a thread in a square.
#[inline(always)]
fn quad_offset(quad: usize, thread: u32) -> u32 {
    (quad as u32 * 128 + thread) * 16
}

impl<T: Half> WarpgroupSquare for Square<T>
where
    [[f32; 4]; 8]: WarpgroupMma<T>,
{
    #[inline(always)]
    unsafe fn product<const PAIRS: usize>(pairs: [(Panels, Panels); PAIRS]) -> Self {
        let (a, b) = pairs[0];
        // SAFETY (whole body): the caller's contract.
        unsafe {
            let mut sum = <[[f32; 4]; 8]>::product_down(a.down_rows(0), b.down_rows(0));
            for i in 0..PAIRS {
                let (a, b) = pairs[i];
                for k in (if i == 0 { 1 } else { 0 })..a.row_steps() {
                    sum.add_product_down(a.down_rows(k), b.down_rows(k));
                }
            }
            Self(sum, PhantomData)
        }
    }

    #[inline(always)]
    unsafe fn product_across(a: Panels, b: Panels) -> Self {
        // SAFETY (whole body): the caller's contract.
        unsafe {
            let mut sum = <[[f32; 4]; 8]>::product_across(a.along_rows(0), b.down_rows(0));
            for k in 1..a.k_steps() {
                sum.add_product_across(a.along_rows(k), b.down_rows(k));
            }
            Self(sum, PhantomData)
        }
    }

    #[inline(always)]
    unsafe fn restart_across(&mut self, a: Panels, b: Panels, add: u32) {
        // SAFETY (whole body): the caller's contract.
        unsafe {
            self.0.restart_across(a.along_rows(0), b.down_rows(0), add);
            for k in 1..a.k_steps() {
                self.0.add_product_across(a.along_rows(k), b.down_rows(k));
            }
        }
    }

    #[inline(always)]
    fn pin(&mut self) {
        self.0.pin();
    }

    #[inline(always)]
    unsafe fn add_to(&self, target: u64, thread: u32) {
        // One address in registers: the offsets from it are constants in the instructions.
        let target = target + quad_offset(0, thread) as u64;
        for quad in 0..8 {
            // SAFETY: the caller's contract.
            unsafe { memory::add_global_v4(target + quad_offset(quad, 0) as u64, self.0[quad]) }
        }
    }

    #[inline(always)]
    unsafe fn write(&self, target: u32, thread: u32) {
        for quad in 0..8 {
            // SAFETY: the caller's contract.
            unsafe { memory::st_shared_words(target + quad_offset(quad, thread), self.0[quad].map(f32::to_bits)) }
        }
    }
}

impl<T> Square<T> {
    /// Reads this thread's part of a square that [`write`](WarpgroupSquare::write) wrote, copied to global memory.
    ///
    /// # Safety
    /// `source` is 16-byte aligned and readable.
    #[inline(always)]
    pub unsafe fn read(source: u64, thread: u32) -> Fragments<T, 1, 8> {
        let mut sum = [[0.0; 4]; 8];
        for quad in 0..8 {
            // SAFETY: the caller's contract.
            sum[quad] =
                unsafe { memory::ld_global_words(source + quad_offset(quad, thread) as u64) }.map(f32::from_bits);
        }
        Fragments([sum], PhantomData)
    }
}
