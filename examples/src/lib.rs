//! Shared parts of the examples: attention inputs on disk, the error of a result, and the refusal of wrong command
//! lines.

mod accuracy;
pub mod command_line;
mod features;
mod file;
pub mod paged;
pub mod ragged;
pub mod timing;
pub mod traffic;

pub use accuracy::Accuracy;
pub use features::Features;
pub use file::{AttentionFile, Stored, Written, write_output};

/// The reason why an example stopped: one sentence.
#[derive(Debug)]
pub struct Failure(pub String);

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}

impl From<flash_attention::Error> for Failure {
    fn from(error: flash_attention::Error) -> Self {
        Self(error.to_string())
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self(error.to_string())
    }
}
