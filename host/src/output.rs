//! Results of a call: [`Output`] of a forward pass, [`Gradients`] of a backward pass.

use crate::device::Device;
use crate::element::{Element, Scalar};
use crate::error::Error;
use crate::layout::TensorInfo;
use crate::plan::TableGradients;
use crate::problem::{Named, Outputs};
use crate::program::{Program, Table, TableSource};
use crate::tensor::Tensor;

/// Results of a forward pass.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Output<T: Element> {
    /// Attention output, `[batch, heads_q, seqlen_q, head_dim_v]`. It is 0 for a query that sees no key.
    pub out: Tensor<T>,
    /// Natural logarithm of the sum of exponentials of each query's scaled scores, f32 `[batch, heads_q, seqlen_q]`.
    /// It is minus infinity for a query that sees no key. The backward pass needs it. `out` and `lse` suffice to
    /// merge attention over two sets of keys.
    pub lse: Tensor<f32>,
    /// Both parts of lse, without the rounding error of their sum. With `None` a backward pass uses lse alone. The
    /// weights it recomputes then have a relative error of up to `|lse| * 2^-24`, and none is above 1.
    pub statistics: Option<Statistics>,
}

impl<T: Element> Output<T> {
    /// Makes the results of a forward pass from `out` and `lse`, for callers who kept these themselves.
    pub fn new(out: Tensor<T>, lse: Tensor<f32>) -> Self {
        Self {
            out,
            lse,
            statistics: None,
        }
    }

    /// New tensors with statistics: out of one shape, lse, row_max and row_sum of another. Their content is undefined.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or an error of the device's driver.
    pub(crate) fn empty(device: &Device, out: &[usize], rows: &[usize]) -> Result<Self, Error> {
        let of_rows = || Tensor::empty(device, rows);
        Ok(Self {
            out: Tensor::empty(device, out)?,
            lse: of_rows()?,
            statistics: Some(Statistics {
                row_max: of_rows()?,
                row_sum: of_rows()?,
            }),
        })
    }

    /// Describes all tensors, for a problem.
    pub(crate) fn outputs(&self) -> Outputs<'_> {
        Outputs {
            statistics: self.statistics.as_ref().map(Statistics::infos),
            ..Outputs::new(self.out.info(), self.lse.info())
        }
    }

    /// Descriptions of all tensors with their names.
    pub(crate) fn named(&self) -> Vec<Named<'_>> {
        let mut named = vec![("out", self.out.info()), ("lse", self.lse.info())];
        if let Some(Statistics { row_max, row_sum }) = &self.statistics {
            named.extend([("row_max", row_max.info()), ("row_sum", row_sum.info())]);
        }
        named
    }
}

/// Both parts of lse for each query: key j has the weight `exp(softmax_scale * (q.k_j - row_max)) / row_sum`.
///
/// lse is `softmax_scale * row_max + ln(row_sum)`, rounded to 24 bits. Where lse is large, few of these bits are left
/// for `row_sum`.
#[derive(Clone, Debug)]
pub struct Statistics {
    /// Largest product q.k, before scaling, of the key with the largest weight; contiguous `[batch, heads_q,
    /// seqlen_q]`. It is minus infinity for a query that sees no key.
    pub row_max: Tensor<f32>,
    /// Sum of the weights relative to the largest, contiguous `[batch, heads_q, seqlen_q]`. It is 0 for a query that
    /// sees no key.
    pub row_sum: Tensor<f32>,
}

impl Statistics {
    /// Descriptions of row_max and row_sum.
    pub(crate) fn infos(&self) -> [&TensorInfo; 2] {
        [self.row_max.info(), self.row_sum.info()]
    }
}

