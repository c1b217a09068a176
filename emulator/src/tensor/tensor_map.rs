//! Tensor maps: the 128 opaque bytes that `cp.async.bulk.tensor` takes (manual section "Tensors"; driver function
//! `cuTensorMapEncodeTiled`).
//!
//! The hardware's encoding is not public, so this encoding is the emulator's own. Its first bytes are a mark, so a
//! map of a driver is recognised as foreign instead of being misread. The checks and their limits are those of the
//! driver's documentation; each broken rule is an error that names the argument, the value and the limit. Copies
//! through a map are in [`super::tile_copy`].
//!
//! Dimension 0 is the innermost: its elements are contiguous, and `strides` starts with dimension 1.

use super::swizzle::Swizzle;

pub use super::tensor_map_types::{
    ElementType, Field, Fill, Interleave, L2Promotion, TensorMapError, swizzle_from_number,
};

/// Size of a tensor map in bytes.
pub const TENSOR_MAP_BYTES: usize = 128;
/// Alignment of a tensor map in memory.
pub const TENSOR_MAP_ALIGNMENT: usize = 64;
/// Alignment that a tile's shared-memory address must have.
pub const TILE_ALIGNMENT: u32 = 128;
/// Most dimensions of a tensor.
pub const MAX_RANK: usize = 5;

const MARK: [u8; 8] = *b"\x7fptxTMA1";

/// Arguments of [`TensorMap::tiled`], named as those of `cuTensorMapEncodeTiled`.
#[derive(Clone, Copy, Debug)]
pub struct Tiled<'a> {
    /// Element type.
    pub element: ElementType,
    /// Global address of element (0, 0, …).
    pub address: u64,
    /// Number of elements in each dimension, innermost first; the length is the rank.
    pub dims: &'a [u64],
    /// Stride of each dimension from 1 up, in bytes.
    pub strides: &'a [u64],
    /// Size of the box in elements, innermost first.
    pub box_dims: &'a [u32],
    /// Steps within the box, innermost first; usually all 1. Entry 0 is ignored without interleave.
    pub element_strides: &'a [u32],
    /// Interleaved layout.
    pub interleave: Interleave,
    /// Shared-memory swizzle.
    pub swizzle: Swizzle,
    /// L2 promotion.
    pub l2_promotion: L2Promotion,
    /// Out-of-bounds fill.
    pub fill: Fill,
}

/// A checked tensor map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap {
    pub(super) element: ElementType,
    pub(super) rank: usize,
    pub(super) address: u64,
    pub(super) dims: [u64; MAX_RANK],
    pub(super) strides: [u64; MAX_RANK],
    pub(super) box_dims: [u32; MAX_RANK],
    pub(super) element_strides: [u32; MAX_RANK],
    pub(super) interleave: Interleave,
    pub(super) swizzle: Swizzle,
    l2_promotion: L2Promotion,
    pub(super) fill: Fill,
}

fn check_length(argument: &'static str, length: usize, expected: usize) -> Result<(), TensorMapError> {
    if length == expected {
        Ok(())
    } else {
        Err(TensorMapError::Length {
            argument,
            length,
            expected,
        })
    }
}

fn check_range(
    argument: &'static str,
    values: impl Iterator<Item = u64>,
    min: u64,
    max: u64,
) -> Result<(), TensorMapError> {
    for (index, value) in values.enumerate() {
        if !(min..=max).contains(&value) {
            return Err(TensorMapError::Range {
                argument,
                index,
                value,
                min,
                max,
            });
        }
    }
    Ok(())
}

fn check_multiple(
    argument: &'static str,
    values: impl Iterator<Item = u64>,
    multiple: u64,
) -> Result<(), TensorMapError> {
    for (index, value) in values.enumerate() {
        if !value.is_multiple_of(multiple) {
            return Err(TensorMapError::Multiple {
                argument,
                index,
                value,
                multiple,
            });
        }
    }
    Ok(())
}

/// Puts `values` in the first entries and `rest` in the others.
fn padded<T: Copy>(values: &[T], rest: T) -> [T; MAX_RANK] {
    let mut out = [rest; MAX_RANK];
    out[..values.len()].copy_from_slice(values);
    out
}

