//! What happens when an alias comes to lead elsewhere, or nobody can say where it leads.

use std::{net::SocketAddr, sync::Arc};

use crate::support::{
    client, loopback,
    message::Message,
    peer::Peer,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts, trust, within,
};
use serde_json::json;
use tokio::{net::TcpListener, sync::Semaphore};
use truename::demo::dns::{self, DnsResponse, RecordType};

const OTHER: &str = "other.example";

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
    until_response(address, "second.example").await;
    second.assert_called("second.example", &format!("second.example:{port}"));
    assert_eq!(third.seen().connections, 0, "the third came before its turn");

    let first = SocketAddr::new(addresses[0], port);
    let first = start(TcpListener::bind(first).await.unwrap(), names[0]);
    until_response(address, "first.example").await;
    drop((first, second));
    until_response(address, "third.example").await;
}

#[tokio::test]
async fn a_refused_move_keeps_the_last_good_name_and_is_told() {
    let (scene, old, new) = two_targets(&["good.example.com"], scripts::respond).await;
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
    old.assert_called("good.example.com", &scene.authority("good.example.com"));
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
    let _origins = scene.script(scripts::respond);
    let proxy = Proxy::start(&scene.restless_yaml("")).await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);

    scene.dns.respond(ALIAS_IN_DNS, DnsResponse::Silence);
    let asked = [RecordType::A, RecordType::AAAA].map(|kind| scene.dns.queries(ALIAS_IN_DNS, kind));
    let asked = asked.iter().sum::<usize>();
    within("a question", scene.dns.wait_for_queries(ALIAS_IN_DNS, asked + 2)).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    // The query without a response is still open: the request did not wait for its end.
    let target = &proxy.status().await["aliases"][0]["targets"][0];
    assert_eq!(target["error"], json!(null));
}

#[tokio::test]
async fn while_dns_fails_the_last_good_answer_serves_for_stale() {
    async fn serves(failure: DnsResponse, name: &str) {
        let mut scene = Scene::new(1).await;
        let _origins = scene.script(scripts::respond);
        let proxy = Proxy::start(&with_dns(&scene, "stale: 3s, nxdomain_hold: 0s")).await;
        let address = proxy.address(ALIAS).await;
        assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);

        scene.dns.respond(name, failure.clone());
        if name == TRUE_NAME {
            // What CoreDNS makes of all of them: NOERROR, and the CNAME alone.
            let alone = dns::cname(ALIAS_IN_DNS, 0, TRUE_NAME);
            scene.dns.respond(ALIAS_IN_DNS, DnsResponse::Records(vec![alone]));
        }
        proxy.logged("serving the last good answer").await;
        assert_eq!(client::get(address, ALIAS, "/").await.status(), 200, "{failure:?}");
        until_status(address, [503, 504]).await;
        scene.dns.restore(ALIAS_IN_DNS);
        until_status(address, [200, 200]).await;
    }
    tokio::join!(
        serves(DnsResponse::ServFail, ALIAS_IN_DNS),
        serves(DnsResponse::Refused, ALIAS_IN_DNS),
        serves(DnsResponse::Silence, ALIAS_IN_DNS),
        serves(DnsResponse::Garbage, ALIAS_IN_DNS),
        serves(DnsResponse::ServFail, TRUE_NAME),
        serves(DnsResponse::Silence, TRUE_NAME),
    );
}

#[tokio::test]
async fn a_name_that_was_deleted_serves_for_nxdomain_hold() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let proxy = Proxy::start(&with_dns(&scene, "nxdomain_hold: 2s")).await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);

    scene.dns.remove(ALIAS_IN_DNS);
    proxy.logged("serving the last good answer").await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    let response = until_status(address, [503, 503]).await;
    let problem = response.json();
    assert!(problem["detail"].as_str().unwrap().contains("NXDOMAIN"), "{problem}");
    // `externalName: 10.0.0.1` looks like this, too.
    assert!(problem["fix"].as_str().unwrap().contains("`target:`"), "{problem}");
}

