//! Contract of the committed kernels, checked on their text: registers only, no calls, exactly the products of their
//! tiles, and the launch bounds of the table.

mod markers;

use std::collections::BTreeSet;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use flash_attention_kernels::abi::{
    BackwardParams, ForwardParams, Fp8ForwardParams, HopperBackwardParams, HopperForwardParams, ListedBackwardParams,
    ListedForwardParams, QuerySumsParams, RotaryParams,
};
use flash_attention_kernels::archive::Archive;
use flash_attention_kernels::element::F16;
use flash_attention_kernels::entries::{Arch, Dtype, ENTRIES, Entry, FP8_ENTRIES, PROGRAM_ENTRIES, Pass};
use flash_attention_kernels::shape::{HOPPER_SHARED_BYTES, LatentD576, PORTABLE_SHARED_BYTES, TileSizes as _};
use flash_attention_kernels::study::{self, StandardParams};
use flash_attention_tests::files::workspace;

/// A row of a table and its PTX. Kernels of the traffic study have no pass.
struct Kernel {
    entry: Entry<Option<Pass>>,
    ptx: String,
}

impl Deref for Kernel {
    type Target = Entry<Option<Pass>>;

    fn deref(&self) -> &Entry<Option<Pass>> {
        &self.entry
    }
}

impl Kernel {
    /// Iterates over the instructions, without comments and directives.
    fn instructions(&self) -> impl Iterator<Item = &str> {
        let lines = self.ptx.lines().map(str::trim);
        lines.filter(|line| !line.is_empty() && !line.starts_with("//") && !line.starts_with('.'))
    }
}

/// All compiled kernels, including those of the traffic study, inflated once for all tests.
static KERNELS: LazyLock<Vec<Kernel>> = LazyLock::new(|| {
    let product = ENTRIES.iter().chain(PROGRAM_ENTRIES).chain(FP8_ENTRIES);
    let product = product.map(|entry| Kernel {
        entry: entry.with_pass(Some(entry.pass)),
        ptx: entry.ptx(),
    });
    let study = study::KERNELS.iter().map(|kernel| Kernel {
        entry: kernel.with_pass(None),
        ptx: kernel.ptx(),
    });
    product.chain(study).collect()
});

