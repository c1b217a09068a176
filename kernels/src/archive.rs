//! The door through which compiled kernels are read: two compressed archives for each target in `kernels/ptx`, plain kernels and
//! those for score programs, one for kernels over e4m3 inputs, and one for the study.
//!
//! An archive starts with a manifest in text, so that `head` shows it:
//!
//! ```text
//! flash-attention-kernels 2
//! rustc: rustc 1.96.0 (ac68faa20 2026-05-25)
//! source: <SHA-256 of the kernels' sources, without comments>
//! entry: forward_f16_d64 141924 12876
//! entry: forward_bf16_d64 142570 1542 forward_f16_d64
//! ```
//!
//! The line of an entry holds its name, the bytes of its [relative text](registers), the bytes of its stream, and the name of its base
//! if it has one. An empty line ends the manifest. The streams follow in the same order, without gaps.
//!
//! A stream is raw LZMA of the relative text, whose lines do not change with the numbers of registers. Kernels resemble each other
//! more than they repeat themselves: f16 and bf16 differ in the name of a type, and a causal kernel adds a few lines to the full one.
//! So the dictionary of a stream starts with the relative text of its base, which is inflated first. At most three texts are inflated
//! for one entry.

pub mod registers;

use std::format;
use std::io::Read;
use std::string::String;
use std::vec::Vec;

/// First line of an archive: a magic word and the version of the format.
pub const FIRST_LINE: &str = "flash-attention-kernels 2";

/// Bits of the previous byte that predict a literal (LZMA's lc). Positions predict nothing in text, so lp and pb are
/// 0.
pub const LITERAL_CONTEXT_BITS: u32 = 3;

/// Returns the size of a window that holds a text of `bytes` after a base of `base_bytes`.
pub const fn window(bytes: usize, base_bytes: usize) -> u32 {
    (bytes + base_bytes).next_multiple_of(4096) as u32
}

/// An archive with a parsed manifest.
#[derive(Clone, Debug)]
pub struct Archive<'a> {
    /// Compiler that made the kernels, as `rustc --version` prints it.
    pub rustc: &'a str,
    /// SHA-256 of the kernels' sources, in hex.
    pub source: &'a str,
    members: Vec<Member<'a>>,
}

/// A compressed kernel.
#[derive(Clone, Copy, Debug)]
struct Member<'a> {
    name: &'a str,
    bytes: usize,
    base: Option<&'a str>,
    stream: &'a [u8],
}

/// The reason why an archive cannot be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Damaged(String);

impl core::fmt::Display for Damaged {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::error::Error for Damaged {}

impl<'a> Archive<'a> {
    /// Parses the manifest of an archive, without inflating any kernel.
    ///
    /// # Errors
    /// [`Damaged`] if the manifest is malformed, or its streams do not fill the rest of `bytes`.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Damaged> {
        let end = bytes.windows(2).position(|pair| pair == b"\n\n");
        let end = end.ok_or_else(|| Damaged("no empty line ends the manifest".into()))?;
        let (manifest, mut streams) = (&bytes[..end], &bytes[end + 2..]);
        let manifest = core::str::from_utf8(manifest).map_err(|error| Damaged(format!("manifest: {error}")))?;
        let mut lines = manifest.lines();
        if lines.next() != Some(FIRST_LINE) {
            return Err(Damaged(format!("the first line is not `{FIRST_LINE}`")));
        }
        let mut field = |name: &str| {
            let value = lines
                .next()
                .and_then(|line| line.strip_prefix(name)?.strip_prefix(": "));
            value.ok_or_else(|| Damaged(format!("the manifest has no `{name}`")))
        };
        let (rustc, source) = (field("rustc")?, field("source")?);
        let members = lines
            .map(|line| Member::take(line, &mut streams).ok_or_else(|| Damaged(format!("manifest: `{line}`"))))
            .collect::<Result<_, _>>()?;
        match streams.len() {
            0 => Ok(Self { rustc, source, members }),
            more => Err(Damaged(format!("{more} bytes follow the last stream"))),
        }
    }

    /// Iterates over the names of the kernels, in the order of the archive.
    pub fn names(&self) -> impl Iterator<Item = &'a str> {
        self.members.iter().map(|member| member.name)
    }

    /// Inflates the text of one kernel, and of the kernels that its stream refers to.
    ///
    /// # Errors
    /// [`Damaged`] if the archive has no kernel `name`, or not its base before it, or if a stream does not inflate to
    /// relative text of the manifest's length.
    pub fn text(&self, name: &str) -> Result<String, Damaged> {
        let relative = self.relative_before(self.members.len(), name)?;
        registers::absolute(&relative).ok_or_else(|| Damaged(format!("{name}: a distance is no register's")))
    }

    /// Inflates the relative text of a kernel among the first `end`. Its base must come before it, so a chain of bases cannot be a circle.
    fn relative_before(&self, end: usize, name: &str) -> Result<String, Damaged> {
        let at = self.members[..end].iter().position(|member| member.name == name);
        let at = at.ok_or_else(|| Damaged(format!("no kernel {name} where it is looked for")))?;
        let member = self.members[at];
        let base = member.base.map(|base| self.relative_before(at, base)).transpose()?;
        let inflated = inflate(member.stream, member.bytes, base.as_deref().unwrap_or_default());
        inflated.map_err(|error| Damaged(format!("{name}: {error}")))
    }
}

