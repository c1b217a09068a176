//! Memory of the device: the host's allocations, and the memory of blocks and lanes.
//!
//! Blocks on several host threads share global memory, so its bytes are atomic words and every access is one or more
//! relaxed word operations. A race of the kernel is then a race of values, and never undefined behaviour of the
//! emulator. Beside the bytes lies the shadow: one bit per byte, set once the byte has been written.

pub(crate) mod global;
pub(crate) mod local;
pub(crate) mod origin;
pub(crate) mod shared;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::MemoryError;
use global::Allocation;

/// A device address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    /// Returns the address `bytes` bytes further on.
    pub fn offset(self, bytes: u64) -> DevicePtr {
        DevicePtr(self.0.wrapping_add(bytes))
    }
}

/// Global memory, shared by all launches that are given it.
#[derive(Debug)]
pub struct DeviceMemory {
    state: Mutex<State>,
    capacity: u64,
}

#[derive(Debug)]
struct State {
    live: BTreeMap<u64, Arc<Allocation>>,
    freed: VecDeque<(u64, u64)>,
    next: u64,
    in_use: u64,
    peak: u64,
    /// Addresses of the variables of each module that was launched.
    modules: HashMap<u64, Arc<Vec<u64>>>,
}

/// Number of unmapped bytes between allocations, so that a stray access hits no memory.
const GUARD: u64 = 1 << 16;
const ALIGN: u64 = 512;
const FIRST: u64 = 0x7_0000_0000;
/// Number of freed ranges that are remembered for use-after-free messages.
const FREED_KEPT: usize = 4096;

impl Default for DeviceMemory {
    fn default() -> Self {
        Self::new()
    }
}

impl DeviceMemory {
    /// Makes an empty memory of 64 GiB.
    pub fn new() -> Self {
        Self::with_capacity(64 << 30)
    }

    /// Makes an empty memory of `bytes` bytes.
    pub fn with_capacity(bytes: u64) -> Self {
        let state = State {
            live: BTreeMap::new(),
            freed: VecDeque::new(),
            next: FIRST,
            in_use: 0,
            peak: 0,
            modules: HashMap::new(),
        };
        Self {
            state: Mutex::new(state),
            capacity: bytes,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Every update leaves the state consistent, so a panic elsewhere does not corrupt it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Allocates `bytes`, aligned to 512 and not initialised.
    ///
    /// # Errors
    ///
    /// [`MemoryError::OutOfMemory`].
    pub fn alloc(&self, bytes: usize) -> Result<DevicePtr, MemoryError> {
        self.alloc_named(bytes, None)
    }

    pub(crate) fn alloc_named(&self, bytes: usize, name: Option<String>) -> Result<DevicePtr, MemoryError> {
        let mut state = self.lock();
        let asked = bytes as u64;
        let free = self.capacity - state.in_use;
        if asked > free {
            return Err(MemoryError::OutOfMemory { asked, free });
        }
        let base = state.next;
        state.next = (base + asked + GUARD).next_multiple_of(ALIGN);
        state.in_use += asked;
        state.peak = state.peak.max(state.in_use);
        let allocation = Allocation::new(base, bytes, name);
        state.live.insert(base, Arc::new(allocation));
        Ok(DevicePtr(base))
    }

    /// Frees an allocation.
    ///
    /// # Errors
    ///
    /// [`MemoryError::NotAllocated`] if [`alloc`](Self::alloc) did not return `ptr`, or it was freed.
    pub fn free(&self, ptr: DevicePtr) -> Result<(), MemoryError> {
        let mut state = self.lock();
        let Some(allocation) = state.live.remove(&ptr.0) else {
            return Err(MemoryError::NotAllocated { address: ptr.0 });
        };
        let len = allocation.len() as u64;
        state.in_use -= len;
        state.freed.push_back((ptr.0, len));
        if state.freed.len() > FREED_KEPT {
            state.freed.pop_front();
        }
        Ok(())
    }

    fn find(&self, address: u64, bytes: usize) -> Result<(Arc<Allocation>, usize), MemoryError> {
        let outside = MemoryError::OutOfBounds {
            address,
            bytes: bytes as u64,
        };
        let state = self.lock();
        let Some((base, allocation)) = state.live.range(..=address).next_back() else {
            return Err(outside);
        };
        let at = (address - base) as usize;
        if at.checked_add(bytes).is_none_or(|end| end > allocation.len()) {
            return Err(outside);
        }
        Ok((allocation.clone(), at))
    }

    /// Copies to the device and marks the bytes initialised.
    ///
    /// # Errors
    ///
    /// [`MemoryError::OutOfBounds`] if the range is not inside one live allocation.
    pub fn write(&self, ptr: DevicePtr, bytes: &[u8]) -> Result<(), MemoryError> {
        let (allocation, at) = self.find(ptr.0, bytes.len())?;
        allocation.copy_in(at, bytes);
        Ok(())
    }

    /// Copies from the device, initialised or not.
    ///
    /// # Errors
    ///
    /// [`MemoryError::OutOfBounds`] if the range is not inside one live allocation.
    pub fn read(&self, ptr: DevicePtr, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let (allocation, at) = self.find(ptr.0, bytes.len())?;
        allocation.copy_out(at, bytes);
        Ok(())
    }

    /// Returns true if the host or a kernel has written all of a range.
    ///
    /// # Errors
    ///
    /// [`MemoryError::OutOfBounds`] if the range is not inside one live allocation.
    pub fn is_initialized(&self, ptr: DevicePtr, bytes: usize) -> Result<bool, MemoryError> {
        let (allocation, at) = self.find(ptr.0, bytes)?;
        Ok(allocation.first_uninitialized(at, bytes).is_none())
    }

    /// Returns the number of bytes allocated now.
    pub fn bytes_in_use(&self) -> u64 {
        self.lock().in_use
    }

    /// Returns the largest number of bytes allocated at one time.
    pub fn peak_bytes(&self) -> u64 {
        self.lock().peak
    }

    /// Returns the number of bytes that can still be allocated.
    pub fn bytes_free(&self) -> u64 {
        self.capacity - self.lock().in_use
    }

    /// Takes a view of the allocations for a launch.
    pub(crate) fn snapshot(&self) -> global::View {
        let state = self.lock();
        global::View::new(
            state.live.values().cloned().collect(),
            state.freed.iter().copied().collect(),
        )
    }

    /// Returns the addresses of a module's variables; the first call makes them with `make`.
    pub(crate) fn module_variables<E>(
        &self,
        id: u64,
        make: impl FnOnce() -> Result<Vec<u64>, E>,
    ) -> Result<Arc<Vec<u64>>, E> {
        if let Some(known) = self.lock().modules.get(&id) {
            return Ok(known.clone());
        }
        let made = Arc::new(make()?);
        let mut state = self.lock();
        Ok(state.modules.entry(id).or_insert(made).clone())
    }
}
