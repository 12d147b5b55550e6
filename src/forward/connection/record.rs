//! Metrics and access log of a connection whose protocol has no requests.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use tokio::time::Instant;

use super::super::{
    http::Problem,
    record::explain,
    tunnel::{self, Side, Traffic},
};
use crate::{
    connect::ConnectError,
    fault::{Fault, ProxyErrorType},
    telemetry::{AliasMetrics, ConnectionAccess, RetryReason},
    tls::{Alpn, TlsError},
    upstream::{Alias, Generation, Link},
};

/// One connection. Its line in the access log is written when this is dropped.
pub(super) struct Record {
    alias: Arc<Alias>,
    worker: usize,
    started: Instant,
    generation: Option<Arc<Generation>>,
    endpoint: Option<SocketAddr>,
    tls_version: &'static str,
    connect_time: Option<Duration>,
    retries: u32,
    traffic: Arc<Traffic>,
    /// The bytes that are in the metrics already: from the client, and to it.
    counted: (u64, u64),
    error: Option<ProxyErrorType>,
    end: &'static str,
}

/// How a connection ended.
#[derive(Debug)]
pub(super) enum End {
    /// Both sides have closed.
    Closed,
    /// The client left before anything was copied, or its TLS handshake failed.
    Left,
    /// A side broke off.
    Broken(Side, io::Error),
    /// Nothing moved for `timeouts.idle`.
    Idle,
    /// One side had closed, and the other was idle for too long.
    HalfClosed,
    /// The alias leads elsewhere, and `on_change` says that it ends.
    Moved,
    /// The proxy has ended.
    Shutdown,
}

impl End {
    /// Of a tunnel; `None` of one that was cut.
    pub(super) fn of_tunnel(end: tunnel::End) -> Option<Self> {
        match end {
            tunnel::End::Closed => Some(Self::Closed),
            tunnel::End::Broken(side, error) => Some(Self::Broken(side, error)),
            tunnel::End::Idle => Some(Self::Idle),
            tunnel::End::HalfClosed => Some(Self::HalfClosed),
            tunnel::End::Killed | tunnel::End::Stopped => None,
        }
    }

    /// The access log's word for it.
    fn as_str(&self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Left | Self::Broken(Side::Client, _) => "client",
            Self::Broken(Side::Target, _) => "target",
            Self::Idle => "idle",
            Self::HalfClosed => "half_closed",
            Self::Moved => "moved",
            Self::Shutdown => "shutdown",
        }
    }
}

impl Record {
    pub(super) fn new(alias: &Arc<Alias>, worker: usize, started: Instant) -> Self {
        Self {
            alias: alias.clone(),
            worker,
            started,
            generation: None,
            endpoint: None,
            tls_version: "",
            connect_time: None,
            retries: 0,
            traffic: Arc::default(),
            counted: (0, 0),
            error: None,
            // A connection is dropped before its end only if its worker ends.
            end: End::Shutdown.as_str(),
        }
    }

    pub(super) fn alias(&self) -> &Arc<Alias> {
        &self.alias
    }

    pub(super) fn worker(&self) -> usize {
        self.worker
    }

    /// Counts what is carried.
    pub(super) fn traffic(&self) -> &Arc<Traffic> {
        &self.traffic
    }

    fn metrics(&self) -> &AliasMetrics {
        &self.alias.worker(self.worker).metrics
    }

    /// Connecting is tried again.
    pub(super) fn retried(&mut self) {
        self.retries += 1;
        self.metrics().retry(RetryReason::Connect);
    }

    /// There is a connection to the target.
    pub(super) fn connected(&mut self, link: &Link) {
        let facts = &link.session.facts;
        self.generation = Some(link.generation().clone());
        self.endpoint = Some(link.endpoint());
        self.tls_version = facts.tls_version.unwrap_or("");
        self.connect_time = Some(facts.tcp_time + facts.tls_time);
    }

    /// No connection to the target could be made; the last attempt was this.
    pub(super) fn attempted(
        &mut self,
        generation: Option<Arc<Generation>>,
        endpoint: Option<SocketAddr>,
    ) {
        (self.generation, self.endpoint) = (generation, endpoint);
    }

    /// It cannot be served.
    pub(super) fn failed(&mut self, fault: &Fault) {
        self.end = "failed";
        self.explain(fault);
    }

    /// It has ended.
    pub(super) fn ended(&mut self, end: End) {
        self.end = end.as_str();
        match end {
            End::Broken(Side::Target, error) => self.target_broke(&error),
            End::Broken(Side::Client, error) => tracing::debug!(%error, "a client broke off"),
            End::Idle | End::HalfClosed => self.broke(ProxyErrorType::ConnectionTimeout),
            End::Closed | End::Left | End::Moved | End::Shutdown => {}
        }
    }

    /// With TLS 1.3, a target that refuses our client certificate says so after the handshake.
    fn target_broke(&mut self, error: &io::Error) {
        let tls = self.generation.as_ref().and_then(|generation| generation.tls());
        let refusal = tls.and_then(|(tls, name)| {
            TlsError::after_handshake(error, name, tls.offer(Alpn::Listed))
        });
        match (refusal, self.endpoint) {
            (Some(source), Some(endpoint)) => {
                self.explain(&ConnectError::Tls { endpoint, source }.into());
            }
            _ => {
                tracing::debug!(%error, "a target broke off");
                self.broke(ProxyErrorType::ConnectionTerminated);
            }
        }
    }

    fn explain(&mut self, fault: &Fault) {
        let generation = self.generation.as_deref();
        let problem = Problem::new(fault, Some(&self.alias), generation);
        explain(&self.alias, generation, self.endpoint, &problem);
        self.broke(problem.error());
    }

    fn broke(&mut self, error: ProxyErrorType) {
        self.error = Some(error);
        self.metrics().error(error);
    }

    /// Adds to the metrics what was carried since the last time.
    pub(super) fn count(&mut self) {
        let now = (self.traffic.bytes_in(), self.traffic.bytes_out());
        let before = std::mem::replace(&mut self.counted, now);
        self.metrics().carried(now.0 - before.0, now.1 - before.1);
    }

    /// Writes a line into the access log.
    pub(super) fn log(&self, end: &'static str) {
        ConnectionAccess {
            alias: &self.alias.config().name,
            true_name: self.generation.as_ref().map_or("", |g| g.true_name().as_str()),
            endpoint: self.endpoint,
            protocol: self.alias.config().protocol.word(),
            end,
            error: self.error.map_or("", ProxyErrorType::as_str),
            bytes_in: self.traffic.bytes_in(),
            bytes_out: self.traffic.bytes_out(),
            duration: self.started.elapsed(),
            upstream: self.connect_time,
            retries: self.retries,
            tls_version: self.tls_version,
        }
        .log();
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.count();
        self.log(self.end);
    }
}
