//! What the TLS libraries that users have make of the local authorities: they accept an alias' names, and
//! whatever a thief signs with a stolen key they refuse.
//!
//! OpenSSL (its own tools, curl, Python, Node), Java, GnuTLS, NSS, rustls.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use crate::support::{
    ca::{init, only, text},
    curl::curl,
    within,
};
use rcgen::{
    BasicConstraints, CertificateParams, CidrSubnet, DistinguishedName, DnType, GeneralSubtree,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, NameConstraints, SanType,
};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    sign::{CertifiedKey, SingleCertAndKey},
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use truename::tls::authority::{Authority, Root, now, pem};

const ALIAS: &str = "webscaler-manual";
/// What a client accepts of the alias' own certificates.
const ACCEPTED: [&str; 6] = [
    ALIAS,
    "webscaler-manual.default",
    "webscaler-manual.default.svc",
    "webscaler-manual.default.svc.cluster.local",
    "localhost",
    "127.0.0.1",
];
/// What a thief of the alias' key signs with it: a stranger's name, one below the alias, another alias, an
/// address.
const STOLEN: [&str; 4] = ["example.org", "login.webscaler-manual", "my_service", "127.0.0.2"];
/// What a root signs whose key was not thrown away, though its names are `app.app`, `example.com` and others.
const BEYOND: [&str; 5] = ["cash.app", "x.app.app", "login.example.com", "example.org", "10.0.0.1"];

#[tokio::test]
async fn curl_accepts_the_alias_and_refuses_whatever_is_signed_with_its_key() {
    for shop in Shop::both().await {
        for case in &shop.cases {
            let url = format!("https://{}:{}/", case.name, case.port);
            let roots = shop.roots.to_str().unwrap();
            let connect = format!("::127.0.0.1:{}", case.port);
            let response = curl(&["--cacert", roots, "--connect-to", &connect, &url]).await;
            let expected = if case.accepted { (0, "ok") } else { (60, "") };
            assert_eq!((response.code, response.stdout.as_str()), expected, "{url}: {response:?}");
        }
    }
}

#[tokio::test]
async fn openssl_accepts_the_alias_and_refuses_whatever_is_signed_with_its_key() {
    for shop in Shop::both().await {
        shop.judged_by(&["bash", "trusting-openssl.sh"]).await;
    }
}

/// With the strict checks that Python has by default from 3.13 on.
#[tokio::test]
async fn python_accepts_the_alias_and_refuses_whatever_is_signed_with_its_key() {
    for shop in Shop::both().await {
        shop.judged_by(&["python3", "trusting.py"]).await;
    }
}

#[tokio::test]
async fn node_accepts_the_alias_and_refuses_whatever_is_signed_with_its_key() {
    for shop in Shop::both().await {
        shop.judged_by(&["node", "trusting.js"]).await;
    }
}

#[tokio::test]
async fn gnutls_accepts_the_alias_and_refuses_whatever_is_signed_with_its_key() {
    for shop in Shop::both().await {
        shop.judged_by(&["bash", "trusting-gnutls.sh"]).await;
    }
}

#[tokio::test]
async fn nss_accepts_the_alias_and_refuses_whatever_is_signed_with_its_key() {
    for shop in Shop::both().await {
        shop.judged_by(&["bash", "trusting-nss.sh"]).await;
    }
}

/// It heeds no constraints of a trusted root: that nobody has its key is all that protects here.
#[tokio::test]
async fn java_accepts_the_alias_and_refuses_whatever_is_signed_with_its_key() {
    let mut shop = Shop::of_alias().await;
    shop.roots = shop.folder.path().join("ca/truststore.p12");
    shop.judged_by(&["java", "Trusting.java"]).await;
}

