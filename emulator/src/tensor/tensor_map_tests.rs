//! Round trips, damaged bytes, and one case for every rule with its message.

use super::*;
use crate::numeric::float16::OOB_NAN;

fn good() -> Tiled<'static> {
    Tiled {
        element: ElementType::F16,
        address: 0x1_0000_0010,
        dims: &[100, 1 << 32, 3],
        strides: &[208, 1 << 39],
        box_dims: &[64, 256, 1],
        element_strides: &[1, 2, 8],
        interleave: Interleave::None,
        swizzle: Swizzle::B128,
        l2_promotion: L2Promotion::B256,
        fill: Fill::Nan,
    }
}

#[test]
fn encoding_round_trips() {
    let map = TensorMap::tiled(&good()).unwrap();
    assert_eq!(TensorMap::decode(&map.encode()), Ok(map));
    for number in 0..13 {
        let element = ElementType::from_number(number).unwrap();
        let fill = if element.is_float() { Fill::Nan } else { Fill::Zero };
        let arguments = Tiled {
            element,
            fill,
            swizzle: Swizzle::None,
            ..good()
        };
        let map = TensorMap::tiled(&arguments).unwrap();
        assert_eq!(TensorMap::decode(&map.encode()), Ok(map));
    }
    let moved = map.with_address(0x20).unwrap();
    assert_eq!(TensorMap::decode(&moved.encode()).unwrap().address, 0x20);
    assert!(map.with_address(0x28).is_err());
}

#[test]
fn damaged_or_foreign_bytes_are_refused() {
    let bytes = TensorMap::tiled(&good()).unwrap().encode();
    assert_eq!(TensorMap::decode(&[0; 128]), Err(TensorMapError::Foreign));
    for (at, value) in [(0, 1), (8, 0), (8, 6), (9, 200), (10, 3), (11, 4), (12, 4), (13, 2)] {
        let mut bytes = bytes;
        bytes[at] = value;
        assert_eq!(TensorMap::decode(&bytes), Err(TensorMapError::Foreign), "byte {at}");
    }
    for at in 0..128 {
        for bit in 0..8 {
            let mut bytes = bytes;
            bytes[at] ^= 1 << bit;
            // Any result is fine, as long as it is a value and not a panic.
            let _ = TensorMap::decode(&bytes);
        }
    }
}

#[test]
fn every_rule_is_enforced() {
    let cases: [(Tiled<'_>, &str); 22] = [
        (Tiled { dims: &[], ..good() }, "tensorRank is 0, must be 1 to 5"),
        (
            Tiled {
                dims: &[1; 6],
                ..good()
            },
            "tensorRank is 6, must be 1 to 5",
        ),
        (
            Tiled {
                interleave: Interleave::B16,
                dims: &[8, 8],
                ..good()
            },
            "tensorRank is 2, must be 3 to 5",
        ),
        (
            Tiled {
                strides: &[208],
                ..good()
            },
            "globalStrides has 1 entries, must have 2",
        ),
        (
            Tiled {
                box_dims: &[64, 1],
                ..good()
            },
            "boxDim has 2 entries, must have 3",
        ),
        (
            Tiled {
                element_strides: &[1],
                ..good()
            },
            "elementStrides has 1 entries, must have 3",
        ),
        (
            Tiled { address: 8, ..good() },
            "globalAddress[0] is 8, must be a multiple of 16",
        ),
        (
            Tiled {
                address: 16,
                interleave: Interleave::B32,
                swizzle: Swizzle::B32,
                ..good()
            },
            "globalAddress[0] is 16, must be a multiple of 32",
        ),
        (
            Tiled {
                dims: &[100, 0, 3],
                ..good()
            },
            "globalDim[1] is 0, must be 1 to 4294967296",
        ),
        (
            Tiled {
                dims: &[100, (1 << 32) + 1, 3],
                ..good()
            },
            "globalDim[1] is 4294967297, must be 1 to 4294967296",
        ),
        (
            Tiled {
                strides: &[200, 16],
                ..good()
            },
            "globalStrides[0] is 200, must be a multiple of 16",
        ),
        (
            Tiled {
                strides: &[208, 1 << 40],
                ..good()
            },
            "globalStrides[1] is 1099511627776, must be 0 to 1099511627775",
        ),
        (
            Tiled {
                strides: &[208, 208],
                address: 32,
                interleave: Interleave::B32,
                ..good()
            },
            "globalStrides[0] is 208, must be a multiple of 32",
        ),
        (
            Tiled {
                box_dims: &[64, 257, 1],
                ..good()
            },
            "boxDim[1] is 257, must be 1 to 256",
        ),
        (
            Tiled {
                box_dims: &[0, 1, 1],
                ..good()
            },
            "boxDim[0] is 0, must be 1 to 256",
        ),
        (
            Tiled {
                box_dims: &[4, 1, 1],
                ..good()
            },
            "boxDim[0] is 8 bytes, must be a multiple of 16",
        ),
        (
            Tiled {
                box_dims: &[72, 1, 1],
                ..good()
            },
            "boxDim[0] is 144 bytes, must be at most the swizzle's 128",
        ),
        (
            Tiled {
                swizzle: Swizzle::B32,
                ..good()
            },
            "boxDim[0] is 128 bytes, must be at most the swizzle's 32",
        ),
        (
            Tiled {
                element_strides: &[1, 9, 1],
                ..good()
            },
            "elementStrides[1] is 9, must be 1 to 8",
        ),
        (
            Tiled {
                element_strides: &[1, 0, 1],
                ..good()
            },
            "elementStrides[1] is 0, must be 1 to 8",
        ),
        (
            Tiled {
                address: 32,
                strides: &[224, 224],
                interleave: Interleave::B32,
                ..good()
            },
            "interleave of 32 bytes needs the 32-byte swizzle, not B128",
        ),
        (
            Tiled {
                element: ElementType::U16,
                ..good()
            },
            "oobFill NaN needs a floating-point type, not U16",
        ),
    ];
    for (arguments, message) in cases {
        assert_eq!(TensorMap::tiled(&arguments).unwrap_err().to_string(), message);
    }
    let error = ElementType::from_number(13).unwrap_err().to_string();
    assert_eq!(error, "tensorDataType 13 is not supported for sm_90");
    assert!(swizzle_from_number(4).is_err());
}

#[test]
fn tf32_maps_round_what_they_load() {
    assert_eq!(ElementType::Tf32.loaded(0x3f80_1000), 0x3f80_2000);
    assert_eq!(ElementType::Tf32.loaded(0xffff_ffff), 0x7fff_e000);
    assert_eq!(ElementType::F32.loaded(0x3f80_1fff), 0x3f80_1fff);
    assert_eq!([Fill::Nan.byte(0), Fill::Nan.byte(1)], OOB_NAN.to_le_bytes());
}
