//! Keeps resolutions fresh: a task for each question queries again before the TTL expires, and publishes the result.

use super::{
    Purpose, Question, ResolutionState, ResolveError,
    environment::{Environment, ResolvConf, Source},
    error::Place,
    lookup::{DnsClient, Round},
    memory::{Answers, Memory, Outlook},
    names::{candidates, fold, in_domain, normalise},
    report::Report,
};
use crate::config::{self, TargetHost};
use arc_swap::ArcSwap;
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    pin::pin,
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep_until},
};

/// However often a refresh is requested, DNS is not queried more often than this.
const LEAST_GAP: Duration = Duration::from_secs(1);
const FIRST_RETRY: Duration = Duration::from_millis(250);

/// Resolves the questions of all aliases. Lives on the control thread for as long as the process runs: what it knows
/// survives reloads.
pub struct Resolver {
    dns: ArcSwap<config::Dns>,
    resolv_conf: Source,
    client: Mutex<Arc<DnsClient>>,
    /// The inquiries that know something about a name, the latest last. The next inquiry for this name starts with that.
    informed: Mutex<HashMap<Arc<str>, Vec<Weak<Inquiry>>>>,
}

impl Resolver {
    /// With `/etc/resolv.conf` for what is not configured.
    pub fn new(dns: config::Dns) -> Arc<Resolver> {
        Resolver::with_resolv_conf(dns, ResolvConf::default())
    }

    /// With another file instead of `/etc/resolv.conf`.
    pub fn with_resolv_conf(dns: config::Dns, resolv_conf: ResolvConf) -> Arc<Resolver> {
        Arc::new(Resolver {
            dns: ArcSwap::from_pointee(dns),
            resolv_conf: Source::new(resolv_conf),
            client: Mutex::new(Arc::new(DnsClient::new(&[]))),
            informed: Mutex::default(),
        })
    }

    /// Sets other settings for all queries from now on. [`Subscription::adopt`] notifies those that wait for their next
    /// round.
    pub fn configure(&self, dns: config::Dns) {
        self.dns.store(Arc::new(dns));
    }

    /// The current settings.
    pub fn settings(&self) -> Arc<config::Dns> {
        self.dns.load_full()
    }

    /// Servers, namespace and cluster domain as of the last lookup.
    pub fn environment(&self) -> Environment {
        self.environment_with(&self.settings())
    }

    /// Waits until resolv.conf has another namespace or cluster domain than `before`.
    pub async fn moved_from(&self, before: &Environment) {
        self.resolv_conf.moved_from(before, &self.settings()).await;
    }

    /// The same with other settings.
    pub fn environment_with(&self, dns: &config::Dns) -> Environment {
        self.resolv_conf.known(dns)
    }

    /// Resolves in the background, on the current runtime, until the last copy of the subscription is dropped.
    pub fn watch(self: &Arc<Self>, question: Question) -> Subscription {
        let subscription = self.inquire(question);
        tokio::spawn(Refresh::new(&subscription).run());
        subscription
    }

    /// The subscription without its background task.
    fn inquire(self: &Arc<Self>, question: Question) -> Subscription {
        let question = Arc::new(question);
        let settings = self.settings();
        let mut memory = Memory::new(question.clone(), &settings);
        if let Some(answers) = self.known_answers(&question) {
            memory.recall(answers, Instant::now());
        }
        let (sender, state) = watch::channel(Arc::new(memory.state().clone()));
        let inquiry = Arc::new(Inquiry {
            resolver: self.clone(),
            settings: Mutex::new(settings),
            report: Mutex::new(Report::new(question, memory.state())),
            memory: Mutex::new(memory),
            sender,
            wish: Notify::new(),
            anew: Notify::new(),
        });
        let name = inquiry.memory.lock().answers().name().cloned();
        if let Some(name) = name {
            self.inform(&name, &inquiry);
        }
        Subscription { state, inquiry }
    }

