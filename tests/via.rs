//! `via`: targets that are reached through an HTTP proxy.

use std::net::SocketAddr;

use crate::support::{
    client,
    daemon::Daemon,
    loopback,
    proxy::{Proxy, Setup},
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts, trust,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, copy_bidirectional},
    net::TcpStream,
    sync::{Semaphore, mpsc},
};
use truename::demo::dns::{self, RecordType};

#[tokio::test]
async fn a_target_behind_tinyproxy_is_verified_with_its_true_name() {
    let tinyproxy = Daemon::tinyproxy("Allow 127.0.0.0/8\nBasicAuth ann secretword").await;
    for protocol in ["http", "tcp"] {
        let mut scene = Scene::new(1).await;
        let origin = scene.script(scripts::respond).remove(0);
        let keys = format!(
            "protocol: {protocol}\ntarget: \"{}\"\nvia: {{url: \"http://{}\", credentials: ann}}\n\
             tls: {{server_name: {TRUE_NAME}, ca: {{system: false, webpki: false, files: \
             [\"$FOLDER/root.pem\"]}}}}",
            origin.address, tinyproxy.address
        );
        let setup = Setup::new(&scene.yaml(&keys)).file("ann", "ann:secretword\n");
        let proxy = setup.start().await;
        let response = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
        assert_eq!(response.status(), 200, "{protocol}: {}", response.text());
        assert_eq!(origin.seen().server_names, [Some(TRUE_NAME.to_owned())]);
        let encoded = "YW5uOnNlY3JldHdvcmQ";
        let admin = proxy.admin().await;
        for path in ["/config", "/status", "/metrics"] {
            let shown = client::get(admin, "localhost", path).await;
            let shown = shown.text();
            assert!(!shown.contains("secretword") && !shown.contains(encoded), "{path}: {shown}");
        }
        assert!(!proxy.log().contains("secret") && !proxy.log().contains(encoded));
    }
}

#[tokio::test]
async fn credentials_are_taken_anew_when_their_file_changes() {
    let tinyproxy = Daemon::tinyproxy("Allow 127.0.0.0/8\nBasicAuth ann secret").await;
    let mut scene = Scene::new(1).await;
    let origin = scene.script(scripts::respond).remove(0);
    let target = format!(
        "target: \"{}\"\ntls: {{server_name: {TRUE_NAME}, ca: {{system: false, webpki: false, \
         files: [\"$FOLDER/root.pem\"]}}}}",
        origin.address
    );
    let url = format!("http://{}", tinyproxy.address);
    let keys = format!("{target}\nvia: {{url: \"{url}\", credentials: ann}}");
    let proxy = Setup::new(&scene.yaml(&keys)).file("ann", "ann:wrong\n").start().await;
    let address = proxy.address(ALIAS).await;
    let refused = client::get(address, ALIAS, "/").await;
    assert_eq!(refused.status(), 503);
    assert!(refused.text().contains(&url), "{}", refused.text());
    assert!(refused.text().contains("correct the file of `via.credentials`"), "{}", refused.text());
    std::fs::write(proxy.folder().join("ann"), "ann:secret\n").unwrap();
    proxy.logged("the credentials for the proxy of `via` changed and are now in use").await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
}

#[tokio::test]
async fn the_proxy_is_asked_for_the_true_name_which_needs_no_addresses() {
    let mut scene = Scene::new(1).await;
    let origin = scene.script(scripts::respond).remove(0);
    scene.dns.remove(TRUE_NAME);
    let (proxy, mut asked) = http_proxy(Speech::Tunnel(origin.address));
    let via = format!("via: \"http://{}\"", proxy.address);
    for protocol in ["http", "tcp"] {
        let truename = Proxy::start(&scene.yaml(&format!("protocol: {protocol}\n{via}"))).await;
        let response = client::get(truename.address(ALIAS).await, ALIAS, "/").await;
        assert_eq!(response.status(), 200, "{}", response.text());
        let authority = scene.authority(TRUE_NAME);
        let head = asked.recv().await.unwrap();
        assert_eq!(head, format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n"));
    }
    assert_eq!(origin.seen().server_names, vec![Some(TRUE_NAME.to_owned()); 2]);
}

#[tokio::test]
async fn the_proxys_own_name_is_resolved_by_the_same_dns() {
    let mut scene = Scene::new(1).await;
    let origin = scene.script(scripts::respond).remove(0);
    let (proxy, _asked) = http_proxy(Speech::Tunnel(origin.address));
    scene.dns.zone([dns::address("proxy.corp", 60, proxy.address.ip())]);
    let port = proxy.address.port();
    let via = format!("via: \"http://proxy.corp:{port}\"");
    let truename = Proxy::start(&scene.yaml(&via)).await;
    let address = truename.address(ALIAS).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);

    let via = format!("via: \"http://nowhere.corp:{port}\"");
    let truename = Proxy::start(&scene.yaml(&via)).await;
    let problem = client::get(truename.address(ALIAS).await, ALIAS, "/").await.json();
    assert_eq!((&problem["status"], &problem["stage"]), (&503.into(), &"resolve".into()));
    assert!(problem["detail"].as_str().unwrap().contains("nowhere.corp"), "{problem}");
    assert_eq!(problem["fix"], "correct `via:`");
}

