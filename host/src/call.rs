//! The calls: plans are made and run here, for an [`Attention`] and for one that reports.

use std::sync::{RwLockReadGuard, RwLockWriteGuard};

use crate::attention::{Gradients, Output, Statistics};
use crate::plan::Results;
use crate::problem::{BackwardInputs, GradientOutputs, Outputs};
use crate::progress::{Progress, Reporter};
use crate::tensor::Storage;
use crate::{Attention, BackwardProblem, Element, Error, Plan, Problem, Tensor};

/// An [`Attention`] whose calls report how far they are: what [`Attention::on_progress`] gives.
#[derive(Clone, Copy, Debug)]
pub struct Reporting<F> {
    attention: Attention,
    /// Who is told, if anybody.
    report: Option<F>,
}

impl Attention {
    /// The same attention, whose calls tell `report` how far they are.
    ///
    /// ```
    /// # use flash_attention::{Attention, Device, Tensor};
    /// # let q = Tensor::from_slice(&Device::cpu(), [1, 1, 64, 8], &[0.5_f32; 512])?;
    /// # let (k, v) = (q.clone(), q.clone());
    /// let attention = Attention::new().on_progress(|progress| {
    ///     eprint!("\r{:3.0} %", 100.0 * progress.fraction());
    /// });
    /// let output = attention.forward(&q, &k, &v)?;
    /// # Ok::<(), flash_attention::Error>(())
    /// ```
    ///
    /// The CPU and the emulator report; a GPU, where a call returns as soon as its work is launched, does not. A call that
    /// succeeds reports at least once. `done` grows from one report to the next, a hundred times a second at most, and is
    /// `total` in the last one and in no other, which comes when the results are there. A call that fails may report, but
    /// never that it has ended.
    ///
    /// `report` runs on whichever thread has finished something, never on two at a time for one call; the other threads do
    /// not wait for it. Until the last report it must not read or write the results, which are locked. Where it
    /// panics, the call first does all of its work without further reports; then the panic goes on from the thread that called.
    /// Results are the same bits with and without reports.
    pub fn on_progress<F: Fn(Progress) + Sync>(self, report: F) -> Reporting<F> {
        Reporting {
            attention: self,
            report: Some(report),
        }
    }

    /// The same attention, which tells nobody.
    pub(crate) fn silent(self) -> Reporting<fn(Progress)> {
        Reporting {
            attention: self,
            report: None,
        }
    }
}

impl<F: Fn(Progress) + Sync> Reporting<F> {
    /// [`Attention::forward`].
    ///
    /// # Errors
    /// As there.
    pub fn forward<T: Element>(&self, q: &Tensor<T>, k: &Tensor<T>, v: &Tensor<T>) -> Result<Output<T>, Error> {
        let plan = self.attention.plan(q, k, v)?;
        let mut out = Tensor::empty(q.device(), q.shape())?;
        let mut lse = Tensor::empty(q.device(), &q.shape()[..3])?;
        let new = || Tensor::empty(q.device(), &q.shape()[..3]);
        let mut statistics = match plan.writes_statistics() {
            true => Some(Statistics {
                row_max: new()?,
                row_sum: new()?,
            }),
            false => None,
        };
        forward(
            &plan,
            [q, k, v],
            &mut out,
            &mut lse,
            statistics.as_mut(),
            self.reporter(),
        )?;
        Ok(Output { out, lse, statistics })
    }

    /// [`Attention::forward_into`].
    ///
    /// # Errors
    /// As there.
    pub fn forward_into<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        out: &mut Tensor<T>,
        lse: &mut Tensor<f32>,
    ) -> Result<(), Error> {
        let outputs = Outputs {
            out: out.info(),
            lse: lse.info(),
            statistics: None,
        };
        let problem = Problem::new(&self.attention, q.info(), k.info(), v.info(), Some(outputs))?;
        let plan = Plan::new(&problem, &q.device().info())?;
        forward(&plan, [q, k, v], out, lse, None, self.reporter())
    }

    /// [`Attention::backward`].
    ///
    /// # Errors
    /// As there.
    pub fn backward<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &Output<T>,
        dout: &Tensor<T>,
    ) -> Result<Gradients<T>, Error> {
        let plan = self.attention.plan_backward(q, k, v, output, dout)?;
        check_lse(&output.lse)?;
        let mut gradients = Gradients {
            dq: Tensor::empty(q.device(), q.shape())?,
            dk: Tensor::empty(k.device(), k.shape())?,
            dv: Tensor::empty(v.device(), v.shape())?,
        };
        let inputs = [q, k, v, &output.out, dout];
        backward(&plan, inputs, output, &mut gradients, self.reporter())?;
        Ok(gradients)
    }

    /// [`Attention::backward_into`].
    ///
    /// # Errors
    /// As there.
    pub fn backward_into<T: Element>(
        &self,
        q: &Tensor<T>,
        k: &Tensor<T>,
        v: &Tensor<T>,
        output: &Output<T>,
        dout: &Tensor<T>,
        gradients: &mut Gradients<T>,
    ) -> Result<(), Error> {
        let outputs = GradientOutputs {
            dq: gradients.dq.info(),
            dk: gradients.dk.info(),
            dv: gradients.dv.info(),
        };
        let above = above(output, dout);
        let problem = BackwardProblem::new(&self.attention, q.info(), k.info(), v.info(), above, Some(outputs))?;
        let plan = Plan::backward(&problem, &q.device().info())?;
        check_lse(&output.lse)?;
        let inputs = [q, k, v, &output.out, dout];
        backward(&plan, inputs, output, gradients, self.reporter())
    }

    fn reporter(&self) -> Reporter<'_> {
        self.report
            .as_ref()
            .map_or_else(Reporter::silent, |report| Reporter::new(report))
    }
}

