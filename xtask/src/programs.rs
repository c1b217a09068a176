//! A fixed set of score programs, spliced into every kernel that takes them: what ptxas makes of each.

use flash_attention::Attention;
use flash_attention::program::{Code, splice};
use flash_attention_kernels::entries::{Dtype, Pass};
use rayon::prelude::*;

use crate::Outcome;
use crate::limits::Loops;
use crate::sass::{Tools, assemble, targets};
use crate::step::Step;
use crate::table::{Row, tables};

/// Programs by name, from the one that changes nothing on.
pub fn programs() -> Vec<(&'static str, Attention)> {
    let new = Attention::new;
    vec![
        ("scale", new().score(|s, _| s + 0.0)),
        ("softcap", new().softcap(30.0)),
        ("linear", new().score(|s, at| s + (at.key - at.query) * 0.5)),
        ("causal", new().mask(|at| at.distance().at_least(0))),
        ("window", new().window(512, 0)),
        ("dropout", new().dropout(0.1, 1)),
        (
            "linear, softcap, window",
            new()
                .softcap(30.0)
                .window(512, 0)
                .score(|s, at| s + (at.key - at.query) * 0.5),
        ),
    ]
}

/// Assembles every program in every kernel with `part` in its name, f16 for both types of 16 bits, and prints registers,
/// spills and main loops. Fails if a kernel spills or ptxas warns.
pub fn show(part: &str) -> Outcome {
    let tools = Tools::find()?;
    let mut faults = Vec::new();
    for table in tables() {
        let rows: Vec<Row> = (table.rows.iter().copied())
            .filter(|row| row.program && row.name.contains(part) && row.dtype != Dtype::Bf16)
            .collect();
        if rows.is_empty() {
            continue;
        }
        let committed = table.committed()?;
        let programs = programs();
        let work: Vec<_> = (rows.iter())
            .flat_map(|row| targets(row.arch).iter().map(move |&target| (*row, target)))
            .flat_map(|(row, target)| {
                programs
                    .iter()
                    .map(move |(name, program)| (row, target, *name, program))
            })
            .collect();
        let assembled = work.into_par_iter().map(|(row, target, name, program)| {
            let text = spliced(&committed.text(row.name)?, &row, program)?;
            let stem = format!("{}-{}", row.name, name.replace(", ", "-"));
            Ok((name, assemble(&tools, &text, row, target, &stem)?))
        });
        for (name, kernel) in assembled.collect::<Outcome<Vec<_>>>()? {
            let steps = Loops::of(&kernel.loops).steps();
            let others: Vec<u32> = steps.iter().map(Step::others).collect();
            let line = format!(
                "{} for {}, {name}: {} registers, {} bytes spilled, {others:?} instructions beside the products of a step",
                kernel.entry.name, kernel.target, kernel.registers, kernel.spilled
            );
            println!("{line}");
            if kernel.spilled > 0 || !kernel.warnings.is_empty() {
                faults.push(line + &kernel.warnings.concat());
            }
        }
    }
    if faults.is_empty() {
        Ok(())
    } else {
        Err(format!("spills or warnings:\n{}", faults.join("\n")))
    }
}

/// A kernel's text with a program in it.
fn spliced(text: &str, row: &Row, program: &Attention) -> Outcome<String> {
    let program = program.program().map_err(|e| e.to_string())?.ok_or("no program")?;
    let code = match row.pass {
        Some(Pass::Forward) => Code::new(program, 1.0),
        _ => Code::backward(program, 1.0, false).map_err(|e| e.to_string())?,
    };
    let spliced = splice(text, &code, row.dtype == Dtype::F32).map_err(|e| e.to_string())?;
    Ok(spliced.text)
}
