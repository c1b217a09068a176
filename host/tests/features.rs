//! Tests that a device left out of the build is an error that says so, and that an included one can be made.

use flash_attention::Device;
use flash_attention::error::{CudaUnavailable, Error};

#[test]
fn emulated_gpus_are_there_or_left_out() {
    for text in ["emulator:sm_90a", "emulator:sm_80"] {
        match text.parse::<Device>() {
            Ok(device) if cfg!(feature = "emulator") => drop(device),
            Err(Error::NotBuilt {
                device,
                feature: "emulator",
            }) if !cfg!(feature = "emulator") => assert_eq!(device, text),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn gpus_are_left_out_where_the_feature_is() {
    let left_out = matches!(
        Device::cuda(0),
        Err(Error::CudaUnavailable {
            reason: CudaUnavailable::NotBuilt
        })
    );
    assert_eq!(left_out, !cfg!(feature = "cuda"));
    assert!(Device::best().is_ok());
}
