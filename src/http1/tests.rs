//! The codec against itself, in any fragments, and against hyper.

use std::{convert::Infallible, future::poll_fn, task::Poll, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::stream;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, Version};
use http_body::{Body as _, Frame};
use http_body_util::{BodyExt as _, Empty, StreamBody};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use proptest::{collection::vec, prelude::*, sample::select};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    sync::mpsc,
    time::timeout,
};

use super::*;
use crate::body::{BoxError, RequestBody};

const MAX_HEAD: usize = 64 * 1024;

/// A message, whoever read it.
#[derive(Debug, PartialEq)]
struct Message {
    start: String,
    version: Version,
    fields: Vec<(String, Vec<u8>)>,
    /// None where it is not what the head said.
    body: Option<Vec<u8>>,
}

#[test]
fn a_request_is_the_same_in_any_fragments() {
    let heads = [
        "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        "POST /p?q HTTP/1.1\r\nHost: a\r\nX-Y: \u{e9}\r\n\r\n",
    ];
    for head in heads {
        for cut in 0..head.len() {
            let mut inbox = Inbox::default();
            inbox.bytes.extend_from_slice(&head.as_bytes()[..cut]);
            if inbox.may_have_head(MAX_HEAD) {
                assert_eq!(
                    parse_request(&mut inbox.bytes, MAX_HEAD).map(|head| head.is_some()),
                    Ok(false)
                );
            }
            inbox.bytes.extend_from_slice(&head.as_bytes()[cut..]);
            assert!(inbox.may_have_head(MAX_HEAD), "cut at {cut}");
            let parsed = parse_request(&mut inbox.bytes, MAX_HEAD).unwrap().unwrap();
            assert_eq!(parsed.headers["host"], "a");
            assert!(inbox.bytes.is_empty());
        }
    }
}

/// Some servers write all chunks' sizes in one width.
#[test]
fn a_body_of_any_length_may_have_its_chunks_sizes_padded() {
    let mut decoder = Decoder::new(Framing::Chunked);
    for _ in 0..10_000 {
        let mut bytes = BytesMut::from(&b"5   \r\nhello\r\n"[..]);
        assert!(decoder.decode(&mut bytes).unwrap().is_some());
        assert!(decoder.decode(&mut bytes).unwrap().is_none() && bytes.is_empty());
    }
}

/// Its peer would take the next request for the rest of its body.
#[tokio::test]
async fn a_request_that_breaks_off_under_its_response_is_the_last_on_its_connection() {
    let (stream, mut origin) = duplex(1024);
    let (parts, mut sent) = mpsc::unbounded_channel::<Result<Frame<Bytes>, BoxError>>();
    let body = StreamBody::new(stream::poll_fn(move |cx| sent.poll_recv(cx)));
    let head = Request::post("/").header("transfer-encoding", "chunked").body(()).unwrap();
    let (head, ()) = head.into_parts();
    origin.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
    let mut client = ClientConnection::new(stream);
    client.send(&head, RequestBody::boxed(body), false, None).await.unwrap();
    parts.send(Err("it broke off".into())).unwrap();
    // Nobody asks for the response's body meanwhile.
    poll_fn(|cx| {
        client.poll_progress(cx);
        Poll::Ready(())
    })
    .await;
    let frame = poll_fn(|cx| client.poll_frame(cx)).await;
    assert!(matches!(frame, Some(Err(ExchangeError::RequestBody(_)))), "{frame:?}");
    while poll_fn(|cx| client.poll_frame(cx)).await.is_some() {}
    assert!(!client.is_free());
}

#[test]
fn a_head_keeps_its_spelling() {
    let head =
        "HTTP/1.1 299 Fine, thanks\r\nETag: a\r\nset-cookie: b\r\nSet-Cookie: c\r\nX_y: d\r\n";
    let mut bytes = BytesMut::from(format!("{head}\r\n").as_bytes());
    let mut parsed = parse_response(&mut bytes, MAX_HEAD).unwrap().unwrap();
    let written = |parsed: &http::response::Parts| {
        let mut out = Vec::new();
        push_response(&mut out, parsed);
        String::from_utf8(out).unwrap()
    };
    assert_eq!(written(&parsed), head);
    parsed.headers.remove("set-cookie");
    parsed.headers.insert("x-new", HeaderValue::from_static("e"));
    let text = written(&parsed);
    for line in ["ETag: a\r\n", "X_y: d\r\n", "x-new: e\r\n"] {
        assert!(text.contains(line), "{text}");
    }
}

