//! Sessions of one load of TLS settings, resumed only while their certificates would be accepted.
//!
//! A resumed handshake has no certificate, so rustls verifies none. Therefore the chain that a session
//! was verified with is stored with it, and verified again before the session is offered.

use super::verify::Verifier;
use parking_lot::Mutex;
use rustls::{
    ClientConfig, NamedGroup,
    client::{ClientSessionStore, Resumption, Tls12ClientSessionValue, Tls13ClientSessionValue},
    pki_types::{CertificateDer, ServerName, UnixTime},
};
use std::{
    collections::VecDeque,
    fmt::{self, Debug, Formatter},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

/// The most true names whose sessions are kept: an alias has one at a time, and one for each failover target.
const SERVERS: usize = 16;

/// TLS 1.3 tickets kept for each of them.
const TICKETS: usize = 8;

/// The sessions of all connections that were made with one load of TLS settings.
pub(super) struct Sessions {
    verifier: Arc<Verifier>,
    /// The oldest is first.
    servers: Mutex<VecDeque<Server>>,
}

/// What is remembered about one true name.
struct Server {
    name: ServerName<'static>,
    group: Option<NamedGroup>,
    tls12: Option<(Tls12ClientSessionValue, Arc<Chain>)>,
    tls13: VecDeque<(Tls13ClientSessionValue, Arc<Chain>)>,
    /// The one of the latest connection.
    chain: Option<Arc<Chain>>,
}

/// The verified certificates of a server.
struct Chain {
    certificates: Vec<CertificateDer<'static>>,
    /// The last second in which they were accepted: within a second, the result does not change.
    accepted: AtomicU64,
}

impl Sessions {
    pub(super) fn new(verifier: Arc<Verifier>) -> Self {
        Self { verifier, servers: Mutex::default() }
    }

    /// A configuration for one connection, with a store that gets the verified certificates.
    ///
    /// Each connection has its own store: rustls passes the server name of a session to it, but not the connection,
    /// and two addresses of one name may have different certificates.
    pub(super) fn attend(self: &Arc<Self>, config: &ClientConfig) -> (ClientConfig, Arc<Visit>) {
        let visit = Arc::new(Visit { sessions: self.clone(), state: Mutex::default() });
        let mut config = config.clone();
        config.resumption = Resumption::store(visit.clone());
        (config, visit)
    }

    fn with<T>(&self, name: &ServerName<'_>, look: impl FnOnce(&mut Server) -> T) -> Option<T> {
        self.servers.lock().iter_mut().find(|server| server.name == *name).map(look)
    }

    fn edit<T>(&self, name: ServerName<'static>, edit: impl FnOnce(&mut Server) -> T) -> T {
        let mut servers = self.servers.lock();
        if let Some(server) = servers.iter_mut().find(|server| server.name == name) {
            return edit(server);
        }
        if servers.len() == SERVERS {
            servers.pop_front();
        }
        let mut server =
            Server { name, group: None, tls12: None, tls13: VecDeque::new(), chain: None };
        let edited = edit(&mut server);
        servers.push_back(server);
        edited
    }

    /// The chain of these certificates. All sessions that were verified with them share it.
    fn chain(&self, name: &ServerName<'static>, certificates: &[CertificateDer<'_>]) -> Arc<Chain> {
        self.edit(name.clone(), |server| {
            let chains = server.tls13.iter().map(|(_, chain)| chain);
            let mut chains = chains.chain(server.tls12.iter().map(|(_, chain)| chain));
            let known = server
                .chain
                .iter()
                .chain(&mut chains)
                .find(|chain| chain.certificates == certificates);
            let chain = known.cloned().unwrap_or_else(|| {
                let certificates = certificates.iter().map(|it| it.clone().into_owned()).collect();
                Arc::new(Chain { certificates, accepted: AtomicU64::new(0) })
            });
            server.chain = Some(chain.clone());
            chain
        })
    }

    fn keep(&self, session: Session, chain: Arc<Chain>) {
        match session {
            Session::Tls12(name, value) => {
                self.edit(name, |server| server.tls12 = Some((value, chain)));
            }
            Session::Tls13(name, value) => self.edit(name, |server| {
                if server.tls13.len() == TICKETS {
                    server.tls13.pop_front();
                }
                server.tls13.push_back((value, chain));
            }),
        }
    }

    /// Whether the chain would be accepted in a full handshake now.
    fn accepts(&self, chain: &Chain, name: &ServerName<'_>) -> bool {
        let now = UnixTime::now();
        if chain.accepted.load(Relaxed) == now.as_secs() {
            return true;
        }
        let Some((leaf, intermediates)) = chain.certificates.split_first() else { return false };
        let accepted = self.verifier.verify(leaf, intermediates, name, now).is_ok();
        if accepted {
            chain.accepted.store(now.as_secs(), Relaxed);
        }
        accepted
    }
}

