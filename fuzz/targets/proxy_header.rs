//! PROXY headers, whole and cut anywhere: more bytes never change what fewer have decided, and what is written
//! again says the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use truename::{
    config::ProxyVersion,
    proxy_header::{encode, parse},
};

fuzz_target!(|bytes: &[u8]| {
    let whole = parse(bytes);
    for length in 0..bytes.len().min(300) {
        let part = parse(&bytes[..length]);
        assert!(part == Ok(None) || part == whole, "{length}: {part:?}, {whole:?}");
    }
    if let Ok(Some(header)) = whole {
        assert!(header.length <= bytes.len());
        for version in [ProxyVersion::V1, ProxyVersion::V2] {
            let again = encode(version, header.addresses.as_ref());
            let again = parse(&again).ok().flatten().map(|header| header.addresses);
            assert_eq!(again, Some(header.addresses));
        }
    }
});
