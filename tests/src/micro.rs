//! The micro-kernels of `tests/ptx`: at least one kernel for each instruction family, with its input and expected
//! output.
//!
//! Each file is a kernel `test(input, output)`. Its header gives the number of threads, the input and the expected
//! output as 32-bit words in hexadecimal, so that any device that loads PTX can run it. `cluster: n` launches n
//! blocks as one cluster. Each `map: buffer type dims box swizzle` adds a parameter of 128 bytes, aligned to 64: the
//! tensor map of a dense tensor in the input or output buffer. `within: bound …`, for approximate instructions,
//! bounds the error of each word on hardware; the list repeats over the output.
//!
//! The emulator's tests include this file, so it uses only the standard library.

use std::path::{Path, PathBuf};

/// Bytes of an encoded tensor map.
pub const MAP_BYTES: usize = 128;

/// A file of `tests/ptx`.
#[derive(Clone, Debug)]
pub struct Micro {
    /// Name of the file.
    pub name: String,
    /// Text of the file: PTX with the header as comments.
    pub text: String,
    /// Target: `sm_80`, `sm_90a`.
    pub target: String,
    /// PTX version: major, minor.
    pub version: (u32, u32),
    /// Threads per block.
    pub block: u32,
    /// Number of blocks, which form one cluster.
    pub cluster: u32,
    /// Tensor maps, which follow the two addresses in the parameters.
    pub maps: Vec<Map>,
    /// Words of the input buffer.
    pub input: Vec<u32>,
    /// Expected words of the output buffer after the launch.
    pub output: Vec<u32>,
    /// Bounds of the words' errors on hardware: entry `i % len` for word i; without entries every word must be equal.
    pub within: Vec<Bound>,
}

/// A tensor map of a dense tensor that starts where its buffer starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Map {
    /// True if the tensor is in the input buffer, false if it is in the output buffer.
    pub in_input: bool,
    /// Type of the elements.
    pub element: Element,
    /// Sizes of the tensor, innermost first.
    pub dims: Vec<u64>,
    /// Sizes of the box that one instruction copies, innermost first.
    pub box_dims: Vec<u32>,
    /// Span of the swizzle in bytes: 16 (none), 32, 64 or 128.
    pub span: u32,
}

/// Element types of maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Element {
    /// IEEE binary16.
    F16,
    /// IEEE binary32.
    F32,
    /// Unsigned 32-bit words.
    U32,
}

/// Error that the PTX manual allows for an approximate result. Infinity, NaN and (unless stated otherwise) zero must
/// be exact: the manual's tables define them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// `exact`: an equal word.
    Exact,
    /// `ulp:n`: n units in the last place of an f32.
    Ulp(u32),
    /// `rel:e`: an f32, relative error 2^e.
    Relative(f64),
    /// `abs:e`: an f32, absolute error 2^e, also where the exact result is zero.
    Absolute(f64),
    /// `mixed:e`: an f32, absolute error 2^e where the exact result is below one in magnitude, relative error 2^e elsewhere.
    Mixed(f64),
    /// `half:e`: two f16, relative error 2^e each.
    Half(f64),
}

impl Micro {
    /// Reads every `.ptx` file of a folder, sorted by name.
    ///
    /// # Errors
    /// A sentence with the name of the file, if the folder or a file cannot be read or a header is malformed.
    pub fn read_folder(folder: &Path) -> Result<Vec<Self>, String> {
        let unreadable = |e: std::io::Error| format!("{}: {e}", folder.display());
        let mut paths: Vec<PathBuf> = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(unreadable)? {
            let path = entry.map_err(unreadable)?.path();
            if path.extension().is_some_and(|extension| extension == "ptx") {
                paths.push(path);
            }
        }
        paths.sort();
        let read = |path: &PathBuf| {
            let named = |message: String| format!("{}: {message}", path.display());
            let text = std::fs::read_to_string(path).map_err(|e| named(e.to_string()))?;
            let name = path
                .file_name()
                .map(|name| name.display().to_string())
                .unwrap_or_default();
            Self::parse(&name, &text).map_err(named)
        };
        paths.iter().map(read).collect()
    }

