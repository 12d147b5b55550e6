use std::{
    net::Ipv4Addr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::TlsConnector;

use super::*;

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
        "ok  40 of 40 were answered",
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
    assert_eq!(failures, ["the origin was called httpbin.org, in SNI and in Host"], "{page}");
}

#[tokio::test]
async fn the_story_does_not_hold_where_one_address_is_left_out() {
    let world = World::start().unwrap();
    let host = format!("{TRUE_NAME}:{}", world.port());
    let (story, page) = told(&world, StandIn { host, addresses: ADDRESSES[1..].to_vec() }).await;

    let failures: Vec<_> = story.failures().collect();
    assert_eq!(failures, ["every address served some of them"], "{page}");
}

#[tokio::test]
async fn the_story_does_not_hold_where_nobody_listens() {
    let world = World::start().unwrap();
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let nobody = listener.local_addr().unwrap();
    drop(listener);
    let mut page = Page::plain(Vec::new());
    let story = tell(&world, nobody, &mut page).await.unwrap();

    assert!(!story.held());
    assert_eq!(story.failures().count(), 4, "{story:?}");
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
    curl_lines(&world, "127.0.0.1:12345".parse().unwrap(), &mut page).unwrap();
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
    let proxy = listener.local_addr().unwrap();
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
            let (tcp, _) = listener.accept().await.unwrap();
            let turn = next.fetch_add(1, Ordering::Relaxed);
            let ip = stand_in.addresses[turn % stand_in.addresses.len()];
            connections.spawn(pass(tcp, (ip, port).into(), tls.clone(), stand_in.host.clone()));
        }
    };

    let mut page = Page::plain(Vec::new());
    let story = tokio::select! {
        story = tell(world, proxy, &mut page) => story.unwrap(),
        never = accepting => never,
    };
    (story, String::from_utf8(page.into_inner()).unwrap())
}

async fn pass(mut tcp: TcpStream, origin: SocketAddr, tls: TlsConnector, host: String) {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(tcp.read_u8().await.unwrap());
    }
    let head = String::from_utf8(head).unwrap().replace(ALIAS, &host);
    let name = ServerName::try_from(TRUE_NAME).unwrap();
    let upstream = TcpStream::connect(origin).await.unwrap();
    let mut upstream = tls.connect(name, upstream).await.unwrap();
    upstream.write_all(head.as_bytes()).await.unwrap();
    // The client ends the connection, which is an error to one side or none.
    let _ = copy_bidirectional(&mut tcp, &mut upstream).await;
}
