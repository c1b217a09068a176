//! Named features that read tensors, and tables made of tensors.

use std::any::Any;
use std::sync::Arc;

use half::{bf16, f16};

use crate::device::Device;
use crate::element::{DataType, Element, F8E4M3, Scalar};
use crate::error::{Error, ProgramError};
use crate::options::Attention;
use crate::problem::Problem;
use crate::program::{
    BlockMask, Coverage, Evaluator, Fragment, HostTable, Index, Program, Score, Sizes, Table, TableSource,
};
use crate::tensor::{Storage, Tensor};

impl<T: Scalar, const RANK: usize> Table<T, RANK> {
    /// Makes a table over a tensor's memory, with any strides. The memory stays allocated as long as the table or a
    /// program that reads it.
    ///
    /// # Errors
    /// [`Error::Program`] if the tensor has another number of axes, or no elements.
    pub fn new(tensor: &Tensor<T>) -> Result<Self, Error> {
        if tensor.shape().len() != RANK || tensor.info().is_empty() {
            return Err(Error::Program(ProgramError::TableShape {
                argument: "table",
                shape: tensor.shape().to_vec(),
                expected: ["", "one axis", "two axes", "three axes", "four axes"][RANK],
            }));
        }
        Ok(Self::over(source("table", tensor)))
    }
}

impl Attention {
    /// ALiBi, attention with linear biases (Press et al., 2021): scores become `score - slope[head] * abs(p - key)`.
    /// Slopes are `[heads]` or `[batch, heads]`.
    #[must_use]
    pub fn alibi(self, slopes: &Tensor<f32>) -> Self {
        let fragment = match named("alibi_slopes", slopes, &[1, 2], "[heads] or [batch, heads]") {
            Err(error) => Fragment::refused(error),
            Ok(source) if source.shape.len() == 1 => {
                let slopes = Table::<f32, 1>::over(source);
                Fragment::score(|s, at| s - slopes.at(at.head) * at.distance().abs())
            }
            Ok(source) => {
                let slopes = Table::<f32, 2>::over(source);
                Fragment::score(|s, at| s - slopes.at(at.batch, at.head) * at.distance().abs())
            }
        };
        self.with(|parts| parts.alibi = Some(fragment))
    }

    /// Bias: scores become `score + bias[batch, head, query, key]`. Each axis of the bias has the size of the scores'
    /// axis, or size 1 and is broadcast. Elements are of any float type.
    #[must_use]
    pub fn bias<T: Element>(self, bias: &Tensor<T>) -> Self {
        let fragment = match named(
            "bias",
            bias,
            &[4],
            "[batch, heads, seqlen_q, seqlen_k], each of them or 1",
        ) {
            Err(error) => Fragment::refused(error),
            Ok(source) => {
                let repeats: Vec<bool> = source.shape.iter().map(|&size| size == 1).collect();
                Fragment::score(|s, at| {
                    let along = |axis: usize, index| if repeats[axis] { at.first() } else { index };
                    let [b, h, q, k] = [at.batch, at.head, at.query, at.key];
                    s + Score::load(&source, &[along(0, b), along(1, h), along(2, q), along(3, k)], false)
                })
            }
        };
        self.with(|parts| parts.bias = Some(fragment))
    }

    /// Sinks: one logit for each query head, f32 `[heads]`, that takes part in the softmax without a value. The
    /// weights of a row then sum to less than 1, and lse includes the sink. From gpt-oss (2025); a fixed 0 is the
    /// softmax-off-by-one of Miller (2023).
    #[must_use]
    pub fn sinks(self, sinks: &Tensor<f32>) -> Self {
        match named("sinks", sinks, &[1], "[heads]") {
            Err(error) => self.with(|parts| parts.masks.push(Fragment::refused(error))),
            Ok(source) => self.with(|parts| parts.sinks = Some(source)),
        }
    }

    /// Document mask: a query sees the keys with its own document number. Numbers are `[batch, seqlen_q]` and
    /// `[batch, seqlen_k]`, or `[1, …]` for all sequences.
    #[must_use]
    pub fn documents(self, q: &Tensor<i32>, k: &Tensor<i32>) -> Self {
        let table = |name, tensor, expected| Ok((named(name, tensor, &[2], expected)?, tensor.shape()[0] == 1));
        let tables = table("documents_q", q, "[batch, seqlen_q] or [1, seqlen_q]")
            .and_then(|q| Ok((q, table("documents_k", k, "[batch, seqlen_k] or [1, seqlen_k]")?)));
        let fragment = match tables {
            Err(error) => Fragment::refused(error),
            Ok(((q, q_repeats), (k, k_repeats))) => Fragment::mask(|at| {
                let batch = |repeats| if repeats { at.first() } else { at.batch };
                let of_query = Index::load(&q, &[batch(q_repeats), at.query], false);
                of_query.equals(Index::load(&k, &[batch(k_repeats), at.key], false))
            }),
        };
        self.with(|parts| parts.masks.push(fragment))
    }

