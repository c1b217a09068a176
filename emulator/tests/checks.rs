//! For every check a small kernel with one fault, which some seed must catch, and its mended twin, which must pass
//! under all of them.

use ptx_emulator::{DeviceMemory, Error, FindingKind, Launch, Module, Options, Report};

const SEEDS: u64 = 16;

/// A kernel `k(.param .u64 data)` with the usual registers.
fn module(target: &str, body: &str) -> Module {
    let text = format!(
        ".version 8.0\n.target {target}\n.address_size 64\n\
         .visible .entry k(.param .u64 data) {{\n\
         .reg .pred %p<8>;\n.reg .b32 %r<32>;\n.reg .f32 %f<8>;\n.reg .b64 %rd<16>;\n\
         .shared .align 128 .b8 tile[2048];\n.shared .align 8 .b64 bar[2];\n\
         ld.param.u64 %rd1, [data];\nmov.u32 %r1, %tid.x;\nmov.u32 %r2, tile;\nmov.u32 %r3, bar;\n\
         {body}\nret;\n}}\n"
    );
    Module::parse(&text, "k.ptx").expect("the kernel parses")
}

fn run(module: &Module, grid: u32, threads: u32, seed: u64) -> Result<Report, Error> {
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
    module.launch(&memory, &launch, &options)
}

struct Case {
    target: &'static str,
    grid: u32,
    threads: u32,
}

const ONE_WARP: Case = Case {
    target: "sm_80",
    grid: 1,
    threads: 32,
};
const TWO_WARPS: Case = Case {
    target: "sm_80",
    grid: 1,
    threads: 64,
};
const HOPPER: Case = Case {
    target: "sm_90a",
    grid: 1,
    threads: 128,
};

