//! Clients of HTTP/2 that send what costs them little and its reader much.

use std::sync::Arc;

use tokio::sync::watch;

use crate::{
    clients::{Frames, hasty},
    support::{client::H2, raw_origin::Arrival, scene::ALIAS, scripts, through::Through, within},
};

const PRIORITY: u8 = 2;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const UNKNOWN: u8 = 0xfe;
const ENHANCE_YOUR_CALM: u32 = 11;

#[tokio::test]
async fn a_client_that_floods_its_connection_with_frames_is_cut_off() {
    let through = Through::new("", scripts::respond).await;
    for (kind, payload) in [
        (PING, &[0; 8][..]),
        (Frames::SETTINGS, &[]),
        (PRIORITY, &[0, 0, 0, 0, 1]),
        (WINDOW_UPDATE, &[0, 0, 0, 1]),
        (UNKNOWN, &[]),
    ] {
        let mut frames = Frames::connect(through.address).await;
        let stream = if kind == PRIORITY { 5 } else { 0 };
        let flood = Frames::frame(kind, 0, stream, payload).repeat(3000);
        if frames.0.try_send(flood).await.is_ok() {
            is_cut_off(&mut frames, kind).await;
        }
        let mut other = H2::connect(through.address).await;
        assert_eq!(other.get(&format!("http://{ALIAS}/")).await.unwrap().head.status, 200);
    }
}

/// Some clients send one whenever an upload is flushed.
#[tokio::test]
async fn a_client_may_send_many_empty_frames_in_its_uploads() {
    let through = Through::new("", scripts::respond).await;
    let mut frames = Frames::connect(through.address).await;
    let fields = Frames::fields(&[
        (":method", "POST"),
        (":scheme", "http"),
        (":path", "/"),
        (":authority", ALIAS),
    ]);
    let mut upload = Frames::frame(Frames::HEADERS, Frames::END_HEADERS, 1, &fields);
    for _ in 0..30 {
        upload.extend(Frames::frame(Frames::DATA, 0, 1, &[]).repeat(10));
        upload.extend(Frames::frame(Frames::DATA, 0, 1, b"."));
    }
    upload.extend(Frames::frame(Frames::DATA, Frames::END_STREAM, 1, b"whole"));
    frames.0.send(upload).await;
    while let Some((kind, _, payload)) = frames.next().await {
        assert_ne!(kind, Frames::GOAWAY, "{payload:?}");
        if kind == Frames::HEADERS {
            let whole = ".".repeat(30) + "whole";
            assert_eq!(through.origin.seen().requests[0].text(), whole);
            return;
        }
    }
    panic!("no response");
}

#[tokio::test]
async fn a_client_that_gives_up_many_requests_at_once_keeps_its_connection() {
    let through = Through::new("", scripts::respond).await;
    let mut frames = Frames::connect(through.address).await;
    let fields = Frames::fields(&[
        (":method", "GET"),
        (":scheme", "http"),
        (":path", "/"),
        (":authority", ALIAS),
    ]);
    let ends = Frames::END_HEADERS | Frames::END_STREAM;
    let mut burst: Vec<u8> = Vec::new();
    for stream in (0..99).map(|number| 2 * number + 1) {
        burst.extend(Frames::frame(Frames::HEADERS, ends, stream, &fields));
        burst.extend(Frames::frame(Frames::RST_STREAM, 0, stream, &8_u32.to_be_bytes()));
    }
    burst.extend(Frames::frame(Frames::HEADERS, ends, 199, &fields));
    frames.0.send(burst).await;
    while let Some((kind, stream, payload)) = frames.next().await {
        assert_ne!(kind, Frames::GOAWAY, "{payload:?}");
        if kind == Frames::HEADERS && stream == 199 {
            return;
        }
    }
    panic!("the connection has ended");
}

/// What was on its way of an upload when that was refused is no fault of the client's.
#[tokio::test]
async fn a_client_may_have_any_number_of_its_uploads_refused() {
    let through = Through::new("", scripts::respond).await;
    let mut frames = Frames::connect(through.address).await;
    let nobody =
        [(":method", "POST"), (":scheme", "http"), (":path", "/"), (":authority", "nobody")];
    let (batch, fields) = (90, Frames::fields(&nobody));
    for first in (0..30).map(|number| 2 * batch * number + 1) {
        let streams = (0..batch).map(|number| first + 2 * number);
        let frame =
            |kind, flags, payload| move |stream| Frames::frame(kind, flags, stream, payload);
        let heads: Vec<_> = streams
            .clone()
            .flat_map(frame(Frames::HEADERS, Frames::END_HEADERS, &fields[..]))
            .collect();
        frames.0.send(heads).await;
        let mut left = batch;
        while left > 0 {
            let (kind, _, payload) = frames.next().await.expect("a connection that goes on");
            assert_ne!(kind, Frames::GOAWAY, "{payload:?}");
            left -= u32::from(kind == Frames::RST_STREAM);
        }
        let data: Vec<_> = streams.flat_map(frame(Frames::DATA, 0, &[0])).collect();
        frames.0.send(data.repeat(4)).await;
        // Room for the next refusals.
        frames.send(WINDOW_UPDATE, 0, 0, &60_000_u32.to_be_bytes()).await;
        frames.send(PING, 0, 0, &first.to_be_bytes().repeat(2)).await;
        assert!(replied(&mut frames, first).await, "cut off after {first}");
    }
}

