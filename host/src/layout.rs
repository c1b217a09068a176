//! Description of a tensor without its memory: device, dtype, shape, strides and address, which is all that
//! validation and planning need.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::element::DataType;
use crate::error::Error;

/// Identity of a device: a number that no other device of the process has, and the text that names it.
///
/// Two devices may have the same text: each call of [`Device::emulator`](crate::Device::emulator) makes a device with
/// memory of its own.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct DeviceId {
    number: u64,
    text: Arc<str>,
}

impl DeviceId {
    /// Makes a new identity, equal to no other.
    pub(crate) fn new(text: String) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self {
            number: NEXT.fetch_add(1, Ordering::Relaxed),
            text: text.into(),
        }
    }

    /// Returns true for the CPU device, `cpu` or, with its instructions, `cpu:avx2`.
    pub(crate) fn is_cpu(&self) -> bool {
        self.text.split(':').next() == Some("cpu")
    }
}

/// Writes the device's text: `cpu`, `cuda:0`, `emulator:sm_80`.
impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A tensor's device, dtype, shape, strides and address, without the tensor.
///
/// [`Problem::new`](crate::problem::Problem::new) takes these, so a problem of any size can be validated and planned
/// without being allocated. [`Tensor::info`](crate::Tensor::info) returns that of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorInfo {
    device: DeviceId,
    dtype: DataType,
    shape: Vec<usize>,
    strides: Vec<usize>,
    address: u64,
}

/// Largest span of a tensor in bytes: offsets then fit a signed 64-bit integer on every device.
pub(crate) const MAX_BYTES: usize = isize::MAX as usize;

impl TensorInfo {
    /// Describes a tensor. Strides count elements. `address` is the address of the first element, or 0 without
    /// memory.
    ///
    /// # Errors
    /// [`Error::StridesRank`] if shape and strides differ in length, [`Error::SizeOverflow`] if the elements' bytes
    /// cannot be counted or addressed.
    pub fn new(
        device: &DeviceId,
        dtype: impl Into<DataType>,
        shape: impl AsRef<[usize]>,
        strides: impl AsRef<[usize]>,
        address: u64,
    ) -> Result<Self, Error> {
        let (shape, strides) = (shape.as_ref(), strides.as_ref());
        if shape.len() != strides.len() {
            return Err(Error::StridesRank {
                strides: strides.len(),
                rank: shape.len(),
            });
        }
        let info = Self {
            device: device.clone(),
            dtype: dtype.into(),
            shape: shape.to_vec(),
            strides: strides.to_vec(),
            address,
        };
        info.check_size()?;
        Ok(info)
    }

    /// Describes a tensor whose elements lie in order without gaps.
    ///
    /// # Errors
    /// [`Error::SizeOverflow`] if the elements' bytes cannot be counted or addressed.
    pub fn contiguous(
        device: &DeviceId,
        dtype: impl Into<DataType>,
        shape: impl AsRef<[usize]>,
        address: u64,
    ) -> Result<Self, Error> {
        let shape = shape.as_ref();
        Self::new(device, dtype, shape, contiguous_strides(shape), address)
    }

    /// Returns the device of the tensor.
    pub fn device(&self) -> &DeviceId {
        &self.device
    }

    /// Returns the element type.
    pub fn dtype(&self) -> DataType {
        self.dtype
    }

    /// Returns the size of each axis.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Returns the stride of each axis, in elements.
    pub fn strides(&self) -> &[usize] {
        &self.strides
    }

    /// Returns the device address of the first element.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Returns the number of elements.
    pub fn len(&self) -> usize {
        if self.is_empty() {
            0
        } else {
            self.shape.iter().product()
        }
    }

    /// Returns true if the tensor has no elements.
    pub fn is_empty(&self) -> bool {
        self.shape.contains(&0)
    }

    /// Returns true if the elements lie in order without gaps. The stride of an axis of size 1 does not matter.
    pub fn is_contiguous(&self) -> bool {
        let expected = contiguous_strides(&self.shape);
        self.is_empty()
            || self
                .axes()
                .zip(expected)
                .all(|((size, stride), expected)| size == 1 || stride == expected)
    }

