//! Layers of a crate: the modules that each module may import.
//!
//! A room is a module of the crate root with everything below it. Rooms stand on floors. A room may import from
//! itself and from rooms on lower floors, and must name the room that defines an item, not `lib.rs`, which re-exports
//! it for users. Unit tests may import from anywhere.

use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, TokenStream, TokenTree};

/// Reads the sources below `src` and returns a sentence for every import that the floors forbid. `floors` lists the
/// rooms of each floor, lowest first; two rooms of one floor must not import each other. `lib.rs` and the programs in
/// `bin` are above all floors and are not read.
///
/// # Errors
///
/// A sentence if a file cannot be read or is not Rust.
pub fn forbidden_imports(src: &Path, floors: &[&[&str]]) -> Result<Vec<String>, String> {
    let mut files = Vec::new();
    sources(src, &mut files)?;
    let mut forbidden = Vec::new();
    for file in files {
        let module = module_path(src, &file);
        let Some(room) = module.first().filter(|room| *room != "lib" && *room != "bin") else {
            continue;
        };
        let Some(floor) = floor_of(floors, room) else {
            forbidden.push(format!("{}: the room `{room}` stands on no floor", file.display()));
            continue;
        };
        for import in imports(&file, &module)? {
            let Some(target) = import.first().filter(|target| *target != room) else {
                continue;
            };
            let path = import.join("::");
            match floor_of(floors, target) {
                Some(below) if below < floor => {}
                Some(above) => forbidden.push(format!(
                    "{} (floor {floor}) imports `crate::{path}` of {} (floor {above})",
                    file.display(),
                    defined_in(src, &import).display(),
                )),
                None => forbidden.push(format!(
                    "{} imports `crate::{path}` through {}: name the room it lives in",
                    file.display(),
                    src.join("lib.rs").display(),
                )),
            }
        }
    }
    Ok(forbidden)
}

fn floor_of(floors: &[&[&str]], room: &str) -> Option<usize> {
    floors.iter().position(|rooms| rooms.contains(&room))
}

/// Collects the Rust files of a folder and its subfolders, without files of unit tests.
fn sources(folder: &Path, found: &mut Vec<PathBuf>) -> Result<(), String> {
    let describe = |error: std::io::Error| format!("{}: {error}", folder.display());
    let items = std::fs::read_dir(folder).map_err(describe)?;
    let mut paths: Vec<PathBuf> = items
        .map(|item| Ok(item.map_err(describe)?.path()))
        .collect::<Result<_, String>>()?;
    paths.sort();
    for path in paths {
        let name = path.file_stem().and_then(|name| name.to_str()).unwrap_or_default();
        if path.is_dir() {
            sources(&path, found)?;
        } else if path.extension().is_some_and(|e| e == "rs") && name != "tests" && !name.ends_with("_tests") {
            found.push(path);
        }
    }
    Ok(())
}

/// Returns the path of a file's module from the crate root; that of `lib.rs` is `lib`.
fn module_path(src: &Path, file: &Path) -> Vec<String> {
    let inside = file.strip_prefix(src).unwrap_or(file).with_extension("");
    let mut path: Vec<String> = inside.iter().map(|part| part.to_string_lossy().into_owned()).collect();
    if path.last().is_some_and(|last| last == "mod") {
        path.pop();
    }
    path
}

/// Returns the file in which the start of a path is defined.
fn defined_in(src: &Path, path: &[String]) -> PathBuf {
    let candidates = (1..=path.len()).rev().flat_map(|n| {
        let module = src.join(path[..n].iter().collect::<PathBuf>());
        [module.with_extension("rs"), module.join("mod.rs")]
    });
    let mut files = candidates.filter(|file| file.is_file());
    files.next().unwrap_or_else(|| src.join("lib.rs"))
}

/// Returns the paths from the crate root that a file names, in `use` lines or elsewhere outside its unit tests.
fn imports(file: &Path, module: &[String]) -> Result<Vec<Vec<String>>, String> {
    let text = std::fs::read_to_string(file).map_err(|error| format!("{}: {error}", file.display()))?;
    let tokens: TokenStream = text.parse().map_err(|error| format!("{}: {error}", file.display()))?;
    let mut found = Vec::new();
    scan(tokens, module, &mut found);
    Ok(found)
}

