//! An upstream that does to each connection what a script says, and notes what it received.

use std::{net::SocketAddr, sync::Arc};

use rustls::ServerConfig;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

use super::{
    message::Message,
    peer::{Peer, reset_at_close},
    within,
};

/// A running scripted origin; dropping it closes its listener and every connection.
pub struct RawOrigin {
    /// Where it listens.
    pub address: SocketAddr,
    seen: watch::Receiver<Seen>,
    _tasks: JoinSet<()>,
}

/// What happened so far.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    /// TCP connections accepted.
    pub connections: usize,
    /// The names in the ClientHellos of handshakes that came to their end, in that order.
    pub server_names: Vec<Option<String>>,
    /// Handshakes that did not.
    pub failed_handshakes: usize,
    /// Requests that scripts read, whole, in that order.
    pub requests: Vec<Message>,
    /// Connections whose script came to its end.
    pub ended: usize,
}

impl RawOrigin {
    /// Runs `script` for every connection to `listener`; with `tls`, or in the clear.
    pub fn start<Script, Run>(
        listener: TcpListener,
        tls: Option<Arc<ServerConfig>>,
        script: Script,
    ) -> Self
    where
        Script: Fn(Arrival) -> Run + Send + Sync + 'static,
        Run: Future<Output = ()> + Send + 'static,
    {
        let address = listener.local_addr().unwrap();
        let (notes, seen) = watch::channel(Seen::default());
        let notes = Arc::new(notes);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut scripts = JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                // Else a response may wait for the acknowledgement of TLS' session tickets.
                tcp.set_nodelay(true).unwrap();
                let nth = notes.borrow().connections;
                notes.send_modify(|seen| seen.connections += 1);
                let tls = tls.clone().map(TlsAcceptor::from);
                let run = script(Arrival { tcp, tls, nth, notes: notes.clone() });
                let notes = notes.clone();
                scripts.spawn(async move {
                    run.await;
                    notes.send_modify(|seen| seen.ended += 1);
                });
            }
        });
        Self { address, seen, _tasks: tasks }
    }

    /// What happened so far.
    pub fn seen(&self) -> Seen {
        self.seen.borrow().clone()
    }

    /// All its visitors called it by these names, and there were some.
    #[track_caller]
    pub fn assert_called(&self, server_name: &str, host: &str) {
        let seen = self.seen();
        assert!(!seen.requests.is_empty() && seen.failed_handshakes == 0, "{seen:?}");
        for name in &seen.server_names {
            assert_eq!(name.as_deref(), Some(server_name));
        }
        for request in &seen.requests {
            assert_eq!(request.field("host"), Some(host));
        }
    }

    /// Waits until what happened is `enough`.
    #[track_caller]
    pub fn until(&self, enough: impl FnMut(&Seen) -> bool) -> impl Future<Output = Seen> {
        let mut seen = self.seen.clone();
        within("the origin to see enough", async move {
            seen.wait_for(enough).await.expect("a running origin").clone()
        })
    }
}

/// A connection that was accepted, before the first byte.
pub struct Arrival {
    tcp: TcpStream,
    tls: Option<TlsAcceptor>,
    /// How many came before it.
    pub nth: usize,
    notes: Arc<watch::Sender<Seen>>,
}

impl Arrival {
    /// Shakes hands, where the origin has TLS; `None` where that failed.
    pub async fn open(self) -> Option<Conversation> {
        let peer = match self.tls {
            None => Peer::plain(self.tcp),
            Some(tls) => match tls.accept(self.tcp).await {
                Ok(stream) => Peer::tls_server(stream),
                Err(_) => {
                    self.notes.send_modify(|seen| seen.failed_handshakes += 1);
                    return None;
                }
            },
        };
        self.notes.send_modify(|seen| seen.server_names.push(peer.server_name.clone()));
        Some(Conversation { peer, notes: self.notes })
    }

    /// The connection before TLS: for what comes ahead of a ClientHello, such as PostgreSQL's
    /// SSLRequest.
    pub fn tcp(&mut self) -> &mut TcpStream {
        &mut self.tcp
    }

    /// Ends with a RST.
    pub fn reset(self) {
        reset_at_close(&self.tcp);
    }
}

/// A connection that is open.
pub struct Conversation {
    /// The origin's end.
    pub peer: Peer,
    notes: Arc<watch::Sender<Seen>>,
}

impl Conversation {
    /// The next request, which is also noted; `None` where the connection ends before one begins.
    pub async fn request(&mut self) -> Option<Message> {
        let request = self.peer.request().await?;
        self.notes.send_modify(|seen| seen.requests.push(request.clone()));
        Some(request)
    }
}