    /// Returns the number of elements from the first to the last in memory, both included: the size that the memory
    /// must have.
    pub fn span(&self) -> usize {
        if self.is_empty() {
            0
        } else {
            1 + self.axes().map(|(size, stride)| (size - 1) * stride).sum::<usize>()
        }
    }

    /// Returns [`span`](Self::span) in bytes.
    pub fn span_bytes(&self) -> usize {
        self.span() * self.dtype.bytes()
    }

    /// Returns true if two indices of the tensor may share an element.
    ///
    /// The answer is exact for every tensor that was made from a contiguous one by slicing and reordering axes. A
    /// tensor whose axes interleave in any other way counts as overlapping.
    pub fn overlaps_itself(&self) -> bool {
        let mut axes: Vec<_> = self.axes().filter(|&(size, _)| size > 1).collect();
        axes.sort_unstable_by_key(|&(_, stride)| stride);
        let mut reach = 0; // largest offset within the axes so far
        !self.is_empty()
            && axes.iter().any(|&(size, stride)| {
                let overlaps = stride <= reach;
                reach += (size - 1) * stride;
                overlaps
            })
    }

    /// Returns true if the spans of the two tensors, from first to last element, have a byte in common.
    pub fn shares_bytes_with(&self, other: &Self) -> bool {
        let end = |info: &Self| u128::from(info.address) + info.span_bytes() as u128;
        !self.is_empty()
            && !other.is_empty()
            && u128::from(self.address) < end(other)
            && u128::from(other.address) < end(self)
    }

    /// Determines if two tensors on one device have an element in common.
    ///
    /// They have one if `offset = sum of c * stride` has a solution with each `c` within bounds that the shapes give.
    /// The search goes from the largest stride to the smallest and skips offsets that the smaller strides cannot
    /// reach.
    pub(crate) fn sharing(&self, other: &Self) -> Sharing {
        if !self.shares_bytes_with(other) {
            return Sharing::Apart;
        }
        if self.is_contiguous() && other.is_contiguous() {
            return Sharing::Shared;
        }
        let [of_self, of_other] = [self, other].map(|info| info.dtype.bytes() as i128);
        let offset = i128::from(other.address) - i128::from(self.address);
        // Strides count elements where those lie on one grid, else bytes: then each element is one more axis.
        let one_grid = of_self == of_other && offset % of_self == 0;
        let (offset, units, bytes) = if one_grid {
            (offset / of_self, [1, 1], [1, 1])
        } else {
            (offset, [of_self, of_other], [of_self, of_other])
        };
        let mut terms: Vec<Term> = Vec::new();
        let ends = |info: &Self, of: usize, sign: i128| -> Vec<(i128, i128)> {
            let axes = info
                .axes()
                .map(|(size, stride)| (units[of] * stride as i128, sign * (size as i128 - 1)));
            axes.chain([(1, sign * (bytes[of] - 1))]).collect()
        };
        for (stride, end) in ends(self, 0, 1).into_iter().chain(ends(other, 1, -1)) {
            if stride == 0 || end == 0 {
                continue;
            }
            match terms.iter_mut().find(|term| term.stride == stride) {
                Some(term) if end < 0 => term.low += end,
                Some(term) => term.high += end,
                None => terms.push(Term {
                    stride,
                    low: end.min(0),
                    high: end.max(0),
                }),
            }
        }
        terms.sort_unstable_by_key(|term| std::cmp::Reverse(term.stride));
        let mut steps = 10_000;
        match reaches(offset, &terms, &mut steps) {
            Some(true) => Sharing::Shared,
            Some(false) => Sharing::Apart,
            None => Sharing::Unproven,
        }
    }

    /// Size and stride of each axis.
    fn axes(&self) -> impl Iterator<Item = (usize, usize)> {
        self.shape.iter().copied().zip(self.strides.iter().copied())
    }

