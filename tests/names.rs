//! Where an alias leads, and what happens when that changes: seen from both ends of the proxy.

// Its helpers are part of the tests.
#![allow(clippy::unwrap_used)]

mod support;

use std::{net::SocketAddr, sync::Arc};

use rustls::ServerConfig;
use serde_json::json;
use support::{
    client, loopback,
    message::Message,
    peer::Peer,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts, trust, within,
};
use tokio::{net::TcpListener, sync::Semaphore};
use truename::demo::{
    authority::LeafOptions,
    dns::{self, Answer, RecordType},
};

const OTHER: &str = "other.example";

#[tokio::test]
async fn the_true_name_is_the_first_outside_the_cluster_and_no_later_one() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::answer);
    let middle = "middle.default.svc.cluster.local";
    scene.dns.zone([
        dns::cname(ALIAS_IN_DNS, 60, middle),
        dns::cname(middle, 60, "HTTPBIN.org"),
        dns::cname(TRUE_NAME, 60, "edge.cdn.example"),
        dns::address("edge.cdn.example", 60, scene.addresses[0]),
    ]);
    let proxy = Proxy::start(&scene.yaml("")).await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 200);
    called(&origins[0], TRUE_NAME, &authority(&scene, TRUE_NAME));
    let status = proxy.status().await;
    let chain = json!([ALIAS_IN_DNS, middle, TRUE_NAME, "edge.cdn.example"]);
    assert_eq!(status["aliases"][0]["targets"][0]["chain"], chain);
}

#[tokio::test]
async fn chain_match_takes_a_later_name_of_the_chain() {
    let mut scene = Scene::new(1).await;
    let origin = serve(&mut scene, &["db.rds.example"], "ok");
    scene.dns.zone([
        dns::cname(TRUE_NAME, 60, "db.rds.example"),
        dns::cname("db.rds.example", 60, "ec2.example"),
        dns::address("ec2.example", 60, scene.addresses[0]),
    ]);
    let proxy = Proxy::start(&scene.yaml(&tls("chain_match: [\"*.rds.example\"]"))).await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 200);
    called(&origin, "db.rds.example", &authority(&scene, "db.rds.example"));
}

#[tokio::test]
async fn server_name_is_sni_and_verified_name_and_host_together() {
    let mut scene = Scene::new(1).await;
    let origin = serve(&mut scene, &[OTHER], "ok");
    let proxy = Proxy::start(&scene.yaml(&tls(&format!("server_name: {OTHER}")))).await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 200);
    called(&origin, OTHER, &authority(&scene, OTHER));
}

#[tokio::test]
async fn a_chain_that_stays_in_the_cluster_has_no_true_name() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::answer);
    scene.dns.zone([dns::address(ALIAS_IN_DNS, 60, scene.addresses[0])]);
    let proxy = Proxy::start(&scene.yaml("")).await;
    let answer = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    assert_eq!(answer.status(), 503);
    let fix = answer.json()["fix"].as_str().unwrap().to_owned();
    assert!(fix.contains("server_name") && fix.contains("plaintext"), "{fix}");
}

#[tokio::test]
async fn a_chain_that_loops_is_shown() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::answer);
    let ring =
        [dns::cname(ALIAS_IN_DNS, 60, "a.example"), dns::cname("a.example", 60, ALIAS_IN_DNS)];
    scene.dns.answer(ALIAS_IN_DNS, Answer::Records(ring.to_vec()));
    let proxy = Proxy::start(&scene.yaml("")).await;
    let answer = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    assert_eq!((answer.status(), &answer.json()["stage"]), (503, &json!("resolve")));
    let detail = answer.json()["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains(&format!("{ALIAS_IN_DNS} → a.example → {ALIAS_IN_DNS}")), "{detail}");
}