    /// What other inquiries already know about the name that the question needs.
    fn known_answers(&self, question: &Question) -> Option<Answers> {
        let Ok(Asked::Name(name, _)) = name_to_ask(question, &self.environment()) else {
            return None;
        };
        let informed = self.informed.lock();
        informed.get(name.as_str())?.iter().rev().filter_map(Weak::upgrade).find_map(|inquiry| {
            let memory = inquiry.memory.lock();
            let answers = memory.answers();
            // Without addresses, they are of use only where none are needed.
            let is_enough = memory.question().purpose == question.purpose;
            let is_same = answers.name().map(|name| &**name) == Some(name.as_str());
            (is_same && is_enough).then(|| answers.clone())
        })
    }

    /// Notes that an inquiry knows something about a name.
    fn inform(&self, name: &Arc<str>, inquiry: &Arc<Inquiry>) {
        let mut informed = self.informed.lock();
        if informed.len() == informed.capacity() {
            // Before the map grows: so it never has more than twice the entries that are in use.
            informed.retain(|_, those| those.iter().any(|inquiry| inquiry.strong_count() > 0));
        }
        let those = informed.entry(name.clone()).or_default();
        let new = Arc::downgrade(inquiry);
        those.retain(|old| old.strong_count() > 0 && !old.ptr_eq(&new));
        those.push(new);
    }

    /// Resolves once, for `explain`. Returns what would be a subscription's first state.
    pub async fn resolve(&self, question: &Question) -> ResolutionState {
        let mut memory = Memory::new(Arc::new(question.clone()), &self.settings());
        let (round, cluster_domain) = self.ask(question, |_, _| {}).await;
        memory.absorb(round, &cluster_domain, Instant::now());
        memory.state().clone()
    }

    /// The addresses of a host that is not an alias, in order. They are queried now and not cached.
    pub async fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, ResolveError> {
        // RFC 6761 §6.3.
        if host == "localhost" || host.ends_with(".localhost") {
            return Ok(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]);
        }
        let environment = self.resolv_conf.read(&self.settings()).await;
        let client = self.client(&environment.servers);
        let (first, second) = candidates(host, &environment.namespace, &environment.cluster_domain);
        if first != fold(host) {
            check(&environment, host)?;
        }
        let second = second.filter(|_| environment.unknown_of(host).is_none());
        let answer = client.both(&first, Place::Client).await.into_addresses();
        match (answer, second) {
            (Err(error), Some(second)) if error.is_denial() => {
                let answer = client.both(&second, Place::Client).await.into_addresses();
                answer.map_err(|_| error)
            }
            (answer, _) => answer,
        }
    }

    /// Runs one round, and returns it with the cluster domain that applies to it. `turn_to` gets the name and the cluster
    /// domain before DNS is queried.
    async fn ask(&self, question: &Question, turn_to: impl FnOnce(&str, &str)) -> (Round, String) {
        let environment = self.resolv_conf.read(&self.settings()).await;
        let asked = name_to_ask(question, &environment);
        if let Some(name) = name_of(&asked) {
            turn_to(name, &environment.cluster_domain);
        }
        let round = match asked {
            Ok(Asked::Ip(ip)) => Round::of_ip(ip),
            Ok(Asked::Name(name, place)) => {
                let client = self.client(&environment.servers);
                if question.purpose == Purpose::AskProxy {
                    let is_enough = |names: &[Arc<str>]| question.is_settled(names, &environment);
                    let names = client.names(&name, place, is_enough).await;
                    Round { v4: names.clone(), v6: names }
                } else {
                    client.both(&name, place).await
                }
            }
            Err(error) => Round { v4: Err(error.clone()), v6: Err(error) },
        };
        (round, environment.cluster_domain)
    }

    /// The client. If the servers have changed, it is a new one.
    fn client(&self, servers: &[SocketAddr]) -> Arc<DnsClient> {
        let mut client = self.client.lock();
        if client.servers() != servers {
            *client = Arc::new(DnsClient::new(servers));
        }
        client.clone()
    }
}

enum Asked {
    Ip(IpAddr),
    Name(String, Place),
}

