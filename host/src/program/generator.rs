//! [Dropout](super::dropout) as PTX.
//!
//! One call of the generator gives four words, for the pairs `{q, q + 8} x {k, k + 8}` of a 16 x 16 block: with `mma` a lane
//! holds all four. A lane of plain FMA holds other pairs, and takes one word of a call for each.

use flash_attention_kernels::program::{Layout, Tile};

use super::dropout::{FACTORS, ROUNDS, WEYL};
use super::print::{Kept, Printer, real};
use super::scope::{Class, Scope};
use super::text::Slot;

/// A word of the generator's counter or key, or a part of one, as earlier markers leave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Word {
    /// The query head.
    Head,
    /// The batch entry; 0 in a batch of sequences.
    Batch,
    /// Word 0 or 1 of the key of a sequence: the seed plus the number of the sequence.
    Key(u32),
    /// The group of the tile's first row plus this.
    RowGroup(u32),
    /// The group of the tile's first column.
    ColumnGroup,
    /// 8 if the first row is in the second half of a block, else 0.
    RowHalf,
    /// 8 if the first column is in the second half of a block, else 0.
    ColumnHalf,
}

impl Word {
    /// Distance from the first row, for words of a row.
    pub fn row(self) -> Option<u32> {
        match self {
            Self::RowGroup(row) => Some(row),
            _ => None,
        }
    }

    /// Tells if no query or key changes it.
    pub fn is_of_head(self) -> bool {
        matches!(self, Self::Head | Self::Batch | Self::Key(_))
    }

    /// Name of the register that keeps it.
    pub fn name(self) -> String {
        match self {
            Self::Head => "%score_head".to_owned(),
            Self::Batch => "%score_batch".to_owned(),
            Self::Key(word) => format!("%score_key{word}"),
            Self::RowGroup(row) => format!("%score_row_group{row}"),
            Self::ColumnGroup => "%score_column_group".to_owned(),
            Self::RowHalf => "%score_row_half".to_owned(),
            Self::ColumnHalf => "%score_column_half".to_owned(),
        }
    }

    /// Works it out from the coordinates that a marker has.
    pub fn print(
        self,
        [head, batch, first_row, first_column]: [&str; 4],
        printer: &mut Printer<'_>,
        scope: &mut Scope,
    ) -> String {
        let group = |position: &str, scope: &mut Scope| {
            let block = scope.result(Class::B32, "and.b32", &[position, "-16"]);
            let block = scope.result(Class::B32, "shr.u32", &[&block, "1"]);
            let rest = scope.result(Class::B32, "and.b32", &[position, "7"]);
            scope.result(Class::B32, "or.b32", &[&block, &rest])
        };
        match self {
            Self::Head => head.to_owned(),
            Self::Batch if printer.of_sequences() => "0".to_owned(),
            Self::Batch => batch.to_owned(),
            Self::Key(word) => {
                let [low, high] = [0, 1].map(|word| printer.slot(Slot::RoundKey(0, word), Class::B32, scope));
                let sum = scope.result(Class::B32, "add.u32", &[&low, batch]);
                if word == 0 {
                    return sum;
                }
                let carries = scope.result(Class::Predicate, "setp.lt.u32", &[&sum, &low]);
                let next = scope.result(Class::B32, "add.u32", &[&high, "1"]);
                scope.result(Class::B32, "selp.b32", &[&next, &high, &carries])
            }
            Self::RowGroup(row) => {
                let row = scope.result(Class::B32, "add.s32", &[first_row, &row.to_string()]);
                group(&row, scope)
            }
            Self::ColumnGroup => group(first_column, scope),
            Self::RowHalf => scope.result(Class::B32, "and.b32", &[first_row, "8"]),
            Self::ColumnHalf => scope.result(Class::B32, "and.b32", &[first_column, "8"]),
        }
    }
}

