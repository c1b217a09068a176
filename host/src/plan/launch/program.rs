//! The score program of a launch, and the module that a device loads with the program in it.

use std::sync::Arc;

#[cfg(any(feature = "cuda", feature = "emulator"))]
use flash_attention_kernels::entries::Dtype;
use flash_attention_kernels::entries::Entry;
use flash_attention_kernels::work::SequenceRows;

use super::count;
use super::kept::Key;
use super::lists::{Listed, Owned, Sequence};
#[cfg(any(feature = "cuda", feature = "emulator"))]
use super::{Launch, Template};
use crate::error::Error;
use crate::plan::lists::{Owner, TileLists};
#[cfg(any(feature = "cuda", feature = "emulator"))]
use crate::plan::pass::PassType;
use crate::problem::{BackwardProblem, Problem};
#[cfg(any(feature = "cuda", feature = "emulator"))]
use crate::program::{self, Gradients, NodeId, NotSpliced, Slot};
use crate::program::{Code, MaskKey, Numbers, Program, Sizes};

/// A score program as a launch takes it.
#[derive(Clone, Debug)]
pub(super) struct ScoreProgram {
    code: Arc<Code>,
    numbers: Numbers,
}

impl ScoreProgram {
    /// The program of a problem, with its causal mask, as forward kernels for programs take it; `None` if it has none.
    pub(super) fn forward(problem: &Problem) -> Option<Self> {
        let program = with_mask(problem)?;
        let code = Code::new(&program, problem.softmax_scale());
        Some(Self::new(problem, program, code))
    }

    /// The program of [`forward`](Self::forward), or without one the program that leaves scores as they are.
    pub(super) fn forward_or_identity(problem: &Problem) -> Self {
        Self::forward(problem).unwrap_or_else(|| {
            let program = identity(problem);
            // Products come as they are; the kernel has the scale.
            let code = Code::new(&program, 1.0);
            Self::new(problem, program, code)
        })
    }

    /// The program of a problem, with its causal mask, as backward kernels for programs take it; without one, the program that leaves
    /// scores as they are.
    pub(super) fn backward(problem: &BackwardProblem) -> Result<Self, Error> {
        let (forward, table_gradients) = (problem.forward(), problem.table_gradients());
        // Without a program products come as they are; the kernel has the scale.
        let (program, scale) = match with_mask(forward) {
            Some(program) => (program, forward.softmax_scale()),
            None => (identity(forward), 1.0),
        };
        let code = Code::backward(&program, scale, table_gradients)?;
        Ok(Self::new(forward, program, code))
    }

    fn new(problem: &Problem, program: Arc<Program>, code: Code) -> Self {
        let code = match problem.placed() {
            Some(_) => code.of_sequences(),
            None => code,
        };
        Self {
            code: Arc::new(code),
            numbers: Numbers {
                program,
                softmax_scale: problem.softmax_scale(),
                seqlen_q: problem.seqlen_q(),
                seqlen_k: problem.seqlen_k(),
                heads_q_per_kv: (problem.heads_q() / problem.heads_kv()) as u32,
            },
        }
    }

    /// Tells if the program may hide pairs.
    pub(super) fn has_mask(&self) -> bool {
        self.numbers.program.mask().is_some()
    }

    /// Returns the lists of a launch whose blocks own tiles of the problem's queries or keys. Launches of equal masks and sizes share
    /// them for a time.
    ///
    /// # Errors
    /// [`Error::GridTooLarge`].
    pub(super) fn listed(&self, problem: &Problem, owner: Owner, entry: &Entry) -> Result<Listed, Error> {
        // Where there are no queries, not even a head of them, each key head has an empty one.
        let heads_kv = problem.heads_kv();
        let heads_q = problem.heads_q().max(heads_kv);
        let (tiles, heads, sharing) = match owner {
            Owner::Queries => ([entry.block_m, entry.block_n], heads_q, 1),
            Owner::Keys => ([entry.block_n, entry.block_m], heads_kv, heads_q / heads_kv),
        };
        let queries = |seqlen_q| if problem.has_queries() { seqlen_q } else { 0 };
        let sequences = match problem.placed() {
            Some(placed) => {
                let rows = placed.sequences.iter();
                let rows = rows.map(|rows| SequenceRows {
                    seqlen_q: queries(rows.seqlen_q),
                    ..*rows
                });
                rows.collect()
            }
            None => {
                let rows = (0..problem.batch()).map(|entry| SequenceRows {
                    q_entry: entry as u32,
                    q_begin: 0,
                    seqlen_q: queries(problem.seqlen_q()),
                    k_entry: entry as u32,
                    k_begin: 0,
                    seqlen_k: problem.seqlen_k(),
                });
                rows.collect()
            }
        };
        let key = Key {
            owner,
            tiles,
            owned: Owned {
                heads: count(heads)?.get(),
                sharing: count(sharing)?.get(),
                rows: tiles[0],
            },
            heads: [heads_q, heads_kv],
            is_placed: problem.placed().is_some(),
            sequences,
            mask: MaskKey::new(self.program()),
        };
        key.listed(|key| self.make_lists(key))
    }

