//! Validation that no tensor of reasonable size can reach, and the order of what is checked.

use flash_attention::problem::{DataType, Outputs, Problem, TensorInfo};
use flash_attention::{Attention, Device, Dtype, Error};

fn info(shape: &[usize], address: u64) -> TensorInfo {
    TensorInfo::contiguous(Device::cpu().id(), Dtype::F16, shape, address).expect("countable")
}

fn problem(q: &TensorInfo, k: &TensorInfo) -> Result<Problem, Error> {
    Problem::new(&Attention::new(), q, k, k, None)
}

/// A valid problem with these outputs.
fn write_to(out: &TensorInfo, lse: &TensorInfo) -> Result<Problem, Error> {
    let (q, k) = (info(&[1, 2, 4, 8], 1 << 12), info(&[1, 1, 3, 8], 1 << 13));
    Problem::new(&Attention::new(), &q, &k, &k, Some(Outputs::new(out, lse)))
}

fn out(shape: &[usize], strides: &[usize], address: u64) -> TensorInfo {
    TensorInfo::new(Device::cpu().id(), Dtype::F16, shape, strides, address).expect("countable")
}

fn lse(shape: &[usize], strides: &[usize], address: u64) -> TensorInfo {
    TensorInfo::new(Device::cpu().id(), Dtype::F32, shape, strides, address).expect("countable")
}

#[test]
fn a_problem_knows_its_sizes() {
    let (q, k) = (info(&[2, 6, 5, 16], 64), info(&[2, 3, 7, 16], 128));
    let problem = Problem::new(&Attention::new().causal(), &q, &k, &k, None).expect("valid");
    assert_eq!((problem.batch(), problem.heads_q(), problem.heads_kv()), (2, 6, 3));
    assert_eq!((problem.seqlen_q(), problem.seqlen_k(), problem.head_dim()), (5, 7, 16));
    assert_eq!(
        (problem.dtype(), problem.causal(), problem.softmax_scale()),
        (Dtype::F16, true, 0.25)
    );
    assert_eq!(
        (problem.q().address, problem.q().row_stride, problem.out().address),
        (64, 16, 0)
    );
}

#[test]
fn what_is_wrong_first_is_reported_first() {
    let good = info(&[1, 2, 4, 8], 64);
    let rank = info(&[2, 4, 8], 64);
    let zero = info(&[1, 2, 0, 8], 64);
    assert!(matches!(
        problem(&zero, &rank),
        Err(Error::Rank {
            argument: "k",
            rank: 3,
            expected: 4,
            ..
        })
    ));
    assert!(problem(&zero, &good).is_ok_and(|problem| !problem.has_queries() && problem.has_keys()));
    let wide = info(&[1, 2, 4, 264], 64);
    assert!(matches!(
        problem(&wide, &good),
        Err(Error::ShapeMismatch {
            argument: "k",
            axis: "head_dim",
            got: 8,
            other: "q",
            expected: 264
        })
    ));
    assert!(matches!(
        problem(&wide, &wide),
        Err(Error::HeadDim {
            argument: "q",
            head_dim: 264,
            ..
        })
    ));
    let odd = info(&[1, 3, 4, 8], 64);
    assert!(matches!(
        problem(&odd, &good),
        Err(Error::HeadsNotDivisible {
            heads_q: 3,
            heads_kv: 2
        })
    ));
}

#[test]
fn dtypes_and_devices_agree() {
    let good = info(&[1, 2, 4, 8], 64);
    let other = TensorInfo::contiguous(Device::cpu().id(), Dtype::Bf16, [1, 2, 4, 8], 64).expect("countable");
    let mismatch = problem(&good, &other);
    assert!(matches!(
        mismatch,
        Err(Error::DtypeMismatch {
            argument: "k",
            got: DataType::Bf16,
            expected: DataType::F16
        })
    ));
    let elsewhere = Device::cpu_with_threads(1).expect("a thread");
    let other = TensorInfo::contiguous(elsewhere.id(), Dtype::F16, [1, 2, 4, 8], 64).expect("countable");
    assert!(matches!(
        problem(&good, &other),
        Err(Error::DeviceMismatch { argument: "k", .. })
    ));
}

#[test]
fn sequences_end_where_positions_do() {
    let q = info(&[1, 1, 1, 8], 64);
    let limit = flash_attention::problem::MAX_SEQLEN as usize;
    assert!(problem(&q, &info(&[1, 1, limit, 8], 64)).is_ok());
    let too_long = problem(&q, &info(&[1, 1, limit + 1, 8], 64));
    assert!(
        matches!(too_long, Err(Error::SequenceTooLong { argument: "k", seqlen, max }) if seqlen == limit + 1 && max == limit)
    );
}

#[test]
fn scales_are_finite() {
    let q = info(&[1, 1, 1, 8], 64);
    for scale in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let refused = Problem::new(&Attention::new().softmax_scale(scale), &q, &q, &q, None);
        assert!(matches!(refused, Err(Error::SoftmaxScale { .. })), "{scale}");
    }
    for scale in [0.0, -1.0, f32::MAX, f32::MIN_POSITIVE] {
        assert!(
            Problem::new(&Attention::new().softmax_scale(scale), &q, &q, &q, None).is_ok(),
            "{scale}"
        );
    }
}

