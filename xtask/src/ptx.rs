//! `cargo xtask ptx`: the committed kernels, written, checked and shown.

use crate::compiler::Compiler;
use crate::{Outcome, module, pack, ptx_folder, source};
use flash_attention_kernels::archive::Archive;
use flash_attention_kernels::entries::{Arch, ENTRIES, Entry};
use rayon::prelude::*;
use std::path::PathBuf;

const REMEDY: &str = "run `cargo xtask ptx` and commit the result";

/// Compiles every kernel and writes `kernels/ptx`, which holds nothing else afterwards.
pub fn write() -> Outcome {
    let compiler = Compiler::find()?;
    let source = source::hash()?;
    let compiled = compile(&compiler)?;
    let folder = ptx_folder();
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    for (arch, kernels) in &compiled {
        let path = path(*arch);
        let archive = pack::archive(&compiler.version, &source, kernels)?;
        std::fs::write(&path, &archive).map_err(|e| format!("{}: {e}", path.display()))?;
        let text: usize = kernels.iter().map(|(_, text)| text.len()).sum();
        println!(
            "{}: {} kernels, {text} bytes in {}, by {}",
            path.display(),
            kernels.len(),
            archive.len(),
            compiler.version
        );
    }
    Ok(())
}

/// Compiles every kernel and compares with what is committed. By the compiler that made the archives, to the letter; by
/// another, the hash of the sources, the set of entries and their parameters.
pub fn check() -> Outcome {
    let compiler = Compiler::find()?;
    let source = source::hash()?;
    // Before the minutes that compiling takes.
    for &arch in Arch::ALL {
        let bytes = read(arch)?;
        let archive = parse(arch, &bytes)?;
        if archive.source != source {
            return Err(format!(
                "{}: made from other sources than kernels/src holds; {REMEDY}",
                path(arch).display()
            ));
        }
        if !archive.names().eq(table(arch).map(|entry| entry.name)) {
            return Err(format!(
                "{}: holds other kernels than the table of entries; {REMEDY}",
                path(arch).display()
            ));
        }
    }
    for (arch, kernels) in compile(&compiler)? {
        let bytes = read(arch)?;
        let archive = parse(arch, &bytes)?;
        let same_compiler = archive.rustc == compiler.version;
        for (name, fresh) in &kernels {
            let committed = archive
                .text(name)
                .map_err(|e| format!("{}: {e}", path(arch).display()))?;
            let same = if same_compiler {
                committed == *fresh
            } else {
                module::signature(&committed) == module::signature(fresh)
            };
            if !same {
                return Err(format!(
                    "{name}: differs from what {} makes; {REMEDY}",
                    compiler.version
                ));
            }
        }
        let (count, name, version) = (kernels.len(), arch.name(), &compiler.version);
        if same_compiler {
            println!("{count} kernels for {name} are what {version} makes of kernels/src, to the letter");
        } else {
            println!(
                "{count} kernels for {name}: same sources, entries and parameters; the text was not compared, since {} made \
                 it and {version} is here",
                archive.rustc
            );
        }
    }
    Ok(())
}

/// Prints the committed PTX of one kernel.
pub fn show(name: &str) -> Outcome {
    let entry = ENTRIES.iter().find(|entry| entry.name == name);
    let entry = entry.ok_or_else(|| format!("the table of entries has no {name}"))?;
    print!("{}", text(entry)?);
    Ok(())
}

/// The committed PTX of one kernel.
pub fn text(entry: &Entry) -> Outcome<String> {
    let bytes = read(entry.arch)?;
    let text = parse(entry.arch, &bytes)?.text(entry.name);
    text.map_err(|e| format!("{}: {e}", path(entry.arch).display()))
}

/// A kernel's name and its PTX.
pub type Kernel = (&'static str, String);

/// Compiles the kernels of every target, all targets at once; each target's kernels in the order of the table.
fn compile(compiler: &Compiler) -> Outcome<Vec<(Arch, Vec<Kernel>)>> {
    let compiled = Arch::ALL.par_iter().map(|&arch| {
        let module = compiler.compile(arch)?;
        let kernels = table(arch).map(|entry| Ok((entry.name, module::extract(&module, entry)?)));
        Ok((arch, kernels.collect::<Outcome<_>>()?))
    });
    compiled.collect()
}

/// The rows of the table for a target.
fn table(arch: Arch) -> impl Iterator<Item = &'static Entry> {
    ENTRIES.iter().filter(move |entry| entry.arch == arch)
}

/// The archive of a target's kernels.
fn path(arch: Arch) -> PathBuf {
    ptx_folder().join(arch.name()).with_extension("lzma")
}

fn read(arch: Arch) -> Outcome<Vec<u8>> {
    let path = path(arch);
    std::fs::read(&path).map_err(|e| format!("{}: {e}; {REMEDY}", path.display()))
}

fn parse(arch: Arch, bytes: &[u8]) -> Outcome<Archive<'_>> {
    Archive::parse(bytes).map_err(|e| format!("{}: {e}; {REMEDY}", path(arch).display()))
}
