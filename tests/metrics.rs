//! `/metrics`: which series there are, and what moves them.

use std::collections::{BTreeMap, BTreeSet};

use crate::support::{
    client, loopback,
    message::Message,
    peer::Peer,
    proxy::{Proxy, with_admin},
    raw_origin::RawOrigin,
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts, trust, within,
};
use truename::{
    demo::dns::{self, DnsResponse, RecordType},
    fault::ProxyErrorType,
};

#[tokio::test]
async fn every_metric_is_there_once_and_parses() {
    let mut scene = Scene::new(2).await;
    let tls = trust::server_with_alpn(&[TRUE_NAME, "other.example"], &["http/1.1"]);
    let mut listeners = scene.take_listeners();
    // The second address refuses, which makes for a retry; the first has all the requests.
    listeners.truncate(1);
    let origin = RawOrigin::start(listeners.remove(0), Some(tls), scripts::respond);
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

    let response = ask(&proxy, "GET", "/metrics", "").await;
    assert_eq!(response.field("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let metrics = Metrics::parse(response.text());
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
        assert_eq!(metrics.value(series), value, "{series} in\n{}", response.text());
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
    let _origins = scene.script(scripts::respond);
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
    let origins = scene.script(scripts::respond);
    let port = origins[0].address.port();
    let proxy = Proxy::start(&scene.yaml(&format!("failover: [\"httpbin.org:{port}\"]"))).await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 200);
    // The parser refuses what is there twice.
    let response = ask(&proxy, "GET", "/metrics", "").await;
    let series = format!("truename_true_name_info{{alias=\"{ALIAS}\",true_name=\"{TRUE_NAME}\"}}");
    assert_eq!(Metrics::parse(response.text()).value(&series), 1.0);
}

#[tokio::test]
async fn connections_to_a_shared_listener_count_for_the_alias_that_they_ask_for() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
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
    let counted: Vec<_> = family.iter().filter(|(_, count)| **count > 0.0).collect();
    let series = |alias: &str| {
        format!(
            "truename_downstream_connections_total{{alias=\"{alias}\",protocol=\"http/1.1\",tls=\"false\"}}"
        )
    };
    assert_eq!(counted, [(&series(""), &1.0), (&series(ALIAS), &1.0)]);
}

#[tokio::test]
async fn every_counter_of_an_alias_begins_at_0() {
    let mut scene = Scene::new(1).await;
    scene.take_listeners();
    let proxy = Proxy::start(&scene.yaml("retry: {attempts: 0}")).await;
    let metrics = scrape(&proxy).await;
    let labels = [
        ("truename_upstream_errors_total", ProxyErrorType::ALL.len()),
        ("truename_retries_total", 4),
        ("truename_bytes_total", 2),
        ("truename_policy_refusals_total", 2),
        ("truename_true_name_changes_total", 1),
        ("truename_downstream_connections_total", 6),
        // Fifteen buckets, sum and count.
        ("truename_http_request_duration_seconds", 17),
        ("truename_upstream_connect_duration_seconds", 17),
        ("truename_upstream_tls_handshake_duration_seconds", 34),
    ];
    for (family, count) in labels {
        let own: Vec<_> = metrics.of(family, ALIAS).collect();
        assert_eq!(own.len(), count, "{family}: {own:?}");
        assert!(own.iter().all(|(_, value)| *value == 0.0), "{family}: {own:?}");
    }
    for result in ["ok", "error"] {
        let reloads = format!("truename_config_reloads_total{{result=\"{result}\"}}");
        assert_eq!(metrics.value(&reloads), 0.0);
    }
    metrics.value("truename_dns_lookups_total{result=\"servfail\"}");

    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 502);
    let metrics = scrape(&proxy).await;
    let errors: Vec<_> =
        metrics.of("truename_upstream_errors_total", ALIAS).filter(|(_, n)| *n > 0.0).collect();
    let refused =
        format!("truename_upstream_errors_total{{alias=\"{ALIAS}\",error=\"connection_refused\"}}");
    assert_eq!(errors, [(refused.as_str(), 1.0)]);
}

/// Regression: a question that was given up, as the other family's addresses had come, was never counted.
#[tokio::test]
async fn a_server_that_is_silent_about_one_family_shows_in_the_lookups() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    for name in [ALIAS_IN_DNS, TRUE_NAME] {
        scene.dns.respond_to_type(name, RecordType::AAAA, DnsResponse::Silence);
    }
    let proxy = Proxy::start(&scene.yaml("")).await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    let timeouts = "truename_dns_lookups_total{result=\"timeout\"}";
    until(&proxy, timeouts, |count| *count >= Some(1.0)).await;
}

