//! `protocol: tcp`: bytes both ways over verified TLS, and how such connections begin, fail and end.

use std::{io, net::SocketAddr, sync::Arc};

use crate::support::{
    client,
    peer::Peer,
    proxy::{Proxy, with_admin},
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts,
    through::Through,
    trust, within,
};
use nix::sys::signal::Signal;
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use truename::demo::dns;

#[tokio::test]
async fn bytes_pass_both_ways_at_once_over_tls_with_the_true_name() {
    const LENGTH: usize = 3 * 1024 * 1024;
    for keys in ["", "tls_in: false"] {
        let through = tcp(keys, scripts::echo).await;
        let (mut read, mut write) = tokio::io::split(through.connect().await.into_wire());
        let mut random = fastrand::Rng::with_seed(7);
        let sent: Vec<u8> = (0..LENGTH).map(|_| random.u8(..)).collect();
        let send = async {
            let mut left = &sent[..];
            while !left.is_empty() {
                let (piece, rest) = left.split_at(random.usize(1..=70_000).min(left.len()));
                write.write_all(piece).await.unwrap();
                left = rest;
            }
            write.shutdown().await.unwrap();
        };
        let mut received = Vec::new();
        let (_, read) =
            within("all bytes", async { tokio::join!(send, read.read_to_end(&mut received)) })
                .await;
        read.unwrap();
        assert!(received == sent, "{} of {LENGTH} bytes", received.len());
        assert_eq!(through.origin.seen().server_names, [Some(TRUE_NAME.to_owned())]);
    }
}

#[tokio::test]
async fn plaintext_to_the_target_is_a_matter_of_configuration() {
    let mut scene = Scene::new(1).await;
    let origin = RawOrigin::start(scene.take_listeners().remove(0), None, scripts::echo);
    let proxy = Proxy::start(&scene.yaml("protocol: tcp\ntls: {mode: plaintext}")).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    peer.send("in the clear").await;
    assert_eq!(peer.exactly(12).await, b"in the clear");
    peer.finish().await;
    assert_eq!(peer.rest().await.unwrap(), b"");
    origin.until(|seen| seen.ended == 1).await;
}

/// As a server does that speaks first, such as one of mail or MySQL.
async fn greet_and_echo(arrival: Arrival) {
    let Some(mut conversation) = arrival.open().await else { return };
    conversation.peer.send("hello\r\n").await;
    loop {
        let bytes = conversation.peer.some().await;
        if bytes.is_empty() || conversation.peer.try_send(bytes).await.is_err() {
            return conversation.peer.finish().await;
        }
    }
}

#[tokio::test]
async fn a_client_may_wait_for_the_server_to_speak_first() {
    for keys in ["", "tls_in: false"] {
        let through = tcp(keys, greet_and_echo).await;
        let mut peer = through.connect().await;
        assert_eq!(peer.exactly(7).await, b"hello\r\n", "{keys}");
        peer.send("quit").await;
        assert_eq!(peer.exactly(4).await, b"quit");
        peer.finish().await;
        assert_eq!(peer.rest().await.unwrap(), b"");
    }
    let through = tcp("tls_in: true", greet_and_echo).await;
    let mut peer = secured(&through.proxy, dial(through.address).await, &[]).await.unwrap();
    assert_eq!(peer.exactly(7).await, b"hello\r\n");
}

#[tokio::test]
async fn a_client_hello_counts_until_the_server_has_spoken() {
    let through = tcp("", scripts::echo).await;
    for late in [false, true] {
        let tcp = dial(through.address).await;
        if late {
            // Nothing came for so long that the target was dialled.
            through.origin.until(|seen| seen.server_names.len() == 2).await;
        }
        let mut peer = secured(&through.proxy, tcp, &[]).await.unwrap();
        peer.send("secret").await;
        assert_eq!(peer.exactly(6).await, b"secret");
        peer.finish().await;
        assert_eq!(peer.rest().await.unwrap(), b"", "a close_notify is an end");
    }
    for (tls, count) in [("true", 2.0), ("false", 0.0)] {
        assert_eq!(through.proxy.metric(&connections(tls)).await, Some(count), "{tls}");
    }
}

