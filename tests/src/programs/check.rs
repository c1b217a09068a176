//! Checks of a program's results and gradients on a device against the oracle.

use flash_attention::reference::{self, AllGradients, Dims};
use flash_attention::{Device, Dtype, Element, Gradients};

use super::tensor;
use crate::{Case, Mismatch, compare, largest_error};

/// Checks forward and backward of a case on a device, tables' gradients included.
///
/// # Panics
/// If the device fails in another way, or an error exceeds its bound: twice that of standard attention, plus 1e-5; for gradients
/// of tables that of [`check_table_gradients`]. In halves, backward is held against the oracle's gradients from the output that
/// the device gave.
pub fn check_program<T: Element>(case: &Case, device: &Device) {
    let inputs = case.inputs::<T>();
    let [q, k, v] = [(case.q, &inputs.q), (case.kv, &inputs.k), (case.v_shape(), &inputs.v)]
        .map(|(shape, elements)| tensor(device, &shape, elements));
    let attention = case.attention.clone().table_gradients();
    case.check_on([device]);
    let output = attention
        .forward(&q, &k, &v)
        .unwrap_or_else(|error| panic!("{case:?} on {device}: {error}"));
    let dout_elements = case.dout::<T>();
    let dout = tensor(device, &case.out_shape(), &dout_elements);
    let gradients = attention.backward(&q, &k, &v, &output, &dout);
    let gradients = gradients.unwrap_or_else(|error| panic!("{case:?} on {device}: {error}"));
    let dims = case.dims();
    let [wide_q, wide_k, wide_v, wide_dout] = [&inputs.q, &inputs.k, &inputs.v, &dout_elements]
        .map(|elements| elements.iter().map(|x| x.to_f64()).collect::<Vec<_>>());
    let out: Vec<f64> = output.out.to_vec().expect("read").iter().map(|x| x.to_f64()).collect();
    let wide = [&wide_q[..], &wide_k, &wide_v];
    let exact = reference::backward_with_tables(&dims, &wide_q, &wide_k, &wide_v, &wide_dout, true);
    let from_out = reference::backward_from(&dims, wide, &out, &wide_dout, true);
    let standard =
        reference::standard_backward_with_tables(&dims, &inputs.q, &inputs.k, &inputs.v, &dout_elements, true);
    // In halves out is rounded, and delta with it: a backward pass is judged by what it was given.
    let want = if case.dtype == Dtype::F32 { &exact } else { &from_out };
    let standard = Standard {
        gradients: &standard,
        exact: &exact,
        from_out: (case.dtype == Dtype::F32).then_some(&from_out),
    };
    let name = format!("{case:?} on {device}");
    check_all(&name, case, &dims, &gradients, want, &standard);
}

/// Standard attention's gradients and the exact ones: their distance is what a dtype costs.
#[derive(Clone, Copy, Debug)]
pub struct Standard<'a, T> {
    /// Gradients of standard attention in the dtype.
    pub gradients: &'a AllGradients<T>,
    /// Gradients of the oracle.
    pub exact: &'a AllGradients<f64>,
    /// Gradients of the oracle from the output that the device gave, where they are not what results are compared with: their
    /// distance from the exact ones is what the rounding of out does to the gradients of tables.
    pub from_out: Option<&'a AllGradients<f64>>,
}

fn check_all<T: Element>(
    name: &str,
    case: &Case,
    dims: &Dims,
    got: &Gradients<T>,
    want: &AllGradients<f64>,
    standard: &Standard<'_, T>,
) {
    let must = |result: Result<(), Mismatch>| {
        if let Err(mismatch) = result {
            panic!("{name}\n{mismatch}");
        }
    };
    let Standard { gradients, exact, .. } = standard;
    let of_inputs = [
        ("dq", case.q, &got.dq, &want.dq, largest_error(&gradients.dq, &exact.dq)),
        (
            "dk",
            case.kv,
            &got.dk,
            &want.dk,
            largest_error(&gradients.dk, &exact.dk),
        ),
        (
            "dv",
            case.v_shape(),
            &got.dv,
            &want.dv,
            largest_error(&gradients.dv, &exact.dv),
        ),
    ];
    for (what, shape, got, want, error) in of_inputs {
        must(compare(
            what,
            &shape,
            &got.to_vec().expect("read"),
            want,
            2.0 * error + 1e-5,
        ));
    }
    check_table_gradients(name, case, dims, got, want, standard);
}

/// Checks the gradients of a case's float tables and sinks against `want`.
///
/// Each error is at most twice that of standard attention, which adds in f64, plus 1e-5, plus what n additions in f32 may do.
///
/// In f32 the error of the oracle's gradients from the rounded out counts if it is the larger one. The delta of a query is then off by
/// the same for all its keys, and the sum over them does not cancel that where all have about the same derivative, as by a slope
/// if all keys are far.
///
/// An addition rounds by an error that is uniform over half a unit in the last place, 0.42 * 2^-24 of the sum in the mean square.
/// Sums that grow evenly to their result are `1 / sqrt(3)` of it in the mean square. So n errors have a standard deviation of
/// `0.25 * sqrt(n) * 2^-24` of the result, whatever the order is; three of them are allowed.
///
/// # Panics
/// If a gradient is missing, or an error exceeds its bound.
pub fn check_table_gradients<T: Element>(
    name: &str,
    case: &Case,
    dims: &Dims,
    got: &Gradients<T>,
    want: &AllGradients<f64>,
    Standard {
        gradients,
        exact,
        from_out,
    }: &Standard<'_, T>,
) {
    let Some(evaluator) = &dims.program else { return };
    let must = |result: Result<(), Mismatch>| {
        if let Err(mismatch) = result {
            panic!("{name}\n{mismatch}");
        }
    };
    let bound = |terms: usize, error: f64, exact: &[f64]| {
        let roundings = 0.75 * (terms as f64).sqrt() * f64::from(f32::EPSILON) / 2.0;
        2.0 * error + 1e-5 + roundings * largest(exact)
    };
    let tables = evaluator.program().tables();
    for (i, table) in tables.iter().enumerate().filter(|(_, table)| table.element.is_float()) {
        let gradient = got
            .gradient_of(table)
            .expect("the gradient of a table of floats")
            .to_vec();
        let terms = exact.table_terms[i].iter().copied().max().unwrap_or(0);
        let of_out = from_out.map_or(0.0, |from_out| distance(&from_out.tables[i], &exact.tables[i]));
        let error = distance(&gradients.tables[i], &exact.tables[i]).max(of_out);
        let bound = bound(terms, error, &exact.tables[i]);
        must(compare(
            table.name,
            &table.shape,
            &gradient.expect("read"),
            &want.tables[i],
            bound,
        ));
    }
    if let (Some(want), Some(exact), Some(standard)) = (&want.sinks, &exact.sinks, &gradients.sinks) {
        let sinks = got
            .sinks
            .as_ref()
            .expect("the gradient of sinks")
            .to_vec()
            .expect("read");
        let bound = bound(case.q[0] * case.q[2], distance(standard, exact), exact);
        must(compare("dsinks", &[want.len()], &sinks, want, bound));
    }
}

fn largest(numbers: &[f64]) -> f64 {
    numbers.iter().fold(0.0, |largest, x| x.abs().max(largest))
}

fn distance(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).fold(0.0, |largest, (x, y)| (x - y).abs().max(largest))
}
