//! MySQL on the wire, for both ends: what clients send, and a stand-in for the server that does what MySQL 8 and 9 do
//! where a password is concerned, and can misbehave.

use std::sync::Arc;

use aws_lc_rs::{
    digest::{SHA1_FOR_LEGACY_USE_ONLY, SHA256, digest},
    rsa::{OAEP_SHA1_MGF1SHA1, OaepPublicEncryptingKey, PublicEncryptingKey},
};
use parking_lot::Mutex;
use rustls::pki_types::{SubjectPublicKeyInfoDer, pem::PemObject};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{
    client,
    peer::Peer,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene, TRUE_NAME},
    trust, within,
};

/// LONG_PASSWORD, CONNECT_WITH_DB, PROTOCOL_41, SECURE_CONNECTION, PLUGIN_AUTH.
pub const CLIENT: u32 = 1 | 8 | 1 << 9 | 1 << 15 | 1 << 19;
/// The capability of TLS.
pub const TLS: u32 = 1 << 11;
/// What the server of the greeting binds passwords to.
pub const SCRAMBLE: &[u8; 20] = b"\x01bcdefghijklmnopqrs\x7f";
/// What it binds them to after it has switched the plugin.
pub const SWITCHED: &[u8; 20] = b"\x01BCDEFGHIJKLMNOPQRS\x7f";
/// The password of the stand-in's only user.
pub const PASSWORD: &str = "open sesame: a long one";
/// A payload that says OK.
pub const OK: &[u8] = &[0, 0, 0, 2, 0, 0, 0];
/// The payload of a query.
pub const QUERY: &[u8] = b"\x03select 1";

/// A packet.
pub fn packet(sequence: u8, payload: impl AsRef<[u8]>) -> Vec<u8> {
    let payload = payload.as_ref();
    let length = u32::try_from(payload.len()).unwrap().to_le_bytes();
    [&length[..3], &[sequence], payload].concat()
}

/// The payload of a greeting.
pub fn greeting(plugin: &str, tls: bool) -> Vec<u8> {
    let capabilities = 0x81ff_f7df_u32 | if tls { TLS } else { 0 };
    let [a, b, c, d] = capabilities.to_le_bytes();
    [
        b"\x0a8.4.3-stand-in\0\x07\0\0\0",
        &SCRAMBLE[..8],
        &[0, a, b, 255, 2, 0, c, d, 21],
        &[0; 10],
        &SCRAMBLE[8..],
        b"\0",
        plugin.as_bytes(),
        b"\0",
    ]
    .concat()
}

/// What a client's response begins with.
pub fn flags(capabilities: u32) -> Vec<u8> {
    [&capabilities.to_le_bytes()[..], &[0, 0, 0, 1, 45], &[0; 23]].concat()
}

/// The payload of a client's response.
pub fn response(capabilities: u32, plugin: &str, data: &[u8]) -> Vec<u8> {
    let length = u8::try_from(data.len()).unwrap();
    let flags = flags(capabilities);
    [&flags[..], b"app\0", &[length], data, b"shop\0", plugin.as_bytes(), b"\0"].concat()
}

/// The next packet: its sequence number and its payload; `None` at the end.
pub async fn next_packet(peer: &mut Peer) -> Option<(u8, Vec<u8>)> {
    let header = peer.try_exactly(4).await?;
    let length = u32::from_le_bytes([header[0], header[1], header[2], 0]);
    Some((header[3], peer.try_exactly(usize::try_from(length).unwrap()).await?))
}

/// An error: its sequence number, its code, its SQLSTATE and its text.
#[track_caller]
pub fn error(packet: (u8, Vec<u8>)) -> (u8, u16, String, String) {
    let (sequence, payload) = packet;
    assert_eq!((payload[0], payload[3]), (0xff, b'#'), "{}", String::from_utf8_lossy(&payload));
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let code = u16::from_le_bytes([payload[1], payload[2]]);
    (sequence, code, text(&payload[4..9]), text(&payload[9..]))
}

/// A password as it is hashed by a plugin.
pub fn hash(plugin: &str, password: &str, scramble: &[u8]) -> Vec<u8> {
    let xor = |a: &[u8], b: &[u8]| a.iter().zip(b).map(|(a, b)| a ^ b).collect();
    let password = password.as_bytes();
    match plugin {
        "mysql_native_password" => {
            let sha1 = |bytes: &[u8]| digest(&SHA1_FOR_LEGACY_USE_ONLY, bytes).as_ref().to_vec();
            let once = sha1(password);
            xor(&once, &sha1(&[scramble, &sha1(&once)].concat()))
        }
        "caching_sha2_password" => {
            let sha256 = |bytes: &[u8]| digest(&SHA256, bytes).as_ref().to_vec();
            let once = sha256(password);
            xor(&once, &sha256(&[&sha256(&once), scramble].concat()))
        }
        _ => panic!("{plugin}"),
    }
}

