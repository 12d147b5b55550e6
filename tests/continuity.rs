//! What a reload leaves as it was: all that was learned of targets that remain.

use std::net::SocketAddr;

use crate::support::{
    client,
    proxy::{Proxy, with_admin},
    raw_origin::RawOrigin,
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts, trust, within,
};
use serde_json::Value;
use truename::demo::dns::DnsResponse;

/// Regression: a changed key of an alias, or any of `dns`, turned stale service into 503.
#[tokio::test]
async fn a_reload_while_dns_fails_leaves_the_last_good_answer_in_service() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let yaml = |keys: &str| with_admin(&scene.restless_yaml(keys));
    let (proxy, address) = stale(&scene, &yaml("")).await;

    let root = "ca: {system: false, webpki: false, files: [\"$FOLDER/root.pem\"]}";
    let further = "  - name: another\n    listen: [\"127.0.0.1:0\"]\n    target: another.example\n";
    for after in [
        yaml("hosts: [new.example]"),
        yaml(&format!("tls: {{min_version: \"1.3\", {root}}}")),
        yaml("allow: [httpbin.org]"),
        yaml("").replace("namespace: default", "namespace: default, stale: 2h"),
        yaml("").replace("aliases:\n", &format!("aliases:\n{further}")),
    ] {
        proxy.rewrite(&after);
        proxy.reload().await;
        let response = client::get(address, ALIAS, "/").await;
        assert_eq!(response.status(), 200, "{after}\n{response:?}");
        let status = proxy.status().await;
        let aliases = status["aliases"].as_array().unwrap();
        let alias = aliases.iter().find(|alias| alias["alias"] == ALIAS).unwrap();
        assert!(alias["targets"][0]["stale_seconds"].as_f64().unwrap() > 0.0, "{alias}");
    }
}

#[tokio::test]
async fn an_alias_at_another_port_or_of_another_name_is_served_from_what_dns_has_said_of_its_target()
 {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let yaml = |alias: &str, keys: &str| {
        let yaml = scene.restless_yaml(&format!("{keys}\ntarget: httpbin.org:{}", scene.port));
        with_admin(&yaml.replace(ALIAS, alias))
    };
    let other_port = format!("port: {}", scene.port);
    let proxy = Proxy::start(&yaml(ALIAS, "").replace(&other_port, "port: 9")).await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    scene.dns.respond("httpbin.org", DnsResponse::ServFail);
    proxy.logged("serving the last good answer").await;

    proxy.rewrite(&yaml("renamed", ""));
    proxy.reload().await;
    let address = proxy.address("renamed").await;
    assert_eq!(client::get(address, "renamed", "/").await.status(), 200);
    let elsewhere = format!("httpbin.org:{}", scene.port);
    let moved = yaml("renamed", "").replace(&elsewhere, "httpbin.org:9");
    proxy.rewrite(&moved);
    proxy.reload().await;
    // Nobody is there; but where that is, is known.
    assert_eq!(client::get(address, "renamed", "/").await.status(), 502);
}

/// Regression: an endpoint that does not respond was tried anew after each reload.
#[tokio::test]
async fn a_reload_leaves_ejected_endpoints_ejected_and_latencies_known() {
    let mut scene = Scene::new(2).await;
    let mut listeners = scene.take_listeners();
    drop(listeners.pop());
    let tls = trust::server_with_alpn(&[TRUE_NAME], &["http/1.1"]);
    let _origin = RawOrigin::start(listeners.remove(0), Some(tls), scripts::respond);
    let keys = "health: {passive: {failures: 1, eject: 1h, max_eject: 1h}}";
    let yaml = |further: &str| with_admin(&scene.restless_yaml(&format!("{keys}\n{further}")));
    let proxy = Proxy::start(&yaml("")).await;
    let address = proxy.address(ALIAS).await;
    let ejected = |endpoints: &[Value]| {
        endpoints.iter().filter(|endpoint| endpoint["state"] == "ejected").count()
    };
    within("an ejection", async {
        while ejected(&endpoints(&proxy).await) == 0 {
            assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
        }
    })
    .await;

    let root = "ca: {system: false, webpki: false, files: [\"$FOLDER/root.pem\"]}";
    for further in [
        "hosts: [new.example]",
        &format!("tls: {{min_version: \"1.3\", {root}}}"),
        "balance: least_request",
        "pool: {max_connections: 5}",
    ] {
        proxy.rewrite(&yaml(further));
        proxy.reload().await;
        let endpoints = endpoints(&proxy).await;
        assert_eq!(ejected(&endpoints), 1, "{further}: {endpoints:?}");
        let known = endpoints.iter().any(|endpoint| endpoint["latency_ms"].is_number());
        assert!(known, "{further}: {endpoints:?}");
        assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    }
}

/// What TLS failed at may be just what the new settings are about.
#[tokio::test]
async fn endpoints_that_tls_failed_at_are_tried_anew_once_tls_is_changed() {
    let mut scene = Scene::new(3).await;
    let _origins = scene.script(scripts::respond);
    let passive = "health: {passive: {failures: 1, eject: 1h, max_eject: 1h}}";
    let yaml = |files: &str| {
        let ca = format!("tls: {{ca: {{system: false, webpki: true, files: [{files}]}}}}");
        with_admin(&scene.restless_yaml(&format!("{passive}\n{ca}")))
    };
    let proxy = Proxy::start(&yaml("")).await;
    let address = proxy.address(ALIAS).await;
    let states = async || {
        let endpoints = endpoints(&proxy).await;
        endpoints.iter().map(|endpoint| endpoint["state"].clone()).collect::<Vec<_>>()
    };
    within("two ejections", async {
        while states().await.iter().filter(|state| *state == "ejected").count() < 2 {
            assert_eq!(client::get(address, ALIAS, "/").await.status(), 502);
        }
    })
    .await;

    proxy.rewrite(&yaml("\"$FOLDER/root.pem\""));
    proxy.reload().await;
    assert_eq!(states().await, ["active", "active", "active"]);
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
}

