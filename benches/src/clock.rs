//! Times of a GPU's events, and of the host's clock on other devices.

use std::ffi::c_int;
use std::time::Instant;

use cudarc::driver::result::{self, DriverError, ctx, device, event, primary_ctx};
use cudarc::driver::sys;
use flash_attention::{Device, Error};

use crate::Failure;

/// Times runs of work launched on a device.
pub struct Clock {
    device: Device,
    events: Option<Events>,
}

/// Two events for each run, on the stream of a GPU.
struct Events {
    stream: sys::CUstream,
    pairs: Vec<[sys::CUevent; 2]>,
}

impl Clock {
    /// Makes a clock for a device. On a GPU, the device's context becomes current on this thread.
    ///
    /// # Errors
    /// The error of the driver.
    pub fn new(device: &Device) -> Result<Self, Failure> {
        let events = match device.cuda_stream() {
            None => None,
            Some(stream) => {
                enter(ordinal(device)).map_err(failed("cuDevicePrimaryCtxRetain"))?;
                Some(Events {
                    stream: stream.cast(),
                    pairs: Vec::new(),
                })
            }
        };
        Ok(Self {
            device: device.clone(),
            events,
        })
    }

    /// Returns the source of the times: `device events` or `host clock`.
    pub fn name(&self) -> &'static str {
        if self.events.is_some() {
            "device events"
        } else {
            "host clock"
        }
    }

    /// Launches work `warm_up + runs` times without waiting, and returns the seconds of each of the last `runs`, in
    /// order. `run` receives the number of earlier calls, so that it can use other inputs each time.
    ///
    /// On a GPU nothing waits between runs: while one executes, the next is launched. An event before and one after
    /// each run, on the stream, time it.
    ///
    /// # Errors
    /// The error of `run` or of the driver.
    pub fn time(
        &mut self,
        warm_up: usize,
        runs: usize,
        mut run: impl FnMut(usize) -> Result<(), Error>,
    ) -> Result<Vec<f64>, Failure> {
        let Some(events) = &mut self.events else {
            let mut seconds = Vec::with_capacity(runs);
            for i in 0..warm_up + runs {
                let start = Instant::now();
                run(i)?;
                self.device.synchronize()?;
                seconds.push(start.elapsed().as_secs_f64());
            }
            return Ok(seconds.split_off(warm_up));
        };
        events.grow(runs)?;
        for i in 0..warm_up {
            run(i)?;
        }
        for (i, pair) in events.pairs[..runs].iter().enumerate() {
            events.record(pair[0])?;
            run(warm_up + i)?;
            events.record(pair[1])?;
        }
        self.device.synchronize()?;
        events.pairs[..runs].iter().map(|pair| elapsed(*pair)).collect()
    }

    /// Returns the seconds of copies of `bytes` within a GPU's memory; `None` on other devices.
    ///
    /// # Errors
    /// The error of the driver.
    pub fn time_copies(&mut self, bytes: usize, warm_up: usize, runs: usize) -> Result<Option<Vec<f64>>, Failure> {
        let Some(events) = &mut self.events else {
            return Ok(None);
        };
        events.grow(runs)?;
        // SAFETY: both allocations have the size of the copy, are initialised first, and are freed after the work on
        // them has finished.
        unsafe {
            let from = result::malloc_sync(bytes).map_err(failed("cuMemAlloc"))?;
            let to = result::malloc_sync(bytes).map_err(failed("cuMemAlloc"))?;
            result::memset_d8_async(from, 0x3c, bytes, events.stream).map_err(failed("cuMemsetD8Async"))?;
            let copy =
                || result::memcpy_dtod_async(to, from, bytes, events.stream).map_err(failed("cuMemcpyDtoDAsync"));
            for _ in 0..warm_up {
                copy()?;
            }
            for pair in &events.pairs[..runs] {
                events.record(pair[0])?;
                copy()?;
                events.record(pair[1])?;
            }
            self.device.synchronize()?;
            result::free_sync(from).map_err(failed("cuMemFree"))?;
            result::free_sync(to).map_err(failed("cuMemFree"))?;
        }
        let seconds: Result<_, Failure> = events.pairs[..runs].iter().map(|pair| elapsed(*pair)).collect();
        seconds.map(Some)
    }
}

impl Events {
    fn grow(&mut self, runs: usize) -> Result<(), Failure> {
        while self.pairs.len() < runs {
            let make = || event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed("cuEventCreate"));
            self.pairs.push([make()?, make()?]);
        }
        Ok(())
    }

    fn record(&self, event: sys::CUevent) -> Result<(), Failure> {
        // SAFETY: the event was created in the context that is current, and neither it nor the stream is ever
        // destroyed.
        unsafe { event::record(event, self.stream) }.map_err(failed("cuEventRecord"))
    }
}

/// Returns the seconds between two events that have occurred.
fn elapsed([start, end]: [sys::CUevent; 2]) -> Result<f64, Failure> {
    // SAFETY: both events were created and recorded on one stream, and are never destroyed.
    let milliseconds = unsafe { event::elapsed(start, end) }.map_err(failed("cuEventElapsedTime"))?;
    Ok(f64::from(milliseconds) * 1e-3)
}

/// Properties of a GPU beside its name.
pub struct Card {
    /// Size of L2, in bytes.
    pub l2_bytes: usize,
    /// Free memory, in bytes.
    pub free_bytes: usize,
    /// CUDA version of the driver: major, minor.
    pub driver: (i32, i32),
}

impl Card {
    /// Queries the driver for a GPU's properties; `None` for other devices.
    ///
    /// # Errors
    /// The error of the driver.
    pub fn of(device: &Device) -> Result<Option<Self>, Failure> {
        if device.cuda_stream().is_none() {
            return Ok(None);
        }
        let gpu = enter(ordinal(device)).map_err(failed("cuDevicePrimaryCtxRetain"))?;
        let l2 = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE;
        // SAFETY: `gpu` is a device that the driver just gave us.
        let l2_bytes = unsafe { device::get_attribute(gpu, l2) }.map_err(failed("cuDeviceGetAttribute"))?;
        let (free_bytes, _) = result::mem_get_info().map_err(failed("cuMemGetInfo"))?;
        let mut version = 0;
        // SAFETY: writes one integer.
        unsafe { sys::cuDriverGetVersion(&mut version) }
            .result()
            .map_err(failed("cuDriverGetVersion"))?;
        Ok(Some(Self {
            l2_bytes: l2_bytes as usize,
            free_bytes,
            driver: (version / 1000, version % 1000 / 10),
        }))
    }
}

/// Returns the number in `cuda:N`.
fn ordinal(device: &Device) -> c_int {
    let name = device.to_string();
    name.rsplit(':').next().and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// Makes a GPU's primary context, which the library has retained and keeps, current on this thread.
fn enter(ordinal: c_int) -> Result<sys::CUdevice, DriverError> {
    let gpu = device::get(ordinal)?;
    // SAFETY: a device that the driver just gave us; the context is kept to the end of the process.
    unsafe { primary_ctx::retain(gpu).and_then(|context| ctx::set_current(context))? };
    Ok(gpu)
}

fn failed(call: &'static str) -> impl Fn(DriverError) -> Failure {
    move |error| format!("{call}: {error:?}").into()
}
