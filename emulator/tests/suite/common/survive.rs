//! Runs of arbitrary text, for the suite and for the fuzz target.

use ptx_emulator::{DeviceMemory, Launch, Module, Options};

/// Parses a text and runs every entry for a short time. The outcome does not matter, only that it ends.
pub fn survive(text: &str) {
    let Ok(module) = Module::parse(text, "text.ptx") else {
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
            block: [48, 1, 1],
            cluster: [1, 1, 1],
            shared_bytes: 64,
            params: &params,
        };
        let options = Options {
            max_instructions: Some(20_000),
            threads: Some(1),
            ..Options::default()
        };
        let _ = module.launch(&memory, &launch, &options);
    }
}
