//! The forward proxy's credentials: who is let in, who is told what, and what is done with them.

use std::{fs, net::SocketAddr, process::Stdio};

use crate::support::{
    client,
    curl::{Curl, curl},
    loopback,
    message::Message,
    peer::Peer,
    proxy::{Proxy, Setup},
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene, TRUE_NAME},
    scripts, tools, within,
};
use base64::{Engine, engine::general_purpose::STANDARD};
use nix::sys::signal::Signal;
use truename::demo::dns;

const OTHER: &str = "elsewhere.example";
const PASSWORD: &str = "open:sesame ü";

/// A forward proxy that lets `ann` and `bob` in, with an alias and a host that is none behind it.
struct World {
    proxy: Proxy,
    address: SocketAddr,
    scene: Scene,
    alias: RawOrigin,
    other: RawOrigin,
}

impl World {
    async fn new() -> Self {
        Self::with("127.0.0.1:0", scripts::respond).await
    }

    async fn with<Script, Run>(listen: &str, script: Script) -> Self
    where
        Script: Fn(Arrival) -> Run + Clone + Send + Sync + 'static,
        Run: Future<Output = ()> + Send + 'static,
    {
        let mut scene = Scene::new(1).await;
        let alias = scene.script(script.clone()).remove(0);
        let other = RawOrigin::start(loopback::listen_anywhere(), None, script);
        scene.dns.zone([dns::address(OTHER, 60, other.address.ip())]);
        let yaml = format!(
            "{}\nproxy: {{listen: \"{listen}\", credentials: $FOLDER/credentials}}\n",
            scene.yaml("")
        );
        let file = format!("# who may come in\nann:{PASSWORD}\nbob:other\n");
        let proxy = Setup::new(&yaml).file("credentials", file).start().await;
        let address = proxy.forward_proxy().await;
        Self { proxy, address, scene, alias, other }
    }

    fn targets(&self) -> [String; 2] {
        [format!("{ALIAS}:80"), self.other_target()]
    }

    fn other_target(&self) -> String {
        format!("{OTHER}:{}", self.other.address.port())
    }

    /// Nobody was called.
    fn assert_untouched(&self) {
        assert_eq!((self.alias.seen().connections, self.other.seen().connections), (0, 0));
    }

    async fn curl(&self, user: &str, arguments: &[&str]) -> Curl {
        let proxy = format!("http://{}", self.address);
        let through = ["--noproxy", "", "--proxy", &proxy, "--proxy-user", user];
        curl(&[&through, arguments].concat()).await
    }

    /// Whether this user is let in.
    async fn admits(&self, user: &str) -> bool {
        let url = format!("GET http://{}/ HTTP/1.1\r\nHost: x\r\n", self.other_target());
        let head = format!("{url}{}Connection: close\r\n\r\n", field(user));
        let mut peer = client::connect(self.address).await;
        peer.send(head).await;
        peer.response().await.status() == 200
    }

    /// Waits until the file's change shows.
    async fn until_admits(&self, user: &str) {
        within("the new credentials", async { while !self.admits(user).await {} }).await;
    }

    fn write(&self, contents: &str) {
        fs::write(self.proxy.folder().join("credentials"), contents).unwrap();
    }
}

fn field(user: &str) -> String {
    format!("Proxy-Authorization: Basic {}\r\n", STANDARD.encode(user))
}

fn connect_to(target: &str, fields: &str) -> String {
    format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n{fields}\r\n")
}

#[track_caller]
fn refused(response: &Message) -> serde_json::Value {
    assert_eq!(response.status(), 407, "{}{}", response.head, response.text());
    let challenge = response.field("proxy-authenticate");
    assert_eq!(challenge, Some("Basic realm=\"truename\", charset=\"UTF-8\""));
    assert_eq!(response.field("content-type"), Some("application/problem+json"));
    let status = response.field("proxy-status").unwrap();
    assert!(status.starts_with("truename; error=http_request_denied; "), "{status}");
    let problem = response.json();
    assert_eq!((&problem["status"], &problem["stage"]), (&407.into(), &"request".into()));
    assert!(problem["fix"].as_str().unwrap().contains("proxy.credentials"), "{problem}");
    problem
}

