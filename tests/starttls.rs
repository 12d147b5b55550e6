//! `protocol: smtp`, `imap`, `pop3` and `ldap`: STARTTLS with the target, and what clients are told who cannot be served.

use std::{net::SocketAddr, sync::Arc};

use crate::support::{
    client,
    peer::Peer,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene, TRUE_NAME},
    trust, within,
};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// A protocol: what both sides say up to TLS, and what clients are told.
#[derive(Debug)]
struct Speech {
    protocol: &'static str,
    /// What the server hears, and what it responds.
    turns: &'static [(&'static [u8], &'static [u8])],
    /// What the server responds, the last time, where it has no TLS.
    no_tls: &'static [u8],
    /// What the client is greeted with.
    greeting: &'static [u8],
    /// What a client says.
    request: &'static [u8],
    /// How the client is told that TLS is not to be had, that a connection is not to be had, and that there are too many.
    told: [&'static [u8]; 3],
}

const SPEECHES: [Speech; 4] = [
    Speech {
        protocol: "smtp",
        turns: &[
            (b"", b"220-mail.example.com ESMTP\r\n220 at your service\r\n"),
            (b"EHLO [127.0.0.1]\r\n", b"250-mail.example.com\r\n250-STARTTLS\r\n250 SIZE 1000\r\n"),
            (b"STARTTLS\r\n", b"220 go ahead\r\n"),
        ],
        no_tls: b"454 4.7.0 TLS not available\r\n",
        greeting: b"220-mail.example.com ESMTP\r\n220 at your service\r\n",
        request: b"EHLO client.example\r\n",
        told: [b"421-4.7.5 truename: ", b"421-4.4.1 truename: ", b"421-4.3.2 truename: "],
    },
    Speech {
        protocol: "imap",
        turns: &[
            (b"", b"* OK [CAPABILITY IMAP4rev1 STARTTLS LOGINDISABLED] hello\r\n"),
            (b"truename STARTTLS\r\n", b"* OK just a moment\r\ntruename OK begin TLS\r\n"),
        ],
        no_tls: b"truename BAD unknown command\r\n",
        greeting: b"* OK IMAP4 ready\r\n",
        request: b"a LOGIN app secret\r\n",
        told: [
            b"* BYE [UNAVAILABLE] truename: ",
            b"* BYE [UNAVAILABLE] truename: ",
            b"* BYE [LIMIT] truename: ",
        ],
    },
    Speech {
        protocol: "pop3",
        turns: &[
            (b"", b"+OK hello <1896.697170952@mail.example.com>\r\n"),
            (b"STLS\r\n", b"+OK begin TLS\r\n"),
        ],
        no_tls: b"-ERR unknown command\r\n",
        greeting: b"+OK hello <1896.697170952@mail.example.com>\r\n",
        request: b"USER app\r\n",
        told: [
            b"-ERR [SYS/PERM] truename: ",
            b"-ERR [SYS/TEMP] truename: ",
            b"-ERR [SYS/TEMP] truename: ",
        ],
    },
    Speech {
        protocol: "ldap",
        turns: &[(
            b"\x30\x1d\x02\x01\x01\x77\x18\x80\x161.3.6.1.4.1.1466.20037",
            b"\x30\x84\0\0\0\x10\x02\x01\x01\x78\x84\0\0\0\x07\x0a\x01\0\x04\0\x04\0",
        )],
        no_tls: b"\x30\x12\x02\x01\x01\x78\x0d\x0a\x01\x02\x04\0\x04\x06no TLS",
        greeting: b"",
        request: b"\x30\x0c\x02\x01\x05\x60\x07\x02\x01\x03\x04\0\x80\0",
        // A BindResponse with the request's id, its length in two bytes or five; the result is unavailable or busy.
        told: [b"\x02\x01\x05\x61", b"\x02\x01\x05\x61", b"\x02\x01\x05\x61"],
    },
];

/// Says `turns`; whatever else is heard is a failure. Returns whether the connection lasted.
async fn say(tcp: &mut TcpStream, turns: &[(&[u8], &[u8])]) -> bool {
    for (heard, said) in turns {
        let mut bytes = vec![0; heard.len()];
        if tcp.read_exact(&mut bytes).await.is_err() {
            return false;
        }
        assert_eq!(bytes.escape_ascii().to_string(), heard.escape_ascii().to_string());
        tcp.write_all(said).await.unwrap();
    }
    true
}

/// A server with TLS, which gives every byte back.
async fn upgrade_and_echo(mut arrival: Arrival, speech: &Speech) {
    if !say(arrival.tcp(), speech.turns).await {
        return;
    }
    let Some(mut conversation) = arrival.open().await else { return };
    loop {
        let bytes = conversation.peer.some().await;
        if bytes.is_empty() || conversation.peer.try_send(bytes).await.is_err() {
            return conversation.peer.finish().await;
        }
    }
}

/// A server that responds, the last time, with something else, and waits until it is left. What it hears by then must
/// be nothing.
async fn upgrade_with(mut arrival: Arrival, speech: &Speech, last: &[u8]) {
    let (end, turns) = speech.turns.split_last().unwrap();
    say(arrival.tcp(), turns).await;
    say(arrival.tcp(), &[(end.0, last)]).await;
    let mut rest = Vec::new();
    let _ = arrival.tcp().read_to_end(&mut rest).await;
    assert_eq!(rest, b"", "what is not for such a server");
}

/// The proxy, before servers of one protocol.
struct World {
    /// Its DNS must go on.
    _scene: Scene,
    origins: Vec<RawOrigin>,
    proxy: Proxy,
    address: SocketAddr,
}

impl World {
    /// With one server, whose certificate is for the true name. `keys` are further lines of the alias.
    async fn new<Run>(
        speech: &'static Speech,
        keys: &str,
        script: impl Fn(Arrival) -> Run + Send + Sync + 'static,
    ) -> Self
    where
        Run: Future<Output = ()> + Send + 'static,
    {
        Self::called(TRUE_NAME, speech, keys, script).await
    }

