//! `protocol: postgres`: how sessions begin, and how they fail to, with a stand-in for the server.

use std::{io, sync::Arc};

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

use crate::support::{
    client,
    peer::Peer,
    postgres::{
        ASK_PASSWORD, GSS_REQUEST, SSL_REQUEST, Server, TERMINATE, ThroughPostgres, cancel, error,
        log_in, message, query, startup, until_ready,
    },
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene, TRUE_NAME},
    trust,
};

#[tokio::test]
async fn a_session_without_tls_goes_over_tls_with_the_true_name() {
    let (through, server) = ThroughPostgres::serving("tls_in: false").await;
    let mut peer = through.connect().await;
    for request in [GSS_REQUEST, SSL_REQUEST] {
        peer.send(request).await;
        assert_eq!(peer.exactly(1).await, b"N");
    }
    assert_eq!(through.origin.seen().connections, 0, "nothing is asked of the target before");
    peer.send(startup(0)).await;
    let begun = until_ready(&mut peer).await;
    assert_eq!(begun.first(), Some(&(b'R', vec![0; 4])));
    peer.send(query("select 1")).await;
    assert_eq!(until_ready(&mut peer).await[0], (b'C', b"select 1\0".to_vec()));
    peer.send(TERMINATE).await;
    assert_eq!(peer.rest().await.unwrap(), b"");

    assert_eq!(through.origin.seen().server_names, [Some(TRUE_NAME.to_owned())]);
    assert_eq!(server.startups(), [startup(0)[4..].to_vec()]);
    let line = line(&through.proxy, "closed").await;
    for (key, value) in [
        ("alias", Value::from(ALIAS)),
        ("true_name", TRUE_NAME.into()),
        ("endpoint", through.origin.address.to_string().into()),
        ("protocol", "postgres".into()),
        ("error", "".into()),
        ("bytes_in", (startup(0).len() + query("select 1").len() + TERMINATE.len()).into()),
        ("tls_version", "TLSv1.3".into()),
    ] {
        assert_eq!(line[key], value, "{key} of {line}");
    }
    assert!(line["bytes_out"].as_u64().unwrap() > 60, "{line}");
    let accepted = |tls: &str| {
        format!(
            "truename_downstream_connections_total{{alias=\"{ALIAS}\",protocol=\"postgres\",tls=\"{tls}\"}}"
        )
    };
    assert_eq!(through.proxy.metric(&accepted("false")).await, Some(1.0));
    assert_eq!(through.proxy.metric(&accepted("true")).await, Some(0.0));
}

#[tokio::test]
async fn a_client_may_have_tls_by_request_or_directly() {
    let (through, _) = ThroughPostgres::serving("").await;
    for (direct, alpn, chosen) in [
        (false, &[][..], None),
        (false, &["postgresql"][..], Some("postgresql")),
        (true, &["postgresql"], Some("postgresql")),
    ] {
        let mut tcp = TcpStream::connect(through.address).await.unwrap();
        if !direct {
            tcp.write_all(&SSL_REQUEST).await.unwrap();
            assert_eq!(tcp.read_u8().await.unwrap(), b'S');
        }
        let mut peer = secured(&through.proxy, tcp, alpn).await.unwrap();
        assert_eq!(peer.alpn.as_deref(), chosen);
        log_in(&mut peer).await;
        peer.send(query("select 1")).await;
        assert_eq!(until_ready(&mut peer).await[0].0, b'C');
        peer.send(TERMINATE).await;
        assert_eq!(peer.rest().await.unwrap(), b"", "a close_notify is an end");
    }
}

#[tokio::test]
async fn tls_is_for_clients_as_the_alias_says() {
    let (through, _) = ThroughPostgres::serving("tls_in: true").await;
    let mut peer = through.connect().await;
    peer.send(startup(0)).await;
    assert_eq!(error(&mut peer).await[&'C'], "28000");

    let (through, _) = ThroughPostgres::serving("tls_in: false").await;
    let mut peer = through.connect().await;
    peer.send([0x16, 3, 1, 0, 5]).await;
    let refusal = error(&mut peer).await;
    assert_eq!(refusal[&'C'], "08P01", "{refusal:?}");
    assert!(refusal[&'H'].contains("tls_in: auto"), "{refusal:?}");
}

