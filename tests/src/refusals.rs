//! Calls that must fail with a typed error, before anything is allocated.

use flash_attention::{Device, Error};

use crate::devices;

/// Runs a call that must fail on every device, and checks that it allocated nothing. Passes the device and the error
/// to `expect`.
///
/// # Panics
/// If the call succeeds, or allocates before it fails.
pub fn refused<A, R>(
    prepare: impl Fn(&Device) -> A,
    call: impl Fn(&A) -> Result<R, Error>,
    expect: impl Fn(&Device, Error),
) {
    for device in &devices().unshared() {
        let arguments = prepare(device);
        device.reset_peak_memory();
        let before = device.memory();
        let Err(error) = call(&arguments) else {
            panic!("accepted on {device}")
        };
        assert_eq!(device.memory(), before, "{error} came after an allocation on {device}");
        expect(device, error);
    }
}

/// Asserts the variant and fields of an error, and that its message contains each of the words.
#[macro_export]
macro_rules! assert_error {
    ($device:ident, $error:ident, $pattern:pat $(if $guard:expr)?, $($word:expr),+) => {
        assert!(matches!(&$error, $pattern $(if $guard)?), "on {}: {:?}", $device, $error);
        let message = $error.to_string();
        for word in [$($word),+] {
            assert!(message.contains(word), "no {word} in: {message}");
        }
        assert!(!message.contains('\n'), "{message}");
    };
}
