//! Gradients: of the score that comes in, of tables, and of sinks.

use crate::program::scope::{Class, Scope};
use crate::program::text::{Memory, Slot};
use crate::program::{LoadDerivative, Node, NodeId};

use super::kept::Kept;
use super::{Point, Printer, real};

impl Printer<'_> {
    /// The gradient of the score that comes in, from that of the one that comes out.
    pub(super) fn print_gradient(&mut self, point: Point<'_>, scope: &mut Scope) {
        if let Some(derivative) = self.code.derivative
            && let Some(gradient) = self.pull_back(derivative, point, scope)
        {
            scope.put(format!("mov.f32 {}, {gradient};", point.product));
        }
    }

    /// The gradient of a pair's score times a derivative; `None` if that is 1. Where the gradient is 0, so is the product: the
    /// derivative at a hidden pair may be anything.
    fn pull_back(&mut self, derivative: NodeId, point: Point<'_>, scope: &mut Scope) -> Option<String> {
        if self.code.expression.node(derivative) == Node::Real(1.0_f32.to_bits()) {
            return None;
        }
        let gradient = point.product;
        let derivative = if self.is_of_score(derivative) {
            self.keep(Kept::Pair(derivative, point.row, point.column))
        } else {
            self.value(derivative, point, scope)
        };
        let is_zero = scope.result(Class::Predicate, "setp.eq.f32", &[gradient, &real(0.0)]);
        let product = scope.result(Class::B32, "mul.rn.f32", &[gradient, &derivative]);
        Some(scope.result(Class::B32, "selp.f32", &[gradient, &product, &is_zero]))
    }

    /// Adds what a pair adds to the gradients of tables to the `sums` of a marker, one for each address.
    pub(super) fn sum_table_gradients(
        &mut self,
        point: Point<'_>,
        sums: &mut Vec<(String, String, NodeId)>,
        scope: &mut Scope,
    ) {
        let code = self.code;
        for &LoadDerivative { load, derivative } in &code.loads {
            let part = self.pull_back(derivative, point, scope);
            let part = part.unwrap_or_else(|| point.product.to_owned());
            // A query past the last one may have any value, so its part is replaced by 0.
            let exists = self.keep(Kept::Exists(point.row));
            let part = scope.result(Class::B32, "selp.f32", &[&part, &real(0.0), &exists]);
            let address = self.address(load, Memory::Gradient, point, scope);
            match sums.iter_mut().find(|(known, ..)| *known == address) {
                Some((_, sum, _)) => *sum = scope.result(Class::B32, "add.rn.f32", &[sum, &part]),
                None => sums.push((address, part, load)),
            }
        }
    }

    /// Adds a marker's sums to the gradients of tables.
    pub(super) fn add_table_gradients(&mut self, sums: Vec<(String, String, NodeId)>, scope: &mut Scope) {
        for (address, sum, load) in sums {
            scope.node = Some(load);
            let is_some = scope.result(Class::Predicate, "setp.neu.f32", &[&sum, &real(0.0)]);
            scope.put(format!("@{is_some} red.global.add.f32 [{address}], {sum};"));
            scope.node = None;
        }
    }

    /// Adds a query's part to the gradient of its head's sink, `-exp(sink - lse) * delta`.
    pub(super) fn print_sink_gradient(&mut self, [head, lse, delta]: [&str; 3], scope: &mut Scope) {
        let sink = self.load_sink(head, scope);
        let is_none = scope.result(Class::Predicate, "setp.eq.f32", &[&sink, &real(f32::NEG_INFINITY)]);
        let exponent = scope.result(Class::B32, "sub.rn.f32", &[&sink, lse]);
        let weight = self.exp(&exponent, scope);
        let weight = scope.result(Class::B32, "selp.f32", &[&real(0.0), &weight, &is_none]);
        let weight = scope.result(Class::B32, "neg.f32", &[&weight]);
        let part = scope.result(Class::B32, "mul.rn.f32", &[&weight, delta]);
        let gradients = self.slot(Slot::SinksGradient, Class::B64, scope);
        let address = scope.result(Class::B64, "mad.wide.u32", &[head, "4", &gradients]);
        scope.put(format!("red.global.add.f32 [{address}], {part};"));
    }

    /// Reads the logit of a head's sink.
    pub(super) fn load_sink(&mut self, head: &str, scope: &mut Scope) -> String {
        let address = self.slot(Slot::SinksAddress, Class::B64, scope);
        let stride = self.slot(Slot::SinksStride, Class::B32, scope);
        let address = scope.result(Class::B64, "mad.wide.u32", &[head, &stride, &address]);
        scope.result(Class::B32, "ld.global.nc.b32", &[&format!("[{address}]")])
    }
}
