//! HTTP/2 towards origins: where messages end, what comes ahead of them, and origins that stall.

use std::{future::poll_fn, sync::Arc, time::Duration};

use bytes::Bytes;
use h2::{Reason, server::SendResponse};
use http::{HeaderMap, Request, Response, StatusCode};
use tokio::{sync::watch, task::JoinSet};

use crate::support::{
    peer::{Peer, Wire},
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene, TRUE_NAME},
    through::Through,
    trust, within,
};

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
const GOAWAY: u8 = 7;
pub(crate) const END_STREAM: u8 = 1;
const ACK: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// `:status: 200`, in HPACK.
pub(crate) const OK: &[u8] = &[0x88];

/// An alias whose origin speaks HTTP/2, to clients of either version.
pub(crate) async fn through<Script, Run>(keys: &str, script: Script) -> Through
where
    Script: Fn(Arrival) -> Run + Clone + Send + Sync + 'static,
    Run: Future<Output = ()> + Send + 'static,
{
    let mut scene = Scene::new(1).await;
    let tls = trust::server_with_alpn(&[TRUE_NAME], &["h2"]);
    let origin = RawOrigin::start(scene.take_listeners().remove(0), Some(tls), script);
    let keys = format!("http: {{version: \"2\"}}\n{keys}");
    let proxy = Proxy::start(&format!("workers: 1\n{}", scene.yaml(&keys))).await;
    let address = proxy.address(ALIAS).await;
    Through { proxy, address, origin, scene }
}

/// The same, with an origin that handles each request with `handle`.
pub(crate) async fn responding<Handle, Run>(keys: &str, handle: Handle) -> Through
where
    Handle: Fn(Request<h2::RecvStream>, SendResponse<Bytes>) -> Run + Clone + Send + Sync + 'static,
    Run: Future<Output = ()> + Send + 'static,
{
    through(keys, move |arrival| {
        let handle = handle.clone();
        async move {
            let mut connection = serve(arrival).await;
            let mut streams = JoinSet::new();
            while let Some(Ok((request, respond))) = connection.accept().await {
                streams.spawn(handle(request, respond));
            }
        }
    })
    .await
}

async fn serve(arrival: Arrival) -> h2::server::Connection<Box<dyn Wire>, Bytes> {
    h2::server::handshake(arrival.open().await.unwrap().peer.into_wire()).await.unwrap()
}

/// An origin's connection, frame by frame.
pub(crate) struct Frames(pub Peer);

impl Frames {
    /// Ready for the first request.
    pub async fn open(arrival: Arrival) -> Self {
        let mut frames = Self(arrival.open().await.unwrap().peer);
        frames.0.exactly(24).await;
        frames.send(SETTINGS, 0, 0, &[]).await;
        frames
    }

    pub async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let mut frame = (payload.len() as u32).to_be_bytes()[1..].to_vec();
        frame.extend([kind, flags]);
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        self.0.send(frame).await;
    }

    /// Waits for a frame of this kind, and gives its stream and flags.
    pub async fn wait_for(&mut self, kind: u8) -> (u32, u8) {
        loop {
            let head = within("a frame", self.0.exactly(9)).await;
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let payload = self.0.exactly(length).await;
            if matches!(head[3], SETTINGS | PING) && head[4] & ACK == 0 {
                let payload = if head[3] == PING { &payload[..] } else { &[] };
                self.send(head[3], ACK, 0, payload).await;
            }
            if head[3] == kind {
                return (u32::from_be_bytes([head[5], head[6], head[7], head[8]]), head[4]);
            }
        }
    }
}

#[tokio::test]
async fn a_response_that_is_reset_before_its_end_is_not_whole_whatever_the_reset_says() {
    for reason in [Reason::NO_ERROR, Reason::CANCEL, Reason::INTERNAL_ERROR] {
        let through = through("", move |arrival| async move {
            let mut frames = Frames::open(arrival).await;
            let (stream, _) = frames.wait_for(HEADERS).await;
            frames.send(HEADERS, END_HEADERS, stream, OK).await;
            frames.send(DATA, 0, stream, b"half").await;
            frames.send(RST_STREAM, 0, stream, &u32::from(reason).to_be_bytes()).await;
            frames.0.hold().await;
        })
        .await;
        let mut peer = through.connect().await;
        peer.send(get("/")).await;
        let head = peer.head().await.unwrap();
        assert!(head.contains("transfer-encoding: chunked\r\n"), "{head}");
        let body = peer.rest().await.unwrap_or_default();
        assert_eq!(body, b"4\r\nhalf\r\n", "{reason:?}: {}", String::from_utf8_lossy(&body));
    }
}

