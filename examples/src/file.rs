//! Attention inputs and outputs as safetensors files.

use std::path::{Path, PathBuf};

use flash_attention::half::{bf16, f16};
use flash_attention::{Device, Dtype, Element, Gradients, Output, Tensor};
use safetensors::SafeTensors;
use safetensors::tensor::TensorView;
use zerocopy::{FromBytes, IntoBytes};

use crate::Failure;

/// Content of a file: the tensors q, k and v, and optionally the stored answer.
#[derive(Clone, Debug)]
pub struct AttentionFile {
    /// Queries, `[batch, heads_q, seqlen_q, head_dim]`; of packed sequences `[total_q, heads_q, head_dim]`.
    pub q: Stored,
    /// Keys, `[batch, heads_kv, seqlen_k, head_dim]` or `[total_k, heads_kv, head_dim]`.
    pub k: Stored,
    /// Values, with the shape of the keys except head_dim, which may differ.
    pub v: Stored,
    /// Correct output of full attention, with the shape of the queries and the head_dim of the values.
    pub out: Option<Stored>,
    /// Correct log-sum-exp of full attention, `[batch, heads_q, seqlen_q]` or `[heads_q, total_q]`.
    pub lse: Option<Stored>,
    /// Gradient of the output, with the shape of the output.
    pub dout: Option<Stored>,
    /// Correct gradients of q, k and v for full attention, each with the shape of its tensor.
    pub gradients: [Option<Stored>; 3],
    /// `softmax_scale` of the file's metadata.
    pub softmax_scale: Option<f32>,
    /// The whole file, for the tensors that options name.
    bytes: Vec<u8>,
    /// Path of the file, for messages.
    path: PathBuf,
}

/// A tensor of a file. Files hold f16, bf16 or f32, each of which is exact in f32.
#[derive(Clone, Debug)]
pub struct Stored {
    /// Shape of the tensor.
    pub shape: Vec<usize>,
    /// Elements in logical order.
    pub elements: Vec<f32>,
}

impl AttentionFile {
    /// Reads a file.
    ///
    /// # Errors
    /// A sentence if the file cannot be read, is no safetensors file, lacks q, k or v, holds another type than f16,
    /// bf16 and f32, or stores an answer or a gradient of the wrong shape.
    pub fn read(path: &Path) -> Result<Self, Failure> {
        let failed = |what: String| Failure(format!("{}: {what}", path.display()));
        let bytes = std::fs::read(path).map_err(|error| failed(error.to_string()))?;
        let no_file = |error| failed(format!("not a safetensors file ({error})"));
        let tensors = SafeTensors::deserialize(&bytes).map_err(no_file)?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(no_file)?;
        let read = |name: &str| match tensors.tensor(name) {
            Ok(view) => Stored::read(name, &view).map(Some).map_err(failed),
            Err(_) => Ok(None),
        };
        let require = |name: &str| {
            read(name)?.ok_or_else(|| {
                let mut names = tensors.names();
                names.sort_unstable();
                failed(format!("no tensor `{name}` (there is {})", names.join(", ")))
            })
        };
        let scale = header
            .metadata()
            .as_ref()
            .and_then(|fields| fields.get("softmax_scale"));
        let file = Self {
            q: require("q")?,
            k: require("k")?,
            v: require("v")?,
            out: read("out")?,
            lse: read("lse")?,
            dout: read("dout")?,
            gradients: [read("dq")?, read("dk")?, read("dv")?],
            softmax_scale: scale
                .map(|text| text.parse())
                .transpose()
                .map_err(|_| failed(format!("softmax_scale is {scale:?}, expected a number")))?,
            path: path.to_owned(),
            bytes: Vec::new(),
        };
        let file = Self { bytes, ..file };
        file.check_answer().map_err(failed)?;
        Ok(file)
    }

    /// Returns true if the file has a tensor of this name.
    pub fn has(&self, name: &str) -> bool {
        SafeTensors::deserialize(&self.bytes).is_ok_and(|tensors| tensors.tensor(name).is_ok())
    }

