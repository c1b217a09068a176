//! Parses arbitrary text and runs whatever parses for a short time: nothing may panic or hang.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../tests/suite/common/survive.rs"]
mod survive;

fuzz_target!(|text: &str| survive::survive(text));