#[tokio::test]
async fn a_name_that_comes_to_lead_nowhere_serves_for_nxdomain_hold() {
    async fn serves(gone: &str, denial: DnsResponse, told: &str) {
        let mut scene = Scene::new(1).await;
        let _origins = scene.script(scripts::respond);
        let proxy = Proxy::start(&with_dns(&scene, "nxdomain_hold: 2s")).await;
        let address = proxy.address(ALIAS).await;
        assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);

        scene.dns.respond(gone, denial);
        if gone == TRUE_NAME {
            let alone = dns::cname(ALIAS_IN_DNS, 0, TRUE_NAME);
            scene.dns.respond(ALIAS_IN_DNS, DnsResponse::Records(vec![alone]));
        }
        proxy.logged("serving the last good answer").await;
        assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
        let problem = until_status(address, [503, 503]).await;
        assert!(problem.text().contains(told), "{}", problem.text());
    }
    tokio::join!(
        serves(
            ALIAS_IN_DNS,
            DnsResponse::NoData { soa: true },
            "the Service exists but leads nowhere"
        ),
        serves(
            TRUE_NAME,
            DnsResponse::NoData { soa: true },
            "has no address for httpbin.org (NODATA)"
        ),
        serves(TRUE_NAME, DnsResponse::NxDomain, "httpbin.org does not exist (NXDOMAIN)"),
    );
}

#[tokio::test]
async fn when_the_true_name_moves_requests_move_and_idle_connections_are_closed() {
    let (scene, old, new) = two_targets(&[TRUE_NAME], scripts::respond).await;
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
    new.assert_called(OTHER, &scene.authority(OTHER));
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
async fn what_is_open_ends_as_on_change_says_also_where_the_name_was_gone_before_it_moved() {
    let mut open = Open::begin_with("on_change: close\ndrain: 1h", "nxdomain_hold: 250ms").await;
    let address = open.proxy.address(ALIAS).await;
    open.scene.dns.respond(ALIAS_IN_DNS, DnsResponse::NxDomain);
    until_status(address, [503, 503]).await;
    open.still_flows().await;
    point(&open.scene, OTHER);
    open.scene.dns.restore(ALIAS_IN_DNS);
    until_status(address, [200, 200]).await;
    open.is_cut_off().await;
}

/// Regression: what was open to a target that a reload took away went on for ever.
#[tokio::test]
async fn what_is_open_to_a_target_that_a_reload_takes_away_ends_as_on_change_says() {
    async fn ends(on_change: &str, after: impl Fn(&str) -> String) {
        let mut open = Open::begin(on_change).await;
        open.proxy.rewrite(&after(&open.yaml));
        open.proxy.reload().await;
        if on_change.contains("close") {
            return open.is_cut_off().await;
        }
        open.still_flows().await;
        if !on_change.contains("keep") {
            open.is_cut_off().await;
        }
    }
    let moved = |yaml: &str| yaml.to_owned() + "    target: other.example\n";
    let gone = |yaml: &str| yaml.replace(&format!("name: {ALIAS}"), "name: another");
    for on_change in ["on_change: close", "on_change: drain\ndrain: 3s", "on_change: keep"] {
        tokio::join!(ends(on_change, moved), ends(on_change, gone));
    }
}

#[tokio::test]
async fn a_reload_that_forbids_the_true_name_ends_what_is_open_to_it_as_on_change_says() {
    let mut open = Open::begin("on_change: close").await;
    open.proxy.rewrite(&(open.yaml.clone() + "    allow: [\"*.elsewhere.example\"]\n"));
    open.proxy.reload().await;
    open.is_cut_off().await;
    let address = open.proxy.address(ALIAS).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 403);
    let series = "truename_policy_refusals_total{alias=\"webscaler-manual\",reason=\"true_name\"}";
    assert_eq!(open.proxy.metric(series).await, Some(1.0));
}

