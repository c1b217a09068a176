//! The micro-kernels of `tests/ptx` at the root of the repository, one for each instruction family. Every word must
//! be exact: the emulator's approximate instructions also meet the expected values.

// Shared with the program that runs them on hardware, which uses more of it.
#[allow(dead_code)]
#[path = "../../../tests/src/micro.rs"]
mod format;

use std::path::Path;

use format::{Element, Map, Micro};
use ptx_emulator::tensor::swizzle::Swizzle;
use ptx_emulator::tensor::tensor_map::{ElementType, Fill, Interleave, L2Promotion, TensorMap, Tiled};
use ptx_emulator::{Counters, DeviceMemory, Launch, Module, Options};

/// Converts a tensor map to the emulator's.
fn tensor_map(map: &Map, address: u64) -> Result<[u8; format::MAP_BYTES], String> {
    let swizzles = [Swizzle::None, Swizzle::B32, Swizzle::B64, Swizzle::B128];
    let swizzle = swizzles.into_iter().find(|s| s.span() == map.span);
    let arguments = Tiled {
        element: match map.element {
            Element::F16 => ElementType::F16,
            Element::F32 => ElementType::F32,
            Element::U32 => ElementType::U32,
        },
        address,
        dims: &map.dims,
        strides: &map.strides(),
        box_dims: &map.box_dims,
        element_strides: &vec![1; map.dims.len()],
        interleave: Interleave::None,
        swizzle: swizzle.expect("16, 32, 64 or 128"),
        l2_promotion: L2Promotion::None,
        fill: Fill::Zero,
    };
    TensorMap::tiled(&arguments)
        .map(|map| map.encode())
        .map_err(|e| e.to_string())
}

fn bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Runs the kernel; returns the words that it wrote, and what the emulator counted.
fn run(micro: &Micro, seed: u64) -> Result<(Vec<u32>, Counters), String> {
    let module = Module::parse(&micro.text, &micro.name).map_err(|e| e.to_string())?;
    let memory = DeviceMemory::new();
    let input = memory.alloc(4 * micro.input.len()).expect("memory");
    let output = memory.alloc(4 * micro.output.len()).expect("memory");
    memory.write(input, &bytes(&micro.input)).expect("a copy");
    let mut params = Vec::new();
    for param in micro.params(input.0, output.0, tensor_map)? {
        // Addresses are aligned to 8 bytes, maps to 64.
        let align = if param.len() == format::MAP_BYTES { 64 } else { 8 };
        params.resize(params.len().next_multiple_of(align), 0);
        params.extend(param);
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
    let mut got = vec![0; 4 * micro.output.len()];
    memory.read(output, &mut got).expect("a copy");
    let word = |b: &[u8]| u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    Ok((got.chunks_exact(4).map(word).collect(), report.counters))
}

/// Runs the kernel; an error tells how it differs from the values in its header.
fn check(micro: &Micro, seed: u64) -> Result<(), String> {
    match micro.compare(&run(micro, seed)?.0)? {
        0 => Ok(()),
        near => Err(format!("{near} words are near, not equal")),
    }
}

fn micros() -> Vec<Micro> {
    Micro::read_folder(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/ptx")).expect("headers")
}

/// The tensor copy of 128 bytes goes to both blocks; the other copies are within the cluster.
#[test]
fn a_multicast_reads_once() {
    let micros = micros();
    let micro = micros.iter().find(|micro| micro.name.contains("cluster_copy"));
    let (_, counters) = run(micro.expect("in the folder"), 0).expect("clean");
    assert_eq!(counters.global_read_bytes, 128);
}

#[test]
fn every_family_gives_the_expected_words_under_every_seed() {
    let micros = micros();
    assert!(micros.len() >= 68, "only {} kernels", micros.len());
    let failed = |micro: &Micro| {
        let (seed, error) = (0..16).find_map(|seed| check(micro, seed).err().map(|e| (seed, e)))?;
        Some(format!("{} seed {seed}: {error}", micro.name))
    };
    let failures: Vec<String> = micros.iter().filter_map(failed).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
