//! The example programs, run as a user runs them.

mod quickstart;
mod traffic;
mod train;
