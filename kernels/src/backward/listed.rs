//! Backward over listed work, and with the markers of a score program.
//!
//! A block takes its rows and the runs of its tiles from a list of [`work`](crate::work), so that ragged batches and block-sparse masks
//! are nothing that the loops know of. A run without a mask is proven to show every pair: its body has no code of the mask.

use core::ops::Range;

use super::{Owned, Tile, add, clean_queries, cleaned, load_owned, ring_base, shifts, store_gradient, weighed};
use crate::abi::{Exponents, Layout, ListedBackwardParams, StridedTensor};
use crate::lists::Work;
use crate::mask::{Blocks, Span};
use crate::nonfinite;
use crate::pipeline::{PairRing, StreamedRows};
use crate::ptx::{memory, optimizer, program, sreg};
use crate::scores::OfRows;
use crate::shape::TileShape;
use crate::tile::global::GlobalTile;
use crate::tile::register::Accumulator;
use crate::work::{SequenceRows, TileRun};

/// Runs `$body` for each tile of the runs of `$block` in order, with its number `$n` in the sequence of `$rows` rows, its stage, and the
/// constant `$masked`. The body is compiled once for masked runs and once for the others. The pipeline keeps no place in the list: the
/// loop tells it the next tile, which takes fewer registers.
macro_rules! for_runs {
    ($block:ident, $rows:ident, $ring:ident, |$n:ident, $stage:ident, $masked:ident| $body:expr) => {{
        let (mut index, runs) = (0, $block.work.runs.listed());
        for number in runs.start..runs.end {
            let TileRun { begin, masked, .. } = $block.run(number);
            macro_rules! tiles {
                ($is_masked:literal) => {{
                    const $masked: bool = $is_masked;
                    let mut $n = begin;
                    loop {
                        // Read again: kept, the end would occupy a register during the whole loop.
                        let is_last = $n + 1 == $block.run(number).end;
                        let next = if is_last {
                            $block.first_tile::<S>(number + 1..runs.end, $rows)
                        } else {
                            $n + 1
                        };
                        let $stage = $ring.acquire_listed(index, next * S::COLUMNS);
                        $body;
                        index += 1;
                        if is_last {
                            break;
                        }
                        $n += 1;
                    }
                }};
            }
            if masked != 0 {
                tiles!(true);
            } else {
                tiles!(false);
            }
        }
        $ring.drain();
    }};
}

/// Computes dQ of `ROWS` queries of one head from the keys of their runs.
///
/// # Safety
/// Launched as its row of `entries` says, with parameters and lists that `Problem` and `Plan` made, after
/// [`delta`](crate::delta::delta).
#[inline(always)]
pub unsafe fn listed_dq<S: TileShape>(p: &ListedBackwardParams) {
    // SAFETY (whole body): owned tiles and stages are disjoint parts of this block's dynamic shared memory, every
    // thread takes every step that holds a barrier, and windows clip what does not exist.
    unsafe {
        weigh_few::<S>(p);
        let block = Listed::of_this_thread_block(p, 0);
        let (head, first_row) = (block.work.head, block.work.first_row);
        let (owned, [k, v]) = load_queries::<S>(p, &block);
        let seqlen_k = block.work.sequence.seqlen_k;
        let first_row = first_row + sreg::warp_id() * S::WARP_ROWS;
        let first_key = block.first_tile::<S>(block.work.runs.listed(), seqlen_k) * S::COLUMNS;
        let span = |_| Span {
            begin: 0,
            end: seqlen_k,
        };
        let mut ring = PairRing::<S>::start_at(ring_base::<S>(), first_key, k, v, None);
        let rows = block.work.sequence.seqlen_q.saturating_sub(first_row);
        let statistics = block.statistic(head, first_row);
        let (queries, is_far) = OfRows::load::<S::Scores>(&p.backward.exponents, statistics, rows, shifts::<S>());

        block.begin_head(head);
        let (mut dq, mut none) = (S::Output::zero(), S::Output::zero());
        for_runs!(block, seqlen_k, ring, |n, stage, MASKED| {
            let hides = MASKED && program::hides();
            let tile = Tile::of_keys(first_row, n * S::COLUMNS, span, is_far, hides);
            add::<S, program::OfQueries<MASKED>, MASKED, true, true, false>(
                &p.backward,
                owned,
                stage,
                queries,
                tile,
                &mut dq,
                &mut none,
            )
        });

        // Read again here: kept, it would occupy registers during the whole loop.
        let block = Listed::of_this_thread_block(p, 0);
        let first_row = block.work.first_row + sreg::renewed_warp_id() * S::WARP_ROWS;
        let target = block.queries::<S>(&p.backward.dq, &p.backward.layout, block.work.head);
        store_gradient::<S>(dq, p.backward.softmax_scale, owned.first, target.rows_from(first_row));
    }
}

