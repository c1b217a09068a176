//! Persistent tile scheduler: the distribution of all heads' tiles over blocks that stay for the whole launch, and
//! the order of a head's tiles.
//!
//! Full attention distributes single tiles, head by head, so that blocks that run at the same time stream the same
//! rows through L2. Under a causal mask one share of work is the last tile of a head and its first, the next share
//! the last but one and the second, and so on, so that all shares are equal. Each round gives every block a share.
//!
//! The shares that are left for the last three rounds, and for a fourth that not all blocks would have a part in, are
//! distributed by single tiles over all their heads, the longest before the shorter ones, to the blocks in order and
//! back again. So the tiles that not all blocks have one of are the shortest.
//!
//! Blocks that add to the same dQ can do so in a fixed order, [`Deal::place`], without ever waiting for work that has
//! not started: a head's tiles come in the order of rounds, and in a round the first tiles of shares come before the
//! second ones. Each block follows the one before it by about a step. To keep that lag from growing with every head,
//! the order in a round starts at a block whose number is a multiple of a head's shares, wherever the head starts.
//! Single tiles come from the last of a head to the first, which is the longest where blocks own keys: then the first
//! round is the one that not all blocks have a part in.

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

/// Number of rounds of shares under a causal mask that are distributed by single tiles, beside one that not all blocks would have a
/// part in. With 3 the longest block of 16384 tokens has at most 1.4 % more than the mean. With more, more heads are streamed at a time.
const ROUNDS_OF_TILES: u32 = 3;

impl WorkList {
    /// Distributes the tiles of so many heads.
    pub fn new(tiles_per_head: NonZeroU32, heads: u32, blocks: u32) -> Self {
        let mut list = Self {
            tiles_per_head,
            heads,
            blocks,
            rounds: 0,
            head: 0,
            dealt: 0,
            missing: 0,
        };
        let shares_per_head = list.shares_per_head::<true>();
        list.rounds = (heads * shares_per_head.get() / blocks).saturating_sub(ROUNDS_OF_TILES);
        list.head = list.rounds * blocks / shares_per_head;
        list.dealt = list.rounds * blocks % shares_per_head;
        let tiles = list.single_tiles().count();
        list.missing = tiles.next_multiple_of(blocks) - tiles;
        list
    }

    /// Iterates over the tiles of block number `block`, in order. Under a causal mask the last tile of a head is the longest, or the
    /// shortest if blocks own keys.
    #[inline(always)]
    pub fn deal<const CAUSAL: bool, const OWNS_KEYS: bool>(&self, block: u32) -> impl Iterator<Item = Deal> {
        let mut next_turn = 0;
        core::iter::from_fn(move || {
            loop {
                let turn = next_turn;
                next_turn += 1;
                let (blocks, rounds) = (renew(self.blocks), renew(self.rounds));
                let deal = if !CAUSAL {
                    let before = turn * blocks;
                    if before + block >= self.heads * self.shares_per_head::<false>().get() {
                        return None;
                    }
                    Some(self.tile_of_share::<false>(before, block, blocks, false))
                } else if turn < 2 * rounds {
                    let second = turn % 2 == 1;
                    let deal = self.tile_of_share::<true>(turn / 2 * blocks, block, blocks, second);
                    // The middle tile of a head is a share of its own.
                    (!second || 2 * deal.tile + 1 != self.tiles_per_head.get()).then_some(deal)
                } else {
                    let tiles = self.single_tiles();
                    // The round of the shortest tiles is not full: the first, or the last.
                    let missing = if OWNS_KEYS { self.missing } else { 0 };
                    let round = turn - 2 * rounds;
                    if round * blocks >= tiles.count() + missing {
                        return None;
                    }
                    let place = if round % 2 == 0 { block } else { blocks - 1 - block };
                    let index = (round * blocks + place).wrapping_sub(missing);
                    (index < tiles.count()).then(|| tiles.deal(index))
                };
                if deal.is_some() {
                    return deal;
                }
            }
        })
    }