#[test]
fn what_is_too_much_of_a_head_is_refused() {
    let parse = |head: String| parse_request(&mut BytesMut::from(head.as_bytes()), 1024);
    let field = |size: usize| format!("GET / HTTP/1.1\r\nA: {}\r\n", "x".repeat(size));
    assert!(matches!(parse(field(900)), Ok(None)));
    assert_eq!(parse(field(2000)).unwrap_err(), HeadError::TooLarge);
    assert_eq!(parse(field(2000) + "\r\n").unwrap_err(), HeadError::TooLarge);
    let fields = "a: b\r\n".repeat(101);
    let fields = parse(format!("GET / HTTP/1.1\r\n{fields}\r\n"));
    assert_eq!(fields.unwrap_err(), HeadError::TooManyFields);
    let long = format!("GET /{} HTTP/1.1\r\n\r\n", "x".repeat(70_000));
    let parsed = parse_request(&mut BytesMut::from(long.as_bytes()), 100_000);
    assert_eq!(parsed.unwrap_err(), HeadError::TargetTooLong);
}

#[test]
fn chunks_that_two_readers_could_take_for_different_ones_are_refused() {
    for (chunks, error) in [
        ("3\nabc\r\n0\r\n\r\n", BodyError::Chunk),
        ("3\r\nabc\n0\r\n\r\n", BodyError::Chunk),
        ("3\r\nabcd\r\n0\r\n\r\n", BodyError::Chunk),
        ("+3\r\nabc\r\n0\r\n\r\n", BodyError::Chunk),
        ("0x3\r\nabc\r\n0\r\n\r\n", BodyError::Chunk),
        ("\r\nabc\r\n0\r\n\r\n", BodyError::Chunk),
        ("3;a\rb\r\nabc\r\n0\r\n\r\n", BodyError::Chunk),
        ("3 x\r\nabc\r\n0\r\n\r\n", BodyError::Chunk),
        ("3\x0c\r\nabc\r\n0\r\n\r\n", BodyError::Chunk),
        ("00000000000000003\r\nabc\r\n0\r\n\r\n", BodyError::Chunk),
        ("3\r\nabc\r\n0\r\nno field\r\n\r\n", BodyError::Chunk),
        (&format!("3;{}\r\n", "x".repeat(5000)), BodyError::TooLarge),
        (&format!("0\r\nA: {}", "x".repeat(20_000)), BodyError::TooLarge),
        (&format!("1;{}\r\na\r\n", "x".repeat(4000)).repeat(6), BodyError::TooLarge),
        ("3\r\nab", BodyError::Incomplete),
        ("3\r\nabc\r\n", BodyError::Incomplete),
        ("3\r\nabc\r\n0\r\n", BodyError::Incomplete),
    ] {
        let body = decode(Framing::Chunked, [chunks.as_bytes()]);
        assert_eq!(body.map(|body| body.0), Err(error), "{chunks:.40}");
    }
    let (body, trailers, left) =
        decode(Framing::Chunked, [&b"3 ;a=b\r\nabc\r\n00\r\nX-Sum: 1\r\n\r\nnext"[..]]).unwrap();
    assert_eq!((&body[..], &left[..]), (&b"abc"[..], &b"next"[..]));
    assert_eq!(trailers.unwrap()["x-sum"], "1");
}

