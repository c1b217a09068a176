//! [`NewKeys`]: keys and values that are written to a cache, before attention to all of them.

use super::cached::check_pages;
use super::{check_rank, check_shape};
use crate::element::Element;
use crate::error::Error;
use crate::layout::Sharing;
use crate::options::Attention;
use crate::output::Output;
use crate::problem::{check_last_axis, check_written};
use crate::rotary::{Move, Rotary, moved};
use crate::sequences::KvCache;
use crate::tensor::Tensor;

/// The new keys of a step, and their values: those that [`KvCache::append`] made room for.
///
/// Each is `[batch, heads_kv, seqlen_new, head_dim]`, or packed end to end, `[total_new, heads_kv, head_dim]`, in any strides; v may
/// have another head_dim than k.
#[derive(Clone, Debug)]
pub struct NewKeys<'a, T: Element> {
    k: &'a Tensor<T>,
    v: &'a Tensor<T>,
    rotary: Option<&'a Rotary>,
    positions: Option<&'a [i32]>,
}

impl<'a, T: Element> NewKeys<'a, T> {
    /// Describes new keys and values.
    pub fn new(k: &'a Tensor<T>, v: &'a Tensor<T>) -> Self {
        Self {
            k,
            v,
            rotary: None,
            positions: None,
        }
    }

    /// Returns these keys with a rotary embedding: the new keys are turned before they are written, and queries before they are
    /// compared with keys. New key j and query j of a sequence with n keys before the step stand at position n + j.
    #[must_use]
    pub fn rotary(self, rotary: &'a Rotary) -> Self {
        Self {
            rotary: Some(rotary),
            ..self
        }
    }

    /// Returns these keys with other positions for the rotary embedding: new key j and query j of sequence i stand at
    /// `first[i] + j`.
    #[must_use]
    pub fn positions(self, first: &'a [i32]) -> Self {
        Self {
            positions: Some(first),
            ..self
        }
    }

    /// Position of the first new key of each sequence.
    fn first_positions(&self, cache: &KvCache) -> Result<Vec<i32>, Error> {
        match self.positions {
            None => {
                let first = |sequence| i32::try_from(cache.new_keys(sequence).start).unwrap_or(i32::MAX);
                Ok((0..cache.batch()).map(first).collect())
            }
            Some(first) if first.len() == cache.batch() => Ok(first.to_vec()),
            Some(first) => Err(Error::SequenceCount {
                argument: "positions",
                len: first.len(),
                expected: cache.batch(),
            }),
        }
    }
}

impl KvCache {
    /// Writes the new keys of this cache, those of the last [`append`](Self::append), and their values to k and v, its pages. With a
    /// rotary embedding, keys are turned.
    ///
    /// A GPU moves the new keys and values, and nothing else of the cache, on its own stream. New keys or values that share memory with
    /// the cache are copied first, through the host.
    ///
    /// # Errors
    /// [`Error::Rank`] and [`Error::ShapeMismatch`] unless k and v are pages of this cache, and the new keys have their heads and
    /// head_dim; [`Error::Sequence`] for another number of new keys than the cache has room for, and for a position outside of a
    /// rotary embedding's tables; [`Error::SequenceCount`] unless each sequence has a first position, where positions are given;
    /// [`Error::OverlappingStrides`], [`Error::Aliased`] and [`Error::Interleaved`] if two keys may share memory;
    /// [`Error::LastAxisStride`]; [`Error::DeviceMismatch`]; and the errors of [`Rotary::forward`]. Nothing has been written then,
    /// unless the device failed.
    pub fn write<T: Element>(&self, new: &NewKeys<'_, T>, k: &mut Tensor<T>, v: &mut Tensor<T>) -> Result<(), Error> {
        check_written(&[], &[("k", k.info()), ("v", v.info())])?;
        let of_keys = rows_of_new("k_new", new.k, ("k", k), self)?;
        let of_values = rows_of_new("v_new", new.v, ("v", v), self)?;
        let counts = (0..self.batch()).map(|sequence| self.new_keys(sequence).len());
        let first = new.first_positions(self)?;
        let positions = match new.rotary {
            Some(rotary) => {
                let positions = positions(&first, counts)?;
                rotary.check(new.k.shape()[new.k.shape().len() - 1], &positions)?;
                positions
            }
            None => vec![0; counts.sum()],
        };
        let keys = apart(new.k, &[k, v])?;
        let values = apart(new.v, &[k, v])?;
        let (k, v) = (k.transpose(1, 2)?, v.transpose(1, 2)?);
        let rotary = new.rotary.map(|rotary| (rotary, 1.0));
        let keys = moved(&keys, &k, self.moves(of_keys, &positions), rotary)?;
        let values = moved(&values, &v, self.moves(of_values, &positions), None)?;
        keys.run()?;
        values.run()
    }

