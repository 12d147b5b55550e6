//! HTTP/2 origins that send much: what no longer matters to anybody, or for nothing.

use std::{
    future::poll_fn,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use http::Response;
use tokio::task::JoinSet;

use crate::{
    http2_upstream::{
        DATA, END_HEADERS, END_STREAM, Frames, HEADERS, OK, PING, RST_STREAM, SETTINGS, get,
        responding, through,
    },
    support::client,
};

const PRIORITY: u8 = 2;

/// What a download's origin had sent when its client left is no error of the origin's.
#[tokio::test]
async fn a_connection_outlives_any_number_of_downloads_that_are_given_up() {
    const DOWNLOADS: usize = 1500;
    let served = Arc::new(AtomicUsize::new(0));
    let count = served.clone();
    let through = responding("", move |_request, mut respond| {
        let served = count.clone();
        async move {
            served.fetch_add(1, Ordering::SeqCst);
            let Ok(mut body) = respond.send_response(Response::new(()), false) else { return };
            loop {
                body.reserve_capacity(1024);
                let Some(Ok(room)) = poll_fn(|cx| body.poll_capacity(cx)).await else { return };
                if body.send_data(vec![b'x'; room.min(1024)].into(), false).is_err() {
                    return;
                }
            }
        }
    })
    .await;
    let address = through.address;
    let mut tasks = JoinSet::new();
    for _ in 0..10 {
        tasks.spawn(async move {
            for _ in 0..DOWNLOADS / 10 {
                let mut peer = client::connect(address).await;
                peer.send(get("/")).await;
                peer.head().await.unwrap();
                assert!(!peer.some().await.is_empty());
            }
        });
    }
    tasks.join_all().await;
    assert_eq!(served.load(Ordering::SeqCst), DOWNLOADS);
    assert_eq!(through.origin.seen().connections, 1);
}

#[tokio::test]
async fn what_was_under_way_of_downloads_that_were_given_up_does_not_end_their_connection() {
    const DOWNLOADS: usize = 1500;
    let through = through("", |arrival| async move {
        let mut frames = Frames::open(arrival).await;
        let mut streams = Vec::new();
        while streams.len() < DOWNLOADS {
            let (stream, _) = frames.wait_for(HEADERS).await;
            frames.send(HEADERS, END_HEADERS, stream, OK).await;
            frames.send(DATA, 0, stream, b"some").await;
            frames.wait_for(RST_STREAM).await;
            streams.push(stream);
        }
        for stream in streams {
            for _ in 0..3 {
                frames.send(DATA, 0, stream, b"x").await;
            }
        }
        let (stream, _) = frames.wait_for(HEADERS).await;
        frames.send(HEADERS, END_HEADERS | END_STREAM, stream, OK).await;
        frames.0.hold().await;
    })
    .await;
    for _ in 0..DOWNLOADS {
        let mut peer = through.connect().await;
        peer.send(get("/")).await;
        peer.head().await.unwrap();
        assert!(!peer.some().await.is_empty());
    }
    let response = through.exchange(&get("/")).await;
    assert_eq!(response.status(), 200, "{}", response.text());
    assert_eq!(through.origin.seen().connections, 1);
}

#[tokio::test]
async fn an_origin_that_floods_its_connection_with_frames_gets_no_more_requests_on_it() {
    for (kind, payload) in [(PING, &[0; 8][..]), (SETTINGS, &[]), (PRIORITY, &[0, 0, 0, 0, 1])] {
        let through = through("retry: {attempts: 1, when: [reset]}", move |arrival| async move {
            let nth = arrival.nth;
            let mut frames = Frames::open(arrival).await;
            let (stream, _) = frames.wait_for(HEADERS).await;
            if nth > 0 {
                frames.send(HEADERS, END_HEADERS | END_STREAM, stream, OK).await;
                return frames.0.hold().await;
            }
            let stream = if kind == PRIORITY { stream } else { 0 };
            let mut flood = (payload.len() as u32).to_be_bytes()[1..].to_vec();
            flood.extend([kind, 0]);
            flood.extend(stream.to_be_bytes());
            flood.extend(payload);
            let _ = frames.0.try_send(flood.repeat(3000)).await;
            frames.0.hold().await;
        })
        .await;
        assert_eq!(through.exchange(&get("/")).await.status(), 200, "{kind}");
        assert_eq!(through.origin.seen().connections, 2, "{kind}");
    }
}

/// What flushes a response that has nothing to say yet sends such a frame, with some servers.
#[tokio::test]
async fn a_connection_outlives_any_number_of_empty_frames_in_its_responses() {
    let through = responding("", |_request, mut respond| async move {
        let mut body = respond.send_response(Response::new(()), false).unwrap();
        for _ in 0..10 {
            body.send_data("".into(), false).unwrap();
        }
        body.send_data("whole".into(), true).unwrap();
    })
    .await;
    for _ in 0..30 {
        assert_eq!(through.exchange(&get("/")).await.text(), "whole");
    }
    assert_eq!(through.origin.seen().connections, 1);
}
