//! TLS towards the target, as the keys of `tls:` say, seen from both ends.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use crate::support::{
    client,
    message::Message,
    proxy::{Proxy, Setup},
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene, TRUE_NAME},
    scripts, trust, within,
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, date_time_ymd,
};
use rustls::{
    ServerConfig, SupportedCipherSuite,
    crypto::aws_lc_rs,
    pki_types::PrivatePkcs8KeyDer,
    server::WebPkiClientVerifier,
    version::{TLS12, TLS13},
};
use serde_json::Value;
use x509_parser::prelude::{FromDer as _, X509Certificate};

use truename::demo::{
    authority::{Authority, Leaf, LeafOptions, Usage},
    origin::Origin,
};

/// Long enough for a session to be made and resumed, on a machine that is busy.
const SHORT: Duration = Duration::from_secs(6);

/// Trusts the tests' root alone, with these further keys of `tls:`.
fn tls(keys: &str) -> String {
    let ca = "ca: {system: false, webpki: false, files: [\"$FOLDER/root.pem\"]}";
    format!("tls: {{{ca}, {keys}}}")
}

async fn get(proxy: &Proxy) -> Message {
    client::get(proxy.address(ALIAS).await, ALIAS, "/get").await
}

/// Asserts that the response is truename's own, and gives it.
#[track_caller]
fn problem(response: &Message, status: u16, error: &str) -> Value {
    assert_eq!(response.status(), status, "{}", response.text());
    let told = response.field("proxy-status").expect("a response of the proxy's own");
    assert!(told.contains(&format!("error={error}")), "{told}");
    response.json()
}

fn leaf(options: LeafOptions) -> Leaf {
    trust::authority().issue(&[TRUE_NAME], &[], options).unwrap()
}

fn serve(scene: &mut Scene, tls: Arc<ServerConfig>) -> Origin {
    Origin::serve(scene.take_listeners().remove(0), tls).unwrap()
}

