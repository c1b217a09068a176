//! Long texts as bytes, to be told apart: whether a passage is of a comedy or of a tragedy. It stands in for the reviews of films of Long
//! Range Arena.

use std::path::Path;

use candle_core::{Device, Result};
use rand::Rng;
use rand::rngs::StdRng;

use super::{Batch, HeldOut, Task, classified};

/// Token before each passage, at which the model is read; bytes are the others.
const FIRST: u32 = 256;
/// Bytes at the start of each file that are left out: title and persons.
const TITLE: usize = 3000;
/// One play of each so many is held out, whole: its names tell nothing about the others.
const HELD_OUT_EVERY: usize = 4;

const COMEDIES: [&str; 14] = [
    "alls_well_that_ends_well",
    "as_you_like_it",
    "comedy_of_errors",
    "loves_labours_lost",
    "measure_for_measure",
    "merchant_of_venice",
    "merry_wives_of_windsor",
    "midsummer_nights_dream",
    "much_ado_about_nothing",
    "taming_of_the_shrew",
    "tempest",
    "twelfth_night",
    "two_gentlemen_of_verona",
    "winters_tale",
];
const TRAGEDIES: [&str; 12] = [
    "antony_and_cleopatra",
    "coriolanus",
    "cymbeline",
    "hamlet",
    "julius_caesar",
    "lear",
    "macbeth",
    "othello",
    "romeo_and_juliet",
    "timon_of_athens",
    "tragedy_of_titus_andronicus",
    "troilus_and_cressida",
];

/// Passages of texts of two classes.
#[derive(Clone, Debug)]
pub struct Genres {
    /// Texts of each class to train on, and texts that are held out.
    train: [Vec<Vec<u8>>; 2],
    held_out: [Vec<Vec<u8>>; 2],
    context: usize,
    device: Device,
}

impl Genres {
    /// Texts of two classes, of which passages of `context - 1` bytes are drawn after one more token.
    ///
    /// # Errors
    /// A class has fewer than four texts, or a text is shorter than a passage.
    pub fn new(texts: [Vec<Vec<u8>>; 2], context: usize, device: &Device) -> Result<Self> {
        for texts in &texts {
            let shortest = texts.iter().map(Vec::len).min().unwrap_or_default();
            if texts.len() < HELD_OUT_EVERY || shortest < context || context < 2 {
                candle_core::bail!(
                    "{} texts of {shortest} bytes or more; passages of {context} tokens need {HELD_OUT_EVERY} texts at least as long",
                    texts.len()
                )
            }
        }
        let split = |held_out: bool| {
            texts.each_ref().map(|texts| {
                let texts = texts.iter().enumerate();
                let chosen = texts.filter(|(index, _)| ((index + 1) % HELD_OUT_EVERY == 0) == held_out);
                chosen.map(|(_, text)| text.clone()).collect()
            })
        };
        Ok(Self {
            train: split(false),
            held_out: split(true),
            context,
            device: device.clone(),
        })
    }

    /// Shakespeare's comedies and tragedies from the folder that `cargo xtask fetch shakespeare` makes.
    ///
    /// # Errors
    /// A file that cannot be read, with its name, and those of [`new`](Self::new).
    pub fn read(folder: &Path, context: usize, device: &Device) -> Result<Self> {
        let read = |name: &&str| -> Result<Vec<u8>> {
            let path = folder.join(format!("{name}_gut.txt"));
            match std::fs::read(&path) {
                Ok(bytes) => Ok(bytes[TITLE.min(bytes.len())..].to_vec()),
                Err(error) => candle_core::bail!("{}: {error}", path.display()),
            }
        };
        let comedies = COMEDIES.iter().map(read).collect::<Result<_>>()?;
        let tragedies = TRAGEDIES.iter().map(read).collect::<Result<_>>()?;
        Self::new([comedies, tragedies], context, device)
    }

    fn passage(&self, rng: &mut StdRng, class: usize, of: &[Vec<Vec<u8>>; 2]) -> (Vec<u32>, u32) {
        let text = &of[class][rng.random_range(0..of[class].len())];
        let start = rng.random_range(0..=text.len() - (self.context - 1));
        let bytes = text[start..start + self.context - 1]
            .iter()
            .map(|&byte| u32::from(byte));
        (std::iter::once(FIRST).chain(bytes).collect(), class as u32)
    }
}

impl Task for Genres {
    fn vocabulary(&self) -> usize {
        FIRST as usize + 1
    }

    fn classes(&self) -> Option<usize> {
        Some(2)
    }

    fn positions(&self) -> usize {
        self.context
    }

    fn draw(&self, rng: &mut StdRng, _: usize, batch: usize) -> Result<Batch> {
        let passages: Vec<_> = (0..batch)
            .map(|_| {
                let class = rng.random_range(0..2);
                self.passage(rng, class, &self.train)
            })
            .collect();
        classified(&passages, &self.device)
    }

    fn held_out(&self, count: usize) -> Result<Vec<HeldOut>> {
        HeldOut::only(count, |index, rng| {
            classified(&[self.passage(rng, index % 2, &self.held_out)], &self.device)
        })
    }
}
