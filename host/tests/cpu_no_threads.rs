//! Tests that a call runs on the calling thread if the system grants no threads.
#![cfg(target_os = "linux")]

mod common;

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use common::noise;
use flash_attention::half::bf16;
use flash_attention::{Attention, Device, Element, Tensor};

/// Name of the environment variable that chooses the failure in a process of this test.
const FAILURE: &str = "NO_THREADS";

/// User id of `nobody`, for whom limits hold that do not hold for root.
const NOBODY: u32 = 65534;

/// Number of drawn problems.
const PROBLEMS: u64 = 12;

/// Returns a checksum of the results of both passes over drawn problems, the first of them with tasks for many threads.
fn checksum(device: &Device) -> u64 {
    let bits = (0..PROBLEMS).flat_map(|seed| {
        let drawn = noise(5, seed + 1);
        let size = |i: usize, largest: f64| 1 + (drawn[i].abs() * largest) as usize;
        let shape = match seed {
            0 => [1, 4, 512, 64],
            _ => [size(0, 2.0), size(1, 4.0), size(2, 300.0), 8 * size(3, 16.0)],
        };
        let attention = Attention::new();
        let attention = if drawn[4] < 0.0 { attention.causal() } else { attention };
        if seed % 2 == 0 {
            results::<bf16>(device, &attention, shape, seed)
        } else {
            results::<f32>(device, &attention, shape, seed)
        }
    });
    bits.fold(0, |sum: u64, bits| sum.wrapping_mul(31).wrapping_add(bits))
}

/// Returns the bits of out, dq, dk and dv of a problem.
fn results<T: Element>(device: &Device, attention: &Attention, shape: [usize; 4], seed: u64) -> Vec<u64> {
    let data: Vec<T> = noise(shape.iter().product(), seed + 7)
        .into_iter()
        .map(|x| T::from_f32(x as f32))
        .collect();
    let q = Tensor::from_slice(device, shape, &data).expect("small");
    let output = attention.forward(&q, &q, &q).expect("valid");
    let gradients = attention.backward(&q, &q, &q, &output, &q).expect("valid");
    let all = [&output.out, &gradients.dq, &gradients.dk, &gradients.dv];
    let bits = all.map(|tensor| tensor.to_vec().expect("cpu"));
    bits.iter().flatten().map(|x| x.to_f64().to_bits()).collect()
}

/// Runs this test again in a process that computes under `failure`, and returns its checksum.
fn checksum_under(failure: &str) -> u64 {
    // A copy that every user may run, wherever the build is.
    let copy = std::env::temp_dir().join(format!("no-threads-{}-{failure}", std::process::id()));
    std::fs::copy(std::env::current_exe().expect("this test"), &copy).expect("a writable folder");
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o755)).expect("the copy is ours");
    let mut command = Command::new("prlimit");
    if failure == "limit" {
        command.arg("--nproc=1");
        // SAFETY: only returns a number.
        if unsafe { libc::geteuid() } == 0 {
            command.uid(NOBODY);
        }
    }
    let threads = ["--exact", "a_call_without_threads", "--nocapture", "--test-threads=1"];
    let command = command.arg(&copy).args(threads).current_dir("/");
    let output = command.env(FAILURE, failure).env("RAYON_NUM_THREADS", "4").output();
    std::fs::remove_file(&copy).expect("the copy is ours");
    let output = output.expect("prlimit of util-linux");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let line = text.lines().find_map(|line| line.split_once("checksum "));
    line.expect("a checksum").1.trim().parse().expect("a number")
}

#[test]
fn a_call_without_threads() {
    let Ok(failure) = std::env::var(FAILURE) else {
        let expected = checksum(&Device::cpu_with_threads(2).expect("two threads"));
        for failure in ["limit", "another"] {
            assert_eq!(checksum_under(failure), expected, "{failure}");
        }
        return;
    };
    if failure == "limit" {
        let thread = std::thread::Builder::new().spawn(|| ());
        assert!(thread.is_err(), "the limit does not hold: nothing would be seen here");
    } else {
        // Other code's attempt to start the global pool.
        let refuse = |_| Err(std::io::Error::other("no thread"));
        let built = rayon::ThreadPoolBuilder::new().spawn_handler(refuse).build_global();
        assert!(built.is_err());
    }
    println!("checksum {}", checksum(&Device::cpu()));
}