    /// The same with a certificate for `name`.
    async fn called<Run>(
        name: &str,
        speech: &'static Speech,
        keys: &str,
        script: impl Fn(Arrival) -> Run + Send + Sync + 'static,
    ) -> Self
    where
        Run: Future<Output = ()> + Send + 'static,
    {
        let mut scene = Scene::new(1).await;
        let tls = trust::server_with_alpn(&[name], &[]);
        let origins = vec![RawOrigin::start(scene.take_listeners().remove(0), Some(tls), script)];
        Self::before(scene, origins, speech, keys).await
    }

    async fn before(
        scene: Scene,
        origins: Vec<RawOrigin>,
        speech: &'static Speech,
        keys: &str,
    ) -> Self {
        let keys = format!("protocol: {}\n{keys}", speech.protocol);
        let proxy = Proxy::start(&scene.yaml(&keys)).await;
        let address = proxy.address(ALIAS).await;
        Self { _scene: scene, origins, proxy, address }
    }

    async fn connect(&self) -> Peer {
        client::connect(self.address).await
    }

    /// Makes TLS with the proxy, which is called by `name`.
    async fn secured(&self, name: &str) -> Peer {
        let file = self.proxy.folder().join("state/truename/ca.pem");
        let mut roots = RootCertStore::empty();
        for root in CertificateDer::pem_file_iter(file).unwrap() {
            roots.add(root.unwrap()).unwrap();
        }
        let tcp = TcpStream::connect(self.address).await.unwrap();
        client::handshake(tcp, name, Arc::new(roots), &[]).await.unwrap()
    }

