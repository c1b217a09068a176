//! Refusal of wrong command lines: one sentence, and exit status 2.

use std::process::ExitCode;

/// Prints a sentence that describes the error.
pub fn refuse(sentence: &str) -> ExitCode {
    eprintln!("{sentence}");
    ExitCode::from(2)
}

/// Returns the error and the allowed values, without the usage text that follows.
pub fn first_paragraph(text: &str) -> String {
    text.lines()
        .take_while(|line| !line.is_empty())
        .map(str::trim)
        .collect::<Vec<_>>()
        .join(" ")
}
