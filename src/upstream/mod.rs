//! One alias at work: its targets in order, what each resolves to now, and the way to a
//! connection.

mod budget;
mod dial;
mod generation;
mod happy_eyeballs;
mod lease;
mod material;
#[cfg(test)]
mod tests;

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use arc_swap::{ArcSwap, ArcSwapOption};
use parking_lot::Mutex;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{Instant, interval, timeout_at},
};
use tokio_util::sync::CancellationToken;

pub use dial::Attempts;
pub use generation::Generation;
pub use lease::{Lease, Want};

pub use crate::pool::{AcquireError, SendError};
use budget::Budget;
use material::Material;

use crate::{
    balance::State as EndpointState,
    config::{self, OnChange},
    connect::AddressPolicy,
    pool::{EndpointConnections, Pool, PoolKey},
    resolve::{Question, Refusal, ResolveError, Resolver, State, Subscription, names},
    telemetry::{AliasMetrics, AliasSeries, Failures, RequestFailure},
    tls::{RootStores, TlsConfigErrors, TlsError},
};

/// How often connections that were idle too long are closed.
const REAP_INTERVAL: Duration = Duration::from_secs(1);

/// One alias, shared by all workers.
pub struct Upstream {
    config: Arc<config::Alias>,
    hosts: Vec<String>,
    targets: Vec<Target>,
    material: Arc<Material>,
    workers: Vec<Worker>,
    connections: Mutex<HashMap<SocketAddr, Arc<EndpointConnections>>>,
    policy: Arc<ArcSwap<AddressPolicy>>,
    series: Arc<AliasSeries>,
    requests: Option<Arc<Semaphore>>,
    budget: Budget,
    failures: Failures<RequestFailure>,
}

/// What a worker has for itself.
pub struct Worker {
    /// Its connections.
    pub pool: Pool,
    /// Its part of the alias' series.
    pub metrics: AliasMetrics,
}

/// A true name with a port: the alias' own, or one of `failover`.
pub struct Target {
    port: u16,
    /// None once nothing is to be resolved any more, though requests may go on.
    subscription: ArcSwapOption<Subscription>,
    generation: ArcSwapOption<Generation>,
    /// The last generation, while there is none because DNS has failed for too long. Connections of it may be open.
    unserved: ArcSwapOption<Generation>,
    /// Why there is no generation for a true name that DNS gave.
    unusable: ArcSwapOption<TlsError>,
    /// What `generation` was made from: published after it.
    applied: watch::Sender<Arc<State>>,
}

/// Why there is nobody to send a request to.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NoTarget {
    /// The alias leads nowhere that is known.
    #[error("{0}")]
    Resolve(Arc<ResolveError>),
    /// The alias leads to a name that `allow` does not list, and no earlier name is known.
    #[error("{}", .0.what())]
    Refused(Arc<Refusal>),
    /// The alias leads to a name that no server can prove.
    #[error("{0}")]
    Unusable(Arc<TlsError>),
    /// DNS has said nothing yet.
    #[error("no DNS server has answered for this alias within {0:?}")]
    Pending(Duration),
}

impl Upstream {
    /// Loads what the alias needs and begins to resolve it. Nothing is dialled. There are as many
    /// workers as `series` has.
    ///
    /// Blocking where certificates are read; must run inside the control thread's runtime.
    pub fn new(
        config: Arc<config::Alias>,
        resolver: &Arc<Resolver>,
        roots: &mut RootStores,
        policy: Arc<ArcSwap<AddressPolicy>>,
        series: Arc<AliasSeries>,
    ) -> Result<Self, TlsConfigErrors> {
        let material = Arc::new(Material::load(&config.tls, roots)?);
        let told = config.target.as_ref();
        let mut targets = Vec::with_capacity(1 + config.failover.len());
        for target in [told].into_iter().chain(config.failover.iter().map(Some)) {
            targets.push(Target {
                port: target.and_then(|target| target.port).unwrap_or(config.port),
                subscription: ArcSwapOption::from_pointee(
                    resolver.watch(Question::new(&config, target)),
                ),
                generation: ArcSwapOption::empty(),
                unserved: ArcSwapOption::empty(),
                unusable: ArcSwapOption::empty(),
                applied: watch::Sender::default(),
            });
        }
        let hosts = names::of_alias(&config, &resolver.environment());
        let workers = series.workers();
        let worker = |worker| Worker {
            pool: Pool::new(&config.pool, workers),
            metrics: AliasMetrics::new(&series, worker),
        };
        let requests = config.limits.requests;
        Ok(Self {
            hosts,
            targets,
            material,
            workers: (0..workers).map(worker).collect(),
            connections: Mutex::default(),
            policy,
            series,
            requests: (requests > 0).then(|| Arc::new(Semaphore::new(requests))),
            budget: Budget::new(config.retry.budget, workers, Instant::now()),
            config,
            failures: Failures::default(),
        })
    }