/// The faulty body must give a finding of `kind` for some seed, the mended one none for any.
fn caught(case: &Case, kind: FindingKind, faulty: &str, mended: &str) {
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

#[test]
fn uninitialized() {
    let read = "ld.shared.u32 %r4, [tile];";
    let mended = format!("mov.u32 %r4, 0;\nst.shared.u32 [tile], %r4;\n{read}");
    caught(&ONE_WARP, FindingKind::Uninitialized, read, &mended);
    let local = ".local .align 4 .b8 depot[16];\nld.local.u32 %r4, [depot];";
    let mended = ".local .align 4 .b8 depot[16];\nst.local.u32 [depot], %r1;\nld.local.u32 %r4, [depot];";
    caught(&ONE_WARP, FindingKind::Uninitialized, local, mended);
}

/// Each thread writes its word and reads its neighbour's across the warp boundary.
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
    // Block 0 writes a word and raises a flag that the others wait for: with ordinary stores the write is not published.
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
fn cp_async_read_before_its_wait() {
    let body = |wait| {
        format!(
            "shl.b32 %r4, %r1, 4;\nadd.u32 %r5, %r2, %r4;\ncvt.u64.u32 %rd2, %r4;\nadd.s64 %rd3, %rd1, %rd2;\n\
             cp.async.cg.shared.global [%r5], [%rd3], 16;\ncp.async.commit_group;\n{wait}\n\
             bar.sync 0;\nld.shared.u32 %r6, [%r5];"
        )
    };
    let (faulty, mended) = (body("cp.async.wait_group 1;"), body("cp.async.wait_group 0;"));
    caught(&TWO_WARPS, FindingKind::UnawaitedAsync, &faulty, &mended);
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

/// Warp 0 arms an mbarrier and everyone waits for its first phase.
fn pipeline(init: &str, arm: &str) -> String {
    format!(
        "setp.eq.u32 %p1, %r1, 0;\n{init}\nbar.sync 0;\n\
         @%p1 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd1], 1024, [%r3];\n\
         {arm}\n\
         WAIT:\nmbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0;\n@!%p2 bra WAIT;\n\
         shl.b32 %r4, %r1, 2;\nadd.u32 %r5, %r2, %r4;\nld.shared.u32 %r6, [%r5];"
    )
}

const INIT: &str = "@%p1 mbarrier.init.shared::cta.b64 [%r3], 1;\nfence.mbarrier_init.release.cluster;";
const ARM: &str = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 1024;";

#[test]
fn bulk_copy_with_a_wrong_byte_count_never_completes() {
    let short = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 2048;";
    caught(
        &HOPPER,
        FindingKind::Deadlock,
        &pipeline(INIT, short),
        &pipeline(INIT, ARM),
    );
}

#[test]
fn bulk_copy_read_before_its_wait() {
    let without = pipeline(INIT, ARM).replace("@!%p2 bra WAIT;", "");
    let without = without.replace("mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r3], 0;", "");
    caught(&HOPPER, FindingKind::UnawaitedAsync, &without, &pipeline(INIT, ARM));
}

#[test]
fn mbarrier_misuse() {
    let twice = "@%p1 mbarrier.init.shared::cta.b64 [%r3], 1;\n@%p1 mbarrier.init.shared::cta.b64 [%r3], 1;";
    caught(
        &HOPPER,
        FindingKind::Mbarrier,
        &pipeline(twice, ARM),
        &pipeline(INIT, ARM),
    );
    let many = "@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 1024;\n\
                @%p1 mbarrier.arrive.shared::cta.b64 _, [%r3], 2;";
    caught(
        &HOPPER,
        FindingKind::Mbarrier,
        &pipeline(INIT, many),
        &pipeline(INIT, ARM),
    );
    // Re-initialised while in use; the mended twin invalidates it first.
    let again = |inval: &str| {
        format!(
            "{}\nbar.sync 0;\n{inval}\n@%p1 mbarrier.init.shared::cta.b64 [%r3], 2;",
            pipeline(INIT, ARM)
        )
    };
    let inval = "@%p1 mbarrier.inval.shared::cta.b64 [%r3];";
    caught(&HOPPER, FindingKind::Mbarrier, &again(""), &again(inval));
}

#[test]
fn transaction_counts_out_of_range() {
    // One thread; the count may go 2^20 - 1 either way, and no further.
    let body = |action: &str, bytes: u32| {
        format!(
            "setp.ne.u32 %p1, %r1, 0;\n@%p1 bra DONE;\nmbarrier.init.shared::cta.b64 [%r3], 1;\nmov.u32 %r4, {bytes};\n\
             mbarrier.{action}.relaxed.cta.shared::cta.b64 [%r3], %r4;\n\
             mbarrier.{action}.relaxed.cta.shared::cta.b64 [%r3], %r4;\nDONE:"
        )
    };
    for action in ["expect_tx", "complete_tx"] {
        let (faulty, mended) = (body(action, 1 << 19), body(action, 1 << 18));
        caught(&HOPPER, FindingKind::Mbarrier, &faulty, &mended);
    }
}

#[test]
fn bulk_store_of_what_no_proxy_fence_published() {
    let body = |fence| {
        format!(
            "setp.eq.u32 %p1, %r1, 0;\nshl.b32 %r4, %r1, 2;\nadd.u32 %r5, %r2, %r4;\nst.shared.u32 [%r5], %r1;\n\
             {fence}\nbar.sync 0;\n\
             @%p1 cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r2], 512;\n\
             cp.async.bulk.commit_group;\ncp.async.bulk.wait_group 0;"
        )
    };
    let (faulty, mended) = (body(""), body("fence.proxy.async.shared::cta;"));
    caught(&HOPPER, FindingKind::MissingProxyFence, &faulty, &mended);
}

#[test]
fn bulk_store_whose_source_is_overwritten_before_its_wait() {
    let body = |wait| {
        format!(
            "setp.ne.u32 %p1, %r1, 0;\n@%p1 bra DONE;\nst.shared.v4.u32 [%r2], {{%r1, %r1, %r1, %r1}};\n\
             fence.proxy.async.shared::cta;\n\
             cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r2], 16;\ncp.async.bulk.commit_group;\n{wait}\n\
             st.shared.u32 [%r2], %r3;\ncp.async.bulk.wait_group 0;\nDONE:"
        )
    };
    let (faulty, mended) = (body(""), body("cp.async.bulk.wait_group.read 0;"));
    caught(&HOPPER, FindingKind::UnawaitedAsync, &faulty, &mended);
}

/// A 64x8x16 product of zeros, A and B in shared memory without swizzle.
fn product(before: &str, wait: &str, after: &str) -> String {
    format!(
        "shl.b32 %r4, %r1, 4;\nadd.u32 %r5, %r2, %r4;\nmov.u32 %r6, 0;\n\
         st.shared.v4.u32 [%r5], {{%r6, %r6, %r6, %r6}};\n\
         fence.proxy.async;\nbar.sync 0;\n\
         shr.u32 %r7, %r2, 4;\ncvt.u64.u32 %rd2, %r7;\nor.b64 %rd2, %rd2, 0x0000000800080000;\n\
         mov.f32 %f1, 0f00000000;\nmov.f32 %f2, %f1;\nmov.f32 %f3, %f1;\nmov.f32 %f4, %f1;\nsetp.eq.u32 %p3, %r6, 0;\n\
         {before}\n\
         wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {{%f1, %f2, %f3, %f4}}, %rd2, %rd2, %p3, 1, 1, 0, 0;\n\
         wgmma.commit_group.sync.aligned;\n{wait}\n{after}"
    )
}

#[test]
fn wgmma_registers_and_operands() {
    let fence = "wgmma.fence.sync.aligned;";
    let wait = "wgmma.wait_group.sync.aligned 0;";
    let read = "add.f32 %f5, %f1, %f2;";
    let kind = FindingKind::UnawaitedAsync;
    let mended = product(fence, wait, read);
    caught(&HOPPER, kind, &product(fence, "", read), &mended);
    caught(&HOPPER, kind, &product("", wait, read), &mended);
    let overwrite = "bar.sync 0;\nst.shared.v4.u32 [%r5], {%r6, %r6, %r6, %r6};";
    caught(
        &HOPPER,
        kind,
        &product(fence, "", overwrite),
        &product(fence, wait, overwrite),
    );
    let unpublished = mended.replace("fence.proxy.async;\n", "");
    caught(&HOPPER, FindingKind::MissingProxyFence, &unpublished, &mended);
    let written = "mov.f32 %f1, 0f3F800000;";
    caught(
        &HOPPER,
        kind,
        &product(fence, "", written),
        &product(fence, wait, written),
    );
}

#[test]
fn wgmma_register_operand_overwritten_before_its_wait() {
    let body = |before: &str, after: &str| {
        product("wgmma.fence.sync.aligned;", before, after)
            .replace("%p3, 1, 1, 0, 0;", "%p3, 1, 1, 0;")
            .replace("%rd2, %rd2, %p3", "{%r10, %r11, %r12, %r13}, %rd2, %p3")
    };
    let set = "mov.u32 %r10, 0;\nmov.u32 %r11, 0;\nmov.u32 %r12, 0;\nmov.u32 %r13, 0;\nwgmma.fence.sync.aligned;";
    let body = |before: &str, after: &str| body(before, after).replace("wgmma.fence.sync.aligned;", set);
    let (wait, touch) = ("wgmma.wait_group.sync.aligned 0;", "mov.u32 %r10, 1;");
    let (faulty, mended) = (body("", touch), body(wait, touch));
    caught(&HOPPER, FindingKind::UnawaitedAsync, &faulty, &mended);
}

/// A kernel of two warpgroups that the launch bounds give 96 registers a thread; the first gives some away.
fn register_pool(body: &str) -> Module {
    let text = format!(
        ".version 8.0\n.target sm_90a\n.address_size 64\n\
         .visible .entry k(.param .u64 data)\n.maxntid 256, 1, 1\n.maxnreg 96\n{{\n\
         .reg .pred %p<8>;\n.reg .b32 %r<32>;\nmov.u32 %r1, %tid.x;\n\
         setp.lt.u32 %p1, %r1, 128;\n{body}\nret;\n}}\n"
    );
    Module::parse(&text, "k.ptx").expect("the kernel parses")
}

#[test]
fn setmaxnreg_against_its_rules() {
    let body = |low, high| {
        format!(
            "@%p1 bra PRODUCER;\nsetmaxnreg.inc.sync.aligned.u32 {high};\nbra DONE;\n\
             PRODUCER:\nsetmaxnreg.dec.sync.aligned.u32 {low};\nDONE:"
        )
    };
    let kinds = |body: &str, seed| -> Vec<FindingKind> {
        let report = run(&register_pool(body), 1, 256, seed).expect("it ends");
        report.findings.iter().map(|f| f.kind).collect()
    };
    for seed in 0..SEEDS {
        assert_eq!(kinds(&body(40, 152), seed), []);
        // Raised by more than the others gave: the wait for registers never ends.
        assert!(kinds(&body(40, 160), seed).contains(&FindingKind::Limit));
        // Lowered to more than there were, raised to fewer.
        assert!(kinds(&body(104, 152), seed).contains(&FindingKind::Limit));
        assert!(kinds(&body(40, 88), seed).contains(&FindingKind::Limit));
    }
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
    // A lock taken by each lane in turn: without independent progress the loop never ends.
    let body = "L:\natom.global.cas.b32 %r4, [%rd1], 0x01010101, 0;\nsetp.ne.u32 %p1, %r4, 0x01010101;\n@%p1 bra L;\n\
                atom.global.add.u32 %r5, [%rd1+8], 1;\natom.global.exch.b32 %r6, [%rd1], 0x01010101;";
    for seed in 0..SEEDS {
        let report = run(&module("sm_80", body), 2, 64, seed).expect("it ends");
        assert!(report.is_clean());
    }
}

#[test]
fn blocks_can_wait_for_later_blocks() {
    // A barrier of the whole grid: every block must be under way before any can end.
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