    /// Returns a tensor of floats that an option takes.
    ///
    /// # Errors
    /// A sentence if the file has no such tensor, or one of another type.
    pub fn floats(&self, name: &str, option: &str) -> Result<Stored, Failure> {
        self.tensor(name, option, |view| Stored::read(name, view))
    }

    /// Returns shape and elements of a tensor of i32 that an option takes.
    ///
    /// # Errors
    /// A sentence if the file has no such tensor, or one of another type.
    pub fn integers(&self, name: &str, option: &str) -> Result<(Vec<usize>, Vec<i32>), Failure> {
        self.tensor(name, option, |view| match view.dtype() {
            safetensors::Dtype::I32 => {
                let of = |chunk: &[u8]| i32::read_from_bytes(chunk).expect("a chunk is an element");
                Ok((view.shape().to_vec(), view.data().chunks_exact(4).map(of).collect()))
            }
            other => Err(format!("`{name}` has dtype {other:?}, expected I32")),
        })
    }

    /// Returns shape and elements of a tensor of u8 that an option takes: 1 is true, 0 false.
    ///
    /// # Errors
    /// A sentence if the file has no such tensor, or one of another type.
    pub fn flags(&self, name: &str, option: &str) -> Result<(Vec<usize>, Vec<bool>), Failure> {
        self.tensor(name, option, |view| match view.dtype() {
            safetensors::Dtype::U8 | safetensors::Dtype::BOOL => {
                Ok((view.shape().to_vec(), view.data().iter().map(|&x| x != 0).collect()))
            }
            other => Err(format!("`{name}` has dtype {other:?}, expected U8")),
        })
    }

    fn tensor<R>(
        &self,
        name: &str,
        option: &str,
        read: impl FnOnce(&TensorView<'_>) -> Result<R, String>,
    ) -> Result<R, Failure> {
        let failed = |what: String| Failure(format!("{}: {what}", self.path.display()));
        let tensors = SafeTensors::deserialize(&self.bytes).map_err(|error| failed(error.to_string()))?;
        let view = tensors.tensor(name);
        let view = view.map_err(|_| failed(format!("no tensor `{name}`, which {option} needs")))?;
        read(&view).map_err(failed)
    }

    /// Checks that the answer and the inputs of backward have the shapes that attention over these inputs gives.
    fn check_answer(&self) -> Result<(), String> {
        let (q, k, v) = (&self.q.shape[..], &self.k.shape[..], &self.v.shape[..]);
        let [dq, dk, dv] = &self.gradients;
        let lse = match q {
            &[total_q, heads, _] => vec![heads, total_q], // packed sequences
            _ => q[..q.len().min(3)].to_vec(),
        };
        let rows = q.iter().take(q.len().saturating_sub(1));
        let out: Vec<usize> = rows.chain(v.last()).copied().collect();
        for (name, answer, expected, model) in [
            ("out", &self.out, &out[..], "`q` has, with the head_dim of `v`"),
            ("lse", &self.lse, &lse[..], "`q` has"),
            ("dout", &self.dout, &out[..], "`q` has, with the head_dim of `v`"),
            ("dq", dq, q, "`q` has"),
            ("dk", dk, k, "`k` has"),
            ("dv", dv, v, "`v` has"),
        ] {
            if let Some(answer) = answer
                && answer.shape != expected
            {
                return Err(format!(
                    "`{name}` has shape {:?}, expected {expected:?} as {model}",
                    answer.shape
                ));
            }
        }
        Ok(())
    }
}

impl Stored {
    fn read(name: &str, view: &TensorView<'_>) -> Result<Self, String> {
        fn widen<T: Element>(bytes: &[u8]) -> Vec<f32> {
            // A tensor may start at any byte of the file.
            bytes
                .chunks_exact(size_of::<T>())
                .map(|chunk| T::read_from_bytes(chunk).expect("a chunk is an element").to_f32())
                .collect()
        }
        let widen = match view.dtype() {
            safetensors::Dtype::F32 => widen::<f32>,
            safetensors::Dtype::F16 => widen::<f16>,
            safetensors::Dtype::BF16 => widen::<bf16>,
            other => return Err(format!("`{name}` has dtype {other:?}, expected F32, F16 or BF16")),
        };
        Ok(Self {
            shape: view.shape().to_vec(),
            elements: widen(view.data()),
        })
    }

