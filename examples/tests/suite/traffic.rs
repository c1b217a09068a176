//! Tests of the kernels of the traffic study, under every check of the emulator.

use flash_attention_examples::traffic::{QUERIES_PER_BLOCK, Study};
use ptx_emulator::Options;

/// Tests that with 16 orders of warps no check has a finding, and that the fused kernels agree with standard
/// attention.
#[test]
fn kernels_of_the_study_are_clean_in_any_order() {
    for causal in [false, true] {
        for seed in 0..16 {
            let options = Options {
                seed,
                ..Options::default()
            };
            let study = Study::with_options(80, causal, options).expect("it fits");
            study
                .standard()
                .unwrap_or_else(|failure| panic!("seed {seed}: {failure}"));
            for block_m in QUERIES_PER_BLOCK {
                study
                    .flash(block_m)
                    .unwrap_or_else(|failure| panic!("seed {seed}: {failure}"));
            }
        }
    }
}