#[test]
fn outputs_have_the_shape_of_q() {
    let (shape, strides) = ([1, 2, 4, 8], [64, 32, 8, 1]);
    let (good_out, good_lse) = (out(&shape, &strides, 1 << 14), lse(&[1, 2, 4], &[8, 4, 1], 1 << 15));
    assert!(write_to(&good_out, &good_lse).is_ok());
    let wrong = write_to(&out(&[1, 2, 3, 8], &strides, 1 << 14), &good_lse);
    assert!(matches!(
        wrong,
        Err(Error::ShapeMismatch {
            argument: "out",
            axis: "seqlen",
            got: 3,
            expected: 4,
            ..
        })
    ));
    let wrong = write_to(&good_out, &lse(&[1, 2, 5], &[10, 5, 1], 1 << 15));
    assert!(matches!(
        wrong,
        Err(Error::ShapeMismatch {
            argument: "lse",
            axis: "seqlen",
            got: 5,
            ..
        })
    ));
    let wrong = write_to(&good_out, &lse(&[1, 2, 4, 1], &[8, 4, 1, 1], 1 << 15));
    assert!(matches!(
        wrong,
        Err(Error::Rank {
            argument: "lse",
            rank: 4,
            expected: 3,
            ..
        })
    ));
    let wrong = write_to(&good_out, &out(&[1, 2, 4], &[8, 4, 1], 1 << 15));
    assert!(matches!(
        wrong,
        Err(Error::DtypeMismatch {
            argument: "lse",
            got: DataType::F16,
            expected: DataType::F32
        })
    ));
}

#[test]
fn outputs_have_memory_of_their_own() {
    let shape = [1, 2, 4, 8];
    let (contiguous, good_lse) = ([64, 32, 8, 1], lse(&[1, 2, 4], &[8, 4, 1], 1 << 15));
    let interleaved = out(&shape, &[64, 8, 16, 1], 1 << 14); // [batch, seqlen, heads, head_dim] memory
    assert!(write_to(&interleaved, &good_lse).is_ok());
    let repeated = write_to(&out(&shape, &[64, 0, 8, 1], 1 << 14), &good_lse);
    assert!(matches!(
        repeated,
        Err(Error::OverlappingStrides { argument: "out", .. })
    ));
    let close = write_to(&out(&shape, &[64, 32, 7, 1], 1 << 14), &good_lse);
    assert!(matches!(close, Err(Error::OverlappingStrides { argument: "out", .. })));
    let apart = write_to(&out(&shape, &[128, 64, 16, 2], 1 << 14), &good_lse);
    assert!(matches!(
        apart,
        Err(Error::LastAxisStride {
            argument: "out",
            stride: 2,
            ..
        })
    ));
    let gaps = write_to(
        &out(&shape, &contiguous, 1 << 14),
        &lse(&[1, 2, 4], &[16, 8, 1], 1 << 15),
    );
    assert!(gaps.is_ok(), "a plan for a GPU refuses it");

    let on_k = write_to(&out(&shape, &contiguous, (1 << 13) + 46), &good_lse);
    assert!(matches!(
        on_k,
        Err(Error::Aliased {
            argument: "out",
            other: "k"
        })
    ));
    let after_k = write_to(&out(&shape, &contiguous, (1 << 13) + 48), &good_lse);
    assert!(after_k.is_ok());
    let lse_on_q = write_to(
        &out(&shape, &contiguous, 1 << 14),
        &lse(&[1, 2, 4], &[8, 4, 1], 1 << 12),
    );
    assert!(matches!(
        lse_on_q,
        Err(Error::Aliased {
            argument: "lse",
            other: "q"
        })
    ));
    let lse_on_out = write_to(
        &out(&shape, &contiguous, 1 << 14),
        &lse(&[1, 2, 4], &[8, 4, 1], (1 << 14) + 124),
    );
    assert!(matches!(
        lse_on_out,
        Err(Error::Aliased {
            argument: "lse",
            other: "out"
        })
    ));
}

#[test]
fn messages_name_argument_value_and_limit() {
    let wide = info(&[1, 2, 4, 264], 64);
    let message = problem(&wide, &wide).expect_err("too wide").to_string();
    assert_eq!(
        message,
        "`q` has head_dim = 264, expected a multiple of 8 up to 256, and not 0"
    );
}

/// lse lies between the heads of out, whose elements are of another size: the bytes are compared.
#[test]
fn elements_of_two_sizes_are_proven_apart_or_shared() {
    let base = 1 << 14;
    let between = out(&[1, 2, 4, 8], &[256, 128, 16, 1], base);
    let lse_at = |address| write_to(&between, &lse(&[1, 2, 4], &[8, 4, 1], address));
    lse_at(base + 128).expect("between the heads");
    lse_at(base + 512).expect("behind both");
    for address in [base + 12, base + 96, base + 250] {
        let error = lse_at(address).expect_err("an element of each");
        assert!(matches!(&error, Error::Aliased { .. }), "{address:#x}: {error}");
    }
}
