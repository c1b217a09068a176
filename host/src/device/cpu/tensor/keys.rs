//! The rows of keys or values of one head, in a row or in pages.

use std::ops::Range;

use flash_attention_kernels::abi::StridedTensor;
use flash_attention_kernels::entries::Dtype;

use super::Head;
use crate::device::cpu::kernels::{Kernels, Listed, Rows, Strided, rows_ahead};
use crate::sequences::Pages;

/// The keys or values of one head of a sequence, whose rows may lie in pages.
#[derive(Clone, Copy)]
pub(in crate::device::cpu) struct KeyRows<'a> {
    /// All rows, or the rows of page 0.
    head: Head,
    pages: Option<&'a Pages>,
    /// Bytes from one head to the next.
    head_bytes: usize,
    /// Bytes from one page to the next.
    page_bytes: usize,
    /// Rows between one that is read and one that is asked for.
    ahead: usize,
}

/// Returns `count` rows, `offset` bytes after those listed, and as many later ones, which are listed from `ahead` on; the last one stands
/// for those missing.
fn listed(addresses: &mut Vec<*const u8>, ahead: usize, count: usize, offset: usize) -> Rows {
    let last = addresses.last().copied().unwrap_or(std::ptr::null());
    addresses.resize(ahead + count, last);
    let (rows, later) = (addresses.as_ptr(), addresses[ahead..].as_ptr());
    Rows::Listed {
        rows: Listed(rows, offset),
        later: Listed(later, 0),
    }
}

impl<'a> KeyRows<'a> {
    /// # Safety
    /// The contract of [`Head::new`] for each page.
    pub(in crate::device::cpu) unsafe fn new(
        tensor: StridedTensor,
        pages: Option<&'a Pages>,
        dtype: Dtype,
        [batch, head, head_dim]: [usize; 3],
    ) -> Self {
        Self {
            // SAFETY: passed on to the caller.
            head: unsafe { Head::new(tensor, dtype, batch, head, head_dim) },
            pages,
            head_bytes: tensor.head_stride as usize * dtype.bytes(),
            page_bytes: tensor.batch_stride as usize * dtype.bytes(),
            ahead: rows_ahead(head_dim * dtype.bytes()),
        }
    }

    /// The keys or values of a head that lie in a row.
    pub(in crate::device::cpu) fn of_one_run(head: Head) -> Self {
        Self {
            head,
            pages: None,
            head_bytes: 0,
            page_bytes: 0,
            ahead: rows_ahead(head.row_bytes()),
        }
    }

    /// Returns the elements of a row.
    pub(in crate::device::cpu) fn head_dim(&self) -> usize {
        self.head.head_dim
    }

    /// Returns the rows of a later head.
    pub(in crate::device::cpu) fn later_head(&self, heads: usize) -> Self {
        Self {
            head: self.head.later(heads * self.head_bytes),
            ..*self
        }
    }

    /// Returns the places of `rows`, which exist; later ones are those [`rows_ahead`] on. Unless one page holds `rows`, they are listed
    /// in `addresses`, and the last one stands for those past `end`.
    pub(in crate::device::cpu) fn locate(
        &self,
        rows: Range<usize>,
        end: usize,
        addresses: &mut Vec<*const u8>,
    ) -> Rows {
        let ahead = self.ahead;
        let with_later = rows.start..(rows.end + ahead).min(end);
        if let Some(rows @ Strided(first, stride_bytes)) = self.strided(with_later.clone()) {
            let later = Strided(first.wrapping_add(ahead * stride_bytes), stride_bytes);
            return Rows::Strided { rows, later };
        }
        addresses.clear();
        self.list(with_later, 1, addresses);
        listed(addresses, ahead, rows.len(), 0)
    }

    /// Lists `rows` in `addresses` for [`locate_among`](Self::locate_among), unless one page holds them.
    pub(in crate::device::cpu) fn list_rows(&self, rows: Range<usize>, addresses: &mut Vec<*const u8>) {
        if self.strided(rows.clone()).is_none() {
            addresses.clear();
            self.list(rows, 1, addresses);
        }
    }

