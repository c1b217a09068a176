//! Programs that run on the emulator, right and wrong ones.

mod checks;
mod checks_async;
mod checks_undefined;
mod common;
mod launches;
mod micro;
mod robust;
