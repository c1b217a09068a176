//! The table of compiled kernels. Kernels are emitted from it, the host chooses from it, tests iterate over it, and
//! `cargo xtask ptx` reads the launch bounds from it. A shape that is not in it cannot be planned.

use crate::element::{Bf16, F16};
use crate::shape::*;

/// Target that a kernel is compiled for, and the least GPU that runs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Arch {
    /// sm_80: A100 and every later GPU.
    Sm80,
    /// sm_90a: Hopper (H100, H200) and no other.
    Sm90a,
}

impl Arch {
    /// All targets that kernels are compiled for.
    pub const ALL: &[Self] = &[Self::Sm80, Self::Sm90a];

    /// Returns the target's name as PTX and ptxas spell it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sm80 => "sm_80",
            Self::Sm90a => "sm_90a",
        }
    }
}

/// Element type of q, k, v and out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Dtype {
    /// IEEE binary32, computed in f32 arithmetic (no TF32).
    F32,
    /// IEEE binary16, accumulated in f32.
    F16,
    /// bfloat16, accumulated in f32.
    Bf16,
}

impl Dtype {
    /// Returns the bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Returns the name in kernel names and on command lines.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// Result that a kernel computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Pass {
    /// out and lse from q, k, v.
    Forward,
    /// out and lse from the partial results of splits over keys.
    Combine,
    /// Preprocess: delta = rowsum(dO * O), which the other backward kernels need. For Hopper also lse in base 2,
    /// padded, and a cleared dQ accumulator.
    BackwardDelta,
    /// dQ.
    BackwardQueries,
    /// dK and dV.
    BackwardKeys,
    /// dK and dV, and dQ in an f32 accumulator in device memory, to which blocks add.
    BackwardAll,
    /// Postprocess: dQ from that accumulator.
    BackwardFinish,
    /// Rows of q, or of new keys and values, turned by a rotary embedding.
    Rotary,
}

/// A compiled kernel. `P` is the type of its result: a [`Pass`], except for kernels of the traffic study.
#[derive(Clone, Copy, Debug)]
pub struct Entry<P = Pass> {
    /// Name of the `.entry`, and of the kernel in its archive.
    pub name: &'static str,
    /// Result that it computes.
    pub pass: P,
    /// Target that it is compiled for.
    pub arch: Arch,
    /// Element type of its tensors.
    pub dtype: Dtype,
    /// True if it masks causally.
    pub causal: bool,
    /// True if it has the markers of score programs. The program has the mask then.
    pub program: bool,
    /// True if q, k and v are e4m3 with scales; the dtype is that of out.
    pub quantized: bool,
    /// Widest head it serves.
    pub head_dim: u32,
    /// Number of queries of a tile. A block owns one such tile, or in `BackwardKeys` streams them.
    pub block_m: u32,
    /// Number of keys of a tile. A block streams them, or in `BackwardKeys` owns one.
    pub block_n: u32,
    /// Threads per block.
    pub threads: u32,
    /// Least number of blocks that must fit on a multiprocessor, which bounds the registers that ptxas may use. 0
    /// leaves this to ptxas, which then spills less than with 1 or 2 where all 255 registers are used.
    pub min_blocks: u32,
    /// Dynamic shared memory per block, in bytes.
    pub shared_bytes: u32,
    /// True if the kernel streams the queries twice, once for dK and once for dV.
    pub two_walks: bool,
    /// Number of blocks of a cluster, along x. They own neighbouring tiles and load the streamed ones together. 1 without
    /// clusters.
    pub cluster: u32,
}

impl<P> Entry<P> {
    /// Tells if this is a kernel of latent attention, which loads values with their keys where both are the same rows.
    pub const fn is_latent(&self) -> bool {
        self.head_dim == LatentD576::<F16>::HEAD_DIM
    }

    /// Marks a kernel as one with the markers of score programs.
    const fn of_programs(mut self) -> Self
    where
        P: Copy,
    {
        self.program = true;
        self
    }

    /// Returns the kernel for a table that names passes by another type.
    pub const fn with_pass<Q: Copy>(&self, pass: Q) -> Entry<Q> {
        Entry {
            name: self.name,
            pass,
            arch: self.arch,
            dtype: self.dtype,
            causal: self.causal,
            program: self.program,
            quantized: self.quantized,
            head_dim: self.head_dim,
            block_m: self.block_m,
            block_n: self.block_n,
            threads: self.threads,
            min_blocks: self.min_blocks,
            shared_bytes: self.shared_bytes,
            two_walks: self.two_walks,
            cluster: self.cluster,
        }
    }
}

