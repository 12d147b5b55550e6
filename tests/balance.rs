//! Requests go where they are served best, and none fails because one endpoint does.

use std::{
    fs,
    net::SocketAddr,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use crate::support::{
    client::{self, H2},
    loopback::{self, Blackhole},
    message::Message,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene, TRUE_NAME},
    scripts, trust, within,
};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::{
    process::Command,
    task::JoinSet,
    time::{Instant, sleep},
};
use truename::demo::authority::LeafOptions;

const QUIET: &str = "log: {access: false}\n";

/// `clients` applications at once send `requests` altogether; each must get a 200.
async fn send(address: SocketAddr, clients: usize, requests: usize) {
    send_and_note(address, clients, requests, |_, _| {}).await;
}

/// The same, and `note` gets each response and how long it took.
async fn send_and_note(
    address: SocketAddr,
    clients: usize,
    requests: usize,
    note: impl Fn(&Message, Duration) + Clone + Send + 'static,
) {
    let left = Arc::new(AtomicUsize::new(requests));
    let mut tasks = JoinSet::new();
    for _ in 0..clients {
        let (left, note) = (left.clone(), note.clone());
        tasks.spawn(async move {
            let mut peer = client::connect(address).await;
            let take = |left: usize| left.checked_sub(1);
            while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
                let began = Instant::now();
                peer.send(format!(
                    "POST / HTTP/1.1\r\nHost: {ALIAS}\r\nContent-Length: 1\r\n\r\n1"
                ))
                .await;
                let response = peer.response().await;
                assert_eq!(response.status(), 200, "{}", response.text());
                note(&response, began.elapsed());
            }
        });
    }
    while let Some(task) = tasks.join_next().await {
        task.unwrap();
    }
}

fn shares(origins: &[RawOrigin]) -> Vec<usize> {
    origins.iter().map(|origin| origin.seen().requests.len()).collect()
}

async fn assert_equal_shares(policy: &str, tolerance: usize) {
    let mut scene = Scene::new(4).await;
    // Long enough for the machine's own noise to weigh little beside it.
    let origins = scene.script(|arrival| respond_after(arrival, Duration::from_millis(20)));
    let yaml = scene.yaml(&format!("balance: {policy}"));
    let proxy = Proxy::start(&format!("{yaml}{QUIET}")).await;
    send(proxy.address(ALIAS).await, 64, 4_000).await;
    let shares = shares(&origins);
    for share in &shares {
        assert!(share.abs_diff(1_000) <= tolerance, "{policy}: {shares:?}");
    }
}

async fn respond_after(arrival: Arrival, delay: Duration) {
    respond_with(arrival, "ok", || delay).await;
}

