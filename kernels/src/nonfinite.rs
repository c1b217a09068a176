//! NaN and infinity among keys, values and gradients that a mask hides from some queries of a tile.
//!
//! A hidden pair weighs 0, and 0 times NaN is NaN in a product. So a tile that needs the mask is searched for such elements,
//! by the threads that multiply it; where there are any, which is rare, they are zeroed in shared memory before the product, and at
//! the end added to those rows of the sum that do see them. Tiles without hidden pairs are not searched, and
//! multiply as they are.

use crate::mask::Blocks;
use crate::tile::element::Element;
use crate::tile::{
    global::{GlobalTile, Places},
    register::Accumulator,
};

/// Runs `$body` for each `$position` before `$end` in the masked ones of `$blocks`, of `$block` rows each. `$none` is a zero to be added
/// to columns: kept, these would occupy registers during the whole loop.
macro_rules! for_hidden {
    ($blocks:expr, $block:expr, $end:expr, |$position:ident, $none:ident| $body:expr) => {
        let (blocks, block): ($crate::mask::Blocks, u32) = ($blocks, $block);
        let (whole_begin, whole_end) = (blocks.whole_begin * block, blocks.whole_end * block);
        for $position in blocks.begin * block..(blocks.end * block).min($end) {
            if $position < whole_begin || $position >= whole_end {
                let $none = $crate::ptx::optimizer::renew(0);
                $body
            }
        }
    };
}
pub(crate) use for_hidden;

/// Adds what was zeroed in the masked blocks of `block` rows of `source` to the rows of `sum` that see it: `sees` of a row of the
/// sum and a position of the source.
///
/// A weight is at least 0, so NaN and infinity reach a sum as they are. A weight that underflowed to 0 would turn infinity into NaN, and
/// here does not.
///
/// # Safety
/// `source` is readable.
#[inline(always)]
pub unsafe fn restore<E: Element, A: Accumulator>(
    sum: &mut A,
    source: &GlobalTile<impl Places>,
    blocks: Blocks,
    block: u32,
    sees: impl Fn(u32, u32) -> bool,
) {
    for_hidden!(blocks, block, source.rows(), |position, none| {
        // SAFETY: the caller's contract.
        sum.map_coordinates(|row, column, x| unsafe {
            restored::<E>(x, source, position, column + none, sees(row, position))
        });
    });
}

/// Returns `x`, an element of a sum, plus the element of `source` that was zeroed at (position, column), if any, where the row of the
/// sum `sees` the position.
///
/// # Safety
/// `source` is readable.
#[inline(always)]
pub unsafe fn restored<E: Element>(
    x: f32,
    source: &GlobalTile<impl Places>,
    position: u32,
    column: u32,
    sees: bool,
) -> f32 {
    if !sees || !source.contains(position, column * E::BYTES / 16) {
        return x;
    }
    // SAFETY: the element exists.
    let y = unsafe { E::load(source.element_address(position, column)) };
    if y.abs() < f32::INFINITY { x } else { x + y }
}
