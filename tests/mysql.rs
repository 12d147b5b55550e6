//! `protocol: mysql`: how sessions begin, and how they fail to, with a stand-in for the server.

use std::{sync::Arc, time::Duration};

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

use crate::support::{
    client,
    mysql::{
        CLIENT, OK, PASSWORD, QUERY, SCRAMBLE, SWITCHED, Server, TLS, ThroughMysql, encrypt, error,
        flags, greeted, greeting, hash, log_in, next_packet, packet, response,
    },
    peer::Peer,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene, TRUE_NAME},
    trust, within,
};

#[tokio::test]
async fn a_session_without_tls_goes_over_tls_with_the_true_name() {
    let server = Server::of("mysql_native_password", "mysql_native_password");
    let through = ThroughMysql::serving(&server, "").await;
    let mut peer = through.connect().await;
    let expected = greeting("mysql_native_password", false);
    assert_eq!(greeted(&mut peer).await, expected, "all but the capability of TLS is the server's");
    let plugin = "mysql_native_password";
    let sent = packet(1, response(CLIENT, plugin, &hash(plugin, PASSWORD, SCRAMBLE)));
    peer.send(&sent).await;
    assert_eq!(next_packet(&mut peer).await, Some((2, OK.to_vec())));
    for _ in 0..3 {
        peer.send(packet(0, QUERY)).await;
        assert_eq!(next_packet(&mut peer).await, Some((1, OK.to_vec())));
    }
    peer.send(packet(0, [1])).await;
    assert_eq!(peer.rest().await.unwrap(), b"");
    drop(peer);

    assert_eq!(through.origin.seen().server_names, [Some(TRUE_NAME.to_owned())]);
    let expected = response(CLIENT | TLS, plugin, &hash(plugin, PASSWORD, SCRAMBLE));
    assert_eq!(server.state().responses, [expected]);
    let line = line(&through.proxy, "closed").await;
    for (key, value) in [
        ("alias", Value::from(ALIAS)),
        ("true_name", TRUE_NAME.into()),
        ("endpoint", through.origin.address.to_string().into()),
        ("protocol", "mysql".into()),
        ("error", "".into()),
        ("tls_version", "TLSv1.3".into()),
    ] {
        assert_eq!(line[key], value, "{key} of {line}");
    }
    let accepted = format!(
        "truename_downstream_connections_total{{alias=\"{ALIAS}\",protocol=\"mysql\",tls=\"false\"}}"
    );
    assert_eq!(through.proxy.metric(&accepted).await, Some(1.0));
}

#[tokio::test]
async fn a_cold_cache_gets_the_password_over_tls_and_a_warm_one_needs_none() {
    let server = Server::new();
    let through = ThroughMysql::serving(&server, "").await;
    for (forget, asked) in [(false, true), (false, false), (true, true)] {
        if forget {
            server.forget();
        }
        let mut peer = through.connect().await;
        assert_eq!(log_in(&mut peer, PASSWORD).await, Ok(asked));
        peer.send(packet(0, QUERY)).await;
        assert_eq!(next_packet(&mut peer).await, Some((1, OK.to_vec())));
    }
    let mut peer = through.connect().await;
    assert_eq!(log_in(&mut peer, "another").await, Err("Access denied".into()));
    assert_eq!(peer.rest().await.unwrap(), b"");
    assert_eq!(server.state().logins, (3, 1));
}

