//! The state of an alias that outlives configurations.

use std::{collections::HashMap, net::SocketAddr, sync::Arc};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::{active::Active, budget::Budget, link::Holder};
use crate::{
    config,
    limit::Limit,
    pool::{EndpointConnections, Pool},
    protocol::postgres::CancelKeys,
    telemetry::{AliasMetrics, AliasSeries, Failures, RequestFailure},
};

/// More sessions than one process serves.
const MAX_CANCEL_KEYS: usize = 65_536;

/// An alias' state, without its settings. Belongs to the name: a reload keeps it.
pub struct AliasState {
    pub(super) series: Arc<AliasSeries>,
    pub(super) workers: Vec<Worker>,
    pub(super) budget: Budget,
    pub(super) requests: Limit,
    pub(super) failures: Failures<RequestFailure>,
    /// Which of the targets requests go to.
    pub(super) active: Active,
    /// Of PostgreSQL sessions.
    pub(super) cancel_keys: Arc<CancelKeys<Holder>>,
    connections: Mutex<Connections>,
}

/// The connections to each endpoint, over all configurations.
struct Connections {
    by_endpoint: HashMap<SocketAddr, Arc<EndpointConnections>>,
    /// `pool.max_connections` of the current settings.
    limit: usize,
}

/// A worker's own part.
pub struct Worker {
    /// Its connections.
    pub pool: Pool,
    /// Its part of the alias' series.
    pub metrics: AliasMetrics,
}

impl AliasState {
    /// For a new alias, with its first settings.
    pub(super) fn new(config: &config::Alias, workers: usize) -> Arc<Self> {
        let series = AliasSeries::new(&config.name, workers);
        series.set_protocol(config.protocol);
        let worker = |worker| Worker {
            pool: Pool::new(&config.pool, worker, workers),
            metrics: AliasMetrics::new(&series, worker),
        };
        let now = Instant::now();
        Arc::new(Self {
            workers: (0..workers).map(worker).collect(),
            budget: Budget::new(config.retry.budget, workers, now),
            requests: Limit::new(config.limits.requests),
            failures: Failures::default(),
            active: Active::new(now),
            cancel_keys: Arc::new(CancelKeys::new(MAX_CANCEL_KEYS)),
            connections: Mutex::new(Connections {
                by_endpoint: HashMap::new(),
                limit: config.pool.max_connections,
            }),
            series,
        })
    }

    /// Applies other settings.
    pub(super) fn configure(&self, config: &config::Alias) {
        self.series.set_protocol(config.protocol);
        self.budget.set_share(config.retry.budget);
        self.requests.resize(config.limits.requests);
        for worker in &self.workers {
            worker.pool.configure(&config.pool, self.workers.len());
        }
        let mut connections = self.connections.lock();
        connections.limit = config.pool.max_connections;
        for connections in connections.by_endpoint.values() {
            connections.resize(config.pool.max_connections);
        }
    }

    /// The count of the connections to an endpoint.
    pub(super) fn connections(&self, endpoint: SocketAddr) -> Arc<EndpointConnections> {
        let mut connections = self.connections.lock();
        let (limit, workers) = (connections.limit, self.workers.len());
        let new =
            || Arc::new(EndpointConnections::new(self.series.endpoint(endpoint), limit, workers));
        connections.by_endpoint.entry(endpoint).or_insert_with(new).clone()
    }

    /// Forgets the endpoints that neither stay nor have connections.
    pub(super) fn forget_endpoints(&self, stays: impl Fn(SocketAddr) -> bool) {
        self.series.retain_endpoints(&stays);
        self.connections
            .lock()
            .by_endpoint
            .retain(|endpoint, connections| connections.series().active() > 0 || stays(*endpoint));
    }
}
