//! Writes the archives that `flash_attention_kernels::archive` reads.

use crate::Outcome;
use crate::ptx::Kernel;
use flash_attention_kernels::archive::{Archive, FIRST_LINE, LITERAL_CONTEXT_BITS, registers, window};
use lzma_rust2::{LzmaOptions, LzmaWriter};
use rayon::prelude::*;
use std::fmt::Write as _;
use std::io::Write as _;

/// Packs `kernels` into an archive. It is deterministic: equal kernels give equal bytes.
pub fn archive(rustc: &str, source: &str, kernels: &[Kernel]) -> Outcome<Vec<u8>> {
    let relative: Vec<String> = kernels.par_iter().map(|(_, text)| registers::relative(text)).collect();
    let streams: Vec<_> = (0..kernels.len())
        .into_par_iter()
        .map(|at| deflate(&relative[at], base(kernels, at).map_or("", |base| &relative[base])))
        .collect::<Outcome<_>>()?;
    let mut manifest = format!("{FIRST_LINE}\nrustc: {rustc}\nsource: {source}\n");
    for (at, stream) in streams.iter().enumerate() {
        let name = kernels[at].0;
        let _ = write!(manifest, "entry: {name} {} {}", relative[at].len(), stream.len());
        if let Some(base) = base(kernels, at) {
            let _ = write!(manifest, " {}", kernels[base].0);
        }
        manifest.push('\n');
    }
    let mut bytes = (manifest + "\n").into_bytes();
    bytes.extend(streams.iter().flatten());
    let packed = Archive::parse(&bytes).map_err(|e| e.to_string())?;
    for (name, text) in kernels {
        if packed.text(name).as_ref() != Ok(text) {
            return Err(format!("{name}: packed and inflated, it is another text"));
        }
    }
    Ok(bytes)
}

/// Returns the number of the earlier kernel with the most similar name: its f16 twin, or the name without the last property.
fn base(kernels: &[Kernel], at: usize) -> Option<usize> {
    let name = kernels[at].0;
    let find = |name: &str| kernels[..at].iter().position(|kernel| kernel.0 == name);
    let in_f16 = find(&name.replace("_bf16", "_f16"));
    in_f16.or_else(|| find(name.rsplit_once('_')?.0))
}

/// Compresses `text` to raw LZMA, with `base` at the start of the dictionary.
fn deflate(text: &str, base: &str) -> Outcome<Vec<u8>> {
    let mut options = LzmaOptions::with_preset(9);
    options.dict_size = window(text.len(), base.len());
    options.nice_len = LzmaOptions::NICE_LEN_MAX;
    (options.lc, options.lp, options.pb) = (LITERAL_CONTEXT_BITS, 0, 0);
    options.preset_dict = Some(base.as_bytes().to_vec()).filter(|base| !base.is_empty());
    let pack = || {
        let mut writer = LzmaWriter::new_no_header(Vec::new(), &options, false)?;
        writer.write_all(text.as_bytes())?;
        writer.finish()
    };
    pack().map_err(|e| format!("packing a kernel: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_come_back_and_twins_are_small() {
        let text = |name: &str| (0..2000_u64).fold(format!("{name}\n"), |text, n| format!("{text}{}\n", n * n * 7919));
        let names = [
            "forward_f16_d64",
            "forward_f16_d64_causal",
            "forward_bf16_d64",
            "forward_bf16_d64_causal",
            "other",
        ];
        let kernels = names.map(|name| (name, text(name)));
        let bytes = archive("rustc 1", "abc", &kernels).expect("it inflates to them, which it checked");
        let archive = Archive::parse(&bytes).expect("it reads");
        assert!(archive.names().eq(names));
        assert_eq!((archive.rustc, archive.source), ("rustc 1", "abc"));
        let bases = (0..names.len()).map(|at| base(&kernels, at).map(|base| names[base]));
        assert!(bases.eq([None, Some(names[0]), Some(names[0]), Some(names[1]), None]));
        assert!(deflate(&kernels[2].1, &kernels[0].1).expect("it packs").len() < 100);
        assert!(deflate(&kernels[2].1, "").expect("it packs").len() > 1000);
    }
}
