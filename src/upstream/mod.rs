//! The live alias: its targets in order, what each resolves to now, and connections to them.

mod active;
mod budget;
mod credentials;
mod dial;
mod failover;
mod fault;
mod follow;
mod generation;
mod happy_eyeballs;
mod lease;
mod link;
mod material;
mod registry;
mod state;
mod status;
mod target;
#[cfg(test)]
mod tests;

use std::{net::SocketAddr, sync::Arc};

use arc_swap::ArcSwap;
use tokio::{sync::OwnedSemaphorePermit, time::Instant};

pub use dial::{Attempts, Caller};
pub use generation::Generation;
pub use lease::{Lease, Want};
pub use link::{Holder, InUse, Link};
pub use registry::{Inventory, Registry};
pub use state::{AliasState, Worker};
pub use status::EndpointStatus;
pub use target::{NoTarget, Target, TargetKey};

pub use crate::pool::SendError;
use credentials::ProxyCredentials;
use material::Material;

use crate::{
    config,
    connect::AddressPolicy,
    pool::{EndpointConnections, PoolKey},
    protocol::postgres::CancelKeys,
    telemetry::{AliasSeries, Failures, RequestFailure},
};

/// An alias in one configuration, shared by all workers: its settings, which never change, and the state
/// that outlives them.
pub struct Alias {
    config: Arc<config::Alias>,
    hosts: Vec<String>,
    targets: Vec<Arc<Target>>,
    material: Arc<Material>,
    credentials: Arc<ProxyCredentials>,
    policy: Arc<ArcSwap<AddressPolicy>>,
    state: Arc<AliasState>,
}

impl Alias {
    /// Its requests that fail.
    pub fn failures(&self) -> &Failures<RequestFailure> {
        &self.state.failures
    }

    /// Its settings.
    pub fn config(&self) -> &Arc<config::Alias> {
        &self.config
    }

    /// What outlives its settings.
    fn state(&self) -> &AliasState {
        &self.state
    }

    /// The Host names it answers to, whatever DNS says: lower-case, without port.
    pub fn hosts(&self) -> &[String] {
        &self.hosts
    }

    /// Whether `host` is the true name of one of its targets now.
    pub fn is_true_name(&self, host: &str) -> bool {
        self.targets.iter().any(|target| {
            let generation = target.generation.load();
            generation.as_ref().is_some_and(|generation| generation.true_name().as_str() == host)
        })
    }

    /// Whether DNS has yet to say anything of one of its targets.
    pub fn is_pending(&self) -> bool {
        self.targets.iter().any(|target| target.is_pending())
    }

    /// A worker's own part.
    pub fn worker(&self, worker: usize) -> &Worker {
        &self.state.workers[worker % self.state.workers.len()]
    }

    /// All of them.
    pub fn workers(&self) -> &[Worker] {
        &self.state.workers
    }

    /// What it counts.
    pub fn series(&self) -> &Arc<AliasSeries> {
        &self.state.series
    }

    /// Its targets, in order of preference.
    pub fn targets(&self) -> &[Arc<Target>] {
        &self.targets
    }

    fn has_target(&self, target: &Arc<Target>) -> bool {
        self.targets.iter().any(|own| Arc::ptr_eq(own, target))
    }

    /// A permit for one more request, or connection, by `limits.requests`; `Err` if there is none left.
    pub fn admit(&self) -> Result<Option<OwnedSemaphorePermit>, LimitReached> {
        self.state.requests.try_acquire().map_err(|limit| {
            let is_http = self.config.protocol == config::Protocol::Http;
            let what = if is_http { "requests" } else { "connections" };
            LimitReached { limit, what }
        })
    }

    /// Counts a request that came at `now` towards the retry budget.
    pub fn deposit(&self, worker: usize, now: Instant) {
        self.state.budget.deposit(worker, now);
    }

    /// Whether the budget grants a retry.
    pub fn withdraw(&self) -> bool {
        self.state.budget.withdraw(Instant::now())
    }

    /// Whether a request could use a connection kept under `key` now.
    pub fn makes(&self, key: &PoolKey) -> bool {
        self.targets.iter().any(|target| {
            let generation = target.generation.load();
            generation.as_ref().is_some_and(|current| !current.is_retired() && current.makes(key))
        })
    }

    /// The keys that its sessions can be cancelled by.
    pub fn cancel_keys(&self) -> &Arc<CancelKeys<Holder>> {
        &self.state.cancel_keys
    }

    fn connections(&self, endpoint: SocketAddr) -> Arc<EndpointConnections> {
        self.state.connections(endpoint)
    }

    /// Idle connections over all workers.
    pub fn idle(&self) -> usize {
        self.workers().iter().map(|worker| worker.pool.idle()).sum()
    }
}

/// `limits.requests` requests, or connections, are being served already.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("{limit} {what} are being served already, as many as `limits.requests` allows")]
pub struct LimitReached {
    limit: usize,
    what: &'static str,
}
