//! What an application gets when truename responds in the target's place.

use std::{net::SocketAddr, sync::Arc};

use crate::support::{
    client,
    curl::curl,
    loopback::{self, Blackhole},
    message::Message,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts,
    service_origin::ServiceOrigin,
    trust, within,
};
use rustls::{
    ServerConfig,
    pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer},
    server::WebPkiClientVerifier,
};
use serde_json::{Value, json};
use tokio::net::UdpSocket;
use tokio_rustls::TlsAcceptor;
use truename::demo::{
    authority::{Authority, LeafOptions},
    dns::DnsResponse,
};

#[tokio::test]
async fn a_host_that_is_no_alias_is_told_which_ones_are() {
    let (_scene, _origin, proxy) = with("", scripts::respond).await;
    let response = client::get(proxy.address(ALIAS).await, "evil.example", "/").await;
    let problem = problem(&response, 404, "destination_not_found", "route");
    tells(&problem, "detail", &["`evil.example`", ALIAS]);
    tells(&problem, "fix", &["`hosts`"]);
    for unknown in ["alias", "true_name", "chain", "endpoint"] {
        assert_eq!(problem[unknown], Value::Null, "{unknown}");
    }
}

#[tokio::test]
async fn an_alias_that_dns_does_not_know_is_a_dns_error() {
    let (scene, _origin, proxy) = with("", scripts::respond).await;
    scene.dns.remove(ALIAS_IN_DNS);
    let response = get(&restarted(&scene, proxy, "").await).await;
    let problem = problem(&response, 503, "dns_error", "resolve");
    tells(&problem, "detail", &["NXDOMAIN", ALIAS_IN_DNS, &scene.dns.address().to_string()]);
    tells(&problem, "fix", &["`name:`", "`target:`"]);
    assert_eq!(problem["alias"], ALIAS);
    assert_eq!(problem["chain"], json!([ALIAS_IN_DNS]));
    assert_eq!(problem["true_name"], Value::Null);
}

#[tokio::test]
async fn dns_that_does_not_respond_is_a_dns_timeout() {
    let (scene, _origin, proxy) = with("", scripts::respond).await;
    scene.dns.respond(ALIAS_IN_DNS, DnsResponse::Silence);
    let response = get(&restarted(&scene, proxy, "timeouts: {connect: 300ms}").await).await;
    let problem = problem(&response, 504, "dns_timeout", "resolve");
    tells(&problem, "fix", &["`dns.servers`"]);
}

/// Regression: the DNS server and the network were blamed.
#[tokio::test]
async fn dns_that_cannot_be_asked_for_want_of_descriptors_names_the_limit() {
    let mut scene = Scene::new(1).await;
    let _origin = scene.script(scripts::respond).remove(0);
    let yaml =
        scene.restless_yaml("").replace("namespace: default", "namespace: default, stale: 0s");
    let proxy = Proxy::start(&yaml).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    let request = format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n");
    peer.send(&request).await;
    assert_eq!(peer.response().await.status(), 200);
    proxy.limit_open_files(Some(4));
    let response = within("a lookup that fails", async {
        loop {
            peer.send(&request).await;
            let response = peer.response().await;
            if response.status() != 200 {
                break response;
            }
        }
    })
    .await;
    let problem = problem(&response, 503, "dns_error", "resolve");
    tells(&problem, "detail", &["Too many open files"]);
    tells(&problem, "fix", &["`ulimit -Hn`"]);
}

#[tokio::test]
async fn a_dns_server_that_is_not_there_is_named_at_once() {
    let (scene, _origin, proxy) = with("", scripts::respond).await;
    let dns = scene.dns.address();
    let nobody = [loopback::listen_anywhere(), loopback::listen_anywhere()];
    let nobody = nobody.map(|socket| socket.local_addr().unwrap());
    drop(proxy);
    let servers = format!("{}\", \"{}", nobody[0], nobody[1]);
    let proxy = Proxy::start(&scene.yaml("").replace(&dns.to_string(), &servers)).await;
    // The first response, which no time-out went before.
    let problem = problem(&get(&proxy).await, 503, "dns_error", "resolve");
    let refused = format!("connection refused by nameservers {}, {}", nobody[0], nobody[1]);
    tells(&problem, "detail", &[&refused]);
    tells(&problem, "fix", &["`dns.servers`"]);
}

