//! Markers: the places of a kernel at which the host splices a score program into the text.
//!
//! A program kernel is compiled once and has a comment at each place where scores are in registers. The comment names the
//! registers; unspliced, it does nothing. The host replaces each by the instructions of the program, in a scope of their own,
//! declares the registers that they share at the top of the kernel, and adds a second kernel parameter with the program's constants.
//!
//! | marker | where | operands |
//! | --- | --- | --- |
//! | `head` | once a head that a block works on | `HEAD BATCH SEQLEN_Q SEQLEN_K` |
//! | `start` | before the first scores of a head's rows | `ROW_MAX ROW_SUM`, which the program may change |
//! | `tile` | once for the rows of a [layout](Layout) in a streamed tile, before its scores are there | `LAYOUT EDGE ROW COLUMN M` |
//! | `score` | products of queries and keys, before the softmax | `LAYOUT EDGE S0 S1 … M N` |
//! | `mask` | the same scores, after `score` | `LAYOUT EDGE S0 S1 … M N` |
//! | `hide` | weights that backward made of scores that no `mask` changed | `LAYOUT EDGE S0 S1 … M N` |
//! | `weight` | weights before their product with the values, and their gradients | `LAYOUT EDGE S0 S1 … M N` |
//! | `gradient` | gradients of the scores that the program made | `LAYOUT EDGE S0 S1 … M N` |
//! | `hides` | where code depends on whether pairs may be hidden | `FLAG`, 0, which the program may change to 1 |
//! | `visible` | where one pair is asked for | `FLAG QUERY KEY HEAD`; the flag is 1, which the program may change to 0 |
//! | `row` | the statistics of a query in backward | `HEAD LSE DELTA` |
//!
//! `ROW` and `COLUMN` are registers with the lane's first coordinates in the tile, `M` and `N` literals to add to them, and the
//! layout says what each of the registers `S0 S1 …` adds in turn. Rows are queries and columns keys; in a layout that ends in
//! `_t` it is the other way round. `EDGE` is `edge` in a tile that may hold columns past the end of their sequence, else
//! `whole`. Rows past the end of theirs may come in either.
//!
//! Markers run in the order of the text: a `tile` before the scores of that tile, a `head` before its tiles. So a program finds
//! the values that it computed at one marker in its registers at the next.

/// Positions of a marker's registers in a tile of scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Layout {
    /// 16 x 16 scores of a warp, two accumulators of m16n8.
    Fragment,
    /// Four rows of one column, of plain FMA.
    Lanes,
}

impl Layout {
    /// Row and column of each register, relative to the first.
    pub const fn offsets(self) -> &'static [(u32, u32)] {
        match self {
            Self::Fragment => &[(0, 0), (0, 1), (8, 0), (8, 1), (0, 8), (0, 9), (8, 8), (8, 9)],
            Self::Lanes => &[(0, 0), (1, 0), (2, 0), (3, 0)],
        }
    }

    /// Lanes that share a row.
    pub const fn lanes_of_row(self) -> u32 {
        match self {
            Self::Fragment => 4,
            Self::Lanes => 16,
        }
    }
}

/// The values of a tile at a marker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Products of queries and keys.
    Score,
    /// The scores that the program made of them.
    Mask,
    /// Weights that backward made of scores that no mask changed.
    Hide,
    /// Weights, or their gradients.
    Weight,
    /// Gradients of the scores that the program made.
    Gradient,
}

/// A tile of scores, as a marker names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Positions of the scores.
    pub layout: Layout,
    /// True if rows are keys, and columns queries.
    pub transposed: bool,
    /// True if columns may lie past the end.
    pub edge: bool,
}

/// A marker, as a line of a kernel's text holds it. Registers are by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Marker<'a> {
    /// Beginning of a head.
    Head {
        /// Query head.
        head: &'a str,
        /// Batch entry, or number of the sequence.
        batch: &'a str,
        /// Length of the query sequence.
        seqlen_q: &'a str,
        /// Length of the key sequence.
        seqlen_k: &'a str,
    },
    /// Start of each row's softmax.
    Start {
        /// Largest score so far.
        row_max: &'a str,
        /// This lane's part of the sum of weights so far.
        row_sum: &'a str,
    },
    /// Beginning of a streamed tile.
    Tile {
        /// The tile.
        tile: Tile,
        /// First row.
        row: &'a str,
        /// First column.
        column: &'a str,
        /// To add to the row.
        m: u32,
    },
    /// Scores or weights.
    Scores {
        /// Kind of the values.
        kind: Kind,
        /// The tile that they belong to.
        tile: Tile,
        /// The registers, as many as the layout has.
        registers: [&'a str; 8],
        /// To add to the row.
        m: u32,
        /// To add to the column.
        n: u32,
    },
    /// A question if the program hides pairs.
    Hides {
        /// 0, or 1 if it does.
        flag: &'a str,
    },
    /// A question if the program shows a pair.
    Visible {
        /// 1, or 0 if it does not.
        flag: &'a str,
        /// Query.
        query: &'a str,
        /// Key.
        key: &'a str,
    },
    /// A query's statistics, in backward.
    Row {
        /// Query head.
        head: &'a str,
        /// Log-sum-exp of the query.
        lse: &'a str,
        /// `rowsum(dO * O)`.
        delta: &'a str,
    },
}