impl Entry {
    /// Returns the kernel that does the same in clusters of blocks, if there is one.
    pub fn in_clusters(&self) -> Option<&'static Entry> {
        let key = |e: &Entry| (e.pass, e.arch, e.dtype, e.quantized, e.causal, e.program, e.head_dim);
        ENTRIES.iter().find(|e| e.cluster > 1 && key(e) == key(self))
    }
}

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
            block_m: if matches!(Pass::$pass, Pass::BackwardKeys) {
                <$shape>::COLUMNS
            } else {
                <$shape>::ROWS
            },
            block_n: if matches!(Pass::$pass, Pass::BackwardKeys) {
                <$shape>::ROWS
            } else {
                <$shape>::COLUMNS
            },
            threads: <$shape>::THREADS,
            min_blocks: $min_blocks,
            shared_bytes: <$shape>::$shared,
            two_walks: matches!(Pass::$pass, Pass::BackwardKeys) && <$shape>::TWO_WALKS,
            cluster: 1,
        }
    };
}

/// The shape under a causal mask of a row for Hopper, `full | causal` where they differ.
macro_rules! causal_shape {
    ($shape:ty) => {
        $shape
    };
    ($shape:ty | $causal:ty) => {
        $causal
    };
}

/// A row of the table for the portable kernel of row sums.
const fn delta_entry(name: &'static str, dtype: Dtype) -> Entry {
    Entry {
        name,
        pass: Pass::BackwardDelta,
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
        ..delta_entry(name, dtype)
    }
}

/// A row of the table for the kernel that turns and moves rows, of any head_dim.
const fn rotary_entry(name: &'static str, dtype: Dtype) -> Entry {
    Entry {
        pass: Pass::Rotary,
        head_dim: u32::MAX,
        block_m: 0,
        threads: ROTARY_WARPS * 32,
        ..delta_entry(name, dtype)
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
            two_walks: hopper_entry!(two_walks $pass $shape),
            cluster: 1,
        }
    };
    (m Forward $shape:ty) => { <$shape>::BLOCK_M };
    (n Forward $shape:ty) => { <$shape>::BLOCK_N };
    (m BackwardQueries $shape:ty) => { <$shape>::ROWS };
    (n BackwardQueries $shape:ty) => { <$shape>::COLUMNS };
    (m $keys:ident $shape:ty) => { <$shape>::COLUMNS };
    (n $keys:ident $shape:ty) => { <$shape>::ROWS };
    (two_walks BackwardKeys $shape:ty) => { <$shape>::WALK.is_twice() };
    (two_walks $pass:ident $shape:ty) => { false };
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

