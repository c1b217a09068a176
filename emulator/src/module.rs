//! A PTX module, decoded and ready to launch.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::decode;
use crate::error::Error;
use crate::launch;
use crate::memory::DeviceMemory;
use crate::parse;
use crate::program::{Entry, Program, Source};
use crate::report::Report;
use crate::request::{Launch, Options};

/// A PTX module: its kernels, functions and variables.
#[derive(Debug)]
pub struct Module {
    program: Program,
    /// Tells the instances of modules apart in a device memory.
    id: u64,
}

impl Module {
    /// Reads PTX. `file` is the name used in messages.
    ///
    /// # Errors
    ///
    /// [`Error::Syntax`] names the line that is not PTX. Instructions that are PTX but not known here
    /// are reported by [`launch`](Self::launch), and only for entries that can reach them.
    pub fn parse(text: &str, file: &str) -> Result<Module, Error> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let source = Source::new(text, file);
        let syntax = |line: u32, message: String, source: &Source| Error::Syntax {
            file: file.to_owned(),
            line,
            message,
            text: source.line(line),
        };
        let parsed = parse::module(text).map_err(|e| syntax(e.line, e.message, &source))?;
        if parsed.version.is_empty() || parsed.target.is_empty() {
            return Err(syntax(1, "`.version` or `.target` is missing".into(), &source));
        }
        match decode::program(&parsed, source) {
            Ok(program) => Ok(Module {
                program,
                id: NEXT.fetch_add(1, Ordering::Relaxed),
            }),
            Err((line, message, source)) => Err(syntax(line, message, &source)),
        }
    }

    /// The kernel of that name.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.program.entry(name)
    }

    /// All kernels, in the order of the text.
    pub fn entries(&self) -> &[Entry] {
        &self.program.entries
    }

    /// The `.target` of the module, such as `sm_90a`.
    pub fn target(&self) -> &str {
        &self.program.target
    }

    /// The name given to [`parse`](Self::parse).
    pub fn file(&self) -> &str {
        &self.program.source.file
    }

    /// The text of a one-based line, trimmed; empty if there is none.
    pub fn line(&self, line: u32) -> String {
        self.program.source.line(line)
    }

    /// Runs a kernel to its end.
    ///
    /// # Errors
    ///
    /// [`Error::NoEntry`] and [`Error::Launch`] before anything runs, [`Error::UnknownInstruction`] if the entry can
    /// reach an instruction that is not known, and [`Error::Trap`], [`Error::Fault`] or [`Error::Runaway`] from the run.
    pub fn launch(&self, memory: &DeviceMemory, launch: &Launch<'_>, options: &Options) -> Result<Report, Error> {
        self.launch_watched(memory, launch, options, &|_| ())
    }

    /// [`launch`](Self::launch), which calls `ended` with a number of blocks whenever so many more have come to their end.
    /// It is called from the host threads that ran them, several at a time, and must not panic.
    ///
    /// # Errors
    ///
    /// Those of [`launch`](Self::launch).
    pub fn launch_watched(
        &self,
        memory: &DeviceMemory,
        launch: &Launch<'_>,
        options: &Options,
        ended: &(dyn Fn(u64) + Sync),
    ) -> Result<Report, Error> {
        launch::run(&self.program, self.id, memory, launch, options, ended)
    }
}
