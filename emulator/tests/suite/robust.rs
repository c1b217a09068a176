//! No text may cause a panic, a hang or exhausted memory: generated modules parse and run, broken ones are refused.

use proptest::prelude::*;
use ptx_emulator::Module;

use crate::common::survive::survive;

const WORDS: &[&str] = &[
    ".version 8.0",
    ".target sm_90a",
    ".entry k",
    ".func f",
    "(",
    ")",
    "{",
    "}",
    ";",
    ",",
    "[",
    "]",
    ".reg",
    ".b32",
    "%r<9>",
    "%r1",
    "%p1",
    "@%p1",
    "bra",
    "L:",
    "L",
    "mov.u32",
    "0",
    "-1",
    "0x7fffffff",
    "0f3F800000",
    "ld.global.u32",
    "st.shared.v4.u32",
    ".shared",
    ".align",
    "16",
    "tile",
    "[4]",
    "bar.sync",
    "call",
    "ret",
    "exit",
    ".param",
    "+",
    "|",
    "!",
    "=",
    "<",
    ">",
    ":",
    "%tid.x",
    "mma.sync",
    "cvt.rn.f16.f32",
    "/*",
    "*/",
    "//",
    "\"",
    "\\",
    "é",
    "\n",
];

/// Generates a line of a well-formed body.
fn instruction() -> impl Strategy<Value = String> {
    let r = || (0..8u32).prop_map(|n| format!("%r{n}"));
    let binary = prop::sample::select(vec![
        "add.u32",
        "sub.s32",
        "mul.lo.u32",
        "mul.hi.s32",
        "div.s32",
        "rem.u32",
        "shl.b32",
        "shr.s32",
        "and.b32",
        "min.s32",
        "bmsk.clamp.b32",
        "div.rn.f32",
        "fma.rn.f32",
        "bfe.s32",
        "prmt.b32",
        "shf.l.wrap.b32",
        "szext.wrap.s32",
        "sad.u32",
    ]);
    let arithmetic = (binary, r(), r(), r(), any::<i32>()).prop_map(|(op, d, a, b, c)| {
        let three = ["fma", "bfe", "prmt", "shf", "sad"].iter().any(|p| op.starts_with(p));
        let last = if three && !op.starts_with("fma") {
            format!(", {c}")
        } else {
            String::new()
        };
        let last = if op.starts_with("fma") { format!(", {a}") } else { last };
        format!("{op} {d}, {a}, {b}{last};")
    });
    let convert = (
        prop::sample::select(vec![
            "cvt.rzi.s32.f32",
            "cvt.rn.f32.s32",
            "cvt.u32.u16",
            "ex2.approx.f32",
            "popc.b32",
            "brev.b32",
        ]),
        r(),
        r(),
    );
    let convert = convert.prop_map(|(op, d, a)| match op {
        "cvt.u32.u16" => format!("cvt.u32.u16 {d}, {a};"),
        _ => format!("{op} {d}, {a};"),
    });
    let memory = (r(), r(), any::<i16>()).prop_map(|(d, a, at)| format!("ld.shared.u32 {d}, [{a}+{at}];"));
    let branch = (r(), r(), 0..4u32).prop_map(|(a, b, l)| format!("setp.lt.s32 %p1, {a}, {b};\n@%p1 bra L{l};"));
    let warp = (r(), r()).prop_map(|(d, a)| format!("shfl.sync.bfly.b32 {d}, {a}, 3, 31, -1;"));
    let barrier = Just("bar.sync 0;".to_owned());
    prop_oneof![6 => arithmetic, 2 => convert, 2 => memory, 2 => branch, 1 => warp, 1 => barrier]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_characters(text in "\\PC{0,200}") {
        survive(&text);
    }

    #[test]
    fn any_words(words in prop::collection::vec(prop::sample::select(WORDS), 0..80)) {
        survive(&words.join(" "));
    }

    #[test]
    fn generated_modules_parse_and_end(lines in prop::collection::vec(instruction(), 1..40)) {
        let mut body = String::new();
        for (index, line) in lines.iter().enumerate() {
            if index % 10 == 0 {
                body.push_str(&format!("L{}:\n", index / 10));
            }
            body.push_str(line);
            body.push('\n');
        }
        for label in lines.len().div_ceil(10)..4 {
            body.push_str(&format!("L{label}:\n"));
        }
        let text = format!(
            ".version 8.0\n.target sm_90a\n.address_size 64\n.entry k() {{\n.reg .b32 %r<8>;\n.reg .pred %p<2>;\n\
             .shared .b8 tile[64];\nmov.u32 %r0, %tid.x;\n{body}ret;\n}}\n"
        );
        let module = Module::parse(&text, "generated.ptx");
        prop_assert!(module.is_ok(), "{:?}", module.err());
        survive(&text);
    }

    #[test]
    fn broken_kernels(at in 0..20_000usize, cut in 0..40usize, word in prop::sample::select(WORDS)) {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/ptx/bulk.ptx");
        let text = std::fs::read_to_string(folder).expect("a kernel");
        let chars: Vec<char> = text.chars().collect();
        let at = at % chars.len();
        let end = (at + cut).min(chars.len());
        let broken: String = chars[..at].iter().copied().chain(word.chars()).chain(chars[end..].iter().copied()).collect();
        survive(&broken);
    }
}

#[test]
fn deep_nesting_and_huge_declarations_are_refused_or_harmless() {
    survive(&format!(
        ".version 8.0 .target sm_80 .entry k() {}",
        "{".repeat(100_000)
    ));
    survive(&format!(
        ".version 8.0 .target sm_80 .entry k() {{ mov.u32 {}1",
        "{".repeat(100_000)
    ));
    survive(".version 8.0 .target sm_80 .entry k() { .reg .b32 %r<4000000000>; mov.u32 %r3999999999, 1; ret; }");
    survive(".version 8.0 .target sm_80 .entry k() { .local .b8 a[4294967295]; st.local.u8 [a], 1; ret; }");
    survive(".version 8.0 .target sm_80 .shared .b8 a[4294967295]; .entry k() { st.shared.u8 [a], 1; ret; }");
    survive(".version 8.0 .target sm_80 .global .b8 a[4294967295]; .entry k() { ret; }");
    survive(".version 8.0 .target sm_80 .global .b64 a[] = { k }; .entry k() { call k; ret; }");
}
