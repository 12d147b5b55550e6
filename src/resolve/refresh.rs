//! Keeps resolutions fresh: a task for each question asks again before the TTL runs out, and publishes what holds.

use super::{
    Question, ResolveError, State,
    environment::{Environment, ResolvConf, Source},
    error::Place,
    lookup::{Client, Round},
    memory::{Memory, Outlook},
    names::{NameError, candidates, in_domain, normalise},
    report::Report,
};
use crate::config::{self, TargetHost};
use parking_lot::Mutex;
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    sync::{Notify, watch},
    time::{Instant, sleep_until},
};

/// However often somebody asks for a refresh, DNS is not asked more often than this.
const LEAST_GAP: Duration = Duration::from_secs(1);
const FIRST_RETRY: Duration = Duration::from_millis(250);

/// Resolves the questions of all aliases with one set of DNS settings. Lives on the control thread.
pub struct Resolver {
    dns: config::Dns,
    resolv_conf: Arc<Source>,
    client: Mutex<Arc<Client>>,
}

impl Resolver {
    /// With `/etc/resolv.conf` for what the settings leave open.
    pub fn new(dns: config::Dns) -> Arc<Resolver> {
        Resolver::with_resolv_conf(dns, ResolvConf::default())
    }

    /// With another file in place of `/etc/resolv.conf`.
    pub fn with_resolv_conf(dns: config::Dns, resolv_conf: ResolvConf) -> Arc<Resolver> {
        Resolver::of(dns, Arc::new(Source::new(resolv_conf)))
    }

    /// With other settings. What resolv.conf has said before still holds.
    pub fn with_settings(&self, dns: config::Dns) -> Arc<Resolver> {
        Resolver::of(dns, self.resolv_conf.clone())
    }

    fn of(dns: config::Dns, resolv_conf: Arc<Source>) -> Arc<Resolver> {
        Arc::new(Resolver { dns, resolv_conf, client: Mutex::new(Arc::new(Client::new(&[]))) })
    }

    /// Servers, namespace and cluster domain as they were at the last lookup.
    pub fn environment(&self) -> Environment {
        self.resolv_conf.known(&self.dns)
    }

    /// Starts resolving in the background, on the current runtime, until the last copy of the subscription is dropped.
    pub fn watch(self: &Arc<Self>, question: Question) -> Subscription {
        let (sender, state) = watch::channel(Arc::default());
        let wish = Arc::new(Notify::new());
        let question = Arc::new(question);
        let refresh = Refresh {
            resolver: self.clone(),
            memory: Memory::new(question.clone(), &self.dns),
            report: Report::new(question.clone()),
            question,
            sender,
            wish: wish.clone(),
            pace: Pace::default(),
        };
        tokio::spawn(refresh.run());
        Subscription { state, wish }
    }

    /// Resolves once, for `explain`: what a subscription's first state would be.
    pub async fn resolve(&self, question: &Question) -> State {
        let mut memory = Memory::new(Arc::new(question.clone()), &self.dns);
        let (round, cluster_domain) = self.ask(question).await;
        memory.absorb(round, &cluster_domain, Instant::now());
        memory.state().clone()
    }

    /// The addresses of a host that is no alias, in order: asked for now, and kept by nobody.
    pub async fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, ResolveError> {
        // RFC 6761 §6.3.
        if host == "localhost" || host.ends_with(".localhost") {
            return Ok(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]);
        }
        let environment = self.resolv_conf.read(&self.dns).await;
        let client = self.client(&environment.servers);
        let (first, second) = candidates(host, &environment.namespace, &environment.cluster_domain);
        let answer = client.both(&first, Place::Client).await.into_addresses();
        match (answer, second) {
            (Err(error), Some(second)) if error.is_denial() => {
                let answer = client.both(&second, Place::Client).await.into_addresses();
                answer.map_err(|_| error)
            }
            (answer, _) => answer,
        }
    }

    /// One round, and the cluster domain that it is to be judged by.
    async fn ask(&self, question: &Question) -> (Round, String) {
        let environment = self.resolv_conf.read(&self.dns).await;
        let round = match name_to_ask(question, &environment) {
            Ok(Asked::Ip(ip)) => Round::of_ip(ip),
            Ok(Asked::Name(name, place)) => {
                let client = self.client(&environment.servers);
                client.both(&name, place).await
            }
            Err(error) => Round {
                v4: Err(ResolveError::Name(error.clone())),
                v6: Err(ResolveError::Name(error)),
            },
        };
        (round, environment.cluster_domain)
    }

    /// The client, made anew when the servers changed.
    fn client(&self, servers: &[SocketAddr]) -> Arc<Client> {
        let mut client = self.client.lock();
        if client.servers() != servers {
            *client = Arc::new(Client::new(servers));
        }
        client.clone()
    }
}

enum Asked {
    Ip(IpAddr),
    Name(String, Place),
}

fn name_to_ask(question: &Question, environment: &Environment) -> Result<Asked, NameError> {
    match &question.target {
        Some(TargetHost::Ip(ip)) => Ok(Asked::Ip(*ip)),
        Some(TargetHost::Name(name)) => Ok(Asked::Name(normalise(name)?, Place::Target)),
        None => {
            let name = normalise(&environment.absolute(&question.alias))?;
            let place = match in_domain(&name, &environment.cluster_domain) {
                true => Place::Service,
                false => Place::Alias,
            };
            Ok(Asked::Name(name, place))
        }
    }
}

/// The latest [`State`] of a question, and a way to ask for a newer one.
#[derive(Clone, Debug)]
pub struct Subscription {
    state: watch::Receiver<Arc<State>>,
    wish: Arc<Notify>,
}