macro_rules! entries {
    (
        tiles { $($name:literal: $pass:ident $arch:ident $dtype:ident, $shape:ty, $shared:ident,
                  $module:ident::$function:ident($params:ident), min_blocks $min:literal;)* }
        delta { $($delta:literal: $delta_dtype:ident;)* }
        combine { $($combine:literal: $combine_dtype:ident;)* }
        rotary { $($rotary:literal: $rotary_dtype:ident;)* }
        hopper { $($hopper:literal: $hopper_pass:ident $hopper_dtype:ident, $hopper_shape:ty $(| $causal_shape:ty)?,
                   $hopper_module:ident::$hopper_kind:ident::$hopper_function:ident($hopper_params:ident);)* }
        clusters { $($cluster:literal: $cluster_dtype:ident, $cluster_shape:ty;)* }
        sums { $($sums:literal: $sums_pass:ident $sums_dtype:ident, $sums_function:ident, $sums_bytes:expr;)* }
    ) => {
        /// All compiled kernels: each row of tiles below, full and causal, forward in clusters, and the preprocess and
        /// postprocess kernels of backward.
        pub const ENTRIES: &[Entry] = &[
            $(
                entry!($name, $arch $pass $dtype, $shape, $shared, $min, false),
                entry!(concat!($name, "_causal"), $arch $pass $dtype, $shape, $shared, $min, true),
            )*
            $(delta_entry($delta, Dtype::$delta_dtype),)*
            $(combine_entry($combine, Dtype::$combine_dtype),)*
            $(rotary_entry($rotary, Dtype::$rotary_dtype),)*
            $(
                hopper_entry!($hopper, $hopper_pass $hopper_dtype, $hopper_shape, false),
                hopper_entry!(concat!($hopper, "_causal"), $hopper_pass $hopper_dtype, causal_shape!($hopper_shape $(| $causal_shape)?), true),
            )*
            $(Entry {
                cluster: CLUSTER,
                ..hopper_entry!($cluster, Forward $cluster_dtype, $cluster_shape, false)
            },)*
            $(Entry {
                pass: Pass::$sums_pass,
                arch: Arch::Sm90a,
                block_m: if $sums_bytes == 0 { DELTA_ROWS } else { HOPPER_ROWS },
                threads: 128,
                shared_bytes: $sums_bytes,
                ..delta_entry($sums, Dtype::$sums_dtype)
            },)*
        ];
        $(
            #[cfg(all(target_arch = "nvptx64", feature = "sm_90a"))]
            hopper_kernel!($cluster, hopper::forward::in_clusters, HopperForwardParams, $cluster_shape);
        )*
        $(
            #[cfg(all(target_arch = "nvptx64", feature = "sm_90a"))]
            kernel!($sums, hopper::backward::sums::$sums_function, crate::abi::QuerySumsParams, $sums_dtype);
        )*
        $(
            #[cfg(all(target_arch = "nvptx64", feature = "sm_90a"))]
            hopper_kernel!($hopper, $hopper_module::$hopper_kind::$hopper_function, $hopper_params, $hopper_shape, false);
            #[cfg(all(target_arch = "nvptx64", feature = "sm_90a"))]
            hopper_kernel!(concat!($hopper, "_causal"), $hopper_module::$hopper_kind::$hopper_function, $hopper_params, causal_shape!($hopper_shape $(| $causal_shape)?), true);
        )*
        $(
            #[cfg(all(target_arch = "nvptx64", feature = "sm_80"))]
            kernel!($name, $module::$function, crate::abi::$params, $shape, false);
            #[cfg(all(target_arch = "nvptx64", feature = "sm_80"))]
            kernel!(concat!($name, "_causal"), $module::$function, crate::abi::$params, $shape, true);
        )*
        $(
            #[cfg(all(target_arch = "nvptx64", feature = "sm_80"))]
            kernel!($delta, delta::delta, crate::abi::BackwardParams, crate::element::$delta_dtype);
        )*
        $(
            #[cfg(all(target_arch = "nvptx64", feature = "sm_80"))]
            kernel!($combine, listed::combine, crate::abi::ListedForwardParams, crate::element::$combine_dtype);
        )*
        $(
            #[cfg(all(target_arch = "nvptx64", feature = "sm_80"))]
            kernel!($rotary, rotary::rotary, crate::abi::RotaryParams, crate::element::$rotary_dtype);
        )*
    };
}

