//! lse, row_max and row_sum with any strides, on every device: the bits of contiguous tensors, forward and backward, in every form of
//! call. On a GPU each that is not contiguous has a copy in the workspace; a contiguous one costs nothing.

use flash_attention::device::{DeviceInfo, DeviceKind};
use flash_attention::half::{bf16, f16};
use flash_attention::plan::PassType;
use flash_attention::problem::{Outputs, Problem};
use flash_attention::{
    Arch, Attention, Device, Dtype, Element, Error, Gradients, KvCache, Output, Plan, Sequences, Statistics, Tensor,
};
use flash_attention_tests::fp8::{Fp8Case, fp8_devices};
use flash_attention_tests::{Case, RowLayout, RowMemory, devices, drawn, emulator, files, for_dtype, row_layout};
use proptest::prelude::*;

/// Rows of `[batch, seqlen, heads]` memory in which lse, row_max and row_sum of a query are neighbours.
const INTERLEAVED: RowLayout = RowLayout {
    order: [0, 2, 1],
    gaps: [0, 0, 1],
    outside: 3,
    others: 0,
};

const CONTIGUOUS: RowLayout = RowLayout {
    order: [0, 1, 2],
    gaps: [0; 3],
    outside: 0,
    others: 0,
};

/// A tensor of drawn numbers.
fn numbers<T: Element>(device: &Device, shape: &[usize], seed: u64) -> Tensor<T> {
    let numbers = files::normal(shape.iter().product(), 1.0, seed);
    Tensor::from_slice(device, shape, &numbers.into_iter().map(T::from_f32).collect::<Vec<_>>()).expect("it fits")
}

/// A tensor of NaN with this shape.
fn nan<T: Element>(device: &Device, shape: &[usize]) -> Tensor<T> {
    let nan = vec![T::from_f32(f32::NAN); shape.iter().product()];
    Tensor::from_slice(device, shape, &nan).expect("it fits")
}

/// A workspace of so many bytes, full of NaN.
fn workspace(device: &Device, bytes: u64) -> Tensor<f32> {
    nan(device, &[bytes as usize / size_of::<f32>()])
}

fn bits<T: Element>(tensor: &Tensor<T>) -> Vec<u64> {
    let elements = tensor.to_vec().expect("read").into_iter();
    elements.map(|x| x.to_f64().to_bits()).collect()
}

/// Bits of lse, and of row_max and row_sum if they are asked for.
fn rows_of<T: Element>(output: &Output<T>, keeps: bool) -> Vec<Vec<u32>> {
    let Statistics { row_max, row_sum } = output.statistics.as_ref().expect("always kept");
    let rows = [&output.lse, row_max, row_sum]
        .into_iter()
        .take(if keeps { 3 } else { 1 });
    rows.map(|tensor| tensor.to_vec().expect("read").iter().map(|x| x.to_bits()).collect())
        .collect()
}

fn gradients<T: Element>(Gradients { dq, dk, dv, .. }: &Gradients<T>) -> [Vec<u64>; 3] {
    [dq, dk, dv].map(bits)
}

/// Names of the tensors that a plan copies, each once.
fn copied(plan: &Plan<impl PassType>) -> Vec<&'static str> {
    let mut names: Vec<_> = plan.launches().iter().filter_map(|launch| launch.copied).collect();
    names.dedup();
    names
}

/// Bytes of a workspace in which `count` tensors of `rows` f32 have copies behind other bytes.
fn with_copies(bytes: u64, count: usize, rows: usize) -> u64 {
    let add = |bytes: u64, _| bytes.next_multiple_of(16) + 4 * rows as u64;
    (0..count).fold(bytes, add)
}

