//! [`Fragment`], what one closure gives, and how fragments become a [`Program`].

use std::sync::Arc;

use super::{Binary, Constant, Dropout, Expression, Node, NodeId, Program, ProgramError, TableSource, Type};

/// Most operations of a program, of a closure before what its result does not need is left out.
pub const MAX_NODES: usize = 4096;

/// Most numbers that a program has as parameters.
pub const MAX_CONSTANTS: usize = 256;

/// Most tables that a program reads, its sinks not counted.
pub const MAX_TABLES: usize = 16;

/// The operations of one closure, with the values of its parameters and its tables.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fragment {
    expression: Expression,
    constants: Vec<Constant>,
    tables: Vec<TableSource>,
    root: Option<NodeId>,
    /// The first thing that was wrong.
    error: Option<ProgramError>,
}

impl Fragment {
    /// A fragment that lets the program it becomes part of be refused.
    pub(crate) fn refused(error: ProgramError) -> Self {
        Self {
            error: Some(error),
            ..Self::default()
        }
    }

    pub(super) fn add(&mut self, node: Node) -> NodeId {
        if self.expression.nodes().len() >= MAX_NODES {
            self.refuse(ProgramError::TooLarge {
                what: "operations",
                limit: MAX_NODES,
            });
            return NodeId::default(); // any: the program is refused
        }
        self.expression.add(node)
    }

    pub(super) fn type_of(&self, node: NodeId) -> Type {
        self.expression.type_of(node)
    }

    /// A place for a number.
    pub(super) fn parameter(&mut self, value: Constant) -> u32 {
        self.constants.push(value);
        self.constants.len() as u32 - 1
    }

    /// The place of a table, which is added if it is not there.
    pub(super) fn table(&mut self, source: &TableSource) -> u32 {
        place_of(source, &mut self.tables, &mut self.expression)
    }

    pub(super) fn refuse(&mut self, error: ProgramError) {
        self.error.get_or_insert(error);
    }

    pub(super) fn finish(mut self, root: NodeId) -> Self {
        self.root = Some(root);
        self
    }
}

/// Features that a program is made of. They do not depend on the order of the calls, except for the order of closures.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Parts {
    pub(crate) softcap: Option<Fragment>,
    pub(crate) bias: Option<Fragment>,
    pub(crate) alibi: Option<Fragment>,
    pub(crate) scores: Vec<Fragment>,
    pub(crate) masks: Vec<Fragment>,
    pub(crate) sinks: Option<TableSource>,
    pub(crate) dropout: Option<Dropout>,
}

impl Parts {
    /// The program that the parts make; `None` of no parts.
    ///
    /// The order is fixed: softcap, bias, ALiBi, then the closures of scores one after the other, each from what the
    /// one before gave. A pair is visible if all masks say so.
    pub(crate) fn compose(&self) -> Result<Option<Arc<Program>>, ProgramError> {
        if *self == Self::default() {
            return Ok(None);
        }
        let mut composer = Composer::default();
        let mut score = composer.expression.add(Node::Score);
        let named = [&self.softcap, &self.bias, &self.alibi];
        for fragment in named.into_iter().flatten().chain(&self.scores) {
            score = composer.append(fragment, score)?;
        }
        let mut mask = None;
        for fragment in &self.masks {
            let visible = composer.append(fragment, score)?;
            mask = Some(match mask {
                Some(others) => composer.expression.add(Node::Binary(Binary::And, others, visible)),
                None => visible,
            });
        }
        let Composer {
            expression,
            constants,
            tables,
        } = composer;
        let sizes = [
            ("operations", expression.nodes().len(), MAX_NODES),
            ("numbers", constants.len(), MAX_CONSTANTS),
            ("tables", tables.len(), MAX_TABLES),
        ];
        if let Some(&(what, _, limit)) = sizes.iter().find(|(_, size, limit)| size > limit) {
            return Err(ProgramError::TooLarge { what, limit });
        }
        let place = |fragment: &Option<Fragment>| {
            let table = fragment.as_ref().and_then(|fragment| fragment.tables.first())?;
            tables.iter().position(|other| other == table)
        };
        let [bias, alibi_slopes] = [place(&self.bias), place(&self.alibi)];
        Ok(Some(Arc::new(Program {
            expression,
            score,
            mask,
            constants,
            tables,
            bias,
            alibi_slopes,
            sinks: self.sinks.clone(),
            dropout: self.dropout,
        })))
    }
}

/// A program that is being put together.
#[derive(Default)]
struct Composer {
    expression: Expression,
    constants: Vec<Constant>,
    tables: Vec<TableSource>,
}

impl Composer {
    /// Adds what a fragment's result needs, with `score` in place of the score that comes in; the result.
    fn append(&mut self, fragment: &Fragment, score: NodeId) -> Result<NodeId, ProgramError> {
        if let Some(error) = &fragment.error {
            return Err(error.clone());
        }
        let root = fragment.root.expect("a fragment without an error has ended");
        let needed = fragment.expression.needed([root]);
        let mut places = vec![score; needed.len()];
        for (id, node) in fragment.expression.iter().filter(|(id, _)| needed[id.index()]) {
            let node = match node.map(|operand| places[operand.index()]) {
                Node::Score => continue, // its place holds `score`
                Node::Parameter(slot, type_) => {
                    self.constants.push(fragment.constants[slot as usize]);
                    Node::Parameter(self.constants.len() as u32 - 1, type_)
                }
                Node::Load {
                    table,
                    indices,
                    clamped,
                } => Node::Load {
                    table: place_of(&fragment.tables[table as usize], &mut self.tables, &mut self.expression),
                    indices,
                    clamped,
                },
                node => node,
            };
            places[id.index()] = self.expression.add(node);
        }
        Ok(places[root.index()])
    }
}

/// The place of a table, which is added if it is not there.
fn place_of(source: &TableSource, tables: &mut Vec<TableSource>, expression: &mut Expression) -> u32 {
    if let Some(place) = tables.iter().position(|table| table == source) {
        return place as u32;
    }
    tables.push(source.clone());
    expression.add_table(source.table_type())
}