/// A server of `leaf` that speaks only these versions.
fn server_of(leaf: &Leaf, versions: &[&'static rustls::SupportedProtocolVersion]) -> ServerConfig {
    ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(versions)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(leaf.chain.clone(), leaf.key.clone_key())
        .unwrap()
}

/// `sha256/BASE64` of the leaf's public key, as `openssl pkey -pubin -outform der` would have it.
fn pin(leaf: &Leaf) -> String {
    let (_, certificate) = x509_parser::parse_x509_certificate(&leaf.chain[0]).unwrap();
    let suite = aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;
    let SupportedCipherSuite::Tls13(suite) = suite else { panic!("no TLS 1.3 suite") };
    let hash = suite.common.hash_provider.hash(certificate.public_key().raw);
    format!("sha256/{}", STANDARD.encode(hash.as_ref()))
}

#[tokio::test]
async fn a_session_is_resumed_at_another_address_of_the_target() {
    let mut scene = Scene::new(4).await;
    let listeners = scene.take_listeners();
    // The addresses are one service's, which shares the keys of its tickets: no ledger of one
    // server would know the other's sessions.
    let tls = trust::server(&[TRUE_NAME]);
    let mut shared = (*tls).clone();
    shared.ticketer = aws_lc_rs::Ticketer::new().unwrap();
    let shared = Arc::new(shared);
    let origins: Vec<_> = listeners
        .into_iter()
        .map(|listener| Origin::serve(listener, shared.clone()).unwrap())
        .collect();
    let keys = "balance: round_robin\npool: {max_idle: 0}";
    let proxy = Proxy::start(&format!("{}workers: 1\n", scene.yaml(keys))).await;
    for _ in 0..8 {
        assert_eq!(get(&proxy).await.status(), 200);
    }
    let counts: Vec<_> = origins.iter().map(Origin::counts).collect();
    let connections: u64 = counts.iter().map(|count| count.connections).sum();
    let resumed: u64 = counts.iter().map(|count| count.handshakes_resumed).sum();
    assert_eq!((connections, resumed), (8, 7), "{counts:?}");
    assert!(counts.iter().filter(|count| count.handshakes_resumed > 0).count() >= 3, "{counts:?}");
    let series = format!(
        "truename_upstream_tls_handshake_duration_seconds_count{{alias=\"{ALIAS}\",resumed=\"true\"}}"
    );
    assert_eq!(proxy.metric(&series).await, Some(7.0));
}

/// A resumed handshake shows no certificate: what was verified once must still hold.
#[tokio::test]
async fn a_session_is_not_resumed_after_its_certificate_has_expired() {
    let now = SystemTime::now();
    let leaf = leaf(LeafOptions { not_after: Some(now + SHORT), ..LeafOptions::default() });
    let tickets = |mut config: ServerConfig| {
        config.ticketer = aws_lc_rs::Ticketer::new().unwrap();
        config
    };
    let servers = [
        ("1.3", server_of(&leaf, &[&TLS13])),
        ("1.3 by tickets", tickets(server_of(&leaf, &[&TLS13]))),
        ("1.2 by session id", server_of(&leaf, &[&TLS12])),
        ("1.2 by tickets", tickets(server_of(&leaf, &[&TLS12]))),
    ];
    futures_util::future::join_all(servers.map(async |(how, server)| {
        let mut scene = Scene::new(1).await;
        let origin = serve(&mut scene, Arc::new(server));
        let proxy = Proxy::start(&scene.yaml("pool: {max_idle: 0}")).await;
        let refused = within("the certificate to expire", async {
            loop {
                let response = get(&proxy).await;
                if response.status() != 200 {
                    return response;
                }
            }
        });
        let problem = problem(&refused.await, 502, "tls_certificate_error");
        assert!(problem["detail"].as_str().unwrap().contains("has expired"), "{how}: {problem}");
        assert!(SystemTime::now() > now + SHORT, "{how}: too soon");
        assert!(origin.counts().handshakes_resumed > 0, "{how}: {:?}", origin.counts());
    }))
    .await;
}

#[tokio::test]
async fn an_expired_root_is_warned_of_and_verifies_nothing() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.serve();
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "Root of 2020");
    params.not_after = date_time_ymd(2021, 2, 3);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let old = CertifiedIssuer::self_signed(params, key).unwrap();
    let leaf = CertificateParams::new([TRUE_NAME.to_owned()]).unwrap();
    let key = KeyPair::generate().unwrap();
    let leaf = leaf.signed_by(&key, &old).unwrap().der().clone();
    let server = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![leaf], PrivatePkcs8KeyDer::from(key.serialize_der()).into())
        .unwrap();
    let mut other = Scene::new(1).await;
    let origin = serve(&mut other, Arc::new(server));
    // The bundle goes on serving those whose root is in force.
    for (scene, status) in [(&scene, 200), (&other, 502)] {
        let yaml = scene.yaml(&tls("min_version: \"1.2\"").replace("root.pem", "bundle.pem"));
        let bundle = old.pem() + trust::authority().root_pem();
        let proxy = Setup::new(&yaml).file("bundle.pem", bundle).start().await;
        let warned = proxy.logged("certificate expired").await;
        assert!(warned.contains("Root of 2020") && warned.contains("bundle.pem"), "{warned}");
        let response = get(&proxy).await;
        assert_eq!(response.status(), status, "{}", response.text());
        if status == 502 {
            let problem = problem(&response, 502, "tls_certificate_error");
            let told = problem["detail"].as_str().unwrap();
            assert!(told.contains("Root of 2020") && told.contains("expired"), "{problem}");
        }
    }
    assert_eq!(origin.counts().requests, 0);
}

#[tokio::test]
async fn files_add_to_the_roots_of_system_and_webpki() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.serve();
    let yaml = scene.yaml("tls: {ca: {files: [\"$FOLDER/root.pem\"]}}");
    assert_eq!(get(&Proxy::start(&yaml).await).await.status(), 200);
}

#[tokio::test]
async fn files_are_trusted_beside_those_of_ssl_cert_file() {
    let other = Authority::new("corporate root").unwrap();
    let by_other = other.issue(&[TRUE_NAME], &[], LeafOptions::default()).unwrap();
    for ours in [true, false] {
        let mut scene = Scene::new(1).await;
        let server = match ours {
            true => trust::server(&[TRUE_NAME]),
            false => by_other.server_config(&["http/1.1"]).unwrap(),
        };
        let _origin = serve(&mut scene, server);
        let corporate = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(corporate.path(), other.root_pem()).unwrap();
        let proxy = Setup::new(&scene.yaml("tls: {ca: {files: [\"$FOLDER/root.pem\"]}}"))
            .variable("SSL_CERT_FILE", corporate.path().to_str().unwrap())
            .start()
            .await;
        assert_eq!(get(&proxy).await.status(), 200, "ours: {ours}");
    }
}