    /// Checks that the number of elements and the span can both be counted in bytes. They differ: a stride of 0 makes
    /// the number of elements larger than the span, gaps make it smaller.
    fn check_size(&self) -> Result<(), Error> {
        if self.is_empty() {
            return Ok(());
        }
        let elements = self
            .shape
            .iter()
            .try_fold(1_u128, |product, &size| product.checked_mul(size as u128));
        let span = self.axes().try_fold(1_u128, |sum, (size, stride)| {
            sum.checked_add((size as u128 - 1).checked_mul(stride as u128)?)
        });
        let fits = |count: Option<u128>| {
            let bytes = count?.checked_mul(self.dtype.bytes() as u128)?;
            (bytes <= MAX_BYTES as u128).then_some(bytes)
        };
        match (fits(elements), fits(span)) {
            (Some(_), Some(span)) if u128::from(self.address) + span <= u64::MAX.into() => Ok(()),
            _ => Err(Error::SizeOverflow {
                argument: "shape",
                shape: self.shape.clone(),
                element_bytes: self.dtype.bytes(),
                limit: MAX_BYTES,
            }),
        }
    }

    /// Describes a view of this memory with other axes; the caller keeps its elements within the old span.
    pub(crate) fn view(&self, shape: Vec<usize>, strides: Vec<usize>, offset: usize) -> Self {
        let address = self.address + (offset * self.dtype.bytes()) as u64;
        Self {
            device: self.device.clone(),
            dtype: self.dtype,
            shape,
            strides,
            address,
        }
    }

    /// Describes this tensor at another address.
    pub(crate) fn at(self, address: u64) -> Self {
        Self { address, ..self }
    }
}

/// Relation between the elements of two tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sharing {
    /// They have no element in common.
    Apart,
    /// They have an element in common.
    Shared,
    /// The spans interleave, and the elements could not be proven apart.
    Unproven,
}

/// A stride and the bounds of its coefficient.
struct Term {
    stride: i128,
    low: i128,
    high: i128,
}

/// Determines if the terms can add up to `target`; `None` once the steps are used up.
fn reaches(target: i128, terms: &[Term], steps: &mut u32) -> Option<bool> {
    let Some((term, smaller)) = terms.split_first() else {
        return Some(target == 0);
    };
    let least: i128 = smaller.iter().map(|term| term.low * term.stride).sum();
    let most: i128 = smaller.iter().map(|term| term.high * term.stride).sum();
    // target - c * stride has to lie in least ..= most.
    let first = term.low.max(-(most - target).div_euclid(term.stride));
    let last = term.high.min((target - least).div_euclid(term.stride));
    let mut c = first;
    while c <= last {
        *steps = steps.checked_sub(1)?;
        if reaches(target - c * term.stride, smaller, steps)? {
            return Some(true);
        }
        c += 1;
    }
    Some(false)
}

/// Returns the strides of a tensor whose elements lie in order without gaps.
///
/// The products wrap where the number of elements overflows; [`TensorInfo::new`] refuses such a shape.
pub(crate) fn contiguous_strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1_usize; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis].wrapping_mul(shape[axis].max(1));
    }
    strides
}

#[cfg(test)]
mod tests {
    use flash_attention_kernels::entries::Dtype;

    use super::*;

    fn device() -> DeviceId {
        DeviceId::new("cpu".to_owned())
    }

    fn info(shape: &[usize], strides: &[usize]) -> TensorInfo {
        TensorInfo::new(&device(), Dtype::F32, shape, strides, 64).expect("a small tensor")
    }

    /// Returns the offsets of all elements, in logical order.
    fn offsets(shape: &[usize], strides: &[usize]) -> Vec<usize> {
        let mut offsets = vec![0];
        for (&size, &stride) in shape.iter().zip(strides) {
            offsets = offsets
                .iter()
                .flat_map(|&o| (0..size).map(move |i| o + i * stride))
                .collect();
        }
        offsets
    }

    #[test]
    fn span_reaches_the_last_element() {
        for (shape, strides) in [
            ([2, 3], [3, 1]),
            ([2, 3], [1, 2]),
            ([4, 1], [5, 9]),
            ([2, 2], [0, 1]),
            ([0, 3], [3, 1]),
        ] {
            let last = offsets(&shape, &strides).into_iter().max();
            assert_eq!(
                info(&shape, &strides).span(),
                last.map_or(0, |last| last + 1),
                "{shape:?} {strides:?}"
            );
        }
    }

