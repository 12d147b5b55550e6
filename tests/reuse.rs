//! The origin closes a kept connection at the moment at which it is used again.
//!
//! Two things must hold at once: the application never sees an error for a request that no origin
//! took, and no request that is not idempotent ever arrives twice.

use std::{
    collections::{HashMap, HashSet},
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::{
    http2_upstream,
    support::{
        client,
        message::Message,
        peer::Peer,
        proxy::Proxy,
        raw_origin::{Arrival, RawOrigin},
        scene::{ALIAS, Scene},
        scripts,
    },
};
use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    task::JoinSet,
    time::{Instant, sleep, timeout_at},
};

const OK: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";

fn post(id: &str, body: &str) -> String {
    format!("POST /{id} HTTP/1.1\r\nHost: {ALIAS}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

fn get(id: &str) -> String {
    format!("GET /{id} HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")
}

async fn ask(peer: &mut Peer, request: &str) -> Message {
    peer.send(request).await;
    peer.response().await
}

/// How an origin ends a connection that it has kept long enough.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ending {
    /// TLS close_notify, then FIN.
    CloseNotify,
    /// FIN alone, as after a crash.
    Fin,
    /// RST, by `SO_LINGER` 0.
    Reset,
}

/// What the origins took: which requests, how often each, and which of those whose kernel had
/// taken bytes of when the origin closed without having read them.
#[derive(Default)]
struct Ledger {
    taken: Mutex<HashMap<String, usize>>,
    /// Connections closed on a request that was in the kernel already.
    closed_on: AtomicUsize,
    closed: AtomicUsize,
}

impl Ledger {
    /// How often a close meets a request depends on how busy the machine is. After this many, enough has been
    /// seen: connections are kept.
    fn has_been_rude(&self) -> bool {
        self.closed_on.load(Ordering::Relaxed) >= 30
    }

    fn take(&self, request: &Message) {
        let id = request.start_line().split(' ').nth(1).unwrap()[1..].to_owned();
        *self.taken.lock().entry(id).or_default() += 1;
    }
}

/// Responds, keeps the connection for a time of the order of what its client waits, and ends it
/// whatever has come meanwhile.
async fn close_at_reuse(arrival: Arrival, ending: Ending, ledger: Arc<Ledger>) {
    let Some(mut conversation) = arrival.open().await else { return };
    let Some(first) = conversation.request().await else { return };
    ledger.take(&first);
    if conversation.peer.try_send(OK).await.is_err() {
        return;
    }
    loop {
        let until = Instant::now() + Duration::from_micros(fastrand::u64(0..1_000));
        match timeout_at(until, conversation.request()).await {
            Ok(Some(request)) => {
                ledger.take(&request);
                if conversation.peer.try_send(OK).await.is_err() {
                    return;
                }
            }
            Ok(None) => return,
            Err(_) if ledger.has_been_rude() => {}
            Err(_) => break,
        }
    }
    ledger.closed.fetch_add(1, Ordering::Relaxed);
    let mut arrived = conversation.peer.has_arrived();
    match ending {
        Ending::CloseNotify => {
            conversation.peer.finish().await;
            // What came before the FIN, and perhaps some that came behind it.
            arrived = conversation.peer.has_arrived();
        }
        Ending::Fin => {}
        Ending::Reset => conversation.peer.reset(),
    }
    if arrived {
        ledger.closed_on.fetch_add(1, Ordering::Relaxed);
    }
}

struct Storm {
    ledger: Arc<Ledger>,
    /// Requests whose response was not the origin's 200.
    failed: HashSet<String>,
    proxy: Proxy,
}

/// 16 clients, each of which asks, waits about as long as origins do before they close, and asks
/// again.
async fn storm(method: &str, ending: Ending, requests: usize) -> Storm {
    const CLIENTS: usize = 16;
    let ledger = Arc::new(Ledger::default());
    let mut scene = Scene::new(4).await;
    let script = {
        let ledger = ledger.clone();
        move |arrival| close_at_reuse(arrival, ending, ledger.clone())
    };
    let _origins = scene.script(script);
    let proxy = Proxy::start(&format!("{}log: {{access: false}}\n", scene.yaml(""))).await;
    let address = proxy.address(ALIAS).await;
    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let method = method.to_owned();
        clients.spawn(async move {
            let mut peer = client::connect(address).await;
            let mut failed = Vec::new();
            for n in 0..requests / CLIENTS {
                let id = format!("{client}-{n}");
                let request = match method.as_str() {
                    "POST" => post(&id, &id),
                    _ => get(&id),
                };
                let response = ask(&mut peer, &request).await;
                if (response.status(), response.text()) != (200, "ok") {
                    failed.push((id, response.text().to_owned()));
                }
                sleep(Duration::from_micros(fastrand::u64(0..1_000))).await;
            }
            failed
        });
    }
    let failed: Vec<_> = clients.join_all().await.into_iter().flatten().collect();
    if let Some((id, response)) = failed.first() {
        eprintln!("{} failed, such as {id}: {response}", failed.len());
    }
    let failed = failed.into_iter().map(|(id, _)| id).collect();
    Storm { ledger, failed, proxy }
}

