//! The kernels that a device has loaded.

use std::collections::HashMap;
use std::fmt::Display;
use std::sync::{Arc, Mutex, PoisonError};

use crate::error::Error;
use crate::plan::{Launch, ModuleKey, ModuleText, PassType};
use crate::program::{NodeId, Slot};

/// Modules by their keys, each loaded at its first use and kept.
pub(super) struct Modules<M>(Mutex<HashMap<ModuleKey, Loaded<M>>>);

/// A module as a device has it.
#[derive(Clone)]
pub(super) struct Loaded<M> {
    pub module: M,
    /// Contents of the kernel's second parameter; empty if it has none.
    pub slots: Arc<[Slot]>,
    /// Lines of the text that are its score program's, with the nodes that they work out.
    #[cfg_attr(
        not(feature = "emulator"),
        expect(dead_code, reason = "only the emulator has findings")
    )]
    pub lines: Arc<[(usize, Option<NodeId>)]>,
}

impl<M: Clone> Modules<M> {
    pub(super) fn new() -> Self {
        Self(Mutex::default())
    }

    /// The module of a launch, which `load` makes of its PTX if the device, named `device`, does not have it yet.
    ///
    /// # Errors
    /// [`Error::Launch`] if the kernel takes no score program, and in place of the errors of `load`.
    pub(super) fn get<E: Display>(
        &self,
        launch: &Launch<impl PassType>,
        device: impl Fn() -> String,
        load: impl FnOnce(&str) -> Result<M, E>,
    ) -> Result<Loaded<M>, Error> {
        let mut modules = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let key = launch.module_key();
        if let Some(loaded) = modules.get(&key) {
            return Ok(loaded.clone());
        }
        let ModuleText { ptx, slots, lines } = (launch.module_text()).map_err(|error| launch.error(device(), error))?;
        let loaded = Loaded {
            module: load(&ptx).map_err(|error| launch.error(device(), error))?,
            slots: slots.into(),
            lines: lines.into(),
        };
        modules.insert(key, loaded.clone());
        Ok(loaded)
    }
}
