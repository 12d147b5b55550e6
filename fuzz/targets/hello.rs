//! A ClientHello, or what is sent in its place: the peek at its name ends, in an error.
#![no_main]

use std::{io::Cursor, sync::OnceLock};

use libfuzzer_sys::fuzz_target;
use tokio::{
    io::{join, sink},
    runtime::{Builder, Runtime},
};
use truename::tls::server::ServerTls;

fuzz_target!(|bytes: &[u8]| {
    static WORLD: OnceLock<(Runtime, ServerTls)> = OnceLock::new();
    let (runtime, tls) = WORLD.get_or_init(|| {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        (runtime, ServerTls::new().expect("a TLS server"))
    });
    let stream = join(Cursor::new(bytes), sink());
    let accepted = runtime.block_on(tls.accept(stream, |_| None, String::new, None));
    assert!(accepted.is_err(), "no certificate was there to be shown");
});
