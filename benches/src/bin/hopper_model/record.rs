//! The main loops as `cargo xtask results` records them from the machine code.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::Failure;
use crate::replay::Program;

/// `benches/results/sass.json`.
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
    /// Instructions that one warp issues in a step beside the products.
    pub fn others(&self) -> u32 {
        self.step.instructions - self.step.classes.get("Tensor").unwrap_or(&0)
    }

    /// The loop as it is replayed.
    ///
    /// # Errors
    /// If it was not recorded, or is in another notation.
    pub fn program(&self) -> Result<Program, Failure> {
        if self.code.is_empty() {
            return Err("the record has no code of this loop".into());
        }
        Program::parse(&self.code)
    }
}

/// The main loops of a kernel for Hopper, one a walk.
///
/// # Errors
/// If the record has none of this name.
pub fn main_loops(kernel: &str) -> Result<Vec<Loop>, Failure> {
    let record: Record = serde_json::from_str(include_str!("../../../results/sass.json"))?;
    let found = record
        .kernels
        .into_iter()
        .find(|found| found.name == kernel && found.target == "sm_90a");
    let found = found.ok_or_else(|| format!("sass.json has no {kernel}: cargo xtask results"))?;
    Ok(found.main)
}
