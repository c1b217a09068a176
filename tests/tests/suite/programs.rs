//! Score programs spliced into compiled kernels, against the f64 oracle.

use flash_attention::device::DeviceKind;
use flash_attention::half::{bf16, f16};
use flash_attention::program::Table;
use flash_attention::reference::{self, AllGradients};
use flash_attention::{Attention, Device, Dtype, Element, Error, Tensor};
use flash_attention_kernels::entries::{PROGRAM_ENTRIES, Pass};
use flash_attention_tests::programs::{self, Standard};
use flash_attention_tests::{Case, compare, devices, files, for_dtype};

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

/// The devices that splice programs into kernels.
fn gpus() -> impl Iterator<Item = &'static Device> {
    devices().all().filter(|device| device.kind() != DeviceKind::Cpu)
}

/// Programs of coordinates and numbers, by name.
fn programs() -> Vec<(&'static str, Attention)> {
    let new = Attention::new;
    vec![
        ("scale", new().score(|s, _| s + 0.0)),
        ("softcap", new().softcap(1.5)),
        ("linear bias", new().score(|s, at| s + (at.key - at.query) * 0.03)),
        ("window", new().window(20, 3)),
        ("window and softcap", new().window(20, None).softcap(2.0)),
        ("prefix", new().prefix(7)),
        ("chunked", new().chunked(16)),
        ("dilated", new().dilated(3)),
        ("top left", new().top_left()),
        ("causal and softcap", new().causal().softcap(3.0)),
    ]
}

#[test]
fn programs_of_coordinates() {
    for (i, (name, attention)) in programs().into_iter().enumerate() {
        for (j, dtype) in DTYPES.into_iter().enumerate() {
            let head_dim = [64, 128, 40][(i + j) % 3];
            eprintln!("{name} {dtype:?} {head_dim}");
            Case::new(dtype, [1, 2, 35, head_dim], [1, 1, 75, head_dim])
                .with(attention.clone())
                .check_on(gpus());
        }
    }
}

#[test]
fn gradients_through_programs_of_coordinates() {
    for (i, (name, attention)) in programs().into_iter().enumerate() {
        for (j, dtype) in DTYPES.into_iter().enumerate() {
            let head_dim = [64, 128, 40][(i + j) % 3];
            eprintln!("{name} {dtype:?} {head_dim}");
            Case::new(dtype, [1, 2, 35, head_dim], [1, 1, 75, head_dim])
                .with(attention.clone())
                .check_gradients_on(gpus());
        }
    }
}

/// Every row of the table of kernels for programs, with more than one key block.
#[test]
fn every_kernel_for_programs() {
    for entry in PROGRAM_ENTRIES {
        let (block_m, block_n) = (entry.block_m as usize, entry.block_n as usize);
        let attention = Attention::new().softcap(2.0).window(block_n, 5);
        let head_dim = entry.head_dim as usize;
        let head_dim_v = if entry.is_latent() { 512 } else { head_dim };
        let case = |seqlen_q, seqlen_k| {
            Case::one_head(entry.dtype, seqlen_q, seqlen_k, head_dim)
                .with_head_dim_v(head_dim_v)
                .with(attention.clone())
        };
        match entry.pass {
            Pass::Forward => case(18, block_n + 9).check_on(gpus()),
            Pass::BackwardDq => case(18, block_n + 9).check_gradients_on(gpus()),
            Pass::BackwardDkv => case(block_m + 9, 18).check_gradients_on(gpus()),
            _ => {}
        }
    }
}

/// Sizes of the cases with tables.
const Q: [usize; 4] = [2, 4, 35, 64];
const KV: [usize; 4] = [2, 2, 75, 64];

/// A tensor of normal numbers.
fn normal<T: Element>(device: &Device, shape: &[usize], seed: u64) -> Tensor<T> {
    let elements: Vec<T> = files::normal(shape.iter().product(), 1.0, seed)
        .into_iter()
        .map(T::from_f32)
        .collect();
    Tensor::from_slice(device, shape, &elements).expect("a tensor")
}