#[tokio::test]
async fn a_removed_alias_takes_its_series_along_and_begins_at_0_when_it_comes_back() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let one = scene.yaml("");
    let origin = RawOrigin::start(loopback::listen_anywhere(), None, scripts::respond);
    let other = format!(
        "  - name: other\n    listen: [\"127.0.0.1:0\"]\n    target: \"{}\"\n    \
         tls: {{mode: plaintext}}\n",
        origin.address
    );
    let both = with_admin(&(one.clone() + &other));
    let proxy = Proxy::start(&both).await;
    assert_eq!(client::get(proxy.address("other").await, "other", "/").await.status(), 200);
    let bytes = "truename_bytes_total{alias=\"other\",direction=\"out\"}";
    until(&proxy, bytes, |value| *value == Some(2.0)).await;

    reload(&proxy, &with_admin(&one)).await;
    let text = ask(&proxy, "GET", "/metrics", "").await;
    assert!(!text.text().contains("\"other\""), "{}", text.text());

    reload(&proxy, &both).await;
    let metrics = scrape(&proxy).await;
    assert_eq!(metrics.value(bytes), 0.0);
    assert_eq!(metrics.of("truename_http_requests_total", "other").count(), 0);
}

#[tokio::test]
async fn what_was_counted_survives_new_settings_of_the_alias() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let proxy = Proxy::start(&with_admin(&scene.yaml(""))).await;
    for drain in ["5s", "6s"] {
        let address = proxy.addresses(ALIAS, 1).await[0];
        assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
        reload(&proxy, &with_admin(&scene.yaml(&format!("drain: {drain}")))).await;
    }
    let metrics = scrape(&proxy).await;
    for series in [
        "truename_http_requests_total{alias=\"webscaler-manual\",code=\"200\",method=\"GET\"}",
        "truename_http_request_duration_seconds_count{alias=\"webscaler-manual\"}",
        "truename_downstream_connections_total{alias=\"webscaler-manual\",protocol=\"http/1.1\",tls=\"false\"}",
    ] {
        assert_eq!(metrics.value(series), 2.0, "{series}");
    }
}

#[tokio::test]
async fn connections_are_counted_on_over_new_settings_of_the_alias() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::upgrade_and_echo);
    let yaml = |keys: &str| with_admin(&scene.yaml(keys));
    let proxy = Proxy::start(&yaml("")).await;
    let mut tunnels = Vec::new();
    for keys in ["drain: 5s", "drain: 6s"] {
        tunnels.push(upgraded(&proxy).await);
        reload(&proxy, &yaml(keys)).await;
    }
    tunnels.push(upgraded(&proxy).await);
    let of = |family: &str| {
        let endpoint = format!("{}:{}", scene.addresses[0], scene.port);
        format!(
            "truename_upstream_connections_{family}{{alias=\"{ALIAS}\",endpoint=\"{endpoint}\"}}"
        )
    };
    let metrics = scrape(&proxy).await;
    assert_eq!(["active", "total"].map(|family| metrics.value(&of(family))), [3.0, 3.0]);
    drop(tunnels);
    until(&proxy, &of("active"), |value| *value == Some(0.0)).await;
    assert_eq!(scrape(&proxy).await.value(&of("total")), 3.0);
}

