//! A message of HTTP/1, in one piece or in many: it is taken for the same. A head that was understood
//! is understood alike once it is written again.
#![no_main]

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, Method};
use libfuzzer_sys::fuzz_target;
use truename::http1::{
    Decoder, Framing, HeadError, Inbox, parse_request, parse_response, push_request, push_response,
    request_framing, response_framing,
};

const MAX_HEAD: usize = 2048;

#[derive(Debug, PartialEq)]
struct Message {
    head: Vec<u8>,
    framing: Framing,
    /// None where it is broken, or not all there.
    body: Option<Vec<u8>>,
}

fuzz_target!(|input: (u8, bool, &[u8])| {
    let (fragment, request, bytes) = input;
    let whole = read(request, MAX_HEAD, [bytes].into_iter());
    let pieces = read(request, MAX_HEAD, bytes.chunks(fragment.max(1).into()));
    assert_eq!(whole, pieces);
    if let Some(message) = whole {
        // Written again it has a space for each field.
        let again = read(request, 2 * MAX_HEAD, [&message.head[..]].into_iter());
        let again = again.expect("what was read once");
        assert_eq!(again.framing, message.framing);
        let (one, other) = (message.head.to_ascii_lowercase(), again.head.to_ascii_lowercase());
        assert_eq!(Bytes::from(one), Bytes::from(other));
    }
});

/// The first message of what comes in these fragments, if it has a head.
fn read<'a>(
    request: bool,
    max_size: usize,
    mut fragments: impl Iterator<Item = &'a [u8]>,
) -> Option<Message> {
    let mut inbox = Inbox::default();
    let (head, framing) = loop {
        inbox.bytes.extend_from_slice(fragments.next()?);
        if inbox.may_have_head(max_size)
            && let Some(found) = head(request, max_size, &mut inbox.bytes).ok()?
        {
            break found;
        }
    };
    let mut decoder = Decoder::new(framing);
    let mut body = Some(Vec::new());
    loop {
        match decoder.decode(&mut inbox.bytes) {
            Err(_) => body = None,
            Ok(Some(frame)) => {
                if let Some(body) = &mut body {
                    body.extend(frame.into_data().unwrap_or_default());
                }
                continue;
            }
            Ok(None) => {}
        }
        let Some(more) = fragments.next().filter(|_| body.is_some()) else { break };
        inbox.bytes.extend_from_slice(more);
    }
    if decoder.end().is_err() {
        body = None;
    }
    Some(Message { head, framing, body })
}

/// A head as it is written again, and where its body ends.
fn head(
    request: bool,
    max_size: usize,
    bytes: &mut BytesMut,
) -> Result<Option<(Vec<u8>, Framing)>, HeadError> {
    let mut out = Vec::new();
    let one_length = |headers: &HeaderMap| headers.get_all("content-length").iter().count() <= 1;
    if request {
        let Some(mut parts) = parse_request(bytes, max_size)? else { return Ok(None) };
        let framing = request_framing(&mut parts)?.body.unwrap_or(Framing::Length(0));
        assert!(one_length(&parts.headers));
        parts.headers.remove("transfer-encoding");
        if framing == Framing::Chunked {
            parts.headers.insert("transfer-encoding", "chunked".parse().expect("a value"));
            parts.version = http::Version::HTTP_11;
        }
        push_request(&mut out, &parts);
        return Ok(Some((out, framing)));
    }
    let Some(mut parts) = parse_response(bytes, max_size)? else { return Ok(None) };
    let framing = response_framing(&Method::GET, &mut parts)?;
    assert!(
        framing != Framing::Close
            || parts.headers.contains_key("transfer-encoding")
            || one_length(&parts.headers)
    );
    push_response(&mut out, &parts);
    out.extend_from_slice(b"\r\n");
    Ok(Some((out, framing)))
}