/// Checks a plan with tensors of the caller's against the one with contiguous ones: the copies are all that it has more.
fn check_plan<P: PassType>(device: &Device, plan: &Plan<P>, contiguous: &Plan<P>, memory: &RowMemory, keeps: bool) {
    let is_gpu = device.kind() != DeviceKind::Cpu;
    let rows = memory.rows[0].shape().iter().product::<usize>();
    let names = ["lse", "row_max", "row_sum"].into_iter().zip(&memory.rows);
    let names = names.take(if keeps { 3 } else { 1 });
    let strided = names.filter(|(_, tensor)| is_gpu && rows > 0 && !tensor.info().is_contiguous());
    let names: Vec<_> = strided.map(|(name, _)| name).collect();
    assert_eq!(copied(plan), names, "{device}: {plan}");
    let bytes = with_copies(contiguous.workspace_bytes(), names.len(), rows);
    assert_eq!(plan.workspace_bytes(), bytes, "{device}: {plan}");
    let moved = (4 * rows * names.len()) as u128;
    let (cost, less) = (plan.cost(), contiguous.cost());
    // New results of forward have the statistics always.
    let dropped = if keeps || P::NAME == "backward" {
        0
    } else {
        8 * rows as u128
    };
    assert_eq!(cost.flops, less.flops);
    assert_eq!(cost.bytes_read, less.bytes_read + moved, "{plan}");
    assert_eq!(cost.bytes_written + dropped, less.bytes_written + moved, "{plan}");
    for name in names {
        assert!(plan.to_string().contains(&format!("), copies {name}\n")), "{plan}");
    }
}

/// The plan of a forward pass into tensors of the caller's.
fn plan_into<T: Element>(attention: &Attention, [q, k, v]: [&Tensor<T>; 3], output: &Output<T>) -> Plan {
    let mut outputs = Outputs::new(output.out.info(), output.lse.info());
    outputs.statistics = (output.statistics.as_ref()).map(|of| [of.row_max.info(), of.row_sum.info()]);
    let problem = Problem::new(attention, q.info(), k.info(), v.info(), Some(outputs)).expect("valid");
    Plan::new(&problem, &q.device().info()).expect("a kernel")
}

/// GPUs have no backward pass of latent attention.
fn has_backward(case: &Case, device: &Device) -> bool {
    case.q[3] <= 256 || device.kind() == DeviceKind::Cpu
}

/// Checks forward and, unless it is forward's alone, backward of a rectangle against the same calls with contiguous rows.
fn check_rectangle<T: Element>(device: &Device, case: &Case, layout: &RowLayout, keeps: bool) {
    let attention = &case.attention;
    let inputs = case.inputs::<T>();
    let place = |shape: [usize; 4], data: &[T]| Tensor::from_slice(device, shape, data).expect("it fits");
    let (q, k) = (place(case.q, &inputs.q), place(case.kv, &inputs.k));
    let v = place(case.v_shape(), &inputs.v);
    let want = attention.forward(&q, &k, &v).expect("valid");

    let check = |output: &Output<T>, memory: &RowMemory| {
        let same = bits(&output.out) == bits(&want.out) && memory.read(keeps) == rows_of(&want, keeps);
        assert!(same, "{device}: {case:?}, {layout:?}");
    };

    let memory = layout.place(device, &case.q[..3]);
    let mut output = memory.output(nan(device, &case.out_shape()), keeps);
    (attention.forward_into_output(&q, &k, &v, &mut output)).expect("any strides");
    check(&output, &memory);

    let plan = plan_into(attention, [&q, &k, &v], &output);
    check_plan(
        device,
        &plan,
        &attention.plan(&q, &k, &v).expect("valid"),
        &memory,
        keeps,
    );
    device.prepare(&plan).expect("kernels and lists");
    let again = layout.place(device, &case.q[..3]);
    let mut into = again.output(nan(device, &case.out_shape()), keeps);
    let mut own = workspace(device, plan.workspace_bytes());
    (attention.forward_into_with(&q, &k, &v, &mut into, &mut own)).expect("a workspace as the plan says");
    check(&into, &again);

    if !has_backward(case, device) {
        return;
    }
    let mut want = want;
    if !keeps {
        want.statistics = None;
    }
    check_backward(device, attention, [&q, &k, &v], (&output, &memory), &want);
}