#[tokio::test]
async fn bytes_in_the_clear_behind_an_ssl_request_are_refused() {
    let (through, server) = ThroughPostgres::serving("").await;
    let mut peer = through.connect().await;
    peer.send([&SSL_REQUEST[..], &startup(0)].concat()).await;
    assert_eq!(error(&mut peer).await[&'C'], "08P01");
    assert!(server.startups().is_empty());
}

#[tokio::test]
async fn a_server_without_tls_gets_nothing_but_the_question() {
    for (response, words) in [
        (&b"N"[..], "does not support TLS"),
        (b"E", "responded to the SSLRequest with an error"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is not PostgreSQL"),
        (b"Sx", "bytes in plaintext followed"),
        (b"", "closed the connection instead"),
    ] {
        let through = ThroughPostgres::new("", move |mut arrival: Arrival| async move {
            let mut request = [0; 8];
            arrival.tcp().read_exact(&mut request).await.unwrap();
            arrival.tcp().write_all(response).await.unwrap();
            if response.is_empty() {
                return;
            }
            let mut rest = Vec::new();
            let _ = arrival.tcp().read_to_end(&mut rest).await;
            assert_eq!(rest, b"", "after {response:?}");
        })
        .await;
        let mut peer = through.connect().await;
        peer.send(startup(0)).await;
        let refusal = error(&mut peer).await;
        assert_eq!(refusal[&'C'], "08001", "{refusal:?}");
        assert!(refusal[&'M'].contains(words), "{refusal:?}");
        assert!(!refusal[&'H'].is_empty());
        assert_eq!(through.origin.until(|seen| seen.ended > 0).await.server_names, []);
    }
}

#[tokio::test]
async fn a_certificate_of_another_name_is_told_to_the_client() {
    let mut scene = Scene::new(1).await;
    let tls = trust::server_with_alpn(&["other.example.com"], &[]);
    let server = Server::new();
    let behaves = server.clone();
    let _origin = RawOrigin::start(scene.take_listeners().remove(0), Some(tls), move |arrival| {
        behaves.clone().serve(arrival)
    });
    let proxy = Proxy::start(&scene.yaml("protocol: postgres")).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    peer.send(startup(0)).await;
    let refusal = error(&mut peer).await;
    assert_eq!((&refusal[&'S'], &refusal[&'C']), (&"FATAL".to_owned(), &"08001".to_owned()));
    let text = &refusal[&'M'];
    assert!(text.contains(TRUE_NAME) && text.contains("other.example.com"), "{text}");
    assert!(server.startups().is_empty());
    let line = line(&proxy, "failed").await;
    assert_eq!(line["error"], "tls_certificate_error");
}

#[tokio::test]
async fn tls_to_the_target_may_begin_directly() {
    let server = Server::new();
    let behaves = server.clone();
    let through = ThroughPostgres::new("postgres: {negotiation: direct}", move |arrival| {
        let server = behaves.clone();
        async move {
            let Some(conversation) = Arrival::open(arrival).await else { return };
            assert_eq!(conversation.peer.alpn.as_deref(), Some("postgresql"));
            server.converse(conversation.peer).await;
        }
    })
    .await;
    through.session().await;
    assert_eq!(server.startups().len(), 1);
}

#[tokio::test]
async fn plaintext_to_the_target_is_a_matter_of_configuration() {
    let mut scene = Scene::new(1).await;
    let server = Server::new();
    let behaves = server.clone();
    let listener = scene.take_listeners().remove(0);
    let _origin = RawOrigin::start(listener, None, move |arrival: Arrival| {
        let server = behaves.clone();
        async move { server.converse(arrival.open().await.unwrap().peer).await }
    });
    let proxy = Proxy::start(&scene.yaml("protocol: postgres\ntls: {mode: plaintext}")).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    log_in(&mut peer).await;
    assert_eq!(server.startups().len(), 1);
}

#[tokio::test]
async fn an_alias_that_cannot_be_reached_is_explained_to_the_client() {
    let mut scene = Scene::new(1).await;
    drop(scene.take_listeners());
    let proxy = Proxy::start(&scene.yaml("protocol: postgres")).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    peer.send(startup(2)).await;
    let refusal = error(&mut peer).await;
    assert_eq!(refusal[&'C'], "08001", "{refusal:?}");
    assert!(refusal[&'M'].contains("refused"), "{refusal:?}");

    let proxy = Proxy::start(&scene.yaml("protocol: postgres\nallow: [db.example.com]")).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    peer.send(startup(0)).await;
    assert_eq!(error(&mut peer).await[&'C'], "08004");

    scene.dns.zone([dns::cname(crate::support::scene::ALIAS_IN_DNS, 1, "nowhere.example")]);
    let proxy = Proxy::start(&scene.yaml("protocol: postgres")).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    peer.send(startup(0)).await;
    let refusal = error(&mut peer).await;
    assert_eq!(refusal[&'C'], "08001", "{refusal:?}");
    assert!(refusal[&'D'].contains("nowhere.example"), "{refusal:?}");
}

#[tokio::test]
async fn an_endpoint_that_fails_before_the_session_is_passed_over() {
    let mut scene = Scene::new(2).await;
    let server = Server::new();
    let behaves = server.clone();
    let tls = trust::server_with_alpn(&[TRUE_NAME], &[]);
    let mut listeners = scene.take_listeners();
    let _good = RawOrigin::start(listeners.remove(0), Some(tls), move |arrival| {
        behaves.clone().serve(arrival)
    });
    // Has no TLS.
    let _bad = RawOrigin::start(listeners.remove(0), None, |mut arrival: Arrival| async move {
        let mut request = [0; 8];
        arrival.tcp().read_exact(&mut request).await.unwrap();
        arrival.tcp().write_all(b"N").await.unwrap();
        let _ = arrival.tcp().read_to_end(&mut Vec::new()).await;
    });
    let proxy = Proxy::start(&scene.yaml("protocol: postgres\nretry: {budget: 100%}")).await;
    for _ in 0..6 {
        let mut peer = client::connect(proxy.address(ALIAS).await).await;
        log_in(&mut peer).await;
    }
    assert_eq!(server.startups().len(), 6);
}

#[tokio::test]
async fn more_sessions_than_the_limit_are_refused_with_the_reason() {
    let (through, _) = ThroughPostgres::serving("limits: {requests: 1}").await;
    let (first, _) = through.session().await;
    let mut peer = through.connect().await;
    peer.send(startup(0)).await;
    let refusal = error(&mut peer).await;
    assert_eq!(refusal[&'C'], "53300");
    assert!(refusal[&'H'].contains("limits.requests"), "{refusal:?}");
    drop(first);
}

#[tokio::test]
async fn what_is_no_startup_packet_is_refused() {
    let (through, _) = ThroughPostgres::serving("").await;
    for (junk, code) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "08P01"),
        (&[0x7f, 0xff, 0xff, 0xff, 0, 3, 0, 0], "08P01"),
        (&[0, 0, 0, 4], "08P01"),
        (&[0, 0, 0, 9, 0, 3, 0, 0, b'u'], "08P01"),
        (&[0, 0, 0, 9, 0, 2, 0, 0, 0], "0A000"),
    ] {
        let mut peer = through.connect().await;
        peer.send(junk).await;
        let refusal = error(&mut peer).await;
        assert_eq!(refusal[&'C'], code, "{junk:?}: {refusal:?}");
    }
    assert_eq!(through.origin.seen().connections, 0);
}

