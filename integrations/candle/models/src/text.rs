//! A text as bytes: windows to train on, and a part that is held out.

use std::path::{Path, PathBuf};

use candle_core::{Device, Result, Tensor};
use rand::Rng;
use rand::rngs::StdRng;

/// Tokens: the values of a byte.
pub const VOCABULARY: usize = 256;

/// A text whose last tenth is held out from training.
#[derive(Clone, Debug)]
pub struct Text {
    bytes: Vec<u8>,
    held_out: usize,
}

impl Text {
    /// A text to learn in windows of `context + 1` bytes.
    ///
    /// # Errors
    /// Training part or held-out part is shorter than one window.
    pub fn new(bytes: Vec<u8>, context: usize) -> Result<Self> {
        let held_out = bytes.len() - bytes.len() / 10;
        if bytes.len() - held_out <= context {
            candle_core::bail!(
                "a text of {} bytes is too short for windows of {}",
                bytes.len(),
                context + 1
            )
        }
        Ok(Self { bytes, held_out })
    }

    /// The file's bytes, or those of all `.txt` files of a folder in the order of their names.
    ///
    /// # Errors
    /// The system's errors, and those of [`new`](Self::new).
    pub fn read(path: &Path, context: usize) -> Result<Self> {
        if path.is_file() {
            return Self::new(std::fs::read(path)?, context);
        }
        let mut files: Vec<PathBuf> = std::fs::read_dir(path)?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<std::io::Result<_>>()?;
        files.retain(|file| file.extension().is_some_and(|extension| extension == "txt"));
        files.sort();
        let parts = files.iter().map(std::fs::read).collect::<std::io::Result<Vec<_>>>()?;
        Self::new(parts.concat(), context)
    }

    /// Bytes of the text.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// True if the text has no bytes.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Windows from anywhere in the training part, `[batch, context + 1]`.
    ///
    /// # Errors
    /// candle's errors.
    pub fn draw(&self, rng: &mut StdRng, batch: usize, context: usize) -> Result<Tensor> {
        let last = self.held_out - context - 1;
        let starts: Vec<usize> = (0..batch).map(|_| rng.random_range(0..=last)).collect();
        self.windows(&starts, context)
    }

    /// `count` windows spread over the held-out part, `[count, context + 1]`.
    ///
    /// # Errors
    /// candle's errors.
    pub fn held_out(&self, count: usize, context: usize) -> Result<Tensor> {
        let room = self.bytes.len() - self.held_out - context - 1;
        let starts: Vec<usize> = (0..count).map(|at| self.held_out + at * room / count).collect();
        self.windows(&starts, context)
    }

    fn windows(&self, starts: &[usize], context: usize) -> Result<Tensor> {
        let window = |&start: &usize| self.bytes[start..=start + context].iter().map(|&byte| u32::from(byte));
        let tokens: Vec<u32> = starts.iter().flat_map(window).collect();
        Tensor::from_vec(tokens, (starts.len(), context + 1), &Device::Cpu)
    }
}