/// Checks backward from results of forward with strides against backward from contiguous ones.
fn check_backward<T: Element>(
    device: &Device,
    attention: &Attention,
    [q, k, v]: [&Tensor<T>; 3],
    (output, memory): (&Output<T>, &RowMemory),
    want: &Output<T>,
) {
    let dout = numbers::<T>(device, output.out.shape(), 9);
    let expected = attention.backward(q, k, v, want, &dout).expect("valid");
    let got = attention.backward(q, k, v, output, &dout).expect("any strides");
    assert!(gradients(&got) == gradients(&expected), "{device}: {attention:?}");
    let plan = attention.plan_backward(q, k, v, output, &dout).expect("valid");
    let contiguous = attention.plan_backward(q, k, v, want, &dout).expect("valid");
    check_plan(device, &plan, &contiguous, memory, output.statistics.is_some());
    let mut into = Gradients::new(nan(device, q.shape()), nan(device, k.shape()), nan(device, v.shape()));
    let mut own = workspace(device, plan.workspace_bytes());
    (attention.backward_into_with(q, k, v, output, &dout, &mut into, &mut own)).expect("a workspace as the plan says");
    assert!(gradients(&into) == gradients(&expected), "{device}: {attention:?}");
}

/// Rectangles of every kind of plan.
fn rectangles() -> Vec<Case> {
    let fixed = || Attention::new().deterministic();
    vec![
        Case::new(Dtype::F32, [2, 2, 33, 24], [2, 1, 40, 24]).with(fixed().causal()),
        Case::new(Dtype::F16, [1, 2, 150, 64], [1, 1, 70, 64]).with(fixed()),
        Case::new(Dtype::Bf16, [2, 2, 17, 128], [2, 1, 70, 128]).with(fixed().causal()),
        Case::new(Dtype::F16, [2, 2, 40, 32], [2, 2, 40, 32]).with(fixed().softcap(2.0).window(9, 9)),
        // Splits over keys.
        Case::new(Dtype::F16, [1, 4, 2, 64], [1, 2, 600, 64]).with(fixed()),
        Case::new(Dtype::Bf16, [5, 2, 1, 32], [5, 1, 9, 32]).with(fixed()),
        Case::new(Dtype::F16, [1, 4, 3, 576], [1, 1, 20, 576])
            .with_head_dim_v(512)
            .with(fixed()),
        Case::new(Dtype::F16, [1, 3, 40, 64], [1, 3, 20, 64]).with(fixed().arch(Arch::Sm80)),
    ]
}

proptest! {
    #![proptest_config(drawn::config(12))]

    #[test]
    fn rectangles_have_the_bits_of_contiguous_rows(
        case in prop::sample::select(rectangles()),
        layout in row_layout(),
        keeps in prop_oneof![3 => Just(true), 1 => Just(false)],
    ) {
        for device in devices().all() {
            for_dtype!(case.dtype, T => check_rectangle::<T>(device, &case, &layout, keeps));
        }
    }

}

proptest! {
    #![proptest_config(drawn::config(6))]

    #[test]
    fn batches_have_the_bits_of_contiguous_rows(
        layout in row_layout(),
        program in any::<bool>(),
        wide in any::<bool>(),
        keeps in prop_oneof![3 => Just(true), 1 => Just(false)],
    ) {
        let attention = Attention::new().causal().deterministic();
        let attention = if program { attention.softcap(2.0) } else { attention };
        for device in devices().all() {
            match wide {
                true => check_ragged::<f32>(device, &attention, &layout, keeps),
                false => check_ragged::<bf16>(device, &attention, &layout, keeps),
            }
            check_cached(device, &attention, &layout, keeps);
        }
    }

    #[test]
    fn quantised_inputs_have_the_bits_of_contiguous_rows(layout in row_layout(), causal in any::<bool>()) {
        let case = Fp8Case::new([2, 4, 150, 64], [2, 2, 200, 64]).masked(causal);
        let codes = case.inputs();
        for device in fp8_devices() {
            let [q, k, v] = [0, 1, 2].map(|input| codes[input].place(device, false, 0));
            let want = case.attention.forward_fp8::<f16>(&q, &k, &v).expect("valid");
            let memory = layout.place(device, &case.q[..3]);
            let mut output = memory.output::<f16>(nan(device, &case.q), true);
            case.attention.forward_fp8_into(&q, &k, &v, &mut output).expect("any strides");
            prop_assert!(bits(&output.out) == bits(&want.out), "{device}: {layout:?}");
            prop_assert!(memory.read(true) == rows_of(&want, true), "{device}: {layout:?}");
        }
    }
}

