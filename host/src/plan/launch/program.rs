//! The score program of a launch, and the module that a device loads with the program in it.

use std::sync::Arc;

#[cfg(any(feature = "cuda", feature = "emulator"))]
use flash_attention_kernels::entries::Dtype;

#[cfg(any(feature = "cuda", feature = "emulator"))]
use super::{Launch, Results, TableGradients};
use crate::error::Error;
use crate::problem::{BackwardProblem, Problem};
#[cfg(any(feature = "cuda", feature = "emulator"))]
use crate::program::{self, Gradients, NotSpliced, Slot};
use crate::program::{Code, Numbers, Program};

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

    /// The program of a problem as backward kernels take it.
    pub(super) fn backward(problem: &BackwardProblem) -> Result<Option<Self>, Error> {
        let (forward, table_gradients) = (problem.forward(), problem.table_gradients());
        let Some(program) = with_mask(forward) else {
            return Ok(None);
        };
        let code = Code::backward(&program, forward.softmax_scale(), table_gradients)?;
        Ok(Some(Self::new(forward, program, code)))
    }

    fn new(problem: &Problem, program: Arc<Program>, code: Code) -> Self {
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

    /// The factor of scores in the exponent to base 2.
    pub(super) fn scale_log2(&self) -> f32 {
        self.code.scale_log2(self.numbers.softmax_scale)
    }
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
}

#[cfg(any(feature = "cuda", feature = "emulator"))]
impl Launch {
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
            return Ok(ModuleText { ptx, slots: Vec::new() });
        };
        let spliced = program::splice(&ptx, &program.code, self.entry.dtype == Dtype::F32)?;
        Ok(ModuleText {
            ptx: spliced.text,
            slots: spliced.slots,
        })
    }

    /// The kernel's second parameter, which holds the numbers of its score program; empty if it has none.
    pub(crate) fn numbers(&self, slots: &[Slot], results: &Results) -> Vec<u8> {
        let tables = match results {
            Results::Forward { .. } => TableGradients::default(),
            Results::Backward { tables, .. } => *tables,
        };
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
