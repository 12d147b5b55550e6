//! `protocol: tcp` with servers and clients that people have: Mosquitto, Redis; and the examples, as they stand.

use std::{
    fs,
    net::SocketAddr,
    path::Path,
    process::{Command, Output, Stdio},
};

use crate::support::{
    loopback,
    proxy::Proxy,
    scene::Scene,
    unprivileged::{Daemon, Folder},
    within,
};
use truename::demo::dns;

const MESSAGES: usize = 1_000;

#[tokio::test]
async fn a_subscriber_with_a_session_gets_every_message_that_came_while_it_was_away() {
    let world = World::new("mqtt", "mqtt.example.com", "port: 8883", |folder, address| {
        let at = folder.path().display();
        let file = folder.file(
            "mosquitto.conf",
            format!(
                "listener {} {}\ncertfile {at}/cert.pem\nkeyfile {at}/key.pem\nallow_anonymous true\n\
                 max_queued_messages 0\n",
                address.port(),
                address.ip()
            ),
        );
        ["/usr/sbin/mosquitto", "-c", file.to_str().unwrap()].map(str::to_owned).to_vec()
    })
    .await;
    let client = |program: &str, more: &[&str]| {
        let address = world.alias;
        let (host, port) = (address.ip().to_string(), address.port().to_string());
        let common = ["-h", &host, "-p", &port, "-t", "reports", "-q", "1"];
        let mut command = Command::new(program);
        command.args(common).args(more).stdin(Stdio::null());
        command
    };
    let session = ["-c", "-i", "night-shift"];
    let begun = run(client("mosquitto_sub", &[&session[..], &["-E"]].concat())).await;
    assert!(begun.status.success(), "{begun:?}");

    let lines: String = (0..MESSAGES).map(|number| format!("report {number}\n")).collect();
    let file = world.proxy.folder().join("lines");
    fs::write(&file, &lines).unwrap();
    let mut publish = client("mosquitto_pub", &["-l"]);
    publish.stdin(fs::File::open(&file).unwrap());
    let published = run(publish).await;
    assert!(published.status.success(), "{published:?}");

    let count = MESSAGES.to_string();
    let received = run(client("mosquitto_sub", &[&session[..], &["-C", &count]].concat())).await;
    assert!(received.status.success(), "{received:?}");
    assert!(String::from_utf8(received.stdout).unwrap() == lines, "each once, and in order");
}

#[tokio::test]
async fn redis_is_used_without_tls_though_it_takes_nothing_else() {
    let world = World::new("redis", "redis.example.com", "port: 6380", |folder, address| {
        let at = |file: &str| folder.path().join(file).display().to_string();
        let (host, port) = (address.ip().to_string(), address.port().to_string());
        let (certificate, key) = (at("cert.pem"), at("key.pem"));
        [
            &["redis-server", "--port", "0", "--tls-port", &port, "--bind", &host][..],
            &["--tls-cert-file", &certificate, "--tls-key-file", &key],
            &["--tls-ca-cert-file", &certificate, "--tls-auth-clients", "no"],
            &["--save", "", "--daemonize", "no"],
        ]
        .concat()
        .into_iter()
        .map(str::to_owned)
        .collect()
    })
    .await;
    let client = |program: &str, more: &[&str]| {
        let (host, port) = (world.alias.ip().to_string(), world.alias.port().to_string());
        let mut command = Command::new(program);
        command.args(["-h", &host, "-p", &port]).args(more).stdin(Stdio::null());
        command
    };
    let set = run(client("redis-cli", &["set", "greeting", "hello"])).await;
    assert_eq!(String::from_utf8_lossy(&set.stdout), "OK\n", "{set:?}");
    let got = run(client("redis-cli", &["get", "greeting"])).await;
    assert_eq!(String::from_utf8_lossy(&got.stdout), "hello\n", "{got:?}");

    let load = ["-q", "-n", "5000", "-c", "50", "-P", "4", "-d", "1000", "-t", "set,get", "--csv"];
    let loaded = run(client("redis-benchmark", &load)).await;
    let table = String::from_utf8_lossy(&loaded.stdout);
    assert!(loaded.status.success() && table.contains("\"SET\"") && table.contains("\"GET\""));
    let line = world.proxy.logged("\"message\":\"connection\"").await;
    assert!(line.contains("\"tls_version\":\"TLSv1.3\""), "{line}");
}

/// A server of other people, and a proxy with the configuration of an example.
struct World {
    proxy: Proxy,
    alias: SocketAddr,
    _scene: Scene,
    _daemon: Daemon,
    _folder: Folder,
}

impl World {
    /// With a certificate for `name`. `port` is how the example has the server's.
    async fn new(
        example: &str,
        name: &str,
        port: &str,
        command: impl FnOnce(&Folder, SocketAddr) -> Vec<String>,
    ) -> Self {
        let scene = Scene::new(1).await;
        let address = SocketAddr::new(loopback::address(), loopback::port_of_its_own());
        scene.dns.zone([dns::address(name, 60, address.ip())]);
        let folder = Folder::of(name);
        let command = command(&folder, address);
        let command: Vec<_> = command.iter().map(String::as_str).collect();
        let daemon = Daemon::start(&folder, &command, &[address]).await;

        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples").join(example);
        let text = fs::read_to_string(file.join("truename.yaml")).unwrap();
        let tls = "tls: {ca: {system: false, webpki: false, files: [\"$FOLDER/root.pem\"]}}";
        let here = format!("port: {}\n    {tls}", address.port());
        assert!(text.contains(port) && text.contains("listen: ["), "{text}");
        let text = text.replace(port, &here).replace("listen: [", "listen: [0] # [");
        let proxy = Proxy::start(&format!(
            "dns: {{servers: [\"{}\"], cluster_domain: cluster.local, namespace: default}}\n\
             policy: {{allow_addresses: [\"127.0.0.0/8\"]}}\n{text}",
            scene.dns.address()
        ))
        .await;
        let alias = text.lines().find_map(|line| line.trim().strip_prefix("- name: ")).unwrap();
        let alias = proxy.address(alias).await;
        Self { proxy, alias, _scene: scene, _daemon: daemon, _folder: folder }
    }
}

/// Runs a client to its end.
async fn run(mut command: Command) -> Output {
    let name = format!("{command:?}");
    let ended = tokio::task::spawn_blocking(move || command.output().unwrap());
    within(&name, ended).await.unwrap()
}
