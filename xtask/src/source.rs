//! Hash of the kernels' sources that comments do not change.

use crate::{Outcome, read, workspace};
use proc_macro2::{Delimiter, Spacing, TokenStream, TokenTree};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Source file and folder that no kernel is compiled from: they read the compiled archives.
const DOOR: [&str; 2] = ["archive.rs", "archive"];

/// Returns the SHA-256 (in hex) of the paths and tokens of all sources of the kernels. Comments, documentation,
/// layout and unit tests do not change it.
pub fn hash() -> Outcome<String> {
    let root = workspace().join("kernels/src");
    let mut hasher = Sha256::new();
    for path in files_below(&root)? {
        let name = path.strip_prefix(&root).expect("collected below it").to_string_lossy();
        if !DOOR.iter().any(|door| path.starts_with(root.join(door))) {
            let code = code(&read(&path)?).map_err(|e| format!("{}: {e}", path.display()))?;
            hasher.update(format!("{}\n{}\n{code}", name.replace('\\', "/"), code.len()));
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Returns the tokens of a file that reach the compiler's back end, separated by spaces.
fn code(text: &str) -> Result<String, proc_macro2::LexError> {
    let mut code = String::with_capacity(text.len());
    append(text.parse()?, &mut code);
    Ok(code)
}

fn append(tokens: TokenStream, code: &mut String) {
    let tokens: Vec<_> = tokens.into_iter().collect();
    let mut rest = &tokens[..];
    while let Some((token, after)) = rest.split_first() {
        rest = after;
        if let Some((attribute, after)) = attribute(token, rest) {
            if attribute.starts_with("doc =") {
                rest = after;
                continue;
            } else if attribute == "cfg (test)" {
                let end = after.iter().position(ends_item).unwrap_or(after.len() - 1);
                rest = &after[end + 1..];
                continue;
            }
        }
        match token {
            TokenTree::Group(group) => {
                let (open, close) = match group.delimiter() {
                    Delimiter::Parenthesis => ("(", ")"),
                    Delimiter::Brace => ("{", "}"),
                    Delimiter::Bracket => ("[", "]"),
                    Delimiter::None => ("", ""),
                };
                code.push_str(open);
                append(group.stream(), code);
                code.push_str(close);
            }
            TokenTree::Punct(punct) => {
                code.push(punct.as_char());
                if punct.spacing() == Spacing::Alone {
                    code.push(' ');
                }
            }
            TokenTree::Ident(_) | TokenTree::Literal(_) => {
                code.push_str(&token.to_string());
                code.push(' ');
            }
        }
    }
}

/// If an attribute starts at `token`, returns the content of its brackets and the tokens after it.
fn attribute<'a>(token: &TokenTree, rest: &'a [TokenTree]) -> Option<(String, &'a [TokenTree])> {
    let is = |token: &TokenTree, mark| matches!(token, TokenTree::Punct(punct) if punct.as_char() == mark);
    if !is(token, '#') {
        return None;
    }
    let rest = if is(rest.first()?, '!') { &rest[1..] } else { rest };
    match rest.split_first()? {
        (TokenTree::Group(group), after) if group.delimiter() == Delimiter::Bracket => {
            Some((group.stream().to_string(), after))
        }
        _ => None,
    }
}

/// Returns true if an item that starts before `token` ends with it.
fn ends_item(token: &TokenTree) -> bool {
    match token {
        TokenTree::Group(group) => group.delimiter() == Delimiter::Brace,
        TokenTree::Punct(punct) => punct.as_char() == ';',
        _ => false,
    }
}

fn files_below(folder: &Path) -> Outcome<BTreeSet<PathBuf>> {
    let mut files = BTreeSet::new();
    for item in std::fs::read_dir(folder).map_err(|e| format!("{}: {e}", folder.display()))? {
        let path = item.map_err(|e| format!("{}: {e}", folder.display()))?.path();
        if path.is_dir() {
            files.append(&mut files_below(&path)?);
        } else {
            files.insert(path);
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prose_layout_and_tests_are_not_code() {
        let plain =
            r#"fn f(x: &u32) -> u32 { text!("mov {x}; // kept"); a && b & &c } macro_rules! m { () => { struct S; } }"#;
        let dressed = r#"
            //! About the file.
            #![doc = "more"]

            /// About f. /* not nested */
            fn f(x: &u32) -> u32 {
                /* a /* nested */ comment */
                text!("mov {x}; // kept"); // why
                a && b & &c
            }
            #[cfg(test)]
            use {a, b};
            macro_rules! m { () => {
                #[doc = concat!("About ", "S")]
                struct S;
            } }
            #[cfg(test)]
            mod tests {
                #[test]
                fn t() {}
            }
        "#;
        let code = |text: &str| code(text).expect("it is Rust");
        assert_eq!(code(plain), code(&dressed.replace("use {a, b};", "use a;")));
        let changes = [
            ("&u32", "u32"),
            ("// kept", "// lost"),
            ("& &c", "&& c"),
            ("&& b", "& & b"),
            ("struct S", "#[repr(C)] struct S"),
        ];
        for (from, to) in changes {
            assert!(plain.contains(from));
            assert_ne!(code(plain), code(&plain.replace(from, to)), "{from} to {to}");
        }
    }

    #[test]
    fn the_sources_have_a_hash() {
        assert_eq!(hash().expect("the sources are Rust").len(), 64);
    }
}