#[tokio::test]
async fn a_client_that_says_nothing_is_let_go() {
    let process = "listener: {header_timeout: 300ms}";
    let (through, _) = ThroughPostgres::serving_by("", process).await;
    for part in [&b""[..], &SSL_REQUEST[..3], &startup(0)[..12]] {
        let mut peer = through.connect().await;
        peer.send(part).await;
        assert_eq!(peer.rest().await.unwrap(), b"");
    }
    assert_eq!(through.origin.seen().connections, 0);
}

#[tokio::test]
async fn nothing_is_left_of_a_client_that_leaves_at_any_byte_of_its_start() {
    let through = ThroughPostgres::new("", |mut arrival: Arrival| async move {
        let mut request = [0; 8];
        arrival.tcp().read_exact(&mut request).await.unwrap();
        arrival.tcp().write_all(b"S").await.unwrap();
        let Some(mut conversation) = arrival.open().await else { return };
        conversation.peer.exactly(startup(0).len()).await;
        conversation.peer.send(ASK_PASSWORD).await;
        conversation.peer.hold().await;
    })
    .await;
    let packet = [&startup(0)[..], &message(b'p', "secret\0")].concat();
    for length in 0..packet.len() {
        let mut peer = through.connect().await;
        peer.send(&packet[..length]).await;
        if length >= startup(0).len() {
            assert_eq!(peer.exactly(ASK_PASSWORD.len()).await, ASK_PASSWORD);
        }
        match length % 2 {
            0 => drop(peer),
            _ => peer.reset(),
        }
    }
    let seen = through.origin.until(|seen| seen.ended == seen.connections).await;
    assert_eq!(seen.connections, packet.len() - startup(0).len());
    none_left(&through).await;
}

