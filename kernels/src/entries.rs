//! The table of compiled kernels. Kernels are emitted from it, the host chooses from it, tests iterate over it, and
//! `cargo xtask ptx` reads the launch bounds from it. A shape that is not in it cannot be planned.

mod entry;

pub use entry::{Arch, Dtype, Entry, Pass};

use crate::element::{Bf16, F16};
use crate::shape::*;

/// The kernel of `pass` that serves this head_dim with the least waste, without clusters.
pub fn find(pass: Pass, arch: Arch, dtype: Dtype, causal: bool, head_dim: u32) -> Option<&'static Entry> {
    narrowest(ENTRIES, pass, arch, dtype, head_dim, |e| {
        e.causal == causal && e.cluster == 1
    })
}

/// The kernel of `pass` that runs score programs and serves this head_dim with the least waste.
pub fn find_program(pass: Pass, arch: Arch, dtype: Dtype, head_dim: u32) -> Option<&'static Entry> {
    narrowest(PROGRAM_ENTRIES, pass, arch, dtype, head_dim, |_| true)
}

fn narrowest(
    entries: &'static [Entry],
    pass: Pass,
    arch: Arch,
    dtype: Dtype,
    head_dim: u32,
    fits: impl Fn(&Entry) -> bool,
) -> Option<&'static Entry> {
    entries
        .iter()
        .filter(|e| (e.pass, e.arch, e.dtype) == (pass, arch, dtype) && e.head_dim >= head_dim && fits(e))
        .min_by_key(|e| e.head_dim)
}

macro_rules! entry {
    ($name:expr, $arch:ident $pass:ident $dtype:ident, $shape:ty, $shared:ident, $min_blocks:literal, $causal:literal) => {
        Entry {
            name: $name,
            pass: Pass::$pass,
            arch: Arch::$arch,
            dtype: Dtype::$dtype,
            causal: $causal,
            program: false,
            quantized: false,
            head_dim: <$shape>::HEAD_DIM,
            block_m: if matches!(Pass::$pass, Pass::BackwardDkv) {
                <$shape>::COLUMNS
            } else {
                <$shape>::ROWS
            },
            block_n: if matches!(Pass::$pass, Pass::BackwardDkv) {
                <$shape>::ROWS
            } else {
                <$shape>::COLUMNS
            },
            threads: <$shape>::THREADS,
            min_blocks: $min_blocks,
            shared_bytes: <$shape>::$shared,
            two_walks: matches!(Pass::$pass, Pass::BackwardDkv) && <$shape>::TWO_WALKS,
            cluster: 1,
        }
    };
}

/// The shape under a causal mask of a row for Hopper, `full | causal` where they differ.
macro_rules! causal_shape {
    ($dtype:ident, $shape:ident) => {
        $shape<$dtype>
    };
    ($dtype:ident, $shape:ident | $causal:ident) => {
        $causal<$dtype>
    };
}

/// A row of the table for the portable kernel of row sums.
const fn preprocess_entry(name: &'static str, dtype: Dtype) -> Entry {
    Entry {
        name,
        pass: Pass::BackwardPreprocess,
        arch: Arch::Sm80,
        dtype,
        causal: false,
        program: false,
        quantized: false,
        head_dim: 256,
        block_m: DELTA_ROWS,
        block_n: 0,
        threads: DELTA_ROWS * 8,
        min_blocks: 8,
        shared_bytes: 0,
        two_walks: false,
        cluster: 1,
    }
}

/// A row of the table for the kernel that combines partial results.
const fn combine_entry(name: &'static str, dtype: Dtype) -> Entry {
    Entry {
        pass: Pass::Combine,
        head_dim: LatentD576::<F16>::HEAD_DIM_V,
        block_m: 0,
        threads: COMBINE_WARPS * 32,
        ..preprocess_entry(name, dtype)
    }
}

