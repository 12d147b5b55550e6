//! A configured certificate for applications that speak TLS, and its replacement under traffic.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use crate::support::{
    client,
    proxy::{Proxy, Setup},
    scene::{ALIAS, Scene, TRUE_NAME},
    scripts, trust, within,
};
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use truename::demo::authority::{Leaf, LeafOptions};

const FILES: &str =
    "listener: {tls: {certificate: $FOLDER/tls.crt, key: $FOLDER/tls.key}}\nworkers: 1\n";

#[tokio::test]
async fn it_is_replaced_as_a_pair_at_every_swap_and_no_request_notices() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let secret = Secret::new();
    let first = leaf(&[ALIAS]);
    secret.publish(&first.chain_pem, &first.key_pem);
    let yaml = FILES.replace("$FOLDER", secret.folder.path().to_str().unwrap());
    let proxy = Proxy::start(&format!("{yaml}{}", scene.yaml(""))).await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(shown(address, ALIAS).await, first.chain[0].as_ref());

    // Requests on connections that stay and on new ones, all the while.
    let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let traffic = tokio::spawn(traffic(address, stop.clone(), served.clone()));
    let mut current = first;
    for round in 0..3 {
        let next = leaf(&[ALIAS]);
        let half = &next.chain_pem[..next.chain_pem.len() / 2];
        let unusable = [
            [(half, next.key_pem.as_str()), ("", "")],
            [(&next.chain_pem, &next.key_pem[..40]), (&next.chain_pem, "")],
            [(&next.chain_pem, &current.key_pem), (&current.chain_pem, &next.key_pem)],
        ];
        for (certificate, key) in unusable[round] {
            let complaints = complaints(&proxy);
            secret.publish(certificate, key);
            within("a complaint", async {
                while self::complaints(&proxy) == complaints {
                    tokio::task::yield_now().await;
                }
            })
            .await;
            assert_eq!(shown(address, ALIAS).await, current.chain[0].as_ref(), "round {round}");
        }
        secret.publish(&next.chain_pem, &next.key_pem);
        within("the next certificate", async {
            while shown(address, ALIAS).await != next.chain[0].as_ref() {}
        })
        .await;
        let before = served.load(Ordering::Relaxed);
        within("requests after it", async {
            while served.load(Ordering::Relaxed) < before + 5 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        current = next;
    }
    stop.store(true, Ordering::Relaxed);
    within("the traffic's end", traffic).await.unwrap();
}

#[tokio::test]
async fn names_that_it_does_not_bear_are_said_at_load_and_when_it_changes() {
    let scene = Scene::new(1).await;
    let covering = leaf(&[ALIAS, "webscaler-manual.default", "*.default.svc"]);
    let proxy = Setup::new(&format!("{FILES}{}", scene.yaml("hosts: [pay.example]")))
        .file("tls.crt", covering.chain_pem.clone())
        .file("tls.key", covering.key_pem.clone())
        .start()
        .await;
    let said = "is not valid for this name of an alias";
    let named = |name: &str| {
        let name = format!("\"name\":\"{name}\"");
        proxy.log().lines().filter(|line| line.contains(said) && line.contains(&name)).count()
    };
    assert_eq!(named("pay.example"), 1, "{}", proxy.log());
    assert_eq!(named("webscaler-manual.default.svc.cluster.local"), 1);
    assert_eq!((named(ALIAS), named("webscaler-manual.default.svc")), (0, 0));

    let narrower = leaf(&["pay.example"]);
    fs::write(proxy.folder().join("tls.key"), &narrower.key_pem).unwrap();
    fs::write(proxy.folder().join("tls.crt"), &narrower.chain_pem).unwrap();
    proxy.logged(&format!("\"name\":\"{ALIAS}\"")).await;
    assert_eq!(named("pay.example"), 1);
}

#[tokio::test]
async fn it_serves_every_name_of_the_listener_the_true_name_and_any_host_included() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::respond);
    let everything = leaf(&[ALIAS, "*.pay.example", TRUE_NAME]);
    let proxy = Setup::new(&format!("{FILES}{}", scene.yaml("hosts: [\"*\"]")))
        .file("tls.crt", everything.chain_pem.clone())
        .file("tls.key", everything.key_pem.clone())
        .start()
        .await;
    let address = proxy.address(ALIAS).await;
    for name in [ALIAS, "anything.pay.example", TRUE_NAME] {
        let roots = trust::authority().roots();
        let mut peer = client::connect_tls(address, name, roots, &["http/1.1"]).await.unwrap();
        peer.send(format!("GET / HTTP/1.1\r\nHost: {name}\r\n\r\n")).await;
        assert_eq!(peer.response().await.text(), "ok", "{name}");
    }
    origins[0].assert_called(TRUE_NAME, &scene.authority(TRUE_NAME));
    assert!(!proxy.folder().join("state").exists(), "no authority is made that nobody needs");
}

#[tokio::test]
async fn it_is_shown_to_clients_without_sni_and_for_every_name_that_it_is_valid_for() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let ip = [IpAddr::V4(Ipv4Addr::LOCALHOST)];
    let names = [ALIAS, "elsewhere.example"];
    let leaf = trust::authority().issue(&names, &ip, LeafOptions::default()).unwrap();
    let proxy = Setup::new(&format!("{FILES}{}", scene.yaml("")))
        .file("tls.crt", leaf.chain_pem.clone())
        .file("tls.key", leaf.key_pem.clone())
        .start()
        .await;
    let address = proxy.address(ALIAS).await;
    for name in [ALIAS, "elsewhere.example", "127.0.0.1"] {
        assert_eq!(shown(address, name).await, leaf.chain[0].as_ref(), "{name}");
    }
    let roots = trust::authority().roots();
    let error = client::connect_tls(address, "stranger.example", roots, &[]).await.err().unwrap();
    assert!(error.to_string().contains("UnrecognisedName"), "{error}");
}

