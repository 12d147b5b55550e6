//! Dials one of several endpoints: Happy Eyeballs, permits and counts, under one deadline. Nothing here depends on
//! the protocol that follows.

use std::{iter, net::SocketAddr, sync::Arc};

use arc_swap::ArcSwap;
use tokio::time::Instant;

use super::{
    Alias, Generation,
    happy_eyeballs::{Because, Progress, Won, race},
};
use crate::{
    balance::Endpoint,
    config::Timeouts,
    connect::{
        self, AddressPolicy, ConnectError, ConnectRequest, Deadline, Destination, Identity, Secret,
        Session, Via,
    },
    fault::Fault,
    pool::{AcquireError, Counted, Room},
    protocol::Opening,
    proxy_header::{self, Addresses},
    telemetry::AliasMetrics,
    tls::{Alpn, TlsError},
};

/// The most addresses of a host that are tried.
const MAX_ADDRESSES: usize = 8;

/// What every attempt of one dial has in common.
pub struct Attempts<'a> {
    /// Which addresses may be dialled.
    pub policy: &'a ArcSwap<AddressPolicy>,
    /// The identity to verify; none on plaintext.
    pub identity: Option<Identity<'a>>,
    /// The keys that concern a connection.
    pub timeouts: &'a Timeouts,
    /// What is said before TLS, if anything.
    pub opening: Option<Opening>,
    /// The deadline for a connection.
    pub deadline: Deadline,
    /// The proxy to go through.
    pub via: Option<Via<'a>>,
    /// The PROXY header to send.
    pub header: Option<&'a [u8]>,
    /// Whose attempts they are.
    pub metrics: &'a AliasMetrics,
}

impl Attempts<'_> {
    /// A session with the first of these addresses that connects, trying each in turn; and that address. The
    /// error is that of the first to fail.
    pub async fn any_of(
        &self,
        first: SocketAddr,
        others: impl Iterator<Item = SocketAddr>,
    ) -> Result<(Session, SocketAddr), Fault> {
        let mut others = others.take(MAX_ADDRESSES - 1);
        let dial = async |address: SocketAddr, progress: Progress| {
            Ok((self.one(address, &progress).await?, address))
        };
        match race(first, |_| others.next(), dial).await {
            Ok(won) => Ok(won.connection),
            Err(failures) => Err(failures.first()),
        }
    }

    /// A session with one address.
    pub(super) async fn one(
        &self,
        endpoint: SocketAddr,
        progress: &Progress,
    ) -> Result<Session, Fault> {
        let session = self.connect(endpoint, progress).await;
        match &session {
            Ok(session) => self.metrics.connected(&session.facts),
            Err(fault) => count_refusal(fault, self.metrics),
        }
        // A reload may have made it stricter in the meantime.
        let policy = self.policy.load();
        let behind = self.via.and_then(|via| via.destination.address());
        for address in iter::once(endpoint).chain(behind) {
            policy.check(address).map_err(ConnectError::Denied)?;
        }
        session
    }

    async fn connect(&self, endpoint: SocketAddr, progress: &Progress) -> Result<Session, Fault> {
        let policy = self.policy.load_full();
        let (keepalive, deadline, header) = (self.timeouts.keepalive, self.deadline, self.header);
        let via = self.via;
        let request =
            ConnectRequest { endpoint, policy: &policy, keepalive, deadline, via, header };
        let mut opened = connect::open(&request).await?;
        progress.opened();
        opened.reach_target(&request).await?;
        if let Some(opening) = self.opening.clone() {
            opened.negotiate(opening, deadline).await?;
        }
        opened.verify(self.identity, deadline).await
    }
}

/// Whom a connection to a target is made for.
#[derive(Clone, Copy)]
pub struct Caller<'a> {
    /// The worker that serves it.
    pub worker: usize,
    /// The client's connection; none for a call by the library.
    pub client: Option<&'a Arc<Addresses>>,
}

/// Counts an address that is not allowed, and records the expiry of a certificate that was not accepted.
pub(super) fn count_refusal(fault: &Fault, metrics: &AliasMetrics) {
    match fault.cause() {
        Some(ConnectError::Denied(_)) => metrics.address_refused(),
        Some(ConnectError::Tls { source: TlsError::Certificate(failure), .. }) => {
            metrics.certificate(failure.not_after);
        }
        _ => {}
    }
}

/// A connection that a request to an alias, or a tunnel, needs.
#[derive(Clone, Copy)]
pub(super) struct DialRequest<'a> {
    pub(super) alias: &'a Arc<Alias>,
    pub(super) caller: Caller<'a>,
    pub(super) generation: &'a Arc<Generation>,
    /// What a proxy is asked for, as it was when the dial began.
    pub(super) destination: Option<&'a Arc<Destination>>,
    pub(super) alpn: Alpn,
    pub(super) deadline: Deadline,
}

/// What is sent to a proxy and to the target before the target's protocol begins.
pub(super) struct Preamble {
    /// The PROXY header.
    header: Option<Vec<u8>>,
    /// The proxy of `via`.
    proxy: Option<String>,
    authorization: Option<Arc<Secret>>,
}

/// The result of a dial.
#[allow(clippy::large_enum_variant, reason = "it is taken apart at once")]
pub(super) enum Dialled<T> {
    /// A new connection, to this endpoint.
    New(Session, Counted, Arc<Endpoint>),
    /// One that was kept and became free while `pool.max_connections` allowed no new one.
    Kept(T),
}