/// A row of the table for the kernel that turns and moves rows, of any head_dim.
const fn rotary_entry(name: &'static str, dtype: Dtype) -> Entry {
    Entry {
        pass: Pass::Rotary,
        head_dim: u32::MAX,
        block_m: 0,
        threads: ROTARY_WARPS * 32,
        ..preprocess_entry(name, dtype)
    }
}

/// A row of the table for the preprocess and postprocess kernels of Hopper's backward, which need so many bytes of shared memory.
const fn sums_entry(name: &'static str, pass: Pass, dtype: Dtype, shared_bytes: u32) -> Entry {
    Entry {
        pass,
        arch: Arch::Sm90a,
        block_m: if shared_bytes == 0 { DELTA_ROWS } else { HOPPER_ROWS },
        threads: 128,
        shared_bytes,
        ..preprocess_entry(name, dtype)
    }
}

/// A row of the table for Hopper.
macro_rules! hopper_entry {
    ($name:expr, $pass:ident $dtype:ident, $shape:ty, $causal:literal) => {
        Entry {
            name: $name,
            pass: Pass::$pass,
            arch: Arch::Sm90a,
            dtype: Dtype::$dtype,
            causal: $causal,
            program: false,
            quantized: false,
            head_dim: <$shape>::HEAD_DIM,
            block_m: hopper_entry!(m $pass $shape),
            block_n: hopper_entry!(n $pass $shape),
            threads: <$shape>::THREADS,
            min_blocks: 1,
            shared_bytes: <$shape>::SHARED_BYTES,
            two_walks: false,
            cluster: 1,
        }
    };
    (m Forward $shape:ty) => { <$shape>::BLOCK_M };
    (n Forward $shape:ty) => { <$shape>::BLOCK_N };
    (m $keys:ident $shape:ty) => { <$shape>::COLUMNS };
    (n $keys:ident $shape:ty) => { <$shape>::ROWS };
}

/// Compiles one kernel of the table for Hopper, whose parameters hold tensor maps: copies want their address.
#[cfg(all(
    target_arch = "nvptx64",
    any(feature = "sm_90a", feature = "program_sm_90a", feature = "fp8_sm_90a")
))]
macro_rules! hopper_kernel {
    ($name:expr, $module:ident::$kind:ident::$function:ident, $params:ident, $($argument:tt)*) => {
        const _: () = {
            #[unsafe(export_name = $name)]
            unsafe extern "ptx-kernel" fn kernel(params: crate::abi::$params) {
                let maps = crate::ptx::tma::parameter_address!($name);
                // SAFETY: the host launches a row of the table as the row describes.
                unsafe { crate::$module::$kind::$function::<$($argument)*>(&params, maps) }
            }
        };
    };
}

/// Compiles a kernel of the table.
#[cfg(target_arch = "nvptx64")]
macro_rules! kernel {
    ($name:expr, $($module:ident)::+, $params:ty, $($argument:tt)*) => {
        const _: () = {
            #[unsafe(export_name = $name)]
            unsafe extern "ptx-kernel" fn kernel(params: $params) {
                // SAFETY: the host launches a row of the table as the row describes.
                unsafe { crate::$($module)::+::<$($argument)*>(&params) }
            }
        };
    };
}
#[cfg(all(target_arch = "nvptx64", feature = "study"))]
pub(crate) use kernel;