impl TensorMap {
    /// Makes a map for tile mode. Maps for im2col mode are not supported.
    ///
    /// # Errors
    ///
    /// A [`TensorMapError`] for the first rule broken, with the argument, its value and the limit.
    pub fn tiled(arguments: &Tiled<'_>) -> Result<TensorMap, TensorMapError> {
        let Tiled {
            element,
            address,
            dims,
            strides,
            box_dims,
            element_strides,
            interleave,
            swizzle,
            ..
        } = *arguments;
        let rank = dims.len();
        let min = if interleave == Interleave::None { 1 } else { 3 };
        if !(min..=MAX_RANK).contains(&rank) {
            return Err(TensorMapError::Rank { rank, min });
        }
        check_length("globalStrides", strides.len(), rank - 1)?;
        check_length("boxDim", box_dims.len(), rank)?;
        check_length("elementStrides", element_strides.len(), rank)?;
        let alignment = if interleave == Interleave::B32 { 32 } else { 16 };
        check_multiple("globalAddress", [address].into_iter(), alignment)?;
        check_range("globalDim", dims.iter().copied(), 1, 1 << 32)?;
        check_multiple("globalStrides", strides.iter().copied(), alignment)?;
        check_range("globalStrides", strides.iter().copied(), 0, (1 << 40) - 1)?;
        check_range("boxDim", box_dims.iter().map(|&x| x.into()), 1, 256)?;
        let bytes = u64::from(box_dims[0]) * u64::from(element.bytes());
        if interleave == Interleave::None {
            if !bytes.is_multiple_of(16) {
                return Err(TensorMapError::InnerBytes { bytes });
            }
            let span = u64::from(swizzle.span());
            if swizzle != Swizzle::None && bytes > span {
                return Err(TensorMapError::InnerExceedsSwizzle { bytes, span });
            }
        }
        check_range("elementStrides", element_strides.iter().map(|&x| x.into()), 1, 8)?;
        if interleave == Interleave::B32 && swizzle != Swizzle::B32 {
            return Err(TensorMapError::InterleaveSwizzle { swizzle });
        }
        if arguments.fill == Fill::Nan && !element.is_float() {
            return Err(TensorMapError::NanFill { element });
        }
        let mut all_strides = [0; MAX_RANK];
        all_strides[0] = element.bytes().into();
        all_strides[1..rank].copy_from_slice(strides);
        let mut steps = padded(element_strides, 1);
        if interleave == Interleave::None {
            steps[0] = 1;
        }
        Ok(TensorMap {
            element,
            rank,
            address,
            dims: padded(dims, 1),
            strides: all_strides,
            box_dims: padded(box_dims, 1),
            element_strides: steps,
            interleave,
            swizzle,
            l2_promotion: arguments.l2_promotion,
            fill: arguments.fill,
        })
    }

    /// Returns the 128 bytes of the map.
    pub fn encode(&self) -> [u8; TENSOR_MAP_BYTES] {
        let mut out = Vec::with_capacity(TENSOR_MAP_BYTES);
        out.extend(MARK);
        let swizzle = match self.swizzle {
            Swizzle::None => 0,
            Swizzle::B32 => 1,
            Swizzle::B64 => 2,
            Swizzle::B128 => 3,
        };
        let modes = [self.interleave as u8, swizzle, self.l2_promotion as u8, self.fill as u8];
        out.extend([
            self.rank as u8,
            self.element as u8,
            modes[0],
            modes[1],
            modes[2],
            modes[3],
            0,
            0,
        ]);
        out.extend(self.address.to_le_bytes());
        out.extend(self.dims.iter().flat_map(|d| ((d - 1) as u32).to_le_bytes()));
        out.extend(self.strides[1..].iter().flat_map(|s| s.to_le_bytes()));
        out.extend(self.box_dims.iter().flat_map(|b| (*b as u16).to_le_bytes()));
        out.extend(self.element_strides.iter().map(|s| *s as u8));
        let mut bytes = [0; TENSOR_MAP_BYTES];
        bytes[..out.len()].copy_from_slice(&out);
        bytes
    }