#[tokio::test]
async fn a_dns_response_that_needs_tcp_where_tcp_is_refused_says_so() {
    let (scene, _origin, proxy) = with("", scripts::respond).await;
    drop(proxy);
    let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let dns = [scene.dns.address(), server.local_addr().unwrap()].map(|dns| dns.to_string());
    let yaml = scene.yaml("").replace(&dns[0], &dns[1]);
    let truncates = tokio::spawn(async move {
        let mut query = [0; 512];
        loop {
            let (length, peer) = server.recv_from(&mut query).await.unwrap();
            // A response, truncated: the question is all that it has.
            query[2..4].copy_from_slice(&[0x83, 0x80]);
            server.send_to(&query[..length], peer).await.unwrap();
        }
    });
    let proxy = Proxy::start(&yaml).await;
    let problem = problem(&get(&proxy).await, 503, "dns_error", "resolve");
    tells(
        &problem,
        "detail",
        &["does not fit into a datagram, and over TCP it refused the connection"],
    );
    tells(&problem, "fix", &["TCP", "NetworkPolicy"]);
    truncates.abort();
}

#[tokio::test]
async fn a_port_where_nobody_listens_refuses() {
    let mut scene = Scene::new(2).await;
    scene.take_listeners();
    let proxy = Proxy::start(&scene.yaml("")).await;
    let response = get(&proxy).await;
    let problem = problem(&response, 502, "connection_refused", "connect");
    assert_eq!(problem["true_name"], TRUE_NAME);
    assert_eq!(problem["chain"], json!([ALIAS_IN_DNS, TRUE_NAME]));
    let endpoints = scene.addresses.iter().map(|ip| SocketAddr::new(*ip, scene.port).to_string());
    assert!(endpoints.into_iter().any(|endpoint| problem["endpoint"] == endpoint), "{problem}");
    tells(&problem, "fix", &["`port`"]);
    assert_eq!(errors(&proxy, "connection_refused").await, Some(1.0));
}

#[tokio::test]
async fn an_address_without_a_way_to_it_is_unavailable() {
    // TCP has no way to a multicast address, on any machine.
    let scene = Scene::new(1).await;
    let yaml = scene.yaml("target: 224.0.0.1").replace("127.0.0.0/8", "224.0.0.0/4");
    let proxy = Proxy::start(&yaml).await;
    let response = get(&proxy).await;
    let problem = problem(&response, 503, "destination_unavailable", "connect");
    assert_eq!(problem["endpoint"], format!("224.0.0.1:{}", scene.port));
    assert_eq!(response.field("retry-after"), Some("1"));
}

#[tokio::test]
async fn a_connection_without_a_reply_times_out() {
    let scene = Scene::new(1).await;
    let hole = Blackhole::bind(SocketAddr::new(loopback::address(), 0));
    let keys = format!("target: \"{}\"\ntimeouts: {{connect: 300ms}}", hole.address);
    let proxy = Proxy::start(&scene.yaml(&keys)).await;
    let problem = problem(&get(&proxy).await, 504, "connection_timeout", "connect");
    tells(&problem, "detail", &[&hole.address.to_string(), "300ms"]);
    tells(&problem, "fix", &["NetworkPolicy", "`timeouts.connect`"]);
    assert_eq!(errors(&proxy, "connection_timeout").await, Some(1.0));
}

#[tokio::test]
async fn a_handshake_without_a_reply_times_out() {
    let (_scene, _origin, proxy) =
        with("timeouts: {connect: 300ms}", scripts::never_shake_hands).await;
    let problem = problem(&get(&proxy).await, 504, "connection_timeout", "tls");
    tells(&problem, "detail", &["the TLS handshake", "300ms"]);
}

#[tokio::test]
async fn a_response_that_does_not_come_times_out() {
    let (_scene, origin, proxy) = with("timeouts: {response: 300ms}", scripts::never_respond).await;
    let problem = problem(&get(&proxy).await, 504, "http_response_timeout", "response");
    tells(&problem, "fix", &["`timeouts.response`"]);
    assert_eq!(origin.seen().requests.len(), 1, "it was sent again");
}

#[tokio::test]
async fn a_target_that_closes_instead_of_responding_has_its_own_error() {
    let (_scene, origin, proxy) = with("", scripts::close_after_request).await;
    let problem = problem(&get(&proxy).await, 502, "connection_terminated", "response");
    assert_eq!(problem["endpoint"], origin.address.to_string());
    tells(&problem, "detail", &["closed the connection before its response"]);
}

#[tokio::test]
async fn a_target_that_speaks_no_http_is_told_so() {
    let (_scene, _origin, proxy) = with("", scripts::garbage).await;
    let problem = problem(&get(&proxy).await, 502, "http_protocol_error", "response");
    tells(&problem, "detail", &["not HTTP"]);
}

