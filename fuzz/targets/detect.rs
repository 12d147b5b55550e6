//! The first bytes of a connection: more of them never change what fewer have decided.
#![no_main]

use libfuzzer_sys::fuzz_target;
use truename::detect::classify;

fuzz_target!(|bytes: &[u8]| {
    let mut decided = None;
    for length in 0..=bytes.len().min(64) {
        let protocol = classify(&bytes[..length]);
        assert!(decided.is_none() || protocol == decided, "{length}: {protocol:?}, {decided:?}");
        decided = decided.or(protocol);
    }
});