fn name_to_ask(question: &Question, environment: &Environment) -> Result<Asked, ResolveError> {
    let normalise = |name: &str| normalise(name).map_err(ResolveError::Name);
    match &question.target {
        Some(TargetHost::Ip(ip)) => Ok(Asked::Ip(*ip)),
        Some(TargetHost::Name(name)) => {
            let is_proxy = question.purpose == Purpose::DialProxy;
            let place = if is_proxy { Place::Proxy } else { Place::Target };
            Ok(Asked::Name(normalise(name)?, place))
        }
        None => {
            let absolute = environment.absolute(&question.alias);
            if absolute != fold(&question.alias) {
                check(environment, &question.alias)?;
            }
            let name = normalise(&absolute)?;
            let place = match in_domain(&name, &environment.cluster_domain) {
                true => Place::Service,
                false => Place::Alias,
            };
            Ok(Asked::Name(name, place))
        }
    }
}

/// Fails if it is not known what completes `name`.
fn check(environment: &Environment, name: &str) -> Result<(), ResolveError> {
    match environment.unknown_of(name) {
        Some(why) => Err(ResolveError::Unknown { name: name.to_owned(), why: why.clone() }),
        None => Ok(()),
    }
}

/// The name to query, even if it is not a valid one. `None` if there is no query.
fn name_of(asked: &Result<Asked, ResolveError>) -> Option<&str> {
    match asked {
        Ok(Asked::Ip(_)) => None,
        Ok(Asked::Name(name, _)) => Some(name),
        Err(ResolveError::Name(error)) => Some(&error.name),
        Err(_) => None,
    }
}

/// The latest [`ResolutionState`] of a question, and a way to request a newer one.
#[derive(Clone)]
pub struct Subscription {
    state: watch::Receiver<Arc<ResolutionState>>,
    inquiry: Arc<Inquiry>,
}

impl Subscription {
    /// The current state.
    pub fn state(&self) -> Arc<ResolutionState> {
        self.state.borrow().clone()
    }

    /// Waits for a state that was not seen yet. `None` if there will be no more.
    pub async fn changed(&mut self) -> Option<Arc<ResolutionState>> {
        self.state.changed().await.ok()?;
        Some(self.state.borrow_and_update().clone())
    }

    /// Waits until the state is as wished, which it may be already. `None` if there will be no more states.
    pub async fn wait_for(
        &mut self,
        wished: impl Fn(&ResolutionState) -> bool,
    ) -> Option<Arc<ResolutionState>> {
        let found = self.state.wait_for(|state| wished(state)).await;
        found.ok().map(|state| state.clone())
    }

    /// Queries DNS again soon rather than when the TTL expires: for when no endpoint responds.
    pub fn refresh(&self) {
        self.inquiry.wish.notify_one();
    }

    /// Continues with another question about the same target, and with the resolver's current settings. What is known is
    /// re-evaluated at once, and DNS is queried again.
    pub fn adopt(&self, question: Question) {
        let inquiry = &self.inquiry;
        let settings = inquiry.resolver.settings();
        let before = std::mem::replace(&mut *inquiry.settings.lock(), settings.clone());
        let mut memory = inquiry.memory.lock();
        if before == settings && **memory.question() == question {
            return;
        }
        let question = Arc::new(question);
        memory.adopt(question.clone(), &settings, Instant::now());
        let environment = inquiry.resolver.environment();
        if let Some(name) = name_of(&name_to_ask(&question, &environment)) {
            memory.turn_to(name, &environment.cluster_domain);
        }
        inquiry.report.lock().adopt(question);
        inquiry.publish(&memory);
        inquiry.anew.notify_one();
    }
}

/// A question that is asked repeatedly.
struct Inquiry {
    resolver: Arc<Resolver>,
    /// The settings that the memory uses.
    settings: Mutex<Arc<config::Dns>>,
    memory: Mutex<Memory>,
    report: Mutex<Report>,
    sender: watch::Sender<Arc<ResolutionState>>,
    /// A newer answer is requested.
    wish: Notify,
    /// The question or the settings have changed.
    anew: Notify,
}

