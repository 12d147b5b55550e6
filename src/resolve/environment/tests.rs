use super::*;
use crate::resolve::names::tests::settings;
use nix::{sys::stat::Mode, unistd::mkfifo};
use std::{
    fs,
    path::Path,
    sync::{Arc, mpsc},
    thread,
};
use tempfile::TempDir;
use tokio::runtime;

const POD: &str = "search prod.svc.k8s.corp svc.k8s.corp k8s.corp\nnameserver 10.96.0.10\n\
    nameserver fd00::a\noptions ndots:5\n";

fn parsed(dns: &config::Dns, text: &str) -> Environment {
    Environment::new(dns, Reading::parse(text.as_bytes(), 53), None)
}

struct File {
    folder: TempDir,
    source: Source,
}

impl File {
    fn new() -> File {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("resolv.conf");
        File { folder, source: Source::new(ResolvConf { path, port: 53 }) }
    }

    fn path(&self) -> &Path {
        &self.source.file.path
    }

    fn write(&self, text: &str) {
        fs::write(self.path(), text).unwrap();
    }

    async fn read(&self) -> (String, usize) {
        let environment = self.source.read(&settings()).await;
        let search = format!("{}.svc.{}", environment.namespace, environment.cluster_domain);
        (search, environment.servers.len())
    }
}

fn pod() -> (String, usize) {
    ("prod.svc.k8s.corp".to_owned(), 2)
}

#[test]
fn a_pods_resolv_conf_says_all() {
    let environment = parsed(&settings(), POD);
    assert_eq!(
        environment.servers,
        ["10.96.0.10:53".parse().unwrap(), "[fd00::a]:53".parse().unwrap()]
    );
    assert_eq!((&*environment.namespace, &*environment.cluster_domain), ("prod", "k8s.corp"));
    assert_eq!(environment.absolute("db"), "db.prod.svc.k8s.corp");
}

#[test]
fn the_configuration_overrides_the_file() {
    let server: SocketAddr = "127.0.0.1:5353".parse().unwrap();
    let dns = config::Dns {
        servers: vec![server.into()],
        cluster_domain: Some("Cluster.Local.".into()),
        namespace: Some("qa".into()),
        ..settings()
    };
    let environment = parsed(&dns, POD);
    assert_eq!(environment.servers, [server]);
    assert_eq!(environment.absolute("db"), "db.qa.svc.cluster.local");
}

#[test]
fn a_laptop_has_the_defaults() {
    let text = "search home.example\nnonsense here\nnameserver 192.0.2.53\n";
    let environment = parsed(&settings(), text);
    assert_eq!(environment.servers, ["192.0.2.53:53".parse().unwrap()]);
    assert_eq!(
        (&*environment.namespace, &*environment.cluster_domain),
        ("default", "cluster.local")
    );
    assert!(File::new().source.known(&settings()).servers.is_empty());
}

#[test]
fn a_link_local_server_keeps_its_interface() {
    let loopback = if_nametoindex("lo").unwrap();
    let text = "nameserver fe80::1%lo\nnameserver fe80::2%7\nnameserver fe80::3%none-such\n";
    let servers = parsed(&settings(), text).servers;
    let expected = [("fe80::1", loopback), ("fe80::2", 7), ("fe80::3", 0)]
        .map(|(ip, scope)| SocketAddrV6::new(ip.parse().unwrap(), 53, 0, scope).into());
    assert_eq!(servers, expected);

    let configured = ["[fe80::1%lo]", "[fe80::2%7]", "[fe80::3%none-such]"];
    let servers = configured.map(|server| server.parse().unwrap()).to_vec();
    let dns = config::Dns { servers, ..settings() };
    assert_eq!(parsed(&dns, POD).servers, expected);
}

#[tokio::test]
async fn a_file_that_is_emptied_cut_or_removed_takes_nothing_back() {
    let file = File::new();
    file.write(POD);
    assert_eq!(file.read().await, pod());
    for text in [
        "",
        "\n",
        "# being written\n",
        "nameserver 10.96.0.10\nnameserver fd00::a\n",
        "search corp.example\nnameserver 10.96.0.10\nnameserver fd00::a\n",
        "search prod.svc.k8s.corp\n",
        "search prod\n",
        "nameserver 10.96.\n",
        "search qa.svc.k8s.corp\0\0\nnameserver 10.96.0.11\0\n",
        "search .svc.k8s.corp qa.svc. qa.svc.k8s..corp\n",
    ] {
        file.write(text);
        assert_eq!(file.read().await, pod(), "{text:?}");
        assert_eq!(file.source.known(&settings()).namespace, "prod");
    }
    fs::remove_file(file.path()).unwrap();
    assert_eq!(file.read().await, pod());
    // What cannot be read, for whatever reason.
    fs::create_dir(file.path()).unwrap();
    assert_eq!(file.read().await, pod());
}