async fn assert_no_post_arrives_twice_and_few_fail(ending: Ending, requests: usize) {
    let storm = storm("POST", ending, requests).await;
    let taken = storm.ledger.taken.lock().clone();
    let twice: Vec<_> = taken.iter().filter(|(_, times)| **times > 1).collect();
    assert!(twice.is_empty(), "arrived more than once: {twice:?}");
    let closed = storm.ledger.closed.load(Ordering::Relaxed);
    assert!(closed > requests / 20, "the origins closed {closed} times: that is no test");
    // A request that was in the origin's kernel when its connection was closed may have been read, for
    // all that a proxy can know: those few are told to the client. The origin looks a moment before it
    // closes: a few arrive in between.
    let may_fail = storm.ledger.closed_on.load(Ordering::Relaxed) + requests / 400;
    assert!(storm.failed.len() <= may_fail, "{} failed, {may_fail} may", storm.failed.len());
    assert!(may_fail < requests / 50, "{may_fail} of {requests}: the origins are too rude");
    let retries = storm.proxy.metric(&retries("reuse")).await;
    assert!(retries.unwrap_or(0.0) > 0.0, "no request ever met a closed connection");
}

fn retries(reason: &str) -> String {
    format!("truename_retries_total{{alias=\"{ALIAS}\",reason=\"{reason}\"}}")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_post_arrives_twice_and_few_fail_when_origins_say_close_notify_at_reuse() {
    assert_no_post_arrives_twice_and_few_fail(Ending::CloseNotify, 3_400).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_post_arrives_twice_and_few_fail_when_origins_close_at_reuse() {
    assert_no_post_arrives_twice_and_few_fail(Ending::Fin, 3_400).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_post_arrives_twice_and_few_fail_when_origins_reset_at_reuse() {
    assert_no_post_arrives_twice_and_few_fail(Ending::Reset, 3_400).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_get_fails_whatever_origins_do_at_reuse() {
    let storm = storm("GET", Ending::Reset, 2_000).await;
    assert!(storm.failed.is_empty(), "{} failed", storm.failed.len());
}

/// Responds to the first request of a connection; `second` says what becomes of the next. Connections
/// after the first respond to everything.
async fn at_the_second<Run>(arrival: Arrival, second: impl FnOnce(Peer) -> Run)
where
    Run: Future<Output = ()>,
{
    if arrival.nth > 0 {
        return scripts::respond(arrival).await;
    }
    let Some(mut conversation) = arrival.open().await else { return };
    conversation.request().await.unwrap();
    conversation.peer.send(OK).await;
    conversation.request().await.unwrap();
    second(conversation.peer).await;
}

async fn one_origin<Script, Run>(
    keys: &str,
    script: Script,
) -> (RawOrigin, Proxy, SocketAddr, Scene)
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

fn lines(origin: &RawOrigin) -> Vec<String> {
    origin.seen().requests.iter().map(|request| request.start_line().to_owned()).collect()
}

#[tokio::test]
async fn a_post_that_was_read_is_not_sent_again_when_the_origin_resets() {
    let script = |arrival| at_the_second(arrival, async |peer: Peer| peer.reset());
    let (origin, _proxy, address, _scene) =
        one_origin("retry: {when: [connect, reset]}", script).await;
    let mut peer = client::connect(address).await;
    assert_eq!(ask(&mut peer, &post("1", "x")).await.status(), 200);
    let response = ask(&mut peer, &post("2", "x")).await;
    assert_eq!(lines(&origin), ["POST /1 HTTP/1.1", "POST /2 HTTP/1.1"]);
    assert_eq!(response.status(), 502, "{}", response.text());
    let problem = response.json();
    assert!(problem["fix"].as_str().unwrap().contains("`pool.idle_timeout`"), "{problem}");
}

#[tokio::test]
async fn a_post_that_was_read_is_not_sent_again_when_the_origin_closes() {
    let script = |arrival| at_the_second(arrival, async |mut peer: Peer| peer.finish().await);
    let (origin, _proxy, address, _scene) =
        one_origin("retry: {when: [connect, reset]}", script).await;
    let mut peer = client::connect(address).await;
    assert_eq!(ask(&mut peer, &post("1", "x")).await.status(), 200);
    let response = ask(&mut peer, &post("2", "x")).await;
    assert_eq!(lines(&origin), ["POST /1 HTTP/1.1", "POST /2 HTTP/1.1"]);
    assert_eq!(response.status(), 502, "{}", response.text());
}

#[tokio::test]
async fn a_post_that_was_read_is_not_sent_again_when_the_origin_says_close_notify_and_resets() {
    let script = |arrival| {
        at_the_second(arrival, async |mut peer: Peer| {
            peer.finish().await;
            peer.reset();
        })
    };
    let (origin, _proxy, address, _scene) = one_origin("", script).await;
    let mut peer = client::connect(address).await;
    assert_eq!(ask(&mut peer, &post("1", "x")).await.status(), 200);
    let response = ask(&mut peer, &post("2", "x")).await;
    assert_eq!(lines(&origin), ["POST /1 HTTP/1.1", "POST /2 HTTP/1.1"]);
    assert_eq!(response.status(), 502, "{}", response.text());
}

/// As servers do that give notice of an idle time-out, such as HAProxy and Apache, and those that
/// mean the request.
async fn late(mut peer: Peer) {
    peer.send(LATE).await;
    peer.finish().await;
}

const LATE: &str =
    "HTTP/1.1 408 Request Timeout\r\nContent-Length: 4\r\nConnection: close\r\n\r\nlate";

#[tokio::test]
async fn a_post_with_the_response_408_on_a_kept_connection_is_not_sent_again() {
    let script = |arrival| at_the_second(arrival, late);
    let (origin, _proxy, address, _scene) = one_origin("", script).await;
    let mut peer = client::connect(address).await;
    assert_eq!(ask(&mut peer, &post("1", "x")).await.status(), 200);
    let response = ask(&mut peer, &post("2", "x")).await;
    assert_eq!(lines(&origin), ["POST /1 HTTP/1.1", "POST /2 HTTP/1.1"]);
    assert_eq!((response.status(), response.text()), (408, "late"));
}

#[tokio::test]
async fn a_get_with_the_response_408_on_a_kept_connection_is_sent_once_more() {
    let script = |arrival| at_the_second(arrival, late);
    let (origin, _proxy, address, _scene) = one_origin("", script).await;
    let mut peer = client::connect(address).await;
    assert_eq!(ask(&mut peer, &get("1")).await.status(), 200);
    assert_eq!(ask(&mut peer, &get("2")).await.status(), 200);
    assert_eq!(lines(&origin), ["GET /1 HTTP/1.1", "GET /2 HTTP/1.1", "GET /2 HTTP/1.1"]);
}

fn put_chunked(id: &str, body: &str) -> String {
    format!("PUT /{id} HTTP/1.1\r\nHost: {ALIAS}\r\nTransfer-Encoding: chunked\r\n\r\n{body}")
}

#[tokio::test]
async fn an_empty_chunked_body_is_sent_again_with_its_end() {
    let script = |arrival| at_the_second(arrival, async |peer: Peer| peer.reset());
    let (origin, _proxy, address, _scene) = one_origin("", script).await;
    let mut peer = client::connect(address).await;
    assert_eq!(ask(&mut peer, &put_chunked("1", "0\r\n\r\n")).await.status(), 200);
    assert_eq!(ask(&mut peer, &put_chunked("2", "0\r\n\r\n")).await.status(), 200);
    assert_eq!(lines(&origin), ["PUT /1 HTTP/1.1", "PUT /2 HTTP/1.1", "PUT /2 HTTP/1.1"]);
}

#[tokio::test]
async fn an_empty_chunked_body_is_sent_again_with_its_end_where_a_503_is_a_reason_to() {
    const BUSY: &[u8] = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n";
    let script = |arrival: Arrival| async {
        match arrival.nth {
            0 => scripts::always(arrival, BUSY).await,
            _ => scripts::respond(arrival).await,
        }
    };
    let (origin, _proxy, address, _scene) = one_origin("retry: {when: [503]}", script).await;
    let mut peer = client::connect(address).await;
    assert_eq!(ask(&mut peer, &put_chunked("1", "0\r\n\r\n")).await.status(), 200);
    assert_eq!(lines(&origin), ["PUT /1 HTTP/1.1", "PUT /1 HTTP/1.1"]);
}

#[tokio::test]
async fn a_body_whose_trailers_have_gone_is_not_sent_again_without_them() {
    let script = |arrival| at_the_second(arrival, async |peer: Peer| peer.reset());
    let (origin, _proxy, address, _scene) = one_origin("", script).await;
    let mut peer = client::connect(address).await;
    let body = "0\r\nX-Sum: 0\r\n\r\n";
    assert_eq!(ask(&mut peer, &put_chunked("1", body)).await.status(), 200);
    let response = ask(&mut peer, &put_chunked("2", body)).await;
    assert_eq!(lines(&origin), ["PUT /1 HTTP/1.1", "PUT /2 HTTP/1.1"]);
    assert_eq!(response.status(), 502, "{}", response.text());
}

#[tokio::test]
async fn a_get_on_a_kept_connection_that_ends_is_sent_once_more() {
    let script = |arrival| at_the_second(arrival, async |peer: Peer| peer.reset());
    let (origin, _proxy, address, _scene) = one_origin("", script).await;
    let mut peer = client::connect(address).await;
    assert_eq!(ask(&mut peer, &get("1")).await.status(), 200);
    assert_eq!(ask(&mut peer, &get("2")).await.status(), 200);
    assert_eq!(lines(&origin), ["GET /1 HTTP/1.1", "GET /2 HTTP/1.1", "GET /2 HTTP/1.1"]);
}

#[tokio::test]
async fn nothing_is_sent_again_after_a_byte_of_the_response() {
    let script = |arrival| {
        at_the_second(arrival, async |mut peer: Peer| {
            peer.send("HTTP/1.1 200 OK\r\nContent-Le").await;
            peer.finish().await;
        })
    };
    let (origin, _proxy, address, _scene) =
        one_origin("retry: {when: [connect, reset]}", script).await;
    let mut peer = client::connect(address).await;
    assert_eq!(ask(&mut peer, &get("1")).await.status(), 200);
    assert_eq!(ask(&mut peer, &get("2")).await.status(), 502);
    assert_eq!(lines(&origin), ["GET /1 HTTP/1.1", "GET /2 HTTP/1.1"]);
}

#[tokio::test]
async fn half_a_head_on_a_new_connection_is_not_asked_for_again() {
    let (origin, _proxy, address, _scene) =
        one_origin("retry: {when: [connect, reset]}", scripts::half_a_head).await;
    let mut peer = client::connect(address).await;
    assert_eq!(ask(&mut peer, &get("1")).await.status(), 502);
    assert_eq!(lines(&origin), ["GET /1 HTTP/1.1"]);
}

/// Closes each connection after its first response, without saying so in the response.
async fn respond_once(arrival: Arrival) {
    scripts::respond_times(arrival, 1).await;
}

#[tokio::test]
async fn a_body_of_any_size_goes_out_again_whole_where_the_kept_connection_was_closed() {
    let (origin, _proxy, address, _scene) = one_origin("", respond_once).await;
    let mut peer = client::connect(address).await;
    for (n, size) in [1, 60_000, 70_000, 3_000_000].into_iter().enumerate() {
        let body = "b".repeat(size);
        let response = ask(&mut peer, &post(&n.to_string(), &body)).await;
        assert_eq!(response.status(), 200, "{size}: {}", response.text());
        let seen = origin.until(|seen| seen.requests.len() == n + 1).await;
        assert_eq!(seen.requests[n].body.len(), size);
        origin.until(|seen| seen.ended == n + 1).await;
    }
}

#[tokio::test]
async fn a_response_that_nobody_asked_for_reaches_no_client() {
    let twice = [OK, b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nsecret"].concat();
    let script = move |arrival: Arrival| {
        let twice = twice.clone();
        async move {
            match arrival.nth {
                0 => scripts::always(arrival, twice).await,
                _ => scripts::respond(arrival).await,
            }
        }
    };
    let (origin, _proxy, address, _scene) = one_origin("", script).await;
    let mut peer = client::connect(address).await;
    for _ in 0..2 {
        assert_eq!(ask(&mut peer, &post("1", "x")).await.text(), "ok");
    }
    assert_eq!(origin.seen().connections, 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_response_sent_at_the_moment_of_reuse_is_not_taken_for_the_next_ones() {
    async fn time_out(arrival: Arrival) {
        let Some(mut conversation) = arrival.open().await else { return };
        if conversation.request().await.is_none() || conversation.peer.try_send(OK).await.is_err() {
            return;
        }
        loop {
            let until = Instant::now() + Duration::from_micros(fastrand::u64(200..1_000));
            match timeout_at(until, conversation.request()).await {
                Ok(Some(_)) => {
                    if conversation.peer.try_send(OK).await.is_err() {
                        return;
                    }
                }
                Ok(None) => return,
                Err(_) if conversation.peer.has_arrived() => {}
                Err(_) => break,
            }
        }
        conversation.peer.try_send(LATE).await.ok();
        conversation.peer.finish().await;
    }
    let mut scene = Scene::new(2).await;
    let _origins = scene.script(time_out);
    let proxy = Proxy::start(&format!("{}log: {{access: false}}\n", scene.yaml(""))).await;
    let address = proxy.address(ALIAS).await;
    let mut clients = JoinSet::new();
    for _ in 0..8 {
        clients.spawn(async move {
            let mut peer = client::connect(address).await;
            for n in 0..200 {
                let response = ask(&mut peer, &get(&n.to_string())).await;
                assert_eq!((response.status(), response.text()), (200, "ok"));
                sleep(Duration::from_micros(fastrand::u64(200..1_000))).await;
            }
        });
    }
    while let Some(client) = clients.join_next().await {
        client.unwrap();
    }
}

/// Each request would open a connection, and the others serve on.
#[tokio::test]
async fn a_stream_that_its_origin_resets_is_not_a_connection_that_broke() {
    for (retry, times) in [("", 1), ("retry: {attempts: 1, budget: 100%, when: [reset]}", 2)] {
        let bad = Arc::new(AtomicUsize::new(0));
        let counted = bad.clone();
        let through = http2_upstream::responding(retry, move |request, mut respond| {
            let bad = counted.clone();
            async move {
                if request.uri().path() == "/bad" {
                    bad.fetch_add(1, Ordering::SeqCst);
                    return respond.send_reset(h2::Reason::INTERNAL_ERROR);
                }
                respond.send_response(http::Response::new(()), true).unwrap();
            }
        })
        .await;
        assert_eq!(through.exchange(&get("good")).await.status(), 200);
        for n in 1..=5 {
            let response = through.exchange(&get("bad")).await;
            assert_eq!(response.status(), 502, "{}", response.text());
            assert_eq!(response.json().get("fix"), None);
            assert_eq!(bad.load(Ordering::SeqCst), n * times);
        }
        assert_eq!(through.origin.seen().connections, 1);
    }
}

#[tokio::test]
async fn a_request_over_http_2_is_not_sent_again_after_a_1xx() {
    let gate = Arc::new(Notify::new());
    let through = http2_upstream::through("", {
        let gate = gate.clone();
        move |arrival| {
            let gate = gate.clone();
            async move {
                let wire = arrival.open().await.unwrap().peer.into_wire();
                let mut origin = h2::server::handshake(wire).await.unwrap();
                let mut held = Vec::new();
                loop {
                    // This also sends the 1xx.
                    let (request, mut respond) = tokio::select! {
                        next = origin.accept() => match next {
                            Some(Ok(next)) => next,
                            _ => return,
                        },
                        () = gate.notified() => return,
                    };
                    if request.uri().path() == "/good" {
                        respond.send_response(http::Response::new(()), true).unwrap();
                        continue;
                    }
                    let early = http::Response::builder().status(103).body(()).unwrap();
                    respond.send_informational(early).unwrap();
                    held.push((request, respond));
                }
            }
        }
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(get("good")).await;
    assert_eq!(peer.response().await.status(), 200);
    peer.send(get("early")).await;
    assert_eq!(peer.response().await.status(), 103);
    gate.notify_one();
    let response = peer.response().await;
    assert_eq!(response.status(), 502, "{}", response.text());
    assert_eq!(through.origin.seen().connections, 1);
}
