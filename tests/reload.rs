//! A configuration that changes under a running proxy.

use std::{fs, io::Write as _, net::SocketAddr, os::unix::fs::symlink, thread};

use crate::support::{
    client, loopback,
    message::Message,
    peer::Peer,
    proxy::{Proxy, Setup},
    raw_origin::RawOrigin,
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts,
    service_origin::ServiceOrigin,
    trust, within,
};
use nix::sys::signal::Signal;
use tokio::net::TcpStream;
use truename::demo::dns::{self, RecordType};

#[tokio::test]
async fn a_hangup_puts_the_file_to_work() {
    let (scene, _origins, proxy) = running().await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(client::get(address, "new.example", "/").await.status(), 404);

    proxy.rewrite(&yaml(&scene, "hosts: [new.example]"));
    proxy.signal(Signal::SIGHUP);
    proxy.logged("configuration reloaded").await;
    assert_eq!(client::get(address, "new.example", "/").await.text(), "ok");
}

#[tokio::test]
async fn a_file_that_is_written_over_is_put_to_work_once() {
    let (scene, _origins, proxy) = running().await;
    let address = proxy.address(ALIAS).await;

    proxy.rewrite(&yaml(&scene, "hosts: [new.example]"));
    until_served(address, "new.example").await;
    // The next change comes after the next look at the file, which must not have found the first
    // one again.
    proxy.rewrite(&yaml(&scene, "hosts: [newer.example]"));
    until_served(address, "newer.example").await;
    reloaded(&proxy, 2.0).await;
    assert_eq!(client::get(address, "new.example", "/").await.status(), 404);
}

/// Regression: what the file said once the proxy ran was taken for what it runs by.
#[tokio::test]
async fn a_change_that_comes_while_the_proxy_starts_is_noticed() {
    let scene = Scene::new(1).await;
    let tls = "tls: {ca: {webpki: false, files: [\"$FOLDER/root.pem\"]}}";
    // The start stands still where it reads the system's roots, long after the configuration.
    let setup = Setup::new(&scene.yaml(tls))
        .variable("SSL_CERT_FILE", "slow.pem")
        .shell("mkfifo slow.pem; ");
    let proxy = setup.spawn();
    let slow = proxy.folder().join("slow.pem");
    let root = trust::authority().root_pem();
    let in_start = slow.clone();
    let pipe = tokio::task::spawn_blocking(move || {
        while !in_start.exists() {
            thread::yield_now();
        }
        // Until there is a reader.
        fs::OpenOptions::new().write(true).open(in_start).unwrap()
    });
    let mut pipe = within("the proxy to start", pipe).await.unwrap();
    fs::write(proxy.folder().join("root.copy"), root).unwrap();
    fs::rename(proxy.folder().join("root.copy"), slow).unwrap();
    proxy.rewrite(&yaml(&scene, "hosts: [new.example]"));
    pipe.write_all(root.as_bytes()).unwrap();
    drop(pipe);
    proxy.logged("configuration reloaded").await;
}

#[tokio::test]
async fn every_swap_of_a_config_map_is_noticed() {
    let (scene, _origins, proxy) = running().await;
    let address = proxy.address(ALIAS).await;
    let folder = proxy.folder();
    // As the kubelet does it: truename.yaml -> ..data/truename.yaml, ..data -> ..VERSION, and a
    // new version comes with one rename of `..data`.
    let publish = |version: usize, hosts: &str| {
        let name = format!("..version_{version}");
        fs::create_dir(folder.join(&name)).unwrap();
        let text = yaml(&scene, hosts).replace("$FOLDER", folder.to_str().unwrap());
        let text = format!("{text}\nadmin: {{listen: \"127.0.0.1:0\"}}\n");
        fs::write(folder.join(&name).join("truename.yaml"), text).unwrap();
        symlink(&name, folder.join("..data_tmp")).unwrap();
        fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
        if version > 1 {
            fs::remove_dir_all(folder.join(format!("..version_{}", version - 1))).unwrap();
        }
    };
    publish(1, "");
    symlink("..data/truename.yaml", folder.join("link")).unwrap();
    fs::rename(folder.join("link"), folder.join("truename.yaml")).unwrap();

    for version in 2..=4 {
        let host = format!("v{version}.example");
        publish(version, &format!("hosts: [{host}]"));
        until_served(address, &host).await;
    }
}

