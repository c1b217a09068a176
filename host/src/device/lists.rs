//! Lists of work in a device's memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::Backend;
use crate::error::Error;

/// Lists that a device keeps besides those in use and those that are pinned.
const KEPT: usize = 64;

/// Lists of work that a device has in its memory, by their content: layers that share a mask upload it once. The last one used
/// comes last.
#[derive(Default)]
pub(super) struct Lists(Mutex<Vec<Arc<List>>>);

/// A list in a device's memory. It stays there while it is held, or pinned.
pub(super) struct List {
    content: Arc<[u8]>,
    /// Device address.
    pub address: u64,
    is_pinned: AtomicBool,
}

impl List {
    /// Keeps the list as long as the device.
    #[cfg(feature = "cuda")]
    pub(super) fn pin(&self) {
        self.is_pinned.store(true, Ordering::Relaxed);
    }
}

impl Lists {
    /// Returns the list of this content, which is uploaded if the device does not have it. Lists that were not used for a long
    /// time are freed, after the work launched before.
    ///
    /// # Errors
    /// The errors of [`Backend::alloc`] and [`Backend::upload`].
    pub(super) fn get(&self, device: &impl Backend, content: &Arc<[u8]>) -> Result<Arc<List>, Error> {
        let mut lists = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = |list: &Arc<List>| Arc::ptr_eq(&list.content, content) || list.content == *content;
        if let Some(place) = lists.iter().position(known) {
            let list = lists.remove(place);
            lists.push(list.clone());
            return Ok(list);
        }
        let is_free = |list: &Arc<List>| Arc::strong_count(list) == 1 && !list.is_pinned.load(Ordering::Relaxed);
        if lists.iter().filter(|list| is_free(list)).count() >= KEPT
            && let Some(place) = lists.iter().position(is_free)
        {
            let list = lists.remove(place);
            // SAFETY: `alloc` made it, and nobody holds it.
            unsafe { device.free(list.address, list.content.len()) }
        }
        let address = device.alloc(content.len())?;
        // SAFETY: the memory is new, and as long as the content.
        if let Err(error) = unsafe { device.upload(address, content) } {
            // SAFETY: the memory is of no use to anybody.
            unsafe { device.free(address, content.len()) }
            return Err(error);
        }
        let list = Arc::new(List {
            content: content.clone(),
            address,
            is_pinned: AtomicBool::new(false),
        });
        lists.push(list.clone());
        Ok(list)
    }

    /// Returns address and bytes of all lists, which the device is about to free.
    #[cfg(feature = "cuda")]
    pub(super) fn take(&mut self) -> impl Iterator<Item = (u64, usize)> + use<> {
        let lists = std::mem::take(self.0.get_mut().unwrap_or_else(PoisonError::into_inner));
        lists.into_iter().map(|list| (list.address, list.content.len()))
    }
}