    /// Hides the pairs of tiles that a [`BlockMask`] leaves empty: block-sparse attention, as in FlashAttention (Dao et al., 2022).
    /// The tiles become a table on `device`, which q is on.
    ///
    /// # Errors
    /// The errors of [`Tensor::from_slice`].
    pub fn block_mask(self, blocks: &BlockMask, device: &Device) -> Result<Self, Error> {
        let ([batch, heads], [rows, columns]) = (blocks.batch_and_heads(), blocks.counts());
        let visible: Vec<i32> = blocks
            .tiles()
            .iter()
            .map(|&tile| i32::from(tile != Coverage::Empty))
            .collect();
        let shape = [batch, heads, rows, columns];
        let mut table = source("block_mask", &Tensor::from_slice(device, shape, &visible)?);
        table.content = Some(Arc::new(HostTable {
            shape: shape.to_vec(),
            values: visible.into_iter().map(f64::from).collect(),
        }));
        let size = |positions: usize| i32::try_from(positions).unwrap_or(i32::MAX);
        let [block_m, block_n] = blocks.block().map(size);
        let fragment = Fragment::mask(|at| {
            let batch = if batch == 1 { at.first() } else { at.batch };
            let head = if heads == 1 { at.first() } else { at.head };
            Index::load(&table, &[batch, head, at.query / block_m, at.key / block_n], false).differs_from(0)
        });
        Ok(self.with(|parts| parts.masks.push(fragment)))
    }

    /// Finds the tiles of 64 queries and 64 keys that the mask leaves empty, cuts, or fills, causal masks included.
    ///
    /// ```
    /// # use flash_attention::{Attention, Device, Tensor};
    /// let q = Tensor::from_slice(&Device::cpu(), [1, 1, 512, 8], &[0.5_f32; 512 * 8])?;
    /// let blocks = Attention::new().window(64, 0).blocks(&q, &q)?;
    /// println!("{blocks}"); // a picture
    /// assert!(blocks.density() < 0.25);
    /// # Ok::<(), flash_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// The errors of [`Problem::new`] for q and k, and those of reading tables.
    pub fn blocks<T: Element>(&self, q: &Tensor<T>, k: &Tensor<T>) -> Result<BlockMask, Error> {
        self.blocks_of(q, k, [64, 64])
    }

    /// [`blocks`](Self::blocks) in tiles of other sizes, queries and keys.
    ///
    /// # Errors
    /// The errors of [`blocks`](Self::blocks), and [`Error::Program`] if a size is 0.
    pub fn blocks_of<T: Element>(&self, q: &Tensor<T>, k: &Tensor<T>, block: [usize; 2]) -> Result<BlockMask, Error> {
        let problem = Problem::new(self, q.info(), k.info(), k.info(), None)?;
        let evaluator = self.evaluator()?;
        let (mut program, tables) = match &evaluator {
            Some(evaluator) => (evaluator.program().clone(), evaluator.tables()),
            None => (Program::identity(), &[][..]),
        };
        if self.is_causal() {
            program = program.with_causal_mask();
        }
        let sizes = Sizes {
            batch: problem.batch(),
            heads_q: problem.heads_q(),
            heads_kv: problem.heads_kv(),
            seqlen_q: problem.seqlen_q() as usize,
            seqlen_k: problem.seqlen_k() as usize,
        };
        BlockMask::of(&program, tables, sizes, block)
    }

    /// The program with what its tables hold, copied to the host, for the [oracle](crate::reference); `None` without a
    /// program. Waits for the work that produces the tables.
    ///
    /// # Errors
    /// [`Error::Program`] if the program is refused, or what [`Tensor::to_vec`] says.
    pub fn evaluator(&self) -> Result<Option<Evaluator>, Error> {
        let Some(program) = self.program()? else {
            return Ok(None);
        };
        let tables = program.tables().iter().map(contents).collect::<Result<_, _>>()?;
        let sinks = program.sinks().map(contents).transpose()?;
        Ok(Some(Evaluator::new(
            program.clone(),
            tables,
            sinks.map(|sinks| sinks.values),
        )))
    }
}

/// Describes a table over a tensor's memory.
fn source<T: Scalar>(name: &'static str, tensor: &Tensor<T>) -> TableSource {
    let owner: Arc<dyn Any + Send + Sync> = tensor.owner();
    TableSource::new(name, tensor.info(), owner)
}

/// Describes a table of a named feature, which allows certain numbers of axes.
fn named<T: Scalar>(
    argument: &'static str,
    tensor: &Tensor<T>,
    ranks: &[usize],
    expected: &'static str,
) -> Result<TableSource, ProgramError> {
    if ranks.contains(&tensor.shape().len()) && !tensor.info().is_empty() {
        return Ok(source(argument, tensor));
    }
    Err(ProgramError::TableShape {
        argument,
        shape: tensor.shape().to_vec(),
        expected,
    })
}

/// Returns the memory that a table keeps alive.
pub(crate) fn storage(table: &TableSource) -> &Storage {
    table.owner.downcast_ref().expect("tables are made of tensors")
}

/// Copies a table's elements, in order.
fn contents(table: &TableSource) -> Result<HostTable, Error> {
    fn elements<T: Scalar>(table: &TableSource) -> Result<Vec<T>, Error> {
        let owner = table
            .owner
            .clone()
            .downcast::<Storage>()
            .expect("tables are made of tensors");
        Tensor::<T>::seen_through(table.info(), owner).to_vec()
    }
    let values = match table.element {
        DataType::F32 => elements::<f32>(table)?.into_iter().map(f64::from).collect(),
        DataType::F16 => elements::<f16>(table)?.into_iter().map(f64::from).collect(),
        DataType::Bf16 => elements::<bf16>(table)?.into_iter().map(f64::from).collect(),
        DataType::F8E4M3 => elements::<F8E4M3>(table)?.into_iter().map(f64::from).collect(),
        DataType::I32 => elements::<i32>(table)?.into_iter().map(f64::from).collect(),
        DataType::U32 => elements::<u32>(table)?.into_iter().map(f64::from).collect(),
    };
    let shape = table.shape.clone();
    Ok(HostTable { shape, values })
}
