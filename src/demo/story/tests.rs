use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::demo::authority::LeafOptions;

#[tokio::test]
async fn the_story_holds_with_a_proxy_that_does_its_part() {
    let world = World::start().unwrap();
    let host = format!("{TRUE_NAME}:{}", world.port());
    let (story, page) = told(&world, StandIn { host, addresses: ADDRESSES.to_vec() }).await;

    assert!(story.held(), "{page}");
    for part in [
        "webscaler-manual.default.svc.cluster.local  canonical name = httpbin.org",
        "Address: 127.0.0.14",
        "(60) SSL: no alternative certificate subject name matches target host name \
         'webscaler-manual'",
        "the certificate's only name   httpbin.org",
        "SNI   httpbin.org\n",
        "  127.0.0.11   ##########",
        "ok  https://webscaler-manual works, and both certificates are verified",
        "ok  40 of 40 succeeded",
    ] {
        assert!(page.contains(part), "{part:?} is not in\n{page}");
    }
    assert!(!page.contains('\x1b'), "colour on a page that is no terminal");
}

#[tokio::test]
async fn the_story_does_not_hold_where_the_alias_is_sent_as_host() {
    let world = World::start().unwrap();
    let stand_in = StandIn { host: ALIAS.to_owned(), addresses: ADDRESSES.to_vec() };
    let (story, page) = told(&world, stand_in).await;

    assert!(!story.held());
    let failures: Vec<_> = story.failures().collect();
    assert_eq!(failures, ["SNI and Host were httpbin.org"], "{page}");
}

#[tokio::test]
async fn the_story_does_not_hold_where_one_address_is_left_out() {
    let world = World::start().unwrap();
    let host = format!("{TRUE_NAME}:{}", world.port());
    let (story, page) = told(&world, StandIn { host, addresses: ADDRESSES[1..].to_vec() }).await;

    let failures: Vec<_> = story.failures().collect();
    assert_eq!(failures, ["every address served some requests"], "{page}");
}

#[tokio::test]
async fn the_story_does_not_hold_where_nobody_listens() {
    let world = World::start().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let nobody = listener.local_addr().unwrap();
    drop(listener);
    let mut page = Page::plain(Vec::new());
    let roots = world.authority().roots();
    let nobody = Proxy { alias: nobody, forward: nobody, roots, database: nobody };
    let story = tell(&world, &nobody, &mut page).await.unwrap();

    assert!(!story.held());
    assert_eq!(story.failures().count(), 5, "{story:?}");
    let page = String::from_utf8(page.into_inner()).unwrap();
    assert!(page.contains("curl: (7) Failed to connect"), "{page}");
}

#[test]
fn a_story_that_claims_nothing_does_not_hold() {
    assert!(!Story::default().held());
}

#[tokio::test]
async fn every_curl_line_names_where_the_proxy_is() {
    let world = World::start().unwrap();
    let mut page = Page::plain(Vec::new());
    let (alias, database) = ("127.0.0.1:12345".parse().unwrap(), "127.0.0.1:5433".parse().unwrap());
    let proxy = Proxy { alias, forward: alias, roots: world.authority().roots(), database };
    curl_lines(&world, &proxy, &mut page).unwrap();
    let page = String::from_utf8(page.into_inner()).unwrap();
    let commands: Vec<_> = page.lines().filter(|line| line.trim().starts_with("curl ")).collect();
    let (without, with) = commands.split_last().unwrap();
    assert!(with.iter().all(|line| line.contains("http://127.0.0.1:12345/")), "{page}");
    assert!(with[0].contains("-H 'Host: webscaler-manual'"), "{page}");
    assert!(without.contains(&world.root_file().display().to_string()), "{page}");
}

/// What stands in for the proxy: it sends `host` to `addresses` in turn, over TLS to the true name.
struct StandIn {
    host: String,
    addresses: Vec<IpAddr>,
}

async fn told(world: &World, stand_in: StandIn) -> (Story, String) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let alias = listener.local_addr().unwrap();
    let forward_listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let forward = forward_listener.local_addr().unwrap();
    let leaf = world.authority().issue(&[ALIAS], &[], LeafOptions::default()).unwrap();
    let acceptor = TlsAcceptor::from(leaf.server_config(&["http/1.1"]).unwrap());
    let proxy = Proxy { alias, forward, roots: world.authority().roots(), database: alias };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let tls = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(world.authority().roots())
        .with_no_client_auth();
    let (tls, port) = (TlsConnector::from(Arc::new(tls)), world.port());
    let next = Arc::new(AtomicUsize::new(0));
    let mut connections = JoinSet::new();
    let accepting = async {
        loop {
            let (tcp, tunnelled) = tokio::select! {
                accepted = listener.accept() => (accepted.unwrap().0, false),
                accepted = forward_listener.accept() => (accepted.unwrap().0, true),
            };
            let turn = next.fetch_add(1, Ordering::Relaxed);
            let ip = stand_in.addresses[turn % stand_in.addresses.len()];
            let (tls, host) = (tls.clone(), stand_in.host.clone());
            if tunnelled {
                connections.spawn(open(tcp, acceptor.clone(), (ip, port).into(), tls, host));
            } else {
                connections.spawn(pass(tcp, (ip, port).into(), tls, host));
            }
        }
    };

    let mut page = Page::plain(Vec::new());
    let story = tokio::select! {
        story = tell(world, &proxy, &mut page) => story.unwrap(),
        never = accepting => never,
    };
    (story, String::from_utf8(page.into_inner()).unwrap())
}

/// A forward proxy's part: the tunnel, and TLS in the alias' name inside of it.
async fn open(
    mut tcp: TcpStream,
    acceptor: TlsAcceptor,
    origin: SocketAddr,
    tls: TlsConnector,
    host: String,
) {
    let head = read_head(&mut tcp).await;
    assert!(head.starts_with("CONNECT webscaler-manual:443 HTTP/1.1\r\n"), "{head}");
    tcp.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
    pass(acceptor.accept(tcp).await.unwrap(), origin, tls, host).await;
}

async fn read_head<S: AsyncRead + Unpin>(stream: &mut S) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

async fn pass<S>(mut client: S, origin: SocketAddr, tls: TlsConnector, host: String)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let head = read_head(&mut client).await.replace(ALIAS, &host);
    let name = ServerName::try_from(TRUE_NAME).unwrap();
    let upstream = TcpStream::connect(origin).await.unwrap();
    let mut upstream = tls.connect(name, upstream).await.unwrap();
    upstream.write_all(head.as_bytes()).await.unwrap();
    // The client ends the connection, which is an error to one side or none.
    let _ = copy_bidirectional(&mut client, &mut upstream).await;
}
