//! A GGUF file with f32 in place of quantized weights.

use std::io::{Cursor, Read, Seek};

use candle_core::quantized::gguf_file::{self, Content, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Result};

/// The bytes of a GGUF file that has the metadata and the tensors of another, in f32.
///
/// candle's product with quantized weights rounds each activation to 8 bits, so that a difference in the last bit of an activation
/// can become one of 1 in 127. With f32 weights two implementations of a model agree to the rounding of f32.
///
/// # Errors
/// candle's errors.
pub fn dequantized(file: &Content, reader: &mut (impl Read + Seek)) -> Result<Vec<u8>> {
    let metadata: Vec<(&str, &Value)> = file.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let mut tensors = Vec::with_capacity(file.tensor_infos.len());
    for name in file.tensor_infos.keys() {
        let tensor = file.tensor(reader, name, &Device::Cpu)?.dequantize(&Device::Cpu)?;
        tensors.push((name.as_str(), QTensor::quantize(&tensor, GgmlDType::F32)?));
    }
    let tensors: Vec<(&str, &QTensor)> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let mut written = Cursor::new(Vec::new());
    gguf_file::write(&mut written, &metadata, &tensors)?;
    Ok(written.into_inner())
}
