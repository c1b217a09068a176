//! The part of the NumPy array format that the program needs: the header is kept, the data is read or replaced.

use std::path::Path;

/// An array file: the bytes before the data, and the data.
#[derive(Debug, Clone)]
pub struct Npy {
    header: Vec<u8>,
    /// Elements in C order, little-endian.
    pub data: Vec<u8>,
}

const MAGIC: &[u8] = b"\x93NUMPY";

impl Npy {
    /// Reads an array of any numeric type.
    pub fn read(path: &Path) -> Result<Npy, String> {
        let show = path.display();
        let bytes = std::fs::read(path).map_err(|e| format!("cannot read {show}: {e}"))?;
        let not = |what: &str| format!("{show} is not a usable .npy file: {what}");
        let version = bytes.get(6).copied();
        if !bytes.starts_with(MAGIC) || bytes.len() < 12 {
            return Err(not("wrong magic"));
        }
        let (start, len) = match version {
            Some(1) => (10, usize::from(u16::from_le_bytes([bytes[8], bytes[9]]))),
            Some(2 | 3) => {
                let len = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
                (12, len as usize)
            }
            _ => return Err(not("unknown version")),
        };
        let end = start + len;
        let Some(text) = bytes.get(start..end) else {
            return Err(not("the header is cut off"));
        };
        let text = String::from_utf8_lossy(text);
        let descr = field(&text, "'descr':").ok_or_else(|| not("no descr"))?;
        if text.contains("'fortran_order': True") && shape(&text).len() > 1 {
            return Err(not("it is in Fortran order"));
        }
        let width = element_bytes(descr).ok_or_else(|| not(&format!("element type {descr}")))?;
        let count: usize = shape(&text).iter().product();
        let data = bytes[end..].to_vec();
        if data.len() != count * width {
            return Err(not(&format!(
                "{} bytes of data, expected {}",
                data.len(),
                count * width
            )));
        }
        Ok(Npy {
            header: bytes[..end].to_vec(),
            data,
        })
    }

    /// Writes the array back with new data of the same length.
    pub fn write(&self, path: &Path, data: &[u8]) -> Result<(), String> {
        let mut bytes = self.header.clone();
        bytes.extend_from_slice(data);
        std::fs::write(path, bytes).map_err(|e| format!("cannot write {}: {e}", path.display()))
    }
}

/// Returns the quoted value that follows a key.
fn field<'t>(text: &'t str, key: &str) -> Option<&'t str> {
    let rest = text.split_once(key)?.1.trim_start();
    let quote = rest.chars().next().filter(|c| matches!(c, '\'' | '"'))?;
    rest[1..].split(quote).next()
}

fn shape(text: &str) -> Vec<usize> {
    let Some((_, rest)) = text.split_once("'shape':") else {
        return Vec::new();
    };
    let inner = rest.split_once('(').and_then(|(_, r)| r.split_once(')'));
    let inner = inner.map_or("", |(inner, _)| inner);
    inner.split(',').filter_map(|n| n.trim().parse().ok()).collect()
}

/// Returns the bytes of an element type such as `<f4`; `None` for big-endian types, which a GPU cannot use.
fn element_bytes(descr: &str) -> Option<usize> {
    let digits = descr.trim_start_matches(['<', '|', '=']);
    let kind = digits.chars().next()?;
    if !matches!(kind, 'f' | 'i' | 'u' | 'b' | 'c' | 'V') {
        return None;
    }
    digits[1..].parse().ok().filter(|n| *n > 0)
}
