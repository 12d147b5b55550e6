//! Certificates, keys, roots and revocation lists that change on disk while the proxy runs, as
//! the kubelet changes them: the whole of a new version counts, and never a half of it.

use std::{fs, net::SocketAddr, os::unix::fs::symlink, path::PathBuf, sync::Arc};

use crate::support::{
    client,
    message::Message,
    peer::Peer,
    proxy::{Proxy, Setup},
    scene::{ALIAS, Scene, TRUE_NAME},
    scripts, trust, within,
};
use arc_swap::ArcSwap;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use rustls::{ServerConfig, crypto::aws_lc_rs, server::WebPkiClientVerifier};
use tempfile::TempDir;
use tokio::{net::TcpListener, task::JoinSet};
use tokio_rustls::TlsAcceptor;
use truename::demo::authority::{Authority, Leaf, LeafOptions, Usage};

const KEPT: &str = "cannot be used; the previous ones stay in use";
/// Every request shakes hands anew, and so shows what is in force.
const NO_POOL: &str = "pool: {max_idle: 0}";

/// A Secret or ConfigMap as the kubelet mounts it: `name -> ..data/name`, `..data -> ..version_N`,
/// and a new version comes with one rename of `..data`.
struct Volume {
    folder: TempDir,
    version: usize,
}

impl Volume {
    fn new(files: &[(&str, &str)]) -> Self {
        let mut volume = Self { folder: tempfile::tempdir().unwrap(), version: 0 };
        volume.publish(files);
        for (name, _) in files {
            symlink(format!("..data/{name}"), volume.path(name)).unwrap();
        }
        volume
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn publish(&mut self, files: &[(&str, &str)]) {
        self.version += 1;
        let name = format!("..version_{}", self.version);
        fs::create_dir(self.path(&name)).unwrap();
        for (file, text) in files {
            fs::write(self.path(&name).join(file), text).unwrap();
        }
        symlink(&name, self.path("..data_tmp")).unwrap();
        fs::rename(self.path("..data_tmp"), self.path("..data")).unwrap();
        if self.version > 1 {
            fs::remove_dir_all(self.path(&format!("..version_{}", self.version - 1))).unwrap();
        }
    }
}

/// An origin whose certificate may change, and which responds with the certificate that it was
/// shown itself.
struct Gatekeeper {
    tls: Arc<ArcSwap<ServerConfig>>,
    _task: JoinSet<()>,
}

impl Gatekeeper {
    fn start(listener: TcpListener, tls: Arc<ServerConfig>) -> Self {
        let tls = Arc::new(ArcSwap::new(tls));
        let current = tls.clone();
        let mut task = JoinSet::new();
        task.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                let tls = TlsAcceptor::from(current.load_full());
                connections.spawn(async move {
                    let Ok(stream) = tls.accept(tcp).await else { return };
                    let shown = stream.get_ref().1.peer_certificates().map(|chain| mark(&chain[0]));
                    let mut peer = Peer::tls_server(stream);
                    while peer.request().await.is_some() {
                        let response = scripts::ok(shown.as_deref().unwrap_or("nobody"));
                        peer.try_send(response).await.ok();
                    }
                });
            }
        });
        Self { tls, _task: task }
    }
}

/// What a certificate is told apart by: the end of its signature.
fn mark(certificate: &[u8]) -> String {
    STANDARD.encode(&certificate[certificate.len() - 24..])
}

fn leaf_of(authority: &Authority) -> Leaf {
    authority.issue(&[TRUE_NAME], &[], LeafOptions::default()).unwrap()
}

fn application() -> Leaf {
    let options = LeafOptions { usage: Usage::Client, ..LeafOptions::default() };
    trust::authority().issue(&["application"], &[], options).unwrap()
}

/// The proxy's TLS settings: its roots are in `ca`, besides these keys.
fn tls(ca: &str, keys: &str) -> String {
    format!("tls: {{ca: {{system: false, webpki: false, files: [\"{ca}\"]}}{keys}}}\n{NO_POOL}")
}

async fn get(address: SocketAddr) -> Message {
    client::get(address, ALIAS, "/").await
}

async fn until(address: SocketAddr, what: &str, wished: impl Fn(&Message) -> bool) -> Message {
    within(what, async {
        loop {
            let response = get(address).await;
            if wished(&response) {
                return response;
            }
        }
    })
    .await
}

