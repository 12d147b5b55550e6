//! The forward proxy: aliases by absolute URL and through CONNECT, other hosts as they are.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
};

use crate::support::{
    client::{self, H2},
    curl::{Curl, curl},
    loopback,
    message::Message,
    peer::Peer,
    proxy::{Proxy, Setup},
    raw_origin::RawOrigin,
    scene::{ALIAS, Scene, TRUE_NAME},
    scripts, trust,
};
use nix::sys::signal::Signal;
use truename::demo::dns;

const OTHER: &str = "elsewhere.example";

/// A proxy with an alias and a forward proxy beside it.
struct World {
    proxy: Proxy,
    address: SocketAddr,
    scene: Scene,
}

impl World {
    /// `keys` are further lines of the file's top level.
    async fn new(scene: Scene, keys: &str) -> Self {
        let keys = if keys.contains("proxy:") {
            keys.to_owned()
        } else {
            format!("{keys}\nproxy: {{listen: \"127.0.0.1:0\"}}")
        };
        let proxy = Setup::new(&format!("{}\n{keys}\n", scene.yaml(""))).start().await;
        let address = proxy.forward_proxy().await;
        Self { proxy, address, scene }
    }

    /// An origin without TLS that has a name of its own and is no alias.
    fn elsewhere<Script, Run>(&self, script: Script) -> RawOrigin
    where
        Script: Fn(crate::support::raw_origin::Arrival) -> Run + Clone + Send + Sync + 'static,
        Run: Future<Output = ()> + Send + 'static,
    {
        let origin = RawOrigin::start(loopback::listen_anywhere(), None, script);
        self.scene.dns.zone([dns::address(OTHER, 60, origin.address.ip())]);
        origin
    }

    /// Sends `head` to the forward proxy and reads the response.
    async fn ask(&self, head: &str) -> Message {
        let mut peer = client::connect(self.address).await;
        peer.send(head).await;
        peer.response_to(head.split(' ').next().unwrap()).await
    }

    /// A tunnel to `target`, open.
    async fn tunnel(&self, target: &str) -> Peer {
        let mut peer = client::connect(self.address).await;
        peer.send(connect_to(target)).await;
        let response = peer.response_to("CONNECT").await;
        assert_eq!(response.status(), 200, "{}{}", response.head, response.text());
        assert_eq!(response.fields(), [], "RFC 9110, section 9.3.6");
        peer
    }

    async fn curl(&self, arguments: &[&str]) -> Curl {
        let proxy = format!("http://{}", self.address);
        let through = ["--noproxy", "", "--proxy", &proxy];
        curl(&[&through, arguments].concat()).await
    }

    fn local_root(&self) -> PathBuf {
        self.proxy.folder().join("state/truename/ca.pem")
    }
}

fn connect_to(target: &str) -> String {
    format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n")
}

#[track_caller]
fn refused(response: &Message, status: u16, error: &str) -> serde_json::Value {
    assert_eq!(response.status(), status, "{}{}", response.head, response.text());
    assert_eq!(response.field("content-type"), Some("application/problem+json"));
    let proxy_status = response.field("proxy-status").unwrap();
    assert!(proxy_status.starts_with(&format!("truename; error={error}; ")), "{proxy_status}");
    response.json()
}

#[tokio::test]
async fn an_alias_is_reached_by_absolute_url_under_all_its_names_and_any_port() {
    let mut scene = Scene::new(1).await;
    let origin = scene.script(scripts::respond).remove(0);
    let host = format!("{TRUE_NAME}:{}", scene.port);
    let world = World::new(scene, "").await;
    for name in [
        "webscaler-manual",
        "Webscaler-Manual.default",
        "webscaler-manual.default.svc:80",
        "webscaler-manual.default.svc.cluster.local.:12345",
    ] {
        let url = format!("http://{name}/a%2Fb?test=value");
        let result = world.curl(&["-H", "Proxy-Feature: x", "-U", "user:secret", &url]).await;
        assert_eq!((result.code, result.stdout.as_str()), (0, "ok"), "{name}: {}", result.stderr);
        let request = origin.seen().requests.pop().unwrap();
        assert_eq!(request.start_line(), "GET /a%2Fb?test=value HTTP/1.1");
        assert_eq!(request.field("host"), Some(host.as_str()));
        assert!(!request.head.to_lowercase().contains("proxy-"), "{}", request.head);
    }
    assert!(origin.seen().server_names.iter().all(|name| name.as_deref() == Some(TRUE_NAME)));
}

