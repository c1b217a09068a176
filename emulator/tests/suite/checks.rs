//! Tests of the checks for memory and synchronisation. Each has a small kernel with one fault, which some seed must
//! find, and a corrected twin, which must pass with all seeds. `checks_async` has the other checks.

use crate::common::*;
use ptx_emulator::{DeviceMemory, FindingKind, Launch, Options};

#[test]
fn out_of_bounds() {
    let body = |scale| {
        format!(
            "mul.wide.u32 %rd2, %r1, {scale};\nadd.s64 %rd3, %rd1, %rd2;\n\
             ld.global.u32 %r4, [%rd3];"
        )
    };
    caught(&ONE_WARP, FindingKind::OutOfBounds, &body(256), &body(128));
    let shared = |last| format!("mov.u32 %r4, 1;\nst.shared.u32 [tile+{last}], %r4;");
    caught(&ONE_WARP, FindingKind::OutOfBounds, &shared(8192), &shared(2044));
}

#[test]
fn misaligned() {
    let body = |offset| format!("ld.global.v4.u32 {{%r4, %r5, %r6, %r7}}, [%rd1+{offset}];");
    caught(&ONE_WARP, FindingKind::Misaligned, &body(8), &body(16));
}

#[test]
fn use_after_free() {
    let module = module("sm_80", "ld.global.u32 %r4, [%rd1];");
    let memory = DeviceMemory::new();
    let data = memory.alloc(4096).expect("memory");
    memory.write(data, &[0; 4096]).expect("a copy");
    memory.free(data).expect("a free");
    let launch = Launch {
        entry: "k",
        grid: [1, 1, 1],
        block: [32, 1, 1],
        cluster: [1, 1, 1],
        shared_bytes: 0,
        params: &data.0.to_le_bytes(),
    };
    let report = module.launch(&memory, &launch, &Options::default()).expect("a report");
    assert_eq!(report.findings[0].kind, FindingKind::UseAfterFree);
    assert_eq!(report.total_findings, 32);
}

/// Each thread writes its word and reads its neighbour's, across the warp boundary.
fn exchange(between: &str) -> String {
    format!(
        "shl.b32 %r4, %r1, 2;\nadd.u32 %r5, %r2, %r4;\nst.shared.u32 [%r5], %r1;\n{between}\n\
         xor.b32 %r6, %r4, 128;\nadd.u32 %r6, %r6, %r2;\nld.shared.u32 %r7, [%r6];"
    )
}

#[test]
fn shared_race_between_warps() {
    let kind = FindingKind::SharedRace;
    caught(&TWO_WARPS, kind, &exchange(""), &exchange("bar.sync 0;"));
    caught(
        &TWO_WARPS,
        kind,
        &exchange("bar.warp.sync -1;"),
        &exchange("barrier.sync 3, 64;"),
    );
}

#[test]
fn global_race_between_blocks() {
    let case = Case {
        target: "sm_80",
        grid: 4,
        threads: 32,
    };
    let faulty = "st.global.u32 [%rd1], %r1;";
    let mended = "red.global.add.u32 [%rd1], %r1;";
    caught(&case, FindingKind::GlobalRace, faulty, mended);
    // Block 0 writes a word and raises a flag that the others wait for: with ordinary stores the write is not
    // published.
    let body = |raise: &str, look: &str| {
        format!(
            "mov.u32 %r4, %ctaid.x;\nor.b32 %r5, %r4, %r1;\nsetp.eq.u32 %p1, %r5, 0;\n\
             setp.ne.u32 %p2, %r4, 0;\n@%p2 bra READ;\n\
             @%p1 st.global.u32 [%rd1+256], %r4;\n{raise}\nbra DONE;\n\
             READ:\n{look}\nDONE:"
        )
    };
    let release = "@%p1 st.release.gpu.global.u32 [%rd1], 7;";
    let wait = "L:\nld.acquire.gpu.global.u32 %r6, [%rd1];\nsetp.ne.u32 %p3, %r6, 7;\n@%p3 bra L;\n\
                ld.global.u32 %r7, [%rd1+256];";
    let hasty = "ld.global.u32 %r7, [%rd1+256];";
    caught(
        &case,
        FindingKind::GlobalRace,
        &body(release, hasty),
        &body(release, wait),
    );
}

#[test]
fn findings_say_where() {
    let body = "ld.global.u32 %r4, [%rd1+8192];";
    let report = run(&module("sm_80", body), 1, 32, 0).expect("it ends");
    let finding = &report.findings[0];
    assert_eq!((finding.line, finding.block, finding.warp), (15, [0; 3], 0));
    assert_eq!(finding.text, body);
    assert!(finding.lane.is_some() && finding.address.is_some());
    let racing = exchange("");
    let report = (0..SEEDS).map(|seed| run(&module("sm_80", &racing), 1, 64, seed).expect("it ends"));
    let findings: Vec<_> = report.flat_map(|r| r.findings).collect();
    let race = findings.iter().find(|f| f.kind == FindingKind::SharedRace);
    let message = race.expect("a race").to_string();
    assert!(message.contains("warp") && message.contains("line"), "{message}");
}

