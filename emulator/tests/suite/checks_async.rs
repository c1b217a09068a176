//! Faulty kernels and their corrected twins for asynchronous copies, mbarriers, `wgmma` and `setmaxnreg`.

use crate::common::*;
use ptx_emulator::{FindingKind, Module};

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

/// Warp 0 arms an mbarrier and all warps wait for its first phase.
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
    // Re-initialised while in use; the corrected twin invalidates it first.
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

/// Tests that a bulk store is in memory after a wait for its group, and after a wait for the reads alone not always.
#[test]
fn bulk_store_writes_after_its_reads() {
    let finds_old = |read| {
        let body = format!(
            "setp.ne.u32 %p1, %r1, 0;\n@%p1 bra DONE;\nst.shared.v4.u32 [%r2], {{%r1, %r1, %r1, %r1}};\n\
             fence.proxy.async.shared::cta;\n\
             cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r2], 16;\ncp.async.bulk.commit_group;\n\
             cp.async.bulk.wait_group{read} 0;\n\
             ld.global.u32 %r4, [%rd1];\nst.global.u32 [%rd1 + 16], %r4;\nDONE:"
        );
        let module = module(HOPPER.target, &body);
        (0..SEEDS).any(|seed| {
            let (_, data) = run_for_data(&module, 1, HOPPER.threads, seed).expect("it ends");
            assert_eq!(
                data[..16],
                [0; 16],
                "seed {seed}: the store has landed when the kernel has ended"
            );
            data[16] == 1
        })
    };
    assert!(finds_old(".read") && !finds_old(""));
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

/// A kernel of two warpgroups whose launch bounds give each thread 96 registers; the first warpgroup returns some.
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
        // Raised to more than the others returned: the wait for registers never ends.
        assert!(kinds(&body(40, 160), seed).contains(&FindingKind::Limit));
        // Lowered to more than before, raised to fewer than before.
        assert!(kinds(&body(104, 152), seed).contains(&FindingKind::Limit));
        assert!(kinds(&body(40, 88), seed).contains(&FindingKind::Limit));
    }
}

#[test]
fn moves_of_an_accumulator_before_its_wait_only_rename() {
    let fence = "wgmma.fence.sync.aligned;";
    let body = |first, second| product(fence, &format!("mov.b32 %f5, %f1;\nmov.f32 %f6, %f5;\n{first}"), second);
    let (wait, read) = ("wgmma.wait_group.sync.aligned 0;", "add.f32 %f7, %f6, %f2;");
    let kind = FindingKind::UnawaitedAsync;
    caught(&HOPPER, kind, &body(read, wait), &body(wait, read));
    // A copy that is overwritten is no copy any more.
    let other = body("mov.f32 %f6, 0f3F800000;\nadd.f32 %f7, %f6, %f6;", wait);
    caught(&HOPPER, kind, &body("add.f32 %f7, %f5, %f5;", wait), &other);
}
