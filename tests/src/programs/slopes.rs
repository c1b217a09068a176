//! The oracle's gradients of a program against differences of its forward pass.

use flash_attention::reference::{self, Dims};

use crate::Case;

/// Checks the oracle's gradients of a case, tables' included, against differences of its forward pass in f64. An element
/// near a kink, where the differences to the left and right disagree, has no slope and is left out.
///
/// # Panics
/// If a gradient is no slope, or more than a fifth of the elements are near kinks.
pub fn check_slopes(case: &Case) {
    let inputs = case.inputs::<f32>();
    let widen = |elements: &[f32]| elements.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
    let tensors = [widen(&inputs.q), widen(&inputs.k), widen(&inputs.v)];
    let dout = widen(&case.dout::<f32>());
    let dims = case.dims();
    let loss = |dims: &Dims, [q, k, v]: &[Vec<f64>; 3]| -> f64 {
        let (out, _) = reference::forward(dims, q, k, v);
        out.iter().zip(&dout).map(|(x, y)| x * y).sum()
    };
    let [q, k, v] = &tensors;
    let gradients = reference::backward_with_tables(&dims, q, k, v, &dout, true);
    let (step, middle) = (1e-6, loss(&dims, &tensors));
    let (mut checked, mut kinks) = (0, 0);
    let mut check = |name: String, got: f64, moved: &dyn Fn(f64) -> f64| {
        let (left, right) = ((middle - moved(-step)) / step, (moved(step) - middle) / step);
        checked += 1;
        if (left - right).abs() > 1e-3 * (1.0 + left.abs()) {
            kinks += 1;
            return;
        }
        let want = (left + right) / 2.0;
        assert!(
            (got - want).abs() <= 1e-4 * (1.0 + want.abs()),
            "{name}: {got} {want} of {case:?}"
        );
    };
    for (which, gradient) in [&gradients.dq, &gradients.dk, &gradients.dv].into_iter().enumerate() {
        for element in (0..gradient.len()).step_by(1 + gradient.len() / 12) {
            check(format!("input {which}, {element}"), gradient[element], &|by| {
                let mut moved = tensors.clone();
                moved[which][element] += by;
                loss(&dims, &moved)
            });
        }
    }
    if let Some(evaluator) = &dims.program {
        for (table, gradient) in gradients.tables.iter().enumerate() {
            let is_float = evaluator.program().tables()[table].element.is_float();
            for element in (0..gradient.len()).step_by(5).filter(|_| is_float) {
                check(format!("table {table}, {element}"), gradient[element], &|by| {
                    let mut tables = evaluator.tables().to_vec();
                    tables[table].values[element] += by;
                    let program = std::sync::Arc::new(evaluator.program().clone());
                    let moved = flash_attention::program::Evaluator::new(program, tables, None);
                    let dims = Dims {
                        program: Some(moved),
                        ..dims.clone()
                    };
                    loss(&dims, &tensors)
                });
            }
        }
    }
    assert!(5 * kinks <= checked, "{kinks} kinks of {checked}: {case:?}");
}
