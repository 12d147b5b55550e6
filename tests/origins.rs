//! Origins that close, stall, babble and lie: whatever they do, the client sees either the whole
//! of a response or that there is none.

use std::time::Duration;

use crate::support::{
    client, loopback,
    message::Message,
    peer::Peer,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene},
    scripts,
    through::Through,
    within,
};
use serde_json::Value;
use truename::demo::dns;

const GET: &str = "GET / HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n";
/// Nobody is waited for longer than this, in any phase.
const IMPATIENT: &str = "timeouts: {connect: 300ms, response: 300ms, idle: 300ms}";
const IN_FLIGHT: &str = "truename_http_requests_in_flight{alias=\"webscaler-manual\"}";

/// An origin that gives this response to the first request of each connection, and then waits.
async fn saying(keys: &str, response: impl Into<Vec<u8>>) -> Through {
    let response = response.into();
    Through::new(keys, move |arrival: Arrival| {
        let response = response.clone();
        async move {
            let Some(mut conversation) = arrival.open().await else { return };
            conversation.request().await;
            conversation.peer.try_send(response).await.ok();
            conversation.peer.hold().await;
        }
    })
    .await
}

/// The same, with the end of the connection right behind the response.
async fn last_words(keys: &str, response: impl Into<Vec<u8>>) -> Through {
    let response = response.into();
    Through::new(keys, move |arrival: Arrival| {
        let response = response.clone();
        async move {
            let Some(mut conversation) = arrival.open().await else { return };
            conversation.request().await;
            conversation.peer.try_send(response).await.ok();
            conversation.peer.finish().await;
        }
    })
    .await
}

/// An explanation of this status and error, which says something.
#[track_caller]
fn problem(response: &Message, status: u16, error: &str) -> Value {
    assert_eq!(response.status(), status, "{}\n{}", response.head, response.text());
    assert_eq!(response.field("content-type"), Some("application/problem+json"));
    let problem = response.json();
    assert_eq!(problem["type"], format!("urn:truename:error:{error}"), "{problem}");
    assert!(!problem["detail"].as_str().unwrap().is_empty());
    problem
}

/// Reads all there is of a response that does not come to its end, and holds that this shows.
async fn assert_broken(mut peer: Peer, begins: &str) {
    let head = peer.head().await.expect("the head of a response");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    let body = match peer.rest().await {
        // A reset is as clear as can be.
        Err(_) => return,
        Ok(body) => String::from_utf8(body).unwrap(),
    };
    assert!(body.contains(begins), "{body:?}");
    let length = head
        .lines()
        .find_map(|line| line.to_lowercase().strip_prefix("content-length:")?.trim().parse().ok());
    match length {
        Some(length) => assert!(body.len() < length, "whole: {head}{body}"),
        None => {
            assert!(head.to_lowercase().contains("transfer-encoding: chunked"), "{head}");
            assert!(!body.ends_with("0\r\n\r\n"), "whole: {head}{body}");
        }
    }
}

async fn no_request_is_in_flight(proxy: &Proxy) {
    within("no request in flight", async { while proxy.metric(IN_FLIGHT).await != Some(0.0) {} })
        .await;
}

#[tokio::test]
async fn an_origin_that_closes_or_resets_before_it_responds_has_its_own_error() {
    async fn told<Script, Run>(script: Script, stages: &[&str])
    where
        Script: Fn(Arrival) -> Run + Clone + Send + Sync + 'static,
        Run: Future<Output = ()> + Send + 'static,
    {
        let through = Through::new("", script).await;
        let problem = problem(&through.exchange(GET).await, 502, "connection_terminated");
        assert!(stages.contains(&problem["stage"].as_str().unwrap()), "{problem}");
        assert_eq!(problem["endpoint"], through.origin.address.to_string());
        no_request_is_in_flight(&through.proxy).await;
    }
    told(scripts::close_on_accept, &["tls"]).await;
    // The reset may be quicker than the news that the connection is up.
    told(scripts::reset_on_accept, &["connect", "tls"]).await;
    told(scripts::close_after_request, &["response"]).await;
    told(scripts::reset_after_request, &["response"]).await;
    told(scripts::half_a_head, &["response"]).await;
}

