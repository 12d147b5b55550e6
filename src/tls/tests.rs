//! Real handshakes against rustls servers, with certificates made for each test.

mod acceptance;
mod certificates;
mod handshakes;
mod settings;
mod trust;

use super::{
    Alpn, ClientTls, Handshake, Reason, RootStores, TlsError, VerifyFailure, handshake, server_name,
};
use crate::{
    config::{self, TlsMode, TlsVersion},
    resolve::TrueName,
};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
};
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName},
};
use std::{fs, io, path::PathBuf, sync::Arc, time::Duration};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

const NAME: &str = "api.example.com";

/// Nothing here takes a second, but a test that hangs must fail.
const DEADLINE: Duration = Duration::from_secs(20);

/// A certificate authority.
struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new(name: &str) -> Ca {
        let key = KeyPair::generate().unwrap();
        Ca(CertifiedIssuer::self_signed(Ca::params(name), key).unwrap())
    }

    fn intermediate(&self, name: &str) -> Ca {
        let key = KeyPair::generate().unwrap();
        Ca(CertifiedIssuer::signed_by(Ca::params(name), key, &self.0).unwrap())
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params
    }

    fn issue(&self, names: &[&str]) -> Identity {
        self.issue_with(names, |_| {})
    }

    fn issue_with(&self, names: &[&str], change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let mut params = leaf_params(names);
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Identity::new(vec![certificate.der().clone()], &key)
    }

    fn der(&self) -> CertificateDer<'static> {
        self.0.der().clone()
    }

    fn pem(&self) -> String {
        self.0.pem()
    }
}

fn leaf_params(names: &[&str]) -> CertificateParams {
    let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
    let mut params = CertificateParams::new(names).unwrap();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "leaf");
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params
}

/// A server's certificate chain and key.
struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl Identity {
    fn new(chain: Vec<CertificateDer<'static>>, key: &KeyPair) -> Identity {
        Identity { chain, key: PrivatePkcs8KeyDer::from(key.serialize_der()).into() }
    }

    fn self_signed(params: CertificateParams) -> (Identity, String) {
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        (Identity::new(vec![certificate.der().clone()], &key), certificate.pem())
    }

    fn server(self) -> ServerConfig {
        self.server_speaking(rustls::DEFAULT_VERSIONS)
    }

    fn server_speaking(
        self,
        versions: &[&'static rustls::SupportedProtocolVersion],
    ) -> ServerConfig {
        ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(versions)
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(self.chain, self.key)
            .unwrap()
    }
}

/// `tls:` settings, with their files.
struct Settings {
    directory: TempDir,
    tls: config::Tls,
}

impl Settings {
    fn trusting(ca: &Ca) -> Settings {
        Settings::trusting_pem(&ca.pem())
    }

    fn trusting_pem(pem: &str) -> Settings {
        let mut settings = Settings::trusting_nobody();
        let file = settings.file("ca.pem", pem);
        settings.tls.ca.files.push(file);
        settings
    }

    fn trusting_nobody() -> Settings {
        let tls = config::Tls {
            mode: TlsMode::Verify,
            server_name: None,
            chain_match: Vec::new(),
            ca: config::Trust { system: false, webpki: false, files: Vec::new() },
            client_certificate: None,
            pins: Vec::new(),
            crls: Vec::new(),
            min_version: TlsVersion::V1_2,
            post_quantum: true,
        };
        Settings { directory: TempDir::new().unwrap(), tls }
    }

    fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.directory.path().join(name);
        fs::write(&path, content).unwrap();
        path
    }

    fn load(&self) -> ClientTls {
        ClientTls::load(&self.tls, &mut RootStores::default()).unwrap().unwrap()
    }

    /// The error's text, which must contain the key and, if there is one, the file.
    fn error(&self) -> String {
        match ClientTls::load(&self.tls, &mut RootStores::default()) {
            Ok(_) => panic!("these settings should be refused"),
            Err(error) => error.to_string(),
        }
    }
}

fn name(text: &str) -> ServerName<'static> {
    server_name(&TrueName::for_test(text)).unwrap()
}

type Client = Result<Handshake<DuplexStream>, TlsError>;

type Server = io::Result<TlsStream<DuplexStream>>;

/// One handshake, seen from both sides.
async fn meet(
    server: ServerConfig,
    tls: &ClientTls,
    alpn: Alpn,
    as_name: &str,
) -> (Client, Server) {
    let (near, far) = duplex(64 * 1024);
    let acceptor = TlsAcceptor::from(Arc::new(server));
    let expected = name(as_name);
    timeout(DEADLINE, async {
        tokio::join!(handshake(near, tls, alpn, &expected), acceptor.accept(far))
    })
    .await
    .unwrap()
}

/// Why the certificate was refused. Panics if it was accepted, or if anything else failed.
async fn refusal(server: ServerConfig, tls: &ClientTls, as_name: &str) -> VerifyFailure {
    match meet(server, tls, Alpn::None, as_name).await.0 {
        Err(TlsError::Certificate(failure)) => *failure,
        Err(other) => panic!("not about the certificate: {other}"),
        Ok(_) => panic!("the certificate was accepted"),
    }
}

async fn accepted(server: ServerConfig, tls: &ClientTls, as_name: &str) {
    if let Err(error) = meet(server, tls, Alpn::None, as_name).await.0 {
        panic!("refused: {error}");
    }
}
