//! Errors on the inputs with outliers of FlashAttention-3's paper (table 3): root mean square errors against attention in f64 over
//! the same f16 inputs. `docs/numbers.md` has the figures; this prints them with `--nocapture`, and holds the bounds.

use flash_attention::device::DeviceKind;
use flash_attention::half::f16;
use flash_attention::reference::{self, Dims};
use flash_attention::{Attention, Device, Hadamard, Quantized, Tensor};
use flash_attention_tests::fp8::{Codes, fp8_devices};
use flash_attention_tests::{devices, files};

/// Errors that FlashAttention-3 states: of its FP8 with blocks and incoherent processing, and of its f16.
const PAPER: [f64; 2] = [9.1e-3, 1.9e-4];

/// Inputs, and attention in f64 over them.
struct Problem {
    attention: Attention,
    shape: [usize; 4],
    inputs: [Vec<f16>; 3],
    exact: Vec<f64>,
}

/// Preparation of q and k, and scales of all.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Preparation {
    ByHeads,
    ByBlocks,
    RotatedByHeads,
    RotatedByBlocks,
}

impl Problem {
    fn new(heads: usize, head_dim: usize, causal: bool) -> Self {
        let shape = [1, heads, 1024, head_dim];
        let attention = if causal {
            Attention::new().causal()
        } else {
            Attention::new()
        };
        let draw = |seed| -> Vec<f16> {
            let numbers = files::with_outliers(shape.iter().product(), seed);
            numbers.into_iter().map(f16::from_f32).collect()
        };
        let inputs = [1, 2, 3].map(draw);
        let [q, k, v] = inputs
            .each_ref()
            .map(|input| input.iter().map(|x| x.to_f64()).collect::<Vec<_>>());
        let (exact, _) = reference::forward(&Dims::new(&attention, shape, shape), &q, &k, &v);
        Self {
            attention,
            shape,
            inputs,
            exact,
        }
    }

    fn dims(&self) -> Dims {
        Dims::new(&self.attention, self.shape, self.shape)
    }

    /// The root mean square error of an output.
    fn error(&self, out: &[f16]) -> f64 {
        assert_eq!(out.len(), self.exact.len());
        let squares = out
            .iter()
            .zip(&self.exact)
            .map(|(got, want)| (got.to_f64() - want).powi(2));
        (squares.sum::<f64>() / out.len() as f64).sqrt()
    }

    fn tensors(&self, device: &Device) -> [Tensor<f16>; 3] {
        (self.inputs.each_ref()).map(|input| Tensor::from_slice(device, self.shape, input).expect("small"))
    }

    /// Error of forward in f16 on a device.
    fn of_f16(&self, device: &Device) -> f64 {
        let [q, k, v] = self.tensors(device);
        let output = self.attention.forward(&q, &k, &v).expect("every device has f16");
        self.error(&output.out.to_vec().expect("read"))
    }

    fn quantized(&self, device: &Device, preparation: Preparation) -> [Quantized; 3] {
        use Preparation::{ByBlocks, RotatedByBlocks, RotatedByHeads};
        let [mut q, mut k, v] = self.tensors(device);
        if matches!(preparation, RotatedByHeads | RotatedByBlocks) {
            let turn = Hadamard::new(self.shape[3], 1).expect("a head_dim of attention");
            [q, k] = [q, k].map(|x| turn.apply(&x).expect("four axes"));
        }
        [q, k, v].map(|x| match preparation {
            ByBlocks | RotatedByBlocks => Quantized::by_blocks(&x).expect("four axes"),
            _ => Quantized::by_heads(&x).expect("four axes"),
        })
    }

    /// Error of the FP8 forward pass on a device.
    fn of_fp8(&self, device: &Device, preparation: Preparation) -> f64 {
        let [q, k, v] = self.quantized(device, preparation);
        let output = self.attention.forward_fp8(&q, &k, &v).expect("a device with FP8");
        self.error(&output.out.to_vec().expect("read"))
    }