/// Drops some of a marker's weights, `m` and `n` beyond the tile's first pair, and scales those that are left.
pub(super) fn print(printer: &mut Printer<'_>, tile: Tile, registers: &[&str; 8], [m, n]: [u32; 2], scope: &mut Scope) {
    match tile.layout {
        Layout::Fragment => {
            for column in 0..2 {
                let words = draw(printer, tile.transposed, m, n / 2 + column, scope);
                // (q, k), (q, k + 8), (q + 8, k), (q + 8, k + 8), as the layout has them.
                let places = if tile.transposed { [0, 2, 4, 6] } else { [0, 4, 2, 6] };
                for (word, place) in words.iter().zip(places) {
                    drop_or_scale(printer, registers[place + column as usize], word, scope);
                }
            }
        }
        Layout::Lanes => {
            let mut second_half = |word| {
                let half = printer.keep(Kept::Drawn(word));
                scope.result(Class::Predicate, "setp.ne.b32", &[&half, "0"])
            };
            let halves = [second_half(Word::RowHalf), second_half(Word::ColumnHalf)];
            let [query_half, key_half] = in_order(halves, tile.transposed);
            for (&(row, _), register) in tile.layout.offsets().iter().zip(registers) {
                let words = draw(printer, tile.transposed, m + row, n / 2, scope);
                let mut either = |x: &str, y: &str, second: &str| scope.result(Class::B32, "selp.b32", &[y, x, second]);
                let first = either(&words[0], &words[1], &key_half);
                let second = either(&words[2], &words[3], &key_half);
                let word = either(&first, &second, &query_half);
                drop_or_scale(printer, register, &word, scope);
            }
        }
    }
}

/// Puts the values of rows and of columns in the order query, key.
fn in_order([rows, columns]: [String; 2], transposed: bool) -> [String; 2] {
    if transposed { [columns, rows] } else { [rows, columns] }
}

/// The four words of a group: that of the first row plus `row`, and `column` beyond that of the tile's first column.
fn draw(printer: &mut Printer<'_>, transposed: bool, row: u32, column: u32, scope: &mut Scope) -> [String; 4] {
    let rows = printer.keep(Kept::Drawn(Word::RowGroup(row)));
    let columns = printer.keep(Kept::Drawn(Word::ColumnGroup));
    let columns = scope.result(Class::B32, "add.s32", &[&columns, &column.to_string()]);
    let [query, key] = in_order([rows, columns], transposed);
    let (head, batch) = (
        printer.keep(Kept::Drawn(Word::Head)),
        printer.keep(Kept::Drawn(Word::Batch)),
    );
    let mut words = [query, key, head, batch];
    for round in 0..ROUNDS as u32 {
        let [low0, high0] = product(&words[0], FACTORS[0], scope);
        let [low2, high2] = product(&words[2], FACTORS[1], scope);
        let mut mixed = |high: &str, word: &str, which| {
            let key = if printer.of_sequences() {
                let key = printer.keep(Kept::Drawn(Word::Key(which)));
                let more = round.wrapping_mul(WEYL[which as usize]) as i32;
                scope.result(Class::B32, "add.s32", &[&key, &more.to_string()])
            } else {
                printer.slot(Slot::RoundKey(round, which), Class::B32, scope)
            };
            let mixed = scope.result(Class::B32, "xor.b32", &[high, word]);
            scope.result(Class::B32, "xor.b32", &[&mixed, &key])
        };
        words = [mixed(&high2, &words[1], 0), low2, mixed(&high0, &words[3], 1), low0];
    }
    words
}

/// Low and high word of a product.
fn product(word: &str, by: u32, scope: &mut Scope) -> [String; 2] {
    let wide = scope.result(Class::B64, "mul.wide.u32", &[word, &by.to_string()]);
    let [low, high] = [(); 2].map(|()| scope.register(Class::B32));
    scope.put(format!("mov.b64 {{{low}, {high}}}, {wide};"));
    [low, high]
}

fn drop_or_scale(printer: &mut Printer<'_>, weight: &str, word: &str, scope: &mut Scope) {
    let threshold = printer.slot(Slot::DropThreshold, Class::B32, scope);
    let scale = printer.slot(Slot::KeepScale, Class::B32, scope);
    let is_kept = scope.result(Class::Predicate, "setp.ge.u32", &[word, &threshold]);
    let scaled = scope.result(Class::B32, "mul.rn.f32", &[weight, &scale]);
    scope.put(format!("selp.f32 {weight}, {scaled}, {}, {is_kept};", real(0.0)));
}