#[tokio::test]
async fn an_expired_certificate_is_told_with_its_date() {
    let expired = trust::authority().issue(&[TRUE_NAME], &[], LeafOptions::expired()).unwrap();
    let (proxy, problem) = refused_certificate(expired.server_config(&[]).unwrap()).await;
    tells(
        &problem,
        "detail",
        &["has expired", "`httpbin.org`", "truename test root", "valid until"],
    );
    tells(&problem, "fix", &["renew", "clock"]);
    let series = format!("truename_upstream_certificate_not_after_seconds{{alias=\"{ALIAS}\"}}");
    let not_after = proxy.metric(&series).await.unwrap();
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    assert!(now - 2.0 * 86_400.0 < not_after && not_after < now, "{not_after} at {now}");
}

#[tokio::test]
async fn a_certificate_for_another_name_is_told_with_both() {
    let (_proxy, problem) =
        refused_certificate(trust::server(&["other.example", "*.a.example"])).await;
    let parts = ["not valid for `httpbin.org`", "it is valid for `other.example`, `*.a.example`"];
    tells(&problem, "detail", &parts);
    tells(&problem, "detail", &["issued by CN=truename test root", "valid until 2"]);
    tells(&problem, "fix", &["`tls.server_name: other.example`"]);
    assert_eq!(problem["true_name"], TRUE_NAME);
}

#[tokio::test]
async fn an_issuer_that_nobody_trusts_is_named() {
    let stranger = Authority::new("a stranger").unwrap();
    let leaf = stranger.issue(&[TRUE_NAME], &[], LeafOptions::default()).unwrap();
    let (_proxy, problem) = refused_certificate(leaf.server_config(&[]).unwrap()).await;
    tells(&problem, "detail", &["unknown issuer", "CN=a stranger"]);
    tells(&problem, "fix", &["`tls.ca.files`"]);
}

#[tokio::test]
async fn a_self_signed_certificate_is_called_that() {
    let own = rcgen::generate_simple_self_signed(vec![TRUE_NAME.to_owned()]).unwrap();
    let key: PrivateKeyDer = PrivatePkcs8KeyDer::from(own.signing_key.serialize_der()).into();
    let config = server_builder().with_no_client_auth();
    let config = config.with_single_cert(vec![own.cert.der().clone()], key).unwrap();
    let (_proxy, problem) = refused_certificate(Arc::new(config)).await;
    tells(&problem, "detail", &["self-signed and not trusted"]);
    tells(&problem, "fix", &["`tls.ca.files`"]);
}

#[tokio::test]
async fn a_server_that_wants_a_client_certificate_is_told_which_key_has_it() {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let roots = trust::authority().roots();
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build().unwrap();
    let leaf = trust::authority().issue(&[TRUE_NAME], &[], LeafOptions::default()).unwrap();
    let config = server_builder().with_client_cert_verifier(verifier);
    let config = config.with_single_cert(leaf.chain.clone(), leaf.key.clone_key()).unwrap();
    let (proxy, response) = response_behind(Some(Arc::new(config)), "").await;
    let problem = problem(&response, 502, "tls_protocol_error", "tls");
    tells(&problem, "detail", &["certificate_required", "requires a client certificate"]);
    tells(&problem, "fix", &["`tls.client_certificate:"]);
    assert_eq!(errors(&proxy, "tls_protocol_error").await, Some(1.0));
}

/// Regression: the message said only that the connection had ended, and not how to fix it.
#[tokio::test]
async fn a_server_of_http2_that_wants_a_client_certificate_is_told_as_well() {
    let mut scene = Scene::new(1).await;
    let listener = scene.take_listeners().remove(0);
    let acceptor = requiring_client_certificates();
    tokio::spawn(async move {
        let mut refused = Vec::new();
        while let Ok((tcp, _)) = listener.accept().await {
            // It stays open, so that the alert is all that the client gets.
            refused.extend(acceptor.accept(tcp).into_fallible().await.err());
        }
    });
    let proxy = Proxy::start(&scene.yaml("http: {version: \"2\"}")).await;
    let problem = problem(&get(&proxy).await, 502, "tls_protocol_error", "tls");
    tells(&problem, "detail", &["certificate_required", "requires a client certificate"]);
    tells(&problem, "fix", &["`tls.client_certificate:"]);
}

