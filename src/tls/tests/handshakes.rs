//! Protocols, sessions, client certificates, and peers that misbehave.

use super::*;
use crate::tls::Negotiated;
use rustls::{
    RootCertStore,
    crypto::aws_lc_rs::kx_group,
    server::WebPkiClientVerifier,
    version::{TLS12, TLS13},
};
use tokio::net::{TcpListener, TcpStream};

/// A server that only accepts clients with a certificate from `clients`.
fn demanding(
    identity: Identity,
    clients: &Ca,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> ServerConfig {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(clients.der()).unwrap();
    let verifier =
        WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
    ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_client_cert_verifier(verifier.unwrap())
        .with_single_cert(identity.chain, identity.key)
        .unwrap()
}

/// A peer that reads the ClientHello, responds with `bytes` and closes.
async fn error_after(bytes: &[u8], tls: &ClientTls) -> TlsError {
    let (near, mut far) = duplex(64 * 1024);
    let expected = name(NAME);
    let peer = async move {
        let mut hello = [0; 16 * 1024];
        assert!(far.read(&mut hello).await.unwrap() > 0);
        far.write_all(bytes).await.unwrap();
    };
    let both = async { tokio::join!(handshake(near, tls, Alpn::Http1, &expected), peer) };
    match timeout(DEADLINE, both).await.unwrap().0 {
        Err(error) => error,
        Ok(_) => panic!("a handshake with such a peer"),
    }
}

fn any_client() -> ClientTls {
    Settings::trusting(&Ca::new("Root")).load()
}

#[tokio::test]
async fn alpn_is_offered_as_asked_and_reported_as_agreed() {
    let ca = Ca::new("Root");
    let tls = Settings::trusting(&ca).load();
    let both: &[&[u8]] = &[b"http/1.1", b"h2"];
    let cases: [(Alpn, &[&[u8]], Negotiated); 8] = [
        (Alpn::Http1, both, Negotiated::Http1),
        (Alpn::Http2, both, Negotiated::Http2),
        (Alpn::Http2Or1, &[b"h2", b"http/1.1"], Negotiated::Http2),
        (Alpn::Http2Or1, &[b"http/1.1"], Negotiated::Http1),
        (Alpn::Http2Or1, &[b"h2"], Negotiated::Http2),
        (Alpn::Http2Or1, &[], Negotiated::None),
        (Alpn::Http1, &[], Negotiated::None),
        (Alpn::None, both, Negotiated::None),
    ];
    for (offer, spoken, expected) in cases {
        let mut server = ca.issue(&[NAME]).server();
        server.alpn_protocols = spoken.iter().map(|name| name.to_vec()).collect();
        let handshake = meet(server, &tls, offer, NAME).await.0.unwrap();
        assert_eq!(handshake.alpn, expected, "{offer:?} to a server of {spoken:?}");
    }
}

#[tokio::test]
async fn a_demanded_protocol_that_the_server_lacks_is_an_error_that_names_the_key() {
    let ca = Ca::new("Root");
    let tls = Settings::trusting(&ca).load();
    for spoken in [vec![], vec![b"http/1.1".to_vec()]] {
        let mut server = ca.issue(&[NAME]).server();
        server.alpn_protocols = spoken;
        let error = meet(server, &tls, Alpn::Http2, NAME).await.0.err().unwrap();
        assert!(matches!(error, TlsError::Alpn { offered: "h2", .. }), "{error}");
        assert!(error.hint().unwrap().contains("http.version"));
    }
}

/// Connects over TCP, reads a byte (the server's tickets come before it) and returns both sides' view.
async fn visit(
    listener: &TcpListener,
    server: &Arc<ServerConfig>,
    tls: &ClientTls,
    alpn: Alpn,
) -> (bool, bool) {
    let address = listener.local_addr().unwrap();
    let serve = async {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = TlsAcceptor::from(server.clone()).accept(stream).await.unwrap();
        stream.write_all(b"x").await.unwrap();
        stream.flush().await.unwrap();
        stream.get_ref().1.handshake_kind() == Some(rustls::HandshakeKind::Resumed)
    };
    let expected = name(NAME);
    let visit = async {
        let stream = TcpStream::connect(address).await.unwrap();
        let mut handshake = handshake(stream, tls, alpn, &expected).await.unwrap();
        assert_eq!(handshake.stream.read_u8().await.unwrap(), b'x');
        assert!(handshake.not_after.is_some());
        handshake.resumed
    };
    timeout(DEADLINE, async { tokio::join!(visit, serve) }).await.unwrap()
}

#[tokio::test]
async fn a_session_is_resumed_at_another_address_of_the_same_name() {
    for version in [&TLS12, &TLS13] {
        let ca = Ca::new("Root");
        let settings = Settings::trusting(&ca);
        let tls = settings.load();
        let mut server = ca.issue(&[NAME]).server_speaking(&[version]);
        server.ticketer = aws_lc_rs::Ticketer::new().unwrap();
        let server = Arc::new(server);
        let here = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let there = TcpListener::bind("127.0.0.2:0").await.unwrap();
        assert_ne!(here.local_addr().unwrap().ip(), there.local_addr().unwrap().ip());

        assert_eq!(visit(&here, &server, &tls, Alpn::None).await, (false, false));
        assert_eq!(visit(&there, &server, &tls, Alpn::None).await, (true, true), "{version:?}");
        assert_eq!(visit(&here, &server, &tls, Alpn::Http1).await, (true, true), "{version:?}");

        // Roots that are loaded again accept no session of the old ones.
        assert_eq!(visit(&here, &server, &settings.load(), Alpn::None).await, (false, false));
    }
}

#[tokio::test]
async fn post_quantum_key_exchange_comes_first_unless_it_is_off() {
    let ca = Ca::new("Root");
    // The server chooses the first of its groups for which the client has sent a key share.
    let preferring = |kx_groups| {
        let identity = ca.issue(&[NAME]);
        let provider =
            rustls::crypto::CryptoProvider { kx_groups, ..aws_lc_rs::default_provider() };
        ServerConfig::builder_with_provider(Arc::new(provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(identity.chain, identity.key)
            .unwrap()
    };
    let groups = vec![kx_group::X25519MLKEM768, kx_group::X25519];
    let mut settings = Settings::trusting(&ca);
    for (post_quantum, hello, group) in [
        (true, 1_200..1_800, kx_group::X25519MLKEM768.name()),
        (false, 100..500, kx_group::X25519.name()),
    ] {
        settings.tls.post_quantum = post_quantum;
        let tls = settings.load();
        assert!(hello.contains(&hello_length(&tls).await), "post_quantum: {post_quantum}");
        let (_, server) = meet(preferring(groups.clone()), &tls, Alpn::None, NAME).await;
        let server = server.unwrap();
        assert_eq!(server.get_ref().1.negotiated_key_exchange_group().unwrap().name(), group);
    }
}

async fn hello_length(tls: &ClientTls) -> usize {
    let (near, mut far) = duplex(64 * 1024);
    let expected = name(NAME);
    let peer = async move {
        let mut hello = [0; 16 * 1024];
        far.read(&mut hello).await.unwrap()
    };
    let both = async { tokio::join!(handshake(near, tls, Alpn::None, &expected), peer) };
    let (client, length) = timeout(DEADLINE, both).await.unwrap();
    let error = client.err().unwrap();
    assert!(matches!(error, TlsError::Eof { .. }), "{error}");
    length
}

#[tokio::test]
async fn a_client_certificate_is_shown_to_a_server_that_asks() {
    let (ca, clients) = (Ca::new("Root"), Ca::new("Clients"));
    for version in [&TLS12, &TLS13] {
        let mut settings = Settings::trusting(&ca);
        settings.tls.client_certificate = Some(client_pair(&settings, &clients));
        let tls = settings.load();
        assert!(tls.has_client_certificate());
        let server = demanding(ca.issue(&[NAME]), &clients, &[version]);
        let (client, server) = meet(server, &tls, Alpn::None, NAME).await;
        assert!(client.is_ok());
        assert_eq!(server.unwrap().get_ref().1.peer_certificates().unwrap().len(), 1);
    }
}

#[tokio::test]
async fn a_missing_client_certificate_is_named_in_tls_1_2() {
    let ca = Ca::new("Root");
    let tls = Settings::trusting(&ca).load();
    let server = demanding(ca.issue(&[NAME]), &Ca::new("Clients"), &[&TLS12]);
    let error = meet(server, &tls, Alpn::None, NAME).await.0.err().unwrap();
    assert!(error.hint().unwrap().contains("tls.client_certificate"), "{error}");
}

#[tokio::test]
async fn a_missing_client_certificate_is_named_in_tls_1_3_where_the_alert_comes_late() {
    let ca = Ca::new("Root");
    let tls = Settings::trusting(&ca).load();
    let server = demanding(ca.issue(&[NAME]), &Ca::new("Clients"), &[&TLS13]);
    let (client, server) = meet(server, &tls, Alpn::None, NAME).await;
    assert!(server.is_err());
    let read = client.unwrap().stream.read_u8().await.unwrap_err();
    // hyper wraps the I/O error several levels deep.
    let wrapped = io::Error::other(Wrapped(read));
    let error = TlsError::after_handshake(&wrapped, &name(NAME), tls.offer(Alpn::None)).unwrap();
    assert_eq!(
        error.to_string(),
        "`api.example.com` refused the TLS connection with the alert certificate_required: it requires a client certificate, and none is configured"
    );
    assert!(error.hint().unwrap().contains("tls.client_certificate"));
}

#[tokio::test]
async fn a_client_certificate_that_the_server_refuses_is_not_called_missing() {
    let ca = Ca::new("Root");
    let mut settings = Settings::trusting(&ca);
    settings.tls.client_certificate = Some(client_pair(&settings, &Ca::new("Strangers")));
    let tls = settings.load();
    let server = demanding(ca.issue(&[NAME]), &Ca::new("Clients"), &[&TLS12]);
    let error = meet(server, &tls, Alpn::None, NAME).await.0.err().unwrap();
    assert!(error.to_string().contains("does not accept our client certificate"), "{error}");
    assert!(error.hint().unwrap().contains("tls.client_certificate"));
}

#[test]
fn an_error_that_is_not_of_tls_has_no_tls_error_behind_it() {
    let error = io::Error::other(Wrapped(io::ErrorKind::ConnectionReset.into()));
    assert!(
        TlsError::after_handshake(&error, &name(NAME), any_client().offer(Alpn::None)).is_none()
    );
}

#[tokio::test]
async fn a_response_in_plaintext_has_its_own_error() {
    for response in [
        "HTTP/1.1 400 Bad Request\r\n\r\nClient sent a TLS request to a plain port",
        "220 mail.example.com ESMTP ready\r\n",
        "-ERR unknown command\r\n",
        "SSH-2.0-OpenSSH_9.2\r\n",
    ] {
        let error = error_after(response.as_bytes(), &any_client()).await;
        assert!(matches!(error, TlsError::NotTls { .. }), "{response}: {error}");
        assert!(error.hint().unwrap().contains("tls.mode: plaintext"));
    }
}

#[tokio::test]
async fn a_peer_that_closes_is_told_apart() {
    let mut settings = Settings::trusting(&Ca::new("Root"));
    let error = error_after(b"", &settings.load()).await;
    assert!(matches!(error, TlsError::Eof { .. }), "{error}");
    assert!(error.hint().unwrap().contains("tls.post_quantum: false"));
    settings.tls.post_quantum = false;
    let error = error_after(b"", &settings.load()).await;
    assert!(!error.hint().unwrap().contains("post_quantum"));
}

#[tokio::test]
async fn a_server_of_tls_1_0_is_told_what_it_lacks() {
    // ServerHello of TLS 1.0 choosing TLS_RSA_WITH_AES_128_CBC_SHA.
    let mut hello = vec![0x16, 3, 1, 0, 42, 2, 0, 0, 38, 3, 1];
    hello.extend([7; 32]);
    hello.extend([0, 0, 0x2f, 0]);
    let error = error_after(&hello, &any_client()).await;
    assert!(matches!(error, TlsError::Protocol { .. }), "{error}");
    assert!(error.to_string().contains("TLS 1.1 or older"), "{error}");
}

#[tokio::test]
async fn a_server_with_nothing_in_common_is_told_what_was_offered() {
    // Fatal alerts: handshake_failure, as servers of RSA key exchange send, and protocol_version.
    let error = error_after(&[0x15, 3, 1, 0, 2, 2, 40], &any_client()).await;
    assert!(error.to_string().contains("no RSA key exchange"), "{error}");
    assert!(error.hint().unwrap().contains("ECDHE"));
    assert!(error.hint().unwrap().contains("tls.client_certificate"));
    let error = error_after(&[0x15, 3, 1, 0, 2, 2, 70], &any_client()).await;
    assert!(error.to_string().contains("supports none of the offered TLS versions"), "{error}");
}

#[tokio::test]
async fn a_server_below_min_version_is_refused_with_the_key() {
    let ca = Ca::new("Root");
    let mut settings = Settings::trusting(&ca);
    let old = || ca.issue(&[NAME]).server_speaking(&[&TLS12]);
    let handshake = meet(old(), &settings.load(), Alpn::None, NAME).await.0.unwrap();
    assert_eq!(handshake.version, "TLSv1.2");
    settings.tls.min_version = TlsVersion::V1_3;
    let error = meet(old(), &settings.load(), Alpn::None, NAME).await.0.err().unwrap();
    assert!(error.hint().unwrap().contains("tls.min_version: \"1.2\""), "{error}");
}

#[tokio::test]
async fn an_alert_is_named() {
    // unrecognized_name
    let error = error_after(&[0x15, 3, 1, 0, 2, 2, 112], &any_client()).await;
    assert!(
        error.to_string().contains("unrecognized_name: it does not serve this name"),
        "{error}"
    );
    assert!(error.hint().unwrap().contains("tls.server_name"));
}

fn client_pair(settings: &Settings, clients: &Ca) -> config::ClientCertificate {
    let key = KeyPair::generate().unwrap();
    let mut params = leaf_params(&["client.example.com"]);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let certificate = params.signed_by(&key, &clients.0).unwrap();
    config::ClientCertificate {
        cert: settings.file("client.pem", certificate.pem()),
        key: settings.file("client.key", key.serialize_pem()),
    }
}

#[derive(Debug, thiserror::Error)]
#[error("connection error")]
struct Wrapped(#[source] io::Error);
