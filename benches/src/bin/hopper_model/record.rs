//! Main loops as `cargo xtask results` records them from the machine code.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::Failure;
use crate::program::Program;

/// Content of `benches/results/sass.json`.
#[derive(Deserialize)]
struct Record {
    kernels: Vec<Kernel>,
}

#[derive(Deserialize)]
struct Kernel {
    name: String,
    target: String,
    main: Vec<Loop>,
}

/// A main loop of one kernel.
#[derive(Deserialize)]
pub struct Loop {
    step: Step,
    #[serde(default)]
    code: String,
}

#[derive(Deserialize)]
struct Step {
    instructions: u32,
    classes: BTreeMap<String, u32>,
}

impl Loop {
    /// Returns the instructions other than products that one warp issues in a step.
    pub fn others(&self) -> u32 {
        self.step.instructions - self.step.classes.get("Tensor").unwrap_or(&0)
    }

    /// Returns the exponentials that one warp issues in a step.
    pub fn exponentials(&self) -> u32 {
        self.step.classes.get("Exp2").copied().unwrap_or_default()
    }

    /// Returns the loop as a program to replay.
    ///
    /// # Errors
    /// If the code of the loop was not recorded, or is malformed.
    pub fn program(&self) -> Result<Program, Failure> {
        if self.code.is_empty() {
            return Err("the record has no code of this loop".into());
        }
        Program::parse(&self.code)
    }
}

/// Returns the main loops of a kernel for Hopper.
///
/// # Errors
/// If the record has no kernel of this name.
pub fn main_loops(kernel: &str) -> Result<Vec<Loop>, Failure> {
    let record: Record = serde_json::from_str(include_str!("../../../results/sass.json"))?;
    let found = record
        .kernels
        .into_iter()
        .find(|found| found.name == kernel && found.target == "sm_90a");
    let found = found.ok_or_else(|| format!("sass.json has no {kernel}: cargo xtask results"))?;
    Ok(found.main)
}
