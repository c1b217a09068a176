//! Ends of launches: traps, runaways, the bound on findings, and progress of lanes and blocks.

use crate::common::*;
use ptx_emulator::{DeviceMemory, Error, Launch, Module, Options};

#[test]
fn traps_and_runaways_are_errors() {
    let trap = module("sm_80", "trap;");
    assert!(matches!(run(&trap, 1, 32, 0), Err(Error::Trap { line: 15, .. })));
    let endless = module("sm_80", "L:\nbra L;");
    assert!(matches!(run(&endless, 1, 32, 0), Err(Error::Runaway { .. })));
}

#[test]
fn findings_are_bounded_and_counted() {
    let body = "mov.u32 %r4, 0;\nL:\nld.global.u32 %r5, [%rd1+1048576];\nadd.u32 %r4, %r4, 1;\n\
                setp.lt.u32 %p1, %r4, 1000;\n@%p1 bra L;";
    let report = run(&module("sm_80", body), 1, 32, 0).expect("it ends");
    assert_eq!(report.total_findings, 32_000);
    assert!(report.findings.len() <= 8);
}

#[test]
fn unknown_instructions_are_refused_by_name_and_line() {
    let module = module("sm_80", "frobnicate.u32 %r4, %r1;");
    match run(&module, 1, 32, 0) {
        Err(Error::UnknownInstruction { line, text, .. }) => {
            assert_eq!((line, text.as_str()), (15, "frobnicate.u32 %r4, %r1;"));
        }
        other => panic!("expected a refusal, got {other:?}"),
    }
}

#[test]
fn lanes_of_a_warp_can_wait_for_each_other() {
    // Each lane takes a lock in turn: without independent progress of lanes the loop does not end.
    let body = "L:\natom.global.cas.b32 %r4, [%rd1], 0x01010101, 0;\nsetp.ne.u32 %p1, %r4, 0x01010101;\n@%p1 bra L;\n\
                atom.global.add.u32 %r5, [%rd1+8], 1;\natom.global.exch.b32 %r6, [%rd1], 0x01010101;";
    for seed in 0..SEEDS {
        let report = run(&module("sm_80", body), 2, 64, seed).expect("it ends");
        assert!(report.is_clean());
    }
}

#[test]
fn blocks_can_wait_for_later_blocks() {
    // A barrier of the whole grid: all blocks must be running before any can end.
    let body = "setp.ne.u32 %p1, %r1, 0;\n@%p1 bra DONE;\natom.global.add.u32 %r4, [%rd1+16], 1;\n\
                L:\nld.acquire.gpu.global.u32 %r5, [%rd1+16];\nsub.u32 %r6, %r5, 0x01010101;\n\
                setp.lt.u32 %p2, %r6, 8;\n@%p2 bra L;\nDONE:";
    let report = run(&module("sm_80", body), 8, 32, 3).expect("it ends");
    assert!(report.is_clean(), "{}", report.findings[0]);
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let module = module("sm_80", "cvt.rn.f32.u32 %f1, %r1;\nred.global.add.f32 [%rd1], %f1;");
    let mut seen = None;
    for threads in [1, 2, 5] {
        let memory = DeviceMemory::new();
        let data = memory.alloc(4096).expect("memory");
        memory.write(data, &[0; 4096]).expect("a copy");
        let launch = Launch {
            entry: "k",
            grid: [37, 1, 1],
            block: [96, 1, 1],
            cluster: [1, 1, 1],
            shared_bytes: 0,
            params: &data.0.to_le_bytes(),
        };
        let options = Options {
            threads: Some(threads),
            ..Options::default()
        };
        let report = module.launch(&memory, &launch, &options).expect("it ends");
        let mut sum = [0; 4];
        memory.read(data, &mut sum).expect("a copy");
        let outcome = (sum, report.counters);
        assert_eq!(*seen.get_or_insert(outcome.clone()), outcome);
    }
}

#[test]
fn a_grid_synchronises_in_its_workspace() {
    // The barrier of cooperative groups: one block adds a number such that all arrivals together flip the upper bit.
    let body = "mov.u32 %r4, %envreg2;\ncvt.u64.u32 %rd2, %r4;\nmov.u32 %r5, %envreg1;\ncvt.u64.u32 %rd3, %r5;\n\
                bfi.b64 %rd2, %rd3, %rd2, 32, 32;\nmov.u32 %r6, %ctaid.x;\nadd.u32 %r7, %r6, 1;\nrem.u32 %r7, %r7, 4;\n\
                mul.wide.u32 %rd4, %r6, 4;\nadd.u64 %rd4, %rd1, %rd4;\nmul.wide.u32 %rd5, %r7, 4;\n\
                add.u64 %rd5, %rd1, %rd5;\nst.global.u32 [%rd4], %r6;\nbar.sync 0;\n\
                setp.ne.u32 %p1, %r1, 0;\n@%p1 bra ARRIVED;\n\
                setp.eq.u32 %p2, %r6, 0;\nselp.u32 %r8, 0x7ffffffd, 1, %p2;\n\
                atom.add.release.gpu.u32 %r9, [%rd2+4], %r8;\n\
                WAIT:\nld.acquire.gpu.u32 %r10, [%rd2+4];\nxor.b32 %r10, %r10, %r9;\nsetp.ge.s32 %p3, %r10, 0;\n\
                @%p3 bra WAIT;\nARRIVED:\nbar.sync 0;\nld.global.u32 %r11, [%rd5];";
    let (whole, hasty) = (
        module("sm_80", body),
        module("sm_80", &body.replace("@%p3 bra WAIT;", "")),
    );
    let findings = |module: &Module, seed| run(module, 4, 32, seed).expect("it ends").total_findings;
    assert!((0..SEEDS).all(|seed| findings(&whole, seed) == 0));
    assert!((0..SEEDS).any(|seed| findings(&hasty, seed) > 0));
}