#[tokio::test]
async fn https_to_an_alias_has_a_certificate_of_its_own_name_by_http1_and_http2() {
    let mut scene = Scene::new(1).await;
    let origins = scene.serve();
    let world = World::new(scene, "").await;
    let root = world.local_root();
    for (flag, version) in [("--http1.1", "1.1"), ("--http2", "2")] {
        let url = format!("https://{ALIAS}/anything?test=value");
        let arguments = ["--cacert", root.to_str().unwrap(), flag, "-w", " %{http_version}", &url];
        let result = world.curl(&arguments).await;
        assert_eq!(result.code, 0, "{}", result.stderr);
        let (body, spoken) = result.stdout.rsplit_once(' ').unwrap();
        let body: serde_json::Value = serde_json::from_str(body).unwrap();
        assert_eq!(body["args"]["test"], "value");
        assert_eq!(spoken, version);
    }
    let visits = origins[0].visits();
    assert_eq!(visits.len(), 2);
    assert!(visits.iter().all(|visit| visit.sni.as_deref() == Some(TRUE_NAME)), "{visits:?}");
}

#[tokio::test]
async fn the_first_bytes_in_a_tunnel_decide_and_not_its_port() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.serve();
    let world = World::new(scene, "").await;

    // Plaintext where TLS is expected.
    let mut peer = world.tunnel(&format!("{ALIAS}:443")).await;
    for _ in 0..2 {
        peer.send(format!("GET /get HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
        assert_eq!(peer.response().await.status(), 200);
    }
    // HTTP/2 with prior knowledge.
    let mut h2 = H2::over(world.tunnel(&format!("{ALIAS}:80")).await).await;
    assert_eq!(h2.get(&format!("http://{ALIAS}/get")).await.unwrap().head.status, 200);
    // TLS where plaintext is expected.
    let root = world.local_root();
    let arguments = ["--cacert", root.to_str().unwrap(), &format!("https://{ALIAS}:80/get")];
    let result = world.curl(&arguments).await;
    assert_eq!(result.code, 0, "{}", result.stderr);
}

#[tokio::test]
async fn bytes_that_come_with_the_connect_are_the_tunnels_first() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.serve();
    let world = World::new(scene, "").await;
    let mut peer = client::connect(world.address).await;
    let inside = format!("GET /get HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n");
    peer.send(connect_to(&format!("{ALIAS}:443")) + &inside).await;
    assert_eq!(peer.response_to("CONNECT").await.status(), 200);
    assert_eq!(peer.response().await.status(), 200);
}

#[tokio::test]
async fn inside_of_a_tunnel_the_alias_listener_has_the_say() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.serve();
    let world = World::new(scene, "").await;
    let target = format!("{ALIAS}:443");

    let mut peer = world.tunnel(&target).await;
    peer.send("GET / HTTP/1.1\r\nHost: elsewhere\r\n\r\n").await;
    refused(&peer.response().await, 404, "destination_not_found");

    let mut peer = world.tunnel(&target).await;
    peer.send(connect_to(&target)).await;
    let response = peer.response_to("CONNECT").await;
    refused(&response, 405, "http_request_error");

    let mut peer = world.tunnel(&target).await;
    peer.send("no HTTP at all\r\n\r\n").await;
    refused(&peer.response().await, 400, "http_request_error");
    peer.closed().await;

    let root = world.local_root();
    let arguments = [
        "--cacert",
        root.to_str().unwrap(),
        "--connect-to",
        &format!("elsewhere:443:{target}"),
        "https://elsewhere/",
    ];
    let result = world.curl(&arguments).await;
    assert_eq!(result.code, 35, "an alert for a name without certificate: {}", result.stderr);
}