#[tokio::test]
async fn what_is_not_to_be_tls_passes_as_it_is_and_what_is_to_be_tls_must_be() {
    let hello = [0x16, 3, 1, 0, 5, 1, 0, 0, 1, 0];
    let through = tcp("tls_in: false", scripts::echo).await;
    let mut peer = through.connect().await;
    peer.send(hello).await;
    assert_eq!(peer.exactly(hello.len()).await, hello);

    let through = tcp("tls_in: true", scripts::echo).await;
    let mut peer = through.connect().await;
    peer.send("*1\r\n$4\r\nPING\r\n").await;
    through.proxy.logged("client TLS handshake failed").await;
    peer.closed().await;
    assert_eq!(through.origin.seen().connections, 0);
    assert_eq!(line(&through.proxy, "client").await["bytes_in"], 0);

    // Something else that begins like a handshake is no ClientHello.
    let through = tcp("", scripts::echo).await;
    let mut peer = through.connect().await;
    for byte in [0x16, 3, 9] {
        peer.send([byte]).await;
    }
    assert_eq!(peer.exactly(3).await, [0x16, 3, 9]);
}

#[tokio::test]
async fn an_end_in_one_direction_leaves_the_other_open() {
    let through = tcp("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        let all = conversation.peer.rest().await.unwrap();
        conversation.peer.send(format!("{} bytes", all.len())).await;
        conversation.peer.finish().await;
    })
    .await;
    let mut peer = through.connect().await;
    peer.send("hello").await;
    peer.finish().await;
    assert_eq!(peer.rest().await.unwrap(), b"5 bytes");
    // One that says nothing at all has ended its side too, and may be told something.
    let mut peer = through.connect().await;
    peer.finish().await;
    assert_eq!(peer.rest().await.unwrap(), b"0 bytes");

    let through = tcp("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.finish().await;
        assert_eq!(conversation.peer.rest().await.unwrap(), b"still here");
    })
    .await;
    let mut peer = through.connect().await;
    peer.send("still").await;
    assert_eq!(peer.rest().await.unwrap(), b"");
    peer.send(" here").await;
    peer.finish().await;
    through.origin.until(|seen| seen.ended == 1).await;
}

#[tokio::test]
async fn a_server_that_leaves_without_close_notify_has_not_ended_but_broken_off() {
    let through = tcp("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.exactly(1).await;
        conversation.peer.send("half of it").await;
        conversation.peer.finish_tcp();
        conversation.peer.hold().await;
    })
    .await;
    let mut plain = through.connect().await;
    plain.send("?").await;
    assert_eq!(plain.exactly(10).await, b"half of it");
    assert_eq!(plain.rest().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);

    let mut tls = secured(&through.proxy, dial(through.address).await, &[]).await.unwrap();
    tls.send("?").await;
    assert_eq!(tls.exactly(10).await, b"half of it");
    assert!(tls.rest().await.is_err());

    let line = line(&through.proxy, "target").await;
    assert_eq!((&line["error"], &line["bytes_out"]), (&"connection_terminated".into(), &10.into()));
    let errors = errors("connection_terminated");
    assert_eq!(through.proxy.metric(&errors).await, Some(2.0));
}

#[tokio::test]
async fn a_client_that_breaks_off_has_not_ended_for_the_server_either() {
    let through = tcp("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        assert_eq!(conversation.peer.exactly(5).await, b"begin");
        assert!(conversation.peer.rest().await.is_err(), "no close_notify");
    })
    .await;
    let mut peer = through.connect().await;
    peer.send("begin").await;
    // It has arrived, lest the reset takes it away.
    through.origin.until(|seen| seen.server_names.len() == 1).await;
    peer.reset();
    through.origin.until(|seen| seen.ended == 1).await;
    assert_eq!(line(&through.proxy, "client").await["error"], "");
}