#[tokio::test]
async fn whoever_has_none_or_others_is_asked_for_them_and_nobody_is_called() {
    let world = World::new().await;
    let good = STANDARD.encode(format!("ann:{PASSWORD}"));
    let fields = [
        String::new(),
        field("ann:wrong"),
        field("ann"),
        field(&format!("Ann:{PASSWORD}")),
        field("# who may come in"),
        format!("Proxy-Authorization: Bearer {good}\r\n"),
        format!("Proxy-Authorization: {good}\r\n"),
        "Proxy-Authorization: Basic !\r\n".to_owned(),
        // For the origin, not for the proxy.
        format!("Authorization: Basic {good}\r\n"),
        format!("{}Proxy-Authorization: Basic {good}\r\n", field("ann:wrong")),
    ];
    for target in world.targets() {
        for fields in &fields {
            // One connection: being refused is no reason to close it.
            let mut peer = client::connect(world.address).await;
            for request in [
                format!("GET http://{target}/ HTTP/1.1\r\nHost: {target}\r\n{fields}\r\n"),
                connect_to(&target, fields),
                // Nor does it tell them what else would be wrong.
                format!("GET / HTTP/1.1\r\nHost: {target}\r\n{fields}\r\n"),
            ] {
                peer.send(&request).await;
                let response = peer.response_to(request.split(' ').next().unwrap()).await;
                let problem = refused(&response);
                let given = fields.starts_with("Proxy-");
                let detail = problem["detail"].as_str().unwrap();
                assert_eq!(detail.ends_with("none that are valid"), given, "{request}{detail}");
            }
        }
    }
    world.assert_untouched();
    let line = world.proxy.logged("\"status\":407").await;
    assert!(line.contains("http_request_denied"), "{line}");
    let log = world.proxy.log();
    for secret in [&good, PASSWORD, "ann:", &STANDARD.encode("ann:wrong")] {
        assert!(!log.contains(secret), "{secret} is in the log");
    }
}

#[tokio::test]
async fn neither_http2_nor_tls_is_a_way_around_it() {
    let world = World::new().await;
    let mut peer = client::connect(world.address).await;
    peer.send(b"\x16\x03\x01 a hello\r\n\r\n").await;
    assert_eq!(peer.response().await.status(), 400);
    peer.closed().await;
    // The preface, and settings.
    let mut peer = client::connect(world.address).await;
    peer.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await;
    assert_eq!(peer.response().await.status(), 400);
    peer.closed().await;
    world.assert_untouched();
}

#[tokio::test]
async fn curl_with_its_proxy_user_gets_through_both_ways_and_by_both_versions() {
    let world = World::new().await;
    let user = format!("ann:{PASSWORD}");
    let other = format!("http://{}/", world.other_target());
    let alias = format!("http://{ALIAS}/");
    for user in [user.as_str(), "bob:other"] {
        for arguments in [
            &[alias.as_str()][..],
            &["--proxytunnel", &alias],
            &["--proxytunnel", "--http2-prior-knowledge", &alias],
            &[&other],
            &["--proxytunnel", &other],
            // Asked first, and then told.
            &["--proxy-anyauth", &alias],
        ] {
            let result = world.curl(user, arguments).await;
            assert_eq!(
                (result.code, result.stdout.as_str()),
                (0, "ok"),
                "{arguments:?} {result:?}"
            );
        }
    }
    let root = world.proxy.folder().join("state/truename/ca.pem");
    for version in ["--http1.1", "--http2"] {
        let url = format!("https://{ALIAS}/");
        let arguments = ["--cacert", root.to_str().unwrap(), version, &url];
        assert_eq!(world.curl(&user, &arguments).await.stdout, "ok", "{version}");
        // 56: the tunnel was refused.
        let denied = world.curl("ann:wrong", &arguments).await;
        assert!(denied.code != 0 && denied.stderr.contains("407"), "{version}: {denied:?}");
    }
    let log = world.proxy.log();
    assert!(!log.contains(&STANDARD.encode(&user)) && !log.contains("sesame"), "{log}");
}

#[tokio::test]
async fn the_credentials_reach_no_origin() {
    let world = World::new().await;
    let ann = field(&format!("ann:{PASSWORD}"));
    for target in world.targets() {
        let inside = format!("GET / HTTP/1.1\r\nHost: {target}\r\nAuthorization: Basic theirs\r\n");
        let mut peer = client::connect(world.address).await;
        let absolute = inside.replace("GET /", &format!("GET http://{target}/"));
        peer.send(format!("{absolute}{ann}\r\n")).await;
        assert_eq!(peer.response().await.text(), "ok");
        peer.send(connect_to(&target, &ann)).await;
        assert_eq!(peer.response_to("CONNECT").await.status(), 200);
        // What is said within a tunnel to a host that is no alias is between those two.
        let again = if target.starts_with(ALIAS) { ann.as_str() } else { "" };
        peer.send(format!("{inside}{again}\r\n")).await;
        assert_eq!(peer.response().await.text(), "ok");
    }
    for origin in [&world.alias, &world.other] {
        let requests = origin.seen().requests;
        assert_eq!(requests.len(), 2);
        for request in requests {
            assert!(!request.head.to_lowercase().contains("proxy-"), "{}", request.head);
            assert_eq!(request.field("authorization"), Some("Basic theirs"));
        }
    }
    world.alias.assert_called(TRUE_NAME, &world.scene.authority(TRUE_NAME));
}

