//! The admin listener: probes, status, commands.

use crate::support::{
    client,
    message::Message,
    proxy::Proxy,
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts,
};
use serde_json::{Value, json};

#[tokio::test]
async fn probes_get_a_response_whatever_the_targets_do() {
    let mut scene = Scene::new(1).await;
    scene.take_listeners();
    let proxy = Proxy::start(&scene.yaml("")).await;
    for target in ["/livez", "/readyz"] {
        assert_eq!(ask(&proxy, "GET", target, "").await.status(), 200, "{target}");
        let head = ask(&proxy, "HEAD", target, "").await;
        assert_eq!((head.status(), head.body.as_slice()), (200, &b""[..]), "{target}");
    }
}

#[tokio::test]
async fn status_tells_where_an_alias_leads_and_how_its_endpoints_are() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::respond);
    let proxy = Proxy::start(&scene.yaml("")).await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 200);

    let status = proxy.status().await;
    assert_eq!(status["version"], "0.1.0");
    let alias = &status["aliases"][0];
    assert_eq!(alias["alias"], ALIAS);
    let target = &alias["targets"][0];
    assert_eq!(target["true_name"], TRUE_NAME);
    assert_eq!(target["port"], scene.port);
    assert_eq!(target["chain"], json!([ALIAS_IN_DNS, TRUE_NAME]));
    assert_eq!(target["ttl_seconds"], 60.0);
    assert!(target["age_seconds"].as_f64().unwrap() < 60.0, "{target}");
    for absent in ["stale_seconds", "error", "refused"] {
        assert_eq!(target[absent], Value::Null, "{absent}");
    }
    let endpoint = &alias["endpoints"][0];
    assert_eq!(endpoint["address"], origins[0].address.to_string());
    assert_eq!(endpoint["state"], "active");
    assert_eq!(endpoint["in_flight"], 0);
    assert_eq!(endpoint["connections_total"], 1);
    assert_eq!(endpoint["connections_active"], 1);
    assert!(endpoint["latency_ms"].as_f64().unwrap() > 0.0, "{endpoint}");
    assert_eq!(alias["connections_idle"], 1);
}

#[tokio::test]
async fn config_shows_every_key_as_it_is_at_work() {
    let mut scene = Scene::new(1).await;
    scene.take_listeners();
    let proxy = Proxy::start(&scene.yaml("drain: 7s")).await;
    let response = ask(&proxy, "GET", "/config", "").await;
    assert_eq!(response.field("content-type"), Some("application/json"));
    let config = response.json();
    assert_eq!(config["aliases"][0]["drain"], "7s");
    assert_eq!(config["aliases"][0]["pool"]["max_idle"], 64);
    assert_eq!(config["dns"]["stale"], "1h");
}

#[tokio::test]
async fn the_log_level_changes_while_it_runs() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let proxy = Proxy::start(&scene.yaml("")).await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(ask(&proxy, "POST", "/log?level=error", "").await.status(), 200);
    assert_eq!(client::get(address, ALIAS, "/silent").await.status(), 200);
    assert_eq!(ask(&proxy, "POST", "/log?level=info", "").await.status(), 200);
    assert_eq!(client::get(address, ALIAS, "/heard").await.status(), 200);
    proxy.logged("/heard").await;
    assert!(!proxy.log().contains("/silent"));

    let response = ask(&proxy, "POST", "/log?level=loud", "").await;
    assert_eq!(response.status(), 400);
    assert!(response.text().contains("error, warn, info, debug or trace"), "{}", response.text());
}

#[tokio::test]
async fn what_changes_something_is_no_get_and_no_browsers() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let proxy = Proxy::start(&scene.yaml("")).await;
    for target in ["/quit", "/reload", "/log?level=error"] {
        let response = ask(&proxy, "GET", target, "").await;
        assert_eq!((response.status(), response.field("allow")), (405, Some("POST")), "{target}");
        let response = ask(&proxy, "POST", target, "Origin: https://evil.example\r\n").await;
        assert_eq!(response.status(), 403, "{target}");
    }
    for target in ["/livez", "/readyz", "/metrics", "/status", "/config"] {
        let response = ask(&proxy, "POST", target, "").await;
        assert_eq!(
            (response.status(), response.field("allow")),
            (405, Some("GET, HEAD")),
            "{target}"
        );
    }
    let response = ask(&proxy, "GET", "/nowhere", "").await;
    assert_eq!(response.status(), 404);
    assert!(response.text().contains("/metrics") && response.text().contains("/reload"));
    // None of it did anything.
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/still").await.status(), 200);
    proxy.logged("/still").await;
}