#[tokio::test]
async fn a_server_that_leaves_at_any_byte_of_the_start_is_told_to_the_client() {
    let welcome = [
        &ASK_PASSWORD[..],
        &message(b'R', [0; 4]),
        &message(b'S', "in_hot_standby\0off\0"),
        &message(b'K', [1; 8]),
        &message(b'Z', "I"),
    ]
    .concat();
    let cut = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (at, script) = (cut.clone(), welcome.clone());
    let through = ThroughPostgres::new("", move |mut arrival: Arrival| {
        let (at, welcome) = (at.clone(), script.clone());
        async move {
            let mut request = [0; 8];
            arrival.tcp().read_exact(&mut request).await.unwrap();
            arrival.tcp().write_all(b"S").await.unwrap();
            let mut conversation = arrival.open().await.unwrap();
            conversation.peer.exactly(startup(0).len()).await;
            let length = at.load(std::sync::atomic::Ordering::Relaxed);
            conversation.peer.send(&welcome[..length]).await;
            conversation.peer.finish().await;
            conversation.peer.hold().await;
        }
    })
    .await;
    for length in 0..welcome.len() {
        cut.store(length, std::sync::atomic::Ordering::Relaxed);
        let mut peer = through.connect().await;
        peer.send([&startup(0)[..], &message(b'p', "secret\0")].concat()).await;
        let rest = peer.rest().await.unwrap();
        assert!(rest.windows(6).any(|code| code == b"C08006"), "{length}: {rest:?}");
    }
}

#[tokio::test]
async fn a_cancel_request_goes_to_the_server_of_its_session_and_ends_after_it() {
    let (through, server) = ThroughPostgres::serving("").await;
    for tls in [false, true] {
        for minor in [0, 2] {
            let mut peer = through.connect().await;
            peer.send(startup(minor)).await;
            let key = until_ready(&mut peer).await.remove(3).1;
            assert_eq!(key.len(), if minor == 0 { 8 } else { 36 });
            peer.send(query("sleep")).await;
            let mut asks = if tls {
                let mut tcp = TcpStream::connect(through.address).await.unwrap();
                tcp.write_all(&SSL_REQUEST).await.unwrap();
                assert_eq!(tcp.read_u8().await.unwrap(), b'S');
                secured(&through.proxy, tcp, &[]).await.unwrap()
            } else {
                through.connect().await
            };
            asks.send(cancel(&key)).await;
            assert_eq!(asks.rest().await.unwrap(), b"");
            assert_eq!(server.cancels().last(), Some(&key), "the server has acted by then");
            assert_eq!(until_ready(&mut peer).await[0].0, b'E');
        }
    }
    // Unknown keys, and the keys of sessions that have ended, reach nobody.
    let (peer, key) = through.session().await;
    drop(peer);
    none_left(&through).await;
    let connections = through.origin.seen().connections;
    for key in [key, vec![9; 8]] {
        let mut asks = through.connect().await;
        asks.send(cancel(&key)).await;
        assert_eq!(asks.rest().await.unwrap(), b"");
    }
    assert_eq!(through.origin.seen().connections, connections);
}

/// Waits until the proxy has closed all connections of clients.
async fn none_left(through: &ThroughPostgres) {
    let active = format!("truename_downstream_connections_active{{alias=\"{ALIAS}\"}}");
    crate::support::within("no connection to be left", async {
        while through.proxy.metric(&active).await != Some(0.0) {}
    })
    .await;
}

/// A client's TLS with the alias.
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