/// Waits until the log has told of `count` versions that cannot be used.
async fn refused(proxy: &Proxy, count: usize) {
    within("a version to be refused", async {
        while proxy.log().matches(KEPT).count() < count {
            // Turns of the event loop, and of the other process.
            client::get(proxy.admin().await, "localhost", "/livez").await;
        }
    })
    .await;
    assert_eq!(proxy.log().matches(KEPT).count(), count, "told more than once");
}

#[tokio::test]
async fn a_client_certificate_changes_with_its_key_or_not_at_all() {
    let server = leaf_of(trust::authority());
    let verifier = WebPkiClientVerifier::builder_with_provider(
        trust::authority().roots(),
        Arc::new(aws_lc_rs::default_provider()),
    );
    let config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_client_cert_verifier(verifier.build().unwrap())
        .with_single_cert(server.chain.clone(), server.key.clone_key())
        .unwrap();
    let mut scene = Scene::new(1).await;
    let _origin = Gatekeeper::start(scene.take_listeners().remove(0), Arc::new(config));

    let mut now = application();
    let pair = |cert: &str, key: &str| [("tls.crt", cert.to_owned()), ("tls.key", key.to_owned())];
    let publish = |volume: &mut Volume, pair: &[(&str, String)]| {
        let files: Vec<_> = pair.iter().map(|(name, text)| (*name, text.as_str())).collect();
        volume.publish(&files);
    };
    let mut volume = Volume::new(&[("tls.crt", &now.chain_pem), ("tls.key", &now.key_pem)]);
    let (cert, key) = (volume.path("tls.crt"), volume.path("tls.key"));
    let keys = format!(
        ", client_certificate: {{cert: \"{}\", key: \"{}\"}}",
        cert.display(),
        key.display()
    );
    let proxy = Proxy::start(&scene.yaml(&tls("$FOLDER/root.pem", &keys))).await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(get(address).await.text(), mark(&now.chain[0]));

    for round in 1..=3 {
        let next = application();
        let half = &next.key_pem[..next.key_pem.len() / 2];
        let broken = match round {
            1 => pair(&next.chain_pem, &now.key_pem),
            2 => pair(&next.chain_pem, half),
            _ => pair("", &next.key_pem),
        };
        publish(&mut volume, &broken);
        refused(&proxy, round).await;
        for _ in 0..3 {
            assert_eq!(get(address).await.text(), mark(&now.chain[0]), "round {round}");
        }
        publish(&mut volume, &pair(&next.chain_pem, &next.key_pem));
        let wished = mark(&next.chain[0]);
        let old = mark(&now.chain[0]);
        until(address, "the new certificate", |response| {
            // No request falls between the two.
            assert!([&old, &wished].contains(&&response.text().to_owned()), "{}", response.head);
            response.text() == wished
        })
        .await;
        now = next;
    }
}

