//! [`Fp8Case`]: an attention problem over quantised inputs, solved on a device and compared with the oracle.

use std::sync::OnceLock;

use flash_attention::device::DeviceKind;
use flash_attention::half::{bf16, f16};
use flash_attention::reference::{self, Dims};
use flash_attention::{Attention, Device, Error, F8E4M3, Half, Output, Quantized, Statistics, Tensor};

use crate::{Poisoned, compare, devices, files, largest_error};

/// An attention problem over quantised inputs.
#[derive(Clone, Debug)]
pub struct Fp8Case {
    /// Mask and scale.
    pub attention: Attention,
    /// `[batch, heads_q, seqlen_q, head_dim]`.
    pub q: [usize; 4],
    /// `[batch, heads_kv, seqlen_k, head_dim]`.
    pub kv: [usize; 4],
    /// Which of q, k and v have a scale for each block of rows.
    pub by_blocks: [bool; 3],
    /// Tensors in `[batch, seqlen, heads, head_dim]` memory, else in that of their axes.
    pub seqlen_first: bool,
    /// Elements of each row of memory that do not belong to the tensor, half of them before it. They are NaN.
    pub gap: usize,
    /// Standard deviation of the normal distribution that inputs are drawn from before they are quantised.
    pub deviation: f32,
    /// Seed of the inputs.
    pub seed: u64,
}

/// A quantised tensor in slices: its shape, codes and scales.
#[derive(Clone, Debug)]
pub struct Codes {
    /// `[batch, heads, seqlen, head_dim]`.
    pub shape: [usize; 4],
    /// Codes, contiguous.
    pub codes: Vec<F8E4M3>,
    /// Scales, `[batch, heads, blocks]`.
    pub scales: Vec<f32>,
}

impl Codes {
    /// Quantises numbers on the CPU.
    ///
    /// # Panics
    /// If the shape has not as many elements.
    pub fn new(shape: [usize; 4], numbers: &[f32], by_blocks: bool) -> Self {
        let tensor = Tensor::from_slice(&Device::cpu(), shape, numbers).expect("as many numbers");
        let quantized = match by_blocks {
            true => Quantized::by_blocks(&tensor),
            false => Quantized::by_heads(&tensor),
        };
        Self::of(&quantized.expect("four axes"))
    }

    /// Reads a quantised tensor.
    ///
    /// # Panics
    /// If the device fails.
    pub fn of(quantized: &Quantized) -> Self {
        Self {
            shape: quantized.shape().try_into().expect("four axes"),
            codes: quantized.data().to_vec().expect("read"),
            scales: quantized.scales().to_vec().expect("read"),
        }
    }

    /// Returns the codes and scales, as the reference takes them.
    pub fn slices(&self) -> reference::Codes<'_> {
        (&self.codes, &self.scales)
    }

    /// Returns the numbers that they stand for.
    pub fn numbers(&self) -> Vec<f64> {
        reference::dequantized(self.shape, self.slices())
    }

    /// Places them on a device: contiguous, or as a view of memory with other axes and NaN in gaps.
    ///
    /// # Panics
    /// If the device fails.
    pub fn place(&self, device: &Device, seqlen_first: bool, gap: usize) -> Quantized {
        let [batch, heads, seqlen, head_dim] = self.shape;
        let (pitch, lead) = (head_dim + gap, gap / 2);
        let (memory_shape, [head_stride, row_stride]) = match seqlen_first {
            true => ([batch, seqlen, heads, pitch], [pitch, heads * pitch]),
            false => ([batch, heads, seqlen, pitch], [seqlen * pitch, pitch]),
        };
        let mut memory = vec![F8E4M3::NAN; batch * heads * seqlen * pitch];
        for (row, codes) in self.codes.chunks(head_dim).enumerate() {
            let (entry, head, place) = (row / seqlen / heads, row / seqlen % heads, row % seqlen);
            let first = entry * heads * seqlen * pitch + head * head_stride + place * row_stride + lead;
            memory[first..first + head_dim].copy_from_slice(codes);
        }
        let view = || -> Result<Quantized, Error> {
            let mut data = Tensor::from_slice(device, memory_shape, &memory)?.narrow(3, lead, head_dim)?;
            if seqlen_first {
                data = data.transpose(1, 2)?;
            }
            let blocks = self.scales.len() / (batch * heads).max(1);
            Quantized::from_parts(data, Tensor::from_slice(device, [batch, heads, blocks], &self.scales)?)
        };
        view().unwrap_or_else(|error| panic!("{error}"))
    }
}