/// Checks packed sequences, some without queries or keys, and rows that belong to none.
fn check_ragged<T: Element>(device: &Device, attention: &Attention, layout: &RowLayout, keeps: bool) {
    let sequences = Sequences::new(&[0, 3, 3, 43, 48], &[0, 30, 34, 34, 90]);
    let sequences = sequences.and_then(|sequences| sequences.seqused_k(&[29, 4, 0, 56]));
    let sequences = sequences.expect("offsets grow");
    let q = numbers::<T>(device, &[50, 4, 16], 1);
    let [k, v] = [2, 3].map(|seed| numbers::<T>(device, &[93, 2, 16], seed));
    let want = attention.forward_ragged(&q, &k, &v, &sequences).expect("valid");
    let plans = attention.plan_ragged(&q, &k, &v, &sequences).expect("valid");
    let bytes: u64 = plans.iter().map(Plan::workspace_bytes).sum();
    let dout = numbers::<T>(device, q.shape(), 4);
    for brings in [false, true] {
        let memory = layout.place(device, &[4, 50]);
        let mut output = memory.output::<T>(nan(device, q.shape()), keeps);
        let mut own = workspace(device, with_copies(bytes, memory.strided(keeps), 200));
        let own = brings.then_some(&mut own);
        (attention.forward_ragged_into(&q, &k, &v, &sequences, &mut output, own)).expect("any strides");
        assert!(bits(&output.out) == bits(&want.out), "{device}: {layout:?}");
        assert!(memory.read(keeps) == rows_of(&want, keeps), "{device}: {layout:?}");

        let mut want = want.clone();
        want.statistics = want.statistics.filter(|_| keeps);
        let expected = attention.backward_ragged(&q, &k, &v, &want, &dout, &sequences);
        let mut into = Gradients::new(nan(device, q.shape()), nan(device, k.shape()), nan(device, v.shape()));
        let plans = attention.plan_backward_ragged(&q, &k, &v, &output, &dout, &sequences, &into);
        let bytes = |plan: &Plan<_>| plan.workspace_bytes().next_multiple_of(64);
        let mut own = workspace(device, plans.expect("valid").iter().map(bytes).sum());
        let own = brings.then_some(&mut own);
        (attention.backward_ragged_into(&q, &k, &v, &output, &dout, &sequences, &mut into, own)).expect("any strides");
        assert!(
            gradients(&into) == gradients(&expected.expect("valid")),
            "{device}: {layout:?}"
        );
    }
}

/// Checks paged caches, with splits, of a batch and of packed queries.
fn check_cached(device: &Device, attention: &Attention, layout: &RowLayout, keeps: bool) {
    let [k, v] = [1, 2].map(|seed| numbers::<f32>(device, &[40, 16, 1, 32], seed));
    let table: Vec<i32> = (0..40).rev().chain(0..40).collect();
    let cache = KvCache::paged([40, 16], &table, &[600, 7]).expect("pages");
    let packed = cache.clone().cu_seqlens_q(&[0, 1, 4]).expect("offsets grow");
    for (cache, shape, rows) in [
        (cache, vec![2, 4, 1, 32], vec![2, 4, 1]),
        (packed, vec![5, 4, 32], vec![4, 5]),
    ] {
        let q = numbers::<f32>(device, &shape, 3);
        let want = attention.forward_cached(&q, &k, &v, &cache).expect("valid");
        let plans = attention.plan_cached(&q, &k, &v, &cache).expect("valid");
        let bytes: u64 = plans.iter().map(Plan::workspace_bytes).sum();
        for brings in [false, true] {
            let memory = layout.place(device, &rows);
            let mut output = memory.output::<f32>(nan(device, &shape), keeps);
            let of_rows = rows.iter().product();
            let mut own = workspace(device, with_copies(bytes, memory.strided(keeps), of_rows));
            let own = brings.then_some(&mut own);
            (attention.forward_cached_into(&q, &k, &v, &cache, &mut output, own)).expect("any strides");
            assert!(bits(&output.out) == bits(&want.out), "{device}: {layout:?}");
            assert!(memory.read(keeps) == rows_of(&want, keeps), "{device}: {layout:?}");
        }
    }
}

/// Tests rows of packed memory, the commonest order that is not contiguous, in every kind of plan.
#[test]
fn interleaved_rows_in_every_kind_of_plan() {
    for case in rectangles() {
        for device in devices().all() {
            for_dtype!(case.dtype, T => check_rectangle::<T>(device, &case, &INTERLEAVED, true));
        }
    }
}