#[tokio::test]
async fn roots_of_the_system_that_cannot_be_read_are_missed_in_the_log() {
    let scene = Scene::new(1).await;
    for (name, contents) in [("nothing.pem", None), ("empty.pem", Some(""))] {
        let mut setup = Setup::new(&scene.yaml("tls: {ca: {files: [\"$FOLDER/root.pem\"]}}"));
        if let Some(contents) = contents {
            setup = setup.file(name, contents);
        }
        let setup = setup.variable("SSL_CERT_FILE", name).variable("SSL_CERT_DIR", "");
        let proxy = setup.start().await;
        let line = proxy.logged("CA certificates of the system cannot be read").await;
        assert!(line.contains(name) && line.contains("\"warn\""), "{line}");
    }
}

/// Regression: all but the first PEM block of such files was left out without a word.
#[tokio::test]
async fn roots_of_the_system_are_found_in_files_that_were_joined_without_care() {
    let other = Authority::new("another root").unwrap();
    let ours = trust::authority().root_pem();
    let joined = [
        format!("\u{feff}{ours}"),
        format!("{}{ours}", other.root_pem().trim_end()),
        format!("{}\u{feff}{ours}", other.root_pem()),
    ];
    for text in joined {
        for variable in ["SSL_CERT_FILE", "SSL_CERT_DIR"] {
            let mut scene = Scene::new(1).await;
            let _origin = serve(&mut scene, trust::server(&[TRUE_NAME]));
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join("roots.pem");
            std::fs::write(&file, &text).unwrap();
            let place = if variable == "SSL_CERT_FILE" { &file } else { folder.path() };
            let proxy = Setup::new(&scene.yaml("tls: {ca: {webpki: false}}"))
                .variable(variable, place.to_str().unwrap())
                .start()
                .await;
            assert_eq!(get(&proxy).await.status(), 200, "{variable}: {text}");
        }
    }
}

#[tokio::test]
async fn a_root_that_nobody_named_is_not_trusted() {
    let mut scene = Scene::new(1).await;
    let other = Authority::new("another root").unwrap();
    let leaf = other.issue(&[TRUE_NAME], &[], LeafOptions::default()).unwrap();
    let origin = serve(&mut scene, leaf.server_config(&["http/1.1"]).unwrap());
    let proxy = Proxy::start(&scene.yaml("")).await;
    let problem = problem(&get(&proxy).await, 502, "tls_certificate_error");
    assert_eq!(problem["stage"], "tls");
    assert!(problem["fix"].as_str().unwrap().contains("tls.ca.files"), "{problem}");
    assert_eq!(origin.counts().requests, 0);
}

#[tokio::test]
async fn insecure_skip_verify_takes_any_certificate_and_says_so() {
    let mut scene = Scene::new(1).await;
    let other = Authority::new("another root").unwrap();
    let expired = other.issue(&["example.org"], &[], LeafOptions::expired()).unwrap();
    let origin = serve(&mut scene, expired.server_config(&["http/1.1"]).unwrap());
    let proxy = Proxy::start(&scene.yaml("tls: {mode: insecure_skip_verify}")).await;
    proxy.logged("insecure_skip_verify").await;
    assert_eq!(get(&proxy).await.status(), 200);
    assert_eq!(origin.visits()[0].sni.as_deref(), Some(TRUE_NAME));
}

#[tokio::test]
async fn plaintext_speaks_no_tls_and_still_names_the_true_name() {
    let mut scene = Scene::new(1).await;
    let listener = scene.take_listeners().remove(0);
    let origin = RawOrigin::start(listener, None, scripts::respond);
    let proxy = Proxy::start(&scene.yaml("tls: {mode: plaintext}")).await;
    assert_eq!(get(&proxy).await.text(), "ok");
    let seen = origin.seen();
    let host = format!("{TRUE_NAME}:{}", scene.port);
    assert_eq!(seen.requests[0].field("host"), Some(&*host));
}

