//! Listeners that widen, narrow, move and change places under a running proxy.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinHandle,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::support::{
    client::{self, H2},
    loopback,
    message::Message,
    peer::Peer,
    proxy::{Proxy, Setup},
    raw_origin::RawOrigin,
    scene::{ALIAS, Scene, TRUE_NAME},
    scripts,
    service_origin::ServiceOrigin,
    trust, within,
};

/// A second alias, which leads to the same origin.
const OTHER: &str = "other";

#[tokio::test]
async fn a_listener_widens_and_narrows_and_no_client_is_refused_or_reset() {
    let world = World::start("0.0.0.0:0").await;
    let port = world.proxy.address(ALIAS).await.port();
    let (inside, outside) = (local(port), SocketAddr::from(([127, 0, 0, 2], port)));
    let clients = [Busy::connecting(inside, ALIAS), Busy::connecting(inside, ALIAS)];
    for _ in 0..4 {
        world.reload(&world.listening(&[&inside.to_string()])).await;
        until_refused(outside).await;
        world.reload(&world.listening(&[&format!("0.0.0.0:{port}")])).await;
        assert_eq!(client::get(outside, ALIAS, "/").await.text(), "ok");
    }
    for client in clients {
        assert_ne!(client.stop().await, 0);
    }
}

/// Regression: those beyond `listener.max_connections`, who wait in the queue of the wide socket, were reset with it.
#[tokio::test]
async fn a_listener_narrows_and_no_client_is_reset_that_waits_for_its_turn() {
    let limit = "listener: {max_connections: 1}\nworkers: 2\n";
    let world = World::with("0.0.0.0:0", limit).await;
    let port = world.proxy.address(ALIAS).await.port();
    let mut served = client::connect(local(port)).await;
    assert_eq!(ask(&mut served, "/").await.text(), "ok");
    let mut waiting = Vec::new();
    for _ in 0..5 {
        waiting.push(client::connect(local(port)).await);
    }

    world.reload(&(world.listening(&[&local(port).to_string()]) + limit)).await;
    until_refused(SocketAddr::from(([127, 0, 0, 2], port))).await;
    drop(served);
    // Whose turn it is decides chance.
    let mut responses = tokio::task::JoinSet::new();
    for mut peer in waiting {
        responses.spawn(async move {
            peer.send(format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\nConnection: close\r\n\r\n"))
                .await;
            peer.response().await.text().to_owned()
        });
    }
    assert_eq!(responses.join_all().await, ["ok"; 5]);
}

#[tokio::test]
async fn a_reload_that_would_narrow_a_listener_and_fails_refuses_nobody() {
    let world = World::start("0.0.0.0:0").await;
    let port = world.proxy.address(ALIAS).await.port();
    let client = Busy::connecting(local(port), ALIAS);
    let narrow = world.listening(&[&local(port).to_string()]);
    let broken =
        format!("{narrow}listener: {{tls: {{certificate: $FOLDER/no, key: $FOLDER/no}}}}\n");
    for _ in 0..4 {
        assert_eq!(world.try_reload(&broken).await.status(), 422);
        let outside = SocketAddr::from(([127, 0, 0, 2], port));
        assert_eq!(client::get(outside, ALIAS, "/").await.text(), "ok");
    }
    assert_ne!(client.stop().await, 0);
}

#[tokio::test]
async fn aliases_and_the_forward_proxy_change_places_and_no_client_is_refused() {
    let world = World::start("127.0.0.1:0").await;
    let [one, two, three] = free_addresses();
    let rotated = |alias: SocketAddr, other: SocketAddr, proxy: SocketAddr| {
        let other =
            format!("  - name: {OTHER}\n    target: 127.0.0.1:1\n    listen: [\"{other}\"]\n");
        let first = world.listening(&[&alias.to_string()]);
        format!("{first}{other}proxy: {{listen: \"{proxy}\"}}\n")
    };
    world.reload(&rotated(one, two, three)).await;
    let clients = [one, two, three].map(Busy::opening);
    for _ in 0..3 {
        for [alias, other, proxy] in [[two, three, one], [three, one, two], [one, two, three]] {
            world.reload(&rotated(alias, other, proxy)).await;
            assert_eq!(client::get(alias, ALIAS, "/").await.text(), "ok");
            assert_eq!(client::get(other, ALIAS, "/").await.status(), 404);
            let absolute = format!("http://{ALIAS}/");
            assert_eq!(client::get(proxy, ALIAS, &absolute).await.text(), "ok");
            assert_eq!(client::get(proxy, ALIAS, "/").await.status(), 400);
        }
    }
    for client in clients {
        assert_ne!(client.stop().await, 0);
    }
}

/// Regression: now and then the next reload found the address taken, "by another process": the workers had yet to close
/// the socket.
#[tokio::test]
async fn a_listener_that_one_reload_drops_is_there_again_with_the_next() {
    let world = World::start("127.0.0.1:0").await;
    let [one, two] = free_addresses();
    let [one, two] = [one, two].map(|address| address.to_string());
    for _ in 0..40 {
        world.reload(&world.listening(&[&one, &two])).await;
        world.reload(&world.listening(&[&one])).await;
    }
}

/// Regression: a connection was served by whatever was configured at the address where it had come in.
#[tokio::test]
async fn a_kept_connection_follows_its_listener_to_another_address() {
    let world = World::start("127.0.0.1:0").await;
    let [one, two] = free_addresses();
    let placed = |alias: SocketAddr, other: SocketAddr| {
        let other =
            format!("  - name: {OTHER}\n    target: 127.0.0.1:1\n    listen: [\"{other}\"]\n");
        world.listening(&[&alias.to_string()]) + &other
    };
    world.reload(&placed(one, two)).await;
    let mut peer = client::connect(one).await;
    let mut h2 = H2::connect(one).await;
    for addresses in [[two, one], [free_address(), two], [one, two]] {
        world.reload(&placed(addresses[0], addresses[1])).await;
        assert_eq!(ask(&mut peer, "/").await.text(), "ok", "{addresses:?}");
        let response = h2.get(&format!("http://{ALIAS}/")).await.unwrap();
        assert_eq!(response.body, "ok", "{addresses:?}");
    }
}

/// Regression: it was served by all aliases at the address that its listener had moved to.
#[tokio::test]
async fn a_kept_connection_does_not_follow_its_listener_to_aliases_that_it_could_not_reach() {
    let world = World::start("0.0.0.0:0").await;
    let port = world.proxy.address(ALIAS).await.port();
    let other = |address: SocketAddr| {
        format!("  - name: {OTHER}\n    target: 127.0.0.1:1\n    listen: [\"{address}\"]\n")
    };
    let inside = free_address();
    for narrow in [local(port), inside] {
        let wide = world.listening(&[&format!("0.0.0.0:{port}")]);
        world.reload(&(wide + &other(inside))).await;
        let mut outside = client::connect(SocketAddr::from(([127, 0, 0, 2], port))).await;
        assert_eq!(ask(&mut outside, "/").await.text(), "ok");
        world.reload(&(world.listening(&[&narrow.to_string()]) + &other(narrow))).await;
        outside.closed().await;
    }
}

/// Regression: the reload after the one that narrowed its listener let it reach an alias that was new there.
#[tokio::test]
async fn a_kept_connection_from_outside_does_not_reach_aliases_that_a_narrowed_listener_gets_later()
{
    let world = World::start("0.0.0.0:0").await;
    let port = world.proxy.address(ALIAS).await.port();
    let mut outside = client::connect(SocketAddr::from(([127, 0, 0, 2], port))).await;
    let narrow = world.listening(&[&local(port).to_string()]);
    world.reload(&narrow).await;
    assert_eq!(ask(&mut outside, "/").await.text(), "ok", "it could reach that before");
    let other =
        format!("  - name: {OTHER}\n    target: 127.0.0.1:1\n    listen: [\"{}\"]\n", local(port));
    world.reload(&(narrow + &other)).await;
    outside.closed().await;
}

#[tokio::test]
async fn kept_connections_of_a_listener_that_is_removed_are_closed() {
    let world = World::start("127.0.0.1:0").await;
    let [one, two] = free_addresses();
    world.reload(&world.listening(&[&one.to_string(), &two.to_string()])).await;
    let (mut stays, mut goes) = (client::connect(one).await, client::connect(two).await);
    for peer in [&mut stays, &mut goes] {
        assert_eq!(ask(peer, "/").await.text(), "ok");
    }
    let mut h2 = H2::connect(two).await;
    let url = format!("http://{ALIAS}/");
    assert_eq!(h2.get(&url).await.unwrap().body, "ok");

    world.reload(&world.listening(&[&one.to_string()])).await;
    goes.closed().await;
    within("the end of an HTTP/2 connection", async {
        while let Ok(response) = h2.get(&url).await {
            assert_eq!(response.body, "ok");
        }
    })
    .await;
    assert_eq!(ask(&mut stays, "/").await.text(), "ok");
}

#[tokio::test]
async fn the_request_at_hand_is_the_last_where_its_listener_is_removed() {
    let mut scene = Scene::new(1).await;
    let listener = scene.take_listeners().remove(0);
    let (_origin, mut streams) = ServiceOrigin::streaming(listener, trust::server(&[TRUE_NAME]));
    let [one, two] = free_addresses();
    let both = listening(&scene, &[&one.to_string(), &two.to_string()]);
    let proxy = Setup::new(&both).start().await;
    let world = World { proxy, _origins: Vec::new(), scene };
    let mut peer = client::connect(two).await;
    peer.send(format!("GET /stream HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    let stream = within("the stream", streams.recv()).await.unwrap();

    world.reload(&world.listening(&[&one.to_string()])).await;
    until_refused(two).await;
    assert!(stream.data("whole").await);
    drop(stream);
    assert_eq!(peer.response().await.text(), "whole");
    peer.closed().await;
}

/// Regression: connections that were kept were served under the rules of before.
#[tokio::test]
async fn kept_connections_of_the_forward_proxy_are_served_by_its_rules_of_now_wherever_it_is() {
    let world = World::start("127.0.0.1:0").await;
    let [one, two] = free_addresses();
    let proxied = |address: SocketAddr, keys: &str| {
        world.listening(&["127.0.0.1:0"]) + &format!("proxy: {{listen: \"{address}\"{keys}}}\n")
    };
    world.reload(&proxied(one, "")).await;
    let mut peer = client::connect(one).await;
    let (alias, other) = (format!("http://{ALIAS}/"), "http://127.0.0.1:1/");
    assert_eq!(ask(&mut peer, &alias).await.text(), "ok");
    assert_eq!(ask(&mut peer, other).await.status(), 502);

    world.reload(&proxied(two, ", passthrough: deny")).await;
    assert_eq!(ask(&mut peer, &alias).await.text(), "ok");
    assert_eq!(ask(&mut peer, other).await.status(), 403);

    std::fs::write(world.proxy.folder().join("users"), "ann:one\n").unwrap();
    world.reload(&proxied(one, ", credentials: $FOLDER/users")).await;
    assert_eq!(ask(&mut peer, &alias).await.status(), 407);
}

#[tokio::test]
async fn kept_connections_of_a_forward_proxy_that_is_removed_are_closed_and_so_are_tunnels_to_aliases()
 {
    let world = World::start("127.0.0.1:0").await;
    let without = world.listening(&["127.0.0.1:0"]);
    world.reload(&format!("{without}proxy: {{listen: \"127.0.0.1:0\"}}\n")).await;
    let address = world.proxy.forward_proxy().await;
    let mut peer = client::connect(address).await;
    assert_eq!(ask(&mut peer, &format!("http://{ALIAS}/")).await.text(), "ok");
    let mut tunnel = client::connect(address).await;
    tunnel.send(format!("CONNECT {ALIAS}:80 HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    assert_eq!(tunnel.response_to("CONNECT").await.status(), 200);
    assert_eq!(ask(&mut tunnel, "/").await.text(), "ok");

    world.reload(&without).await;
    peer.closed().await;
    tunnel.closed().await;
}

#[tokio::test]
async fn the_next_request_of_a_kept_connection_is_read_by_the_settings_of_now() {
    let world = World::start("127.0.0.1:0").await;
    let yaml = world.listening(&["127.0.0.1:0"]);
    let mut peer = client::connect(world.proxy.address(ALIAS).await).await;
    let long = format!("/{}", "x".repeat(8000));
    assert_eq!(ask(&mut peer, &long).await.text(), "ok");
    world.reload(&format!("{yaml}listener: {{max_header_size: 4KiB}}\n")).await;
    assert_eq!(ask(&mut peer, "/").await.text(), "ok");
    let refused = ask(&mut peer, &long).await;
    assert!([414, 431].contains(&refused.status()), "{}", refused.head);
}

#[tokio::test]
async fn wildcards_of_both_families_listen_side_by_side() {
    let port = free_wildcard_port();
    let both = [format!("0.0.0.0:{port}"), format!("[::]:{port}")];
    let (v4, v6) = (local(port), SocketAddr::from((Ipv6Addr::LOCALHOST, port)));
    let world = World::start(&both.join("\", \"")).await;
    for address in [v4, v6] {
        assert_eq!(client::get(address, ALIAS, "/").await.text(), "ok");
    }

    // Alone, that of IPv6 stands for both families, and it becomes that and ceases to be it.
    let clients = [Busy::connecting(v4, ALIAS), Busy::connecting(v6, ALIAS)];
    let listens: [&[&str]; 3] = [&[&both[1]], &[&both[0], &both[1]], &[&both[1]]];
    for listen in listens {
        world.reload(&world.listening(listen)).await;
        for address in [v4, v6, SocketAddr::from(([127, 0, 0, 2], port))] {
            assert_eq!(client::get(address, ALIAS, "/").await.text(), "ok", "{listen:?}");
        }
    }
    for client in clients {
        assert_ne!(client.stop().await, 0);
    }
}

#[tokio::test]
async fn a_wildcard_of_ipv6_stands_beside_an_address_of_ipv4() {
    let port = free_wildcard_port();
    let _world = World::start(&format!("127.0.0.1:{port}\", \"[::]:{port}")).await;
    let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    for address in [local(port), v6] {
        assert_eq!(client::get(address, ALIAS, "/").await.text(), "ok");
    }
    assert!(TcpStream::connect(("127.0.0.2", port)).await.is_err(), "it was not asked for");
}

#[tokio::test]
async fn a_wildcard_of_ipv6_leaves_ipv4_out_once_an_address_of_it_is_configured() {
    let port = free_wildcard_port();
    let [wildcard, one] = [format!("[::]:{port}"), format!("127.0.0.1:{port}")];
    let v6 = SocketAddr::from((Ipv6Addr::LOCALHOST, port));
    let outside = SocketAddr::from(([127, 0, 0, 2], port));
    let world = World::start(&one).await;
    world.reload(&world.listening(&[&wildcard])).await;
    assert_eq!(client::get(outside, ALIAS, "/").await.text(), "ok");
    let clients = [local(port), v6].map(|address| Busy::connecting(address, ALIAS));

    world.reload(&world.listening(&[&wildcard, &one])).await;
    assert!(!is_served(outside).await, "it was not asked for");
    world.reload(&world.listening(&[&wildcard])).await;
    assert_eq!(client::get(outside, ALIAS, "/").await.text(), "ok");
    for client in clients {
        assert_ne!(client.stop().await, 0);
    }

    // What was there by itself before the wildcard took its place goes, too.
    let other = format!("127.0.0.2:{port}");
    world.reload(&world.listening(&[&wildcard, &other])).await;
    assert_eq!(client::get(outside, ALIAS, "/").await.text(), "ok");
    assert!(!is_served(local(port)).await, "it was not asked for");
}

#[tokio::test]
async fn a_port_that_cannot_be_had_is_explained_by_who_has_it() {
    let world = World::start("127.0.0.1:0").await;
    let foreign = loopback::listen_anywhere();
    let foreign = foreign.local_addr().unwrap();
    let response = world.try_reload(&world.listening(&[&foreign.to_string()])).await;
    assert_eq!(response.status(), 422);
    assert!(response.text().contains("another process has it"), "{}", response.text());

    // The admin listener moves at the next start only.
    let admin = world.proxy.admin().await;
    let moved = world
        .listening(&[&admin.to_string()])
        .replace("admin: {listen: \"127.0.0.1:0\"}", "admin: {listen: null}");
    let response = world.try_reload(&moved).await;
    assert_eq!(response.status(), 422);
    assert!(response.text().contains("this proxy's admin listener has it"), "{}", response.text());
}

/// An alias with an origin, and a proxy that is reloaded.
struct World {
    scene: Scene,
    proxy: Proxy,
    _origins: Vec<RawOrigin>,
}

impl World {
    async fn start(listen: &str) -> Self {
        Self::with(listen, "").await
    }

    /// The same with further keys of the configuration.
    async fn with(listen: &str, keys: &str) -> Self {
        let mut scene = Scene::new(1).await;
        let origins = scene.script(scripts::respond);
        let proxy = Setup::new(&(listening(&scene, &[listen]) + keys)).start().await;
        Self { scene, proxy, _origins: origins }
    }

    /// The configuration with these addresses of the alias.
    fn listening(&self, listen: &[&str]) -> String {
        listening(&self.scene, listen)
    }

    #[track_caller]
    fn reload(&self, yaml: &str) -> impl Future<Output = ()> {
        let reload = self.try_reload(yaml);
        within("a reload", async move {
            let response = reload.await;
            assert_eq!(response.text(), "reloaded\n");
        })
    }

    fn try_reload(&self, yaml: &str) -> impl Future<Output = Message> {
        self.proxy.rewrite(yaml);
        async {
            let mut peer = client::connect(self.proxy.admin().await).await;
            peer.send("POST /reload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
                .await;
            peer.response_to("POST").await
        }
    }
}

fn listening(scene: &Scene, listen: &[&str]) -> String {
    let yaml = scene.yaml("").replacen("127.0.0.1:0", &listen.join("\", \""), 1);
    // The origins are not where a wildcard listener would find itself.
    format!("allow_non_loopback: true\nadmin: {{listen: \"127.0.0.1:0\"}}\n{yaml}")
}

/// A client that comes again and again, and never accepts that it cannot.
struct Busy {
    rounds: JoinHandle<usize>,
    stop: DropGuard,
}

impl Busy {
    /// With a request each time.
    fn connecting(address: SocketAddr, host: &'static str) -> Self {
        Self::repeating(move || async move {
            assert_eq!(client::get(address, host, "/").await.text(), "ok");
        })
    }

    /// Whoever listens there.
    fn opening(address: SocketAddr) -> Self {
        Self::repeating(move || async move {
            client::get(address, ALIAS, "/").await;
        })
    }

    fn repeating<F>(visit: impl Fn() -> F + Send + 'static) -> Self
    where
        F: Future<Output = ()> + Send,
    {
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let rounds = tokio::spawn(async move {
            let mut rounds = 0;
            while !stopped.is_cancelled() {
                visit().await;
                rounds += 1;
            }
            rounds
        });
        Self { rounds, stop: stop.drop_guard() }
    }

    /// How many times it has come.
    async fn stop(self) -> usize {
        drop(self.stop);
        self.rounds.await.unwrap()
    }
}

/// Whether anything comes back from there.
async fn is_served(address: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect(address).await else { return false };
    let request = format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\nConnection: close\r\n\r\n");
    let mut response = Vec::new();
    let _ = stream.write_all(request.as_bytes()).await;
    let _ = within("an end", stream.read_to_end(&mut response)).await;
    !response.is_empty()
}

fn local(port: u16) -> SocketAddr {
    (Ipv4Addr::LOCALHOST, port).into()
}

/// A request on a connection that is kept.
async fn ask(peer: &mut Peer, target: &str) -> Message {
    peer.send(format!("GET {target} HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    peer.response().await
}

fn free_address() -> SocketAddr {
    let [address] = free_addresses();
    address
}

/// Addresses that nobody else uses.
fn free_addresses<const N: usize>() -> [SocketAddr; N] {
    std::array::from_fn(|_| SocketAddr::new(loopback::address(), 8080))
}

/// A port that is free on all addresses of both families.
fn free_wildcard_port() -> u16 {
    let listener = std::net::TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
    listener.local_addr().unwrap().port()
}

async fn until_refused(address: SocketAddr) {
    within("the listener to close", async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}