#[tokio::test]
async fn a_plugin_that_is_switched_to_works_like_the_first() {
    let server = Server::of("mysql_native_password", "caching_sha2_password");
    let through = ThroughMysql::serving(&server, "").await;
    let mut peer = through.connect().await;
    greeted(&mut peer).await;
    let plugin = "mysql_native_password";
    peer.send(packet(1, response(CLIENT, plugin, &hash(plugin, PASSWORD, SCRAMBLE)))).await;
    let (sequence, switch) = next_packet(&mut peer).await.unwrap();
    assert_eq!((sequence, switch[0]), (2, 0xfe));
    peer.send(packet(3, hash("caching_sha2_password", PASSWORD, SWITCHED))).await;
    assert_eq!(next_packet(&mut peer).await, Some((4, vec![1, 4])));
    peer.send(packet(5, [2])).await;
    let (sequence, key) = next_packet(&mut peer).await.unwrap();
    assert_eq!(sequence, 6);
    peer.send(packet(7, encrypt(&key, PASSWORD, SWITCHED))).await;
    assert_eq!(next_packet(&mut peer).await, Some((8, OK.to_vec())));
}

#[tokio::test]
async fn sha256_passwords_are_asked_for_in_the_response_or_after_a_switch() {
    let plugin = "sha256_password";
    let server = Server::of(plugin, plugin);
    let through = ThroughMysql::serving(&server, "").await;
    let mut peer = through.connect().await;
    greeted(&mut peer).await;
    peer.send(packet(1, response(CLIENT, plugin, &[1]))).await;
    let (sequence, key) = next_packet(&mut peer).await.unwrap();
    assert_eq!(sequence, 2);
    peer.send(packet(3, encrypt(&key, PASSWORD, SCRAMBLE))).await;
    assert_eq!(next_packet(&mut peer).await, Some((4, OK.to_vec())));

    let through = ThroughMysql::serving(&Server::of("mysql_native_password", plugin), "").await;
    let mut peer = through.connect().await;
    greeted(&mut peer).await;
    peer.send(packet(1, response(CLIENT, "mysql_native_password", &[]))).await;
    assert_eq!(next_packet(&mut peer).await.unwrap().0, 2);
    peer.send(packet(3, [1])).await;
    let (sequence, key) = next_packet(&mut peer).await.unwrap();
    assert_eq!(sequence, 4);
    peer.send(packet(5, encrypt(&key, PASSWORD, SWITCHED))).await;
    assert_eq!(next_packet(&mut peer).await, Some((6, OK.to_vec())));
}

#[tokio::test]
async fn passwords_in_the_clear_go_over_tls_and_only_there() {
    let plugin = "mysql_clear_password";
    let server = Server::of("mysql_native_password", plugin);
    let through = ThroughMysql::serving(&server, "").await;
    let mut peer = through.connect().await;
    greeted(&mut peer).await;
    peer.send(packet(1, response(CLIENT, "mysql_native_password", &[]))).await;
    assert_eq!(next_packet(&mut peer).await.unwrap().0, 2);
    peer.send(packet(3, format!("{PASSWORD}\0"))).await;
    assert_eq!(next_packet(&mut peer).await, Some((4, OK.to_vec())));
    assert_eq!(server.state().logins, (1, 0));
}

#[tokio::test]
async fn a_server_without_tls_gets_nothing() {
    let mute = |bytes: Vec<u8>| {
        move |mut arrival: Arrival| {
            let bytes = bytes.clone();
            async move {
                // It may be cut short.
                let _ = arrival.tcp().write_all(&bytes).await;
                let mut rest = Vec::new();
                let _ = arrival.tcp().read_to_end(&mut rest).await;
                assert_eq!(rest, b"", "after {bytes:?}");
            }
        }
    };
    for (bytes, words) in [
        (packet(0, greeting("mysql_native_password", false)), "does not offer TLS"),
        ([packet(0, greeting("mysql_native_password", true)), vec![0]].concat(), "followed"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(), "is not a MySQL greeting"),
        (b"220 mail.example.com ESMTP\r\n".to_vec(), "is not a MySQL greeting"),
        (packet(1, greeting("mysql_native_password", true)), "sequence number 1"),
        (vec![0; 1 << 20], "is not a MySQL greeting"),
        ([&[0, 0, 16, 0][..], &[10; 1 << 20]].concat(), "1048576 bytes"),
    ] {
        let through = ThroughMysql::new("retry: {attempts: 0}", mute(bytes)).await;
        let mut peer = through.connect().await;
        let (sequence, code, state, text) = error(next_packet(&mut peer).await.unwrap());
        assert_eq!((sequence, code, &state[..]), (0, 1429, "08001"), "{text}");
        assert!(text.contains(words), "{text}");
        assert!(text.contains("; fix: "), "{text}");
        assert_eq!(peer.rest().await.unwrap(), b"");
        let seen = through.origin.until(|seen| seen.ended > 0).await;
        assert_eq!(seen.server_names, []);
    }
}

