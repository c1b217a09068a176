//! Checks of clusters: blocks that start and end while others access their shared memory.

use ptx_emulator::{DeviceMemory, FindingKind, Launch, Module, Options, Report};

use crate::common::{SEEDS, module};

/// Runs the kernel in one cluster of two blocks of two warps, on data that is all ones.
fn run(module: &Module, seed: u64) -> Report {
    let memory = DeviceMemory::new();
    let data = memory.alloc(4096).expect("small");
    memory.write(data, &[1; 4096]).expect("a copy");
    let launch = Launch {
        entry: "k",
        grid: [2, 1, 1],
        block: [64, 1, 1],
        cluster: [2, 1, 1],
        shared_bytes: 0,
        params: &data.0.to_le_bytes(),
    };
    let options = Options {
        seed,
        ..Options::default()
    };
    module.launch(&memory, &launch, &options).expect("it ends")
}

/// Tests that the body without one of its lines has a finding of `kind` for some seed, and whole none for any.
fn needs(body: &str, line: &str, kind: FindingKind) {
    assert!(body.contains(line), "{line}");
    let (whole, broken) = (module("sm_90a", body), module("sm_90a", &body.replacen(line, "", 1)));
    for seed in 0..SEEDS {
        let report = run(&whole, seed);
        assert!(report.is_clean(), "seed {seed}: {}", report.findings[0]);
    }
    let found = |seed| run(&broken, seed).findings.iter().any(|finding| finding.kind == kind);
    assert!((0..SEEDS).any(found), "{kind:?} is not found without {line}");
}

const BEGIN: &str = "barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n";
const END: &str = "barrier.cluster.arrive;\nbarrier.cluster.wait;\n";

/// Each block arrives at the barriers of both and waits for its own. The first one arrives at both once more, and no block
/// waits for that.
fn arrivals() -> String {
    format!(
        "setp.eq.u32 %p1, %r1, 0;\n@%p1 mbarrier.init.shared::cta.b64 [%r3], 2;\n\
         fence.mbarrier_init.release.cluster;\n{BEGIN}\
         setp.lt.u32 %p2, %r1, 2;\nmapa.shared::cluster.u32 %r4, %r3, %r1;\n\
         @%p2 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r4];\n\
         WAIT:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [%r3], 0;\n@!%p3 bra WAIT;\n\
         mov.u32 %r5, %cluster_ctarank;\nsetp.eq.and.u32 %p4, %r5, 0, %p2;\n\
         @%p4 mbarrier.arrive.shared::cluster.b64 _, [%r4];\n{END}"
    )
}

#[test]
fn an_arrival_needs_a_block_that_has_started_and_not_ended() {
    needs(&arrivals(), BEGIN, FindingKind::Mbarrier);
    needs(&arrivals(), END, FindingKind::UseAfterFree);
}

/// Two slots of a kilobyte, or what `copies` leaves of them: each block loads half of a tile into both blocks, once all warps of both
/// blocks have released the slot, and reads the whole tile.
fn shared_loads(wait_empty: &str, end: &str) -> String {
    format!(
        "add.u32 %r4, %r3, 8;\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 mbarrier.init.shared::cta.b64 [%r3], 1;\n\
         @%p1 mbarrier.init.shared::cta.b64 [%r4], 4;\nfence.mbarrier_init.release.cluster;\n{BEGIN}\
         mov.u32 %r5, %cluster_ctarank;\nshl.b32 %r6, %r5, 9;\nadd.u32 %r6, %r6, %r2;\n\
         mul.wide.u32 %rd2, %r5, 512;\nadd.u64 %rd2, %rd2, %rd1;\nmov.u16 %h1, 3;\n\
         mov.u32 %r7, 0;\nmov.u32 %r8, 0;\nand.b32 %r9, %r1, 31;\nsetp.lt.u32 %p4, %r9, 2;\n\
         mapa.shared::cluster.u32 %r10, %r4, %r9;\nmad.lo.u32 %r11, %r1, 16, %r2;\n\
         NEXT:\n@!%p1 bra FULL;\nxor.b32 %r12, %r7, 1;\n{wait_empty}\
         mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 1024;\n\
         cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r6], [%rd2], 512, [%r3], %h1;\n\
         FULL:\nmbarrier.try_wait.parity.shared::cta.b64 %p3, [%r3], %r7;\n@!%p3 bra FULL;\n\
         ld.shared.v4.u32 {{%r20, %r21, %r22, %r23}}, [%r11];\nbar.warp.sync -1;\n\
         @%p4 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r10];\n\
         xor.b32 %r7, %r7, 1;\nadd.u32 %r8, %r8, 1;\nsetp.lt.u32 %p5, %r8, 5;\n@%p5 bra NEXT;\n{end}"
    )
}

const EMPTY: &str =
    "EMPTY:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%r4], %r12;\n@!%p2 bra EMPTY;\n";

#[test]
fn a_slot_is_filled_once_all_blocks_have_released_it() {
    let body = shared_loads(EMPTY, END);
    needs(&body, EMPTY, FindingKind::SharedRace);
    needs(&body, END, FindingKind::UseAfterFree);
}

#[test]
fn a_copy_lands_in_a_block_that_has_not_ended() {
    let wait = "mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r3], 0;\n@!%p3 bra WAIT;\n";
    let body = format!(
        "setp.eq.u32 %p1, %r1, 0;\n@%p1 mbarrier.init.shared::cta.b64 [%r3], 1;\n\
         fence.mbarrier_init.release.cluster;\n{BEGIN}\
         mov.u32 %r5, %cluster_ctarank;\nsetp.eq.and.u32 %p2, %r5, 0, %p1;\nmov.u16 %h1, 3;\n\
         @!%p1 bra WAIT;\nmbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 512;\n\
         @%p2 cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r2], [%rd1], 512, [%r3], %h1;\n\
         WAIT:\n{wait}{END}"
    );
    needs(&body, &format!("{wait}{END}"), FindingKind::UseAfterFree);
}

#[test]
fn an_asynchronous_store_is_there_once_its_barrier_completes() {
    let wait = "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p3, [%r4], 0;\n@!%p3 bra STORED;\n";
    // Two copies that the same thread has issued before are still under way.
    let body = format!(
        "add.u32 %r4, %r3, 8;\nsetp.eq.u32 %p1, %r1, 0;\n@%p1 mbarrier.init.shared::cta.b64 [%r3], 1;\n\
         @%p1 mbarrier.init.shared::cta.b64 [%r4], 1;\nfence.mbarrier_init.release.cluster;\n{BEGIN}\
         add.u32 %r5, %r2, 512;\nadd.u32 %r6, %r2, 1024;\nmov.u32 %r7, %cluster_ctarank;\nxor.b32 %r7, %r7, 1;\n\
         mapa.shared::cluster.u32 %r8, %r6, %r7;\nmapa.shared::cluster.u32 %r9, %r4, %r7;\n@!%p1 bra STORED;\n\
         mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3], 1024;\n\
         cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd1], 512, [%r3];\n\
         cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r5], [%rd1], 512, [%r3];\n\
         mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r4], 4;\n\
         st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r8], %r7, [%r9];\n\
         STORED:\n{wait}ld.shared.u32 %r10, [%r6];\n\
         COPIED:\nmbarrier.try_wait.parity.shared::cta.b64 %p3, [%r3], 0;\n@!%p3 bra COPIED;\n{END}"
    );
    needs(&body, wait, FindingKind::SharedRace);
}
