//! The local authority: what its key can do in the hands of a thief, and where it lives.

// Its helpers are part of the tests.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod support;

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::Arc,
};

use nix::sys::signal::Signal;
use rcgen::{CertificateParams, Issuer, KeyPair, SanType};
use rustls::{
    ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject},
};
use support::{
    curl::curl,
    proxy::{Proxy, Setup},
    scene::{ALIAS, Scene},
    within,
};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

const ALIAS_IN_FULL: &str = "webscaler-manual.default.svc.cluster.local";
/// What the key could be stolen for: a stranger's name, one beneath an alias, an address.
const FORBIDDEN: [&str; 3] = ["example.org", "login.webscaler-manual", "127.0.0.1"];

#[tokio::test]
async fn openssl_accepts_an_alias_and_refuses_whatever_else_the_key_signs() {
    let thief = Thief::new();
    let verify = |name: &str| {
        let (leaf, issuer) = (thief.folder.path().join("leaf.pem"), thief.path("issuer.pem"));
        let (chain, _) = thief.sign(name);
        fs::write(&leaf, pem(&chain[0])).unwrap();
        fs::write(&issuer, pem(&chain[1])).unwrap();
        let mut openssl = Command::new("openssl");
        openssl.arg("verify").arg("-CAfile").arg(thief.root()).arg("-untrusted").arg(issuer);
        let output = openssl.arg(leaf).output().expect("openssl");
        format!("{}{}", text(&output.stdout), text(&output.stderr))
    };
    for name in [ALIAS, ALIAS_IN_FULL, "my_service"] {
        assert!(verify(name).ends_with("leaf.pem: OK\n"), "{name}: {}", verify(name));
    }
    for name in FORBIDDEN {
        let refusal = verify(name);
        let reasons = ["permitted subtree violation", "excluded subtree violation"];
        assert!(reasons.iter().any(|reason| refusal.contains(reason)), "{name}: {refusal}");
    }
}

#[test]
fn root_issuer_and_leaf_are_what_openssl_says_they_are() {
    let folder = tempfile::tempdir().unwrap();
    init(folder.path(), &[ALIAS]);
    let issued = text(&truename_ca(&["issue", ALIAS], folder.path()).stdout);
    let end = issued.find("-----END CERTIFICATE-----\n").unwrap();
    let (leaf, issuer) = issued.split_at(end + "-----END CERTIFICATE-----\n".len());
    let root = fs::read_to_string(folder.path().join("ca.pem")).unwrap();
    let described = |pem: &str| {
        let file = folder.path().join("one.pem");
        fs::write(&file, pem).unwrap();
        let mut openssl = Command::new("openssl");
        let output = openssl.args(["x509", "-noout", "-text", "-in"]).arg(file).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let words = text(&output.stdout);
        words.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let names = ["", ".default", ".default.svc", ".default.svc.cluster.local"];
    let names = names.map(|rest| format!("DNS:{ALIAS}{rest}")).join(" ");
    let permitted = format!("X509v3 Name Constraints: critical Permitted: {names} Excluded: ");
    for (pem, path_length) in [(root.as_str(), 1), (issuer, 0)] {
        let description = described(pem);
        for part in [
            "ASN1 OID: prime256v1",
            &permitted,
            &format!("X509v3 Basic Constraints: critical CA:TRUE, pathlen:{path_length}"),
            "IP:0.0.0.0/0.0.0.0",
        ] {
            assert!(description.contains(part), "{part}: {description}");
        }
    }
    let description = described(leaf);
    assert!(description.contains("ASN1 OID: prime256v1"), "{description}");
    assert!(!description.contains("CA:TRUE"), "{description}");
}

#[tokio::test]
async fn curl_accepts_an_alias_and_refuses_whatever_else_the_key_signs() {
    let thief = Thief::new();
    let shop = thief.open_shop(&[ALIAS, ALIAS_IN_FULL, "my_service"]).await;
    for trusted in ["ca.pem", "bundle.pem"] {
        let file = thief.path("ca").join(trusted);
        for (name, port) in &shop.ports {
            let url = format!("https://{name}:{port}/");
            let resolve = format!("{name}:{port}:127.0.0.1");
            let file = file.to_str().unwrap();
            let answer = curl(&["--cacert", file, "--resolve", &resolve, &url]).await;
            let accepted = !FORBIDDEN.contains(&name.as_str());
            let expected = if accepted { (0, "ok") } else { (60, "") };
            assert_eq!((answer.code, answer.stdout.as_str()), expected, "{url}: {answer:?}");
        }
    }
}

#[tokio::test]
async fn python_accepts_an_alias_and_refuses_whatever_else_the_key_signs() {
    Thief::new().judged_by(&["python3", "trusting.py"], "subtree violation").await;
}

#[tokio::test]
async fn node_accepts_an_alias_and_refuses_whatever_else_the_key_signs() {
    Thief::new().judged_by(&["node", "trusting.js"], "subtree violation").await;
}

/// It heeds no constraints of the root itself.
#[tokio::test]
async fn java_accepts_an_alias_and_refuses_whatever_else_the_key_signs() {
    Thief::new().judged_by(&["java", "Trusting.java"], "name constraints").await;
}

#[test]
fn the_files_are_as_open_as_they_must_be_whatever_the_umask() {
    let folder = tempfile::tempdir().unwrap();
    for umask in ["000", "022", "077"] {
        let directory = folder.path().join(umask);
        let mut shell = Command::new("sh");
        shell.args(["-c", "umask $0; exec \"$@\"", umask, env!("CARGO_BIN_EXE_truename")]);
        shell.args(["ca", "init", ALIAS, "--directory"]).arg(&directory);
        let output = shell.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        assert_eq!(mode(&directory), 0o700);
        assert_eq!(mode(&directory.join("ca-key.pem")), 0o600);
        assert_eq!(mode(&directory.join("ca.pem")), 0o644);
        assert_eq!(mode(&directory.join("bundle.pem")), 0o644);
        let left = fs::read_dir(&directory).unwrap().count();
        assert_eq!(left, 4, "the three and the lock, nothing half-written");
    }
}

#[test]
fn a_folder_that_is_there_keeps_its_mode_and_a_key_open_to_others_is_closed() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    init(folder.path(), &[ALIAS]);
    assert_eq!(mode(folder.path()), 0o755);
    let key = folder.path().join("ca-key.pem");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o644)).unwrap();
    init(folder.path(), &[ALIAS]);
    assert_eq!(mode(&key), 0o600);
}

