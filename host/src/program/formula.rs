//! [`Program::formula`]: a node as a formula, for messages.

use super::{Binary, Comparison, Constant, Coordinate, Expression, Node, NodeId, Program, Unary};

/// Operations inside one another that a formula shows; deeper ones are dots.
const DEPTH: usize = 5;

impl Program {
    /// Writes a node of `expression`, which is the program's or extends it with derivatives, with the names of tables and the values of
    /// parameters: `bias[0, head, query, key]`.
    pub(crate) fn formula(&self, expression: &Expression, node: NodeId) -> String {
        self.written(expression, node, DEPTH)
    }

    fn written(&self, expression: &Expression, node: NodeId, depth: usize) -> String {
        let node = expression.node(node);
        if depth == 0 && node.operands().next().is_some() {
            return "...".to_owned();
        }
        let of = |node| self.written(expression, node, depth - 1);
        match node {
            Node::Score => "s".to_owned(),
            Node::Coordinate(which) => coordinate(which).to_owned(),
            Node::Real(bits) => f32::from_bits(bits).to_string(),
            Node::Integer(value) => value.to_string(),
            Node::Truth(value) => value.to_string(),
            Node::Parameter(place, _) => match self.constants()[place as usize] {
                Constant::Score(value) => value.to_string(),
                Constant::Index(value) => value.to_string(),
            },
            Node::Unary(operation, x) => unary(operation, &of(x)),
            Node::Binary(operation, x, y) => match operation {
                Binary::Min => format!("min({}, {})", of(x), of(y)),
                Binary::Max => format!("max({}, {})", of(x), of(y)),
                _ => format!("({} {} {})", of(x), infix(operation), of(y)),
            },
            Node::Compare(comparison, x, y) => {
                let sign = match comparison {
                    Comparison::Less => "<",
                    Comparison::LessOrEqual => "<=",
                    Comparison::Equal => "==",
                };
                format!("({} {sign} {})", of(x), of(y))
            }
            Node::Select(condition, x, y) => format!("select({}, {}, {})", of(condition), of(x), of(y)),
            Node::Load { table, indices, .. } => {
                let indices: Vec<String> = indices.iter().map(|&index| of(index)).collect();
                format!("{}[{}]", self.tables()[table as usize].name, indices.join(", "))
            }
        }
    }
}

fn coordinate(which: Coordinate) -> &'static str {
    match which {
        Coordinate::Batch => "batch",
        Coordinate::Head => "head",
        Coordinate::KvHead => "kv_head",
        Coordinate::Query => "query",
        Coordinate::Key => "key",
        Coordinate::SeqlenQ => "seqlen_q",
        Coordinate::SeqlenK => "seqlen_k",
    }
}

fn unary(operation: Unary, x: &str) -> String {
    let function = match operation {
        Unary::Negate => return format!("-{x}"),
        Unary::Not => return format!("!{x}"),
        // The type is seen from what is done with it.
        Unary::ToScore => return x.to_owned(),
        Unary::Abs => "abs",
        Unary::Exp => "exp",
        Unary::Log => "log",
        Unary::Tanh => "tanh",
        Unary::Sqrt => "sqrt",
        Unary::Reciprocal => "reciprocal",
        Unary::Floor => "floor",
        Unary::ToIndex => "to_index",
    };
    format!("{function}({x})")
}

fn infix(operation: Binary) -> &'static str {
    match operation {
        Binary::Add => "+",
        Binary::Subtract => "-",
        Binary::Multiply => "*",
        Binary::Divide => "/",
        Binary::Remainder => "%",
        Binary::And => "&",
        Binary::Or => "|",
        Binary::Xor => "^",
        Binary::ShiftLeft => "<<",
        Binary::ShiftRight => ">>",
        Binary::Min | Binary::Max => unreachable!("functions of two values"),
    }
}

#[cfg(test)]
mod tests {
    use crate::device::Device;
    use crate::options::Attention;
    use crate::tensor::Tensor;

    #[test]
    fn formulas_name_tables_and_numbers() {
        let bias = Tensor::from_slice(&Device::cpu(), [1, 2, 1, 3], &[0.0_f32; 6]).expect("small");
        let attention = Attention::new()
            .bias(&bias)
            .score(|s, at| at.key.less_than(3).select((-s).exp(), s.max(0.5) * (at.key - at.query)));
        let formula = |attention: &Attention| {
            let program = attention.program().expect("valid").expect("a program").clone();
            program.formula(program.expression(), program.score())
        };
        assert_eq!(
            formula(&attention),
            "select((key < 3), exp(-(s + bias[0, head, 0, key])), (max((s + bias[0, head, 0, key]), 0.5) * (key - query)))"
        );
        assert_eq!(
            formula(&attention.score(|s, _| s.abs())),
            "abs(select((key < 3), exp(-(s + ...)), (max((s + ...), 0.5) * (key - query))))"
        );
    }
}