/// Starts to load the block's queries and their gradients of the output, and returns them with the windows of keys and values.
///
/// # Safety
/// The contract of [`listed_dq`].
#[inline(always)]
unsafe fn load_queries<S: TileShape>(p: &ListedBackwardParams, block: &Listed) -> (Owned, [GlobalTile; 2]) {
    let (head, kv_head) = (block.work.head, block.work.head / p.backward.heads_q_per_kv);
    let (layout, of_values) = (&p.backward.layout, &p.values);
    let rows_of = |tensor, layout| block.queries::<S>(tensor, layout, head).rows_from(block.work.first_row);
    // SAFETY: the caller's contract.
    let owned = unsafe { load_owned::<S>(rows_of(&p.backward.q, layout), rows_of(&p.backward.dout, of_values)) };
    let keys_of = |tensor, layout| block.keys::<S>(tensor, layout, kv_head);
    (
        owned,
        [keys_of(&p.backward.k, layout), keys_of(&p.backward.v, of_values)],
    )
}

/// Writes delta of the block's queries that few keys share, from the keys of their runs.
///
/// # Safety
/// The contract of [`listed_dq`].
#[inline(always)]
unsafe fn weigh_few<S: TileShape>(p: &ListedBackwardParams) {
    if !weighed::applies::<S>(&p.backward) {
        return;
    }
    // SAFETY (whole body): as in `listed_dq`.
    unsafe {
        let block = Listed::of_this_thread_block(p, 0);
        let (head, first_row) = (block.work.head, block.work.first_row);
        let SequenceRows { seqlen_q, seqlen_k, .. } = block.work.sequence;
        let first_warp_row = first_row + sreg::renewed_warp_id() * S::WARP_ROWS;
        let rows = seqlen_q.saturating_sub(first_warp_row);
        let queries = weighed::Queries::<S>::load(&p.backward, block.statistic(head, first_warp_row), rows);
        if !queries.any_of_few(&p.backward) {
            return;
        }
        let (owned, [k, v]) = load_queries::<S>(p, &block);
        let first_key = block.first_tile::<S>(block.work.runs.listed(), seqlen_k) * S::COLUMNS;
        let mut ring = PairRing::<S>::start_at(ring_base::<S>(), first_key, k, v, None);
        block.begin_head(head);
        let span = |_| Span {
            begin: 0,
            end: seqlen_k,
        };
        let mut sums = weighed::Sums::<S>::zero();
        for_runs!(block, seqlen_k, ring, |n, stage, MASKED| {
            let hides = MASKED && program::hides();
            let tile = Tile::of_keys(first_warp_row, n * S::COLUMNS, span, queries.is_far, hides);
            sums.add::<program::OfQueries<MASKED>, MASKED, true>(&p.backward, owned, stage, &queries, tile)
        });
        queries.store(&p.backward, sums);
    }
}

