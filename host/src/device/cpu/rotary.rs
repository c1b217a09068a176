//! Rotary embedding of the rows of tokens, on their way from one tensor to another, as the kernels do it.

use std::sync::Arc;

use flash_attention_kernels::abi::RotaryParams;
use flash_attention_kernels::rotary::turn;
use flash_attention_kernels::work::TokenMove;

use crate::element::Element;

/// Moves all heads of each token of the lists, one token after the other.
///
/// # Safety
/// The rows of the tokens exist in both tensors, which lie at the addresses of the parameters and share no memory; angles exist for
/// every pair at the position of every token.
pub(super) unsafe fn move_tokens<T: Element>(p: &RotaryParams, lists: &[&Arc<[u8]>]) {
    let (from, to) = (p.from as *const T, p.to as *mut T);
    let angles = lists.get(1).map_or(&[][..], |angles| angles);
    let mut turns = vec![[1.0, 0.0]; p.pairs as usize];
    let element = |row: u64, head: u32, stride: u64| (row + u64::from(head) * stride) as usize;
    for token in lists[0].chunks_exact(size_of::<TokenMove>()) {
        let [row, target, position] = [0, 8, 16].map(|field| word(token, field));
        for (pair, turn) in turns.iter_mut().enumerate() {
            *turn = turn_of(p, angles, position, pair);
        }
        for head in 0..p.heads {
            let read = |column: usize| {
                let place = element(row, head, p.from_head_stride) + column * p.from_column_stride as usize;
                // SAFETY: the caller's contract.
                unsafe { *from.add(place) }
            };
            let write = |column: usize, x: T| {
                let place = element(target, head, p.to_head_stride) + column;
                // SAFETY: the caller's contract.
                unsafe { *to.add(place) = x }
            };
            for (pair, [cos, sin]) in turns.iter().enumerate() {
                let (first, second) = match p.interleaved {
                    0 => (pair, pair + turns.len()),
                    _ => (2 * pair, 2 * pair + 1),
                };
                let (a, b) = (read(first).to_f32(), read(second).to_f32());
                write(first, T::from_f32(a * cos - b * sin));
                write(second, T::from_f32(a * sin + b * cos));
            }
            for column in 2 * turns.len()..p.head_dim as usize {
                write(column, read(column));
            }
        }
    }
}

/// Returns cosine and sine of a pair at a position, with the direction of the turn.
fn turn_of(p: &RotaryParams, angles: &[u8], position: u64, pair: usize) -> [f32; 2] {
    let [cos, sin] = match p.tables {
        0 => turn(position.wrapping_mul(word(angles, 8 * pair))),
        _ => {
            let both = word(angles, 8 * (position as usize * p.pairs as usize + pair)).to_ne_bytes();
            let [a, b, c, d, e, f, g, h] = both;
            [[a, b, c, d], [e, f, g, h]].map(f32::from_ne_bytes)
        }
    };
    [cos, p.sign * sin]
}

/// Returns the 8 bytes of a list from byte `first` on.
fn word(list: &[u8], first: usize) -> u64 {
    let (word, _) = list[first..].split_first_chunk().expect("lists consist of words");
    u64::from_ne_bytes(*word)
}
