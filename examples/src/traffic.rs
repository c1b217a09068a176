//! Device memory traffic of attention kernels, counted by the emulator.

use std::num::NonZeroU32;

use flash_attention_kernels::abi::{ForwardParams, Layout, Params, StridedTensor};
use flash_attention_kernels::entries::Entry;
use flash_attention_kernels::study::{KERNELS, StandardParams, Step};
use ptx_emulator::{Checks, DeviceMemory, DevicePtr, Launch, Module, Options};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use zerocopy::IntoBytes;

use crate::Failure;

/// head_dim of the study.
pub const HEAD_DIM: u32 = 64;

/// Number of queries per block of the fused kernel; one kernel is compiled for each.
pub const QUERIES_PER_BLOCK: [u32; 4] = [16, 32, 64, 128];

/// Memory traffic of one way to compute attention.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Length of both sequences.
    pub seqlen: u32,
    /// Number of queries of a block.
    pub block_m: u32,
    /// SRAM of a block in bytes, 4 times the M of the formulas.
    pub shared_bytes: u32,
    /// Bytes read from and written to device memory.
    pub bytes: u64,
}

/// One head of random attention in the emulator's memory.
pub struct Study {
    seqlen: NonZeroU32,
    memory: DeviceMemory,
    q: DevicePtr,
    k: DevicePtr,
    v: DevicePtr,
    out: DevicePtr,
    lse: DevicePtr,
    scores: DevicePtr,
    causal: bool,
    options: Options,
    /// Result of standard attention, to compare with.
    reference: std::cell::OnceCell<Vec<f32>>,
}

impl Study {
    /// Draws q, k and v for full attention, with the emulator's checks off.
    ///
    /// # Errors
    /// A sentence if the emulator's memory is too small.
    pub fn new(seqlen: u32) -> Result<Self, Failure> {
        let options = Options {
            checks: Checks::none(),
            ..Options::default()
        };
        Self::with_options(seqlen, false, options)
    }

    /// Draws q, k and v, with or without a causal mask, with these checks and this order of warps. A finding is a
    /// failure.
    ///
    /// # Errors
    /// A sentence if the emulator's memory is too small.
    pub fn with_options(seqlen: u32, causal: bool, options: Options) -> Result<Self, Failure> {
        let memory = DeviceMemory::new();
        let mut random = StdRng::seed_from_u64(u64::from(seqlen));
        let mut tensor = || -> Result<DevicePtr, Failure> {
            let data: Vec<f32> = (0..seqlen * HEAD_DIM).map(|_| random.random_range(-2.0..2.0)).collect();
            let address = memory.alloc(data.len() * 4).map_err(failure)?;
            memory.write(address, data.as_bytes()).map_err(failure)?;
            Ok(address)
        };
        let (q, k, v) = (tensor()?, tensor()?, tensor()?);
        let space = |elements: usize| memory.alloc(elements * 4).map_err(failure);
        let n = seqlen as usize;
        let (out, lse, scores) = (space(n * HEAD_DIM as usize)?, space(n)?, space(n * n)?);
        let seqlen = NonZeroU32::new(seqlen).ok_or_else(|| Failure("seqlen is 0, expected at least 1".to_owned()))?;
        Ok(Self {
            seqlen,
            memory,
            q,
            k,
            v,
            out,
            lse,
            scores,
            causal,
            options,
            reference: std::cell::OnceCell::new(),
        })
    }

    /// Runs standard attention: three kernels, with the scores in device memory.
    ///
    /// # Errors
    /// The error of a launch.
    pub fn standard(&self) -> Result<Measured, Failure> {
        let n = self.seqlen.get();
        let mut bytes = 0;
        let mut shape = (0, 0);
        for step in [Step::StandardScores, Step::StandardSoftmax, Step::StandardOutput] {
            let entry = find(step, self.causal, None)?;
            let key_tiles = tiles(n, entry.block_n)?;
            let params = StandardParams {
                forward: self.params(entry)?,
                scores: self.scores.0,
                key_tiles,
                reserved: 0,
            };
            let blocks = n.div_ceil(entry.block_m)
                * if step == Step::StandardScores {
                    key_tiles.get()
                } else {
                    1
                };
            bytes += self.launch(entry, blocks, params.as_bytes())?;
            shape = (entry.block_m, entry.shared_bytes);
        }
        let out = self.out()?;
        self.reference.get_or_init(|| out);
        Ok(Measured {
            seqlen: n,
            block_m: shape.0,
            shared_bytes: shape.1,
            bytes,
        })
    }

