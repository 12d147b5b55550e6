//! `protocol: postgres`: how sessions end, with a stand-in for the server.

use nix::sys::signal::Signal;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use truename::demo::dns;

use crate::support::{
    client,
    peer::Peer,
    postgres::{
        Server, TERMINATE, ThroughPostgres, cancel, error, log_in, message, query, startup,
        until_ready,
    },
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, ALIAS_IN_DNS, Scene},
    trust, within,
};

/// Two servers of two names, and a proxy whose alias leads to the first.
struct Moving {
    scene: Scene,
    proxy: Proxy,
    servers: [Server; 2],
    _origins: Vec<RawOrigin>,
}

impl Moving {
    async fn new(keys: &str) -> Self {
        let mut scene = Scene::new(2).await;
        let names = ["one.example", "two.example"];
        for (name, ip) in names.into_iter().zip(&scene.addresses) {
            scene.dns.zone([dns::address(name, 60, *ip)]);
        }
        scene.dns.zone([dns::cname(ALIAS_IN_DNS, 0, names[0])]);
        let servers = [Server::new(), Server::new()];
        let listeners = scene.take_listeners().into_iter();
        let origins = listeners.zip(names).zip(&servers).map(|((listener, name), server)| {
            let (tls, server) = (trust::server_with_alpn(&[name], &[]), server.clone());
            RawOrigin::start(listener, Some(tls), move |arrival| server.clone().serve(arrival))
        });
        let origins = origins.collect();
        let proxy =
            Proxy::start(&scene.restless_yaml(&format!("protocol: postgres\n{keys}"))).await;
        Self { scene, proxy, servers, _origins: origins }
    }

    async fn connect(&self) -> Peer {
        client::connect(self.proxy.address(ALIAS).await).await
    }

    async fn session(&self) -> (Peer, Vec<u8>) {
        let mut peer = self.connect().await;
        let key = log_in(&mut peer).await;
        (peer, key)
    }

    /// A session that has had a query.
    async fn used_session(&self) -> (Peer, Vec<u8>) {
        let (mut peer, key) = self.session().await;
        peer.send(query("select 1")).await;
        until_ready(&mut peer).await;
        (peer, key)
    }

