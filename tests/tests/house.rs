//! The floors of the crates: no room imports from its own floor or from one above.

use flash_attention_tests::files::workspace;
use flash_attention_tests::house::forbidden_imports;

/// The rooms of `host/src`, the lowest floor first.
const HOST: &[&[&str]] = &[
    &["error", "element", "progress"],
    &["layout", "options", "target"],
    &["reference", "problem"],
    &["plan"],
    &["device"],
    &["tensor"],
    &["output", "trace"],
    &["call"],
];

#[test]
fn imports_of_the_host_go_down() {
    let found = forbidden_imports(&workspace().join("host/src"), HOST);
    assert!(found.is_empty(), "{}", found.join("\n"));
}
