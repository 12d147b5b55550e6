//! PostgreSQL on the wire, for both ends: what clients send, and a stand-in for the server, which is precise where a
//! real one is not, and can misbehave.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::Notify,
};

use super::{
    peer::Peer,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene, TRUE_NAME},
    trust,
};

/// Asks whether TLS can be had.
pub const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
/// Asks whether encryption by GSSAPI can be had.
pub const GSS_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x30];
/// Ends a session.
pub const TERMINATE: [u8; 5] = [b'X', 0, 0, 0, 4];
/// Asks for a password in the clear.
pub const ASK_PASSWORD: [u8; 9] = [b'R', 0, 0, 0, 8, 0, 0, 0, 3];

/// A message.
pub fn message(tag: u8, body: impl AsRef<[u8]>) -> Vec<u8> {
    let body = body.as_ref();
    let length = u32::try_from(body.len() + 4).unwrap();
    [&[tag], &length.to_be_bytes()[..], body].concat()
}

/// The StartupMessage of this minor version of protocol 3.
pub fn startup(minor: u8) -> Vec<u8> {
    let body = b"user\0app\0database\0shop\0\0";
    let length = u32::try_from(body.len() + 8).unwrap();
    [&length.to_be_bytes(), &[0, 3, 0, minor], &body[..]].concat()
}

/// The CancelRequest for a session with this key.
pub fn cancel(key: &[u8]) -> Vec<u8> {
    let length = u32::try_from(key.len() + 8).unwrap();
    [&length.to_be_bytes(), &[0x04, 0xd2, 0x16, 0x2e], key].concat()
}

/// A Query.
pub fn query(text: &str) -> Vec<u8> {
    message(b'Q', format!("{text}\0"))
}

/// The next message: its type and its body; `None` at the end.
pub async fn next_message(peer: &mut Peer) -> Option<(u8, Vec<u8>)> {
    let header = peer.try_exactly(5).await?;
    let length = u32::from_be_bytes([header[1], header[2], header[3], header[4]]);
    Some((header[0], peer.try_exactly(usize::try_from(length).unwrap() - 4).await?))
}

/// The messages up to the next ReadyForQuery, or up to an ErrorResponse that ends the connection.
#[track_caller]
pub fn until_ready(peer: &mut Peer) -> impl Future<Output = Vec<(u8, Vec<u8>)>> {
    super::within("ReadyForQuery", async move {
        let mut messages = Vec::new();
        while let Some(message) = next_message(peer).await {
            let is_last = message.0 == b'Z';
            messages.push(message);
            if is_last {
                break;
            }
        }
        messages
    })
}

/// The fields of an ErrorResponse.
pub fn fields(body: &[u8]) -> HashMap<char, String> {
    let texts = body.split(|byte| *byte == 0).filter(|text| !text.is_empty());
    let field = |text: &[u8]| {
        (char::from(text[0]), String::from_utf8(text[1..].to_vec()).expect("a text in UTF-8"))
    };
    texts.map(field).collect()
}

/// The ErrorResponse that ends a connection, and that nothing follows.
#[track_caller]
pub fn error(peer: &mut Peer) -> impl Future<Output = HashMap<char, String>> {
    super::within("an ErrorResponse", async move {
        let (tag, body) = next_message(peer).await.expect("an ErrorResponse, not the end");
        assert_eq!(char::from(tag), 'E', "{body:?}");
        assert_eq!(peer.rest().await.unwrap(), b"");
        fields(&body)
    })
}

/// Starts a session, and gives its key.
#[track_caller]
pub fn log_in(peer: &mut Peer) -> impl Future<Output = Vec<u8>> {
    super::within("a session", async move {
        peer.send(startup(0)).await;
        let messages = until_ready(peer).await;
        let key = messages.into_iter().find(|message| message.0 == b'K');
        key.expect("BackendKeyData, not an error").1
    })
}

/// No two servers give out the same key, as real ones hardly ever do.
static NEXT_KEY: AtomicU32 = AtomicU32::new(1);

/// How a stand-in behaves. Clones are of the same server.
#[derive(Clone)]
pub struct Server {
    /// What it reports as `in_hot_standby`; none before PostgreSQL 14.
    pub in_hot_standby: Arc<Mutex<Option<&'static str>>>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    sessions: HashMap<Vec<u8>, Arc<Notify>>,
    startups: Vec<Vec<u8>>,
    cancels: Vec<Vec<u8>>,
    terminated: usize,
}

impl Server {
    /// One that is a primary.
    pub fn new() -> Self {
        let in_hot_standby = Arc::new(Mutex::new(Some("off")));
        Self { in_hot_standby, state: Arc::default() }
    }

    /// The StartupMessages that it got.
    pub fn startups(&self) -> Vec<Vec<u8>> {
        self.state.lock().startups.clone()
    }

    /// The keys of the CancelRequests that it got.
    pub fn cancels(&self) -> Vec<Vec<u8>> {
        self.state.lock().cancels.clone()
    }

    /// How many sessions ended with a Terminate.
    pub fn terminated(&self) -> usize {
        self.state.lock().terminated
    }

    /// How many sessions are open.
    pub fn sessions(&self) -> usize {
        self.state.lock().sessions.len()
    }