    /// Has the alias lead to the second server, and waits until it does.
    async fn moves(&self) {
        self.scene.dns.zone([dns::cname(ALIAS_IN_DNS, 0, "two.example")]);
        within("the second server to have a session", async {
            while self.servers[1].startups().is_empty() {
                let mut peer = self.connect().await;
                peer.send(startup(0)).await;
                // With `on_change: close`, a session that begins at that moment gets an error.
                until_ready(&mut peer).await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn a_session_that_rests_is_told_that_the_alias_leads_elsewhere() {
    let moving = Moving::new("").await;
    let (mut used, _) = moving.used_session().await;
    let (mut unused, _) = moving.session().await;
    moving.moves().await;
    for peer in [&mut used, &mut unused] {
        let told = error(peer).await;
        assert_eq!(told[&'C'], "57P01", "{told:?}");
        assert!(told[&'M'].contains("leads to another server"), "{told:?}");
    }
    within("both sessions to be ended at the server", async {
        while moving.servers[0].terminated() < 2 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    moving.proxy.logged("\"end\":\"moved\"").await;
}

#[tokio::test]
async fn a_transaction_is_finished_before_its_session_is_drained() {
    let moving = Moving::new("").await;
    let (mut peer, _) = moving.session().await;
    peer.send(query("begin")).await;
    until_ready(&mut peer).await;
    moving.moves().await;
    for _ in 0..3 {
        peer.send(query("insert")).await;
        assert_eq!(until_ready(&mut peer).await[0].0, b'C');
    }
    peer.send(query("commit")).await;
    assert_eq!(until_ready(&mut peer).await[0], (b'C', b"commit\0".to_vec()));
    assert_eq!(error(&mut peer).await[&'C'], "57P01");
}

/// As pgbench does: it never rests.
#[tokio::test]
async fn a_session_that_does_not_rest_is_told_in_response_to_a_query_that_the_server_does_not_get()
{
    let moving = Moving::new("").await;
    let (mut peer, _) = moving.used_session().await;
    let asks = async {
        loop {
            peer.send(query("select 1")).await;
            let messages = until_ready(&mut peer).await;
            if messages[0].0 == b'E' {
                return messages;
            }
        }
    };
    let (told, ()) = tokio::join!(asks, moving.moves());
    let fields = crate::support::postgres::fields(&told[0].1);
    assert_eq!((&fields[&'C'], told.len()), (&"57P01".to_owned(), 1));
}

#[tokio::test]
async fn on_change_closes_at_once_or_keeps() {
    let moving = Moving::new("on_change: close").await;
    let (mut peer, _) = moving.session().await;
    peer.send(query("sleep")).await;
    moving.moves().await;
    assert_eq!(error(&mut peer).await[&'C'], "57P01", "between two messages of the server");

    let moving = Moving::new("on_change: keep").await;
    let (mut peer, _) = moving.used_session().await;
    moving.moves().await;
    peer.send(query("select 1")).await;
    assert_eq!(until_ready(&mut peer).await[0].0, b'C');
}

#[tokio::test]
async fn a_cancel_request_goes_to_the_former_server_while_its_session_goes_on() {
    for on_change in ["on_change: keep", "on_change: drain"] {
        let moving = Moving::new(on_change).await;
        let (mut peer, key) = moving.session().await;
        peer.send(query("sleep")).await;
        moving.moves().await;
        let mut asks = moving.connect().await;
        asks.send(cancel(&key)).await;
        assert_eq!(asks.rest().await.unwrap(), b"");
        assert_eq!(until_ready(&mut peer).await[0].0, b'E');
        assert_eq!(moving.servers[0].cancels(), [key]);
        assert!(moving.servers[1].cancels().is_empty());
    }
}

/// A session of before a reload is at a connection that was made as the alias was configured then.
#[tokio::test]
async fn a_session_is_cancelled_as_it_was_begun_when_a_reload_has_changed_how_sessions_begin() {
    let moving = Moving::new("").await;
    let (mut peer, key) = moving.session().await;
    peer.send(query("sleep")).await;
    for keys in ["postgres: {negotiation: direct}", "tls: {mode: plaintext}"] {
        let yaml = moving.scene.restless_yaml(&format!("protocol: postgres\n{keys}"));
        moving.proxy.rewrite(&yaml);
        moving.proxy.reload().await;
    }
    let mut asks = moving.connect().await;
    asks.send(cancel(&key)).await;
    assert_eq!(asks.rest().await.unwrap(), b"");
    assert_eq!(until_ready(&mut peer).await[0].0, b'E');
    assert_eq!(moving.servers[0].cancels(), [key]);
}

#[tokio::test]
async fn a_session_that_a_reload_meets_before_its_startup_begins_as_is_configured_now() {
    let moving = Moving::new("tls: {mode: plaintext}").await;
    let mut peer = moving.connect().await;
    let packet = startup(0);
    peer.send(&packet[..5]).await;
    // It is being served once another one is, which came later.
    let mut other = moving.connect().await;
    other.send([0, 0, 0, 3]).await;
    error(&mut other).await;
    let yaml = moving.scene.restless_yaml("protocol: postgres");
    moving.proxy.rewrite(&yaml);
    moving.proxy.reload().await;
    peer.send(&packet[5..]).await;
    assert_eq!(until_ready(&mut peer).await.last().unwrap().0, b'Z');
}

#[tokio::test]
async fn a_proxy_that_is_to_end_ends_sessions_between_their_transactions() {
    let (through, server) = ThroughPostgres::serving("").await;
    let (mut resting, _) = through.session().await;
    let (mut busy, _) = through.session().await;
    busy.send(query("begin")).await;
    until_ready(&mut busy).await;
    through.proxy.signal(Signal::SIGTERM);
    let told = error(&mut resting).await;
    assert_eq!(told[&'C'], "57P01");
    assert!(told[&'M'].contains("shutting down"), "{told:?}");
    // A client's last calls come after the signal.
    let (mut late, _) = through.session().await;
    late.send(query("select 1")).await;
    assert_eq!(until_ready(&mut late).await[0].0, b'C');
    busy.send(query("commit")).await;
    assert_eq!(until_ready(&mut busy).await[0].0, b'C');
    assert_eq!(error(&mut busy).await[&'C'], "57P01");
    assert_eq!(error(&mut late).await[&'C'], "57P01");
    assert!(through.proxy.exit().await.success());
    assert_eq!((server.terminated(), server.sessions()), (3, 0));
}

#[tokio::test]
async fn a_server_that_breaks_off_is_no_end_for_the_client() {
    let through = ThroughPostgres::new("", |mut arrival: Arrival| async move {
        let mut request = [0; 8];
        arrival.tcp().read_exact(&mut request).await.unwrap();
        arrival.tcp().write_all(b"S").await.unwrap();
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.exactly(startup(0).len()).await;
        let welcome = [message(b'R', [0; 4]), message(b'Z', "I")].concat();
        conversation.peer.send(welcome).await;
        conversation.peer.exactly(query("select 1").len()).await;
        conversation.peer.send(&message(b'D', "half of it")[..9]).await;
        conversation.peer.finish_tcp();
        conversation.peer.hold().await;
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(startup(0)).await;
    until_ready(&mut peer).await;
    peer.send(query("select 1")).await;
    assert_eq!(peer.exactly(9).await, message(b'D', "half of it")[..9]);
    assert!(peer.rest().await.is_err());
    through.proxy.logged("\"end\":\"target\"").await;
}

#[tokio::test]
async fn what_is_no_message_ends_the_session() {
    let (through, server) = ThroughPostgres::serving("").await;
    let (mut peer, _) = through.session().await;
    peer.send([b'Q', 0, 0, 0, 3]).await;
    let told = error(&mut peer).await;
    assert_eq!(told[&'C'], "08P01", "{told:?}");
    through.origin.until(|seen| seen.ended == 1).await;
    assert_eq!(server.sessions(), 0);
}

/// A server that begins a session, and then does as `script` says.
async fn scripted<Script, Run>(script: Script) -> (ThroughPostgres, Peer)
where
    Script: Fn(Peer) -> Run + Clone + Send + Sync + 'static,
    Run: Future<Output = ()> + Send + 'static,
{
    let through = ThroughPostgres::new("", move |mut arrival: Arrival| {
        let script = script.clone();
        async move {
            let mut request = [0; 8];
            arrival.tcp().read_exact(&mut request).await.unwrap();
            arrival.tcp().write_all(b"S").await.unwrap();
            let mut peer = arrival.open().await.unwrap().peer;
            peer.exactly(startup(0).len()).await;
            peer.send([message(b'R', [0; 4]), message(b'Z', "I")].concat()).await;
            script(peer).await;
        }
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(startup(0)).await;
    until_ready(&mut peer).await;
    (through, peer)
}

/// Regression: a client that reads rows as they come took the ErrorResponse for the rest of a value.
#[tokio::test]
async fn a_client_with_half_a_message_is_reset_when_junk_follows_the_other_half() {
    let row = message(b'D', [0; 40]);
    let (half, rest) = (row[..20].to_vec(), [&row[20..], &[b'Z', 0, 0, 0, 3]].concat());
    let sent = half.clone();
    let (_through, mut peer) = scripted(move |mut peer| {
        let (half, rest) = (sent.clone(), rest.clone());
        async move {
            peer.send(half).await;
            peer.exactly(5).await;
            peer.send(rest).await;
            peer.hold().await;
        }
    })
    .await;
    assert_eq!(peer.exactly(half.len()).await, half);
    peer.send(message(b'S', "")).await;
    assert!(peer.rest().await.is_err(), "a reset, and nothing before it");
}

/// Regression: the server took the Terminate for the rest of the message.
#[tokio::test]
async fn a_server_with_half_a_message_is_reset_when_junk_follows_the_other_half() {
    let copied = message(b'd', [b'a'; 20]);
    let (half, rest) = (copied[..20].to_vec(), [&copied[20..], &[b'd', 0, 0, 0, 3]].concat());
    let (tells, mut told) = tokio::sync::mpsc::unbounded_channel();
    let (_through, mut peer) = scripted(move |mut peer| {
        let tells = tells.clone();
        async move {
            peer.exactly(20).await;
            peer.send(message(b'N', "\0")).await;
            tells.send(peer.rest().await.ok()).unwrap();
        }
    })
    .await;
    peer.send(half).await;
    peer.exactly(6).await;
    peer.send(rest).await;
    assert_eq!(error(&mut peer).await[&'C'], "08P01");
    let ended = within("the server's connection to end", told.recv()).await.unwrap();
    assert_eq!(ended, None, "a reset, and nothing before it");
}

#[tokio::test]
async fn what_a_client_waits_for_is_cancelled_when_it_disconnects_if_so_configured() {
    for (keys, cancels) in [("postgres: {cancel_on_disconnect: true}", true), ("", false)] {
        let (through, server) = ThroughPostgres::serving(keys).await;
        for resets in [false, true] {
            let (mut peer, key) = through.session().await;
            peer.send(query("sleep")).await;
            // The server has it once it has another session's, which came later.
            through.session().await.0.send(TERMINATE).await;
            if resets {
                peer.reset();
            } else {
                drop(peer);
            }
            if cancels {
                within("the query to be cancelled", async {
                    while !server.cancels().contains(&key) {
                        tokio::task::yield_now().await;
                    }
                })
                .await;
            }
            within("the sessions to end", async {
                while server.sessions() > 0 {
                    tokio::task::yield_now().await;
                }
            })
            .await;
        }
        assert_eq!(server.cancels().len(), if cancels { 2 } else { 0 });
    }
}

/// Two servers of one name that show these roles, and a proxy for sessions with `role`.
async fn roles(
    role: &str,
    shown: [Option<&'static str>; 2],
) -> (Scene, Proxy, [Server; 2], Vec<RawOrigin>) {
    let mut scene = Scene::new(2).await;
    let servers = shown.map(|shown| {
        let server = Server::new();
        *server.in_hot_standby.lock() = shown;
        server
    });
    let tls = trust::server_with_alpn(&[crate::support::scene::TRUE_NAME], &[]);
    let origins = scene.take_listeners().into_iter().zip(&servers).map(|(listener, server)| {
        let server = server.clone();
        let script = move |arrival| server.clone().serve(arrival);
        RawOrigin::start(listener, Some(tls.clone()), script)
    });
    let origins = origins.collect();
    let keys = format!("protocol: postgres\npostgres: {{role: {role}}}");
    let proxy = Proxy::start(&scene.yaml(&keys)).await;
    (scene, proxy, servers, origins)
}

/// The SQLSTATE that a client gets instead of a session, if it does.
async fn refused(proxy: &Proxy) -> Option<String> {
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    peer.send(startup(0)).await;
    let (tag, body) = until_ready(&mut peer).await.remove(0);
    (tag == b'E').then(|| crate::support::postgres::fields(&body)[&'C'].clone())
}

#[tokio::test]
async fn a_session_goes_only_to_a_server_of_the_role_and_the_next_attempt_finds_it() {
    for (role, wanted) in [("primary", 0), ("standby", 1)] {
        let (_scene, proxy, servers, _origins) = roles(role, [Some("off"), Some("on")]).await;
        let mut refusals = 0;
        for _ in 0..6 {
            match refused(&proxy).await {
                Some(code) => {
                    assert_eq!(code, "57P03");
                    refusals += 1;
                }
                None => assert!(!servers[wanted].startups().is_empty()),
            }
        }
        assert!(refusals <= 1, "{refusals}");
        assert_eq!(servers[wanted].startups().len(), 6 - refusals);
        // The server that let nobody in was left in order.
        within("a Terminate", async {
            while servers[1 - wanted].terminated() < refusals {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
}

#[tokio::test]
async fn a_promoted_server_is_found_by_the_second_attempt() {
    let (_scene, proxy, servers, _origins) = roles("primary", [Some("off"), Some("on")]).await;
    for _ in 0..2 {
        refused(&proxy).await;
    }
    assert_eq!(refused(&proxy).await, None);
    for (server, shown) in servers.iter().zip(["on", "off"]) {
        *server.in_hot_standby.lock() = Some(shown);
    }
    assert_eq!(refused(&proxy).await.as_deref(), Some("57P03"), "the former primary");
    for _ in 0..3 {
        assert_eq!(refused(&proxy).await, None);
    }
}

#[tokio::test]
async fn a_server_that_shows_no_role_serves_only_those_to_whom_it_is_all_the_same() {
    let (_scene, proxy, _servers, _origins) = roles("any", [None, None]).await;
    assert_eq!(refused(&proxy).await, None);
    let (_scene, proxy, _servers, _origins) = roles("primary", [None, None]).await;
    assert_eq!(refused(&proxy).await.as_deref(), Some("57P03"));
}