/// Programs that read tables, by name, with their tables on a device.
fn programs_of_tables(device: &Device) -> Vec<(&'static str, Attention)> {
    let new = Attention::new;
    let [batch, heads, seqlen_q, _] = Q;
    let seqlen_k = KV[2];
    let slopes = Tensor::from_slice(device, [heads], &[0.25_f32, 0.125, 0.0625, 0.5]).expect("a tensor");
    let slopes_of_batch: Tensor<f32> = normal(device, &[batch, heads], 5);
    let bias: Tensor<f32> = normal(device, &[batch, heads, seqlen_q, seqlen_k], 6);
    let narrow: Tensor<f16> = normal(device, &[1, heads, seqlen_q, seqlen_k], 7);
    let of_keys: Tensor<bf16> = normal(device, &[batch, 1, 1, seqlen_k], 8);
    let of_queries: Tensor<f32> = normal(device, &[1, heads, seqlen_q, 1], 9);
    let relative: Tensor<f32> = normal(device, &[heads, 33], 10);
    let relative = Table::<f32, 2>::new(&relative).expect("a table");
    let sinks: Tensor<f32> = normal(device, &[heads], 11);
    let documents = |seqlen: usize, shift: usize| -> Tensor<i32> {
        let ids: Vec<i32> = (0..batch * seqlen)
            .map(|i| (i % seqlen + shift * (i / seqlen)) as i32 / 17)
            .collect();
        Tensor::from_slice(device, [batch, seqlen], &ids).expect("a tensor")
    };
    let (documents_q, documents_k) = (documents(seqlen_q, 3), documents(seqlen_k, 5));
    vec![
        ("alibi", new().alibi(&slopes)),
        ("alibi of each batch entry", new().alibi(&slopes_of_batch).causal()),
        ("bias", new().bias(&bias)),
        ("bias in f16", new().bias(&narrow)),
        ("bias of keys in bf16", new().bias(&of_keys)),
        ("bias of queries", new().bias(&of_queries)),
        (
            "relative bias",
            new().score(move |s, at| s + relative.at(at.head, at.distance().max(-16).min(16) + 16)),
        ),
        ("sinks", new().sinks(&sinks)),
        ("sinks and window", new().sinks(&sinks).window(5, 0)),
        ("documents", new().documents(&documents_q, &documents_k)),
        ("dropout", new().dropout(0.3, 0x1234_5678_9abc_def0)),
        (
            "all",
            new()
                .softcap(4.0)
                .bias(&narrow)
                .alibi(&slopes)
                .window(40, 10)
                .documents(&documents_q, &documents_k)
                .sinks(&sinks)
                .dropout(0.1, 7),
        ),
    ]
}

#[test]
fn programs_of_tables_forward() {
    for device in gpus() {
        for (i, (name, attention)) in programs_of_tables(device).into_iter().enumerate() {
            eprintln!("{name} on {device}");
            Case::new(DTYPES[i % 3], Q, KV)
                .with(attention.clone())
                .check_on([device]);
            Case::new(DTYPES[(i + 1) % 3], Q, KV).with(attention).check_on([device]);
        }
    }
}

#[test]
fn programs_of_tables_backward() {
    for device in gpus() {
        for (i, (name, attention)) in programs_of_tables(device).into_iter().enumerate() {
            eprintln!("{name} on {device}");
            let case = Case::new(DTYPES[i % 3], Q, KV).with(attention.table_gradients());
            case.check_gradients_on([device]);
            for_dtype!(case.dtype, T => check_table_gradients::<T>(name, &case, device));
        }
    }
}

/// Holds the gradients of a case's tables to the oracle.
fn check_table_gradients<T: Element>(name: &str, case: &Case, device: &Device) {
    let (inputs, dout) = (case.inputs::<T>(), case.dout::<T>());
    let prepared = case.prepare_backward(device, &inputs, &dout);
    let [q, k, v] = prepared.inputs.each_ref().map(|input| &input.tensor);
    let attention = &case.attention;
    let got = attention
        .backward(q, k, v, &prepared.output, &prepared.dout.tensor)
        .expect("gradients");
    let dims = case.dims();
    let standard: AllGradients<T> =
        reference::standard_backward_with_tables(&dims, &inputs.q, &inputs.k, &inputs.v, &dout, true);
    let widen = |elements: &[T]| elements.iter().map(|x| x.to_f64()).collect::<Vec<_>>();
    let [q, k, v, dout] = [&inputs.q, &inputs.k, &inputs.v, &dout].map(|elements| widen(elements));
    let want = reference::backward_with_tables(&dims, &q, &k, &v, &dout, true);
    let standard = Standard {
        gradients: &standard,
        exact: &want,
        from_out: None,
    };
    programs::check_table_gradients(&format!("{name} on {device}"), case, &dims, &got, &want, &standard);
}