/// Results of a backward pass.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Gradients<T: Element> {
    /// Gradient of q, `[batch, heads_q, seqlen_q, head_dim]`. It is 0 for a query that sees no key.
    pub dq: Tensor<T>,
    /// Gradient of k, `[batch, heads_kv, seqlen_k, head_dim]`, summed over the query heads that share it.
    pub dk: Tensor<T>,
    /// Gradient of v, `[batch, heads_kv, seqlen_k, head_dim_v]`, summed over the query heads that share it.
    pub dv: Tensor<T>,
    /// Gradient of [`Attention::bias`](crate::Attention::bias), f32 with the shape of the bias, if
    /// [`Attention::table_gradients`](crate::Attention::table_gradients) asked for it. Broadcast axes are summed.
    pub bias: Option<Tensor<f32>>,
    /// Gradient of [`Attention::sinks`](crate::Attention::sinks), f32 `[heads_q]`, if table gradients were asked for.
    pub sinks: Option<Tensor<f32>>,
    /// Gradient of the slopes of [`Attention::alibi`](crate::Attention::alibi), f32 with the shape of the slopes, if
    /// table gradients were asked for.
    pub alibi_slopes: Option<Tensor<f32>>,
    /// Gradient of each table of floats.
    pub(crate) tables: Vec<(TableSource, Tensor<f32>)>,
}

impl<T: Element> Gradients<T> {
    /// Collects the caller's own tensors, for [`Attention::backward_into`](crate::Attention::backward_into).
    pub fn new(dq: Tensor<T>, dk: Tensor<T>, dv: Tensor<T>) -> Self {
        Self {
            dq,
            dk,
            dv,
            bias: None,
            sinks: None,
            alibi_slopes: None,
            tables: Vec::new(),
        }
    }

    /// Descriptions of dq, dk and dv with their names.
    pub(crate) fn named(&self) -> [Named<'_>; 3] {
        [("dq", self.dq.info()), ("dk", self.dk.info()), ("dv", self.dv.info())]
    }

    /// Returns the gradient of a table that the score program reads, f32 with the shape of the table, if
    /// [`Attention::table_gradients`](crate::Attention::table_gradients) asked for it. Tables of integers have no gradient.
    pub fn table<E: Scalar, const RANK: usize>(&self, table: &Table<E, RANK>) -> Option<&Tensor<f32>> {
        self.gradient_of(table.source())
    }

    /// The gradients of all float tables, in the order of [`Program::tables`](crate::program::Program::tables), that
    /// of the sinks last.
    pub fn tables(&self) -> impl Iterator<Item = &Tensor<f32>> {
        self.tables.iter().map(|(_, gradient)| gradient)
    }

    /// Gradient of a table as a program names it: [`table`](Self::table) for code that has no [`Table`].
    pub fn gradient_of(&self, source: &TableSource) -> Option<&Tensor<f32>> {
        let (_, gradient) = self.tables.iter().find(|(table, _)| table == source)?;
        Some(gradient)
    }

    /// Makes gradients of zeros for a program's tables. Each call allocates new memory, which no other argument can
    /// share.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or an error of the device's driver.
    pub(crate) fn make_tables(&mut self, program: &Program) -> Result<TableGradients, Error> {
        let device = self.dq.device().clone();
        self.tables.clear();
        let mut zeros = |table: &TableSource| -> Result<u64, Error> {
            let gradient = Tensor::zeros(&device, &table.shape)?;
            let address = gradient.address();
            self.tables.push((table.clone(), gradient));
            Ok(address)
        };
        let mut addresses = TableGradients::default();
        for (table, address) in program.tables().iter().zip(&mut addresses.tables) {
            if table.element.is_float() {
                *address = zeros(table)?;
            }
        }
        if let Some(sinks) = program.sinks() {
            addresses.sinks = zeros(sinks)?;
        }
        self.name_tables(program);
        Ok(addresses)
    }

    /// Sets the fields of the named features to their gradients.
    pub(crate) fn name_tables(&mut self, program: &Program) {
        let at = |place: Option<usize>| self.gradient_of(&program.tables()[place?]).cloned();
        let (bias, alibi_slopes) = (at(program.bias()), at(program.alibi_slopes()));
        self.sinks = program.sinks().and_then(|sinks| self.gradient_of(sinks)).cloned();
        (self.bias, self.alibi_slopes) = (bias, alibi_slopes);
    }
}
