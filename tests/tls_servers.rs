//! Servers of another age, and chains as certificate authorities really make them.

use std::{
    process::{Child, Command, Stdio},
    sync::Arc,
};

use crate::support::{
    client,
    proxy::{Proxy, Setup},
    raw_origin::RawOrigin,
    scene::{ALIAS, Scene, TRUE_NAME},
    scripts, within,
};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
};
use serde_json::Value;
use tokio::net::TcpStream;

#[tokio::test]
async fn a_server_of_tls_1_0_only_is_told_to_lack_1_2() {
    let problem = response_of(&["-tls1", "-cipher", "DEFAULT:@SECLEVEL=0"]).await;
    assert_eq!(problem["status"], 502);
    assert_eq!(problem["type"], "urn:truename:error:tls_protocol_error");
    assert_eq!(problem["stage"], "tls");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("TLS 1.2"), "{detail}");
}

#[tokio::test]
async fn a_server_with_rsa_key_exchange_only_is_told_to_lack_forward_secrecy() {
    let problem = response_of(&["-tls1_2", "-cipher", "AES128-GCM-SHA256"]).await;
    assert_eq!(problem["status"], 502);
    assert_eq!(problem["type"], "urn:truename:error:tls_protocol_error");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("RSA key exchange"), "{detail}");
}

#[tokio::test]
async fn a_chain_of_four_intermediates_is_followed() {
    let (root, config) = chain(4, true);
    let (_scene, _origin, proxy) = behind(config, &root).await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 200);
}

#[tokio::test]
async fn a_server_that_leaves_out_its_intermediates_has_an_unknown_issuer() {
    let (root, config) = chain(1, false);
    let (_scene, _origin, proxy) = behind(config, &root).await;
    let response = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    let problem: Value = serde_json::from_str(response.text()).unwrap();
    assert_eq!(problem["type"], "urn:truename:error:tls_certificate_error");
    let detail = problem["detail"].as_str().unwrap();
    assert!(detail.contains("intermediate 0"), "the issuer is named: {detail}");
}

/// What a client hears of `openssl s_server` with these arguments.
async fn response_of(arguments: &[&str]) -> Value {
    let mut scene = Scene::new(1).await;
    drop(scene.take_listeners());
    let folder = tempfile::tempdir().unwrap();
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=httpbin.org"])
        .args(["-keyout", "key.pem", "-out", "certificate.pem"])
        .current_dir(&folder)
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let address = format!("{}:{}", scene.addresses[0], scene.port);
    let server = Command::new("openssl")
        .args([
            "s_server",
            "-accept",
            &address,
            "-key",
            "key.pem",
            "-cert",
            "certificate.pem",
            "-www",
        ])
        .args(arguments)
        .current_dir(&folder)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let _server = Killed(server);
    within("a server that listens", async {
        while TcpStream::connect(&address).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let proxy = Proxy::start(&scene.yaml("")).await;
    let response = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    serde_json::from_str(response.text()).unwrap()
}

struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A proxy that trusts `root` only, before an origin with this configuration.
async fn behind(config: Arc<ServerConfig>, root: &str) -> (Scene, RawOrigin, Proxy) {
    let mut scene = Scene::new(1).await;
    let listener = scene.take_listeners().remove(0);
    let origin = RawOrigin::start(listener, Some(config), scripts::respond);
    let yaml = scene.yaml("").replace("root.pem", "chain.pem");
    let proxy = Setup::new(&yaml).file("chain.pem", root).start().await;
    (scene, origin, proxy)
}

/// A root as PEM, and a server whose certificate comes `length` intermediates after it; which it
/// sends or not.
fn chain(length: usize, sent: bool) -> (String, Arc<ServerConfig>) {
    let authority = |name: &str| {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params
    };
    let key = || KeyPair::generate().unwrap();
    let root = CertifiedIssuer::self_signed(authority("root"), key()).unwrap();
    let root_pem = root.pem();
    let mut issuer = root;
    let mut chain: Vec<CertificateDer<'static>> = Vec::new();
    for index in 0..length {
        let params = authority(&format!("intermediate {index}"));
        let next = CertifiedIssuer::signed_by(params, key(), &issuer).unwrap();
        chain.insert(0, next.der().clone());
        issuer = next;
    }
    let leaf_key = key();
    let leaf = CertificateParams::new([TRUE_NAME.to_owned()]).unwrap();
    let leaf = leaf.signed_by(&leaf_key, &issuer).unwrap().der().clone();
    if !sent {
        chain.clear();
    }
    chain.insert(0, leaf);
    let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(leaf_key.serialize_der()));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .unwrap();
    (root_pem, Arc::new(config))
}