proptest! {
    #[test]
    fn a_body_comes_back_as_it_was_in_any_pieces_and_fragments(
        pieces in vec(vec(any::<u8>(), 0..300), 0..8),
        cuts in vec(1usize..90, 1..40),
        trailer in any::<bool>(),
        framing in 0usize..3,
    ) {
        let whole: Vec<u8> = pieces.concat();
        let framing = [Framing::Chunked, Framing::Close, Framing::Length(whole.len() as u64)][framing];
        let mut encoder = Encoder::new(framing, true);
        let mut out = Outbox::default();
        for piece in &pieces {
            encoder.push(Frame::data(piece.clone().into()), &mut out).unwrap();
        }
        if trailer {
            let name = HeaderName::from_static("x-sum");
            let trailers = HeaderMap::from_iter([(name, HeaderValue::from_static("1"))]);
            encoder.push(Frame::trailers(trailers), &mut out).unwrap();
        }
        encoder.finish(&mut out).unwrap();
        let wire = written(&mut out);

        let mut rest = &wire[..];
        let mut cuts = cuts.iter().cycle();
        let fragments = std::iter::from_fn(|| {
            let (first, more) = rest.split_at((*cuts.next()?).min(rest.len()));
            rest = more;
            (!first.is_empty()).then_some(first)
        });
        let (body, trailers, left) = decode(framing, fragments).unwrap();
        prop_assert_eq!(body, whole);
        prop_assert_eq!(trailers.is_some(), trailer && framing == Framing::Chunked);
        prop_assert_eq!(left, b"");
    }

    /// What is taken for a request is one to hyper, too, and the same. What hyper takes for one is
    /// taken, unless it has a `Transfer-Encoding` that is not simply `chunked`.
    #[test]
    fn requests_are_what_hyper_takes_them_for(
        method in select(&["GET", "POST", "get", "X-Y", "G ET", "", "G\0T"][..]),
        target in select(&["/", "/a?b=%20", "*", "a:1", "http://b/c", "/\u{e9}", "/a b", "", "/<"][..]),
        version in select(&["HTTP/1.1", "HTTP/1.0", "HTTP/2.0", "http/1.1", ""][..]),
        end in select(&["\r\n", "\r\n", "\r\n", "\n", "\r"][..]),
        fields in vec(field(), 0..5),
        body in body(),
    ) {
        let head = format!("{method} {target} {version}{end}{}{end}", fields.join(end));
        let fields_end = if fields.is_empty() { "" } else { end };
        let wire = [head.as_bytes(), fields_end.as_bytes(), body.as_bytes()].concat();
        let (ours, theirs) = (our_request(&wire), hypers_request(&wire));
        let coded = fields.iter().any(|field| field.to_lowercase().starts_with("transfer-encoding"));
        if ours.is_some() || !coded {
            prop_assert_eq!(ours, theirs, "{:?}", String::from_utf8_lossy(&wire));
        }
    }

    /// The same of responses, and of the client in front of the codec.
    #[test]
    fn responses_are_what_hyper_takes_them_for(
        start in select(&[
            "HTTP/1.1 200 OK", "HTTP/1.0 200 OK", "HTTP/1.1 204 ", "HTTP/1.1 304 Not", "HTTP/1.1 404",
            "HTTP/1.1 103 Early\r\nLink: a\r\n\r\nHTTP/1.1 200 OK", "HTTP/1.1 20 OK", "HTTP/3 200 OK",
        ][..]),
        head in any::<bool>(),
        fields in vec(field(), 0..5),
        body in body(),
    ) {
        let lines: String = fields.iter().map(|field| format!("{field}\r\n")).collect();
        let wire = format!("{start}\r\n{lines}\r\n{body}").into_bytes();
        let method = if head { Method::HEAD } else { Method::GET };
        let (ours, theirs) = (our_response(&method, &wire), hypers_response(&method, &wire));
        let coded = fields.iter().any(|field| field.to_lowercase().starts_with("transfer-encoding"));
        if ours.is_some() || !coded {
            prop_assert_eq!(ours, theirs, "{:?}", String::from_utf8_lossy(&wire));
        }
    }
}

fn field() -> impl Strategy<Value = String> {
    let name = select(
        &["Host", "x-a", "X-A", "Cookie", "Connection", "Expect", "a b", "a ", " a", "", "a\u{e9}"]
            [..],
    );
    let value = select(&["", "1", " b ", "a, b", "close", "\u{e9}", "\x7f", "a\rb", "\0"][..]);
    let length = select(&["0", "3", "3", "5", "-1", "+3", "3, 3", "3 ", "x", ""][..]);
    let coding =
        select(&["chunked", "Chunked", "gzip, chunked", "chunked, gzip", "identity", ""][..]);
    prop_oneof![
        6 => (name, value).prop_map(|(name, value)| format!("{name}:{value}")),
        3 => length.prop_map(|length| format!("Content-Length: {length}")),
        2 => coding.prop_map(|coding| format!("Transfer-Encoding: {coding}")),
    ]
}

fn body() -> impl Strategy<Value = String> {
    let whole = select(
        &[
            "",
            "abc",
            "abcde",
            "3\r\nabc\r\n0\r\n\r\n",
            "3;x=y\r\nabc\r\n0\r\nA: b\r\n\r\n",
            "0\r\n\r\n",
        ][..],
    );
    let broken = select(&["ab", "3\r\nab", "z\r\n", "3\nabc\r\n", "3\r\nabcd\r\n", "0\r\n"][..]);
    prop_oneof![3 => whole, 1 => broken].prop_map(str::to_owned)
}

/// A body, its trailers, and what comes behind it.
type Decoded = (Vec<u8>, Option<HeaderMap>, Vec<u8>);

/// The body of these fragments.
fn decode<'a>(
    framing: Framing,
    fragments: impl IntoIterator<Item = &'a [u8]>,
) -> Result<Decoded, BodyError> {
    let (mut decoder, mut bytes) = (Decoder::new(framing), BytesMut::new());
    let (mut body, mut trailers) = (Vec::new(), None);
    for fragment in fragments {
        bytes.extend_from_slice(fragment);
        while let Some(frame) = decoder.decode(&mut bytes)? {
            match frame.into_data() {
                Ok(data) => body.extend_from_slice(&data),
                Err(frame) => trailers = frame.into_trailers().ok(),
            }
        }
    }
    decoder.end()?;
    Ok((body, trailers, bytes.to_vec()))
}