async fn respond_with(arrival: Arrival, body: &str, delay: impl Fn() -> Duration) {
    let Some(mut conversation) = arrival.open().await else { return };
    while conversation.request().await.is_some() {
        sleep(delay()).await;
        if conversation.peer.try_send(scripts::ok(body)).await.is_err() {
            return;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_endpoints_get_equal_shares_by_p2c() {
    assert_equal_shares("p2c", 100).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_endpoints_get_equal_shares_in_turn() {
    assert_equal_shares("round_robin", 100).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_endpoints_get_equal_shares_by_chance() {
    assert_equal_shares("random", 100).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_endpoints_get_equal_shares_by_least_requests() {
    assert_equal_shares("least_request", 100).await;
}

/// How long a response takes from the endpoints that are not slow: on this machine, and with what else it does just
/// now. A busy one takes far longer than the endpoint itself does, and a slow endpoint with a delay of its own would be
/// hardly slower than the others.
struct Pace(Mutex<Duration>);

impl Pace {
    fn note(&self, took: Duration) {
        let mut pace = self.0.lock();
        *pace = *pace * 7 / 8 + took / 8;
    }

    fn of_now(&self) -> Duration {
        *self.0.lock()
    }
}

/// Four endpoints, the first ten times slower: what each gets of 1,000 requests.
async fn shares_beside_a_slow_one(policy: &str) -> Vec<usize> {
    const QUICK: Duration = Duration::from_millis(10);
    let mut scene = Scene::new(4).await;
    let slow = scene.addresses[0];
    let pace = Arc::new(Pace(Mutex::new(QUICK)));
    let tls = trust::server_with_alpn(&[TRUE_NAME], &["http/1.1"]);
    let listeners = scene.take_listeners().into_iter();
    let origins: Vec<_> = listeners
        .map(|listener| {
            let is_slow = listener.local_addr().unwrap().ip() == slow;
            let pace = pace.clone();
            RawOrigin::start(listener, Some(tls.clone()), move |arrival| {
                let pace = pace.clone();
                async move {
                    match is_slow {
                        true => respond_with(arrival, "slow", || pace.of_now() * 10).await,
                        false => respond_with(arrival, "quick", || QUICK).await,
                    }
                }
            })
        })
        .collect();
    let yaml = scene.yaml(&format!("balance: {policy}"));
    let proxy = Proxy::start(&format!("{yaml}{QUIET}")).await;
    send_and_note(proxy.address(ALIAS).await, 16, 1_000, move |response, took| {
        if response.text() == "quick" {
            pace.note(took);
        }
    })
    .await;
    shares(&origins)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn p2c_shifts_away_from_a_slow_endpoint() {
    let shares = shares_beside_a_slow_one("p2c").await;
    assert!(shares[0] < 100, "{shares:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn least_request_shifts_away_from_a_slow_endpoint() {
    let shares = shares_beside_a_slow_one("least_request").await;
    assert!(shares[0] < 150, "{shares:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn round_robin_does_not() {
    let shares = shares_beside_a_slow_one("round_robin").await;
    assert!(shares[0] >= 200, "{shares:?}");
}

/// What `/status` says of an endpoint.
async fn endpoint(proxy: &Proxy, address: SocketAddr) -> Value {
    let status = proxy.status().await;
    let endpoints = status["aliases"][0]["endpoints"].as_array().unwrap().clone();
    let found = endpoints.into_iter().find(|known| known["address"] == address.to_string());
    found.unwrap_or_else(|| panic!("no {address} in {status}"))
}

async fn count(proxy: &Proxy, state: &str) -> f64 {
    let series = format!("truename_endpoints{{alias=\"{ALIAS}\",state=\"{state}\"}}");
    proxy.metric(&series).await.unwrap()
}

async fn until_state(proxy: &Proxy, address: SocketAddr, state: &str) -> Value {
    within(state, async {
        loop {
            let endpoint = endpoint(proxy, address).await;
            if endpoint["state"] == state {
                return endpoint;
            }
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await
}

/// The first of four endpoints is dead in some way: no request fails, and it is put aside.
async fn assert_put_aside(proxy: &Proxy, dead: SocketAddr) {
    let address = proxy.address(ALIAS).await;
    within("ejection", async {
        loop {
            send(address, 4, 20).await;
            if endpoint(proxy, dead).await["state"] == "ejected" {
                return;
            }
        }
    })
    .await;
    assert_eq!(count(proxy, "ejected").await, 1.0);
    assert_eq!(count(proxy, "active").await, 3.0);
    let ejected = endpoint(proxy, dead).await;
    assert!(ejected["ejected_seconds"].as_f64().unwrap() <= 10.0, "{ejected}");
    proxy.logged("endpoint ejected").await;
}

/// The other three of four endpoints respond; the first one's listener is left to the caller.
async fn three_good(scene: &mut Scene) -> (tokio::net::TcpListener, Vec<RawOrigin>) {
    let tls = trust::server_with_alpn(&[TRUE_NAME], &["http/1.1"]);
    let mut listeners = scene.take_listeners();
    let first = listeners.remove(0);
    let start = |listener| RawOrigin::start(listener, Some(tls.clone()), scripts::respond);
    (first, listeners.into_iter().map(start).collect())
}

#[tokio::test]
async fn an_endpoint_that_refuses_is_put_aside_and_no_request_fails() {
    let mut scene = Scene::new(4).await;
    let (first, _origins) = three_good(&mut scene).await;
    let dead = first.local_addr().unwrap();
    drop(first);
    let proxy = Proxy::start(&format!("{}{QUIET}", scene.yaml(""))).await;
    assert_put_aside(&proxy, dead).await;
}

#[tokio::test]
async fn an_endpoint_that_resets_is_put_aside_and_no_request_fails() {
    let mut scene = Scene::new(4).await;
    let (first, _origins) = three_good(&mut scene).await;
    let dead = RawOrigin::start(first, None, scripts::reset_on_accept);
    let proxy = Proxy::start(&format!("{}{QUIET}", scene.yaml(""))).await;
    assert_put_aside(&proxy, dead.address).await;
}

#[tokio::test]
async fn an_endpoint_with_a_wrong_certificate_is_put_aside_and_no_request_fails() {
    let mut scene = Scene::new(4).await;
    let (first, _origins) = three_good(&mut scene).await;
    let wrong = trust::server_with_alpn(&["example.org"], &["http/1.1"]);
    let dead = RawOrigin::start(first, Some(wrong), scripts::respond);
    let proxy = Proxy::start(&format!("{}{QUIET}", scene.yaml(""))).await;
    assert_put_aside(&proxy, dead.address).await;
    assert_eq!(dead.seen().requests.len(), 0, "no request goes to an unverified peer");
}

#[tokio::test]
async fn a_black_hole_is_put_aside_and_no_request_fails_or_waits_for_it() {
    let mut scene = Scene::new(4).await;
    let (first, _origins) = three_good(&mut scene).await;
    let dead = Blackhole::of(first.into_std().unwrap());
    // If a request waited for it, the test would time out.
    let yaml = scene.yaml("timeouts: {connect: 1h}");
    let proxy = Proxy::start(&format!("{yaml}{QUIET}")).await;
    assert_put_aside(&proxy, dead.address).await;
}

#[tokio::test]
async fn a_burst_of_http2_requests_does_not_wait_for_a_black_hole() {
    let mut scene = Scene::new(2).await;
    let mut listeners = scene.take_listeners();
    let good = listeners.remove(0);
    let _dead = Blackhole::of(listeners.remove(0).into_std().unwrap());
    let _origin = truename::demo::origin::Origin::serve(good, trust::server(&[TRUE_NAME])).unwrap();
    let yaml = scene.yaml("timeouts: {connect: 1h}");
    let proxy = Proxy::start(&format!("{yaml}{QUIET}")).await;
    let client = H2::connect(proxy.address(ALIAS).await).await;
    let mut responses = JoinSet::new();
    for _ in 0..40 {
        let mut client = client.clone();
        responses.spawn(async move { client.get(&format!("http://{ALIAS}/get")).await.unwrap() });
    }
    for response in responses.join_all().await {
        assert_eq!(response.head.status, 200);
    }
}

#[tokio::test]
async fn an_endpoint_killed_under_load_fails_no_request_and_comes_back() {
    let mut scene = Scene::new(4).await;
    let (first, _origins) = three_good(&mut scene).await;
    let tls = trust::server_with_alpn(&[TRUE_NAME], &["http/1.1"]);
    let killed = RawOrigin::start(first, Some(tls.clone()), scripts::respond);
    let dead = killed.address;
    let keys = "health: {passive: {failures: 2, eject: 300ms, max_eject: 10s}}";
    let proxy = Proxy::start(&format!("{}{QUIET}", scene.yaml(keys))).await;
    let address = proxy.address(ALIAS).await;
    send(address, 8, 200).await;
    assert!(!killed.seen().requests.is_empty());
    drop(killed);

    // Each time that it is tried again and fails, it stays away for longer.
    let mut longest = 0.0_f64;
    within("doubling", async {
        while longest < 0.6 {
            send(address, 4, 40).await;
            let ejected = endpoint(&proxy, dead).await["ejected_seconds"].as_f64();
            longest = longest.max(ejected.unwrap_or(0.0));
        }
    })
    .await;

    let listener = tokio::net::TcpListener::bind(dead).await.unwrap();
    let back = RawOrigin::start(listener, Some(tls), scripts::respond);
    within("its return", async {
        while back.seen().requests.is_empty() {
            send(address, 4, 20).await;
        }
    })
    .await;
    until_state(&proxy, dead, "active").await;
    assert_eq!(endpoint(&proxy, dead).await["failures"], 0);
}

#[tokio::test]
async fn an_endpoint_whose_process_is_killed_is_put_aside_and_found_again() {
    let mut scene = Scene::new(4).await;
    let (first, _origins) = three_good(&mut scene).await;
    let address = first.local_addr().unwrap();
    drop(first);
    let leaf = trust::authority().issue(&[TRUE_NAME], &[], LeafOptions::default()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("cert.pem"), &leaf.chain_pem).unwrap();
    fs::write(folder.path().join("key.pem"), &leaf.key_pem).unwrap();
    let start = || {
        let mut openssl = Command::new("openssl");
        openssl.args(["s_server", "-www", "-cert", "cert.pem", "-key", "key.pem", "-accept"]);
        openssl.arg(address.to_string()).current_dir(&folder).kill_on_drop(true);
        openssl.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
    };
    // By turns: p2c would leave a process alone that is slower than the others, dead or alive.
    let keys = "balance: round_robin\n\
                health: {passive: {failures: 2, eject: 300ms, max_eject: 300ms}}";
    let proxy = Proxy::start(&format!("{}{QUIET}", scene.yaml(keys))).await;
    let listener = proxy.address(ALIAS).await;
    // Whether the process was the one that responded.
    let ask = async || {
        let response = client::get(listener, ALIAS, "/").await;
        assert_eq!(response.status(), 200, "{}", response.text());
        response.text().contains("s_server")
    };

    let mut process = start();
    within("a response from the process", async { while !ask().await {} }).await;
    process.kill().await.unwrap();
    within("ejection", async {
        while endpoint(&proxy, address).await["state"] != "ejected" {
            assert!(!ask().await, "a response from the dead");
        }
    })
    .await;
    let _process = start();
    within("a response from the new process", async { while !ask().await {} }).await;
    until_state(&proxy, address, "active").await;
}

#[tokio::test]
async fn the_last_endpoint_is_never_put_aside() {
    let mut scene = Scene::new(2).await;
    let addresses: Vec<_> =
        scene.take_listeners().iter().map(|listener| listener.local_addr().unwrap()).collect();
    let proxy = Proxy::start(&format!("{}{QUIET}", scene.yaml(""))).await;
    let address = proxy.address(ALIAS).await;
    for _ in 0..20 {
        assert_eq!(client::get(address, ALIAS, "/").await.status(), 502);
    }
    assert_eq!(count(&proxy, "ejected").await, 1.0);
    assert_eq!(count(&proxy, "active").await, 1.0);

    // So whichever comes back is found, at the latest when the other's time is over.
    let tls = trust::server_with_alpn(&[TRUE_NAME], &["http/1.1"]);
    let mut spared = None;
    for known in &addresses {
        if endpoint(&proxy, *known).await["state"] == "active" {
            spared = Some(*known);
        }
    }
    let listener = tokio::net::TcpListener::bind(spared.unwrap()).await.unwrap();
    let _origin = RawOrigin::start(listener, Some(tls), scripts::respond);
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
}

#[tokio::test]
async fn a_request_whose_endpoint_refuses_goes_to_another_whatever_its_method() {
    let mut scene = Scene::new(4).await;
    let (first, origins) = three_good(&mut scene).await;
    drop(first);
    let keys = "balance: round_robin\nhealth: {passive: {failures: 0}}\nretry: {budget: 100%}";
    let proxy = Proxy::start(&format!("{}{QUIET}", scene.yaml(keys))).await;
    send(proxy.address(ALIAS).await, 1, 40).await;
    assert_eq!(shares(&origins).iter().sum::<usize>(), 40);
    let retries = format!("truename_retries_total{{alias=\"{ALIAS}\",reason=\"connect\"}}");
    // Retries take their turns too.
    assert!(proxy.metric(&retries).await >= Some(10.0));
}

async fn tries_of_one_request(keys: &str) -> (usize, u16) {
    let mut scene = Scene::new(4).await;
    let origins = scene.script(scripts::close_on_accept);
    let proxy = Proxy::start(&scene.yaml(keys)).await;
    let response = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    (origins.iter().map(|origin| origin.seen().connections).sum(), response.status())
}

#[tokio::test]
async fn a_request_is_tried_as_often_as_attempts_and_budget_allow() {
    assert_eq!(tries_of_one_request("").await, (3, 502));
    assert_eq!(tries_of_one_request("retry: {attempts: 3}").await, (4, 502));
    assert_eq!(tries_of_one_request("retry: {attempts: 0}").await, (1, 502));
    assert_eq!(tries_of_one_request("retry: {budget: 0%}").await, (1, 502));
    assert_eq!(tries_of_one_request("retry: {when: []}").await, (1, 502));
}

#[tokio::test]
async fn a_budget_keeps_retries_to_its_share_when_everything_fails() {
    // Of the requests of ten seconds, and of three a second besides.
    for (share, budget) in [(0.1, "10%"), (0.6, "60%")] {
        const REQUESTS: usize = 400;
        let mut scene = Scene::new(2).await;
        let origins = scene.script(scripts::close_on_accept);
        let keys = format!(
            "health: {{passive: {{failures: 0}}}}\nretry: {{attempts: 5, budget: {budget}}}"
        );
        let proxy = Proxy::start(&format!("{}{QUIET}", scene.yaml(&keys))).await;
        let address = proxy.address(ALIAS).await;
        let began = Instant::now();
        for _ in 0..REQUESTS {
            assert_eq!(client::get(address, ALIAS, "/").await.status(), 502);
        }
        let seconds = began.elapsed().as_secs() as usize + 1;
        let tries: usize = origins.iter().map(|origin| origin.seen().connections).sum();
        let retries = tries - REQUESTS;
        let shared = (share * REQUESTS as f64) as usize;
        assert!(
            (shared..=shared + 3 * (seconds + 1)).contains(&retries),
            "{budget}: {retries} retries of {REQUESTS} requests within {seconds} s"
        );
    }
}

/// A 503 first, then 200: what a client gets, and how often the origin was asked.
async fn after_a_503(keys: &str, method: &str, body: &str) -> (u16, usize) {
    let mut scene = Scene::new(1).await;
    let origin = scene.script(|arrival: Arrival| async {
        let busy = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 4\r\n\r\nbusy";
        match arrival.nth {
            0 => scripts::always(arrival, busy).await,
            _ => scripts::respond(arrival).await,
        }
    });
    let proxy = Proxy::start(&scene.yaml(keys)).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    let length = body.len();
    peer.send(format!(
        "{method} / HTTP/1.1\r\nHost: {ALIAS}\r\nContent-Length: {length}\r\n\r\n{body}"
    ))
    .await;
    let status = peer.response().await.status();
    (status, origin[0].seen().requests.len())
}

#[tokio::test]
async fn a_503_is_passed_on_unless_the_configuration_and_the_method_allow_another_try() {
    assert_eq!(after_a_503("retry: {when: [503]}", "GET", "").await, (200, 2));
    assert_eq!(after_a_503("", "GET", "").await, (503, 1));
    assert_eq!(after_a_503("retry: {when: [503]}", "POST", "").await, (503, 1));
    // Its body has gone: it is not kept for that.
    assert_eq!(after_a_503("retry: {when: [503]}", "PUT", "1").await, (503, 1));
}

#[tokio::test]
async fn a_reset_of_a_new_connection_is_tried_again_only_where_that_is_safe_and_wanted() {
    async fn requests(keys: &str, method: &str) -> usize {
        let mut scene = Scene::new(1).await;
        let origins = scene.script(scripts::reset_after_request);
        let proxy = Proxy::start(&scene.yaml(keys)).await;
        let mut peer = client::connect(proxy.address(ALIAS).await).await;
        peer.send(format!("{method} / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
        assert_eq!(peer.response().await.status(), 502);
        origins[0].seen().requests.len()
    }
    assert_eq!(requests("", "GET").await, 1);
    assert_eq!(requests("retry: {when: [reset]}", "POST").await, 1);
    assert_eq!(requests("retry: {when: [reset]}", "GET").await, 3);
}

#[tokio::test]
async fn both_address_families_of_a_name_are_used() {
    use truename::demo::dns;
    let mut scene = Scene::new(1).await;
    let addresses = [loopback::address(), std::net::Ipv6Addr::LOCALHOST.into()];
    let listeners = loopback::listen(&addresses);
    scene.port = listeners[0].local_addr().unwrap().port();
    scene.dns.zone(addresses.map(|address| dns::address(TRUE_NAME, 60, address)));
    let tls = trust::server_with_alpn(&[TRUE_NAME], &["http/1.1"]);
    let start = |listener| RawOrigin::start(listener, Some(tls.clone()), scripts::respond);
    let origins: Vec<_> = listeners.into_iter().map(start).collect();
    let yaml = scene
        .yaml("balance: round_robin")
        .replace("\"127.0.0.0/8\"", "\"127.0.0.0/8\", \"::1/128\"");
    let proxy = Proxy::start(&yaml).await;
    let address = proxy.address(ALIAS).await;
    within("both", async {
        while shares(&origins).contains(&0) {
            send(address, 1, 2).await;
        }
    })
    .await;
}