#[tokio::test]
async fn what_the_proxy_says_is_explained_and_ejects_nobody() {
    let scene = Scene::new(1).await;
    for (says, status, fix) in [
        ("HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", 503, "credentials: FILE"),
        ("HTTP/1.1 403 Forbidden\r\n\r\n", 503, "allow CONNECT to this name and port"),
        (
            "HTTP/1.1 502 Bad Gateway\r\nContent-Length: 4\r\n\r\noops",
            503,
            "check that it can resolve",
        ),
        ("HTTP/1.1 504 Gateway Timeout\r\n\r\n", 504, "check that it can resolve this name"),
        ("SSH-2.0-OpenSSH_9.2\r\n", 503, "names an HTTP proxy"),
        ("", 502, "names an HTTP proxy"),
    ] {
        let (proxy, _asked) = http_proxy(Speech::Say(says));
        let via =
            format!("via: \"http://{}\"\nhealth: {{passive: {{failures: 1}}}}", proxy.address);
        let truename = Proxy::start(&scene.yaml(&via)).await;
        let problem = client::get(truename.address(ALIAS).await, ALIAS, "/").await.json();
        let (detail, told) = (problem["detail"].to_string(), problem["fix"].to_string());
        assert_eq!(problem["status"], status, "{says}: {problem}");
        assert!(detail.contains(&format!("the proxy http://{}", proxy.address)), "{detail}");
        assert!(told.contains(fix), "{says}: {told}");
        if let Some((line, _)) =
            says.split_once("\r\n").filter(|(line, _)| line.starts_with("HTTP"))
        {
            assert!(detail.contains(line), "{detail}");
        }
        let ejected = format!("truename_endpoints{{alias=\"{ALIAS}\",state=\"ejected\"}}");
        assert_eq!(truename.metric(&ejected).await, Some(0.0), "{says}");
    }
}

#[tokio::test]
async fn a_proxy_that_does_not_listen_is_named() {
    let mut scene = Scene::new(1).await;
    let dead = scene.take_listeners().remove(0).local_addr().unwrap();
    let truename = Proxy::start(&scene.yaml(&format!("via: \"http://{dead}\""))).await;
    let problem = client::get(truename.address(ALIAS).await, ALIAS, "/").await.json();
    let detail = problem["detail"].to_string();
    assert!(detail.contains(&format!("connecting to the proxy http://{dead}")), "{detail}");
    assert!(problem["fix"].to_string().contains("`via`"), "{problem}");
}

#[tokio::test]
async fn what_comes_along_with_the_proxys_response_is_the_targets() {
    let mut scene = Scene::new(1).await;
    let origin = RawOrigin::start(scene.take_listeners().remove(0), None, scripts::echo);
    for response in [
        "HTTP/1.1 200 Connection established\r\nVia: 1.1 x\r\n\r\n".to_owned(),
        "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </>\r\n\r\nHTTP/1.1 200 OK\r\n\r\n"
            .to_owned(),
        // Regression: where it took more than two looks, it was never found.
        format!("HTTP/1.1 200 OK\r\nVia: {}\r\n\r\n", "x".repeat(15_000)),
    ] {
        let words: &str = Box::leak(format!("{response}hello\r\n").into_boxed_str());
        let (proxy, _asked) = http_proxy(Speech::Words(words, origin.address));
        let keys =
            format!("protocol: tcp\ntls: {{mode: plaintext}}\nvia: \"http://{}\"", proxy.address);
        let truename = Proxy::start(&scene.yaml(&keys)).await;
        let mut peer = client::connect(truename.address(ALIAS).await).await;
        assert_eq!(peer.exactly(7).await, b"hello\r\n", "{response}");
        peer.send("bytes").await;
        assert_eq!(peer.exactly(5).await, b"bytes");
    }
}

