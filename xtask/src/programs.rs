//! A fixed set of score programs, spliced into kernels that take them: what ptxas makes of each.
//!
//! Every program in every kernel would be some 900 assemblies. The set is chosen to take two minutes on two cores:
//!
//! - f16 stands for bf16, whose kernels have the same loops.
//! - All programs at head_dim 64 and 128, which models have most; at the other head_dims the one that changes nothing and the one
//!   that has everything.
//! - For f32 the one that has everything, at the same two.
//! - Portable kernels for sm_80. Their backward also for sm_90, since Hopper has none of its own for programs, with the two programs that
//!   keep most for it.

mod judge;

use std::collections::BTreeMap;
use std::fmt::Write as _;

use flash_attention::half::f16;
use flash_attention::program::{Code, splice};
use flash_attention::{Attention, Device, Scalar, Tensor};
use flash_attention_kernels::entries::{Dtype, Pass};
use rayon::prelude::*;

use crate::limits::Loops;
use crate::sass::{Assembled, Tools, assemble, targets};
use crate::step::{Class, Step};
use crate::table::{Row, tables};
use crate::{Outcome, read, workspace};

/// Name of the program that changes nothing: what others are compared with.
const NOTHING: &str = "scale";

/// Name of the program that has every feature with a cost.
const EVERYTHING: &str = "all";

/// Programs by name. Numbers and sizes of tables are parameters, so they change no code.
fn programs() -> Vec<(&'static str, Attention)> {
    let new = Attention::new;
    let (heads, seqlen) = (4, 64);
    let slopes: Tensor<f32> = zeros(&[heads]);
    let sinks: Tensor<f32> = zeros(&[heads]);
    let documents: Tensor<i32> = zeros(&[1, seqlen]);
    let bias: Tensor<f16> = zeros(&[1, heads, seqlen, seqlen]);
    vec![
        (NOTHING, new().score(|s, _| s + 0.0)),
        ("softcap", new().softcap(30.0)),
        ("alibi", new().alibi(&slopes)),
        ("window", new().window(512, 0)),
        ("documents", new().documents(&documents, &documents)),
        ("bias", new().bias(&bias)),
        ("dropout", new().dropout(0.1, 1)),
        (
            EVERYTHING,
            new()
                .softcap(30.0)
                .bias(&bias)
                .alibi(&slopes)
                .window(512, 0)
                .documents(&documents, &documents)
                .sinks(&sinks)
                .dropout(0.1, 1),
        ),
    ]
}

fn zeros<T: Scalar + Default>(shape: &[usize]) -> Tensor<T> {
    let elements = vec![T::default(); shape.iter().product()];
    Tensor::from_slice(&Device::cpu(), shape, &elements).expect("a small tensor")
}

/// Tells if a program belongs to the fixed set of a kernel on a target.
fn is_chosen(row: &Row, target: &str, program: &str) -> bool {
    let is_usual = matches!(row.head_dim, 64 | 128);
    let is_forward = row.pass == Some(Pass::Forward);
    match (row.dtype, target) {
        (Dtype::F16, "sm_90") => is_usual && !is_forward && matches!(program, "softcap" | EVERYTHING),
        (Dtype::F16, _) => is_usual || matches!(program, NOTHING | EVERYTHING),
        (Dtype::F32, "sm_80") => is_usual && program == EVERYTHING,
        _ => false,
    }
}

/// Figures of a kernel with a program in it, as ptxas compiled it.
struct Figure {
    entry: Row,
    target: &'static str,
    program: &'static str,
    spilled: u32,
    /// Loads and stores of spilled registers in the main loops.
    in_loops: u32,
    /// Instructions beside the products of a step, in main loops and in those that apply the mask; none in f32.
    others: [Option<u32>; 2],
    warnings: Vec<String>,
}

impl Figure {
    fn new(kernel: Assembled, program: &'static str) -> Self {
        let loops = Loops::of(&kernel.loops);
        let sum = |steps: Vec<Step>| (!steps.is_empty()).then(|| steps.iter().map(Step::others).sum());
        let masked: Vec<Step> = loops.masked.iter().map(|found| Step::of(&found.leanest)).collect();
        Self {
            in_loops: loops.steps().iter().map(|step| step.count(Class::Local)).sum(),
            others: [sum(loops.steps()), sum(masked)],
            entry: kernel.entry,
            target: kernel.target,
            program,
            spilled: kernel.spilled,
            warnings: kernel.warnings,
        }
    }

    fn name(&self) -> String {
        format!("{} for {} with `{}`", self.entry.name, self.target, self.program)
    }

    /// The figure as a cell of the page.
    fn cell(&self) -> String {
        let [main, masked] = self.others.map(|others| others.map(|others| others.to_string()));
        let mut cell = main.unwrap_or_else(|| "-".to_owned());
        if let Some(masked) = masked {
            cell += &format!(", {masked}");
        }
        if self.spilled > 0 {
            cell += &format!(" ({} B, {})", self.spilled, self.in_loops);
        }
        cell
    }
}

