//! Splits a module of many kernels into modules of one kernel each, with launch bounds and the size of clusters.
//!
//! LLVM cannot express launch bounds. They belong between a kernel's parameters and its body, so they are added there
//! from the table of entries. Without them ptxas would have to allow for 1024 threads per block.

use crate::Outcome;
use crate::table::Row;
use flash_attention_kernels::entries::Arch;

/// Cuts the module that contains only `entry` out of the compiler's `module`.
pub fn extract(module: &str, entry: &Row) -> Outcome<String> {
    let name = entry.name;
    let header = lines_between(module, ".version", ".address_size").ok_or("the module has no header")?;
    let shared = module
        .lines()
        .find(|line| line.starts_with(".extern .shared"))
        .ok_or("the module declares no smem")?;
    let start = module
        .find(&format!(".entry {name}("))
        .ok_or_else(|| format!("the compiler emitted no entry {name}"))?;
    let text = &module[start..];
    let body = text.find("\n{\n").ok_or_else(|| format!("{name} has no body"))?;
    let end = text.find("\n}\n").ok_or_else(|| format!("{name} has no end"))?;
    let instructions: String = text[body..end]
        .lines()
        .filter(|line| is_code(line))
        .flat_map(|l| [l, "\n"])
        .collect();
    let instructions = own_labels(&instructions);
    if instructions.contains("call") {
        return Err(format!("{name} calls a function, which its file would lack"));
    }
    // A version that the driver of CUDA 12.0 loads, except for additions of whole vectors.
    let header = match instructions.contains(".add.v4.f32") {
        true => header.replace(".version 8.0", ".version 8.1"),
        false => header,
    };
    Ok(format!(
        "{header}\n\n{shared}\n\n.visible {parameters}\n.maxntid {threads}, 1, 1\n{blocks}{cluster}{instructions}}}\n",
        parameters = parameters(text[..body].trim_end(), entry.arch),
        threads = entry.threads,
        blocks = match entry.min_blocks {
            0 => String::new(),
            blocks => format!(".minnctapersm {blocks}\n"),
        },
        cluster = match entry.cluster {
            1 => String::new(),
            blocks => format!(".reqnctapercluster {blocks}, 1, 1\n"),
        },
    ))
}

/// Converts the parameter list. On Hopper it starts with tensor maps, which must be aligned to 64 bytes.
fn parameters(list: &str, arch: Arch) -> String {
    match arch {
        Arch::Sm80 => list.to_owned(),
        Arch::Sm90a => list.replace(".param .align 8 ", ".param .align 64 "),
    }
}

/// Renames labels such as `$L__BB11_2` to `$L__BB_2`. The compiler numbers the functions of a module, so a kernel
/// would otherwise change with the kernels compiled beside it.
fn own_labels(code: &str) -> String {
    let mut parts = code.split("$L__BB");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |code, part| {
        code + "$L__BB" + part.trim_start_matches(|c: char| c.is_ascii_digit())
    })
}

/// Returns true for a line of code and for the marker of a score program. The compiler's remarks around inline
/// assembly, which would double a kernel's length, are dropped.
fn is_code(line: &str) -> bool {
    let line = line.trim_start();
    !line.is_empty() && (!line.starts_with("//") || line.starts_with("//@"))
}

/// Returns the lines from the first that starts with `from` to the next that starts with `to`.
fn lines_between(text: &str, from: &str, to: &str) -> Option<String> {
    let mut lines = text.lines().skip_while(|line| !line.starts_with(from));
    let mut kept = Vec::new();
    loop {
        let line = lines.next()?;
        kept.push(line);
        if line.starts_with(to) {
            return Some(kept.join("\n"));
        }
    }
}

/// Returns the parameter list of a module's only kernel, to compare the output of two compilers.
pub fn signature(module: &str) -> Option<&str> {
    let start = module.find(".entry ")?;
    let end = module[start..].find(')')?;
    Some(&module[start..=start + end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_do_not_count_functions() {
        let code = "\t@%p1 bra \t$L__BB11_2;\n$L__BB11_2:\n\tadd.s32 %r11, %r1, 2;\n";
        assert_eq!(own_labels(code), code.replace("BB11_", "BB_"));
        assert_eq!(own_labels("ret;"), "ret;");
    }
}
