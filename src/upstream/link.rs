//! From a generation to a connection that serves one client only.

use std::{convert::Infallible, fmt, net::SocketAddr, sync::Arc};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{
    Alias, Generation,
    dial::{Caller, DialRequest, Dialled, count_refusal},
    happy_eyeballs::Progress,
};
use crate::{
    balance::{Endpoint, InFlight},
    config::Role,
    connect::{Deadline, Session, TargetStream, Wire},
    fault::Fault,
    pool::{AcquireError, Counted},
    tls::Alpn,
};

/// A connection to a target that serves one client only. It counts at its endpoint until it is dropped.
pub struct Link {
    /// The connection, verified.
    pub session: Session,
    generation: Arc<Generation>,
    in_use: InUse,
}

/// Keeps a connection counted while it is in use. Unless it has [`ended`](Self::ended), the target is reset: it must
/// not take what it has received for all there is.
pub struct InUse {
    in_flight: InFlight,
    _counted: Counted,
    wire: Arc<Wire>,
    has_ended: bool,
}

/// Who holds a session: what a request to cancel its query must go to.
#[derive(Clone)]
pub struct Holder {
    /// As it was configured when the session began.
    alias: Arc<Alias>,
    generation: Arc<Generation>,
    endpoint: Arc<Endpoint>,
}

impl Holder {
    /// A connection to exactly this endpoint, even if the alias does not lead there any more: made as the session's
    /// was, whatever a reload has changed. `pool.max_connections` does not apply: the session that it is about has
    /// its permit.
    pub async fn link(&self, caller: Caller<'_>) -> Result<Link, Fault> {
        let Self { alias, generation, endpoint } = self;
        let address = endpoint.address();
        let deadline = Deadline::new(Instant::now(), alias.config().timeouts.connect);
        let (destination, alpn) = (generation.destination(), Alpn::Listed);
        let destination = destination.as_ref();
        let dial = DialRequest { alias, caller, generation, destination, alpn, deadline };
        let preamble = dial.preamble();
        let session = dial.attempts(&preamble).one(address, &Progress::default()).await?;
        generation.made(address, &session.wire);
        let counted = alias.connections(address).beyond_limit(caller.worker).opened();
        Ok(Link::new(session, counted, endpoint, generation))
    }

    /// The server has shown its role.
    pub fn mark_role(&self, role: Role) {
        mark_role(&self.endpoint, role);
    }
}

impl Alias {
    /// A connection to one of the generation's endpoints, within the deadline. Endpoints in `tried` are passed
    /// over while there are others.
    pub async fn link(
        self: &Arc<Self>,
        caller: Caller<'_>,
        generation: &Arc<Generation>,
        tried: &[SocketAddr],
        deadline: Deadline,
    ) -> Result<Link, Fault> {
        let now = Instant::now();
        let mut avoided =
            generation.balancer().of_other_role(self.config.postgres.role, tried, now);
        avoided.extend(tried);
        let tried = &avoided[..];
        let picked = generation.balancer().pick(now, &mut fastrand::Rng::new(), tried);
        let endpoint = picked.ok_or(AcquireError::NoEndpoint)?;
        // A client that waits for its connection counts too: many that arrive at once would all see the same load.
        let _waiting = endpoint.begin(now);
        let (destination, alpn) = (generation.destination(), Alpn::Listed);
        let destination = destination.as_ref();
        let dial = DialRequest { alias: self, caller, generation, destination, alpn, deadline };
        match dial.dial(&endpoint, tried, |_| None::<Infallible>).await? {
            Dialled::Kept(never) => match never {},
            Dialled::New(session, counted, endpoint) => {
                let link = Link::new(session, counted, &endpoint, generation);
                // One whose certificate is wrong must not look well for its greeting.
                if !link.awaits_tls() {
                    endpoint.succeeded();
                }
                Ok(link)
            }
        }
    }
}

impl fmt::Debug for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Holder")
            .field("generation", &self.generation)
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

impl Link {
    fn new(
        session: Session,
        counted: Counted,
        endpoint: &Arc<Endpoint>,
        generation: &Arc<Generation>,
    ) -> Self {
        let in_flight = endpoint.begin(Instant::now());
        let wire = session.wire.clone();
        let in_use = InUse { in_flight, _counted: counted, wire, has_ended: false };
        Self { session, generation: generation.clone(), in_use }
    }

    /// Whether its TLS has yet to begin.
    pub fn awaits_tls(&self) -> bool {
        self.generation.tls().is_some() && self.session.facts.tls_version.is_none()
    }

    /// Completes TLS and verifies the target, where the protocol has that begin after its greeting.
    pub async fn secure(
        self,
        alias: &Alias,
        worker: usize,
        deadline: Deadline,
    ) -> Result<Self, Fault> {
        let Self { session, generation, in_use } = self;
        let metrics = &alias.worker(worker).metrics;
        let endpoint = in_use.in_flight.endpoint();
        let Some(identity) = generation.identity(Alpn::Listed) else {
            return Ok(Self { session, generation, in_use });
        };
        match session.verify(endpoint.address(), identity, deadline).await {
            Ok(session) => {
                metrics.handshaken(&session.facts);
                endpoint.succeeded();
                Ok(Self { session, generation, in_use })
            }
            Err(fault) => {
                count_refusal(&fault, metrics);
                alias.attempt_failed(&generation, endpoint, &fault);
                Err(fault)
            }
        }
    }

    /// Who is at its other end.
    pub fn holder(&self, alias: &Arc<Alias>) -> Holder {
        let endpoint = self.in_use.in_flight.endpoint().clone();
        Holder { alias: alias.clone(), generation: self.generation.clone(), endpoint }
    }

    /// The endpoint.
    pub fn endpoint(&self) -> SocketAddr {
        self.in_use.in_flight.endpoint().address()
    }

    /// Cancelled when the connection is to be cut.
    pub fn cut(&self) -> CancellationToken {
        self.session.wire.take_over()
    }

    /// The byte stream, and what has to be held while it is in use.
    pub fn into_stream(self) -> (TargetStream, InUse) {
        (self.session.stream, self.in_use)
    }

    /// The server has shown its role.
    pub fn mark_role(&self, role: Role) {
        mark_role(self.in_use.in_flight.endpoint(), role);
    }

    /// Cancelled when a session on it should end between messages.
    pub fn draining(&self) -> CancellationToken {
        self.generation.draining()
    }

    /// The generation that it belongs to.
    pub fn generation(&self) -> &Arc<Generation> {
        &self.generation
    }
}

impl InUse {
    /// Both sides have closed.
    pub fn ended(mut self) {
        self.has_ended = true;
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        if !self.has_ended {
            self.wire.reset_on_close();
        }
    }
}

fn mark_role(endpoint: &Endpoint, role: Role) {
    match role {
        Role::Any => {}
        Role::Primary => endpoint.mark_role(true, Instant::now()),
        Role::Standby => endpoint.mark_role(false, Instant::now()),
    }
}
