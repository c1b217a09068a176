//! Predicts the speed of the kernels for Hopper, without a GPU, and holds measured speeds against it.
//!
//! `hopper_model [--output FILE]` writes the table of predictions; `hopper_model --check FILE` reads measured rows, a JSON
//! object a line with `pass`, `dtype`, `mask` or `causal`, `head_dim`, `seqlen` and `tflops`, and prints both side by side.

mod counts;
mod model;

use std::fmt::Write as _;

use benches::row::Pass;
use counts::Shape;
use model::Prediction;

type Failure = Box<dyn std::error::Error>;

const HEAD_DIMS: [usize; 5] = [64, 96, 128, 192, 256];
const SEQLENS: [usize; 6] = [512, 1024, 2048, 4096, 8192, 16384];

/// How far off a prediction may be if the model is to be kept.
const TOLERANCE: f64 = 0.15;

/// FlashAttention-3 on H100, FP16, 16k tokens, hidden 2048, TFLOP/s at each of [`SEQLENS`]: its paper's figures 5 and 6.
const PUBLISHED: [(Pass, usize, bool, [u32; 6]); 8] = [
    (Pass::Forward, 64, false, [333, 392, 460, 476, 496, 497]),
    (Pass::Forward, 64, true, [197, 265, 371, 420, 460, 473]),
    (Pass::Forward, 128, false, [467, 565, 625, 638, 646, 648]),
    (Pass::Forward, 128, true, [292, 423, 521, 579, 602, 616]),
    (Pass::Forward, 256, false, [482, 639, 707, 736, 746, 756]),
    (Pass::Forward, 256, true, [286, 427, 537, 612, 628, 642]),
    (Pass::Backward, 64, false, [272, 363, 422, 453, 472, 474]),
    (Pass::Backward, 128, false, [316, 424, 501, 542, 559, 561]),
];

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => print!("{}", document()?),
        ["--output", path] => std::fs::write(path, document()?)?,
        ["--check", path] => print!("{}", check(&std::fs::read_to_string(path)?)?),
        _ => return Err("usage: hopper_model [--output FILE | --check FILE]".into()),
    }
    Ok(())
}

/// The predictions, with what they rest on.
fn document() -> Result<String, Failure> {
    let mut text = String::from(include_str!("about.md"));
    text += &model::about();
    text += "\n| pass | mask | head_dim |";
    for seqlen in SEQLENS {
        let _ = write!(text, " {seqlen} |");
    }
    text += " ceiling at 16384 | busiest, share of the time | longest block / mean | FA3, H100, published, 512 to 16384 |\n";
    text += &format!("{}|\n", "| --- ".repeat(7 + SEQLENS.len()));
    for pass in [Pass::Forward, Pass::Backward, Pass::Deterministic] {
        for head_dim in HEAD_DIMS {
            let counts = counts::measure(pass, head_dim)?;
            for causal in [false, true] {
                let predictions: Vec<Prediction> = SEQLENS
                    .iter()
                    .map(|&seqlen| model::predict(&Shape::of_table(pass, head_dim, seqlen, causal), &counts))
                    .collect::<Result<_, _>>()?;
                let _ = write!(text, "| {} | {} | {head_dim} |", pass.title(), mask(causal));
                for prediction in &predictions {
                    let _ = write!(text, " {:.0} |", prediction.tflops);
                }
                let last = predictions[SEQLENS.len() - 1];
                let published = PUBLISHED
                    .iter()
                    .find(|row| (row.0, row.1, row.2) == (pass, head_dim, causal));
                let published = published.map_or("-".into(), |row| row.3.map(|n| n.to_string()).join(", "));
                let (name, share) = last.busiest;
                let _ = writeln!(
                    text,
                    " {:.0} | {name}, {:.0} % | {:.2} | {published} |",
                    last.ceiling,
                    100.0 * share,
                    last.imbalance
                );
            }
        }
    }
    Ok(text)
}

