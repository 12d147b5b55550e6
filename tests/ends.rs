//! How connections end: whatever a client is still sending, its last response reaches it whole; and what
//! it asks for behind an early response is served, or was never promised.

use std::time::Duration;

use nix::sys::signal::Signal;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::mpsc,
    time::timeout,
};

use crate::support::{
    client,
    peer::Peer,
    proxy::Proxy,
    raw_origin::Arrival,
    scene::{ALIAS, Scene},
    scripts,
    through::Through,
    within,
};

const IN_FLIGHT: &str = "truename_http_requests_in_flight{alias=\"webscaler-manual\"}";

#[tokio::test]
async fn the_last_response_arrives_whole_whatever_comes_behind_its_request() {
    const LENGTH: usize = 300_000;
    let body = "x".repeat(LENGTH);
    let through =
        Through::new("", move |arrival| scripts::always(arrival, scripts::ok(&body))).await;
    let mut peer = through.connect().await;
    let request = format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\nConnection: close\r\n\r\n");
    peer.send(format!("{request}{}", "behind".repeat(10_000))).await;
    // The proxy is done with it before anything is read.
    let responses =
        "truename_http_requests_total{alias=\"webscaler-manual\",method=\"GET\",code=\"200\"}";
    until(&through.proxy, responses, 1.0).await;
    until(&through.proxy, IN_FLIGHT, 0.0).await;
    peer.try_send("more").await.unwrap();
    assert_eq!(peer.response().await.body.len(), LENGTH);
    assert_eq!(peer.rest().await.unwrap(), b"");
}

/// Many clients look at the response once all of the body is written.
#[tokio::test]
async fn a_client_that_sends_all_of_a_refused_body_sees_why() {
    const BLOCK: usize = 1024 * 1024;
    const BLOCKS: usize = 48;
    let through = Through::new("", scripts::respond).await;
    for (host, fields, status) in [
        ("evil.example", "", 404),
        (ALIAS, "Transfer-Encoding: gzip\r\n", 400),
        (ALIAS, "Host: another\r\n", 400),
    ] {
        let mut peer = through.connect().await;
        let length = BLOCK * BLOCKS;
        let head =
            format!("POST / HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n{fields}\r\n");
        peer.send(head).await;
        for _ in 0..BLOCKS {
            peer.send(vec![b'x'; BLOCK]).await;
        }
        let response = peer.response().await;
        assert_eq!((response.status(), response.field("Connection")), (status, Some("close")));
        assert_eq!(peer.rest().await.unwrap(), b"");
    }
    assert_eq!(through.origin.seen().connections, 0);
}

#[tokio::test]
async fn a_request_behind_an_early_response_is_served_or_the_response_says_close() {
    /// Responds to POST after its head, and does not read the body.
    async fn early(arrival: Arrival) {
        let mut conversation = arrival.open().await.unwrap();
        while let Some(head) = conversation.peer.head().await {
            conversation.peer.try_send(scripts::ok("early")).await.ok();
            if head.starts_with("POST") {
                return conversation.peer.hold().await;
            }
        }
    }
    let through = Through::new("", early).await;
    let get = format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n");
    let post = |framing: &str| format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\n{framing}\r\n\r\n");

    // Little enough to be passed over.
    let mut peer = through.connect().await;
    peer.send(post("Content-Length: 300000")).await;
    let response = peer.response().await;
    assert_eq!((response.text(), response.field("Connection")), ("early", None));
    peer.send("x".repeat(300_000) + &get).await;
    assert_eq!(peer.response().await.text(), "early");

    // Refused by truename itself, the same.
    peer.send(post("Content-Length: 300000").replace(ALIAS, "evil.example")).await;
    let response = peer.response().await;
    assert_eq!((response.status(), response.field("Connection")), (404, None));
    peer.send("x".repeat(300_000) + &get).await;
    assert_eq!(peer.response().await.text(), "early");

    // More than that, or nobody knows how much.
    for framing in ["Content-Length: 30000000", "Transfer-Encoding: chunked"] {
        let mut peer = through.connect().await;
        peer.send(post(framing)).await;
        let response = peer.response().await;
        assert_eq!(
            (response.text(), response.field("Connection")),
            ("early", Some("close")),
            "{framing}"
        );
        assert_eq!(peer.rest().await.unwrap(), b"", "{framing}");
    }
}