/// Tests that plans for contiguous rows of the caller's are those for new ones: no launch, no byte of workspace more.
#[test]
fn contiguous_rows_have_no_copies() {
    for case in rectangles() {
        for device in devices().all() {
            for_dtype!(case.dtype, T => check_plans::<T>(device, &case, &CONTIGUOUS));
        }
    }
}

/// Checks the plans of a rectangle with rows of this layout against those with new ones.
fn check_plans<T: Element>(device: &Device, case: &Case, layout: &RowLayout) {
    let attention = &case.attention;
    let [q, k, v] = [case.q, case.kv, case.v_shape()].map(|shape| nan::<T>(device, &shape));
    let new = |shape: &[usize]| Tensor::<f32>::zeros(device, shape).expect("it fits");
    let contiguous = attention.plan(&q, &k, &v).expect("valid");
    let memory = layout.place(device, &case.q[..3]);
    let output = memory.output(nan(device, &case.out_shape()), true);
    let plan = plan_into(attention, [&q, &k, &v], &output);
    check_plan(device, &plan, &contiguous, &memory, true);
    assert_eq!(plan.launches().len(), contiguous.launches().len(), "{plan}");
    if has_backward(case, device) {
        let rows = || new(&case.q[..3]);
        let mut of_new = Output::new(output.out.clone(), rows());
        let (row_max, row_sum) = (rows(), rows());
        of_new.statistics = Some(Statistics { row_max, row_sum });
        let plan = |output| attention.plan_backward(&q, &k, &v, output, &output.out).expect("valid");
        let (plan, contiguous) = (plan(&output), plan(&of_new));
        check_plan(device, &plan, &contiguous, &memory, true);
        assert_eq!(plan.launches().len(), contiguous.launches().len(), "{plan}");
    }
}

/// Tests that results without queries have no copies, and those without keys have them.
#[test]
fn rows_of_empty_calls() {
    for device in devices().all() {
        for (q, kv) in [([2, 2, 0, 8], [2, 2, 5, 8]), ([2, 2, 5, 8], [2, 2, 0, 8])] {
            let case = Case::new(Dtype::F32, q, kv);
            check_rectangle::<f32>(device, &case, &INTERLEAVED, true);
        }
    }
}

/// Tests that what a GPU reads and writes is what the plan says.
#[test]
fn copies_move_the_bytes_that_plans_count() {
    if !devices().emulation() {
        return;
    }
    // A device of its own: counters are those of all calls.
    let device = &emulator(Arch::Sm80, 1, 2);
    let case = Case::new(Dtype::F32, [2, 3, 150, 32], [2, 3, 40, 32]);
    let q = numbers::<f32>(device, &case.q, 1);
    let k = numbers::<f32>(device, &case.kv, 2);
    let attention = Attention::new();
    let run = |output: &mut Output<f32>| {
        device.reset_counters();
        attention.forward_into_output(&q, &k, &k, output).expect("valid");
        let (cost, counters) = (plan_into(&attention, [&q, &k, &k], output).cost(), device.counters());
        let counters = counters.expect("the emulator counts");
        assert_eq!(cost.bytes_written, counters.global_written_bytes.into());
        u128::from(counters.global_read_bytes) - cost.bytes_read
    };
    let contiguous = attention.forward(&q, &k, &k).expect("valid");
    let memory = INTERLEAVED.place(device, &case.q[..3]);
    let mut output = memory.output::<f32>(nan(device, &case.q), true);
    assert_eq!(run(&mut contiguous.clone()), 0);
    // Beside the rows each thread reads where its block works, 24 bytes: of three tensors six heads, in two runs.
    assert_eq!(run(&mut output), 3 * 6 * 2 * 256 * 24);
}

