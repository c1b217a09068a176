//! Forward passes on a GPU: over a rectangle, or over sequences placed anywhere in the tensors.

use flash_attention_kernels::entries::{self, Arch, Entry, Pass};

use super::choose::{choose, fits_device};
use super::launch::{KeySplits, LEAST_KEYS, OfSequences};
use super::rows::RowCopies;
use super::{Cost, Launch, Tiles, tile_map};
use crate::error::Error;
use crate::problem::Problem;
use crate::sequences::Placed;
use crate::target::DeviceInfo;

/// Fewest keys of a rectangle whose few queries are planned as sequences: two splits.
const MANY_KEYS: u32 = 2 * LEAST_KEYS;

/// Parts of a plan of a forward pass on a GPU.
pub(super) struct Choice {
    pub tiles: Tiles,
    pub launches: Vec<Launch>,
    pub workspace_bytes: u64,
    /// The splits of keys, if there are any.
    pub splits: Option<KeySplits>,
    pub cost: Cost,
}

impl Choice {
    /// Collects the launches of `entry` over a rectangle.
    pub fn of_rectangle(problem: &Problem, entry: &Entry, launches: Vec<Launch>) -> Self {
        let tiles = Tiles::of_launches(entry, &launches);
        Self {
            tiles,
            cost: Cost::forward(problem, tiles, &launches, statistics_written(problem)),
            launches,
            workspace_bytes: 0,
            splits: None,
        }
    }

    /// Returns this choice with what writes lse, row_max and row_sum of the caller's that are not contiguous.
    pub fn with_row_copies(mut self, problem: &Problem) -> Result<Self, Error> {
        let copied = RowCopies::after_forward(problem, &mut self.launches, &mut self.workspace_bytes)?;
        self.cost = self.cost.with_copies(copied);
        Ok(self)
    }
}

/// Plans the forward pass over a rectangular batch.
pub(super) fn of_rectangle(problem: &Problem, device: &DeviceInfo, multiprocessors: u32) -> Result<Choice, Error> {
    // Hopper's kernel takes the largest product for the largest score, which is true of a positive scale. A program has the scale itself.
    let hopper = problem.has_pairs()
        && (problem.softmax_scale() > 0.0 || problem.program().is_some())
        && tile_map::fit(
            problem,
            problem.input_type(),
            &[problem.q(), problem.out()],
            &[problem.k(), problem.v()],
        );
    let entry = choose(problem, Pass::Forward, device, hopper)?;
    if entry.is_latent() && problem.program().is_none() {
        // The kernel of latent attention takes lists alone, since it packs the rows of many heads.
        return of_sequences(problem, &rectangle(problem), entry, multiprocessors);
    }
    if !problem.has_queries() {
        return Ok(Choice::of_rectangle(problem, entry, Vec::new()));
    }
    let hopper = match entry.arch {
        Arch::Sm90a => Some(Launch::hopper_forward(problem, entry, multiprocessors)?),
        Arch::Sm80 => None,
    };
    if let Some(choice) = of_few_queries(problem, hopper.as_ref(), device, multiprocessors)? {
        return Ok(choice);
    }
    let launch = match hopper {
        Some(launch) => sparse_launch(problem, device)?.unwrap_or(launch),
        None => Launch::forward(problem, entry)?,
    };
    Ok(Choice::of_rectangle(problem, launch.entry, vec![launch]))
}

/// Plans the forward pass over a batch of placed sequences by a kernel that takes lists of work.
pub(super) fn of_sequences(
    problem: &Problem,
    placed: &Placed,
    entry: &'static Entry,
    multiprocessors: u32,
) -> Result<Choice, Error> {
    let of_sequences = match problem.has_queries() {
        true => OfSequences::new(problem, placed, entry, multiprocessors)?,
        false => OfSequences::default(),
    };
    Ok(Choice {
        cost: Cost::of_sequences(problem, &of_sequences, statistics_written(problem)),
        tiles: Tiles::of_launches(entry, &of_sequences.launches),
        launches: of_sequences.launches,
        workspace_bytes: of_sequences.workspace_bytes,
        splits: of_sequences.splits,
    })
}

/// Plans a rectangle of few queries and many keys, as a step of decoding has them, as sequences, if their kernel then splits keys over
/// blocks or packs heads: such queries fill so few tiles that blocks without splits would leave most of the card idle.
///
/// Queries are few if those of a head fit in one tile. The partial results of whole tiles would be as many bytes as the keys of a short
/// split. `hopper` is the launch of Hopper's own kernel, if it suits. It packs heads, and its products take half of the time, so splits
/// pay where it leaves more than half of the multiprocessors idle. A batch-invariant call may not depend on that.
fn of_few_queries(
    problem: &Problem,
    hopper: Option<&Launch>,
    device: &DeviceInfo,
    multiprocessors: u32,
) -> Result<Option<Choice>, Error> {
    let is_forced = problem.arch() == Some(Arch::Sm90a);
    let fills_card = hopper.is_some_and(|launch| 2 * launch.grid[0] >= multiprocessors && !problem.batch_invariant());
    if is_forced || fills_card || problem.seqlen_k() < MANY_KEYS {
        return Ok(None);
    }
    let listed = entries::find_program(Pass::Forward, Arch::Sm80, problem.dtype(), problem.widest_head_dim());
    // A card with little shared memory has the other kernels.
    let fits =
        |entry: &&'static Entry| problem.seqlen_q() <= entry.block_m && fits_device(problem, entry, device).is_ok();
    let Some(entry) = listed.filter(fits) else {
        return Ok(None);
    };
    let choice = of_sequences(problem, &rectangle(problem), entry, multiprocessors)?;
    let pays = choice.splits.is_some() || hopper.is_none() && choice.tiles.packed_heads > 1;
    Ok(Some(choice).filter(|_| pays))
}

/// The batch entries of a rectangle as sequences.
fn rectangle(problem: &Problem) -> Placed {
    Placed::of_rectangle(problem.batch(), problem.seqlen_q(), problem.seqlen_k())
}

/// Number of f32 that a forward pass writes for each query: lse, and row_max and row_sum if they are kept.
pub(super) fn statistics_written(problem: &Problem) -> u32 {
    1 + 2 * u32::from(problem.keeps_statistics())
}

/// Returns the launch of the portable kernel for a score program, in place of Hopper's own, if its mask leaves few tiles and no kernel is
/// forced.
///
/// Hopper's kernel follows no lists and visits every tile. Its `wgmma` has twice the rate of `mma.sync` there, and its softmax overlaps
/// with products, so the portable kernel is the faster one once it visits less than a third of the tiles.
fn sparse_launch(problem: &Problem, device: &DeviceInfo) -> Result<Option<Launch>, Error> {
    if problem.program().is_none() || problem.arch().is_some() || !problem.has_pairs() {
        return Ok(None);
    }
    let launch = Launch::forward(problem, choose(problem, Pass::Forward, device, false)?)?;
    let tiles = problem.seqlen_q().div_ceil(launch.entry.block_m) as usize * problem.heads_q() * problem.batch();
    let all = tiles as u128 * u128::from(problem.seqlen_k());
    Ok(Some(launch).filter(|launch| launch.streamed_rows().is_some_and(|rows| 3 * rows < all)))
}
