//! The table of kernels for score programs and listed work.

use super::*;

/// A row of the table for the kernel of latent attention.
const fn latent_entry(name: &'static str, dtype: Dtype) -> Entry {
    type Shape = LatentD576<F16>;
    Entry {
        name,
        pass: Pass::Forward,
        arch: Arch::Sm80,
        dtype,
        causal: false,
        program: true,
        quantized: false,
        head_dim: Shape::HEAD_DIM,
        block_m: Shape::ROWS,
        block_n: Shape::COLUMNS,
        threads: Shape::THREADS,
        min_blocks: 1,
        shared_bytes: Shape::SHARED_BYTES,
        two_walks: false,
        cluster: 1,
    }
}

macro_rules! program_entries {
    (
        tiles { $($name:literal $dim:literal: $pass:ident, $module:ident::$function:ident($params:ident), $shared:ident,
                  $f32:ident min_blocks $f32_min:literal, $half:ident min_blocks $half_min:literal;)* }
        latent { $($latent:literal $latent_dim:literal;)* }
        delta { $($delta:literal;)* }
        hopper { $($hopper:literal $hopper_dim:literal: $hopper_shape:ident;)* }
    ) => {
        /// Every compiled kernel that runs score programs: full attention with [markers](crate::program).
        pub const PROGRAM_ENTRIES: &[Entry] = &[
            $(
                entry!(concat!($name, "_f32", $dim), Sm80 $pass F32, $f32, $shared, $f32_min, false).of_programs(),
                entry!(concat!($name, "_f16", $dim), Sm80 $pass F16, $half<F16>, $shared, $half_min, false).of_programs(),
                entry!(concat!($name, "_bf16", $dim), Sm80 $pass Bf16, $half<Bf16>, $shared, $half_min, false).of_programs(),
            )*
            $(
                latent_entry(concat!($latent, "_f16", $latent_dim), Dtype::F16),
                latent_entry(concat!($latent, "_bf16", $latent_dim), Dtype::Bf16),
            )*
            $(
                preprocess_entry(concat!($delta, "_f32"), Dtype::F32).of_programs(),
                preprocess_entry(concat!($delta, "_f16"), Dtype::F16).of_programs(),
                preprocess_entry(concat!($delta, "_bf16"), Dtype::Bf16).of_programs(),
            )*
            $(
                hopper_entry!(concat!($hopper, "_f16", $hopper_dim), Forward F16, $hopper_shape<F16>, false).of_programs(),
                hopper_entry!(concat!($hopper, "_bf16", $hopper_dim), Forward Bf16, $hopper_shape<Bf16>, false).of_programs(),
            )*
        ];
        #[cfg(all(target_arch = "nvptx64", feature = "program_sm_80"))]
        mod sm_80 {
            use super::*;
            use crate::element::F32;
            $(
                kernel!(concat!($name, "_f32", $dim), $module::$function, crate::abi::$params, $f32);
                kernel!(concat!($name, "_f16", $dim), $module::$function, crate::abi::$params, $half<F16>);
                kernel!(concat!($name, "_bf16", $dim), $module::$function, crate::abi::$params, $half<Bf16>);
            )*
            $(
                kernel!(concat!($latent, "_f16", $latent_dim), latent::forward, crate::abi::ListedForwardParams, F16);
                kernel!(concat!($latent, "_bf16", $latent_dim), latent::forward, crate::abi::ListedForwardParams, Bf16);
            )*
            $(
                kernel!(concat!($delta, "_f32"), delta::program, crate::abi::BackwardParams, F32);
                kernel!(concat!($delta, "_f16"), delta::program, crate::abi::BackwardParams, F16);
                kernel!(concat!($delta, "_bf16"), delta::program, crate::abi::BackwardParams, Bf16);
            )*
        }
        #[cfg(all(target_arch = "nvptx64", feature = "program_sm_90a"))]
        mod sm_90a {
            use super::*;
            $(
                hopper_kernel!(concat!($hopper, "_f16", $hopper_dim), hopper::forward::program, HopperForwardParams, $hopper_shape<F16>);
                hopper_kernel!(concat!($hopper, "_bf16", $hopper_dim), hopper::forward::program, HopperForwardParams, $hopper_shape<Bf16>);
            )*
        }
    };
}

