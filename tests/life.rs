//! A proxy's life: it starts whatever the world is like, says what it does, and ends in order.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::Command,
};

use crate::support::{
    client, loopback,
    peer::Peer,
    proxy::{Proxy, Setup},
    raw_origin::RawOrigin,
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts,
    service_origin::{ServiceOrigin, StreamSender},
    trust, within,
};
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::sync::mpsc;
use truename::demo::dns::{self, DnsServer};

#[tokio::test]
async fn it_starts_while_all_is_down_and_mends_itself_when_dns_comes_up() {
    let addresses = loopback::addresses(1);
    let listener = loopback::listen(&addresses).remove(0);
    let port = listener.local_addr().unwrap().port();
    // An address of its own, so that its port is free until DNS comes up.
    let dns_address = SocketAddr::new(loopback::address(), port);
    let mut yaml = Scene::new(1).await.yaml("");
    let servers = yaml.find("servers: [").unwrap();
    let end = servers + yaml[servers..].find(']').unwrap();
    yaml.replace_range(servers..=end, &format!("servers: [\"{dns_address}\"]"));
    let start = yaml.find("port: ").unwrap();
    let end = start + yaml[start..].find('\n').unwrap();
    yaml.replace_range(start..end, &format!("port: {port}"));

    let proxy = Proxy::start(&yaml).await;
    let address = proxy.address(ALIAS).await;
    let response = client::get(address, ALIAS, "/").await;
    assert!([503, 504].contains(&response.status()), "{response:?}");
    let problem = response.json();
    assert_eq!(problem["stage"], "resolve");
    assert!(problem["detail"].as_str().unwrap().contains(&dns_address.to_string()), "{problem}");
    assert!(problem["fix"].as_str().unwrap().contains("dns.servers"), "{problem}");

    let dns = DnsServer::start(dns_address).await.unwrap();
    dns.zone([dns::cname(ALIAS_IN_DNS, 60, TRUE_NAME)]);
    dns.zone([dns::address(TRUE_NAME, 60, addresses[0])]);
    let _origin = RawOrigin::start(listener, Some(trust::server(&[TRUE_NAME])), scripts::respond);
    within("the proxy to mend itself", async {
        while client::get(address, ALIAS, "/").await.status() != 200 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_signal_lets_a_slow_response_end_and_serves_those_who_still_come() {
    let (_scene, _origin, mut streams, proxy) = streaming("").await;
    let address = proxy.address(ALIAS).await;
    let (mut slow, stream) = begin(address, &mut streams).await;
    // An idle connection is closed: nobody waits for it.
    let mut idle = client::connect(address).await;
    idle.send(format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    assert_eq!(idle.response().await.text(), "ok");

    proxy.signal(Signal::SIGTERM);
    proxy.logged("draining").await;
    idle.closed().await;
    let late = client::get(address, ALIAS, "/").await;
    assert_eq!(late.text(), "ok");
    assert!(stream.data("to its end").await);
    drop(stream);
    assert_eq!(slow.response().await.text(), "to its end");
    assert_eq!(proxy.exit().await.code(), Some(0));
}

#[tokio::test]
async fn without_work_a_signal_ends_it_at_once() {
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let (_scene, _origin, _streams, proxy) = streaming("").await;
        proxy.signal(signal);
        assert_eq!(proxy.exit().await.code(), Some(0), "{signal}");
    }
}

#[tokio::test]
async fn a_second_interrupt_does_not_wait() {
    let (_scene, _origin, mut streams, proxy) = streaming("").await;
    let (mut slow, _stream) = begin(proxy.address(ALIAS).await, &mut streams).await;
    proxy.signal(Signal::SIGINT);
    proxy.logged("draining").await;
    proxy.signal(Signal::SIGINT);
    assert_eq!(proxy.exit().await.code(), Some(130));
    slow.closed().await;
}

#[tokio::test]
async fn the_grace_bounds_the_drain() {
    let (_scene, _origin, mut streams, proxy) = streaming("shutdown_grace: 300ms").await;
    let (mut slow, _stream) = begin(proxy.address(ALIAS).await, &mut streams).await;
    proxy.signal(Signal::SIGTERM);
    let line = proxy.logged("`shutdown_grace` is over").await;
    assert_eq!(json(&line)["connections"], 1);
    assert_eq!(proxy.exit().await.code(), Some(0));
    slow.closed().await;
}

#[tokio::test]
async fn quit_drains_as_a_signal_does() {
    let (_scene, _origin, mut streams, proxy) = streaming("").await;
    let (mut slow, stream) = begin(proxy.address(ALIAS).await, &mut streams).await;
    let mut admin = client::connect(proxy.admin().await).await;
    admin.send("POST /quit HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n").await;
    assert_eq!(admin.response_to("POST").await.text(), "draining\n");
    proxy.logged("\"draining\"").await;
    drop(stream);
    assert_eq!(slow.response().await.status(), 200);
    assert_eq!(proxy.exit().await.code(), Some(0));
}

/// Regression: the response said that it had ended, and the log that the new configuration was rejected.
#[tokio::test]
async fn a_proxy_that_drains_says_so_to_whoever_asks_for_a_reload() {
    let (scene, _origin, mut streams, proxy) = streaming("").await;
    let (mut slow, stream) = begin(proxy.address(ALIAS).await, &mut streams).await;
    let admin = proxy.admin().await;
    proxy.signal(Signal::SIGTERM);
    proxy.logged("\"draining\"").await;
    proxy.rewrite(&scene.yaml("drain: 1s"));
    // The second one finds that nobody follows the file any more.
    for _ in 0..2 {
        let mut peer = client::connect(admin).await;
        peer.send("POST /reload HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n").await;
        let response = peer.response_to("POST").await;
        assert_eq!(response.status(), 409);
        assert!(response.text().contains("is draining"), "{}", response.text());
    }
    assert!(!proxy.log().contains("rejected"), "{}", proxy.log());
    drop(stream);
    assert_eq!(slow.response().await.status(), 200);
    assert_eq!(proxy.exit().await.code(), Some(0));
}

#[tokio::test]
async fn a_taken_port_is_named_with_the_way_out() {
    let scene = Scene::new(1).await;
    let taken = loopback::listen_anywhere().into_std().unwrap();
    let taken_address = taken.local_addr().unwrap();
    let proxy = Setup::new(&scene.yaml("").replace("127.0.0.1:0", &taken_address.to_string()));
    let proxy = proxy.spawn();
    assert_eq!(proxy.exit().await.code(), Some(2));
    let log = proxy.log();
    for part in
        [&*format!("cannot listen on {taken_address}"), "Address already in use", "`listen`"]
    {
        assert!(log.contains(part), "{part} is not in {log}");
    }

    let admin = format!("\nadmin: {{listen: \"{taken_address}\"}}\n");
    let proxy = Setup::new(&(scene.yaml("") + &admin)).spawn();
    assert_eq!(proxy.exit().await.code(), Some(2));
    let log = proxy.log();
    assert!(log.contains("`admin.listen`") && log.contains("--admin"), "{log}");
}

#[tokio::test]
async fn a_request_is_one_line_of_the_log_without_its_query() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::respond);
    let proxy = Proxy::start(&scene.yaml("")).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    peer.send(format!(
        "POST /a%20path?token=secret HTTP/1.1\r\nHost: {ALIAS}\r\nContent-Length: 4\r\n\
         Authorization: Bearer secret\r\ntraceparent: 00-{trace}-00f067aa0ba902b7-01\r\n\r\nbody"
    ))
    .await;
    assert_eq!(peer.response_to("POST").await.status(), 200);
    let line = json(&proxy.logged("\"message\":\"request\"").await);
    for (key, value) in [
        ("level", "info"),
        ("alias", ALIAS),
        ("true_name", TRUE_NAME),
        ("protocol", "http/1.1"),
        ("method", "POST"),
        ("path", "/a%20path"),
        ("error", ""),
        ("tls_version", "TLSv1.3"),
        ("trace_id", trace),
    ] {
        assert_eq!(line[key], value, "{key} in {line}");
    }
    assert_eq!(line["endpoint"], origins[0].address.to_string());
    for (key, value) in [("status", 200), ("bytes_in", 4), ("bytes_out", 2), ("retries", 0)] {
        assert_eq!(line[key], value, "{key} in {line}");
    }
    assert_eq!(line["reused"], false);
    let [duration, upstream] =
        ["duration_ms", "upstream_ms"].map(|key| line[key].as_f64().unwrap());
    assert!(0.0 < upstream && upstream <= duration, "{line}");

    peer.send(format!("GET /again HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    assert_eq!(peer.response().await.status(), 200);
    assert_eq!(json(&proxy.logged("/again").await)["reused"], true);

    proxy.signal(Signal::SIGTERM);
    proxy.exit().await;
    let log = proxy.log();
    assert!(!log.contains("secret"), "{log}");
    for line in log.lines() {
        let line = json(line);
        for key in ["time", "level", "message"] {
            assert!(line[key].is_string(), "no {key}: {line}");
        }
    }
}

#[tokio::test]
async fn a_failed_request_is_logged_with_its_true_name_and_what_mends_it() {
    let mut scene = Scene::new(1).await;
    scene.take_listeners();
    let proxy = Proxy::start(&scene.yaml("retry: {attempts: 0}")).await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/?q=1").await.status(), 502);
    let endpoint = SocketAddr::new(scene.addresses[0], scene.port).to_string();
    let line = json(&proxy.logged("\"message\":\"request\"").await);
    assert_eq!(line["error"], "connection_refused");
    assert_eq!(line["status"], 502);
    assert_eq!(line["true_name"], TRUE_NAME);
    assert_eq!(line["endpoint"], endpoint);
    let line = json(&proxy.logged("\"level\":\"warn\"").await);
    assert_eq!(line["stage"], "connect");
    assert!(line["message"].as_str().unwrap().contains(&endpoint), "{line}");
    assert!(line["fix"].as_str().unwrap().contains("`port`"), "{line}");
}

#[tokio::test]
async fn a_failure_that_goes_on_is_logged_when_it_begins_counted_and_reported_when_it_has_ended() {
    let mut scene = Scene::new(1).await;
    scene.take_listeners();
    let yaml = scene.yaml("retry: {attempts: 0}") + "log: {access: false}\n";
    let proxy = Proxy::start(&yaml).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    for _ in 0..100 {
        peer.send(format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
        assert_eq!(peer.response().await.status(), 502);
    }
    let line = json(&proxy.logged("requests no longer fail for this reason").await);
    for (key, value) in [
        ("level", "info"),
        ("alias", ALIAS),
        ("true_name", TRUE_NAME),
        ("error", "connection_refused"),
    ] {
        assert_eq!(line[key], value, "{key} in {line}");
    }
    assert_eq!(line["failures"], 100);
    let log = proxy.log();
    let begun = log.lines().filter(|line| line.contains("\"stage\":\"connect\"")).count();
    let told = log.lines().filter(|line| line.contains("connection_refused")).count();
    assert!(begun == 1 && told <= 3, "{log}");
}

/// Regression: whoever asked for names that are not served wrote a line with each request.
#[tokio::test]
async fn requests_for_no_alias_that_fail_are_logged_once_counted_and_reported_too() {
    let mut scene = Scene::new(1).await;
    scene.take_listeners();
    let proxy = Proxy::start(&(scene.yaml("") + "log: {access: false}\n")).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    for _ in 0..100 {
        peer.send("GET / HTTP/1.1\r\nHost: stranger.example\r\n\r\n").await;
        assert_eq!(peer.response().await.status(), 404);
    }
    let line = json(&proxy.logged("requests no longer fail for this reason").await);
    assert_eq!((&line["level"], &line["stage"]), (&"info".into(), &"route".into()), "{line}");
    assert_eq!((&line["failures"], &line["alias"]), (&100.into(), &Value::Null), "{line}");
    let log = proxy.log();
    let told = log.lines().filter(|line| line.contains("stranger.example")).count();
    assert!(told <= 3, "{log}");
}

#[tokio::test]
async fn failures_that_an_alias_change_ends_are_reported_with_their_count() {
    let mut scene = Scene::new(1).await;
    scene.take_listeners();
    let proxy = Proxy::start(&scene.yaml("retry: {attempts: 0}")).await;
    let address = proxy.address(ALIAS).await;
    for _ in 0..3 {
        assert_eq!(client::get(address, ALIAS, "/").await.status(), 502);
    }
    let more = "retry: {attempts: 0}\nhosts: [new.example]";
    proxy.rewrite(&(scene.yaml(more) + "admin: {listen: \"127.0.0.1:0\"}\n"));
    let line = json(&proxy.logged("until the alias was changed or removed").await);
    assert_eq!(line["failures"], 3, "{line}");
    assert_eq!(line["error"], "connection_refused", "{line}");
}

#[tokio::test]
async fn where_no_more_files_may_be_opened_it_is_said_once_and_no_endpoint_is_blamed() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(|arrival| scripts::respond_times(arrival, 1));
    let yaml = scene.yaml("retry: {attempts: 0}") + "log: {access: false}\n";
    let proxy = Setup::new(&yaml).shell("ulimit -n 60; ").start().await;
    let address = proxy.address(ALIAS).await;
    let mut peers = Vec::new();
    for _ in 0..100 {
        peers.push(client::connect(address).await);
    }
    proxy.logged("cannot accept connections").await;
    let problem = within("a dial that fails", async {
        loop {
            peers[0].send(format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
            let response = peers[0].response().await;
            if response.status() != 200 {
                break response.json();
            }
        }
    })
    .await;
    assert!(problem["detail"].as_str().unwrap().contains("Too many open files"), "{problem}");
    assert!(problem["fix"].as_str().unwrap().contains("ulimit -Hn"), "{problem}");
    drop(peers);
    proxy.logged("connections are accepted again").await;
    assert_eq!(proxy.status().await["aliases"][0]["endpoints"][0]["failures"], 0);
    let log = proxy.log();
    assert_eq!(log.matches("cannot accept connections").count(), 1, "{log}");
}

/// Each worker has a descriptor of its own for a listener.
#[tokio::test]
async fn a_listener_that_comes_while_no_more_files_may_be_opened_is_served_once_they_may() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let address = loopback::listen_anywhere().local_addr().unwrap();
    // Far more than may find a descriptor: some that are open now may be closed by then.
    let yaml = scene.yaml("") + "workers: 24\nadmin: {listen: \"127.0.0.1:0\"}\n";
    let proxy = Proxy::start(&yaml).await;
    // One for the socket, and some for the files that are read before the workers have it.
    let files = (0..100).map(|_| proxy.open_files()).min().unwrap();
    proxy.limit_open_files(Some(files + 3));
    proxy.rewrite(&yaml.replace("127.0.0.1:0\"]", &format!("127.0.0.1:0\", \"{address}\"]")));
    within("the reload", async {
        // Whatever else reads a file at that moment may leave none for it.
        let mut refused = 0;
        while !proxy.log().contains("configuration reloaded") {
            let now = proxy.log().matches("the running one stays").count();
            if std::mem::replace(&mut refused, now) < now {
                proxy.signal(Signal::SIGHUP);
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
    let line = json(&proxy.logged("cannot accept connections").await);
    assert_eq!(line["listener"], address.to_string(), "{line}");
    proxy.limit_open_files(None);
    assert_eq!(client::get(address, ALIAS, "/").await.text(), "ok");
    proxy.logged("connections are accepted again").await;
}

/// A drain may last for hours.
#[tokio::test]
async fn failures_are_counted_in_the_log_while_it_drains() {
    let (_scene, _origin, mut streams, proxy) = streaming("shutdown_grace: 10m").await;
    let address = proxy.address(ALIAS).await;
    let (mut slow, stream) = begin(address, &mut streams).await;
    proxy.signal(Signal::SIGTERM);
    proxy.logged("\"draining\"").await;
    let mut peer = client::connect(address).await;
    peer.send("\x16\x03\x01\x00\x05hello").await;
    proxy.logged("client TLS handshake failed").await;
    let line = json(&proxy.logged("client TLS handshakes no longer fail for this reason").await);
    assert_eq!(line["failures"], 1, "{line}");
    drop(stream);
    assert_eq!(slow.response().await.status(), 200);
    assert_eq!(proxy.exit().await.code(), Some(0));
}

#[tokio::test]
async fn the_access_log_can_be_silenced() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let proxy = Proxy::start(&(scene.yaml("") + "log: {access: false}\n")).await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 200);
    proxy.signal(Signal::SIGTERM);
    proxy.exit().await;
    let log = proxy.log();
    assert!(log.contains("\"stopped\"") && !log.contains("\"message\":\"request\""), "{log}");
}

#[tokio::test]
async fn a_terminal_gets_lines_for_people() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let proxy = Setup::new(&(scene.yaml("") + "log: {format: text}\n")).start().await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 200);
    let line = proxy.logged("path=").await;
    for part in [" INFO request ", "alias=\"webscaler-manual\"", "status=200", "endpoint=127."] {
        assert!(line.contains(part), "{part} is not in {line}");
    }
    assert!(!proxy.log().contains('\x1b'), "colour where there is no terminal");
}

#[tokio::test]
async fn connections_past_the_limit_wait_and_are_served_when_there_is_room() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let proxy = Proxy::start(&(scene.yaml("") + "listener: {max_connections: 1}\n")).await;
    let address = proxy.address(ALIAS).await;
    let request = format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n");
    let mut first = client::connect(address).await;
    first.send(&request).await;
    assert_eq!(first.response().await.status(), 200);
    // The kernel takes the second; the proxy does not look at it yet.
    let mut second = client::connect(address).await;
    second.send(&request).await;
    for _ in 0..10 {
        first.send(&request).await;
        assert_eq!(first.response().await.status(), 200);
    }
    // A connection is counted with its first byte, well before its request has a response.
    let connections = format!(
        "truename_downstream_connections_total{{alias=\"{ALIAS}\",protocol=\"http/1.1\",\
         tls=\"false\"}}"
    );
    assert_eq!(proxy.metric(&connections).await, Some(1.0), "the second was not left to wait");
    drop(first);
    assert_eq!(second.response().await.status(), 200);
}

#[tokio::test]
async fn a_connection_that_does_not_finish_its_head_is_closed() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let proxy = Proxy::start(&(scene.yaml("") + "listener: {header_timeout: 300ms}\n")).await;
    let address = proxy.address(ALIAS).await;
    for words in ["", "GET / HTTP/1.1\r\nHo", "PRI * HTT"] {
        let mut peer = client::connect(address).await;
        peer.send(words).await;
        peer.closed().await;
    }
    // While a response takes its time, nothing is late.
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn curl_shows_the_response_and_the_explanation() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let proxy = Proxy::start(&scene.yaml("")).await;
    let address = proxy.address(ALIAS).await;
    let curl = |host: &str| {
        let mut command = Command::new("curl");
        command.args(["--silent", "--noproxy", "*", "--max-time", "20", "--write-out"]);
        command.args(["\n%{http_code} %{content_type}", "--header", &format!("Host: {host}")]);
        let output = command.arg(format!("http://{address}/")).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(curl(ALIAS).starts_with("ok\n200 "));
    assert!(curl("evil.example").ends_with("404 application/problem+json"));
    assert_eq!(address.ip(), IpAddr::V4(Ipv4Addr::LOCALHOST));
}

async fn streaming(
    keys: &str,
) -> (Scene, ServiceOrigin, mpsc::UnboundedReceiver<StreamSender>, Proxy) {
    let mut scene = Scene::new(1).await;
    let listener = scene.take_listeners().remove(0);
    let (origin, streams) = ServiceOrigin::streaming(listener, trust::server(&[TRUE_NAME]));
    let proxy = Proxy::start(&(scene.yaml("") + keys)).await;
    (scene, origin, streams, proxy)
}

/// A response that has begun, and what sends the rest of it.
async fn begin(
    proxy: SocketAddr,
    streams: &mut mpsc::UnboundedReceiver<StreamSender>,
) -> (Peer, StreamSender) {
    let mut peer = client::connect(proxy).await;
    peer.send(format!("GET /stream HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    let stream = within("the stream", streams.recv()).await.unwrap();
    (peer, stream)
}

#[track_caller]
fn json(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"))
}