#[tokio::test]
async fn a_told_target_may_be_a_name_or_an_address_each_with_or_without_port() {
    for with_port in [false, true] {
        let mut scene = Scene::new(1).await;
        let (ip, port) = (scene.addresses[0], scene.port);
        let leaf = trust::authority().issue(&[OTHER], &[ip], LeafOptions::default()).unwrap();
        let origin = serve_as(&mut scene, leaf.server_config(&["http/1.1"]).unwrap(), "ok");
        scene.dns.zone([dns::address(OTHER, 60, ip)]);
        // Without a port it is the alias' own.
        let target = |host: &str| match with_port {
            true => format!("port: 1\ntarget: \"{host}:{port}\""),
            false => format!("target: \"{host}\""),
        };
        let yaml = |target: &str| {
            let yaml = scene.yaml(target);
            match with_port {
                true => yaml.replacen(&format!("    port: {port}\n"), "", 1),
                false => yaml,
            }
        };

        let proxy = Proxy::start(&yaml(&target(OTHER))).await;
        assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.text(), "ok");
        called(&origin, OTHER, &authority(&scene, OTHER));
        let proxy = Proxy::start(&yaml(&target(&ip.to_string()))).await;
        assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.text(), "ok");
        let seen = origin.seen();
        assert_eq!(seen.server_names[1], None, "an address is no SNI (RFC 6066)");
        assert_eq!(seen.requests[1].field("host"), Some(&*format!("{ip}:{port}")));
        assert_eq!(
            scene.dns.queries(ALIAS_IN_DNS, RecordType::A),
            0,
            "DNS was asked for the alias"
        );
    }
}

#[tokio::test]
async fn failover_targets_stand_in_by_order_and_step_back() {
    let addresses = loopback::addresses(3);
    let mut listeners = loopback::listen(&addresses);
    let port = listeners[0].local_addr().unwrap().port();
    let scene = Scene::new(1).await;
    let names = ["first.example", "second.example", "third.example"];
    for (name, ip) in names.iter().zip(&addresses) {
        scene.dns.zone([dns::address(name, 60, *ip)]);
    }
    let start = |listener: TcpListener, name: &'static str| {
        let tls = trust::server_with_alpn(&[name], &["http/1.1"]);
        RawOrigin::start(listener, Some(tls), move |arrival| {
            scripts::always(arrival, scripts::ok(name))
        })
    };
    let third = start(listeners.remove(2), names[2]);
    let second = start(listeners.remove(1), names[1]);
    drop(listeners);

    let yaml = scene.yaml(
        "target: first.example\nfailover: [second.example, third.example]\n\
         health: {passive: {failures: 1, eject: 1s, max_eject: 1s}}",
    );
    let yaml = yaml.replace(&format!("port: {}", scene.port), &format!("port: {port}"));
    let proxy = Proxy::start(&yaml).await;
    let address = proxy.address(ALIAS).await;
    until_answered(address, "second.example").await;
    called(&second, "second.example", &format!("second.example:{port}"));
    assert_eq!(third.seen().connections, 0, "the third came before its turn");

    let first = SocketAddr::new(addresses[0], port);
    let first = start(TcpListener::bind(first).await.unwrap(), names[0]);
    until_answered(address, "first.example").await;
    drop((first, second));
    until_answered(address, "third.example").await;
}

#[tokio::test]
async fn a_true_name_that_is_not_allowed_is_refused_from_the_start() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::answer);
    let proxy = Proxy::start(&scene.yaml("allow: [\"*.example.com\"]")).await;
    let answer = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    assert_eq!(answer.status(), 403);
    let problem = answer.json();
    assert_eq!(problem["type"], "urn:truename:error:http_request_denied");
    assert_eq!(problem["stage"], "policy");
    assert_eq!(problem["chain"], json!([ALIAS_IN_DNS, TRUE_NAME]));
    assert!(problem["fix"].as_str().unwrap().contains("add \"httpbin.org\" to `allow`"));
    assert_eq!(origins[0].seen().connections, 0);
}

