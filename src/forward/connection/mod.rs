//! A connection from a client to an alias whose protocol has no requests: it gets a connection to the target of its
//! own, and then bytes are copied both ways.

mod record;
mod session;
mod until_quit;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use bytes::BytesMut;
use tokio::{
    sync::OwnedSemaphorePermit,
    time::{Instant, interval_at, sleep},
};
use tokio_util::sync::CancellationToken;

use super::tunnel::{self, Settings, Side, Unwatched, Watch, carry};
use crate::{
    config::{NEVER, RetryOn},
    connect::{Deadline, TargetStream},
    fault::{Blame, Fault},
    protocol::mysql::ClientPackets,
    proxy_header::Addresses,
    stream::{ByteStream, Prefixed, Socket, receive},
    upstream::{Alias, Caller, Generation, Holder, Link},
};
use record::{End, Record};
use until_quit::UntilQuit;

pub use session::{Begun, Ended, close, tell};

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

/// Why there is no connection to the target.
#[derive(Clone, Debug)]
pub enum Unconnected {
    /// None can be made.
    Failed(Fault),
    /// The client has left.
    Left,
}

impl Connection {
    /// Begins to serve a connection that was accepted at `started`.
    pub fn new(
        alias: &Arc<Alias>,
        worker: usize,
        client: &Arc<Addresses>,
        started: Instant,
        stopped: CancellationToken,
    ) -> Self {
        let record = Record::new(alias, worker, started);
        Self { record, client: client.clone(), stopped, _permit: None }
    }

    /// Has it count towards `limits.requests`; fails if that is reached.
    pub fn admit(&mut self) -> Result<(), Fault> {
        match self.record.alias().admit() {
            Ok(permit) => {
                self._permit = permit;
                Ok(())
            }
            Err(error) => {
                let fault = error.into();
                self.record.failed(&fault);
                Err(fault)
            }
        }
    }

