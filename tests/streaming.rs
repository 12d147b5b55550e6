//! Bodies flow in both directions as they come, however long, and end as they should.

use std::time::Duration;

use crate::support::{
    client, curl::curl, proxy::Proxy, raw_origin::Arrival, scene::ALIAS, scripts, through::Through,
    within,
};
use socket2::SockRef;
use tokio::{sync::watch, time::sleep};

#[tokio::test]
async fn the_first_chunk_of_a_response_arrives_before_the_second_is_sent() {
    let (go_on, gone_on) = watch::channel(false);
    let through = Through::new("", move |arrival: Arrival| {
        let mut gone_on = gone_on.clone();
        async move {
            let mut conversation = arrival.open().await.unwrap();
            conversation.request().await.unwrap();
            let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
            conversation.peer.send(format!("{head}3\r\none\r\n")).await;
            gone_on.wait_for(|go_on| *go_on).await.unwrap();
            conversation.peer.send("3\r\ntwo\r\n0\r\n\r\n").await;
            conversation.peer.hold().await;
        }
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(get("/")).await;
    assert!(peer.head().await.unwrap().starts_with("HTTP/1.1 200 OK\r\n"));
    assert_eq!(peer.exactly(8).await, b"3\r\none\r\n");
    go_on.send_replace(true);
    assert_eq!(peer.exactly(13).await, b"3\r\ntwo\r\n0\r\n\r\n");
}

#[tokio::test]
async fn what_a_client_takes_to_send_its_request_is_not_the_targets_time_to_respond() {
    let through = Through::new("timeouts: {response: 500ms}", scripts::respond).await;
    let mut peer = through.connect().await;
    peer.send(format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\nContent-Length: 4\r\n\r\n")).await;
    for byte in ["a", "b", "c", "d"] {
        sleep(Duration::from_millis(300)).await;
        peer.send(byte).await;
    }
    assert_eq!(peer.response().await.status(), 200);
    assert_eq!(through.last_request().body, b"abcd");
}

#[tokio::test]
async fn what_a_target_takes_to_read_its_request_is_not_its_time_to_respond() {
    const PIECE: usize = 64 * 1024;
    const PIECES: usize = 48;
    let through = Through::new("timeouts: {response: 500ms}", |mut arrival: Arrival| async move {
        SockRef::from(&*arrival.tcp()).set_recv_buffer_size(PIECE).unwrap();
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        for _ in 0..PIECES {
            sleep(Duration::from_millis(30)).await;
            conversation.peer.exactly(PIECE).await;
        }
        conversation.peer.send(scripts::ok("ok")).await;
        conversation.peer.hold().await;
    })
    .await;
    let body = "x".repeat(PIECES * PIECE);
    let length = body.len();
    let request =
        format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\nContent-Length: {length}\r\n\r\n{body}");
    let mut peer = through.connect().await;
    peer.send(request).await;
    let response = peer.response().await;
    assert_eq!(response.status(), 200, "{}", response.text());
}

#[tokio::test]
async fn server_sent_events_arrive_one_by_one() {
    let (events, next) = watch::channel(0);
    let through = Through::new("", move |arrival: Arrival| {
        let mut next = next.clone();
        async move {
            let mut conversation = arrival.open().await.unwrap();
            conversation.request().await.unwrap();
            // Without a length, as many such servers do it.
            let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n";
            conversation.peer.send(head).await;
            while next.changed().await.is_ok() {
                let event = format!("data: {}\n\n", *next.borrow_and_update());
                conversation.peer.send(event).await;
            }
        }
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(get("/events")).await;
    let head = peer.head().await.unwrap();
    assert!(head.contains("text/event-stream"), "{head}");
    for number in 1..=5 {
        events.send_replace(number);
        assert_eq!(peer.exactly(14).await, format!("9\r\ndata: {number}\n\n\r\n").as_bytes());
    }
}

#[tokio::test]
async fn the_origin_reads_the_first_chunk_before_the_second_is_sent() {
    let (got, mut first) = watch::channel(false);
    let through = Through::new("", move |arrival: Arrival| {
        let got = got.clone();
        async move {
            let mut conversation = arrival.open().await.unwrap();
            conversation.peer.head().await.unwrap();
            assert_eq!(conversation.peer.exactly(8).await, b"3\r\none\r\n");
            got.send_replace(true);
            assert_eq!(conversation.peer.exactly(13).await, b"3\r\ntwo\r\n0\r\n\r\n");
            conversation.peer.send(scripts::ok("both")).await;
        }
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(post("Transfer-Encoding: chunked", "3\r\none\r\n")).await;
    within("the first chunk", first.wait_for(|first| *first)).await.unwrap();
    peer.send("3\r\ntwo\r\n0\r\n\r\n").await;
    assert_eq!(peer.response().await.text(), "both");
}

#[tokio::test]
async fn a_response_may_flow_while_the_request_still_does() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        conversation.peer.send(head).await;
        for _ in 0..4 {
            let chunk = conversation.peer.exactly(8).await;
            conversation.peer.send(chunk).await;
        }
        assert_eq!(conversation.peer.exactly(5).await, b"0\r\n\r\n");
        conversation.peer.send("0\r\n\r\n").await;
        conversation.peer.hold().await;
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(post("Transfer-Encoding: chunked", "")).await;
    assert_eq!(peer.head().await.unwrap().split("\r\n").next(), Some("HTTP/1.1 200 OK"));
    for chunk in ["3\r\none\r\n", "3\r\ntwo\r\n", "3\r\nthr\r\n", "3\r\nfou\r\n"] {
        peer.send(chunk).await;
        assert_eq!(peer.exactly(8).await, chunk.as_bytes());
    }
    peer.send("0\r\n\r\n").await;
    assert_eq!(peer.exactly(5).await, b"0\r\n\r\n");
}

#[tokio::test]
async fn a_response_ahead_of_the_bodys_end_reaches_the_client() {
    let response =
        "HTTP/1.1 413 Content Too Large\r\nConnection: close\r\nContent-Length: 3\r\n\r\nno!";
    let through = Through::new("", move |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        conversation.peer.send(response).await;
        // It takes what comes, as servers that mean well do for a while.
        conversation.peer.finish().await;
        conversation.peer.hold().await;
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(post("Content-Length: 1000000", &"x".repeat(10_000))).await;
    let response = peer.response().await;
    assert_eq!((response.status(), response.text()), (413, "no!"));
}

#[tokio::test]
async fn curl_hears_of_a_refusal_while_it_still_uploads() {
    for closes in [false, true] {
        let through = Through::new("", move |arrival: Arrival| async move {
            let mut conversation = arrival.open().await.unwrap();
            conversation.peer.head().await.unwrap();
            let connection = if closes { "Connection: close\r\n" } else { "" };
            let head = format!("HTTP/1.1 413 Content Too Large\r\n{connection}");
            conversation.peer.send(format!("{head}Content-Length: 3\r\n\r\nno!")).await;
            if closes {
                conversation.peer.finish().await;
            }
            conversation.peer.hold().await;
        })
        .await;
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("upload");
        std::fs::write(&file, vec![b'x'; 50_000_000]).unwrap();
        let url = format!("http://{}/", through.address);
        let file = file.to_str().unwrap();
        let said = curl(&["-H", "Expect:", "-w", " %{http_code}", "-T", file, &url]).await;
        assert_eq!(said.stdout, "no! 413", "{closes}: {} {}", said.code, said.stderr);
    }
}

#[tokio::test]
async fn a_request_that_breaks_off_does_not_look_whole() {
    for (fields, part) in
        [("Content-Length: 10", "hello"), ("Transfer-Encoding: chunked", "5\r\nhello\r\n")]
    {
        let through = Through::new("", move |arrival: Arrival| async move {
            let mut conversation = arrival.open().await.unwrap();
            let head = conversation.peer.head().await.unwrap();
            assert!(head.contains(fields), "{head}");
            let all = conversation.peer.rest().await.unwrap_or_else(|_| part.into());
            assert_eq!(String::from_utf8(all).unwrap(), part);
        })
        .await;
        let mut peer = through.connect().await;
        peer.send(post(fields, part)).await;
        through.origin.until(|seen| seen.server_names.len() == 1).await;
        drop(peer);
        through.origin.until(|seen| seen.ended == 1).await;
    }
}

#[tokio::test]
async fn trailers_pass_both_ways_where_they_are_wanted() {
    let response = "HTTP/1.1 200 OK\r\nTrailer: X-Sum, X-Other\r\nTransfer-Encoding: chunked\r\n\r\n\
                  2\r\nok\r\n0\r\nX-Sum: 42\r\nX-Other: b\r\n\r\n";
    let through = Through::new("", move |arrival| scripts::always(arrival, response)).await;
    let request = post(
        "TE: trailers\r\nConnection: TE\r\nTrailer: X-Check\r\nTransfer-Encoding: chunked",
        "3\r\nabc\r\n0\r\nX-Check: 7\r\n\r\n",
    );
    let response = through.exchange(&request).await;
    let named: Vec<_> =
        response.trailers.iter().map(|(name, value)| (name.to_lowercase(), value)).collect();
    let expected =
        [("x-sum".to_owned(), &"42".to_owned()), ("x-other".to_owned(), &"b".to_owned())];
    assert_eq!(named, expected);
    let sent = through.last_request();
    assert_eq!(sent.text(), "abc");
    let [(name, value)] = sent.trailers.as_slice() else { panic!("{sent:?}") };
    assert!(name.eq_ignore_ascii_case("x-check") && value == "7", "{sent:?}");
    assert_eq!(sent.field("Trailer"), Some("X-Check"));

    // RFC 9110, section 6.5.1: who does not want them gets the body without.
    let response = through.exchange(&get("/")).await;
    assert_eq!((response.text(), response.trailers.len()), ("ok", 0));
}

/// What recipients that merge trailers into the head would be led astray by, and what this hop alone is
/// concerned with (RFC 9110, sections 6.5.1 and 7.6.1).
#[tokio::test]
async fn trailers_that_frame_route_or_authenticate_do_not_pass() {
    let harmful = "Content-Length: 5\r\nHost: evil.example\r\nTransfer-Encoding: chunked\r\n\
                   Proxy-Authorization: Basic eDp5\r\nAuthorization: x\r\nConnection: X-Third\r\n\
                   Keep-Alive: 5\r\nTE: trailers\r\nTrailer: Host\r\nUpgrade: h2c\r\n\
                   Expect: 100-continue\r\nSet-Cookie: a=b\r\nX-Third: 3\r\nX-Nominated: 4\r\n\
                   X-Forwarded-For: 10.0.0.1\r\n";
    let trailers = format!("{harmful}X-Sum: 42\r\n");
    let fields = "TE: trailers\r\nConnection: TE, X-Nominated\r\nTransfer-Encoding: chunked";
    let body = format!("2\r\nok\r\n0\r\n{trailers}\r\n");
    let response =
        format!("HTTP/1.1 200 OK\r\n{}\r\n\r\n{body}", fields.replace("TE: trailers\r\n", ""));
    let through = Through::new("", move |arrival| scripts::always(arrival, response.clone())).await;
    let response = through.exchange(&post(fields, &body)).await;
    let sent = through.last_request();
    for message in [&response, &sent] {
        let [(name, value)] = message.trailers.as_slice() else { panic!("{message:?}") };
        assert!(name.eq_ignore_ascii_case("x-sum") && value == "42", "{message:?}");
        assert_eq!(message.text(), "ok");
    }

    // An HTTP/2 client would refuse the whole response for its `Connection`.
    let mut client = client::H2::connect(through.address).await;
    let response = client.get(&format!("http://{ALIAS}/")).await.unwrap();
    let trailers = response.trailers.unwrap();
    assert_eq!((trailers.len(), trailers["x-sum"].as_bytes()), (1, &b"42"[..]));
}

/// Far more than any buffer on the way.
const LONG: usize = 100 * 1024 * 1024;
/// What the process may grow by meanwhile: the kernel's buffers and TLS records, not the message.
const MOST_MEMORY: usize = 8 * 1024 * 1024;
const BLOCK: usize = 1024 * 1024;

#[tokio::test]
async fn a_long_response_to_a_slow_reader_takes_little_memory() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.request().await.unwrap();
        conversation.peer.send(format!("HTTP/1.1 200 OK\r\nContent-Length: {LONG}\r\n\r\n")).await;
        let block = vec![b'x'; BLOCK];
        for _ in 0..LONG / BLOCK {
            conversation.peer.try_send(&block).await.unwrap();
        }
        conversation.peer.hold().await;
    })
    .await;
    let before = through.proxy.peak_memory();
    let mut peer = through.connect().await;
    peer.send(get("/")).await;
    peer.head().await.unwrap();
    for read in 0..LONG / BLOCK {
        if read == 1 {
            // Nobody reads: all that can be on its way is, before the rest is asked for.
            settled_memory(&through.proxy).await;
        }
        assert!(peer.exactly(BLOCK).await.iter().all(|byte| *byte == b'x'));
    }
    let grown = through.proxy.peak_memory() - before;
    assert!(grown < MOST_MEMORY, "{grown} bytes");
}

#[tokio::test]
async fn a_long_request_to_a_slow_reader_takes_little_memory() {
    let (read_on, reading) = watch::channel(false);
    let through = Through::new("", move |arrival: Arrival| {
        let mut reading = reading.clone();
        async move {
            let mut conversation = arrival.open().await.unwrap();
            conversation.peer.head().await.unwrap();
            reading.wait_for(|go| *go).await.unwrap();
            for _ in 0..LONG / BLOCK {
                conversation.peer.exactly(BLOCK).await;
            }
            conversation.peer.send(scripts::ok("all")).await;
            conversation.peer.hold().await;
        }
    })
    .await;
    let before = through.proxy.peak_memory();
    let mut peer = through.connect().await;
    peer.send(post(&format!("Content-Length: {LONG}"), "")).await;
    let block = vec![b'x'; BLOCK];
    for sent in 0..LONG / BLOCK {
        if sent == 1 {
            settled_memory(&through.proxy).await;
            read_on.send_replace(true);
        }
        peer.send(&block).await;
    }
    assert_eq!(peer.response().await.text(), "all");
    let grown = through.proxy.peak_memory() - before;
    assert!(grown < MOST_MEMORY, "{grown} bytes");
}

#[tokio::test]
async fn a_client_that_leaves_is_not_waited_for_by_the_origin() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.request().await.unwrap();
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n";
        conversation.peer.send(head).await;
        conversation.peer.hold().await;
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(get("/")).await;
    peer.head().await.unwrap();
    drop(peer);
    through.origin.until(|seen| seen.ended == 1).await;
}

#[tokio::test]
async fn a_response_that_breaks_off_does_not_look_whole() {
    for script in ["length", "chunked"] {
        let through = Through::new("", move |arrival: Arrival| async move {
            match script {
                "length" => scripts::half_a_body(arrival).await,
                _ => scripts::half_a_chunk(arrival).await,
            }
        })
        .await;
        let mut peer = through.connect().await;
        peer.send(get("/")).await;
        let rest = peer.rest().await;
        if let Ok(bytes) = rest {
            let text = String::from_utf8(bytes).unwrap();
            assert!(text.ends_with("half") || text.ends_with("half\r\n"), "{text}");
        }
    }
}

/// Waits until the proxy's memory has not grown for a while, and holds a peak that counts.
async fn settled_memory(proxy: &Proxy) {
    let mut last = 0;
    let wait = async {
        while proxy.peak_memory() != last {
            last = proxy.peak_memory();
            client::get(proxy.admin().await, "localhost", "/livez").await;
        }
    };
    within("memory that stays", wait).await;
}

fn get(target: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")
}

fn post(fields: &str, body: &str) -> String {
    format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\n{fields}\r\n\r\n{body}")
}
