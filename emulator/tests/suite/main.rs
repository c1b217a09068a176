//! Tests of whole programs on the emulator.

mod checks;
mod checks_async;
mod checks_cluster;
mod checks_undefined;
mod common;
mod launches;
mod micro;
mod robust;