#[tokio::test]
async fn an_error_in_place_of_a_greeting_passes_on() {
    let full = b"\xff\x10\x04Too many connections".to_vec();
    let refused = full.clone();
    let through = ThroughMysql::new("", move |mut arrival: Arrival| {
        let bytes = packet(0, &refused);
        async move { arrival.tcp().write_all(&bytes).await.unwrap() }
    })
    .await;
    let mut peer = through.connect().await;
    assert_eq!(next_packet(&mut peer).await, Some((0, full)));
    assert_eq!(peer.rest().await.unwrap(), b"");
}

#[tokio::test]
async fn a_server_that_is_full_or_silent_or_gone_is_not_the_last_that_is_tried() {
    let mut scene = Scene::new(3).await;
    let mut listeners = scene.take_listeners();
    let server = Server::new();
    let good = server.clone();
    let tls = trust::server(&[TRUE_NAME]);
    let _good = RawOrigin::start(listeners.remove(0), Some(tls), move |arrival| {
        good.clone().serve(arrival)
    });
    let _full = RawOrigin::start(listeners.remove(0), None, |mut arrival: Arrival| async move {
        let full = packet(0, b"\xff\x10\x04Too many connections");
        arrival.tcp().write_all(&full).await.unwrap();
    });
    drop(listeners);
    let keys = "protocol: mysql\nbalance: round_robin\nretry: {budget: 100%}\n";
    let proxy = Proxy::start(&scene.yaml(keys)).await;
    let address = proxy.address(ALIAS).await;
    for _ in 0..6 {
        let mut peer = client::connect(address).await;
        log_in(&mut peer, PASSWORD).await.unwrap();
    }
    assert_eq!(server.state().logins, (6, 0));
}

#[tokio::test]
async fn a_certificate_of_another_name_is_told_to_the_client_and_gets_no_password() {
    let mut scene = Scene::new(1).await;
    let server = Server::new();
    let standing = server.clone();
    let tls = trust::server(&["other.example.com"]);
    let _origin = RawOrigin::start(scene.take_listeners().remove(0), Some(tls), move |arrival| {
        standing.clone().serve(arrival)
    });
    let proxy = Proxy::start(&scene.yaml("protocol: mysql\n")).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    greeted(&mut peer).await;
    let plugin = "caching_sha2_password";
    peer.send(packet(1, response(CLIENT, plugin, &hash(plugin, PASSWORD, SCRAMBLE)))).await;
    let (sequence, code, state, text) = error(next_packet(&mut peer).await.unwrap());
    assert_eq!((sequence, code, &state[..]), (2, 1429, "08001"), "{text}");
    assert!(text.contains("other.example.com") && text.contains(TRUE_NAME), "{text}");
    assert_eq!(peer.rest().await.unwrap(), b"");
    assert!(server.state().responses.is_empty());
    let errors = format!(
        "truename_upstream_errors_total{{alias=\"{ALIAS}\",error=\"tls_certificate_error\"}}"
    );
    assert_eq!(proxy.metric(&errors).await, Some(1.0));
}