#[tokio::test]
async fn a_server_below_min_version_is_refused() {
    let leaf = leaf(LeafOptions::default());
    let old = Arc::new(server_of(&leaf, &[&TLS12]));
    let mut scene = Scene::new(1).await;
    let _origin = serve(&mut scene, old.clone());
    let proxy = Proxy::start(&scene.yaml(&tls("min_version: \"1.3\""))).await;
    let problem = problem(&get(&proxy).await, 502, "tls_protocol_error");
    assert!(problem["fix"].as_str().unwrap().contains("tls.min_version"), "{problem}");

    let mut scene = Scene::new(1).await;
    let _origin = serve(&mut scene, old);
    assert_eq!(get(&Proxy::start(&scene.yaml(&tls(""))).await).await.status(), 200);

    let mut scene = Scene::new(1).await;
    let _origin = serve(&mut scene, Arc::new(server_of(&leaf, &[&TLS13])));
    let proxy = Proxy::start(&scene.yaml(&tls("min_version: \"1.3\""))).await;
    assert_eq!(get(&proxy).await.status(), 200);
}

#[tokio::test]
async fn one_of_the_pins_must_be_in_the_chain() {
    let leaf = leaf(LeafOptions::default());
    let (right, wrong) = (pin(&leaf), format!("sha256/{}", STANDARD.encode([7; 32])));
    for (pins, trusted) in [(format!("{wrong}\", \"{right}"), true), (wrong, false)] {
        let mut scene = Scene::new(1).await;
        let origin = serve(&mut scene, leaf.server_config(&["http/1.1"]).unwrap());
        let proxy = Proxy::start(&scene.yaml(&tls(&format!("pins: [\"{pins}\"]")))).await;
        let response = get(&proxy).await;
        if trusted {
            assert_eq!(response.status(), 200, "{}", response.text());
        } else {
            problem(&response, 502, "tls_certificate_error");
            assert_eq!(origin.counts().requests, 0);
        }
    }
}

#[tokio::test]
async fn a_revoked_certificate_is_refused_and_another_of_the_same_issuer_is_not() {
    let (good, bad) = (leaf(LeafOptions::default()), leaf(LeafOptions::default()));
    let list = trust::authority().revocation_list(&[&bad]).unwrap();
    for (leaf, revoked) in [(&good, false), (&bad, true)] {
        let mut scene = Scene::new(1).await;
        let origin = serve(&mut scene, leaf.server_config(&["http/1.1"]).unwrap());
        let yaml = scene.yaml(&tls("crls: [\"$FOLDER/list.pem\"]"));
        let proxy = Setup::new(&yaml).file("list.pem", list.clone()).start().await;
        let response = get(&proxy).await;
        if revoked {
            let problem = problem(&response, 502, "tls_certificate_error");
            assert!(problem["detail"].as_str().unwrap().contains("revoked"), "{problem}");
            assert_eq!(origin.counts().requests, 0);
        } else {
            assert_eq!(response.status(), 200, "{}", response.text());
        }
    }
}

#[tokio::test]
async fn the_client_certificate_is_shown_to_a_server_that_asks() {
    let verifier = WebPkiClientVerifier::builder_with_provider(
        trust::authority().roots(),
        Arc::new(aws_lc_rs::default_provider()),
    );
    let leaf_of_server = leaf(LeafOptions::default());
    let server = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(leaf_of_server.chain.clone(), leaf_of_server.key.clone_key())
        .unwrap();
    let server = Arc::new(server);
    let options = LeafOptions { usage: Usage::Client, ..LeafOptions::default() };
    let client = trust::authority().issue(&["application"], &[], options).unwrap();

    let mut scene = Scene::new(1).await;
    let _origin = serve(&mut scene, server.clone());
    let keys = "client_certificate: {cert: \"$FOLDER/client.pem\", key: \"$FOLDER/client.key\"}";
    let proxy = Setup::new(&scene.yaml(&tls(keys)))
        .file("client.pem", client.chain_pem.clone())
        .file("client.key", client.key_pem.clone())
        .start()
        .await;
    assert_eq!(get(&proxy).await.status(), 200);

    let mut scene = Scene::new(1).await;
    let origin = serve(&mut scene, server);
    let proxy = Proxy::start(&scene.yaml(&tls(""))).await;
    let response = get(&proxy).await;
    assert_eq!(response.status(), 502, "{}", response.text());
    let problem = response.json();
    assert!(problem["fix"].as_str().unwrap().contains("tls.client_certificate"), "{problem}");
    assert_eq!(origin.counts().requests, 0);
}