/// Tests that backward reads an lse whose batch entries share memory, which no call may write.
#[test]
fn an_lse_that_is_repeated_is_read() {
    for device in devices().all() {
        let repeated = |seed| {
            let numbers = numbers::<f32>(device, &[2, 20, 16], seed).to_vec().expect("read");
            Tensor::from_slice_strided(device, [3, 2, 20, 16], [0, 320, 16, 1], &numbers).expect("one entry")
        };
        let [q, k, v, dout] = [1, 2, 3, 4].map(repeated);
        let attention = Attention::new().deterministic();
        let Output { out, lse, .. } = attention.forward(&q, &k, &v).expect("valid");
        let of_one = lse.narrow(0, 0, 1).and_then(|lse| lse.to_vec()).expect("read");
        let of_all = Tensor::from_slice_strided(device, [3, 2, 20], [0, 20, 1], &of_one).expect("one entry");
        let backward = |lse| {
            let output = Output::new(out.clone(), lse);
            gradients(&attention.backward(&q, &k, &v, &output, &dout).expect("valid"))
        };
        assert!(backward(of_all) == backward(lse), "{device}");
    }
}

/// Tests that kernels for Hopper, a launch a sequence, read rows of packed sequences in another order.
#[test]
fn rows_of_sequences_one_by_one() {
    let is_hopper = |device: &&Device| {
        matches!(
            device.info(),
            DeviceInfo::Gpu {
                compute_capability: (9, 0),
                ..
            }
        )
    };
    for device in devices().all().filter(is_hopper) {
        let [q, k, v, dout] = [1, 2, 3, 4].map(|seed| numbers::<f16>(device, &[30, 2, 64], seed));
        let sequences = Sequences::new(&[0, 11, 30], &[0, 11, 30]).expect("offsets grow");
        let attention = Attention::new().causal().deterministic().arch(Arch::Sm90a);
        let Output { out, lse, .. } = (attention.forward_ragged(&q, &k, &v, &sequences)).expect("valid");
        let backward = |lse| {
            let output = Output::new(out.clone(), lse);
            gradients(&(attention.backward_ragged(&q, &k, &v, &output, &dout, &sequences)).expect("valid"))
        };
        let by_query = lse.transpose(0, 1).and_then(|lse| lse.contiguous());
        let strided = by_query.and_then(|lse| lse.transpose(0, 1)).expect("two axes");
        assert!(backward(strided) == backward(lse), "{device}");
    }
}

/// Tests that a workspace without room for the copies is refused, and that so are rows that share memory.
#[test]
fn rows_that_will_not_do_are_refused() {
    for device in devices().all() {
        let q = numbers::<f32>(device, &[2, 3, 20, 8], 1);
        let [k, v] = [2, 3].map(|seed| numbers::<f32>(device, &[2, 3, 20, 8], seed));
        let attention = Attention::new();
        let memory = INTERLEAVED.place(device, &[2, 3, 20]);
        let mut output = memory.output::<f32>(nan(device, &[2, 3, 20, 8]), true);
        let mut small = workspace(device, with_copies(0, 3, 120) - 4);
        let refused = attention.forward_into_with(&q, &k, &v, &mut output, &mut small);
        let is_gpu = device.kind() != DeviceKind::Cpu;
        let is_too_small =
            matches!(&refused, Err(Error::Workspace { needed, .. }) if *needed == with_copies(0, 3, 120));
        assert_eq!(is_too_small, is_gpu, "{device}: {refused:?}");

        let mut twice = output.clone();
        twice.lse = (output.statistics.as_ref()).expect("kept").row_max.clone();
        let refused = attention.forward_into_output(&q, &k, &v, &mut twice);
        let expected = Error::Aliased {
            argument: "row_max",
            other: "lse",
        };
        assert_eq!(
            refused.expect_err("shared").to_string(),
            expected.to_string(),
            "{device}"
        );
        let mut in_q = output.clone();
        in_q.lse = q.select(3, 5).expect("in range");
        let refused = attention.forward_into_output(&q, &k, &v, &mut in_q);
        assert!(
            matches!(
                refused,
                Err(Error::Aliased {
                    argument: "lse",
                    other: "q"
                })
            ),
            "{device}: {refused:?}"
        );
        in_q.lse = Tensor::from_slice_strided(device, [2, 3, 20], [20, 0, 1], &[0.0; 40]).expect("it fits");
        let refused = attention.forward_into_output(&q, &k, &v, &mut in_q);
        assert!(
            matches!(refused, Err(Error::OverlappingStrides { argument: "lse", .. })),
            "{device}: {refused:?}"
        );
    }
}
