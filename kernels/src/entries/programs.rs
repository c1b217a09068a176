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
        tiles { $($name:literal: $pass:ident $dtype:ident, $shape:ty, $shared:ident,
                  $module:ident::$function:ident($params:ident), min_blocks $min:literal;)* }
        latent { $($latent:literal: $latent_dtype:ident;)* }
        delta { $($delta:literal: $delta_dtype:ident;)* }
        hopper { $($hopper:literal: $hopper_pass:ident $hopper_dtype:ident, $hopper_shape:ty,
                   $hopper_module:ident::$hopper_kind:ident::$hopper_function:ident($hopper_params:ident);)* }
    ) => {
        /// Every compiled kernel that runs score programs: full attention with [markers](crate::program).
        pub const PROGRAM_ENTRIES: &[Entry] = &[
            $(entry!($name, Sm80 $pass $dtype, $shape, $shared, $min, false).of_programs(),)*
            $(latent_entry($latent, Dtype::$latent_dtype),)*
            $(delta_entry($delta, Dtype::$delta_dtype).of_programs(),)*
            $(hopper_entry!($hopper, $hopper_pass $hopper_dtype, $hopper_shape, false).of_programs(),)*
        ];
        $(
            #[cfg(all(target_arch = "nvptx64", feature = "program_sm_80"))]
            kernel!($latent, latent::forward, crate::abi::ListedForwardParams, crate::element::$latent_dtype);
        )*
        $(
            #[cfg(all(target_arch = "nvptx64", feature = "program_sm_80"))]
            kernel!($delta, delta::program, crate::abi::BackwardParams, crate::element::$delta_dtype);
        )*
        $(
            #[cfg(all(target_arch = "nvptx64", feature = "program_sm_90a"))]
            hopper_kernel!($hopper, $hopper_module::$hopper_kind::$hopper_function, $hopper_params, $hopper_shape);
        )*
        $(
            #[cfg(all(target_arch = "nvptx64", feature = "program_sm_80"))]
            kernel!($name, $module::$function, crate::abi::$params, $shape);
        )*
    };
}

