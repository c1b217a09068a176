//! Persistent tile scheduler: the distribution of all heads' tiles over blocks that stay for the whole launch, and
//! the order of a head's tiles.
//!
//! Full attention distributes single tiles, head by head, so that blocks that run at the same time stream the same
//! rows through L2. Under a causal mask one share of work is the last tile of a head and its first, the next share
//! the last but one and the second, and so on, so that all shares are equal. If every half of the shares left for the
//! last round finds a block, these shares are split in half.
//!
//! Blocks that add to the same dQ can do so in a fixed order, [`Deal::place`], without ever waiting for work that has
//! not started: a head's tiles come in the order of rounds, and in a round the first tiles of shares come before the
//! second ones. Each block follows the one before it by about a step. To keep that lag from growing with every head,
//! the order in a round starts at a block whose number is a multiple of a head's shares, wherever the head starts.

use crate::abi::WorkList;
#[cfg(target_arch = "nvptx64")]
use crate::ptx::optimizer::renew;
use core::num::NonZeroU32;

/// Returns `value`. On a GPU, where registers are few, the compiler recomputes what depends on it instead of keeping
/// it.
#[cfg(not(target_arch = "nvptx64"))]
fn renew(value: u32) -> u32 {
    value
}

/// A tile of work, with its place in the order of its head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deal {
    /// Index of the head, counted over all batch entries.
    pub head: u32,
    /// Index of the tile in its head.
    pub tile: u32,
    /// Tiles `0 .. low` of the head come before this one in the order of additions to dQ.
    low: u32,
    /// Tiles above `high` of the head come before this one in that order.
    high: u32,
}

impl WorkList {
    /// Iterates over the tiles of block number `block`, in order.
    #[inline(always)]
    pub fn deal<const CAUSAL: bool>(&self, block: u32) -> impl Iterator<Item = Deal> {
        let mut turn = 0;
        core::iter::from_fn(move || {
            loop {
                let blocks = renew(self.blocks);
                let (round, second) = if CAUSAL {
                    (turn / 2, turn % 2 == 1)
                } else {
                    (turn, false)
                };
                turn += 1;
                // Shares of earlier rounds, and shares that are left.
                let before = round * blocks;
                let left = (self.heads * self.shares_per_head::<CAUSAL>().get()).saturating_sub(before);
                let halved = CAUSAL && 2 * left <= blocks;
                let index = if halved { block / 2 } else { block };
                if index >= left || halved && second {
                    return None;
                }
                let second = if halved { block % 2 == 1 } else { second };
                let deal = self.tile_of_share::<CAUSAL>(before, index, blocks, second);
                // The middle tile of a head is a share of its own.
                if !second || 2 * deal.tile + 1 != self.tiles_per_head.get() {
                    return Some(deal);
                }
            }
        })
    }

    /// Returns the number of shares of a head: pairs of tiles (a middle one counts as a pair), or tiles.
    #[inline(always)]
    fn shares_per_head<const CAUSAL: bool>(&self) -> NonZeroU32 {
        let tiles = NonZeroU32::MIN.saturating_add(renew(self.tiles_per_head.get()) - 1);
        if CAUSAL {
            NonZeroU32::MIN.saturating_add((tiles.get() - 1) / 2)
        } else {
            tiles
        }
    }

    /// Returns the first or the second tile of share `index` of a round of `blocks` shares, after `before` earlier
    /// shares.
    #[inline(always)]
    fn tile_of_share<const CAUSAL: bool>(&self, before: u32, index: u32, blocks: u32, second: bool) -> Deal {
        let shares = self.shares_per_head::<CAUSAL>();
        let head = (before + index) / shares;
        let first = head * shares.get();
        let (begin, end) = (before.saturating_sub(first), shares.get().min(before + blocks - first));
        // Index of the head's first share in this round, and the share at which the rotated order starts.
        let start = first + begin - before;
        let ahead = start.next_multiple_of(shares.get()) - start;
        let (index, count) = (index - start, end - begin);
        let share = begin
            + if ahead >= count {
                index
            } else if index >= ahead {
                index - ahead
            } else {
                index + count - ahead
            };
        let tiles = self.tiles_per_head.get();
        let (tile, low, high) = if !CAUSAL {
            (share, share, tiles)
        } else if second {
            // After all second tiles before it, and all first tiles so far.
            (share, share, (tiles - 1).saturating_sub(end))
        } else {
            // After the second tiles of earlier rounds, and the first tiles nearer to the last.
            let tile = tiles - 1 - share;
            (tile, begin, tile)
        };
        Deal { head, tile, low, high }
    }
}

