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
    ($($name:literal: $dtype:ident, $shape:ty;)*) => {
        /// Kernels over e4m3 inputs with scales: each row below, full and causal.
        pub const FP8_ENTRIES: &[Entry] = &[
            $(
                hopper_entry!($name, Forward $dtype, $shape, false).of_codes(),
                hopper_entry!(concat!($name, "_causal"), Forward $dtype, $shape, true).of_codes(),
            )*
        ];
        $(
            #[cfg(all(target_arch = "nvptx64", feature = "fp8_sm_90a"))]
            hopper_kernel!($name, hopper::fp8::forward, Fp8ForwardParams, $shape, false);
            #[cfg(all(target_arch = "nvptx64", feature = "fp8_sm_90a"))]
            hopper_kernel!(concat!($name, "_causal"), hopper::fp8::forward, Fp8ForwardParams, $shape, true);
        )*
    };
}

fp8_entries! {
    "hopper_forward_fp8_f16_d64": F16, CodesD64<F16>;
    "hopper_forward_fp8_f16_d96": F16, CodesD96<F16>;
    "hopper_forward_fp8_f16_d128": F16, CodesD128<F16>;
    "hopper_forward_fp8_f16_d192": F16, CodesD192<F16>;
    "hopper_forward_fp8_f16_d256": F16, CodesD256<F16>;
    "hopper_forward_fp8_bf16_d64": Bf16, CodesD64<Bf16>;
    "hopper_forward_fp8_bf16_d96": Bf16, CodesD96<Bf16>;
    "hopper_forward_fp8_bf16_d128": Bf16, CodesD128<Bf16>;
    "hopper_forward_fp8_bf16_d192": Bf16, CodesD192<Bf16>;
    "hopper_forward_fp8_bf16_d256": Bf16, CodesD256<Bf16>;
}