#[tokio::test]
async fn a_refused_move_keeps_the_last_good_name_and_is_told() {
    let (scene, old, new) = two_targets(&["good.example.com"], scripts::answer).await;
    scene.dns.zone([
        dns::address("good.example.com", 0, scene.addresses[0]),
        dns::cname(ALIAS_IN_DNS, 0, "good.example.com"),
    ]);
    let proxy = Proxy::start(&scene.restless_yaml("allow: [\"*.example.com\"]")).await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);

    point(&scene, OTHER);
    proxy.logged("refused: ").await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    called(&old, "good.example.com", &authority(&scene, "good.example.com"));
    assert_eq!(new.seen().connections, 0);
    let series = "truename_policy_refusals_total{alias=\"webscaler-manual\",reason=\"true_name\"}";
    assert_eq!(proxy.metric(series).await, Some(1.0));
    let target = &proxy.status().await["aliases"][0]["targets"][0];
    assert_eq!(target["refused"], OTHER);
    assert_eq!(target["true_name"], "good.example.com");
}

#[tokio::test]
async fn a_silent_dns_server_delays_no_request() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::answer);
    let proxy = Proxy::start(&scene.restless_yaml("")).await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);

    scene.dns.answer(ALIAS_IN_DNS, Answer::Silence);
    let asked = [RecordType::A, RecordType::AAAA].map(|kind| scene.dns.queries(ALIAS_IN_DNS, kind));
    let asked = asked.iter().sum::<usize>();
    within("a question", scene.dns.wait_for_queries(ALIAS_IN_DNS, asked + 2)).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    // The question that nobody answers is still open: the request did not wait for its end.
    let target = &proxy.status().await["aliases"][0]["targets"][0];
    assert_eq!(target["error"], json!(null));
}

#[tokio::test]
async fn while_dns_fails_the_last_good_answer_serves_for_stale() {
    for failure in [Answer::ServFail, Answer::Refused, Answer::Silence, Answer::Garbage] {
        let mut scene = Scene::new(1).await;
        let _origins = scene.script(scripts::answer);
        let proxy = Proxy::start(&with_dns(&scene, "stale: 3s, nxdomain_hold: 0s")).await;
        let address = proxy.address(ALIAS).await;
        assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);

        scene.dns.answer(ALIAS_IN_DNS, failure.clone());
        let line = proxy.logged("serving the last good answer").await;
        assert_eq!(client::get(address, ALIAS, "/").await.status(), 200, "{failure:?}: {line}");
        until_status(address, 503, 504).await;
        scene.dns.restore(ALIAS_IN_DNS);
        until_status(address, 200, 200).await;
    }
}

#[tokio::test]
async fn a_name_that_was_deleted_serves_for_nxdomain_hold() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::answer);
    let proxy = Proxy::start(&with_dns(&scene, "nxdomain_hold: 2s")).await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);

    scene.dns.remove(ALIAS_IN_DNS);
    proxy.logged("serving the last good answer").await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    let answer = until_status(address, 503, 503).await;
    let problem = answer.json();
    assert!(problem["detail"].as_str().unwrap().contains("NXDOMAIN"), "{problem}");
    // `externalName: 10.0.0.1` looks like this, too.
    assert!(problem["fix"].as_str().unwrap().contains("`target:`"), "{problem}");
}

#[tokio::test]
async fn when_the_true_name_moves_requests_move_and_idle_connections_are_closed() {
    let (scene, old, new) = two_targets(&[TRUE_NAME], scripts::answer).await;
    let proxy = Proxy::start(&scene.restless_yaml("")).await;
    let address = proxy.address(ALIAS).await;
    let mut peer = client::connect(address).await;
    let get = format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n");
    peer.send(&get).await;
    assert_eq!(peer.response().await.status(), 200);
    assert_eq!(old.seen().requests.len(), 1);

    point(&scene, OTHER);
    old.until(|seen| seen.ended == 1).await;
    // The application's own connection goes on, and leads to the new name.
    peer.send(&get).await;
    assert_eq!(peer.response().await.status(), 200);
    assert_eq!(old.seen().requests.len(), 1);
    called(&new, OTHER, &authority(&scene, OTHER));
    let changes = "truename_true_name_changes_total{alias=\"webscaler-manual\"}";
    assert_eq!(proxy.metric(changes).await, Some(1.0));
}

#[tokio::test]
async fn drain_lets_what_is_open_end_in_its_time_and_then_closes_it() {
    let mut open = Open::begin("on_change: drain\ndrain: 3s").await;
    open.move_away().await;
    open.still_flows().await;
    open.is_cut_off().await;
}