impl Inquiry {
    /// Queries use this name from now on. What is known about another name is no longer used.
    fn turn_to(&self, name: &str, cluster_domain: &str) {
        let mut memory = self.memory.lock();
        if memory.answers().name().is_some_and(|before| **before != *name) {
            memory.turn_to(name, cluster_domain);
            self.publish(&memory);
        }
    }

    fn publish(&self, memory: &Memory) {
        let new = Arc::new(memory.state().clone());
        let old = self.sender.send_replace(new.clone());
        self.report.lock().change(&old, &new);
    }

    fn expiry(&self) -> Option<Instant> {
        self.memory.lock().expiry()
    }
}

/// The task of an [`Inquiry`].
struct Refresh {
    inquiry: Arc<Inquiry>,
    pace: Pace,
}

impl Refresh {
    fn new(subscription: &Subscription) -> Refresh {
        Refresh { inquiry: subscription.inquiry.clone(), pace: Pace::default() }
    }

    async fn run(mut self) {
        while self.ask().await.is_some() && self.wait().await.is_some() {}
    }

    /// Runs one round. `None` once there are no subscribers.
    async fn ask(&mut self) -> Option<()> {
        let inquiry = self.inquiry.clone();
        let (round, cluster_domain) = loop {
            let question = inquiry.memory.lock().question().clone();
            let turn_to = |name: &str, domain: &str| inquiry.turn_to(name, domain);
            let mut attempt = pin!(inquiry.resolver.ask(&question, turn_to));
            let asked = loop {
                tokio::select! {
                    // This comes first: the name may belong to another tenant by now.
                    biased;
                    () = inquiry.anew.notified() => break None,
                    () = inquiry.sender.closed() => return None,
                    asked = &mut attempt => break Some(asked),
                    () = at(inquiry.expiry()) => {
                        self.expire();
                    }
                }
            };
            if let Some(asked) = asked {
                break asked;
            }
        };
        let mut memory = inquiry.memory.lock();
        memory.absorb(round, &cluster_domain, Instant::now());
        inquiry.publish(&memory);
        let name = memory.answers().name().cloned();
        drop(memory);
        if let Some(name) = name {
            inquiry.resolver.inform(&name, &inquiry);
        }
        Some(())
    }

    /// Waits until it is time for the next round. `None` once there are no subscribers.
    async fn wait(&mut self) -> Option<()> {
        let inquiry = self.inquiry.clone();
        let now = Instant::now();
        let outlook = inquiry.memory.lock().outlook();
        let mut next = now + self.pace.pause(outlook, fastrand::f64());
        loop {
            tokio::select! {
                () = sleep_until(next) => return Some(()),
                () = inquiry.wish.notified() => next = next.min(now + LEAST_GAP),
                () = inquiry.anew.notified() => {
                    self.pace = Pace::default();
                    return Some(());
                }
                () = at(inquiry.expiry()) => if self.expire() {
                    // The last round may have been many seconds ago.
                    return Some(());
                },
                () = inquiry.sender.closed() => return None,
            }
        }
    }

    /// Drops what has expired. Returns whether requests fail from now on.
    fn expire(&mut self) -> bool {
        let mut memory = self.inquiry.memory.lock();
        let was_served = memory.state().current.is_some();
        memory.expire(Instant::now());
        self.inquiry.publish(&memory);
        let is_over = was_served && memory.state().current.is_none();
        if is_over {
            self.pace = Pace::default();
        }
        is_over
    }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

/// When to query next.
#[derive(Debug, Default)]
struct Pace {
    failures: u32,
}

impl Pace {
    /// Just before the TTL expires; after a failure soon, with exponential back-off. Never at once, because `dns.min_ttl`
    /// may be 0. `random` (0 to 1) keeps the proxies of many pods out of step.
    fn pause(&mut self, outlook: Outlook, random: f64) -> Duration {
        let last = match outlook {
            Outlook::Whole(ttl) => {
                self.failures = 0;
                return ttl.mul_f64(0.9 + 0.1 * random).max(FIRST_RETRY);
            }
            Outlook::Partial(ttl) => ttl,
            Outlook::Failed { longest } => longest,
        };
        let longest = last.max(FIRST_RETRY);
        let pause = FIRST_RETRY.saturating_mul(1 << self.failures.min(16)).min(longest);
        self.failures = self.failures.saturating_add(1);
        pause.mul_f64(0.75 + 0.25 * random)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        demo::dns::{DnsServer, RecordType, address, cname},
        resolve::names::tests::settings,
    };
    use tokio::time::timeout;