/// An origin that goes on telling what is ahead of its response, to a client that does not read.
#[tokio::test]
async fn interim_responses_that_a_client_does_not_read_take_no_memory() {
    let (told, mut telling) = watch::channel(false);
    let told = Arc::new(told);
    let through = Through::new("", move |arrival: Arrival| {
        let told = told.clone();
        async move {
            let mut conversation = arrival.open().await.unwrap();
            conversation.peer.head().await.unwrap();
            let hint = format!("HTTP/1.1 103 Early Hints\r\nLink: <{}>\r\n\r\n", "x".repeat(4000));
            for _ in 0..200 {
                conversation.peer.send(hint.repeat(50)).await;
            }
            told.send_replace(true);
            std::future::pending().await
        }
    })
    .await;
    let mut frames = Frames::connect(through.address).await;
    let before = through.proxy.peak_memory();
    let fields = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", ALIAS)];
    frames.get(1, &fields).await;
    within("all that is ahead", telling.wait_for(|told| *told)).await.unwrap();
    let grown = through.proxy.peak_memory() - before;
    assert!(grown < 16 * 1024 * 1024, "{grown} bytes");
}

/// One after the other, so that none of them waits to be accepted.
#[tokio::test]
async fn a_client_that_resets_most_of_its_streams_at_once_is_cut_off() {
    let through = Through::new("", scripts::never_respond).await;
    let mut frames = Frames::connect(through.address).await;
    let fields = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", ALIAS)];
    let (fields, ends) = (Frames::fields(&fields), Frames::END_HEADERS | Frames::END_STREAM);
    for stream in (0..1500).map(|number| 2 * number + 1) {
        let get = Frames::frame(Frames::HEADERS, ends, stream, &fields);
        let reset = Frames::frame(Frames::RST_STREAM, 0, stream, &8_u32.to_be_bytes());
        // What follows the reply has been read after the request was.
        let ping = Frames::frame(PING, 0, 0, &stream.to_be_bytes().repeat(2));
        let asked = [get, ping].concat();
        if frames.0.try_send(asked).await.is_err() || !replied(&mut frames, stream).await {
            assert!(stream > 1000, "cut off after {stream}");
            return;
        }
        if frames.0.try_send(reset).await.is_err() {
            return;
        }
    }
    panic!("1500 resets were taken in silence");
}

#[tokio::test]
async fn a_frame_that_never_ends_is_given_up() {
    let (_origin, _proxy, address, _scene) = hasty("1s").await;
    let block = Frames::fields(&[(":method", "GET"), (":scheme", "http"), (":path", "/")]);
    for part in [
        Frames::frame(Frames::HEADERS, Frames::END_STREAM, 1, &block),
        Frames::frame(PING, 0, 0, &[0; 8])[..12].to_vec(),
        Frames::frame(PING, 0, 0, &[0; 8])[..3].to_vec(),
    ] {
        let mut frames = Frames::connect(address).await;
        frames.0.send(&part).await;
        is_cut_off(&mut frames, part[0]).await;
    }
}

/// It is told why, unless what it was still sending came in the way.
async fn is_cut_off(frames: &mut Frames, what: u8) {
    while let Some((kind, _, payload)) = frames.next().await {
        if kind == Frames::GOAWAY {
            assert_eq!(payload[4..8], ENHANCE_YOUR_CALM.to_be_bytes(), "{what}");
        }
    }
}

/// Whether the reply to this PING comes before the connection ends.
async fn replied(frames: &mut Frames, number: u32) -> bool {
    loop {
        let Some(head) = within("a frame", frames.0.try_exactly(9)).await else { return false };
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
        let payload = within("a payload", frames.0.try_exactly(length)).await;
        let Some(payload) = payload else { return false };
        match head[3] {
            PING if payload[..4] == number.to_be_bytes() => return true,
            Frames::GOAWAY => {
                assert_eq!(payload[4..8], ENHANCE_YOUR_CALM.to_be_bytes());
                return false;
            }
            _ => {}
        }
    }
}
