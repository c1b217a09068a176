//! The op of a step of decoding: new keys and values are written to pages in place, then queries attend. On the CPU, without gradients.

use std::cell::Cell;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp3, InplaceOp1, Layout, Result, Shape, Tensor};
use flash_attention::{Device, Error, KvCache, NewKeys, Rotary};

use crate::FlashAttention;
use crate::op::{Scalar, on_host, rows, with_scalar};
use crate::views::{Memory, wrap};

impl FlashAttention {
    /// A step of decoding, as the host's [`Attention::forward_append`](crate::Attention::forward_append) has it: writes new keys and
    /// values to the pages of a cache, and attends to all keys that its sequences then have. The result is contiguous, of q's shape.
    ///
    /// * q: `[batch, heads_q, seqlen_q, head_dim]`, or packed `[total_q, heads_q, head_dim]` if the cache has `cu_seqlens_q`.
    /// * k, v: the new keys and values, `[batch, heads_kv, seqlen_new, head_dim]`, or packed `[total_new, heads_kv, head_dim]`.
    /// * rotary: turns q and the new keys by their positions in the sequences.
    /// * pages: k and v of the cache, `[pages, page_size, heads_kv, head_dim]`, each with a storage of its own.
    /// * cache: the sequences after [`KvCache::append`].
    ///
    /// It runs on the CPU, where q and the new tokens are read and the pages are written in place. No gradient goes through it.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use flash_attention_candle::{Attention, FlashAttention, KvCache, Rotary};
    ///
    /// let layer = FlashAttention::new(Attention::new().causal());
    /// let rotary = Rotary::new(16, 10_000.0).unwrap();
    /// let k = Tensor::zeros((4, 8, 1, 16), DType::F32, &Device::Cpu)?; // 4 pages of 8 keys of 1 head
    /// let v = k.zeros_like()?.copy()?;
    /// let mut cache = KvCache::paged([4, 8], &[0, 1, 2, 3], &[0, 0]).unwrap(); // 2 sequences without keys
    /// for seqlen in [5, 1, 1] {
    ///     let x = Tensor::randn(0f32, 1.0, (2, 1, seqlen, 16), &Device::Cpu)?;
    ///     cache = cache.append(&[seqlen as i32; 2]).unwrap();
    ///     let out = layer.forward_append(&x, [&x, &x], Some(&rotary), [&k, &v], &cache)?;
    ///     assert_eq!(out.dims(), x.dims());
    /// }
    /// assert_eq!(cache.keys(0), 7);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// The errors of [`Attention::forward_append`](crate::Attention::forward_append), [`Error::Aliased`] for pages in the storage of
    /// another tensor of the call, and another dtype or device, as candle's error. Nothing has been written then.
    pub fn forward_append(
        &self,
        q: &Tensor,
        [k, v]: [&Tensor; 2],
        rotary: Option<&Rotary>,
        pages: [&Tensor; 2],
        cache: &KvCache,
    ) -> Result<Tensor> {
        let [k_pages, v_pages] = pages;
        let read = [("q", q), ("k", k), ("v", v), ("k_pages", k_pages)];
        for (argument, written, others) in [("k_pages", k_pages, &read[..3]), ("v_pages", v_pages, &read[..])] {
            if let Some(&(other, _)) = others.iter().find(|(_, other)| storage(other) == storage(written)) {
                return Err(wrap(Error::Aliased { argument, other }));
            }
        }
        let op = AppendOp {
            layer: self,
            rotary,
            pages,
            cache,
        };
        rows(q)?.apply_op3_no_bwd(&rows(k)?, &rows(v)?, &op)
    }
}

/// Address of a tensor's storage. Those of two tensors that are there at the same time differ unless they share it.
fn storage(tensor: &Tensor) -> usize {
    std::ptr::from_ref(&*tensor.storage_and_layout().0).addr()
}

struct AppendOp<'a> {
    layer: &'a FlashAttention,
    rotary: Option<&'a Rotary>,
    pages: [&'a Tensor; 2],
    cache: &'a KvCache,
}

impl AppendOp<'_> {
    fn forward<T: Scalar>(&self, inputs: [(&CpuStorage, &Layout); 3]) -> Result<(CpuStorage, Shape)> {
        let device = Device::cpu();
        let [k_pages, v_pages] = self.pages;
        let [q, k, v] = on_host::<T, 3>(inputs)?
            // SAFETY: the slices outlive the call, which returns when its work is done, and are only read.
            .map(|(memory, layout)| unsafe { memory.tensor::<T>(&device, layout) });
        let (q, k, v) = (q?, k?, v?);
        let new = NewKeys::new(&k, &v);
        let new = match self.rotary {
            Some(rotary) => new.rotary(rotary),
            None => new,
        };
        let out = in_place::<T, _>(k_pages, |k_pages, k_layout| {
            in_place::<T, _>(v_pages, |v_pages, v_layout| {
                // SAFETY: the pages' storages are lent to the two closures alone until the call has returned, when its work is done.
                let (mut k_pages, mut v_pages) = unsafe {
                    (
                        k_pages.tensor::<T>(&device, k_layout)?,
                        v_pages.tensor::<T>(&device, v_layout)?,
                    )
                };
                (self.layer.attention())
                    .forward_append(&q, &new, &mut k_pages, &mut v_pages, self.cache)
                    .and_then(|output| output.out.to_vec())
                    .map_err(wrap)
            })
        })?;
        Ok((T::to_cpu_storage_owned(out), inputs[0].1.shape().clone()))
    }
}

impl CustomOp3 for AppendOp<'_> {
    fn name(&self) -> &'static str {
        "flash-attention-append"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let inputs = [(q, q_layout), (k, k_layout), (v, v_layout)];
        with_scalar!(q.dtype(), T => self.forward::<T>(inputs))
    }
}

/// Runs `work` with the memory of a tensor on the CPU, which it may write, and returns its result.
///
/// # Errors
/// The errors of `work`, another dtype than `T`, another device.
fn in_place<T: Scalar, R>(tensor: &Tensor, work: impl Fn(Memory, &Layout) -> Result<R>) -> Result<R> {
    let result = Cell::new(None);
    tensor.inplace_op1(&InPlace(|storage: &mut CpuStorage, layout: &Layout| {
        storage.as_slice::<T>()?; // refuses another dtype
        let memory = match storage {
            CpuStorage::F32(elements) => Memory::written(elements),
            CpuStorage::F16(elements) => Memory::written(elements),
            CpuStorage::BF16(elements) => Memory::written(elements),
            _ => unreachable!("no other dtype is a Scalar"),
        };
        result.set(Some(work(memory, layout)?));
        Ok(())
    }))?;
    match result.into_inner() {
        Some(result) => Ok(result),
        None => candle_core::bail!("an op in place was not run"),
    }
}

struct InPlace<F>(F);

impl<F: Fn(&mut CpuStorage, &Layout) -> Result<()>> InplaceOp1 for InPlace<F> {
    fn name(&self) -> &'static str {
        "flash-attention-in-place"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        (self.0)(storage, layout)
    }
}
