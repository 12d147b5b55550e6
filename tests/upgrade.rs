//! WebSocket and whatever else begins with `Upgrade`: agreed to, refused, and carried.

use crate::support::{
    client,
    message::Message,
    peer::Peer,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene, TRUE_NAME},
    scripts,
    through::Through,
    trust,
};

const SWITCH: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\
                      Upgrade: websocket\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

#[tokio::test]
async fn a_websocket_carries_bytes_both_ways() {
    let through = Through::new("", scripts::upgrade_and_echo).await;
    let mut peer = through.connect().await;
    peer.send(websocket("")).await;
    let response = peer.response().await;
    assert_eq!(response.status(), 101);
    assert_eq!(response.field("Upgrade"), Some("websocket"));
    assert!(response.field("Connection").unwrap().eq_ignore_ascii_case("upgrade"));
    assert_eq!(
        (response.field("Content-Length"), response.field("Transfer-Encoding")),
        (None, None)
    );
    for message in [&b"\x81\x05hello"[..], &[0; 100_000], b"bye"] {
        peer.send(message).await;
        assert_eq!(peer.exactly(message.len()).await, message);
    }

    let sent = through.last_request();
    assert_eq!(sent.start_line(), "GET /chat?room=%20 HTTP/1.1");
    assert_eq!(sent.field("Host"), Some(through.true_host().as_str()));
    assert_eq!(sent.field("Upgrade"), Some("websocket"));
    assert_eq!(sent.field("Connection"), Some("Upgrade"));
    assert_eq!(sent.field("Sec-WebSocket-Key"), Some("dGhlIHNhbXBsZSBub25jZQ=="));
    // A server that looks at Origin would refuse that of the alias.
    assert_eq!(sent.field("Origin"), Some(format!("https://{}", through.true_host()).as_str()));
}

#[tokio::test]
async fn bytes_right_behind_either_head_are_not_lost() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.request().await.unwrap();
        conversation.peer.send(format!("{SWITCH}greeting")).await;
        assert_eq!(conversation.peer.exactly(5).await, b"early");
        conversation.peer.send("!").await;
        conversation.peer.hold().await;
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(format!("{}early", websocket(""))).await;
    assert_eq!(peer.response().await.status(), 101);
    assert_eq!(peer.exactly(9).await, b"greeting!");
}

/// Its rest would be taken for the other protocol's first words, by one side or the other.
#[tokio::test]
async fn a_switch_within_a_requests_body_comes_to_nothing() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        conversation.peer.send(SWITCH).await;
        // The two bytes that came, if anything.
        let rest = conversation.peer.rest().await.unwrap_or_default();
        assert!(rest.is_empty() || rest == b"ab", "{rest:?}");
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(format!("{}ab", websocket("Content-Length: 5\r\n"))).await;
    assert_eq!(peer.rest().await.unwrap_or_default(), b"");
    through.origin.until(|seen| seen.ended == 1).await;
}

#[tokio::test]
async fn an_end_in_one_direction_leaves_the_other_open() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.request().await.unwrap();
        conversation.peer.send(SWITCH).await;
        let all = conversation.peer.rest().await.unwrap();
        conversation.peer.send(format!("{} bytes", all.len())).await;
        conversation.peer.finish().await;
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(websocket("")).await;
    assert_eq!(peer.response().await.status(), 101);
    peer.send("hello").await;
    peer.finish().await;
    assert_eq!(peer.rest().await.unwrap(), b"5 bytes");

    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.request().await.unwrap();
        conversation.peer.send(SWITCH).await;
        conversation.peer.finish().await;
        assert_eq!(conversation.peer.rest().await.unwrap(), b"still here");
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(websocket("")).await;
    assert_eq!(peer.response().await.status(), 101);
    assert_eq!(peer.rest().await.unwrap(), b"");
    peer.send("still here").await;
    peer.finish().await;
    through.origin.until(|seen| seen.ended == 1).await;
}

#[tokio::test]
async fn an_upgrade_goes_by_http_1_1_where_the_origin_would_choose_http_2() {
    for keys in ["", "http: {version: \"2\"}"] {
        let mut scene = Scene::new(1).await;
        let tls = trust::server(&[TRUE_NAME]);
        let origin = RawOrigin::start(
            scene.take_listeners().remove(0),
            Some(tls),
            scripts::upgrade_and_echo,
        );
        let proxy = Proxy::start(&scene.yaml(keys)).await;
        let mut peer = crate::support::client::connect(proxy.address(ALIAS).await).await;
        peer.send(websocket("")).await;
        assert_eq!(peer.response().await.status(), 101, "{keys}");
        peer.send("ping").await;
        assert_eq!(peer.exactly(4).await, b"ping");
        assert_eq!(origin.seen().requests.len(), 1);
    }
}

#[tokio::test]
async fn a_refused_upgrade_is_a_response_like_any_other() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        while let Some(request) = conversation.request().await {
            let status = match request.field("X-Want") {
                Some(_) => "426 Upgrade Required\r\nUpgrade: other",
                None => "200 OK",
            };
            let response = format!("HTTP/1.1 {status}\r\nContent-Length: 2\r\n\r\nno");
            conversation.peer.send(response).await;
        }
    })
    .await;
    let mut peer = through.connect().await;
    for (fields, status) in [("X-Want: other\r\n", 426), ("", 200), ("X-Want: x\r\n", 426)] {
        peer.send(websocket(fields)).await;
        let response = peer.response().await;
        assert_eq!((response.status(), response.text()), (status, "no"));
    }
    assert_eq!(through.origin.seen().connections, 1, "the connection serves on");
}