entries! {
    tiles {
        "forward_f32_d32": Forward Sm80 F32, ForwardF32D32, FORWARD_BYTES, forward::forward(ForwardParams), min_blocks 2;
        "forward_f32_d64": Forward Sm80 F32, ForwardF32D64, FORWARD_BYTES, forward::forward(ForwardParams), min_blocks 2;
        "forward_f32_d96": Forward Sm80 F32, ForwardF32D96, FORWARD_BYTES, forward::forward(ForwardParams), min_blocks 2;
        "forward_f32_d128": Forward Sm80 F32, ForwardF32D128, FORWARD_BYTES, forward::forward(ForwardParams), min_blocks 2;
        "forward_f32_d192": Forward Sm80 F32, ForwardF32D192, FORWARD_BYTES, forward::forward(ForwardParams), min_blocks 1;
        "forward_f32_d256": Forward Sm80 F32, ForwardF32D256, FORWARD_BYTES, forward::forward(ForwardParams), min_blocks 2;
        "forward_f16_d32": Forward Sm80 F16, ForwardD32<F16>, FORWARD_BYTES, forward::forward(ForwardParams), min_blocks 2;
        "forward_f16_d64": Forward Sm80 F16, ForwardD64<F16>, FORWARD_BYTES, forward::forward(ForwardParams), min_blocks 2;
        "forward_f16_d96": Forward Sm80 F16, ForwardD96<F16>, FORWARD_BYTES, forward::forward(ForwardParams), min_blocks 2;
        "forward_f16_d128": Forward Sm80 F16, ForwardD128<F16>, FORWARD_BYTES, forward::forward(ForwardParams), min_blocks 1;
        "forward_f16_d192": Forward Sm80 F16, ForwardD192<F16>, FORWARD_BYTES, forward::forward(ForwardParams), min_blocks 1;
        "forward_f16_d256": Forward Sm80 F16, ForwardD256<F16>, FORWARD_BYTES, forward::forward(ForwardParams), min_blocks 1;
        "forward_bf16_d32": Forward Sm80 Bf16, ForwardD32<Bf16>, FORWARD_BYTES, forward::forward(ForwardParams), min_blocks 2;
        "forward_bf16_d64": Forward Sm80 Bf16, ForwardD64<Bf16>, FORWARD_BYTES, forward::forward(ForwardParams), min_blocks 2;
        "forward_bf16_d96": Forward Sm80 Bf16, ForwardD96<Bf16>, FORWARD_BYTES, forward::forward(ForwardParams), min_blocks 2;
        "forward_bf16_d128": Forward Sm80 Bf16, ForwardD128<Bf16>, FORWARD_BYTES, forward::forward(ForwardParams), min_blocks 1;
        "forward_bf16_d192": Forward Sm80 Bf16, ForwardD192<Bf16>, FORWARD_BYTES, forward::forward(ForwardParams), min_blocks 1;
        "forward_bf16_d256": Forward Sm80 Bf16, ForwardD256<Bf16>, FORWARD_BYTES, forward::forward(ForwardParams), min_blocks 1;
        "backward_queries_f32_d32": BackwardQueries Sm80 F32, BackwardF32D32, BACKWARD_BYTES, backward::queries(BackwardParams), min_blocks 2;
        "backward_queries_f32_d64": BackwardQueries Sm80 F32, BackwardF32D64, BACKWARD_BYTES, backward::queries(BackwardParams), min_blocks 2;
        "backward_queries_f32_d96": BackwardQueries Sm80 F32, BackwardF32D96, BACKWARD_BYTES, backward::queries(BackwardParams), min_blocks 1;
        "backward_queries_f32_d128": BackwardQueries Sm80 F32, BackwardF32D128, BACKWARD_BYTES, backward::queries(BackwardParams), min_blocks 1;
        "backward_queries_f32_d192": BackwardQueries Sm80 F32, BackwardF32D192, BACKWARD_BYTES, backward::queries(BackwardParams), min_blocks 1;
        "backward_queries_f32_d256": BackwardQueries Sm80 F32, BackwardF32D256, BACKWARD_BYTES, backward::queries(BackwardParams), min_blocks 1;
        "backward_queries_f16_d32": BackwardQueries Sm80 F16, BackwardD32<F16>, BACKWARD_BYTES, backward::queries(BackwardParams), min_blocks 1;
        "backward_queries_f16_d64": BackwardQueries Sm80 F16, BackwardD64<F16>, BACKWARD_BYTES, backward::queries(BackwardParams), min_blocks 1;
        "backward_queries_f16_d96": BackwardQueries Sm80 F16, BackwardD96<F16>, BACKWARD_BYTES, backward::queries(BackwardParams), min_blocks 1;
        "backward_queries_f16_d128": BackwardQueries Sm80 F16, BackwardD128<F16>, BACKWARD_BYTES, backward::queries(BackwardParams), min_blocks 1;
        "backward_queries_f16_d192": BackwardQueries Sm80 F16, BackwardD192<F16>, BACKWARD_BYTES, backward::queries(BackwardParams), min_blocks 1;
        "backward_queries_f16_d256": BackwardQueries Sm80 F16, BackwardD256<F16>, BACKWARD_BYTES, backward::queries(BackwardParams), min_blocks 0;
        "backward_queries_bf16_d32": BackwardQueries Sm80 Bf16, BackwardD32<Bf16>, BACKWARD_BYTES, backward::queries(BackwardParams), min_blocks 1;
        "backward_queries_bf16_d64": BackwardQueries Sm80 Bf16, BackwardD64<Bf16>, BACKWARD_BYTES, backward::queries(BackwardParams), min_blocks 1;
        "backward_queries_bf16_d96": BackwardQueries Sm80 Bf16, BackwardD96<Bf16>, BACKWARD_BYTES, backward::queries(BackwardParams), min_blocks 1;
        "backward_queries_bf16_d128": BackwardQueries Sm80 Bf16, BackwardD128<Bf16>, BACKWARD_BYTES, backward::queries(BackwardParams), min_blocks 1;
        "backward_queries_bf16_d192": BackwardQueries Sm80 Bf16, BackwardD192<Bf16>, BACKWARD_BYTES, backward::queries(BackwardParams), min_blocks 1;
        "backward_queries_bf16_d256": BackwardQueries Sm80 Bf16, BackwardD256<Bf16>, BACKWARD_BYTES, backward::queries(BackwardParams), min_blocks 0;
        "backward_keys_f32_d32": BackwardKeys Sm80 F32, BackwardF32D32, BACKWARD_BYTES, backward::keys(BackwardParams), min_blocks 1;
        "backward_keys_f32_d64": BackwardKeys Sm80 F32, BackwardF32D64, BACKWARD_BYTES, backward::keys(BackwardParams), min_blocks 1;
        "backward_keys_f32_d96": BackwardKeys Sm80 F32, BackwardF32D96, BACKWARD_BYTES, backward::keys(BackwardParams), min_blocks 1;
        "backward_keys_f32_d128": BackwardKeys Sm80 F32, BackwardF32D128, BACKWARD_BYTES, backward::keys(BackwardParams), min_blocks 1;
        "backward_keys_f32_d192": BackwardKeys Sm80 F32, BackwardF32D192, BACKWARD_BYTES, backward::keys(BackwardParams), min_blocks 1;
        "backward_keys_f32_d256": BackwardKeys Sm80 F32, BackwardF32D256, BACKWARD_BYTES, backward::keys(BackwardParams), min_blocks 1;
        "backward_keys_f16_d32": BackwardKeys Sm80 F16, BackwardD32<F16>, BACKWARD_BYTES, backward::keys(BackwardParams), min_blocks 1;
        "backward_keys_f16_d64": BackwardKeys Sm80 F16, BackwardD64<F16>, BACKWARD_BYTES, backward::keys(BackwardParams), min_blocks 1;
        "backward_keys_f16_d96": BackwardKeys Sm80 F16, BackwardD96<F16>, BACKWARD_BYTES, backward::keys(BackwardParams), min_blocks 1;
        "backward_keys_f16_d128": BackwardKeys Sm80 F16, BackwardD128<F16>, BACKWARD_BYTES, backward::keys(BackwardParams), min_blocks 1;
        "backward_keys_f16_d192": BackwardKeys Sm80 F16, BackwardD192<F16>, BACKWARD_BYTES, backward::keys(BackwardParams), min_blocks 1;
        "backward_keys_f16_d256": BackwardKeys Sm80 F16, BackwardD256<F16>, BACKWARD_BYTES, backward::keys(BackwardParams), min_blocks 1;
        "backward_keys_bf16_d32": BackwardKeys Sm80 Bf16, BackwardD32<Bf16>, BACKWARD_BYTES, backward::keys(BackwardParams), min_blocks 1;
        "backward_keys_bf16_d64": BackwardKeys Sm80 Bf16, BackwardD64<Bf16>, BACKWARD_BYTES, backward::keys(BackwardParams), min_blocks 1;
        "backward_keys_bf16_d96": BackwardKeys Sm80 Bf16, BackwardD96<Bf16>, BACKWARD_BYTES, backward::keys(BackwardParams), min_blocks 1;
        "backward_keys_bf16_d128": BackwardKeys Sm80 Bf16, BackwardD128<Bf16>, BACKWARD_BYTES, backward::keys(BackwardParams), min_blocks 1;
        "backward_keys_bf16_d192": BackwardKeys Sm80 Bf16, BackwardD192<Bf16>, BACKWARD_BYTES, backward::keys(BackwardParams), min_blocks 1;
        "backward_keys_bf16_d256": BackwardKeys Sm80 Bf16, BackwardD256<Bf16>, BACKWARD_BYTES, backward::keys(BackwardParams), min_blocks 1;
    }
    delta {
        "backward_delta_f32": F32;
        "backward_delta_f16": F16;
        "backward_delta_bf16": Bf16;
    }
    combine {
        "combine_f32": F32;
        "combine_f16": F16;
        "combine_bf16": Bf16;
    }
    rotary {
        "rotary_f32": F32;
        "rotary_f16": F16;
        "rotary_bf16": Bf16;
    }
    hopper {
        "hopper_forward_f16_d64": Forward F16, HopperD64<F16>, hopper::forward::forward(HopperForwardParams);
        "hopper_forward_f16_d96": Forward F16, HopperD96<F16>, hopper::forward::forward(HopperForwardParams);
        "hopper_forward_f16_d128": Forward F16, HopperD128<F16> | HopperD128Causal<F16>, hopper::forward::forward(HopperForwardParams);
        "hopper_forward_f16_d192": Forward F16, HopperD192<F16>, hopper::forward::forward(HopperForwardParams);
        "hopper_forward_f16_d256": Forward F16, HopperD256<F16>, hopper::forward::forward(HopperForwardParams);
        "hopper_forward_bf16_d64": Forward Bf16, HopperD64<Bf16>, hopper::forward::forward(HopperForwardParams);
        "hopper_forward_bf16_d96": Forward Bf16, HopperD96<Bf16>, hopper::forward::forward(HopperForwardParams);
        "hopper_forward_bf16_d128": Forward Bf16, HopperD128<Bf16> | HopperD128Causal<Bf16>, hopper::forward::forward(HopperForwardParams);
        "hopper_forward_bf16_d192": Forward Bf16, HopperD192<Bf16>, hopper::forward::forward(HopperForwardParams);
        "hopper_forward_bf16_d256": Forward Bf16, HopperD256<Bf16>, hopper::forward::forward(HopperForwardParams);
        "hopper_backward_queries_f16_d192": BackwardQueries F16, HopperQueriesD192<F16>, hopper::backward::queries(HopperBackwardParams);
        "hopper_backward_queries_f16_d256": BackwardQueries F16, HopperQueriesD256<F16>, hopper::backward::queries(HopperBackwardParams);
        "hopper_backward_queries_bf16_d192": BackwardQueries Bf16, HopperQueriesD192<Bf16>, hopper::backward::queries(HopperBackwardParams);
        "hopper_backward_queries_bf16_d256": BackwardQueries Bf16, HopperQueriesD256<Bf16>, hopper::backward::queries(HopperBackwardParams);
        "hopper_backward_keys_f16_d192": BackwardKeys F16, HopperKeysD192<F16>, hopper::backward::keys(HopperBackwardParams);
        "hopper_backward_keys_f16_d256": BackwardKeys F16, HopperKeysD256<F16>, hopper::backward::keys(HopperBackwardParams);
        "hopper_backward_keys_bf16_d192": BackwardKeys Bf16, HopperKeysD192<Bf16>, hopper::backward::keys(HopperBackwardParams);
        "hopper_backward_keys_bf16_d256": BackwardKeys Bf16, HopperKeysD256<Bf16>, hopper::backward::keys(HopperBackwardParams);
        "hopper_backward_all_f16_d64": BackwardAll F16, HopperAllD64<F16>, hopper::backward::keys(HopperBackwardParams);
        "hopper_backward_all_f16_d96": BackwardAll F16, HopperAllD96<F16>, hopper::backward::keys(HopperBackwardParams);
        "hopper_backward_all_f16_d128": BackwardAll F16, HopperAllD128<F16>, hopper::backward::keys(HopperBackwardParams);
        "hopper_backward_all_bf16_d64": BackwardAll Bf16, HopperAllD64<Bf16>, hopper::backward::keys(HopperBackwardParams);
        "hopper_backward_all_bf16_d96": BackwardAll Bf16, HopperAllD96<Bf16>, hopper::backward::keys(HopperBackwardParams);
        "hopper_backward_all_bf16_d128": BackwardAll Bf16, HopperAllD128<Bf16>, hopper::backward::keys(HopperBackwardParams);
    }
    clusters {
        "hopper_forward_cluster_f16_d128": F16, HopperD128<F16>;
        "hopper_forward_cluster_f16_d192": F16, HopperD192<F16>;
        "hopper_forward_cluster_f16_d256": F16, HopperD256<F16>;
        "hopper_forward_cluster_bf16_d128": Bf16, HopperD128<Bf16>;
        "hopper_forward_cluster_bf16_d192": Bf16, HopperD192<Bf16>;
        "hopper_forward_cluster_bf16_d256": Bf16, HopperD256<Bf16>;
    }
    sums {
        "hopper_backward_prepare_f16": BackwardDelta F16, prepare, 0;
        "hopper_backward_prepare_bf16": BackwardDelta Bf16, prepare, 0;
        "hopper_backward_finish_f16": BackwardFinish F16, finish, HOPPER_ROWS * 128;
        "hopper_backward_finish_bf16": BackwardFinish Bf16, finish, HOPPER_ROWS * 128;
    }
}

mod fp8;
mod programs;

pub use fp8::{FP8_ENTRIES, find_fp8};
pub use programs::PROGRAM_ENTRIES;