#[tokio::test]
async fn close_ends_what_is_open_at_once() {
    let mut open = Open::begin("on_change: close\ndrain: 1h").await;
    open.move_away().await;
    open.is_cut_off().await;
}

#[tokio::test]
async fn keep_leaves_what_is_open_alone() {
    let mut open = Open::begin("on_change: keep\ndrain: 0s").await;
    open.move_away().await;
    open.still_flows().await;
    open.gate.add_permits(1);
    assert_eq!(open.stream.exactly(2).await, b"of");
}

#[tokio::test]
async fn a_rotated_address_keeps_its_open_connections_and_gets_no_new_ones() {
    let mut scene = Scene::new(2).await;
    let gate = Arc::new(Semaphore::new(0));
    let origins = scene.script(gated(gate.clone()));
    scene.dns.zone(scene.addresses.iter().map(|ip| dns::address(TRUE_NAME, 0, *ip)));
    let proxy = Proxy::start(&scene.restless_yaml("")).await;
    let address = proxy.address(ALIAS).await;
    let mut stream = client::connect(address).await;
    stream.send(format!("GET /stream HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    stream.head().await.unwrap();
    assert_eq!(stream.exactly(2).await, b"ha");
    let streams = |origin: &RawOrigin| !origin.seen().requests.is_empty();
    let (left, stays) = match streams(&origins[0]) {
        true => (&origins[0], &origins[1]),
        false => (&origins[1], &origins[0]),
    };

    scene.dns.zone([dns::address(TRUE_NAME, 0, stays.address.ip())]);
    let left_address = left.address.to_string();
    within("the endpoint to retire", async {
        loop {
            let status = proxy.status().await;
            let endpoints = status["aliases"][0]["endpoints"].as_array().unwrap().clone();
            let state = endpoints.iter().find(|endpoint| endpoint["address"] == left_address);
            // It is listed as long as its connection lives.
            if state.expect("the endpoint with an open connection")["state"] == "retiring" {
                return;
            }
        }
    })
    .await;
    for _ in 0..10 {
        assert_eq!(client::get(address, ALIAS, "/").await.text(), "ok");
    }
    assert_eq!(left.seen().connections, 1);
    assert_eq!(stays.seen().requests.len(), 10);
    gate.add_permits(2);
    assert_eq!(stream.exactly(4).await, b"lfof");
    left.until(|seen| seen.ended == 1).await;
    let changes = "truename_true_name_changes_total{alias=\"webscaler-manual\"}";
    assert_eq!(proxy.metric(changes).await, None, "a rotation is no failover");
}

#[tokio::test]
async fn neither_the_hosts_file_nor_a_search_list_is_asked() {
    let mut scene = Scene::new(1).await;
    let origin = serve(&mut scene, &["localhost"], "ok");
    let hosts = std::fs::read_to_string("/etc/hosts").unwrap();
    assert!(hosts.contains("localhost"), "this machine's hosts file has nothing to lead astray");
    scene.dns.zone([dns::address("localhost", 60, scene.addresses[0])]);
    let proxy = Proxy::start(&scene.yaml("target: localhost")).await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 200);
    called(&origin, "localhost", &authority(&scene, "localhost"));

    let proxy = Proxy::start(&scene.yaml("target: nowhere")).await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 503);
    assert!(scene.dns.queries("nowhere", RecordType::A) > 0);
    for longer in ["nowhere.default.svc.cluster.local", "nowhere.svc.cluster.local"] {
        assert_eq!(scene.dns.queries(longer, RecordType::A), 0, "{longer}");
    }
}