#[tokio::test]
async fn endpoints_whose_certificate_is_wrong_are_ejected() {
    let mut scene = Scene::new(2).await;
    let mut listeners = scene.take_listeners();
    let server = Server::new();
    let mut origins = Vec::new();
    for name in [TRUE_NAME, "other.example.com"] {
        let server = server.clone();
        let tls = Some(trust::server(&[name]));
        origins.push(RawOrigin::start(listeners.remove(0), tls, move |arrival| {
            server.clone().serve(arrival)
        }));
    }
    let keys =
        "protocol: mysql\nbalance: round_robin\nhealth: {passive: {failures: 2, eject: 60s}}\n";
    let proxy = Proxy::start(&format!("{}workers: 1\n", scene.yaml(keys))).await;
    let address = proxy.address(ALIAS).await;
    let mut failed = 0;
    for _ in 0..12 {
        let mut peer = client::connect(address).await;
        failed += usize::from(log_in(&mut peer, PASSWORD).await.is_err());
    }
    assert_eq!((failed, server.state().logins.0), (2, 10));
}

#[tokio::test]
async fn a_target_that_cannot_be_connected_to_is_an_error_in_place_of_the_greeting() {
    let mut scene = Scene::new(1).await;
    drop(scene.take_listeners());
    let proxy = Proxy::start(&scene.yaml("protocol: mysql\nretry: {attempts: 0}\n")).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    let (sequence, code, state, text) = error(next_packet(&mut peer).await.unwrap());
    assert_eq!((sequence, code, &state[..]), (0, 1429, "08001"), "{text}");
    assert!(text.contains("Connection refused") && text.contains("; fix: "), "{text}");
    assert_eq!(peer.rest().await.unwrap(), b"");
}

#[tokio::test]
async fn more_connections_than_the_limit_are_told_so() {
    let through = ThroughMysql::serving(&Server::new(), "limits: {requests: 1}").await;
    let mut first = through.connect().await;
    log_in(&mut first, PASSWORD).await.unwrap();
    let mut second = through.connect().await;
    let (sequence, code, state, text) = error(next_packet(&mut second).await.unwrap());
    assert_eq!((sequence, code, &state[..]), (0, 1040, "08004"), "{text}");
}

#[tokio::test]
async fn whatever_a_client_does_before_its_session_the_server_counts_no_interrupted_handshake() {
    let server = Server::new();
    let through = ThroughMysql::serving(&server, "").await;
    let response = response(CLIENT, "caching_sha2_password", &[7; 32]);
    let whole = packet(1, &response);
    let mut expected = 0;
    for sent in [
        &b""[..],
        &whole[..1],
        &whole[..20],
        &whole[..whole.len() - 1],
        b"GET / HTTP/1.1\r\n\r\n",
        &[0x16, 3, 1, 2, 0, 1, 0, 1, 252],
        &packet(1, [0; 40]),
        &packet(7, &response),
        &packet(1, flags(CLIENT | TLS)),
        &[255, 255, 255, 1],
    ] {
        let mut peer = through.connect().await;
        greeted(&mut peer).await;
        peer.send(sent).await;
        peer.finish_tcp();
        within("an end", peer.rest()).await.ok();
        expected += 1;
        let ended = through.origin.until(|seen| seen.ended == expected).await;
        assert_eq!(ended.server_names, [], "{sent:?}");
        let state = server.state();
        assert_eq!(state.responses.len(), expected, "{sent:?}");
        let nobody = &state.responses[expected - 1];
        assert_eq!(&nobody[32..41], b"truename\0", "and nothing of the client's");
        assert_eq!(state.interrupted, 0, "{sent:?}");
    }
    // One that leaves when it is asked for its password.
    let mut peer = through.connect().await;
    greeted(&mut peer).await;
    peer.send(&whole).await;
    assert_eq!(next_packet(&mut peer).await, Some((2, vec![1, 4])));
    peer.finish_tcp();
    within("an end", peer.rest()).await.ok();
    through.origin.until(|seen| seen.ended == expected + 1).await;
    let state = server.state();
    assert_eq!((state.interrupted, state.logins), (0, (0, 1)));
}

