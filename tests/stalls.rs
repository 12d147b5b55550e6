//! Peers that stop: whoever stops reading, or sending in the midst of a message, is given up after
//! `timeouts.idle`, and with it all that it held; whoever is merely slow is not.

use std::{fs, time::Duration};

use bytes::Bytes;
use http::Response;
use socket2::SockRef;
use tokio::task::JoinSet;

use crate::{
    http2_upstream,
    support::{
        client::H2, peer::Peer, proxy::Proxy, raw_origin::Arrival, scene::ALIAS, scripts,
        through::Through, within,
    },
};

const IN_FLIGHT: &str = "truename_http_requests_in_flight{alias=\"webscaler-manual\"}";
const TUNNEL: &str = "protocol: tcp\ntls_in: false\ntimeouts: {idle: 2s}";
const IMPATIENT: &str = "timeouts: {idle: 1s}";
/// More than all kernels on the way take.
const LONG: usize = 64 * 1024 * 1024;
const BLOCK: usize = 1024 * 1024;

/// Responds with as much as is taken.
async fn long_response(arrival: Arrival) {
    let mut conversation = arrival.open().await.unwrap();
    conversation.request().await.unwrap();
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {LONG}\r\n\r\n");
    conversation.peer.send(head).await;
    while conversation.peer.try_send(vec![b'x'; BLOCK]).await.is_ok() {}
}

/// Reads a head, and then nothing until the connection breaks.
async fn never_read(arrival: Arrival) {
    let mut conversation = arrival.open().await.unwrap();
    conversation.peer.head().await.unwrap();
    conversation.peer.until_broken().await;
}

#[tokio::test]
async fn a_client_that_stops_reading_is_given_up_and_holds_nothing() {
    let through =
        Through::new(&format!("{IMPATIENT}\nlimits: {{requests: 1}}"), long_response).await;
    let mut peer = through.connect().await;
    peer.send(get()).await;
    peer.head().await.unwrap();
    through.origin.until(|seen| seen.ended == 1).await;
    no_request_is_in_flight(&through.proxy).await;
    // Its permit is another's, and its connection was not left to the kernel.
    let mut other = through.connect().await;
    other.send(get()).await;
    assert!(other.head().await.unwrap().starts_with("HTTP/1.1 200"));
    let rest = within("the end", async { while !peer.some().await.is_empty() {} });
    rest.await;
}

#[tokio::test]
async fn an_origin_that_stops_reading_is_given_up_and_its_client_told() {
    let through = Through::new(IMPATIENT, never_read).await;
    let mut peer = uploading(&through).await;
    let response = peer.response().await;
    assert_eq!(response.status(), 504, "{}", response.text());
    assert_eq!(response.json()["type"], "urn:truename:error:http_response_timeout");
    assert_eq!(response.json()["fix"], "raise `timeouts.idle`");
    through.origin.until(|seen| seen.ended == 1).await;
}

#[tokio::test]
async fn a_client_that_stops_sending_in_a_body_is_given_up_and_told() {
    let through = Through::new(IMPATIENT, |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        conversation.peer.hold().await;
    })
    .await;
    for (framing, part) in
        [("Content-Length: 10", "hello"), ("Transfer-Encoding: chunked", "5\r\nhello\r\n")]
    {
        let mut peer = through.connect().await;
        peer.send(format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\n{framing}\r\n\r\n{part}")).await;
        let response = peer.response().await;
        assert_eq!((response.status(), response.field("Connection")), (408, Some("close")));
        assert!(
            response.json()["detail"].as_str().unwrap().contains("`timeouts.idle`"),
            "{}",
            response.text()
        );
        assert_eq!(response.json()["fix"], "raise `timeouts.idle`");
    }
    through.origin.until(|seen| seen.ended == 2).await;
}