#[tokio::test]
async fn a_response_that_is_not_as_long_as_it_says_is_not_whole() {
    for (sent, flags) in [(&b"half"[..], END_STREAM), (b"more than it said", 0)] {
        let through = through("", move |arrival| async move {
            let mut frames = Frames::open(arrival).await;
            let (stream, _) = frames.wait_for(HEADERS).await;
            // `content-length: 8`, as a literal whose name is in the static table.
            let head = [OK, &[0x0f, 0x0d, 1, b'8']].concat();
            frames.send(HEADERS, END_HEADERS, stream, &head).await;
            frames.send(DATA, flags, stream, sent).await;
            frames.0.hold().await;
        })
        .await;
        let mut peer = through.connect().await;
        peer.send(get("/")).await;
        match peer.head().await {
            Some(head) if head.starts_with("HTTP/1.1 200") => {
                let body = peer.rest().await.unwrap_or_default();
                assert!(body.len() < 8, "{}", String::from_utf8_lossy(&body));
            }
            head => assert!(head.unwrap().starts_with("HTTP/1.1 502")),
        }
    }
}

/// RFC 9113, section 8.1: an origin that has responded so says that it wants no more of the request.
#[tokio::test]
async fn a_response_is_whole_whose_origin_then_wants_no_more_of_the_request() {
    let through = through("", |arrival| async move {
        let mut frames = Frames::open(arrival).await;
        let (stream, flags) = frames.wait_for(HEADERS).await;
        assert_eq!(flags & END_STREAM, 0);
        frames.send(HEADERS, END_HEADERS, stream, OK).await;
        frames.send(DATA, END_STREAM, stream, b"enough").await;
        frames.send(RST_STREAM, 0, stream, &[0; 4]).await;
        frames.0.hold().await;
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(post("Content-Length: 1000000")).await;
    let response = peer.response().await;
    assert_eq!((response.status(), response.text()), (200, "enough"));
}

/// RFC 9113, section 6.5.2: it may allow some later.
#[tokio::test]
async fn requests_to_an_origin_that_allows_no_streams_wait_together_and_not_for_ever() {
    let (allowed, allow) = watch::channel(false);
    let through = through("timeouts: {connect: 2s}", move |arrival| {
        let mut allow = allow.clone();
        async move {
            let mut frames = Frames(arrival.open().await.unwrap().peer);
            // The first request may be sent ahead of this, and has to be refused then.
            frames.send(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 0]).await;
            frames.0.exactly(24).await;
            loop {
                tokio::select! {
                    (stream, _) = frames.wait_for(HEADERS) => {
                        let allowed = *allow.borrow();
                        if allowed {
                            frames.send(HEADERS, END_HEADERS | END_STREAM, stream, OK).await;
                        } else {
                            frames.send(RST_STREAM, 0, stream, &[0, 0, 0, 7]).await;
                        }
                    }
                    Ok(()) = allow.changed() => {
                        frames.send(SETTINGS, 0, 0, &[0, 3, 0, 0, 0, 9]).await;
                    }
                }
            }
        }
    })
    .await;
    let mut peers = JoinSet::new();
    for _ in 0..4 {
        let mut peer = through.connect().await;
        peers.spawn(async move {
            peer.send(get("/")).await;
            peer.response().await.status()
        });
    }
    while let Some(status) = within("a response", peers.join_next()).await {
        assert_eq!(status.unwrap(), 504);
    }
    assert_eq!(through.origin.seen().connections, 1);
    let mut waiting = through.connect().await;
    waiting.send(get("/")).await;
    allowed.send_replace(true);
    assert_eq!(waiting.response().await.status(), 200);
}

#[tokio::test]
async fn an_upload_that_breaks_off_is_reset_and_does_not_end() {
    let (ended, mut end) = watch::channel(None);
    let through = responding("", move |mut request, _respond| {
        let ended = ended.clone();
        async move {
            let end = loop {
                match request.body_mut().data().await {
                    Some(Ok(_)) => {}
                    Some(Err(error)) => break error.reason(),
                    None => break Some(Reason::NO_ERROR),
                }
            };
            ended.send_replace(end);
        }
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(post("Transfer-Encoding: chunked")).await;
    peer.send("5\r\nhello\r\n").await;
    drop(peer);
    let end = within("the upload's end", end.wait_for(Option::is_some)).await.unwrap();
    assert_eq!(*end, Some(Reason::CANCEL));
}

#[tokio::test]
async fn a_request_that_its_client_gives_up_is_reset_at_the_origin() {
    let (resets, mut reset) = watch::channel(Vec::new());
    let (asked, mut asks) = watch::channel(0);
    let asked = Arc::new(asked);
    let through = responding("", move |_request, mut respond| {
        let resets = resets.clone();
        asked.send_modify(|asked| *asked += 1);
        async move {
            let reason = poll_fn(|cx| respond.poll_reset(cx)).await.unwrap();
            resets.send_modify(|resets| resets.push(reason));
        }
    })
    .await;
    let body = post("Content-Length: 10");
    for (nth, request) in [get("/"), format!("{body}part")].iter().enumerate() {
        let mut peer = through.connect().await;
        peer.send(request).await;
        // It is there, and nobody responds.
        within("the request", asks.wait_for(|asked| *asked > nth)).await.unwrap();
        drop(peer);
        let reset = within("a reset", reset.wait_for(|resets| resets.len() > nth)).await.unwrap();
        assert_eq!(reset[nth], Reason::CANCEL);
    }
    assert_eq!(through.origin.seen().connections, 1);
}

#[tokio::test]
async fn interim_responses_of_an_origin_of_http_2_reach_a_client_of_http_1_1() {
    let through = responding("", |_request, mut respond| async move {
        for link in ["</a>", "</b>"] {
            let early = Response::builder().status(StatusCode::EARLY_HINTS).header("link", link);
            respond.send_informational(early.body(()).unwrap()).unwrap();
        }
        respond.send_response(Response::new(()), true).unwrap();
    })
    .await;
    let responses = through.exchanges(&get("/")).await;
    let heads: Vec<_> = responses.iter().map(|response| response.head.as_str()).collect();
    assert_eq!(heads[0], "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n");
    assert_eq!(heads[1], "HTTP/1.1 103 Early Hints\r\nlink: </b>\r\n\r\n");
    assert!(heads[2].starts_with("HTTP/1.1 200 OK\r\n"), "{heads:?}");
}

#[tokio::test]
async fn a_switch_of_protocols_over_http_2_is_refused() {
    let through = through("", |arrival| async move {
        let mut frames = Frames::open(arrival).await;
        let (stream, _) = frames.wait_for(HEADERS).await;
        // `:status: 101`.
        frames.send(HEADERS, END_HEADERS, stream, &[0x08, 3, b'1', b'0', b'1']).await;
        frames.wait_for(RST_STREAM).await;
        frames.0.hold().await;
    })
    .await;
    let response = through.exchange(&get("/")).await;
    assert_eq!(response.status(), 502);
    assert_eq!(response.json()["type"], "urn:truename:error:http_protocol_error");
}

#[tokio::test]
async fn a_client_is_told_to_go_on_when_an_origin_of_http_2_says_so() {
    let through = responding("", |mut request, mut respond| async move {
        assert_eq!(request.headers()["expect"], "100-continue");
        let go_on = Response::builder().status(StatusCode::CONTINUE).body(()).unwrap();
        respond.send_informational(go_on).unwrap();
        let body = request.body_mut().data().await.unwrap().unwrap();
        respond.send_response(Response::new(()), false).unwrap().send_data(body, true).unwrap();
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(post("Expect: 100-continue\r\nContent-Length: 5")).await;
    assert_eq!(peer.response().await.head, "HTTP/1.1 100 Continue\r\n\r\n");
    peer.send("hello").await;
    let response = peer.response().await;
    assert_eq!((response.status(), response.text()), (200, "hello"));
}

#[tokio::test]
async fn a_refusal_by_http_2_comes_instead_of_the_word_to_go_on() {
    let through = responding("", |_request, mut respond| async move {
        let refusal = Response::builder().status(StatusCode::UNAUTHORIZED).body(()).unwrap();
        respond.send_response(refusal, true).unwrap();
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(post("Expect: 100-continue\r\nContent-Length: 5")).await;
    assert_eq!(peer.response().await.status(), 401);
}

#[tokio::test]
async fn clients_that_do_not_read_leave_the_others_of_their_connection_alone() {
    const STALLED: usize = 20;
    let stalled = Arc::new(watch::Sender::new(0));
    let mut all = stalled.subscribe();
    let through = responding("", move |request, mut respond| {
        let stalled = stalled.clone();
        async move {
            let mut body = respond.send_response(Response::new(()), false).unwrap();
            let length = if request.uri().path() == "/long" { usize::MAX } else { 1_000_000 };
            let mut sent = 0;
            while sent < length {
                body.reserve_capacity(16 * 1024);
                let capacity = poll_fn(|cx| body.poll_capacity(cx));
                // Its client's kernel, and ours, have taken all that they will.
                let capacity = match tokio::time::timeout(Duration::from_secs(1), capacity).await {
                    Ok(capacity) => capacity,
                    Err(_) => {
                        stalled.send_modify(|stalled| *stalled += 1);
                        poll_fn(|cx| body.poll_capacity(cx)).await
                    }
                };
                let Some(Ok(capacity)) = capacity else { return };
                let part = capacity.min(length - sent);
                sent += part;
                body.send_data(vec![b'x'; part].into(), sent == length).unwrap();
            }
        }
    })
    .await;
    let mut peers = Vec::new();
    for _ in 0..STALLED {
        let mut peer = through.connect().await;
        peer.send(get("/long")).await;
        assert!(peer.head().await.unwrap().starts_with("HTTP/1.1 200"));
        peers.push(peer);
    }
    within("all to stall", all.wait_for(|stalled| *stalled >= STALLED)).await.unwrap();
    let response = through.exchange(&get("/")).await;
    assert_eq!((response.status(), response.text().len()), (200, 1_000_000));
    assert_eq!(through.origin.seen().connections, 1, "all of them share one");
}

#[tokio::test]
async fn an_origin_of_http_2_that_stops_reading_is_given_up_and_its_client_told() {
    let (reset, mut resets) = watch::channel(None);
    let through = responding("timeouts: {idle: 1s}", move |request, mut respond| {
        let reset = reset.clone();
        async move {
            if request.method() == "GET" {
                return drop(respond.send_response(Response::new(()), true).unwrap());
            }
            // Nothing of it is read, so that its window never opens again.
            let _unread = request;
            reset.send_replace(Some(poll_fn(|cx| respond.poll_reset(cx)).await.unwrap()));
        }
    })
    .await;
    let mut peer = through.connect().await;
    // A kept connection is not what is to blame.
    peer.send(get("/")).await;
    assert_eq!(peer.response().await.status(), 200);
    peer.send(post("Content-Length: 64000000")).await;
    let sent = async { while peer.try_send(vec![b'x'; 64 * 1024]).await.is_ok() {} };
    tokio::time::timeout(Duration::from_millis(700), sent).await.unwrap_err();
    let response = peer.response().await;
    assert_eq!(response.status(), 504, "{}", response.text());
    assert_eq!(response.json()["type"], "urn:truename:error:http_response_timeout");
    assert_eq!(response.json()["fix"], "raise `timeouts.idle`");
    let reset = within("the reset", resets.wait_for(Option::is_some)).await.unwrap();
    assert_eq!(*reset, Some(Reason::CANCEL));
}

/// The first try must not take anything of what the second sends.
#[tokio::test]
async fn a_retry_on_a_status_over_http_2_sends_the_whole_body() {
    const PIECES: usize = 50;
    let (arrived, mut arrivals) = watch::channel(0);
    let keys = "retry: {attempts: 1, when: [503]}";
    let through = responding(keys, move |mut request, mut respond| {
        let arrived = arrived.clone();
        async move {
            arrived.send_modify(|count| *count += 1);
            if *arrived.borrow() == 1 {
                let busy = Response::builder().status(StatusCode::SERVICE_UNAVAILABLE);
                // It may still be reading.
                let mut body = respond.send_response(busy.body(()).unwrap(), false).unwrap();
                body.send_data("busy".into(), false).unwrap();
                while let Some(Ok(data)) = request.body_mut().data().await {
                    let _ = request.body_mut().flow_control().release_capacity(data.len());
                }
                return;
            }
            let mut whole = Vec::new();
            while let Some(Ok(data)) = request.body_mut().data().await {
                whole.extend_from_slice(&data);
                let _ = request.body_mut().flow_control().release_capacity(data.len());
            }
            let mut body = respond.send_response(Response::new(()), false).unwrap();
            body.send_data(whole.into(), true).unwrap();
        }
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(format!("PUT / HTTP/1.1\r\nHost: {ALIAS}\r\nTransfer-Encoding: chunked\r\n\r\n"))
        .await;
    within("the second try", arrivals.wait_for(|count| *count == 2)).await.unwrap();
    let mut whole = String::new();
    for piece in 0..PIECES {
        let piece = format!("{piece:04}");
        peer.send(format!("4\r\n{piece}\r\n")).await;
        tokio::task::yield_now().await;
        whole.push_str(&piece);
    }
    peer.send("0\r\n\r\n").await;
    let response = peer.response().await;
    assert_eq!((response.status(), response.text()), (200, whole.as_str()));
}

#[tokio::test]
async fn a_connection_that_its_origin_shuts_down_gets_no_more_requests_and_ends_its_last() {
    let through = through("", |arrival| async move {
        let nth = arrival.nth;
        let mut connection = serve(arrival).await;
        let mut streams = Vec::new();
        while let Some(Ok((_, mut respond))) = connection.accept().await {
            let mut body = respond.send_response(Response::new(()), false).unwrap();
            body.send_data(format!("{nth}").into(), nth > 0).unwrap();
            if nth == 0 {
                connection.graceful_shutdown();
                streams.push(body);
            }
        }
    })
    .await;
    let mut first = through.connect().await;
    first.send(get("/")).await;
    first.head().await.unwrap();
    assert_eq!(first.exactly(6).await, b"1\r\n0\r\n");
    let other = within("another connection", async {
        loop {
            let mut peer = through.connect().await;
            peer.send(get("/")).await;
            peer.head().await.unwrap();
            // Before the GOAWAY is there it may share the first.
            if peer.exactly(6).await == b"1\r\n1\r\n" {
                return peer;
            }
        }
    });
    other.await;
    assert_eq!(through.origin.seen().connections, 2);
}

#[tokio::test]
async fn trailers_pass_between_http_1_1_and_an_origin_of_http_2_both_ways() {
    let through = responding("", |mut request, mut respond| async move {
        let body = request.body_mut();
        while let Some(Ok(data)) = body.data().await {
            let _ = body.flow_control().release_capacity(data.len());
        }
        let trailers = body.trailers().await.unwrap().unwrap();
        let mut body = respond.send_response(Response::new(()), false).unwrap();
        body.send_data("ok".into(), false).unwrap();
        let mut fields = HeaderMap::new();
        fields.insert("x-back", trailers["x-sum"].clone());
        body.send_trailers(fields).unwrap();
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(post("Transfer-Encoding: chunked\r\nTE: trailers")).await;
    peer.send("4\r\nbody\r\n0\r\nX-Sum: 42\r\n\r\n").await;
    let response = peer.response().await;
    assert_eq!((response.status(), response.text()), (200, "ok"));
    assert_eq!(response.trailers, [("x-back".to_owned(), "42".to_owned())]);
}

/// A frame behind GOAWAY's last stream, and all the ways in which a connection ends.
#[tokio::test]
async fn a_request_beyond_the_last_that_a_dying_origin_took_is_sent_again() {
    let through = through("", |arrival| async move {
        let nth = arrival.nth;
        let mut frames = Frames::open(arrival).await;
        let (stream, _) = frames.wait_for(HEADERS).await;
        if nth == 0 {
            // Its last stream is none.
            frames.send(GOAWAY, 0, 0, &[0; 8]).await;
        } else {
            frames.send(HEADERS, END_HEADERS | END_STREAM, stream, OK).await;
        }
        frames.0.hold().await;
    })
    .await;
    let response = through.exchange(&format!("{}hello", post("Content-Length: 5"))).await;
    assert_eq!(response.status(), 200, "{}", response.text());
    assert_eq!(through.origin.seen().connections, 2);
}

pub(crate) fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")
}

fn post(fields: &str) -> String {
    format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\n{fields}\r\n\r\n")
}