/// Computes dK and dV of `ROWS` keys of one key/value head from the queries of their runs.
///
/// # Safety
/// The contract of [`listed_dq`].
#[inline(always)]
pub unsafe fn listed_dkv<S: TileShape>(p: &ListedBackwardParams) {
    // SAFETY (whole body): as in `listed_dq`.
    unsafe {
        let block = Listed::of_this_thread_block(p, 0);
        let (layout, of_values) = (&p.backward.layout, &p.values);
        let rows_of = |tensor, layout| {
            block
                .keys::<S>(tensor, layout, block.work.head)
                .rows_from(block.work.first_row)
        };
        let owned = load_owned::<S>(rows_of(&p.backward.k, layout), rows_of(&p.backward.v, of_values));
        // Read again here: kept, it would occupy registers during the whole loop.
        let target = |tensor, layout| {
            let block = Listed::of_this_thread_block(p, 0);
            let first_row = block.work.first_row + sreg::renewed_warp_id() * S::WARP_ROWS;
            block.keys::<S>(tensor, layout, block.work.head).rows_from(first_row)
        };

        let (mut dk, mut dv) = (S::Output::zero(), S::Output::zero());
        if sreg::thread_idx_x() == 0 {
            memory::st_shared_word(cleaned::<S>(), 0);
        }
        if S::TWO_WALKS {
            walk_queries::<S, true, false>(p, owned, &mut dk, &mut dv);
            // V is not needed any more: dV asks for Q, K and dO only.
            store_gradient::<S>(
                dk,
                p.backward.softmax_scale,
                owned.second,
                target(&p.backward.dk, layout),
            );
            walk_queries::<S, false, true>(p, owned, &mut dk, &mut dv);
        } else {
            walk_queries::<S, true, true>(p, owned, &mut dk, &mut dv);
            store_gradient::<S>(
                dk,
                p.backward.softmax_scale,
                owned.second,
                target(&p.backward.dk, layout),
            );
        }
        if program::hides() && memory::ld_shared_u32(cleaned::<S>()) != 0 {
            restore_values::<S>(p, &mut dv);
        }
        store_gradient::<S>(dv, 1.0, owned.first, target(&p.backward.dv, of_values));
    }
}

/// Streams the queries of the block's runs, head by head of those that share the keys.
#[inline(always)]
unsafe fn walk_queries<S: TileShape, const DK: bool, const DV: bool>(
    p: &ListedBackwardParams,
    owned: Owned,
    dk: &mut S::Output,
    dv: &mut S::Output,
) {
    for shared in 0..p.backward.heads_q_per_kv.get() {
        // SAFETY (whole body): the reasons given in `listed_dq`.
        unsafe {
            let block = Listed::of_this_thread_block(p, shared);
            let first_row = block.work.first_row + sreg::warp_id() * S::WARP_ROWS;
            let head = block.work.head * p.backward.heads_q_per_kv.get() + shared;
            let seqlen_q = block.work.sequence.seqlen_q;
            block.begin_head(head);
            let Exponents {
                lse_log2, delta, shift, ..
            } = p.backward.exponents;
            let SequenceRows { q_entry, q_begin, .. } = block.work.sequence;
            let statistics = StreamedRows {
                lines: [lse_log2, delta, shift],
                rows: seqlen_q,
                head: q_entry * p.backward.heads_q.get() + head,
                rows_of_head: p.backward.seqlen_q,
                begin: q_begin,
            };
            let (q, dout) = (
                block.queries::<S>(&p.backward.q, &p.backward.layout, head),
                block.queries::<S>(&p.backward.dout, &p.values, head),
            );
            let first_tile = block.first_tile::<S>(block.work.runs.listed(), seqlen_q);
            let mut ring =
                PairRing::<S>::start_at(ring_base::<S>(), first_tile * S::COLUMNS, q, dout, Some(statistics));
            let span = |_| Span {
                begin: 0,
                end: seqlen_q,
            };
            for_runs!(block, seqlen_q, ring, |m, stage, MASKED| {
                let tile = Tile {
                    first_row,
                    first_column: m * S::COLUMNS,
                    span,
                    is_far: S::ELEMENT_BYTES == 2 && stage.queries.any_far(S::COLUMNS),
                    hides: MASKED && program::hides(),
                    is_of_keys: false,
                };
                if tile.hides {
                    clean_queries::<S>(&stage);
                }
                add::<S, program::OfKeys<MASKED>, MASKED, true, DK, DV>(
                    &p.backward,
                    owned,
                    stage,
                    stage.queries,
                    tile,
                    dk,
                    dv,
                )
            });
        }
    }
}

