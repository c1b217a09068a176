#![doc = include_str!("../README.md")]

mod append;
#[cfg(feature = "cuda")]
mod cuda;
mod dense;
mod error;
mod forward;
mod op;
mod options;
mod paged;
mod sdpa;
mod varlen;
mod views;

pub use dense::{
    FlashAttn, flash_attn, flash_attn_alibi, flash_attn_alibi_windowed, flash_attn_alibi_windowed_softcap,
    flash_attn_windowed,
};
pub use error::Error;
pub use flash_attention::{self, Attention, KvCache, Rotary};
pub use sdpa::{FlashAttention, sdpa};
pub use varlen::{
    flash_attn_varlen, flash_attn_varlen_alibi, flash_attn_varlen_alibi_windowed,
    flash_attn_varlen_alibi_windowed_softcap, flash_attn_varlen_paged_windowed, flash_attn_varlen_windowed,
};
