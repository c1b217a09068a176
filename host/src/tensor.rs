//! Tensors: memory of a device with a shape and strides.
//!
//! Cloning a tensor is cheap. Views share its memory, as in candle: `transpose`, `narrow` and `select` move no data,
//! so tensors in `[batch, seqlen, heads, head_dim]` order and packed QKV are used in place.

use std::any::Any;
use std::marker::PhantomData;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use zerocopy::IntoBytes;

use crate::device::Device;
use crate::element::{DataType, Scalar};
use crate::error::Error;
use crate::layout::{TensorInfo, contiguous_strides};

/// A tensor of `T` in a device's memory.
///
/// Attention takes `[batch, heads, seqlen, head_dim]` with a contiguous last axis and any other strides; score
/// programs read tables of any shape.
pub struct Tensor<T: Scalar> {
    info: TensorInfo,
    storage: Arc<Storage>,
    element: PhantomData<T>,
}

/// A range of device memory, freed when the last tensor that uses it is dropped.
pub(crate) struct Storage {
    device: Device,
    address: u64,
    bytes: usize,
    ownership: Ownership,
    /// Read-locked while a device reads the memory and write-locked while it writes. This keeps two threads with
    /// clones of one tensor from racing, although the CPU device accesses the memory through plain pointers.
    lock: RwLock<()>,
}

enum Ownership {
    /// Memory that this library allocated and has to free.
    Ours,
    /// Memory of the caller. The owner, if given, is dropped with the storage.
    Foreign(Option<Arc<dyn Any + Send + Sync>>),
}

impl Drop for Storage {
    fn drop(&mut self) {
        match &self.ownership {
            Ownership::Ours if self.bytes > 0 => {
                // SAFETY: `Storage::new` got the address from `alloc(bytes)`, and this is the only free of it.
                unsafe { self.device.free(self.address, self.bytes) };
            }
            // Its owner may free the memory at once, so the device's work on it has to finish first. An error of that
            // work is reported again to the caller who reads its result.
            Ownership::Foreign(Some(_)) => drop(self.device.synchronize()),
            Ownership::Ours | Ownership::Foreign(None) => {}
        }
    }
}

impl Storage {
    fn new(device: &Device, bytes: usize) -> Result<Self, Error> {
        let address = if bytes == 0 { 0 } else { device.alloc(bytes)? };
        Ok(Self {
            device: device.clone(),
            address,
            bytes,
            ownership: Ownership::Ours,
            lock: RwLock::new(()),
        })
    }

