//! Checks of a cache's tables and lengths, each with the sequence and the value in its error.

use std::collections::HashMap;
use std::ops::Range;

use super::{Kind, KvCache};
use crate::error::Error;

impl KvCache {
    /// The sum of a sequence's old end and `value`, if its pages have room.
    pub(super) fn checked_end(
        &self,
        argument: &'static str,
        sequence: usize,
        value: i64,
        old: usize,
    ) -> Result<usize, Error> {
        let room = self.shape[1].saturating_mul(self.max_pages);
        let end = usize::try_from(value).ok().and_then(|value| old.checked_add(value));
        end.filter(|&end| end <= room).ok_or_else(|| Error::Sequence {
            argument,
            sequence,
            value,
            expected: match self.kind {
                Kind::Paged => format!(
                    "0 to {}, what {} pages of {} keys have room for",
                    room - old,
                    self.max_pages,
                    self.shape[1]
                ),
                Kind::Rectangular => format!("0 to {}, the room of a row", room - old),
            },
        })
    }

    /// Checks that the cache has every page that a sequence uses.
    pub(super) fn check_pages(&self, sequence: usize) -> Result<(), Error> {
        let count = self.shape[0];
        let used = match self.sequences[sequence].end {
            0 if self.kind == Kind::Rectangular => 1, // a row of its own, even without keys
            end => end.div_ceil(self.shape[1].max(1)),
        };
        let row = &self.table[sequence * self.max_pages..][..used];
        let exists = |page: i32| usize::try_from(page).is_ok_and(|page| page < count);
        match row.iter().find(|&&page| !exists(page)) {
            None => Ok(()),
            Some(&page) => Err(Error::Sequence {
                argument: self.argument_of_pages(),
                sequence,
                value: page.into(),
                expected: format!("at least 0 and below {count}, the number of {}", self.name_of_pages()),
            }),
        }
    }

    /// Checks that no new key is written where another sequence has a key, or the same sequence another one.
    pub(super) fn check_new_places(&self) -> Result<(), Error> {
        // New keys of each page: the sequence, the index of the page in it, and the places that are written.
        let mut written: HashMap<i32, Vec<(usize, usize, Range<usize>)>> = HashMap::new();
        for (sequence, span) in self.sequences.iter().enumerate() {
            for (page, number, places) in self.uses(sequence, span.end - span.new) {
                written.entry(number).or_default().push((sequence, page, places));
            }
        }
        for sequence in (0..self.batch()).filter(|_| !written.is_empty()) {
            for (page, number, keys) in self.uses(sequence, self.sequences[sequence].begin) {
                for (writer, of_writer, new) in written.get(&number).into_iter().flatten() {
                    let meets = keys.start < new.end && new.start < keys.end;
                    if (*writer, *of_writer) != (sequence, page) && meets {
                        return Err(Error::Sequence {
                            argument: self.argument_of_pages(),
                            sequence: *writer,
                            value: number.into(),
                            expected: "a page without other keys where new ones are written".to_owned(),
                        });
                    }
                }
            }
        }
        Ok(())
    }

    /// The pages of a sequence's keys from place `from` on: the index of each, its number, and the places of these keys in it.
    fn uses(&self, sequence: usize, from: usize) -> impl Iterator<Item = (usize, i32, Range<usize>)> {
        let (end, page_size) = (self.sequences[sequence].end, self.shape[1]);
        let pages = match from < end {
            true => from / page_size..end.div_ceil(page_size),
            false => 0..0,
        };
        pages.map(move |page| {
            let first = page * page_size;
            let places = from.max(first) - first..end.min(first + page_size) - first;
            (page, self.table[sequence * self.max_pages + page], places)
        })
    }

    fn argument_of_pages(&self) -> &'static str {
        match self.kind {
            Kind::Paged => "block_table",
            Kind::Rectangular => "cache_batch_idx",
        }
    }

    pub(super) fn name_of_pages(&self) -> &'static str {
        match self.kind {
            Kind::Paged => "pages",
            Kind::Rectangular => "rows",
        }
    }
}