/// The table. A row has a kernel's name up to its dtype and after it, and stands for the kernels of every dtype.
macro_rules! entries {
    (
        tiles { $($name:literal $dim:literal: $pass:ident, $module:ident::$function:ident($params:ident), $shared:ident,
                  $f32:ident min_blocks $f32_min:literal, $half:ident min_blocks $half_min:literal;)* }
        rows { $($rows:literal: $entry:ident, $rows_module:ident::$rows_function:ident($rows_params:ident);)* }
        hopper { $($hopper:literal $hopper_dim:literal: $hopper_pass:ident, $hopper_shape:ident $(| $causal_shape:ident)?,
                   $hopper_module:ident::$hopper_kind:ident::$hopper_function:ident($hopper_params:ident);)* }
        clusters { $($cluster:literal $cluster_dim:literal: $cluster_shape:ident;)* }
        sums { $($sums:literal: $sums_pass:ident, $sums_function:ident, $sums_bytes:expr;)* }
    ) => {
        /// All compiled kernels: each row of tiles below, full and causal, forward in clusters, and the preprocess and
        /// postprocess kernels of backward.
        pub const ENTRIES: &[Entry] = &[
            $(
                entry!(concat!($name, "_f32", $dim), Sm80 $pass F32, $f32, $shared, $f32_min, false),
                entry!(concat!($name, "_f32", $dim, "_causal"), Sm80 $pass F32, $f32, $shared, $f32_min, true),
                entry!(concat!($name, "_f16", $dim), Sm80 $pass F16, $half<F16>, $shared, $half_min, false),
                entry!(concat!($name, "_f16", $dim, "_causal"), Sm80 $pass F16, $half<F16>, $shared, $half_min, true),
                entry!(concat!($name, "_bf16", $dim), Sm80 $pass Bf16, $half<Bf16>, $shared, $half_min, false),
                entry!(concat!($name, "_bf16", $dim, "_causal"), Sm80 $pass Bf16, $half<Bf16>, $shared, $half_min, true),
            )*
            $(
                $entry(concat!($rows, "_f32"), Dtype::F32),
                $entry(concat!($rows, "_f16"), Dtype::F16),
                $entry(concat!($rows, "_bf16"), Dtype::Bf16),
            )*
            $(
                hopper_entry!(concat!($hopper, "_f16", $hopper_dim), $hopper_pass F16, $hopper_shape<F16>, false),
                hopper_entry!(concat!($hopper, "_f16", $hopper_dim, "_causal"), $hopper_pass F16, causal_shape!(F16, $hopper_shape $(| $causal_shape)?), true),
                hopper_entry!(concat!($hopper, "_bf16", $hopper_dim), $hopper_pass Bf16, $hopper_shape<Bf16>, false),
                hopper_entry!(concat!($hopper, "_bf16", $hopper_dim, "_causal"), $hopper_pass Bf16, causal_shape!(Bf16, $hopper_shape $(| $causal_shape)?), true),
            )*
            $(
                hopper_entry!(concat!($cluster, "_f16", $cluster_dim), Forward F16, $cluster_shape<F16>, false).of_clusters(),
                hopper_entry!(concat!($cluster, "_bf16", $cluster_dim), Forward Bf16, $cluster_shape<Bf16>, false).of_clusters(),
            )*
            $(
                sums_entry(concat!($sums, "_f16"), Pass::$sums_pass, Dtype::F16, $sums_bytes),
                sums_entry(concat!($sums, "_bf16"), Pass::$sums_pass, Dtype::Bf16, $sums_bytes),
            )*
        ];
        #[cfg(all(target_arch = "nvptx64", feature = "sm_80"))]
        mod sm_80 {
            use super::*;
            use crate::element::F32;
            $(
                kernel!(concat!($name, "_f32", $dim), $module::$function, crate::abi::$params, $f32, false);
                kernel!(concat!($name, "_f32", $dim, "_causal"), $module::$function, crate::abi::$params, $f32, true);
                kernel!(concat!($name, "_f16", $dim), $module::$function, crate::abi::$params, $half<F16>, false);
                kernel!(concat!($name, "_f16", $dim, "_causal"), $module::$function, crate::abi::$params, $half<F16>, true);
                kernel!(concat!($name, "_bf16", $dim), $module::$function, crate::abi::$params, $half<Bf16>, false);
                kernel!(concat!($name, "_bf16", $dim, "_causal"), $module::$function, crate::abi::$params, $half<Bf16>, true);
            )*
            $(
                kernel!(concat!($rows, "_f32"), $rows_module::$rows_function, crate::abi::$rows_params, F32);
                kernel!(concat!($rows, "_f16"), $rows_module::$rows_function, crate::abi::$rows_params, F16);
                kernel!(concat!($rows, "_bf16"), $rows_module::$rows_function, crate::abi::$rows_params, Bf16);
            )*
        }
        #[cfg(all(target_arch = "nvptx64", feature = "sm_90a"))]
        mod sm_90a {
            use super::*;
            $(
                hopper_kernel!(concat!($hopper, "_f16", $hopper_dim), $hopper_module::$hopper_kind::$hopper_function, $hopper_params, $hopper_shape<F16>, false);
                hopper_kernel!(concat!($hopper, "_f16", $hopper_dim, "_causal"), $hopper_module::$hopper_kind::$hopper_function, $hopper_params, causal_shape!(F16, $hopper_shape $(| $causal_shape)?), true);
                hopper_kernel!(concat!($hopper, "_bf16", $hopper_dim), $hopper_module::$hopper_kind::$hopper_function, $hopper_params, $hopper_shape<Bf16>, false);
                hopper_kernel!(concat!($hopper, "_bf16", $hopper_dim, "_causal"), $hopper_module::$hopper_kind::$hopper_function, $hopper_params, causal_shape!(Bf16, $hopper_shape $(| $causal_shape)?), true);
            )*
            $(
                hopper_kernel!(concat!($cluster, "_f16", $cluster_dim), hopper::forward::in_clusters, HopperForwardParams, $cluster_shape<F16>);
                hopper_kernel!(concat!($cluster, "_bf16", $cluster_dim), hopper::forward::in_clusters, HopperForwardParams, $cluster_shape<Bf16>);
            )*
            $(
                kernel!(concat!($sums, "_f16"), hopper::backward::sums::$sums_function, crate::abi::QuerySumsParams, F16);
                kernel!(concat!($sums, "_bf16"), hopper::backward::sums::$sums_function, crate::abi::QuerySumsParams, Bf16);
            )*
        }
    };
}