/// Adds to dV what was zeroed in tiles of dO.
#[inline(always)]
unsafe fn restore_values<S: TileShape>(p: &ListedBackwardParams, dv: &mut S::Output) {
    for shared in 0..p.backward.heads_q_per_kv.get() {
        // SAFETY (whole body): the windows clip what does not exist.
        unsafe {
            let block = Listed::of_this_thread_block(p, shared);
            let first_row = block.work.first_row + sreg::renewed_warp_id() * S::WARP_ROWS;
            let head = block.work.head * p.backward.heads_q_per_kv.get() + shared;
            let douts = block.queries::<S>(&p.backward.dout, &p.values, head);
            block.begin_head(head);
            let sees = |row, query| program::visible(query, first_row + row, head);
            for number in block.work.runs.listed() {
                let run = block.run(number);
                if run.masked != 0 {
                    let blocks = Blocks::masked(run.begin..run.end);
                    nonfinite::restore::<S::Element, _>(dv, &douts, blocks, S::COLUMNS, sees);
                }
            }
        }
    }
}

/// A block's work, with one of its lists, and the tensors that it is of.
struct Listed<'a> {
    work: Work,
    p: &'a ListedBackwardParams,
}

impl<'a> Listed<'a> {
    /// Reads the work of this thread block, with the runs of the `shared`-th of the heads that share its keys.
    ///
    /// # Safety
    /// The contract of [`listed_dq`].
    #[inline(always)]
    unsafe fn of_this_thread_block(p: &'a ListedBackwardParams, shared: u32) -> Self {
        let block = optimizer::renew(sreg::block_idx_x());
        let number = if p.lists_of_block > 1 {
            block * p.lists_of_block + shared
        } else {
            block
        };
        // SAFETY: the caller's contract.
        let work = unsafe { Work::listed(&p.work, number) };
        Self { work, p }
    }

    /// Reads a run.
    ///
    /// # Safety
    /// The contract of [`listed_dq`]; the run is one of the block's.
    #[inline(always)]
    unsafe fn run(&self, number: u32) -> TileRun {
        // SAFETY: the caller's contract.
        unsafe { memory::ld_global_struct(self.p.work.runs, number) }
    }

    /// Returns the first tile of some runs, or the end of a sequence of `rows` rows if there are none.
    ///
    /// # Safety
    /// The contract of [`run`](Self::run).
    #[inline(always)]
    unsafe fn first_tile<S: TileShape>(&self, runs: Range<u32>, rows: u32) -> u32 {
        if runs.start < runs.end {
            // SAFETY: the caller's contract.
            unsafe { self.run(runs.start).begin }
        } else {
            rows.div_ceil(S::COLUMNS)
        }
    }

    /// Begins a query head for the score program.
    #[inline(always)]
    fn begin_head(&self, head: u32) {
        let SequenceRows { seqlen_q, seqlen_k, .. } = self.work.sequence;
        program::head(head, self.work.number, seqlen_q, seqlen_k);
    }

    /// Returns the queries of the sequence in a head of a tensor.
    #[inline(always)]
    fn queries<S: TileShape>(&self, tensor: &StridedTensor, layout: &Layout, head: u32) -> GlobalTile {
        let SequenceRows {
            q_entry,
            q_begin,
            seqlen_q,
            ..
        } = self.work.sequence;
        GlobalTile::new(tensor, q_entry, head, q_begin + seqlen_q, layout, S::ELEMENT_BYTES).rows_from(q_begin)
    }

    /// Returns the keys of the sequence in a key/value head of a tensor.
    #[inline(always)]
    fn keys<S: TileShape>(&self, tensor: &StridedTensor, layout: &Layout, head: u32) -> GlobalTile {
        let SequenceRows {
            k_entry,
            k_begin,
            seqlen_k,
            ..
        } = self.work.sequence;
        GlobalTile::new(tensor, k_entry, head, k_begin + seqlen_k, layout, S::ELEMENT_BYTES).rows_from(k_begin)
    }

    /// Returns the index of a query's statistics.
    #[inline(always)]
    fn statistic(&self, head: u32, row: u32) -> u64 {
        let SequenceRows { q_entry, q_begin, .. } = self.work.sequence;
        let head = q_entry as u64 * self.p.backward.heads_q.get() as u64 + head as u64;
        head * self.p.backward.seqlen_q as u64 + (q_begin + row) as u64
    }
}