/// Regression: an upload often met the closed connection before the alert, and the message did not mention it.
#[tokio::test]
async fn a_server_that_closes_during_an_upload_is_told_as_well() {
    for version in ["1.1", "2"] {
        let mut scene = Scene::new(1).await;
        let listener = scene.take_listeners().remove(0);
        let acceptor = requiring_client_certificates();
        tokio::spawn(async move {
            while let Ok((tcp, _)) = listener.accept().await {
                drop(acceptor.accept(tcp).await);
            }
        });
        let body = tempfile::NamedTempFile::new().unwrap();
        body.as_file().set_len(1 << 20).unwrap();
        let data = format!("@{}", body.path().display());
        let proxy = Proxy::start(&scene.yaml(&format!("http: {{version: \"{version}\"}}"))).await;
        let url = format!("http://{}/", proxy.address(ALIAS).await);
        for _ in 0..30 {
            let host = format!("Host: {ALIAS}");
            let told = curl(&["-H", &host, "-H", "Expect:", "--data-binary", &data, &url]).await;
            assert!(told.stdout.contains("certificate_required"), "{version}: {told:?}");
        }
    }
}

fn requiring_client_certificates() -> TlsAcceptor {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let roots = trust::authority().roots();
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider).build().unwrap();
    let leaf = trust::authority().issue(&[TRUE_NAME], &[], LeafOptions::default()).unwrap();
    let config = server_builder().with_client_cert_verifier(verifier);
    let mut config = config.with_single_cert(leaf.chain.clone(), leaf.key.clone_key()).unwrap();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    TlsAcceptor::from(Arc::new(config))
}

#[tokio::test]
async fn a_plaintext_port_is_called_that() {
    let mut scene = Scene::new(1).await;
    let listener = scene.take_listeners().remove(0);
    let _origin = RawOrigin::start(listener, None, async |arrival: Arrival| {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.some().await;
        conversation.peer.send("HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n").await;
    });
    let proxy = Proxy::start(&scene.yaml("")).await;
    let response = get(&proxy).await;
    let problem = problem(&response, 502, "tls_protocol_error", "tls");
    tells(&problem, "detail", &["responded in plaintext"]);
    tells(&problem, "fix", &["`port`", "`tls.mode: plaintext`"]);
}

#[tokio::test]
async fn tls_without_a_version_in_common_is_told_with_the_key() {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let leaf = trust::authority().issue(&[TRUE_NAME], &[], LeafOptions::default()).unwrap();
    let config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(leaf.chain.clone(), leaf.key.clone_key())
        .unwrap();
    let keys = "tls: {min_version: \"1.3\", ca: {system: false, webpki: false, files: [\"$FOLDER/root.pem\"]}}";
    let (_proxy, response) = response_behind(Some(Arc::new(config)), keys).await;
    let problem = problem(&response, 502, "tls_protocol_error", "tls");
    tells(&problem, "detail", &["no TLS with `httpbin.org`", "1.3"]);
    tells(&problem, "fix", &["`tls.min_version: \"1.2\"`"]);
}

