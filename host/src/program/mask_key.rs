//! [`MaskKey`]: what the tiles that a mask leaves depend on.

use std::sync::Arc;

use super::evaluate::HostTable;
use super::{Node, NodeId, Program};

/// Operations, numbers and known tables of a program's mask. Programs of equal keys leave the same tiles for the same sizes, whatever
/// else they do to scores.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct MaskKey {
    nodes: Vec<(NodeId, Node)>,
    /// Bits of each parameter that a node reads, in the order of the nodes.
    numbers: Vec<u32>,
    /// Content of each table that a node reads, in the order of the nodes.
    tables: Vec<Content>,
}

/// Content of a table; `None` where it is unknown.
#[derive(Clone, Debug)]
struct Content(Option<Arc<HostTable>>);

impl MaskKey {
    /// Takes the mask of a program. The key does not keep the memory of tables alive.
    pub fn new(program: &Program) -> Self {
        let needed = program.expression.needed(program.mask);
        let nodes = program.expression.iter().filter(|(id, _)| needed[id.index()]);
        let nodes: Vec<(NodeId, Node)> = nodes.collect();
        let of_nodes = || nodes.iter().map(|(_, node)| *node);
        let numbers = of_nodes().filter_map(|node| match node {
            Node::Parameter(place, _) => Some(program.constants[place as usize].to_bits()),
            _ => None,
        });
        let tables = of_nodes().filter_map(|node| match node {
            Node::Load { table, .. } => Some(Content(program.tables[table as usize].content.clone())),
            _ => None,
        });
        Self {
            numbers: numbers.collect(),
            tables: tables.collect(),
            nodes,
        }
    }

    /// Returns the bytes of the tables that the key keeps.
    pub fn bytes(&self) -> usize {
        let known = self.tables.iter().filter_map(|table| table.0.as_deref());
        known.map(|table| size_of_val(&table.values[..])).sum()
    }
}

/// Compares sizes and the bits of elements, unless it is the same table.
impl PartialEq for Content {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (Some(one), Some(other)) => {
                let bits = |table: &HostTable| table.values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                Arc::ptr_eq(one, other) || one.shape == other.shape && bits(one) == bits(other)
            }
            (None, None) => true,
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Device;
    use crate::options::Attention;
    use crate::program::BlockMask;

    fn key(attention: Attention) -> MaskKey {
        MaskKey::new(attention.program().expect("a valid program").expect("a program"))
    }

    #[test]
    fn a_key_has_the_numbers_of_the_mask_and_no_others() {
        let window = |left, cap, seed| key(Attention::new().window(left, 0).softcap(cap).dropout(0.1, seed));
        assert_eq!(window(5, 2.0, 1), window(5, 3.0, 2));
        assert_ne!(window(5, 2.0, 1), window(6, 2.0, 1));
        assert_ne!(window(5, 2.0, 1), key(Attention::new().softcap(2.0).prefix(5)));
    }

    #[test]
    fn a_key_has_the_content_of_a_block_mask() {
        let device = Device::cpu();
        let of = |visible: [bool; 4]| {
            let blocks = BlockMask::from_dense([1, 1], [64, 64], [32, 32], &visible).expect("four tiles");
            key(Attention::new().block_mask(&blocks, &device).expect("a small table"))
        };
        assert_eq!(of([true, false, true, true]), of([true, false, true, true]));
        assert_ne!(of([true, false, true, true]), of([true, true, true, true]));
        assert_eq!(of([true; 4]).bytes(), 4 * 8);
    }
}