    /// Writes new keys to a cache of latent attention, whose values are the first elements of its keys: those of the last
    /// [`append`](Self::append), `[batch, 1, seqlen_new, head_dim]` or packed, `[total_new, 1, head_dim]`, as for [`NewKeys`].
    ///
    /// ```
    /// use flash_attention::{Attention, Device, KvCache, Rotary, Tensor};
    ///
    /// let device = Device::cpu();
    /// let mut latent = Tensor::<f32>::zeros(&device, [4, 8, 1, 576])?; // 4 pages of 8 tokens
    /// let cache = KvCache::paged([4, 8], &[0, 1, 2, 3], &[0, 0])?.append(&[5, 5])?; // 2 sequences, 5 tokens of each
    /// let new = Tensor::from_slice(&device, [2, 1, 5, 576], &[0.5; 5760])?;
    /// cache.write_latent(&new, &mut latent)?;
    ///
    /// let q = Tensor::from_slice(&device, [2, 16, 5, 576], &[0.5; 92160])?;
    /// let values = latent.narrow(3, 0, 512)?;
    /// let output = Attention::new().causal().forward_cached(&q, &latent, &values, &cache)?;
    /// assert_eq!(output.out.shape(), [2, 16, 5, 512]);
    /// # Ok::<(), flash_attention::Error>(())
    /// ```
    ///
    /// A rotary embedding turns other elements of a key than its values; [`Rotary::forward`] does so before the two are joined.
    ///
    /// # Errors
    /// Those of [`write`](Self::write), with `latent_new` and `latent` as arguments.
    pub fn write_latent<T: Element>(&self, new: &Tensor<T>, latent: &mut Tensor<T>) -> Result<(), Error> {
        check_written(&[], &[("latent", latent.info())])?;
        let rows = rows_of_new("latent_new", new, ("latent", latent), self)?;
        let new = apart(new, &[latent])?;
        let positions = vec![0; rows.len()];
        moved(&new, &latent.transpose(1, 2)?, self.moves(rows, &positions), None)?.run()
    }

    /// Moves of new rows, given by entry and row, to their slots.
    fn moves(&self, rows: Vec<[usize; 2]>, positions: &[i32]) -> impl Iterator<Item = Move> {
        let keys = (0..self.batch()).flat_map(|sequence| self.new_keys(sequence).map(move |key| (sequence, key)));
        let slots = keys.map(|(sequence, key)| <[usize; 2]>::from(self.slot(sequence, key)));
        let moves = rows.into_iter().zip(slots).zip(positions);
        moves.map(|((from, to), &position)| Move { from, to, position })
    }
}

/// Returns new rows that share no memory with pages: a copy through the host of those that do.
fn apart<T: Element>(new: &Tensor<T>, pages: &[&Tensor<T>]) -> Result<Tensor<T>, Error> {
    let is_apart = |pages: &&Tensor<T>| new.info().sharing(pages.info()) == Sharing::Apart;
    match pages.iter().all(is_apart) {
        true => Ok(new.clone()),
        false => Tensor::from_slice(new.device(), new.shape(), &new.to_vec()?),
    }
}

