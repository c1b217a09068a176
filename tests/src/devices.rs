//! Devices of this machine: those that run the suite, and those that are absent, with the reason.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::sync::{Mutex, OnceLock, PoisonError};

use cudarc::driver::CudaContext;
use flash_attention::device::{DeviceKind, EmulatorOptions};
use flash_attention::{Arch, Device};

/// A device, given by its text.
struct Spec {
    text: &'static str,
    /// True if a machine may lack the device. The absence of any other device fails the suite.
    optional: bool,
}

/// All devices of the library.
const SPECS: [Spec; 4] = [
    Spec {
        text: "cpu",
        optional: false,
    },
    Spec {
        text: "cuda",
        optional: true,
    },
    Spec {
        text: "emulator:sm_80",
        optional: false,
    },
    Spec {
        text: "emulator:sm_90a",
        optional: false,
    },
];

/// Devices of this run.
#[derive(Clone, Debug)]
pub struct Devices {
    devices: Vec<Device>,
    /// True if tests of the emulator itself run.
    emulation: bool,
}

/// Name of the environment variable that chooses the devices of a run, separated by commas: `cuda`, or
/// `cpu,emulator:sm_90a`. Each is a text that [`Device::from_str`](std::str::FromStr) reads, and must be present.
/// Without the variable all devices of the machine run.
pub const CHOICE: &str = "FLASH_ATTENTION_DEVICES";

/// Returns the devices of this run: those that [`CHOICE`] names, else all of the machine. The first call of a test
/// binary prints the names of the devices that run, and the reason for each that does not.
///
/// # Panics
/// If a device is absent that was chosen, or that every machine has.
pub fn devices() -> &'static Devices {
    static DEVICES: OnceLock<Devices> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let choice = std::env::var(CHOICE).ok();
        let (devices, report) = Devices::choose(choice.as_deref()).unwrap_or_else(|error| panic!("{error}"));
        // Written directly, since the test harness hides the output of passing tests.
        let _ = writeln!(std::io::stderr(), "devices of this run:{report}");
        devices
    })
}

/// Makes an emulator that runs warps in the order of a seed, and blocks on this number of host threads.
pub fn emulator(arch: Arch, seed: u64, threads: usize) -> Device {
    let mut options = EmulatorOptions::new(arch);
    options.launch.seed = seed;
    options.launch.threads = Some(threads);
    Device::emulator_with(options)
}

impl Devices {
    /// Opens the devices in a text like `cuda,cpu`, or all; also returns the report to print.
    fn choose(choice: Option<&str>) -> Result<(Self, String), String> {
        let (mut devices, mut report) = (Vec::new(), String::new());
        let mut add = |text: &str, optional: bool| match text.parse::<Device>() {
            Ok(device) => {
                report += &format!("\n  {device}: {}", device.name());
                devices.push(device);
                Ok(())
            }
            Err(error) if optional => {
                report += &format!("\n  {text}: absent, {error}");
                Ok(())
            }
            Err(error) => Err(format!("{text}: {error}")),
        };
        match choice {
            None => SPECS.iter().try_for_each(|spec| add(spec.text, spec.optional))?,
            Some(choice) => {
                for text in choice.split(',').map(str::trim) {
                    add(text, false).map_err(|error| format!("{CHOICE}={choice}: {error}"))?;
                }
                let chosen = |kind: &str| choice.split(',').any(|text| text.trim().starts_with(kind));
                for left in SPECS.iter().filter(|spec| !chosen(spec.text)) {
                    report += &format!("\n  {}: not run, {CHOICE}={choice}", left.text);
                }
            }
        }
        let emulation = devices.iter().any(|device| device.kind() == DeviceKind::Emulator);
        if devices.iter().all(|device| device.kind() == DeviceKind::Emulator) {
            report += "\n  shapes too large to emulate: not run, since nothing else was chosen";
        }
        Ok((Self { devices, emulation }, report))
    }

    /// Iterates over all devices.
    pub fn all(&self) -> impl Iterator<Item = &Device> {
        self.devices.iter()
    }

    /// Iterates over all devices, and over a CPU device for each instruction set of this machine where the CPU is among them.
    pub fn of_every_instruction_set(&self) -> impl Iterator<Item = &Device> {
        static OTHERS: OnceLock<Vec<Device>> = OnceLock::new();
        let others = OTHERS.get_or_init(|| {
            let of_processor: &[&str] = match std::env::consts::ARCH {
                "x86_64" => &["cpu:amx", "cpu:avx512bf16", "cpu:avx512", "cpu:avx2"],
                "aarch64" => &["cpu:neonbf16", "cpu:neon"],
                _ => &[],
            };
            let texts = of_processor.iter().chain(&["cpu:portable"]);
            texts.filter_map(|text| text.parse().ok()).collect()
        });
        let has_cpu = self.all().any(|device| device.kind() == DeviceKind::Cpu);
        self.all().chain(others.iter().filter(move |_| has_cpu))
    }

