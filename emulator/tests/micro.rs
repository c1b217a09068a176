//! One kernel an instruction family, from `tests/ptx` at the root of the repository.
//!
//! Each file is a kernel `test(input, output)`. Its header holds the number of threads, the input and the expected
//! output as 32-bit words in hexadecimal, so that any device that loads PTX can run it. `cluster: n` launches n blocks
//! as one cluster. Each `map: buffer type dims box swizzle` adds a parameter of 128 bytes, aligned to 64: the tensor
//! map of a dense tensor in the input or output buffer.

use std::path::{Path, PathBuf};

use ptx_emulator::tensor::swizzle::Swizzle;
use ptx_emulator::tensor::tensor_map::{ElementType, Fill, Interleave, L2Promotion, TensorMap, Tiled};
use ptx_emulator::{DeviceMemory, Launch, Module, Options};

struct Micro {
    name: String,
    text: String,
    block: u32,
    cluster: u32,
    maps: Vec<String>,
    input: Vec<u8>,
    output: Vec<u8>,
}

fn parse(path: &Path) -> Micro {
    let text = std::fs::read_to_string(path).expect("the file is readable");
    let mut micro = Micro {
        name: path.file_name().expect("a name").display().to_string(),
        block: 0,
        cluster: 1,
        maps: Vec::new(),
        input: Vec::new(),
        output: Vec::new(),
        text: text.clone(),
    };
    let mut in_output = false;
    for line in text.lines() {
        let Some(line) = line.strip_prefix("//") else {
            break;
        };
        let line = line.trim();
        if let Some(n) = line.strip_prefix("block:") {
            micro.block = n.trim().parse().expect("a number of threads");
        } else if let Some(n) = line.strip_prefix("cluster:") {
            micro.cluster = n.trim().parse().expect("a number of blocks");
        } else if let Some(map) = line.strip_prefix("map:") {
            micro.maps.push(map.trim().to_owned());
        } else if line == "input:" || line == "output:" {
            in_output = line == "output:";
        } else if micro.block != 0 {
            let target = if in_output { &mut micro.output } else { &mut micro.input };
            for word in line.split_whitespace() {
                let word = u32::from_str_radix(word, 16).expect("a hexadecimal word");
                target.extend(word.to_le_bytes());
            }
        }
    }
    micro
}

/// The map that a line `input f32 8,4 4,4 128` describes: buffer, element, sizes, box, swizzle span in bytes.
fn tensor_map(line: &str, input: u64, output: u64) -> TensorMap {
    let words: Vec<&str> = line.split_whitespace().collect();
    let &[buffer, element, dims, box_dims, span] = &words[..] else {
        panic!("`{line}` is not a map");
    };
    let element = match element {
        "f16" => ElementType::F16,
        "f32" => ElementType::F32,
        "u32" => ElementType::U32,
        other => panic!("no element type {other}"),
    };
    let swizzles = [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128];
    let swizzle = swizzles.into_iter().find(|s| s.span().to_string() == span);
    let dims: Vec<u64> = dims.split(',').map(|n| n.parse().expect("a size")).collect();
    let box_dims: Vec<u32> = box_dims.split(',').map(|n| n.parse().expect("a size")).collect();
    let mut strides = Vec::new();
    let mut stride = u64::from(element.bytes());
    for size in &dims[..dims.len() - 1] {
        stride *= size;
        strides.push(stride);
    }
    let arguments = Tiled {
        element,
        address: if buffer == "input" { input } else { output },
        dims: &dims,
        strides: &strides,
        box_dims: &box_dims,
        element_strides: &vec![1; dims.len()],
        interleave: Interleave::None,
        swizzle: swizzle.expect("16, 32, 64 or 128"),
        l2_promotion: L2Promotion::None,
        fill: Fill::Zero,
    };
    TensorMap::tiled(&arguments).expect("the map keeps to the rules")
}

fn words(bytes: &[u8]) -> Vec<u32> {
    let word = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    bytes.chunks_exact(4).map(word).collect()
}

/// Runs the kernel; says how it differs from what its header promises.
fn run(micro: &Micro, seed: u64) -> Result<(), String> {
    let module = Module::parse(&micro.text, &micro.name).map_err(|e| e.to_string())?;
    let memory = DeviceMemory::new();
    let input = memory.alloc(micro.input.len()).expect("memory");
    let output = memory.alloc(micro.output.len()).expect("memory");
    memory.write(input, &micro.input).expect("a copy");
    let mut params = [input.0.to_le_bytes(), output.0.to_le_bytes()].concat();
    for map in &micro.maps {
        params.resize(params.len().next_multiple_of(64), 0);
        params.extend(tensor_map(map, input.0, output.0).encode());
    }
    let launch = Launch {
        entry: "test",
        grid: [micro.cluster, 1, 1],
        block: [micro.block, 1, 1],
        cluster: [micro.cluster, 1, 1],
        shared_bytes: 0,
        params: &params,
    };
    let options = Options {
        seed,
        ..Options::default()
    };
    let report = module.launch(&memory, &launch, &options).map_err(|e| e.to_string())?;
    if let Some(finding) = report.findings.first() {
        return Err(finding.to_string());
    }
    let mut got = vec![0; micro.output.len()];
    memory.read(output, &mut got).expect("a copy");
    let both = words(&got).into_iter().zip(words(&micro.output)).enumerate();
    for (index, (got, want)) in both {
        if got != want {
            return Err(format!("word {index} is {got:08x}, not {want:08x}"));
        }
    }
    Ok(())
}

fn files() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/ptx");
    let entries = std::fs::read_dir(folder).expect("tests/ptx exists");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    let mut out: Vec<PathBuf> = paths.filter(|p| p.extension().is_some_and(|e| e == "ptx")).collect();
    out.sort();
    out
}

#[test]
fn every_family_gives_the_expected_words_under_every_seed() {
    let files = files();
    assert!(files.len() >= 66, "only {} kernels", files.len());
    let mut failures = Vec::new();
    for path in files {
        let micro = parse(&path);
        let failed = (0..16).find_map(|seed| run(&micro, seed).err().map(|e| (seed, e)));
        if let Some((seed, error)) = failed {
            failures.push(format!("{} seed {seed}: {error}", micro.name));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