impl<'a> Member<'a> {
    /// Reads a line of the manifest and cuts the member's stream from the front of `streams`.
    fn take(line: &'a str, streams: &mut &'a [u8]) -> Option<Self> {
        let mut words = line.strip_prefix("entry: ")?.split(' ');
        let name = words.next()?;
        let bytes = words.next()?.parse().ok()?;
        let stream = streams.split_off(..words.next()?.parse().ok()?)?;
        let base = words.next();
        words.next().is_none().then_some(Self {
            name,
            bytes,
            base,
            stream,
        })
    }
}

/// Inflates a text of `bytes` from raw LZMA whose dictionary starts with `base`.
fn inflate(stream: &[u8], bytes: usize, base: &str) -> std::io::Result<String> {
    let base = Some(base.as_bytes()).filter(|base| !base.is_empty());
    let window = window(bytes, base.map_or(0, <[u8]>::len));
    let mut reader = lzma_rust2::LzmaReader::new(stream, bytes as u64, LITERAL_CONTEXT_BITS, 0, 0, window, base)?;
    let mut text = String::with_capacity(bytes);
    reader.read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(feature = "embedded")]
impl crate::entries::Entry {
    /// Inflates the PTX of this kernel: a module that contains it alone.
    ///
    /// This takes one or two milliseconds, and at most five. A device keeps the loaded kernel, so it calls this once.
    pub fn ptx(&self) -> String {
        use crate::entries::Arch;
        let archive: &[u8] = match (self.arch, self.program) {
            _ if self.quantized => include_bytes!("../ptx/fp8_sm_90a.lzma"),
            (Arch::Sm80, false) => include_bytes!("../ptx/sm_80.lzma"),
            (Arch::Sm90a, false) => include_bytes!("../ptx/sm_90a.lzma"),
            (Arch::Sm80, true) => include_bytes!("../ptx/program_sm_80.lzma"),
            (Arch::Sm90a, true) => include_bytes!("../ptx/program_sm_90a.lzma"),
        };
        embedded(archive, self.name)
    }
}

#[cfg(all(feature = "embedded", feature = "study"))]
impl crate::entries::Entry<crate::study::Step> {
    /// Inflates the PTX of this kernel: a module that contains it alone.
    pub fn ptx(&self) -> String {
        embedded(include_bytes!("../ptx/study.lzma"), self.name)
    }
}

/// Inflates a kernel of an archive in this crate.
#[cfg(feature = "embedded")]
fn embedded(archive: &[u8], name: &str) -> String {
    let text = Archive::parse(archive).and_then(|archive| archive.text(name));
    text.expect("a test inflates every kernel of the archives in this crate")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_archive_is_refused() {
        let parse = |text: &[u8]| Archive::parse(text).map(|archive| archive.names().count());
        let fault = |text: &[u8]| parse(text).expect_err("it is damaged").0;
        let with = |rest: &str| format!("{FIRST_LINE}\nrustc: r\nsource: s\n{rest}").into_bytes();
        assert_eq!(parse(&with("entry: a 3 2\nentry: b 3 1 a\n\nxyz")), Ok(2));
        assert!(fault(b"").contains("empty line"));
        assert!(fault(b"something else\n\n").contains("first line"));
        assert!(fault(format!("{FIRST_LINE}\nrustc: r\n\n").as_bytes()).contains("source"));
        assert!(fault(&with("entry: a 3 4\n\nxyz")).contains("entry: a 3 4"), "too long");
        assert!(fault(&with("entry: a 3 2\n\nxyz")).contains("1 bytes follow"));
        assert!(fault(&with("entry: a 3 3 b c\n\nxyz")).contains("b c"));
    }

    #[test]
    fn a_damaged_stream_is_an_error() {
        let bytes = format!("{FIRST_LINE}\nrustc: r\nsource: s\nentry: a 300 2\nentry: b 3 1 b\n\nxyz").into_bytes();
        let archive = Archive::parse(&bytes).expect("the manifest is sound");
        assert!(
            archive
                .text("a")
                .expect_err("two bytes are no 300")
                .0
                .starts_with("a: ")
        );
        assert!(
            archive
                .text("b")
                .expect_err("b is its own base")
                .0
                .contains("no kernel b")
        );
        assert!(archive.text("c").expect_err("it is absent").0.contains("no kernel c"));
    }
}