#[tokio::test]
async fn a_certificate_that_proves_nothing_is_explained_and_its_end_is_told() {
    let issue = |names: &[&str], options| trust::authority().issue(names, &[], options).unwrap();
    let tomorrow = Some(SystemTime::now() + Duration::from_secs(86_400));
    let next_week = Some(SystemTime::now() + Duration::from_secs(7 * 86_400));
    let own = |options| issue(&[TRUE_NAME], options);
    let any = LeafOptions::default;
    for (leaf, word) in [
        (own(LeafOptions::expired()), "has expired"),
        (own(LeafOptions { not_before: tomorrow, not_after: next_week, ..any() }), "not valid yet"),
        (own(LeafOptions { usage: Usage::Client, ..any() }), "was not issued for servers"),
        (issue(&["example.org"], any()), "it is valid for `example.org`"),
        (issue(&["*.httpbin.org"], any()), "it is valid for `*.httpbin.org`"),
        (issue(&["*.*.org"], any()), "it is valid for `*.*.org`"),
        (
            issue(&[], LeafOptions { common_name: Some(TRUE_NAME.to_owned()), ..any() }),
            "only the common name `httpbin.org`",
        ),
    ] {
        let mut scene = Scene::new(1).await;
        let origin = serve(&mut scene, leaf.server_config(&["http/1.1"]).unwrap());
        let proxy = Proxy::start(&scene.yaml("")).await;
        let problem = problem(&get(&proxy).await, 502, "tls_certificate_error");
        assert!(problem["detail"].as_str().unwrap().contains(word), "{problem}");
        assert_eq!(origin.counts().requests, 0);
        let expiry =
            format!("truename_upstream_certificate_not_after_seconds{{alias=\"{ALIAS}\"}}");
        let (_, parsed) = X509Certificate::from_der(&leaf.chain[0]).unwrap();
        let not_after = parsed.validity().not_after.timestamp() as f64;
        assert_eq!(proxy.metric(&expiry).await, Some(not_after), "{word}");
    }
}

#[tokio::test]
async fn a_wrong_certificate_at_one_of_four_addresses_costs_no_request() {
    let mut scene = Scene::new(4).await;
    let mut listeners = scene.take_listeners();
    let wrong = trust::server_with_alpn(&["example.org"], &["http/1.1"]);
    let right = trust::server_with_alpn(&[TRUE_NAME], &["http/1.1"]);
    let misconfigured = RawOrigin::start(listeners.remove(0), Some(wrong), scripts::respond);
    let start = |listener| RawOrigin::start(listener, Some(right.clone()), scripts::respond);
    let origins: Vec<_> = listeners.into_iter().map(start).collect();
    let proxy = Proxy::start(&scene.yaml("balance: round_robin")).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    for _ in 0..20 {
        peer.send(format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\nContent-Length: 1\r\n\r\n1")).await;
        assert_eq!(peer.response().await.status(), 200);
    }
    assert!(misconfigured.until(|seen| seen.failed_handshakes > 0).await.requests.is_empty());
    assert!(origins.iter().all(|origin| !origin.seen().requests.is_empty()));
}

#[tokio::test]
async fn a_server_that_never_shakes_hands_is_given_up_after_timeouts_connect() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(|arrival: Arrival| scripts::never_shake_hands(arrival));
    let keys = "timeouts: {connect: 200ms}\nretry: {attempts: 0}";
    let proxy = Proxy::start(&scene.yaml(keys)).await;
    let problem = problem(&get(&proxy).await, 504, "connection_timeout");
    assert_eq!(problem["stage"], "tls");
    assert!(problem["fix"].as_str().unwrap().contains("timeouts.connect"), "{problem}");
    assert_eq!(origins[0].seen().connections, 1);
}

#[tokio::test]
async fn no_root_is_an_error_at_the_start() {
    let scene = Scene::new(1).await;
    let yaml = scene.yaml("tls: {ca: {system: false, webpki: false}}");
    let status = Setup::new(&yaml).spawn().exit().await;
    assert_eq!(status.code(), Some(2));
}
