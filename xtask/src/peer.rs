//! Main loops of FlashAttention-3, read from its machine code.
//!
//! Source: `flash_attn_3/_C.so` of the PyPI wheel xformers 0.0.33.post2 (flash v2.8.3-133-gde1584b, CUDA 12.8), f16
//! kernels without local windows, softcap, variable lengths, paging, packed GQA or splits; `cuobjdump -xelf` and
//! `nvdisasm -c -hex` 13.5.37.

use flash_attention_kernels::entries::{Arch, Pass};

/// One step of one warp of FlashAttention-3.
pub struct Peer {
    arch: Arch,
    /// Forward, or the backward kernel of all gradients.
    pass: Pass,
    head_dim: u32,
    causal: bool,
    /// Queries and keys of a step of all multiplying warps together, and the number of these warps.
    tile: [u32; 3],
    instructions: u32,
    /// Sum of stall counts.
    stalls: u32,
    /// Number of tensor instructions.
    products: u32,
    /// Instructions and stall sum of the masked loop, if it was read.
    pub masked: Option<[u32; 2]>,
}

/// Figures of a peer for 64 x 64 scores shared by four warps.
#[derive(Debug, PartialEq)]
pub struct Figures {
    /// Sum of stall counts, in cycles.
    pub stalls: f64,
    /// Number of instructions other than products.
    pub others: f64,
}

impl Peer {
    /// Scales the step to 64 x 64 scores.
    pub fn for_scores(&self) -> Figures {
        let [queries, keys, warps] = self.tile.map(f64::from);
        let tiles = queries * keys / 4096.0 / (warps / 4.0);
        Figures {
            stalls: f64::from(self.stalls) / tiles,
            others: f64::from(self.instructions - self.products) / tiles,
        }
    }

    /// Returns the peer of a kernel, if its machine code was read.
    pub fn of(arch: Arch, pass: Pass, head_dim: u32, causal: bool) -> Option<&'static Self> {
        let key = |peer: &Peer| (peer.arch, peer.pass, peer.head_dim, peer.causal);
        PEERS.iter().find(|peer| key(peer) == (arch, pass, head_dim, causal))
    }
}

/// Makes a row of [`PEERS`]: instructions, stall sum and tensor instructions.
const fn peer(
    (arch, pass): (Arch, Pass),
    head_dim: u32,
    causal: bool,
    tile: [u32; 3],
    [instructions, stalls, products]: [u32; 3],
    masked: Option<[u32; 2]>,
) -> Peer {
    Peer {
        arch,
        pass,
        head_dim,
        causal,
        tile,
        instructions,
        stalls,
        products,
        masked,
    }
}

const FORWARD: (Arch, Pass) = (Arch::Sm90a, Pass::Forward);
const BACKWARD: (Arch, Pass) = (Arch::Sm90a, Pass::BackwardDqkv);
const PORTABLE: (Arch, Pass) = (Arch::Sm80, Pass::Forward);

#[rustfmt::skip]
const PEERS: &[Peer] = &[
    peer(FORWARD, 64, false, [192, 192, 12], [628, 1398, 16], None),
    peer(FORWARD, 64, true, [192, 128, 12], [427, 919, 12], Some([577, 1074])),
    peer(FORWARD, 96, false, [192, 144, 12], [515, 1089, 15], None),
    peer(FORWARD, 96, true, [192, 144, 12], [515, 1089, 15], None),
    peer(FORWARD, 128, false, [128, 176, 8], [590, 1322, 19], None),
    peer(FORWARD, 128, true, [128, 128, 8], [465, 1008, 16], Some([616, 1151])),
    peer(FORWARD, 192, false, [128, 112, 8], [485, 1072, 19], None),
    peer(FORWARD, 192, true, [128, 112, 8], [485, 1072, 19], None),
    peer(FORWARD, 256, false, [128, 80, 8], [460, 932, 21], None),
    peer(FORWARD, 256, true, [128, 80, 8], [449, 923, 21], Some([551, 1048])),
    peer(BACKWARD, 64, false, [128, 128, 8], [705, 1122, 32], None),
    peer(BACKWARD, 64, true, [128, 128, 8], [669, 1115, 32], Some([776, 1161])),
    peer(BACKWARD, 96, false, [64, 128, 8], [414, 779, 28], None),
    peer(BACKWARD, 96, true, [64, 128, 8], [446, 843, 28], None),
    peer(BACKWARD, 128, false, [80, 128, 8], [506, 979, 34], None),
    peer(BACKWARD, 128, true, [64, 128, 8], [483, 915, 32], None),
    peer(BACKWARD, 192, false, [64, 96, 12], [379, 760, 38], None),
    peer(BACKWARD, 192, true, [64, 96, 12], [392, 746, 38], None),
    peer(BACKWARD, 256, false, [64, 80, 8], [509, 959, 58], None),
    peer(BACKWARD, 256, true, [64, 80, 8], [524, 944, 58], None),
    peer(PORTABLE, 64, false, [128, 112, 4], [998, 2701, 224], None),
    peer(PORTABLE, 128, false, [128, 128, 8], [837, 2538, 256], None),
    peer(PORTABLE, 256, false, [128, 96, 8], [1058, 3653, 384], None),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_for_64_x_64_scores() {
        let figures = |pass, head_dim, causal| {
            let peer = Peer::of(Arch::Sm90a, pass, head_dim, causal);
            let figures = peer.expect("in the table").for_scores();
            (figures.stalls, figures.others)
        };
        assert_eq!(figures(Pass::Forward, 64, false), (466.0, 204.0));
        assert_eq!(figures(Pass::Forward, 128, true), (504.0, 224.5));
        assert_eq!(figures(Pass::BackwardDqkv, 192, false), (1520.0, 682.0));
        assert!(Peer::of(Arch::Sm80, Pass::BackwardDqkv, 64, false).is_none());
    }
}
