//! A text as tokens: one token per character.

use rand::RngExt;
use rand::rngs::StdRng;

/// A text with numbered characters.
#[derive(Clone, Debug)]
pub struct Text {
    /// All characters that occur, sorted; the index of a character is its token.
    vocabulary: Vec<char>,
    tokens: Vec<usize>,
}

/// Error of a text that is too short to learn from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TextError {
    /// Number of characters it has.
    pub len: usize,
    /// Number of characters it needs: a context, and the character that follows it.
    pub needed: usize,
}

impl std::fmt::Display for TextError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { len, needed } = self;
        write!(f, "the text has {len} characters and needs at least {needed}")
    }
}

impl std::error::Error for TextError {}

/// Pieces of a text, and for each of their tokens the next one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Consecutive sequences of `seqlen` tokens.
    pub inputs: Vec<usize>,
    /// The token that follows each input.
    pub targets: Vec<usize>,
    /// Tokens per sequence.
    pub seqlen: usize,
}

impl Text {
    /// Numbers the characters of a text that is longer than `context`.
    ///
    /// # Errors
    /// [`TextError`] if the text is too short.
    pub fn new(text: &str, context: usize) -> Result<Self, TextError> {
        let characters: Vec<char> = text.chars().collect();
        let (len, needed) = (characters.len(), context + 1);
        if len < needed {
            return Err(TextError { len, needed });
        }
        let mut vocabulary = characters.clone();
        vocabulary.sort_unstable();
        vocabulary.dedup();
        let tokens = characters.iter().map(|character| {
            vocabulary
                .binary_search(character)
                .expect("every character of the text is in its vocabulary")
        });
        Ok(Self {
            tokens: tokens.collect(),
            vocabulary,
        })
    }

    /// Returns the number of different characters.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary.len()
    }

    /// Returns the tokens of the whole text.
    pub fn tokens(&self) -> &[usize] {
        &self.tokens
    }

    /// Returns the characters of tokens of this text.
    pub fn decode(&self, tokens: &[usize]) -> String {
        tokens.iter().map(|&token| self.vocabulary[token]).collect()
    }

    /// Draws `size` pieces of `seqlen` tokens from random positions of the text.
    pub fn batch(&self, rng: &mut StdRng, size: usize, seqlen: usize) -> Batch {
        let mut batch = Batch {
            inputs: Vec::with_capacity(size * seqlen),
            targets: Vec::with_capacity(size * seqlen),
            seqlen,
        };
        for _ in 0..size {
            let start = rng.random_range(0..self.tokens.len() - seqlen);
            batch.inputs.extend(&self.tokens[start..start + seqlen]);
            batch.targets.extend(&self.tokens[start + 1..=start + seqlen]);
        }
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn tokens_become_the_text_again() {
        let text = Text::new("grün, grün", 4).expect("long enough");
        assert_eq!(text.vocabulary(), 6);
        assert_eq!(text.decode(text.tokens()), "grün, grün");
    }

    #[test]
    fn targets_follow_inputs() {
        let text = Text::new("abcdefghij", 4).expect("long enough");
        let batch = text.batch(&mut StdRng::seed_from_u64(1), 7, 4);
        assert_eq!(batch.inputs.len(), 28);
        for (input, target) in batch.inputs.iter().zip(&batch.targets) {
            assert_eq!(input + 1, *target);
        }
    }

    #[test]
    fn a_text_of_one_context_and_one_character_is_enough() {
        let text = Text::new("abcde", 4).expect("just long enough");
        let batch = text.batch(&mut StdRng::seed_from_u64(1), 1, 4);
        assert_eq!(text.decode(&batch.targets), "bcde");
        let error = Text::new("abcd", 4).map(|_| ()).expect_err("nothing follows");
        assert_eq!(error.to_string(), "the text has 4 characters and needs at least 5");
    }
}
