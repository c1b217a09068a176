//! Tests of the micro-kernels' headers, parameters and bounds, which need no GPU. The emulator's own tests run the
//! kernels, and on a GPU `gpu_kernels micro` does.

use flash_attention_tests::files::workspace;
use flash_attention_tests::gpu::loads;
use flash_attention_tests::micro::{MAP_BYTES, Micro};

fn micros() -> Vec<Micro> {
    Micro::read_folder(&workspace().join("tests/ptx")).expect("every header is right")
}

#[test]
fn every_header_says_what_a_launch_needs() {
    let micros = micros();
    assert!(micros.len() >= 66, "only {} kernels", micros.len());
    for micro in &micros {
        assert!(loads(&micro.target, (9, 0)), "{}: {}", micro.name, micro.target);
        assert!(
            (7..=8).contains(&micro.version.0),
            "{}: {:?}",
            micro.name,
            micro.version
        );
        assert!(
            (1..=1024).contains(&micro.block) && (1..=8).contains(&micro.cluster),
            "{}",
            micro.name
        );
        // Only approximate instructions may have a bound other than equality.
        assert_eq!(
            micro.within.is_empty(),
            !micro.text.contains(".approx."),
            "{}",
            micro.name
        );
        assert!(micro.within.is_empty() || micro.output.len().is_multiple_of(micro.within.len()));
        for map in &micro.maps {
            let buffer = if map.in_input { &micro.input } else { &micro.output };
            let elements: u64 = map.dims.iter().product();
            assert!(
                elements * map.element.bytes() <= 4 * buffer.len() as u64,
                "{}: {map:?}",
                micro.name
            );
            assert!((1..=5).contains(&map.dims.len()), "{}: {map:?}", micro.name);
            // Requirements of cuTensorMapEncodeTiled.
            let row = u64::from(map.box_dims[0]) * map.element.bytes();
            assert!(row.is_multiple_of(16), "{}: {map:?}", micro.name);
            assert!(map.span == 16 || row <= map.span.into(), "{}: {map:?}", micro.name);
            assert!(
                map.strides().iter().all(|s| s.is_multiple_of(16)),
                "{}: {map:?}",
                micro.name
            );
        }
    }
    assert!(micros.iter().any(|micro| micro.cluster == 2));
}

#[test]
fn parameters_are_two_addresses_and_the_maps() {
    for micro in micros() {
        let mut encoded = Vec::new();
        let params = micro.params(0x1100, 0x2200, |map, address| {
            assert_eq!(address, if map.in_input { 0x1100 } else { 0x2200 });
            encoded.push(map.clone());
            Ok::<_, ()>([encoded.len() as u8; MAP_BYTES])
        });
        let params = params.expect("nothing fails");
        assert_eq!(params[0], 0x1100_u64.to_le_bytes());
        assert_eq!(params[1], 0x2200_u64.to_le_bytes());
        assert_eq!(encoded, micro.maps);
        for (i, param) in params[2..].iter().enumerate() {
            assert_eq!(param, &[1 + i as u8; MAP_BYTES]);
        }
        // The kernel must declare the same number of parameters.
        let (_, entry) = micro.text.split_once(".entry test").expect("an entry");
        let (list, _) = entry.split_once(')').expect("a parameter list");
        assert_eq!(list.matches(".param").count(), params.len(), "{}: {list}", micro.name);
    }
}

fn with_bounds(within: &str, words: &str) -> Micro {
    let text = format!("// block: 1\n// within: {within}\n// output:\n//  {words}\n.version 7.0\n.target sm_80\n");
    Micro::parse("made here", &text).expect("a header")
}

#[test]
fn words_must_be_equal_where_no_bound_is_given() {
    let text = "// block: 1\n// output:\n//  00000001 ffffffff\n.version 7.0\n.target sm_80\n";
    let micro = Micro::parse("made here", text).expect("a header");
    assert_eq!(micro.compare(&[1, u32::MAX]), Ok(0));
    let error = micro.compare(&[0, 0]).expect_err("both differ");
    assert!(error.contains("word 0 is 00000000, not 00000001; 2 of 2"), "{error}");
    assert!(micro.compare(&[1]).is_err());
}

#[test]
fn bounds_allow_what_they_say_and_no_more() {
    let word = |x: f32| x.to_bits();
    let near = |micro: &Micro, words: &[u32]| micro.compare(words).ok();
    // 2.0, 0.5, 0, +inf under 2 ulp: the specials stay exact.
    let ulp = with_bounds("ulp:2", "40000000 3f000000 00000000 7f800000");
    let exact = [0x4000_0000, 0x3f00_0000, 0, 0x7f80_0000];
    assert_eq!(near(&ulp, &exact), Some(0));
    assert_eq!(near(&ulp, &[0x4000_0002, 0x3eff_fffe, 0, 0x7f80_0000]), Some(2));
    for (i, wrong) in [
        (0, 0x4000_0003),
        (1, 0x3eff_fffd),
        (2, 1),
        (2, 0x8000_0000),
        (3, 0x7f7f_ffff),
        (0, 0x7fff_ffff),
    ] {
        let mut words = exact;
        words[i] = wrong;
        assert_eq!(near(&ulp, &words), None, "{wrong:08x}");
    }
    // Three, relative and mixed with 2^-22; zero is exact under the first.
    let kinds = with_bounds("rel:-22 mixed:-22 abs:-20", "40400000 00000000 00000000");
    let some = [word(3.0 * (1.0 + 2e-7)), word(2e-7), word(-9e-7)];
    assert_eq!(near(&kinds, &some), Some(3));
    assert_eq!(near(&kinds, &[word(3.0 * (1.0 + 3e-7)), 0, 0]), None);
    assert_eq!(near(&kinds, &[word(3.0), word(3e-7), 0]), None);
    assert_eq!(near(&kinds, &[word(3.0), 0, word(1e-6)]), None);
    assert_eq!(near(&kinds, &[word(3.0), 0, word(f32::NAN)]), None);
    let relative = with_bounds("rel:-22", "00000000 7f800000");
    assert_eq!(near(&relative, &[1, 0x7f80_0000]), None);
    assert_eq!(near(&relative, &[0, word(f32::MAX)]), None);
    // Two halves, 1.0 and 2.0: one ulp of f16 is 2^-10, less than 2^-9.9.
    let half = with_bounds("half:-9.9", "40003c00");
    assert_eq!(near(&half, &[0x4001_3c01]), Some(1));
    assert_eq!(near(&half, &[0x4000_3c02]), None);
    assert_eq!(near(&half, &[0x4002_3c00]), None);
}

#[test]
fn wrong_headers_are_refused() {
    for (text, word) in [
        ("// output:\n// 1\n.version 7.0\n.target sm_80\n", "block"),
        ("// block: 32\n.version 7.0\n.target sm_80\n", "output"),
        ("// block: 32\n// output:\n// 1\n.target sm_80\n", "version"),
        ("// block: 32\n// output:\n// 1\n.version 7.0\n", "target"),
        ("// block: many\n", "many"),
        ("// block: 1\n// output:\n// xyz\n", "xyz"),
        ("// block: 1\n// map: input f32 8,4 4 128\n", "not a map"),
        ("// block: 1\n// map: input f32 8,4 4,4 17\n", "not a map"),
        ("// block: 1\n// within: ulps:2\n", "ulps:2"),
    ] {
        let error = Micro::parse("made here", text).expect_err(text);
        assert!(error.contains(word), "{error}");
    }
}