fn written(out: &mut Outbox) -> Vec<u8> {
    let mut wire = Vec::new();
    let mut cx = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(out.poll_flush(&mut cx, &mut wire).is_ready());
    wire
}

fn fields(headers: &HeaderMap) -> Vec<(String, Vec<u8>)> {
    // Lengths are each side's own: they are compared by the body.
    let others = headers.iter().filter(|(name, _)| *name != "content-length");
    let others = others.map(|(name, value)| (name.to_string(), value.as_bytes().to_vec()));
    // The order counts among those of one name.
    let mut fields: Vec<_> = others.collect();
    fields.sort_by(|one, other| one.0.cmp(&other.0));
    fields
}

fn our_request(wire: &[u8]) -> Option<Message> {
    let mut bytes = BytesMut::from(wire);
    let mut head = parse_request(&mut bytes, MAX_HEAD).ok()??;
    let framing = request_framing(&mut head).ok()?.body.unwrap_or(Framing::Length(0));
    Some(Message {
        start: format!("{} {}", head.method, head.uri),
        version: head.version,
        fields: fields(&head.headers),
        body: decode(framing, [&bytes[..]]).ok().map(|(body, ..)| body),
    })
}

fn our_response(method: &Method, wire: &[u8]) -> Option<Message> {
    run(async {
        let stream = origin(wire);
        let mut client = ClientConnection::new(stream);
        let (head, ()) = request(method).map(|_| ()).into_parts();
        let response = client.send(&head, RequestBody::empty(), false, None).await.ok()?;
        let mut body = Some(Vec::new());
        while let Some(frame) = std::future::poll_fn(|cx| client.poll_frame(cx)).await {
            match (frame, &mut body) {
                (Ok(frame), Some(body)) => {
                    body.extend(frame.into_data().into_iter().flatten());
                }
                _ => body = None,
            }
        }
        Some(message(&response.into_parts().0, body))
    })
}

fn hypers_request(wire: &[u8]) -> Option<Message> {
    run(async {
        // All there is to read, and then the end. What is answered is held unread.
        let (stream, mut client) = duplex(1024 * 1024);
        client.write_all(wire).await.ok()?;
        client.shutdown().await.ok()?;
        let (requests, mut received) = mpsc::channel(8);
        let service = service_fn(move |request: Request<Incoming>| {
            let requests = requests.clone();
            async move {
                let (head, body) = request.into_parts();
                let message = Message {
                    start: format!("{} {}", head.method, head.uri),
                    version: head.version,
                    fields: fields(&head.headers),
                    body: body.collect().await.ok().map(|body| body.to_bytes().to_vec()),
                };
                let _ = requests.try_send(message);
                Ok::<_, Infallible>(Response::new(Empty::<Bytes>::new()))
            }
        });
        let connection = hyper::server::conn::http1::Builder::new()
            .half_close(true)
            .serve_connection(TokioIo::new(stream), service);
        let _ = connection.await;
        received.try_recv().ok()
    })
}

fn hypers_response(method: &Method, wire: &[u8]) -> Option<Message> {
    run(async {
        let io = TokioIo::new(origin(wire));
        let (mut sender, connection) = hyper::client::conn::http1::handshake(io).await.ok()?;
        let connection = tokio::spawn(connection);
        let response = sender.send_request(request(method)).await.ok()?;
        let (head, body) = response.into_parts();
        let body = body.collect().await.ok().map(|body| body.to_bytes().to_vec());
        connection.abort();
        Some(message(&head, body))
    })
}

fn message(head: &http::response::Parts, body: Option<Vec<u8>>) -> Message {
    let (start, version) = (head.status.to_string(), head.version);
    Message { start, version, fields: fields(&head.headers), body }
}

fn request(method: &Method) -> Request<Empty<Bytes>> {
    let request = Request::builder().method(method).uri("/").header("host", "a");
    let request = request.body(Empty::new()).unwrap();
    assert!(request.body().is_end_stream());
    request
}

/// A stream to one that answers `wire`, and nothing more, once it has a request.
fn origin(wire: &[u8]) -> DuplexStream {
    let (stream, mut origin) = duplex(1024 * 1024);
    let wire = wire.to_vec();
    tokio::spawn(async move {
        let mut request = BytesMut::new();
        while !request.ends_with(b"\r\n\r\n") {
            origin.read_buf(&mut request).await.unwrap();
        }
        origin.write_all(&wire).await.unwrap();
        origin.shutdown().await.unwrap();
        // Held until the other side is done.
        while origin.read_buf(&mut request).await.is_ok_and(|read| read > 0) {}
    });
    stream
}

fn run<T>(future: impl Future<Output = Option<T>>) -> Option<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { timeout(Duration::from_secs(5), future).await.expect("an end") })
}
