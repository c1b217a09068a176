//! Launches that move the rows of tokens from one tensor to another, turned by a rotary embedding or as they are.

use std::sync::Arc;

#[cfg(any(feature = "cuda", feature = "emulator"))]
use flash_attention_kernels::abi::Params;
use flash_attention_kernels::abi::{RotaryParams, TensorMap, WorkLists};
use flash_attention_kernels::entries::{self, Arch, Dtype, Pass};
use flash_attention_kernels::work::TokenMove;

use super::lists::{self, Listed};
use super::{Launch, MAX_BLOCKS, Template};
use crate::error::Error;
use crate::plan::pass::PassType;
use crate::plan::rows::RowCopies;
use crate::plan::tile_map::TileMap;

/// The moves of rows from one tensor to another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rotary;

impl PassType for Rotary {
    type Parameters = RotaryParams;
    type Results = ();
    const NAME: &'static str = "rotary";
}

impl Template<()> for RotaryParams {
    fn placed<E>(self, _: &(), _: RowCopies, _: u64, _: impl Fn(&TileMap) -> Result<TensorMap, E>) -> Result<Self, E> {
        Ok(self)
    }

    #[cfg(any(feature = "cuda", feature = "emulator"))]
    fn bytes(&self) -> &[u8] {
        self.as_bytes()
    }

    #[cfg(any(feature = "cuda", feature = "emulator"))]
    fn with_lists(mut self, addresses: &[u64]) -> Self {
        if let [tokens, angles @ ..] = addresses {
            self.tokens = *tokens;
            self.angles = angles.first().copied().unwrap_or(0);
        }
        self
    }
}

impl<P: PassType> Launch<P> {
    /// Makes the launch of a block for each of these tokens, with rows of this head_dim. Angles are those of
    /// [`RotaryParams::angles`], unless no pair is turned.
    ///
    /// # Errors
    /// [`Error::GridTooLarge`].
    pub(super) fn moving(
        dtype: Dtype,
        head_dim: u32,
        params: P::Parameters,
        tokens: &[TokenMove],
        angles: Option<Arc<[u8]>>,
    ) -> Result<Self, Error> {
        let entry = entries::find(Pass::Rotary, Arch::Sm80, dtype, false, head_dim);
        let entry = entry.expect("compiled for every dtype and head_dim");
        let blocks = u32::try_from(tokens.len()).ok().filter(|&blocks| blocks <= MAX_BLOCKS);
        let blocks = blocks.ok_or(Error::GridTooLarge {
            blocks: tokens.len() as u128,
            limit: MAX_BLOCKS,
        })?;
        let listed = Listed {
            content: lists::bytes(tokens).into(),
            table: angles,
            work: WorkLists::NONE,
            lists_of_block: 1,
            blocks,
            streamed_rows: 0,
        };
        Ok(Self {
            listed: Some(listed),
            ..Self::new(entry, [blocks, 1, 1], params)
        })
    }
}

impl Launch<Rotary> {
    /// Makes the launch of a block for each of these tokens, of tensors and pairs that the parameters describe. Angles are those of
    /// [`RotaryParams::angles`], unless no pair is turned.
    ///
    /// # Errors
    /// [`Error::GridTooLarge`].
    pub(crate) fn rotary(
        dtype: Dtype,
        params: RotaryParams,
        tokens: &[TokenMove],
        angles: Option<Arc<[u8]>>,
    ) -> Result<Self, Error> {
        Self::moving(dtype, params.head_dim, params, tokens, angles)
    }

    /// The parameters of a launch of [`rotary`](Self::rotary), without the addresses of its lists.
    pub(crate) fn rotary_params(&self) -> &RotaryParams {
        &self.params
    }
}
