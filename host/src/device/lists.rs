//! Lists of work in a device's memory.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::Backend;
use crate::error::Error;
use crate::plan::{Launch, PassType};

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
    /// Returns the lists of a launch, as [`get`](Self::get) does each.
    ///
    /// # Errors
    /// The errors of [`get`](Self::get).
    pub(super) fn of(&self, device: &impl Backend, launch: &Launch<impl PassType>) -> Result<Vec<Arc<List>>, Error> {
        launch.lists().map(|content| self.get(device, content)).collect()
    }

    /// Returns the list of this content, which is uploaded if the device does not have it. Lists that were not used for a long
    /// time are freed, after the work launched before.
    ///
    /// # Errors
    /// The errors of [`Backend::alloc`] and [`Backend::upload`].
    fn get(&self, device: &impl Backend, content: &Arc<[u8]>) -> Result<Arc<List>, Error> {
        let mut lists = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let same = |list: &Arc<List>| Arc::ptr_eq(&list.content, content);
        let equal = |list: &Arc<List>| list.content == *content;
        if let Some(place) = (lists.iter().position(same)).or_else(|| lists.iter().position(equal)) {
            let list = lists.remove(place);
            lists.push(list.clone());
            return Ok(list);
        }
        let is_free = |list: &Arc<List>| Arc::strong_count(list) == 1 && !list.is_pinned.load(Ordering::Relaxed);
        if lists.iter().filter(|list| is_free(list)).count() >= KEPT
            && let Some(place) = lists.iter().position(is_free)
        {
            let list = lists.remove(place);
            // SAFETY: `alloc` made it, and no call holds it.
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

#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;
    use crate::device::Run;
    use crate::plan::Rotary;
    use crate::progress::Reporter;
    use crate::target::{DeviceInfo, Instructions};

    /// A device that notes which memory it was asked for.
    #[derive(Default)]
    struct Recorder {
        allocated: Mutex<Vec<u64>>,
        freed: Mutex<Vec<u64>>,
        refuses_uploads: bool,
    }

    impl Recorder {
        fn counts(&self) -> [usize; 2] {
            [&self.allocated, &self.freed].map(|addresses| addresses.lock().expect("no test panics").len())
        }
    }

    impl Backend for Recorder {
        fn info(&self) -> DeviceInfo {
            DeviceInfo::cpu(1, Instructions::Portable)
        }

        fn spec(&self) -> String {
            String::new()
        }

        fn name(&self) -> String {
            String::new()
        }

        fn alloc(&self, _: usize) -> Result<u64, Error> {
            let mut allocated = self.allocated.lock().expect("no test panics");
            let address = 64 * (1 + allocated.len() as u64);
            allocated.push(address);
            Ok(address)
        }

        unsafe fn free(&self, address: u64, _: usize) {
            self.freed.lock().expect("no test panics").push(address);
        }

        unsafe fn upload(&self, address: u64, data: &[u8]) -> Result<(), Error> {
            match self.refuses_uploads {
                true => Err(Error::Address {
                    address,
                    align: data.len(),
                }),
                false => Ok(()),
            }
        }

        unsafe fn download(&self, _: u64, _: &mut [u8]) -> Result<(), Error> {
            Ok(())
        }

        unsafe fn zero(&self, _: u64, _: usize) -> Result<(), Error> {
            Ok(())
        }

        unsafe fn run(&self, _: Run<'_>, _: &Reporter<'_>) -> Result<(), Error> {
            Ok(())
        }

        unsafe fn move_tokens(&self, _: &Launch<Rotary>) -> Result<(), Error> {
            Ok(())
        }

        fn synchronize(&self) -> Result<(), Error> {
            Ok(())
        }
    }

    fn content(number: usize) -> Arc<[u8]> {
        number.to_le_bytes().into()
    }

    #[test]
    fn equal_contents_are_uploaded_once() {
        let (device, lists) = (Recorder::default(), Lists::default());
        let first = lists.get(&device, &content(1)).expect("memory");
        let again = lists.get(&device, &content(1)).expect("memory");
        let other = lists.get(&device, &content(2)).expect("memory");
        assert_eq!((first.address, again.address, other.address), (64, 64, 128));
        assert_eq!(device.counts(), [2, 0]);
    }

    #[test]
    fn the_list_that_was_not_used_for_longest_is_freed() {
        let (device, lists) = (Recorder::default(), Lists::default());
        let held = lists.get(&device, &content(0)).expect("memory");
        lists.get(&device, &content(1)).expect("memory").pin();
        for number in 2..KEPT + 2 {
            lists.get(&device, &content(number)).expect("memory");
        }
        assert_eq!(device.counts(), [KEPT + 2, 0], "those in use and pinned do not count");
        lists.get(&device, &content(2)).expect("it is there");
        lists.get(&device, &content(KEPT + 2)).expect("memory");
        let of_third = 64 * 4;
        assert_eq!(*device.freed.lock().expect("no test panics"), [of_third]);
        assert_eq!(held.address, 64);
    }

    #[test]
    fn a_list_that_cannot_be_uploaded_is_freed() {
        let lists = Lists::default();
        let device = Recorder {
            refuses_uploads: true,
            ..Recorder::default()
        };
        assert!(lists.get(&device, &content(1)).is_err());
        assert_eq!(device.counts(), [1, 1]);
        let device = Recorder::default();
        lists.get(&device, &content(1)).expect("memory");
        assert_eq!(device.counts(), [1, 0], "nothing was kept");
    }
}