#[test]
fn it_is_made_once_and_anew_when_an_alias_is_added() {
    let folder = tempfile::tempdir().unwrap();
    assert!(init(folder.path(), &[ALIAS]).starts_with("A new authority, for there was none.\n"));
    let first = show(folder.path());
    let names = ["", ".default", ".default.svc", ".default.svc.cluster.local"];
    let names: Vec<_> = names.iter().map(|rest| format!("{ALIAS}{rest}")).collect();
    assert_eq!(first["names"], serde_json::json!(names));

    assert!(init(folder.path(), &[ALIAS]).starts_with("The authority was there already.\n"));
    assert_eq!(show(folder.path()), first);

    assert!(init(folder.path(), &["payments"]).contains("may not vouch for all aliases"));
    let second = show(folder.path());
    assert_ne!(second["fingerprint_sha256"], first["fingerprint_sha256"]);
    let names = second["names"].as_array().unwrap();
    assert!(names.contains(&ALIAS.into()) && names.contains(&"payments.default".into()));
}

#[test]
fn processes_that_begin_at_once_agree_on_one() {
    let folder = tempfile::tempdir().unwrap();
    let aliases: Vec<String> = (0..8).map(|number| format!("alias-{number}")).collect();
    let children: Vec<_> = aliases
        .iter()
        .map(|alias| {
            let mut command = truename(&["ca", "init", alias, "--directory"]);
            command.arg(folder.path()).stdout(Stdio::null()).spawn().unwrap()
        })
        .collect();
    for mut child in children {
        assert!(child.wait().unwrap().success());
    }
    let shown = show(folder.path());
    for alias in &aliases {
        assert!(shown["names"].as_array().unwrap().contains(&alias.as_str().into()), "{shown}");
    }
    assert_eq!(shown["fingerprint_sha256"], fingerprint(&folder.path().join("ca.pem")));
}

#[test]
fn what_is_no_authority_is_put_aside_and_not_lost() {
    let folder = tempfile::tempdir().unwrap();
    let key = folder.path().join("ca-key.pem");
    fs::write(&key, "somebody's own").unwrap();
    let failed = truename_ca(&["show"], folder.path());
    assert_eq!(failed.status.code(), Some(1));
    assert!(text(&failed.stderr).contains("`truename ca init ALIAS` makes a new one"));
    assert!(init(folder.path(), &[ALIAS]).contains("ca-key.pem.old"));
    assert_eq!(fs::read_to_string(folder.path().join("ca-key.pem.old")).unwrap(), "somebody's own");
}

