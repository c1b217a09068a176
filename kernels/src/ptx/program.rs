//! The markers of score programs: comments that name registers, [`crate::program`] says which.
//!
//! Unspliced, a marker does nothing. Spliced, it does arithmetic, loads memory that no kernel writes, and writes memory that no
//! kernel reads: `nomem`. All but the last two are volatile: one marker leaves values in registers that another reads and the
//! compiler does not know of, so they must keep their order.

use core::arch::asm;

/// True in the portable kernels for score programs, whose text is compiled before the program is known: they work addresses and counts
/// out where these are needed, since every register that is free in the loops saves spills of the program.
pub const SAVES_REGISTERS: bool = cfg!(feature = "program_sm_80");

/// The tile that a marker belongs to.
pub trait Tile {
    /// True if rows are keys, and columns queries.
    const TRANSPOSED: bool;
    /// True if columns may lie past the end of their sequence.
    const EDGE: bool;
}

/// A tile whose rows are queries.
pub struct OfQueries<const EDGE: bool>;

/// A tile whose rows are keys.
pub struct OfKeys<const EDGE: bool>;

impl<const EDGE: bool> Tile for OfQueries<EDGE> {
    const TRANSPOSED: bool = false;
    const EDGE: bool = EDGE;
}

impl<const EDGE: bool> Tile for OfKeys<EDGE> {
    const TRANSPOSED: bool = true;
    const EDGE: bool = EDGE;
}

/// Calls a macro with the words for the layout and the edge of `$tile`.
macro_rules! for_tile {
    ($tile:ident, $plain:literal, $transposed:literal, $macro:ident) => {
        match ($tile::TRANSPOSED, $tile::EDGE) {
            (false, false) => $macro!($plain, "whole"),
            (false, true) => $macro!($plain, "edge"),
            (true, false) => $macro!($transposed, "whole"),
            (true, true) => $macro!($transposed, "edge"),
        }
    };
}

/// The values at a marker of scores.
pub trait Shown {
    /// 16 x 16 scores, two neighbouring accumulators of m16n8, `m` blocks down and `n` across the tile.
    fn fragment<T: Tile>(left: &mut [f32; 4], right: &mut [f32; 4], m: usize, n: usize);

    /// Column `n` of a lane's four rows.
    fn lanes<T: Tile>(column: [&mut f32; 4], n: usize);
}