#[tokio::test]
async fn a_certificate_for_another_name_gets_nothing_and_the_client_is_reset() {
    let mut scene = Scene::new(1).await;
    let tls = trust::server(&["other.example"]);
    let origin = RawOrigin::start(scene.take_listeners().remove(0), Some(tls), scripts::echo);
    let proxy = Proxy::start(&scene.yaml("protocol: tcp")).await;
    is_reset(proxy.address(ALIAS).await, "password").await;
    let told = proxy.logged("other.example").await;
    assert!(told.contains(TRUE_NAME) && told.contains("tls_certificate_error"), "{told}");
    let line = line(&proxy, "failed").await;
    assert_eq!((&line["error"], &line["bytes_in"]), (&"tls_certificate_error".into(), &0.into()));
    assert_eq!(proxy.metric(&errors("tls_certificate_error")).await, Some(1.0));
    assert_eq!(origin.seen().server_names, []);
}

#[tokio::test]
async fn another_endpoint_is_tried_where_one_refuses_or_does_not_shake_hands() {
    for script in [true, false] {
        let mut scene = Scene::new(2).await;
        let mut listeners = scene.take_listeners();
        let tls = trust::server(&[TRUE_NAME]);
        let _good = RawOrigin::start(listeners.remove(0), Some(tls.clone()), scripts::echo);
        let bad = listeners.remove(0);
        let _bad = script.then(|| RawOrigin::start(bad, Some(tls), scripts::reset_on_accept));
        let proxy = Proxy::start(&scene.yaml("protocol: tcp\nbalance: round_robin")).await;
        for _ in 0..4 {
            let mut peer = client::connect(proxy.address(ALIAS).await).await;
            peer.send("found").await;
            assert_eq!(peer.exactly(5).await, b"found");
        }
        let retries = format!("truename_retries_total{{alias=\"{ALIAS}\",reason=\"connect\"}}");
        assert!(proxy.metric(&retries).await.unwrap() > 0.0);
    }
}

#[tokio::test]
async fn the_next_target_is_tried_where_the_first_cannot_be_had() {
    let mut scene = Scene::new(1).await;
    scene.dns.zone([dns::address("gone.example", 60, std::net::Ipv4Addr::LOCALHOST)]);
    let _origin = scene.script(scripts::echo);
    let keys = format!("protocol: tcp\ntarget: gone.example:1\nfailover: [{TRUE_NAME}]");
    let proxy = Proxy::start(&scene.yaml(&keys)).await;
    for _ in 0..2 {
        let mut peer = client::connect(proxy.address(ALIAS).await).await;
        peer.send("second").await;
        assert_eq!(peer.exactly(6).await, b"second");
    }
}

#[tokio::test]
async fn connections_go_to_the_endpoint_that_has_the_fewest_open() {
    let mut scene = Scene::new(2).await;
    let origins = scene.script(scripts::echo);
    let proxy = Proxy::start(&scene.yaml("protocol: tcp\nbalance: least_request")).await;
    let address = proxy.address(ALIAS).await;
    let mut open = Vec::new();
    for _ in 0..6 {
        let mut peer = client::connect(address).await;
        peer.send("x").await;
        assert_eq!(peer.exactly(1).await, b"x");
        open.push(peer);
    }
    assert_eq!(origins.iter().map(|o| o.seen().connections).collect::<Vec<_>>(), [3, 3]);
    assert_eq!(proxy.metric(&active()).await, Some(6.0));
}

#[tokio::test]
async fn a_limit_of_requests_is_one_of_connections() {
    let through = tcp("limits: {requests: 1}", scripts::echo).await;
    let mut first = through.connect().await;
    first.send("first").await;
    assert_eq!(first.exactly(5).await, b"first");
    is_reset(through.address, "").await;
    through.proxy.logged("1 connections are being served already").await;
    let count = through.proxy.metric(&errors("connection_limit_reached")).await;
    assert_eq!(count, Some(1.0));
    first.finish().await;
    assert_eq!(first.rest().await.unwrap(), b"");
    line(&through.proxy, "closed").await;
    let mut third = through.connect().await;
    third.send("third").await;
    assert_eq!(third.exactly(5).await, b"third");
}

