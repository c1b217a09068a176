//! The devices of this machine: those that run the suite, and those that are absent, with the reason.

use std::io::Write as _;
use std::sync::OnceLock;

use flash_attention::{Arch, Device, DeviceKind, EmulatorOptions};

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

/// The devices of this machine.
#[derive(Clone, Debug)]
pub struct Devices(Vec<Device>);

/// The devices of this machine, printed the first time a test binary asks: what is there, by name, and what is not, with
/// the reason.
///
/// # Panics
/// If a device is missing that every machine has.
pub fn devices() -> &'static Devices {
    static DEVICES: OnceLock<Devices> = OnceLock::new();
    DEVICES.get_or_init(|| {
        let (mut present, mut lines) = (Vec::new(), String::new());
        for spec in SPECS {
            match spec.text.parse::<Device>() {
                Ok(device) => {
                    lines += &format!("\n  {device}: {}", device.name());
                    present.push(device);
                }
                Err(error) if spec.optional => {
                    lines += &format!("\n  {}: absent, {error}", spec.text);
                }
                Err(error) => panic!("{}: {error}", spec.text),
            }
        }
        // Past the test harness, which keeps what passing tests print to itself.
        let _ = writeln!(std::io::stderr(), "devices of this run:{lines}");
        Devices(present)
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
    /// All of them.
    pub fn all(&self) -> impl Iterator<Item = &Device> {
        self.0.iter()
    }

    /// Those that compute at the speed of hardware, for shapes too large to emulate.
    pub fn native(&self) -> impl Iterator<Item = &Device> {
        self.all().filter(|device| device.kind() != DeviceKind::Emulator)
    }

    /// The emulator, of the portable kernels.
    ///
    /// # Panics
    /// If it is missing, which `devices` has ruled out.
    pub fn emulator(&self) -> &Device {
        self.all()
            .find(|device| device.kind() == DeviceKind::Emulator)
            .expect("every machine has the emulator")
    }
}
