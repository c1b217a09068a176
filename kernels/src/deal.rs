//! How the tiles of all heads fall to blocks that stay for the whole launch, and in what order the tiles of a head come.
//!
//! Full attention deals tile by tile, head by head, so that blocks which work side by side stream the same rows through the L2
//! cache. Under a causal mask a head's last tile and its first are one share of work, then the last but one and the second, so
//! that all shares are equal. Shares that are left over for the last round are halved if every half finds a block.
//!
//! Blocks that add to the same sums can do so in a fixed order, [`Deal::place`], without ever waiting for work that has
//! not begun: a head's tiles come in the order of rounds, in a round the first tiles of shares before the second ones. Each
//! block follows the one before it by a step or so. So that it need not fall further back with every head, the order
//! in a round begins at a block whose number is a multiple of a head's shares, wherever the head begins.

use crate::abi::WorkList;
#[cfg(target_arch = "nvptx64")]
use crate::ptx::optimizer::renew;
use core::num::NonZeroU32;

/// On a GPU, where registers are few, a number that is not to be kept but worked out anew.
#[cfg(not(target_arch = "nvptx64"))]
fn renew(value: u32) -> u32 {
    value
}

/// One tile, as it falls to a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Deal {
    /// Head, all batch entries counted.
    pub head: u32,
    /// Tile of the head.
    pub tile: u32,
    /// Tiles of the head from 0 up that come before this one: `0 .. low`.
    low: u32,
    /// Tiles of the head from the last one down that come before this one: those above `high`.
    high: u32,
}

impl WorkList {
    /// What falls to block number `block`, in its order.
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
                // Shares that were dealt in earlier rounds, and those that are left.
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

    /// Shares of a head: pairs of tiles, a middle one counted as a pair, or tiles.
    #[inline(always)]
    fn shares_per_head<const CAUSAL: bool>(&self) -> NonZeroU32 {
        let tiles = NonZeroU32::MIN.saturating_add(renew(self.tiles_per_head.get()) - 1);
        if CAUSAL {
            NonZeroU32::MIN.saturating_add((tiles.get() - 1) / 2)
        } else {
            tiles
        }
    }

    /// The first or the second tile of share `index` of a round of `blocks`, which `before` shares came before.
    #[inline(always)]
    fn tile_of_share<const CAUSAL: bool>(&self, before: u32, index: u32, blocks: u32, second: bool) -> Deal {
        let shares = self.shares_per_head::<CAUSAL>();
        let head = (before + index) / shares;
        let first = head * shares.get();
        let (begin, end) = (before.saturating_sub(first), shares.get().min(before + blocks - first));
        // Where in the round the head begins, and how far from there the order does.
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
            // After all seconds before it, and all firsts so far.
            (share, share, (tiles - 1).saturating_sub(end))
        } else {
            // After the seconds of earlier rounds, and the firsts nearer to the last.
            let tile = tiles - 1 - share;
            (tile, begin, tile)
        };
        Deal { head, tile, low, high }
    }
}

impl Deal {
    /// Number of tiles of the head's keys that add to the dQ of a query before this one does, if `first` and `last` are the
    /// first and the last that the query sees: of the tiles below `low` and above `high`, those from `first` to `last`.
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

    /// Runs `check` over lists of every kind.
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

    /// Keys stand against as many tiles of queries: tile `q` sees tiles of keys up to `q`, or all, or of those the ones at most
    /// `window` away. A block goes through a tile's queries from the first that sees it, adding where it has its turn; whoever
    /// can go on does.
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
