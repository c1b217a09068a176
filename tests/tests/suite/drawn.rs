//! Tests of forward attention on every device against the f64 oracle, on cases drawn by proptest.

use flash_attention_tests::{devices, drawn};
use proptest::prelude::*;

proptest! {
    #![proptest_config(drawn::config(64))]

    #[test]
    fn small_on_every_device(case in drawn::case(150, drawn::SMALL)) {
        case.check();
    }
}

proptest! {
    #![proptest_config(drawn::config(64))]

    #[test]
    fn larger_where_hardware_computes(case in drawn::case(500, 150_000_000)) {
        case.check_on(devices().native());
    }
}
