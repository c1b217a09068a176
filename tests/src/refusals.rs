//! Calls that must fail: with a typed error, before anything is allocated.

use std::sync::{Mutex, MutexGuard, PoisonError};

use flash_attention::{Device, Error};

use crate::devices;

/// Memory is counted by the device, which all tests of a program share: one at a time.
pub fn alone() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a call that must fail on every device, and shows that it allocated nothing. The error goes to `expect`, the
/// device with it.
///
/// # Panics
/// If the call succeeds, or allocates before it fails.
pub fn refused<A, R>(
    prepare: impl Fn(&Device) -> A,
    call: impl Fn(&A) -> Result<R, Error>,
    expect: impl Fn(&Device, Error),
) {
    let _alone = alone();
    for device in devices().all() {
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

/// Asserts the variant and its fields of an error on a device, and that the message shows each of the words.
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