/// A password as a client encrypts it with a key that it was sent.
pub fn encrypt(key: &[u8], password: &str, scramble: &[u8]) -> Vec<u8> {
    let der = SubjectPublicKeyInfoDer::from_pem_slice(key.strip_prefix(&[1]).unwrap()).unwrap();
    let key = PublicEncryptingKey::from_der(&der).unwrap();
    let key = OaepPublicEncryptingKey::new(key).unwrap();
    let plain = [password.as_bytes(), &[0]].concat();
    let masked: Vec<u8> =
        plain.iter().zip(scramble.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect();
    let mut room = vec![0; key.ciphertext_size()];
    key.encrypt(&OAEP_SHA1_MGF1SHA1, &masked, &mut room, None).unwrap().to_vec()
}

/// How a stand-in behaves, and what it has seen. Clones are of the same server.
#[derive(Clone)]
pub struct Server {
    /// The plugin of its greeting.
    pub default_plugin: &'static str,
    /// The plugin of the user.
    pub plugin: &'static str,
    state: Arc<Mutex<State>>,
}

/// What it has seen.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// Whether the hash of the user's password is in its cache.
    pub warm: bool,
    /// Logins that came to an OK, and those that did not.
    pub logins: (usize, usize),
    /// Handshakes that broke off: of those a server counts, and blocks the host in the end.
    pub interrupted: usize,
    /// The responses of clients, or of nobody, as they came.
    pub responses: Vec<Vec<u8>>,
}

impl Server {
    /// As MySQL 8 is when it is new.
    pub fn new() -> Self {
        Self::of("caching_sha2_password", "caching_sha2_password")
    }

    /// Whose user has this plugin.
    pub fn of(default_plugin: &'static str, plugin: &'static str) -> Self {
        Self { default_plugin, plugin, state: Arc::default() }
    }

    /// What it has seen.
    pub fn state(&self) -> State {
        self.state.lock().clone()
    }

    /// Empties its cache, as a restart does.
    pub fn forget(&self) {
        self.state.lock().warm = false;
    }

    /// Serves a connection.
    pub async fn serve(self, mut arrival: Arrival) {
        let tcp = arrival.tcp();
        tcp.write_all(&packet(0, greeting(self.default_plugin, true))).await.unwrap();
        let mut header = [0; 4];
        if tcp.read_exact(&mut header).await.is_err() {
            return self.note(|state| state.interrupted += 1);
        }
        let mut payload = vec![0; usize::from(header[0]) | usize::from(header[1]) << 8];
        if header[3] != 1 || tcp.read_exact(&mut payload).await.is_err() {
            return self.note(|state| state.interrupted += 1);
        }
        let asks = u32::from_le_bytes([payload[0], payload[1], payload[2], payload[3]]) & TLS != 0;
        if !asks {
            self.note(|state| state.responses.push(payload));
            let refusal = packet(2, b"\xff\x57\x0c#HY000secure transport is required");
            return drop(tcp.write_all(&refusal).await);
        }
        assert_eq!(payload.len(), 32, "nothing but flags without TLS");
        let Some(conversation) = arrival.open().await else {
            return self.note(|state| state.interrupted += 1);
        };
        let mut peer = conversation.peer;
        match self.log_in(&mut peer, &payload).await {
            None => self.note(|state| state.interrupted += 1),
            Some((sequence, true)) => {
                self.note(|state| state.logins.0 += 1);
                if peer.try_send(packet(sequence, OK)).await.is_ok() {
                    session(&mut peer).await;
                }
            }
            Some((sequence, false)) => {
                self.note(|state| state.logins.1 += 1);
                let refusal = packet(sequence, b"\xff\x15\x04#28000Access denied");
                peer.try_send(refusal).await.ok();
                peer.finish().await;
            }
        }
    }

