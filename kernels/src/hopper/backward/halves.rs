//! The step of the five products for a tile without hidden pairs whose queries are all near, which is nearly every
//! tile.
//!
//! Weights, their operand and `P^T dO` come in two parts of the columns. While the exponentials of the second part
//! occupy their pipe, the gradients of scores of the first part are computed, and its product for dV runs.

use super::Consumer;
use crate::ptx::{sreg, wgmma};
use crate::scores::{self, OfColumns};
use crate::shape::HopperBackwardShape;
use crate::tile::register::{Part, ScoreTile};
use crate::tile::warpgroup::{WarpgroupOutput, WarpgroupScores};

impl<S: HopperBackwardShape, const CAUSAL: bool> Consumer<'_, S, CAUSAL> {
    /// Adds the next `tiles` tiles of queries to dK and dV, and computes their dQ. Afterwards no product is pending.
    ///
    /// # Safety
    /// The contract of [`dqkv`](super::dqkv). No product is pending, each tile sees every key of the block, and no query
    /// in them is far.
    #[inline(always)]
    pub(super) unsafe fn add_near_tiles(&mut self, tiles: u32, dk: &mut S::Output, dv: &mut S::Output) {
        if tiles == 0 {
            return;
        }
        // Known at the start of a step, since a predicate takes as long as a product to issue.
        let mut releases = false;
        let mut left = tiles;
        // SAFETY (whole body): the caller's contract.
        unsafe {
            while left != 0 {
                self.add_near_tile(releases, dk, dv);
                releases = sreg::lane_id() == 0;
                left -= 1;
            }
            wgmma::wait::<0>();
            self.release();
            dk.pin();
            dv.pin();
        }
    }

    /// Adds the next tile. This lane `releases` the tile before it.
    #[inline(always)]
    unsafe fn add_near_tile(&mut self, releases: bool, dk: &mut S::Output, dv: &mut S::Output) {
        let slot = self.streamed.slot;
        let OfColumns { lse_log2, delta, .. } = self.shared.queries(slot);
        let [first, second] = Part::split(S::EIGHTHS_FIRST);
        // SAFETY (whole body): the reasons given in `dqkv`; the slot's statistics arrived with its tiles.
        unsafe {
            let (mut p, mut ds) = self.issue_products(|| {
                if releases {
                    self.shared.streamed_slots().release(slot ^ 1);
                }
            });
            let lse = S::Scores::columns_in(first, lse_log2);
            wgmma::wait::<1>();
            p.pin();
            let (mut weights, mut gradients) = (S::Scores::no_operand(), S::Scores::no_operand());

            scores::weights_in(&mut p, first, lse, self.p.scale_log2);
            p.pin_operand_in(first, &mut weights);
            wgmma::fence();
            dv.add_product_in(first, &weights, self.shared.streamed(1, slot));
            wgmma::commit();

            wgmma::wait::<1>();
            ds.pin();
            scores::score_gradients_in(&mut ds, &p, first, S::Scores::columns_in(first, delta));
            ds.pin_operand_in(first, &mut gradients);

            scores::weights_in(
                &mut p,
                second,
                S::Scores::columns_in(second, lse_log2),
                self.p.scale_log2,
            );
            p.pin_operand_in(second, &mut weights);
            wgmma::fence();
            dv.add_product_in(second, &weights, self.shared.streamed(1, slot));
            wgmma::commit();

            scores::score_gradients_in(&mut ds, &p, second, S::Scores::columns_in(second, delta));
            ds.pin_operand_in(second, &mut gradients);
            self.add_queries_and_keys(&gradients, dk);
            if !S::SUMS_RUN_ON {
                wgmma::wait::<0>();
                dk.pin();
            }
            self.streamed.advance();
        }
    }
}