/// What a backward pass takes beside q, k and v.
pub(crate) fn above<'a, T: Element>(output: &'a Output<T>, dout: &'a Tensor<T>) -> BackwardInputs<'a> {
    BackwardInputs {
        out: output.out.info(),
        lse: output.lse.info(),
        statistics: (output.statistics.as_ref())
            .map(|Statistics { row_max, row_sum }| [row_max.info(), row_sum.info()]),
        dout: dout.info(),
    }
}

/// In debug builds, refuses an lse that no forward pass over finite numbers gives.
fn check_lse(lse: &Tensor<f32>) -> Result<(), Error> {
    if cfg!(debug_assertions)
        && let Some(index) = lse.to_vec()?.iter().position(|x| x.is_nan())
    {
        return Err(Error::NotANumber { argument: "lse", index });
    }
    Ok(())
}

/// Runs a forward plan that was made for exactly these tensors.
fn forward<T: Element>(
    plan: &Plan,
    inputs: [&Tensor<T>; 3],
    out: &mut Tensor<T>,
    lse: &mut Tensor<f32>,
    statistics: Option<&mut Statistics>,
    reporter: Reporter<'_>,
) -> Result<(), Error> {
    let statistics = statistics.map(|Statistics { row_max, row_sum }| [&*row_max, row_sum]);
    let written: Vec<&Storage> = [out.storage(), lse.storage()]
        .into_iter()
        .chain(statistics.into_iter().flatten().map(Tensor::storage))
        .collect();
    let guards = Guards::lock(&inputs.map(Tensor::storage), &written);
    let results = Results::Forward {
        out: out.address(),
        lse: lse.address(),
        statistics: statistics.map(|tensors| tensors.map(Tensor::address)),
    };
    // SAFETY: the plan's problem was proven from the inputs' own descriptions, and from the outputs' or, where they are
    // new, from the contiguous layout they were allocated with. All are borrowed for the call and on one device, the
    // outputs overlap nothing, and the guards keep other threads out.
    let result = unsafe { inputs[0].device().backend().run(plan, results, &reporter) };
    drop(guards);
    ended(result, reporter)
}

/// Runs a backward plan that was made for exactly these tensors.
fn backward<T: Element>(
    plan: &Plan,
    inputs: [&Tensor<T>; 5],
    output: &Output<T>,
    gradients: &mut Gradients<T>,
    reporter: Reporter<'_>,
) -> Result<(), Error> {
    let device = inputs[0].device();
    let words = plan.workspace_bytes() / size_of::<f32>() as u64;
    let workspace = Tensor::<f32>::empty(device, [words as usize])?;
    let [q, k, v, out, dout] = inputs.map(Tensor::storage);
    let Gradients { dq, dk, dv } = gradients;
    let statistics = output.statistics.as_ref();
    let of_rows = statistics
        .into_iter()
        .flat_map(|Statistics { row_max, row_sum }| [row_max, row_sum]);
    let read: Vec<&Storage> = [q, k, v, out, dout, output.lse.storage()]
        .into_iter()
        .chain(of_rows.map(Tensor::storage))
        .collect();
    let guards = Guards::lock(&read, &[dq.storage(), dk.storage(), dv.storage(), workspace.storage()]);
    let results = Results::Backward {
        dq: dq.address(),
        dk: dk.address(),
        dv: dv.address(),
        workspace: workspace.address(),
    };
    // SAFETY: as in `forward`; the workspace is as large as the plan says. It is freed when the call returns, and a device
    // keeps what is freed until the work launched before has finished.
    let result = unsafe { device.backend().run(plan, results, &reporter) };
    drop(guards);
    ended(result, reporter)
}

/// Reports the end of a call, whose tensors are locked no more.
fn ended(result: Result<(), Error>, reporter: Reporter<'_>) -> Result<(), Error> {
    match result {
        Ok(()) => reporter.end(),
        Err(_) => reporter.abandon(),
    }
    result
}

/// Keeps storages from being written, or read while they are written, by another thread.
struct Guards<'a> {
    _read: Vec<RwLockReadGuard<'a, ()>>,
    _write: Vec<RwLockWriteGuard<'a, ()>>,
}

impl<'a> Guards<'a> {
    /// Locks each storage once, for writing if it is an output's; in order of their addresses, so that two calls can
    /// not wait for each other.
    fn lock(inputs: &[&'a Storage], outputs: &[&'a Storage]) -> Self {
        let mut storages: Vec<(&Storage, bool)> = outputs
            .iter()
            .map(|&s| (s, true))
            .chain(inputs.iter().map(|&s| (s, false)))
            .collect();
        storages.sort_by_key(|&(storage, written)| (std::ptr::from_ref(storage).addr(), !written));
        storages.dedup_by(|(later, _), (earlier, _)| std::ptr::eq(*later, *earlier));
        let mut guards = Self {
            _read: Vec::new(),
            _write: Vec::new(),
        };
        for (storage, written) in storages {
            if written {
                guards._write.push(storage.write());
            } else {
                guards._read.push(storage.read());
            }
        }
        guards
    }
}