    /// Parses the text of a file.
    ///
    /// # Errors
    /// A sentence if the header is malformed.
    pub fn parse(name: &str, text: &str) -> Result<Self, String> {
        let mut micro = Self {
            name: name.to_owned(),
            text: text.to_owned(),
            target: String::new(),
            version: (0, 0),
            block: 0,
            cluster: 1,
            maps: Vec::new(),
            input: Vec::new(),
            output: Vec::new(),
            within: Vec::new(),
        };
        let mut words_of_output = None;
        for line in text.lines() {
            if let Some(comment) = line.strip_prefix("//") {
                micro.parse_header(comment.trim(), &mut words_of_output)?;
            } else if let Some(version) = line.strip_prefix(".version ") {
                let (major, minor) = version.trim().split_once('.').ok_or("a version without a point")?;
                micro.version = (number(major)?, number(minor)?);
            } else if let Some(target) = line.strip_prefix(".target ") {
                micro.target = target.trim().to_owned();
                break;
            }
        }
        for (missing, what) in [
            (micro.block == 0, "block"),
            (micro.output.is_empty(), "output"),
            (micro.version.0 == 0, "version"),
            (micro.target.is_empty(), "target"),
        ] {
            if missing {
                return Err(format!("it has no {what}"));
            }
        }
        Ok(micro)
    }

    fn parse_header(&mut self, line: &str, words_of_output: &mut Option<bool>) -> Result<(), String> {
        if let Some(n) = line.strip_prefix("block:") {
            self.block = number(n)?;
        } else if let Some(n) = line.strip_prefix("cluster:") {
            self.cluster = number(n)?;
        } else if let Some(map) = line.strip_prefix("map:") {
            self.maps.push(Map::parse(map)?);
        } else if let Some(bounds) = line.strip_prefix("within:") {
            self.within = bounds.split_whitespace().map(Bound::parse).collect::<Result<_, _>>()?;
        } else if line == "input:" || line == "output:" {
            *words_of_output = Some(line == "output:");
        } else if let Some(of_output) = *words_of_output {
            let words = if of_output { &mut self.output } else { &mut self.input };
            for word in line.split_whitespace() {
                words.push(u32::from_str_radix(word, 16).map_err(|e| format!("word `{word}`: {e}"))?);
            }
        }
        Ok(())
    }

    /// Returns the kernel's parameters, one after the other, for buffers at these addresses. `encode` makes the bytes
    /// of a tensor map for a tensor at an address.
    ///
    /// # Errors
    /// The errors of `encode`.
    pub fn params<E>(
        &self,
        input: u64,
        output: u64,
        mut encode: impl FnMut(&Map, u64) -> Result<[u8; MAP_BYTES], E>,
    ) -> Result<Vec<Vec<u8>>, E> {
        let mut params = vec![input.to_le_bytes().to_vec(), output.to_le_bytes().to_vec()];
        for map in &self.maps {
            params.push(encode(map, if map.in_input { input } else { output })?.to_vec());
        }
        Ok(params)
    }

    /// Compares the words of a device with the expected ones. Returns the number of words that are not equal but
    /// within the manual's bound.
    ///
    /// # Errors
    /// A sentence with the first word out of bounds, and the number of such words.
    pub fn compare(&self, got: &[u32]) -> Result<usize, String> {
        if got.len() != self.output.len() {
            return Err(format!("{} words, not {}", got.len(), self.output.len()));
        }
        let (mut near, mut wrong) = (0, Vec::new());
        for (index, (&got, &want)) in got.iter().zip(&self.output).enumerate() {
            let bound = match self.within.len() {
                0 => Bound::Exact,
                len => self.within[index % len],
            };
            if got == want {
            } else if bound.allows(got, want) {
                near += 1;
            } else {
                wrong.push(format!("word {index} is {got:08x}, not {want:08x}"));
            }
        }
        match wrong.first() {
            None => Ok(near),
            Some(first) => Err(format!("{first}; {} of {} words are wrong", wrong.len(), got.len())),
        }
    }
}

