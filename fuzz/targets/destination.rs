//! The target of a request to the forward proxy: refused, or one host and one port.
#![no_main]

use http::{Method, Request, Uri};
use libfuzzer_sys::fuzz_target;
use truename::forward::destination::Destination;

fuzz_target!(|input: (bool, &str)| {
    let (connects, target) = input;
    let Ok(uri) = target.parse::<Uri>() else { return };
    let method = if connects { Method::CONNECT } else { Method::GET };
    let Ok(request) = Request::builder().method(method).uri(uri).body(()) else { return };
    let (head, ()) = request.into_parts();
    if let Ok(destination) = Destination::of(&head) {
        let host = destination.host();
        assert!(!host.is_empty() && !host.contains(['@', '/', '\\', ' ', '\0']), "{host:?}");
        assert_eq!(host, host.to_ascii_lowercase());
    }
});