    /// Its requests that fail.
    pub fn failures(&self) -> &Failures<RequestFailure> {
        &self.failures
    }

    /// Its settings.
    pub fn config(&self) -> &Arc<config::Alias> {
        &self.config
    }

    /// The Host names that it answers to, whatever DNS says: lower-case, without port.
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

    /// A worker's own part.
    pub fn worker(&self, worker: usize) -> &Worker {
        &self.workers[worker % self.workers.len()]
    }

    /// What it counts.
    pub fn series(&self) -> &Arc<AliasSeries> {
        &self.series
    }

    /// Its targets, in order of preference.
    pub fn targets(&self) -> &[Target] {
        &self.targets
    }

    /// Leave to serve one more request, as `limits.requests` has it; `Err` when there is none.
    pub fn admit(&self) -> Result<Option<OwnedSemaphorePermit>, LimitReached> {
        let Some(requests) = &self.requests else { return Ok(None) };
        match requests.clone().try_acquire_owned() {
            Ok(permit) => Ok(Some(permit)),
            Err(_) => Err(LimitReached(self.config.limits.requests)),
        }
    }

    /// Counts a request that came at `now` towards the retry budget.
    pub fn deposit(&self, worker: usize, now: Instant) {
        self.budget.deposit(worker, now);
    }

    /// Whether the budget grants a retry.
    pub fn withdraw(&self) -> bool {
        self.budget.withdraw(Instant::now())
    }

    /// The target that new requests go to: the first with a usable endpoint.
    ///
    /// Waits only while DNS has never answered yet, and no longer than `timeouts.connect`.
    pub async fn target(&self) -> Result<Arc<Generation>, NoTarget> {
        if let Some(generation) = self.choose() {
            return Ok(generation);
        }
        let limit = self.config.timeouts.connect;
        let deadline = Instant::now() + limit;
        let mut first = self.targets[0].applied.subscribe();
        let answered = first.wait_for(|state| !state.is_pending());
        let Ok(Ok(state)) = timeout_at(deadline, answered).await else {
            return Err(NoTarget::Pending(limit));
        };
        let state = state.clone();
        if let Some(generation) = self.choose() {
            return Ok(generation);
        }
        if let Some(error) = self.targets.iter().find_map(|target| target.unusable.load_full()) {
            return Err(NoTarget::Unusable(error));
        }
        // Requests fail until DNS gives something new: this one shows that somebody waits for it.
        self.refresh();
        Err(match (&state.refused, &state.error) {
            (Some(refusal), _) => NoTarget::Refused(refusal.clone()),
            (None, Some(error)) => NoTarget::Resolve(error.clone()),
            (None, None) => NoTarget::Pending(limit),
        })
    }

    /// Asks DNS again soon: the endpoints known do not work.
    pub fn refresh(&self) {
        for target in &self.targets {
            if let Some(subscription) = &*target.subscription.load() {
                subscription.refresh();
            }
        }
    }

    fn choose(&self) -> Option<Arc<Generation>> {
        if let [only] = self.targets.as_slice() {
            return only.generation.load_full();
        }
        let now = Instant::now();
        let mut generations =
            self.targets.iter().filter_map(|target| target.generation.load_full());
        let first = generations.next()?;
        if first.balancer().has_healthy(now) {
            return Some(first);
        }
        generations.find(|generation| generation.balancer().has_healthy(now)).or(Some(first))
    }

    /// Follows DNS and closes what is idle, until `stop`. Runs on the control thread.
    pub async fn run(self: Arc<Self>, stop: CancellationToken) {
        let follow = self.targets.iter().map(|target| self.follow(target));
        tokio::select! {
            _ = futures_util::future::join_all(follow) => {}
            () = self.reap() => {}
            () = self.renew() => {}
            () = stop.cancelled() => {}
        }
        for report in self.failures.take() {
            let kind = report.kind.as_ref();
            tracing::info!(
                alias = self.config.name,
                true_name = kind.map(|kind| kind.true_name.as_str()),
                error = kind.map_or("various", |kind| kind.error),
                failures = report.count,
                seconds = report.lasted.as_secs(),
                "requests failed for this reason until the alias was changed or removed",
            );
        }
        for target in &self.targets {
            // What is still open must not keep DNS being asked for an alias that nobody configures.
            target.subscription.store(None);
            target.generations().for_each(|generation| generation.retire());
        }
        for worker in &self.workers {
            worker.pool.reap(Instant::now(), |_| false);
        }
    }

