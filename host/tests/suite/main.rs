//! Tests of the library's public interface, in one binary. Tests that need a process or a build of their own are
//! beside it.

#[path = "../common/mod.rs"]
mod common;
mod cpu;
mod cpu_backward;
mod cpu_program;
mod cpu_sizes;
mod device;
#[cfg(feature = "emulator")]
mod emulator;
mod plan;
mod problem;
mod program;
mod program_blocks;
mod program_tables;
mod progress;
mod reference;
mod tensor;
#[cfg(feature = "emulator")]
mod workspace;
