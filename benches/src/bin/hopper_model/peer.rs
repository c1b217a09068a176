//! The calls of FlashAttention-3 whose speeds are published, taken apart as the predicted calls are: steps of the longest block, and
//! the kernels around them.

use benches::row::Pass;

use crate::SEQLENS;
use crate::hardware::{MULTIPROCESSORS, TENSOR, hertz, seconds_around};

/// Tokens of the published calls that are taken apart; the batch is 1.
const SEQLEN: u32 = SEQLENS[SEQLENS.len() - 1] as u32;

/// Heads times head_dim of a published call.
const HIDDEN: u32 = 2048;

/// The calls whose speeds FlashAttention-3's paper publishes in figures 5 and 6: H100, f16, 16384 tokens in all.
pub const CALLS: [Published; 8] = [
    published(Pass::Forward, 64, false, [192, 192], [333, 392, 460, 476, 496, 497]),
    published(Pass::Forward, 64, true, [192, 128], [197, 265, 371, 420, 460, 473]),
    published(Pass::Forward, 128, false, [128, 176], [467, 565, 625, 638, 646, 648]),
    published(Pass::Forward, 128, true, [128, 128], [292, 423, 521, 579, 602, 616]),
    published(Pass::Forward, 256, false, [128, 80], [482, 639, 707, 736, 746, 756]),
    published(Pass::Forward, 256, true, [128, 80], [286, 427, 537, 612, 628, 642]),
    published(Pass::Backward, 64, false, [128, 128], [272, 363, 422, 453, 472, 474]),
    published(Pass::Backward, 128, false, [80, 128], [316, 424, 501, 542, 559, 561]),
];

const fn published(pass: Pass, head_dim: u32, causal: bool, tile: [u32; 2], speeds: [u32; SEQLENS.len()]) -> Published {
    Published {
        pass,
        head_dim,
        causal,
        tile,
        speeds,
    }
}

/// A call of FlashAttention-3.
#[derive(Clone, Copy)]
pub struct Published {
    pub pass: Pass,
    pub head_dim: u32,
    pub causal: bool,
    /// Queries and keys of a tile, from its source.
    pub tile: [u32; 2],
    /// TFLOP/s at each of [`SEQLENS`].
    pub speeds: [u32; SEQLENS.len()],
}

impl Published {
    /// Returns the published call of a pass, if there is one.
    pub fn of(pass: Pass, head_dim: u32, causal: bool) -> Option<&'static Self> {
        CALLS
            .iter()
            .find(|call| (call.pass, call.head_dim, call.causal) == (pass, head_dim, causal))
    }

    /// Returns the published TFLOP/s at 16384 tokens.
    pub fn tflops(&self) -> f64 {
        f64::from(self.speeds[SEQLENS.len() - 1])
    }

    /// Returns the cycles on the tensor cores, at boost clock, of a step of so many queries and keys.
    pub fn tensor_cycles(&self, [queries, keys]: [f64; 2]) -> f64 {
        let products = if self.pass == Pass::Forward { 2.0 } else { 5.0 };
        products * 2.0 * queries * keys * f64::from(self.head_dim) / TENSOR.1
    }

    /// Returns the cycles at boost clock that the published speed gives a step.
    pub fn step_cycles(&self) -> f64 {
        (self.flops() / (self.tflops() * 1e12) - self.around()) * hertz() / self.longest()
    }

    /// Returns the TFLOP/s of the call if a step takes so many cycles at boost clock.
    pub fn speed(&self, step_cycles: f64) -> f64 {
        self.flops() / (self.longest() * step_cycles / hertz() + self.around()) / 1e12
    }

    fn heads(&self) -> u32 {
        HIDDEN / self.head_dim
    }

    fn flops(&self) -> f64 {
        let products = if self.pass == Pass::Forward { 2.0 } else { 5.0 };
        let full = products * 2.0 * f64::from(HIDDEN) * f64::from(SEQLEN).powi(2);
        if self.causal { full / 2.0 } else { full }
    }

    /// Returns the steps of the longest block, with one more for each of its tiles. A causal mask's tiles are dealt out as they come, so
    /// all blocks are as long as the mean.
    fn longest(&self) -> f64 {
        let [queries, keys] = self.tile;
        let (own, streamed) = match self.pass {
            Pass::Forward => (queries, keys),
            _ => (keys, queries),
        };
        let tiles = SEQLEN.div_ceil(own);
        if !self.causal {
            let rounds = (tiles * self.heads()).div_ceil(MULTIPROCESSORS.1 as u32);
            return f64::from(rounds * (SEQLEN.div_ceil(streamed) + 1));
        }
        let steps = |tile: u32| ((tile + 1) * own).min(SEQLEN).div_ceil(streamed) + 1;
        let all: u32 = (0..tiles).map(steps).sum();
        f64::from(all * self.heads()) / MULTIPROCESSORS.1
    }

    /// Returns the seconds of the kernels before and after a backward pass, which accumulate dQ in f32.
    fn around(&self) -> f64 {
        let rows = f64::from(self.heads() * SEQLEN);
        let head_dim = f64::from(self.head_dim);
        seconds_around(self.pass, rows * (head_dim + 2.0) * 4.0, rows * head_dim * 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_by_hand() {
        let call = |causal| Published::of(Pass::Forward, 128, causal).expect("published");
        // 16 heads of 128 tiles are 15.5 rounds of 132; 94 steps of 176 keys and one more.
        assert_eq!(call(false).longest(), 16.0 * 95.0);
        // 1 + 2 + ... + 128 steps, and one more for each tile.
        assert_eq!(call(true).longest(), 16.0 * (8256.0 + 128.0) / 132.0);
        let call = call(false);
        assert!((call.speed(call.step_cycles()) - call.tflops()).abs() < 1e-9);
    }
}