/// Assembles programs in the kernels with `part` in their name, those of the fixed set or all.
fn assemble_all(tools: &Tools, part: &str, all: bool) -> Outcome<Vec<Figure>> {
    let programs = programs();
    let mut figures = Vec::new();
    for table in tables() {
        let rows = (table.rows.iter()).filter(|row| row.program && row.name.contains(part));
        let kernels = rows.flat_map(|row| targets(row.arch).iter().map(move |&target| (*row, target)));
        let has_scores = |row: &Row| row.pass != Some(Pass::BackwardPreprocess);
        let work: Vec<_> = kernels
            .flat_map(|(row, target)| {
                programs
                    .iter()
                    .map(move |(name, program)| (row, target, *name, program))
            })
            .filter(|(row, target, name, _)| {
                has_scores(row) && (is_chosen(row, target, name) || all && row.dtype != Dtype::Bf16)
            })
            .collect();
        if work.is_empty() {
            continue;
        }
        let committed = table.committed()?;
        let assembled = work.into_par_iter().map(|(row, target, name, program)| {
            let text = spliced(&committed.text(row.name)?, &row, program)?;
            let stem = format!("{}-{name}", row.name);
            Ok(Figure::new(assemble(tools, &text, row, target, &stem)?, name))
        });
        figures.extend(assembled.collect::<Outcome<Vec<_>>>()?);
    }
    Ok(figures)
}

/// A kernel's text with a program in it.
fn spliced(text: &str, row: &Row, program: &Attention) -> Outcome<String> {
    let program = program.program().map_err(|e| e.to_string())?.ok_or("no program")?;
    let code = match row.pass {
        Some(Pass::Forward) => Code::new(program, 0.125),
        _ => Code::backward(program, 0.125, true).map_err(|e| e.to_string())?,
    };
    let spliced = splice(text, &code, row.dtype == Dtype::F32).map_err(|e| e.to_string())?;
    Ok(spliced.text)
}

/// Assembles every program in every kernel with `part` in its name and prints their page. Fails if one has a fault.
pub fn show(part: &str) -> Outcome {
    let tools = Tools::find()?;
    let figures = assemble_all(&tools, part, true)?;
    if figures.is_empty() {
        return Err(format!("no kernel for score programs has '{part}' in its name"));
    }
    print!("{}", tables_of(&figures));
    judge::judge(&figures)
}

/// Assembles the fixed set. Fails if a kernel has a fault, or the committed page has other figures.
pub fn check() -> Outcome {
    let tools = Tools::find()?;
    let figures = assemble_all(&tools, "", false)?;
    judge::judge(&figures)?;
    let path = workspace().join(PAGE);
    let committed = read(&path)?;
    if committed == page(tools.version(), &figures) {
        return Ok(());
    }
    if committed.contains(&format!("ptxas {}", tools.version())) {
        return Err(format!(
            "{PAGE} differs from the figures of these kernels; run `cargo xtask results` and commit the result"
        ));
    }
    eprintln!(
        "{PAGE} was written with another ptxas than {}, so it was not compared",
        tools.version()
    );
    Ok(())
}

/// Assembles the fixed set and writes its page. Fails afterwards if a kernel has a fault.
pub fn write() -> Outcome {
    let tools = Tools::find()?;
    let figures = assemble_all(&tools, "", false)?;
    let path = workspace().join(PAGE);
    std::fs::write(&path, page(tools.version(), &figures)).map_err(|e| format!("{}: {e}", path.display()))?;
    judge::judge(&figures)
}

/// Page of the figures.
const PAGE: &str = "benches/results/programs.md";

fn page(ptxas: &str, figures: &[Figure]) -> String {
    let page = include_str!("programs/page.md").replace("PTXAS", ptxas);
    page + &tables_of(figures) + &judge::table_of_exceptions()
}

/// Writes a table a pass: a row for each kernel and target, a column for each program.
fn tables_of(figures: &[Figure]) -> String {
    let names: Vec<&str> = programs().into_iter().map(|(name, _)| name).collect();
    let mut page = String::new();
    for (pass, title) in [
        (Pass::Forward, "Forward"),
        (Pass::BackwardDq, "Backward, dQ"),
        (Pass::BackwardDkv, "Backward, dK and dV"),
    ] {
        let mut rows: Vec<(&Row, &str, BTreeMap<&str, String>)> = Vec::new();
        for figure in figures.iter().filter(|figure| figure.entry.pass == Some(pass)) {
            let is_same = |row: &&mut (&Row, &str, _)| (row.0.name, row.1) == (figure.entry.name, figure.target);
            match rows.iter_mut().find(is_same) {
                Some((.., cells)) => _ = cells.insert(figure.program, figure.cell()),
                None => rows.push((&figure.entry, figure.target, [(figure.program, figure.cell())].into())),
            }
        }
        if rows.is_empty() {
            continue;
        }
        let _ = writeln!(page, "\n## {title}\n\n| kernel | for | tile | {} |", names.join(" | "));
        let _ = writeln!(page, "{}|", "| --- ".repeat(3 + names.len()));
        for (row, target, cells) in rows {
            let cells: Vec<&str> = names
                .iter()
                .map(|name| cells.get(name).map_or("", String::as_str))
                .collect();
            let (m, n) = (row.block_m, row.block_n);
            let _ = writeln!(page, "| {} | {target} | {m} x {n} | {} |", row.name, cells.join(" | "));
        }
    }
    page
}
