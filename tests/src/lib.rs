//! One suite, every device.
//!
//! A [`Case`] is an attention problem with everything that can vary: sizes, dtype, mask, scale, where its tensors lie.
//! [`Case::check`] solves it on every device of the machine and holds each result to the rule FlashAttention tests
//! itself by: against the f64 oracle, the largest error is at most twice that of standard attention computed in the same
//! dtype, plus 1e-5. Before a device writes, its outputs hold NaN, and so does all memory around inputs and outputs: an
//! element that was not written, a row too many that was read, a byte too many that was written, each shows.
//!
//! Which devices ran is printed by every test binary, and so is which did not and why. Nothing skips in silence.

mod case;
mod compare;
mod devices;
pub mod drawn;
pub mod files;
pub mod gpu;
mod gradients;
pub mod house;
mod layout;
pub mod micro;
pub mod refusals;

pub use case::{Case, Inputs, Outcome};
pub use compare::{Mismatch, compare, largest_error};
pub use devices::{CHOICE, Devices, devices, emulator};
pub use gradients::{GradientsOutcome, Prepared};
pub use layout::{Input, Layout, Order, Poisoned};

/// Compiles and runs the example of the repository's first page.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