/// Measured rows beside what was predicted for them; rows that are none of the table's are counted, not hidden.
fn check(lines: &str) -> Result<String, Failure> {
    let mut text = String::from("| pass | mask | head_dim | seqlen | measured | predicted | error | |\n");
    text += &format!("{}|\n", "| --- ".repeat(8));
    let (mut within, mut all, mut others) = (0, 0, 0);
    let mut known: Vec<((Pass, usize), counts::Counts)> = Vec::new();
    for line in lines.lines().filter(|line| !line.trim().is_empty()) {
        let Some((shape, measured)) = measured_row(line) else {
            others += 1;
            continue;
        };
        let key = (shape.pass, shape.head_dim);
        if known.iter().all(|(other, _)| *other != key) {
            known.push((key, counts::measure(shape.pass, shape.head_dim)?));
        }
        let counts = known.iter().find(|(other, _)| *other == key).map(|(_, counts)| counts);
        let predicted = model::predict(&shape, counts.ok_or("counted above")?)?.tflops;
        let error = predicted / measured - 1.0;
        all += 1;
        within += u32::from(error.abs() <= TOLERANCE);
        let verdict = if error.abs() <= TOLERANCE { "within" } else { "off" };
        let (pass, mask) = (shape.pass.title(), mask(shape.causal));
        let _ = writeln!(
            text,
            "| {pass} | {mask} | {} | {} | {measured:.0} | {predicted:.0} | {:+.0} % | {verdict} |",
            shape.head_dim,
            shape.seqlen,
            100.0 * error
        );
    }
    let _ = writeln!(
        text,
        "\n{within} of {all} rows within {:.0} %; {others} lines are not rows of ours.",
        100.0 * TOLERANCE
    );
    Ok(text)
}

/// The shape and TFLOP/s of a line; `None` if it is no row of f16 or bf16 with a speed, or somebody else's.
fn measured_row(line: &str) -> Option<(Shape, f64)> {
    if !matches!(field(line, "dtype")?, "f16" | "bf16") || field(line, "backend").is_some_and(|name| name != "ours") {
        return None;
    }
    let pass = field(line, "pass")?.parse().ok()?;
    let causal = matches!(
        (field(line, "mask"), field(line, "causal")),
        (Some("causal"), _) | (_, Some("true"))
    );
    let (head_dim, seqlen) = (
        field(line, "head_dim")?.parse().ok()?,
        field(line, "seqlen")?.parse().ok()?,
    );
    let tflops: f64 = field(line, "tflops")?.parse().ok()?;
    (tflops > 0.0).then(|| (Shape::of_table(pass, head_dim, seqlen, causal), tflops))
}

/// The value of a field of a flat JSON object, without its quotes.
fn field<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let rest = line
        .split_once(&format!("\"{name}\""))?
        .1
        .trim_start()
        .strip_prefix(':')?;
    Some(rest.split([',', '}']).next()?.trim().trim_matches('"'))
}

fn mask(causal: bool) -> &'static str {
    if causal { "causal" } else { "full" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_read_and_others_are_not() {
        let line = r#"{"kind": "row", "pass": "bwd-det", "dtype": "f16", "mask": "causal", "head_dim": 128, "seqlen": 4096, "tflops": 301.5, "error": 0.1}"#;
        let (shape, tflops) = measured_row(line).expect("a row");
        assert_eq!(shape, Shape::of_table(Pass::Deterministic, 128, 4096, true));
        assert_eq!(tflops, 301.5);
        let full = r#"{"tflops":7,"causal":false,"seqlen":512,"head_dim":64,"dtype":"bf16","pass":"forward"}"#;
        assert_eq!(
            measured_row(full),
            Some((Shape::of_table(Pass::Forward, 64, 512, false), 7.0))
        );
        assert_eq!(measured_row(&line.replace("301.5", "null")), None);
        assert_eq!(measured_row(&line.replace("f16", "f32")), None);
    }
}