#[tokio::test]
async fn rustls_accepts_the_alias_and_refuses_whatever_is_signed_with_its_key() {
    for shop in Shop::both().await {
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_file_iter(&shop.roots).unwrap() {
            roots.add(root.unwrap()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector = TlsConnector::from(Arc::new(config));
        for case in &shop.cases {
            let tcp = TcpStream::connect(("127.0.0.1", case.port)).await.unwrap();
            let name = ServerName::try_from(case.name.clone()).unwrap();
            let handshake = within("a handshake", connector.connect(name, tcp)).await;
            assert_eq!(handshake.is_ok(), case.accepted, "{}: {:?}", case.name, handshake.err());
        }
    }
}

/// A server for each of several names, and the roots that clients trust.
struct Shop {
    folder: TempDir,
    roots: PathBuf,
    cases: Vec<Case>,
    servers: JoinSet<()>,
}

struct Case {
    name: String,
    port: u16,
    accepted: bool,
}

impl Shop {
    async fn both() -> [Self; 2] {
        [Self::of_alias().await, Self::of_liar().await]
    }

    /// The alias itself, and what a thief makes of its key file.
    async fn of_alias() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let directory = folder.path().join("ca");
        // Others are trusted, too.
        init(&directory, &[ALIAS, "my_service", "payments"]);
        let roots = directory.join("ca.pem");
        let mut shop = Self { folder, roots, cases: Vec::new(), servers: JoinSet::new() };
        let root = fs::read(only(&directory, ALIAS, "root")).unwrap();
        let root = Arc::new(Root::from_pem(&root).unwrap());
        let stolen = fs::read(only(&directory, ALIAS, "key")).unwrap();
        let shown = Authority::from_pem(&stolen, &root).unwrap().certified(now());
        for name in ACCEPTED {
            let is_address = name.parse::<std::net::IpAddr>().is_ok();
            let key = if is_address { &shown.unnamed } else { &shown.named };
            shop.open(name, key.clone(), true).await;
        }
        // As if the alias' certificate were that of an authority.
        let key = KeyPair::try_from(&PrivateKeyDer::from_pem_slice(&stolen).unwrap()).unwrap();
        let issuer = Issuer::from_ca_cert_der(&shown.unnamed.cert[0], key).unwrap();
        for name in STOLEN {
            let forged = sign(&issuer, name, Some(&shown.unnamed.cert[0]));
            shop.open(name, forged, false).await;
        }
        shop
    }

    /// Roots like ours, whose keys somebody has kept.
    async fn of_liar() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let roots = folder.path().join("lying.pem");
        let names = ["app", "app.app", "app.app.svc", "example.com", "www.example.com"];
        let names: BTreeSet<String> = names.map(str::to_owned).into();
        let mut shop = Self { folder, roots, cases: Vec::new(), servers: JoinSet::new() };
        let mut trusted = String::new();
        for set in truename::tls::authority::names::sets(&names) {
            let (issuer, root) = liar(&set);
            trusted.push_str(&pem(&root));
            for name in &set {
                shop.open(name, sign(&issuer, name, None), true).await;
            }
            for name in BEYOND {
                shop.open(name, sign(&issuer, name, None), false).await;
            }
        }
        fs::write(&shop.roots, trusted).unwrap();
        shop
    }

    async fn open(&mut self, name: &str, key: Arc<CertifiedKey>, accepted: bool) {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let tls = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        self.cases.push(Case { name: name.to_owned(), port, accepted });
        self.servers.spawn(serve(listener, TlsAcceptor::from(Arc::new(tls))));
    }

    /// Has a client of another make judge every name. Its script says a line for each.
    async fn judged_by(&self, program: &[&str; 2]) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/trusting");
        let mut command = Command::new(program[0]);
        command.arg(script.join(program[1])).arg(&self.roots);
        for case in &self.cases {
            command.arg(&case.name).arg(case.port.to_string());
        }
        command.current_dir(self.folder.path());
        let run = move || command.stdin(Stdio::null()).output();
        let output = within(program[0], tokio::task::spawn_blocking(run)).await.unwrap();
        let output = output.unwrap_or_else(|error| panic!("{}: {error}", program[0]));
        let said = text(&output.stdout);
        let mut lines: Vec<&str> = said.lines().collect();
        assert_eq!(lines.len(), self.cases.len(), "{said}{}", text(&output.stderr));
        for case in &self.cases {
            // Some names have several servers, and some clients do not wait for one another.
            let start = format!("{} {} ", case.name, case.port);
            let at = lines.iter().position(|line| line.starts_with(&start));
            let line = lines.remove(at.unwrap_or_else(|| panic!("{start}: {said}")));
            let verdict = &line[start.len()..];
            let expected = if case.accepted { "accepted" } else { "refused: " };
            assert!(verdict.starts_with(expected), "{line}\n{}", text(&output.stderr));
        }
    }
}

/// A root with constraints as ours have them.
fn liar(names: &BTreeSet<String>) -> (Issuer<'static, KeyPair>, CertificateDer<'static>) {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, format!("truename {}", names.len()));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.use_authority_key_identifier_extension = true;
    let subtree = |name: String| GeneralSubtree::DnsName(name);
    let loopback = GeneralSubtree::IpAddress(CidrSubnet::V4([127, 0, 0, 0], [255, 0, 0, 0]));
    params.name_constraints = Some(NameConstraints {
        permitted_subtrees: names.iter().cloned().map(subtree).chain([loopback]).collect(),
        excluded_subtrees: names.iter().map(|name| subtree(format!(".{name}"))).collect(),
    });
    let key = KeyPair::generate().unwrap();
    let root = params.self_signed(&key).unwrap().der().clone();
    // Else the tests would be about something that we do not make.
    assert_eq!(Root::parse(root.clone()).unwrap().names(), names);
    (Issuer::new(params, key), root)
}

fn sign(
    issuer: &Issuer<'static, KeyPair>,
    name: &str,
    intermediate: Option<&CertificateDer<'static>>,
) -> Arc<CertifiedKey> {
    let mut params = CertificateParams::default();
    params.subject_alt_names.push(match name.parse() {
        Ok(address) => SanType::IpAddress(address),
        Err(_) => SanType::DnsName(name.try_into().unwrap()),
    });
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().unwrap();
    let leaf = params.signed_by(&key, issuer).unwrap().der().clone();
    let chain = std::iter::once(leaf).chain(intermediate.cloned()).collect();
    let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
    let key = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key).unwrap();
    Arc::new(CertifiedKey::new(chain, key))
}

async fn serve(listener: TcpListener, tls: TlsAcceptor) {
    let mut connections = JoinSet::new();
    while let Ok((tcp, _)) = listener.accept().await {
        let tls = tls.clone();
        connections.spawn(async move {
            // The client may refuse: that is what it is asked for.
            let Ok(mut stream) = tls.accept(tcp).await else { return };
            let response = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream.write_all(response).await;
            let _ = stream.shutdown().await;
        });
    }
}
