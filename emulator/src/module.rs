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
    /// Identity of this instance among the modules of a device memory.
    id: u64,
}

impl Module {
    /// Parses and decodes PTX. `file` is the name used in messages.
    ///
    /// # Errors
    ///
    /// [`Error::Syntax`] with the line that is not PTX. Unknown instructions are reported by
    /// [`launch`](Self::launch), and only for entries that can reach them.
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

    /// Returns the kernel of this name.
    pub fn entry(&self, name: &str) -> Option<&Entry> {
        self.program.entry(name)
    }

    /// Returns all kernels, in the order of the text.
    pub fn entries(&self) -> &[Entry] {
        &self.program.entries
    }

    /// Returns the `.target` of the module, such as `sm_90a`.
    pub fn target(&self) -> &str {
        &self.program.target
    }

    /// Returns the name given to [`parse`](Self::parse).
    pub fn file(&self) -> &str {
        &self.program.source.file
    }

    /// Returns the text of a line, counted from 1 and trimmed; empty if there is no such line.
    pub fn line(&self, line: u32) -> String {
        self.program.source.line(line)
    }

    /// Runs a kernel to its end.
    ///
    /// # Errors
    ///
    /// [`Error::NoEntry`] and [`Error::Launch`] before anything runs, [`Error::UnknownInstruction`] if the entry can
    /// reach an unknown instruction, and [`Error::Trap`], [`Error::Fault`] or [`Error::Runaway`] from the run.
    pub fn launch(&self, memory: &DeviceMemory, launch: &Launch<'_>, options: &Options) -> Result<Report, Error> {
        self.launch_watched(memory, launch, options, &|_| ())
    }

    /// Runs a kernel like [`launch`](Self::launch) and calls `ended` with the number of blocks that have ended since
    /// the last call. The host threads that ran the blocks make these calls, several at a time; `ended` must not
    /// panic.
    ///
    /// # Errors
    ///
    /// The errors of [`launch`](Self::launch).
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