/// RFC 9112, section 2.2: some clients send an empty line behind a body, and it is no request.
#[tokio::test]
async fn an_empty_line_is_no_request_and_gets_no_response() {
    let mut scene = Scene::new(1).await;
    let _origin = scene.script(scripts::respond).remove(0);
    let proxy = Proxy::start(&(scene.yaml("") + "listener: {header_timeout: 300ms}\n")).await;
    let address = proxy.address(ALIAS).await;
    let post = format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\nContent-Length: 3\r\n\r\nabc");

    for behind in ["\r\n", "\n", "\r\n\r\n\r\n", "\r"] {
        let mut peer = client::connect(address).await;
        peer.send(format!("{post}{behind}")).await;
        assert_eq!(peer.response().await.text(), "ok");
        // Far longer than a head may take.
        unasked(&mut peer, Duration::from_millis(900)).await;
        let rest = if behind == "\r" { "\n" } else { "" };
        peer.send(format!("{rest}\r\n{post}")).await;
        assert_eq!(peer.response().await.text(), "ok", "{behind:?}");
    }

    // A connection on which nothing is asked for is closed without a word.
    for nothing in ["\r\n", "\r"] {
        let mut peer = client::connect(address).await;
        peer.send(nothing).await;
        assert_eq!(peer.rest().await.unwrap(), b"", "{nothing:?}");
    }
    let mut peer = client::connect(address).await;
    peer.send("\r\nG").await;
    assert_eq!(peer.response().await.status(), 408);
}

/// An origin that refuses a body it has not read, and closes, ends in a reset.
#[tokio::test]
async fn a_refusal_reaches_the_client_though_its_origin_closes_while_the_body_flows() {
    for connection in ["", "Connection: close\r\n"] {
        let through = Through::new("", move |arrival: Arrival| async move {
            let mut conversation = arrival.open().await.unwrap();
            conversation.peer.head().await.unwrap();
            let head = format!("HTTP/1.1 413 Content Too Large\r\n{connection}");
            conversation.peer.send(format!("{head}Content-Length: 3\r\n\r\nno!")).await;
        })
        .await;
        for _ in 0..20 {
            let mut peer = through.connect().await;
            let length = 8 * 1024 * 1024;
            let head =
                format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\nContent-Length: {length}\r\n\r\n");
            peer.send(head).await;
            peer.send(vec![b'x'; length]).await;
            let response = peer.response().await;
            assert_eq!((response.status(), response.text()), (413, "no!"), "{}", response.text());
        }
    }
}