    async fn follow(&self, target: &Target) {
        let Some(subscription) = target.subscription.load_full() else { return };
        let mut subscription = Subscription::clone(&subscription);
        // Of the true name seen last: one that comes back after a failure is not a new one.
        let mut generation = None;
        loop {
            let state = subscription.state();
            self.count(&mut generation, &target.applied.borrow().clone(), &state);
            self.apply(target, &state);
            target.applied.send_replace(state);
            if subscription.changed().await.is_none() {
                return;
            }
        }
    }

    fn count(&self, generation: &mut Option<u64>, old: &State, new: &State) {
        if let Some(current) = &new.current {
            let before = generation.replace(current.generation);
            let moves = before.map_or(0, |before| current.generation.saturating_sub(before));
            self.series.true_name_changed(moves);
        }
        if new.refused.is_some() && new.refused != old.refused {
            self.series.true_name_refused();
        }
    }

    /// A new true name is a failover: a new generation, and the old one ends as `on_change`
    /// says. New addresses are a rotation: the balancer's set changes.
    fn apply(&self, target: &Target, state: &State) {
        target.unusable.store(None);
        let Some(resolution) = &state.current else {
            if let Some(last) = target.generation.swap(None) {
                target.unserved.store(Some(last));
            }
            return;
        };
        let unserved = target.unserved.swap(None);
        let current = target.generation.load_full().or(unserved);
        if let Some(current) = &current
            && current.number() == resolution.generation
        {
            current.rotate(resolution.clone());
            target.generation.store(Some(current.clone()));
            return;
        }
        let generation =
            Generation::new(&self.config, resolution.clone(), target.port, self.material.current());
        let generation = match generation {
            Ok(generation) => Some(Arc::new(generation)),
            // A failover all the same: the alias does not lead to the old name any more.
            Err(error) => {
                tracing::error!(
                    alias = self.config.name,
                    true_name = resolution.true_name.as_str(),
                    %error,
                    "the true name cannot be used",
                );
                target.unusable.store(Some(Arc::new(error)));
                None
            }
        };
        target.generation.store(generation);
        if let Some(old) = current {
            self.retire(old);
        }
    }

    /// Follows certificate files: what was made with the old ones is not used again, and ends
    /// when it ends.
    async fn renew(&self) {
        loop {
            self.material.renewed(&self.config.name).await;
            for target in &self.targets {
                for generation in [&target.generation, &target.unserved] {
                    if let Some(old) = generation.load_full() {
                        generation.store(Some(Arc::new(old.renew(self.material.current()))));
                        old.retire();
                    }
                }
            }
            self.close_unusable();
        }
    }

    fn retire(&self, old: Arc<Generation>) {
        old.retire();
        self.close_unusable();
        match self.config.on_change {
            OnChange::Close => old.kill(),
            OnChange::Keep => {}
            OnChange::Drain => {
                let drain = self.config.drain;
                tokio::spawn(async move {
                    tokio::time::sleep(drain).await;
                    old.kill();
                });
            }
        }
    }

    /// Ends the connections to addresses that the policy denies now: idle ones at once, those in use
    /// as `on_change` says. No further request is sent on either.
    pub fn enforce_policy(&self) {
        self.close_unusable();
        let policy = self.policy.load_full();
        let denied = move |endpoint| policy.check(endpoint).is_err();
        for generation in self.targets.iter().flat_map(Target::generations) {
            match self.config.on_change {
                OnChange::Close => generation.cut(&denied),
                OnChange::Keep => {}
                OnChange::Drain => {
                    let (drain, denied) = (self.config.drain, denied.clone());
                    tokio::spawn(async move {
                        tokio::time::sleep(drain).await;
                        generation.cut(denied);
                    });
                }
            }
        }
    }

    async fn reap(&self) {
        let mut ticks = interval(REAP_INTERVAL);
        loop {
            ticks.tick().await;
            self.close_unusable();
            self.report_failures();
            // After a reload nobody knows at first which endpoints stay; also not while what DNS says is known, and not
            // yet applied.
            if !self.targets.iter().any(|target| target.applied.borrow().is_pending()) {
                self.forget_endpoints();
            }
        }
    }

    fn forget_endpoints(&self) {
        self.series.retain_endpoints(|endpoint| self.has_endpoint(endpoint));
        let mut connections = self.connections.lock();
        connections.retain(|endpoint, connections| {
            connections.series().active() > 0 || self.has_endpoint(*endpoint)
        });
    }