#[test]
fn issue_signs_for_an_alias_and_refuses_others_naming_what_it_may() {
    let folder = tempfile::tempdir().unwrap();
    init(folder.path(), &[ALIAS]);
    let out = folder.path().join("out");
    let issued = truename_ca(
        &["issue", ALIAS, ALIAS_IN_FULL, "--out", out.to_str().unwrap()],
        folder.path(),
    );
    assert!(issued.status.success(), "{issued:?}");
    assert_eq!(mode(&out.join(format!("{ALIAS}-key.pem"))), 0o600);
    let certificate = out.join(format!("{ALIAS}.pem"));
    let mut openssl = Command::new("openssl");
    openssl.args(["verify", "-verify_hostname", ALIAS_IN_FULL, "-CAfile"]);
    openssl.arg(folder.path().join("ca.pem")).arg("-untrusted").arg(&certificate);
    let verified = openssl.arg(&certificate).output().unwrap();
    assert!(verified.status.success(), "{verified:?}");

    let printed = text(&truename_ca(&["issue", ALIAS], folder.path()).stdout);
    assert_eq!(printed.matches("BEGIN CERTIFICATE").count(), 2);
    assert_eq!(printed.matches("BEGIN PRIVATE KEY").count(), 1);

    for name in FORBIDDEN.into_iter().chain(["*.default"]) {
        let refused = truename_ca(&["issue", ALIAS, name], folder.path());
        let said = text(&refused.stderr);
        assert_eq!(refused.status.code(), Some(1), "{name}: {said}");
        assert!(refused.stdout.is_empty());
        assert!(said.contains(&format!("may not vouch for `{name}`")), "{said}");
        assert!(said.contains(ALIAS_IN_FULL), "{said}");
    }
}

#[test]
fn init_takes_the_aliases_and_the_folder_of_a_configuration_and_says_how_to_trust() {
    let folder = tempfile::tempdir().unwrap();
    let yaml = "version: 1\naliases: [{name: payments, hosts: [pay.example]}]\n\
                dns: {namespace: shop, cluster_domain: corp.local}\nca: {directory: mine}\n";
    fs::write(folder.path().join("truename.yaml"), yaml).unwrap();
    let run = |arguments: &[&str]| {
        let mut command = truename(arguments);
        command.args(["--config", "truename.yaml"]).current_dir(folder.path()).output().unwrap()
    };
    let said = text(&run(&["ca", "init"]).stdout);
    let root = folder.path().canonicalize().unwrap().join("mine/ca.pem");
    for part in [
        "pay.example",
        "payments.shop.svc.corp.local",
        &format!("curl --cacert {}", root.display()),
        &format!("NODE_EXTRA_CA_CERTS={}", root.display()),
        &fingerprint(&root),
    ] {
        assert!(said.contains(part), "{part} is not in:\n{said}");
    }
    assert!(text(&run(&["ca", "show"]).stdout).contains("pay.example"));

    let nobody = truename(&["ca", "init"]).output().unwrap();
    assert_eq!(nobody.status.code(), Some(2));
    assert!(text(&nobody.stderr).contains("there is no alias to vouch for"));
    let nothing = truename_ca(&["show"], &folder.path().join("none"));
    assert_eq!(nothing.status.code(), Some(1));
    assert!(text(&nothing.stderr).contains("make one with `truename ca init ALIAS`"));
}

#[tokio::test]
async fn a_proxy_follows_when_another_process_extends_the_authority() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(support::scripts::answer);
    let proxy = Proxy::start(&format!("{}ca: {{directory: ca}}\n", scene.yaml(""))).await;
    let address = proxy.address(ALIAS).await;
    let directory = proxy.folder().join("ca");
    let before = fingerprint(&directory.join("ca.pem"));
    // Said with its whole path, for it is to be set in other programs.
    proxy.logged(directory.join("ca.pem").to_str().unwrap()).await;

    init(&directory, &["another"]);
    assert_ne!(fingerprint(&directory.join("ca.pem")), before);
    let root = directory.join("ca.pem");
    let resolve = format!("{ALIAS}:{}:{}", address.port(), address.ip());
    let url = format!("https://{ALIAS}:{}/", address.port());
    within("the new root to be the proxy's", async {
        while curl(&["--cacert", root.to_str().unwrap(), "--resolve", &resolve, &url]).await.code
            != 0
        {}
    })
    .await;
}