/// Nothing else could tell a client of HTTP/1.0 that this is not all.
#[tokio::test]
async fn a_response_that_would_end_with_its_connection_ends_in_a_reset_where_it_breaks_off() {
    let through = Through::new("", scripts::half_a_chunk).await;
    let mut peer = through.connect().await;
    peer.send(format!("GET / HTTP/1.0\r\nHost: {ALIAS}\r\n\r\n")).await;
    assert!(peer.head().await.unwrap().starts_with("HTTP/1.0 200"));
    let error = peer.rest().await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// The same where its client ends its side and still reads, or the proxy ends.
#[tokio::test]
async fn a_response_that_would_end_with_its_connection_ends_in_a_reset_where_it_is_cut_off() {
    let mut scene = Scene::new(1).await;
    let _origin = scene.script(|arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.request().await;
        let begin = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n";
        conversation.peer.send(begin).await;
        conversation.peer.hold().await;
    });
    let proxy = Proxy::start(&(scene.yaml("") + "shutdown_grace: 300ms\n")).await;
    let address = proxy.address(ALIAS).await;
    let mut peers = Vec::new();
    for _ in 0..2 {
        let mut peer = client::connect(address).await;
        peer.send(format!("GET / HTTP/1.0\r\nHost: {ALIAS}\r\n\r\n")).await;
        assert!(peer.head().await.unwrap().starts_with("HTTP/1.0 200"));
        assert_eq!(peer.exactly(4).await, b"half");
        peers.push(peer);
    }
    peers[0].finish_tcp();
    let error = peers[0].rest().await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    proxy.signal(Signal::SIGTERM);
    let error = peers[1].rest().await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

/// Holds that nothing comes for a while.
async fn unasked(peer: &mut Peer, time: Duration) {
    tokio::select! {
        bytes = peer.some() => panic!("{}", String::from_utf8_lossy(&bytes)),
        () = tokio::time::sleep(time) => {}
    }
}

async fn until(proxy: &Proxy, series: &str, value: f64) {
    within(series, async { while proxy.metric(series).await != Some(value) {} }).await;
}

/// The origin would take the next request, perhaps another client's, for the rest of the body.
#[tokio::test]
async fn a_body_that_breaks_off_under_its_response_leaves_no_connection_to_the_next_request() {
    const LENGTH: usize = 16 * 1024 * 1024;
    const CHUNK: &[u8] = b"5\r\nhello\r\n";
    let (blocked, mut is_blocked) = mpsc::unbounded_channel();
    let (read, mut was_read) = mpsc::unbounded_channel::<Vec<u8>>();
    let through = Through::new("", move |arrival: Arrival| {
        let (blocked, read) = (blocked.clone(), read.clone());
        async move {
            let mut conversation = arrival.open().await.unwrap();
            while let Some(head) = conversation.peer.head().await
                && head.starts_with("GET")
            {
                conversation.peer.send(scripts::ok("own")).await;
            }
            let (mut reader, mut writer) = tokio::io::split(conversation.peer.into_wire());
            let respond = async {
                let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {LENGTH}\r\n\r\n");
                writer.write_all(head.as_bytes()).await.unwrap();
                let mut left = LENGTH;
                while left > 0 {
                    let block = vec![b'x'; left.min(64 * 1024)];
                    let mut write = std::pin::pin!(writer.write_all(&block));
                    let written = timeout(Duration::from_millis(300), &mut write).await;
                    if written.is_err() {
                        blocked.send(()).unwrap();
                        if write.await.is_err() {
                            return;
                        }
                    }
                    left -= block.len();
                }
            };
            let listen = async {
                let mut bytes = vec![0; 4096];
                while let Ok(length @ 1..) = reader.read(&mut bytes).await {
                    read.send(bytes[..length].to_vec()).unwrap();
                }
            };
            tokio::join!(respond, listen);
        }
    })
    .await;
    let mut peer = through.connect().await;
    let head = format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\nTransfer-Encoding: chunked\r\n\r\n");
    peer.send(head).await;
    is_blocked.recv().await.unwrap();
    // Nothing more of the response finds room, and the body flows on.
    for _ in 0..8 {
        peer.send(CHUNK).await;
        let mut chunk = Vec::new();
        while chunk.len() < CHUNK.len() {
            chunk.extend(within("a chunk", was_read.recv()).await.unwrap());
        }
        assert_eq!(chunk, CHUNK);
    }
    peer.send("no chunk\r\n").await;
    let get = format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n");
    for _ in 0..10 {
        assert_eq!(through.exchange(&get).await.text(), "own");
    }
    // The proxy has seen that by now; and the response goes on.
    peer.closed().await;
    until(&through.proxy, IN_FLIGHT, 0.0).await;

    for _ in 0..10 {
        assert_eq!(through.exchange(&get).await.text(), "own");
    }
    assert_eq!(was_read.try_recv().ok(), None, "a request within another's body");
}

#[tokio::test]
async fn a_client_that_breaks_off_its_body_under_a_response_is_no_failure_of_the_origin() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nearly\r\n";
        conversation.peer.send(head).await;
        conversation.peer.hold().await;
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\nTransfer-Encoding: chunked\r\n\r\n"))
        .await;
    peer.head().await.unwrap();
    assert_eq!(peer.exactly(10).await, b"5\r\nearly\r\n");
    peer.send("no chunk\r\n").await;
    assert!(peer.rest().await.unwrap_or_default().is_empty());
    until(&through.proxy, IN_FLIGHT, 0.0).await;
    let errors = |error: &str| {
        format!("truename_upstream_errors_total{{alias=\"{ALIAS}\",error=\"{error}\"}}")
    };
    let proxy = &through.proxy;
    assert_eq!(proxy.metric(&errors("http_request_error")).await, Some(1.0));
    assert_eq!(proxy.metric(&errors("http_response_incomplete")).await, Some(0.0));
}