/// Regression: what was open went on for ever where DNS had failed for too long before.
#[tokio::test]
async fn a_true_name_that_is_forbidden_while_it_is_gone_ends_what_is_open_once_it_is_back() {
    let mut open = Open::begin_with("on_change: close\ndrain: 1h", "nxdomain_hold: 250ms").await;
    let address = open.proxy.address(ALIAS).await;
    open.scene.dns.respond(ALIAS_IN_DNS, DnsResponse::NxDomain);
    until_status(address, [503, 503]).await;
    open.still_flows().await;
    open.proxy.rewrite(&(open.yaml.clone() + "    allow: [\"*.elsewhere.example\"]\n"));
    open.proxy.reload().await;
    open.scene.dns.restore(ALIAS_IN_DNS);
    until_status(address, [403, 403]).await;
    open.is_cut_off().await;
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
    assert_eq!(proxy.metric(changes).await, Some(0.0), "a rotation is no failover");
}

#[tokio::test]
async fn a_request_that_a_change_cuts_off_is_told_that_the_alias_leads_elsewhere() {
    let (scene, old, new) = two_targets(&[TRUE_NAME], scripts::never_respond).await;
    let proxy = Proxy::start(&scene.restless_yaml("on_change: close")).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    peer.send(format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\nContent-Length: 1\r\n\r\n1")).await;
    old.until(|seen| !seen.requests.is_empty()).await;
    point(&scene, OTHER);
    let response = peer.response().await;
    assert_eq!(response.status(), 502, "{}", response.text());
    let problem = response.json();
    assert_eq!(problem["type"], "urn:truename:error:connection_terminated", "{problem}");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("no longer leads to") && detail.contains(TRUE_NAME), "{detail}");
    assert!(problem["fix"].as_str().unwrap().contains("`on_change`"), "{problem}");
    // It was taken, and may have had its effect: nobody gets it a second time.
    assert!(new.seen().requests.is_empty());
}

/// A streaming response and a WebSocket on the way to a true name that then changes.
struct Open {
    scene: Scene,
    _origins: [RawOrigin; 2],
    proxy: Proxy,
    yaml: String,
    gate: Arc<Semaphore>,
    stream: Peer,
    tunnel: Peer,
}

impl Open {
    async fn begin(keys: &str) -> Self {
        Self::begin_with(keys, "stale: 1h").await
    }

    async fn begin_with(keys: &str, dns: &str) -> Self {
        let gate = Arc::new(Semaphore::new(0));
        let (scene, old, new) = two_targets(&[TRUE_NAME], gated(gate.clone())).await;
        let dns = format!("namespace: default, {dns}");
        let yaml = scene.restless_yaml(keys).replace("namespace: default", &dns);
        let yaml = format!("admin: {{listen: \"127.0.0.1:0\"}}\n{yaml}");
        let proxy = Proxy::start(&yaml).await;
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
        Self { scene, _origins: [old, new], proxy, yaml, gate, stream, tunnel }
    }

    async fn move_away(&self) {
        point(&self.scene, OTHER);
        let [_, new] = &self._origins;
        let address = self.proxy.address(ALIAS).await;
        within("a request to the new name", async {
            while new.seen().requests.is_empty() {
                let response = client::get(address, ALIAS, "/").await;
                // One that was on the old connection when it was closed is no fault of its client's.
                assert!([200, 502].contains(&response.status()), "{response:?}");
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

/// `/stream` returns `ha`, then `lf` and `of` as the gate lets it pass; an upgrade echoes.
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

fn with_dns(scene: &Scene, keys: &str) -> String {
    scene.restless_yaml("").replace("namespace: default", &format!("namespace: default, {keys}"))
}

async fn until_response(address: SocketAddr, text: &str) {
    within(&format!("a response from {text}"), async {
        loop {
            let response = client::get(address, ALIAS, "/").await;
            if response.status() == 200 && response.text() == text {
                return;
            }
        }
    })
    .await;
}

async fn until_status(address: SocketAddr, wished: [u16; 2]) -> Message {
    within(&format!("one of {wished:?}"), async {
        loop {
            let response = client::get(address, ALIAS, "/").await;
            if wished.contains(&response.status()) {
                return response;
            }
        }
    })
    .await
}