#[tokio::test]
async fn a_file_that_says_something_else_is_followed() {
    let file = File::new();
    assert_eq!(file.read().await, ("default.svc.cluster.local".to_owned(), 0));
    file.write("");
    assert_eq!(file.read().await, ("default.svc.cluster.local".to_owned(), 0));
    file.write(POD);
    assert_eq!(file.read().await, pod(), "the first with usable contents");
    file.write("search qa.svc.k8s.corp\nnameserver 10.96.0.11\n");
    assert_eq!(file.read().await, ("qa.svc.k8s.corp".to_owned(), 1));
    // By rename, as the kubelet does it.
    let fresh = file.folder.path().join("fresh");
    fs::write(&fresh, POD).unwrap();
    fs::rename(fresh, file.path()).unwrap();
    assert_eq!(file.read().await, pod());
}

#[test]
fn a_file_that_is_still_being_written_is_not_believed() {
    let file = File::new();
    let namespace_and_domain = || {
        let environment = file.source.known(&settings());
        format!("{}.{}", environment.namespace, environment.cluster_domain)
    };
    file.write(POD);
    assert_eq!(namespace_and_domain(), "prod.k8s.corp");
    let mut before = file.source.known.lock().reading.clone();
    for (text, is_settled) in [
        ("search qa.svc.k8s.co", false),
        ("search qa.svc.k8s.corp.example\nnameserver 10.96.0.1", false),
        ("search qa.svc.k8s.corp.example\nnameserver 10.96.0.100\n", false),
        ("search qa.svc.k8s.corp.example\nnameserver 10.96.0.100\n", true),
    ] {
        assert_eq!(namespace_and_domain(), "prod.k8s.corp");
        file.write(text);
        let looked = read(file.path());
        assert_eq!(file.source.is_settled(looked, &mut before), is_settled, "{text:?}");
    }
    assert_eq!(namespace_and_domain(), "qa.k8s.corp.example");
}

/// Regression: the control thread read the file itself and hung with it, and so did probes, signals and reloads.
#[test]
fn a_file_that_hangs_keeps_neither_lookups_nor_the_thread() {
    let kept = Arc::new(File::new());
    let (done, ended) = mpsc::channel();
    let file = kept.clone();
    thread::spawn(move || {
        let runtime = runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let known = runtime.block_on(async {
            file.write(POD);
            assert_eq!(file.read().await, pod());
            fs::remove_file(file.path()).unwrap();
            // Opening it waits for a writer.
            mkfifo(file.path(), Mode::S_IRWXU).unwrap();
            let mut known = Vec::new();
            for _ in 0..20 {
                known.push(file.read().await);
            }
            known
        });
        done.send(known).unwrap();
        runtime.shutdown_background();
    });
    let known = ended.recv_timeout(Duration::from_secs(10)).expect("it waits for the file");
    assert_eq!(known, vec![pod(); 20]);
    // So that the reading thread ends.
    fs::OpenOptions::new().read(true).write(true).open(kept.path()).unwrap();
}

#[tokio::test]
async fn a_file_of_which_nothing_is_needed_is_not_read() {
    let file = File::new();
    file.write(POD);
    let dns = config::Dns {
        servers: vec!["127.0.0.1:53".parse().unwrap()],
        cluster_domain: Some("cluster.local".into()),
        namespace: Some("qa".into()),
        ..settings()
    };
    assert_eq!(file.source.read(&dns).await, file.source.known(&dns));
    assert_eq!(file.source.known.lock().reading, None);
    // After a reload, other settings may need it.
    assert_eq!(file.source.known(&settings()).namespace, "prod");
}

/// Regression: lookups failed in a program that keeps its runtime's blocking threads busy.
#[test]
fn a_file_is_read_though_all_threads_of_the_runtime_are_busy() {
    let mut builder = runtime::Builder::new_current_thread();
    let runtime = builder.enable_all().max_blocking_threads(1).build().unwrap();
    let (free, busy) = mpsc::channel::<()>();
    runtime.spawn_blocking(move || busy.recv());
    let file = File::new();
    file.write(POD);
    assert_eq!(runtime.block_on(file.read()), pod());
    drop(free);
}
