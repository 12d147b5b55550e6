//! The admin listener: probes, metrics, status.

// Its helpers are part of the tests.
#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};
use support::{
    client, loopback,
    message::Message,
    proxy::Proxy,
    raw_origin::RawOrigin,
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts, trust, within,
};
use truename::demo::dns;

#[tokio::test]
async fn probes_answer_whatever_the_targets_do() {
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
async fn every_metric_is_there_once_and_parses() {
    let mut scene = Scene::new(2).await;
    let tls = trust::server_with_alpn(&[TRUE_NAME, "other.example"], &["http/1.1"]);
    let mut listeners = scene.take_listeners();
    // The second address refuses, which makes for a retry; the first has all the requests.
    listeners.truncate(1);
    let origin = RawOrigin::start(listeners.remove(0), Some(tls), scripts::answer);
    let keys = "allow: [httpbin.org, other.example]\nbalance: round_robin\n";
    let down = format!(
        "  - name: down\n    listen: [\"127.0.0.1:0\"]\n    target: {}\n    retry: {{attempts: 0}}\n",
        refusing()
    );
    let proxy = Proxy::start(&(scene.restless_yaml(keys) + &down)).await;
    let address = proxy.address(ALIAS).await;

    for _ in 0..4 {
        assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    }
    let down = client::get(proxy.address("down").await, "down", "/").await;
    assert_eq!(down.status(), 502);
    scene.dns.zone(scene.addresses.iter().map(|ip| dns::address("other.example", 0, *ip)));
    scene.dns.zone([dns::cname(ALIAS_IN_DNS, 0, "other.example")]);
    proxy.logged("new true name").await;
    scene.dns.zone(scene.addresses.iter().map(|ip| dns::address("evil.example", 0, *ip)));
    scene.dns.zone([dns::cname(ALIAS_IN_DNS, 0, "evil.example")]);
    proxy.logged("refused: ").await;
    assert_eq!(ask(&proxy, "POST", "/reload", "").await.status(), 200);
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);

    let answer = ask(&proxy, "GET", "/metrics", "").await;
    assert_eq!(answer.field("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let metrics = Metrics::parse(answer.text());
    let endpoint = origin.address;
    for (series, value) in [
        (r#"truename_http_requests_total{alias="webscaler-manual",code="200",method="GET"}"#, 5.0),
        (r#"truename_http_request_duration_seconds_count{alias="webscaler-manual"}"#, 5.0),
        (r#"truename_http_requests_in_flight{alias="webscaler-manual"}"#, 0.0),
        (
            r#"truename_downstream_connections_total{alias="webscaler-manual",protocol="http/1.1",tls="false"}"#,
            5.0,
        ),
        (r#"truename_upstream_errors_total{alias="down",error="connection_refused"}"#, 1.0),
        (r#"truename_bytes_total{alias="webscaler-manual",direction="out"}"#, 10.0),
        (r#"truename_bytes_total{alias="webscaler-manual",direction="in"}"#, 0.0),
        (r#"truename_endpoints{alias="down",state="active"}"#, 1.0),
        (r#"truename_true_name_info{alias="webscaler-manual",true_name="other.example"}"#, 1.0),
        (r#"truename_true_name_changes_total{alias="webscaler-manual"}"#, 1.0),
        (r#"truename_policy_refusals_total{alias="webscaler-manual",reason="true_name"}"#, 1.0),
        (r#"truename_config_reloads_total{result="ok"}"#, 1.0),
        (r#"truename_build_info{version="0.1.0"}"#, 1.0),
    ] {
        assert_eq!(metrics.value(series), value, "{series} in\n{}", answer.text());
    }
    for series in [
        r#"truename_downstream_connections_active{alias="webscaler-manual"}"#.to_owned(),
        format!(
            r#"truename_upstream_connections_total{{alias="webscaler-manual",endpoint="{endpoint}"}}"#
        ),
        format!(
            r#"truename_upstream_connections_active{{alias="webscaler-manual",endpoint="{endpoint}"}}"#
        ),
        r#"truename_upstream_connections_idle{alias="webscaler-manual"}"#.to_owned(),
        r#"truename_upstream_connect_duration_seconds_count{alias="webscaler-manual"}"#.to_owned(),
        r#"truename_upstream_tls_handshake_duration_seconds_count{alias="webscaler-manual",resumed="false"}"#
            .to_owned(),
        r#"truename_upstream_tls_handshake_duration_seconds_count{alias="webscaler-manual",resumed="true"}"#
            .to_owned(),
        r#"truename_retries_total{alias="webscaler-manual",reason="connect"}"#.to_owned(),
        r#"truename_endpoints{alias="webscaler-manual",state="ejected"}"#.to_owned(),
        r#"truename_endpoints{alias="webscaler-manual",state="retiring"}"#.to_owned(),
        r#"truename_dns_lookups_total{result="ok"}"#.to_owned(),
        "truename_dns_lookup_duration_seconds_count".to_owned(),
        r#"truename_dns_stale_seconds{alias="webscaler-manual"}"#.to_owned(),
        r#"truename_upstream_certificate_not_after_seconds{alias="webscaler-manual"}"#.to_owned(),
        "process_cpu_seconds_total".to_owned(),
        "process_resident_memory_bytes".to_owned(),
        "process_start_time_seconds".to_owned(),
        "process_open_fds".to_owned(),
        "process_max_fds".to_owned(),
    ] {
        metrics.value(&series);
    }
}

#[tokio::test]
async fn what_left_leaves_the_metrics_too() {
    let mut scene = Scene::new(2).await;
    let _origins = scene.script(scripts::answer);
    let proxy = Proxy::start(&scene.restless_yaml("")).await;
    let [stays, leaves] = [0, 1].map(|n| {
        let endpoint = std::net::SocketAddr::new(scene.addresses[n], scene.port);
        format!("truename_upstream_connections_total{{alias=\"{ALIAS}\",endpoint=\"{endpoint}\"}}")
    });
    let true_name =
        |name: &str| format!("truename_true_name_info{{alias=\"{ALIAS}\",true_name=\"{name}\"}}");
    until(&proxy, &leaves, Option::is_some).await;
    assert_eq!(proxy.metric(&true_name(TRUE_NAME)).await, Some(1.0));

    scene.dns.zone([dns::address("other.example", 0, scene.addresses[0])]);
    scene.dns.zone([dns::cname(ALIAS_IN_DNS, 0, "other.example")]);
    until(&proxy, &leaves, Option::is_none).await;
    assert_eq!(proxy.metric(&stays).await, Some(0.0));
    assert_eq!(proxy.metric(&true_name("other.example")).await, Some(1.0));
    assert_eq!(proxy.metric(&true_name(TRUE_NAME)).await, None);
}

#[tokio::test]
async fn targets_that_share_an_address_do_not_share_a_series_twice() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::answer);
    let port = origins[0].address.port();
    let proxy = Proxy::start(&scene.yaml(&format!("failover: [\"httpbin.org:{port}\"]"))).await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 200);
    // The parser refuses what is there twice.
    let answer = ask(&proxy, "GET", "/metrics", "").await;
    let series = format!("truename_true_name_info{{alias=\"{ALIAS}\",true_name=\"{TRUE_NAME}\"}}");
    assert_eq!(Metrics::parse(answer.text()).value(&series), 1.0);
}

#[tokio::test]
async fn connections_to_a_shared_listener_count_for_the_alias_that_they_ask_for() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::answer);
    let listen = std::net::SocketAddr::new(loopback::address(), scene.port);
    let yaml = scene.yaml("").replace("127.0.0.1:0", &listen.to_string());
    let yaml = yaml
        + &format!("  - name: other\n    listen: [\"{listen}\"]\n    target: \"{}\"\n", refusing());
    let proxy = Proxy::start(&yaml).await;
    let mut peer = client::connect(listen).await;
    for _ in 0..2 {
        peer.send(format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
        assert_eq!(peer.response().await.status(), 200);
    }
    let active =
        |alias: &str| format!("truename_downstream_connections_active{{alias=\"{alias}\"}}");
    assert_eq!(proxy.metric(&active(ALIAS)).await, Some(1.0));
    assert_eq!(proxy.metric(&active("other")).await, Some(0.0));
    drop(peer);
    until(&proxy, &active(ALIAS), |value| *value == Some(0.0)).await;
    // A name that nobody serves is nobody's connection, and no label's value.
    assert_eq!(client::get(listen, "evil.example", "/").await.status(), 404);
    let text = ask(&proxy, "GET", "/metrics", "").await;
    assert!(!text.text().contains("evil.example"));
    let total = Metrics::parse(text.text());
    let family = total.family("truename_downstream_connections_total");
    assert_eq!(family.len(), 1, "{family:?}");
}

#[tokio::test]
async fn status_tells_where_an_alias_leads_and_how_its_endpoints_are() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::answer);
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
    let answer = ask(&proxy, "GET", "/config", "").await;
    assert_eq!(answer.field("content-type"), Some("application/json"));
    let config = answer.json();
    assert_eq!(config["aliases"][0]["drain"], "7s");
    assert_eq!(config["aliases"][0]["pool"]["max_idle"], 64);
    assert_eq!(config["dns"]["stale"], "1h");
}

#[tokio::test]
async fn the_log_level_changes_while_it_runs() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::answer);
    let proxy = Proxy::start(&scene.yaml("")).await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(ask(&proxy, "POST", "/log?level=error", "").await.status(), 200);
    assert_eq!(client::get(address, ALIAS, "/silent").await.status(), 200);
    assert_eq!(ask(&proxy, "POST", "/log?level=info", "").await.status(), 200);
    assert_eq!(client::get(address, ALIAS, "/heard").await.status(), 200);
    proxy.logged("/heard").await;
    assert!(!proxy.log().contains("/silent"));

    let answer = ask(&proxy, "POST", "/log?level=loud", "").await;
    assert_eq!(answer.status(), 400);
    assert!(answer.text().contains("error, warn, info, debug, trace"), "{}", answer.text());
}

#[tokio::test]
async fn what_changes_something_is_no_get_and_no_browsers() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::answer);
    let proxy = Proxy::start(&scene.yaml("")).await;
    for target in ["/quit", "/reload", "/log?level=error"] {
        let answer = ask(&proxy, "GET", target, "").await;
        assert_eq!((answer.status(), answer.field("allow")), (405, Some("POST")), "{target}");
        let answer = ask(&proxy, "POST", target, "Origin: https://evil.example\r\n").await;
        assert_eq!(answer.status(), 403, "{target}");
    }
    for target in ["/livez", "/readyz", "/metrics", "/status", "/config"] {
        let answer = ask(&proxy, "POST", target, "").await;
        assert_eq!((answer.status(), answer.field("allow")), (405, Some("GET, HEAD")), "{target}");
    }
    let answer = ask(&proxy, "GET", "/nowhere", "").await;
    assert_eq!(answer.status(), 404);
    assert!(answer.text().contains("/metrics") && answer.text().contains("/reload"));
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
            let answer = client::get(proxy.admin().await, host, target).await;
            assert_eq!(answer.status(), 403, "{host} {target}");
            assert!(answer.text().contains("rebound"), "{}", answer.text());
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
            let answer = ask(&proxy, "POST", target, &format!("{field}\r\n")).await;
            assert_eq!(answer.status(), 403, "{target} {field}");
        }
    }
    let asks = "Origin: https://evil.example\r\nSec-Fetch-Site: cross-site\r\n";
    for (method, target) in [("GET", "/metrics"), ("GET", "/status"), ("OPTIONS", "/quit")] {
        let answer = ask(&proxy, method, target, asks).await;
        let shares = |(name, _): &(&str, &str)| name.starts_with("access-control-");
        assert!(!answer.fields().iter().any(shares), "{method} {target}: {:?}", answer.fields());
        assert_eq!(answer.field("x-content-type-options"), Some("nosniff"), "{method} {target}");
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

/// An endpoint at which nobody listens.
fn refusing() -> std::net::SocketAddr {
    loopback::listen_anywhere().local_addr().unwrap()
}

async fn ask(proxy: &Proxy, method: &str, target: &str, fields: &str) -> Message {
    let mut peer = client::connect(proxy.admin().await).await;
    let head = format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\n{fields}");
    peer.send(format!("{head}Content-Length: 0\r\n\r\n")).await;
    peer.response_to(method).await
}

async fn until(proxy: &Proxy, series: &str, wished: impl Fn(&Option<f64>) -> bool) {
    within(series, async {
        while !wished(&proxy.metric(series).await) {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// Prometheus' text format, read by the letter: a family has one HELP, one TYPE and then all of its
/// series, and no series is there twice.
struct Metrics {
    /// By family; of each series its labels in order.
    families: BTreeMap<String, BTreeMap<String, f64>>,
}

impl Metrics {
    fn parse(text: &str) -> Self {
        let mut families: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
        let (mut helped, mut open) = (BTreeSet::new(), None::<(String, String)>);
        for line in text.lines().filter(|line| !line.is_empty()) {
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, help) = rest.split_once(' ').unwrap();
                assert!(!help.is_empty() && helped.insert(name.to_owned()), "{line}");
                open = None;
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
                assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
                assert!(families.insert(name.to_owned(), BTreeMap::new()).is_none(), "{line}");
                open = Some((name.to_owned(), kind.to_owned()));
            } else {
                let (series, value) = series(line);
                let (family, kind) = open.as_ref().unwrap_or_else(|| panic!("no TYPE: {line}"));
                let name = series.split('{').next().unwrap();
                let suffix = name.strip_prefix(family.as_str()).unwrap_or_else(|| panic!("{line}"));
                let suffixes: &[_] =
                    if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
                assert!(suffixes.contains(&suffix), "{line} in {family}");
                let series_of = families.get_mut(family).unwrap();
                assert!(series_of.insert(series, value).is_none(), "twice: {line}");
            }
        }
        let unhelped: Vec<_> = families.keys().filter(|name| !helped.contains(*name)).collect();
        assert!(unhelped.is_empty(), "no HELP: {unhelped:?}");
        Self { families }
    }

    fn family(&self, name: &str) -> &BTreeMap<String, f64> {
        &self.families[name]
    }

    /// `name{a="1",b="2"}`, labels in order of their names.
    #[track_caller]
    fn value(&self, series: &str) -> f64 {
        let mut all = self.families.values().filter_map(|family| family.get(series));
        *all.next().unwrap_or_else(|| panic!("{series} is not there"))
    }
}

/// Name with sorted labels, and value.
fn series(line: &str) -> (String, f64) {
    let (series, value) = line.rsplit_once(' ').unwrap();
    let value = value.parse().unwrap_or_else(|_| panic!("no number: {line}"));
    let Some((name, labels)) = series.split_once('{') else {
        return (series.to_owned(), value);
    };
    assert!(name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'), "{line}");
    let labels = labels.strip_suffix('}').unwrap_or_else(|| panic!("{line}"));
    // No label of ours has a comma or a quote in its value.
    let mut labels: Vec<&str> = labels.split(',').collect();
    for label in &labels {
        let (key, value) = label.split_once("=\"").unwrap_or_else(|| panic!("{line}"));
        assert!(key.bytes().all(|b| b.is_ascii_lowercase() || b == b'_'), "{line}");
        assert!(value.strip_suffix('"').is_some_and(|v| !v.contains(['"', '\\'])), "{line}");
    }
    labels.sort_unstable();
    assert!(labels.windows(2).all(|pair| pair[0] != pair[1]), "{line}");
    (format!("{name}{{{}}}", labels.join(",")), value)
}
