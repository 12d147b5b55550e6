//! Connections are kept, shared, bounded and let go as the configuration and the origin say.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::support::{
    client::{self, H2},
    message::Message,
    peer::Peer,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts,
    service_origin::{ServiceOrigin, whole},
    trust, within,
};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper::{server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::{
    sync::{Barrier, watch},
    task::JoinSet,
};

const GET: &str = "GET / HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n";
const IDLE: &str = "truename_upstream_connections_idle{alias=\"webscaler-manual\"}";

async fn ask(peer: &mut Peer, request: &str) -> Message {
    peer.send(request).await;
    peer.response().await
}

/// A proxy with one worker before an origin that does as the script says.
async fn start<Script, Run>(keys: &str, script: Script) -> (RawOrigin, Proxy, SocketAddr, Scene)
where
    Script: Fn(Arrival) -> Run + Clone + Send + Sync + 'static,
    Run: Future<Output = ()> + Send + 'static,
{
    let mut scene = Scene::new(1).await;
    let origin = scene.script(script).remove(0);
    let proxy = Proxy::start(&format!("{}workers: 1\n", scene.yaml(keys))).await;
    let address = proxy.address(ALIAS).await;
    (origin, proxy, address, scene)
}

/// Whether the second of two requests, after a response like this, needs a connection of its own.
async fn takes_a_new_connection_after(response: &'static str) -> bool {
    let (origin, _proxy, address, _scene) =
        start("", move |arrival| scripts::always(arrival, response)).await;
    let mut peer = client::connect(address).await;
    for _ in 0..2 {
        assert_eq!(ask(&mut peer, GET).await.text(), "ok");
    }
    let seen = origin.seen();
    assert_eq!(seen.requests.len(), 2);
    seen.connections == 2
}

#[tokio::test]
async fn a_connection_is_kept_for_the_next_request_whoever_sends_it() {
    let (origin, proxy, address, _scene) = start("", scripts::respond).await;
    for _ in 0..5 {
        let mut peer = client::connect(address).await;
        assert_eq!(ask(&mut peer, GET).await.status(), 200);
        assert_eq!(ask(&mut peer, GET).await.status(), 200);
    }
    let seen = origin.seen();
    assert_eq!((seen.connections, seen.requests.len()), (1, 10));
    assert_eq!(proxy.metric(IDLE).await, Some(1.0));
}

#[tokio::test]
async fn a_connection_is_not_used_again_after_a_response_that_forbids_it() {
    assert!(
        !takes_a_new_connection_after("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await,
        "the control"
    );
    let closes = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok";
    assert!(takes_a_new_connection_after(closes).await, "Connection: close");
    let old = "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok";
    assert!(takes_a_new_connection_after(old).await, "HTTP/1.0");
    let ambiguous = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n\
                     2\r\nok\r\n0\r\n\r\n";
    assert!(takes_a_new_connection_after(ambiguous).await, "both lengths");
}

#[tokio::test]
async fn a_connection_is_not_used_again_while_a_request_body_is_left_on_it() {
    // Responds as soon as it has seen a head, and reads no body.
    let early = |arrival: Arrival| async {
        let Some(mut conversation) = arrival.open().await else { return };
        if conversation.peer.head().await.is_some() {
            let response = "HTTP/1.1 413 Content Too Large\r\nContent-Length: 2\r\n\r\nno";
            conversation.peer.send(response).await;
            conversation.peer.hold().await;
        }
    };
    let (origin, _proxy, address, _scene) = start("", early).await;
    let mut unfinished = client::connect(address).await;
    let head = "POST / HTTP/1.1\r\nHost: webscaler-manual\r\nContent-Length: 9\r\n\r\n";
    assert_eq!(ask(&mut unfinished, head).await.status(), 413);
    let mut peer = client::connect(address).await;
    assert_eq!(ask(&mut peer, head).await.status(), 413);
    assert_eq!(origin.seen().connections, 2);
}

#[tokio::test]
async fn a_connection_is_not_used_again_when_the_client_left_within_the_response() {
    let half = |arrival: Arrival| async {
        if arrival.nth > 0 {
            return scripts::respond(arrival).await;
        }
        let Some(mut conversation) = arrival.open().await else { return };
        conversation.request().await;
        conversation.peer.send("HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf").await;
        conversation.peer.hold().await;
    };
    let (origin, _proxy, address, _scene) = start("", half).await;
    let mut leaver = client::connect(address).await;
    leaver.send(GET).await;
    assert!(leaver.head().await.is_some());
    drop(leaver);
    origin.until(|seen| seen.ended == 1).await;
    assert_eq!(ask(&mut client::connect(address).await, GET).await.text(), "ok");
    assert_eq!(origin.seen().connections, 2);
}

#[tokio::test]
async fn connections_to_the_old_true_name_are_closed_and_not_used_again() {
    let mut scene = Scene::new(2).await;
    let listeners = scene.take_listeners();
    let tls = trust::server_with_alpn(&[TRUE_NAME, "example.org"], &["http/1.1"]);
    let origins: Vec<_> = listeners
        .into_iter()
        .map(|listener| RawOrigin::start(listener, Some(tls.clone()), scripts::respond))
        .collect();
    use truename::demo::dns;
    let first = [dns::address(TRUE_NAME, 1, scene.addresses[0])];
    scene.dns.zone([dns::cname(ALIAS_IN_DNS, 1, TRUE_NAME)]);
    scene.dns.zone(first);
    scene.dns.zone([dns::address("example.org", 1, scene.addresses[1])]);
    let yaml = scene.yaml("").replace("dns: {", "dns: {min_ttl: 100ms, ");
    let proxy = Proxy::start(&yaml).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    assert_eq!(ask(&mut peer, GET).await.status(), 200);
    assert_eq!(origins[0].seen().connections, 1);

    scene.dns.zone([dns::cname(ALIAS_IN_DNS, 1, "example.org")]);
    origins[0].until(|seen| seen.ended == 1).await;
    assert_eq!(ask(&mut peer, GET).await.status(), 200);
    assert_eq!(origins[0].seen().requests.len(), 1);
    assert_eq!(origins[1].seen().server_names, [Some("example.org".to_owned())]);
}

#[tokio::test]
async fn a_connection_idle_for_longer_than_idle_timeout_is_closed() {
    let (origin, proxy, address, _scene) =
        start("pool: {idle_timeout: 100ms}", scripts::respond).await;
    assert_eq!(ask(&mut client::connect(address).await, GET).await.status(), 200);
    origin.until(|seen| seen.ended == 1).await;
    assert_eq!(proxy.metric(IDLE).await, Some(0.0));
}

#[tokio::test]
async fn a_connection_older_than_max_lifetime_is_closed() {
    let (origin, _proxy, address, _scene) =
        start("pool: {max_lifetime: 100ms}", scripts::respond).await;
    assert_eq!(ask(&mut client::connect(address).await, GET).await.status(), 200);
    origin.until(|seen| seen.ended == 1).await;
}

#[tokio::test]
async fn a_connection_is_closed_before_the_origin_would_close_it() {
    let response =
        "HTTP/1.1 200 OK\r\nKeep-Alive: timeout=2, max=100\r\nContent-Length: 2\r\n\r\nok";
    let (origin, _proxy, address, _scene) =
        start("", move |arrival| scripts::always(arrival, response)).await;
    let mut peer = client::connect(address).await;
    for _ in 0..2 {
        assert_eq!(ask(&mut peer, GET).await.text(), "ok");
    }
    assert_eq!(origin.seen().connections, 1, "it is kept for a while");
    origin.until(|seen| seen.ended == 1).await;
}

#[tokio::test]
async fn a_connection_that_the_origin_closed_is_no_longer_counted_as_idle() {
    let (origin, proxy, address, _scene) =
        start("", |arrival| scripts::respond_times(arrival, 1)).await;
    assert_eq!(ask(&mut client::connect(address).await, GET).await.status(), 200);
    origin.until(|seen| seen.ended == 1).await;
    within("the reaper", async {
        while proxy.metric(IDLE).await != Some(0.0) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

/// Responds when as many requests are there as the gate wants: each has a connection of its own.
async fn respond_together(arrival: Arrival, gate: Arc<Barrier>) {
    let Some(mut conversation) = arrival.open().await else { return };
    while conversation.request().await.is_some() {
        gate.wait().await;
        if conversation.peer.try_send(scripts::ok("ok")).await.is_err() {
            return;
        }
    }
}

/// At the highest load that a proxy can carry, there must not be a handshake for each request.
#[tokio::test]
async fn connections_of_a_burst_over_max_idle_serve_the_next_one_at_once() {
    let gate = Arc::new(Barrier::new(20));
    let script = move |arrival| respond_together(arrival, gate.clone());
    let (origin, _proxy, address, _scene) = start("pool: {max_idle: 2}", script).await;
    for _ in 0..3 {
        let mut clients = JoinSet::new();
        for _ in 0..20 {
            clients.spawn(async move {
                let mut peer = client::connect(address).await;
                ask(&mut peer, GET).await.status()
            });
        }
        assert_eq!(clients.join_all().await, [200; 20]);
    }
    // Each burst but the first would need 18 new ones, were all but two closed in between.
    let connections = origin.seen().connections;
    assert!(connections < 20 + 2 * 18, "{connections} connections for three bursts of 20");
}

#[tokio::test]
async fn no_more_than_max_idle_are_kept() {
    let gate = Arc::new(Barrier::new(5));
    let script = move |arrival| respond_together(arrival, gate.clone());
    let (origin, proxy, address, _scene) = start("pool: {max_idle: 2}", script).await;
    let mut clients = JoinSet::new();
    for _ in 0..5 {
        clients.spawn(async move {
            let mut peer = client::connect(address).await;
            ask(&mut peer, GET).await.status()
        });
    }
    origin.until(|seen| seen.requests.len() == 5).await;
    assert_eq!(clients.join_all().await, [200; 5]);
    origin.until(|seen| seen.ended == 3).await;
    assert_eq!(proxy.metric(IDLE).await, Some(2.0));
}

/// How many of something there are, and were at most.
#[derive(Default)]
struct Gauge {
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Gauge {
    fn enter(self: &Arc<Self>) -> Inside {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        Inside(self.clone())
    }
}

struct Inside(Arc<Gauge>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.now.fetch_sub(1, Ordering::SeqCst);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_past_max_connections_wait_for_one_on_whichever_worker() {
    let serving = Arc::new(Gauge::default());
    let script = {
        let serving = serving.clone();
        move |arrival: Arrival| {
            let serving = serving.clone();
            async move {
                let Some(mut conversation) = arrival.open().await else { return };
                while conversation.request().await.is_some() {
                    let inside = serving.enter();
                    tokio::time::sleep(Duration::from_millis(1)).await;
                    drop(inside);
                    if conversation.peer.try_send(scripts::ok("ok")).await.is_err() {
                        return;
                    }
                }
            }
        }
    };
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(script);
    let yaml = scene.yaml("pool: {max_connections: 3}");
    let proxy = Proxy::start(&format!("{yaml}workers: 4\nlog: {{access: false}}\n")).await;
    let address = proxy.address(ALIAS).await;
    let mut clients = JoinSet::new();
    for _ in 0..32 {
        clients.spawn(async move {
            let mut peer = client::connect(address).await;
            for _ in 0..10 {
                let response = ask(&mut peer, GET).await;
                assert_eq!(response.status(), 200, "{}", response.text());
            }
        });
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
    assert_eq!(serving.most.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn an_idle_http2_connection_makes_way_for_a_request_that_cannot_use_it() {
    let mut scene = Scene::new(1).await;
    let origins = scene.serve();
    let yaml = scene.yaml("pool: {max_connections: 1}");
    let proxy = Proxy::start(&format!("{yaml}workers: 2\n")).await;
    let address = proxy.address(ALIAS).await;
    let mut http2 = H2::connect(address).await;
    assert_eq!(http2.get("http://webscaler-manual/get").await.unwrap().head.status, 200);
    let get = "GET /get HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n";
    let response = ask(&mut client::connect(address).await, get).await;
    assert_eq!(response.status(), 200, "{}", response.text());
    assert_eq!(origins[0].counts().connections, 2);
}

/// So many requests at once to an origin that allows so many streams, and responds to none before all
/// are there: how many connections that takes.
async fn http2_burst(streams: u32, requests: usize) -> usize {
    let arrived = Arc::new(watch::Sender::new(0));
    let mut scene = Scene::new(1).await;
    let tls = trust::server_with_alpn(&[TRUE_NAME], &["h2"]);
    let listener = scene.take_listeners().remove(0);
    let origin = RawOrigin::start(listener, Some(tls), move |arrival: Arrival| {
        let arrived = arrived.clone();
        async move {
            let Some(conversation) = arrival.open().await else { return };
            let service = service_fn(move |_| {
                let arrived = arrived.clone();
                async move {
                    arrived.send_modify(|count| *count += 1);
                    arrived.subscribe().wait_for(|count| *count >= requests).await.ok();
                    Ok::<_, std::convert::Infallible>(Response::new(Full::new(Bytes::from("ok"))))
                }
            });
            let io = TokioIo::new(conversation.peer.into_wire());
            let mut http2 = http2::Builder::new(TokioExecutor::new());
            http2.max_concurrent_streams(streams).serve_connection(io, service).await.ok();
        }
    });
    let proxy = Proxy::start(&format!("{}workers: 1\n", scene.yaml(""))).await;
    let client = H2::connect(proxy.address(ALIAS).await).await;
    let mut responses = JoinSet::new();
    for _ in 0..requests {
        let mut client = client.clone();
        responses.spawn(async move { client.get("http://webscaler-manual/").await.unwrap() });
    }
    for response in responses.join_all().await {
        assert_eq!(response.head.status, 200);
    }
    origin.seen().connections
}

#[tokio::test]
async fn a_burst_of_http2_requests_dials_once_and_shares() {
    assert_eq!(http2_burst(100, 50).await, 1);
}

#[tokio::test]
async fn more_http2_connections_are_made_when_streams_run_out() {
    assert_eq!(http2_burst(10, 50).await, 5);
}

#[tokio::test]
async fn an_origin_without_http2_gets_http1_and_dials_are_not_one_after_the_other() {
    // No connection is up before many are dialled: one after the other would take for ever.
    const BURST: usize = 8;
    let (dialled, dialling) = watch::channel(0);
    let dialled = Arc::new(dialled);
    let mut scene = Scene::new(1).await;
    let tls = trust::server_with_alpn(&[TRUE_NAME], &["http/1.1"]);
    let listener = scene.take_listeners().remove(0);
    let origin = RawOrigin::start(listener, Some(tls), move |arrival: Arrival| {
        let (dialled, mut dialling) = (dialled.clone(), dialling.clone());
        async move {
            // The first is what teaches the proxy.
            if arrival.nth > 0 {
                dialled.send_modify(|count| *count += 1);
                dialling.wait_for(|count| *count >= BURST - 1).await.ok();
            }
            scripts::respond(arrival).await;
        }
    });
    let proxy = Proxy::start(&format!("{}workers: 1\n", scene.yaml(""))).await;
    let client = H2::connect(proxy.address(ALIAS).await).await;
    let mut responses = JoinSet::new();
    for _ in 0..BURST {
        let mut client = client.clone();
        responses.spawn(async move { client.get("http://webscaler-manual/").await.unwrap() });
    }
    for response in responses.join_all().await {
        assert_eq!((response.head.status.as_u16(), &*response.body), (200, b"ok".as_slice()));
    }
    assert_eq!(origin.seen().requests.len(), BURST);
}

#[tokio::test]
async fn a_stream_that_was_refused_is_sent_again_whatever_its_method() {
    // The first stream of the origin is refused; a POST that comes again gets its response.
    let mut scene = Scene::new(1).await;
    let tls = trust::server_with_alpn(&[TRUE_NAME], &["h2"]);
    let listener = scene.take_listeners().remove(0);
    let origin = RawOrigin::start(listener, Some(tls), |arrival: Arrival| async move {
        let refuses = arrival.nth == 0;
        let Some(conversation) = arrival.open().await else { return };
        let wire = conversation.peer.into_wire();
        let Ok(mut connection) = h2::server::handshake(wire).await else { return };
        while let Some(Ok((request, mut respond))) = connection.accept().await {
            if refuses {
                respond.send_reset(h2::Reason::REFUSED_STREAM);
                continue;
            }
            assert_eq!(request.method(), "POST");
            let response = Response::new(());
            respond.send_response(response, false).unwrap().send_data("ok".into(), true).unwrap();
        }
    });
    let proxy = Proxy::start(&format!("{}workers: 1\n", scene.yaml(""))).await;
    let mut client = H2::connect(proxy.address(ALIAS).await).await;
    let post =
        || Request::post("http://webscaler-manual/").body(Full::new(Bytes::from("body"))).unwrap();
    let response = client.send(post()).await.unwrap();
    assert_eq!(response.head.status, 200, "{:?}", response.body);
    assert_eq!(origin.seen().connections, 2);
}

#[tokio::test]
async fn a_stream_that_a_dying_http2_origin_had_taken_is_not_sent_again() {
    let mut scene = Scene::new(1).await;
    let tls = trust::server_with_alpn(&[TRUE_NAME], &["h2"]);
    let listener = scene.take_listeners().remove(0);
    let taken = Arc::new(AtomicUsize::new(0));
    let origin = RawOrigin::start(listener, Some(tls), {
        let taken = taken.clone();
        move |arrival: Arrival| {
            let taken = taken.clone();
            async move {
                let Some(conversation) = arrival.open().await else { return };
                let wire = conversation.peer.into_wire();
                let Ok(mut connection) = h2::server::handshake(wire).await else { return };
                while let Some(Ok((request, mut respond))) = connection.accept().await {
                    if request.uri().path() == "/die" {
                        taken.fetch_add(1, Ordering::SeqCst);
                        // GOAWAY counts this stream among those that were taken.
                        connection.graceful_shutdown();
                        let dying = std::future::poll_fn(|cx| connection.poll_closed(cx));
                        tokio::time::timeout(Duration::from_millis(50), dying).await.ok();
                        return;
                    }
                    let response = Response::new(());
                    respond.send_response(response, true).unwrap();
                }
            }
        }
    });
    let proxy = Proxy::start(&format!("{}workers: 1\n", scene.yaml(""))).await;
    let mut client = H2::connect(proxy.address(ALIAS).await).await;
    let post = |path: &str| {
        let uri = format!("http://webscaler-manual{path}");
        Request::post(uri).body(Full::new(Bytes::from("body"))).unwrap()
    };
    assert_eq!(client.send(post("/")).await.unwrap().head.status, 200);
    assert_eq!(client.send(post("/die")).await.unwrap().head.status, 502);
    assert_eq!(taken.load(Ordering::SeqCst), 1);
    assert_eq!(client.send(post("/")).await.unwrap().head.status, 200);
    assert_eq!(origin.seen().connections, 2);
}

#[tokio::test]
async fn http2_goes_out_in_the_clear_where_the_application_speaks_it() {
    let mut scene = Scene::new(1).await;
    let listener = scene.take_listeners().remove(0);
    let origin = RawOrigin::start(listener, None, |arrival: Arrival| async {
        let Some(conversation) = arrival.open().await else { return };
        let service = service_fn(|request: Request<hyper::body::Incoming>| async move {
            let body = request.into_body().collect().await.unwrap().to_bytes();
            Ok::<_, std::convert::Infallible>(Response::new(Full::new(body)))
        });
        let io = TokioIo::new(conversation.peer.into_wire());
        let http2 = http2::Builder::new(TokioExecutor::new());
        http2.serve_connection(io, service).await.ok();
    });
    let proxy = Proxy::start(&scene.yaml("tls: {mode: plaintext}")).await;
    let mut client = H2::connect(proxy.address(ALIAS).await).await;
    let echo = Request::post("http://webscaler-manual/").body(Full::new(Bytes::from("echo")));
    let response = client.send(echo.unwrap()).await.unwrap();
    assert_eq!(&*response.body, b"echo");
    assert_eq!(origin.seen().connections, 1);
}

#[tokio::test]
async fn http1_applications_share_http2_where_the_configuration_says_so() {
    let mut scene = Scene::new(1).await;
    let tls = trust::server(&[TRUE_NAME]);
    let listener = scene.take_listeners().remove(0);
    let origin = ServiceOrigin::start(listener, tls, async |request: Request<_>| {
        Response::new(whole(format!("{:?}", request.version())))
    });
    let proxy = Proxy::start(&scene.yaml("http: {version: \"2\"}")).await;
    let response = ask(&mut client::connect(proxy.address(ALIAS).await).await, GET).await;
    assert_eq!(response.text(), "HTTP/2.0");
    drop(origin);
}