entries! {
    tiles {
        "forward" "_d32": Forward, forward::forward(ForwardParams), FORWARD_BYTES, ForwardF32D32 min_blocks 2, ForwardD32 min_blocks 2;
        "forward" "_d64": Forward, forward::forward(ForwardParams), FORWARD_BYTES, ForwardF32D64 min_blocks 2, ForwardD64 min_blocks 2;
        "forward" "_d96": Forward, forward::forward(ForwardParams), FORWARD_BYTES, ForwardF32D96 min_blocks 2, ForwardD96 min_blocks 2;
        "forward" "_d128": Forward, forward::forward(ForwardParams), FORWARD_BYTES, ForwardF32D128 min_blocks 2, ForwardD128 min_blocks 1;
        "forward" "_d192": Forward, forward::forward(ForwardParams), FORWARD_BYTES, ForwardF32D192 min_blocks 1, ForwardD192 min_blocks 1;
        "forward" "_d256": Forward, forward::forward(ForwardParams), FORWARD_BYTES, ForwardF32D256 min_blocks 2, ForwardD256 min_blocks 1;
        "backward_dq" "_d32": BackwardDq, backward::dq(BackwardParams), BACKWARD_BYTES, BackwardF32D32 min_blocks 2, BackwardD32 min_blocks 1;
        "backward_dq" "_d64": BackwardDq, backward::dq(BackwardParams), BACKWARD_BYTES, BackwardF32D64 min_blocks 2, BackwardD64 min_blocks 1;
        "backward_dq" "_d96": BackwardDq, backward::dq(BackwardParams), BACKWARD_BYTES, BackwardF32D96 min_blocks 1, BackwardD96 min_blocks 1;
        "backward_dq" "_d128": BackwardDq, backward::dq(BackwardParams), BACKWARD_BYTES, BackwardF32D128 min_blocks 1, BackwardD128 min_blocks 1;
        "backward_dq" "_d192": BackwardDq, backward::dq(BackwardParams), BACKWARD_BYTES, BackwardF32D192 min_blocks 1, BackwardD192 min_blocks 1;
        "backward_dq" "_d256": BackwardDq, backward::dq(BackwardParams), BACKWARD_BYTES, BackwardF32D256 min_blocks 1, BackwardD256 min_blocks 0;
        "backward_dkv" "_d32": BackwardDkv, backward::dkv(BackwardParams), BACKWARD_BYTES, BackwardF32D32 min_blocks 1, BackwardD32 min_blocks 1;
        "backward_dkv" "_d64": BackwardDkv, backward::dkv(BackwardParams), BACKWARD_BYTES, BackwardF32D64 min_blocks 1, BackwardD64 min_blocks 1;
        "backward_dkv" "_d96": BackwardDkv, backward::dkv(BackwardParams), BACKWARD_BYTES, BackwardF32D96 min_blocks 1, BackwardD96 min_blocks 1;
        "backward_dkv" "_d128": BackwardDkv, backward::dkv(BackwardParams), BACKWARD_BYTES, BackwardF32D128 min_blocks 1, BackwardD128 min_blocks 1;
        "backward_dkv" "_d192": BackwardDkv, backward::dkv(BackwardParams), BACKWARD_BYTES, BackwardF32D192 min_blocks 1, BackwardD192 min_blocks 1;
        "backward_dkv" "_d256": BackwardDkv, backward::dkv(BackwardParams), BACKWARD_BYTES, BackwardF32D256 min_blocks 1, BackwardD256 min_blocks 1;
    }
    rows {
        "backward_preprocess": preprocess_entry, delta::delta(BackwardParams);
        "combine": combine_entry, listed::combine(ListedForwardParams);
        "rotary": rotary_entry, rotary::rotary(RotaryParams);
    }
    hopper {
        "hopper_forward" "_d64": Forward, HopperD64, hopper::forward::forward(HopperForwardParams);
        "hopper_forward" "_d96": Forward, HopperD96, hopper::forward::forward(HopperForwardParams);
        "hopper_forward" "_d128": Forward, HopperD128 | HopperD128Causal, hopper::forward::forward(HopperForwardParams);
        "hopper_forward" "_d192": Forward, HopperD192, hopper::forward::forward(HopperForwardParams);
        "hopper_forward" "_d256": Forward, HopperD256, hopper::forward::forward(HopperForwardParams);
        "hopper_backward_dqkv" "_d64": BackwardDqkv, HopperBackwardD64, hopper::backward::dqkv(HopperBackwardParams);
        "hopper_backward_dqkv" "_d96": BackwardDqkv, HopperBackwardD96, hopper::backward::dqkv(HopperBackwardParams);
        "hopper_backward_dqkv" "_d128": BackwardDqkv, HopperBackwardD128, hopper::backward::dqkv(HopperBackwardParams);
        "hopper_backward_dqkv" "_d192": BackwardDqkv, HopperBackwardD192, hopper::backward::wide(HopperBackwardParams);
        "hopper_backward_dqkv" "_d256": BackwardDqkv, HopperBackwardD256, hopper::backward::wide(HopperBackwardParams);
    }
    clusters {
        "hopper_forward_cluster" "_d128": HopperD128;
        "hopper_forward_cluster" "_d192": HopperD192;
        "hopper_forward_cluster" "_d256": HopperD256;
    }
    sums {
        "hopper_backward_preprocess": BackwardPreprocess, preprocess, 0;
        "hopper_backward_postprocess": BackwardPostprocess, postprocess, HOPPER_ROWS * 128;
    }
}

mod fp8;
mod programs;

pub use fp8::{FP8_ENTRIES, find_fp8};
pub use programs::PROGRAM_ENTRIES;