#[tokio::test]
async fn a_file_with_problems_is_refused_and_the_running_configuration_stays() {
    let (scene, _origins, proxy) = running().await;
    let address = proxy.address(ALIAS).await;

    proxy.rewrite(&yaml(&scene, "hosts: [new.example]\nlisen: []"));
    let line = proxy.logged("new configuration rejected; the running one stays in effect").await;
    assert!(line.contains("did you mean `listen`?"), "{line}");
    assert_eq!(client::get(address, ALIAS, "/").await.text(), "ok");
    assert_eq!(client::get(address, "new.example", "/").await.status(), 404);
    assert_eq!(reloads(&proxy, "error").await, 1.0);

    proxy.rewrite(&yaml(&scene, "hosts: [new.example]"));
    until_served(address, "new.example").await;
    reloaded(&proxy, 1.0).await;
}

#[tokio::test]
async fn a_new_file_that_cannot_be_read_is_refused_once_for_each_reason() {
    let (scene, _origins, proxy) = running().await;
    let address = proxy.address(ALIAS).await;
    let path = proxy.folder().join("truename.yaml");
    let large = yaml(&scene, "hosts: [new.example]") + &"# much\n".repeat(600_000);
    proxy.rewrite(&large);
    proxy.logged("it is larger than 4MiB").await;
    fs::write(&path, b"version: 1 # \xff\n").unwrap();
    proxy.logged("it is not UTF-8").await;
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    proxy.logged("it is a directory").await;
    fs::remove_dir(&path).unwrap();
    // Nobody waits for its writer.
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    proxy.logged("it is a pipe").await;
    assert_eq!(client::get(address, ALIAS, "/").await.text(), "ok");
    assert_eq!(reloads(&proxy, "error").await, 4.0);
    assert_eq!(post(&proxy, "/reload").await.status(), 422);

    fs::remove_file(&path).unwrap();
    proxy.rewrite(&yaml(&scene, "hosts: [new.example]"));
    until_served(address, "new.example").await;
    reloaded(&proxy, 1.0).await;
    assert_eq!(reloads(&proxy, "error").await, 5.0);
}

#[tokio::test]
async fn what_cannot_be_loaded_at_a_reload_is_named_with_its_place_in_the_file() {
    let (scene, _origins, proxy) = running().await;
    fs::write(proxy.folder().join("garbage"), "garbage").unwrap();
    proxy.rewrite(&yaml(&scene, "tls: {crls: [\"$FOLDER/garbage\"]}"));
    let line = proxy.logged("the running one stays").await;
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    let error = line["error"].as_str().unwrap();
    let place = error.split_once("truename.yaml:").expect(error).1;
    let (row, column) = (place.split(':').next(), place.split(':').nth(1));
    assert!([row, column].iter().all(|n| n.unwrap().parse::<usize>().is_ok()), "{error}");
    assert!(error.contains(".tls.crls[0]: "), "{error}");
}

/// A ConfigMap and a Secret that belong together come one after the other.
#[tokio::test]
async fn a_configuration_is_tried_again_once_the_files_that_it_names_are_there() {
    let (scene, _origins, proxy) = running().await;
    let address = proxy.address(ALIAS).await;
    let root = proxy.folder().join("late.pem");
    let tls = "tls: {ca: {webpki: false, files: [\"$FOLDER/root.pem\", \"$FOLDER/late.pem\"]}}";
    proxy.rewrite(&yaml(&scene, &format!("hosts: [new.example]\n{tls}")));
    let line = proxy.logged("new configuration rejected; the running one stays in effect").await;
    assert!(line.contains("late.pem"), "{line}");

    fs::write(&root, "not yet").unwrap();
    proxy.logged("has no `-----BEGIN CERTIFICATE-----`").await;
    assert_eq!(client::get(address, "new.example", "/").await.status(), 404);
    fs::write(&root, trust::authority().root_pem()).unwrap();
    until_served(address, "new.example").await;
    reloaded(&proxy, 1.0).await;
    // Each reason is told once.
    assert_eq!(reloads(&proxy, "error").await, 2.0);
    let refused = "new configuration rejected";
    assert_eq!(proxy.log().matches(refused).count(), 2, "{}", proxy.log());
}