#[tokio::test]
async fn what_is_refused_before_an_alias_is_found_counts_without_one() {
    let mut scene = Scene::new(1).await;
    scene.take_listeners();
    let proxy = Proxy::start(&scene.yaml("")).await;
    let address = proxy.address(ALIAS).await;
    for (request, method, status, error) in [
        ("GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", "GET", 404, "destination_not_found"),
        ("CONNECT a:1 HTTP/1.1\r\nHost: a:1\r\n\r\n", "CONNECT", 405, "http_request_error"),
        ("PUT / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "PUT", 400, "http_request_error"),
        ("no HTTP at all\r\n\r\n", "other", 400, "http_request_error"),
    ] {
        let requests = format!(
            "truename_http_requests_total{{alias=\"\",method=\"{method}\",code=\"{status}\"}}"
        );
        let errors = format!("truename_upstream_errors_total{{alias=\"\",error=\"{error}\"}}");
        let before = proxy.metric(&errors).await.unwrap();
        let mut peer = client::connect(address).await;
        peer.send(request).await;
        assert_eq!(peer.response_to(method).await.status(), status, "{request}");
        until(&proxy, &requests, |value| *value == Some(1.0)).await;
        assert_eq!(proxy.metric(&errors).await, Some(before + 1.0), "{request}");
    }
    let metrics = scrape(&proxy).await;
    assert_eq!(metrics.of("truename_http_requests_total", ALIAS).count(), 0);
}

#[tokio::test]
async fn a_connection_that_comes_to_no_request_counts_as_one_that_spoke_no_protocol() {
    let mut scene = Scene::new(1).await;
    scene.take_listeners();
    let proxy = Proxy::start(&scene.yaml("")).await;
    let address = proxy.address(ALIAS).await;
    let counted = |tls: bool| {
        format!(
            "truename_downstream_connections_total{{alias=\"{ALIAS}\",protocol=\"none\",tls=\"{tls}\"}}"
        )
    };
    // A ClientHello that is none.
    let mut peer = client::connect(address).await;
    peer.send(b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00").await;
    peer.closed().await;
    until(&proxy, &counted(true), |value| *value == Some(1.0)).await;
    drop(client::connect(address).await);
    until(&proxy, &counted(false), |value| *value == Some(1.0)).await;
    let active = format!("truename_downstream_connections_active{{alias=\"{ALIAS}\"}}");
    assert_eq!(proxy.metric(&active).await, Some(0.0));
}

#[tokio::test]
async fn what_passes_through_the_forward_proxy_counts_without_an_alias() {
    let mut scene = Scene::new(1).await;
    scene.take_listeners();
    let yaml = scene.yaml("") + "\nproxy: {listen: \"127.0.0.1:0\"}\n";
    let proxy = Proxy::start(&yaml).await;
    let address = proxy.forward_proxy().await;
    let host = RawOrigin::start(loopback::listen_anywhere(), None, scripts::respond);
    let origin = host.address;
    let mut peer = client::connect(address).await;
    peer.send(format!("GET http://{origin}/ HTTP/1.1\r\nHost: {origin}\r\n\r\n")).await;
    assert_eq!(peer.response().await.text(), "ok");
    drop(peer);
    let mut tunnel = client::connect(address).await;
    tunnel.send(format!("CONNECT {origin} HTTP/1.1\r\nHost: {origin}\r\n\r\n")).await;
    assert_eq!(tunnel.response_to("CONNECT").await.status(), 200);
    tunnel.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(tunnel.response().await.text(), "ok");
    let in_flight = "truename_http_requests_in_flight{alias=\"\"}";
    assert_eq!(proxy.metric(in_flight).await, Some(1.0));
    drop(tunnel);
    until(&proxy, in_flight, |value| *value == Some(0.0)).await;

    let metrics = scrape(&proxy).await;
    for (series, value) in [
        ("truename_http_requests_total{alias=\"\",code=\"200\",method=\"GET\"}", 1.0),
        ("truename_http_requests_total{alias=\"\",code=\"200\",method=\"CONNECT\"}", 1.0),
        ("truename_upstream_connect_duration_seconds_count{alias=\"\"}", 2.0),
    ] {
        assert_eq!(metrics.value(series), value, "{series}");
    }
    assert!(metrics.value("truename_bytes_total{alias=\"\",direction=\"in\"}") > 20.0);
}

#[tokio::test]
async fn a_tunnel_to_an_alias_counts_as_the_connection_inside_of_it() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let yaml = scene.yaml("") + "\nproxy: {listen: \"127.0.0.1:0\"}\n";
    let proxy = Proxy::start(&yaml).await;
    let mut tunnel = client::connect(proxy.forward_proxy().await).await;
    tunnel.send(format!("CONNECT {ALIAS}:80 HTTP/1.1\r\nHost: {ALIAS}:80\r\n\r\n")).await;
    assert_eq!(tunnel.response_to("CONNECT").await.status(), 200);
    tunnel.send(format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    assert_eq!(tunnel.response().await.text(), "ok");
    drop(tunnel);
    let active = format!("truename_downstream_connections_active{{alias=\"{ALIAS}\"}}");
    until(&proxy, &active, |value| *value == Some(0.0)).await;
    let metrics = scrape(&proxy).await;
    let family = metrics.family("truename_downstream_connections_total");
    assert_eq!(family.values().sum::<f64>(), 1.0, "{family:?}");
}

#[tokio::test]
async fn a_connection_that_was_upgraded_is_active_until_its_tunnel_ends() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::upgrade_and_echo);
    let proxy = Proxy::start(&scene.yaml("")).await;
    let tunnel = upgraded(&proxy).await;
    let active = format!("truename_downstream_connections_active{{alias=\"{ALIAS}\"}}");
    assert_eq!(scrape(&proxy).await.value(&active), 1.0);
    drop(tunnel);
    until(&proxy, &active, |value| *value == Some(0.0)).await;
}

/// A tunnel that was used once.
async fn upgraded(proxy: &Proxy) -> Peer {
    let mut tunnel = client::connect(proxy.address(ALIAS).await).await;
    tunnel
        .send(format!(
            "GET / HTTP/1.1\r\nHost: {ALIAS}\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"
        ))
        .await;
    assert_eq!(tunnel.response().await.status(), 101);
    tunnel.send("open").await;
    assert_eq!(tunnel.exactly(4).await, b"open");
    tunnel
}

/// An endpoint at which nobody listens.
fn refusing() -> std::net::SocketAddr {
    loopback::listen_anywhere().local_addr().unwrap()
}

async fn reload(proxy: &Proxy, yaml: &str) {
    proxy.rewrite(yaml);
    assert_eq!(ask(proxy, "POST", "/reload", "").await.status(), 200);
}

async fn scrape(proxy: &Proxy) -> Metrics {
    Metrics::parse(ask(proxy, "GET", "/metrics", "").await.text())
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

    /// The series of one alias.
    fn of(&self, family: &str, alias: &str) -> impl Iterator<Item = (&str, f64)> {
        let label = format!("alias=\"{alias}\"");
        let series = self.families.get(family).into_iter().flatten();
        series.filter(move |(name, _)| name.contains(&label)).map(|(name, n)| (name.as_str(), *n))
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
