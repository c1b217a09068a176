//! `cargo xtask ptx`: writes, checks and prints the committed kernels.

use crate::compiler::Compiler;
use crate::table::{Table, tables};
use crate::{Outcome, module, pack, ptx_folder, source};
use flash_attention_kernels::archive::Archive;
use rayon::prelude::*;
use std::path::PathBuf;

const REMEDY: &str = "run `cargo xtask ptx` and commit the result";

/// Compiles every kernel and writes `kernels/ptx`; other files there are removed.
pub fn write() -> Outcome {
    let compiled = compile(&Compiler::find()?, tables())?;
    let _ = std::fs::remove_dir_all(ptx_folder());
    pack(&compiled)
}

/// Compiles the kernels of one table and writes its archive; the others stay as they are, of older sources.
pub fn write_one(name: &str) -> Outcome {
    let table = tables().into_iter().find(|table| table.name == name);
    let table = table.ok_or_else(|| format!("no table of kernels is called {name}"))?;
    pack(&compile(&Compiler::find()?, vec![table])?)
}

/// Writes the archives of compiled kernels.
fn pack(compiled: &[(Table, Vec<Kernel>)]) -> Outcome {
    let (version, source) = (Compiler::find()?.version, source::hash()?);
    let folder = ptx_folder();
    std::fs::create_dir_all(&folder).map_err(|e| format!("{}: {e}", folder.display()))?;
    for (table, kernels) in compiled {
        let path = table.path();
        let archive = pack::archive(&version, &source, kernels)?;
        std::fs::write(&path, &archive).map_err(|e| format!("{}: {e}", path.display()))?;
        let text: usize = kernels.iter().map(|(_, text)| text.len()).sum();
        println!(
            "{}: {} kernels, {text} bytes in {}, by {}",
            path.display(),
            kernels.len(),
            archive.len(),
            version
        );
    }
    Ok(())
}

/// Compiles every kernel and compares it with the committed one. With the compiler that made the archives the text
/// must be equal. With another one, the hash of the sources, the set of entries and their parameters must be equal.
pub fn check() -> Outcome {
    let compiler = Compiler::find()?;
    // Checked first, since compiling takes minutes.
    let source = source::hash()?;
    for table in tables() {
        table.committed()?.check(&table, &source)?;
    }
    for (table, kernels) in compile(&compiler, tables())? {
        let committed = table.committed()?;
        let archive = committed.archive()?;
        let same_compiler = archive.rustc == compiler.version;
        for (name, fresh) in &kernels {
            let text = committed.text(name)?;
            let same = if same_compiler {
                text == *fresh
            } else {
                module::signature(&text) == module::signature(fresh)
            };
            if !same {
                return Err(format!(
                    "{name}: differs from what {} makes; {REMEDY}",
                    compiler.version
                ));
            }
        }
        let (count, name, version) = (kernels.len(), table.name, &compiler.version);
        if same_compiler {
            println!("{name}: {count} kernels equal the output of {version} for kernels/src");
        } else {
            println!(
                "{name}: {count} kernels have the same sources, entries and parameters; the text was not compared, since {} \
                 made it and {version} is here",
                archive.rustc
            );
        }
    }
    Ok(())
}

/// Prints the committed PTX of one kernel.
pub fn show(name: &str) -> Outcome {
    let tables = tables();
    let table = tables
        .iter()
        .find(|table| table.rows.iter().any(|row| row.name == name));
    let table = table.ok_or_else(|| format!("no table of kernels has {name}"))?;
    print!("{}", table.committed()?.text(name)?);
    Ok(())
}

/// Name and PTX of a kernel.
pub type Kernel = (&'static str, String);

/// Compiles tables in parallel; the kernels of each come back in its order.
fn compile(compiler: &Compiler, tables: Vec<Table>) -> Outcome<Vec<(Table, Vec<Kernel>)>> {
    let compiled = tables.into_par_iter().map(|table| {
        let module = compiler.compile(&table)?;
        let kernels = table
            .rows
            .iter()
            .map(|row| Ok((row.name, module::extract(&module, row)?)));
        let kernels = kernels.collect::<Outcome<_>>()?;
        Ok((table, kernels))
    });
    compiled.collect()
}

/// A committed archive.
pub struct Committed {
    path: PathBuf,
    bytes: Vec<u8>,
}

impl Table {
    fn path(&self) -> PathBuf {
        ptx_folder().join(self.name).with_extension("lzma")
    }

    /// Reads the archive of this table's kernels.
    pub fn committed(&self) -> Outcome<Committed> {
        let path = self.path();
        let bytes = std::fs::read(&path).map_err(|e| format!("{}: {e}; {REMEDY}", path.display()))?;
        Ok(Committed { path, bytes })
    }
}

impl Committed {
    fn archive(&self) -> Outcome<Archive<'_>> {
        Archive::parse(&self.bytes).map_err(|e| self.fault(e))
    }

    /// Inflates the PTX of one kernel.
    pub fn text(&self, name: &str) -> Outcome<String> {
        self.archive()?.text(name).map_err(|e| self.fault(e))
    }

    /// Fails if the archive was made from other sources or holds other kernels.
    fn check(&self, table: &Table, source: &str) -> Outcome {
        let archive = self.archive()?;
        if archive.source != source {
            return Err(self.fault("made from other sources than kernels/src holds"));
        }
        if !archive.names().eq(table.rows.iter().map(|row| row.name)) {
            return Err(self.fault("holds other kernels than its table"));
        }
        Ok(())
    }

    fn fault(&self, what: impl std::fmt::Display) -> String {
        format!("{}: {what}; {REMEDY}", self.path.display())
    }
}