    pub(crate) fn read(&self) -> RwLockReadGuard<'_, ()> {
        self.lock.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, ()> {
        self.lock.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T: Scalar> Tensor<T> {
    /// Makes a contiguous tensor with a copy of `data`, in row-major order.
    ///
    /// # Errors
    /// [`Error::DataLength`] if `data` does not have exactly as many elements as the shape, [`Error::SizeOverflow`],
    /// [`Error::OutOfMemory`], or an error of the device's driver.
    pub fn from_slice(device: &Device, shape: impl AsRef<[usize]>, data: &[T]) -> Result<Self, Error> {
        let info = TensorInfo::contiguous(device.id(), T::DATA_TYPE, shape, 0)?;
        if data.len() != info.len() {
            return Err(Error::DataLength {
                len: data.len(),
                expected: info.len(),
                shape: info.shape().to_vec(),
            });
        }
        Self::uploaded(device, info, data)
    }

    /// Makes a strided tensor with a copy of `data`: element `[i, j, …]` is at `i * strides[0] + j * strides[1] + …`.
    ///
    /// Strides count elements. A stride of 0 repeats one entry along its axis without repeating it in memory.
    ///
    /// # Errors
    /// [`Error::StridesRank`], [`Error::DataLength`] if `data` ends before the last element, [`Error::SizeOverflow`],
    /// [`Error::OutOfMemory`], or an error of the device's driver.
    pub fn from_slice_strided(
        device: &Device,
        shape: impl AsRef<[usize]>,
        strides: impl AsRef<[usize]>,
        data: &[T],
    ) -> Result<Self, Error> {
        let info = TensorInfo::new(device.id(), T::DATA_TYPE, shape, strides, 0)?;
        match data.get(..info.span()) {
            Some(data) => Self::uploaded(device, info, data),
            None => Err(Error::DataLength {
                len: data.len(),
                expected: info.span(),
                shape: info.shape().to_vec(),
            }),
        }
    }

    /// Makes a contiguous tensor with undefined content, to be written before it is read.
    ///
    /// # Errors
    /// [`Error::SizeOverflow`], [`Error::OutOfMemory`], or an error of the device's driver.
    pub fn empty(device: &Device, shape: impl AsRef<[usize]>) -> Result<Self, Error> {
        Self::allocated(device, TensorInfo::contiguous(device.id(), T::DATA_TYPE, shape, 0)?)
    }

    /// Makes a contiguous tensor of zeros.
    ///
    /// # Errors
    /// The errors of [`empty`](Self::empty).
    pub fn zeros(device: &Device, shape: impl AsRef<[usize]>) -> Result<Self, Error> {
        let tensor = Self::empty(device, shape)?;
        if tensor.storage.bytes > 0 {
            let _guard = tensor.storage.write();
            // SAFETY: the storage was just allocated with this size, and nothing else uses it.
            unsafe { device.backend().zero(tensor.storage.address, tensor.storage.bytes)? };
        }
        Ok(tensor)
    }

    /// Makes a tensor in device memory of the caller, which is used in place and never freed.
    ///
    /// `address` is a device address on a GPU, a pointer on the CPU. `owner`, if given, is dropped once nothing uses
    /// the memory any more: pass the handle of the buffer, and the buffer lives as long as it must.
    ///
    /// # Errors
    /// [`Error::StridesRank`], [`Error::SizeOverflow`], or [`Error::Address`] if the address is null or not a
    /// multiple of the element's size.
    ///
    /// # Safety
    /// - All of the tensor's elements lie in initialised memory of `device`, which stays allocated until `owner` is
    ///   dropped. Without an owner, it stays until the tensor and all its clones and views are dropped and
    ///   [`Device::synchronize`] has returned.
    /// - Other code that writes the memory finishes before this device's work on it is launched. Other code that
    ///   reads what is written through this tensor waits for this device first, and so does code that writes the
    ///   memory later.
    pub unsafe fn from_raw_parts(
        device: &Device,
        address: u64,
        shape: impl AsRef<[usize]>,
        strides: impl AsRef<[usize]>,
        owner: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Result<Self, Error> {
        let info = TensorInfo::new(device.id(), T::DATA_TYPE, shape, strides, address)?;
        let align = T::DATA_TYPE.bytes();
        if !info.is_empty() && (address == 0 || !address.is_multiple_of(align as u64)) {
            return Err(Error::Address { address, align });
        }
        let storage = Storage {
            device: device.clone(),
            address,
            bytes: info.span_bytes(),
            ownership: Ownership::Foreign(owner),
            lock: RwLock::new(()),
        };
        Ok(Self {
            info,
            storage: Arc::new(storage),
            element: PhantomData,
        })
    }

    /// Copies all elements to the host, in row-major order. Waits for the work that produces them.
    ///
    /// # Errors
    /// [`Error::Driver`] or [`Error::Launch`] if that work failed; [`Error::OutOfMemory`] if the host cannot reserve
    /// the elements, as for a stride of 0 along a huge axis.
    pub fn to_vec(&self) -> Result<Vec<T>, Error> {
        let mut span = reserved(self.info.span())?;
        span.resize(self.info.span(), T::default());
        if !span.is_empty() {
            let _guard = self.storage.read();
            // SAFETY: every view keeps its span within its storage, and the guard keeps out writers.
            unsafe {
                self.device()
                    .backend()
                    .download(self.info.address(), span.as_mut_bytes())?
            };
        }
        if self.info.is_contiguous() {
            return Ok(span);
        }
        let mut elements = reserved(self.info.len())?;
        let mut index = vec![0; self.shape().len()];
        for _ in 0..self.info.len() {
            let offset: usize = index.iter().zip(self.strides()).map(|(i, stride)| i * stride).sum();
            elements.push(span[offset]);
            for axis in (0..index.len()).rev() {
                index[axis] += 1;
                if index[axis] < self.shape()[axis] {
                    break;
                }
                index[axis] = 0;
            }
        }
        Ok(elements)
    }

    /// Returns these elements in order and without gaps: a clone if they lie so already, else a copy made through the
    /// host.
    ///
    /// # Errors
    /// The errors of [`to_vec`](Self::to_vec) and [`from_slice`](Self::from_slice).
    pub fn contiguous(&self) -> Result<Self, Error> {
        if self.info.is_contiguous() {
            return Ok(self.clone());
        }
        Self::from_slice(self.device(), self.shape(), &self.to_vec()?)
    }

    /// Returns a view with two axes exchanged: `transpose(1, 2)` turns `[batch, seqlen, heads, head_dim]` into
    /// `[batch, heads, seqlen, head_dim]` without moving data.
    ///
    /// # Errors
    /// [`Error::Axis`] if the tensor has no such axis.
    pub fn transpose(&self, first: usize, second: usize) -> Result<Self, Error> {
        self.check_axis(first)?;
        self.check_axis(second)?;
        let (mut shape, mut strides) = (self.shape().to_vec(), self.strides().to_vec());
        shape.swap(first, second);
        strides.swap(first, second);
        Ok(self.view(shape, strides, 0))
    }

    /// Returns a view of the entries `start .. start + len` of an axis.
    ///
    /// # Errors
    /// [`Error::Axis`] if the tensor has no such axis, [`Error::Range`] if the axis is shorter.
    pub fn narrow(&self, axis: usize, start: usize, len: usize) -> Result<Self, Error> {
        self.check_axis(axis)?;
        let size = self.shape()[axis];
        if start.checked_add(len).is_none_or(|end| end > size) {
            return Err(Error::Range { axis, start, len, size });
        }
        let mut shape = self.shape().to_vec();
        shape[axis] = len;
        let empty = shape.contains(&0);
        Ok(self.view(
            shape,
            self.strides().to_vec(),
            if empty { 0 } else { start * self.strides()[axis] },
        ))
    }

    /// Returns a view of entry `index` of an axis, without that axis: `select(2, 0)` takes q out of `[batch, seqlen,
    /// 3, heads, head_dim]`.
    ///
    /// # Errors
    /// The errors of [`narrow`](Self::narrow).
    pub fn select(&self, axis: usize, index: usize) -> Result<Self, Error> {
        let one = self.narrow(axis, index, 1)?;
        let (mut shape, mut strides) = (one.shape().to_vec(), one.strides().to_vec());
        shape.remove(axis);
        strides.remove(axis);
        Ok(one.view(shape, strides, 0))
    }

    /// Returns these elements with an axis of one entry before axis `axis`: `unsqueeze(0)` makes a batch of one.
    ///
    /// # Errors
    /// [`Error::Axis`] if `axis` is larger than the number of axes.
    pub fn unsqueeze(&self, axis: usize) -> Result<Self, Error> {
        let (mut shape, mut strides) = (self.shape().to_vec(), self.strides().to_vec());
        if axis > shape.len() {
            return Err(Error::Axis {
                axis,
                rank: shape.len(),
            });
        }
        let stride = shape[axis..].first().map_or(1, |size| size * strides[axis]);
        shape.insert(axis, 1);
        strides.insert(axis, stride);
        Ok(self.view(shape, strides, 0))
    }

    /// Returns the device of the tensor.
    pub fn device(&self) -> &Device {
        &self.storage.device
    }

    /// Returns the element type.
    pub fn dtype(&self) -> DataType {
        T::DATA_TYPE
    }

    /// Returns the size of each axis.
    pub fn shape(&self) -> &[usize] {
        self.info.shape()
    }

    /// Returns the stride of each axis, in elements.
    pub fn strides(&self) -> &[usize] {
        self.info.strides()
    }

    /// Returns the device address of the first element, for code that shares the memory. On the CPU it is a pointer.
    pub fn address(&self) -> u64 {
        self.info.address()
    }

    /// Returns the description of the tensor, without its memory.
    pub fn info(&self) -> &TensorInfo {
        &self.info
    }

    pub(crate) fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Returns the memory, which stays allocated as long as the returned value exists.
    pub(crate) fn owner(&self) -> Arc<Storage> {
        self.storage.clone()
    }

    /// Makes a tensor over memory that the caller guarantees to hold it.
    pub(crate) fn seen_through(info: TensorInfo, storage: Arc<Storage>) -> Self {
        Self {
            info,
            storage,
            element: PhantomData,
        }
    }

    /// Allocates memory for a tensor described at address 0.
    pub(crate) fn allocated(device: &Device, info: TensorInfo) -> Result<Self, Error> {
        let storage = Storage::new(device, info.span_bytes())?;
        let info = info.at(storage.address);
        Ok(Self {
            info,
            storage: Arc::new(storage),
            element: PhantomData,
        })
    }

    /// Allocates memory for a tensor described at address 0 and copies `span`, from its first to its last element,
    /// into it.
    fn uploaded(device: &Device, info: TensorInfo, span: &[T]) -> Result<Self, Error> {
        let tensor = Self::allocated(device, info)?;
        if !span.is_empty() {
            let _guard = tensor.storage.write();
            // SAFETY: the storage was just allocated with this many bytes, and nothing else uses it.
            unsafe {
                tensor
                    .device()
                    .backend()
                    .upload(tensor.storage.address, span.as_bytes())?
            };
        }
        Ok(tensor)
    }

    fn view(&self, shape: Vec<usize>, strides: Vec<usize>, offset: usize) -> Self {
        Self {
            info: self.info.view(shape, strides, offset),
            storage: self.storage.clone(),
            element: PhantomData,
        }
    }

    fn check_axis(&self, axis: usize) -> Result<(), Error> {
        let rank = self.shape().len();
        if axis < rank {
            Ok(())
        } else {
            Err(Error::Axis { axis, rank })
        }
    }
}

/// Returns an empty vector with room for `len` elements in the host's memory.
pub(crate) fn reserved<T: Scalar>(len: usize) -> Result<Vec<T>, Error> {
    let mut elements = Vec::new();
    elements.try_reserve_exact(len).map_err(|_| Error::OutOfMemory {
        device: "the host".to_owned(),
        requested: (len * T::DATA_TYPE.bytes()) as u64,
        free: None,
    })?;
    Ok(elements)
}

/// Makes a tensor that shares this memory; nothing is copied.
impl<T: Scalar> Clone for Tensor<T> {
    fn clone(&self) -> Self {
        Self {
            info: self.info.clone(),
            storage: self.storage.clone(),
            element: PhantomData,
        }
    }
}

impl<T: Scalar> std::fmt::Debug for Tensor<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Tensor<{}>({:?} on {}",
            T::DATA_TYPE.name(),
            self.shape(),
            self.device()
        )?;
        if self.strides() != contiguous_strides(self.shape()) {
            write!(f, ", strides {:?}", self.strides())?;
        }
        f.write_str(")")
    }
}
