//! Parameters of kernels over e4m3 inputs.

use super::{HopperForwardParams, Params};

/// Number of rows of q, k or v that share a scale if each head has more than one.
pub const FP8_SCALE_ROWS: u32 = 64;

/// The scales of a tensor: f32, contiguous `[batch, heads, blocks]`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scales {
    /// Device address of the first scale.
    pub address: u64,
    /// Number of scales of a head: 1, or one for each [`FP8_SCALE_ROWS`] rows.
    pub blocks: u32,
    /// Pads the struct to a multiple of 8 bytes.
    pub reserved: u32,
}

impl Scales {
    /// Returns the address of the scale of a row of a head, counted over all batch entries. Past the last row it is that of the last
    /// block.
    #[inline(always)]
    pub const fn address_of(&self, head: u32, row: u32) -> u64 {
        let (block, last) = (row / FP8_SCALE_ROWS, self.blocks - 1);
        let block = if block < last { block } else { last };
        self.address + (head as u64 * self.blocks as u64 + block as u64) * 4
    }
}

/// Parameters of the forward kernels for Hopper over e4m3 inputs.
///
/// In [`forward`](Self::forward) the maps of q, k and v are of bytes, in boxes of 128 columns, and the strides of values count bytes.
/// The scale is that of the product of the numbers that q and k stand for.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Fp8ForwardParams {
    /// Tensors and sizes.
    pub forward: HopperForwardParams,
    /// Scales of q.
    pub q: Scales,
    /// Scales of k.
    pub k: Scales,
    /// Scales of v.
    pub v: Scales,
    /// Pads the struct to a multiple of 64 bytes.
    pub reserved: [u32; 4],
}

params!(Fp8ForwardParams);

const _: () = {
    assert!(size_of::<Scales>() == 16);
    assert!(size_of::<Fp8ForwardParams>() == size_of::<HopperForwardParams>() + 3 * 16 + 16);
    assert!(size_of::<Fp8ForwardParams>().is_multiple_of(64));
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_has_the_scale_of_its_block() {
        let scales = |blocks| Scales {
            address: 1000,
            blocks,
            reserved: 0,
        };
        for row in [0, 63, 64, 1000] {
            assert_eq!(scales(1).address_of(5, row), 1000 + 5 * 4);
        }
        let of_three = [0, 63, 64, 127, 128, 191, 192, 5000].map(|row| scales(3).address_of(2, row));
        assert_eq!(of_three.map(|address| (address - 1000) / 4), [6, 6, 7, 7, 8, 8, 8, 8]);
    }
}