#[tokio::test]
async fn a_client_that_says_nothing_is_given_up_before_the_server_gives_up() {
    let server = Server::new();
    let through = ThroughMysql::serving(&server, "").await;
    let mut peer = through.connect().await;
    greeted(&mut peer).await;
    let packet = timeout(Duration::from_secs(60), next_packet(&mut peer)).await.expect("an error");
    let (sequence, code, state, text) = error(packet.unwrap());
    assert_eq!((sequence, code, &state[..]), (1, 1159, "08S01"), "{text}");
    through.origin.until(|seen| seen.ended == 1).await;
    assert_eq!(server.state().interrupted, 0);
}

#[tokio::test]
async fn with_tls_in_clients_ask_for_tls_and_send_their_password_in_it() {
    let server = Server::new();
    let through = ThroughMysql::serving(&server, "tls_in: true").await;
    let plugin = "caching_sha2_password";
    let mut tcp = TcpStream::connect(through.address).await.unwrap();
    assert_eq!(greeting_of(&mut tcp).await, greeting(plugin, true));
    tcp.write_all(&packet(1, flags(CLIENT | TLS))).await.unwrap();
    let mut peer = secured(&through.proxy, tcp).await;
    let response = response(CLIENT | TLS, plugin, &hash(plugin, PASSWORD, SCRAMBLE));
    peer.send(packet(2, &response)).await;
    assert_eq!(next_packet(&mut peer).await, Some((3, vec![1, 4])));
    peer.send(packet(4, format!("{PASSWORD}\0"))).await;
    assert_eq!(next_packet(&mut peer).await, Some((5, OK.to_vec())));
    peer.send(packet(0, QUERY)).await;
    assert_eq!(next_packet(&mut peer).await, Some((1, OK.to_vec())));
    assert_eq!(server.state().responses, [response]);
    let accepted = format!(
        "truename_downstream_connections_total{{alias=\"{ALIAS}\",protocol=\"mysql\",tls=\"true\"}}"
    );
    assert_eq!(through.proxy.metric(&accepted).await, Some(1.0));
}

#[tokio::test]
async fn with_tls_in_a_client_may_have_tls_from_its_first_byte() {
    let through = ThroughMysql::serving(&Server::new(), "tls_in: true").await;
    let tcp = TcpStream::connect(through.address).await.unwrap();
    let mut peer = secured(&through.proxy, tcp).await;
    // As far as it knows there is no TLS, and it encrypts its password.
    assert_eq!(log_in(&mut peer, PASSWORD).await, Ok(true));
    peer.send(packet(0, QUERY)).await;
    assert_eq!(next_packet(&mut peer).await, Some((1, OK.to_vec())));
}

#[tokio::test]
async fn with_tls_in_a_client_without_tls_is_refused() {
    let server = Server::new();
    let through = ThroughMysql::serving(&server, "tls_in: true").await;
    let mut peer = through.connect().await;
    greeted(&mut peer).await;
    peer.send(packet(1, response(CLIENT, "caching_sha2_password", &[7; 32]))).await;
    let (sequence, code, state, text) = error(next_packet(&mut peer).await.unwrap());
    assert_eq!((sequence, code, &state[..]), (2, 3159, "HY000"), "{text}");
    // What follows a request for TLS is read as TLS.
    let mut peer = through.connect().await;
    greeted(&mut peer).await;
    peer.send([packet(1, flags(CLIENT | TLS)), packet(2, flags(CLIENT))].concat()).await;
    let rest = within("an end", peer.rest()).await.unwrap_or_default();
    assert_ne!(rest.first(), Some(&2), "no packet: an alert of TLS, or nothing");
    through.origin.until(|seen| seen.ended == 2).await;
    assert_eq!(server.state().interrupted, 0);
}