#[tokio::test]
async fn a_refused_body_does_not_become_the_next_request() {
    let world = World::new().await;
    let target = world.other_target();
    let smuggled = format!("GET http://{target}/smuggled HTTP/1.1\r\nHost: x\r\n\r\n");
    let mut peer = client::connect(world.address).await;
    peer.send(format!(
        "POST http://{target}/ HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{smuggled}",
        smuggled.len()
    ))
    .await;
    refused(&peer.response().await);
    let user = field("bob:other");
    let close =
        format!("GET http://{target}/ HTTP/1.1\r\nHost: x\r\n{user}Connection: close\r\n\r\n");
    if peer.try_send(close).await.is_ok() {
        // Where the connection is kept, the next response is to the next request.
        let rest = String::from_utf8(peer.rest().await.unwrap_or_default()).unwrap();
        assert!(rest.matches("HTTP/1.1").count() <= 1, "{rest}");
    }
    let seen = world.other.seen();
    assert!(seen.requests.iter().all(|request| request.start_line() == "GET / HTTP/1.1"));
}

#[tokio::test]
async fn python_s_requests_gets_through_with_a_user_in_the_proxy_s_url_only() {
    let world = World::new().await;
    let root = world.proxy.folder().join("state/truename/ca.pem");
    let script = "import os, requests, sys
proxy, user, root, other = sys.argv[1:]
for url in 'http://webscaler-manual/', 'https://webscaler-manual/', other:
    proxies = dict.fromkeys(['http', 'https'], 'http://' + user + proxy)
    try:
        response = requests.get(url, proxies=proxies, verify=root, timeout=15)
        print(response.status_code)
    except requests.exceptions.ProxyError as error:
        print('407' if '407' in str(error) else error)
";
    // In Latin-1 is how it sends what is not ASCII.
    let user = "bob:other@";
    for (user, expected) in [(user, "200\n200\n200\n"), ("", "407\n407\n407\n")] {
        let mut command = tokio::process::Command::new(tools::python());
        command.args(["-c", script, &world.address.to_string(), user]).arg(&root);
        command.arg(format!("http://{}/", world.other_target()));
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().to_uppercase().ends_with("_PROXY") {
                command.env_remove(name);
            }
        }
        let output = command.stdin(Stdio::null()).kill_on_drop(true).output();
        let output = within("Python", output).await.unwrap();
        let (said, complained) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert_eq!(said, expected, "{complained}");
    }
}

#[tokio::test]
async fn a_changed_file_counts_at_once_for_connections_that_are_open_too() {
    let world = World::new().await;
    let get = |user: &str| {
        let target = world.other_target();
        format!("GET http://{target}/ HTTP/1.1\r\nHost: {target}\r\n{}\r\n", field(user))
    };
    let mut open = client::connect(world.address).await;
    open.send(get("bob:other")).await;
    assert_eq!(open.response().await.text(), "ok");

    world.write("carol:new\n");
    world.until_admits("carol:new").await;
    assert!(!world.admits("bob:other").await);
    open.send(get("bob:other")).await;
    refused(&open.response().await);
    open.send(get("carol:new")).await;
    assert_eq!(open.response().await.text(), "ok");
    let line = world.proxy.logged("the forward proxy's credentials have changed").await;
    assert!(line.contains("credentials"), "{line}");
}

#[tokio::test]
async fn a_broken_file_keeps_the_old_credentials_and_is_said() {
    let world = World::new().await;
    for (contents, said) in
        [("bob:other\nsecret-line\n", "line 2 has no colon"), ("", "no `USER:PASSWORD` line")]
    {
        world.write(contents);
        let line = world.proxy.logged(said).await;
        assert!(
            line.contains("the previous credentials stay in use") && line.contains("\"warn\""),
            "{line}"
        );
        assert!(world.admits(&format!("ann:{PASSWORD}")).await);
    }
    fs::remove_file(world.proxy.folder().join("credentials")).unwrap();
    world.proxy.logged("No such file").await;
    assert!(world.admits("bob:other").await);
    world.write("dora:next\n");
    world.until_admits("dora:next").await;
    assert!(!world.proxy.log().contains("secret-line"));
}