#[tokio::test]
async fn an_upgrade_works_inside_of_a_tunnel() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::upgrade_and_echo);
    let world = World::new(scene, "").await;
    let mut peer = world.tunnel(&format!("{ALIAS}:80")).await;
    peer.send(format!(
        "GET / HTTP/1.1\r\nHost: {ALIAS}\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
    ))
    .await;
    assert_eq!(peer.response().await.status(), 101);
    peer.send("frames").await;
    assert_eq!(peer.exactly(6).await, b"frames");
}

#[tokio::test]
async fn a_tunnel_that_stays_silent_or_is_left_is_closed() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.serve();
    let world = World::new(scene, "listener: {header_timeout: 250ms}").await;
    world.tunnel(&format!("{ALIAS}:443")).await.closed().await;

    let mut half_open = world.tunnel(&format!("{ALIAS}:443")).await;
    half_open.finish().await;
    half_open.closed().await;
}

#[tokio::test]
async fn an_open_tunnel_is_not_held_to_the_time_for_heads() {
    let world = World::new(Scene::new(1).await, "listener: {header_timeout: 250ms}").await;
    let origin = world.elsewhere(scripts::echo);
    let mut tunnel = world.tunnel(&format!("{OTHER}:{}", origin.address.port())).await;
    tunnel.send("one").await;
    assert_eq!(tunnel.exactly(3).await, b"one");
    // Opened later, and given up when its time is over.
    world.tunnel(&format!("{ALIAS}:443")).await.closed().await;
    tunnel.send("two").await;
    assert_eq!(tunnel.exactly(3).await, b"two");
}

#[tokio::test]
async fn another_host_is_asked_in_the_clear_as_the_client_asked() {
    let world = World::new(Scene::new(1).await, "").await;
    let origin = world.elsewhere(scripts::respond);
    let host = format!("{OTHER}:{}", origin.address.port());
    let mut peer = client::connect(world.address).await;
    // One connection to the proxy, whoever is asked through it.
    for _ in 0..2 {
        peer.send(format!(
            "POST http://{host}/a%2fb?c=d HTTP/1.1\r\nHost: ignored.example\r\n\
             Proxy-Authorization: Basic c2VjcmV0\r\nProxy-Connection: keep-alive\r\n\
             Proxy-Secret: x\r\nAuthorization: Bearer theirs\r\nContent-Length: 4\r\n\r\nbody"
        ))
        .await;
        let response = peer.response().await;
        assert_eq!((response.status(), response.text()), (200, "ok"));
        let request = origin.seen().requests.pop().unwrap();
        assert_eq!(request.start_line(), "POST /a%2fb?c=d HTTP/1.1");
        assert_eq!(request.field("host"), Some(host.as_str()));
        assert_eq!(request.field("authorization"), Some("Bearer theirs"));
        assert_eq!(request.text(), "body");
        assert!(!request.head.to_lowercase().contains("proxy-"), "{}", request.head);
        assert!(!request.head.to_lowercase().contains("via"), "{}", request.head);
    }
    let line = world.proxy.logged("/a%2fb").await;
    assert!(line.contains(OTHER) && !line.contains("c=d"), "{line}");
}

#[tokio::test]
async fn an_address_of_another_host_that_refuses_is_passed_over() {
    let world = World::new(Scene::new(1).await, "").await;
    let origin = world.elsewhere(scripts::respond);
    // Nobody listens there at this port.
    let deaf = loopback::address();
    world.scene.dns.zone([
        dns::address("two.example", 60, deaf),
        dns::address("two.example", 60, origin.address.ip()),
    ]);
    let port = origin.address.port();
    for _ in 0..4 {
        let url = format!("http://two.example:{port}/");
        let response = world.ask(&format!("GET {url} HTTP/1.1\r\nHost: two.example\r\n\r\n")).await;
        assert_eq!(response.text(), "ok");
    }
}