program_entries! {
    tiles {
        "score_forward_f32_d32": Forward F32, ForwardF32D32, FORWARD_BYTES, listed::forward(ListedForwardParams), min_blocks 2;
        "score_forward_f32_d64": Forward F32, ForwardF32D64, FORWARD_BYTES, listed::forward(ListedForwardParams), min_blocks 2;
        "score_forward_f32_d96": Forward F32, ForwardF32D96, FORWARD_BYTES, listed::forward(ListedForwardParams), min_blocks 2;
        "score_forward_f32_d128": Forward F32, ForwardF32D128, FORWARD_BYTES, listed::forward(ListedForwardParams), min_blocks 2;
        "score_forward_f32_d192": Forward F32, ForwardF32D192, FORWARD_BYTES, listed::forward(ListedForwardParams), min_blocks 1;
        "score_forward_f32_d256": Forward F32, ForwardF32D256, FORWARD_BYTES, listed::forward(ListedForwardParams), min_blocks 2;
        "score_forward_f16_d32": Forward F16, ForwardD32<F16>, FORWARD_BYTES, listed::forward(ListedForwardParams), min_blocks 2;
        "score_forward_f16_d64": Forward F16, ForwardD64<F16>, FORWARD_BYTES, listed::forward(ListedForwardParams), min_blocks 2;
        "score_forward_f16_d96": Forward F16, ForwardD96<F16>, FORWARD_BYTES, listed::forward(ListedForwardParams), min_blocks 2;
        "score_forward_f16_d128": Forward F16, ForwardD128<F16>, FORWARD_BYTES, listed::forward(ListedForwardParams), min_blocks 0;
        "score_forward_f16_d192": Forward F16, ForwardD192<F16>, FORWARD_BYTES, listed::forward(ListedForwardParams), min_blocks 1;
        "score_forward_f16_d256": Forward F16, ForwardD256<F16>, FORWARD_BYTES, listed::forward(ListedForwardParams), min_blocks 1;
        "score_forward_bf16_d32": Forward Bf16, ForwardD32<Bf16>, FORWARD_BYTES, listed::forward(ListedForwardParams), min_blocks 2;
        "score_forward_bf16_d64": Forward Bf16, ForwardD64<Bf16>, FORWARD_BYTES, listed::forward(ListedForwardParams), min_blocks 2;
        "score_forward_bf16_d96": Forward Bf16, ForwardD96<Bf16>, FORWARD_BYTES, listed::forward(ListedForwardParams), min_blocks 2;
        "score_forward_bf16_d128": Forward Bf16, ForwardD128<Bf16>, FORWARD_BYTES, listed::forward(ListedForwardParams), min_blocks 0;
        "score_forward_bf16_d192": Forward Bf16, ForwardD192<Bf16>, FORWARD_BYTES, listed::forward(ListedForwardParams), min_blocks 1;
        "score_forward_bf16_d256": Forward Bf16, ForwardD256<Bf16>, FORWARD_BYTES, listed::forward(ListedForwardParams), min_blocks 1;
        "score_backward_queries_f32_d32": BackwardQueries F32, BackwardF32D32, BACKWARD_BYTES, backward::listed_queries(ListedBackwardParams), min_blocks 1;
        "score_backward_queries_f32_d64": BackwardQueries F32, BackwardF32D64, BACKWARD_BYTES, backward::listed_queries(ListedBackwardParams), min_blocks 1;
        "score_backward_queries_f32_d96": BackwardQueries F32, BackwardF32D96, BACKWARD_BYTES, backward::listed_queries(ListedBackwardParams), min_blocks 1;
        "score_backward_queries_f32_d128": BackwardQueries F32, BackwardF32D128, BACKWARD_BYTES, backward::listed_queries(ListedBackwardParams), min_blocks 1;
        "score_backward_queries_f32_d192": BackwardQueries F32, BackwardF32D192, BACKWARD_BYTES, backward::listed_queries(ListedBackwardParams), min_blocks 1;
        "score_backward_queries_f32_d256": BackwardQueries F32, BackwardF32D256, BACKWARD_BYTES, backward::listed_queries(ListedBackwardParams), min_blocks 1;
        "score_backward_keys_f32_d32": BackwardKeys F32, BackwardF32D32, BACKWARD_BYTES, backward::listed_keys(ListedBackwardParams), min_blocks 1;
        "score_backward_keys_f32_d64": BackwardKeys F32, BackwardF32D64, BACKWARD_BYTES, backward::listed_keys(ListedBackwardParams), min_blocks 1;
        "score_backward_keys_f32_d96": BackwardKeys F32, BackwardF32D96, BACKWARD_BYTES, backward::listed_keys(ListedBackwardParams), min_blocks 1;
        "score_backward_keys_f32_d128": BackwardKeys F32, BackwardF32D128, BACKWARD_BYTES, backward::listed_keys(ListedBackwardParams), min_blocks 1;
        "score_backward_keys_f32_d192": BackwardKeys F32, BackwardF32D192, BACKWARD_BYTES, backward::listed_keys(ListedBackwardParams), min_blocks 1;
        "score_backward_keys_f32_d256": BackwardKeys F32, BackwardF32D256, BACKWARD_BYTES, backward::listed_keys(ListedBackwardParams), min_blocks 1;
        "score_backward_queries_f16_d32": BackwardQueries F16, BackwardD32<F16>, BACKWARD_BYTES, backward::listed_queries(ListedBackwardParams), min_blocks 1;
        "score_backward_queries_f16_d64": BackwardQueries F16, BackwardD64<F16>, BACKWARD_BYTES, backward::listed_queries(ListedBackwardParams), min_blocks 1;
        "score_backward_queries_f16_d96": BackwardQueries F16, BackwardD96<F16>, BACKWARD_BYTES, backward::listed_queries(ListedBackwardParams), min_blocks 1;
        "score_backward_queries_f16_d128": BackwardQueries F16, BackwardD128<F16>, BACKWARD_BYTES, backward::listed_queries(ListedBackwardParams), min_blocks 1;
        "score_backward_queries_f16_d192": BackwardQueries F16, BackwardD192<F16>, BACKWARD_BYTES, backward::listed_queries(ListedBackwardParams), min_blocks 1;
        "score_backward_queries_f16_d256": BackwardQueries F16, BackwardD256<F16>, BACKWARD_BYTES, backward::listed_queries(ListedBackwardParams), min_blocks 0;
        "score_backward_keys_f16_d32": BackwardKeys F16, BackwardD32<F16>, BACKWARD_BYTES, backward::listed_keys(ListedBackwardParams), min_blocks 1;
        "score_backward_keys_f16_d64": BackwardKeys F16, BackwardD64<F16>, BACKWARD_BYTES, backward::listed_keys(ListedBackwardParams), min_blocks 1;
        "score_backward_keys_f16_d96": BackwardKeys F16, BackwardD96<F16>, BACKWARD_BYTES, backward::listed_keys(ListedBackwardParams), min_blocks 1;
        "score_backward_keys_f16_d128": BackwardKeys F16, BackwardD128<F16>, BACKWARD_BYTES, backward::listed_keys(ListedBackwardParams), min_blocks 1;
        "score_backward_keys_f16_d192": BackwardKeys F16, BackwardD192<F16>, BACKWARD_BYTES, backward::listed_keys(ListedBackwardParams), min_blocks 1;
        "score_backward_keys_f16_d256": BackwardKeys F16, BackwardD256<F16>, BACKWARD_BYTES, backward::listed_keys(ListedBackwardParams), min_blocks 1;
        "score_backward_queries_bf16_d32": BackwardQueries Bf16, BackwardD32<Bf16>, BACKWARD_BYTES, backward::listed_queries(ListedBackwardParams), min_blocks 1;
        "score_backward_queries_bf16_d64": BackwardQueries Bf16, BackwardD64<Bf16>, BACKWARD_BYTES, backward::listed_queries(ListedBackwardParams), min_blocks 1;
        "score_backward_queries_bf16_d96": BackwardQueries Bf16, BackwardD96<Bf16>, BACKWARD_BYTES, backward::listed_queries(ListedBackwardParams), min_blocks 1;
        "score_backward_queries_bf16_d128": BackwardQueries Bf16, BackwardD128<Bf16>, BACKWARD_BYTES, backward::listed_queries(ListedBackwardParams), min_blocks 1;
        "score_backward_queries_bf16_d192": BackwardQueries Bf16, BackwardD192<Bf16>, BACKWARD_BYTES, backward::listed_queries(ListedBackwardParams), min_blocks 1;
        "score_backward_queries_bf16_d256": BackwardQueries Bf16, BackwardD256<Bf16>, BACKWARD_BYTES, backward::listed_queries(ListedBackwardParams), min_blocks 0;
        "score_backward_keys_bf16_d32": BackwardKeys Bf16, BackwardD32<Bf16>, BACKWARD_BYTES, backward::listed_keys(ListedBackwardParams), min_blocks 1;
        "score_backward_keys_bf16_d64": BackwardKeys Bf16, BackwardD64<Bf16>, BACKWARD_BYTES, backward::listed_keys(ListedBackwardParams), min_blocks 1;
        "score_backward_keys_bf16_d96": BackwardKeys Bf16, BackwardD96<Bf16>, BACKWARD_BYTES, backward::listed_keys(ListedBackwardParams), min_blocks 1;
        "score_backward_keys_bf16_d128": BackwardKeys Bf16, BackwardD128<Bf16>, BACKWARD_BYTES, backward::listed_keys(ListedBackwardParams), min_blocks 1;
        "score_backward_keys_bf16_d192": BackwardKeys Bf16, BackwardD192<Bf16>, BACKWARD_BYTES, backward::listed_keys(ListedBackwardParams), min_blocks 1;
        "score_backward_keys_bf16_d256": BackwardKeys Bf16, BackwardD256<Bf16>, BACKWARD_BYTES, backward::listed_keys(ListedBackwardParams), min_blocks 1;
    }
    latent {
        "score_forward_f16_d576": F16;
        "score_forward_bf16_d576": Bf16;
    }
    delta {
        "score_backward_delta_f32": F32;
        "score_backward_delta_f16": F16;
        "score_backward_delta_bf16": Bf16;
    }
    hopper {
        "score_hopper_forward_f16_d64": Forward F16, HopperWideD64<F16>, hopper::forward::program(HopperForwardParams);
        "score_hopper_forward_f16_d96": Forward F16, HopperD96<F16>, hopper::forward::program(HopperForwardParams);
        "score_hopper_forward_f16_d128": Forward F16, HopperNarrowD128<F16>, hopper::forward::program(HopperForwardParams);
        "score_hopper_forward_f16_d192": Forward F16, HopperD192<F16>, hopper::forward::program(HopperForwardParams);
        "score_hopper_forward_f16_d256": Forward F16, HopperD256<F16>, hopper::forward::program(HopperForwardParams);
        "score_hopper_forward_bf16_d64": Forward Bf16, HopperWideD64<Bf16>, hopper::forward::program(HopperForwardParams);
        "score_hopper_forward_bf16_d96": Forward Bf16, HopperD96<Bf16>, hopper::forward::program(HopperForwardParams);
        "score_hopper_forward_bf16_d128": Forward Bf16, HopperNarrowD128<Bf16>, hopper::forward::program(HopperForwardParams);
        "score_hopper_forward_bf16_d192": Forward Bf16, HopperD192<Bf16>, hopper::forward::program(HopperForwardParams);
        "score_hopper_forward_bf16_d256": Forward Bf16, HopperD256<Bf16>, hopper::forward::program(HopperForwardParams);
    }
}
