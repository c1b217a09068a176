//! An emulator for NVIDIA PTX. It executes on the CPU the PTX that a GPU's driver would load, checks every memory
//! access and all synchronisation of threads, and counts instructions and bytes like a profiler.
//!
//! A [`Module`] is parsed and decoded once. [`Module::launch`] runs one of its kernels on a [`DeviceMemory`] and
//! returns a [`Report`] of findings and counters. It accepts PTX of any compiler. The PTX manual defines the results,
//! and an unknown instruction is an error, never skipped.
//!
//! ```
//! use ptx_emulator::{DeviceMemory, Launch, Module, Options};
//!
//! let text = "
//!     .version 7.0
//!     .target sm_80
//!     .address_size 64
//!     .visible .entry double(.param .u64 data) {
//!         .reg .b32 %r<3>;
//!         .reg .b64 %rd<4>;
//!         ld.param.u64 %rd1, [data];
//!         mov.u32 %r1, %tid.x;
//!         mul.wide.u32 %rd2, %r1, 4;
//!         add.s64 %rd3, %rd1, %rd2;
//!         ld.global.u32 %r2, [%rd3];
//!         shl.b32 %r2, %r2, 1;
//!         st.global.u32 [%rd3], %r2;
//!         ret;
//!     }";
//! let module = Module::parse(text, "double.ptx")?;
//! let memory = DeviceMemory::new();
//! let data = memory.alloc(4 * 4)?;
//! let input: Vec<u8> = [1u32, 2, 3, 4].iter().flat_map(|x| x.to_le_bytes()).collect();
//! memory.write(data, &input)?;
//! let launch = Launch {
//!     entry: "double",
//!     grid: [1, 1, 1],
//!     block: [4, 1, 1],
//!     cluster: [1, 1, 1],
//!     shared_bytes: 0,
//!     params: &data.0.to_le_bytes(),
//! };
//! let report = module.launch(&memory, &launch, &Options::default())?;
//! assert!(report.is_clean());
//! assert_eq!(report.counters.global_read_bytes, 16);
//! let mut output = [0; 16];
//! memory.read(data, &mut output)?;
//! assert_eq!(output[4], 4);
//! # Ok::<(), ptx_emulator::Error>(())
//! ```
//!
//! Modules in order: `lex` and `parse` read the text, `decode` turns each instruction into a variant of one table,
//! `exec` executes it, `check` looks for errors, `counters` counts.

mod check;
mod counters;
mod decode;
mod error;
mod exec;
mod isa;
mod launch;
mod lex;
mod memory;
mod module;
pub mod numeric;
mod parse;
mod program;
mod report;
mod request;
mod schedule;
pub mod tensor;

pub use check::Checks;
pub use counters::{Counters, OpcodeCount};
pub use error::{Error, MemoryError};
pub use memory::{DeviceMemory, DevicePtr};
pub use module::Module;
pub use program::{Entry, Parameter};
pub use report::{Finding, FindingKind, Report};
pub use request::{Launch, Options};
