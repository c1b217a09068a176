//! NaN and infinity among keys, values and gradients that a mask hides from some queries of a tile.
//!
//! A hidden pair weighs 0, and 0 times NaN is NaN in a product. So a tile that needs the mask is searched for such elements,
//! by the threads that multiply it; where there are any, which is rare, they are zeroed in shared memory before the product, and at
//! the end added to those rows of the sum that do see them. Tiles without hidden pairs are not searched, and
//! multiply as they are.

use crate::mask::Blocks;
use crate::ptx::optimizer;
use crate::tile::element::Element;
use crate::tile::{
    global::{GlobalTile, Places},
    register::Accumulator,
};

/// Adds what was zeroed in the masked blocks of `block` rows of `source` to the rows of `sum` that see it: `sees` of a row of the
/// sum and a position of the source.
///
/// A weight is at least 0, so NaN and infinity reach a sum as they are; one that is 0 for want of range would make NaN of infinity, and here
/// does not.
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
    let (whole_begin, whole_end) = (blocks.whole_begin * block, blocks.whole_end * block);
    for position in blocks.begin * block..(blocks.end * block).min(source.rows()) {
        if position < whole_begin || position >= whole_end {
            // Recomputed for each position: kept, columns would occupy registers during the whole loop.
            let none = optimizer::renew(0);
            sum.map_coordinates(|row, column, x| {
                let column = column + none;
                if sees(row, position) && source.contains(position, column * E::BYTES / 16) {
                    // SAFETY: the element exists.
                    let y = unsafe { E::load(source.element_address(position, column)) };
                    if y.abs() < f32::INFINITY { x } else { x + y }
                } else {
                    x
                }
            });
        }
    }
}