#[tokio::test]
async fn a_file_that_cannot_be_put_to_work_changes_nothing() {
    let (scene, _origins, proxy) = running().await;
    let address = proxy.address(ALIAS).await;
    let taken = loopback::listen_anywhere();
    let taken_address = taken.local_addr().unwrap();

    let listen = format!("hosts: [new.example]\nlisten: [\"127.0.0.1:0\", \"{taken_address}\"]");
    proxy.rewrite(&without_listen(&yaml(&scene, &listen)));
    let response = post(&proxy, "/reload").await;
    assert_eq!(response.status(), 422);
    assert!(response.text().contains(&format!("cannot listen on {taken_address}")), "{response:?}");
    assert_eq!(client::get(address, "new.example", "/").await.status(), 404);
    assert_eq!(client::get(address, ALIAS, "/").await.text(), "ok");
}

#[tokio::test]
async fn an_alias_keeps_its_upstream_connections_unless_its_tls_is_changed() {
    let (scene, origins, proxy) = running().await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    assert_eq!(origins[0].seen().connections, 1);

    let more = "  - name: other\n    listen: [\"127.0.0.1:0\"]\n    target: httpbin.org\n";
    proxy.rewrite(&(yaml(&scene, "") + more));
    proxy.address("other").await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    assert_eq!(origins[0].seen().connections, 1, "the pooled connection was not used again");

    proxy.rewrite(&(yaml(&scene, "hosts: [new.example]") + more));
    until_served(address, "new.example").await;
    assert_eq!(origins[0].seen().connections, 1, "what was changed is not about connections");

    // Another trust is: it may be withheld from that very connection.
    let tls = "tls: {min_version: \"1.3\", ca: {system: false, webpki: false, \
               files: [\"$FOLDER/root.pem\"]}}";
    proxy.rewrite(&(yaml(&scene, &format!("hosts: [newer.example]\n{tls}")) + more));
    until_served(address, "newer.example").await;
    assert_eq!(origins[0].seen().connections, 2);
    origins[0].until(|seen| seen.ended == 1).await;
}

#[tokio::test]
async fn a_response_under_way_survives_the_change_of_its_alias() {
    let mut scene = Scene::new(1).await;
    let listener = scene.take_listeners().remove(0);
    let (_origin, mut streams) = ServiceOrigin::streaming(listener, trust::server(&[TRUE_NAME]));
    let proxy = Proxy::start(&yaml(&scene, "")).await;
    let address = proxy.address(ALIAS).await;
    let mut peer = client::connect(address).await;
    peer.send(format!("GET /stream HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    let stream = within("the stream", streams.recv()).await.unwrap();

    proxy.rewrite(&yaml(&scene, "hosts: [new.example]"));
    until_served(address, "new.example").await;
    assert!(stream.data("whole").await);
    drop(stream);
    assert_eq!(peer.response().await.text(), "whole");
}

#[tokio::test]
async fn a_stricter_policy_closes_idle_connections_to_what_it_denies_now() {
    let (scene, origins, proxy) = running().await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    assert_eq!(origins[0].seen().ended, 0);

    proxy.rewrite(&stricter(&yaml(&scene, "")));
    assert_eq!(post(&proxy, "/reload").await.text(), "reloaded\n");
    origins[0].until(|seen| seen.ended == 1).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 403);
}

#[tokio::test]
async fn a_response_under_way_survives_a_stricter_policy_and_is_the_last_on_its_connection() {
    let mut scene = Scene::new(1).await;
    let listener = scene.take_listeners().remove(0);
    let (_origin, mut streams) = ServiceOrigin::streaming(listener, trust::server(&[TRUE_NAME]));
    let proxy = Proxy::start(&yaml(&scene, "")).await;
    let address = proxy.address(ALIAS).await;
    let mut peer = client::connect(address).await;
    peer.send(format!("GET /stream HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    let stream = within("the stream", streams.recv()).await.unwrap();

    proxy.rewrite(&stricter(&yaml(&scene, "")));
    assert_eq!(post(&proxy, "/reload").await.text(), "reloaded\n");
    assert!(stream.data("whole").await);
    drop(stream);
    assert_eq!(peer.response().await.text(), "whole");
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 403);
    assert_eq!(
        proxy.metric("truename_upstream_connections_idle{alias=\"webscaler-manual\"}").await,
        Some(0.0)
    );
}

#[tokio::test]
async fn a_stricter_policy_ends_tunnels_as_on_change_says() {
    for on_change in ["on_change: close", "drain: 0s"] {
        let mut scene = Scene::new(1).await;
        let _origins = scene.script(scripts::upgrade_and_echo);
        let proxy = Proxy::start(&yaml(&scene, on_change)).await;
        let mut peer = tunnel(&proxy).await;
        proxy.rewrite(&stricter(&yaml(&scene, on_change)));
        assert_eq!(post(&proxy, "/reload").await.text(), "reloaded\n");
        peer.closed().await;
    }
}

#[tokio::test]
async fn a_stricter_policy_also_ends_tunnels_of_aliases_that_are_changed_with_it_or_before_it() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::upgrade_and_echo);
    let before = yaml(&scene, "on_change: close");
    let changed = yaml(&scene, "on_change: close\nhosts: [another]");
    for first in [None, Some(&changed)] {
        let proxy = Proxy::start(&before).await;
        let mut peers = [tunnel(&proxy).await, tunnel(&proxy).await];
        if let Some(first) = first {
            proxy.rewrite(first);
            assert_eq!(post(&proxy, "/reload").await.text(), "reloaded\n");
            for peer in &mut peers {
                peer.send("open").await;
                assert_eq!(peer.exactly(4).await, b"open");
            }
        }
        proxy.rewrite(&stricter(&changed));
        assert_eq!(post(&proxy, "/reload").await.text(), "reloaded\n");
        for peer in &mut peers {
            peer.closed().await;
        }
    }
}