    /// Decodes the 128 bytes and checks them by every rule again, since a program may have changed them.
    ///
    /// # Errors
    ///
    /// [`TensorMapError::Foreign`] if the mark or an enumerated field is not of this emulator, else the rule broken.
    pub fn decode(bytes: &[u8; TENSOR_MAP_BYTES]) -> Result<TensorMap, TensorMapError> {
        let foreign = TensorMapError::Foreign;
        if bytes[..8] != MARK {
            return Err(foreign);
        }
        let rank = usize::from(bytes[8]);
        if !(1..=MAX_RANK).contains(&rank) {
            return Err(foreign);
        }
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let dims: [u64; 5] = std::array::from_fn(|i| (word(24 + 4 * i) & 0xffff_ffff) + 1);
        let strides: [u64; 4] = std::array::from_fn(|i| word(44 + 8 * i));
        let box_dims: [u32; 5] = std::array::from_fn(|i| (word(76 + 2 * i) & 0xffff) as u32);
        let element_strides: [u32; 5] = std::array::from_fn(|i| bytes[86 + i].into());
        TensorMap::tiled(&Tiled {
            element: ElementType::from_number(bytes[9].into()).map_err(|_| foreign)?,
            address: word(16),
            dims: &dims[..rank],
            strides: &strides[..rank - 1],
            box_dims: &box_dims[..rank],
            element_strides: &element_strides[..rank],
            interleave: *[Interleave::None, Interleave::B16, Interleave::B32]
                .get(usize::from(bytes[10]))
                .ok_or(foreign)?,
            swizzle: swizzle_from_number(bytes[11].into()).map_err(|_| foreign)?,
            l2_promotion: *[
                L2Promotion::None,
                L2Promotion::B64,
                L2Promotion::B128,
                L2Promotion::B256,
            ]
            .get(usize::from(bytes[12]))
            .ok_or(foreign)?,
            fill: *[Fill::Zero, Fill::Nan].get(usize::from(bytes[13])).ok_or(foreign)?,
        })
    }

    /// Changes one field of the 128 bytes, as `tensormap.replace` does. Bytes that are all zero become a map.
    ///
    /// # Errors
    ///
    /// [`TensorMapError::Foreign`] if the bytes are neither zero nor a map of this emulator,
    /// [`TensorMapError::Range`] or [`TensorMapError::Unsupported`] if the field cannot hold the value. The fields
    /// together are checked when the map is used.
    pub fn replace(bytes: &mut [u8; TENSOR_MAP_BYTES], field: Field, value: u64) -> Result<(), TensorMapError> {
        if bytes[..8] != MARK && bytes.iter().any(|b| *b != 0) {
            return Err(TensorMapError::Foreign);
        }
        bytes[..8].copy_from_slice(&MARK);
        let range = |argument, max| check_range(argument, [value].into_iter(), 0, max);
        let mut put = |at: usize, n: usize, value: u64| bytes[at..at + n].copy_from_slice(&value.to_le_bytes()[..n]);
        match field {
            Field::GlobalAddress => put(16, 8, value),
            Field::Rank => {
                range("rank", MAX_RANK as u64 - 1)?;
                put(8, 1, value + 1);
            }
            // A size of 2^32 is written as 0.
            Field::GlobalDim(n) => put(24 + 4 * usize::from(n), 4, value.wrapping_sub(1) & 0xffff_ffff),
            Field::GlobalStride(n) => put(44 + 8 * usize::from(n), 8, value),
            Field::BoxDim(n) => {
                range("box_dim", 256)?;
                put(76 + 2 * usize::from(n), 2, value);
            }
            Field::ElementStride(n) => {
                range("element_stride", 255)?;
                put(86 + usize::from(n), 1, value);
            }
            Field::ElementType => put(9, 1, ElementType::from_ptx(value)? as u64),
            Field::Interleave => {
                range("interleave_layout", 2)?;
                put(10, 1, value);
            }
            Field::Swizzle => {
                range("swizzle_mode", 3)?;
                put(11, 1, value);
            }
            Field::Fill => {
                range("fill_mode", 1)?;
                put(13, 1, value);
            }
        }
        Ok(())
    }

    /// Returns the number of dimensions.
    pub const fn rank(&self) -> usize {
        self.rank
    }

    /// Returns the element type.
    pub const fn element(&self) -> ElementType {
        self.element
    }

    /// Returns the out-of-bounds fill.
    pub const fn fill(&self) -> Fill {
        self.fill
    }

    /// Returns the swizzle mode.
    pub const fn swizzle(&self) -> Swizzle {
        self.swizzle
    }

    /// Returns this map with another address (`cuTensorMapReplaceAddress`).
    ///
    /// # Errors
    ///
    /// [`TensorMapError::Multiple`] if the address is not aligned as the map needs.
    pub fn with_address(self, address: u64) -> Result<TensorMap, TensorMapError> {
        let alignment = if self.interleave == Interleave::B32 { 32 } else { 16 };
        check_multiple("globalAddress", [address].into_iter(), alignment)?;
        Ok(TensorMap { address, ..self })
    }
}

#[cfg(test)]
#[path = "tensor_map_tests.rs"]
mod tests;