impl Fp8Case {
    /// Makes a case of full attention with the default scale over contiguous tensors with a scale for each block of rows.
    pub fn new(q: [usize; 4], kv: [usize; 4]) -> Self {
        Self {
            attention: Attention::new(),
            q,
            kv,
            by_blocks: [true; 3],
            seqlen_first: false,
            gap: 0,
            deviation: 1.0,
            seed: 1,
        }
    }

    /// Makes a case of one batch entry and one head.
    pub fn one_head(seqlen_q: usize, seqlen_k: usize, head_dim: usize) -> Self {
        Self::new([1, 1, seqlen_q, head_dim], [1, 1, seqlen_k, head_dim])
    }

    /// Returns this case with the causal mask on or off.
    #[must_use]
    pub fn masked(self, causal: bool) -> Self {
        let attention = if causal {
            self.attention.causal()
        } else {
            self.attention
        };
        Self { attention, ..self }
    }

    /// Draws the inputs.
    pub fn inputs(&self) -> [Codes; 3] {
        let draw = |shape: [usize; 4], salt: u64, by_blocks| {
            let numbers = files::normal(shape.iter().product(), self.deviation, self.seed * 3 + salt);
            Codes::new(shape, &numbers, by_blocks)
        };
        let [q, k, v] = self.by_blocks;
        [draw(self.q, 0, q), draw(self.kv, 1, k), draw(self.kv, 2, v)]
    }

    /// Solves the case on every device with FP8, with results in f16 and in bf16, and checks each result.
    ///
    /// # Panics
    /// If a device fails, or an error exceeds its bound; the message has the index and both values.
    pub fn check(&self) {
        self.check_of(&self.inputs(), fp8_devices());
    }

    /// Checks the case like [`check`](Self::check), for these inputs and on these devices.
    ///
    /// # Panics
    /// Under the conditions of [`check`](Self::check).
    pub fn check_of<'a>(&self, inputs: &[Codes; 3], devices: impl IntoIterator<Item = &'a Device>) {
        let expected = Expected::of(self, inputs);
        for device in devices {
            self.check_as::<f16>(inputs, device, &expected);
            self.check_as::<bf16>(inputs, device, &expected);
        }
    }

    fn check_as<O: Half>(&self, inputs: &[Codes; 3], device: &Device, expected: &Expected) {
        let name = format!("{self:?} to {} on {device}", O::DTYPE.name());
        let (out, lse, [row_max, row_sum]) = self.run::<O>(inputs, device);
        let [out_bound, lse_bound] = expected.bounds::<O>(self, inputs, device);
        let out = compare("out", &self.q, &out, &expected.out, out_bound);
        let lse_of_statistics: Vec<f32> = (row_max.iter().zip(&row_sum))
            .map(|(&max, &sum)| {
                let scale = f64::from(self.attention.scale_for(self.q[3]));
                (f64::from(max) * scale + f64::from(sum).ln()) as f32
            })
            .collect();
        let rows = [("lse", &lse), ("statistics", &lse_of_statistics)];
        let rows = rows.map(|(what, got)| compare(what, &self.q[..3], got, &expected.lse, lse_bound).err());
        if let Some(mismatch) = out.err().into_iter().chain(rows.into_iter().flatten()).next() {
            panic!("{name}\n{mismatch}");
        }
    }

    /// Solves the case on one device: out, lse, and row_max and row_sum.
    ///
    /// # Panics
    /// If the device fails, or memory next to a result was written.
    pub fn run<O: Half>(&self, inputs: &[Codes; 3], device: &Device) -> (Vec<O>, Vec<f32>, [Vec<f32>; 2]) {
        let solve = || -> Result<_, Error> {
            let [q, k, v] = [0, 1, 2].map(|input| inputs[input].place(device, self.seqlen_first, self.gap));
            let out = Poisoned::<O>::contiguous(device, &self.q)?;
            let rows = || Poisoned::<f32>::contiguous(device, &self.q[..3]);
            let (lse, row_max, row_sum) = (rows()?, rows()?, rows()?);
            let mut output = Output::new(out.tensor.clone(), lse.tensor.clone());
            output.statistics = Some(Statistics {
                row_max: row_max.tensor.clone(),
                row_sum: row_sum.tensor.clone(),
            });
            self.attention.forward_fp8_into(&q, &k, &v, &mut output)?;
            Ok((out.read()?, lse.read()?, [row_max.read()?, row_sum.read()?]))
        };
        solve().unwrap_or_else(|error| panic!("{self:?} on {device}: {error}"))
    }

    /// Returns the sizes and options for the reference.
    pub fn dims(&self) -> Dims {
        Dims::new(&self.attention, self.q, self.kv)
    }
}

