//! `protocol: tcp`: what a client does while its target is being connected.

use std::time::Duration;

use serde_json::Value;
use tokio::time::sleep;

use crate::support::{
    client,
    loopback::Blackhole,
    proxy::{Proxy, with_admin},
    raw_origin::Arrival,
    scene::{ALIAS, Scene},
    through::Through,
    within,
};

#[tokio::test]
async fn a_client_that_leaves_ends_the_attempt_and_frees_its_place() {
    let keys = "protocol: tcp\nlimits: {requests: 1}\ntimeouts: {connect: 1h}";
    for (tls_in, is_reset) in [("auto", true), ("auto", false), ("false", true)] {
        let mut scene = Scene::new(1).await;
        let _blackhole = Blackhole::of(scene.take_listeners().remove(0).into_std().unwrap());
        let yaml = scene.yaml(&format!("{keys}\ntls_in: {tls_in}"));
        let proxy = Proxy::start(&with_admin(&yaml)).await;
        let address = proxy.address(ALIAS).await;
        let mut client = client::connect(address).await;
        if is_reset {
            client.send("a request").await;
        }
        active(&proxy, 1.0).await;
        match is_reset {
            true => client.reset(),
            false => drop(client),
        }
        let line = proxy.logged("\"end\":\"client\"").await;
        let line: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(line.get("fields").unwrap_or(&line)["bytes_in"], 0);
        active(&proxy, 0.0).await;

        let _next = client::connect(address).await;
        active(&proxy, 1.0).await;
        let refused = format!(
            "truename_upstream_errors_total{{alias=\"{ALIAS}\",error=\"connection_limit_reached\"}}"
        );
        assert_eq!(proxy.metric(&refused).await, Some(0.0));
    }
}

#[tokio::test]
async fn a_client_that_has_sent_all_it_has_is_connected_and_gets_its_response() {
    let through = Through::new("protocol: tcp", |arrival: Arrival| async move {
        // Meanwhile the client is checked.
        sleep(Duration::from_millis(300)).await;
        let mut conversation = arrival.open().await.unwrap();
        let all = conversation.peer.rest().await.unwrap();
        conversation.peer.send(all).await;
        conversation.peer.finish().await;
    })
    .await;
    let mut peer = through.connect().await;
    peer.send("a request").await;
    peer.finish().await;
    assert_eq!(peer.rest().await.unwrap(), b"a request");
}

/// Waits until so many connections to the alias are open.
async fn active(proxy: &Proxy, count: f64) {
    let series = format!("truename_downstream_connections_active{{alias=\"{ALIAS}\"}}");
    let open = || async { proxy.metric(&series).await == Some(count) };
    within("the connections to be as many", async { while !open().await {} }).await;
}