    /// Error of standard attention over codes, with exponentials of 8 bits.
    fn of_standard_fp8(&self, preparation: Preparation) -> f64 {
        let [q, k, v] = self.quantized(&Device::cpu(), preparation).map(|x| Codes::of(&x));
        let (out, _) = reference::standard_fp8(&self.dims(), q.slices(), k.slices(), v.slices());
        self.error(&out)
    }

    fn of_standard_f16(&self) -> f64 {
        let [q, k, v] = &self.inputs;
        self.error(&reference::standard(&self.dims(), q, k, v).0)
    }
}

/// Heads that are worth a device's time.
fn heads(device: &Device) -> usize {
    if device.kind() == DeviceKind::Emulator { 1 } else { 2 }
}

#[test]
fn f16_with_outliers_is_as_exact_as_the_paper_states() {
    for device in devices().all() {
        let problem = Problem::new(heads(device), 128, false);
        let (error, standard) = (problem.of_f16(device), problem.of_standard_f16());
        println!("f16 on {device}: {error:.2e}, standard attention {standard:.2e}");
        assert!(error <= PAPER[1] && error <= standard, "{error:e} on {device}");
    }
}

#[test]
fn fp8_with_outliers_is_as_exact_as_the_paper_states() {
    let problem = Problem::new(2, 128, false);
    let of_8_bits = problem.of_standard_fp8(Preparation::RotatedByBlocks);
    println!("8-bit exponentials: {of_8_bits:.2e}");
    assert!(of_8_bits <= PAPER[0], "{of_8_bits:e} with 8-bit exponentials");
    for device in fp8_devices() {
        let problem = Problem::new(heads(device), 128, false);
        let error = problem.of_fp8(device, Preparation::RotatedByBlocks);
        println!("FP8 on {device}: {error:.2e}");
        assert!(error <= PAPER[0], "{error:e} on {device}");
    }
}

/// Prints the errors with each preparation of the inputs, for the table in `docs/numbers.md`, and tests that rotation lowers them.
#[test]
fn rotated_inputs_are_more_exact() {
    use Preparation::{ByBlocks, ByHeads, RotatedByBlocks, RotatedByHeads};
    let cpu = Device::cpu();
    for (head_dim, causal) in [(128, false), (128, true), (64, false)] {
        let problem = Problem::new(2, head_dim, causal);
        let errors = [ByHeads, ByBlocks, RotatedByHeads, RotatedByBlocks].map(|preparation| {
            let errors = [problem.of_fp8(&cpu, preparation), problem.of_standard_fp8(preparation)];
            println!("head_dim {head_dim}, causal {causal}, {preparation:?}: {:.2e} on the CPU, {:.2e} with 8-bit exponentials", errors[0], errors[1]);
            errors
        });
        let [plain, _, _, rotated] = errors;
        assert!(rotated[0] < 0.9 * plain[0] && rotated[1] < 0.9 * plain[1], "{errors:?}");
        // 8-bit exponentials cost little beside 8-bit inputs.
        assert!(
            errors.iter().all(|[cpu, of_8_bits]| *of_8_bits < 1.1 * cpu),
            "{errors:?}"
        );
    }
}

/// The rotation is orthogonal: it keeps products of rows, and no row of a unit matrix has an element that stands out.
#[test]
fn rotations_are_orthogonal_and_spread_outliers() {
    for head_dim in [8, 64, 72, 96, 128, 192, 256] {
        let turn = Hadamard::new(head_dim, 7).expect("a head_dim of attention");
        let size = 1 << head_dim.trailing_zeros();
        let unit: Vec<f32> = (0..head_dim * head_dim)
            .map(|i| f32::from(i / head_dim == i % head_dim))
            .collect();
        let unit = Tensor::from_slice(&Device::cpu(), [1, 1, head_dim, head_dim], &unit).expect("small");
        let rotated = turn.apply(&unit).and_then(|rows| rows.to_vec()).expect("four axes");
        let rows: Vec<&[f32]> = rotated.chunks(head_dim).collect();
        for (i, x) in rows.iter().enumerate() {
            let count = x.iter().filter(|x| **x != 0.0).count();
            assert_eq!(count, size, "row {i} of {head_dim}");
            let largest = x.iter().fold(0.0, |a: f32, x| a.max(x.abs()));
            assert!(
                (f64::from(largest) - 1.0 / (size as f64).sqrt()).abs() < 1e-6,
                "row {i} of {head_dim}"
            );
            for (j, y) in rows.iter().enumerate() {
                let product: f64 = x.iter().zip(*y).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
                assert!(
                    (product - f64::from(u8::from(i == j))).abs() < 1e-6,
                    "rows {i} and {j} of {head_dim}: {product}"
                );
            }
        }
    }
}