    /// Logs what became of requests that failed.
    fn report_failures(&self) {
        for report in self.failures.reports() {
            let alias = self.config.name.as_str();
            let kind = report.kind.as_ref();
            let true_name = kind.map(|kind| kind.true_name.as_str());
            let error = kind.map_or("various", |kind| kind.error);
            let fix = kind.and_then(|kind| kind.fix.as_deref());
            let (failures, seconds) = (report.count, report.lasted.as_secs());
            if report.has_ended {
                tracing::info!(
                    alias,
                    true_name,
                    error,
                    failures,
                    seconds,
                    "requests no longer fail for this reason",
                );
            } else {
                tracing::warn!(
                    alias,
                    true_name,
                    error,
                    failures,
                    seconds,
                    fix,
                    "requests go on failing; the latest: {}",
                    report.detail,
                );
            }
        }
    }

    /// Closes idle connections that no request will ask for, that were idle too long, or that go to
    /// an address that the policy denies.
    fn close_unusable(&self) {
        let now = Instant::now();
        let generations: Vec<_> =
            self.targets.iter().filter_map(|target| target.generation.load_full()).collect();
        let policy = self.policy.load();
        let keep = |key: &PoolKey| {
            generations.iter().any(|generation| generation.makes(key))
                && policy.check(key.endpoint).is_ok()
        };
        for worker in &self.workers {
            worker.pool.reap(now, keep);
        }
    }

    fn has_endpoint(&self, endpoint: SocketAddr) -> bool {
        self.targets.iter().any(|target| {
            let generation = target.generation.load();
            generation.as_ref().is_some_and(|generation| generation.has_endpoint(endpoint))
        })
    }

    fn connections(&self, endpoint: SocketAddr) -> Arc<EndpointConnections> {
        let mut connections = self.connections.lock();
        let limit = self.config.pool.max_connections;
        let new = || Arc::new(EndpointConnections::new(self.series.endpoint(endpoint), limit));
        connections.entry(endpoint).or_insert_with(new).clone()
    }

    /// Every endpoint that takes requests or still has connections, with its counts.
    pub fn endpoints(&self) -> Vec<EndpointStatus> {
        let now = Instant::now();
        let connections = self.series.endpoints();
        let count = |address: SocketAddr| {
            connections.get(&address).map_or((0, 0), |c| (c.total(), c.active()))
        };
        let generations = self.targets.iter().filter_map(|target| target.generation.load_full());
        let mut endpoints: Vec<_> = generations
            .flat_map(|generation| generation.balancer().endpoints())
            .map(|endpoint| {
                let (total, active) = count(endpoint.address());
                EndpointStatus {
                    address: endpoint.address(),
                    state: endpoint.state(now),
                    in_flight: endpoint.in_flight(),
                    latency: endpoint.latency(now),
                    failures: endpoint.consecutive_failures(),
                    ejected_for: endpoint.ejected_for(now),
                    connections_total: total,
                    connections_active: active,
                }
            })
            .collect();
        for (address, counts) in connections.iter() {
            if counts.active() > 0 && !endpoints.iter().any(|known| known.address == *address) {
                endpoints.push(EndpointStatus {
                    address: *address,
                    state: EndpointState::Retiring,
                    in_flight: 0,
                    latency: None,
                    failures: 0,
                    ejected_for: None,
                    connections_total: counts.total(),
                    connections_active: counts.active(),
                });
            }
        }
        endpoints
    }

    /// Idle connections over all workers.
    pub fn idle(&self) -> usize {
        self.workers.iter().map(|worker| worker.pool.idle()).sum()
    }
}

impl Target {
    /// The port that its endpoints are dialled at.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What DNS says of it.
    pub fn state(&self) -> Arc<State> {
        match &*self.subscription.load() {
            Some(subscription) => subscription.state(),
            None => self.applied.borrow().clone(),
        }
    }

    /// Those that connections may be open of and that have not been retired: one at most.
    fn generations(&self) -> impl Iterator<Item = Arc<Generation>> {
        [&self.generation, &self.unserved].into_iter().filter_map(ArcSwapOption::load_full)
    }
}

/// `limits.requests` requests are being served already.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("{0} requests are being served already, as many as `limits.requests` allows")]
pub struct LimitReached(pub usize);

/// An endpoint as `status` and the metrics show it.
#[derive(Clone, Debug)]
pub struct EndpointStatus {
    /// Its address.
    pub address: SocketAddr,
    /// Whether it takes requests.
    pub state: EndpointState,
    /// Requests that it is serving.
    pub in_flight: u32,
    /// The latency it is reckoned to have.
    pub latency: Option<Duration>,
    /// Transport failures in a row.
    pub failures: u32,
    /// How long it stays ejected.
    pub ejected_for: Option<Duration>,
    /// Connections made so far.
    pub connections_total: u64,
    /// Connections open now.
    pub connections_active: usize,
}
