//! One module of many kernels to many modules of one, with launch bounds.
//!
//! LLVM knows nothing of launch bounds, but they stand on the line between a kernel's parameters and its body, so they
//! can be added from the table of entries. Without them ptxas would have to allow for 1024 threads a block.

use crate::Outcome;
use crate::table::Row;
use flash_attention_kernels::entries::Arch;

/// The module that holds `entry` alone, cut out of the compiler's `module`.
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
    Ok(format!(
        "{header}\n\n{shared}\n\n.visible {parameters}\n.maxntid {threads}, 1, 1\n{blocks}{instructions}}}\n",
        parameters = parameters(text[..body].trim_end(), entry.arch),
        threads = entry.threads,
        blocks = match entry.min_blocks {
            0 => String::new(),
            blocks => format!(".minnctapersm {blocks}\n"),
        },
    ))
}

/// The parameter list, which on Hopper starts with tensor maps: those lie at multiples of 64 bytes.
fn parameters(list: &str, arch: Arch) -> String {
    match arch {
        Arch::Sm80 => list.to_owned(),
        Arch::Sm90a => list.replace(".param .align 8 ", ".param .align 64 "),
    }
}

/// A kernel's code with labels `$L__BB_2` for `$L__BB11_2`: the compiler numbers the functions of a module, and a kernel would
/// change with what is compiled beside it.
fn own_labels(code: &str) -> String {
    let mut parts = code.split("$L__BB");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |code, part| {
        code + "$L__BB" + part.trim_start_matches(|c: char| c.is_ascii_digit())
    })
}

/// Whether a line is worth keeping: the compiler's remarks around inline assembly double a kernel's length.
fn is_code(line: &str) -> bool {
    let line = line.trim_start();
    !line.is_empty() && !line.starts_with("//")
}

/// The lines from the first that starts with `from` to the next that starts with `to`.
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

/// The parameter list of the only kernel of a module, to compare what two compilers made of it.
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