#[tokio::test]
async fn a_page_of_a_name_rebound_to_loopback_reads_nothing() {
    let mut scene = Scene::new(1).await;
    scene.take_listeners();
    let proxy = Proxy::start(&scene.yaml("")).await;
    for target in ["/metrics", "/status", "/config"] {
        for host in ["attacker.example:9990", "localhost.attacker.example"] {
            let response = client::get(proxy.admin().await, host, target).await;
            assert_eq!(response.status(), 403, "{host} {target}");
            assert!(response.text().contains("DNS rebinding"), "{}", response.text());
        }
        let mut peer = client::connect(proxy.admin().await).await;
        let absolute =
            format!("GET http://attacker.example{target} HTTP/1.1\r\nHost: localhost\r\n\r\n");
        peer.send(absolute).await;
        assert_eq!(peer.response().await.status(), 403, "{target}");
        for host in ["localhost:9990", "127.0.0.1", "[::1]:9990"] {
            assert_eq!(
                client::get(proxy.admin().await, host, target).await.status(),
                200,
                "{host}"
            );
        }
        let mut peer = client::connect(proxy.admin().await).await;
        peer.send(format!("GET {target} HTTP/1.0\r\n\r\n")).await;
        assert_eq!(peer.response().await.status(), 200, "{target}");
    }
}

#[tokio::test]
async fn no_page_of_another_origin_is_obeyed_or_shown_anything() {
    let mut scene = Scene::new(1).await;
    scene.take_listeners();
    let proxy = Proxy::start(&scene.yaml("")).await;
    for target in ["/quit", "/reload", "/log?level=error"] {
        for field in ["Origin: null", "Origin: http://localhost:3000", "Sec-Fetch-Site: cross-site"]
        {
            let response = ask(&proxy, "POST", target, &format!("{field}\r\n")).await;
            assert_eq!(response.status(), 403, "{target} {field}");
        }
    }
    let asks = "Origin: https://evil.example\r\nSec-Fetch-Site: cross-site\r\n";
    for (method, target) in [("GET", "/metrics"), ("GET", "/status"), ("OPTIONS", "/quit")] {
        let response = ask(&proxy, method, target, asks).await;
        let shares = |(name, _): &(&str, &str)| name.starts_with("access-control-");
        assert!(
            !response.fields().iter().any(shares),
            "{method} {target}: {:?}",
            response.fields()
        );
        assert_eq!(response.field("x-content-type-options"), Some("nosniff"), "{method} {target}");
    }
}

#[tokio::test]
async fn idle_connections_do_not_keep_a_probe_from_its_response() {
    let mut scene = Scene::new(1).await;
    scene.take_listeners();
    let proxy = Proxy::start(&scene.yaml("")).await;
    let admin = proxy.admin().await;
    let mut idle = Vec::new();
    for _ in 0..200 {
        idle.push(client::connect(admin).await);
    }
    for target in ["/livez", "/readyz", "/metrics"] {
        assert_eq!(client::get(admin, "localhost", target).await.status(), 200, "{target}");
    }
    // The oldest made room.
    idle.swap_remove(0).closed().await;
    let mut newest = idle.swap_remove(198);
    newest.send("GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert_eq!(newest.response().await.status(), 200);
}

#[tokio::test]
async fn a_head_without_end_is_not_kept() {
    let mut scene = Scene::new(1).await;
    scene.take_listeners();
    let proxy = Proxy::start(&scene.yaml("")).await;
    let mut peer = client::connect(proxy.admin().await).await;
    peer.send(format!("GET /livez HTTP/1.1\r\nHost: localhost\r\nX: {}", "x".repeat(40_000))).await;
    // What was not read of it may turn the refusal into a reset.
    if let Ok(response) = peer.rest().await {
        assert!(response.starts_with(b"HTTP/1.1 431 "), "{}", String::from_utf8_lossy(&response));
    }
}

/// Regression: `nc -N` was given the probes and the metrics, and nothing else; what it asked for was mostly not done.
#[tokio::test]
async fn a_client_that_ends_its_side_behind_its_request_has_its_response() {
    let mut scene = Scene::new(1).await;
    scene.take_listeners();
    let proxy = Proxy::start(&scene.yaml("")).await;
    let gets = ["/livez", "/metrics", "/status", "/config"].map(|target| ("GET", target));
    for (method, target) in gets.into_iter().chain([("POST", "/reload"), ("POST", "/quit")]) {
        let mut peer = client::connect(proxy.admin().await).await;
        peer.send(format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\n\r\n")).await;
        peer.finish().await;
        assert_eq!(peer.response_to(method).await.status(), 200, "{target}");
    }
}

async fn ask(proxy: &Proxy, method: &str, target: &str, fields: &str) -> Message {
    let mut peer = client::connect(proxy.admin().await).await;
    let head = format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\n{fields}");
    peer.send(format!("{head}Content-Length: 0\r\n\r\n")).await;
    peer.response_to(method).await
}
