//! A target of an alias: the name it resolves and its port, and what is known of it. It outlives configurations.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    time::Duration,
};

use arc_swap::ArcSwapOption;
use tokio::{
    sync::watch,
    time::{Instant, timeout_at},
};

use super::Generation;
use crate::{
    config::{self, TargetHost},
    resolve::{
        Question, Refusal, Resolution, ResolutionState, ResolveError, Resolver, Subscription,
    },
    tls::TlsError,
};

/// Identifies a target of an alias. Contains no settings: with other settings it is the same target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TargetKey {
    /// Which of the alias' targets it is in the file; none is the alias itself, which DNS is asked for.
    asked: Option<TargetHost>,
    port: u16,
    /// The proxy that it is reached through.
    via: Option<config::Via>,
}

/// The alias' own target, or one of `failover`.
pub struct Target {
    key: TargetKey,
    /// Unique in this process; never 0.
    number: u32,
    /// None before the target is in use, and after it was removed, although requests may continue.
    subscription: ArcSwapOption<Subscription>,
    /// The same for the name of its proxy, if it has one.
    proxy_subscription: ArcSwapOption<Subscription>,
    pub(super) generation: ArcSwapOption<Generation>,
    /// The last generation, while there is none because DNS has failed for too long. Connections of it may be open.
    pub(super) unserved: ArcSwapOption<Generation>,
    /// Why there is no generation for a true name that DNS gave.
    pub(super) unusable: ArcSwapOption<TlsError>,
    /// What `generation` was made from: published after it.
    applied: watch::Sender<Arc<ResolutionState>>,
}

/// Why there is no target for a request.
#[derive(Clone, Debug, thiserror::Error)]
pub enum NoTarget {
    /// The alias cannot be resolved.
    #[error("{}", .0.what())]
    Resolve(Arc<ResolveError>),
    /// The alias leads to a name that `allow` does not list, and no earlier name is known.
    #[error("{}", .0.what())]
    Refused(Arc<Refusal>),
    /// The alias leads to a name that no certificate can be valid for.
    #[error("{0}")]
    Unusable(Arc<TlsError>),
    /// DNS has not responded yet.
    #[error("no DNS server has responded for this alias within {0:?}")]
    Pending(Duration),
}

impl TargetKey {
    /// The keys of an alias' targets, in order of preference.
    pub(super) fn of_alias(config: &config::Alias) -> impl Iterator<Item = Self> {
        let asked = [config.target.as_ref()].into_iter().chain(config.failover.iter().map(Some));
        asked.map(|target| Self {
            asked: target.map(|target| target.host.clone()),
            port: target.and_then(|target| target.port).unwrap_or(config.port),
            via: config.via.clone(),
        })
    }
}

impl Target {
    /// One that is not in use yet.
    pub(super) fn new(key: TargetKey) -> Arc<Self> {
        static NUMBERS: AtomicU32 = AtomicU32::new(1);
        Arc::new(Self {
            key,
            number: NUMBERS.fetch_add(1, Relaxed),
            subscription: ArcSwapOption::empty(),
            proxy_subscription: ArcSwapOption::empty(),
            generation: ArcSwapOption::empty(),
            unserved: ArcSwapOption::empty(),
            unusable: ArcSwapOption::empty(),
            applied: watch::Sender::default(),
        })
    }

    pub(super) fn key(&self) -> &TargetKey {
        &self.key
    }

    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// Its port; its endpoints may be a proxy's.
    pub fn port(&self) -> u16 {
        self.key.port
    }

    /// What DNS says of it.
    pub fn state(&self) -> Arc<ResolutionState> {
        match &*self.subscription.load() {
            Some(subscription) => self.through_proxy(subscription.state()),
            None => self.applied.borrow().clone(),
        }
    }

    /// Begins to query DNS, or applies the current settings.
    pub(super) fn ask(
        &self,
        alias: &config::Alias,
        resolver: &Arc<Resolver>,
    ) -> Arc<ResolutionState> {
        let question = Question::new(alias, self.key.asked.clone());
        if let Some(subscription) = &*self.subscription.load() {
            subscription.adopt(question);
            if let (Some(proxy), Some(via)) = (self.proxy_subscription(), &self.key.via) {
                proxy.adopt(Question::of_proxy(alias, via.url.host.clone()));
            }
            return self.state();
        }
        if let Some(via) = &self.key.via {
            let proxy = resolver.watch(Question::of_proxy(alias, via.url.host.clone()));
            self.proxy_subscription.store(Some(Arc::new(proxy)));
        }
        let subscription = resolver.watch(question);
        self.subscription.store(Some(Arc::new(subscription)));
        self.state()
    }

    /// The addresses of a target that is reached through a proxy are those of the proxy.
    fn through_proxy(&self, state: Arc<ResolutionState>) -> Arc<ResolutionState> {
        let Some(proxy) = self.proxy_subscription() else { return state };
        let proxy = proxy.state();
        let both = state.current.as_ref().zip(proxy.current.as_ref());
        Arc::new(ResolutionState {
            current: both.map(|(target, proxy)| {
                Arc::new(Resolution { addresses: proxy.addresses.clone(), ..(**target).clone() })
            }),
            error: state.error.clone().or_else(|| proxy.error.clone()),
            ..(*state).clone()
        })
    }

    /// What follows DNS for its proxy's name.
    pub(super) fn proxy_subscription(&self) -> Option<Subscription> {
        self.proxy_subscription.load().as_deref().cloned()
    }

    /// What follows DNS; none where it is not asked any more.
    pub(super) fn subscription(&self) -> Option<Subscription> {
        self.subscription.load().as_deref().cloned()
    }

    /// Stops querying DNS: open connections must not keep queries for a removed alias going.
    pub(super) fn ask_no_more(&self) {
        self.subscription.store(None);
        self.proxy_subscription.store(None);
    }

    /// Asks DNS again soon.
    pub(super) fn refresh(&self) {
        if let Some(subscription) = &*self.subscription.load() {
            subscription.refresh();
        }
        if let Some(proxy) = &*self.proxy_subscription.load() {
            proxy.refresh();
        }
    }

    /// What `generation` was made from.
    pub(super) fn applied(&self) -> Arc<ResolutionState> {
        self.applied.borrow().clone()
    }

    /// `generation` is what follows from `state`.
    pub(super) fn has_applied(&self, state: Arc<ResolutionState>) {
        self.applied.send_replace(state);
    }

    /// Whether DNS has not responded yet.
    pub(super) fn is_pending(&self) -> bool {
        self.applied.borrow().is_pending()
    }

    /// Waits until DNS has responded; `false` if that takes too long.
    pub(super) async fn wait_for_dns(&self, deadline: Instant) -> bool {
        let mut applied = self.applied.subscribe();
        let responded = applied.wait_for(|state| !state.is_pending());
        matches!(timeout_at(deadline, responded).await, Ok(Ok(_)))
    }

    /// The generations that may have open connections and are not retired: one at most.
    pub(super) fn generations(&self) -> impl Iterator<Item = Arc<Generation>> {
        [&self.generation, &self.unserved].into_iter().filter_map(ArcSwapOption::load_full)
    }
}