#[tokio::test]
async fn an_alias_that_leads_to_the_proxy_itself_is_a_loop_not_a_storm() {
    let own = loopback::listen_anywhere().local_addr().unwrap();
    let scene = Scene::new(1).await;
    scene.dns.zone([dns::address("loop.example", 60, own.ip())]);
    let yaml = |keys: &str| {
        let yaml = scene.yaml(keys).replace("127.0.0.1:0", &own.to_string());
        yaml.replace(&format!("port: {}", scene.port), &format!("port: {}", own.port()))
    };
    for target in [format!("\"{own}\""), "loop.example".to_owned()] {
        // `scene.yaml` allows all of 127.0.0.0/8: that is not meant for the proxy itself.
        let proxy = Proxy::start(&yaml(&format!("target: {target}"))).await;
        let answer = client::get(own, ALIAS, "/").await;
        assert_eq!(answer.status(), 508, "{target}: {}", answer.text());
        let problem = answer.json();
        assert_eq!(problem["type"], "urn:truename:error:proxy_loop_detected");
        assert_eq!(problem["endpoint"], own.to_string());
        let total = "truename_downstream_connections_total{alias=\"webscaler-manual\",\
                     protocol=\"http/1.1\",tls=\"false\"}";
        assert_eq!(proxy.metric(total).await, Some(1.0), "it called itself");
    }
}

#[tokio::test]
async fn an_address_that_policy_denies_is_not_dialled() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::answer);
    let yaml = scene.yaml("").replace("127.0.0.0/8", "10.0.0.0/8");
    let proxy = Proxy::start(&yaml).await;
    let answer = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    assert_eq!(answer.status(), 403);
    let problem = answer.json();
    assert_eq!(problem["type"], "urn:truename:error:destination_ip_prohibited");
    assert_eq!(problem["stage"], "policy");
    let ip = scene.addresses[0].to_string();
    assert!(problem["detail"].as_str().unwrap().contains(&format!("{ip} is a loopback address")));
    assert!(problem["fix"].as_str().unwrap().contains(&format!("add {ip} to `policy.allow_addr")));
    assert_eq!(origins[0].seen().connections, 0);
    let series = "truename_policy_refusals_total{alias=\"webscaler-manual\",reason=\"address\"}";
    assert!(proxy.metric(series).await.unwrap() >= 1.0);
}

/// A streaming response and a WebSocket on the way to a true name that then changes.
struct Open {
    scene: Scene,
    _origins: [RawOrigin; 2],
    proxy: Proxy,
    gate: Arc<Semaphore>,
    stream: Peer,
    tunnel: Peer,
}