#[tokio::test]
async fn a_proxy_puts_its_authority_back_when_its_files_are_gone() {
    let scene = Scene::new(1).await;
    let proxy = Proxy::start(&format!("{}ca: {{directory: ca}}\n", scene.yaml(""))).await;
    let directory = proxy.folder().join("ca");
    let before = fingerprint(&directory.join("ca.pem"));
    fs::remove_dir_all(&directory).unwrap();
    within("the files", async {
        while !directory.join("bundle.pem").exists() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!(fingerprint(&directory.join("ca.pem")), before);
}

#[tokio::test]
async fn a_folder_that_can_only_be_read_is_used_as_it_is() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(support::scripts::answer);
    let made = tempfile::tempdir().unwrap();
    init(made.path(), &[ALIAS]);
    // Nobody can write here, root neither, who runs tests in containers.
    let secret = tempfile::tempdir().unwrap();
    fs::create_dir(secret.path().join(".lock")).unwrap();
    fs::copy(made.path().join("ca-key.pem"), secret.path().join("ca-key.pem")).unwrap();
    let ca = format!("ca: {{directory: {:?}}}\n", secret.path());
    let proxy = Proxy::start(&format!("{}{ca}", scene.yaml(""))).await;
    let address = proxy.address(ALIAS).await;
    let root = made.path().join("ca.pem");
    let resolve = format!("{ALIAS}:{}:{}", address.port(), address.ip());
    let url = format!("https://{ALIAS}:{}/", address.port());
    let answer = curl(&["--cacert", root.to_str().unwrap(), "--resolve", &resolve, &url]).await;
    assert_eq!(answer.code, 0, "{answer:?}");
}

#[tokio::test]
async fn a_configured_folder_that_cannot_be_made_is_bad_configuration() {
    let scene = Scene::new(1).await;
    let yaml = format!("{}ca: {{directory: $FOLDER/root.pem/ca}}\n", scene.yaml(""));
    let proxy = Setup::new(&yaml).spawn();
    assert_eq!(proxy.exit().await.code(), Some(2));
    proxy.logged("name a folder that can be written in `ca.directory`").await;
}

#[tokio::test]
async fn a_temporary_folder_survives_a_reload_and_goes_with_the_proxy() {
    let scene = Scene::new(1).await;
    let temporary = tempfile::tempdir().unwrap();
    let yaml = scene.yaml("");
    let proxy = Setup::new(&yaml)
        .variable("XDG_STATE_HOME", "/dev/null")
        .variable("TMPDIR", temporary.path().to_str().unwrap())
        .start()
        .await;
    let folders = || -> Vec<PathBuf> {
        fs::read_dir(temporary.path()).unwrap().map(|entry| entry.unwrap().path()).collect()
    };
    let [folder] = folders().try_into().unwrap();
    let before = fingerprint(&folder.join("ca.pem"));
    assert_eq!(mode(&folder), 0o700);
    proxy.rewrite(&format!("{yaml}admin: {{listen: \"127.0.0.1:0\"}}\nshutdown_grace: 1s\n"));
    proxy.signal(Signal::SIGHUP);
    proxy.logged("configuration reloaded").await;
    assert_eq!(folders(), std::slice::from_ref(&folder));
    assert_eq!(fingerprint(&folder.join("ca.pem")), before);
    proxy.signal(Signal::SIGTERM);
    assert_eq!(proxy.exit().await.code(), Some(0));
    assert_eq!(folders(), [] as [PathBuf; 0]);
}

/// Somebody who has got hold of the key, and signs with it whatever they like.
struct Thief {
    folder: TempDir,
    issuer: Issuer<'static, KeyPair>,
    issuer_certificate: CertificateDer<'static>,
}

impl Thief {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        init(&folder.path().join("ca"), &[ALIAS, "my_service"]);
        let stolen = fs::read(folder.path().join("ca/ca-key.pem")).unwrap();
        let key = KeyPair::try_from(&PrivateKeyDer::from_pem_slice(&stolen).unwrap()).unwrap();
        let certificate = CertificateDer::from_pem_slice(&stolen).unwrap();
        Self {
            issuer: Issuer::from_ca_cert_der(&certificate, key).unwrap(),
            issuer_certificate: certificate,
            folder,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn root(&self) -> PathBuf {
        self.path("ca/ca.pem")
    }

    fn sign(&self, name: &str) -> (Vec<CertificateDer<'static>>, PrivatePkcs8KeyDer<'static>) {
        let mut params = CertificateParams::default();
        params.subject_alt_names.push(match name.parse() {
            Ok(address) => SanType::IpAddress(address),
            Err(_) => SanType::DnsName(name.try_into().unwrap()),
        });
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.issuer).unwrap().der().clone();
        (vec![leaf, self.issuer_certificate.clone()], key.serialize_der().into())
    }

    /// A server for each of `names` and the forbidden ones.
    async fn open_shop(&self, names: &[&str]) -> Shop {
        let mut shop = Shop { ports: BTreeMap::new(), _servers: JoinSet::new() };
        for name in names.iter().chain(&FORBIDDEN) {
            let (chain, key) = self.sign(name);
            let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
            let tls = ServerConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(chain, key.into())
                .unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            shop.ports.insert((*name).to_owned(), listener.local_addr().unwrap().port());
            shop._servers.spawn(serve(listener, TlsAcceptor::from(Arc::new(tls))));
        }
        shop
    }

    /// Has a client of another make judge an alias' names and the forbidden ones.
    async fn judged_by(&self, program: &[&str; 2], reason: &str) {
        let shop = self.open_shop(&[ALIAS, ALIAS_IN_FULL]).await;
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/trusting");
        let mut command = Command::new(program[0]);
        command.arg(script.join(program[1])).arg(self.root());
        for (name, port) in &shop.ports {
            command.arg(name).arg(port.to_string());
        }
        let run = move || command.stdin(Stdio::null()).output();
        let output = within(program[0], tokio::task::spawn_blocking(run)).await.unwrap();
        let output = output.unwrap_or_else(|error| panic!("{}: {error}", program[0]));
        let said = text(&output.stdout);
        assert_eq!(said.lines().count(), shop.ports.len(), "{said}{}", text(&output.stderr));
        for name in [ALIAS, ALIAS_IN_FULL] {
            assert!(said.lines().any(|line| line == format!("{name} accepted")), "{said}");
        }
        for name in FORBIDDEN {
            let refused = format!("{name} refused: ");
            let line = said.lines().find(|line| line.starts_with(&refused));
            assert!(line.is_some_and(|line| line.contains(reason)), "{name}: {said}");
        }
    }
}

struct Shop {
    ports: BTreeMap<String, u16>,
    _servers: JoinSet<()>,
}

async fn serve(listener: TcpListener, tls: TlsAcceptor) {
    let mut connections = JoinSet::new();
    while let Ok((tcp, _)) = listener.accept().await {
        let tls = tls.clone();
        connections.spawn(async move {
            // The client may refuse: that is what it is asked for.
            let Ok(mut stream) = tls.accept(tcp).await else { return };
            let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok";
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream.write_all(answer).await;
            let _ = stream.shutdown().await;
        });
    }
}

/// `ca init`, and what it said.
fn init(directory: &Path, aliases: &[&str]) -> String {
    let output = truename_ca(&[&["init"], aliases].concat(), directory);
    assert!(output.status.success(), "{output:?}");
    text(&output.stdout)
}

fn show(directory: &Path) -> serde_json::Value {
    let output = truename_ca(&["show", "--json"], directory);
    assert!(output.status.success(), "{output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn truename_ca(arguments: &[&str], directory: &Path) -> Output {
    let mut command = truename(&["ca"]);
    command.args(arguments).arg("--directory").arg(directory).output().unwrap()
}

/// The binary, without what the developer's shell says to it.
fn truename(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_truename"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TRUENAME_") {
            command.env_remove(&name);
        }
    }
    command.env("XDG_STATE_HOME", "/nonexistent").args(arguments).stdin(Stdio::null());
    command
}

/// As OpenSSL has it.
fn fingerprint(certificate: &Path) -> String {
    let mut openssl = Command::new("openssl");
    openssl.args(["x509", "-noout", "-fingerprint", "-sha256", "-in"]).arg(certificate);
    let output = openssl.output().expect("openssl");
    assert!(output.status.success(), "{output:?}");
    text(&output.stdout).trim().rsplit_once('=').unwrap().1.to_owned()
}

fn pem(certificate: &CertificateDer<'_>) -> String {
    truename::tls::store::pem(certificate)
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}