#[tokio::test]
async fn the_next_target_is_used_where_the_proxy_cannot_reach_the_first() {
    let mut scene = Scene::new(1).await;
    let tls = trust::server(&["other.example"]);
    let listener = scene.take_listeners().remove(0);
    let origin = RawOrigin::start(listener, Some(tls), scripts::respond);
    let (proxy, _asked) = http_proxy(Speech::Only("other.example", origin.address));
    let keys = format!("failover: [other.example]\nvia: \"http://{}\"", proxy.address);
    let truename = Proxy::start(&scene.yaml(&keys)).await;
    let address = truename.address(ALIAS).await;
    for _ in 0..2 {
        let response = client::get(address, ALIAS, "/").await;
        assert_eq!(response.status(), 200, "{}", response.text());
    }
}

#[tokio::test]
async fn a_server_name_is_not_where_the_target_is() {
    let mut scene = Scene::new(1).await;
    let listener = scene.take_listeners().remove(0);
    let origin = RawOrigin::start(listener, None, scripts::respond);
    let (proxy, mut asked) = http_proxy(Speech::Only("two.example", origin.address));
    let keys = format!(
        "target: one.example\nfailover: [two.example]\nvia: \"http://{}\"\n\
         tls: {{mode: plaintext, server_name: {TRUE_NAME}}}",
        proxy.address
    );
    let truename = Proxy::start(&scene.yaml(&keys)).await;
    let address = truename.address(ALIAS).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    let head = asked.recv().await.unwrap();
    assert!(head.starts_with(&format!("CONNECT two.example:{} ", scene.port)), "{head}");
}

#[tokio::test]
async fn a_certificate_for_another_name_is_refused_behind_a_proxy_too() {
    let mut scene = Scene::new(1).await;
    let listener = scene.take_listeners().remove(0);
    let tls = trust::server(&["proxy.corp"]);
    let origin = RawOrigin::start(listener, Some(tls), scripts::respond);
    let (proxy, _asked) = http_proxy(Speech::Tunnel(origin.address));
    let truename = Proxy::start(&scene.yaml(&format!("via: \"http://{}\"", proxy.address))).await;
    let problem = client::get(truename.address(ALIAS).await, ALIAS, "/").await.json();
    assert_eq!((&problem["status"], &problem["stage"]), (&502.into(), &"tls".into()));
    assert!(origin.seen().requests.is_empty());
}

#[tokio::test]
async fn no_proxy_is_asked_for_an_address_that_the_policy_denies() {
    let scene = Scene::new(1).await;
    let (proxy, mut asked) = http_proxy(Speech::Say(""));
    for target in ["169.254.169.254", "\"[fe80::1]:443\"", "metadata.localhost"] {
        let keys = format!("target: {target}\nvia: \"http://{}\"", proxy.address);
        let yaml = scene.yaml(&keys).replace("127.0.0.0/8", &proxy.address.ip().to_string());
        let truename = Proxy::start(&yaml).await;
        let response = client::get(truename.address(ALIAS).await, ALIAS, "/").await;
        assert_eq!(response.status(), 403, "{target}: {}", response.text());
    }
    assert!(asked.try_recv().is_err());
}

/// Regression: only the addresses of the proxy were looked at again.
#[tokio::test]
async fn a_stricter_policy_ends_what_goes_through_a_proxy_to_an_address_that_it_denies() {
    for protocol in ["http", "tcp"] {
        let mut scene = Scene::new(1).await;
        let target = scene.addresses[0];
        let origin = RawOrigin::start(scene.take_listeners().remove(0), None, scripts::respond);
        let (proxy, _asked) = http_proxy(Speech::Tunnel(origin.address));
        let yaml = scene.yaml(&format!(
            "protocol: {protocol}\ntarget: \"{target}\"\nvia: \"http://{}\"\non_change: close\n\
             tls: {{mode: plaintext}}",
            proxy.address
        ));
        let truename = Proxy::start(&yaml).await;
        let mut peer = client::connect(truename.address(ALIAS).await).await;
        let request = format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n");
        peer.send(&request).await;
        assert_eq!(peer.response().await.status(), 200);

        truename.rewrite(&yaml.replace("127.0.0.0/8", &proxy.address.ip().to_string()));
        truename.reload().await;
        match protocol {
            "http" => {
                peer.send(&request).await;
                assert_eq!(peer.response().await.status(), 403);
            }
            _ => peer.closed().await,
        }
        origin.until(|seen| seen.ended == 1).await;
    }
}

