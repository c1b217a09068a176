//! Tests that run the example programs as a user does.

mod quickstart;
mod traffic;
mod train;
