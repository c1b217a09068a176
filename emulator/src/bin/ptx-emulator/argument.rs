//! Kernel arguments in the syntax of the command line.

use std::path::PathBuf;

use ptx_emulator::tensor::swizzle::Swizzle;
use ptx_emulator::tensor::tensor_map::{
    ElementType, Fill, Interleave, L2Promotion, TensorMap, Tiled, swizzle_from_number,
};
use ptx_emulator::{DeviceMemory, DevicePtr};

use crate::npy::Npy;

/// One argument: its bytes in the parameter buffer, and the array to write back if there is one.
pub struct Argument {
    text: String,
    bytes: Vec<u8>,
    output: Option<(PathBuf, Npy, DevicePtr)>,
}

impl Argument {
    /// Reads an argument; arrays are copied to device memory.
    pub fn parse(text: &str, memory: &DeviceMemory) -> Result<Argument, String> {
        let unknown = || format!("argument `{text}` is not known; see --help");
        if text == "null" {
            return Ok(Self::scalar(text, 0u64.to_le_bytes().to_vec()));
        }
        let (kind, value) = text.split_once(':').ok_or_else(unknown)?;
        let wrong = |_| format!("argument `{text}`: `{value}` is not a {kind}");
        let bytes = match kind {
            "i32" => int(value, text, i64::from(i32::MIN), i64::from(i32::MAX))? as u32 as u64,
            "u32" => int(value, text, 0, i64::from(u32::MAX))? as u64,
            "i64" => value.parse::<i64>().map_err(|e| wrong(e.to_string()))? as u64,
            "u64" => value.parse::<u64>().map_err(|e| wrong(e.to_string()))?,
            "f32" => u64::from(value.parse::<f32>().map_err(|e| wrong(e.to_string()))?.to_bits()),
            "f64" => value.parse::<f64>().map_err(|e| wrong(e.to_string()))?.to_bits(),
            "in" | "out" => return Self::array(text, value, kind == "out", memory),
            "tma" => return Self::tensor(text, value, memory),
            _ => return Err(unknown()),
        };
        let width = if kind.ends_with("32") { 4 } else { 8 };
        Ok(Self::scalar(text, bytes.to_le_bytes()[..width].to_vec()))
    }

    fn scalar(text: &str, bytes: Vec<u8>) -> Argument {
        Argument {
            text: text.to_owned(),
            bytes,
            output: None,
        }
    }

    fn array(text: &str, path: &str, output: bool, memory: &DeviceMemory) -> Result<Argument, String> {
        let path = PathBuf::from(path);
        let array = Npy::read(&path)?;
        let ptr = memory.alloc(array.data.len()).map_err(|e| e.to_string())?;
        memory.write(ptr, &array.data).map_err(|e| e.to_string())?;
        Ok(Argument {
            text: text.to_owned(),
            bytes: ptr.0.to_le_bytes().to_vec(),
            output: output.then_some((path, array, ptr)),
        })
    }

    /// Reads a tensor map: `in:A.npy:elem=f16,swizzle=3,dims=128x64,strides=256,box=64x64`.
    fn tensor(text: &str, value: &str, memory: &DeviceMemory) -> Result<Argument, String> {
        let broken = |what: String| format!("argument `{text}`: {what}");
        let (direction, rest) = value.split_once(':').unwrap_or((value, ""));
        let output = match direction {
            "in" => false,
            "out" => true,
            _ => return Err(broken("expected tma:in:… or tma:out:…".into())),
        };
        let Some((path, options)) = rest.rsplit_once(':') else {
            return Err(broken("the tensor's options are missing".into()));
        };
        let mut argument = Self::array(text, path, output, memory)?;
        let address = argument.bytes.iter().rev().fold(0, |acc, b| acc << 8 | u64::from(*b));
        let map = tensor_map(address, options).map_err(broken)?;
        argument.bytes = map.encode().to_vec();
        Ok(argument)
    }

    /// Returns the argument's bytes for the parameter buffer.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Returns the argument's text on the command line.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Copies an output array back to its file.
    pub fn write_back(&self, memory: &DeviceMemory) -> Result<(), String> {
        let Some((path, array, ptr)) = &self.output else {
            return Ok(());
        };
        let mut data = vec![0; array.data.len()];
        memory.read(*ptr, &mut data).map_err(|e| e.to_string())?;
        array.write(path, &data)
    }
}

fn int(value: &str, text: &str, min: i64, max: i64) -> Result<i64, String> {
    match value.parse::<i64>() {
        Ok(number) if (min..=max).contains(&number) => Ok(number),
        _ => Err(format!(
            "argument `{text}`: `{value}` is not an integer from {min} to {max}"
        )),
    }
}

fn element(name: &str) -> Option<ElementType> {
    Some(match name {
        "u8" => ElementType::U8,
        "u16" => ElementType::U16,
        "u32" => ElementType::U32,
        "i32" | "s32" => ElementType::S32,
        "u64" => ElementType::U64,
        "i64" | "s64" => ElementType::S64,
        "f16" => ElementType::F16,
        "f32" => ElementType::F32,
        "f64" => ElementType::F64,
        "bf16" => ElementType::Bf16,
        "f32ftz" => ElementType::F32Ftz,
        "tf32" => ElementType::Tf32,
        "tf32ftz" => ElementType::Tf32Ftz,
        _ => return None,
    })
}

fn sizes(value: &str) -> Result<Vec<u64>, String> {
    let parts = value.split('x').filter(|p| !p.is_empty());
    let parse = |p: &str| p.parse().map_err(|_| format!("`{p}` is not a size"));
    parts.map(parse).collect()
}

fn tensor_map(address: u64, options: &str) -> Result<TensorMap, String> {
    let mut kind = None;
    let mut swizzle = Swizzle::None;
    let mut fill = Fill::Zero;
    let (mut dims, mut strides, mut boxes, mut steps) = (vec![], vec![], vec![], vec![]);
    for option in options.split(',') {
        let (key, value) = option.split_once('=').unwrap_or((option, ""));
        match key {
            "elem" => {
                let found = element(value);
                kind = Some(found.ok_or_else(|| format!("element type `{value}` is not known"))?);
            }
            "swizzle" => {
                let number = value
                    .parse()
                    .map_err(|_| format!("swizzle `{value}` is not a number"))?;
                swizzle = swizzle_from_number(number).map_err(|e| e.to_string())?;
            }
            "fill" | "oob" => {
                fill = match value {
                    "0" | "zero" => Fill::Zero,
                    "1" | "nan" => Fill::Nan,
                    _ => return Err(format!("fill `{value}` is not known")),
                }
            }
            "dims" => dims = sizes(value)?,
            "strides" => strides = sizes(value)?,
            "box" => boxes = sizes(value)?,
            "steps" => steps = sizes(value)?,
            _ => return Err(format!("option `{key}` is not known")),
        }
    }
    let narrow = |list: &[u64]| list.iter().map(|n| u32::try_from(*n).unwrap_or(u32::MAX)).collect();
    let box_dims: Vec<u32> = narrow(&boxes);
    let mut element_strides: Vec<u32> = narrow(&steps);
    if element_strides.is_empty() {
        element_strides = vec![1; dims.len()];
    }
    let tiled = Tiled {
        element: kind.ok_or("elem is missing")?,
        address,
        dims: &dims,
        strides: &strides,
        box_dims: &box_dims,
        element_strides: &element_strides,
        interleave: Interleave::None,
        swizzle,
        l2_promotion: L2Promotion::None,
        fill,
    };
    TensorMap::tiled(&tiled).map_err(|e| e.to_string())
}
