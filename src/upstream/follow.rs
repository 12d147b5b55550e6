//! An alias' background task: follows DNS and certificate files, and closes idle connections. Runs on the control
//! thread.

use std::{iter, net::SocketAddr, sync::Arc, time::Duration};

use tokio::time::{Instant, interval, sleep};
use tokio_util::sync::CancellationToken;

use super::{Alias, Generation, Target};
use crate::{
    config::OnChange,
    pool::PoolKey,
    resolve::{Resolution, ResolutionState, Resolver},
};

/// How often connections that were idle too long are closed.
const REAP_INTERVAL: Duration = Duration::from_secs(1);

impl Alias {
    /// Makes these settings those of its targets: DNS is asked for what is new, and each has the generation
    /// that follows from what is known.
    pub(super) fn put_to_work(&self, resolver: &Arc<Resolver>) {
        for target in &self.targets {
            let state = target.ask(&self.config, resolver);
            self.count_refusal(&target.applied(), &state);
            self.renew_generations(target);
            self.apply(target, &state);
            target.has_applied(state);
        }
    }

    /// Follows DNS and closes what is idle, until `stop`.
    pub(super) async fn run(self: Arc<Self>, stop: CancellationToken) {
        let follow = self.targets.iter().map(|target| self.follow(target));
        tokio::select! {
            // First: what comes after it is for other settings to judge.
            biased;
            () = stop.cancelled() => {}
            _ = futures_util::future::join_all(follow) => {}
            () = self.reap() => {}
            () = self.follow_files() => {}
            () = self.credentials.follow(&self.config.name) => {}
        }
    }

    async fn follow(&self, target: &Target) {
        let Some(mut subscription) = target.subscription() else { return };
        let mut proxy = target.proxy_subscription();
        // Compared with the last true name: one that returns after a failure is not new.
        let mut generation = target.applied().current.as_ref().map(|current| current.generation);
        loop {
            let state = target.state();
            self.count(&mut generation, &target.applied(), &state);
            self.apply(target, &state);
            target.has_applied(state);
            let proxy_changed = async {
                match &mut proxy {
                    Some(proxy) => proxy.changed().await,
                    None => std::future::pending().await,
                }
            };
            let changed = tokio::select! {
                changed = subscription.changed() => changed,
                changed = proxy_changed => changed,
            };
            if changed.is_none() {
                return;
            }
        }
    }

    fn count(&self, generation: &mut Option<u64>, old: &ResolutionState, new: &ResolutionState) {
        if let Some(current) = &new.current {
            let before = generation.replace(current.generation);
            let moves = before.map_or(0, |before| current.generation.saturating_sub(before));
            self.state.series.true_name_changed(moves);
        }
        self.count_refusal(old, new);
    }

    fn count_refusal(&self, old: &ResolutionState, new: &ResolutionState) {
        if new.refused.is_some() && new.refused != old.refused {
            self.state.series.true_name_refused();
        }
    }

