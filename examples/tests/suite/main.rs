//! Tests that run the example programs as a user does.

mod quickstart;
mod quickstart_features;
mod quickstart_paged;
mod traffic;