/// Regression: they were cut by a policy that was not in force any more.
#[tokio::test]
async fn a_policy_that_is_taken_back_cuts_nothing() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::upgrade_and_echo);
    let before = yaml(&scene, "drain: 1s");
    let alias = before.split_once(&format!("  - name: {ALIAS}\n")).unwrap().1;
    let other = format!("  - name: other\n{alias}    target: httpbin.org\n");
    let proxy = Proxy::start(&(before.clone() + &other)).await;
    let mut peer = tunnel(&proxy).await;
    let mut witness = tunnel_to(&proxy, "other").await;
    proxy.rewrite(&stricter(&(before.clone() + &other)));
    assert_eq!(post(&proxy, "/reload").await.text(), "reloaded\n");
    proxy.rewrite(&before);
    assert_eq!(post(&proxy, "/reload").await.text(), "reloaded\n");
    // Of an alias that has gone: in as much time, but from later on.
    witness.closed().await;
    peer.send("open").await;
    assert_eq!(peer.exactly(4).await, b"open");
}

#[tokio::test]
async fn an_alias_that_is_removed_is_not_asked_for_while_its_tunnel_goes_on() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::upgrade_and_echo);
    let other = "other.default.svc.cluster.local";
    scene.dns.zone([dns::cname(ALIAS_IN_DNS, 0, TRUE_NAME), dns::cname(other, 0, TRUE_NAME)]);
    let proxy = Proxy::start(&scene.restless_yaml("")).await;
    let mut peer = tunnel(&proxy).await;

    proxy.rewrite(&scene.restless_yaml("").replace(ALIAS, "other"));
    assert_eq!(post(&proxy, "/reload").await.text(), "reloaded\n");
    let asked = |name| {
        let kinds = [RecordType::A, RecordType::AAAA];
        kinds.iter().map(|kind| scene.dns.queries(name, *kind)).sum::<usize>()
    };
    // What was under way is over by then.
    within("a round", scene.dns.wait_for_queries(other, asked(other) + 4)).await;
    let before = asked(ALIAS_IN_DNS);
    within("more rounds", scene.dns.wait_for_queries(other, asked(other) + 8)).await;
    assert_eq!(asked(ALIAS_IN_DNS), before);
    peer.send("open").await;
    assert_eq!(peer.exactly(4).await, b"open");
}

/// Regression: until DNS had responded for the new name, or not in time, requests went on to the other tenant's target.
#[tokio::test]
async fn another_namespace_ends_the_service_of_the_former_one_at_once() {
    let (scene, origins, proxy) = running().await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    scene.dns.respond("webscaler-manual.prod.svc.cluster.local", dns::DnsResponse::Silence);
    let yaml = yaml(&scene, "timeouts: {connect: 100ms}");
    proxy.rewrite(&yaml.replace("namespace: default", "namespace: prod"));
    proxy.reload().await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 504);
    assert_eq!(origins[0].seen().requests.len(), 1);
}