program_entries! {
    tiles {
        "score_forward" "_d32": Forward, listed::forward(ListedForwardParams), FORWARD_BYTES, ForwardF32D32 min_blocks 2, ProgramD32 min_blocks 2;
        "score_forward" "_d64": Forward, listed::forward(ListedForwardParams), FORWARD_BYTES, ForwardF32D64 min_blocks 2, ForwardD64 min_blocks 2;
        "score_forward" "_d96": Forward, listed::forward(ListedForwardParams), FORWARD_BYTES, ForwardF32D96 min_blocks 2, ProgramD96 min_blocks 2;
        "score_forward" "_d128": Forward, listed::forward(ListedForwardParams), FORWARD_BYTES, ForwardF32D128 min_blocks 2, ProgramD128 min_blocks 0;
        "score_forward" "_d192": Forward, listed::forward(ListedForwardParams), FORWARD_BYTES, ForwardF32D192 min_blocks 1, ProgramD192 min_blocks 1;
        "score_forward" "_d256": Forward, listed::forward(ListedForwardParams), FORWARD_BYTES, ForwardF32D256 min_blocks 2, ProgramD256 min_blocks 1;
        "score_backward_dq" "_d32": BackwardDq, backward::listed_dq(ListedBackwardParams), BACKWARD_BYTES, BackwardF32D32 min_blocks 1, BackwardD32 min_blocks 1;
        "score_backward_dq" "_d64": BackwardDq, backward::listed_dq(ListedBackwardParams), BACKWARD_BYTES, BackwardF32D64 min_blocks 1, BackwardD64 min_blocks 1;
        "score_backward_dq" "_d96": BackwardDq, backward::listed_dq(ListedBackwardParams), BACKWARD_BYTES, BackwardF32D96 min_blocks 1, BackwardD96 min_blocks 1;
        "score_backward_dq" "_d128": BackwardDq, backward::listed_dq(ListedBackwardParams), BACKWARD_BYTES, BackwardF32D128 min_blocks 1, BackwardD128 min_blocks 1;
        "score_backward_dq" "_d192": BackwardDq, backward::listed_dq(ListedBackwardParams), BACKWARD_BYTES, BackwardF32D192 min_blocks 1, BackwardD192 min_blocks 1;
        "score_backward_dq" "_d256": BackwardDq, backward::listed_dq(ListedBackwardParams), BACKWARD_BYTES, BackwardF32D256 min_blocks 1, BackwardD256 min_blocks 0;
        "score_backward_dkv" "_d32": BackwardDkv, backward::listed_dkv(ListedBackwardParams), BACKWARD_BYTES, BackwardF32D32 min_blocks 1, BackwardD32 min_blocks 1;
        "score_backward_dkv" "_d64": BackwardDkv, backward::listed_dkv(ListedBackwardParams), BACKWARD_BYTES, BackwardF32D64 min_blocks 1, BackwardD64 min_blocks 1;
        "score_backward_dkv" "_d96": BackwardDkv, backward::listed_dkv(ListedBackwardParams), BACKWARD_BYTES, BackwardF32D96 min_blocks 1, BackwardD96 min_blocks 1;
        "score_backward_dkv" "_d128": BackwardDkv, backward::listed_dkv(ListedBackwardParams), BACKWARD_BYTES, BackwardF32D128 min_blocks 1, BackwardD128 min_blocks 1;
        "score_backward_dkv" "_d192": BackwardDkv, backward::listed_dkv(ListedBackwardParams), BACKWARD_BYTES, BackwardF32D192 min_blocks 1, BackwardD192 min_blocks 1;
        "score_backward_dkv" "_d256": BackwardDkv, backward::listed_dkv(ListedBackwardParams), BACKWARD_BYTES, BackwardF32D256 min_blocks 1, BackwardD256 min_blocks 1;
    }
    latent {
        "score_forward" "_d576";
    }
    delta {
        "score_backward_preprocess";
    }
    hopper {
        "score_hopper_forward" "_d64": HopperProgramD64;
        "score_hopper_forward" "_d96": HopperProgramD96;
        "score_hopper_forward" "_d128": HopperProgramD128;
        "score_hopper_forward" "_d192": HopperProgramD192;
        "score_hopper_forward" "_d256": HopperProgramD256;
    }
}