impl Subscription {
    /// A subscription that is fed by hand rather than from DNS.
    pub fn pushed() -> (watch::Sender<Arc<State>>, Subscription) {
        let (sender, state) = watch::channel(Arc::default());
        let wish = Arc::new(Notify::new());
        (sender, Subscription { state, wish })
    }

    /// What is known now.
    pub fn state(&self) -> Arc<State> {
        self.state.borrow().clone()
    }

    /// Waits for a state that was not seen yet; none when nobody publishes any more.
    pub async fn changed(&mut self) -> Option<Arc<State>> {
        self.state.changed().await.ok()?;
        Some(self.state.borrow_and_update().clone())
    }

    /// Waits until the state is as wished, which it may be already; none when nobody publishes any more.
    pub async fn wait_for(&mut self, wished: impl Fn(&State) -> bool) -> Option<Arc<State>> {
        let found = self.state.wait_for(|state| wished(state)).await;
        found.ok().map(|state| state.clone())
    }

    /// Asks DNS again soon rather than at the TTL's end: for when no endpoint answers.
    pub fn refresh(&self) {
        self.wish.notify_one();
    }
}

struct Refresh {
    resolver: Arc<Resolver>,
    question: Arc<Question>,
    memory: Memory,
    report: Report,
    sender: watch::Sender<Arc<State>>,
    wish: Arc<Notify>,
    pace: Pace,
}

impl Refresh {
    async fn run(mut self) {
        while self.ask().await.is_some() && self.wait().await.is_some() {}
    }

    /// One round; none when nobody listens any more.
    async fn ask(&mut self) -> Option<()> {
        let (resolver, question) = (self.resolver.clone(), self.question.clone());
        let attempt = resolver.ask(&question);
        tokio::pin!(attempt);
        let (round, cluster_domain) = loop {
            tokio::select! {
                asked = &mut attempt => break asked,
                () = at(self.memory.expiry()) => {
                    self.expire();
                }
                () = self.sender.closed() => return None,
            }
        };
        self.memory.absorb(round, &cluster_domain, Instant::now());
        self.publish();
        Some(())
    }

    /// Until it is time for the next round; none when nobody listens any more.
    async fn wait(&mut self) -> Option<()> {
        let now = Instant::now();
        let mut next = now + self.pace.pause(self.memory.outlook(), fastrand::f64());
        loop {
            tokio::select! {
                () = sleep_until(next) => return Some(()),
                () = self.wish.notified() => next = next.min(now + LEAST_GAP),
                () = at(self.memory.expiry()) => if self.expire() {
                    // What was fetched while it served may be old by many seconds.
                    return Some(());
                },
                () = self.sender.closed() => return None,
            }
        }
    }

    /// Says whether requests fail from now on.
    fn expire(&mut self) -> bool {
        let was_served = self.memory.state().current.is_some();
        self.memory.expire(Instant::now());
        self.publish();
        let is_over = was_served && self.memory.state().current.is_none();
        if is_over {
            self.pace = Pace::default();
        }
        is_over
    }

    fn publish(&mut self) {
        let new = Arc::new(self.memory.state().clone());
        let old = self.sender.send_replace(new.clone());
        self.report.change(&old, &new);
    }
}

async fn at(instant: Option<Instant>) {
    match instant {
        Some(instant) => sleep_until(instant).await,
        None => std::future::pending().await,
    }
}

/// When to ask next.
#[derive(Debug, Default)]
struct Pace {
    failures: u32,
}

impl Pace {
    /// Just before the TTL ends; after a failure soon, then ever later. Never at once: `dns.min_ttl` may be 0. `random` (0 to 1) keeps the proxies of many
    /// pods out of step.
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
            "a good answer starts anew"
        );
    }

    /// Regression: a Service that came back as the hold ended was seen half a minute later.
    #[tokio::test]
    async fn dns_is_asked_at_once_when_the_last_good_answer_has_served_its_time() {
        const ALIAS: &str = "db.default.svc.cluster.local";
        let server = DnsServer::start(([127, 0, 0, 1], 0).into()).await.unwrap();
        server.zone([cname(ALIAS, 5, "db.example"), address("db.example", 5, Ipv4Addr::LOCALHOST)]);
        let nxdomain_hold = Duration::from_millis(300);
        let dns = config::Dns { servers: vec![server.address()], nxdomain_hold, ..settings() };
        let nowhere = ResolvConf { path: "/nonexistent".into(), ..ResolvConf::default() };
        let question = Arc::new(Question::new(&config::Alias::named("db"), None));
        let (sender, mut state) = watch::channel(Arc::default());
        let mut refresh = Refresh {
            resolver: Resolver::with_resolv_conf(dns.clone(), nowhere),
            memory: Memory::new(question.clone(), &dns),
            report: Report::new(question.clone()),
            question,
            sender,
            wish: Arc::default(),
            pace: Pace::default(),
        };
        refresh.ask().await.unwrap();
        // It has been denied for long: the next question but one is half a minute away.
        server.remove(ALIAS);
        refresh.ask().await.unwrap();
        refresh.pace.failures = 16;
        let asked = server.queries(ALIAS, RecordType::A);
        tokio::spawn(async move {
            refresh.wait().await;
            refresh.run().await;
        });
        let over = state.wait_for(|state: &Arc<State>| state.current.is_none());
        timeout(TTL, over).await.expect("it serves for ever").unwrap();
        timeout(TTL, server.wait_for_queries(ALIAS, 2 * asked + 1)).await.expect("not asked");
    }
}
