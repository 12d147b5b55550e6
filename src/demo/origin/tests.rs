use std::{net::Ipv4Addr, process::Command};

use http_body_util::Empty;
use hyper::client;
use rustls::{ClientConfig, pki_types::ServerName};
use serde_json::Value;
use tokio_rustls::TlsConnector;

use super::*;
use crate::demo::authority::{Authority, LeafOptions};

#[tokio::test]
async fn http1_gets_a_response_and_is_counted() {
    let (origin, tls) = start(&["http/1.1"]).await;

    for _ in 0..2 {
        let (mut sender, connection) =
            client::conn::http1::handshake(connect(&origin, &tls).await).await.unwrap();
        let connection = tokio::spawn(connection);
        let response = sender.send_request(get("/anything?test=value")).await.unwrap();
        assert_eq!(response.status(), 200);
        assert_eq!(response.headers()["x-served-by"], "127.0.0.1");
        assert_eq!(text(response).await["args"]["test"], "value");
        drop(sender);
        connection.await.unwrap().unwrap();
    }

    let expected =
        Counts { connections: 2, handshakes_failed: 0, handshakes_resumed: 1, requests: 2 };
    assert_eq!(origin.counts(), expected);
    let visits = origin.visits();
    assert_eq!(visits.len(), 2);
    assert_eq!(visits[0].sni.as_deref(), Some("httpbin.org"));
    assert_eq!(visits[0].host.as_deref(), Some("httpbin.org"));
    assert_eq!(visits[0].target, "/anything?test=value");
    assert_eq!(visits[0].version, Version::HTTP_11);
}

#[tokio::test]
async fn http2_gets_a_response_where_alpn_chose_it() {
    let (origin, tls) = start(&["h2", "http/1.1"]).await;
    let (mut sender, connection) =
        client::conn::http2::handshake(TokioExecutor::new(), connect(&origin, &tls).await)
            .await
            .unwrap();
    tokio::spawn(connection);

    let request = Request::get("https://httpbin.org/get").body(Empty::<Bytes>::new()).unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_eq!(text(response).await["headers"]["Host"], "httpbin.org");
    assert_eq!(origin.visits()[0].version, Version::HTTP_2);

    let request = Request::head("https://httpbin.org/get").body(Empty::<Bytes>::new()).unwrap();
    let response = sender.send_request(request).await.unwrap();
    assert_ne!(response.headers()["content-length"], "0");
    assert!(response.collect().await.unwrap().to_bytes().is_empty());
}

#[tokio::test]
async fn a_stream_has_no_length() {
    let (origin, tls) = start(&["http/1.1"]).await;
    let (mut sender, connection) =
        client::conn::http1::handshake(connect(&origin, &tls).await).await.unwrap();
    tokio::spawn(connection);

    let response = sender.send_request(get("/stream/3")).await.unwrap();
    assert_eq!(response.headers()["transfer-encoding"], "chunked");
    let body = response.collect().await.unwrap().to_bytes();
    assert_eq!(body.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).count(), 3);
}

#[tokio::test]
async fn a_body_too_large_is_refused() {
    let (origin, tls) = start(&["http/1.1"]).await;
    let (mut sender, connection) =
        client::conn::http1::handshake(connect(&origin, &tls).await).await.unwrap();
    tokio::spawn(connection);

    let body = http_body_util::Full::new(Bytes::from(vec![0; MAX_BODY + 1]));
    let request = Request::post("/anything").header("host", "httpbin.org").body(body).unwrap();
    assert_eq!(sender.send_request(request).await.unwrap().status(), 413);
}

#[tokio::test]
async fn a_client_that_distrusts_the_certificate_is_counted() {
    let (origin, _) = start(&["http/1.1"]).await;
    let stranger = client_config(&Authority::new("stranger").unwrap(), &["http/1.1"]);
    let tcp = TcpStream::connect(origin.address()).await.unwrap();
    let name = ServerName::try_from("httpbin.org").unwrap();
    assert!(TlsConnector::from(stranger).connect(name, tcp).await.is_err());

    timeout(Duration::from_secs(10), async {
        while origin.counts().handshakes_failed == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn curl_is_content_and_says_the_storys_words_where_the_name_is_wrong() {
    let authority = Authority::new("curl's root").unwrap();
    let leaf = authority.issue(&["httpbin.org"], &[], LeafOptions::default()).unwrap();
    let origin =
        Origin::start(anywhere(), leaf.server_config(&["h2", "http/1.1"]).unwrap()).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root.pem");
    std::fs::write(&root, authority.root_pem()).unwrap();

    let port = origin.address().port();
    let curl = |host: &str| {
        let mut command = Command::new("curl");
        command.args(["--silent", "--show-error", "--max-time", "10", "--noproxy", "*"]);
        command.arg("--cacert").arg(&root);
        command.args(["--resolve", &format!("{host}:{port}:127.0.0.1")]);
        command.arg(format!("https://{host}:{port}/anything?test=value"));
        tokio::task::spawn_blocking(move || command.output().unwrap())
    };

    let content = curl("httpbin.org").await.unwrap();
    let shown: Value = serde_json::from_slice(&content.stdout).unwrap();
    assert_eq!(shown["url"], format!("https://httpbin.org:{port}/anything?test=value"));

    let refused = curl("webscaler-manual").await.unwrap();
    assert_eq!(refused.status.code(), Some(60));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("webscaler-manual"));
}

type Io = TokioIo<tokio_rustls::client::TlsStream<TcpStream>>;

async fn start(alpn: &[&str]) -> (Origin, TlsConnector) {
    let authority = Authority::new("test root").unwrap();
    let leaf = authority.issue(&["httpbin.org"], &[], LeafOptions::default()).unwrap();
    let origin = Origin::start(anywhere(), leaf.server_config(alpn).unwrap()).await.unwrap();
    (origin, client_config(&authority, alpn).into())
}

fn anywhere() -> SocketAddr {
    (Ipv4Addr::LOCALHOST, 0).into()
}

fn client_config(authority: &Authority, alpn: &[&str]) -> Arc<ClientConfig> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(authority.roots())
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    Arc::new(config)
}

async fn connect(origin: &Origin, tls: &TlsConnector) -> Io {
    let tcp = TcpStream::connect(origin.address()).await.unwrap();
    let name = ServerName::try_from("httpbin.org").unwrap();
    TokioIo::new(tls.connect(name, tcp).await.unwrap())
}

fn get(target: &str) -> Request<Empty<Bytes>> {
    Request::get(target).header("host", "httpbin.org").body(Empty::new()).unwrap()
}

async fn text(response: Response<Incoming>) -> Value {
    serde_json::from_slice(&response.collect().await.unwrap().to_bytes()).unwrap()
}