    /// Returns the tiles that are not in the rounds of shares under a causal mask.
    #[inline(always)]
    fn single_tiles(&self) -> Tiles {
        Tiles {
            tiles_per_head: renew(self.tiles_per_head.get()),
            head: renew(self.head),
            dealt: renew(self.dealt),
            others: self.heads - 1 - renew(self.head),
        }
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

/// Tiles under a causal mask that are distributed one by one: all of some heads, and those in the middle of the head before them.
/// They are counted from the last tile of a head to the first, and by heads that have it.
struct Tiles {
    tiles_per_head: u32,
    /// The first head.
    head: u32,
    /// Number of tiles at either end of the first head that are not among these.
    dealt: u32,
    /// Number of heads after the first.
    others: u32,
}

impl Tiles {
    /// Returns the number of tiles that the first head lacks, at one end, of the other heads.
    #[inline(always)]
    fn outer(&self) -> u32 {
        self.dealt * self.others
    }

    /// Returns the number of tiles that all heads have.
    #[inline(always)]
    fn inner(&self) -> u32 {
        (self.tiles_per_head - 2 * self.dealt) * (self.others + 1)
    }

    #[inline(always)]
    fn count(&self) -> u32 {
        2 * self.outer() + self.inner()
    }

    /// Returns tile number `index`.
    #[inline(always)]
    fn deal(&self, index: u32) -> Deal {
        let (outer, inner) = (self.outer(), self.inner());
        let is_inner = index.wrapping_sub(outer) < inner;
        // Index among tiles that as many heads have, and the place in its head of the first of them.
        let (index, first) = if is_inner {
            (index - outer, self.dealt)
        } else if index < outer {
            (index, 0)
        } else {
            (index - outer - inner, self.tiles_per_head - self.dealt)
        };
        let heads = NonZeroU32::MIN.saturating_add(self.others - !is_inner as u32);
        let (row, head) = (index / heads, index % heads + !is_inner as u32);
        let tile = self.tiles_per_head - 1 - first - row;
        Deal {
            head: self.head + head,
            tile,
            low: if head == 0 { self.dealt } else { 0 },
            high: tile,
        }
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
    use crate::entries::{Arch, ENTRIES, Pass};
    use std::collections::HashMap;
    use std::vec::Vec;

    const TILES: [u32; 9] = [1, 2, 3, 4, 7, 16, 33, 132, 300];

    fn deals<const CAUSAL: bool, const OWNS_KEYS: bool>(tiles: u32, heads: u32, blocks: u32) -> Vec<Vec<Deal>> {
        let list = WorkList::new(NonZeroU32::new(tiles).unwrap(), heads, blocks);
        let deals = (0..blocks).map(|block| list.deal::<CAUSAL, OWNS_KEYS>(block).collect());
        deals.collect()
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
        fn check<const CAUSAL: bool, const OWNS_KEYS: bool>(tiles: u32, heads: u32, blocks: u32) {
            let mut seen = HashMap::new();
            for deal in deals::<CAUSAL, OWNS_KEYS>(tiles, heads, blocks).concat() {
                assert!(deal.head < heads && deal.tile < tiles);
                *seen.entry((deal.head, deal.tile)).or_insert(0) += 1;
            }
            assert_eq!(seen.len() as u32, tiles * heads);
            assert!(seen.values().all(|&times| times == 1));
        }
        for_lists(check::<false, false>);
        for_lists(check::<true, false>);
        for_lists(check::<true, true>);
    }

    /// Tests that no block waits for ever. There are as many tiles of keys as of queries. Tile `q` of queries sees
    /// the tiles of keys up to `q`, or all, or those at most `window` away. A block handles the queries of a tile in
    /// order and adds to each in its turn. In each step any block that can continue does.
    #[test]
    fn blocks_that_take_their_places_never_wait_for_ever() {
        fn check<const CAUSAL: bool>(tiles: u32, heads: u32, blocks: u32, window: u32) {
            let limit = |q: u32| if CAUSAL { q } else { tiles - 1 };
            let seen = |q: u32| (q.saturating_sub(window), limit(q).min(q.saturating_add(window)));
            let work = deals::<CAUSAL, true>(tiles, heads, blocks);
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

    /// Deals 16384 tokens with a hidden size of 2048 to an H100, for each kernel that deals. Of full attention all tiles are equal, and no
    /// block has more than the next whole number of them.
    #[test]
    fn no_block_of_a_long_sequence_has_much_more_than_the_mean() {
        const SEQLEN: u32 = 16384;
        for entry in ENTRIES.iter().filter(|entry| entry.arch == Arch::Sm90a) {
            let owns_keys = match entry.pass {
                Pass::Forward => false,
                Pass::BackwardDqkv => true,
                _ => continue,
            };
            let (owned, streamed) = if owns_keys {
                (entry.block_n, entry.block_m)
            } else {
                (entry.block_m * entry.cluster, entry.block_n)
            };
            let tiles = SEQLEN.div_ceil(owned);
            let (heads, blocks) = (2048 / entry.head_dim, 132 / entry.cluster);
            let dealt = match (entry.causal, owns_keys) {
                (false, _) => deals::<false, false>(tiles, heads, blocks),
                (true, false) => deals::<true, false>(tiles, heads, blocks),
                (true, true) => deals::<true, true>(tiles, heads, blocks),
            };
            let seen = |tile: u32| match (entry.causal, owns_keys) {
                (false, _) => SEQLEN,
                (true, false) => SEQLEN.min((tile + 1) * owned),
                (true, true) => SEQLEN - tile * owned,
            };
            let steps = |deals: &Vec<Deal>| deals.iter().map(|deal| seen(deal.tile).div_ceil(streamed)).sum();
            let steps: Vec<u32> = dealt.iter().map(steps).collect();
            let mean = f64::from(steps.iter().sum::<u32>()) / f64::from(blocks);
            let longest = f64::from(*steps.iter().max().unwrap()) / mean;
            let most = if entry.causal {
                1.02
            } else {
                f64::from((tiles * heads).div_ceil(blocks) * blocks) / f64::from(tiles * heads)
            };
            assert!(longest < most + 1e-9, "{}: {longest:.4} of the mean", entry.name);
        }
    }
}