    /// Returns the places of `rows`, which exist, of the head `index` heads on, whose later ones are `next`, rows of `heads` heads from
    /// this one on in the order of memory. `addresses` is what [`list_rows`](Self::list_rows) made of `rows`, or an earlier call with
    /// them. Unless one page holds `next` and nothing lies between its rows, they are listed there too.
    pub(in crate::device::cpu) fn locate_among(
        &self,
        [index, heads]: [usize; 2],
        rows: Range<usize>,
        next: Range<usize>,
        addresses: &mut Vec<*const u8>,
    ) -> Rows {
        let (count, offset) = (rows.len(), index * self.head_bytes);
        if let Some(Strided(next, stride_bytes)) = self.strided(next.clone())
            && stride_bytes == heads * self.head_bytes
        {
            let later = Strided(next, self.head_bytes);
            return match self.strided(rows) {
                Some(Strided(first, _)) => {
                    let rows = Strided(first.wrapping_add(offset), stride_bytes);
                    Rows::Strided { rows, later }
                }
                None => {
                    let rows = Listed(addresses.as_ptr(), offset);
                    Rows::Paged { rows, later }
                }
            };
        }
        addresses.clear();
        self.list(rows, 1, addresses);
        self.list(next, heads, addresses);
        listed(addresses, count, count, offset)
    }

    /// Appends the addresses of rows of `heads` heads.
    fn list(&self, rows: Range<usize>, heads: usize, addresses: &mut Vec<*const u8>) {
        for (head, place, count) in self.runs(rows) {
            let (first, stride_bytes) = head.row(place);
            let places = (0..count).flat_map(|row| (0..heads).map(move |head| (row, head)));
            addresses.extend(places.map(|(row, head)| first.wrapping_add(row * stride_bytes + head * self.head_bytes)));
        }
    }

    /// Returns the rows with row `row` among them, and its place.
    fn place(&self, row: usize) -> (Head, usize) {
        match self.pages {
            None => (self.head, row),
            Some(pages) => {
                let (page, place) = pages.place(row);
                (self.head.later(page * self.page_bytes), place)
            }
        }
    }

    /// Iterates over the runs of `rows` that one page holds: its rows, the place of the first one, and how many they are.
    fn runs(&self, rows: Range<usize>) -> impl Iterator<Item = (Head, usize, usize)> {
        let mut next = rows.start;
        std::iter::from_fn(move || {
            let left = rows.end.checked_sub(next).filter(|&left| left > 0)?;
            let (head, place) = self.place(next);
            let count = self.pages.map_or(left, |pages| left.min(pages.page_size() - place));
            next += count;
            Some((head, place, count))
        })
    }

    /// Returns the places of `rows`, if one page holds them.
    fn strided(&self, rows: Range<usize>) -> Option<Strided> {
        let (head, place) = self.run(rows)?;
        let (first, stride_bytes) = head.row(place);
        Some(Strided(first, stride_bytes))
    }

    /// Returns the rows that hold all of `rows`, and the place of the first one, if one page does.
    fn run(&self, rows: Range<usize>) -> Option<(Head, usize)> {
        let (head, place, count) = self.runs(rows.clone()).next()?;
        (count == rows.len()).then_some((head, place))
    }

    /// Returns `count` rows from `first` on in place, if they are f32 and contiguous.
    pub(in crate::device::cpu) fn in_place(&self, first: usize, count: usize) -> Option<*const f32> {
        let (head, place) = self.run(first..first + count)?;
        head.in_place(place)
    }

    /// Widens row `row`, which exists, to the head_dim elements of `to`.
    pub(in crate::device::cpu) fn load(&self, kernels: &Kernels, row: usize, to: &mut [f32]) {
        let (head, place) = self.place(row);
        head.load(kernels, place, to);
    }

    /// Widens `count` rows to a tile, whose rows are `width` apart, and zeroes the rows up to `padded`.
    pub(in crate::device::cpu) fn load_tile(
        &self,
        kernels: &Kernels,
        first: usize,
        [count, padded]: [usize; 2],
        tile: &mut [f32],
        width: usize,
    ) {
        let mut done = 0;
        for (head, place, rows) in self.runs(first..first + count) {
            head.load_tile(kernels, place, [rows, rows], &mut tile[done * width..], width);
            done += rows;
        }
        tile[count * width..padded * width].fill(0.0);
    }

    /// Copies `count` rows of 16-bit elements to the first halves of words, `stride` words apart, and zeroes the rows
    /// up to `padded`.
    pub(in crate::device::cpu) fn copy_halves(
        &self,
        first: usize,
        [count, padded]: [usize; 2],
        words: &mut [f32],
        stride: usize,
    ) {
        let mut done = 0;
        for (head, place, rows) in self.runs(first..first + count) {
            head.copy_halves(place, [rows, rows], &mut words[done * stride..], stride);
            done += rows;
        }
        words[count * stride..padded * stride].fill(0.0);
    }

    /// Prefetches rows to L2 that will be read soon.
    pub(in crate::device::cpu) fn prefetch(&self, rows: Range<usize>) {
        self.runs(rows)
            .for_each(|(head, place, count)| head.prefetch(place..place + count));
    }
}