    /// Serves a connection: SSLRequest, TLS, and a session in which `sleep` is answered once it is cancelled, and
    /// everything else at once.
    pub async fn serve(self, mut arrival: Arrival) {
        let mut request = [0; 8];
        if arrival.tcp().read_exact(&mut request).await.is_err() {
            return;
        }
        assert_eq!(request, SSL_REQUEST);
        arrival.tcp().write_all(b"S").await.unwrap();
        let Some(conversation) = arrival.open().await else { return };
        self.converse(conversation.peer).await;
    }

    /// A session, behind TLS.
    pub async fn converse(self, mut peer: Peer) {
        let Some(length) = peer.try_exactly(4).await else { return };
        let length = u32::from_be_bytes([length[0], length[1], length[2], length[3]]);
        let Some(packet) = peer.try_exactly(usize::try_from(length).unwrap() - 4).await else {
            return;
        };
        if packet[..4] == [0x04, 0xd2, 0x16, 0x2e] {
            let mut state = self.state.lock();
            if let Some(session) = state.sessions.get(&packet[4..]) {
                session.notify_one();
            }
            state.cancels.push(packet[4..].to_vec());
            return;
        }
        let cancelled = Arc::new(Notify::new());
        let key = {
            let mut state = self.state.lock();
            let number = NEXT_KEY.fetch_add(1, Ordering::Relaxed);
            // As long as under protocol 3.2.
            let minor = packet[3];
            let secret = vec![7; if minor >= 2 { 32 } else { 4 }];
            let key = [&number.to_be_bytes()[..], &secret].concat();
            state.sessions.insert(key.clone(), cancelled.clone());
            state.startups.push(packet);
            key
        };
        self.session(&mut peer, &key, &cancelled).await;
        self.state.lock().sessions.remove(&key);
    }

    async fn session(&self, peer: &mut Peer, key: &[u8], cancelled: &Notify) {
        let mut welcome = message(b'R', [0; 4]);
        let standby = *self.in_hot_standby.lock();
        for (name, value) in
            [("in_hot_standby", standby), ("server_version", Some("17.2 (stand-in)"))]
        {
            if let Some(value) = value {
                welcome.extend(message(b'S', format!("{name}\0{value}\0")));
            }
        }
        welcome.extend(message(b'K', key));
        welcome.extend(message(b'Z', "I"));
        if peer.try_send(welcome).await.is_err() {
            return;
        }
        let mut status = "I";
        while let Some((tag, body)) = next_message(peer).await {
            let text = String::from_utf8_lossy(&body).trim_end_matches('\0').to_owned();
            let answer = match (tag, text.as_str()) {
                (b'X', _) => {
                    self.state.lock().terminated += 1;
                    peer.finish().await;
                    return;
                }
                (b'Q', "sleep") => {
                    tokio::select! {
                        () = cancelled.notified() => {}
                        () = peer.hold() => return,
                    }
                    message(b'E', "SERROR\0C57014\0Mcanceling statement due to user request\0\0")
                }
                (b'Q', text) => {
                    status = match text {
                        "begin" => "T",
                        "commit" => "I",
                        _ => status,
                    };
                    message(b'C', format!("{text}\0"))
                }
                _ => continue,
            };
            let answer = [answer, message(b'Z', status)].concat();
            if peer.try_send(answer).await.is_err() {
                return;
            }
        }
    }
}

/// A stand-in with a proxy before it.
pub struct ThroughPostgres {
    /// The proxy.
    pub proxy: Proxy,
    /// Where the alias listens.
    pub address: std::net::SocketAddr,
    /// What the alias leads to.
    pub origin: RawOrigin,
    /// DNS, and the server's port.
    _scene: Scene,
}

impl ThroughPostgres {
    /// `keys` are further lines of the alias; `script` is what the server does with a connection.
    pub async fn new<Script, Run>(keys: &str, script: Script) -> Self
    where
        Script: Fn(Arrival) -> Run + Clone + Send + Sync + 'static,
        Run: Future<Output = ()> + Send + 'static,
    {
        Self::start(keys, "", script).await
    }

    async fn start<Script, Run>(keys: &str, process: &str, script: Script) -> Self
    where
        Script: Fn(Arrival) -> Run + Clone + Send + Sync + 'static,
        Run: Future<Output = ()> + Send + 'static,
    {
        let mut scene = Scene::new(1).await;
        let tls = trust::server_with_alpn(&[TRUE_NAME], &["postgresql"]);
        let origin = RawOrigin::start(scene.take_listeners().remove(0), Some(tls), script);
        let yaml = scene.yaml(&format!("protocol: postgres\n{keys}"));
        let proxy = Proxy::start(&format!("{process}\n{yaml}")).await;
        let address = proxy.address(ALIAS).await;
        Self { proxy, address, origin, _scene: scene }
    }

    /// The same before a server that behaves.
    pub async fn serving(keys: &str) -> (Self, Server) {
        Self::serving_by(keys, "").await
    }

    /// The same with further lines of the process.
    pub async fn serving_by(keys: &str, process: &str) -> (Self, Server) {
        let server = Server::new();
        let behaves = server.clone();
        let script = move |arrival| behaves.clone().serve(arrival);
        (Self::start(keys, process, script).await, server)
    }

    /// A connection to the alias.
    pub async fn connect(&self) -> Peer {
        super::client::connect(self.address).await
    }

    /// A connection with a session, and its key.
    pub async fn session(&self) -> (Peer, Vec<u8>) {
        let mut peer = self.connect().await;
        let key = log_in(&mut peer).await;
        (peer, key)
    }
}