#[tokio::test]
async fn a_client_of_http_2_that_stops_sending_in_a_body_is_given_up_and_told() {
    let through = Through::new(IMPATIENT, |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        conversation.peer.hold().await;
    })
    .await;
    let (_upload, body) = crate::support::service_origin::streamed();
    let request = http::Request::post(format!("http://{ALIAS}/")).body(body).unwrap();
    let (mut sender, connection) = {
        let io = hyper_util::rt::TokioIo::new(through.connect().await.into_wire());
        hyper::client::conn::http2::handshake(hyper_util::rt::TokioExecutor::new(), io)
            .await
            .unwrap()
    };
    tokio::spawn(connection);
    let response = within("a response", sender.send_request(request)).await.unwrap();
    assert_eq!(response.status(), 408);
    through.origin.until(|seen| seen.ended == 1).await;
    // The connection serves on.
    drop(H2::connect(through.address).await);
}

/// By the bytes in the way of a FIN nobody would learn of it.
#[tokio::test]
async fn a_client_that_leaves_while_its_upload_is_held_up_is_noticed() {
    let through = Through::new("", never_read).await;
    uploading(&through).await.reset();
    through.origin.until(|seen| seen.ended == 1).await;
    no_request_is_in_flight(&through.proxy).await;
}

#[tokio::test]
async fn whoever_reads_slowly_gets_all() {
    let through = Through::new("timeouts: {idle: 2s}", long_response).await;
    let mut peer = through.connect().await;
    peer.send(get()).await;
    peer.head().await.unwrap();
    let mut pace = tokio::time::interval(Duration::from_millis(100));
    // Longer than anybody may rest, in which the proxy's kernel has no room for more.
    for _ in 0..48 {
        pace.tick().await;
        peer.exactly(BLOCK / 8).await;
    }
    for _ in 0..LONG / BLOCK - 6 {
        peer.exactly(BLOCK).await;
    }
}

/// A socket becomes writable only after a third of its buffer has drained, which takes such a client longer.
#[tokio::test]
async fn a_client_that_reads_slowly_from_a_tunnel_is_not_idle() {
    let through = Through::new(TUNNEL, |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        while conversation.peer.try_send(vec![b'x'; BLOCK]).await.is_ok() {}
    });
    let through = through.await;
    let mut peer = through.connect().await;
    read_slowly(&mut peer).await;
    for _ in 0..8 {
        peer.exactly(BLOCK).await;
    }
}

/// Not even once the client has ended its side, and everything it sent waits in kernels on the way.
#[tokio::test]
async fn a_target_that_reads_slowly_from_a_tunnel_is_not_idle() {
    let through = Through::new(TUNNEL, |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        read_slowly(&mut conversation.peer).await;
        conversation.peer.rest().await.unwrap();
        conversation.peer.send("all of it").await;
        conversation.peer.finish().await;
    });
    let through = through.await;
    let mut peer = through.connect().await;
    peer.send(vec![b'x'; 8 * BLOCK]).await;
    peer.finish().await;
    assert_eq!(peer.rest().await.unwrap(), b"all of it");
}

/// Reads for longer than the peers of [`TUNNEL`] may be idle.
async fn read_slowly(peer: &mut Peer) {
    let mut pace = tokio::time::interval(Duration::from_millis(100));
    for _ in 0..50 {
        pace.tick().await;
        peer.exactly(BLOCK / 32).await;
    }
}

#[tokio::test]
async fn a_client_that_stops_reading_from_a_tunnel_is_idle() {
    let through = Through::new(TUNNEL, |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        while conversation.peer.try_send(vec![b'x'; BLOCK]).await.is_ok() {}
    });
    let through = through.await;
    let mut peer = through.connect().await;
    peer.exactly(1).await;
    through.proxy.logged("\"end\":\"idle\"").await;
    through.origin.until(|seen| seen.ended == 1).await;
}