#[tokio::test]
async fn roots_change_with_their_file_and_stay_while_it_is_broken() {
    let authorities = ["one", "two"].map(|name| Authority::new(name).unwrap());
    let server = |n: usize| leaf_of(&authorities[n % 2]).server_config(&["http/1.1"]).unwrap();
    let mut scene = Scene::new(1).await;
    let origin = Gatekeeper::start(scene.take_listeners().remove(0), server(0));
    let mut volume = Volume::new(&[("ca.crt", authorities[0].root_pem())]);
    let ca = volume.path("ca.crt");
    let proxy = Proxy::start(&scene.yaml(&tls(ca.to_str().unwrap(), ""))).await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(get(address).await.status(), 200);

    for round in 1..=3 {
        let next = authorities[round % 2].root_pem();
        let broken = match round {
            1 => &next[..next.len() / 2],
            2 => "",
            _ => "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        };
        volume.publish(&[("ca.crt", broken)]);
        refused(&proxy, round).await;
        assert_eq!(get(address).await.status(), 200, "round {round}: the old roots are gone");

        // The server is ahead of the file: it is not trusted before the file says so.
        origin.tls.store(server(round));
        assert_eq!(get(address).await.status(), 502, "round {round}");
        volume.publish(&[("ca.crt", next)]);
        until(address, "the new root", |response| response.status() == 200).await;
    }
}

/// Regression: whatever the file held at one look was taken, and what the rest of it would have verified was refused.
/// Regression: changes of these were not followed.
#[tokio::test]
async fn roots_of_the_system_change_with_the_variables_files() {
    let others = Authority::new("another root").unwrap();
    for variable in ["SSL_CERT_FILE", "SSL_CERT_DIR"] {
        let mut scene = Scene::new(1).await;
        let _origins = scene.script(scripts::respond);
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("roots.pem");
        fs::write(&file, others.root_pem()).unwrap();
        let place = if variable == "SSL_CERT_FILE" { &file } else { folder.path() };
        let proxy = Setup::new(&scene.yaml(&format!("tls: {{ca: {{webpki: false}}}}\n{NO_POOL}")))
            .variable(variable, place.to_str().unwrap())
            .start()
            .await;
        let address = proxy.address(ALIAS).await;
        assert_eq!(get(address).await.status(), 502, "{variable}");
        let beside = folder.path().join("new.pem");
        fs::write(&beside, trust::authority().root_pem()).unwrap();
        if variable == "SSL_CERT_FILE" {
            fs::rename(&beside, &file).unwrap();
        }
        until(address, "the new root", |response| response.status() == 200).await;
        let new = if beside.exists() { &beside } else { &file };
        fs::write(folder.path().join(".beside"), others.root_pem()).unwrap();
        fs::rename(folder.path().join(".beside"), new).unwrap();
        until(address, "the old root", |response| response.status() == 502).await;
    }
}

#[tokio::test]
async fn a_bundle_that_is_written_slowly_is_taken_whole() {
    let authorities = ["one", "two"].map(|name| Authority::new(name).unwrap());
    let mut scene = Scene::new(1).await;
    let origin = leaf_of(&authorities[0]).server_config(&["http/1.1"]).unwrap();
    let origin = Gatekeeper::start(scene.take_listeners().remove(0), origin);
    let setup = Setup::new(&scene.yaml(&tls("$FOLDER/ca.pem", "")));
    let proxy = setup.file("ca.pem", authorities[0].root_pem()).start().await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(get(address).await.status(), 200);

    let file = proxy.folder().join("ca.pem");
    let looks = Inotify::init(InitFlags::IN_CLOEXEC).unwrap();
    fs::write(&file, authorities[1].root_pem()).unwrap();
    looks.add_watch(&file, AddWatchFlags::IN_CLOSE_NOWRITE).unwrap();
    let looked = tokio::task::spawn_blocking(move || looks.read_events().unwrap());
    within("a look at the half of it", looked).await.unwrap();
    let whole = authorities.each_ref().map(Authority::root_pem).concat();
    fs::write(&file, whole).unwrap();

    let in_force = "certificate files changed and are now in use";
    proxy.logged(in_force).await;
    assert_eq!(get(address).await.status(), 200, "the half was taken");
    origin.tls.store(leaf_of(&authorities[1]).server_config(&["http/1.1"]).unwrap());
    assert_eq!(get(address).await.status(), 200, "the half was all that was taken");
    assert_eq!(proxy.log().matches(in_force).count(), 1);
}

#[tokio::test]
async fn a_revocation_counts_as_soon_as_its_list_is_there() {
    let leaf = leaf_of(trust::authority());
    let list = |revoked: &[&Leaf]| trust::authority().revocation_list(revoked).unwrap();
    let (nobody, it) = (list(&[]), list(&[&leaf]));
    let mut scene = Scene::new(1).await;
    let server = leaf.server_config(&["http/1.1"]).unwrap();
    let _origin = Gatekeeper::start(scene.take_listeners().remove(0), server);
    let mut volume = Volume::new(&[("list.pem", &nobody)]);
    let keys = format!(", crls: [\"{}\"]", volume.path("list.pem").display());
    let proxy = Setup::new(&scene.yaml(&tls("$FOLDER/root.pem", &keys))).start().await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(get(address).await.status(), 200);

    volume.publish(&[("list.pem", &it)]);
    let response = until(address, "the revocation", |response| response.status() == 502).await;
    assert!(response.json()["detail"].as_str().unwrap().contains("revoked"), "{}", response.text());
    // A list that is cut short is no pardon.
    volume.publish(&[("list.pem", &nobody[..nobody.len() / 2])]);
    refused(&proxy, 1).await;
    assert_eq!(get(address).await.status(), 502);
    volume.publish(&[("list.pem", &nobody)]);
    until(address, "the pardon", |response| response.status() == 200).await;
}
