//! The test suite of all devices.
//!
//! A [`Case`] is an attention problem with everything that can vary: sizes, dtype, mask, scale, memory layouts.
//! [`Case::check`] solves it on every device of the machine and applies the rule of FlashAttention's own tests: the
//! largest error against the f64 oracle is at most twice that of standard attention computed in the same dtype, plus
//! 1e-5. Outputs and all memory around inputs and outputs are filled with NaN before a call, so that an element that
//! was not written, or an access outside of a tensor, shows.
//!
//! Every test binary prints the devices that run and the reason for each that does not. No test is skipped silently.

mod allowances;
mod alone;
mod case;
mod compare;
mod devices;
pub mod drawn;
pub mod files;
pub mod fp8;
pub mod gpu;
mod gradients;
pub mod house;
mod layout;
pub mod micro;
pub mod programs;
pub mod refusals;
mod rows;
mod traffic;

pub use allowances::Allowances;
pub use alone::{backward_alone, check_sequence, forward_alone};
pub use case::{Case, Inputs, Outcome};
pub use compare::{Mismatch, compare, largest_error};
pub use devices::{CHOICE, Devices, devices, emulator};
pub use gradients::{GradientsOutcome, Prepared};
pub use layout::{Input, Layout, Order, Poisoned};
pub use rows::{RowLayout, RowMemory, row_layout};
pub use traffic::check_traffic;

/// Compiles and runs the example of the repository's README.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;

/// Compiles and runs the examples of the page about sequences.
#[cfg(doctest)]
#[doc = include_str!("../../docs/sequences.md")]
struct SequencesPage;

/// Compiles and runs the example of the page about score programs.
#[cfg(doctest)]
#[doc = include_str!("../../docs/programs.md")]
struct ProgramsPage;