    /// Makes a device like each of this run, of which no other test holds memory or launches anything: [`Device::memory`] and
    /// [`Device::counters`] count what the caller does alone, whatever runs beside.
    ///
    /// # Panics
    /// If a device cannot be made a second time.
    pub fn unshared(&self) -> Vec<Device> {
        let another = |device: &Device| {
            let text = device.to_string();
            // Those that every call with the same text returns again.
            let another = match text.split_once(':') {
                None if device.kind() == DeviceKind::Cpu => Device::cpu_with_threads(2),
                Some(("cuda", ordinal)) => {
                    let ordinal = ordinal.parse().expect("a device's text has its number");
                    let context = CudaContext::new(ordinal).expect("the context of the GPU that was opened");
                    Device::cuda_on(&context.default_stream())
                }
                _ => text.parse(),
            };
            another.unwrap_or_else(|error| panic!("another {device}: {error}"))
        };
        self.all().map(another).collect()
    }

    /// Iterates over the devices with hardware speed, for shapes too large to emulate.
    pub fn native(&self) -> impl Iterator<Item = &Device> {
        self.all().filter(|device| device.kind() != DeviceKind::Emulator)
    }

    /// Iterates over the GPUs.
    pub fn gpus(&self) -> impl Iterator<Item = &Device> {
        self.all().filter(|device| device.kind() == DeviceKind::Cuda)
    }

    /// Returns the first emulator, which runs the portable kernels unless chosen otherwise. If none was chosen,
    /// prints that the test does not run.
    pub fn emulator(&self) -> Option<&Device> {
        self.emulation();
        self.all().find(|device| device.kind() == DeviceKind::Emulator)
    }

    /// Returns true if tests that make emulators of their own run. If the choice of devices has no emulator, prints
    /// that the test does not run.
    pub fn emulation(&self) -> bool {
        static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
        if !self.emulation {
            let thread = std::thread::current();
            let test = thread.name().unwrap_or("a test");
            if SAID
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .insert(test.to_owned())
            {
                let _ = writeln!(std::io::stderr(), "not run, no emulator was chosen: {test}");
            }
        }
        self.emulation
    }
}

#[cfg(test)]
mod tests {
    use flash_attention::Tensor;

    use super::*;

    #[test]
    fn the_chosen_run_and_the_others_are_named() {
        let (devices, report) = Devices::choose(Some("cpu, emulator:sm_90a")).expect("every machine has them");
        let names: Vec<String> = devices.all().map(Device::to_string).collect();
        assert_eq!(names, ["cpu", "emulator:sm_90a"]);
        assert!(devices.emulation());
        assert!(
            report.contains("cuda: not run") && report.contains("emulator:sm_80: not run"),
            "{report}"
        );
        assert!(
            !report.contains("cpu: not run") && !report.contains("sm_90a: not run"),
            "{report}"
        );

        let (devices, _) = Devices::choose(Some("cpu")).expect("every machine has it");
        assert!(!devices.emulation() && devices.emulator().is_none());
        let (devices, report) = Devices::choose(Some("emulator:sm_90a")).expect("every machine has it");
        assert!(
            devices.native().next().is_none() && report.contains("too large to emulate"),
            "{report}"
        );
    }

    #[test]
    fn nothing_chosen_means_all() {
        let (devices, report) = Devices::choose(None).expect("what every machine has");
        assert!(devices.all().count() >= 3);
        let cuda = devices.gpus().next().is_some();
        assert_eq!(report.contains("cuda: absent"), !cuda, "{report}");
    }

    #[test]
    fn unshared_devices_count_their_own_memory() {
        let (chosen, _) = Devices::choose(Some("cpu:portable,emulator:sm_90a")).expect("every machine has them");
        for devices in [devices(), &chosen] {
            for (device, unshared) in devices.all().zip(&devices.unshared()) {
                assert_eq!(unshared.to_string(), device.to_string());
                let _held = Tensor::<f32>::zeros(device, [1]).expect("one number");
                assert_eq!(unshared.memory().peak, 0, "{device}");
            }
        }
    }

    #[test]
    fn a_chosen_device_that_is_absent_is_an_error() {
        for wrong in ["cuda:4096", "cpu,cuda:4096", "", "cpu,", "gpu"] {
            let error = Devices::choose(Some(wrong)).expect_err(wrong);
            assert!(error.starts_with(CHOICE), "{error}");
        }
    }
}