#[tokio::test]
async fn a_tunnel_to_another_host_is_bytes_and_its_halves_close_apart() {
    let world = World::new(Scene::new(1).await, "").await;
    let origin = world.elsewhere(scripts::echo);
    let mut peer = world.tunnel(&format!("{OTHER}:{}", origin.address.port())).await;
    peer.send(b"\x16\x00\xff no protocol of ours").await;
    peer.finish().await;
    let echoed = peer.rest().await.unwrap();
    assert_eq!(echoed, b"\x16\x00\xff no protocol of ours");
}

#[tokio::test]
async fn the_true_name_itself_is_a_host_like_any_other() {
    let mut scene = Scene::new(1).await;
    let origins = scene.serve();
    let port = scene.port;
    let world = World::new(scene, "").await;
    let root = world.proxy.folder().join("root.pem");
    let url = format!("https://{TRUE_NAME}:{port}/get");
    // Not the local authority: the origin's own certificate, end to end.
    let result = world.curl(&["--cacert", root.to_str().unwrap(), &url]).await;
    assert_eq!(result.code, 0, "{}", result.stderr);
    assert_eq!(origins[0].visits().len(), 1);
}

#[tokio::test]
async fn denied_passthrough_leaves_the_aliases_only() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.serve();
    let keys = "proxy: {listen: \"127.0.0.1:0\", passthrough: deny}";
    let world = World::new(scene, keys).await;
    let origin = world.elsewhere(scripts::respond);
    let target = format!("{OTHER}:{}", origin.address.port());
    for request in
        [connect_to(&target), format!("GET http://{target}/ HTTP/1.1\r\nHost: x\r\n\r\n")]
    {
        let problem = refused(&world.ask(&request).await, 403, "http_request_denied");
        assert!(problem["detail"].as_str().unwrap().contains(&target), "{problem}");
        assert!(problem["fix"].as_str().unwrap().contains("proxy.passthrough"), "{problem}");
    }
    assert_eq!(origin.seen().connections, 0);
    world.tunnel(&format!("{ALIAS}:443")).await;
}

#[tokio::test]
async fn what_is_forbidden_to_aliases_is_forbidden_to_other_hosts() {
    let scene = Scene::new(1).await;
    scene.dns.zone([
        dns::address("link-local.example", 60, Ipv4Addr::from([169, 254, 10, 10])),
        dns::address("metadata.example", 60, Ipv4Addr::from([169, 254, 169, 254])),
        dns::address("machine.example", 60, Ipv4Addr::from([127, 0, 0, 1])),
        dns::address("unspecified.example", 60, Ipv4Addr::from([0, 0, 0, 0])),
    ]);
    let yaml = scene.yaml("").replace("policy: {allow_addresses: [\"127.0.0.0/8\"]}\n", "");
    let setup = Setup::new(&format!("{yaml}\nproxy: {{listen: \"127.0.0.1:0\"}}\n"));
    let proxy = setup.start().await;
    let world = World { address: proxy.forward_proxy().await, proxy, scene };
    for host in [
        "169.254.169.254",
        "169.254.10.10",
        "127.0.0.1",
        "0.0.0.0",
        "[::1]",
        "[::ffff:169.254.169.254]",
        "[fe80::1]",
        "localhost",
        "a.localhost",
        "link-local.example",
        "metadata.example",
        "machine.example",
        "unspecified.example",
    ] {
        // Not one of our own ports.
        let target = format!("{host}:1");
        let response = world.ask(&connect_to(&target)).await;
        let problem = refused(&response, 403, "destination_ip_prohibited");
        assert_eq!(problem["stage"], "policy", "{target}");
        let url = format!("GET http://{target}/latest/meta-data HTTP/1.1\r\nHost: x\r\n\r\n");
        refused(&world.ask(&url).await, 403, "destination_ip_prohibited");
    }
}

