//! Holds the tests in `tests/models.rs` alone.