macro_rules! shown {
    ($(#[$doc:meta])* $name:ident, $kind:literal) => {
        $(#[$doc])*
        pub struct $name;

        impl Shown for $name {
            #[inline(always)]
            fn fragment<T: Tile>(left: &mut [f32; 4], right: &mut [f32; 4], m: usize, n: usize) {
                macro_rules! block {
                    ($layout:literal, $edge:literal, $m:literal, $n:literal) => {{
                        let ([a, b, c, d], [e, f, g, h]) = (left, right);
                        // SAFETY: a comment, or a program as the module describes it.
                        unsafe {
                            asm!(concat!("//@", $kind, " ", $layout, " ", $edge, " {} {} {} {} {} {} {} {} ", $m, " ", $n),
                                inout(reg32) *a, inout(reg32) *b, inout(reg32) *c, inout(reg32) *d,
                                inout(reg32) *e, inout(reg32) *f, inout(reg32) *g, inout(reg32) *h,
                                options(nomem, nostack));
                        }
                    }};
                }
                macro_rules! blocks {
                    ($layout:literal, $edge:literal) => {
                        match (m, n) {
                            (0, 0) => block!($layout, $edge, 0, 0),
                            (0, 1) => block!($layout, $edge, 0, 16),
                            (0, 2) => block!($layout, $edge, 0, 32),
                            (0, 3) => block!($layout, $edge, 0, 48),
                            (0, 4) => block!($layout, $edge, 0, 64),
                            (0, 5) => block!($layout, $edge, 0, 80),
                            (0, 6) => block!($layout, $edge, 0, 96),
                            (0, 7) => block!($layout, $edge, 0, 112),
                            (0, 8) => block!($layout, $edge, 0, 128),
                            (0, 9) => block!($layout, $edge, 0, 144),
                            (1, 0) => block!($layout, $edge, 16, 0),
                            (1, 1) => block!($layout, $edge, 16, 16),
                            (1, 2) => block!($layout, $edge, 16, 32),
                            (1, 3) => block!($layout, $edge, 16, 48),
                            _ => loop {},
                        }
                    };
                }
                for_tile!(T, "fragment", "fragment_t", blocks)
            }

            #[inline(always)]
            fn lanes<T: Tile>([a, b, c, d]: [&mut f32; 4], n: usize) {
                macro_rules! column {
                    ($layout:literal, $edge:literal, $n:literal) => {
                        // SAFETY: a comment, or a program as the module describes it.
                        unsafe {
                            asm!(concat!("//@", $kind, " ", $layout, " ", $edge, " {} {} {} {} 0 ", $n),
                                inout(reg32) *a, inout(reg32) *b, inout(reg32) *c, inout(reg32) *d,
                                options(nomem, nostack));
                        }
                    };
                }
                macro_rules! columns {
                    ($layout:literal, $edge:literal) => {
                        match n {
                            0 => column!($layout, $edge, 0),
                            1 => column!($layout, $edge, 16),
                            2 => column!($layout, $edge, 32),
                            3 => column!($layout, $edge, 48),
                            _ => loop {},
                        }
                    };
                }
                for_tile!(T, "lanes", "lanes_t", columns)
            }
        }
    };
}

shown!(
    /// Products of queries and keys, before the softmax.
    Scores, "score");
shown!(
    /// The scores that the program made of them.
    Masked, "mask");
shown!(
    /// Weights that backward made of scores that no mask changed.
    Hidden, "hide");
shown!(
    /// Weights before their product with the values, and their gradients.
    Weights, "weight");
shown!(
    /// Gradients of the scores that the program made.
    Gradients, "gradient");

/// Begins a head of a sequence: the program computes here the values that depend on head, batch entry and lengths alone.
#[inline(always)]
pub fn head(head: u32, batch: u32, seqlen_q: u32, seqlen_k: u32) {
    // SAFETY: a comment, or a program as the module describes it.
    unsafe {
        asm!("//@head {h} {b} {q} {k}", h = in(reg32) head, b = in(reg32) batch, q = in(reg32) seqlen_q,
            k = in(reg32) seqlen_k, options(nomem, nostack));
    }
}

/// Returns the start of each row's softmax: its largest score, and this lane's part of its sum.
#[inline(always)]
pub fn start(mut row_max: f32, mut row_sum: f32) -> (f32, f32) {
    // SAFETY: a comment, or a program as the module describes it.
    unsafe { asm!("//@start {m} {s}", m = inout(reg32) row_max, s = inout(reg32) row_sum, options(nomem, nostack)) }
    (row_max, row_sum)
}

/// Begins a streamed tile whose first pair for this lane is (`row`, `column`): the program computes here the values that scores share.
#[inline(always)]
pub fn fragment_tile<T: Tile>(row: u32, column: u32, m: usize) {
    macro_rules! rows {
        ($layout:literal, $edge:literal, $m:literal) => {
            // SAFETY: a comment, or a program as the module describes it.
            unsafe {
                asm!(concat!("//@tile ", $layout, " ", $edge, " {r} {c} ", $m), r = in(reg32) row, c = in(reg32) column,
                    options(nomem, nostack))
            }
        };
    }
    macro_rules! tile {
        ($layout:literal, $edge:literal) => {
            match m {
                0 => rows!($layout, $edge, 0),
                1 => rows!($layout, $edge, 16),
                _ => loop {},
            }
        };
    }
    for_tile!(T, "fragment", "fragment_t", tile)
}

/// [`fragment_tile`] for a tile of plain FMA.
#[inline(always)]
pub fn lanes_tile<T: Tile>(row: u32, column: u32) {
    macro_rules! tile {
        ($layout:literal, $edge:literal) => {
            // SAFETY: a comment, or a program as the module describes it.
            unsafe {
                asm!(concat!("//@tile ", $layout, " ", $edge, " {r} {c} 0"), r = in(reg32) row, c = in(reg32) column,
                    options(nomem, nostack))
            }
        };
    }
    for_tile!(T, "lanes", "lanes_t", tile)
}

/// Gives the program the statistics of a query of `head` in backward: its log-sum-exp and delta.
#[inline(always)]
pub fn row(head: u32, lse: f32, delta: f32) {
    // SAFETY: a comment, or a program as the module describes it.
    unsafe {
        asm!("//@row {h} {l} {d}", h = in(reg32) head, l = in(reg32) lse, d = in(reg32) delta, options(nomem, nostack))
    }
}

/// Tells if the program hides pairs. The driver knows the answer when it compiles the kernel, so a branch on it costs nothing.
#[inline(always)]
pub fn hides() -> bool {
    let mut flag = 0_u32;
    // SAFETY: a comment, or a move.
    unsafe { asm!("//@hides {f}", f = inout(reg32) flag, options(pure, nomem, nostack)) }
    flag != 0
}

/// Tells if the program shows a pair of the head that was shown last. It is `pure`, so that a row's columns ask once.
#[inline(always)]
pub fn visible(query: u32, key: u32, head: u32) -> bool {
    let mut flag = 1_u32;
    // SAFETY: a comment, or a program as the module describes it.
    unsafe {
        asm!("//@visible {f} {q} {k} {h}", f = inout(reg32) flag, q = in(reg32) query, k = in(reg32) key,
            h = in(reg32) head, options(pure, nomem, nostack));
    }
    flag != 0
}