    #[test]
    fn overlap_is_never_missed() {
        let mut missed = Vec::new();
        let mut refused = 0;
        for code in 0..4_usize.pow(3) * 7_usize.pow(3) {
            let size = |axis: u32| 1 + code / 4_usize.pow(axis) % 4;
            let stride = |axis: u32| code / 64 / 7_usize.pow(axis) % 7;
            let (shape, strides) = ([size(0), size(1), size(2)], [stride(0), stride(1), stride(2)]);
            let mut all = offsets(&shape, &strides);
            all.sort_unstable();
            let count = all.len();
            all.dedup();
            let said = info(&shape, &strides).overlaps_itself();
            if all.len() < count && !said {
                missed.push((shape, strides));
            }
            refused += usize::from(all.len() == count && said);
        }
        assert!(missed.is_empty(), "{missed:?}");
        assert!(refused > 0, "the doc says that interleaved axes are refused");
    }

    #[test]
    fn slices_and_transposes_do_not_overlap() {
        assert!(!info(&[2, 3, 4], &[12, 4, 1]).overlaps_itself());
        assert!(!info(&[2, 4, 3], &[12, 1, 4]).overlaps_itself());
        assert!(!info(&[2, 2, 3], &[12, 4, 1]).overlaps_itself());
        assert!(info(&[2, 3], &[0, 1]).overlaps_itself());
        assert!(info(&[2, 3], &[2, 1]).overlaps_itself());
    }

    #[test]
    fn contiguity_ignores_the_stride_of_a_single_entry() {
        assert!(info(&[2, 1, 3], &[3, 77, 1]).is_contiguous());
        assert!(!info(&[2, 2, 3], &[3, 3, 1]).is_contiguous());
        assert!(!info(&[3, 2], &[1, 3]).is_contiguous());
    }

    #[test]
    fn sizes_that_cannot_be_counted_are_refused() {
        let device = device();
        for shape in [vec![usize::MAX, 2], vec![1 << 62, 1], vec![1 << 40, 1 << 40, 1 << 60]] {
            let error = TensorInfo::contiguous(&device, Dtype::F32, &shape, 0).expect_err("too large");
            assert!(matches!(error, Error::SizeOverflow { .. }), "{error}");
        }
        // Broadcasting makes the span small and the number of elements large; both must be countable.
        assert!(TensorInfo::new(&device, Dtype::F32, [1 << 33, 1 << 33], [0, 0], 0).is_err());
        assert!(TensorInfo::new(&device, Dtype::F16, [2, 8], [usize::MAX, 1], 0).is_err());
        assert!(TensorInfo::contiguous(&device, Dtype::F32, [16], u64::MAX - 15).is_err());
        assert!(TensorInfo::contiguous(&device, Dtype::F32, [usize::MAX, 0, usize::MAX], 0).is_ok());
    }

    #[test]
    fn neighbours_do_not_share_bytes() {
        let first = info(&[4], &[1]);
        let next = first.clone().at(64 + 16);
        let inside = first.clone().at(64 + 12);
        assert!(!first.shares_bytes_with(&next) && !next.shares_bytes_with(&first));
        assert!(first.shares_bytes_with(&inside) && inside.shares_bytes_with(&first));
    }

    #[test]
    fn sharing_is_what_brute_force_says() {
        let mut counts = [0; 2];
        let mut state = 1_u64;
        let mut below = |n: usize| {
            state = state
                .wrapping_mul(6364136223846793005)
                .wrapping_add(1442695040888963407);
            (state >> 33) as usize % n
        };
        for _ in 0..20_000 {
            let [a, b] = [(); 2].map(|()| ([(); 3].map(|()| 1 + below(4)), [(); 3].map(|()| below(13))));
            let shift = below(40);
            let first = offsets(&a.0, &a.1);
            let shared = offsets(&b.0, &b.1).iter().any(|o| first.contains(&(o + shift)));
            let (x, y) = (info(&a.0, &a.1), info(&b.0, &b.1).at(64 + 4 * shift as u64));
            let expected = if shared { Sharing::Shared } else { Sharing::Apart };
            assert_eq!(x.sharing(&y), expected, "{a:?} {b:?} {shift}");
            assert_eq!(y.sharing(&x), expected, "{b:?} {a:?} -{shift}");
            counts[usize::from(shared)] += usize::from(x.shares_bytes_with(&y));
        }
        assert!(counts.iter().all(|&count| count > 1000), "{counts:?}");
    }
}