    /// Runs the fused kernel with `block_m` queries per block. If standard attention ran before, the results must
    /// agree.
    ///
    /// # Errors
    /// The error of the launch, or a difference of the results.
    pub fn flash(&self, block_m: u32) -> Result<Measured, Failure> {
        let n = self.seqlen.get();
        let entry = find(Step::Flash, self.causal, Some(block_m))?;
        let bytes = self.launch(entry, n.div_ceil(block_m), self.params(entry)?.as_bytes())?;
        if let Some(reference) = self.reference.get() {
            let error = self
                .out()?
                .iter()
                .zip(reference)
                .map(|(x, y)| (x - y).abs())
                .fold(0.0, f32::max);
            if error.is_nan() || error > 1e-5 {
                return Err(Failure(format!(
                    "{}: differs from standard attention by {error:e}",
                    entry.name
                )));
            }
        }
        Ok(Measured {
            seqlen: n,
            block_m,
            shared_bytes: entry.shared_bytes,
            bytes,
        })
    }

    /// Returns the bytes that one launch moves.
    fn launch(&self, entry: &Entry<Step>, blocks: u32, params: &[u8]) -> Result<u64, Failure> {
        let module = Module::parse(&entry.ptx(), &format!("{}.ptx", entry.name)).map_err(failure)?;
        let launch = Launch {
            entry: entry.name,
            grid: [blocks, 1, 1],
            block: [entry.threads, 1, 1],
            cluster: [1, 1, 1],
            shared_bytes: entry.shared_bytes,
            params,
        };
        let report = module.launch(&self.memory, &launch, &self.options).map_err(failure)?;
        if let Some(finding) = report.findings.first() {
            let total = report.total_findings;
            return Err(Failure(format!(
                "{}: {total} findings, the first: {finding}",
                entry.name
            )));
        }
        let counters = report.counters;
        Ok(counters.global_read_bytes + counters.global_written_bytes)
    }

    fn params(&self, entry: &Entry<Step>) -> Result<ForwardParams, Failure> {
        let n = self.seqlen.get();
        let one = NonZeroU32::MIN;
        let tensor = |address: DevicePtr| StridedTensor {
            address: address.0,
            batch_stride: 0,
            head_stride: 0,
            row_stride: u64::from(HEAD_DIM),
        };
        let scale = 1.0 / f64::from(HEAD_DIM).sqrt();
        Ok(ForwardParams {
            q: tensor(self.q),
            k: tensor(self.k),
            v: tensor(self.v),
            out: tensor(self.out),
            lse: self.lse.0,
            row_max: 0,
            row_sum: 0,
            heads_q: one,
            heads_q_per_kv: one,
            seqlen_q: n,
            seqlen_k: n,
            query_tiles: tiles(n, entry.block_m)?,
            scale_log2: (scale * std::f64::consts::LOG2_E) as f32,
            scale_sign: 1.0,
            layout: Layout {
                head_dim: HEAD_DIM,
                aligned: 1,
            },
            scale: scale as f32,
        })
    }

    fn out(&self) -> Result<Vec<f32>, Failure> {
        let mut out = vec![0.0_f32; (self.seqlen.get() * HEAD_DIM) as usize];
        self.memory.read(self.out, out.as_mut_bytes()).map_err(failure)?;
        Ok(out)
    }
}

fn find(step: Step, causal: bool, block_m: Option<u32>) -> Result<&'static Entry<Step>, Failure> {
    let fits = |entry: &&Entry<Step>| {
        (entry.pass, entry.causal) == (step, causal) && block_m.is_none_or(|m| entry.block_m == m)
    };
    KERNELS
        .iter()
        .find(fits)
        .ok_or_else(|| Failure(format!("no kernel is compiled for {step:?} with {block_m:?} queries")))
}

fn tiles(seqlen: u32, tile: u32) -> Result<NonZeroU32, Failure> {
    NonZeroU32::new(seqlen.div_ceil(tile)).ok_or_else(|| Failure("seqlen is 0, expected at least 1".to_owned()))
}

fn failure(error: impl std::fmt::Display) -> Failure {
    Failure(error.to_string())
}
