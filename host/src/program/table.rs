//! Tables: tensors that programs read at computed indices.

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;

use half::{bf16, f16};

use super::closure::{Index, Readable, Score};
use super::evaluate::HostTable;
use super::{MAX_RANK, TableType};
use crate::element::{DataType, Scalar};
use crate::layout::{DeviceId, TensorInfo};

/// A tensor that score programs read: `RANK` axes of `T`.
///
/// ```
/// use flash_attention::program::Table;
/// use flash_attention::{Attention, Device, Tensor};
///
/// // A learned number for each head and distance, as T5 has them.
/// let bias = Tensor::from_slice(&Device::cpu(), [12, 129], &[0.0_f32; 12 * 129])?;
/// let bias = Table::<f32, 2>::new(&bias)?;
/// let attention = Attention::new().score(|s, at| s + bias.at(at.head, at.distance().max(-64).min(64) + 64));
/// # Ok::<(), flash_attention::Error>(())
/// ```
///
/// Each index is proven to lie within the table for the sizes of each call, from the ranges of coordinates. Where it cannot be
/// proven, as for indices that come from another table, `at_clamped` takes the nearest element instead.
pub struct Table<T: Scalar, const RANK: usize> {
    source: TableSource,
    element: PhantomData<T>,
}

/// Memory of a table, kept alive by its owner.
#[derive(Clone)]
pub struct TableSource {
    /// Name in messages.
    pub name: &'static str,
    /// The device it is on.
    pub device: DeviceId,
    /// Element type.
    pub element: DataType,
    /// Size along each axis, none of them 0.
    pub shape: Vec<usize>,
    /// Elements from one index to the next, for each axis; 0 repeats one entry.
    pub strides: Vec<usize>,
    /// Device address of its first element; a pointer on the CPU.
    pub address: u64,
    /// Owner of the memory, which stays allocated until it is dropped.
    pub owner: Arc<dyn Any + Send + Sync>,
    /// Content of a table that the library made and no caller can write; plans read it.
    pub(crate) content: Option<Arc<HostTable>>,
}

impl TableSource {
    /// Describes a table over a tensor's memory.
    pub fn new(name: &'static str, info: &TensorInfo, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self {
            name,
            device: info.device().clone(),
            element: info.dtype(),
            shape: info.shape().to_vec(),
            strides: info.strides().to_vec(),
            address: info.address(),
            owner,
            content: None,
        }
    }

    /// Layout of the table.
    pub(crate) fn info(&self) -> TensorInfo {
        TensorInfo::new(&self.device, self.element, &self.shape, &self.strides, self.address)
            .expect("the layout of a tensor that is there")
    }

    /// Type of the table in operations.
    pub(super) fn table_type(&self) -> TableType {
        TableType {
            element: self.element,
            rank: self.shape.len(),
        }
    }
}

impl<T: Scalar, const RANK: usize> Table<T, RANK> {
    /// Makes a table over memory with this number of axes and these elements.
    pub(crate) fn over(source: TableSource) -> Self {
        const { assert!(RANK > 0 && RANK <= MAX_RANK, "a table has 1 to 4 axes") };
        debug_assert!(source.shape.len() == RANK && source.element == T::DATA_TYPE);
        Self {
            source,
            element: PhantomData,
        }
    }

    /// Returns the memory of the table.
    pub fn source(&self) -> &TableSource {
        &self.source
    }
}

/// Implements reads with one index per axis.
macro_rules! reads {
    ($($rank:literal: $($axis:ident)*;)*) => {$(
        impl<T: Readable> Table<T, $rank> {
            /// Reads the element at these indices, which must be proven to be within the table.
            pub fn at<'g>(&self, $($axis: Index<'g>),*) -> T::Value<'g> {
                T::read(&self.source, &[$($axis),*], false)
            }

            /// Reads the element at these indices, each clamped to the table.
            pub fn at_clamped<'g>(&self, $($axis: Index<'g>),*) -> T::Value<'g> {
                T::read(&self.source, &[$($axis),*], true)
            }
        }
    )*};
}

reads! {
    1: i;
    2: i j;
    3: i j k;
    4: i j k l;
}

macro_rules! readable {
    ($($element:ident $value:ident),*) => {$(
        impl Readable for $element {
            type Value<'g> = $value<'g>;

            fn read<'g>(source: &TableSource, indices: &[Index<'g>], clamped: bool) -> $value<'g> {
                $value::load(source, indices, clamped)
            }
        }
    )*};
}

readable! { f32 Score, f16 Score, bf16 Score, i32 Index, u32 Index }

impl<T: Scalar, const RANK: usize> Clone for Table<T, RANK> {
    fn clone(&self) -> Self {
        Self::over(self.source.clone())
    }
}

impl<T: Scalar, const RANK: usize> fmt::Debug for Table<T, RANK> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.source.fmt(f)
    }
}

/// Compares place, device, type and layout; names and owners are not compared.
impl PartialEq for TableSource {
    fn eq(&self, other: &Self) -> bool {
        self.device == other.device
            && self.element == other.element
            && self.shape == other.shape
            && self.strides == other.strides
            && self.address == other.address
    }
}

impl fmt::Debug for TableSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "table {} of {} {:?} on {}",
            self.name,
            self.element.name(),
            self.shape,
            self.device
        )?;
        write!(f, ", strides {:?}, at {:#x}", self.strides, self.address)
    }
}
