//! A connection from a client to an alias whose protocol has no requests: it gets a connection to the target of its
//! own, and then bytes are copied both ways.

mod record;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, interval_at, sleep},
};
use tokio_util::sync::CancellationToken;

use super::tunnel::{Side, carry};
use crate::{
    config::{NEVER, RetryOn},
    connect::Deadline,
    fault::{Blame, Fault},
    proxy_header::Addresses,
    stream::{ByteStream, Prefixed, Socket, receive},
    upstream::{Alias, Caller, Generation, Link},
};
use record::{End, Record};

/// How often the bytes copied are added to the metrics.
const UPKEEP: Duration = Duration::from_secs(10);

/// How often an open connection gets a line in the access log.
const STILL_OPEN: Duration = Duration::from_secs(3600);

/// How often it is checked whether a client that waits for its target is still there.
const CLIENT_CHECK: Duration = Duration::from_millis(100);

/// How long connecting continues for a client that has closed its side. It may be gone, or have sent all it has to
/// send and wait for the response: this shows only when something is sent to it.
const HALF_CLOSED: Duration = Duration::from_secs(2);

/// A client's connection, from the moment its alias is known.
pub struct Connection {
    record: Record,
    client: Arc<Addresses>,
    /// Cancelled when the proxy has ended.
    stopped: CancellationToken,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Connection {
    /// Begins to serve a connection that was accepted at `started`; `None` if `limits.requests` is reached.
    pub fn begin(
        alias: &Arc<Alias>,
        worker: usize,
        client: &Arc<Addresses>,
        started: Instant,
        stopped: CancellationToken,
    ) -> Option<Self> {
        let mut record = Record::new(alias, worker, started);
        match alias.admit() {
            Ok(permit) => {
                let client = client.clone();
                Some(Self { record, client, stopped, _permit: permit })
            }
            Err(error) => {
                record.failed(&error.into(), None);
                None
            }
        }
    }

    /// Connects to the alias' target. If that fails, tries another endpoint or the next target, all within
    /// `timeouts.connect`. `None` if no connection can be made, or if the client leaves before.
    pub async fn connect(&mut self, client: Option<&Socket>) -> Option<Link> {
        let mut attempted = None;
        let result = {
            // Boxed: a connection may live for days, and would keep the room for this future.
            let connected = Box::pin(self.try_until_connected(&mut attempted));
            tokio::select! {
                biased;
                result = connected => Some(result),
                () = left(client) => None,
            }
        };
        match result {
            Some(Ok(link)) => {
                self.record.connected(&link);
                Some(link)
            }
            Some(Err(fault)) => {
                self.record.failed(&fault, attempted);
                None
            }
            None => {
                self.record.ended(End::Left);
                None
            }
        }
    }

    /// On failure, `attempted` is the generation of the last attempt.
    async fn try_until_connected(
        &mut self,
        attempted: &mut Option<Arc<Generation>>,
    ) -> Result<Link, Fault> {
        let (alias, worker) = (self.record.alias().clone(), self.record.worker());
        let config = alias.config();
        let now = Instant::now();
        let deadline = Deadline::new(now, config.timeouts.connect);
        alias.deposit(worker, now);
        let mut generation = alias.target().await?;
        let mut tried: Vec<SocketAddr> = Vec::new();
        let mut retries = 0;
        loop {
            *attempted = Some(generation.clone());
            let caller = Caller { worker, client: Some(&self.client) };
            let link = alias.link(caller, &generation, &tried, deadline).await;
            // The true name has changed meanwhile: nothing was sent to the old one, and nothing will be.
            // (An alias that a reload has removed has no newer one.)
            if generation.is_retired() {
                let newer = alias.target().await?;
                if !Arc::ptr_eq(&newer, &generation) {
                    generation = newer;
                    continue;
                }
            }
            let fault = match link {
                Ok(link) => return Ok(link),
                Err(fault) => fault,
            };
            tried.extend(fault.endpoint());
            if matches!(fault.blame(), Blame::Endpoint | Blame::Target) {
                alias.failed_at(&generation, &tried);
            }
            let is_last_next = retries + 1 >= config.retry.attempts;
            let behind = if is_last_next { alias.behind(&generation).await } else { None };
            let target = match behind {
                Some(target) => target,
                None => alias.target().await?,
            };
            let elsewhere = !Arc::ptr_eq(&target, &generation)
                || target.balancer().has_untried(Instant::now(), &tried);
            let may_retry = matches!(fault.blame(), Blame::Connection | Blame::Endpoint)
                && config.retry.when.contains(&RetryOn::Connect)
                && retries < config.retry.attempts;
            if !(may_retry && elsewhere && !deadline.is_over() && alias.withdraw()) {
                alias.refresh();
                return Err(fault);
            }
            retries += 1;
            self.record.retried();
            generation = target;
        }
    }

    /// Waits for the target's first bytes while the client has sent nothing. Empty if the target has closed its
    /// side; `None` if the connection is to end.
    pub async fn first_bytes(&mut self, link: &mut Link) -> Option<Bytes> {
        let idle = self.record.alias().config().timeouts.idle;
        let moved = link.cut();
        let mut bytes = BytesMut::new();
        let end = tokio::select! {
            biased;
            () = cut(&moved, &self.stopped) => self.cut_by(&moved),
            read = receive(&mut link.session.stream, &mut bytes) => match read {
                Ok(_) => return Some(bytes.freeze()),
                Err(error) => End::Broken(Side::Target, error),
            },
            () = sleep(idle), if idle != NEVER => End::Idle,
        };
        self.record.ended(end);
        None
    }

    /// Copies bytes both ways until the connection ends. Returns whether both sides have closed; if not, the client
    /// is to be reset. `early` was read from the target before.
    pub async fn carry<D: ByteStream>(mut self, client: D, link: Link, early: Bytes) -> bool {
        let idle = self.record.alias().config().timeouts.idle;
        let moved = link.cut();
        let (stream, in_use) = link.into_stream();
        let target = Prefixed::new(early, stream);
        let traffic = self.record.traffic().clone();
        let end = {
            let carried = carry(client, target, idle, cut(&moved, &self.stopped), &traffic);
            let upkeep = async {
                let mut ticks = interval_at(Instant::now() + UPKEEP, UPKEEP);
                let mut next_line = Instant::now() + STILL_OPEN;
                loop {
                    ticks.tick().await;
                    self.record.count();
                    if Instant::now() >= next_line {
                        self.record.log("open");
                        next_line += STILL_OPEN;
                    }
                }
            };
            tokio::select! {
                end = carried => Some(end),
                () = upkeep => None,
            }
        };
        let end = match end {
            Some(end) => End::of_tunnel(end),
            None => None,
        };
        let end = end.unwrap_or_else(|| self.cut_by(&moved));
        let has_closed = matches!(end, End::Closed);
        if has_closed {
            in_use.ended();
        }
        self.record.ended(end);
        has_closed
    }

    /// The client left before anything was copied, or its TLS handshake failed.
    pub fn left(mut self) {
        self.record.ended(End::Left);
    }

    /// Why the connection was cut.
    fn cut_by(&self, moved: &CancellationToken) -> End {
        if moved.is_cancelled() { End::Moved } else { End::Shutdown }
    }
}

/// Waits until a client has left: it has reset its connection, or has closed its side for [`HALF_CLOSED`].
///
/// What it has sent stays in the kernel until there is somebody to send it to, so its end cannot be read: the kernel is
/// polled for it.
async fn left(client: Option<&Socket>) {
    let Some(client) = client else { return std::future::pending().await };
    let mut closed = None;
    loop {
        sleep(CLIENT_CHECK).await;
        if client.is_closed() {
            return;
        }
        if client.has_peer_left()
            && closed.get_or_insert_with(Instant::now).elapsed() >= HALF_CLOSED
        {
            return;
        }
    }
}

/// Waits until the connection is to be cut.
async fn cut(moved: &CancellationToken, stopped: &CancellationToken) {
    tokio::select! {
        () = moved.cancelled() => {}
        () = stopped.cancelled() => {}
    }
}
