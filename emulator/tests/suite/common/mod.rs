//! Small kernels for the tests of the checks and of launches.

#![allow(dead_code, reason = "each test program uses some of it")]

pub mod survive;

use ptx_emulator::{DeviceMemory, Error, FindingKind, Launch, Module, Options, Report};

pub const SEEDS: u64 = 16;

/// A kernel `k(.param .u64 data)` with the usual registers.
pub fn module(target: &str, body: &str) -> Module {
    let text = format!(
        ".version 8.0\n.target {target}\n.address_size 64\n\
         .visible .entry k(.param .u64 data) {{\n\
         .reg .pred %p<8>; .reg .b16 %h<2>;\n.reg .b32 %r<32>;\n.reg .f32 %f<8>;\n.reg .b64 %rd<16>;\n\
         .shared .align 128 .b8 tile[2048];\n.shared .align 8 .b64 bar[2];\n\
         ld.param.u64 %rd1, [data];\nmov.u32 %r1, %tid.x;\nmov.u32 %r2, tile;\nmov.u32 %r3, bar;\n\
         {body}\nret;\n}}\n"
    );
    Module::parse(&text, "k.ptx").expect("the kernel parses")
}

pub fn run(module: &Module, grid: u32, threads: u32, seed: u64) -> Result<Report, Error> {
    run_for_data(module, grid, threads, seed).map(|(report, _)| report)
}

/// Runs the kernel on `data`, which is all ones; returns the report and the content of `data` afterwards.
pub fn run_for_data(module: &Module, grid: u32, threads: u32, seed: u64) -> Result<(Report, Vec<u8>), Error> {
    let memory = DeviceMemory::new();
    let data = memory.alloc(4096)?;
    memory.write(data, &[1; 4096])?;
    let launch = Launch {
        entry: "k",
        grid: [grid, 1, 1],
        block: [threads, 1, 1],
        cluster: [1, 1, 1],
        shared_bytes: 0,
        params: &data.0.to_le_bytes(),
    };
    let options = Options {
        seed,
        max_instructions: Some(10_000_000),
        ..Options::default()
    };
    let report = module.launch(&memory, &launch, &options)?;
    let mut left = vec![0; 4096];
    memory.read(data, &mut left)?;
    Ok((report, left))
}

pub struct Case {
    pub target: &'static str,
    pub grid: u32,
    pub threads: u32,
}

pub const ONE_WARP: Case = Case {
    target: "sm_80",
    grid: 1,
    threads: 32,
};
pub const TWO_WARPS: Case = Case {
    target: "sm_80",
    grid: 1,
    threads: 64,
};
pub const HOPPER: Case = Case {
    target: "sm_90a",
    grid: 1,
    threads: 128,
};

/// Tests that the faulty body has a finding of `kind` for some seed, and the corrected one none for any seed.
pub fn caught(case: &Case, kind: FindingKind, faulty: &str, mended: &str) {
    let broken = module(case.target, faulty);
    let found = (0..SEEDS).any(|seed| {
        let report = run(&broken, case.grid, case.threads, seed).expect("the faulty kernel ends");
        report.findings.iter().any(|f| f.kind == kind)
    });
    assert!(found, "{kind:?} was not found");
    let whole = module(case.target, mended);
    for seed in 0..SEEDS {
        let report = run(&whole, case.grid, case.threads, seed).expect("the mended kernel ends");
        let first = report.findings.first();
        assert!(report.is_clean(), "seed {seed}: {}", first.expect("a finding"));
    }
}