    const TTL: Duration = Duration::from_secs(5);

    #[test]
    fn the_refresh_comes_before_the_ttl_ends_and_not_in_step() {
        let mut pace = Pace::default();
        let pauses = [0.0, 1.0].map(|random| pace.pause(Outlook::Whole(TTL), random));
        assert_eq!(pauses, [Duration::from_millis(4500), TTL]);
    }

    #[test]
    fn a_ttl_of_nothing_does_not_make_it_ask_without_pause() {
        let pause = |outlook| Pace::default().pause(outlook, 0.0);
        assert_eq!(pause(Outlook::Whole(Duration::ZERO)), FIRST_RETRY);
        let soon = FIRST_RETRY.mul_f64(0.75);
        assert_eq!(pause(Outlook::Partial(Duration::ZERO)), soon, "one family fails");
        assert_eq!(pause(Outlook::Failed { longest: Duration::from_millis(1) }), soon);
    }

    #[test]
    fn retries_begin_at_once_and_slow_down() {
        let mut pace = Pace::default();
        let mut pauses = |outlook, count: usize| -> Vec<u128> {
            (0..count).map(|_| pace.pause(outlook, 1.0).as_millis()).collect()
        };
        let expected = [250, 500, 1000, 2000, 4000, 8000, 16000, 30000, 30000];
        assert_eq!(pauses(Outlook::Failed { longest: Duration::from_secs(30) }, 9), expected);
        assert_eq!(pauses(Outlook::Failed { longest: TTL }, 1), [5000]);
        assert_eq!(pauses(Outlook::Partial(TTL), 1), [5000], "the TTL ends it at the latest");
        pace.pause(Outlook::Whole(TTL), 0.5);
        assert_eq!(
            pace.pause(Outlook::Partial(TTL), 1.0),
            FIRST_RETRY,
            "a good answer resets the back-off"
        );
    }

    /// Regression: a Service that came back just as the hold expired was noticed half a minute later.
    #[tokio::test]
    async fn dns_is_queried_at_once_when_the_last_good_answer_has_expired() {
        const ALIAS: &str = "db.default.svc.cluster.local";
        let server = DnsServer::start(([127, 0, 0, 1], 0).into()).await.unwrap();
        server.zone([cname(ALIAS, 5, "db.example"), address("db.example", 5, Ipv4Addr::LOCALHOST)]);
        let nxdomain_hold = Duration::from_millis(300);
        let dns =
            config::Dns { servers: vec![server.address().into()], nxdomain_hold, ..settings() };
        let nowhere =
            ResolvConf { path: "/nonexistent/resolv.conf".into(), ..ResolvConf::default() };
        let question = Question::new(&config::Alias::named("db"), None);
        let resolver = Resolver::with_resolv_conf(dns, nowhere);
        let subscription = resolver.inquire(question);
        let mut state = subscription.state.clone();
        let mut refresh = Refresh::new(&subscription);
        refresh.ask().await.unwrap();
        // It has been failing for long, so retries are half a minute apart.
        server.remove(ALIAS);
        refresh.ask().await.unwrap();
        refresh.pace.failures = 16;
        let asked = server.queries(ALIAS, RecordType::A);
        tokio::spawn(async move {
            refresh.wait().await;
            refresh.run().await;
        });
        let over = state.wait_for(|state: &Arc<ResolutionState>| state.current.is_none());
        timeout(TTL, over).await.expect("it never expires").unwrap();
        timeout(TTL, server.wait_for_queries(ALIAS, 2 * asked + 1)).await.expect("no query");
    }
}