/// While the one side sends the other may be silent.
#[tokio::test]
async fn a_stream_in_which_one_side_sends_is_not_idle() {
    let through = Through::new(IMPATIENT, |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nup\r\n";
        conversation.peer.send(head).await;
        // As long as the client sends, and then the other way round.
        for _ in 0..10 {
            assert_eq!(conversation.peer.exactly(7).await, b"2\r\nab\r\n");
        }
        let mut pace = tokio::time::interval(Duration::from_millis(200));
        for _ in 0..10 {
            pace.tick().await;
            conversation.peer.send("2\r\ncd\r\n").await;
        }
        conversation.peer.send("0\r\n\r\n").await;
        conversation.peer.hold().await;
    })
    .await;
    let mut peer = through.connect().await;
    let fields = "Transfer-Encoding: chunked";
    peer.send(format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\n{fields}\r\n\r\n")).await;
    peer.head().await.unwrap();
    assert_eq!(peer.exactly(7).await, b"2\r\nup\r\n");
    let mut pace = tokio::time::interval(Duration::from_millis(200));
    for _ in 0..10 {
        pace.tick().await;
        peer.send("2\r\nab\r\n").await;
    }
    assert_eq!(
        peer.exactly(75).await,
        ["2\r\ncd\r\n".repeat(10), "0\r\n\r\n".to_owned()].concat().as_bytes()
    );
}

/// How long it rested before, within a body that nobody wanted any more, is another matter.
#[tokio::test]
async fn a_client_may_rest_between_two_requests_for_longer_than_within_a_body() {
    let through = Through::new(IMPATIENT, |arrival: Arrival| async move {
        let first = arrival.nth == 0;
        let mut conversation = arrival.open().await.unwrap();
        if first {
            conversation.peer.head().await.unwrap();
            assert_eq!(conversation.peer.exactly(5).await, b"hello");
            conversation.peer.send(scripts::ok("early")).await;
            conversation.peer.hold().await;
        }
        conversation.request().await.unwrap();
        conversation.peer.send(scripts::ok("whole")).await;
    })
    .await;
    let mut peer = through.connect().await;
    let head = format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\nContent-Length: 10\r\n\r\n");
    peer.send(format!("{head}hello")).await;
    assert_eq!(peer.response().await.text(), "early");
    peer.send("world").await;
    tokio::time::sleep(Duration::from_millis(1200)).await;
    peer.send(format!("{head}hello")).await;
    // It is waited for.
    tokio::time::sleep(Duration::from_millis(100)).await;
    peer.send("world").await;
    let response = peer.response().await;
    assert_eq!((response.status(), response.text()), (200, "whole"));
}

#[tokio::test]
async fn an_early_response_flows_on_though_its_origin_reads_no_more_of_the_request() {
    let through = Through::new(IMPATIENT, |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        conversation.peer.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
        let mut pace = tokio::time::interval(Duration::from_millis(200));
        for _ in 0..12 {
            pace.tick().await;
            conversation.peer.send("2\r\nab\r\n").await;
        }
        conversation.peer.send("0\r\n\r\n").await;
        conversation.peer.until_broken().await;
    })
    .await;
    let mut peer = uploading(&through).await;
    assert_eq!(peer.response().await.text(), "ab".repeat(12));
}

