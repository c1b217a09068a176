//! Tests of progress reports: their values, their times, and that they do not change results.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

use flash_attention::{Arch, Attention, Device, Element, Error, Gradients, Output, Progress, Statistics, Tensor};
use half::bf16;

use crate::common::noise;

/// A problem with a gradient of its output.
struct Inputs<T: Element> {
    q: Tensor<T>,
    k: Tensor<T>,
    v: Tensor<T>,
    dout: Tensor<T>,
}

impl<T: Element> Inputs<T> {
    fn new(device: &Device, q: [usize; 4], k: [usize; 4]) -> Self {
        let draw = |shape: [usize; 4], seed| {
            let data: Vec<T> = noise(shape.iter().product(), seed)
                .into_iter()
                .map(T::from_f64)
                .collect();
            Tensor::from_slice(device, shape, &data).expect("small")
        };
        Self {
            q: draw(q, 1),
            k: draw(k, 2),
            v: draw(k, 3),
            dout: draw(q, 4),
        }
    }
}

/// Returns the elements of every result.
fn elements<T: Element>(output: &Output<T>, gradients: &Gradients<T>) -> (Vec<f32>, [Vec<T>; 4]) {
    let tensors = [&output.out, &gradients.dq, &gradients.dk, &gradients.dv];
    let read = |tensor: &Tensor<T>| tensor.to_vec().expect("the device works");
    (output.lse.to_vec().expect("the device works"), tensors.map(read))
}

/// Runs both passes with and without reports. The reports must grow and end at the total, once, and results must be
/// the same bits.
fn check<T: Element>(device: &Device, attention: Attention, q: [usize; 4], k: [usize; 4]) {
    let Inputs { q, k, v, dout } = Inputs::<T>::new(device, q, k);
    let output = attention.forward(&q, &k, &v).expect("valid");
    let gradients = attention.backward(&q, &k, &v, &output, &dout).expect("valid");
    let silent = elements(&output, &gradients);

    let reports = Mutex::new(Vec::new());
    let reporting = attention.clone().on_progress(|progress: Progress| {
        reports.try_lock().expect("one report at a time").push(progress);
    });
    let ended = || {
        let reports = std::mem::take(&mut *reports.lock().expect("no report panics"));
        let case = format!(
            "{device} {attention:?} q {:?} k {:?}: {reports:?}",
            q.shape(),
            k.shape()
        );
        let last = *reports.last().expect("a call reports");
        assert_eq!((last.done, last.fraction()), (last.total, 1.0), "{case}");
        assert!(
            reports
                .iter()
                .all(|report| report.total == last.total && report.done > 0),
            "{case}"
        );
        assert!(reports.windows(2).all(|two| two[0].done < two[1].done), "{case}");
        reports.len()
    };
    let output = reporting.forward(&q, &k, &v).expect("valid");
    ended();
    let gradients = reporting.backward(&q, &k, &v, &output, &dout).expect("valid");
    ended();
    assert!(elements(&output, &gradients) == silent, "{device} {attention:?}");

    let (mut out, mut lse) = (
        Tensor::zeros(device, q.shape()).expect("small"),
        Tensor::zeros(device, &q.shape()[..3]).expect("small"),
    );
    reporting.forward_into(&q, &k, &v, &mut out, &mut lse).expect("valid");
    ended();
    // Without forward's statistics the gradients may differ in their last bits from those above.
    let output = Output::new(out, lse);
    let gradients = attention.backward(&q, &k, &v, &output, &dout).expect("valid");
    let silent = elements(&output, &gradients);
    let mut gradients = Gradients::new(
        Tensor::zeros(device, q.shape()).expect("small"),
        Tensor::zeros(device, k.shape()).expect("small"),
        Tensor::zeros(device, k.shape()).expect("small"),
    );
    reporting
        .backward_into(&q, &k, &v, &output, &dout, &mut gradients)
        .expect("valid");
    ended();
    assert!(elements(&output, &gradients) == silent, "{device} {attention:?}");
}