    /// A new true name is a failover: a new generation, and the old one ends as `on_change`
    /// says. New addresses are a rotation: the balancer's set changes.
    fn apply(&self, target: &Target, state: &ResolutionState) {
        target.unusable.store(None);
        let Some(resolution) = &state.current else {
            let last = target.generation.swap(None).or_else(|| target.unserved.swap(None));
            return match last {
                // `allow` was changed under it: the alias must not lead there any more.
                Some(last) if state.refuses(last.true_name()) => self.retire(last),
                Some(last) => target.unserved.store(Some(last)),
                None => {}
            };
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
        target.generation.store(self.generation(target, resolution, current.as_deref()));
        if let Some(old) = current {
            self.retire(old);
        }
    }

    fn generation(
        &self,
        target: &Target,
        resolution: &Arc<Resolution>,
        before: Option<&Generation>,
    ) -> Option<Arc<Generation>> {
        let (of, tls) = ((target.number(), target.port()), self.material.current());
        match Generation::new(&self.config, of, resolution.clone(), tls, before) {
            Ok(generation) => Some(Arc::new(generation)),
            // A failover nevertheless: the alias does not lead to the old name any more.
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
        }
    }

    /// Follows certificate files.
    async fn follow_files(&self) {
        loop {
            self.material.renewed(&self.config.name).await;
            self.targets.iter().for_each(|target| self.renew_generations(target));
            self.close_unusable();
        }
    }

    /// Connections made with other TLS material are not used again; those in use end by themselves.
    fn renew_generations(&self, target: &Target) {
        let tls = self.material.current();
        for generation in [&target.generation, &target.unserved] {
            let Some(old) = generation.load_full() else { continue };
            if old.is_of(&self.config, tls.as_ref()) {
                continue;
            }
            match old.renew(&self.config, tls.clone()) {
                Ok(new) => generation.store(Some(Arc::new(new))),
                Err(error) => {
                    generation.store(None);
                    target.unusable.store(Some(Arc::new(error)));
                }
            }
            old.retire();
        }
    }

    /// A target was removed from the alias: its connections and requests end according to `on_change`.
    pub(super) fn leave(&self, target: &Target) {
        target.ask_no_more();
        for generation in target.generations() {
            self.retire(generation);
        }
    }

    fn retire(&self, old: Arc<Generation>) {
        old.retire();
        self.close_unusable();
        if self.config.on_change == OnChange::Drain {
            old.drain();
        }
        self.on_change(move || old.kill());
    }

    /// Ends the connections to addresses that the policy denies now: idle ones at once, those in use
    /// as `on_change` says. No further request is sent on either.
    pub fn enforce_policy(&self) {
        self.close_unusable();
        for generation in self.targets.iter().flat_map(|target| target.generations()) {
            let policy = self.policy.clone();
            // By the policy at that time: it may have been reverted in the meantime.
            self.on_change(move || {
                let policy = policy.load();
                let behind = generation.destination().and_then(|behind| behind.address());
                let is_denied = |address| policy.check(address).is_err();
                generation.cut(|endpoint| iter::once(endpoint).chain(behind).any(is_denied));
            });
        }
    }

    /// Ends what is open, when `on_change` says.
    fn on_change(&self, end: impl FnOnce() + Send + 'static) {
        match self.config.on_change {
            OnChange::Close => end(),
            OnChange::Keep => {}
            OnChange::Drain => {
                let drain = self.config.drain;
                tokio::spawn(async move {
                    sleep(drain).await;
                    end();
                });
            }
        }
    }

    async fn reap(&self) {
        let mut ticks = interval(REAP_INTERVAL);
        loop {
            ticks.tick().await;
            // Changes of files that were being read while the settings were replaced have not been noticed.
            self.targets.iter().for_each(|target| self.renew_generations(target));
            self.close_unusable();
            self.report_failures();
            // Initially the endpoints are unknown.
            if !self.targets.iter().any(|target| target.is_pending()) {
                self.state.forget_endpoints(|endpoint| self.has_endpoint(endpoint));
            }
        }
    }

    /// Logs failures of requests that continue or have ended.
    fn report_failures(&self) {
        for report in self.state.failures.reports() {
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
                    "requests still fail; the latest: {}",
                    report.detail,
                );
            }
        }
    }

    /// Logs the current failures before the settings are replaced, because other settings may fix their cause.
    pub(super) fn report_ended_failures(&self) {
        for report in self.state.failures.take() {
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
    }

    /// Closes idle connections that no request will ask for, that were idle too long, or that go to
    /// an address that the policy denies.
    fn close_unusable(&self) {
        let now = Instant::now();
        let generations = self.targets.iter().filter_map(|target| target.generation.load_full());
        let generations: Vec<_> = generations.filter(|g| !g.is_retired()).collect();
        let policy = self.policy.load();
        let keep = |key: &PoolKey| {
            generations.iter().any(|generation| generation.makes(key)) && key.is_allowed(&policy)
        };
        for worker in &self.state.workers {
            worker.pool.reap(now, keep);
        }
    }

    fn has_endpoint(&self, endpoint: SocketAddr) -> bool {
        self.targets.iter().any(|target| {
            let generation = target.generation.load();
            generation.as_ref().is_some_and(|generation| generation.has_endpoint(endpoint))
        })
    }
}