#[tokio::test]
async fn an_origin_that_responds_early_and_reads_slowly_is_not_given_up() {
    const PIECE: usize = 64 * 1024;
    let through = Through::new(IMPATIENT, |mut arrival: Arrival| async move {
        SockRef::from(&*arrival.tcp()).set_recv_buffer_size(PIECE).unwrap();
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        conversation.peer.send("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await;
        for _ in 0..20 {
            tokio::time::sleep(Duration::from_millis(200)).await;
            conversation.peer.exactly(PIECE).await;
        }
        conversation.peer.send("2\r\nok\r\n0\r\n\r\n").await;
        conversation.peer.until_broken().await;
    })
    .await;
    let mut peer = uploading(&through).await;
    assert_eq!(peer.response().await.text(), "ok");
}

/// Its windows are small, so that the last piece of the body waits for many of them.
#[tokio::test]
async fn an_http_2_origin_that_reads_slowly_is_neither_late_nor_idle() {
    const WINDOW: u32 = 4096;
    for (keys, is_early) in [("timeouts: {response: 1s}", false), (IMPATIENT, true)] {
        let through = http2_upstream::through(keys, move |arrival| async move {
            let wire = arrival.open().await.unwrap().peer.into_wire();
            let mut origin = h2::server::Builder::new();
            let origin = origin.initial_window_size(WINDOW).handshake::<_, Bytes>(wire).await;
            let mut origin = origin.unwrap();
            let mut exchanges = JoinSet::new();
            while let Some(Ok((request, mut respond))) = origin.accept().await {
                exchanges.spawn(async move {
                    let mut body = request.into_body();
                    let mut begin = || respond.send_response(Response::new(()), false).unwrap();
                    let mut response = is_early.then(&mut begin);
                    while let Some(data) = body.data().await {
                        let length = data.unwrap().len();
                        tokio::time::sleep(Duration::from_millis(200)).await;
                        body.flow_control().release_capacity(length).unwrap();
                    }
                    response.get_or_insert_with(begin).send_data("ok".into(), true).unwrap();
                });
            }
        })
        .await;
        // The windows are known after that.
        assert_eq!(through.exchange(&get()).await.text(), "ok");
        let body = "x".repeat(64 * 1024);
        let length = body.len();
        let post = format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\nContent-Length: {length}\r\n\r\n");
        assert_eq!(through.exchange(&(post + &body)).await.text(), "ok", "{keys}");
    }
}

/// What it has asked for already stands in the way of its end.
#[tokio::test]
async fn a_client_that_has_asked_ahead_and_leaves_is_noticed() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        conversation.peer.hold().await;
    })
    .await;
    for behind in [get(), "\r\n".to_owned()] {
        let mut peer = through.connect().await;
        peer.send(format!("{}{behind}", get())).await;
    }
    through.origin.until(|seen| seen.ended == 2).await;
    no_request_is_in_flight(&through.proxy).await;
}

#[tokio::test]
async fn tcp_asks_a_silent_peer_on_either_side_whether_it_is_there() {
    for (keys, seconds) in [("", 60), ("timeouts: {keepalive: 7s}", 7)] {
        let through = Through::new(keys, scripts::respond).await;
        let mut peer = through.connect().await;
        peer.send(get()).await;
        assert_eq!(peer.response().await.status(), 200);
        let down = (through.address.port(), peer.address());
        for (local, remote) in [(Some(down.0), down.1.port()), (None, through.scene.port)] {
            within("the keep-alive timer", async {
                loop {
                    match keepalive(local, remote) {
                        // What is left of it, and not more.
                        Some(left)
                            if left <= f64::from(seconds) && left > f64::from(seconds) - 5.0 =>
                        {
                            return;
                        }
                        _ => tokio::task::yield_now().await,
                    }
                }
            })
            .await;
        }
    }
}

/// Seconds until the kernel asks the peer of such a connection of loopback (`proc_pid_net(5)`, timer 2).
fn keepalive(local: Option<u16>, remote: u16) -> Option<f64> {
    let table = fs::read_to_string("/proc/net/tcp").unwrap();
    table.lines().skip(1).find_map(|line| {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let port =
            |column: &str| u16::from_str_radix(column.rsplit(':').next().unwrap(), 16).unwrap();
        let established = columns[3] == "01";
        let (timer, when) = columns[5].split_once(':')?;
        let hundredths = u32::from_str_radix(when, 16).ok()?;
        let it = established
            && port(columns[2]) == remote
            && local.is_none_or(|local| port(columns[1]) == local)
            && timer == "02";
        it.then(|| f64::from(hundredths) / 100.0)
    })
}

/// A client whose upload nobody reads any more, once all on the way is full.
async fn uploading(through: &Through) -> Peer {
    let mut peer = through.connect().await;
    let head = format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\nContent-Length: {LONG}\r\n\r\n");
    peer.send(head).await;
    let block = vec![b'x'; BLOCK];
    let full = async { while peer.try_send(&block).await.is_ok() {} };
    tokio::time::timeout(Duration::from_millis(700), full).await.unwrap_err();
    peer
}

async fn no_request_is_in_flight(proxy: &Proxy) {
    within("no request in flight", async { while proxy.metric(IN_FLIGHT).await != Some(0.0) {} })
        .await;
}

fn get() -> String {
    format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")
}