fn scan(tokens: TokenStream, module: &[String], found: &mut Vec<Vec<String>>) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    let mut at = 0;
    while at < tokens.len() {
        if is_test_attribute(&tokens[at..]) {
            // Skip the item of the attribute: up to its body, or its semicolon.
            while at < tokens.len() && !ends_item(&tokens[at]) {
                at += 1;
            }
            at += 1;
            continue;
        }
        // Only the first name of a path can be `crate` or `super`.
        let continues = at >= 2 && is_separator(&tokens[at - 2..]);
        match &tokens[at] {
            TokenTree::Ident(name) if !continues && (name == "crate" || name == "super") => {
                let (base, next) = base_of(&tokens, at, module);
                if let Some(base) = base
                    && is_separator(&tokens[next..])
                {
                    tree(&tokens[next + 2..], base, found);
                }
                // Continue after the path, including a list in braces.
                at = next - 1;
                while is_separator(&tokens[(at + 1).min(tokens.len())..]) {
                    at += 3;
                }
            }
            TokenTree::Group(group) => scan(group.stream(), module, found),
            _ => {}
        }
        at += 1;
    }
}

/// Returns the module that `crate` or a chain of `super` stands for, and the position after it; `None` above the
/// crate root.
fn base_of(tokens: &[TokenTree], at: usize, module: &[String]) -> (Option<Vec<String>>, usize) {
    let is_super = |at: usize| matches!(tokens.get(at), Some(TokenTree::Ident(name)) if name == "super");
    if !is_super(at) {
        return (Some(Vec::new()), at + 1);
    }
    let (mut up, mut next) = (1, at + 1);
    while is_separator(&tokens[next.min(tokens.len())..]) && is_super(next + 2) {
        up += 1;
        next += 3;
    }
    (module.len().checked_sub(up).map(|n| module[..n].to_vec()), next)
}

/// Collects the paths of a `use` tree, or of a plain path, that starts after `base`.
fn tree(tokens: &[TokenTree], base: Vec<String>, found: &mut Vec<Vec<String>>) {
    match tokens.first() {
        Some(TokenTree::Ident(name)) => {
            // A macro belongs to the crate root, whatever module defines it.
            let is_macro = matches!(tokens.get(1), Some(TokenTree::Punct(p)) if p.as_char() == '!');
            if base.is_empty() && is_macro {
                return;
            }
            let mut path = base;
            match name.to_string().as_str() {
                "self" => {}
                "super" => drop(path.pop()),
                name => path.push(name.to_owned()),
            }
            if is_separator(&tokens[1..]) {
                tree(&tokens[3..], path, found);
            } else {
                found.push(path);
            }
        }
        Some(TokenTree::Group(group)) if group.delimiter() == Delimiter::Brace => {
            let inner: Vec<TokenTree> = group.stream().into_iter().collect();
            let is_comma = |t: &TokenTree| matches!(t, TokenTree::Punct(p) if p.as_char() == ',');
            for part in inner.split(is_comma).filter(|part| !part.is_empty()) {
                tree(part, base.clone(), found);
            }
        }
        _ => found.push(base),
    }
}

fn is_separator(tokens: &[TokenTree]) -> bool {
    let colon = |at: usize| matches!(tokens.get(at), Some(TokenTree::Punct(p)) if p.as_char() == ':');
    colon(0) && colon(1)
}

/// Returns true if `#[cfg(test)]`, the attribute of unit tests, starts here.
fn is_test_attribute(tokens: &[TokenTree]) -> bool {
    let hash = matches!(tokens.first(), Some(TokenTree::Punct(p)) if p.as_char() == '#');
    let is_cfg = |g: &proc_macro2::Group| g.stream().to_string().replace(' ', "") == "cfg(test)";
    let test = matches!(tokens.get(1), Some(TokenTree::Group(g)) if is_cfg(g));
    hash && test
}

fn ends_item(token: &TokenTree) -> bool {
    match token {
        TokenTree::Punct(p) => p.as_char() == ';',
        TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
        _ => false,
    }
}
