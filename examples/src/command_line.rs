//! How an example that was called wrongly says so: one sentence, and exit status 2.

use std::process::ExitCode;

/// Says what is wrong, in one sentence.
pub fn refuse(sentence: &str) -> ExitCode {
    eprintln!("{sentence}");
    ExitCode::from(2)
}

/// What is wrong and what is allowed, without the usage that follows.
pub fn first_paragraph(text: &str) -> String {
    text.lines()
        .take_while(|line| !line.is_empty())
        .map(str::trim)
        .collect::<Vec<_>>()
        .join(" ")
}
