//! Clients that vanish, stall, smuggle and flood: none of them costs another its response, and what
//! goes out is one request that no two readers could take apart differently.

use std::{net::SocketAddr, time::Duration};

use crate::support::{
    client::{self, H2},
    message::Message,
    peer::Peer,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene},
    scripts,
    through::Through,
    within,
};
use bytes::Bytes;
use serde_json::Value;

const GET: &str = "GET / HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n";
const IN_FLIGHT: &str = "truename_http_requests_in_flight{alias=\"webscaler-manual\"}";
const IDLE: &str = "truename_upstream_connections_idle{alias=\"webscaler-manual\"}";

/// An origin that responds, and a proxy with a short timeout for heads.
pub(crate) async fn hasty(header_timeout: &str) -> (RawOrigin, Proxy, SocketAddr, Scene) {
    let mut scene = Scene::new(1).await;
    let origin = scene.script(scripts::respond).remove(0);
    let listener = format!("listener: {{header_timeout: {header_timeout}}}\n");
    let proxy = Proxy::start(&(scene.yaml("") + &listener)).await;
    let address = proxy.address(ALIAS).await;
    (origin, proxy, address, scene)
}

#[track_caller]
fn problem(response: &Message, status: u16) -> Value {
    assert_eq!(response.status(), status, "{}\n{}", response.head, response.text());
    assert_eq!(response.field("content-type"), Some("application/problem+json"));
    let problem = response.json();
    assert_eq!(problem["type"], "urn:truename:error:http_request_error", "{problem}");
    assert_eq!(problem["status"], status);
    assert!(!problem["detail"].as_str().unwrap().is_empty());
    let proxy_status = response.field("proxy-status").unwrap();
    assert!(proxy_status.starts_with("truename; error=http_request_error"), "{proxy_status}");
    problem
}

async fn until_metric(proxy: &Proxy, series: &str, value: f64) {
    within(&format!("{series} to be {value}"), async {
        while proxy.metric(series).await != Some(value) {}
    })
    .await;
}

/// An HTTP/2 connection that does as it pleases: HPACK literals, and frames by hand.
pub(crate) struct Frames(pub Peer);

impl Frames {
    pub const DATA: u8 = 0;
    pub const HEADERS: u8 = 1;
    pub const RST_STREAM: u8 = 3;
    pub const SETTINGS: u8 = 4;
    pub const GOAWAY: u8 = 7;
    pub const END_STREAM: u8 = 1;
    pub const END_HEADERS: u8 = 4;

    pub async fn connect(address: SocketAddr) -> Self {
        let mut peer = client::connect(address).await;
        peer.send("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
        let mut frames = Self(peer);
        frames.send(Self::SETTINGS, 0, 0, &[]).await;
        frames
    }

    pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        frame
    }

    pub async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        self.0.send(Self::frame(kind, flags, stream, payload)).await;
    }

    pub fn fields(fields: &[(&str, &str)]) -> Vec<u8> {
        let mut block = Vec::new();
        for text in fields.iter().flat_map(|(name, value)| [None, Some(*name), Some(*value)]) {
            match text {
                // A literal with a new name, never indexed.
                None => block.push(0x10),
                Some(text) if text.len() < 127 => {
                    block.push(text.len() as u8);
                    block.extend(text.as_bytes());
                }
                Some(text) => {
                    block.push(127);
                    let mut rest = text.len() - 127;
                    while rest > 127 {
                        block.push(0x80 | (rest & 127) as u8);
                        rest >>= 7;
                    }
                    block.push(rest as u8);
                    block.extend(text.as_bytes());
                }
            }
        }
        block
    }

    pub async fn get(&mut self, stream: u32, fields: &[(&str, &str)]) {
        let flags = Self::END_HEADERS | Self::END_STREAM;
        self.send(Self::HEADERS, flags, stream, &Self::fields(fields)).await;
    }

    /// The next frame that is not about the connection itself; `None` at the connection's end.
    pub async fn next(&mut self) -> Option<(u8, u32, Vec<u8>)> {
        loop {
            let head = within("a frame", self.0.try_exactly(9)).await?;
            let length =
                usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            let payload = within("a frame's payload", self.0.try_exactly(length)).await?;
            match head[3] {
                Self::DATA | Self::HEADERS | Self::RST_STREAM | Self::GOAWAY => {
                    return Some((head[3], stream, payload));
                }
                _ => {}
            }
        }
    }
}