#[test]
fn rotations_of_a_seed_are_always_the_same() {
    let signs = |seed: u64| -> Vec<u8> {
        let row: Vec<f32> = (0..64).map(|i| f32::from(i == 0)).collect();
        let unit: Vec<f32> = (0..64)
            .flat_map(|i| row.iter().cycle().skip(64 - i).take(64).copied().collect::<Vec<_>>())
            .collect();
        let unit = Tensor::from_slice(&Device::cpu(), [1, 1, 64, 64], &unit).expect("small");
        let rotated = Hadamard::new(64, seed)
            .and_then(|turn| turn.apply(&unit))
            .and_then(|rows| rows.to_vec());
        // The first column of the matrix has no sign but the row's.
        rotated
            .expect("small")
            .chunks(64)
            .map(|row| u8::from(row[0] < 0.0))
            .collect()
    };
    let [first, second] = [signs(1), signs(2)];
    assert_eq!(first, signs(1));
    assert_ne!(first, second);
    for signs in [first, second] {
        let negative = signs.iter().filter(|sign| **sign == 1).count();
        assert!((16..=48).contains(&negative), "{negative} of 64 signs are negative");
    }
}

#[test]
fn rotations_keep_scores() {
    let shape = [1, 2, 70, 96];
    let draw = |seed| files::normal(shape.iter().product(), 1.0, seed);
    for device in devices().all() {
        let [q, k, v] = [1, 2, 3].map(|seed| Tensor::from_slice(device, shape, &draw(seed)).expect("small"));
        let turn = Hadamard::new(96, 3).expect("a head_dim of attention");
        let [turned_q, turned_k] = [&q, &k].map(|x| turn.apply(x).expect("four axes"));
        let forward = |q, k| {
            Attention::new()
                .forward(q, k, &v)
                .and_then(|output| output.out.to_vec())
                .expect("f32")
        };
        let (plain, rotated) = (forward(&q, &k), forward(&turned_q, &turned_k));
        let largest = plain
            .iter()
            .zip(&rotated)
            .fold(0.0, |a: f32, (x, y)| a.max((x - y).abs()));
        assert!(largest < 1e-5, "{largest} on {device}");
    }
}

#[test]
fn rotations_of_another_head_dim_are_refused() {
    use flash_attention::Error;
    for head_dim in [0, 4, 20, 264] {
        let error = Hadamard::new(head_dim, 1).expect_err("no head_dim of attention");
        assert!(
            matches!(
                error,
                Error::HeadDim {
                    argument: "hadamard",
                    multiple_of: 8,
                    max: 256,
                    ..
                }
            ),
            "{error}"
        );
    }
    let tensor = Tensor::<f16>::zeros(&Device::cpu(), [1, 1, 2, 64]).expect("small");
    let error = Hadamard::new(128, 1)
        .and_then(|turn| turn.apply(&tensor))
        .expect_err("another head_dim");
    assert!(
        matches!(
            error,
            Error::ShapeMismatch {
                argument: "tensor",
                got: 64,
                expected: 128,
                ..
            }
        ),
        "{error}"
    );
    let error = Hadamard::new(64, 1)
        .and_then(|turn| turn.apply(&tensor.select(0, 0)?))
        .expect_err("three axes");
    assert!(
        matches!(
            error,
            Error::Rank {
                argument: "tensor",
                rank: 3,
                expected: 4,
                ..
            }
        ),
        "{error}"
    );
}