#[tokio::test]
async fn a_connection_waits_for_another_where_the_endpoint_has_as_many_as_it_may() {
    let keys = "pool: {max_connections: 1}\ntimeouts: {connect: 15s}";
    let through = tcp(keys, scripts::echo).await;
    let mut first = through.connect().await;
    first.send("first").await;
    assert_eq!(first.exactly(5).await, b"first");
    let mut second = through.connect().await;
    second.send("second").await;
    first.send("still").await;
    assert_eq!(first.exactly(5).await, b"still");
    assert_eq!(through.origin.seen().connections, 1);
    first.finish().await;
    assert_eq!(second.exactly(6).await, b"second");
}

#[tokio::test]
async fn a_move_closes_drains_or_keeps_what_is_open() {
    for (on_change, ends) in [
        ("on_change: close", true),
        ("on_change: drain\ndrain: 1ms", true),
        ("on_change: keep", false),
    ] {
        let (scene, _origins) = two_names().await;
        let proxy =
            Proxy::start(&scene.restless_yaml(&format!("protocol: tcp\n{on_change}"))).await;
        let address = proxy.address(ALIAS).await;
        let mut old = greeted(address).await.unwrap();
        assert_eq!(old.0, "one.example");
        scene.dns.zone([dns::cname(ALIAS_IN_DNS, 0, "two.example")]);
        within("new connections at the new target", async {
            while greeted(address).await.is_none_or(|(name, _)| name != "two.example") {}
        })
        .await;
        if ends {
            let end = old.1.rest().await.unwrap_err();
            assert_eq!(end.kind(), io::ErrorKind::ConnectionReset, "{on_change}");
            assert_eq!(line(&proxy, "moved").await["true_name"], "one.example");
        } else {
            old.1.send("kept").await;
            assert_eq!(old.1.exactly(4).await, b"kept");
        }
    }
}