impl Map {
    /// Parses the text after `map:`, such as `input f32 8,4 4,4 128`.
    fn parse(line: &str) -> Result<Self, String> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let &[buffer, element, dims, box_dims, span] = &words[..] else {
            return Err(format!("`{line}` is not a map"));
        };
        let map = Self {
            in_input: match buffer {
                "input" => true,
                "output" => false,
                _ => return Err(format!("no buffer {buffer}")),
            },
            element: match element {
                "f16" => Element::F16,
                "f32" => Element::F32,
                "u32" => Element::U32,
                _ => return Err(format!("no element type {element}")),
            },
            dims: dims.split(',').map(number).collect::<Result<_, _>>()?,
            box_dims: box_dims.split(',').map(number).collect::<Result<_, _>>()?,
            span: number(span)?,
        };
        if map.dims.len() != map.box_dims.len() || ![16, 32, 64, 128].contains(&map.span) {
            return Err(format!("`{line}` is not a map"));
        }
        Ok(map)
    }

    /// Returns the stride of every axis but the innermost, in bytes.
    pub fn strides(&self) -> Vec<u64> {
        let outer = self.dims.iter().take(self.dims.len() - 1);
        outer
            .scan(self.element.bytes(), |stride, size| {
                *stride *= size;
                Some(*stride)
            })
            .collect()
    }
}

impl Element {
    /// Returns the bytes of one element.
    pub fn bytes(self) -> u64 {
        match self {
            Self::F16 => 2,
            Self::F32 | Self::U32 => 4,
        }
    }
}

impl Bound {
    fn parse(word: &str) -> Result<Self, String> {
        let wrong = || format!("no bound {word}");
        if word == "exact" {
            return Ok(Self::Exact);
        }
        let (kind, amount) = word.split_once(':').ok_or_else(wrong)?;
        let exponent: f64 = amount.parse().map_err(|_| wrong())?;
        match kind {
            "ulp" => Ok(Self::Ulp(number(amount)?)),
            "rel" => Ok(Self::Relative(exponent)),
            "abs" => Ok(Self::Absolute(exponent)),
            "mixed" => Ok(Self::Mixed(exponent)),
            "half" => Ok(Self::Half(exponent)),
            _ => Err(wrong()),
        }
    }

    /// Returns true if a word may be `got` where the exact result rounds to `want`.
    fn allows(self, got: u32, want: u32) -> bool {
        if got == want {
            return true;
        }
        let (g, w) = (f64::from(f32::from_bits(got)), f64::from(f32::from_bits(want)));
        let slack = match self {
            Self::Exact => return false,
            Self::Ulp(n) => {
                let normal = (want & 0x7fff_ffff) != 0 && w.is_finite();
                return normal && got >> 31 == want >> 31 && got.abs_diff(want) <= n && g.is_finite();
            }
            Self::Half(exponent) => {
                let close = |got: u32, want: u32| {
                    let (g, w) = (half(got as u16), half(want as u16));
                    got as u16 == want as u16 || (w.is_finite() && (g - w).abs() <= w.abs() * exponent.exp2())
                };
                return close(got, want) && close(got >> 16, want >> 16);
            }
            Self::Relative(exponent) => exponent.exp2() * w.abs(),
            Self::Absolute(exponent) => exponent.exp2(),
            Self::Mixed(exponent) => exponent.exp2() * w.abs().max(1.0),
        };
        w.is_finite() && (g - w).abs() <= slack
    }
}

/// Returns the value of an f16.
fn half(bits: u16) -> f64 {
    let (exponent, fraction) = (i32::from(bits >> 10 & 31), f64::from(bits & 1023));
    let magnitude = match exponent {
        0 => fraction * (-24_f64).exp2(),
        31 if fraction == 0.0 => f64::INFINITY,
        31 => f64::NAN,
        _ => (1024.0 + fraction) * f64::from(exponent - 25).exp2(),
    };
    if bits >> 15 == 1 { -magnitude } else { magnitude }
}

fn number<T: std::str::FromStr<Err = std::num::ParseIntError>>(text: &str) -> Result<T, String> {
    text.trim().parse().map_err(|e| format!("`{}`: {e}", text.trim()))
}
