//! A row of the table of kernels.

use super::ENTRIES;
use crate::element::F16;
use crate::shape::{CLUSTER, LatentD576, TileSizes};

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
    BackwardPreprocess,
    /// dQ.
    BackwardDq,
    /// dK and dV.
    BackwardDkv,
    /// dK and dV, and dQ in an f32 accumulator in device memory, to which blocks add.
    BackwardDqkv,
    /// Postprocess: dQ from that accumulator.
    BackwardPostprocess,
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
    /// Number of queries of a tile. A block owns one such tile, or in `BackwardDkv` streams them.
    pub block_m: u32,
    /// Number of keys of a tile. A block streams them, or in `BackwardDkv` owns one.
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
    pub(super) const fn of_programs(mut self) -> Self
    where
        P: Copy,
    {
        self.program = true;
        self
    }

    /// Marks a kernel as one in clusters.
    pub(super) const fn of_clusters(mut self) -> Self
    where
        P: Copy,
    {
        self.cluster = CLUSTER;
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
