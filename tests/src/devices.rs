//! The devices of this machine: those that run the suite, and those that are absent, with the reason.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::sync::{Mutex, OnceLock, PoisonError};

use flash_attention::device::{DeviceKind, EmulatorOptions};
use flash_attention::{Arch, Device};

/// A device by the text that makes it.
struct Spec {
    text: &'static str,
    /// Whether a machine may lack it. One that may not and does fails the suite.
    optional: bool,
}

/// Every device the library has.
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

/// The devices of this run.
#[derive(Clone, Debug)]
pub struct Devices {
    devices: Vec<Device>,
    /// Whether tests of the emulator itself run.
    emulation: bool,
}

/// Names the devices that run the suite, separated by commas, instead of all that are there: `cuda`, or
/// `cpu,emulator:sm_90a`. Each is a text that [`Device::from_str`](std::str::FromStr) reads, and must be there.
pub const CHOICE: &str = "FLASH_ATTENTION_DEVICES";

/// The devices of this run: those that [`CHOICE`] names, else every one the machine has. Printed the first time a test
/// binary asks: what runs, by name, and what does not, with the reason.
///
/// # Panics
/// If a device is missing that every machine has or that was chosen.
pub fn devices() -> &'static Devices {
    static DEVICES: OnceLock<Devices> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let choice = std::env::var(CHOICE).ok();
        let (devices, report) = Devices::choose(choice.as_deref()).unwrap_or_else(|error| panic!("{error}"));
        // Past the test harness, which keeps what passing tests print to itself.
        let _ = writeln!(std::io::stderr(), "devices of this run:{report}");
        devices
    })
}

/// An emulator of its own that runs warps in the order of a seed, blocks on as many threads of the host.
pub fn emulator(arch: Arch, seed: u64, threads: usize) -> Device {
    let mut options = EmulatorOptions::new(arch);
    options.launch.seed = seed;
    options.launch.threads = Some(threads);
    Device::emulator_with(options)
}

impl Devices {
    /// Those that a text like `cuda,cpu` names, or all; and what to print about them.
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

    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Device> {
        self.devices.iter()
    }

    /// Those that compute at the speed of hardware, for shapes too large to emulate.
    pub fn native(&self) -> impl Iterator<Item = &Device> {
        self.all().filter(|device| device.kind() != DeviceKind::Emulator)
    }

    /// GPUs, the hardware itself.
    pub fn gpus(&self) -> impl Iterator<Item = &Device> {
        self.all().filter(|device| device.kind() == DeviceKind::Cuda)
    }

    /// The first emulator, of the portable kernels if that was not chosen otherwise. Where none was chosen, says that the
    /// test does not run.
    pub fn emulator(&self) -> Option<&Device> {
        self.emulation();
        self.all().find(|device| device.kind() == DeviceKind::Emulator)
    }

    /// Whether tests that make emulators of their own run. Where the choice of devices left emulators out, says that the
    /// test does not.
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
    fn a_chosen_device_that_is_absent_is_an_error() {
        for wrong in ["cuda:4096", "cpu,cuda:4096", "", "cpu,", "gpu"] {
            let error = Devices::choose(Some(wrong)).expect_err(wrong);
            assert!(error.starts_with(CHOICE), "{error}");
        }
    }
}
