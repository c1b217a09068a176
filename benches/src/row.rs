//! A row of the table of speed: the problem and its FLOPs.

use std::fmt;
use std::str::FromStr;

use flash_attention::Dtype;

use crate::Failure;

/// A pass to time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Forward.
    Forward,
    /// Backward.
    Backward,
    /// Backward with the same bits in every run.
    Deterministic,
}

impl Pass {
    /// Returns the name in arguments and results.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward => "fwd",
            Self::Backward => "bwd",
            Self::Deterministic => "bwd-det",
        }
    }

    /// Returns the name in tables.
    pub fn title(self) -> &'static str {
        match self {
            Self::Forward => "forward",
            Self::Backward => "backward",
            Self::Deterministic => "deterministic backward",
        }
    }
}

impl FromStr for Pass {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Forward, Self::Backward, Self::Deterministic];
        let pass = all.into_iter().find(|pass| [pass.name(), pass.title()].contains(&text));
        pass.ok_or_else(|| format!("no pass `{text}`: fwd, bwd, bwd-det"))
    }
}

/// A problem to time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    /// Pass to time.
    pub pass: Pass,
    /// f16 or bf16.
    pub dtype: Dtype,
    /// True for a causal mask.
    pub causal: bool,
    /// Elements of a head (head_dim).
    pub head_dim: usize,
    /// Length of both sequences.
    pub seqlen: usize,
}

/// Sizes that all rows share.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    /// Number of tokens of all sequences together; a row with a longer sequence has one sequence.
    pub tokens: usize,
    /// Number of elements of all heads together.
    pub hidden: usize,
}

impl Row {
    /// Returns the shape of every tensor, `[batch, heads, seqlen, head_dim]`.
    pub fn shape(&self, sizes: &Sizes) -> [usize; 4] {
        let batch = (sizes.tokens / self.seqlen).max(1);
        let heads = (sizes.hidden / self.head_dim).max(1);
        [batch, heads, self.seqlen, self.head_dim]
    }

    /// Returns the FLOPs as the field counts them: 4 B H N^2 D forward, 2.5 times that backward, half under a causal
    /// mask.
    pub fn flops(&self, sizes: &Sizes) -> f64 {
        let [batch, heads, seqlen, head_dim] = self.shape(sizes).map(|n| n as f64);
        let full = 4.0 * batch * heads * seqlen * seqlen * head_dim;
        full * if self.causal { 0.5 } else { 1.0 } * if self.pass == Pass::Forward { 1.0 } else { 2.5 }
    }

    /// Returns `full` or `causal`.
    pub fn mask(&self) -> &'static str {
        if self.causal { "causal" } else { "full" }
    }
}

/// Writes, for example, `fwd bf16 causal 128 4096`.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (pass, dtype, mask) = (self.pass.name(), self.dtype.name(), self.mask());
        write!(f, "{pass} {dtype} {mask} {} {}", self.head_dim, self.seqlen)
    }
}

impl FromStr for Row {
    type Err = Failure;

    fn from_str(line: &str) -> Result<Self, Failure> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let &[pass, dtype, mask, head_dim, seqlen] = &words[..] else {
            return Err(format!("PASS DTYPE MASK HEAD_DIM SEQLEN, not `{line}`").into());
        };
        let row = Self {
            pass: pass.parse()?,
            dtype: parse_dtype(dtype)?,
            causal: parse_mask(mask)?,
            head_dim: head_dim.parse()?,
            seqlen: seqlen.parse()?,
        };
        if row.head_dim == 0 || row.seqlen == 0 {
            return Err(format!("a head_dim and a seqlen above 0, not `{line}`").into());
        }
        Ok(row)
    }
}

/// Parses `f16` or `bf16`.
///
/// # Errors
/// A sentence for any other text.
pub fn parse_dtype(text: &str) -> Result<Dtype, String> {
    match text {
        "f16" => Ok(Dtype::F16),
        "bf16" => Ok(Dtype::Bf16),
        _ => Err(format!("no dtype `{text}`: f16, bf16")),
    }
}

/// Parses a mask: `full` is false, `causal` is true.
///
/// # Errors
/// A sentence for any other text.
pub fn parse_mask(text: &str) -> Result<bool, String> {
    match text {
        "full" => Ok(false),
        "causal" => Ok(true),
        _ => Err(format!("no mask `{text}`: full, causal")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZES: Sizes = Sizes {
        tokens: 16_384,
        hidden: 2_048,
    };

    #[test]
    fn operations_are_those_of_the_field() {
        let row: Row = "fwd bf16 full 128 4096".parse().expect("a row");
        assert_eq!(row.shape(&SIZES), [4, 16, 4096, 128]);
        assert_eq!(row.flops(&SIZES), 549_755_813_888.0);
        let causal: Row = "bwd bf16 causal 128 4096".parse().expect("a row");
        assert_eq!(causal.flops(&SIZES), 1.25 * row.flops(&SIZES));
        let long: Row = "bwd-det f16 full 96 65536".parse().expect("a row");
        assert_eq!(long.shape(&SIZES), [1, 21, 65_536, 96]);
        assert_eq!(long.to_string(), "bwd-det f16 full 96 65536");
    }

    #[test]
    fn what_is_no_row_is_refused() {
        for wrong in [
            "",
            "fwd f32 full 64 512",
            "fwd bf16 half 64 512",
            "fw bf16 full 64 512",
            "fwd bf16 full 64 0",
        ] {
            assert!(wrong.parse::<Row>().is_err(), "{wrong}");
        }
    }
}