#[tokio::test]
async fn listeners_come_and_go_with_the_file() {
    let (scene, _origins, proxy) = running().await;
    let old = proxy.address(ALIAS).await;
    let new = SocketAddr::new(loopback::address(), old.port());

    let text = without_listen(&yaml(&scene, &format!("listen: [\"{new}\"]")));
    proxy.rewrite(&text);
    assert_eq!(post(&proxy, "/reload").await.text(), "reloaded\n");
    assert_eq!(client::get(new, ALIAS, "/").await.text(), "ok");
    within("the old listener to close", async {
        while TcpStream::connect(old).await.is_ok() {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn whoever_posts_a_reload_hears_what_came_of_it() {
    let (scene, _origins, proxy) = running().await;
    proxy.rewrite(&yaml(&scene, "hosts: [new.example]"));
    let response = post(&proxy, "/reload").await;
    assert_eq!((response.status(), response.text()), (200, "reloaded\n"));
    assert_eq!(client::get(proxy.address(ALIAS).await, "new.example", "/").await.text(), "ok");

    proxy.rewrite(&yaml(&scene, "balance: fastest\nlisen: []"));
    let response = post(&proxy, "/reload").await;
    assert_eq!(response.status(), 422);
    for problem in ["did you mean `listen`?", "`fastest`", "truename.yaml:"] {
        assert!(response.text().contains(problem), "{problem} is not in {}", response.text());
    }
    assert_eq!(reloads(&proxy, "error").await, 1.0);
}

#[tokio::test]
async fn keys_that_need_a_restart_are_named() {
    let (scene, _origins, proxy) = running().await;
    let text = yaml(&scene, "").replace("workers: 1", "workers: 2");
    proxy.rewrite(&(text + "\nlog: {level: debug, access: false}\n"));
    let line = proxy.logged("these settings take effect after a restart").await;
    let line: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(line["keys"], "admin, workers, log.access");
    // The level is not among them: it took effect.
    let address = proxy.address(ALIAS).await;
    client::connect(address).await.send("no HTTP\r\n\r\n").await;
    proxy.logged("\"level\":\"debug\"").await;
}

async fn running() -> (Scene, Vec<RawOrigin>, Proxy) {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::respond);
    let proxy = Proxy::start(&yaml(&scene, "")).await;
    (scene, origins, proxy)
}

/// One worker: two would have a pool each, and so two connections.
fn yaml(scene: &Scene, keys: &str) -> String {
    format!("workers: 1\n{}", scene.yaml(keys))
}

/// The same without leave to dial loopback, where the origins are.
fn stricter(yaml: &str) -> String {
    let stricter = yaml.replace("allow_addresses: [\"127.0.0.0/8\"]", "allow_addresses: []");
    assert_ne!(stricter, yaml);
    stricter
}

/// Takes out the `listen` that every scene has, for one that says its own.
fn without_listen(yaml: &str) -> String {
    yaml.replacen("    listen: [\"127.0.0.1:0\"]\n", "", 1)
}

/// An upgrade that was used once.
async fn tunnel(proxy: &Proxy) -> Peer {
    tunnel_to(proxy, ALIAS).await
}

async fn tunnel_to(proxy: &Proxy, alias: &str) -> Peer {
    let mut peer = client::connect(proxy.address(alias).await).await;
    peer.send(format!(
        "GET / HTTP/1.1\r\nHost: {alias}\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n"
    ))
    .await;
    assert_eq!(peer.response().await.status(), 101);
    peer.send("open").await;
    assert_eq!(peer.exactly(4).await, b"open");
    peer
}

async fn until_served(address: SocketAddr, host: &str) {
    within(&format!("{host} to be served"), async {
        while client::get(address, host, "/").await.status() != 200 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

async fn reloads(proxy: &Proxy, result: &str) -> f64 {
    let series = format!("truename_config_reloads_total{{result=\"{result}\"}}");
    proxy.metric(&series).await.unwrap_or(0.0)
}

/// What a reload brings may be served before the reload is counted.
async fn reloaded(proxy: &Proxy, times: f64) {
    within("the reload to be counted", async { while reloads(proxy, "ok").await != times {} })
        .await;
}

async fn post(proxy: &Proxy, target: &str) -> Message {
    let mut peer = client::connect(proxy.admin().await).await;
    peer.send(format!("POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"))
        .await;
    peer.response_to("POST").await
}