#[tokio::test]
async fn a_stall_before_the_response_ends_with_a_504_that_names_the_phase() {
    let mut scene = Scene::new(1).await;
    let hole = loopback::Blackhole::bind((loopback::address(), 0).into());
    scene.take_listeners();
    scene.dns.zone([dns::address(crate::support::scene::TRUE_NAME, 60, hole.address.ip())]);
    let port = format!("port: {}", scene.port);
    let yaml = scene.yaml(IMPATIENT).replace(&port, &format!("port: {}", hole.address.port()));
    let proxy = Proxy::start(&yaml).await;
    let response = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    assert_eq!(problem(&response, 504, "connection_timeout")["stage"], "connect");

    let through = Through::new(IMPATIENT, scripts::never_shake_hands).await;
    let response = through.exchange(GET).await;
    assert_eq!(problem(&response, 504, "connection_timeout")["stage"], "tls");

    let through = Through::new(IMPATIENT, scripts::never_respond).await;
    let response = through.exchange(GET).await;
    assert_eq!(problem(&response, 504, "http_response_timeout")["stage"], "response");
    // The connection has a response on its way that nobody wants any more.
    through.origin.until(|seen| seen.ended == 1).await;

    let through = saying(IMPATIENT, "HTTP/1.1 200 OK\r\nContent-Le").await;
    let response = through.exchange(GET).await;
    assert_eq!(problem(&response, 504, "http_response_timeout")["stage"], "response");
    through.origin.until(|seen| seen.ended == 1).await;

    let through = saying(IMPATIENT, "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n").await;
    let response = through.exchange(GET).await;
    assert_eq!(problem(&response, 504, "http_response_timeout")["stage"], "response");
    no_request_is_in_flight(&through.proxy).await;
}

#[tokio::test]
async fn a_stall_within_the_body_ends_both_connections_after_timeouts_idle() {
    for response in [
        "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nhalf",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        "HTTP/1.1 200 OK\r\n\r\nhalf",
    ] {
        let through = saying(IMPATIENT, response).await;
        let mut peer = through.connect().await;
        peer.send(GET).await;
        assert_broken(peer, "half").await;
        through.origin.until(|seen| seen.ended == 1).await;
        no_request_is_in_flight(&through.proxy).await;
    }
}

#[tokio::test]
async fn half_a_body_is_never_a_whole_one() {
    for response in [
        "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nhalf",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        // The last chunk without the end of its trailers.
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\nTrailer: cut",
        // A size that is none, is too large for any integer, or is not where it belongs.
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\nxyz\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n-1\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n\
         10000000000000004\r\nmore\r\n0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalfmore\r\n0\r\n\r\n",
    ] {
        let through = last_words("", response).await;
        let mut peer = through.connect().await;
        peer.send(GET).await;
        assert_broken(peer, "half").await;
        no_request_is_in_flight(&through.proxy).await;
    }
}

