//! The tests' own world: what it says about bytes must be true before it judges the proxy.

use std::time::Duration;

use crate::support::{
    client::{self, H2},
    loopback::{self, Blackhole},
    proxy::Bound,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts,
    service_origin::{self, ServiceOrigin},
    trust::{authority, server, server_with_alpn},
};
use http::{HeaderMap, HeaderName, Request, Response, Version};
use hyper::body::Incoming;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};
use truename::{
    config::{Config, TlsMode},
    demo::{
        curl,
        nslookup::{Line, nslookup},
    },
};

#[tokio::test]
async fn a_request_is_noted_as_it_was_on_the_wire() {
    let origin = origin(scripts::respond);
    let mut peer = open(&origin).await;

    let request = "POST //a%2Fb/./%61?x=%20 HTTP/1.1\r\nhOSt:httpbin.org\r\nX-Twice: 1\r\nx-twice:  2 \r\n\
                   Transfer-Encoding: chunked\r\n\r\n3;ext=1\r\nabc\r\n0\r\nTrail: er\r\n\r\n";
    peer.send(request).await;
    assert_eq!(peer.response().await.text(), "ok");

    let seen = origin.seen();
    assert_eq!(seen.server_names, [Some("httpbin.org".to_owned())]);
    let [noted] = seen.requests.as_slice() else { panic!("{seen:?}") };
    assert_eq!(noted.head.clone() + str::from_utf8(&noted.framed_body).unwrap(), request);
    assert_eq!(noted.start_line(), "POST //a%2Fb/./%61?x=%20 HTTP/1.1");
    assert_eq!(noted.body, b"abc");
    assert_eq!(noted.fields()[0], ("hOSt", "httpbin.org"));
    assert_eq!(noted.all("X-TWICE"), ["1", "2"]);
    assert_eq!(noted.trailers, [("Trail".to_owned(), "er".to_owned())]);
}

#[tokio::test]
async fn origins_misbehave_as_told() {
    let quitter = origin(|arrival| scripts::respond_times(arrival, 2));
    let mut peer = open(&quitter).await;
    for _ in 0..2 {
        peer.send(GET).await;
        assert_eq!(peer.response().await.status(), 200);
    }
    assert_eq!(peer.rest().await.unwrap(), b"");
    assert_eq!(quitter.until(|seen| seen.ended == 1).await.requests.len(), 2);

    let halver = origin(scripts::half_a_body);
    let mut peer = open(&halver).await;
    peer.send(GET).await;
    let rest = peer.rest().await.unwrap();
    assert!(rest.ends_with(b"Content-Length: 100\r\n\r\nhalf"));

    let resetter = origin(scripts::reset_after_request);
    let mut peer = open(&resetter).await;
    peer.send(GET).await;
    assert_eq!(peer.rest().await.unwrap_err().kind(), std::io::ErrorKind::ConnectionReset);

    let shy = origin(scripts::close_on_accept);
    let refused = client::connect_tls(shy.address, "httpbin.org", authority().roots(), &[]).await;
    assert!(refused.is_err());
    assert_eq!(shy.until(|seen| seen.ended == 1).await.server_names, []);
}

#[tokio::test]
async fn an_upgraded_connection_echoes() {
    let origin = RawOrigin::start(loopback::listen_anywhere(), None, scripts::upgrade_and_echo);
    let mut peer = client::connect(origin.address).await;
    peer.send("GET / HTTP/1.1\r\nHost: h\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\nearly")
        .await;
    let response = peer.response().await;
    assert_eq!((response.status(), response.field("Upgrade")), (101, Some("echo")));
    assert_eq!(peer.exactly(5).await, b"early");
    peer.send("late").await;
    assert_eq!(peer.exactly(4).await, b"late");
    peer.finish().await;
    assert_eq!(peer.rest().await.unwrap(), b"");
}

#[tokio::test]
async fn http2_in_the_clear_needs_a_server_that_speaks_it() {
    let origin = RawOrigin::start(loopback::listen_anywhere(), None, scripts::garbage);
    let mut client = H2::connect(origin.address).await;
    assert!(client.get("http://httpbin.org/").await.is_err());
}

#[tokio::test]
async fn a_stream_reaches_its_client_bit_by_bit_and_ends_with_trailers() {
    let origin = ServiceOrigin::start(
        loopback::listen_anywhere(),
        server(&["httpbin.org"]),
        async |request: Request<Incoming>| {
            assert_eq!(request.version(), Version::HTTP_2);
            let (sender, body) = service_origin::streamed();
            tokio::spawn(async move {
                sender.data("one ").await;
                sender.data("two").await;
                let trailer = (HeaderName::from_static("grpc-status"), "0".parse().unwrap());
                sender.trailers(HeaderMap::from_iter([trailer])).await;
            });
            Response::new(body)
        },
    );
    let roots = authority().roots();
    let peer = client::connect_tls(origin.address, "httpbin.org", roots, &["h2"]).await.unwrap();
    let response = H2::over(peer).await.get("https://httpbin.org/").await.unwrap();
    assert_eq!(response.body, "one two");
    assert_eq!(response.trailers.unwrap()["grpc-status"], "0");
}