impl Deal {
    /// Returns the number of key tiles of the head that add to the dQ of a query before this one, if the query sees
    /// the key tiles `first ..= last`: of these, the tiles below `low` and above `high`.
    #[inline(always)]
    pub fn place(&self, first: u32, last: u32) -> u32 {
        self.low.max(first) - first + last.max(self.high) - self.high
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use std::collections::HashMap;
    use std::vec::Vec;

    const TILES: [u32; 9] = [1, 2, 3, 4, 7, 16, 33, 132, 300];

    fn deals<const CAUSAL: bool>(tiles: u32, heads: u32, blocks: u32) -> Vec<Vec<Deal>> {
        let list = WorkList {
            tiles_per_head: NonZeroU32::new(tiles).unwrap(),
            heads,
            blocks,
        };
        (0..blocks).map(|block| list.deal::<CAUSAL>(block).collect()).collect()
    }

    /// Runs `check` for lists of every kind.
    fn for_lists(check: impl Fn(u32, u32, u32)) {
        for tiles in TILES {
            for heads in [1, 2, 3, 5, 40] {
                for blocks in [1, 2, 3, 8, 13, 132] {
                    check(tiles, heads, blocks.min(tiles * heads));
                }
            }
        }
    }

    #[test]
    fn every_tile_is_dealt_once() {
        fn check<const CAUSAL: bool>(tiles: u32, heads: u32, blocks: u32) {
            let mut seen = HashMap::new();
            for deal in deals::<CAUSAL>(tiles, heads, blocks).concat() {
                assert!(deal.head < heads && deal.tile < tiles);
                *seen.entry((deal.head, deal.tile)).or_insert(0) += 1;
            }
            assert_eq!(seen.len() as u32, tiles * heads);
            assert!(seen.values().all(|&times| times == 1));
        }
        for_lists(check::<false>);
        for_lists(check::<true>);
    }

    /// Tests that no block waits for ever. There are as many tiles of keys as of queries. Tile `q` of queries sees
    /// the tiles of keys up to `q`, or all, or those at most `window` away. A block handles the queries of a tile in
    /// order and adds to each in its turn. In each step any block that can continue does.
    #[test]
    fn blocks_that_take_their_places_never_wait_for_ever() {
        fn check<const CAUSAL: bool>(tiles: u32, heads: u32, blocks: u32, window: u32) {
            let limit = |q: u32| if CAUSAL { q } else { tiles - 1 };
            let seen = |q: u32| (q.saturating_sub(window), limit(q).min(q.saturating_add(window)));
            let work = deals::<CAUSAL>(tiles, heads, blocks);
            let mut sums = HashMap::new();
            let mut at: Vec<(usize, Option<u32>)> = work.iter().map(|_| (0, None)).collect();
            loop {
                let mut moved = false;
                for (deals, (next, query)) in work.iter().zip(&mut at) {
                    while let Some(deal) = deals.get(*next) {
                        let first_query = if CAUSAL { deal.tile } else { 0 };
                        let q = query.unwrap_or(first_query.max(deal.tile.saturating_sub(window)));
                        let (first, last) = seen(q);
                        let place = deal.place(first, last);
                        let sum = sums.entry((deal.head, q)).or_insert(0);
                        if *sum != place {
                            assert!(*sum < place, "two have one place");
                            break;
                        }
                        *sum += 1;
                        moved = true;
                        *query = (q < (tiles - 1).min(deal.tile.saturating_add(window))).then_some(q + 1);
                        *next += usize::from(query.is_none());
                    }
                }
                if !moved {
                    break;
                }
            }
            assert!(work.iter().zip(&at).all(|(deals, (next, _))| *next == deals.len()));
            assert!((0..heads).all(|head| (0..tiles).all(|q| sums[&(head, q)] == seen(q).1 + 1 - seen(q).0)));
        }
        for window in [0, 1, 5, u32::MAX] {
            for_lists(|tiles, heads, blocks| check::<false>(tiles, heads, blocks, window));
            for_lists(|tiles, heads, blocks| check::<true>(tiles, heads, blocks, window));
        }
    }

    #[test]
    fn shares_under_a_causal_mask_are_equal() {
        for blocks in deals::<true>(128, 64, 132).chunks(2) {
            let steps = |deals: &Vec<Deal>| deals.iter().map(|deal| 128 - deal.tile).sum::<u32>();
            assert!(steps(&blocks[0]).abs_diff(steps(&blocks[1])) <= 129);
        }
    }
}