#[tokio::test]
async fn a_reload_that_asks_for_credentials_asks_on_open_connections_too() {
    let mut scene = Scene::new(1).await;
    let _origin = scene.script(scripts::respond);
    let open = format!(
        "{}\nproxy: {{listen: \"127.0.0.1:0\"}}\nadmin: {{listen: \"127.0.0.1:0\"}}\n",
        scene.yaml("")
    );
    let proxy = Setup::new(&open).file("credentials", "ann:one\n").start().await;
    let mut peer: Peer = client::connect(proxy.forward_proxy().await).await;
    let get = |fields: &str| format!("GET http://{ALIAS}/ HTTP/1.1\r\nHost: x\r\n{fields}\r\n");
    peer.send(get("")).await;
    assert_eq!(peer.response().await.text(), "ok");

    proxy.rewrite(&open.replace(":0\"}\nadmin", ":0\", credentials: $FOLDER/credentials}\nadmin"));
    proxy.signal(Signal::SIGHUP);
    proxy.logged("configuration reloaded").await;
    peer.send(get("")).await;
    refused(&peer.response().await);
    peer.send(get(&field("ann:one"))).await;
    assert_eq!(peer.response().await.text(), "ok");
}

#[tokio::test]
async fn a_file_that_cannot_be_used_is_a_problem_of_the_configuration_and_a_reload_to_it_is_refused()
 {
    let scene = Scene::new(1).await;
    let yaml = |file: &str| {
        let scene = scene.yaml("");
        format!(
            "{scene}\nadmin: {{listen: \"127.0.0.1:0\"}}\nproxy:\n  listen: \"127.0.0.1:0\"\n  credentials: $FOLDER/{file}\n"
        )
    };
    let lines = yaml("x").lines().count();
    for (contents, said) in [
        (Some("ann:one\nsecret\n"), "line 2 has no colon: write `USER:PASSWORD`"),
        (Some(""), "it contains no `USER:PASSWORD` line"),
        (None, "No such file or directory"),
    ] {
        let mut setup = Setup::new(&yaml("credentials"));
        if let Some(contents) = contents {
            setup = setup.file("credentials", contents);
        }
        let proxy = setup.spawn();
        assert_eq!(proxy.exit().await.code(), Some(2));
        let line = proxy.logged(said).await;
        assert!(line.contains(&format!("truename.yaml:{lines}:16: proxy.credentials: ")), "{line}");
        assert!(!proxy.log().contains("secret"));
    }

    let proxy =
        Setup::new(&yaml("good")).file("good", "ann:one\n").file("bad", "no\n").start().await;
    proxy.rewrite(&yaml("bad"));
    proxy.signal(Signal::SIGHUP);
    proxy.logged("new configuration rejected; the running one stays in effect").await;
    let address = proxy.forward_proxy().await;
    let response = client::get(address, "x", &format!("http://{ALIAS}/")).await;
    refused(&response);
}

#[tokio::test]
async fn an_open_proxy_beyond_loopback_is_warned_of_once_and_one_with_credentials_is_not() {
    const WARNING: &str = "the forward proxy is open to other machines without credentials";
    let scene = Scene::new(1).await;
    let yaml = |proxy: &str| {
        let scene = scene.yaml("");
        format!(
            "{scene}\nallow_non_loopback: true\nadmin: {{listen: \"127.0.0.1:0\"}}\nproxy: {{{proxy}}}\n"
        )
    };
    let open = "listen: \"0.0.0.0:0\"";
    let closed = "listen: \"0.0.0.0:0\", credentials: $FOLDER/credentials";
    let warnings = |proxy: &Proxy| proxy.log().matches(WARNING).count();
    for (keys, expected) in [(open, 1), (closed, 0), ("listen: \"127.0.0.1:0\"", 0)] {
        let setup = Setup::new(&yaml(keys)).file("credentials", "ann:one\n");
        let proxy = setup.start().await;
        assert_eq!(warnings(&proxy), expected, "{keys}");
        // A reload that changes something else says it no second time.
        proxy.rewrite(&(yaml(keys) + "shutdown_grace: 1s\n"));
        proxy.signal(Signal::SIGHUP);
        proxy.logged("configuration reloaded").await;
        assert_eq!(warnings(&proxy), expected, "{keys}");
    }
    let proxy = Setup::new(&yaml(closed)).file("credentials", "ann:one\n").start().await;
    proxy.rewrite(&yaml(open));
    proxy.signal(Signal::SIGHUP);
    let line = proxy.logged(WARNING).await;
    assert!(line.contains("proxy.credentials") && line.contains("\"warn\""), "{line}");
}
