//! Layouts of a tensor's elements in memory, as callers may have them, with NaN around the elements.

use flash_attention::{Device, Element, Error, Tensor};

/// Axis of a `[batch, heads, seqlen, head_dim]` tensor that follows head_dim in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// Sequence first: `[batch, heads, seqlen, head_dim]` memory.
    #[default]
    Bhsd,
    /// Heads first: `[batch, seqlen, heads, head_dim]` memory.
    Bshd,
}

/// Layout of a `[batch, heads, seqlen, head_dim]` tensor in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// Order of the axes in memory.
    pub order: Order,
    /// Number of elements in each row of memory that do not belong to the tensor.
    pub gap: usize,
    /// Number of these elements before the tensor's own. A lead that is not a multiple of 16 bytes rules out 16-byte
    /// copies.
    pub lead: usize,
    /// Axis (batch or heads) whose entries share one memory, with stride 0. Inputs only.
    pub broadcast: Option<usize>,
}

/// An input on a device, and its elements in logical order.
#[derive(Debug)]
pub struct Input<T: Element> {
    /// The tensor.
    pub tensor: Tensor<T>,
    /// Elements of the tensor, in logical order.
    pub elements: Vec<T>,
}

/// An output filled with NaN, with NaN before it, after it and in its gaps.
#[derive(Debug)]
pub struct Poisoned<T: Element> {
    /// Tensor to write to.
    pub tensor: Tensor<T>,
    /// Memory behind the tensor, with one more entry of the first axis before it and one after it.
    memory: Tensor<T>,
    /// Columns of each row of the memory that belong to the tensor.
    columns: std::ops::Range<usize>,
}

impl Layout {
    /// Layouts of every kind of copy: rows of whole 16 bytes, rows of elements alone, and gaps between rows.
    pub const EVERY: [Self; 6] = [
        Self::new(Order::Bshd, 0, 0),
        Self::new(Order::Bhsd, 8, 0),
        Self::new(Order::Bshd, 8, 8),
        Self::new(Order::Bhsd, 8, 4),
        Self::new(Order::Bhsd, 1, 0),
        Self::new(Order::Bshd, 3, 1),
    ];

    /// Makes a layout with this order, gap and lead.
    pub const fn new(order: Order, gap: usize, lead: usize) -> Self {
        Self {
            order,
            gap,
            lead,
            broadcast: None,
        }
    }

    /// Returns this layout with one memory for all entries of an axis.
    #[must_use]
    pub const fn broadcast(self, axis: usize) -> Self {
        Self {
            broadcast: Some(axis),
            ..self
        }
    }

    fn strides(&self, [_, heads, seqlen, _]: [usize; 4], pitch: usize) -> [usize; 4] {
        let mut strides = match self.order {
            Order::Bhsd => [heads * seqlen * pitch, seqlen * pitch, pitch, 1],
            Order::Bshd => [heads * seqlen * pitch, pitch, heads * pitch, 1],
        };
        if let Some(axis) = self.broadcast {
            strides[axis] = 0;
        }
        strides
    }

    /// Makes an input with these elements, given in logical order. All entries of a broadcast axis get the elements
    /// of the last.
    ///
    /// # Errors
    /// The device's error for the memory.
    pub fn input<T: Element>(&self, device: &Device, shape: [usize; 4], elements: &[T]) -> Result<Input<T>, Error> {
        let [batch, heads, seqlen, head_dim] = shape;
        let pitch = head_dim + self.gap;
        let strides = self.strides(shape, pitch);
        let rows = || {
            (0..batch * heads * seqlen).map(move |row| {
                let (i, j, k) = (row / seqlen / heads, row / seqlen % heads, row % seqlen);
                self.lead + i * strides[0] + j * strides[1] + k * strides[2]
            })
        };
        let end = rows().max().unwrap_or(0) - self.lead + pitch;
        let mut memory = vec![T::from_f32(f32::NAN); end];
        for (first, row) in rows().zip(elements.chunks(head_dim)) {
            memory[first..first + head_dim].copy_from_slice(row);
        }
        let whole = Tensor::from_slice_strided(device, [batch, heads, seqlen, pitch], strides, &memory)?;
        Ok(Input {
            tensor: whole.narrow(3, self.lead, head_dim)?,
            elements: rows()
                .flat_map(|first| &memory[first..first + head_dim])
                .copied()
                .collect(),
        })
    }

    /// Makes an output of this shape, filled with NaN.
    ///
    /// # Errors
    /// The device's error for the memory.
    pub fn output<T: Element>(&self, device: &Device, shape: [usize; 4]) -> Result<Poisoned<T>, Error> {
        let [batch, heads, seqlen, head_dim] = shape;
        let pitch = head_dim + self.gap;
        let guarded = [batch + 2, heads, seqlen, pitch];
        let nan = vec![T::from_f32(f32::NAN); guarded.iter().product()];
        let memory = Tensor::from_slice_strided(device, guarded, self.strides(shape, pitch), &nan)?;
        let tensor = memory.narrow(0, 1, batch)?.narrow(3, self.lead, head_dim)?;
        let columns = self.lead..self.lead + head_dim;
        Ok(Poisoned {
            tensor,
            memory,
            columns,
        })
    }
}

impl<T: Element> Poisoned<T> {
    /// Makes a contiguous output of any rank, filled with NaN.
    ///
    /// # Errors
    /// The device's error for the memory.
    pub fn contiguous(device: &Device, shape: &[usize]) -> Result<Self, Error> {
        let mut guarded = shape.to_vec();
        guarded[0] += 2;
        let nan = vec![T::from_f32(f32::NAN); guarded.iter().product()];
        let memory = Tensor::from_slice(device, &guarded, &nan)?;
        let tensor = memory.narrow(0, 1, shape[0])?;
        let columns = 0..shape[shape.len() - 1];
        Ok(Self {
            tensor,
            memory,
            columns,
        })
    }

    /// Returns the tensor's elements in logical order.
    ///
    /// # Errors
    /// The device's error for reading.
    ///
    /// # Panics
    /// If memory around the tensor was written.
    pub fn read(&self) -> Result<Vec<T>, Error> {
        let shape = self.memory.shape();
        let pitch = shape[shape.len() - 1];
        let rows_per_entry: usize = shape[1..shape.len() - 1].iter().product();
        let memory = self.memory.to_vec()?;
        for (place, element) in memory.iter().enumerate() {
            let (row, column) = (place / pitch, place % pitch);
            let entry = row / rows_per_entry;
            let inside = (1..shape[0] - 1).contains(&entry) && self.columns.contains(&column);
            assert!(
                inside || element.to_f64().is_nan(),
                "memory next to an output of shape {:?} was written to: {element} in column {column} of row {} of entry {}",
                self.tensor.shape(),
                row % rows_per_entry,
                entry as i64 - 1,
            );
        }
        self.tensor.to_vec()
    }
}