    /// Returns the elements as f64.
    pub fn widen(&self) -> Vec<f64> {
        self.elements.iter().map(|&element| element.into()).collect()
    }

    /// Returns the elements rounded to `T`.
    pub fn round<T: Element>(&self) -> Vec<T> {
        self.elements.iter().map(|&element| T::from_f32(element)).collect()
    }

    /// Returns the tensor on a device, with its elements rounded to `T`.
    ///
    /// # Errors
    /// The errors of [`Tensor::from_slice`].
    pub fn upload<T: Element>(&self, device: &Device) -> Result<Tensor<T>, Failure> {
        Ok(Tensor::from_slice(device, &self.shape, &self.round::<T>())?)
    }
}

/// Content of a file of results.
#[derive(Debug)]
pub struct Written<'a, T: Element> {
    /// Results of forward.
    pub output: &'a Output<T>,
    /// Results of backward, those of bias, sinks and slopes included.
    pub gradients: Option<&'a Gradients<T>>,
    /// Shape and elements of dropout's keep mask.
    pub keep: Option<([usize; 4], Vec<u8>)>,
    /// The scale of scores.
    pub softmax_scale: f32,
}

/// Writes out and lse, the softmax scale, dq, dk, dv, `dbias`, `dsinks` and `dalibi_slopes` if there are such gradients, and
/// `keep` if there is dropout.
///
/// # Errors
/// A sentence if the device fails or the file cannot be written.
pub fn write_output<T: Element>(path: &Path, written: &Written<'_, T>) -> Result<(), Failure> {
    let Written {
        output,
        gradients,
        keep,
        softmax_scale,
    } = written;
    let failed = |what: String| Failure(format!("{}: {what}", path.display()));
    let mut rows = vec![("out", &output.out)];
    rows.extend(gradients.map_or(Vec::new(), |g| vec![("dq", &g.dq), ("dk", &g.dk), ("dv", &g.dv)]));
    let lse = output.lse.to_vec()?;
    let mut contents = vec![(
        "lse",
        safetensors::Dtype::F32,
        output.lse.shape(),
        lse.as_bytes().to_vec(),
    )];
    let of_tables = gradients.iter().flat_map(|gradients| {
        let of = [&gradients.bias, &gradients.sinks, &gradients.alibi_slopes];
        ["dbias", "dsinks", "dalibi_slopes"].into_iter().zip(of)
    });
    for (name, gradient) in of_tables {
        if let Some(gradient) = gradient {
            let bytes = gradient.to_vec()?.as_bytes().to_vec();
            contents.push((name, safetensors::Dtype::F32, gradient.shape(), bytes));
        }
    }
    if let Some((shape, mask)) = keep {
        contents.push(("keep", safetensors::Dtype::U8, shape, mask.clone()));
    }
    let dtype = match T::DTYPE {
        Dtype::F32 => safetensors::Dtype::F32,
        Dtype::F16 => safetensors::Dtype::F16,
        Dtype::Bf16 => safetensors::Dtype::BF16,
    };
    for (name, tensor) in rows {
        let bytes = tensor.to_vec()?.as_bytes().to_vec();
        contents.push((name, dtype, tensor.shape(), bytes));
    }
    let views = contents
        .iter()
        .map(|(name, dtype, shape, bytes)| Ok((*name, TensorView::new(*dtype, shape.to_vec(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|error| failed(error.to_string()))?;
    let metadata = [("softmax_scale".to_owned(), softmax_scale.to_string())].into();
    let bytes = safetensors::serialize(views, Some(metadata)).map_err(|error| failed(error.to_string()))?;
    std::fs::write(path, bytes).map_err(|error| failed(error.to_string()))
}