    async fn errors(&self, error: &str) -> Option<f64> {
        let series =
            format!("truename_upstream_errors_total{{alias=\"{ALIAS}\",error=\"{error}\"}}");
        self.proxy.metric(&series).await
    }
}

/// What a client gets that says its request at once: all, up to an end that is not a reset.
async fn told(mut peer: Peer, speech: &Speech) -> Vec<u8> {
    peer.send(speech.request).await;
    let all = peer.rest().await.unwrap();
    peer.finish().await;
    all
}

/// Asserts that a client was told one of the three things, in words that have `word`.
#[track_caller]
fn assert_told(all: &[u8], speech: &Speech, which: usize, word: &str) {
    let text = all.escape_ascii().to_string();
    let begin = speech.told[which];
    match speech.protocol {
        "ldap" => {
            assert!(all.windows(begin.len()).any(|bytes| bytes == begin), "{text}");
            assert!(text.ends_with("1.3.6.1.4.1.1466.20036"), "no Notice of Disconnection: {text}");
        }
        _ => assert!(all.starts_with(begin) && all.ends_with(b"\r\n"), "{text}"),
    }
    assert!(text.contains(word), "{word}: {text}");
}

#[tokio::test]
async fn starttls_is_made_with_the_server_and_nothing_of_the_clients_comes_before_it() {
    for speech in &SPEECHES {
        let world = World::new(speech, "", move |arrival| upgrade_and_echo(arrival, speech)).await;
        let mut peer = world.connect().await;
        peer.send(speech.request).await;
        let expected = [speech.greeting, speech.request].concat();
        assert_eq!(peer.exactly(expected.len()).await, expected, "{}", speech.protocol);
        peer.finish().await;
        assert_eq!(peer.rest().await.unwrap(), b"");
        let seen = world.origins[0].until(|seen| seen.ended == 1).await;
        assert_eq!(seen.server_names, [Some(TRUE_NAME.to_owned())]);
    }
}

#[tokio::test]
async fn a_client_may_wait_for_its_greeting_and_speak_tls_from_the_first_byte() {
    for speech in &SPEECHES {
        let script = move |arrival| upgrade_and_echo(arrival, speech);
        let world = World::new(speech, "tls_in: true", script).await;
        // By the listener's address there is no SNI.
        for name in [ALIAS, "127.0.0.1"] {
            let mut peer = world.secured(name).await;
            assert_eq!(peer.exactly(speech.greeting.len()).await, speech.greeting);
            peer.send(speech.request).await;
            assert_eq!(peer.exactly(speech.request.len()).await, speech.request);
            peer.finish().await;
            assert_eq!(peer.rest().await.unwrap(), b"");
        }
        // And no other one is served.
        let mut peer = world.connect().await;
        peer.send(b"hello hello hello\r\n").await;
        peer.closed().await;
        assert_eq!(world.origins[0].seen().connections, 2);
    }
}

#[tokio::test]
async fn a_client_of_a_server_that_speaks_first_is_not_asked_for_tls_unless_that_is_configured() {
    for speech in &SPEECHES {
        let world = World::new(speech, "", move |arrival| upgrade_and_echo(arrival, speech)).await;
        if speech.protocol == "ldap" {
            let mut peer = world.secured(ALIAS).await;
            peer.send(speech.request).await;
            assert_eq!(peer.exactly(speech.request.len()).await, speech.request);
        } else {
            let hello = [0x16, 3, 1, 0, 5, 1, 0, 0, 1, 0];
            let mut peer = world.connect().await;
            peer.send(hello).await;
            let expected = [speech.greeting, &hello].concat();
            assert_eq!(peer.exactly(expected.len()).await, expected);
        }
    }
}

#[tokio::test]
async fn a_server_without_tls_gets_nothing_and_the_client_is_told() {
    for speech in &SPEECHES {
        let script = move |arrival| upgrade_with(arrival, speech, speech.no_tls);
        let world = World::new(speech, "", script).await;
        let all = told(world.connect().await, speech).await;
        assert_told(&all, speech, 0, "fix: enable STARTTLS on the server");
        assert_eq!(world.origins[0].until(|seen| seen.ended == 1).await.server_names, []);
        assert_eq!(world.errors("tls_protocol_error").await, Some(1.0));
        world.proxy.logged("enable STARTTLS on the server").await;
    }
}

#[tokio::test]
async fn a_certificate_for_another_name_gets_nothing_and_the_client_is_told() {
    for speech in &SPEECHES {
        let script = move |arrival| upgrade_and_echo(arrival, speech);
        let world = World::called("other.example", speech, "", script).await;
        let all = told(world.connect().await, speech).await;
        assert_told(&all, speech, 0, "other.example");
        assert_told(&all, speech, 0, TRUE_NAME);
        let seen = world.origins[0].until(|seen| seen.ended == 1).await;
        assert_eq!((seen.server_names.len(), seen.failed_handshakes), (0, 1));
        assert_eq!(world.errors("tls_certificate_error").await, Some(1.0));
    }
}

#[tokio::test]
async fn a_client_that_speaks_tls_is_told_within_tls() {
    for speech in &SPEECHES {
        let script = move |arrival| upgrade_with(arrival, speech, speech.no_tls);
        let world = World::new(speech, "tls_in: true", script).await;
        let all = told(world.secured(ALIAS).await, speech).await;
        assert_told(&all, speech, 0, "fix: enable STARTTLS on the server");
    }
}

#[tokio::test]
async fn bytes_that_were_put_behind_the_servers_consent_are_refused() {
    for speech in &SPEECHES {
        let consent = speech.turns.last().unwrap().1;
        let last = [consent, b"250-injected\r\n250 AUTH PLAIN\r\n"].concat();
        let script = move |arrival| {
            let last = last.clone();
            async move { upgrade_with(arrival, speech, &last).await }
        };
        let world = World::new(speech, "", script).await;
        let all = told(world.connect().await, speech).await;
        assert_told(&all, speech, 0, "do not use this path");
        assert!(!all.windows(8).any(|bytes| bytes == b"injected"));
        world.origins[0].until(|seen| seen.ended == 1).await;
    }
}

#[tokio::test]
async fn a_server_that_has_logged_the_client_in_before_tls_is_refused() {
    let speech = &SPEECHES[1];
    let script = async |mut arrival: Arrival| {
        say(arrival.tcp(), &[(b"", b"* PREAUTH hello\r\n")]).await;
        let mut rest = Vec::new();
        let _ = arrival.tcp().read_to_end(&mut rest).await;
        assert_eq!(rest, b"");
    };
    let world = World::new(speech, "", script).await;
    let all = told(world.connect().await, speech).await;
    assert_told(&all, speech, 0, "PREAUTH");
    world.origins[0].until(|seen| seen.ended == 1).await;
}

#[tokio::test]
async fn another_endpoint_is_tried_where_one_is_not_ready() {
    for speech in &SPEECHES {
        let mut scene = Scene::new(2).await;
        let mut listeners = scene.take_listeners();
        let tls = trust::server_with_alpn(&[TRUE_NAME], &[]);
        let good = RawOrigin::start(listeners.remove(0), Some(tls), move |arrival| {
            upgrade_and_echo(arrival, speech)
        });
        let bad = RawOrigin::start(listeners.remove(0), None, move |arrival| {
            upgrade_with(arrival, speech, speech.no_tls)
        });
        let keys = "balance: round_robin\nhealth: {passive: {failures: 0}}";
        let world = World::before(scene, vec![good, bad], speech, keys).await;
        for _ in 0..4 {
            let mut peer = world.connect().await;
            peer.send(speech.request).await;
            let expected = [speech.greeting, speech.request].concat();
            assert_eq!(peer.exactly(expected.len()).await, expected, "{}", speech.protocol);
        }
        assert_eq!(world.origins[0].seen().connections, 4);
        world.origins[1].until(|seen| seen.connections > 0).await;
    }
}

#[tokio::test]
async fn a_server_that_says_nothing_is_given_up_and_one_that_says_too_much_is_too() {
    for speech in &SPEECHES {
        let silent = async |mut arrival: Arrival| {
            let _ = arrival.tcp().read_to_end(&mut Vec::new()).await;
        };
        let keys = "timeouts: {connect: 300ms}";
        let world = World::new(speech, keys, silent).await;
        let all = told(world.connect().await, speech).await;
        assert_told(&all, speech, 1, "set `protocol: tcp`");
        assert_eq!(world.errors("connection_timeout").await, Some(1.0));

        let endless = async |mut arrival: Arrival| {
            let mebibyte = vec![b'0'; 1 << 20];
            let _ = arrival.tcp().write_all(&mebibyte).await;
            let _ = arrival.tcp().read_to_end(&mut Vec::new()).await;
        };
        let world = World::new(speech, "", endless).await;
        let all = told(world.connect().await, speech).await;
        assert!(!all.is_empty() && all.len() < 4096);
        world.origins[0].until(|seen| seen.ended == 1).await;
    }
}

#[tokio::test]
async fn a_server_that_closes_at_any_step_gets_nothing_and_the_client_is_told() {
    for speech in &SPEECHES {
        for step in 0..speech.turns.len() {
            let world = World::new(speech, "", move |mut arrival: Arrival| async move {
                say(arrival.tcp(), &speech.turns[..step]).await;
                let heard = speech.turns[step].0.len();
                let _ = arrival.tcp().read_exact(&mut vec![0; heard]).await;
            })
            .await;
            let all = told(world.connect().await, speech).await;
            match speech.protocol {
                "smtp" => assert!(all.starts_with(b"421-4.4.2 truename: "), "{all:?}"),
                _ => assert_told(&all, speech, 1, "closed the connection before TLS"),
            }
        }
    }
}

#[tokio::test]
async fn a_client_beyond_a_limit_is_told() {
    for speech in &SPEECHES {
        let script = move |arrival| upgrade_and_echo(arrival, speech);
        let world = World::new(speech, "limits: {requests: 1}", script).await;
        let mut first = world.connect().await;
        first.send(speech.request).await;
        let expected = [speech.greeting, speech.request].concat();
        assert_eq!(first.exactly(expected.len()).await, expected);
        let all = told(world.connect().await, speech).await;
        assert_told(&all, speech, 2, "limits.requests");
        assert_eq!(world.origins[0].seen().connections, 1);
    }
}

#[tokio::test]
async fn an_ldap_request_that_comes_in_pieces_is_responded_to() {
    let speech = &SPEECHES[3];
    for length in [1, 2, 6] {
        let script = move |arrival| upgrade_with(arrival, speech, speech.no_tls);
        let world = World::new(speech, "", script).await;
        let mut peer = world.connect().await;
        peer.send(&speech.request[..length]).await;
        world.origins[0].until(|seen| seen.ended == 1).await;
        peer.send(&speech.request[length..]).await;
        let all = peer.rest().await.unwrap();
        assert_told(&all, speech, 0, "fix: enable STARTTLS on the server");
    }
}

#[tokio::test]
async fn without_tls_to_the_target_there_is_no_starttls() {
    let speech = &SPEECHES[0];
    let mut scene = Scene::new(1).await;
    let origin = RawOrigin::start(scene.take_listeners().remove(0), None, async |mut arrival| {
        say(arrival.tcp(), &[(b"", b"220 in the clear\r\n"), (b"QUIT\r\n", b"221 bye\r\n")]).await;
    });
    let world = World::before(scene, vec![origin], speech, "tls: {mode: plaintext}").await;
    let mut peer = world.connect().await;
    peer.send("QUIT\r\n").await;
    assert_eq!(peer.rest().await.unwrap(), b"220 in the clear\r\n221 bye\r\n");
}

#[tokio::test]
async fn the_forward_proxy_opens_tunnels_to_it_whose_clients_are_told_too() {
    let speech = &SPEECHES[0];
    let script = move |arrival: Arrival| async move {
        match arrival.nth {
            0 => upgrade_and_echo(arrival, speech).await,
            _ => upgrade_with(arrival, speech, speech.no_tls).await,
        }
    };
    let mut scene = Scene::new(1).await;
    let tls = trust::server_with_alpn(&[TRUE_NAME], &[]);
    let origin = RawOrigin::start(scene.take_listeners().remove(0), Some(tls), script);
    let yaml = scene.yaml("protocol: smtp") + "proxy: {listen: \"127.0.0.1:0\"}\n";
    let proxy = Proxy::start(&yaml).await;
    let address = proxy.forward_proxy().await;
    let port = proxy.address(ALIAS).await.port();
    let tunnel = async || {
        let mut peer = client::connect(address).await;
        peer.send(format!("CONNECT {ALIAS}:{port} HTTP/1.1\r\nHost: {ALIAS}:{port}\r\n\r\n")).await;
        let head = within("a tunnel", peer.head()).await.unwrap();
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        peer
    };
    let mut peer = tunnel().await;
    peer.send("NOOP\r\n").await;
    let expected = [speech.greeting, b"NOOP\r\n"].concat();
    assert_eq!(peer.exactly(expected.len()).await, expected);
    let all = told(tunnel().await, speech).await;
    assert_told(&all, speech, 0, "fix: enable STARTTLS on the server");
    drop(origin);
}