fn files_below(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for item in std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
        let path = item.expect("a readable folder").path();
        if path.is_dir() {
            found.extend(files_below(&path, extension));
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found
}

#[test]
fn nothing_leaves_the_registers_and_nothing_is_called() {
    for entry in KERNELS.iter() {
        for line in entry.instructions() {
            for word in [".local", "call", "trap", ".func", "brx", ".f64"] {
                assert!(!line.contains(word), "{}: {line}", entry.name);
            }
        }
        for word in [".local", ".func", "__assert", "panic"] {
            assert!(!entry.ptx.contains(word), "{}: {word}", entry.name);
        }
    }
}

/// Returns the number of `mma.sync` m16n8k16 that one warp issues for one product: its rows by a streamed tile, over head_dim.
fn mma_of_one_product(entry: &Kernel) -> u32 {
    let (owned, streamed) = match entry.pass {
        Some(Pass::BackwardDkv) => (entry.block_n, entry.block_m),
        _ => (entry.block_m, entry.block_n),
    };
    let rows = owned / (entry.threads / 32);
    (rows / 16) * (streamed / 8) * (entry.head_dim / 16)
}

/// Returns the number of `mma.sync` that one warp of the kernel of latent attention issues for a streamed tile: scores of some rows,
/// over a part of head_dim, and some columns of the output of all rows.
fn mma_of_latent_tile() -> u32 {
    type Shape = LatentD576<F16>;
    let scores = (Shape::SCORE_ROWS / 16) * (Shape::COLUMNS / 8) * (Shape::PART_COLUMNS / 16);
    scores + (Shape::ROWS / 16) * (Shape::WARP_COLUMNS / 8) * (Shape::COLUMNS / 16)
}

/// Tests the products of portable kernels: two loops with one body each, masked and unmasked, with all products
/// unrolled, and in forward a third for far rows. A kernel in which a block owns keys masks nothing in full attention.
#[test]
fn tensor_core_instructions_are_those_of_the_tiles() {
    for entry in KERNELS.iter().filter(|entry| entry.arch == Arch::Sm80) {
        let products = match (entry.pass, entry.two_walks) {
            (None, _) => 0, // kernels of the study are f32
            (Some(Pass::BackwardPreprocess | Pass::Combine | Pass::Rotary), _) => 0,
            (Some(Pass::Forward), _) => 2,         // Q K^T, P V
            (Some(Pass::BackwardDq), _) => 3,      // Q K^T, dO V^T, dS K
            (Some(Pass::BackwardDkv), false) => 4, // K Q^T, V dO^T, P^T dO, dS^T Q
            (Some(Pass::BackwardDkv), true) => 5,  // K Q^T twice
            (Some(Pass::BackwardDqkv | Pass::BackwardPostprocess), _) => panic!("{} is not portable", entry.name),
        };
        let bodies = match entry.pass {
            Some(Pass::BackwardDkv) if !entry.causal && !entry.program => 1,
            Some(Pass::Forward) if !entry.program => 3,
            _ => 2,
        };
        let expected = match entry.dtype {
            Dtype::F32 => 0,
            Dtype::F16 | Dtype::Bf16 if entry.is_latent() => bodies * mma_of_latent_tile(),
            Dtype::F16 | Dtype::Bf16 => bodies * products * mma_of_one_product(entry),
        };
        let found: Vec<_> = entry.instructions().filter(|line| line.contains("mma.")).collect();
        assert_eq!(found.len() as u32, expected, "{}", entry.name);
        let kind = match entry.dtype {
            Dtype::Bf16 => "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
            Dtype::F32 | Dtype::F16 => "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        };
        assert!(
            found.iter().all(|line| line.contains(kind)),
            "{}: not all are {kind}",
            entry.name
        );
    }
}

/// Tests the products of Hopper kernels, by warpgroups. Forward issues Q K^T before the loop, P V after it, and both
/// in it; a causal mask has a loop of its own. Those of e4m3 are twice as deep, and have both operands in rows along k.
#[test]
fn warpgroup_products_are_those_of_the_tiles() {
    for entry in KERNELS.iter().filter(|entry| entry.arch == Arch::Sm90a) {
        let streamed = match entry.pass {
            Some(Pass::BackwardDqkv) => entry.block_m,
            _ => entry.block_n,
        };
        // Products of tiles in shared memory, along head_dim; and of registers with a tile, along its rows.
        let (loops, along_rows, down_rows) = match (entry.pass, entry.two_walks) {
            (Some(Pass::Forward), _) => (2 + u32::from(entry.causal), 1, 1),
            // One for tiles with hidden pairs, one for the others.
            (Some(Pass::BackwardDqkv), _) => (2, 2, 2),
            (Some(Pass::BackwardPreprocess | Pass::BackwardPostprocess), _) => (0, 0, 0),
            other => panic!("no kernel of {other:?} is compiled for Hopper"),
        };
        // A square of dQ, along the keys of both warpgroups.
        let dq = if entry.pass == Some(Pass::BackwardDqkv) {
            loops * entry.block_n / 16
        } else {
            0
        };
        let products: Vec<_> = entry
            .instructions()
            .filter(|line| line.contains("wgmma.mma_async"))
            .collect();
        let (k, dtype) = match entry.quantized {
            true => (32, "e4m3"),
            false => (16, entry.dtype.name()),
        };
        let shape = |n: u32| format!("wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{dtype}.{dtype} ");
        let count = |n: u32| products.iter().filter(|line| line.contains(&shape(n))).count() as u32;
        let expected = if entry.pass == Some(Pass::BackwardDqkv) && entry.head_dim > 128 {
            // Warpgroups share the keys of a tile's scores, and each gradient's slices of 64 columns.
            let groups = entry.threads / 128 - 1;
            let slices = entry.head_dim / 64 / groups;
            [
                (entry.block_n / groups, 2 * entry.head_dim / k),
                (entry.block_n, 2 * slices * streamed / k),
                (64, slices * entry.block_n / k),
            ]
        } else {
            [
                (streamed, loops * along_rows * entry.head_dim / k),
                (entry.head_dim, loops * down_rows * streamed / k),
                (64, dq),
            ]
        };
        assert_eq!(
            products.len() as u32,
            expected.iter().map(|&(_, of)| of).sum::<u32>(),
            "{}",
            entry.name
        );
        for (columns, _) in expected {
            let of_shape = expected.iter().filter(|&&(n, _)| n == columns).map(|&(_, of)| of);
            assert_eq!(count(columns), of_shape.sum::<u32>(), "{}", entry.name);
        }
        assert!(
            !entry.ptx.contains("mma.sync") && !entry.ptx.contains("cp.async.cg"),
            "{}",
            entry.name
        );
    }
}

/// Tests that values of e4m3 are transposed by pairs: as many matrices are read as written, those of a tile of values once for tiles
/// without hidden pairs and, under a causal mask, once for the others.
#[test]
fn values_of_codes_are_transposed_once() {
    for entry in KERNELS.iter().filter(|entry| entry.quantized) {
        let count = |words: &str| entry.instructions().filter(|line| line.contains(words)).count() as u32;
        let of_warp = entry.block_n * entry.head_dim / 4 / (16 * 32);
        let bodies = 1 + u32::from(entry.causal);
        let read = count("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16");
        assert_eq!(read, bodies * of_warp, "{}", entry.name);
        // The output is stored by the same instruction, 16 columns at a time.
        let written = count("stmatrix.sync.aligned.m8n8.x4.shared.b16");
        assert_eq!(written, read + entry.head_dim / 16, "{}", entry.name);
    }
}

/// Tests how blocks of a cluster share loads: a panel of each tile of keys and of values goes to all of them, those of queries to the
/// block alone; slots are released in the blocks of the cluster; and the cluster meets at the start and at the end.
#[test]
fn clusters_share_loads_of_keys_and_values() {
    for entry in KERNELS.iter().filter(|entry| entry.cluster > 1) {
        let count = |words: [&str; 2]| {
            let has_all = |line: &&str| words.iter().all(|word| line.contains(word));
            entry.instructions().filter(has_all).count() as u32
        };
        let load = "cp.async.bulk.tensor.5d.shared::cluster.global";
        let panels = entry.head_dim.div_ceil(64);
        let queries = entry.block_m / 64;
        // The loop over tiles of keys may be unrolled.
        let shared = count([load, ".multicast::cluster"]);
        assert!(
            shared > 0 && shared.is_multiple_of(2 * panels),
            "{}: {shared}",
            entry.name
        );
        assert_eq!(count([load, ""]) - shared, queries * panels, "{}", entry.name);
        // Keys and values, in the loop and after it.
        let arrive = "mbarrier.arrive.shared::cluster.b64";
        assert_eq!(count([arrive, "mapa.shared::cluster.u32"]), 4, "{}", entry.name);
        assert_eq!(
            count(["barrier.cluster.arrive.release", "barrier.cluster.wait.acquire"]),
            2,
            "{}",
            entry.name
        );
    }
}

/// Tests that f32 kernels compute in f32: fused multiply-adds, and no narrower type. The rotary kernel rounds each product, as the CPU
/// does.
#[test]
fn f32_kernels_compute_in_f32() {
    for entry in KERNELS.iter().filter(|entry| entry.dtype == Dtype::F32) {
        let fuses = entry.pass != Some(Pass::Rotary);
        assert_eq!(entry.ptx.contains("fma.rn.f32"), fuses, "{}", entry.name);
        for word in [
            "tf32",
            "f16",
            "bf16",
            "fma.rn.ftz",
            "mul.ftz",
            "mul.rn.ftz",
            "add.ftz",
            "add.rn.ftz",
        ] {
            assert!(!entry.ptx.contains(word), "{}: {word}", entry.name);
        }
    }
}

#[test]
fn the_header_is_the_table() {
    for entry in KERNELS.iter() {
        let has = |line: &str| {
            let lines = entry.ptx.lines().filter(|l| l.trim() == line).count();
            assert_eq!(lines, 1, "{}: {lines} lines are `{line}`", entry.name);
        };
        has(&format!(".target {}", entry.arch.name()));
        has(".address_size 64");
        has(&format!(".visible .entry {}(", entry.name));
        has(&format!(".maxntid {}, 1, 1", entry.threads));
        match entry.min_blocks {
            0 => assert!(!entry.ptx.contains(".minnctapersm"), "{}", entry.name),
            blocks => has(&format!(".minnctapersm {blocks}")),
        }
        match entry.cluster {
            1 => {
                for word in ["nctapercluster", "multicast", "mapa", "barrier.cluster"] {
                    assert!(!entry.ptx.contains(word), "{}: {word}", entry.name);
                }
            }
            blocks => has(&format!(".reqnctapercluster {blocks}, 1, 1")),
        }
        let hopper = entry.arch == Arch::Sm90a;
        let bytes = match entry.pass {
            None if entry.name.starts_with("standard_") => size_of::<StandardParams>(),
            Some(Pass::Forward) if entry.quantized => size_of::<Fp8ForwardParams>(),
            Some(Pass::Forward) if hopper => size_of::<HopperForwardParams>(),
            Some(Pass::Forward) if entry.program => size_of::<ListedForwardParams>(),
            Some(Pass::Combine) => size_of::<ListedForwardParams>(),
            Some(Pass::Rotary) => size_of::<RotaryParams>(),
            None | Some(Pass::Forward) => size_of::<ForwardParams>(),
            Some(Pass::BackwardPreprocess | Pass::BackwardPostprocess) if hopper => size_of::<QuerySumsParams>(),
            Some(Pass::BackwardDqkv) if hopper => size_of::<HopperBackwardParams>(),
            Some(Pass::BackwardDq | Pass::BackwardDkv) if entry.program => size_of::<ListedBackwardParams>(),
            Some(_) => size_of::<BackwardParams>(),
        };
        // Tensor maps, which come first on Hopper, are aligned to 64 bytes.
        let align = if entry.arch == Arch::Sm90a { 64 } else { 8 };
        has(&format!(".param .align {align} .b8 {}_param_0[{bytes}]", entry.name));
        assert_eq!(entry.ptx.matches(".entry").count(), 1, "{}", entry.name);
    }
}

/// Tests that any driver from CUDA 12.0 on loads the PTX versions, and one from CUDA 12.1 on the backward kernels of wide heads on
/// Hopper, which add whole vectors.
#[test]
fn the_version_is_old_enough() {
    for entry in KERNELS.iter() {
        let version = entry.ptx.lines().find_map(|line| line.strip_prefix(".version "));
        let expected = match entry.arch {
            Arch::Sm80 => "7.0",
            Arch::Sm90a if entry.pass == Some(Pass::BackwardDqkv) && entry.head_dim > 128 => "8.1",
            Arch::Sm90a => "8.0",
        };
        assert_eq!(version, Some(expected), "{}", entry.name);
    }
}

/// Calls `check` with the name and content of each committed archive.
fn for_each_archive(mut check: impl FnMut(String, Archive<'_>)) {
    for path in files_below(&workspace().join("kernels/ptx"), "lzma") {
        let name = path.file_stem().expect("a file has a name").to_string_lossy();
        let bytes = std::fs::read(&path).expect("a readable file");
        check(name.into_owned(), Archive::parse(&bytes).expect("an archive"));
    }
}

#[test]
fn one_source_made_them_all() {
    let mut sources = BTreeSet::new();
    for_each_archive(|name, archive| {
        assert!(archive.rustc.starts_with("rustc 1."), "{name}: {}", archive.rustc);
        assert_eq!(archive.source.len(), 64, "{name}: a SHA-256 in hex");
        sources.insert(archive.source.to_owned());
    });
    assert_eq!(sources.len(), 1, "{sources:?}");
}

#[test]
fn files_and_table_are_the_same_set() {
    let mut packed = Vec::new();
    for_each_archive(|arch, archive| packed.extend(archive.names().map(|name| (arch.clone(), name.to_owned()))));
    let product = ENTRIES.iter().map(|entry| (entry.arch.name(), entry.name));
    let programs = PROGRAM_ENTRIES.iter().map(|entry| match entry.arch {
        Arch::Sm80 => ("program_sm_80", entry.name),
        Arch::Sm90a => ("program_sm_90a", entry.name),
    });
    let fp8 = FP8_ENTRIES.iter().map(|entry| ("fp8_sm_90a", entry.name));
    let study = study::KERNELS.iter().map(|kernel| ("study", kernel.name));
    let table = product
        .chain(programs)
        .chain(fp8)
        .chain(study)
        .map(|(archive, name)| (archive.to_owned(), name.to_owned()));
    let table: BTreeSet<_> = table.collect();
    assert_eq!(packed.len(), table.len(), "a kernel is packed twice");
    assert_eq!(packed.into_iter().collect::<BTreeSet<_>>(), table);
    let names: BTreeSet<_> = table.iter().map(|(_, name)| name).collect();
    assert_eq!(
        names.len(),
        ENTRIES.len() + PROGRAM_ENTRIES.len() + FP8_ENTRIES.len() + study::KERNELS.len(),
        "two entries of one name"
    );
}

/// Tests shared memory against the least of all GPUs that run a kernel: 99 KiB from sm_80 on, 227 KiB on Hopper.
#[test]
fn blocks_fit_every_card() {
    for entry in KERNELS.iter() {
        let granted = match entry.arch {
            Arch::Sm80 => PORTABLE_SHARED_BYTES,
            Arch::Sm90a => HOPPER_SHARED_BYTES,
        };
        assert!(entry.shared_bytes <= granted, "{}", entry.name);
        assert!(
            entry.threads.is_multiple_of(32) && entry.threads <= 1024,
            "{}",
            entry.name
        );
    }
}

/// Tests that `asm!` is only in `kernels/src/ptx`, and in two files of the CPU device, for AMX and for instructions of aarch64
/// that stable Rust has no intrinsics for.
#[test]
fn inline_assembly_stays_in_its_room() {
    let root = workspace();
    let room = root.join("kernels/src/ptx");
    let of_cpu = ["host/src/device/cpu/bf16/x86.rs", "host/src/device/cpu/arm.rs"].map(|file| root.join(file));
    let mut inside = 0;
    for folder in ["kernels/src", "host/src", "emulator/src", "examples", "xtask/src"] {
        for path in files_below(&root.join(folder), "rs") {
            let text = std::fs::read_to_string(&path).expect("a source file");
            let code = text.lines().filter(|line| !line.trim_start().starts_with("//"));
            let uses = code.filter(|line| line.contains("asm!(")).count();
            if path.starts_with(&room) {
                inside += uses;
            } else if !of_cpu.contains(&path) {
                assert_eq!(uses, 0, "{} holds inline assembly", path.display());
            }
        }
    }
    assert!(inside > 0, "the search finds what it looks for");
}
