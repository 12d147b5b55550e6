//! TLS from applications: which certificate they see, and what becomes of handshakes that fail.

use std::{io, net::SocketAddr, path::Path, sync::Arc};

use crate::support::{
    client::{self, H2},
    curl::{Curl, curl},
    peer::Peer,
    proxy::{Proxy, Setup},
    raw_origin::RawOrigin,
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts, trust, within,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, HandshakeKind, RootCertStore,
    SupportedProtocolVersion,
    pki_types::{CertificateDer, ServerName, pem::PemObject},
    version::{TLS12, TLS13},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use truename::demo::dns;

#[tokio::test]
async fn plaintext_and_tls_share_a_port() {
    let world = World::new("").await;
    let plain = client::get(world.address, ALIAS, "/").await;
    assert_eq!(plain.text(), "ok");
    for (name, arguments) in [
        (ALIAS, &["--http1.1"][..]),
        (ALIAS, &["--http1.0"]),
        (ALIAS_IN_DNS, &["--http2"]),
        (ALIAS, &["--tls-max", "1.2"]),
    ] {
        let response = world.curl(name, arguments).await;
        assert_eq!((response.code, response.stdout.as_str()), (0, "ok"), "{name}: {response:?}");
    }
    world.origin.assert_called(TRUE_NAME, &world.scene.authority(TRUE_NAME));
    let count = |protocol: &str, tls: bool| {
        format!(
            "truename_downstream_connections_total{{alias=\"{ALIAS}\",protocol=\"{protocol}\",tls=\"{tls}\"}}"
        )
    };
    assert_eq!(world.proxy.metric(&count("http/1.1", false)).await, Some(1.0));
    assert_eq!(world.proxy.metric(&count("http/1.1", true)).await, Some(2.0));
    assert_eq!(world.proxy.metric(&count("h2", true)).await, Some(2.0));
}

#[tokio::test]
async fn the_sni_chooses_among_the_aliases_of_a_listener() {
    let mut scene = Scene::new(2).await;
    let mut listeners = scene.take_listeners();
    let serve = |listener, name: &str| {
        let tls = trust::server_with_alpn(&[name], &["http/1.1"]);
        RawOrigin::start(listener, Some(tls), scripts::respond)
    };
    let second = serve(listeners.pop().unwrap(), "other.example");
    let first = serve(listeners.pop().unwrap(), TRUE_NAME);
    scene.dns.zone([dns::address("other.example", 60, scene.addresses[1])]);
    let yaml = scene.yaml("hosts: [a.example]");
    let (_, alias) = yaml.split_once("aliases:\n").unwrap();
    let other = alias
        .replace(ALIAS, "other")
        .replace("hosts: [a.", "target: other.example\n    hosts: [b.");
    let proxy = Proxy::start(&format!("{yaml}{other}")).await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(proxy.address("other").await, address);
    let roots = local_roots(&proxy);

    // No Host, as HTTP/1.0 has it: there is only the SNI to go by.
    for (name, origin, host) in [
        ("b.example", &second, "other.example"),
        ("other", &second, "other.example"),
        (ALIAS, &first, TRUE_NAME),
    ] {
        let mut peer = client::connect_tls(address, name, roots.clone(), &[]).await.unwrap();
        peer.send("GET / HTTP/1.0\r\n\r\n").await;
        assert_eq!(peer.response().await.text(), "ok");
        let host = scene.authority(host);
        assert_eq!(origin.seen().requests.last().unwrap().field("host"), Some(host.as_str()));
    }
    assert_eq!((first.seen().requests.len(), second.seen().requests.len()), (1, 2));
}

#[tokio::test]
async fn alpn_chooses_the_protocol() {
    let world = World::new("").await;
    for (offered, chosen) in [
        (&["h2", "http/1.1"][..], Some("h2")),
        (&["http/1.1", "h2"], Some("h2")),
        (&["http/1.1"], Some("http/1.1")),
        (&["http/1.0", "http/1.1"], Some("http/1.1")),
        (&["http/1.0"], Some("http/1.0")),
        (&[], None),
    ] {
        let mut peer = world.connect(ALIAS, offered).await.unwrap();
        assert_eq!(peer.alpn.as_deref(), chosen, "{offered:?}");
        if chosen == Some("h2") {
            let uri = format!("https://{ALIAS}/");
            assert_eq!(H2::over(peer).await.get(&uri).await.unwrap().body, "ok");
        } else {
            peer.send(format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
            assert_eq!(peer.response().await.text(), "ok");
        }
    }
    let error = world.connect(ALIAS, &["imap"]).await.err().expect("a refusal");
    assert_eq!(alert(&error), Some(AlertDescription::NoApplicationProtocol), "{error}");
}

#[tokio::test]
async fn both_versions_of_tls_are_spoken_and_resume_their_sessions() {
    let world = World::new("").await;
    for version in [&TLS12, &TLS13] {
        let config = world.config(&[version]);
        for expected in [HandshakeKind::Full, HandshakeKind::Resumed] {
            let mut tls = world.handshake(ALIAS, &config).await.unwrap();
            let request = format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\nConnection: close\r\n\r\n");
            tls.write_all(request.as_bytes()).await.unwrap();
            let mut response = Vec::new();
            within("the response", tls.read_to_end(&mut response)).await.unwrap();
            assert!(response.ends_with(b"ok"));
            let session = tls.get_ref().1;
            assert_eq!(session.protocol_version(), Some(version.version));
            // In TLS 1.3, a client with a key share that is not the server's first choice is asked
            // for another, which is a full handshake too.
            let full = session.handshake_kind() != Some(HandshakeKind::Resumed);
            assert_eq!(full, expected == HandshakeKind::Full, "{:?}", version.version);
        }
    }
}

#[tokio::test]
async fn who_asks_for_a_stranger_is_told_by_an_alert_and_the_log() {
    let world = World::new("hosts: [pay.example]").await;
    for name in
        ["stranger.example", "login.webscaler-manual", "pay.example.webscaler-manual", TRUE_NAME]
    {
        let error = world.connect(name, &[]).await.err().expect("a refusal");
        assert_eq!(alert(&error), Some(AlertDescription::UnrecognisedName), "{name}: {error}");
        let line = world.proxy.logged(&format!("asked for `{name}`")).await;
        for served in [ALIAS, ALIAS_IN_DNS, "pay.example"] {
            assert!(line.contains(served), "{line}");
        }
    }
    assert_eq!(world.origin.seen().connections, 0);
    // A name is the same in capitals.
    assert!(world.connect("WebScaler-Manual", &[]).await.is_ok());
}

#[tokio::test]
async fn who_names_no_server_is_shown_a_certificate_for_the_address_and_the_names() {
    let mut scene = Scene::new(1).await;
    let origin = scene.script(scripts::respond).remove(0);
    let yaml = scene.yaml("");
    let listen = "listen: [\"127.0.0.1:0\", \"127.0.7.1:0\"]";
    let proxy = Proxy::start(&yaml.replace("listen: [\"127.0.0.1:0\"]", listen)).await;
    for address in proxy.addresses(ALIAS, 2).await {
        let ip = address.ip().to_string();
        let roots = local_roots(&proxy);
        let mut peer = client::connect_tls(address, &ip, roots, &["http/1.1"]).await.unwrap();
        peer.send(format!("GET / HTTP/1.1\r\nHost: {address}\r\n\r\n")).await;
        assert_eq!(peer.response().await.text(), "ok");
        // As Java does it, which asks for a name of one label without SNI.
        for name in [ALIAS, ALIAS_IN_DNS, "localhost"] {
            let mut config = client_config(&proxy, &[&TLS12, &TLS13]);
            Arc::make_mut(&mut config).enable_sni = false;
            assert!(handshake(address, name, &config).await.is_ok(), "{name}");
        }
    }
    origin.assert_called(TRUE_NAME, &scene.authority(TRUE_NAME));
}

#[tokio::test]
async fn localhost_is_a_name_of_a_listener_with_one_alias() {
    let world = World::new("").await;
    let mut peer = world.connect("localhost", &["http/1.1"]).await.unwrap();
    peer.send("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").await;
    assert_eq!(peer.response().await.text(), "ok");
}

#[tokio::test]
async fn who_names_no_server_reaches_the_first_alias_of_a_listener() {
    let mut scene = Scene::new(1).await;
    let _origin = scene.script(scripts::respond);
    let yaml = scene.yaml("");
    let (_, alias) = yaml.split_once("aliases:\n").unwrap();
    let proxy = Proxy::start(&format!("{yaml}{}", alias.replace(ALIAS, "other"))).await;
    let address = proxy.address(ALIAS).await;
    let mut config = client_config(&proxy, &[&TLS12, &TLS13]);
    Arc::make_mut(&mut config).enable_sni = false;
    assert!(handshake(address, ALIAS, &config).await.is_ok());
    assert!(handshake(address, "other", &config).await.is_err());
    // Two aliases: whose would it be?
    let error = handshake(address, "localhost", &client_config(&proxy, &[&TLS13])).await;
    assert_eq!(alert(&error.unwrap_err()), Some(AlertDescription::UnrecognisedName));
}

#[tokio::test]
async fn an_alias_with_any_host_is_shown_for_any_name() {
    let world = World::new("hosts: [\"*\"]").await;
    for name in ["stranger.example", TRUE_NAME, ALIAS] {
        let config = world.config(&[&TLS13]);
        let result = world.handshake(name, &config).await;
        // The certificate is the alias' own, which is valid for no stranger.
        let invalid = |error: &io::Error| error.to_string().contains("not valid for name");
        let shown =
            result.as_ref().is_ok_and(|_| name == ALIAS) || result.as_ref().is_err_and(invalid);
        assert!(shown, "{name}: {:?}", result.err());
    }
}

#[tokio::test]
async fn of_handshakes_that_fail_in_a_flood_the_first_is_logged_and_all_are_counted() {
    const FLOOD: usize = 300;
    let world = World::new("").await;
    let mut strangers = tokio::task::JoinSet::new();
    let name = ServerName::try_from("stranger.example").unwrap();
    let mut hello = Vec::new();
    let config = world.config(&[&TLS12, &TLS13]);
    ClientConnection::new(config, name).unwrap().write_tls(&mut hello).unwrap();
    for _ in 0..FLOOD {
        let (address, hello) = (world.address, hello.clone());
        strangers.spawn(async move {
            let mut peer = client::connect(address).await;
            peer.send(hello).await;
            peer.closed().await;
        });
    }
    within("every refusal", strangers.join_all()).await;
    let end = world.proxy.logged("client TLS handshakes no longer fail for this reason").await;
    assert!(end.contains(&format!("\"failures\":{FLOOD}")) && end.contains("127.0.0.1:0"), "{end}");
    let log = world.proxy.log();
    let told = log.lines().filter(|line| line.contains("client TLS handshake failed")).count();
    assert_eq!(told, 1, "{log}");
    assert_eq!(client::get(world.address, ALIAS, "/").await.text(), "ok");
}

#[tokio::test]
async fn a_client_that_does_not_trust_the_root_is_told_in_the_log() {
    let world = World::new("").await;
    let refused = curl(&[
        "--resolve",
        &world.resolve(ALIAS),
        &format!("https://{ALIAS}:{}/", world.address.port()),
    ])
    .await;
    assert_eq!(refused.code, 60, "{refused:?}");
    let line = world.proxy.logged("client TLS handshake failed").await;
    assert!(line.contains("UnknownCA"), "{line}");
}

#[tokio::test]
async fn a_client_hello_may_come_in_any_two_pieces() {
    // One worker, so that whoever was served after the first pieces were sent proves them read.
    let world = World::with("workers: 1\n", "").await;
    let config = world.config(&[&TLS12, &TLS13]);
    let mut halves = Vec::new();
    for cut in 1.. {
        let name = ServerName::try_from(ALIAS).unwrap();
        let mut session = ClientConnection::new(config.clone(), name).unwrap();
        let mut hello = Vec::new();
        session.write_tls(&mut hello).unwrap();
        if cut >= hello.len() {
            break;
        }
        let mut tcp = TcpStream::connect(world.address).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        tcp.write_all(&hello[..cut]).await.unwrap();
        halves.push((session, tcp, hello.split_off(cut)));
    }
    assert!(halves.len() > 200, "a hello of {}", halves.len());
    assert_eq!(client::get(world.address, ALIAS, "/").await.text(), "ok");
    for (mut session, mut tcp, rest) in halves {
        tcp.write_all(&rest).await.unwrap();
        within("the handshake", async {
            while session.is_handshaking() {
                let mut bytes = [0; 4096];
                let count = tcp.read(&mut bytes).await.unwrap();
                assert_ne!(count, 0, "closed after a cut at {} from the end", rest.len());
                session.read_tls(&mut &bytes[..count]).unwrap();
                session.process_new_packets().unwrap();
                let mut response = Vec::new();
                session.write_tls(&mut response).unwrap();
                tcp.write_all(&response).await.unwrap();
            }
        })
        .await;
    }
}

#[tokio::test]
async fn a_client_hello_may_come_byte_by_byte() {
    let world = World::new("").await;
    let (near, far) = tokio::io::duplex(1);
    let tcp = TcpStream::connect(world.address).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    // What is written into a pipe of one byte comes out, and is sent, one by one.
    let (mut from_proxy, mut to_proxy) = tcp.into_split();
    let (mut from_client, mut to_client) = tokio::io::split(far);
    tokio::spawn(async move {
        let mut byte = [0];
        while from_client.read(&mut byte).await.is_ok_and(|count| count == 1) {
            to_proxy.write_all(&byte).await.unwrap();
        }
    });
    tokio::spawn(async move {
        tokio::io::copy(&mut from_proxy, &mut to_client).await.unwrap();
        to_client.shutdown().await.unwrap();
    });
    let name = ServerName::try_from(ALIAS).unwrap();
    let connector = TlsConnector::from(world.config(&[&TLS12, &TLS13]));
    let mut tls = within("a handshake", connector.connect(name, near)).await.unwrap();
    let request = format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\nConnection: close\r\n\r\n");
    tls.write_all(request.as_bytes()).await.unwrap();
    tls.flush().await.unwrap();
    let mut response = Vec::new();
    within("the response", tls.read_to_end(&mut response)).await.unwrap();
    assert!(response.ends_with(b"ok"));
}

#[tokio::test]
async fn a_ticket_of_a_former_life_is_no_obstacle() {
    let mut scene = Scene::new(1).await;
    let _origin = scene.script(scripts::respond);
    let authority = tempfile::tempdir().unwrap();
    let yaml = format!("{}ca: {{directory: {:?}}}\n", scene.yaml(""), authority.path());
    let mut config = None;
    // The second proxy has the same root, and other keys for its tickets.
    for expected in [[false, true], [false, true]] {
        let proxy = Proxy::start(&yaml).await;
        let address = proxy.address(ALIAS).await;
        let config = config.get_or_insert_with(|| {
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let builder = ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .unwrap();
            let roots = roots_of(&authority.path().join("ca.pem"));
            Arc::new(builder.with_root_certificates(roots).with_no_client_auth())
        });
        for resumed in expected {
            let tcp = TcpStream::connect(address).await.unwrap();
            let name = ServerName::try_from(ALIAS).unwrap();
            let handshake = TlsConnector::from(config.clone()).connect(name, tcp);
            let mut tls = within("a handshake", handshake).await.unwrap();
            let request = format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\nConnection: close\r\n\r\n");
            tls.write_all(request.as_bytes()).await.unwrap();
            let mut response = Vec::new();
            within("the response", tls.read_to_end(&mut response)).await.unwrap();
            assert!(response.ends_with(b"ok"));
            let kind = tls.get_ref().1.handshake_kind();
            assert_eq!(kind == Some(HandshakeKind::Resumed), resumed, "{kind:?}");
        }
    }
}

#[tokio::test]
async fn a_handshake_or_preface_that_never_ends_is_given_up_on() {
    // The default of 30 seconds is longer than the test may take.
    let world = World::with("listener: {header_timeout: 1s}\n", "").await;
    let hello = world.client_hello();
    for sent in [&hello[..1], &hello[..hello.len() / 2], &hello[..]] {
        let mut peer = client::connect(world.address).await;
        peer.send(sent).await;
        peer.closed().await;
    }
    for sent in [&b""[..], b"PRI * HTTP/2"] {
        let mut peer = world.connect(ALIAS, &["h2"]).await.unwrap();
        peer.send(sent).await;
        peer.closed().await;
    }
    // HTTP/1 is told.
    let mut peer = world.connect(ALIAS, &["http/1.1"]).await.unwrap();
    peer.send("GET / HTT").await;
    assert_eq!(peer.response().await.status(), 408);
}

#[tokio::test]
async fn ten_thousand_half_open_handshakes_do_not_keep_others_from_being_served() {
    const HALF_OPEN: usize = 10_000;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    assert!(most > HALF_OPEN as u64 + 500, "this test needs more open files: `ulimit -Hn`");
    let listener = format!("listener: {{max_connections: {}}}\n", HALF_OPEN + 10);
    let world = World::with(&listener, "").await;
    let hello = world.client_hello();
    let before = world.proxy.peak_memory();
    let mut open = Vec::new();
    for number in 0..HALF_OPEN {
        let mut tcp = TcpStream::connect(world.address).await.unwrap();
        tcp.write_all(&hello[..1 + number % (hello.len() - 1)]).await.unwrap();
        open.push(tcp);
        if number % 1000 == 999 {
            let response = world.curl(ALIAS, &[]).await;
            assert_eq!(response.stdout, "ok", "{response:?}");
        }
    }
    let each = (world.proxy.peak_memory() - before) / HALF_OPEN;
    assert!(each < 32 * 1024, "{each} bytes for each that says too little");
}

#[tokio::test]
async fn the_shells_limit_of_open_files_is_raised_as_far_as_it_may_be() {
    let scene = Scene::new(1).await;
    for (hard, warned) in [("", false), ("ulimit -Hn 512; ", true)] {
        let proxy = Setup::new(&scene.yaml("")).shell(&format!("ulimit -Sn 256; {hard}"));
        let proxy = proxy.start().await;
        let (soft, hard) = proxy.file_limit();
        assert_eq!(soft, hard);
        assert_ne!(soft, "256");
        assert_eq!(proxy.log().contains("is lower than `listener.max_connections`"), warned);
    }
}

#[tokio::test]
async fn half_open_handshakes_are_as_many_as_connections_may_be() {
    let world = World::with("listener: {max_connections: 8, header_timeout: 2s}\n", "").await;
    let hello = world.client_hello();
    let mut open = Vec::new();
    for _ in 0..8 {
        let mut peer = client::connect(world.address).await;
        peer.send(&hello[..40]).await;
        open.push(peer);
    }
    // The ninth waits in the kernel, and is served when the others have been given up on.
    let mut ninth = client::connect(world.address).await;
    ninth.send(format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    assert_eq!(ninth.response().await.text(), "ok");
    let mut closed = 0;
    for peer in &mut open {
        peer.closed().await;
        closed += 1;
    }
    assert_eq!(closed, 8);
}

#[tokio::test]
async fn redirects_and_cookies_of_a_tls_listener_are_https() {
    let mut scene = Scene::new(1).await;
    let location = format!("https://{}/next", scene.authority(TRUE_NAME));
    let response = format!(
        "HTTP/1.1 302 Found\r\nLocation: {location}\r\nSet-Cookie: a=b; Domain={TRUE_NAME}; Secure\r\n\
         Content-Length: 0\r\n\r\n"
    );
    let _origins = scene.script(move |arrival| scripts::always(arrival, response.clone()));
    let proxy = Proxy::start(&scene.yaml("")).await;
    let address = proxy.address(ALIAS).await;
    let roots = local_roots(&proxy);
    let mut peer = client::connect_tls(address, ALIAS, roots, &["http/1.1"]).await.unwrap();
    let authority = format!("{ALIAS}:{}", address.port());
    peer.send(format!("GET / HTTP/1.1\r\nHost: {authority}\r\n\r\n")).await;
    let response = peer.response().await;
    assert_eq!(response.field("location"), Some(format!("https://{authority}/next").as_str()));
    assert!(response.field("set-cookie").unwrap().contains("Secure"), "{}", response.head);
}

/// A proxy with one alias that responds `ok`, and the root that its authority had made.
struct World {
    scene: Scene,
    origin: RawOrigin,
    proxy: Proxy,
    address: SocketAddr,
}

impl World {
    /// `keys` are further lines of the alias.
    async fn new(keys: &str) -> Self {
        Self::with("", keys).await
    }

    /// `top` are further lines of the configuration.
    async fn with(top: &str, keys: &str) -> Self {
        let mut scene = Scene::new(1).await;
        let origin = scene.script(scripts::respond).remove(0);
        let proxy = Proxy::start(&format!("{top}{}", scene.yaml(keys))).await;
        let address = proxy.address(ALIAS).await;
        Self { scene, origin, proxy, address }
    }

    async fn connect(&self, name: &str, alpn: &[&str]) -> io::Result<Peer> {
        client::connect_tls(self.address, name, local_roots(&self.proxy), alpn).await
    }

    fn config(&self, versions: &[&'static SupportedProtocolVersion]) -> Arc<ClientConfig> {
        client_config(&self.proxy, versions)
    }

    async fn handshake(
        &self,
        name: &str,
        config: &Arc<ClientConfig>,
    ) -> io::Result<TlsStream<TcpStream>> {
        handshake(self.address, name, config).await
    }

    fn client_hello(&self) -> Vec<u8> {
        let name = ServerName::try_from(ALIAS).unwrap();
        let config = self.config(&[&TLS12, &TLS13]);
        let mut hello = Vec::new();
        ClientConnection::new(config, name).unwrap().write_tls(&mut hello).unwrap();
        hello
    }

    fn resolve(&self, name: &str) -> String {
        format!("{name}:{}:{}", self.address.port(), self.address.ip())
    }

    async fn curl(&self, name: &str, arguments: &[&str]) -> Curl {
        let root = root_file(&self.proxy);
        let url = format!("https://{name}:{}/", self.address.port());
        let resolve = self.resolve(name);
        let all = ["--cacert", root.to_str().unwrap(), "--resolve", &resolve, &url];
        curl(&[&all, arguments].concat()).await
    }
}

fn root_file(proxy: &Proxy) -> std::path::PathBuf {
    proxy.folder().join("state/truename/ca.pem")
}

fn local_roots(proxy: &Proxy) -> Arc<RootCertStore> {
    roots_of(&root_file(proxy))
}

fn roots_of(file: &Path) -> Arc<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(file).unwrap() {
        roots.add(root.unwrap()).unwrap();
    }
    Arc::new(roots)
}

fn client_config(
    proxy: &Proxy,
    versions: &[&'static SupportedProtocolVersion],
) -> Arc<ClientConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)
        .unwrap()
        .with_root_certificates(local_roots(proxy))
        .with_no_client_auth();
    Arc::new(config)
}

async fn handshake(
    address: SocketAddr,
    name: &str,
    config: &Arc<ClientConfig>,
) -> io::Result<TlsStream<TcpStream>> {
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let tcp = TcpStream::connect(address).await.unwrap();
    within("a handshake", TlsConnector::from(config.clone()).connect(name, tcp)).await
}

/// The alert that ended a handshake.
fn alert(error: &io::Error) -> Option<AlertDescription> {
    match error.get_ref()?.downcast_ref::<rustls::Error>()? {
        rustls::Error::AlertReceived(alert) => Some(*alert),
        _ => None,
    }
}