    /// Makes the lists of a key with the program's mask.
    fn make_lists(&self, key: &Key) -> Result<Listed, Error> {
        let (program, [heads_q, heads_kv]) = (self.program(), key.heads);
        let sizes = |batch, rows: &SequenceRows| Sizes {
            batch,
            heads_q,
            heads_kv,
            seqlen_q: rows.seqlen_q as usize,
            seqlen_k: rows.seqlen_k as usize,
        };
        let sequences = key.sequences.iter().enumerate();
        if key.is_placed {
            let of_sequence = |(number, rows): (usize, &SequenceRows)| {
                TileLists::of_sequence(program, number, sizes(1, rows), key.owner, key.tiles)
            };
            let lists: Vec<TileLists> = sequences.map(of_sequence).collect();
            let sequences = key.sequences.iter().zip(&lists);
            let sequences = sequences.map(|(&rows, lists)| Sequence { rows, lists, entry: 0 });
            return Listed::new(&sequences.collect::<Vec<_>>(), key.owned);
        }
        let first = key.sequences.first().copied().unwrap_or_default();
        let sizes = sizes(key.sequences.len(), &first);
        let lists = TileLists::new(program, sizes, key.owner, key.tiles);
        let sequences = sequences.map(|(entry, &rows)| Sequence {
            rows,
            lists: &lists,
            entry,
        });
        Listed::new(&sequences.collect::<Vec<_>>(), key.owned)
    }

    /// The program, with the problem's causal mask.
    pub(super) fn program(&self) -> &Program {
        &self.numbers.program
    }

    /// The factor of scores in the exponent to base 2, of a problem with a program.
    pub(super) fn scale_log2(&self) -> f32 {
        self.code.scale_log2(self.numbers.softmax_scale)
    }
}

/// The program that leaves scores as they are, with the problem's causal mask.
fn identity(problem: &Problem) -> Arc<Program> {
    let identity = Program::identity();
    Arc::new(if problem.causal() {
        identity.with_causal_mask()
    } else {
        identity
    })
}

/// The program of a problem, with its causal mask.
fn with_mask(problem: &Problem) -> Option<Arc<Program>> {
    let program = problem.program()?;
    Some(if problem.causal() {
        Arc::new(program.with_causal_mask())
    } else {
        program.clone()
    })
}

/// A kernel as a device loads it: two launches of equal keys run one module.
#[cfg(any(feature = "cuda", feature = "emulator"))]
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct ModuleKey {
    entry: &'static str,
    code: Option<Arc<Code>>,
}

/// The text of a kernel.
#[cfg(any(feature = "cuda", feature = "emulator"))]
pub(crate) struct ModuleText {
    /// The module.
    pub ptx: String,
    /// Contents of the kernel's second parameter; empty if it has none.
    pub slots: Vec<Slot>,
    /// Lines of the text that are the program's, with the nodes that they work out.
    pub lines: Vec<(usize, Option<NodeId>)>,
}

#[cfg(any(feature = "cuda", feature = "emulator"))]
impl<P: PassType> Launch<P> {
    /// The key of the launch's module.
    pub(crate) fn module_key(&self) -> ModuleKey {
        ModuleKey {
            entry: self.entry.name,
            code: self.program.as_ref().map(|program| program.code.clone()),
        }
    }

    /// The launch's module, with its score program in it.
    ///
    /// # Errors
    /// [`NotSpliced`] if the kernel takes no program.
    pub(crate) fn module_text(&self) -> Result<ModuleText, NotSpliced> {
        let ptx = self.entry.ptx();
        let Some(program) = &self.program else {
            return Ok(ModuleText {
                ptx,
                slots: Vec::new(),
                lines: Vec::new(),
            });
        };
        let spliced = program::splice(&ptx, &program.code, self.entry.dtype == Dtype::F32)?;
        Ok(ModuleText {
            ptx: spliced.text,
            slots: spliced.slots,
            lines: spliced.lines,
        })
    }

    /// Describes a node of the launch's score program as a formula.
    #[cfg(feature = "emulator")]
    pub(crate) fn formula(&self, node: NodeId) -> Option<String> {
        let ScoreProgram { code, numbers } = self.program.as_ref()?;
        Some(numbers.program.formula(code.expression(), node))
    }

    /// The kernel's second parameter, which holds the numbers of its score program; empty if it has none.
    pub(crate) fn numbers(&self, slots: &[Slot], results: &P::Results) -> Vec<u8> {
        let tables = P::Parameters::tables(results);
        let gradients = Gradients {
            tables: &tables.tables,
            sinks: tables.sinks,
        };
        match &self.program {
            Some(program) => program.numbers.bytes(&program.code, slots, gradients),
            None => Vec::new(),
        }
    }
}
