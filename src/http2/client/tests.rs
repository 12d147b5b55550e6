use std::future::poll_fn;

use bytes::Bytes;
use h2::{Reason, server};
use http::{Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{Full, StreamBody};
use tokio::{
    io::{DuplexStream, duplex},
    task::JoinHandle,
    time::{Instant, timeout},
};

use super::*;
use crate::body::BoxError;

type Peer = server::Connection<DuplexStream, Bytes>;

const DEADLINE: Duration = Duration::from_secs(20);

/// A connection that is driven, and its other end.
async fn connect() -> (ClientConnection, Peer, JoinHandle<Result<(), Flood>>) {
    let (near, far) = duplex(64 * 1024);
    let (client, connection, _) = handshake(near, 100).await.unwrap();
    let driven = tokio::spawn(connection);
    (client, server::handshake(far).await.unwrap(), driven)
}

fn post(body: RequestBody) -> (request::Parts, RequestBody) {
    let head = Request::post("https://example.com/").version(http::Version::HTTP_2);
    (head.body(()).unwrap().into_parts().0, body)
}

fn full(body: &'static [u8]) -> RequestBody {
    RequestBody::boxed(Full::new(Bytes::from_static(body)))
}

#[tokio::test]
async fn a_body_that_is_held_back_flows_as_soon_as_the_peer_says_continue() {
    let (mut client, mut peer, _driven) = connect().await;
    let (head, body) = post(full(b"hello"));
    body.hold();
    let begun = Instant::now();
    let mut exchange = client.begin(&head, body).unwrap();
    let origin = async {
        let (mut request, mut respond) = peer.accept().await.unwrap().unwrap();
        let go_on = Response::builder().status(StatusCode::CONTINUE).body(()).unwrap();
        respond.send_informational(go_on).unwrap();
        let driven = async { while peer.accept().await.is_some() {} };
        tokio::select! {
            data = request.body_mut().data() => assert_eq!(data.unwrap().unwrap(), "hello"),
            () = driven => unreachable!("the connection stays open"),
        }
    };
    tokio::select! {
        () = origin => {}
        _ = poll_fn(|cx| exchange.poll_head(cx, None)) => unreachable!("nobody has responded"),
    }
    assert!(begun.elapsed() < Duration::from_secs(1), "or it has merely waited for long enough");
}

#[tokio::test]
async fn an_exchange_that_is_dropped_resets_its_stream_and_no_other() {
    let (mut client, mut peer, driven) = connect().await;
    let (head, body) = post(full(b"hello"));
    let dropped = client.begin(&head, body).unwrap();
    let (head, body) = post(full(b"hello"));
    let mut kept = client.begin(&head, body).unwrap();
    drop(dropped);
    tokio::spawn(async move {
        let mut resets = 0;
        while let Some(Ok((mut request, mut respond))) = peer.accept().await {
            tokio::spawn(async move {
                match request.body_mut().data().await {
                    Some(Err(error)) => assert_eq!(error.reason(), Some(Reason::CANCEL)),
                    _ => drop(respond.send_response(Response::new(()), true)),
                }
            });
            resets += 1;
        }
        resets
    });
    let head = timeout(DEADLINE, poll_fn(|cx| kept.poll_head(cx, None))).await.unwrap().unwrap();
    assert_eq!(head.status(), StatusCode::OK);
    assert!(kept.is_end_stream());
    assert!(client.is_open());
    drop((kept, client));
    timeout(DEADLINE, driven).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn a_body_that_is_not_as_long_as_its_head_says_does_not_end() {
    for (said, what) in [("4", "longer"), ("6", "shorter")] {
        let (mut client, mut peer, _driven) = connect().await;
        let frames = futures_util::stream::iter([Ok::<_, BoxError>(Frame::data("hello".into()))]);
        let (mut head, body) = post(RequestBody::boxed(StreamBody::new(frames)));
        head.headers.insert("content-length", said.parse().unwrap());
        let mut exchange = client.begin(&head, body).unwrap();
        let error = poll_fn(|cx| exchange.poll_head(cx, None)).await.unwrap_err();
        let ExchangeError::RequestBody(error) = error else { panic!("{error}") };
        assert!(error.to_string().contains(what), "{error}");
        let (mut request, _respond) = peer.accept().await.unwrap().unwrap();
        let driven = tokio::spawn(async move { while peer.accept().await.is_some() {} });
        let end = loop {
            match request.body_mut().data().await {
                Some(Ok(_)) => {}
                Some(Err(error)) => break error.reason(),
                None => break None,
            }
        };
        assert_eq!(end, Some(Reason::CANCEL));
        driven.abort();
    }
}

#[tokio::test]
async fn a_connection_that_has_ended_or_is_being_shut_down_takes_no_more() {
    let (mut client, mut peer, _driven) = connect().await;
    assert!(client.is_open());
    peer.graceful_shutdown();
    let closing = tokio::spawn(async move { while peer.accept().await.is_some() {} });
    while client.is_open() {
        tokio::task::yield_now().await;
    }
    let (head, body) = post(RequestBody::empty());
    let Err(error) = client.begin(&head, body) else { panic!("it is closing") };
    assert!(matches!(error, ExchangeError::NotSent(_)), "{error}");
    closing.abort();
}