impl Attention {
    /// A step of decoding: writes new keys and values to a cache, and attends to all keys that it then has.
    ///
    /// It is [`KvCache::write`], then [`forward_cached`](Self::forward_cached) with queries that are turned as the new keys are if
    /// there is a rotary embedding.
    ///
    /// ```
    /// use flash_attention::{Attention, Device, KvCache, NewKeys, Rotary, Tensor};
    ///
    /// let device = Device::cpu();
    /// let mut k = Tensor::<f32>::zeros(&device, [4, 8, 1, 16])?; // 4 pages of 8 keys of 1 head
    /// let mut v = Tensor::<f32>::zeros(&device, [4, 8, 1, 16])?;
    /// let (attention, rotary) = (Attention::new().causal(), Rotary::new(16, 10_000.0)?);
    /// let mut cache = KvCache::paged([4, 8], &[0, 1, 2, 3], &[0, 0])?; // 2 sequences without keys
    /// for seqlen in [5, 1, 1] {
    ///     let token = Tensor::from_slice(&device, [2, 1, seqlen, 16], &vec![0.5; 32 * seqlen])?;
    ///     cache = cache.append(&[seqlen as i32; 2])?;
    ///     let new = NewKeys::new(&token, &token).rotary(&rotary);
    ///     let output = attention.forward_append(&token, &new, &mut k, &mut v, &cache)?;
    ///     assert_eq!(output.out.shape(), token.shape());
    /// }
    /// assert_eq!(cache.keys(0), 7);
    /// # Ok::<(), flash_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// The errors of [`KvCache::write`] and [`forward_cached`](Self::forward_cached); nothing has been written then, unless the
    /// device failed.
    pub fn forward_append<T: Element>(
        &self,
        q: &Tensor<T>,
        new: &NewKeys<'_, T>,
        k: &mut Tensor<T>,
        v: &mut Tensor<T>,
        cache: &KvCache,
    ) -> Result<Output<T>, Error> {
        self.plan_cached(q, k, v, cache)?;
        let turned;
        let q = match new.rotary {
            Some(rotary) => {
                let seqlen_q = |sequence| match cache.queries(sequence) {
                    Some(range) => range.len(),
                    None => q.shape()[2],
                };
                let counts = (0..cache.batch()).map(seqlen_q);
                let mut positions = positions(&new.first_positions(cache)?, counts)?;
                if cache.total_q().is_some() {
                    // Rows that belong to no sequence see nothing, wherever they stand.
                    positions.resize(q.shape()[0], 0);
                }
                turned = rotary.forward(q, &positions)?;
                &turned
            }
            None => q,
        };
        cache.write(new, k, v)?;
        self.forward_cached(q, k, v, cache)
    }
}

/// Positions of tokens: so many for each sequence, from its first on.
fn positions(first: &[i32], counts: impl Iterator<Item = usize>) -> Result<Vec<i32>, Error> {
    let mut positions = Vec::new();
    for (sequence, (&first, count)) in first.iter().zip(counts).enumerate() {
        let end = i32::try_from(count).ok().and_then(|count| first.checked_add(count));
        let Some(end) = end.filter(|_| first >= 0) else {
            return Err(Error::Sequence {
                argument: "positions",
                sequence,
                value: first.into(),
                expected: format!("at least 0 and at most {}, less {count} tokens", i32::MAX),
            });
        };
        positions.extend(first..end);
    }
    Ok(positions)
}

/// Checks new keys or values against the pages they are written to, and returns entry and row of each, sequence after sequence.
fn rows_of_new<T: Element>(
    argument: &'static str,
    new: &Tensor<T>,
    (other, pages): (&'static str, &Tensor<T>),
    cache: &KvCache,
) -> Result<Vec<[usize; 2]>, Error> {
    check_pages(other, pages, cache)?;
    check_last_axis((other, pages.info()))?;
    if new.device() != pages.device() {
        return Err(Error::DeviceMismatch {
            argument,
            got: new.device().to_string(),
            other,
            expected: pages.device().to_string(),
        });
    }
    let counts = (0..cache.batch()).map(|sequence| cache.new_keys(sequence).len());
    let (heads, head_dim) = (pages.shape()[2], pages.shape()[3]);
    if new.shape().len() == 3 {
        let total = counts.sum();
        let sizes = [("total", total), ("heads", heads), ("head_dim", head_dim)];
        check_shape(argument, new, &sizes.map(|(axis, size)| (axis, other, size)))?;
        return Ok((0..total).map(|row| [0, row]).collect());
    }
    check_rank(argument, new, 4)?;
    let seqlen = new.shape()[2];
    let sizes = [
        ("batch", cache.batch()),
        ("heads", heads),
        ("seqlen", seqlen),
        ("head_dim", head_dim),
    ];
    check_shape(argument, new, &sizes.map(|(axis, size)| (axis, other, size)))?;
    match counts.clone().position(|count| count != seqlen) {
        None => Ok((0..cache.batch())
            .flat_map(|sequence| (0..seqlen).map(move |row| [sequence, row]))
            .collect()),
        Some(sequence) => Err(Error::Sequence {
            argument: "seqlens_new",
            sequence,
            value: cache.new_keys(sequence).len() as i64,
            expected: format!("{seqlen}, the seqlen of {argument}"),
        }),
    }
}