#[tokio::test]
async fn its_own_listeners_are_refused_even_where_loopback_is_allowed() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.serve();
    let world = World::new(scene, "").await;
    world.scene.dns.zone([dns::address("loop.example", 60, Ipv4Addr::from([127, 0, 0, 1]))]);
    let own = [world.address, world.proxy.address(ALIAS).await, world.proxy.admin().await];
    for port in own.map(|address| address.port()) {
        for host in ["127.0.0.1", "localhost", "loop.example", "0.0.0.0", "[::ffff:127.0.0.1]"] {
            let response = world.ask(&connect_to(&format!("{host}:{port}"))).await;
            refused(&response, 508, "proxy_loop_detected");
            let url = format!("GET http://{host}:{port}/ HTTP/1.1\r\nHost: x\r\n\r\n");
            refused(&world.ask(&url).await, 508, "proxy_loop_detected");
        }
    }
}

#[tokio::test]
async fn what_names_nobody_clearly_is_a_bad_request() {
    let world = World::new(Scene::new(1).await, "").await;
    for target in [
        ALIAS,
        "webscaler-manual:",
        "webscaler-manual:0",
        "webscaler-manual:65536",
        "webscaler-manual:443x",
        "webscaler-manual:+443",
        "user:secret@webscaler-manual:443",
        "http://webscaler-manual:443/",
        "/webscaler-manual:443",
        "webscaler manual:443",
        ":443",
        "*",
        "[::1:443",
        "127.1:443",
        "a..b:443",
    ] {
        let response = world.ask(&connect_to(target)).await;
        refused(&response, 400, "http_request_error");
    }
    for request in [
        "GET / HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n",
        "GET https://webscaler-manual/ HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n",
        "GET ftp://webscaler-manual/ HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n",
        "GET http://user:secret@webscaler-manual/ HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n",
        "GET webscaler-manual:80 HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n",
        "OPTIONS * HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n",
        "CONNECT webscaler-manual:443\r\n\r\n",
        // TLS to the proxy itself.
        "\x16\x03\x01\x00\x05hello\r\n\r\n",
    ] {
        let response = world.ask(request).await;
        refused(&response, 400, "http_request_error");
    }
}

/// Regression: the response's head repeated it in full, and was too large for many clients.
#[tokio::test]
async fn a_very_long_host_is_not_repeated_in_full() {
    let world = World::new(Scene::new(1).await, "").await;
    let host = "x".repeat(50_000);
    for head in [
        format!("GET http://{host}/ HTTP/1.1\r\nHost: x\r\n\r\n"),
        format!("CONNECT {host}:443 HTTP/1.1\r\nHost: x\r\n\r\n"),
    ] {
        let response = world.ask(&head).await;
        let problem = refused(&response, 400, "http_request_error");
        assert!(response.head.len() < 2048, "{} bytes of head", response.head.len());
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.starts_with("`xxx") && detail.len() < 9000, "{detail}");
    }
}

#[tokio::test]
async fn a_host_that_cannot_be_reached_is_told_before_the_tunnel_opens() {
    let world = World::new(Scene::new(1).await, "").await;
    let deaf = loopback::listen_anywhere().local_addr().unwrap();
    refused(&world.ask(&connect_to(&deaf.to_string())).await, 502, "connection_refused");
    let response = world.ask(&connect_to("nobody.example:443")).await;
    let problem = refused(&response, 503, "dns_error");
    assert!(problem["detail"].as_str().unwrap().contains("nobody.example"), "{problem}");
    assert!(!problem["title"].as_str().unwrap().contains("alias"), "{problem}");

    let cutting = world.elsewhere(scripts::close_after_request);
    let url = format!("GET http://{} HTTP/1.1\r\nHost: x\r\n\r\n", cutting.address);
    refused(&world.ask(&url).await, 502, "connection_terminated");
    let garbling = world.elsewhere(scripts::garbage);
    let url = format!("GET http://{} HTTP/1.1\r\nHost: x\r\n\r\n", garbling.address);
    refused(&world.ask(&url).await, 502, "http_protocol_error");
}