#[tokio::test]
async fn files_that_are_no_pair_are_bad_configuration_and_a_reload_to_them_is_refused() {
    let scene = Scene::new(1).await;
    let (one, other) = (leaf(&[ALIAS]), leaf(&[ALIAS]));
    let yaml = format!("{FILES}{}", scene.yaml(""));
    let setup = Setup::new(&yaml).file("tls.crt", one.chain_pem.clone());
    let proxy = setup.file("tls.key", other.key_pem.clone()).spawn();
    assert_eq!(proxy.exit().await.code(), Some(2));
    let line = proxy.logged("do not match").await;
    assert!(line.contains("tls.crt") && line.contains("tls.key"), "{line}");

    let setup = Setup::new(&yaml).file("tls.crt", one.chain_pem.clone());
    let proxy = setup.file("tls.key", one.key_pem.clone()).start().await;
    let address = proxy.address(ALIAS).await;
    fs::write(proxy.folder().join("other.key"), &other.key_pem).unwrap();
    let changed = yaml.replace("tls.key", "other.key");
    proxy.rewrite(&format!("{changed}\nadmin: {{listen: \"127.0.0.1:0\"}}\n"));
    proxy.logged("new configuration rejected; the running one stays in effect").await;
    assert_eq!(shown(address, ALIAS).await, one.chain[0].as_ref());
}

#[tokio::test]
async fn a_reload_between_the_halves_of_a_new_pair_keeps_the_former_one() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let (one, other) = (leaf(&[ALIAS]), leaf(&[ALIAS]));
    let yaml = |keys: &str| format!("{FILES}{}", scene.yaml(keys));
    let setup = Setup::new(&yaml("")).file("tls.crt", one.chain_pem.clone());
    let proxy = setup.file("tls.key", one.key_pem.clone()).start().await;
    let address = proxy.address(ALIAS).await;
    let before = complaints(&proxy);
    fs::write(proxy.folder().join("tls.crt"), &other.chain_pem).unwrap();
    let changed = yaml("hosts: [new.example]");
    proxy.rewrite(&format!("{changed}\nadmin: {{listen: \"127.0.0.1:0\"}}\n"));
    proxy.logged("configuration reloaded").await;
    assert!(complaints(&proxy) > before, "{}", proxy.log());
    assert_eq!(client::get(address, "new.example", "/").await.text(), "ok");
    assert_eq!(shown(address, ALIAS).await, one.chain[0].as_ref());

    fs::write(proxy.folder().join("tls.key"), &other.key_pem).unwrap();
    within("the new certificate", async {
        while shown(address, ALIAS).await != other.chain[0].as_ref() {}
    })
    .await;
}

/// A Secret as the kubelet mounts it: `tls.crt -> ..data/tls.crt`, `..data -> ..VERSION`, and one
/// rename brings a new version.
struct Secret {
    folder: tempfile::TempDir,
    versions: AtomicUsize,
}

impl Secret {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        for name in ["tls.crt", "tls.key"] {
            symlink(Path::new("..data").join(name), folder.path().join(name)).unwrap();
        }
        Self { folder, versions: AtomicUsize::new(0) }
    }

    fn publish(&self, certificate: &str, key: &str) {
        let number = self.versions.fetch_add(1, Ordering::Relaxed);
        let version = |number: usize| PathBuf::from(format!("..version_{number}"));
        let folder = self.folder.path();
        fs::create_dir(folder.join(version(number))).unwrap();
        fs::write(folder.join(version(number)).join("tls.crt"), certificate).unwrap();
        fs::write(folder.join(version(number)).join("tls.key"), key).unwrap();
        symlink(version(number), folder.join("..data_tmp")).unwrap();
        fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
        if let Some(previous) = number.checked_sub(1) {
            fs::remove_dir_all(folder.join(version(previous))).unwrap();
        }
    }
}

fn leaf(names: &[&str]) -> Leaf {
    trust::authority().issue(names, &[], LeafOptions::default()).unwrap()
}

/// Requests on a connection that stays and each on a new one, until told to stop. Panics where one
/// fails.
async fn traffic(address: SocketAddr, stop: Arc<AtomicBool>, served: Arc<AtomicUsize>) {
    let roots = trust::authority().roots();
    let connect = || client::connect_tls(address, ALIAS, roots.clone(), &["http/1.1"]);
    let mut kept = connect().await.unwrap();
    while !stop.load(Ordering::Relaxed) {
        let mut fresh = connect().await.unwrap();
        for peer in [&mut kept, &mut fresh] {
            peer.send(format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
            assert_eq!(peer.response().await.text(), "ok");
            served.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The certificate that a client is shown, and has verified.
async fn shown(address: SocketAddr, name: &str) -> Vec<u8> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(trust::authority().roots())
        .with_no_client_auth();
    let tcp = TcpStream::connect(address).await.unwrap();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let connector = TlsConnector::from(Arc::new(config));
    let tls = within("a handshake", connector.connect(name, tcp)).await.unwrap();
    tls.get_ref().1.peer_certificates().unwrap()[0].to_vec()
}

fn complaints(proxy: &Proxy) -> usize {
    proxy.log().matches("cannot renew the listener certificates").count()
}