/// A GPU refuses the deterministic gradient of a table if several pairs add to one element, and names the table.
#[test]
fn deterministic_gradients_of_shared_elements_are_refused() {
    for device in gpus() {
        let new = Attention::new;
        let [batch, heads, seqlen_q, _] = Q;
        let whole: Tensor<f32> = normal(device, &[batch, heads, seqlen_q, KV[2]], 4);
        let of_heads: Tensor<f32> = normal(device, &[1, heads, seqlen_q, KV[2]], 5);
        let one_per_head: Tensor<f32> = normal(device, &[heads], 6);
        let table = Table::<f32, 4>::new(&whole).expect("a table");
        let twice = new().score(|s, at| {
            let of = |key| table.at_clamped(at.batch, at.head, at.query, key);
            s + of(at.key) * of(at.query)
        });
        for (name, attention) in [
            ("sinks", new().bias(&whole).sinks(&one_per_head)),
            ("alibi_slopes", new().bias(&whole).alibi(&one_per_head)),
            ("bias", new().bias(&of_heads)),
            ("table", twice),
        ] {
            let attention = attention.table_gradients().deterministic();
            let [q, k]: [Tensor<f32>; 2] = [normal(device, &Q, 2), normal(device, &KV, 3)];
            let output = attention.forward(&q, &k, &k).expect("an output");
            let result = attention.backward(&q, &k, &k, &output, &q);
            let named = format!("a deterministic gradient of `{name}`");
            assert!(
                matches!(&result, Err(Error::Unsupported { feature, .. }) if *feature == named),
                "{result:?}"
            );
        }
    }
}

/// Where each pair reads an element of its own, gradients are deterministic, and those of the oracle.
#[test]
fn deterministic_gradients_of_elements_that_one_pair_reads() {
    for device in gpus() {
        for (dtype, [batch, heads_kv]) in DTYPES.into_iter().zip([[2, 2], [1, 1], [2, 1]]) {
            let (q, kv) = ([batch, 2, 35, 64], [batch, heads_kv, 75, 64]);
            let bias: Tensor<f32> = normal(device, &[batch, 2, 35, 75], 4);
            let attention = Attention::new()
                .bias(&bias)
                .window(40, 3)
                .table_gradients()
                .deterministic();
            let case = Case::new(dtype, q, kv).with(attention);
            for_dtype!(dtype, T => check_table_gradients::<T>("bias", &case, device));
        }
    }
}

/// A value that a program hides may be NaN: queries that do not see it are as if it were not there, those that do are NaN.
#[test]
fn values_that_a_program_hides_may_be_nan() {
    for device in gpus() {
        for (dtype, head_dim) in DTYPES.into_iter().flat_map(|dtype| [(dtype, 64), (dtype, 96)]) {
            let attention = Attention::new().window(6, 0).softcap(3.0);
            let case = Case::new(dtype, [1, 2, 35, head_dim], [1, 1, 75, head_dim])
                .with_head_dim_v(64)
                .with(attention);
            for_dtype!(dtype, T => {
                let mut inputs = case.inputs::<T>();
                for (place, value) in [(50 * 64 + 3, f32::NAN), (70 * 64 + 60, f32::INFINITY)] {
                    inputs.v[place] = T::from_f32(value);
                }
                let (_, outcome) = case.run(device, &inputs);
                let (out, _) = inputs.oracle(&case.dims());
                assert!(out.iter().any(|x| x.is_nan()) && out.iter().any(|x| x.is_finite()));
                if let Err(mismatch) = compare("out", &case.out_shape(), &outcome.out, &out, 2e-2) {
                    panic!("{case:?} on {device}\n{mismatch}");
                }
            });
        }
    }
}
