//! Parses arbitrary text and runs whatever parses for a short time: nothing may panic or hang.
#![no_main]

use libfuzzer_sys::fuzz_target;
use ptx_emulator::{DeviceMemory, Launch, Module, Options};

fuzz_target!(|text: &str| {
    let Ok(module) = Module::parse(text, "fuzz.ptx") else {
        return;
    };
    for entry in module.entries() {
        if entry.param_bytes > 4096 {
            continue;
        }
        let memory = DeviceMemory::with_capacity(1 << 20);
        let params = vec![0; entry.param_bytes as usize];
        let launch = Launch {
            entry: &entry.name,
            grid: [2, 1, 1],
            block: [33, 1, 1],
            cluster: [1, 1, 1],
            shared_bytes: 64,
            params: &params,
        };
        let options = Options {
            max_instructions: Some(10_000),
            threads: Some(1),
            ..Options::default()
        };
        let _ = module.launch(&memory, &launch, &options);
    }
});
