//! `benches/results/sass.json` and `sass.md`: data of the assembled kernels, and tables that compare them with
//! FlashAttention-3.

use crate::limits::{Loops, for_scores, tiles};
use crate::peer::{Figures, Peer};
use crate::sass::Assembled;
use crate::step::{Class, Recorded, Step};
use flash_attention_kernels::entries::{Arch, Dtype, Pass};
use serde::Serialize;
use std::fmt::Write as _;

/// Record of a kernel for one GPU architecture.
#[derive(Serialize)]
struct Kernel {
    name: &'static str,
    target: &'static str,
    block_m: u32,
    block_n: u32,
    threads: u32,
    shared_bytes: u32,
    registers: u32,
    stack: u32,
    spilled: u32,
    tensor_instructions: usize,
    /// Main loops of the kernel.
    main: Vec<Recorded>,
    masked: Vec<Recorded>,
}

impl Kernel {
    fn of(kernel: &Assembled) -> Self {
        let entry = &kernel.entry;
        // bf16 kernels have the same loops as f16 kernels. Nothing replays those over e4m3 inputs.
        let replayed = entry.arch == Arch::Sm90a && entry.dtype == Dtype::F16 && !entry.quantized;
        let loops = Loops::of(&kernel.loops);
        let record = |loops: Vec<_>| loops.into_iter().map(|found| Recorded::of(found, replayed)).collect();
        Self {
            name: entry.name,
            target: kernel.target,
            block_m: entry.block_m,
            block_n: entry.block_n,
            threads: entry.threads,
            shared_bytes: entry.shared_bytes,
            registers: kernel.registers,
            stack: kernel.stack,
            spilled: kernel.spilled,
            tensor_instructions: kernel.tensor_instructions,
            main: record(loops.main),
            masked: record(loops.masked),
        }
    }
}

/// Writes the records of all kernels as JSON, one a line.
pub fn json(ptxas: &str, assembled: &[Assembled]) -> String {
    let kernels: Vec<String> = assembled
        .iter()
        .map(|kernel| serde_json::to_string(&Kernel::of(kernel)).expect("numbers and names"))
        .collect();
    format!(
        "{{\"ptxas\": \"{ptxas}\", \"kernels\": [\n{}\n]}}\n",
        kernels.join(",\n")
    )
}

/// Writes the page of tables.
pub fn markdown(ptxas: &str, assembled: &[Assembled]) -> String {
    let mut page = include_str!("page.md").replace("PTXAS", ptxas);
    page += "\n## Main loops on Hopper, for 64 x 64 scores\n\n";
    page += &against_peers(assembled, "sm_90a", include_str!("page/hopper.md"));
    page += "\n## Main loops on Hopper, one step of one warp by class\n\n";
    page += &by_class(assembled);
    page += "\n## Main loops of portable kernels on sm_80, for 64 x 64 scores\n\n";
    page += &against_peers(assembled, "sm_80", include_str!("page/portable.md"));
    page += "\n## All kernels\n\n";
    page + &all(assembled)
}

/// Returns the line of dashes below the column titles of a table.
fn rule(columns: usize) -> String {
    format!("{}|\n", "| --- ".repeat(columns))
}

/// Writes the table of the main loops of f16 kernels for one GPU architecture, and why some have more than FlashAttention-3's.
fn against_peers(assembled: &[Assembled], target: &str, why: &str) -> String {
    let titles = "| pass | head_dim | mask | tile | stall sum | FA3 | against FA3 | other instructions | FA3 | against FA3 | \
                  EX2 between waits for products | spills in the loops | longest step: instructions, stalls | FA3, with mask |\n";
    let mut table = titles.to_owned() + &rule(14);
    let of = |pass: Pass, head_dim: u32, (causal, cluster): (bool, u32)| {
        assembled.iter().find(|kernel| {
            let entry = &kernel.entry;
            (kernel.target, entry.dtype, entry.quantized) == (target, Dtype::F16, false)
                && (entry.pass, entry.head_dim) == (Some(pass), head_dim)
                && (entry.causal, entry.cluster) == (causal, cluster)
        })
    };
    let variants = [(false, 1), (false, 2), (true, 1)];
    let mut above = Vec::new();
    for pass in [Pass::Forward, Pass::BackwardDqkv] {
        for (head_dim, variant) in [32, 64, 96, 128, 192, 256]
            .into_iter()
            .flat_map(|head_dim| variants.map(|variant| (head_dim, variant)))
        {
            if let Some(kernel) = of(pass, head_dim, variant) {
                table += &row(kernel, &mut above);
            }
        }
    }
    if !above.is_empty() {
        let _ = writeln!(table, "\nAbove FlashAttention-3: {}.\n\n{why}", above.join("; "));
    }
    table
}