/// Regression: the requests in flight before a reload did not count after it.
#[tokio::test]
async fn a_limit_counts_what_was_in_flight_before_a_reload() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::never_respond);
    let yaml = |requests: usize| {
        with_admin(&scene.restless_yaml(&format!("limits: {{requests: {requests}}}")))
    };
    let proxy = Proxy::start(&yaml(3)).await;
    let address = proxy.address(ALIAS).await;
    let get = format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n");
    let mut peers = Vec::new();
    for count in 1..=2 {
        let mut peer = client::connect(address).await;
        peer.send(&get).await;
        origins[0].until(|seen| seen.requests.len() == count).await;
        peers.push(peer);
    }
    for (limit, refused) in [(2, true), (1, true), (3, false)] {
        proxy.rewrite(&yaml(limit));
        proxy.reload().await;
        let mut peer = client::connect(address).await;
        peer.send(&get).await;
        if refused {
            assert_eq!(peer.response().await.status(), 503, "{limit}");
        } else {
            origins[0].until(|seen| seen.requests.len() == 3).await;
        }
    }
}

/// Regression: what DNS had said was lost with an alias that a reload brought while DNS was asked, and so requests
/// had 503 after the next reload.
#[tokio::test]
async fn reloads_in_a_row_while_dns_fails_leave_the_last_good_answer_in_service() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let here = format!("target: httpbin.org:{}", scene.port);
    let yaml = |aliases: &[&str]| {
        let listed = aliases.iter().map(|alias| {
            let alone = scene.restless_yaml(&here).replace(ALIAS, alias);
            alone.split_once("aliases:\n").unwrap().1.to_owned()
        });
        let listed: String = listed.collect();
        let whole = scene.restless_yaml(&here);
        with_admin(&format!("{}aliases:\n{listed}", whole.split_once("aliases:\n").unwrap().0))
    };
    for (before, between, after) in [
        (["one", "two"].as_slice(), ["new"].as_slice(), "newer"),
        (&["one", "two"], &["one"], "new"),
        (&["one", "two"], &["two"], "new"),
    ] {
        let proxy = Proxy::start(&yaml(before)).await;
        for alias in before {
            let address = proxy.address(alias).await;
            assert_eq!(client::get(address, alias, "/").await.status(), 200);
        }
        scene.dns.respond("httpbin.org", DnsResponse::Silence);
        proxy.rewrite(&yaml(between));
        proxy.reload().await;
        proxy.rewrite(&yaml(&[after]));
        proxy.reload().await;
        let address = proxy.address(after).await;
        assert_eq!(client::get(address, after, "/").await.status(), 200, "{between:?}");
        scene.dns.restore("httpbin.org");
    }
}

/// Regression: whoever took back a wrong `allow` had 503 until DNS was there again.
#[tokio::test]
async fn an_allow_that_is_taken_back_while_dns_fails_leaves_the_last_good_answer_in_service() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let yaml = |keys: &str| with_admin(&scene.restless_yaml(keys));
    let (proxy, address) = stale(&scene, &yaml("")).await;

    proxy.rewrite(&yaml("allow: [elsewhere.example]"));
    proxy.reload().await;
    assert_ne!(client::get(address, ALIAS, "/").await.status(), 200);
    proxy.rewrite(&yaml(""));
    proxy.reload().await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
}

/// Regression: it waited on, and had 503.
#[tokio::test]
async fn a_request_that_waits_for_a_connection_gets_one_once_there_is_no_limit_to_them() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::never_respond);
    let yaml = |most: usize| {
        let keys = format!("pool: {{max_connections: {most}}}\ntimeouts: {{connect: 5m}}");
        with_admin(&scene.restless_yaml(&keys))
    };
    let proxy = Proxy::start(&yaml(1)).await;
    let address = proxy.address(ALIAS).await;
    let mut peers = Vec::new();
    for _ in 0..2 {
        let mut peer = client::connect(address).await;
        peer.send(format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
        peers.push(peer);
    }
    origins[0].until(|seen| seen.requests.len() == 1).await;
    let in_flight = format!("truename_http_requests_in_flight{{alias=\"{ALIAS}\"}}");
    within("two requests", async {
        while proxy.metric(&in_flight).await != Some(2.0) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    proxy.rewrite(&yaml(0));
    proxy.reload().await;
    origins[0].until(|seen| seen.requests.len() == 2).await;
}

async fn endpoints(proxy: &Proxy) -> Vec<Value> {
    proxy.status().await["aliases"][0]["endpoints"].as_array().unwrap().clone()
}

/// A proxy that serves the alias from the last good answer, while the cluster's DNS fails; and its address.
async fn stale(scene: &Scene, yaml: &str) -> (Proxy, SocketAddr) {
    let proxy = Proxy::start(yaml).await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    scene.dns.respond(ALIAS_IN_DNS, DnsResponse::ServFail);
    proxy.logged("serving the last good answer").await;
    (proxy, address)
}