impl<'a> Marker<'a> {
    /// Reads a line of a kernel: `None` if it is no marker, an error if it is an unknown one.
    pub fn read(line: &'a str) -> Option<Result<Self, ()>> {
        Some(Self::parse(line.trim_start().strip_prefix("//@")?).ok_or(()))
    }

    fn parse(text: &'a str) -> Option<Self> {
        let mut words = text.split_ascii_whitespace();
        let marker = match words.next()? {
            "head" => Self::Head {
                head: words.next()?,
                batch: words.next()?,
                seqlen_q: words.next()?,
                seqlen_k: words.next()?,
            },
            "start" => Self::Start {
                row_max: words.next()?,
                row_sum: words.next()?,
            },
            "hides" => Self::Hides { flag: words.next()? },
            "visible" => {
                let [flag, query, key, _] = [words.next()?, words.next()?, words.next()?, words.next()?];
                Self::Visible { flag, query, key }
            }
            "row" => Self::Row {
                head: words.next()?,
                lse: words.next()?,
                delta: words.next()?,
            },
            "tile" => Self::Tile {
                tile: Tile::parse(words.next()?, words.next()?)?,
                row: words.next()?,
                column: words.next()?,
                m: words.next()?.parse().ok()?,
            },
            kind => {
                let kind = match kind {
                    "score" => Kind::Score,
                    "mask" => Kind::Mask,
                    "hide" => Kind::Hide,
                    "weight" => Kind::Weight,
                    "gradient" => Kind::Gradient,
                    _ => return None,
                };
                let tile = Tile::parse(words.next()?, words.next()?)?;
                let mut registers = [""; 8];
                for register in &mut registers[..tile.layout.offsets().len()] {
                    *register = words.next()?;
                }
                let (m, n) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
                Self::Scores {
                    kind,
                    tile,
                    registers,
                    m,
                    n,
                }
            }
        };
        words.next().is_none().then_some(marker)
    }
}

impl Tile {
    fn parse(layout: &str, edge: &str) -> Option<Self> {
        let edge = match edge {
            "edge" => true,
            "whole" => false,
            _ => return None,
        };
        let (layout, transposed) = match layout {
            "fragment" => (Layout::Fragment, false),
            "fragment_t" => (Layout::Fragment, true),
            "lanes" => (Layout::Lanes, false),
            "lanes_t" => (Layout::Lanes, true),
            _ => return None,
        };
        Some(Self {
            layout,
            transposed,
            edge,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tile::fragment;

    #[test]
    fn layouts_are_those_of_the_lanes() {
        for lane in 0..32 {
            let (row, column) = fragment::accumulator(lane, 0);
            for (i, &(m, n)) in Layout::Fragment.offsets().iter().enumerate() {
                let (r, c) = fragment::accumulator(lane, i as u32 % 4);
                assert_eq!((row + m, column + n), (r, c + i as u32 / 4 * 8));
            }
            let (row, column) = fragment::simt(lane, 0, 0, 1);
            for (i, &(m, n)) in Layout::Lanes.offsets().iter().enumerate() {
                assert_eq!((row + m, column + n), fragment::simt(lane, i as u32, 0, 1));
                assert_eq!(fragment::simt(lane, i as u32, 3, 1), (row + m, column + 48));
            }
        }
    }

    #[test]
    fn markers_are_read() {
        let scores = Marker::read("\t//@mask lanes_t edge %r1 %r2 %r3 %r4 0 16");
        let registers = ["%r1", "%r2", "%r3", "%r4", "", "", "", ""];
        let tile = Tile {
            layout: Layout::Lanes,
            transposed: true,
            edge: true,
        };
        let kind = Kind::Mask;
        assert_eq!(
            scores,
            Some(Ok(Marker::Scores {
                kind,
                tile,
                registers,
                m: 0,
                n: 16
            }))
        );
        assert_eq!(
            Marker::read("//@head %r1 %r2 %r3 %r4"),
            Some(Ok(Marker::Head {
                head: "%r1",
                batch: "%r2",
                seqlen_q: "%r3",
                seqlen_k: "%r4"
            }))
        );
        assert_eq!(Marker::read("// a remark"), None);
        for line in [
            "//@head %r1",
            "//@head %r1 %r2 %r3",
            "//@head %r1 %r2 %r3 %r4 %r5",
            "//@score lanes edge %r1 0 16",
            "//@tile lanes left %r1 %r2 0",
            "//@x",
        ] {
            assert_eq!(Marker::read(line), Some(Err(())), "{line}");
        }
    }
}