/// Writes the row of one pass in that table. Values above those of FlashAttention-3 are added to `above`.
fn row(kernel: &Assembled, above: &mut Vec<String>) -> String {
    let entry = &kernel.entry;
    let pass = match entry.pass {
        Some(Pass::Forward) => "forward",
        _ => "backward",
    };
    let mask = match (entry.causal, entry.cluster) {
        (true, _) => "causal",
        (false, 1) => "full",
        (false, _) => "full, clusters",
    };
    let peer = entry
        .pass
        .and_then(|pass| Peer::of(entry.arch, pass, entry.head_dim, entry.causal));
    let theirs = peer.map(Peer::for_scores);
    let loops = Loops::of(&kernel.loops);
    let steps = loops.steps();
    let ours = for_scores(entry, &steps);
    let (mut exponentials, mut longest) = (Vec::new(), Vec::new());
    for (found, step) in loops.main.iter().zip(&steps) {
        let counts = step.exponentials_between_waits.iter().map(u32::to_string);
        exponentials.push(counts.collect::<Vec<_>>().join(", "));
        let own = loops.masked.iter().find(|other| other.products() == found.products());
        let step = Step::of(own.map_or(&found.longest, |own| &own.leanest));
        longest.push(format!("{}, {}", step.instructions, step.stalls));
    }
    let of_loop = |found| Step::of(found).count(Class::Local);
    let spills: u32 = kernel.loops.iter().map(|found| of_loop(&found.longest)).sum();
    let against = |ours: f64, theirs: Option<f64>| theirs.map(|theirs| 100.0 * (ours / theirs - 1.0));
    let number = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.0}"));
    let percent = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:+.0} %"));
    let of = |figure: fn(&Figures) -> f64| theirs.as_ref().map(figure);
    let [stalls, others] = [of(|theirs| theirs.stalls), of(|theirs| theirs.others)];
    let ratios = [against(ours[0], stalls), against(ours[1], others)];
    for (ratio, name) in ratios.iter().zip(["stalls", "others"]) {
        if let Some(ratio) = ratio.filter(|ratio| *ratio >= 0.5) {
            above.push(format!("{pass} {} {mask}, {name} {ratio:+.0} %", entry.head_dim));
        }
    }
    let their_mask = peer.and_then(|peer| peer.masked);
    let cells = [
        pass.to_owned(),
        entry.head_dim.to_string(),
        mask.to_owned(),
        format!("{} x {}", entry.block_m, entry.block_n),
        format!("{:.0}", ours[0]),
        number(stalls),
        percent(ratios[0]),
        format!("{:.0}", ours[1]),
        number(others),
        percent(ratios[1]),
        exponentials.join("; "),
        spills.to_string(),
        longest.join("; "),
        their_mask.map_or("-".to_owned(), |[instructions, stalls]| {
            format!("{instructions}, {stalls}")
        }),
    ];
    format!("| {} |\n", cells.join(" | "))
}

/// Writes the table of instructions by class in the main loops of full f16 kernels for Hopper, one column a loop.
fn by_class(assembled: &[Assembled]) -> String {
    let mut columns: Vec<(String, f64, Step)> = Vec::new();
    for kernel in assembled {
        let entry = &kernel.entry;
        if (kernel.target, entry.dtype, entry.causal) == ("sm_90a", Dtype::F16, false) {
            let name = entry.name.trim_start_matches("hopper_");
            let name = name.replace("_f16_d", " ").replace('_', " ");
            let steps = Loops::of(&kernel.loops).steps().into_iter();
            columns.extend(steps.map(|step| (name.clone(), tiles(entry), step)));
        }
    }
    let mut table = String::new();
    let mut line = |title: &str, cell: &dyn Fn(&(String, f64, Step)) -> String| {
        let cells: Vec<String> = columns.iter().map(cell).collect();
        let _ = writeln!(table, "| {title} | {} |", cells.join(" | "));
        if title.is_empty() {
            table += &rule(1 + columns.len());
        }
    };
    line("", &|column| column.0.clone());
    line("tiles of 64 x 64 scores", &|column| format!("{:.2}", column.1));
    line("instructions", &|column| column.2.instructions.to_string());
    line("stall sum, cycles", &|column| column.2.stalls.to_string());
    for &(class, title) in Class::TITLES {
        if columns.iter().any(|column| column.2.count(class) > 0) {
            line(title, &|column| column.2.count(class).to_string());
        }
    }
    table
}

fn all(assembled: &[Assembled]) -> String {
    let mut table =
        "| kernel | for | tile | threads | shared bytes | registers | stack | spilled | tensor instructions | others \
                     per tensor instruction, main loop |\n"
            .to_owned()
            + &rule(10);
    for kernel in assembled {
        let Assembled {
            entry,
            target,
            registers,
            spilled,
            stack,
            tensor_instructions,
            loops,
            ..
        } = kernel;
        let ratio = |found: &crate::machine_code::Loop| {
            let step = Step::of(&found.leanest);
            format!("{:.1}", f64::from(step.others()) / f64::from(step.count(Class::Tensor)))
        };
        let others = loops.first().map_or("-".to_owned(), ratio);
        let (m, n, threads, shared) = (entry.block_m, entry.block_n, entry.threads, entry.shared_bytes);
        let _ = writeln!(
            table,
            "| {} | {target} | {m} x {n} | {threads} | {shared} | {registers} | {stack} | {spilled} | {tensor_instructions} | {others} |",
            entry.name
        );
    }
    table
}