impl Open {
    async fn begin(keys: &str) -> Self {
        let gate = Arc::new(Semaphore::new(0));
        let (scene, old, new) = two_targets(&[TRUE_NAME], gated(gate.clone())).await;
        let proxy = Proxy::start(&scene.restless_yaml(keys)).await;
        let address = proxy.address(ALIAS).await;
        let mut stream = client::connect(address).await;
        stream.send(format!("GET /stream HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
        assert!(stream.head().await.unwrap().starts_with("HTTP/1.1 200"));
        assert_eq!(stream.exactly(2).await, b"ha");
        let mut tunnel = client::connect(address).await;
        tunnel
            .send(format!(
                "GET /socket HTTP/1.1\r\nHost: {ALIAS}\r\nConnection: Upgrade\r\n\
                 Upgrade: websocket\r\n\r\n"
            ))
            .await;
        assert!(tunnel.head().await.unwrap().starts_with("HTTP/1.1 101"));
        Self { scene, _origins: [old, new], proxy, gate, stream, tunnel }
    }

    async fn move_away(&self) {
        point(&self.scene, OTHER);
        let [_, new] = &self._origins;
        let address = self.proxy.address(ALIAS).await;
        within("a request to the new name", async {
            while new.seen().requests.is_empty() {
                assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
            }
        })
        .await;
    }

    async fn still_flows(&mut self) {
        self.gate.add_permits(1);
        assert_eq!(self.stream.exactly(2).await, b"lf");
        self.tunnel.send("echo").await;
        assert_eq!(self.tunnel.exactly(4).await, b"echo");
    }

    async fn is_cut_off(&mut self) {
        self.stream.closed().await;
        self.tunnel.closed().await;
    }
}

/// `/stream` is answered with `ha`, then `lf` and `of` as the gate lets it pass; an upgrade echoes.
fn gated(
    gate: Arc<Semaphore>,
) -> impl Fn(Arrival) -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> + Clone {
    move |arrival| {
        let gate = gate.clone();
        Box::pin(async move {
            let Some(mut conversation) = arrival.open().await else { return };
            while let Some(request) = conversation.request().await {
                if request.field("upgrade").is_some() {
                    let head = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\
                                Upgrade: websocket\r\n\r\n";
                    conversation.peer.send(head).await;
                    loop {
                        let bytes = conversation.peer.some().await;
                        if bytes.is_empty() || conversation.peer.try_send(bytes).await.is_err() {
                            return;
                        }
                    }
                }
                if !request.start_line().contains("/stream") {
                    conversation.peer.try_send(scripts::ok("ok")).await.ok();
                    continue;
                }
                let head = "HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nha";
                conversation.peer.send(head).await;
                for part in ["lf", "of"] {
                    gate.acquire().await.unwrap().forget();
                    conversation.peer.try_send(part).await.ok();
                }
            }
        })
    }
}

/// The true name of the scene, as `names`, at its first address and `other.example` at its second.
async fn two_targets<Script, Run>(names: &[&str], script: Script) -> (Scene, RawOrigin, RawOrigin)
where
    Script: Fn(Arrival) -> Run + Clone + Send + Sync + 'static,
    Run: Future<Output = ()> + Send + 'static,
{
    let mut scene = Scene::new(2).await;
    let [one, other] = <[TcpListener; 2]>::try_from(scene.take_listeners()).unwrap();
    let start = |listener, names: &[&str]| {
        let tls = trust::server_with_alpn(names, &["http/1.1"]);
        RawOrigin::start(listener, Some(tls), script.clone())
    };
    scene.dns.zone([
        dns::address(TRUE_NAME, 0, scene.addresses[0]),
        dns::address(OTHER, 0, scene.addresses[1]),
    ]);
    let (old, new) = (start(one, names), start(other, &[OTHER]));
    (scene, old, new)
}

fn point(scene: &Scene, name: &str) {
    scene.dns.zone([dns::cname(ALIAS_IN_DNS, 0, name)]);
}

/// An origin at the scene's one address that proves `names`.
fn serve(scene: &mut Scene, names: &[&str], body: &'static str) -> RawOrigin {
    serve_as(scene, trust::server_with_alpn(names, &["http/1.1"]), body)
}

fn serve_as(scene: &mut Scene, tls: Arc<ServerConfig>, body: &'static str) -> RawOrigin {
    let listener = scene.take_listeners().remove(0);
    RawOrigin::start(listener, Some(tls), move |arrival| {
        scripts::always(arrival, scripts::ok(body))
    })
}

/// The keys of `tls` beside the trust in the tests' authority.
fn tls(keys: &str) -> String {
    format!("tls: {{ca: {{system: false, webpki: false, files: [\"$FOLDER/root.pem\"]}}, {keys}}}")
}

fn with_dns(scene: &Scene, keys: &str) -> String {
    scene.restless_yaml("").replace("namespace: default", &format!("namespace: default, {keys}"))
}

/// The name with the port, which is not the default one here.
fn authority(scene: &Scene, name: &str) -> String {
    format!("{name}:{}", scene.port)
}

/// All the origin's visitors called it by these names, and there were some.
#[track_caller]
fn called(origin: &RawOrigin, server_name: &str, host: &str) {
    let seen = origin.seen();
    assert!(!seen.requests.is_empty() && seen.failed_handshakes == 0, "{seen:?}");
    for name in &seen.server_names {
        assert_eq!(name.as_deref(), Some(server_name));
    }
    for request in &seen.requests {
        assert_eq!(request.field("host"), Some(host));
    }
}

async fn until_answered(address: SocketAddr, text: &str) {
    within(&format!("an answer from {text}"), async {
        loop {
            let answer = client::get(address, ALIAS, "/").await;
            if answer.status() == 200 && answer.text() == text {
                return;
            }
        }
    })
    .await;
}

async fn until_status(address: SocketAddr, low: u16, high: u16) -> Message {
    within(&format!("{low}"), async {
        loop {
            let answer = client::get(address, ALIAS, "/").await;
            if (low..=high).contains(&answer.status()) {
                return answer;
            }
        }
    })
    .await
}