#[tokio::test]
async fn an_origin_may_speak_before_tls_begins() {
    let script = async |mut arrival: Arrival| {
        let mut request = [0; 8];
        arrival.tcp().read_exact(&mut request).await.unwrap();
        assert_eq!(request, SSL_REQUEST);
        arrival.tcp().write_all(b"S").await.unwrap();
        scripts::echo(arrival).await;
    };
    let origin = origin(script);
    let mut tcp = TcpStream::connect(origin.address).await.unwrap();
    tcp.write_all(&SSL_REQUEST).await.unwrap();
    assert_eq!(tcp.read_u8().await.unwrap(), b'S');
    let mut peer = client::handshake(tcp, "httpbin.org", authority().roots(), &[]).await.unwrap();
    peer.send("hello").await;
    assert_eq!(peer.exactly(5).await, b"hello");
}

/// PostgreSQL's, of 8 bytes: their number, then 1234 and 5679.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

#[tokio::test]
async fn a_scene_leads_from_the_alias_to_origins_that_prove_the_true_name() {
    let mut scene = Scene::new(2).await;
    let origins = scene.serve();
    let lines = nslookup(scene.dns.address(), ALIAS_IN_DNS).await.unwrap();
    assert!(
        matches!(&lines[..], [Line::Cname { target, .. }, Line::Address { .. }, Line::Address { .. }]
            if target == TRUE_NAME),
        "{lines:?}"
    );
    for origin in &origins {
        let roots = authority().roots();
        let reply = curl::https(origin.address(), TRUE_NAME, roots, "/get").await.unwrap();
        assert_eq!(reply.served_by, Some(origin.address().ip().to_string()));
    }

    let yaml = scene.yaml("retry: {attempts: 1}\nhealth:\n  active: null");
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root.pem");
    std::fs::write(&root, authority().root_pem()).unwrap();
    let parse = |yaml: &str| {
        let yaml = yaml.replace("$FOLDER", folder.path().to_str().unwrap());
        Config::parse(&yaml, "truename.yaml").unwrap()
    };
    let config = parse(&yaml);
    let trusting = &config.aliases[0];
    assert_eq!((trusting.retry.attempts, trusting.port), (1, scene.port));
    assert_eq!(trusting.tls.ca.files, [root]);
    let plain = parse(&scene.yaml("tls: {mode: plaintext}"));
    assert_eq!(plain.aliases[0].tls.mode, TlsMode::Plaintext);
}

#[tokio::test]
async fn a_black_hole_neither_responds_nor_refuses() {
    let hole = Blackhole::bind((loopback::address(), 0).into());
    let dial = tokio::time::timeout(Duration::from_millis(300), TcpStream::connect(hole.address));
    assert!(dial.await.is_err());
}

#[tokio::test]
async fn endpoints_of_a_target_share_their_port() {
    let addresses = loopback::addresses(4);
    let listeners = loopback::listen(&addresses);
    let bound: Vec<_> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
    assert_eq!(bound.iter().map(|bound| bound.ip()).collect::<Vec<_>>(), addresses);
    assert!(bound.iter().all(|other| other.port() == bound[0].port()));
}

#[test]
fn an_announced_listener_is_found_in_either_format() {
    let admin = Bound::Admin("127.0.0.1:9".parse().unwrap());
    let alias = Bound::Alias("webscaler-manual".to_owned(), "127.0.0.1:8".parse().unwrap());
    for (line, expected) in [
        (
            r#"{"fields":{"message":"listening","address":"127.0.0.1:8","alias":"webscaler-manual"}}"#,
            Some(alias.clone()),
        ),
        (
            r#"{"message":"listening","address":"127.0.0.1:8","alias":"webscaler-manual"}"#,
            Some(alias.clone()),
        ),
        (
            r#"{"fields":{"message":"admin listening","address":"127.0.0.1:9"}}"#,
            Some(admin.clone()),
        ),
        (
            "INFO truename: listening address=127.0.0.1:8 alias=webscaler-manual",
            Some(alias.clone()),
        ),
        ("INFO listening alias=\"webscaler-manual\" address=127.0.0.1:8 tls=true", Some(alias)),
        ("INFO truename: admin listening address=127.0.0.1:9", Some(admin)),
        ("INFO truename: request address=127.0.0.1:9 alias=webscaler-manual", None),
        (r#"{"fields":{"message":"request","address":"127.0.0.1:9"}}"#, None),
        ("thread 'main' panicked", None),
    ] {
        assert_eq!(Bound::parse(line), expected, "{line}");
    }
}

const GET: &str = "GET / HTTP/1.1\r\nHost: httpbin.org\r\n\r\n";

fn origin<Script, Run>(script: Script) -> RawOrigin
where
    Script: Fn(Arrival) -> Run + Send + Sync + 'static,
    Run: Future<Output = ()> + Send + 'static,
{
    let tls = server_with_alpn(&["httpbin.org"], &["http/1.1"]);
    RawOrigin::start(loopback::listen_anywhere(), Some(tls), script)
}

async fn open(origin: &RawOrigin) -> crate::support::peer::Peer {
    let roots = authority().roots();
    client::connect_tls(origin.address, "httpbin.org", roots, &["http/1.1"]).await.unwrap()
}
