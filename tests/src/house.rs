//! The floors of a crate: a room (a module of the crate's root) imports from the floors below its own only.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Imports of the crate in `src` that `floors` forbid, one message each, and rooms without a floor.
///
/// `floors` lists the rooms of each floor, the lowest floor first. A room may name what is on a lower floor, from the room
/// itself: `crate::problem::Problem`, never `crate::Problem`, which goes through the root. Rooms of one floor do not import
/// each other. `use` lines and paths that begin with `crate::` are read; comments and modules of unit tests
/// (`#[cfg(test)] mod tests` to the end of its file, files `tests.rs`) are not.
///
/// # Panics
/// If a file cannot be read.
pub fn forbidden_imports(src: &Path, floors: &[&[&str]]) -> Vec<String> {
    let rooms = rooms(src);
    let floor_of: BTreeMap<&str, usize> = floors
        .iter()
        .enumerate()
        .flat_map(|(floor, rooms)| rooms.iter().map(move |&room| (room, floor)))
        .collect();
    let mut found = Vec::new();
    for room in rooms.keys().filter(|room| !floor_of.contains_key(room.as_str())) {
        found.push(format!("{room} ({}) has no floor", below(src, &rooms[room][0])));
    }
    for room in floor_of.keys().filter(|&&room| !rooms.contains_key(room)) {
        found.push(format!("{room} has a floor, but {} has no such room", src.display()));
    }
    for (room, files) in &rooms {
        for file in files {
            let text = std::fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
            for target in imported(&text) {
                let fault = match (
                    rooms.get(&target),
                    floor_of.get(room.as_str()),
                    floor_of.get(target.as_str()),
                ) {
                    (None, ..) => "is no room: import it from the room that defines it".to_owned(),
                    (Some(files), Some(own), Some(other)) if other >= own && target != *room => {
                        format!("({}) is not below {room}", below(src, &files[0]))
                    }
                    _ => continue,
                };
                found.push(format!("{} imports crate::{target}, which {fault}", below(src, file)));
            }
        }
    }
    found
}

/// The path of a file within a folder.
fn below<'a>(folder: &Path, file: &'a Path) -> std::path::Display<'a> {
    file.strip_prefix(folder).unwrap_or(file).display()
}

/// The rooms of a crate with their files; the file that declares the room comes first.
fn rooms(src: &Path) -> BTreeMap<String, Vec<PathBuf>> {
    let mut rooms: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    for path in entries(src) {
        let stem = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            if stem != "bin" {
                rooms.entry(stem).or_default().extend(sources(&path));
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") && stem != "lib" && stem != "main" {
            rooms.entry(stem).or_default().insert(0, path);
        }
    }
    for files in rooms.values_mut() {
        files.sort_by_key(|file| (!file.ends_with("mod.rs"), file.components().count()));
    }
    rooms
}

/// All `.rs` files below a folder.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let (folders, files): (Vec<_>, Vec<_>) = entries(folder).into_iter().partition(|path| path.is_dir());
    let sources = files
        .into_iter()
        .filter(|file| file.extension().is_some_and(|extension| extension == "rs") && !file.ends_with("tests.rs"));
    sources
        .chain(folders.iter().flat_map(|folder| self::sources(folder)))
        .collect()
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    let items = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<_> = items.map(|item| item.expect("a readable folder").path()).collect();
    paths.sort();
    paths
}

/// The names that follow `crate::` in a file, each once.
fn imported(text: &str) -> BTreeSet<String> {
    let end = text.find("#[cfg(test)]\nmod tests").unwrap_or(text.len());
    let lines = text[..end]
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default());
    let code = lines.collect::<Vec<_>>().join("\n");
    let mut names = BTreeSet::new();
    for (at, path) in code.match_indices("crate::") {
        let is_part_of_a_name = code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == '$');
        if !is_part_of_a_name {
            names.extend(first_names(&code[at + path.len()..]));
        }
    }
    names
}

/// The first name of a path, or of each path in a group `{a::B, c}`.
fn first_names(path: &str) -> Vec<String> {
    let name = |path: &str| -> String {
        let path = path.trim_start();
        path.chars().take_while(|&c| c.is_alphanumeric() || c == '_').collect()
    };
    let Some(group) = path.strip_prefix('{') else {
        return vec![name(path)];
    };
    let (mut names, mut depth, mut start) = (Vec::new(), 0_usize, 0);
    for (at, c) in group.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                names.push(name(&group[start..at]));
                start = at + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    names.retain(|name| !name.is_empty());
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A crate of three rooms in a folder of its own.
    fn house(name: &str, files: &[(&str, &str)]) -> PathBuf {
        let src = std::env::temp_dir().join(format!("flash-attention-{name}-{}", std::process::id()));
        for (path, text) in files {
            let path = src.join(path);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("a writable folder");
            std::fs::write(path, text).expect("a writable file");
        }
        src
    }

    #[test]
    fn upward_sideways_and_root_imports_are_found() {
        let src = house(
            "house",
            &[
                ("lib.rs", "mod error; mod plan; mod device; pub use plan::Plan;"),
                (
                    "error.rs",
                    "// crate::device is only a comment\npub(crate) struct Error;",
                ),
                (
                    "plan/mod.rs",
                    "use crate::{error::Error, device::{Device, Kind}};\nmod cost;",
                ),
                ("plan/cost.rs", "use crate::Plan;\nfn f(_: crate::tensor::Tensor) {}"),
                (
                    "tensor.rs",
                    "use crate::plan::Plan;\n#[cfg(test)]\nmod tests { use crate::device::Device; }",
                ),
                ("device.rs", "use crate::plan::Plan;"),
            ],
        );
        let found = forbidden_imports(&src, &[&["error"], &["plan", "tensor"], &["device", "gone"]]);
        std::fs::remove_dir_all(&src).expect("the folder exists");
        assert_eq!(
            found[0],
            format!("gone has a floor, but {} has no such room", src.display())
        );
        let expected = [
            "plan/mod.rs imports crate::device, which (device.rs) is not below plan",
            "plan/cost.rs imports crate::Plan, which is no room: import it from the room that defines it",
            "plan/cost.rs imports crate::tensor, which (tensor.rs) is not below plan",
            "tensor.rs imports crate::plan, which (plan/mod.rs) is not below tensor",
        ];
        assert_eq!(found[1..], expected);
    }
}
