//! [`Pages`]: the pages of one sequence, as devices read them.

/// The pages of one sequence, from the one with its first key to the one with its last.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Pages {
    table: Vec<u32>,
    page_size: usize,
    /// Place of the first key in the first page.
    first: usize,
}

impl Pages {
    /// The pages of these numbers, none of them negative. The first key is `begin` keys behind the beginning of a page.
    pub(super) fn new(numbers: &[i32], page_size: usize, begin: usize) -> Self {
        Self {
            table: numbers.iter().map(|&page| page as u32).collect(),
            page_size,
            first: begin.checked_rem(page_size).unwrap_or(0),
        }
    }

    /// Numbers of the pages, in order.
    pub(crate) fn table(&self) -> &[u32] {
        &self.table
    }

    /// Number of keys of a page.
    pub(crate) fn page_size(&self) -> usize {
        self.page_size
    }

    /// The page of a key, which exists, and its place there.
    pub(crate) fn place(&self, key: usize) -> (usize, usize) {
        // Division of u32 takes a third of the time of that of u64. Keys of a problem, padding included, are fewer than 2^32, and
        // in a larger page lie at the place of their number.
        let page_size = self.page_size.min(u32::MAX as usize) as u32;
        let place = (self.first + key) as u32;
        (
            self.table[(place / page_size) as usize] as usize,
            (place % page_size) as usize,
        )
    }
}
