//! Connections that the proxy cuts, because their alias leads elsewhere, `policy` denies their endpoint now, or the proxy
//! ends: neither side may take that for the end of the data. In plaintext, where no `close_notify` tells.

use std::io;

use nix::sys::signal::Signal;
use tokio::sync::mpsc;

use crate::support::{
    client,
    proxy::{Proxy, with_admin},
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene},
    within,
};

#[tokio::test]
async fn a_response_without_a_length_that_is_cut_does_not_look_complete() {
    for cut in [Cut::Policy, Cut::Target] {
        let mut scene = Scene::new(1).await;
        let script = |arrival: Arrival| async move {
            let mut conversation = arrival.open().await.unwrap();
            conversation.request().await;
            conversation.peer.send("HTTP/1.1 200 OK\r\n\r\nhalf").await;
            conversation.peer.hold().await;
        };
        let _origin = RawOrigin::start(scene.take_listeners().remove(0), None, script);
        let before = yaml(&scene, "");
        let proxy = Proxy::start(&before).await;
        let mut peer = client::connect(proxy.address(ALIAS).await).await;
        peer.send(format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
        assert!(peer.head().await.unwrap().starts_with("HTTP/1.1 200"));
        assert_eq!(peer.exactly(9).await, b"4\r\nhalf\r\n");
        cut.apply(&proxy, &before).await;
        assert_eq!(peer.rest().await.unwrap_or_default(), b"", "the last chunk");
        let line = proxy.logged("\"status\":200").await;
        assert!(line.contains("\"error\":\"http_response_incomplete\""), "{line}");
    }
}

#[tokio::test]
async fn both_sides_of_a_tcp_connection_that_is_cut_are_reset() {
    both_are_reset("protocol: tcp", "").await;
}

#[tokio::test]
async fn both_sides_of_an_upgrade_that_is_cut_are_reset() {
    let upgrade =
        format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n");
    both_are_reset("", &upgrade).await;
}

/// `begin` is what the client sends before the two talk.
async fn both_are_reset(keys: &str, begin: &str) {
    for cut in [Cut::Policy, Cut::Target, Cut::Grace] {
        let mut scene = Scene::new(1).await;
        let (ended, mut ends) = mpsc::unbounded_channel();
        let is_upgrade = !begin.is_empty();
        let script = move |arrival: Arrival| {
            let ended = ended.clone();
            async move {
                let mut conversation = arrival.open().await.unwrap();
                if is_upgrade {
                    conversation.request().await;
                    let switch = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\
                                  Upgrade: echo\r\n\r\n";
                    conversation.peer.send(switch).await;
                }
                assert_eq!(conversation.peer.exactly(4).await, b"half");
                conversation.peer.send("half").await;
                ended.send(conversation.peer.rest().await).unwrap();
            }
        };
        let _origin = RawOrigin::start(scene.take_listeners().remove(0), None, script);
        let before = yaml(&scene, keys);
        let proxy = Proxy::start(&before).await;
        let mut peer = client::connect(proxy.address(ALIAS).await).await;
        peer.send(begin).await;
        if is_upgrade {
            assert_eq!(peer.response().await.status(), 101);
        }
        peer.send("half").await;
        assert_eq!(peer.exactly(4).await, b"half");
        cut.apply(&proxy, &before).await;
        let client = peer.rest().await;
        let target = within("the target's end", ends.recv()).await.unwrap();
        for end in [client, target] {
            assert_eq!(end.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        }
        if !is_upgrade {
            let end = if matches!(cut, Cut::Grace) { "shutdown" } else { "moved" };
            proxy.logged(&format!("\"end\":\"{end}\"")).await;
        }
    }
}

/// Before its target has said anything, or while its client may be beginning with TLS.
#[tokio::test]
async fn a_tunnel_of_the_forward_proxy_that_is_cut_before_any_data_is_reset() {
    for first in [&b""[..], b"\x16\x03\x01"] {
        let mut scene = Scene::new(1).await;
        let script = |arrival: Arrival| async move {
            arrival.open().await.unwrap().peer.hold().await;
        };
        let origin = RawOrigin::start(scene.take_listeners().remove(0), None, script);
        let yaml = yaml(&scene, "protocol: tcp") + "proxy: {listen: \"127.0.0.1:0\"}\n";
        let proxy = Proxy::start(&yaml).await;
        let mut peer = client::connect(proxy.forward_proxy().await).await;
        peer.send(format!("CONNECT {ALIAS}:1 HTTP/1.1\r\nHost: {ALIAS}:1\r\n\r\n")).await;
        assert_eq!(peer.response_to("CONNECT").await.status(), 200);
        match first.is_empty() {
            true => drop(origin.until(|seen| seen.connections == 1).await),
            false => peer.send(first).await,
        }
        proxy.signal(Signal::SIGTERM);
        let end = peer.rest().await;
        assert_eq!(end.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        proxy.logged("\"end\":\"shutdown\"").await;
    }
}

/// Why a connection is cut.
#[derive(Clone, Copy, Debug)]
enum Cut {
    /// The endpoints are denied: they are on loopback.
    Policy,
    /// The alias leads elsewhere.
    Target,
    /// `shutdown_grace` is over.
    Grace,
}

impl Cut {
    async fn apply(self, proxy: &Proxy, yaml: &str) {
        let yaml = match self {
            Self::Policy => {
                yaml.replace("allow_addresses: [\"127.0.0.0/8\"]", "allow_addresses: []")
            }
            Self::Target => yaml.replace("port:", "target: 192.0.2.1\n    port:"),
            Self::Grace => return proxy.signal(Signal::SIGTERM),
        };
        proxy.rewrite(&yaml);
        proxy.reload().await;
    }
}

fn yaml(scene: &Scene, keys: &str) -> String {
    let yaml = scene.yaml(&format!("tls: {{mode: plaintext}}\non_change: close\n{keys}"));
    with_admin(&format!("shutdown_grace: 100ms\n{yaml}"))
}
