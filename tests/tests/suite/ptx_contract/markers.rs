//! The markers in kernels for score programs: where each tile of scores passes by.

use flash_attention_kernels::entries::{Arch, Dtype, Pass};
use flash_attention_kernels::program::{Kind, Layout, Marker, Tile};

use super::{KERNELS, Kernel};

/// Markers of a kernel, in the order of its text.
fn markers(entry: &Kernel) -> Vec<Marker<'_>> {
    let read = |line| Marker::read(line).map(|marker| marker.unwrap_or_else(|()| panic!("{}: {line}", entry.name)));
    entry.ptx.lines().filter_map(read).collect()
}

/// Number of walks in which the kernel computes scores: dK and dV may be a walk each, and in f32 a walk for delta may come before that
/// for dQ.
fn walks(entry: &Kernel) -> u32 {
    let weighs = entry.pass == Some(Pass::BackwardDq) && entry.dtype == Dtype::F32;
    if entry.two_walks || weighs { 2 } else { 1 }
}

/// Kinds of markers in a kernel's tile of scores, and how often each is met.
fn kinds(entry: &Kernel, walks: u32) -> Vec<(Kind, u32)> {
    // dK alone takes gradients of scores.
    match entry.pass {
        Some(Pass::Forward) => vec![(Kind::Score, 1), (Kind::Mask, 1), (Kind::Weight, 1)],
        Some(Pass::BackwardDq) => vec![
            (Kind::Score, walks),
            (Kind::Hide, walks),
            (Kind::Weight, walks),
            (Kind::Gradient, 1),
        ],
        _ => vec![
            (Kind::Score, walks),
            (Kind::Hide, walks),
            (Kind::Weight, 2),
            (Kind::Gradient, 1),
        ],
    }
}

/// Each body of a kernel for programs, one for tiles at the edge and one for the rest, has the markers of its tile of scores;
/// plain kernels have none.
#[test]
fn kernels_for_programs_have_their_markers() {
    for entry in KERNELS.iter() {
        let found = markers(entry);
        if !entry.program {
            assert!(found.is_empty(), "{}", entry.name);
            continue;
        }
        if entry.pass == Some(Pass::BackwardPreprocess) {
            assert!(matches!(found[..], [Marker::Row { .. }]), "{}", entry.name);
            continue;
        }
        let transposed = entry.pass == Some(Pass::BackwardDkv);
        let (owned, streamed) = match transposed {
            false => (entry.block_m, entry.block_n),
            true => (entry.block_n, entry.block_m),
        };
        let warps = entry.threads / 32 - if entry.arch == Arch::Sm90a { 4 } else { 0 };
        let (layout, rows) = match entry.dtype {
            Dtype::F32 => (Layout::Lanes, 1),
            // Warps pass scores on through shared memory.
            Dtype::F16 | Dtype::Bf16 if entry.is_latent() => (Layout::Lanes, 1),
            Dtype::F16 | Dtype::Bf16 => (Layout::Fragment, owned / warps / 16),
        };
        let walks = walks(entry);
        let kinds = kinds(entry, walks);
        for edge in [false, true] {
            let wanted = Tile {
                layout,
                transposed,
                edge,
            };
            let count = |is: &dyn Fn(&Marker<'_>) -> bool| found.iter().filter(|marker| is(marker)).count() as u32;
            let tiles = count(&|marker| matches!(marker, Marker::Tile { tile, .. } if *tile == wanted));
            assert_eq!(tiles, rows * walks, "{}: {wanted:?}", entry.name);
            for &(wanted_kind, times) in &kinds {
                // The portable kernels run no mask in tiles that are listed as full.
                let masks = matches!(wanted_kind, Kind::Mask | Kind::Hide);
                let times = if masks && !edge && entry.arch == Arch::Sm80 {
                    0
                } else {
                    times
                };
                let is = |marker: &Marker<'_>| matches!(marker, Marker::Scores { kind, tile, .. } if (*kind, *tile) == (wanted_kind, wanted));
                assert_eq!(
                    count(&is),
                    rows * streamed / 16 * times,
                    "{}: {wanted_kind:?} {wanted:?}",
                    entry.name
                );
            }
        }
        let of_scores = |marker: &&Marker<'_>| matches!(marker, Marker::Scores { .. });
        let times_of_kind = |&(kind, times): &(Kind, u32)| match kind {
            Kind::Mask | Kind::Hide if entry.arch == Arch::Sm80 => times,
            _ => 2 * times,
        };
        let total: u32 = kinds
            .iter()
            .map(|kind| rows * streamed / 16 * times_of_kind(kind))
            .sum();
        assert_eq!(found.iter().filter(of_scores).count() as u32, total, "{}", entry.name);
        let starts = found
            .iter()
            .filter(|marker| matches!(marker, Marker::Start { .. }))
            .count();
        assert_eq!(starts, usize::from(entry.pass == Some(Pass::Forward)), "{}", entry.name);
        let heads = found
            .iter()
            .filter(|marker| matches!(marker, Marker::Head { .. }))
            .count();
        assert!(heads > 0, "{}: no head is shown", entry.name);
    }
}