#[tokio::test]
async fn a_body_that_resets_half_way_is_broken_for_the_client_too() {
    for framing in ["Content-Length: 100", "Transfer-Encoding: chunked", "Connection: close"] {
        let body = if framing.contains("chunked") { "64\r\nhalf" } else { "half" };
        let response = format!("HTTP/1.1 200 OK\r\n{framing}\r\n\r\n{body}");
        let (arrived, mut wait) = tokio::sync::mpsc::unbounded_channel::<()>();
        let gate = std::sync::Arc::new(tokio::sync::Notify::new());
        let through = Through::new("", {
            let gate = gate.clone();
            move |arrival: Arrival| {
                let (gate, response, arrived) = (gate.clone(), response.clone(), arrived.clone());
                async move {
                    let Some(mut conversation) = arrival.open().await else { return };
                    conversation.request().await;
                    conversation.peer.send(response).await;
                    arrived.send(()).unwrap();
                    gate.notified().await;
                    conversation.peer.reset();
                }
            }
        })
        .await;
        let mut peer = through.connect().await;
        peer.send(GET).await;
        within("the response's first half", wait.recv()).await.unwrap();
        let head = peer.head().await.unwrap();
        let chunked = head.to_lowercase().contains("chunked");
        // A chunk's size comes ahead of it.
        let first = peer.exactly(if chunked { 7 } else { 4 }).await;
        assert!(first.ends_with(b"half"), "{head}{first:?}");
        gate.notify_one();
        if let Ok(rest) = peer.rest().await {
            assert!(!rest.ends_with(b"0\r\n\r\n"), "whole: {head}{rest:?}");
            assert!(chunked || head.contains("100"), "an end that looks like one: {head}");
        }
    }
}

/// Nothing but the reset shows that there was more of it: there is neither a length nor TLS.
#[tokio::test]
async fn a_response_is_incomplete_whose_reset_the_upload_notices_first() {
    let mut scene = Scene::new(1).await;
    let (reset, mut was_reset) = tokio::sync::mpsc::unbounded_channel::<()>();
    let script = move |arrival: Arrival| {
        let reset = reset.clone();
        async move {
            let mut conversation = arrival.open().await.unwrap();
            conversation.peer.head().await.unwrap();
            conversation.peer.send("HTTP/1.1 200 OK\r\n\r\n").await;
            // Until the client has no room for more, so that the proxy reads no more of it.
            let block = vec![b'x'; 64 * 1024];
            let pause = Duration::from_millis(300);
            while tokio::time::timeout(pause, conversation.peer.try_send(&block)).await.is_ok() {}
            conversation.peer.reset();
            reset.send(()).unwrap();
        }
    };
    let _origin = RawOrigin::start(scene.take_listeners().remove(0), None, script);
    let proxy = Proxy::start(&scene.yaml("tls: {mode: plaintext}")).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    let head = format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\nTransfer-Encoding: chunked\r\n\r\n");
    peer.send(head).await;
    within("the reset", was_reset.recv()).await.unwrap();
    // The proxy finds out when it sends this on.
    peer.send("5\r\nhello\r\n").await;
    if let Ok(response) = peer.rest().await {
        assert!(response.starts_with(b"HTTP/1.1 200") && response.len() > 64 * 1024);
        assert!(!response.ends_with(b"0\r\n\r\n"), "the last chunk");
    }
    let line = proxy.logged("\"status\":200").await;
    assert!(line.contains("\"error\":\"http_response_incomplete\""), "{line}");
}

#[tokio::test]
async fn what_is_no_http_is_refused_and_explained() {
    let long = format!("HTTP/1.1 200 OK\r\nX: {}\r\n\r\n", "x".repeat(1024 * 1024));
    let many = format!("HTTP/1.1 200 OK\r\n{}Content-Length: 0\r\n\r\n", "X: 1\r\n".repeat(5000));
    for response in [
        "\0\u{ff}this is no HTTP\r\n\r\n",
        "SSH-2.0-OpenSSH_9.6\r\n",
        "HTTP/2.0 200 OK\r\n\r\n",
        "HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 two OK\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok!",
        "HTTP/1.1 200 OK\r\nContent-Length: 2, 3\r\n\r\nok!",
        "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
        "HTTP/1.1 200 OK\r\nBad Name: 1\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: a\0b\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX: a\r\n folded: b\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nX : 1\r\nContent-Length: 0\r\n\r\n",
        &long,
        &many,
    ] {
        let through = saying("", response).await;
        let shown = &response[..response.len().min(70)];
        let response = through.exchange(GET).await;
        assert_eq!(response.status(), 502, "{shown:?}: {}", response.text());
        problem(&response, 502, "http_protocol_error");
        // What else it sends is no response to a request.
        through.origin.until(|seen| seen.ended == 1).await;
    }
}