#[tokio::test]
async fn a_request_past_the_limit_gets_its_response_at_once() {
    let mut scene = Scene::new(1).await;
    let listener = scene.take_listeners().remove(0);
    let (_origin, mut streams) = ServiceOrigin::streaming(listener, trust::server(&[TRUE_NAME]));
    let proxy = Proxy::start(&scene.yaml("limits: {requests: 1}")).await;
    let mut first = client::connect(proxy.address(ALIAS).await).await;
    first.send(format!("GET /stream HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    let stream = within("the stream", streams.recv()).await.unwrap();

    let response = get(&proxy).await;
    let problem = problem(&response, 503, "connection_limit_reached", "request");
    tells(&problem, "detail", &["1 requests", "`limits.requests`"]);
    tells(&problem, "fix", &["raise `limits.requests`"]);
    assert_eq!(response.field("retry-after"), Some("1"));

    drop(stream);
    assert_eq!(first.response().await.status(), 200);
    within("room for a request", async {
        while get(&proxy).await.status() != 200 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_request_with_two_hosts_is_malformed() {
    let (_scene, origin, proxy) = with("", scripts::respond).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    peer.send(format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\nHost: evil.example\r\n\r\n")).await;
    problem(&peer.response().await, 400, "http_request_error", "request");
    assert_eq!(origin.seen().connections, 0);
}

#[tokio::test]
async fn a_signature_over_the_host_is_not_broken_in_silence() {
    let (_scene, origin, proxy) = with("", scripts::respond).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    peer.send(format!(
        "GET / HTTP/1.1\r\nHost: {ALIAS}\r\nAuthorization: AWS4-HMAC-SHA256 Credential=AK/20260101/\
         us-east-1/s3/aws4_request, SignedHeaders=host;x-amz-date, Signature=00\r\n\r\n"
    ))
    .await;
    let problem = problem(&peer.response().await, 502, "http_request_denied", "request");
    tells(&problem, "detail", &["signed over its Host", ALIAS, TRUE_NAME]);
    tells(&problem, "fix", &["`host: preserve`"]);
    assert_eq!(origin.seen().requests.len(), 0);
}

#[tokio::test]
async fn an_application_of_http2_is_told_the_same() {
    let (_scene, _origin, proxy) = with("", scripts::respond).await;
    let mut h2 = client::H2::connect(proxy.address(ALIAS).await).await;
    let response = h2.get("http://evil.example/").await.unwrap();
    assert_eq!(response.head.status, 404);
    assert_eq!(response.head.headers["content-type"], "application/problem+json");
    let status = response.head.headers["proxy-status"].to_str().unwrap();
    assert!(status.starts_with("truename; error=destination_not_found; "), "{status}");
    let problem: Value = serde_json::from_slice(&response.body).unwrap();
    assert_eq!(problem["status"], 404);
}

/// Checks what all problems have in common, and gives the body.
#[track_caller]
fn problem(response: &Message, status: u16, error: &str, stage: &str) -> Value {
    assert_eq!(response.status(), status, "{}", String::from_utf8_lossy(&response.body));
    assert_eq!(response.field("content-type"), Some("application/problem+json"));
    let problem = response.json();
    assert_eq!(problem["type"], format!("urn:truename:error:{error}"), "{problem}");
    assert_eq!(problem["status"], status);
    assert_eq!(problem["stage"], stage, "{problem}");
    let detail = problem["detail"].as_str().unwrap();
    assert!(!detail.is_empty() && !problem["title"].as_str().unwrap().is_empty(), "{problem}");
    let known = [
        "type",
        "title",
        "status",
        "detail",
        "alias",
        "true_name",
        "chain",
        "endpoint",
        "stage",
        "fix",
    ];
    for key in problem.as_object().unwrap().keys() {
        assert!(known.contains(&key.as_str()), "{key}");
    }
    // RFC 9209, with a string of RFC 8941 in it.
    let expected = format!("truename; error={error}; details=\"");
    let proxy_status = response.field("proxy-status").unwrap();
    let details = proxy_status.strip_prefix(expected.as_str());
    let details = details.unwrap_or_else(|| panic!("{proxy_status}")).strip_suffix('"').unwrap();
    assert!(details.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{details}");
    assert_eq!(
        details.replace("\\\"", "\"").replace('?', ""),
        detail.replace(|c: char| !c.is_ascii() || c == '?', "")
    );
    problem
}

#[track_caller]
fn tells(problem: &Value, member: &str, parts: &[&str]) {
    let text = problem[member].as_str().unwrap_or_else(|| panic!("no {member} in {problem}"));
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

async fn with<Script, Run>(keys: &str, script: Script) -> (Scene, RawOrigin, Proxy)
where
    Script: Fn(Arrival) -> Run + Clone + Send + Sync + 'static,
    Run: Future<Output = ()> + Send + 'static,
{
    let mut scene = Scene::new(1).await;
    let origin = scene.script(script).remove(0);
    let proxy = Proxy::start(&scene.yaml(keys)).await;
    (scene, origin, proxy)
}

/// Another proxy, which has heard nothing of DNS yet.
async fn restarted(scene: &Scene, old: Proxy, keys: &str) -> Proxy {
    drop(old);
    Proxy::start(&scene.yaml(keys)).await
}

/// The response that a client gets for a target with this certificate.
async fn refused_certificate(tls: Arc<ServerConfig>) -> (Proxy, Value) {
    let (proxy, response) = response_behind(Some(tls), "").await;
    let problem = problem(&response, 502, "tls_certificate_error", "tls");
    assert_eq!(errors(&proxy, "tls_certificate_error").await, Some(1.0));
    (proxy, problem)
}

async fn response_behind(tls: Option<Arc<ServerConfig>>, keys: &str) -> (Proxy, Message) {
    let mut scene = Scene::new(1).await;
    let listener = scene.take_listeners().remove(0);
    let origin = RawOrigin::start(listener, tls, scripts::respond);
    let proxy = Proxy::start(&scene.yaml(keys)).await;
    let response = get(&proxy).await;
    assert_eq!(origin.seen().requests.len(), 0, "a request was sent");
    (proxy, response)
}

fn server_builder() -> rustls::ConfigBuilder<ServerConfig, rustls::WantsVerifier> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap()
}

async fn get(proxy: &Proxy) -> Message {
    client::get(proxy.address(ALIAS).await, ALIAS, "/").await
}

async fn errors(proxy: &Proxy, error: &str) -> Option<f64> {
    let series = format!("truename_upstream_errors_total{{alias=\"{ALIAS}\",error=\"{error}\"}}");
    proxy.metric(&series).await
}
