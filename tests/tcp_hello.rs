//! `protocol: tcp` with `tls_in: auto`: the first bytes of a client, which may or may not begin a ClientHello.

use std::{io, sync::Arc, time::Duration};

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use tokio::{net::TcpStream, sync::mpsc, time::sleep};

use crate::support::{
    client,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene},
    scripts,
    through::Through,
    within,
};

/// Longer than a client that sends nothing is waited for.
const SILENCE: Duration = Duration::from_millis(400);

/// TLS refuses it with an alert.
const CLIENT_HELLO: [u8; 10] = [0x16, 3, 1, 0, 5, 1, 0, 0, 1, 0];
const ALERT: u8 = 0x15;

#[tokio::test]
async fn what_may_begin_a_client_hello_and_stays_incomplete_is_passed_on() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::echo);
    let yaml = scene.yaml("protocol: tcp");
    let proxy = Proxy::start(&format!("listener: {{header_timeout: 1s}}\n{yaml}")).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    peer.send([0x16]).await;
    assert_eq!(peer.exactly(1).await, [0x16]);
}

#[tokio::test]
async fn a_client_hello_may_come_in_pieces_though_the_server_speaks_first() {
    let through = Through::new("protocol: tcp", |arrival: Arrival| async move {
        let Some(mut conversation) = arrival.open().await else { return };
        conversation.peer.send("hello\r\n").await;
        conversation.peer.hold().await;
    })
    .await;
    for cut in 1..CLIENT_HELLO.len() {
        let mut peer = through.connect().await;
        peer.send(&CLIENT_HELLO[..cut]).await;
        sleep(SILENCE).await;
        peer.send(&CLIENT_HELLO[cut..]).await;
        assert_eq!(peer.exactly(1).await, [ALERT], "{cut}");
    }
}

#[tokio::test]
async fn a_client_that_is_reset_before_it_has_sent_anything_has_not_ended_for_the_server() {
    let mut scene = Scene::new(1).await;
    let (ended, mut ends) = mpsc::unbounded_channel();
    let script = move |arrival: Arrival| {
        let ended = ended.clone();
        async move {
            let mut conversation = arrival.open().await.unwrap();
            ended.send(conversation.peer.rest().await).unwrap();
        }
    };
    let origin = RawOrigin::start(scene.take_listeners().remove(0), None, script);
    let proxy = Proxy::start(&scene.yaml("protocol: tcp\ntls: {mode: plaintext}")).await;
    let peer = client::connect(proxy.address(ALIAS).await).await;
    origin.until(|seen| seen.connections == 1).await;
    peer.reset();
    let end = within("the target's end", ends.recv()).await.unwrap();
    assert_eq!(end.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

/// It has connected to an address, or has no name for what it connects to.
#[tokio::test]
async fn a_client_without_sni_is_served_with_tls_whichever_side_speaks_first() {
    for keys in ["tls_in: true", ""] {
        let through =
            Through::new(&format!("protocol: tcp\n{keys}"), |arrival: Arrival| async move {
                let Some(mut conversation) = arrival.open().await else { return };
                conversation.peer.send("hello\r\n").await;
                let quit = conversation.peer.exactly(6).await;
                conversation.peer.send(quit).await;
                conversation.peer.hold().await;
            })
            .await;
        let mut roots = RootCertStore::empty();
        let file = through.proxy.folder().join("state/truename/ca.pem");
        for root in CertificateDer::pem_file_iter(file).unwrap() {
            roots.add(root.unwrap()).unwrap();
        }
        let roots = Arc::new(roots);
        for client_first in [true, false] {
            let tcp = TcpStream::connect(through.address).await.unwrap();
            let ip = through.address.ip().to_string();
            let mut peer = client::handshake(tcp, &ip, roots.clone(), &[]).await.unwrap();
            if client_first {
                peer.send("quit\r\n").await;
            }
            assert_eq!(peer.exactly(7).await, b"hello\r\n", "{keys}");
            if !client_first {
                peer.send("quit\r\n").await;
            }
            assert_eq!(peer.exactly(6).await, b"quit\r\n", "{keys}");
        }
    }
}