impl DialRequest<'_> {
    /// A session with `first`, or with another endpoint where that one takes long. `kept` gives a connection
    /// to an endpoint that is there already, if one has become free.
    pub(super) async fn dial<T>(
        &self,
        first: &Arc<Endpoint>,
        tried: &[SocketAddr],
        kept: impl Fn(&Arc<Endpoint>) -> Option<T>,
    ) -> Result<Dialled<T>, Fault> {
        let mut tried = tried.to_vec();
        let mut beside = false;
        // `retry` decides whether a failed attempt is repeated, here or elsewhere.
        let next = |because| match because {
            Because::Slow if !std::mem::replace(&mut beside, true) => {
                self.another(&mut tried, first)
            }
            _ => None,
        };
        let dial = async |endpoint: Arc<Endpoint>, progress: Progress| {
            // The caller already counts as in flight at the first endpoint.
            let _waiting = (!Arc::ptr_eq(&endpoint, first)).then(|| endpoint.begin(Instant::now()));
            self.one(endpoint, &progress, &kept).await
        };
        match race(first.clone(), next, dial).await {
            Ok(Won { connection, overtaken }) => {
                // Nothing waits for the slow attempts to fail, so being slow counts as a failure: otherwise a
                // share of all requests would keep paying for a black hole.
                let late = "another endpoint connected first";
                for endpoint in overtaken {
                    self.alias.endpoint_failed(self.generation, &endpoint, late);
                }
                Ok(connection)
            }
            Err(failures) => Err(failures.last),
        }
    }

    /// An endpoint other than `endpoint`, which is being tried, and those tried before.
    pub(super) fn another(
        &self,
        tried: &mut Vec<SocketAddr>,
        endpoint: &Arc<Endpoint>,
    ) -> Option<Arc<Endpoint>> {
        tried.push(endpoint.address());
        let mut rng = fastrand::Rng::new();
        let picked = self.generation.balancer().pick(Instant::now(), &mut rng, tried);
        picked.filter(|picked| !tried.contains(&picked.address()))
    }

    /// What comes before the target's protocol.
    pub(super) fn preamble(&self) -> Preamble {
        let config = self.alias.config();
        let client = self.caller.client.map(|client| &**client);
        let version = config.proxy_protocol.send;
        Preamble {
            header: version.map(|version| proxy_header::encode(version, client)),
            proxy: config.via.as_ref().map(|via| via.url.to_string()),
            authorization: self.alias.credentials.current(),
        }
    }

    /// What its attempts have in common.
    pub(super) fn attempts<'b>(&'b self, preamble: &'b Preamble) -> Attempts<'b> {
        let config = self.alias.config();
        // Not that of the alias' settings: a reload may have changed them for the one and not for the other.
        let opening = self.generation.opening();
        let defers_tls = opening.as_ref().is_some_and(Opening::defers_tls);
        Attempts {
            policy: &self.alias.policy,
            identity: self.generation.identity(self.alpn).filter(|_| !defers_tls),
            timeouts: &config.timeouts,
            opening,
            deadline: self.deadline,
            via: preamble.proxy.as_deref().zip(self.destination).map(|(proxy, destination)| Via {
                proxy,
                destination,
                authorization: preamble.authorization.as_deref(),
            }),
            header: preamble.header.as_deref(),
            metrics: &self.alias.worker(self.caller.worker).metrics,
        }
    }

    async fn one<T>(
        &self,
        endpoint: Arc<Endpoint>,
        progress: &Progress,
        kept: impl Fn(&Arc<Endpoint>) -> Option<T>,
    ) -> Result<Dialled<T>, Fault> {
        let address = endpoint.address();
        let config = self.alias.config();
        let worker = self.alias.worker(self.caller.worker);
        let connections = self.alias.connections(address);
        // An idle connection of another worker counts too: it can be closed to make room.
        let make_way = || {
            let siblings = self.alias.workers().iter();
            siblings.map(|sibling| &sibling.pool).any(|pool| pool.evict(address));
        };
        let room = worker.pool.room(&connections, || kept(&endpoint), make_way);
        let permit = match self.deadline.within(room).await {
            Some(Room::Free(permit)) => permit,
            Some(Room::Kept(kept)) => return Ok(Dialled::Kept(kept)),
            None => {
                let limit = config.pool.max_connections;
                return Err(AcquireError::ConnectionLimit { endpoint: address, limit }.into());
            }
        };
        let preamble = self.preamble();
        match self.attempts(&preamble).one(address, progress).await {
            Ok(session) => {
                self.generation.made(address, &session.wire);
                Ok(Dialled::New(session, permit.opened(), endpoint))
            }
            Err(fault) => {
                self.alias.attempt_failed(self.generation, &endpoint, &fault);
                Err(fault)
            }
        }
    }
}

impl Alias {
    /// Counts an attempt that has failed, if that was the endpoint's fault.
    pub(super) fn attempt_failed(
        &self,
        generation: &Generation,
        endpoint: &Endpoint,
        fault: &Fault,
    ) {
        if fault.is_of_endpoint() {
            endpoint.distrust(matches!(fault.cause(), Some(ConnectError::Tls { .. })));
            self.endpoint_failed(generation, endpoint, &fault.to_string());
        }
    }

    /// Counts a transport failure, and logs if it ejects the endpoint.
    pub(super) fn endpoint_failed(
        &self,
        generation: &Generation,
        endpoint: &Endpoint,
        error: &str,
    ) {
        if let Some(ejected) = endpoint.failed(Instant::now()) {
            tracing::warn!(
                alias = self.config.name,
                true_name = generation.true_name().as_str(),
                endpoint = %endpoint.address(),
                for_seconds = ejected.as_secs_f64(),
                error,
                "endpoint ejected",
            );
        }
    }
}