#[tokio::test]
async fn a_response_with_length_and_coding_is_read_by_its_coding_and_passed_on_with_one() {
    let response = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n\
                  2\r\nok\r\n0\r\n\r\n";
    let through = saying("", response).await;
    // The reader of tests panics at two framings.
    let response = through.exchange(GET).await;
    assert_eq!((response.status(), response.text()), (200, "ok"));
    through.origin.until(|seen| seen.ended == 1).await;
}

#[tokio::test]
async fn what_comes_behind_a_response_reaches_nobody() {
    for (behind, method) in [
        ("HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret", "GET"),
        ("secret without a head", "GET"),
        ("secret without a head", "HEAD"),
    ] {
        let response = format!(
            "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}{behind}",
            if method == "HEAD" { "" } else { "ok" }
        );
        let through = saying("", response).await;
        let mut peer = through.connect().await;
        for _ in 0..2 {
            peer.send(GET.replace("GET", method)).await;
            let response = peer.response_to(method).await;
            assert_eq!(response.status(), 200);
            assert_eq!(response.text(), if method == "HEAD" { "" } else { "ok" });
        }
        assert_eq!(through.origin.seen().connections, 2, "{behind}");
        assert!(!peer.has_arrived(), "more than the response");
    }
}

#[tokio::test]
async fn a_204_or_304_with_a_body_does_not_shift_the_responses() {
    for status in ["204 No Content", "304 Not Modified"] {
        let response =
            format!("HTTP/1.1 {status}\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret");
        let through = saying("", response).await;
        let mut peer = through.connect().await;
        for _ in 0..2 {
            peer.send(GET).await;
            let response = peer.response().await;
            assert!(response.start_line().contains(&status[..3]), "{}", response.head);
        }
        assert_eq!(through.origin.seen().connections, 2);
    }
}

#[tokio::test]
async fn a_response_ahead_of_the_request_on_a_new_connection_is_not_the_next_clients() {
    // It may be taken for the response to the request that the connection was made for, as every
    // HTTP/1 client would; what comes second must not be taken for the next one's.
    let through = Through::new("", |arrival: Arrival| async move {
        let Some(mut conversation) = arrival.open().await else { return };
        let early = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nearly";
        conversation.peer.try_send(early).await.ok();
        while conversation.request().await.is_some() {
            conversation.peer.try_send(scripts::ok("late")).await.ok();
        }
    })
    .await;
    for n in 0..4 {
        let request = GET.replace("GET /", &format!("GET /{n}"));
        let response = through.exchange(&request).await;
        if response.status() == 200 {
            assert_eq!(response.text(), "early", "a response to another request");
        } else {
            problem(&response, 502, "http_protocol_error");
        }
    }
    assert!(through.origin.seen().connections >= 4, "a connection out of step was used again");
}

#[tokio::test]
async fn a_response_of_hundreds_of_fields_passes_and_one_of_thousands_is_refused() {
    let response = |count: usize| {
        let fields: String = (0..count).map(|n| format!("X-Field-{n}: {n}\r\n")).collect();
        format!("HTTP/1.1 200 OK\r\n{fields}Content-Length: 2\r\n\r\nok")
    };
    for (count, status) in [(101, 200), (1_000, 200), (3_000, 502)] {
        let response = response(count);
        let through =
            Through::new("", move |arrival| scripts::always(arrival, response.clone())).await;
        let response = through.exchange(GET).await;
        assert_eq!(response.status(), status, "{count}");
        if status == 200 {
            let sent: Vec<_> =
                (0..count).map(|n| (format!("X-Field-{n}"), n.to_string())).collect();
            let fields = response.fields();
            let fields = fields.iter().filter(|(name, _)| name.starts_with("X-Field-"));
            let came: Vec<_> =
                fields.map(|(name, value)| (name.to_string(), value.to_string())).collect();
            assert_eq!(came, sent);
        }
    }
}

