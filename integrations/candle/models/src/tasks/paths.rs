//! Pictures fed pixel by pixel, as Long Range Arena's Path-X: does a path connect the two marks?
//!
//! A picture holds two paths that keep apart. Both marks lie at the ends of one path, or one at an end of each, and the distances of
//! the marks are distributed the same in both cases, so distance tells nothing. A picture is drawn on 8 x 8 cells, whose width in
//! pixels grows with the picture's side: pictures of all sides have the same shapes, and the small ones are a curriculum for the large.

use std::ops::RangeInclusive;

use candle_core::{Device, Result, Tensor};
use rand::Rng;
use rand::rngs::StdRng;

use super::{Batch, HeldOut, Task};
use crate::attention::Pattern;

/// Cells of a row and of a column.
const CELLS: usize = 8;
/// Cells between paths, at least; pixels see others that are as many cells away.
const APART: usize = 2;
/// Steps of a path, in cells.
const STEPS: RangeInclusive<usize> = 3..=6;
/// Distances of the marks, in cells: the larger of that of their rows and that of their columns. Ends of two paths are never nearer.
const DISTANCES: RangeInclusive<usize> = APART + 1..=APART + 2;

/// Pixels of a step, or more where one picture has more.
const PIXELS: usize = 2048;

/// Tokens: the values of a pixel.
const BACKGROUND: u32 = 0;
const PATH: u32 = 1;
const MARK: u32 = 2;

type Cell = (usize, usize);

/// A picture of `side` x `side` pixels.
#[derive(Clone, Debug)]
pub struct Picture {
    /// Pixels of a row.
    pub side: usize,
    /// Values of the pixels, row by row.
    pub pixels: Vec<u32>,
    /// The two marks' pixels.
    pub marks: [usize; 2],
    /// True if a path connects the marks.
    pub connected: bool,
}

impl Picture {
    /// A picture with a side that is a multiple of 8.
    pub fn draw(rng: &mut StdRng, side: usize) -> Self {
        let connected = rng.random_bool(0.5);
        let distance = rng.random_range(DISTANCES);
        let (first, second, ends) = loop {
            let first = walk(rng, &[]);
            let second = first.as_deref().and_then(|first| walk(rng, first));
            let (Some(first), Some(second)) = (first, second) else {
                continue;
            };
            let marked = if connected { &first } else { &second };
            let ends = [first[0], marked[marked.len() - 1]];
            if distance_of(ends[0], ends[1]) == distance {
                break (first, second, ends);
            }
        };
        let width = side / CELLS;
        let pixel = |(row, column): Cell| (row * width + width / 2) * side + column * width + width / 2;
        let mut pixels = vec![BACKGROUND; side * side];
        for path in [&first, &second] {
            for (&from, &to) in path.iter().zip(&path[1..]) {
                let (from, to) = (pixel(from).min(pixel(to)), pixel(from).max(pixel(to)));
                let stride = if to - from < side { 1 } else { side };
                (from..=to).step_by(stride).for_each(|at| pixels[at] = PATH);
            }
        }
        let marks = ends.map(pixel);
        marks.iter().for_each(|&mark| pixels[mark] = MARK);
        Self {
            side,
            pixels,
            marks,
            connected,
        }
    }
}

/// Distance of two cells, with steps to eight neighbours.
fn distance_of(a: Cell, b: Cell) -> usize {
    a.0.abs_diff(b.0).max(a.1.abs_diff(b.1))
}

/// A walk from cell to cell that does not cross itself and keeps apart from `other`; none if it ran into a dead end.
fn walk(rng: &mut StdRng, other: &[Cell]) -> Option<Vec<Cell>> {
    let free = |&cell: &Cell| other.iter().all(|&of_other| distance_of(of_other, cell) > APART);
    let mut path = vec![(rng.random_range(0..CELLS), rng.random_range(0..CELLS))];
    if !free(&path[0]) {
        return None;
    }
    for _ in 0..rng.random_range(STEPS) {
        let (row, column) = path[path.len() - 1];
        let ways = [
            (row.wrapping_sub(1), column),
            (row + 1, column),
            (row, column.wrapping_sub(1)),
            (row, column + 1),
        ];
        let open = |cell: &&Cell| cell.0 < CELLS && cell.1 < CELLS && free(cell) && !path.contains(cell);
        let ways: Vec<Cell> = ways.iter().filter(open).copied().collect();
        if ways.is_empty() {
            return None;
        }
        path.push(ways[rng.random_range(0..ways.len())]);
    }
    Some(path)
}

/// Pictures of growing sides.
#[derive(Clone, Debug)]
pub struct Paths {
    /// The first step of each stage, and the side of its pictures.
    stages: Vec<(usize, usize)>,
    device: Device,
}