#[tokio::test]
async fn a_client_that_vanishes_in_any_phase_leaves_nothing_behind() {
    /// What was sent when it left, and what the origin does then.
    async fn vanish(request: &str, response: &'static str) {
        let through = Through::new("", move |arrival: Arrival| async move {
            let Some(mut conversation) = arrival.open().await else { return };
            conversation.peer.head().await;
            conversation.peer.try_send(response).await.ok();
            conversation.peer.hold().await;
        })
        .await;
        let mut peer = through.connect().await;
        peer.send(request).await;
        through.origin.until(|seen| !seen.server_names.is_empty()).await;
        if !response.is_empty() {
            peer.head().await.unwrap();
        }
        peer.reset();
        // Its connection ends, for what is left on it is nobody else's.
        through.origin.until(|seen| seen.ended == 1).await;
        until_metric(&through.proxy, IN_FLIGHT, 0.0).await;
        until_metric(&through.proxy, IDLE, 0.0).await;
    }
    let post = "POST / HTTP/1.1\r\nHost: webscaler-manual\r\nContent-Length: 10\r\n\r\nhalf";
    let chunked = "POST / HTTP/1.1\r\nHost: webscaler-manual\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n";
    vanish(GET, "").await;
    vanish(GET, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf").await;
    vanish(post, "").await;
    vanish(chunked, "").await;
    vanish(post, "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf").await;
}

#[tokio::test]
async fn a_client_that_vanishes_before_its_request_is_whole_dials_nobody() {
    let through = Through::new("", scripts::respond).await;
    for part in
        ["", "GET", "GET / HTTP/1.1\r\nHost: webscaler-manual\r\n", "PRI * HT", "\x16\x03\x01"]
    {
        let mut peer = through.connect().await;
        peer.send(part).await;
        peer.reset();
    }
    assert_eq!(through.exchange(GET).await.text(), "ok");
    assert_eq!(through.origin.seen().connections, 1);
    until_metric(&through.proxy, IN_FLIGHT, 0.0).await;
}

#[tokio::test]
async fn a_head_that_does_not_end_gets_a_response_and_is_given_up() {
    let (origin, _proxy, address, _scene) = hasty("300ms").await;
    for part in ["GET / HTTP/1.1\r\nHost: webscaler-man", "GET / HTTP/1.1\r\n", "PO"] {
        let mut peer = client::connect(address).await;
        peer.send(part).await;
        let response = peer.response().await;
        let problem = problem(&response, 408);
        assert!(problem["fix"].as_str().unwrap().contains("listener.header_timeout"), "{problem}");
        assert_eq!(response.field("connection"), Some("close"));
        peer.closed().await;
    }
    assert_eq!(origin.seen().connections, 0);
}

#[tokio::test]
async fn the_second_head_of_a_connection_has_the_same_deadline_and_idleness_has_not() {
    let (_origin, _proxy, address, _scene) = hasty("300ms").await;
    let mut idle = client::connect(address).await;
    idle.send(GET).await;
    assert_eq!(idle.response().await.text(), "ok");

    let mut slow = client::connect(address).await;
    slow.send(GET).await;
    assert_eq!(slow.response().await.text(), "ok");
    slow.send("GET / HTTP/1.1\r\n").await;
    problem(&slow.response().await, 408);
    slow.closed().await;
    // By then the first was idle for longer than a head may take.
    idle.send(GET).await;
    assert_eq!(idle.response().await.text(), "ok");
}

#[tokio::test]
async fn a_body_that_trickles_takes_the_time_it_needs() {
    let (origin, _proxy, address, _scene) = hasty("100ms").await;
    let mut peer = client::connect(address).await;
    peer.send("POST / HTTP/1.1\r\nHost: webscaler-manual\r\nContent-Length: 8\r\n\r\n").await;
    for byte in "trickles".chars() {
        // Time itself is what this is about: the body takes longer than a head may.
        tokio::time::sleep(Duration::from_millis(40)).await;
        peer.send(byte.to_string()).await;
    }
    assert_eq!(peer.response().await.text(), "ok");
    assert_eq!(origin.seen().requests[0].body, b"trickles");
}

#[tokio::test]
async fn a_good_request_ahead_of_a_bad_one_gets_its_response_first() {
    let through = Through::new("", scripts::respond).await;
    let mut peer = through.connect().await;
    peer.send(GET.repeat(3) + "GET / HTTP/1.1\r\nHost : x\r\n\r\n" + GET).await;
    for _ in 0..3 {
        assert_eq!(peer.response().await.text(), "ok");
    }
    problem(&peer.response().await, 400);
    peer.closed().await;
    assert_eq!(through.origin.seen().requests.len(), 3);
}

#[tokio::test]
async fn a_thousand_requests_sent_at_once_get_their_responses_in_order() {
    const REQUESTS: usize = 1000;
    let through = Through::new("", |arrival: Arrival| async move {
        let Some(mut conversation) = arrival.open().await else { return };
        while let Some(request) = conversation.request().await {
            let target = request.start_line().split(' ').nth(1).unwrap().to_owned();
            conversation.peer.try_send(scripts::ok(&target)).await.ok();
        }
    })
    .await;
    let mut peer = through.connect().await;
    let all: String = (0..REQUESTS).map(|n| GET.replace("GET /", &format!("GET /{n}"))).collect();
    peer.send(all).await;
    for n in 0..REQUESTS {
        assert_eq!(peer.response().await.text(), format!("/{n}"));
    }
}

/// What two readers could take for two different things, or for none.
const AMBIGUOUS: &[&str] = &[
    // Lengths and codings.
    "POST / HTTP/1.1\r\nHost: webscaler-manual\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde",
    "POST / HTTP/1.1\r\nHost: webscaler-manual\r\nContent-Length: 4, 5\r\n\r\nabcde",
    "POST / HTTP/1.1\r\nHost: webscaler-manual\r\nContent-Length: +4\r\n\r\nabcd",
    "POST / HTTP/1.1\r\nHost: webscaler-manual\r\nContent-Length: -4\r\n\r\nabcd",
    "POST / HTTP/1.1\r\nHost: webscaler-manual\r\nContent-Length: 0x4\r\n\r\nabcd",
    "POST / HTTP/1.1\r\nHost: webscaler-manual\r\nContent-Length: 4 4\r\n\r\nabcd",
    "POST / HTTP/1.1\r\nHost: webscaler-manual\r\nContent-Length: 18446744073709551616\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: webscaler-manual\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: webscaler-manual\r\nTransfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: webscaler-manual\r\nTransfer-Encoding: identity\r\n\r\n",
    "POST / HTTP/1.1\r\nHost: webscaler-manual\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    // Lines and names.
    "GET / HTTP/1.1\r\nHost: webscaler-manual\r\nX: a\r\n folded\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: webscaler-manual\r\n\tX: a\r\n\r\n",
    "GET / HTTP/1.1\r\n X: a\r\nHost: webscaler-manual\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: webscaler-manual\r\nX: a\rb\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: webscaler-manual\r\nX: a\0b\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: webscaler-manual\r\nX\0: a\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: webscaler-manual\r\nX : a\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: webscaler-manual\r\nX\r\n\r\n",
    "GET / HTTP/1.1\r\nHost: webscaler-manual\r\n: a\r\n\r\n",
    "GET / HTTP/1.1\rHost: webscaler-manual\r\r",
    "GET /a b HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n",
    "GET / HTTP/1.1 \r\nHost: webscaler-manual\r\n\r\n",
    "GET / HTTP/1.2\r\nHost: webscaler-manual\r\n\r\n",
    "GET / HTTP/3.0\r\nHost: webscaler-manual\r\n\r\n",
    "GET /\x01 HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n",
    "G@T / HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n",
    "\0\x01\x02\x03\r\n\r\n",
];

#[tokio::test]
async fn what_two_readers_could_take_differently_is_refused_and_leaves_the_proxy_never() {
    let through = Through::new("", scripts::respond).await;
    for request in AMBIGUOUS {
        let mut peer = through.connect().await;
        peer.send(request).await;
        peer.finish().await;
        let response = peer.response().await;
        assert_eq!(response.status(), 400, "{request:?}: {}", response.head);
        problem(&response, 400);
    }
    assert_eq!(through.exchange(GET).await.text(), "ok");
    let seen = through.origin.seen();
    assert_eq!(seen.requests.len(), 1, "{:?}", seen.requests);
}

#[tokio::test]
async fn a_body_whose_end_nobody_knows_is_refused_with_what_to_change() {
    let through = Through::new("", scripts::respond).await;
    for (field, key) in [
        ("Content-Length: 5, 6", "Content-Length"),
        ("Content-Length: +5", "Content-Length"),
        ("Transfer-Encoding: gzip, chunked", "Transfer-Encoding"),
    ] {
        let request = format!("POST / HTTP/1.1\r\nHost: webscaler-manual\r\n{field}\r\n\r\n");
        let response = through.exchange(&request).await.json();
        assert_eq!(response["status"], 400, "{response}");
        assert!(response["detail"].as_str().unwrap().contains(key), "{response}");
        assert!(response["fix"].as_str().unwrap().starts_with("send the body"), "{response}");
    }
}

#[tokio::test]
async fn a_request_with_length_and_coding_leaves_as_one_or_not_at_all() {
    let smuggled = "GET /smuggled HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n";
    for fields in [
        format!("Content-Length: {}\r\nTransfer-Encoding: chunked", 5 + smuggled.len()),
        format!("Transfer-Encoding: chunked\r\nContent-Length: {}", 5 + smuggled.len()),
        "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked".to_owned(),
        "Transfer-Encoding: gzip, chunked".to_owned(),
        "Transfer-Encoding: Chunked".to_owned(),
        "Content-Length: 5\r\nContent-Length: 5".to_owned(),
    ] {
        let through = Through::new("", scripts::respond).await;
        let mut peer = through.connect().await;
        let request = format!(
            "POST /outer HTTP/1.1\r\nHost: webscaler-manual\r\n{fields}\r\n\r\n0\r\n\r\n{smuggled}"
        );
        peer.send(request).await;
        let first = peer.response().await;
        assert!([200, 400].contains(&first.status()), "{fields}: {}", first.head);
        peer.finish().await;
        let _ = peer.rest().await;
        for request in through.origin.seen().requests {
            // The reader of tests panics where two framings stand.
            let coded = request.field("transfer-encoding").is_some();
            let long = request.field("content-length").is_some();
            assert!(!(coded && long), "{}", request.head);
            if request.start_line().starts_with("POST") {
                assert!([&b""[..], b"0\r\n\r\n"].contains(&&*request.body), "{:?}", request.body);
            }
        }
    }
}

#[tokio::test]
async fn bad_chunks_end_the_request_and_not_as_a_whole_one() {
    for body in [
        "xyz\r\n\r\n0\r\n\r\n",
        "-1\r\n\r\n0\r\n\r\n",
        "10000000000000000\r\nx\r\n0\r\n\r\n",
        "4\r\nabcdef\r\n0\r\n\r\n",
        "0\r\nBad Name: 1\r\n\r\n",
    ] {
        let through = Through::new("", |arrival: Arrival| async move {
            let Some(mut conversation) = arrival.open().await else { return };
            let all = conversation.peer.rest().await.unwrap_or_default();
            assert!(!all.ends_with(b"0\r\n\r\n"), "whole: {:?}", String::from_utf8_lossy(&all));
        })
        .await;
        let mut peer = through.connect().await;
        peer.send(format!(
            "POST / HTTP/1.1\r\nHost: webscaler-manual\r\nTransfer-Encoding: chunked\r\n\r\n{body}{GET}"
        ))
        .await;
        let response = peer.response().await;
        assert_eq!(response.status(), 400, "{body:?}: {}", response.head);
        peer.closed().await;
        until_metric(&through.proxy, IN_FLIGHT, 0.0).await;
    }
}

#[tokio::test]
async fn bare_line_feeds_go_out_as_lines_that_everybody_reads_alike() {
    let through = Through::new("", scripts::respond).await;
    let mut peer = through.connect().await;
    peer.send("POST /lf HTTP/1.1\nHost: webscaler-manual\nX-A: 1\nContent-Length: 2\n\nok").await;
    assert_eq!(peer.response().await.text(), "ok");
    let request = through.last_request();
    assert!(!request.head.replace("\r\n", "").contains(['\r', '\n']), "{:?}", request.head);
    assert_eq!((request.field("x-a"), &*request.body), (Some("1"), &b"ok"[..]));
}

#[tokio::test]
async fn an_authority_in_the_target_rules_and_no_other_leaves() {
    let through = Through::new("", scripts::respond).await;
    let request = through
        .sent("GET http://webscaler-manual/x?y HTTP/1.1\r\nHost: evil.example\r\n\r\n")
        .await;
    assert_eq!(request.start_line(), "GET /x?y HTTP/1.1");
    assert_eq!(request.field("host"), Some(&*through.true_host()));
    assert!(!request.head.contains("evil"), "{}", request.head);

    let evil = "GET http://evil.example/ HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n";
    assert_eq!(through.exchange(evil).await.status(), 404);
    let user = "GET http://evil@webscaler-manual/ HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n";
    let response = through.exchange(user).await;
    assert!([200, 400].contains(&response.status()), "{}", response.head);
    assert!(through.origin.seen().requests.iter().all(|request| !request.head.contains("evil")));
}

#[tokio::test]
async fn a_head_too_large_is_told_to_a_client_that_is_still_sending() {
    let through = Through::new("", scripts::respond).await;
    let head = format!("GET / HTTP/1.1\r\nHost: webscaler-manual\r\nX: {}", "x".repeat(70_000));
    let mut peer = through.connect().await;
    peer.send(head).await;
    let problem = problem(&peer.response().await, 431);
    assert!(problem["fix"].as_str().unwrap().contains("listener.max_header_size"), "{problem}");
    // It does not stop for being refused; a reset could take the response from a slower reader.
    for _ in 0..8 {
        peer.try_send("x".repeat(65_536)).await.expect("a connection that is still read from");
    }
    peer.finish().await;
    peer.closed().await;
    assert_eq!(through.origin.seen().connections, 0);
}

#[tokio::test]
async fn a_hundred_fields_pass_and_more_are_refused() {
    let through = Through::new("", scripts::respond).await;
    let fields = |count: usize| {
        let fields: String = (0..count).map(|n| format!("X-{n}: {n}\r\n")).collect();
        format!("GET / HTTP/1.1\r\nHost: webscaler-manual\r\n{fields}\r\n")
    };
    let request = through.sent(&fields(99)).await;
    assert_eq!(request.fields().len(), 100);
    problem(&through.exchange(&fields(101)).await, 431);
    assert_eq!(through.origin.seen().requests.len(), 1);
}

#[tokio::test]
async fn methods_pass_as_they_are_written_and_are_not_labels() {
    let through = Through::new("", scripts::respond).await;
    for method in ["get", "Get", "FROBNICATE", "M-SEARCH", "PROPFIND"] {
        let request = through.sent(&GET.replace("GET", method)).await;
        assert_eq!(request.start_line(), format!("{method} / HTTP/1.1"));
    }
    let metrics = client::get(through.proxy.admin().await, "localhost", "/metrics").await;
    for method in ["\"get\"", "FROBNICATE", "M-SEARCH"] {
        assert!(!metrics.text().contains(method), "{method} became a label");
    }
}

#[tokio::test]
async fn an_http2_header_list_past_the_limit_is_refused_and_the_next_stream_served() {
    let through = Through::new("", scripts::respond).await;
    let mut h2 = H2::connect(through.address).await;
    let uri = format!("http://{ALIAS}/");
    let mut request = http::Request::get(&uri);
    for n in 0..20 {
        request = request.header(format!("x-{n}"), "x".repeat(5000));
    }
    let response = h2.send(request.body(http_body_util::Full::<Bytes>::default()).unwrap()).await;
    if let Ok(response) = response {
        assert_eq!(response.head.status, 431);
    }
    assert_eq!(through.origin.seen().connections, 0);
    let mut h2 = H2::connect(through.address).await;
    assert_eq!(h2.get(&uri).await.unwrap().body, "ok");
}

#[tokio::test]
async fn an_http2_request_without_an_authority_is_refused() {
    let through = Through::new("", scripts::respond).await;
    let mut frames = Frames::connect(through.address).await;
    frames.get(1, &[(":method", "GET"), (":scheme", "http"), (":path", "/")]).await;
    let (kind, stream, payload) = frames.next().await.expect("a response");
    assert_eq!(stream, 1);
    // Status 400 is entry 12 of HPACK's static table; or the stream is an error.
    assert!(kind == Frames::RST_STREAM || payload[0] == 0x80 | 12, "{kind} {payload:?}");
    // The connection is none the worse.
    let fields = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", ALIAS)];
    frames.get(3, &fields).await;
    loop {
        let (kind, stream, payload) = frames.next().await.expect("a response");
        if (kind, stream) == (Frames::HEADERS, 3) {
            assert_eq!(payload[0], 0x80 | 8, "status 200: {payload:?}");
            break;
        }
    }
    assert_eq!(through.origin.seen().requests.len(), 1);
}

#[tokio::test]
async fn a_flood_of_reset_streams_ends_the_connection_and_harms_nobody() {
    const STREAMS: u32 = 20_000;
    let through = Through::new("", scripts::respond).await;
    let before = through.proxy.peak_memory();
    let mut frames = Frames::connect(through.address).await;
    let block = Frames::fields(&[
        (":method", "GET"),
        (":scheme", "http"),
        (":path", "/"),
        (":authority", ALIAS),
    ]);
    let mut refused = false;
    for first in (0..STREAMS).step_by(100) {
        let mut flood = Vec::new();
        for stream in (first..first + 100).map(|n| 2 * n + 1) {
            let flags = Frames::END_HEADERS | Frames::END_STREAM;
            flood.extend(Frames::frame(Frames::HEADERS, flags, stream, &block));
            flood.extend(Frames::frame(Frames::RST_STREAM, 0, stream, &8u32.to_be_bytes()));
        }
        if frames.0.try_send(flood).await.is_err() {
            refused = true;
            break;
        }
    }
    if !refused {
        while let Some((kind, ..)) = frames.next().await {
            if kind == Frames::GOAWAY {
                refused = true;
                break;
            }
        }
    }
    assert!(refused, "the flood was taken in silence");
    assert_eq!(through.exchange(GET).await.text(), "ok");
    until_metric(&through.proxy, IN_FLIGHT, 0.0).await;
    let grown = through.proxy.peak_memory() - before;
    assert!(grown < 32 * 1024 * 1024, "{grown} bytes");
    let dialled = through.origin.seen().connections;
    assert!(dialled < 1000, "{dialled} connections for requests that nobody waits for");
}
