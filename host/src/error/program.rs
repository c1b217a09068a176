//! [`ProgramError`]: why a score program is invalid.

use std::fmt;

/// The reason why a score program is invalid.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ProgramError {
    /// A named feature was given a number outside of its range.
    Argument {
        /// Name of the feature.
        argument: &'static str,
        /// Number given.
        value: String,
        /// Range of numbers it takes.
        expected: &'static str,
    },

    /// The program divides an index by a number that is not positive.
    Divisor {
        /// Divisor given.
        value: i32,
    },

    /// The program has too many operations or numbers.
    TooLarge {
        /// Name of what it has too many of.
        what: &'static str,
        /// Largest number allowed.
        limit: usize,
    },

    /// A tensor cannot be a table of the feature: it has a wrong number of axes, or a size of 0.
    TableShape {
        /// Name of the feature.
        argument: &'static str,
        /// Shape of the tensor.
        shape: Vec<usize>,
        /// Shapes that the feature takes.
        expected: &'static str,
    },

    /// A table is, or may be, read outside of its bounds: over the pairs of the call the index goes from `low` to
    /// `high`.
    Index {
        /// Name of the table.
        table: &'static str,
        /// Axis of the index.
        axis: usize,
        /// Size of the axis.
        size: usize,
        /// Smallest index.
        low: i32,
        /// Largest index.
        high: i32,
    },

    /// Lists of visible tiles reach past what there is.
    BlockList {
        /// `offsets` or `columns`.
        list: &'static str,
        /// The row of tiles.
        row: usize,
        /// The value that it has there.
        value: usize,
        /// The largest allowed.
        limit: usize,
    },

    /// The number of sinks is not the number of query heads.
    Sinks {
        /// Shape of the sinks.
        shape: Vec<usize>,
        /// Number of query heads.
        heads: usize,
    },

    /// Backward needs a derivative that an operation does not have.
    NotDifferentiable {
        /// Name of the operation.
        operation: &'static str,
    },
}

/// Writes a sentence with the argument's name, its value and the limit.
impl fmt::Display for ProgramError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Argument {
                argument,
                value,
                expected,
            } => write!(f, "`{argument}` is {value}, expected {expected}"),
            Self::Divisor { value } => write!(
                f,
                "the score program divides an index by {value}, expected a number above 0"
            ),
            Self::TooLarge { what, limit } => write!(f, "the score program has more than {limit} {what}"),
            Self::TableShape {
                argument,
                shape,
                expected,
            } => write!(f, "`{argument}` has shape {shape:?}, expected {expected}"),
            Self::Index {
                table,
                axis,
                size,
                low,
                high,
            } => write!(
                f,
                "`{table}` has {size} entries on axis {axis}, the index reaches {low} ..= {high}"
            ),
            Self::BlockList {
                list,
                row,
                value,
                limit,
            } => write!(
                f,
                "`{list}` has {value} for row {row}, expected rising numbers up to {limit}"
            ),
            Self::Sinks { shape, heads } => write!(
                f,
                "`sinks` has shape {shape:?}, expected one number for each of the {heads} heads of `q`"
            ),
            Self::NotDifferentiable { operation } => write!(
                f,
                "the score program has no derivative: it applies `{operation}` to a value that depends on the score or on a \
                 table whose gradient is asked for"
            ),
        }
    }
}

impl std::error::Error for ProgramError {}