    fn note(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock());
    }

    /// The number of what is sent next, and whether the user is who it says; `None` where it left.
    async fn log_in(&self, peer: &mut Peer, flags: &[u8]) -> Option<(u8, bool)> {
        let (sequence, response) = next_packet(peer).await?;
        assert_eq!(sequence, 2);
        assert_eq!(&response[..32], flags, "the flags are those of the request for TLS");
        self.note(|state| state.responses.push(response.clone()));
        let user = response[32..].iter().position(|byte| *byte == 0).unwrap() + 33;
        let length = usize::from(response[user]);
        let mut data = response[user + 1..][..length].to_vec();
        let mut rest = response[user + 1 + length..].split(|byte| *byte == 0);
        if u32::from_le_bytes([flags[0], flags[1], flags[2], flags[3]]) & 8 != 0 {
            rest.next();
        }
        let plugin = rest.next().unwrap_or_default();
        let (mut scramble, mut sequence) = (SCRAMBLE, 3);
        if plugin != self.plugin.as_bytes() {
            scramble = SWITCHED;
            let switch = [&[0xfe], self.plugin.as_bytes(), &[0], SWITCHED, &[0]].concat();
            data = ask(peer, &mut sequence, &switch).await?;
        }
        let password = [PASSWORD.as_bytes(), &[0]].concat();
        let is_right = match self.plugin {
            "caching_sha2_password" => {
                if data.is_empty() || data == [0] {
                    return Some((sequence, false));
                }
                let warm = self.state.lock().warm;
                if warm && data == hash(self.plugin, PASSWORD, scramble) {
                    peer.try_send(packet(sequence, [1, 3])).await.ok()?;
                    return Some((sequence + 1, true));
                }
                let sent = ask(peer, &mut sequence, &[1, 4]).await?;
                if sent.is_empty() {
                    return None;
                }
                // A byte that would ask for a key without TLS is a password within it.
                let is_right = sent == password;
                self.note(|state| state.warm |= is_right);
                is_right
            }
            "sha256_password" | "mysql_clear_password" => data == password,
            plugin => data == hash(plugin, PASSWORD, scramble),
        };
        Some((sequence, is_right))
    }
}

/// Sends, and receives what comes in response.
async fn ask(peer: &mut Peer, sequence: &mut u8, payload: &[u8]) -> Option<Vec<u8>> {
    peer.try_send(packet(*sequence, payload)).await.ok()?;
    let (next, response) = next_packet(peer).await?;
    assert_eq!(next, *sequence + 1);
    *sequence += 2;
    Some(response)
}

/// Says OK to every command, until the client leaves.
async fn session(peer: &mut Peer) {
    while let Some((sequence, command)) = next_packet(peer).await {
        assert_eq!(sequence, 0, "each command begins anew");
        if command == [1] || peer.try_send(packet(1, OK)).await.is_err() {
            break;
        }
    }
    peer.finish().await;
}

/// A proxy for an alias of a MySQL server.
pub struct ThroughMysql {
    /// The server's listener, and what came to it.
    pub origin: RawOrigin,
    /// The proxy.
    pub proxy: Proxy,
    /// Where clients connect to.
    pub address: std::net::SocketAddr,
    _scene: Scene,
}

impl ThroughMysql {
    /// In front of a stand-in. `keys` are further lines of the alias.
    pub async fn serving(server: &Server, keys: &str) -> Self {
        let server = server.clone();
        Self::new(keys, move |arrival| server.clone().serve(arrival)).await
    }

    /// In front of a script.
    pub async fn new<Script, Run>(keys: &str, script: Script) -> Self
    where
        Script: Fn(Arrival) -> Run + Clone + Send + Sync + 'static,
        Run: Future<Output = ()> + Send + 'static,
    {
        let mut scene = Scene::new(1).await;
        let listener = scene.take_listeners().remove(0);
        let origin = RawOrigin::start(listener, Some(trust::server(&[TRUE_NAME])), script);
        let proxy = Proxy::start(&scene.yaml(&format!("protocol: mysql\n{keys}"))).await;
        let address = proxy.address(ALIAS).await;
        Self { origin, proxy, address, _scene: scene }
    }

    /// A client that has not read anything.
    pub async fn connect(&self) -> Peer {
        client::connect(self.address).await
    }
}

/// The greeting, as a client without TLS has it.
#[track_caller]
pub fn greeted(peer: &mut Peer) -> impl Future<Output = Vec<u8>> {
    within("the greeting", async move {
        let (sequence, payload) = next_packet(peer).await.expect("a greeting, not the end");
        assert_eq!(sequence, 0);
        payload
    })
}

/// Logs in by `caching_sha2_password`, as clients do that ask for a key by themselves. Whether it was asked for.
#[track_caller]
pub fn log_in(peer: &mut Peer, password: &str) -> impl Future<Output = Result<bool, String>> {
    within("a login", async move {
        greeted(peer).await;
        let plugin = "caching_sha2_password";
        peer.send(packet(1, response(CLIENT, plugin, &hash(plugin, password, SCRAMBLE)))).await;
        let mut scramble = SCRAMBLE;
        let (mut expected, mut asked) = (2, false);
        loop {
            let (sequence, payload) = next_packet(peer).await.expect("a packet, not the end");
            assert_eq!(sequence, expected);
            expected += 1;
            let reply = match &payload[..] {
                [0, ..] => return Ok(asked),
                [0xff, ..] => return Err(error((sequence, payload)).3),
                [1, 3] => continue,
                [1, 4] => vec![2],
                [1, ..] => {
                    asked = true;
                    encrypt(&payload, password, scramble)
                }
                [0xfe, ..] => {
                    scramble = SWITCHED;
                    hash(plugin, password, scramble)
                }
                other => panic!("{other:?}"),
            };
            peer.send(packet(expected, reply)).await;
            expected += 1;
        }
    })
}