/// Expected results of a case.
struct Expected {
    out: Vec<f64>,
    lse: Vec<f64>,
    /// Errors of standard attention in f32 over the numbers that the inputs stand for: of out, and of lse.
    of_f32: [f64; 2],
}

impl Expected {
    fn of(case: &Fp8Case, inputs: &[Codes; 3]) -> Self {
        let dims = case.dims();
        let numbers = [0, 1, 2].map(|input| inputs[input].numbers());
        let [q, k, v] = &numbers;
        let (out, lse) = reference::forward(&dims, q, k, v);
        let [q, k, v] = numbers.map(|numbers| numbers.iter().map(|&x| x as f32).collect::<Vec<_>>());
        let (standard_out, standard_lse) = reference::standard(&dims, &q, &k, &v);
        let of_f32 = [largest_error(&standard_out, &out), largest_error(&standard_lse, &lse)];
        Self { out, lse, of_f32 }
    }

    /// Returns the largest errors allowed for out and lse: for both twice that of standard attention in f32, plus 1e-5; for lse
    /// also four roundings to f32. Out may have twice the error of the exact result rounded to its dtype and, on a device that
    /// multiplies in 8 bits, twice that of standard attention of 8 bits.
    fn bounds<O: Half>(&self, case: &Fp8Case, inputs: &[Codes; 3], device: &Device) -> [f64; 2] {
        let [q, k, v] = [0, 1, 2].map(|input| inputs[input].slices());
        let rounded: Vec<O> = match device.kind() {
            DeviceKind::Cpu => self.out.iter().map(|&x| O::from_f64(x)).collect(),
            _ => reference::standard_fp8(&case.dims(), q, k, v).0,
        };
        let largest_lse = self
            .lse
            .iter()
            .filter(|lse| lse.is_finite())
            .fold(0.0, |a: f64, b| a.max(b.abs()));
        let [out, lse] = self.of_f32.map(|error| 2.0 * error + 1e-5);
        [
            out + 2.0 * largest_error(&rounded, &self.out),
            lse + largest_lse / 4_194_304.0,
        ]
    }
}

/// Returns the devices of this run with FP8: those that plan a small problem of it.
///
/// # Panics
/// If a device refuses the problem for another reason than that it has no kernel.
pub fn fp8_devices() -> impl Iterator<Item = &'static Device> {
    static WITH_FP8: OnceLock<Vec<Device>> = OnceLock::new();
    let takes = |device: &&Device| {
        let x = Codes::new([1, 1, 64, 64], &[1.0; 64 * 64], true).place(device, false, 0);
        match Attention::new().plan_fp8::<f16>(&x, &x, &x) {
            Ok(_) => true,
            Err(Error::NoKernel { .. }) => false,
            Err(error) => panic!("{device}: {error}"),
        }
    };
    WITH_FP8
        .get_or_init(|| devices().all().filter(takes).cloned().collect())
        .iter()
}