#[tokio::test]
async fn hundreds_of_interim_responses_come_before_the_final_one() {
    let hints = "HTTP/1.1 103 Early Hints\r\nLink: </style.css>; rel=preload\r\n\r\n";
    let (going, processing) = ("HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.1 102 Processing\r\n\r\n");
    for (interim, passed_on) in [(hints, 500), (going, 0), (processing, 500)] {
        let response = interim.repeat(500) + "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
        let through =
            Through::new("", move |arrival| scripts::always(arrival, response.clone())).await;
        let mut peer = through.connect().await;
        for _ in 0..2 {
            peer.send(GET).await;
            let mut response = peer.response().await;
            let mut heads = 0;
            while response.status() < 200 {
                assert_eq!(response.head, interim);
                heads += 1;
                response = peer.response().await;
            }
            assert_eq!((response.status(), response.text(), heads), (200, "ok", passed_on));
        }
    }
}

#[tokio::test]
async fn an_origin_that_says_close_and_does_not_is_left_all_the_same() {
    let response = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok";
    let through = saying("", response).await;
    let mut peer = through.connect().await;
    for nth in 1..=2 {
        peer.send(GET).await;
        assert_eq!(peer.response().await.text(), "ok");
        // The origin waits for our end, and gets it.
        through.origin.until(|seen| seen.ended == nth).await;
    }
    assert_eq!(through.origin.seen().connections, 2);
}

#[tokio::test]
async fn http_1_0_keeps_its_connection_only_where_it_says_so() {
    for (fields, connections) in
        [("Content-Length: 2", 2), ("Connection: keep-alive\r\nContent-Length: 2", 1)]
    {
        let response = format!("HTTP/1.0 200 OK\r\n{fields}\r\n\r\nok");
        let through =
            Through::new("", move |arrival| scripts::always(arrival, response.clone())).await;
        let mut peer = through.connect().await;
        for _ in 0..2 {
            peer.send(GET).await;
            let response = peer.response().await;
            assert_eq!((response.start_line(), response.text()), ("HTTP/1.1 200 OK", "ok"));
        }
        assert_eq!(through.origin.seen().connections, connections, "{fields}");
    }
    // Neither length nor coding: the end of the connection is the end of the body.
    let through = last_words("", "HTTP/1.0 200 OK\r\n\r\nto the end").await;
    let mut peer = through.connect().await;
    for _ in 0..2 {
        peer.send(GET).await;
        assert_eq!(peer.response().await.text(), "to the end");
    }
}

#[tokio::test]
async fn bare_line_feeds_do_not_reach_the_client() {
    let through = saying("", "HTTP/1.1 200 OK\nX-A: 1\nContent-Length: 2\n\nok").await;
    let response = through.exchange(GET).await;
    // Read as RFC 9112 §2.2 permits, it goes on as lines that everybody reads alike.
    assert_eq!((response.status(), response.text()), (200, "ok"));
    assert!(!response.head.replace("\r\n", "").contains(['\r', '\n']), "{:?}", response.head);
    assert_eq!(response.field("x-a"), Some("1"));
}

#[tokio::test]
async fn an_endpoint_without_another_beside_it_is_not_tried_again_in_vain() {
    const RETRIES: &str = "truename_retries_total{alias=\"webscaler-manual\",reason=\"connect\"}";
    let through = Through::new("", scripts::close_on_accept).await;
    problem(&through.exchange(GET).await, 502, "connection_terminated");
    assert_eq!(through.origin.seen().connections, 1);
    assert_eq!(through.proxy.metric(RETRIES).await.unwrap_or_default(), 0.0);

    let scene = Scene::new(1).await;
    let denied =
        scene.yaml("").replace("allow_addresses: [\"127.0.0.0/8\"]", "allow_addresses: []");
    let proxy = Proxy::start(&denied).await;
    let response = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    problem(&response, 403, "destination_ip_prohibited");
    assert_eq!(proxy.metric(RETRIES).await.unwrap_or_default(), 0.0);
}
