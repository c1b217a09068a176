//! A plan as a table for people.

use std::fmt;

use super::Plan;
use super::launch::KeySplits;
use super::pass::{Forward, PassType};
use crate::problem::Problem;
use crate::target::DeviceInfo;

/// Writes a table: the problem, kernels and tiles, and the cost.
impl<P: PassType> fmt::Display for Plan<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let p = &self.problem;
        let mask = if p.causal() { "causal" } else { "full" };
        let pass = P::NAME;
        writeln!(
            f,
            "problem   {pass}, {mask}, {}{}, softmax_scale {}",
            if p.scales().is_some() { "f8e4m3 to " } else { "" },
            p.dtype().name(),
            p.softmax_scale()
        )?;
        let heads = format!("heads {} (kv {})", p.heads_q(), p.heads_kv());
        match p.placed() {
            None => writeln!(
                f,
                "shape     batch {}, {heads}, seqlen {} x {}, head_dim {}",
                p.batch(),
                p.seqlen_q(),
                p.seqlen_k(),
                HeadDims(p)
            )?,
            Some(placed) => writeln!(f, "shape     {placed}, {heads}, head_dim {}", HeadDims(p))?,
        }
        match self.device {
            DeviceInfo::Cpu { threads, instructions } => {
                let path = self.cpu_path().expect("a plan for the CPU has one");
                let lanes = if path.few { ", queries one by one" } else { "" };
                let products = path.products(p.dtype());
                writeln!(f, "kernel    native code, {instructions}, {products}{lanes}")?;
                writeln!(f, "threads   at most {threads}")?;
            }
            DeviceInfo::Gpu { .. } => {
                for launch in &self.launches {
                    let entry = launch.entry;
                    let (name, arch, head_dim) = (entry.name, entry.arch.name(), entry.head_dim);
                    match launch.copied {
                        Some(tensor) => writeln!(f, "kernel    {name} ({arch}), copies {tensor}")?,
                        None => writeln!(f, "kernel    {name} ({arch}, head_dim {head_dim})")?,
                    }
                    let [x, y, z] = launch.grid;
                    write!(f, "grid      {x} x {y} x {z} blocks of {} threads", launch.threads)?;
                    match launch.cluster {
                        1 => writeln!(f)?,
                        blocks => writeln!(f, ", in clusters of {blocks} that load keys together")?,
                    }
                    writeln!(f, "SRAM      {} a block", Bytes(launch.shared_bytes.into()))?;
                }
            }
        }
        write!(
            f,
            "tiles     {} queries x {} keys",
            self.tiles.block_m, self.tiles.block_n
        )?;
        match self.tiles.packed_heads {
            1 => writeln!(f)?,
            heads => writeln!(f, ", the queries of {heads} heads packed")?,
        }
        if let Some(path) = self.cpu_path().filter(|_| P::NAME == Forward::NAME) {
            let keys = path.split_blocks * self.tiles.block_n;
            writeln!(f, "splits    {} of {keys} keys", p.seqlen_k().div_ceil(keys).max(1))?;
        }
        if let Some(KeySplits { parts, most_keys }) = self.splits {
            writeln!(f, "splits    {parts} of at most {most_keys} keys")?;
        }
        if self.workspace_bytes > 0 {
            writeln!(f, "workspace {}", Bytes(self.workspace_bytes.into()))?;
        }
        writeln!(f, "HBM read  {}", Bytes(self.cost.bytes_read))?;
        writeln!(f, "HBM write {}", Bytes(self.cost.bytes_written))?;
        write!(f, "FLOPs     {:.3} G", self.cost.flops as f64 / 1e9)
    }
}

/// The head_dim of a problem, printed as `192`, or `192 (v 128)` where v has another.
pub(super) struct HeadDims<'a>(pub &'a Problem);

impl fmt::Display for HeadDims<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (head_dim, head_dim_v) = (self.0.head_dim(), self.0.head_dim_v());
        write!(f, "{head_dim}")?;
        if head_dim_v != head_dim {
            write!(f, " (v {head_dim_v})")?;
        }
        Ok(())
    }
}

/// A number of bytes, printed exactly and in a suitable unit.
struct Bytes(u128);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = ["KiB", "MiB", "GiB", "TiB"];
        let Some(unit) = (1..=units.len()).rev().find(|&power| self.0 >> (10 * power) > 0) else {
            return write!(f, "{} bytes", self.0);
        };
        write!(
            f,
            "{:.2} {} ({} bytes)",
            self.0 as f64 / (1_u128 << (10 * unit)) as f64,
            units[unit - 1],
            self.0
        )
    }
}