#[tokio::test]
async fn any_protocol_may_be_upgraded_to_but_for_http_2_in_the_clear() {
    let through = Through::new("", scripts::upgrade_and_echo).await;
    let mut peer = through.connect().await;
    peer.send(upgrade("POST /containers/x/attach", "tcp", "")).await;
    let response = peer.response().await;
    assert_eq!((response.status(), response.field("Upgrade")), (101, Some("tcp")));
    peer.send("raw").await;
    assert_eq!(peer.exactly(3).await, b"raw");

    // h2c is between two neighbours; this neighbour declines, and HTTP/1.1 goes on.
    let through = Through::new("", scripts::respond).await;
    let mut peer = through.connect().await;
    let settings = "Connection: HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n";
    peer.send(upgrade("GET /", "h2c", settings)).await;
    assert_eq!(peer.response().await.status(), 200);
    let sent = through.last_request();
    let left = ["Upgrade", "Connection", "HTTP2-Settings"].map(|name| sent.field(name));
    assert_eq!(left, [None; 3]);
}

#[tokio::test]
async fn a_tunnel_ends_when_either_side_crashes() {
    let through = Through::new("", scripts::upgrade_and_echo).await;
    let mut peer = open(&through).await;
    peer.send("ping").await;
    assert_eq!(peer.exactly(4).await, b"ping");
    peer.reset();
    through.origin.until(|seen| seen.ended == 1).await;

    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.request().await.unwrap();
        conversation.peer.send(SWITCH).await;
        conversation.peer.exactly(1).await;
        conversation.peer.reset();
    })
    .await;
    let mut peer = open(&through).await;
    peer.send("x").await;
    peer.closed().await;
}

/// An origin ends without `close_notify`. The client, which reads late and still writes, gets all that was
/// sent, and then no end that looks like one.
#[tokio::test]
async fn what_a_side_sent_before_it_broke_off_arrives_and_then_a_reset() {
    const SENT: usize = 3 * 1024 * 1024;
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.request().await.unwrap();
        conversation.peer.send(SWITCH).await;
        conversation.peer.try_send(vec![b'x'; SENT]).await.unwrap();
        conversation.peer.finish_tcp();
        conversation.peer.hold().await;
    })
    .await;
    let mut peer = open(&through).await;
    for _ in 0..12 {
        let bytes = peer.exactly(SENT / 12).await;
        assert!(bytes.iter().all(|byte| *byte == b'x'));
        peer.try_send(b"more").await.unwrap();
    }
    let error = peer.rest().await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    through.origin.until(|seen| seen.ended == 1).await;
}

/// The same towards the origin.
#[tokio::test]
async fn what_a_client_sent_before_it_was_reset_arrives_at_the_origin() {
    let (go_on, gone_on) = tokio::sync::watch::channel(false);
    let through = Through::new("", move |arrival: Arrival| {
        let mut gone_on = gone_on.clone();
        async move {
            let mut conversation = arrival.open().await.unwrap();
            conversation.request().await.unwrap();
            conversation.peer.send(SWITCH).await;
            gone_on.wait_for(|go_on| *go_on).await.unwrap();
            assert_eq!(conversation.peer.exactly(30_000).await, vec![b'x'; 30_000]);
            // Neither TLS' `close_notify` nor a FIN.
            conversation.peer.rest().await.unwrap_err();
        }
    })
    .await;
    let mut peer = open(&through).await;
    // No more than a receiver takes whatever it does.
    peer.send(vec![b'x'; 30_000]).await;
    let carried = "truename_bytes_total{alias=\"webscaler-manual\",direction=\"in\"}";
    peer.reset();
    crate::support::within("the tunnel's end", async {
        while through.proxy.metric(carried).await != Some(30_000.0) {}
    })
    .await;
    go_on.send_replace(true);
    through.origin.until(|seen| seen.ended == 1).await;
}

async fn open(through: &Through) -> Peer {
    let mut peer = through.connect().await;
    peer.send(websocket("")).await;
    let response: Message = peer.response().await;
    assert_eq!(response.status(), 101);
    peer
}

fn websocket(fields: &str) -> String {
    let own = format!(
        "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
         Origin: http://{ALIAS}\r\n{fields}"
    );
    upgrade("GET /chat?room=%20", "websocket", &own)
}

fn upgrade(start: &str, protocol: &str, fields: &str) -> String {
    format!(
        "{start} HTTP/1.1\r\nHost: {ALIAS}\r\nConnection: keep-alive, Upgrade\r\n\
         Upgrade: {protocol}\r\n{fields}\r\n"
    )
}

#[tokio::test]
async fn a_tunnel_counts_among_the_connections_until_it_ends() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::upgrade_and_echo);
    let proxy = Proxy::start(&(scene.yaml("") + "listener: {max_connections: 1}\n")).await;
    let address = proxy.address(ALIAS).await;
    let mut first = client::connect(address).await;
    first.send(websocket("")).await;
    assert_eq!(first.response().await.status(), 101);
    let mut second = client::connect(address).await;
    second.send(websocket("")).await;
    for _ in 0..10 {
        first.send("hello").await;
        assert_eq!(first.exactly(5).await, b"hello");
    }
    let active = format!("truename_downstream_connections_active{{alias=\"{ALIAS}\"}}");
    assert_eq!(proxy.metric(&active).await, Some(1.0));
    assert!(!second.has_arrived(), "the second was not left to wait");
    drop(first);
    assert_eq!(second.response().await.status(), 101);
}
