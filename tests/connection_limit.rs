//! `pool.max_connections` over HTTP/2, whose connections are shared.

use std::{convert::Infallible, future::pending, sync::Arc, time::Duration};

use bytes::Bytes;
use http::Response;
use http_body_util::Full;
use hyper::{server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{sync::watch, task::JoinSet, time::Instant};

use crate::support::{
    client::H2,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene, TRUE_NAME},
    trust, within,
};

#[tokio::test]
async fn http2_requests_past_max_connections_all_wait_as_long_as_timeouts_connect_and_no_longer() {
    const CONNECT: Duration = Duration::from_secs(2);
    let (busy, mut taken) = watch::channel(false);
    let mut scene = Scene::new(1).await;
    let tls = trust::server_with_alpn(&[TRUE_NAME], &["h2"]);
    let listener = scene.take_listeners().remove(0);
    let busy = Arc::new(busy);
    let _origin = RawOrigin::start(listener, Some(tls), move |arrival: Arrival| {
        let busy = busy.clone();
        async move {
            let Some(conversation) = arrival.open().await else { return };
            let service = service_fn(move |_| {
                busy.send_replace(true);
                pending::<Result<Response<Full<Bytes>>, Infallible>>()
            });
            let io = TokioIo::new(conversation.peer.into_wire());
            let mut http2 = http2::Builder::new(TokioExecutor::new());
            http2.max_concurrent_streams(1).serve_connection(io, service).await.ok();
        }
    });
    let yaml = scene.yaml("pool: {max_connections: 1}\ntimeouts: {connect: 2s}");
    let proxy = Proxy::start(&format!("{yaml}workers: 1\n")).await;
    let client = H2::connect(proxy.address(ALIAS).await).await;
    let mut first = client.clone();
    let first = tokio::spawn(async move { first.get("http://webscaler-manual/").await });
    within("the stream to be taken", taken.wait_for(|taken| *taken)).await.unwrap();

    let mut waiting = JoinSet::new();
    for _ in 0..6 {
        let mut client = client.clone();
        waiting.spawn(async move {
            let since = Instant::now();
            let response = client.get("http://webscaler-manual/").await.unwrap();
            (response, since.elapsed())
        });
    }
    for (response, waited) in waiting.join_all().await {
        assert_eq!(response.head.status, 503);
        let status = response.head.headers["proxy-status"].to_str().unwrap();
        assert!(status.contains("connection_limit_reached"), "{status}");
        assert!(waited < CONNECT * 2, "a request waited {waited:?}");
    }
    first.abort();
}

/// A stream that ends makes room for who waits for a connection, though that stays open and busy.
#[tokio::test]
async fn a_stream_that_ends_makes_room_where_no_further_connection_may_be_made() {
    let (release, _) = watch::channel(0_usize);
    let release = Arc::new(release);
    let (arrived, mut arriving) = watch::channel(0_usize);
    let arrived = Arc::new(arrived);
    let mut scene = Scene::new(1).await;
    let tls = trust::server_with_alpn(&[TRUE_NAME], &["h2"]);
    let listener = scene.take_listeners().remove(0);
    let script = {
        let release = release.clone();
        move |arrival: Arrival| {
            let (release, arrived) = (release.clone(), arrived.clone());
            async move {
                let Some(conversation) = arrival.open().await else { return };
                let service = service_fn(move |_| {
                    let mut nth = 0;
                    arrived.send_modify(|count| {
                        *count += 1;
                        nth = *count;
                    });
                    let release = release.clone();
                    async move {
                        release.subscribe().wait_for(|released| *released >= nth).await.ok();
                        let body = Full::new(Bytes::from("ok"));
                        Ok::<_, Infallible>(Response::new(body))
                    }
                });
                let io = TokioIo::new(conversation.peer.into_wire());
                let mut http2 = http2::Builder::new(TokioExecutor::new());
                http2.max_concurrent_streams(2).serve_connection(io, service).await.ok();
            }
        }
    };
    let origin = RawOrigin::start(listener, Some(tls), script);
    let yaml = scene.yaml("pool: {max_connections: 1}");
    let proxy = Proxy::start(&format!("{yaml}workers: 1\n")).await;
    let client = H2::connect(proxy.address(ALIAS).await).await;
    let mut responses = JoinSet::new();
    for _ in 0..3 {
        let mut client = client.clone();
        responses.spawn(async move { client.get("http://webscaler-manual/").await.unwrap() });
    }
    within("two streams", arriving.wait_for(|count| *count == 2)).await.unwrap();
    // The other stream goes on, so that the connection is never idle.
    release.send_replace(1);
    let response = within("the third request", async {
        arriving.wait_for(|count| *count == 3).await.unwrap();
        release.send_replace(3);
        responses.join_next().await
    });
    assert_eq!(response.await.unwrap().unwrap().head.status, 200);
    for response in responses.join_all().await {
        assert_eq!(response.head.status, 200);
    }
    assert_eq!(origin.seen().connections, 1);
}