/// Without the sessions, which are long and secret.
impl Debug for Sessions {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sessions").finish_non_exhaustive()
    }
}

/// The session store of one connection.
#[derive(Debug)]
pub(super) struct Visit {
    sessions: Arc<Sessions>,
    state: Mutex<Verification>,
}

enum Verification {
    /// The handshake has not finished. Sessions that the server has issued already wait for it.
    Pending(Vec<Session>),
    /// The certificates are verified, in this handshake or in the resumed one.
    Done(Arc<Chain>),
}

enum Session {
    Tls12(ServerName<'static>, Tls12ClientSessionValue),
    Tls13(ServerName<'static>, Tls13ClientSessionValue),
}

impl Visit {
    /// The handshake has finished; these are the server's verified certificates.
    pub(super) fn verified(&self, name: &ServerName<'static>, certificates: &[CertificateDer<'_>]) {
        let chain = self.sessions.chain(name, certificates);
        let before = std::mem::replace(&mut *self.state.lock(), Verification::Done(chain.clone()));
        if let Verification::Pending(sessions) = before {
            sessions.into_iter().for_each(|it| self.sessions.keep(it, chain.clone()));
        }
    }

    fn issued(&self, session: Session) {
        let chain = match &mut *self.state.lock() {
            // A server can send only a few sessions before it is verified.
            Verification::Pending(sessions) if sessions.len() < TICKETS => {
                return sessions.push(session);
            }
            Verification::Pending(_) => return,
            Verification::Done(chain) => chain.clone(),
        };
        self.sessions.keep(session, chain);
    }
}

impl ClientSessionStore for Visit {
    fn set_kx_hint(&self, name: ServerName<'static>, group: NamedGroup) {
        self.sessions.edit(name, |server| server.group = Some(group));
    }

    fn kx_hint(&self, name: &ServerName<'_>) -> Option<NamedGroup> {
        self.sessions.with(name, |server| server.group).flatten()
    }

    fn set_tls12_session(&self, name: ServerName<'static>, value: Tls12ClientSessionValue) {
        self.issued(Session::Tls12(name, value));
    }

    fn tls12_session(&self, name: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        let (value, chain) = self.sessions.with(name, |server| server.tls12.clone()).flatten()?;
        // Without the lock, because verifying takes a while.
        self.sessions.accepts(&chain, name).then_some(value)
    }

    fn remove_tls12_session(&self, name: &ServerName<'static>) {
        self.sessions.with(name, |server| server.tls12 = None);
    }

    fn insert_tls13_ticket(&self, name: ServerName<'static>, value: Tls13ClientSessionValue) {
        self.issued(Session::Tls13(name, value));
    }

    fn take_tls13_ticket(&self, name: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        loop {
            let (value, chain) =
                self.sessions.with(name, |server| server.tls13.pop_back()).flatten()?;
            if self.sessions.accepts(&chain, name) {
                return Some(value);
            }
        }
    }
}

impl Default for Verification {
    fn default() -> Self {
        Verification::Pending(Vec::new())
    }
}

impl Debug for Verification {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Verification::Pending(_) => "Pending",
            Verification::Done(_) => "Done",
        })
    }
}