    /// Connects to the alias' target. If that fails, tries another endpoint or the next target, all within
    /// `timeouts.connect`. No connection is made if the client leaves before.
    pub async fn connect(&mut self, client: Option<&Socket>) -> Result<Link, Unconnected> {
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
                Ok(link)
            }
            Some(Err(fault)) => {
                self.record.attempted(attempted, fault.endpoint());
                self.record.failed(&fault);
                Err(Unconnected::Failed(fault))
            }
            None => {
                self.record.ended(End::Left);
                Err(Unconnected::Left)
            }
        }
    }

    /// Completes TLS with the target and verifies it, where the protocol has that begin after its greeting, within
    /// `timeouts.connect`.
    pub async fn secure(&mut self, link: Link) -> Result<Link, Fault> {
        let (alias, worker) = (self.record.alias().clone(), self.record.worker());
        let deadline = Deadline::new(Instant::now(), alias.config().timeouts.connect);
        let (generation, endpoint) = (link.generation().clone(), link.endpoint());
        match Box::pin(link.secure(&alias, worker, deadline)).await {
            Ok(link) => {
                self.record.connected(&link);
                Ok(link)
            }
            Err(fault) => {
                if matches!(fault.blame(), Blame::Endpoint | Blame::Target) {
                    alias.failed_at(&generation, &[endpoint], &fault);
                }
                self.record.failed(&fault);
                Err(fault)
            }
        }
    }

    /// Connects to the endpoint that holds another session.
    pub async fn connect_to(&mut self, holder: &Holder) -> Result<Link, Fault> {
        let caller = Caller { worker: self.record.worker(), client: Some(&self.client) };
        match Box::pin(holder.link(caller)).await {
            Ok(link) => {
                self.record.connected(&link);
                Ok(link)
            }
            Err(fault) => {
                self.record.attempted(None, fault.endpoint());
                self.record.failed(&fault);
                Err(fault)
            }
        }
    }

    /// Its alias.
    pub fn alias(&self) -> &Arc<Alias> {
        self.record.alias()
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
                alias.failed_at(&generation, &tried, &fault);
            }
            let is_last_next = retries + 1 >= config.retry.attempts;
            let behind = if is_last_next { alias.behind(&generation).await } else { None };
            let target = match behind {
                Some(target) => target,
                None => alias.target().await?,
            };
            let elsewhere = Alias::is_elsewhere(&target, &generation, &tried, &fault);
            let may_retry = !matches!(fault.blame(), Blame::Client | Blame::Alias)
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

    /// Waits for the target's first bytes while the client has sent nothing. `false` if the connection is to end.
    pub async fn first_bytes(&mut self, link: &mut Link) -> bool {
        if !link.session.early.is_empty() {
            return true;
        }
        let idle = self.record.alias().config().timeouts.idle;
        let moved = link.cut();
        let mut bytes = BytesMut::new();
        let end = tokio::select! {
            biased;
            () = cut(&moved, &self.stopped) => self.cut_by(&moved),
            read = receive(&mut link.session.stream, &mut bytes) => match read {
                Ok(_) => {
                    link.session.early = bytes.freeze();
                    return true;
                }
                Err(error) => End::Broken(Side::Target, error),
            },
            () = sleep(idle), if idle != NEVER => End::Idle,
        };
        self.record.ended(end);
        false
    }

    /// Copies bytes both ways until the connection ends. Returns whether both sides have closed; if not, the client
    /// is to be reset.
    pub async fn carry<D: ByteStream>(self, client: D, link: Link) -> bool {
        self.carry_as(client, link, |stream| stream).await
    }

    /// The same for a MySQL session, which has an end of its own, among the client's packets.
    pub async fn carry_mysql<D: ByteStream>(
        self,
        client: D,
        link: Link,
        packets: ClientPackets,
    ) -> bool {
        self.carry_as(client, link, |stream| UntilQuit::new(stream, packets)).await
    }

    async fn carry_as<D: ByteStream, T: ByteStream>(
        mut self,
        client: D,
        mut link: Link,
        wrap: impl FnOnce(TargetStream) -> T,
    ) -> bool {
        let (moved, stopped) = (link.cut(), self.stopped.clone());
        let early = std::mem::take(&mut link.session.early);
        let (stream, in_use) = link.into_stream();
        let target = Prefixed::new(early, wrap(stream));
        let killed = async {
            cut(&moved, &stopped).await;
            tunnel::End::Killed
        };
        let carried = self.tunnel(client, target, killed, &Unwatched).await;
        let end = End::of_tunnel(carried).unwrap_or_else(|| self.cut_by(&moved));
        let has_closed = matches!(end, End::Closed);
        if has_closed {
            in_use.ended();
        }
        self.record.ended(end);
        has_closed
    }

    /// Runs a tunnel to its end, and keeps its metrics and the access log up to date.
    async fn tunnel<D, U, W>(
        &mut self,
        client: D,
        target: U,
        kill: impl Future<Output = tunnel::End>,
        watch: &W,
    ) -> tunnel::End
    where
        D: ByteStream,
        U: ByteStream,
        W: Watch,
    {
        let idle = self.record.alias().config().timeouts.idle;
        let traffic = self.record.traffic().clone();
        let settings = Settings { idle, traffic: &traffic, watch };
        let carried = carry(client, target, kill, settings);
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
            end = carried => end,
            () = upkeep => tunnel::End::Killed,
        }
    }

    /// It cannot be served, although there is a connection to the target, or because of what the client sent.
    pub fn failed(&mut self, fault: &Fault) {
        self.record.failed(fault);
    }

    /// A side has closed its connection before a session began.
    pub fn ended_by(&mut self, side: Side) {
        self.record.ended(match side {
            Side::Client => End::Left,
            Side::Target => End::Closed,
        });
    }

    /// Counts what was sent to the target and to the client before a session began.
    pub fn sent(&self, (to_target, to_client): (u64, u64)) {
        self.record.traffic().add(to_target, to_client);
    }

    /// The client left before anything was copied, or its TLS handshake failed.
    pub fn left(&mut self) {
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
