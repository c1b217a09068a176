//! Parts that the programs share: the exit status, and the error of a file that has to be fetched.

use std::fmt::Display;
use std::path::Path;
use std::process::ExitCode;

use candle_core::{Error, Result};

/// Exit status of a program that ends with `result`; an error is printed.
pub fn exit(result: Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

/// Error of reading `path`, with the command that fetches it: `cargo xtask fetch <package>`.
pub fn not_fetched(path: &Path, package: &str, error: impl Display) -> Error {
    Error::msg(format!(
        "{}: {error}; `cargo xtask fetch {package}` fetches it",
        path.display()
    ))
}