/// Regression: the connection was kept as one to where the alias had come to lead meanwhile.
#[tokio::test]
async fn a_connection_that_a_proxy_opens_slowly_is_kept_for_what_the_proxy_was_asked_for() {
    let mut scene = Scene::new(1).await;
    scene.dns.zone([dns::cname(ALIAS_IN_DNS, 60, "one.example")]);
    let origin = RawOrigin::start(scene.take_listeners().remove(0), None, scripts::respond);
    // As long as the process: it is little.
    let gate: &Semaphore = Box::leak(Box::new(Semaphore::new(0)));
    let (proxy, mut asked) = http_proxy(Speech::Slow(gate, origin.address));
    let keys = format!(
        "via: \"http://{}\"\ntls: {{mode: plaintext, server_name: {TRUE_NAME}}}",
        proxy.address
    );
    let truename = Proxy::start(&scene.restless_yaml(&keys)).await;
    let address = truename.address(ALIAS).await;
    let first = tokio::spawn(client::get(address, ALIAS, "/"));
    assert!(asked.recv().await.unwrap().starts_with("CONNECT one.example:"));

    scene.dns.zone([dns::cname(ALIAS_IN_DNS, 60, "two.example")]);
    let queries = scene.dns.queries(ALIAS_IN_DNS, RecordType::A);
    // The response to the last but one is in use by the time of the last.
    scene.dns.wait_for_queries(ALIAS_IN_DNS, 2 * queries + 6).await;
    gate.add_permits(1);
    assert_eq!(first.await.unwrap().status(), 200);
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    assert!(asked.try_recv().unwrap().starts_with("CONNECT two.example:"));
}

#[tokio::test]
async fn a_proxy_header_is_for_the_target_and_not_for_the_proxy() {
    let mut scene = Scene::new(1).await;
    let origin = RawOrigin::start(scene.take_listeners().remove(0), None, scripts::echo);
    let (proxy, mut asked) = http_proxy(Speech::Tunnel(origin.address));
    let keys = format!(
        "protocol: tcp\ntls: {{mode: plaintext}}\nproxy_protocol: {{send: v1}}\nvia: \"http://{}\"",
        proxy.address
    );
    let truename = Proxy::start(&scene.yaml(&keys)).await;
    let mut peer = client::connect(truename.address(ALIAS).await).await;
    peer.send("x").await;
    let header = format!("PROXY TCP4 127.0.0.1 127.0.0.1 {} ", peer.address().port());
    // The target gives it back.
    assert_eq!(peer.exactly(header.len()).await, header.as_bytes());
    assert!(asked.recv().await.unwrap().starts_with("CONNECT "));
}

/// What a proxy makes of a CONNECT.
#[derive(Clone, Copy)]
enum Speech {
    /// Whatever it is asked for, it leads here.
    Tunnel(SocketAddr),
    /// The same, once it has said this.
    Words(&'static str, SocketAddr),
    /// It leads here if it is asked for this name, and fails for others.
    Only(&'static str, SocketAddr),
    /// It leads here once there is a permit.
    Slow(&'static Semaphore, SocketAddr),
    /// It says this and closes.
    Say(&'static str),
}

/// A proxy, and the heads of the requests that came to it.
fn http_proxy(speech: Speech) -> (RawOrigin, mpsc::UnboundedReceiver<String>) {
    let (note, asked) = mpsc::unbounded_channel();
    let listener = loopback::listen_anywhere();
    let script = move |arrival: Arrival| serve(arrival, speech, note.clone());
    (RawOrigin::start(listener, None, script), asked)
}

async fn serve(mut arrival: Arrival, speech: Speech, note: mpsc::UnboundedSender<String>) {
    let tcp = arrival.tcp();
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        let Ok(byte) = tcp.read_u8().await else { return };
        head.push(byte.into());
    }
    let is_for = |name: &str| head.starts_with(&format!("CONNECT {name}:"));
    let established = "HTTP/1.1 200 Connection established\r\nVia: 1.1 x\r\n\r\n";
    let (to, words) = match speech {
        Speech::Tunnel(to) | Speech::Slow(_, to) => (to, established),
        Speech::Words(words, to) => (to, words),
        Speech::Only(name, to) if is_for(name) => (to, established),
        Speech::Only(..) => return say(tcp, "HTTP/1.1 502 Bad Gateway\r\n\r\n").await,
        Speech::Say(words) => {
            let _ = note.send(head);
            return say(tcp, words).await;
        }
    };
    // Nobody may be interested.
    let _ = note.send(head);
    if let Speech::Slow(gate, _) = speech {
        let _ = gate.acquire().await;
    }
    let mut target = TcpStream::connect(to).await.unwrap();
    say(tcp, words).await;
    let _ = copy_bidirectional(tcp, &mut target).await;
}

async fn say(tcp: &mut TcpStream, words: &str) {
    // Whoever asked may have left.
    let _ = tcp.write_all(words.as_bytes()).await;
}