#[tokio::test]
async fn a_server_in_plaintext_is_passed_to_as_it_is() {
    let through = ThroughMysql::new("tls: {mode: plaintext}", |mut arrival: Arrival| async move {
        let tcp = arrival.tcp();
        let greeting = packet(0, greeting("mysql_native_password", true));
        tcp.write_all(&greeting).await.unwrap();
        let mut sent =
            vec![0; packet(1, response(CLIENT, "mysql_native_password", &[7; 20])).len()];
        tcp.read_exact(&mut sent).await.unwrap();
        assert_eq!(sent, packet(1, response(CLIENT, "mysql_native_password", &[7; 20])));
        tcp.write_all(&packet(2, OK)).await.unwrap();
        let mut rest = Vec::new();
        tcp.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, packet(0, QUERY));
    })
    .await;
    let mut peer = through.connect().await;
    assert_eq!(greeted(&mut peer).await, greeting("mysql_native_password", false));
    let sent = packet(1, response(CLIENT, "mysql_native_password", &[7; 20]));
    // What follows it is sent along, and waits.
    peer.send([sent, packet(0, QUERY)].concat()).await;
    assert_eq!(next_packet(&mut peer).await, Some((2, OK.to_vec())));
    peer.finish_tcp();
    assert_eq!(peer.rest().await.unwrap(), b"");
}

#[tokio::test]
async fn a_server_that_counts_wrongly_or_never_ends_its_packet_is_at_fault() {
    for (bytes, code) in [
        (packet(5, OK), 1156),
        (vec![255, 255, 255, 3], 1043),
        (packet(3, b""), 1043),
        (Vec::new(), 1158),
    ] {
        let through = ThroughMysql::new("", move |mut arrival: Arrival| {
            let bytes = bytes.clone();
            async move {
                let greeting = packet(0, greeting("mysql_native_password", true));
                arrival.tcp().write_all(&greeting).await.unwrap();
                arrival.tcp().read_exact(&mut [0; 36]).await.unwrap();
                let mut peer = arrival.open().await.unwrap().peer;
                next_packet(&mut peer).await.unwrap();
                peer.send(bytes).await;
                peer.finish().await;
            }
        })
        .await;
        let mut peer = through.connect().await;
        greeted(&mut peer).await;
        peer.send(packet(1, response(CLIENT, "mysql_native_password", &[7; 20]))).await;
        let (sequence, found, _, text) = error(next_packet(&mut peer).await.unwrap());
        assert_eq!((sequence, found), (2, code), "{text}");
        assert_eq!(peer.rest().await.unwrap(), b"");
    }
}

#[tokio::test]
async fn a_session_that_its_server_breaks_off_is_broken_off() {
    let server = Server::new();
    let through = ThroughMysql::serving(&server, "").await;
    let mut peer = through.connect().await;
    log_in(&mut peer, PASSWORD).await.unwrap();
    let ThroughMysql { origin, proxy, .. } = through;
    drop(origin);
    within("an end", peer.rest()).await.unwrap_err();
    proxy.logged("\"end\":\"target\"").await;
}

/// TLS with the proxy, on a connection on which it may begin.
async fn secured(proxy: &Proxy, tcp: TcpStream) -> Peer {
    let file = proxy.folder().join("state/truename/ca.pem");
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(file).unwrap() {
        roots.add(root.unwrap()).unwrap();
    }
    client::handshake(tcp, ALIAS, Arc::new(roots), &[]).await.unwrap()
}

/// The greeting, read without reading ahead.
async fn greeting_of(tcp: &mut TcpStream) -> Vec<u8> {
    let mut header = [0; 4];
    tcp.read_exact(&mut header).await.unwrap();
    let mut payload = vec![0; usize::from(header[0])];
    tcp.read_exact(&mut payload).await.unwrap();
    payload
}

/// The line of the access log with this end.
async fn line(proxy: &Proxy, end: &str) -> Value {
    let line = proxy.logged(&format!("\"end\":\"{end}\"")).await;
    let line: Value = serde_json::from_str(&line).unwrap();
    line.get("fields").unwrap_or(&line).clone()
}
