//! Faulty kernels and their corrected twins for values that were never written: a finding where the program depends
//! on one, none where it only moves or ignores it.

use crate::common::*;
use ptx_emulator::{DeviceMemory, FindingKind, Launch, Options};

/// Tests that the faulty body, which depends on an undefined value, has a finding, and its twin has none.
fn undefined(faulty: &str, mended: &str) {
    caught(&ONE_WARP, FindingKind::Uninitialized, faulty, mended);
}

/// Reads a word of shared memory that was never written.
const READ: &str = "ld.shared.u32 %r4, [tile];\n";

#[test]
fn a_value_that_nobody_uses_is_no_fault() {
    let write = "mov.u32 %r5, 7;\nst.shared.u32 [tile], %r5;\n";
    let branch = "setp.eq.u32 %p1, %r4, 1;\n@%p1 bra DONE;\nDONE:";
    undefined(&format!("{READ}{branch}"), &format!("{write}{READ}{branch}"));
    undefined(&format!("{READ}{branch}"), READ);
    undefined(
        &format!("{READ}{branch}"),
        &format!("{READ}add.u32 %r5, %r4, %r1;\nsetp.eq.u32 %p1, %r5, 1;"),
    );
    let local = ".local .align 4 .b8 depot[16];\n";
    let read = "ld.local.u32 %r4, [depot];\n";
    let write = "st.local.u32 [depot], %r1;\n";
    undefined(
        &format!("{local}{read}{branch}"),
        &format!("{local}{write}{read}{branch}"),
    );
}

#[test]
fn addresses_results_and_atomics_are_uses() {
    let address = "and.b32 %r4, %r4, 1020;\nadd.u32 %r5, %r2, %r4;\n";
    undefined(
        &format!("{READ}{address}ld.shared.u32 %r6, [%r5];"),
        &format!("{READ}{address}"),
    );
    // A value that is only moved to global memory stays undefined there. A value computed from it is a result.
    let computed = format!("{READ}add.u32 %r5, %r4, 1;\nst.global.u32 [%rd1], %r5;");
    undefined(&computed, &format!("{READ}st.global.u32 [%rd1], %r4;"));
    let through = |what: &str| {
        format!(
            "{READ}{what} %r5, %r4, 1;\nst.shared.u32 [tile+4], %r5;\nld.shared.u32 %r6, [tile+4];\n\
             shfl.sync.bfly.b32 %r7, %r6, 1, 31, -1;\nst.global.u32 [%rd1], %r7;"
        )
    };
    undefined(&through("add.u32"), &through("shl.b32"));
    undefined(
        &format!("{READ}red.global.add.u32 [%rd1], %r4;"),
        &format!("{READ}red.global.add.u32 [%rd1], %r1;"),
    );
    undefined(
        "atom.shared.add.u32 %r4, [tile], 1;",
        "atom.shared.exch.b32 %r4, [tile], 1;",
    );
}

#[test]
fn bits_that_do_not_matter_are_defined() {
    let store = "add.u32 %r6, %r5, 0;\nst.global.u32 [%rd1], %r6;";
    let masked = |mask: &str| format!("st.shared.u8 [tile], %r1;\n{READ}and.b32 %r5, %r4, {mask};\n{store}");
    undefined(&masked("0x1ff"), &masked("0xff"));
    // A comparison is defined if the defined byte determines its outcome.
    let above = |limit: &str| {
        format!(
            "mov.u32 %r8, 64;\nst.shared.u8 [tile+3], %r8;\n{READ}setp.gt.u32 %p1, %r4, {limit};\n\
             @%p1 st.global.u32 [%rd1], %r1;"
        )
    };
    undefined(&above("0x40000001"), &above("0x3fffffff"));
    // The greater of two, where the second lies past the end of the run and is ignored.
    let merge = |valid: &str| {
        format!(
            "st.shared.u32 [tile], %r3;\nld.shared.u32 %r4, [tile];\nld.shared.u32 %r5, [tile+4];\n\
             setp.lt.u32 %p1, %r1, {valid};\nsetp.gt.u32 %p2, %r5, %r4;\nand.pred %p3, %p1, %p2;\n\
             selp.b32 %r6, %r5, %r4, %p3;\nadd.u32 %r7, %r6, 1;\nst.global.u32 [%rd1], %r7;"
        )
    };
    undefined(&merge("1"), &merge("0"));
}

#[test]
fn structures_with_padding_are_copied() {
    // Copies a byte and a word with three bytes of padding between them through local memory and a call, as `nvcc -G` does.
    let copy = |what: &str| {
        format!(
            ".local .align 8 .b8 from[8];\n.local .align 8 .b8 to[8];\n\
             st.local.u8 [from], %r1;\nst.local.u32 [from+4], %r1;\n\
             ld.local.u64 %rd2, [from];\nst.local.u64 [to], %rd2;\nld.local.v2.u32 {{%r4, %r5}}, [to];\n\
             cvt.u64.u32 %rd3, %r1;\nshl.b64 %rd3, %rd3, 3;\nadd.s64 %rd4, %rd1, %rd3;\n\
             st.global.v2.u32 [%rd4], {{%r4, %r5}};\nld.local.u8 %r6, [to{what}];\nadd.u32 %r7, %r6, %r5;\n\
             st.global.u32 [%rd4], %r7;"
        )
    };
    undefined(&copy("+2"), &copy(""));
}

#[test]
fn asynchronous_copies_move_what_is_undefined() {
    let body = |offset: &str| {
        format!(
            "st.global.u32 [%rd1], %r1;\ncp.async.ca.shared.global [%r2], [%rd1], 4;\n\
             cp.async.wait_all;\nbar.sync 0;\nld.shared.u32 %r4, [tile{offset}];\nadd.u32 %r5, %r4, 1;\n\
             st.global.u32 [%rd1+64], %r5;"
        )
    };
    undefined(&body("+4"), &body(""));
}

/// Tests that bytes that a kernel only moved to global memory are uninitialised there, and others are not.
#[test]
fn the_host_sees_what_was_left_undefined() {
    let module = module(
        "sm_80",
        &format!("{READ}st.global.u32 [%rd1], %r4;\nst.global.u32 [%rd1+4], %r1;"),
    );
    let memory = DeviceMemory::new();
    let data = memory.alloc(8).expect("memory");
    memory.write(data, &[0; 8]).expect("a copy");
    let launch = Launch {
        entry: "k",
        grid: [1, 1, 1],
        block: [1, 1, 1],
        cluster: [1, 1, 1],
        shared_bytes: 0,
        params: &data.0.to_le_bytes(),
    };
    assert!(
        module
            .launch(&memory, &launch, &Options::default())
            .expect("it ends")
            .is_clean()
    );
    assert!(!memory.is_initialized(data, 4).expect("a range"));
    assert!(memory.is_initialized(data.offset(4), 4).expect("a range"));
}

#[test]
fn findings_name_the_read() {
    let body = format!("{READ}add.u32 %r5, %r4, 1;\nst.global.u32 [%rd1], %r5;");
    let report = run(&module("sm_80", &body), 1, 32, 0).expect("it ends");
    let finding = &report.findings[0];
    assert_eq!((finding.kind, finding.line), (FindingKind::Uninitialized, 17));
    assert!(finding.message.contains("line 15"), "{}", finding.message);
}