#[test]
fn divergent_barrier() {
    let body = |guard| format!("setp.lt.u32 %p1, %r1, 16;\n{guard} bar.sync 0;");
    caught(&ONE_WARP, FindingKind::BarrierDivergence, &body("@%p1"), &body(""));
    let vote = |members| {
        format!(
            "setp.lt.u32 %p1, %r1, 16;\n@!%p1 bra OUT;\nmov.u32 %r4, {members};\n\
             shfl.sync.bfly.b32 %r5, %r1, 1, 31, %r4;\nOUT:"
        )
    };
    caught(
        &ONE_WARP,
        FindingKind::BarrierDivergence,
        &vote("0xff"),
        &vote("0xffff"),
    );
}

#[test]
fn deadlock_says_who_waits_where() {
    let body = |other| {
        format!(
            "setp.lt.u32 %p1, %r1, 32;\n@%p1 bra FIRST;\nbar.sync {other}, 64;\nbra DONE;\n\
             FIRST:\nbar.sync 1, 64;\nDONE:"
        )
    };
    caught(&TWO_WARPS, FindingKind::Deadlock, &body(2), &body(1));
    let report = run(&module("sm_80", &body(2)), 1, 64, 0).expect("it ends");
    let mut waiting: Vec<(u32, u32)> = report.findings.iter().map(|f| (f.warp, f.line)).collect();
    waiting.sort_unstable();
    assert_eq!(waiting, [(0, 20), (1, 17)]);
    let message = &report.findings[0].message;
    assert!(message.contains("barrier"), "{message}");
}

#[test]
fn barrier_counts_that_are_no_whole_warps() {
    let body = |count| format!("bar.sync 1, {count};");
    caught(&ONE_WARP, FindingKind::InvalidOperand, &body(16), &body(32));
}

#[test]
fn shared_memory_over_the_limit_of_the_target() {
    for (target, limit) in [("sm_80", 163 << 10), ("sm_90a", 227 << 10)] {
        let module = module(target, "");
        let memory = DeviceMemory::new();
        let data = memory.alloc(4096).expect("memory");
        let params = data.0.to_le_bytes();
        let dynamic = |bytes| Launch {
            entry: "k",
            grid: [1, 1, 1],
            block: [32, 1, 1],
            cluster: [1, 1, 1],
            shared_bytes: bytes,
            params: &params,
        };
        // The kernel's own variables, `tile` and `bar`, count too where it names them.
        let most = limit - 2048 - 16;
        let fits = module.launch(&memory, &dynamic(most), &Options::default());
        assert!(fits.expect("it fits").is_clean());
        let error = module.launch(&memory, &dynamic(limit + 16), &Options::default());
        let text = error.expect_err("it does not fit").to_string();
        assert!(
            text.contains("shared memory") && text.contains(&limit.to_string()),
            "{text}"
        );
    }
}

#[test]
fn stores_of_the_same_value_do_not_race() {
    // Compilers let several warps store replicated data; what differs between them is a race.
    let body = |value| format!("st.shared.u32 [%r2], {value};\nbar.warp.sync 0xffffffff;\nld.shared.u32 %r5, [%r2];");
    let warp = "shr.u32 %r4, %r1, 5;\n";
    let (faulty, mended) = (format!("{warp}{}", body("%r4")), format!("{warp}{}", body("%r3")));
    caught(&TWO_WARPS, FindingKind::SharedRace, &faulty, &mended);
    // A reader must be ordered after one of the copies, a writer after all of them.
    let then = |between: &str| {
        format!(
            "{}\n{between}\nsetp.lt.u32 %p1, %r1, 32;\n@%p1 st.shared.u32 [%r2], %r1;",
            body("%r3")
        )
    };
    caught(&TWO_WARPS, FindingKind::SharedRace, &then(""), &then("bar.sync 0;"));
    let blocks = Case {
        target: "sm_80",
        grid: 4,
        threads: 32,
    };
    let body = |value| {
        format!("mov.u32 %r4, %ctaid.x;\nst.global.u16 [%rd1], {value};\nst.global.v2.u32 [%rd1+8], {{1, {value}}};")
    };
    let faulty = body("%r4").replace("u16 [%rd1], %r4", "u32 [%rd1], %r4");
    caught(&blocks, FindingKind::GlobalRace, &faulty, &body("7"));
}