impl Paths {
    /// Pictures of each side in turn, each from a step on. A step has `batch` pictures, and more of them where they have less than 2048
    /// pixels.
    ///
    /// # Errors
    /// No stage, one that begins before the one before it, or a side that is no multiple of 8.
    pub fn new(stages: Vec<(usize, usize)>, device: &Device) -> Result<Self> {
        if let Some((_, side)) = stages.iter().find(|(_, side)| *side == 0 || side % CELLS != 0) {
            candle_core::bail!("side is {side}; it must be a multiple of {CELLS}")
        }
        if stages.first().is_none_or(|&(first, _)| first != 0) || !stages.is_sorted() {
            candle_core::bail!("stages {stages:?} must begin at step 0, each after the one before it")
        }
        Ok(Self {
            stages,
            device: device.clone(),
        })
    }

    /// Side of the pictures of a step.
    pub fn side(&self, step: usize) -> usize {
        let reached = self.stages.iter().take_while(|&&(first, _)| first <= step);
        reached.last().map_or(CELLS, |&(_, side)| side)
    }

    /// The batch of pictures of one side. Each of their marks is read, for the class of its picture.
    ///
    /// # Errors
    /// candle's errors.
    pub fn batch(&self, pictures: &[Picture]) -> Result<Batch> {
        let side = pictures.first().map_or(CELLS, |picture| picture.side);
        let pixels = side * side;
        let tokens: Vec<u32> = pictures
            .iter()
            .flat_map(|picture| picture.pixels.iter().copied())
            .collect();
        let marks = pictures.iter().enumerate();
        let read: Vec<u32> = marks
            .flat_map(|(index, picture)| picture.marks.map(|mark| (index * pixels + mark) as u32))
            .collect();
        let targets: Vec<u32> = pictures
            .iter()
            .flat_map(|picture| [u32::from(picture.connected); 2])
            .collect();
        Ok(Batch {
            tokens: Tensor::from_vec(tokens, (pictures.len(), pixels), &self.device)?,
            read: Some(Tensor::new(read, &self.device)?),
            targets: Tensor::new(targets, &self.device)?,
            pattern: Pattern::Neighbours {
                side,
                radius: APART * side / CELLS,
            },
        })
    }
}

impl Task for Paths {
    fn vocabulary(&self) -> usize {
        MARK as usize + 1
    }

    fn classes(&self) -> Option<usize> {
        Some(2)
    }

    fn positions(&self) -> usize {
        0
    }

    fn draw(&self, rng: &mut StdRng, step: usize, batch: usize) -> Result<Batch> {
        let side = self.side(step);
        let count = batch * (PIXELS / side.pow(2)).max(1);
        let pictures: Vec<Picture> = (0..count).map(|_| Picture::draw(rng, side)).collect();
        self.batch(&pictures)
    }

    fn held_out(&self, count: usize) -> Result<Vec<HeldOut>> {
        let of_side = |&(_, side): &(usize, usize)| {
            HeldOut::draw(format!("{side} x {side}"), count, |_, rng| {
                self.batch(&[Picture::draw(rng, side)])
            })
        };
        self.stages.iter().map(of_side).collect()
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    /// True if steps to one of four neighbours lead from mark to mark without a background pixel.
    fn is_connected(picture: &Picture) -> bool {
        let side = picture.side;
        let mut seen = vec![false; side * side];
        let mut open = vec![picture.marks[0]];
        while let Some(at) = open.pop() {
            if std::mem::replace(&mut seen[at], true) {
                continue;
            }
            let (row, column) = (at / side, at % side);
            let ways = [
                (row > 0).then(|| at - side),
                (row + 1 < side).then_some(at + side),
                (column > 0).then(|| at - 1),
                (column + 1 < side).then_some(at + 1),
            ];
            open.extend(
                ways.into_iter()
                    .flatten()
                    .filter(|&way| picture.pixels[way] != BACKGROUND),
            );
        }
        seen[picture.marks[1]]
    }

    #[test]
    fn labels_say_what_the_pixels_show() {
        let mut connected = 0;
        for side in [8, 32, 128] {
            for seed in 0..40 {
                let picture = Picture::draw(&mut StdRng::seed_from_u64(seed), side);
                assert_eq!(picture.pixels.len(), side * side);
                let marked = picture.pixels.iter().filter(|&&pixel| pixel == MARK);
                assert_eq!(marked.count(), 2);
                assert_eq!(is_connected(&picture), picture.connected);
                connected += u32::from(picture.connected);
            }
        }
        assert!((40..80).contains(&connected), "{connected} of 120");
    }

    #[test]
    fn stages_follow_each_other() -> Result<()> {
        let paths = Paths::new(vec![(0, 16), (10, 32)], &Device::Cpu)?;
        assert_eq!([0, 9, 10, 99].map(|step| paths.side(step)), [16, 16, 32, 32]);
        let rng = &mut StdRng::seed_from_u64(1);
        assert_eq!(paths.draw(rng, 0, 2)?.tokens.dims(), [16, 256]);
        assert_eq!(paths.draw(rng, 10, 2)?.tokens.dims(), [4, 1024]);
        assert!(Paths::new(vec![(0, 20)], &Device::Cpu).is_err());
        assert!(Paths::new(vec![(5, 16)], &Device::Cpu).is_err());
        Ok(())
    }
}
