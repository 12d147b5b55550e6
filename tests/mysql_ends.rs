//! `protocol: mysql`: how sessions end, and what servers and clients may not do before they begin.

use std::sync::Arc;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::Notify,
};

use crate::support::{
    mysql::{
        CLIENT, OK, PASSWORD, QUERY, SCRAMBLE, Server, ThroughMysql, error, greeted, greeting,
        hash, log_in, next_packet, packet, response,
    },
    peer::Peer,
    raw_origin::Arrival,
    within,
};

const NATIVE: &str = "mysql_native_password";

/// Greets, makes TLS, and lets everybody in.
async fn let_in(arrival: &mut Option<Arrival>) -> Peer {
    let mut arrival = arrival.take().unwrap();
    arrival.tcp().write_all(&packet(0, greeting(NATIVE, true))).await.unwrap();
    arrival.tcp().read_exact(&mut [0; 36]).await.unwrap();
    let mut peer = arrival.open().await.unwrap().peer;
    next_packet(&mut peer).await.unwrap();
    peer.send(packet(3, OK)).await;
    peer
}

/// A client whose session has begun.
async fn session(through: &ThroughMysql) -> Peer {
    let mut peer = through.connect().await;
    greeted(&mut peer).await;
    peer.send(packet(1, response(CLIENT, NATIVE, &[7; 20]))).await;
    assert_eq!(next_packet(&mut peer).await, Some((2, OK.to_vec())));
    peer
}

#[tokio::test]
async fn a_response_that_is_cut_short_is_no_end_whatever_the_client_has_sent() {
    // A query that ends like COM_QUIT.
    let query = [QUERY, &[1, 0, 0, 0, 1]].concat();
    let length = query.len();
    let through = ThroughMysql::new("", move |arrival: Arrival| async move {
        let mut peer = let_in(&mut Some(arrival)).await;
        peer.exactly(4 + length).await;
        peer.send(&packet(1, OK)[..5]).await;
        peer.finish_tcp();
        peer.hold().await;
    })
    .await;
    let mut peer = session(&through).await;
    peer.send(packet(0, &query)).await;
    assert_eq!(peer.exactly(5).await, packet(1, OK)[..5]);
    peer.rest().await.expect_err("a reset");
    through.proxy.logged("\"end\":\"target\"").await;
}

#[tokio::test]
async fn a_session_that_its_client_ends_ends_in_order_in_whatever_pieces_it_says_so() {
    for length in 1..5 {
        let arrived = Arc::new(Notify::new());
        let arrives = arrived.clone();
        let through = ThroughMysql::new("", move |arrival: Arrival| {
            let arrives = arrives.clone();
            async move {
                let mut peer = let_in(&mut Some(arrival)).await;
                peer.exactly(length).await;
                arrives.notify_one();
                peer.exactly(5 - length).await;
                peer.finish_tcp();
                peer.hold().await;
            }
        })
        .await;
        let mut peer = session(&through).await;
        let quit = packet(0, [1]);
        peer.send(&quit[..length]).await;
        within("the first piece", arrived.notified()).await;
        peer.send(&quit[length..]).await;
        assert_eq!(peer.rest().await.unwrap(), b"", "{length}");
    }
}

#[tokio::test]
async fn bytes_that_come_between_the_greeting_and_tls_are_refused() {
    let greeted_client = Arc::new(Notify::new());
    let go = greeted_client.clone();
    let through = ThroughMysql::new("", move |mut arrival: Arrival| {
        let go = go.clone();
        async move {
            arrival.tcp().write_all(&packet(0, greeting(NATIVE, true))).await.unwrap();
            go.notified().await;
            // Somebody on the way says OK in the server's place, and responds to a query.
            let injected = [packet(3, OK), packet(1, b"\x01injected")].concat();
            arrival.tcp().write_all(&injected).await.unwrap();
            if arrival.tcp().read_exact(&mut [0; 36]).await.is_err() {
                return;
            }
            if let Some(mut conversation) = arrival.open().await {
                conversation.peer.hold().await;
            }
        }
    })
    .await;
    let mut peer = through.connect().await;
    greeted(&mut peer).await;
    greeted_client.notify_one();
    peer.send(packet(1, response(CLIENT, NATIVE, &[7; 20]))).await;
    let (_, code, state, text) = error(next_packet(&mut peer).await.unwrap());
    assert_eq!((code, &state[..]), (1429, "08001"), "{text}");
    assert_eq!(peer.rest().await.unwrap(), b"");
}

#[tokio::test]
async fn a_response_whose_length_looks_like_tls_is_a_response() {
    let server = Server::new();
    let through = ThroughMysql::serving(&server, "").await;
    let mut peer = through.connect().await;
    greeted(&mut peer).await;
    let plugin = "caching_sha2_password";
    let mut payload = response(CLIENT, plugin, &hash(plugin, PASSWORD, SCRAMBLE));
    // A packet of 790 bytes begins with 0x16 and 3, as a ClientHello does.
    payload.resize(790, b'a');
    peer.send(packet(1, payload)).await;
    assert_eq!(next_packet(&mut peer).await, Some((2, vec![1, 4])));
}

#[tokio::test]
async fn a_client_that_leaves_while_the_server_works_or_before_its_greeting_is_not_counted() {
    // Its response was passed on; then the server asks, and nobody is there.
    let server = Server::new();
    let greets = Arc::new(Notify::new());
    let go = greets.clone();
    let stand_in = server.clone();
    let through = ThroughMysql::new("", move |arrival: Arrival| {
        let (go, server) = (go.clone(), stand_in.clone());
        async move {
            go.notified().await;
            server.serve(arrival).await;
        }
    })
    .await;
    greets.notify_one();
    let mut peer = through.connect().await;
    greeted(&mut peer).await;
    peer.send(packet(1, response(CLIENT, "caching_sha2_password", &[7; 32]))).await;
    peer.reset();
    through.origin.until(|seen| seen.ended == 1).await;
    assert_eq!(server.state().interrupted, 0);

    // A probe that connects and resets, to a server that is far away.
    let peer = through.connect().await;
    through.origin.until(|seen| seen.connections == 2).await;
    peer.reset();
    // Longer than it is looked whether a client is still there.
    tokio::time::sleep(std::time::Duration::from_millis(300)).await;
    greets.notify_one();
    through.origin.until(|seen| seen.ended == 2).await;
    assert_eq!(server.state().interrupted, 0);
    let mut peer = through.connect().await;
    greets.notify_one();
    assert_eq!(log_in(&mut peer, PASSWORD).await, Ok(true));
}