#[test]
fn a_guess_before_compare_and_swap_is_no_race() {
    let case = Case {
        target: "sm_80",
        grid: 4,
        threads: 32,
    };
    let add = "ld.global.u32 %r4, [%rd1];\nL:\nmov.u32 %r5, %r4;\nadd.u32 %r6, %r5, 3;\n\
               atom.global.cas.b32 %r4, [%rd1], %r5, %r6;\nsetp.ne.u32 %p1, %r4, %r5;\n@%p1 bra L;";
    // Block 0 counts, the other blocks read without counting.
    let look = "mov.u32 %r4, %ctaid.x;\nsetp.eq.u32 %p1, %r4, 0;\n@%p1 atom.global.add.u32 %r4, [%rd1], 1;\n\
                @!%p1 ld.global.u32 %r5, [%rd1];";
    caught(&case, FindingKind::GlobalRace, look, add);
    // A float maximum reads first, and swaps only if its own value is larger.
    let maximum = |after: &str| {
        format!(
            "mov.u32 %r4, %ctaid.x;\nadd.u32 %r5, %r4, %r1;\ncvt.rn.f32.u32 %f1, %r5;\nmov.b32 %r6, %f1;\n\
             ld.global.u32 %r7, [%rd1];\n\
             L:\nmov.b32 %f2, %r7;\nsetp.ge.f32 %p1, %f2, %f1;\n@%p1 bra DONE;\nmov.u32 %r8, %r7;\n\
             atom.global.cas.b32 %r7, [%rd1], %r8, %r6;\nsetp.ne.u32 %p2, %r7, %r8;\n@%p2 bra L;\nDONE:\n{after}"
        )
    };
    let again = maximum("ld.global.u32 %r9, [%rd1];");
    caught(&case, FindingKind::GlobalRace, &again, &maximum(""));
}

#[test]
fn a_guess_before_compare_and_swap_in_shared_memory_is_no_race() {
    let start = "setp.eq.u32 %p1, %r1, 0;\nmov.u64 %rd2, 0;\n@%p1 st.shared.u64 [%r2], %rd2;\nbar.sync 0;\n";
    let add = format!(
        "{start}ld.shared.u64 %rd3, [%r2];\nL:\nmov.u64 %rd4, %rd3;\nadd.u64 %rd5, %rd4, 3;\n\
         atom.shared.cas.b64 %rd3, [%r2], %rd4, %rd5;\nsetp.ne.u64 %p2, %rd3, %rd4;\n@%p2 bra L;"
    );
    // The second warp reads without counting.
    let look = format!(
        "{start}setp.lt.u32 %p2, %r1, 32;\n@%p2 atom.shared.add.u64 %rd3, [%r2], 1;\n\
         @!%p2 ld.shared.u64 %rd4, [%r2];"
    );
    caught(&TWO_WARPS, FindingKind::SharedRace, &look, &add);
    // The read has its address in another register; it counts as a guess because a thread updates what it read.
    let elsewhere = add.replace(
        "ld.shared.u64 %rd3, [%r2];",
        "add.u32 %r5, %r2, 0;\nld.shared.u64 %rd3, [%r5];",
    );
    caught(&TWO_WARPS, FindingKind::SharedRace, &look, &elsewhere);
}

#[test]
fn a_flag_without_its_fence_publishes_nothing() {
    let case = Case {
        target: "sm_80",
        grid: 2,
        threads: 32,
    };
    let body = |fence: &str, raise: &str| {
        format!(
            "mov.u32 %r4, %ctaid.x;\nsetp.ne.u32 %p2, %r4, 0;\n@%p2 bra READ;\n\
             st.global.u32 [%rd1+256], %r4;\n{fence}\n{raise}\nbra DONE;\n\
             READ:\nL:\nld.volatile.global.u32 %r6, [%rd1];\nsetp.ne.u32 %p3, %r6, 7;\n@%p3 bra L;\n\
             membar.gl;\nld.global.u32 %r7, [%rd1+256];\nDONE:"
        )
    };
    let kind = FindingKind::GlobalRace;
    for raise in [
        "st.volatile.global.u32 [%rd1], 7;",
        "atom.relaxed.gpu.global.exch.b32 %r5, [%rd1], 7;",
        "red.relaxed.gpu.global.and.b32 [%rd1], 7;\nred.relaxed.gpu.global.or.b32 [%rd1], 7;",
    ] {
        caught(&case, kind, &body("", raise), &body("membar.gl;", raise));
        caught(
            &case,
            kind,
            &body("fence.acq_rel.cta;", raise),
            &body("fence.acq_rel.gpu;", raise),
        );
    }
    let released = body(
        "",
        "red.release.gpu.global.and.b32 [%rd1], 7;\nred.release.gpu.global.or.b32 [%rd1], 7;",
    );
    caught(
        &case,
        kind,
        &body("", "red.global.and.b32 [%rd1], 7;\nred.global.or.b32 [%rd1], 7;"),
        &released,
    );
}