#[tokio::test]
async fn an_alias_that_a_reload_removes_is_served_no_more_and_its_connections_end_as_on_change_says()
 {
    let through = tcp("on_change: close", scripts::echo).await;
    let mut peer = through.connect().await;
    peer.send("x").await;
    assert_eq!(peer.exactly(1).await, b"x");
    // The same port, as the same address speaks HTTP from now on.
    let other = through.scene.yaml("").replace(ALIAS, "another");
    through.proxy.rewrite(&with_admin(&other));
    through.proxy.reload().await;
    assert_eq!(peer.rest().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    let response = client::get(through.proxy.address("another").await, "another", "/").await;
    assert_ne!(response.status(), 404);
}

#[tokio::test]
async fn a_proxy_that_is_to_end_lets_connections_go_on_for_its_grace_and_then_resets_them() {
    let mut scene = Scene::new(1).await;
    let origin = scene.script(scripts::echo).remove(0);
    let yaml = scene.yaml("protocol: tcp") + "shutdown_grace: 1s\n";
    let proxy = Proxy::start(&yaml).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    peer.send("before").await;
    assert_eq!(peer.exactly(6).await, b"before");
    proxy.signal(Signal::SIGTERM);
    proxy.logged("draining").await;
    peer.send("after").await;
    assert_eq!(peer.exactly(5).await, b"after");
    assert_eq!(peer.rest().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert!(proxy.exit().await.success());
    assert_eq!(line(&proxy, "shutdown").await["bytes_in"], 11);
    origin.until(|seen| seen.ended == 1).await;
}

#[tokio::test]
async fn nobody_is_idle_for_too_long_unless_that_is_configured() {
    let through = tcp("timeouts: {idle: 300ms}", scripts::echo).await;
    for say in [true, false] {
        let mut peer = through.connect().await;
        if say {
            peer.send("x").await;
            assert_eq!(peer.exactly(1).await, b"x");
        }
        assert_eq!(peer.rest().await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        line(&through.proxy, "idle").await;
    }
}

#[tokio::test]
async fn every_connection_has_one_line_and_its_series_begin_at_zero() {
    let through = tcp("", scripts::echo).await;
    let bytes = |direction: &str| {
        format!("truename_bytes_total{{alias=\"{ALIAS}\",direction=\"{direction}\"}}")
    };
    for series in [
        connections("false"),
        connections("true"),
        active(),
        bytes("in"),
        bytes("out"),
        errors("connection_refused"),
    ] {
        assert_eq!(through.proxy.metric(&series).await, Some(0.0), "{series}");
    }
    for http in ["truename_http_requests_in_flight", "truename_http_request_duration_seconds_count"]
    {
        let series = format!("{http}{{alias=\"{ALIAS}\"}}");
        assert_eq!(through.proxy.metric(&series).await, None, "{series}");
    }
    let mut peer = through.connect().await;
    peer.send("twelve bytes").await;
    assert_eq!(peer.exactly(12).await, b"twelve bytes");
    assert_eq!(through.proxy.metric(&active()).await, Some(1.0));
    peer.finish().await;
    assert_eq!(peer.rest().await.unwrap(), b"");
    let line = line(&through.proxy, "closed").await;
    for (key, value) in [
        ("alias", Value::from(ALIAS)),
        ("true_name", TRUE_NAME.into()),
        ("endpoint", through.origin.address.to_string().into()),
        ("protocol", "tcp".into()),
        ("error", "".into()),
        ("bytes_in", 12.into()),
        ("bytes_out", 12.into()),
        ("retries", 0.into()),
        ("tls_version", "TLSv1.3".into()),
    ] {
        assert_eq!(line[key], value, "{key} of {line}");
    }
    assert!(line["upstream_ms"].as_f64().unwrap() <= line["duration_ms"].as_f64().unwrap());
    assert_eq!(through.proxy.metric(&bytes("in")).await, Some(12.0));
    assert_eq!(through.proxy.metric(&bytes("out")).await, Some(12.0));
    assert_eq!(through.proxy.metric(&connections("false")).await, Some(1.0));
    assert_eq!(through.proxy.metric(&active()).await, Some(0.0));
}

#[tokio::test]
async fn alpn_is_offered_as_configured_and_accepted_where_the_client_offers_it() {
    let mut scene = Scene::new(1).await;
    let tls = trust::server_with_alpn(&[TRUE_NAME], &["x-amzn-mqtt-ca", "mqtt"]);
    let listener = scene.take_listeners().remove(0);
    let _origin = RawOrigin::start(listener, Some(tls), |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        let alpn = conversation.peer.alpn.clone().unwrap_or_default();
        conversation.peer.send(format!("{alpn};")).await;
        conversation.peer.hold().await;
    });
    for (keys, offered, told, chosen) in [
        ("", &[][..], &b";"[..], None),
        ("tcp: {alpn: [mqtt]}", &["other", "mqtt"], b"mqtt;", Some("mqtt")),
        ("tcp: {alpn: [mqtt]}", &["h2"], b"mqtt;", None),
    ] {
        let proxy = Proxy::start(&scene.yaml(&format!("protocol: tcp\n{keys}"))).await;
        let tcp = dial(proxy.address(ALIAS).await).await;
        let mut peer = secured(&proxy, tcp, offered).await.unwrap();
        assert_eq!(peer.exactly(told.len()).await, told);
        assert_eq!(peer.alpn.as_deref(), chosen);
    }
    let proxy = Proxy::start(&scene.yaml("protocol: tcp\ntcp: {alpn: [nothing]}")).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    peer.send("x").await;
    assert!(peer.rest().await.is_err());
    proxy.logged("set `tcp.alpn` to protocols that the target speaks").await;
}

#[tokio::test]
async fn the_forward_proxy_opens_tunnels_to_it_and_sends_it_no_requests() {
    let mut scene = Scene::new(1).await;
    let origin = scene.script(scripts::echo).remove(0);
    let proxy = "proxy: {listen: \"127.0.0.1:0\", passthrough: deny}\n";
    for listen in ["", "[]"] {
        let mut yaml = scene.yaml("protocol: tcp") + proxy;
        if !listen.is_empty() {
            yaml = yaml.replace("listen: [\"127.0.0.1:0\"]\n    port", "listen: []\n    port");
        }
        let proxy = Proxy::start(&yaml).await;
        let mut peer = client::connect(proxy.forward_proxy().await).await;
        peer.send(format!("CONNECT {ALIAS}:8883 HTTP/1.1\r\nHost: {ALIAS}:8883\r\n\r\n")).await;
        assert_eq!(peer.response_to("CONNECT").await.status(), 200);
        peer.send("through a tunnel").await;
        assert_eq!(peer.exactly(16).await, b"through a tunnel");
        peer.finish().await;
        assert_eq!(peer.rest().await.unwrap(), b"");

        let seen = origin.seen().connections;
        let mut peer = client::connect(proxy.forward_proxy().await).await;
        peer.send(format!("GET http://{ALIAS}/ HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
        let response = peer.response().await;
        assert_eq!(response.status(), 400);
        assert!(response.text().contains("CONNECT"), "{}", response.text());
        assert_eq!(origin.seen().connections, seen);
    }
}

/// The proxy before a scripted target of an alias with `protocol: tcp`.
async fn tcp<Script, Run>(keys: &str, script: Script) -> Through
where
    Script: Fn(Arrival) -> Run + Clone + Send + Sync + 'static,
    Run: Future<Output = ()> + Send + 'static,
{
    Through::new(&format!("protocol: tcp\n{keys}"), script).await
}

/// Two names, the first of which the alias leads to; each greets with itself and gives every byte back.
async fn two_names() -> (Scene, Vec<RawOrigin>) {
    let mut scene = Scene::new(2).await;
    let names = ["one.example", "two.example"];
    let origins = scene.take_listeners().into_iter().zip(names).map(|(listener, name)| {
        let tls = trust::server(&[name]);
        RawOrigin::start(listener, Some(tls), move |arrival: Arrival| async move {
            let mut conversation = arrival.open().await.unwrap();
            conversation.peer.send(name).await;
            loop {
                let bytes = conversation.peer.some().await;
                if bytes.is_empty() || conversation.peer.try_send(bytes).await.is_err() {
                    return conversation.peer.finish().await;
                }
            }
        })
    });
    let origins = origins.collect();
    scene.dns.zone(names.iter().zip(&scene.addresses).map(|(n, ip)| dns::address(n, 0, *ip)));
    scene.dns.zone([dns::cname(ALIAS_IN_DNS, 0, names[0])]);
    (scene, origins)
}

/// The name that a new connection was greeted with, and the connection; `None` if it was cut before.
async fn greeted(address: SocketAddr) -> Option<(String, Peer)> {
    let mut peer = Peer::plain(TcpStream::connect(address).await.ok()?);
    peer.try_send("?").await.ok()?;
    let mut greeting = peer.try_exactly(12).await?;
    assert_eq!(greeting.pop(), Some(b'?'));
    Some((String::from_utf8(greeting).unwrap(), peer))
}

/// Connects and says something; asserts that the connection is reset, at whichever step, without a byte.
async fn is_reset(address: SocketAddr, say: &str) {
    let mut received = Vec::new();
    let end = within("a reset", async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(say.as_bytes()).await?;
        stream.read_to_end(&mut received).await
    });
    assert_eq!(end.await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(received, b"");
}

async fn dial(address: SocketAddr) -> TcpStream {
    TcpStream::connect(address).await.unwrap()
}

/// Makes TLS with the proxy, whose local authority is trusted.
async fn secured(proxy: &Proxy, tcp: TcpStream, alpn: &[&str]) -> io::Result<Peer> {
    let file = proxy.folder().join("state/truename/ca.pem");
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(file).unwrap() {
        roots.add(root.unwrap()).unwrap();
    }
    client::handshake(tcp, ALIAS, Arc::new(roots), alpn).await
}

/// The line of the access log with this end.
async fn line(proxy: &Proxy, end: &str) -> Value {
    let line = proxy.logged(&format!("\"end\":\"{end}\"")).await;
    let line: Value = serde_json::from_str(&line).unwrap();
    line.get("fields").unwrap_or(&line).clone()
}

fn connections(tls: &str) -> String {
    format!(
        "truename_downstream_connections_total{{alias=\"{ALIAS}\",protocol=\"tcp\",tls=\"{tls}\"}}"
    )
}

fn active() -> String {
    format!("truename_downstream_connections_active{{alias=\"{ALIAS}\"}}")
}

fn errors(error: &str) -> String {
    format!("truename_upstream_errors_total{{alias=\"{ALIAS}\",error=\"{error}\"}}")
}
