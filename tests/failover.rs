//! Which of an alias' targets gets a request: the first, for as long as it can be had.

use std::{net::SocketAddr, sync::Arc};

use crate::support::{
    client::{self, H2},
    loopback,
    message::Message,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene},
    scripts, trust, within,
};
use tokio::{net::TcpListener, sync::watch, task::JoinSet};
use truename::demo::dns::{self, DnsResponse};

const FIRST: &str = "first.example";
const SECOND: &str = "second.example";

/// Regression: whichever target's DNS responded first got the traffic.
#[tokio::test]
async fn the_first_target_is_waited_for_though_dns_knows_the_second_already() {
    let world = World::new(1).await;
    let (first, second) = (world.first(scripts::respond), world.second());
    world.scene.dns.respond(FIRST, DnsResponse::Silence);
    let proxy = Proxy::start(&world.yaml("timeouts: {connect: 15s}")).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    peer.send(format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    resolved(&proxy, 1).await;
    world.scene.dns.restore(FIRST);
    assert_eq!(peer.response().await.status(), 200);
    assert_eq!([first.seen().requests.len(), second.seen().requests.len()], [1, 0]);
}

#[tokio::test]
async fn a_first_target_that_dns_is_silent_about_is_waited_for_as_long_as_a_connection() {
    let world = World::new(1).await;
    let (_first, _second) = (world.first(scripts::respond), world.second());
    world.scene.dns.respond(FIRST, DnsResponse::Silence);
    let proxy = Proxy::start(&world.yaml("timeouts: {connect: 500ms}")).await;
    assert_eq!(get(&proxy).await.text(), "second");
}

/// Regression: the request had 503 where DNS was slower about the second.
#[tokio::test]
async fn a_request_reaches_the_second_target_where_the_name_of_the_first_is_unknown() {
    let world = World::new(1).await;
    let (_first, _second) = (world.first(scripts::respond), world.second());
    world.scene.dns.respond(FIRST, DnsResponse::NxDomain);
    world.scene.dns.respond(SECOND, DnsResponse::Silence);
    let proxy = Proxy::start(&world.yaml("timeouts: {connect: 15s}")).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    peer.send(format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    proxy.logged("does not exist (NXDOMAIN)").await;
    world.scene.dns.restore(SECOND);
    assert_eq!(peer.response().await.text(), "second");
}

/// Regression: it had 502, as did all others until the first was ejected.
#[tokio::test]
async fn a_request_reaches_the_second_target_where_the_first_refuses_whatever_its_method() {
    for request in [
        format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n"),
        format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\nContent-Length: 4\r\n\r\nbody"),
    ] {
        let world = World::new(1).await;
        let _second = world.second();
        let proxy = Proxy::start(&world.yaml("")).await;
        let mut peer = client::connect(proxy.address(ALIAS).await).await;
        peer.send(request).await;
        assert_eq!(peer.response().await.text(), "second");
    }
}

#[tokio::test]
async fn the_last_attempt_of_a_request_is_for_the_second_target_however_many_endpoints_are_left() {
    let world = World::new(4).await;
    let _second = world.second();
    let proxy = Proxy::start(&world.yaml("retry: {attempts: 1}")).await;
    assert_eq!(get(&proxy).await.text(), "second");
}

#[tokio::test]
async fn new_requests_follow_after_one_that_failed_and_go_on_doing_so_over_a_reload() {
    let world = World::new(1).await;
    let (first, _second) = (world.first(scripts::close_on_accept), world.second());
    let keys = "health: {passive: {eject: 1h, max_eject: 1h}}";
    let proxy = Proxy::start(&world.yaml(keys)).await;
    for _ in 0..3 {
        assert_eq!(get(&proxy).await.text(), "second");
    }
    assert_eq!(first.seen().connections, 1);

    proxy.rewrite(&world.yaml(&format!("{keys}\nhosts: [new.example]")));
    proxy.reload().await;
    let response = client::get(proxy.address(ALIAS).await, "new.example", "/").await;
    assert_eq!(response.text(), "second");
    assert_eq!(first.seen().connections, 1);
}

/// Without a retry the request is lost, and the next ones need not be.
#[tokio::test]
async fn a_request_that_may_not_be_retried_moves_those_after_it() {
    let world = World::new(1).await;
    let _second = world.second();
    let keys = "retry: {attempts: 0}\nhealth: {passive: {eject: 1h, max_eject: 1h}}";
    let proxy = Proxy::start(&world.yaml(keys)).await;
    assert_eq!(get(&proxy).await.status(), 502);
    assert_eq!(get(&proxy).await.text(), "second");
}

/// Regression: all attempts were for the first.
#[tokio::test]
async fn the_last_attempt_is_for_the_second_target_also_where_the_first_has_responded_or_reset() {
    const UNAVAILABLE: &str = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n";
    for endpoints in [1, 2] {
        let world = World::new(endpoints).await;
        let _first: Vec<_> = (0..endpoints)
            .map(|n| world.nth(n, |arrival| scripts::always(arrival, UNAVAILABLE)))
            .collect();
        let _second = world.second();
        let proxy = Proxy::start(&world.yaml("retry: {attempts: 1, when: [\"503\"]}")).await;
        for _ in 0..3 {
            assert_eq!(get(&proxy).await.text(), "second");
        }
    }
    let world = World::new(2).await;
    let _first: Vec<_> = (0..2).map(|n| world.nth(n, scripts::reset_after_request)).collect();
    let _second = world.second();
    let proxy = Proxy::start(&world.yaml("retry: {attempts: 1, when: [reset]}")).await;
    assert_eq!(get(&proxy).await.text(), "second");
}

/// Regression: an endpoint that a request of the former configuration was the first to dial had that one's limit.
#[tokio::test]
async fn a_new_limit_holds_for_endpoints_that_requests_from_before_it_come_to() {
    let world = World::new(1).await;
    let first = world.first(scripts::never_shake_hands);
    let tls = trust::server_with_alpn(&[SECOND], &["http/1.1"]);
    let second = RawOrigin::start(listener(world.second), Some(tls), scripts::never_respond);
    let yaml = |most: usize| {
        let passive = "health: {passive: {eject: 1h, max_eject: 1h}}\ntimeouts: {connect: 1s}";
        world.yaml(&format!("pool: {{max_connections: {most}}}\n{passive}"))
    };
    let proxy = Proxy::start(&yaml(0)).await;
    let address = proxy.address(ALIAS).await;
    let mut peer = client::connect(address).await;
    peer.send(format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    first.until(|seen| seen.connections == 1).await;
    proxy.rewrite(&yaml(1));
    proxy.reload().await;
    second.until(|seen| seen.requests.len() == 1).await;
    assert_eq!(get(&proxy).await.status(), 503);
}

/// Two targets at one port. The first has so many addresses.
/// Regression: those that wait for its connection got a 504.
#[tokio::test]
async fn requests_that_wait_for_the_same_connection_in_vain_reach_the_second_target() {
    let world = World::new(1).await;
    let tls = trust::server_with_alpn(&[FIRST], &["h2"]);
    let (accepted, mut accepts) = watch::channel(false);
    let accepted = Arc::new(accepted);
    // It never sends its SETTINGS.
    let _first = RawOrigin::start(listener(world.first[0]), Some(tls), move |arrival: Arrival| {
        let accepted = accepted.clone();
        async move {
            let _conversation = arrival.open().await;
            accepted.send_replace(true);
            std::future::pending().await
        }
    });
    let _second = world.second();
    let proxy = Proxy::start(&world.yaml("timeouts: {connect: 1s}")).await;
    let client = H2::connect(proxy.address(ALIAS).await).await;
    let url = format!("http://{ALIAS}/");
    let mut leader = client.clone();
    let first = url.clone();
    let leading = tokio::spawn(async move { leader.get(&first).await });
    within("the first request", accepts.wait_for(|accepted| *accepted)).await.unwrap();
    let mut following = JoinSet::new();
    for _ in 0..3 {
        let (mut client, url) = (client.clone(), url.clone());
        following.spawn(async move { client.get(&url).await.unwrap() });
    }
    for response in following.join_all().await {
        assert_eq!((response.head.status.as_u16(), &response.body[..]), (200, &b"second"[..]));
    }
    leading.abort();
}

struct World {
    scene: Scene,
    first: Vec<SocketAddr>,
    second: SocketAddr,
}

impl World {
    async fn new(endpoints: usize) -> Self {
        let addresses = loopback::addresses(endpoints + 1);
        let listeners = loopback::listen(&addresses);
        let port = listeners[0].local_addr().unwrap().port();
        let (second, first) = addresses.split_last().unwrap();
        let scene = Scene::new(1).await;
        scene.dns.zone(first.iter().map(|ip| dns::address(FIRST, 60, *ip)));
        scene.dns.zone([dns::address(SECOND, 60, *second)]);
        let at = |ip: &std::net::IpAddr| SocketAddr::new(*ip, port);
        Self { scene, first: first.iter().map(at).collect(), second: at(second) }
    }

    fn yaml(&self, keys: &str) -> String {
        let targets = format!("target: {FIRST}\nfailover: [{SECOND}]\n{keys}");
        let port = |port: u16| format!("port: {port}");
        let yaml = self.scene.yaml(&targets);
        format!("workers: 1\n{}", yaml.replace(&port(self.scene.port), &port(self.second.port())))
            + "admin: {listen: \"127.0.0.1:0\"}\n"
    }

    fn first<Script, Run>(&self, script: Script) -> RawOrigin
    where
        Script: Fn(Arrival) -> Run + Send + Sync + 'static,
        Run: Future<Output = ()> + Send + 'static,
    {
        self.nth(0, script)
    }

    /// At one of the first's endpoints.
    fn nth<Script, Run>(&self, endpoint: usize, script: Script) -> RawOrigin
    where
        Script: Fn(Arrival) -> Run + Send + Sync + 'static,
        Run: Future<Output = ()> + Send + 'static,
    {
        let tls = trust::server_with_alpn(&[FIRST], &["http/1.1"]);
        RawOrigin::start(listener(self.first[endpoint]), Some(tls), script)
    }

    fn second(&self) -> RawOrigin {
        let tls = trust::server_with_alpn(&[SECOND], &["http/1.1"]);
        let script = |arrival| scripts::always(arrival, scripts::ok("second"));
        RawOrigin::start(listener(self.second), Some(tls), script)
    }
}

fn listener(address: SocketAddr) -> TcpListener {
    let listener = std::net::TcpListener::bind(address).unwrap();
    listener.set_nonblocking(true).unwrap();
    TcpListener::from_std(listener).unwrap()
}

async fn get(proxy: &Proxy) -> Message {
    client::get(proxy.address(ALIAS).await, ALIAS, "/").await
}

/// Waits until DNS has said where a target is.
async fn resolved(proxy: &Proxy, target: usize) {
    within("a response of DNS", async {
        while proxy.status().await["aliases"][0]["targets"][target]["true_name"].is_null() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
