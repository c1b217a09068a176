//! The table of kernels over e4m3 inputs, which are compiled by themselves.

use super::*;

/// The forward kernel over e4m3 inputs with results of this dtype that serves this head_dim with the least waste.
pub fn find_fp8(arch: Arch, dtype: Dtype, causal: bool, head_dim: u32) -> Option<&'static Entry> {
    narrowest(FP8_ENTRIES, Pass::Forward, arch, dtype, head_dim, |e| {
        e.causal == causal
    })
}

impl Entry {
    /// Marks a kernel as one over e4m3 inputs.
    const fn of_codes(mut self) -> Self {
        self.quantized = true;
        self
    }
}

macro_rules! fp8_entries {
    ($($name:literal $dim:literal: $shape:ident;)*) => {
        /// Kernels over e4m3 inputs with scales: each row below, full and causal, by the dtype of out.
        pub const FP8_ENTRIES: &[Entry] = &[
            $(
                hopper_entry!(concat!($name, "_f16", $dim), Forward F16, $shape<F16>, false).of_codes(),
                hopper_entry!(concat!($name, "_f16", $dim, "_causal"), Forward F16, $shape<F16>, true).of_codes(),
                hopper_entry!(concat!($name, "_bf16", $dim), Forward Bf16, $shape<Bf16>, false).of_codes(),
                hopper_entry!(concat!($name, "_bf16", $dim, "_causal"), Forward Bf16, $shape<Bf16>, true).of_codes(),
            )*
        ];
        #[cfg(all(target_arch = "nvptx64", feature = "fp8_sm_90a"))]
        mod sm_90a {
            use super::*;
            $(
                hopper_kernel!(concat!($name, "_f16", $dim), hopper::fp8::forward, Fp8ForwardParams, $shape<F16>, false);
                hopper_kernel!(concat!($name, "_f16", $dim, "_causal"), hopper::fp8::forward, Fp8ForwardParams, $shape<F16>, true);
                hopper_kernel!(concat!($name, "_bf16", $dim), hopper::fp8::forward, Fp8ForwardParams, $shape<Bf16>, false);
                hopper_kernel!(concat!($name, "_bf16", $dim, "_causal"), hopper::fp8::forward, Fp8ForwardParams, $shape<Bf16>, true);
            )*
        }
    };
}

fp8_entries! {
    "hopper_forward_fp8" "_d64": CodesD64;
    "hopper_forward_fp8" "_d96": CodesD96;
    "hopper_forward_fp8" "_d128": CodesD128;
    "hopper_forward_fp8" "_d192": CodesD192;
    "hopper_forward_fp8" "_d256": CodesD256;
}
