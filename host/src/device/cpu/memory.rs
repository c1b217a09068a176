//! Memory of the CPU device.

use std::alloc::Layout;

/// Alignment of tensors in bytes: a cache line.
const ALIGN: usize = 64;

/// Allocations of at least this many bytes are first compared with the machine's free memory: the system may grant
/// memory that it does not have, and end the process when it is used.
const CHECKED: usize = 1 << 30;

/// Allocates `bytes` of zeros, aligned to [`ALIGN`]: Rust must be able to read bytes that were never written. The error is the number
/// of bytes that are free, if the system reports it.
pub(super) fn allocate(bytes: usize) -> Result<*mut u8, Option<u64>> {
    let layout = layout(bytes).ok_or_else(available)?;
    if bytes >= CHECKED
        && let Some(free) = available().filter(|free| *free < bytes as u64)
    {
        return Err(Some(free));
    }
    // SAFETY: the layout has more than 0 bytes.
    let start = unsafe { std::alloc::alloc_zeroed(layout) };
    if start.is_null() {
        return Err(available());
    }
    let skipped = ALIGN - start.addr() % ALIGN;
    // SAFETY: at least one byte and at most `ALIGN` are skipped, of an allocation that has so many more than the caller asks for.
    unsafe {
        start.add(skipped - 1).write(skipped as u8);
        Ok(start.add(skipped))
    }
}

/// Frees memory.
///
/// # Safety
/// `first` came from `allocate(bytes)` and was not freed.
pub(super) unsafe fn free(first: *mut u8, bytes: usize) {
    // SAFETY: `allocate` wrote this byte, and had a layout of so many bytes.
    unsafe {
        let skipped = first.sub(1).read();
        std::alloc::dealloc(first.sub(skipped.into()), layout(bytes).unwrap_unchecked());
    }
}

/// Returns the layout of an allocation of `bytes`, with room to align them, and to say before them by how much.
///
/// It asks for no alignment. Were it larger than that of every allocation of the system's, Rust would have the calling thread write
/// zeros, also to pages that the system delivers as zeros to the threads that touch them first.
fn layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes.checked_add(ALIGN)?, 1).ok()
}

/// Returns the bytes that can be allocated without swapping, if the system reports them.
fn available() -> Option<u64> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_and_zero_and_can_be_written() {
        for bytes in [1, 63, 64, 65, 4096, (33 << 20) + 1] {
            // The second allocation may be the memory of the first.
            for _ in 0..2 {
                let first = allocate(bytes).expect("it is small");
                assert_eq!(first.addr() % ALIGN, 0, "{bytes}");
                // SAFETY: the memory is as long, and no one else has it.
                unsafe {
                    let all = std::slice::from_raw_parts_mut(first, bytes);
                    assert!(all.iter().all(|byte| *byte == 0), "{bytes}");
                    all.fill(0xff);
                    free(first, bytes);
                }
            }
        }
    }

    #[test]
    fn sizes_that_no_machine_has_are_refused() {
        for bytes in [usize::MAX, usize::MAX - ALIGN, isize::MAX as usize, 1 << 46] {
            allocate(bytes).expect_err("no machine has it");
        }
    }
}