#[tokio::test]
async fn a_service_of_the_cluster_passes_by_its_short_name() {
    let world = World::new(Scene::new(1).await, "").await;
    let origin = world.elsewhere(scripts::respond);
    let (ip, port) = (origin.address.ip(), origin.address.port());
    world.scene.dns.zone([
        dns::address("payments.default.svc.cluster.local", 60, ip),
        dns::address("payments.prod.svc.cluster.local", 60, ip),
    ]);
    for host in ["payments", "payments.prod", "payments.prod.svc"] {
        let request = format!("GET http://{host}:{port}/ HTTP/1.1\r\nHost: x\r\n\r\n");
        assert_eq!(world.ask(&request).await.status(), 200, "{host}");
    }
}

#[tokio::test]
async fn an_alias_without_a_listener_is_reached_by_the_forward_proxy() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.serve();
    let yaml = scene.yaml("").replace("listen: [\"127.0.0.1:0\"]", "listen: []");
    let setup = Setup::new(&format!("{yaml}\nproxy: {{listen: \"127.0.0.1:0\"}}\n"));
    let proxy = setup.start().await;
    let world = World { address: proxy.forward_proxy().await, proxy, scene };
    let url = format!("GET http://{ALIAS}/get HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n");
    assert_eq!(world.ask(&url).await.status(), 200);
    let root = world.local_root();
    let arguments = ["--cacert", root.to_str().unwrap(), &format!("https://{ALIAS}/get")];
    let result = world.curl(&arguments).await;
    assert_eq!(result.code, 0, "{}", result.stderr);
}

#[tokio::test]
async fn a_reload_opens_and_closes_the_forward_proxy() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let without = format!("{}\nadmin: {{listen: \"127.0.0.1:0\"}}\n", scene.yaml(""));
    let proxy = Setup::new(&without).start().await;
    proxy.rewrite(&format!("{without}proxy: {{listen: \"127.0.0.1:0\"}}\n"));
    proxy.signal(Signal::SIGHUP);
    let address = proxy.forward_proxy().await;
    let url = format!("http://{ALIAS}/");
    assert_eq!(client::get(address, ALIAS, &url).await.text(), "ok");

    proxy.rewrite(&without);
    proxy.signal(Signal::SIGHUP);
    crate::support::within("the listener to close", async {
        while tokio::net::TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_drain_lets_a_tunnel_end_by_itself() {
    let world = World::new(Scene::new(1).await, "").await;
    let origin = world.elsewhere(scripts::echo);
    let mut peer = world.tunnel(&format!("{OTHER}:{}", origin.address.port())).await;
    world.proxy.signal(Signal::SIGTERM);
    world.proxy.logged("draining").await;
    peer.send("still here").await;
    assert_eq!(peer.exactly(10).await, b"still here");
    peer.finish().await;
    peer.closed().await;
    assert!(world.proxy.exit().await.success());
}

#[tokio::test]
async fn an_alias_that_leads_nowhere_is_explained_inside_of_its_tunnel() {
    let mut scene = Scene::new(1).await;
    // A certificate for somebody else.
    let tls = trust::server(&["elsewhere.example"]);
    let _origin = RawOrigin::start(scene.take_listeners().remove(0), Some(tls), scripts::respond);
    let world = World::new(scene, "").await;
    let root = world.local_root();
    let arguments = ["--cacert", root.to_str().unwrap(), &format!("https://{ALIAS}/")];
    let result = world.curl(&arguments).await;
    let problem: serde_json::Value = serde_json::from_str(&result.stdout).unwrap();
    assert_eq!(problem["status"], 502, "{problem}");
    assert_eq!(problem["true_name"], TRUE_NAME);
    assert_eq!(problem["stage"], "tls");
}