#[test]
fn every_path_of_the_cpu_reports_all_of_its_work() {
    for threads in [1, 2, 5] {
        let device = Device::cpu_with_threads(threads).expect("threads");
        for attention in [Attention::new(), Attention::new().causal()] {
            // Tiles of a task, segments of a tile, few queries, queries that see no key, heads that share keys.
            for (q, k) in [
                ([2, 6, 200, 40], [2, 2, 700, 40]),
                ([1, 1, 100, 16], [1, 1, 5000, 16]),
                ([1, 2, 1, 16], [1, 1, 4500, 16]),
                ([1, 8, 300, 8], [1, 8, 70, 8]),
                // Under a causal mask, tiles of queries that see none of the later keys.
                ([1, 2, 700, 8], [1, 1, 700, 8]),
                ([1, 1, 1, 8], [1, 1, 1, 8]),
            ] {
                check::<f32>(&device, attention.clone(), q, k);
                check::<bf16>(&device, attention.clone(), q, k);
            }
        }
    }
}

#[test]
fn the_emulator_reports_its_blocks() {
    let device = Device::emulator(Arch::Sm80);
    check::<f32>(&device, Attention::new().causal(), [1, 2, 70, 32], [1, 1, 70, 32]);
    // Splits of keys, and the launch that combines them.
    check::<f32>(&device, Attention::new(), [1, 2, 1, 32], [1, 1, 700, 32]);
}

#[test]
fn a_long_call_reports_on_its_way() {
    let device = Device::cpu_with_threads(2).expect("threads");
    let Inputs { q, k, v, .. } = Inputs::<f32>::new(&device, [1, 8, 1500, 64], [1, 8, 1500, 64]);
    let reports = Mutex::new(0);
    let reporting = Attention::new().on_progress(|_| *reports.lock().expect("no report panics") += 1);
    reporting.forward(&q, &k, &v).expect("valid");
    // The first report is made as soon as any unit is done, even in a short call.
    assert!(reports.into_inner().expect("no report panics") >= 2);
}

#[test]
fn a_refused_call_reports_nothing() {
    let device = Device::cpu();
    let Inputs { q, k, .. } = Inputs::<f32>::new(&device, [1, 1, 8, 8], [1, 1, 8, 16]);
    let reporting = Attention::new().on_progress(|progress| panic!("{progress:?}"));
    assert!(matches!(
        reporting.forward(&q, &k, &k),
        Err(Error::ShapeMismatch { .. })
    ));
}

/// Tests a report that panics: the call does all of its work, then the panic continues, and device and tensors stay
/// usable.
#[test]
fn a_report_that_panics_leaves_nothing_half_done() {
    for threads in [1, 3] {
        let device = Device::cpu_with_threads(threads).expect("threads");
        let Inputs { q, k, v, dout } = Inputs::<f32>::new(&device, [1, 4, 500, 32], [1, 4, 900, 32]);
        let attention = Attention::new();
        let output = attention.forward(&q, &k, &v).expect("valid");
        let gradients = attention.backward(&q, &k, &v, &output, &dout).expect("valid");
        let right = elements(&output, &gradients);

        let of_rows = || Tensor::zeros(&device, &q.shape()[..3]).expect("small");
        let mut output = Output::new(Tensor::zeros(&device, q.shape()).expect("small"), of_rows());
        output.statistics = Some(Statistics {
            row_max: of_rows(),
            row_sum: of_rows(),
        });
        let mut gradients = Gradients::new(
            Tensor::zeros(&device, q.shape()).expect("small"),
            Tensor::zeros(&device, k.shape()).expect("small"),
            Tensor::zeros(&device, k.shape()).expect("small"),
        );
        let calls = Mutex::new(0);
        let reporting = attention.clone().on_progress(|_| {
            *calls.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) += 1;
            panic!("of the report");
        });
        let panicked = |call: &mut dyn FnMut() -> Result<(), Error>| {
            let panic = catch_unwind(AssertUnwindSafe(call)).expect_err("the panic goes on");
            assert_eq!(panic.downcast_ref(), Some(&"of the report"));
        };
        panicked(&mut || reporting.forward_into_output(&q, &k, &v, &mut output));
        panicked(&mut || reporting.backward_into(&q, &k, &v, &output, &dout, &mut gradients));
        assert_eq!(*calls.lock().unwrap_or_else(|poisoned| poisoned.into_inner()), 2);
        assert!(elements(&output, &gradients) == right);

        let again = attention.forward(&q, &k, &v).expect("the device works");
        assert!(elements(&again, &gradients) == right);
    }
}
