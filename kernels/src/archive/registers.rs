//! PTX in which registers are numbered relative to earlier lines, so that lines that differ in these numbers alone become equal, and
//! compress.
//!
//! LLVM numbers the registers of a kernel from 1 on, so one more line at the top changes nearly every line below, and each copy of an
//! unrolled loop differs from the one before. Relative text has the distance from the number in the same place of the last line with
//! the same instruction, between `~` and the class of the register:
//!
//! ```text
//! fma.rn.f32 %f101, %f50, %f7, %f100;        fma.rn.f32 ~101f, ~50f, ~7f, ~100f;
//! fma.rn.f32 %f102, %f51, %f7, %f101;        fma.rn.f32 ~f, ~f, ~=f, ~f;
//! fma.rn.f32 %f103, %f52, %f9, %f12;         fma.rn.f32 ~f, ~f, ~2f, ~-89f;
//! ```
//!
//! A distance of 1 is left out, and `=` is one of 0. No PTX that rustc writes contains `~`.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::string::String;

/// Numbers of registers by instruction and place in its line.
type Numbers<'a> = HashMap<(&'a str, u32), i64>;

/// Returns the text with distances in place of numbers. [`absolute`] undoes it for every text without `~`.
pub fn relative(text: &str) -> String {
    let mut numbers = Numbers::new();
    rewrite(text, '%', |rest, instruction, place, out| {
        let class = prefix(rest, |c| c.is_ascii_lowercase());
        let digits = prefix(&rest[class.len()..], |c| c.is_ascii_digit());
        let end = class.len() + digits.len();
        let number: i64 = digits
            .parse()
            .ok()
            .filter(|_| digits == "0" || !digits.starts_with('0'))?;
        if class.is_empty() || rest[end..].starts_with(|c: char| c.is_ascii_lowercase()) {
            return None;
        }
        let last = numbers.insert((instruction, place), number).unwrap_or(0);
        let _ = match number - last {
            0 => write!(out, "~={class}"),
            1 => write!(out, "~{class}"),
            distance => write!(out, "~{distance}{class}"),
        };
        Some(end)
    })
}

/// Returns the text with numbers in place of distances; `None` if some `~` begins no register.
pub fn absolute(text: &str) -> Option<String> {
    let mut numbers = Numbers::new();
    let text = rewrite(text, '~', |rest, instruction, place, out| {
        let distance = prefix(rest, |c| c.is_ascii_digit() || c == '-' || c == '=');
        let class = prefix(&rest[distance.len()..], |c| c.is_ascii_lowercase());
        let by = match distance {
            "" => 1,
            "=" => 0,
            _ => distance.parse().ok()?,
        };
        let last = numbers.entry((instruction, place)).or_default();
        let number = last.checked_add(by)?;
        if class.is_empty() || number < 0 {
            return None;
        }
        *last = number;
        let _ = write!(out, "%{class}{number}");
        Some(distance.len() + class.len())
    });
    // A mark that begins no register has been copied.
    (!text.contains('~')).then_some(text)
}

/// Copies a text and gives what follows each `mark` to `register`, with the instruction of the line and the number of registers before
/// it in the line. `register` writes the other form and returns the number of bytes that it read, or `None` if it is no register.
fn rewrite<'a>(
    text: &'a str,
    mark: char,
    mut register: impl FnMut(&'a str, &'a str, u32, &mut String) -> Option<usize>,
) -> String {
    let mut out = String::with_capacity(text.len() + text.len() / 4);
    for line in text.split_inclusive('\n') {
        let (instruction, mut rest, mut place) = (instruction(line), line, 0);
        while let Some(at) = rest.find(mark) {
            let after = &rest[at + 1..];
            out.push_str(&rest[..at]);
            match register(after, instruction, place, &mut out) {
                Some(read) => (rest, place) = (&after[read..], place + 1),
                None => {
                    out.push(mark);
                    rest = after;
                }
            }
        }
        out.push_str(rest);
    }
    out
}

/// Returns the first word of a line after its predicate.
fn instruction(line: &str) -> &str {
    let mut words = line.split_ascii_whitespace();
    let first = words.next().unwrap_or_default();
    if first.starts_with('@') {
        words.next().unwrap_or_default()
    } else {
        first
    }
}

/// Returns the longest start of a text whose characters are `part` of it.
fn prefix(text: &str, part: impl Fn(char) -> bool) -> &str {
    &text[..text.find(|c| !part(c)).unwrap_or(text.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_stand_for_numbers() {
        let text = "\tfma.rn.f32 \t%f101, %f50, %f7, %f100;\n\tfma.rn.f32 \t%f102, %f51, %f7, %f101;\n\
                    @!%p3 fma.rn.f32 \t%f103, %f52, %f9, %f12;\n";
        let want = "\tfma.rn.f32 \t~101f, ~50f, ~7f, ~100f;\n\tfma.rn.f32 \t~f, ~f, ~=f, ~f;\n\
                    @!~-99p fma.rn.f32 \t~52f, ~45f, ~-92f, ~12f;\n";
        assert_eq!(relative(text), want);
        assert_eq!(absolute(want).as_deref(), Some(text));
    }

    #[test]
    fn any_text_comes_back() {
        for text in [
            "",
            "\n\n",
            "%",
            "%r",
            "%r1",
            "%1",
            "a %r01 %r0 %r00 %r10x %rd4+4 [%rd4+-8]\na %r1",
            "\t.reg .b32 \t%r<3462>;\n\tmov.u32 \t%r3, %tid.x;\n\tmov.u32 \t%r4, %envreg3;",
            "a %r99999999999999999999 %r9223372036854775807 %r0\na %r2 %r0 %r9223372036854775807",
            "@%p1 bra \t$L__BB_1;\n$L__BB_1:\n@",
        ] {
            assert_eq!(absolute(&relative(text)).as_deref(), Some(text));
        }
    }

    #[test]
    fn any_text_of_pieces_comes_back() {
        const PIECES: [&str; 24] = [
            "%",
            "%r",
            "%rd",
            "%f",
            "%p",
            "0",
            "1",
            "7",
            "00",
            "19",
            "9223372036854775807",
            "-",
            "=",
            "+",
            "x",
            "_",
            "é",
            " ",
            "\t",
            "\n",
            "@",
            "@!",
            "add.s32 ",
            "mov.b32 ",
        ];
        let mut state = 1_u64;
        let mut draw = |below: usize| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as usize % below
        };
        let mut registers = 0;
        for _ in 0..20_000 {
            let mut text = String::new();
            for _ in 0..draw(80) {
                text.push_str(PIECES[draw(PIECES.len())]);
            }
            let relative = relative(&text);
            assert_eq!(absolute(&relative), Some(text), "{relative}");
            registers += relative.matches('~').count();
        }
        assert!(registers > 20_000, "{registers}");
    }

    #[test]
    fn a_damaged_text_is_refused() {
        let overflow = "a ~9223372036854775807r\na ~9r";
        for text in [
            "~",
            "~-",
            "~-r",
            "~7",
            "~=-r",
            "~--1r",
            "~-1r",
            "a ~3r\na ~-4r",
            "~~r",
            overflow,
        ] {
            assert_eq!(absolute(text), None, "{text}");
        }
    }
}
