//! What may still be used: the last good answer of each family, for how long it may be used, and when a true name is
//! new. Pure, given the time.

use super::{
    Question, Resolution, ResolutionState, TrueName,
    chain::{Chain, Rule},
    error::{Failure, Refusal, ResolveError},
    lookup::Round,
    names::in_domain,
};
use crate::config;
use std::{net::IpAddr, sync::Arc, time::Duration};
use tokio::time::Instant;

/// The longest interval between retries while DNS fails.
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// The same while there is nothing to use, so that a fix of the Service takes effect quickly.
const LONGEST_RETRY_UNSERVED: Duration = Duration::from_secs(5);

/// The answers to one question over time.
#[derive(Debug)]
pub struct Memory {
    question: Arc<Question>,
    limits: Limits,
    answers: Answers,
    /// The true name of the newest generation, even while it has no addresses left.
    newest: Option<TrueName>,
    generation: u64,
    /// The TTL of the newest answer, even of a refused one; none after a failure.
    ttl: Option<Duration>,
    /// Whether the queried name, or any other name of the chain, is in the cluster domain.
    in_cluster: bool,
    state: ResolutionState,
}

/// What DNS has returned for one name, independent of question and settings.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    /// `None` before the first query.
    name: Option<Arc<str>>,
    /// The cluster domain at the time of the query.
    cluster_domain: String,
    v4: Remembered,
    v6: Remembered,
}

/// What a round means for a question.
enum Finding {
    /// There is a true name, that of the first good family. If the families differ, only one of them counts, because some
    /// of the mixed addresses would be used with the wrong name.
    Good { leading: Good, families: Box<[Result<Good, ResolveError>; 2]> },
    /// There is a true name that `allow` does not list.
    Refused(Good),
    /// There is no true name.
    Failed { v4: ResolveError, v6: ResolveError },
}

#[derive(Clone, Copy, Debug)]
struct Limits {
    min_ttl: Duration,
    max_ttl: Duration,
    cluster_max_ttl: Duration,
    stale: Duration,
    nxdomain_hold: Duration,
}

/// What the newest round means for the time of the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outlook {
    /// Valid for this TTL.
    Whole(Duration),
    /// Valid for this TTL, but a family failed that has no earlier answer. Its addresses may be the ones that work.
    Partial(Duration),
    /// No new answer, with or without an old one to use.
    Failed {
        /// The longest time until the next query.
        longest: Duration,
    },
}

/// One family's last good answer, and since when there has been no newer one.
#[derive(Clone, Debug, Default)]
struct Remembered {
    good: Option<Good>,
    /// Instead of it, an answer that `allow` does not list. Other settings may allow it.
    refused: Option<Good>,
    failing: Option<Failing>,
}

#[derive(Clone, Debug)]
struct Good {
    true_name: TrueName,
    chain: Chain,
    at: Instant,
}

#[derive(Clone, Copy, Debug)]
struct Failing {
    since: Instant,
    /// Since when DNS has been responding that there is nothing. A timeout in between does not restart it.
    denied_since: Option<Instant>,
    denied_now: bool,
}

impl Answers {
    /// The queried name. `None` before the first query.
    pub fn name(&self) -> Option<&Arc<str>> {
        self.name.as_ref()
    }

    fn families(&self) -> [&Remembered; 2] {
        [&self.v4, &self.v6]
    }

    /// Since when all of it has been old. `None` if some of it is new.
    fn stale_since(&self) -> Option<Instant> {
        let good = self.families().into_iter().filter(|family| family.good.is_some());
        let since = good.map(|family| family.failing.map(|failing| failing.since));
        since.min().flatten()
    }

    /// The good answers of both families, the leading one first.
    fn good(&self) -> impl Iterator<Item = &Good> {
        self.families().into_iter().filter_map(|family| family.good.as_ref())
    }
}

impl Memory {
    /// Nothing is known yet.
    pub fn new(question: Arc<Question>, dns: &config::Dns) -> Memory {
        Memory {
            question,
            limits: Limits::new(dns),
            answers: Answers::default(),
            newest: None,
            generation: 0,
            ttl: None,
            in_cluster: false,
            state: ResolutionState::default(),
        }
    }

    /// The question that it is about.
    pub fn question(&self) -> &Arc<Question> {
        &self.question
    }

    /// What DNS has returned so far.
    pub fn answers(&self) -> &Answers {
        &self.answers
    }

    /// The state to publish.
    pub fn state(&self) -> &ResolutionState {
        &self.state
    }

    /// What the newest round means for the time of the next one.
    pub fn outlook(&self) -> Outlook {
        match self.ttl {
            Some(ttl) if self.answers.families().iter().any(|family| family.is_missing()) => {
                Outlook::Partial(ttl)
            }
            Some(ttl) => Outlook::Whole(ttl),
            None if self.state.current.is_none() => {
                Outlook::Failed { longest: LONGEST_RETRY_UNSERVED }
            }
            None if self.in_cluster => {
                Outlook::Failed { longest: LONGEST_RETRY.min(self.limits.cluster_max_ttl) }
            }
            None => Outlook::Failed { longest: LONGEST_RETRY },
        }
    }

    /// Takes in the results of both families.
    pub fn absorb(&mut self, round: Round, cluster_domain: &str, now: Instant) {
        self.in_cluster = round.names().any(|name| in_domain(name, cluster_domain));
        if let Some(name) = round.names().next() {
            self.turn_to(name, cluster_domain);
        }
        match Finding::of(round, &self.question, cluster_domain, now) {
            Finding::Good { leading, families } => self.accept(&leading, *families, now),
            Finding::Refused(good) => self.refuse(&good, now),
            Finding::Failed { v4, v6 } => self.fail(v4, v6, now),
        }
    }

    /// Continues with another question about the same target, and with other settings. What is known is re-evaluated.
    pub fn adopt(&mut self, question: Arc<Question>, dns: &config::Dns, now: Instant) {
        self.limits = Limits::new(dns);
        if *question != *self.question {
            self.question = question;
            self.judge_anew(now);
        }
        self.expire(now);
    }

    /// Takes over what another inquiry knows about the name. Must be called before anything else is known.
    pub fn recall(&mut self, answers: Answers, now: Instant) {
        let domain = &answers.cluster_domain;
        self.in_cluster = answers
            .good()
            .any(|good| good.chain.names().iter().any(|name| in_domain(name, domain)));
        self.answers = answers;
        self.judge_anew(now);
        if self.state.current.is_some() {
            self.state.stale_since = self.answers.stale_since();
        }
        self.expire(now);
    }

    /// Queries use this name from now on. Answers about another name are dropped, because another namespace belongs to
    /// another tenant.
    pub fn turn_to(&mut self, name: &str, cluster_domain: &str) {
        if self.answers.name.as_deref().is_some_and(|before| before != name) {
            self.answers = Answers::default();
            self.state = ResolutionState::default();
        }
        self.answers.name.get_or_insert_with(|| Arc::from(name));
        cluster_domain.clone_into(&mut self.answers.cluster_domain);
    }

    /// Derives the true names of the known answers again.
    fn judge_anew(&mut self, now: Instant) {
        let question = self.question.clone();
        let rule = question.rule(&self.answers.cluster_domain);
        let mut refused = None;
        let mut leading: Option<Good> = None;
        for family in [&mut self.answers.v4, &mut self.answers.v6] {
            let known = family.refused.take();
            let judged = family.good.take().or(known).and_then(|good| {
                let true_name = rule.true_name(good.chain.names()).ok()?;
                Some(Good { true_name, ..good })
            });
            match judged {
                Some(good) if !question.allows(&good.true_name) => {
                    family.refused = Some(good.clone());
                    refused = Some(good);
                }
                Some(good) if leading.as_ref().is_none_or(|l| l.true_name == good.true_name) => {
                    leading.get_or_insert_with(|| good.clone());
                    family.good = Some(good);
                }
                _ => {}
            }
        }
        if let Some(leading) = leading {
            let was_refused = self.state.refused.take().is_some();
            if was_refused {
                self.state.error = None;
            }
            if was_refused || self.state.current.is_none() {
                self.state.stale_since = self.answers.stale_since();
            }
            self.answers.v4.refused = None;
            self.answers.v6.refused = None;
            return self.combine(&leading);
        }
        self.state = ResolutionState::default();
        if let Some(refused) = refused {
            self.state_refusal(&refused, now);
        }
    }

    fn accept(&mut self, leading: &Good, [v4, v6]: [Result<Good, ResolveError>; 2], now: Instant) {
        let limits = self.limits;
        for (family, result) in [(&mut self.answers.v4, v4), (&mut self.answers.v6, v6)] {
            family.update(result, &leading.true_name, &limits, now);
        }
        self.combine(leading);
        self.ttl = self.state.current.as_ref().map(|current| current.ttl);
        self.state.error = None;
        self.state.refused = None;
        self.state.stale_since = None;
    }

    /// The last good answer stays in use however long the refusal lasts: whoever set `allow` trusts it more than DNS.
    fn refuse(&mut self, good: &Good, now: Instant) {
        for family in [&mut self.answers.v4, &mut self.answers.v6] {
            family.failing = None;
            family.refused.take_if(|known| known.true_name != good.true_name);
        }
        self.state_refusal(good, now);
    }

    fn state_refusal(&mut self, good: &Good, now: Instant) {
        self.ttl = Some(self.limits.clamp(good.chain.ttl(), self.in_cluster));
        let refusal = Arc::new(Refusal {
            true_name: good.true_name.clone(),
            chain: good.chain.names().to_vec(),
            allow: self.question.allow.clone(),
        });
        if self.state.current.is_some() {
            self.state.stale_since.get_or_insert(now);
        }
        self.state.error = Some(Arc::new(ResolveError::NotAllowed(refusal.clone())));
        self.state.refused = Some(refusal);
    }

    fn fail(&mut self, v4: ResolveError, v6: ResolveError, now: Instant) {
        self.answers.v4.fail(v4.is_denial(), now);
        self.answers.v6.fail(v6.is_denial(), now);
        let error = if telling(&v4) > telling(&v6) { v4 } else { v6 };
        self.ttl = None;
        self.state.refused = None;
        self.state.error = Some(Arc::new(error));
        if self.state.current.is_some() {
            self.state.stale_since.get_or_insert(now);
        }
        self.expire(now);
    }

    /// Drops what may no longer be used.
    pub fn expire(&mut self, now: Instant) {
        let limits = self.limits;
        for family in [&mut self.answers.v4, &mut self.answers.v6] {
            if family.expiry(&limits).is_some_and(|expiry| expiry <= now) {
                family.good = None;
                family.refused = None;
            }
        }
        let left = self.answers.good().next().cloned();
        match left {
            Some(good) => self.combine(&good),
            None => {
                self.state.current = None;
                self.state.stale_since = None;
            }
        }
    }

    /// When [`expire`](Memory::expire) will next have something to do, unless a good answer comes first.
    pub fn expiry(&self) -> Option<Instant> {
        self.answers.families().iter().filter_map(|family| family.expiry(&self.limits)).min()
    }

    /// Builds the resolution from both families' answers. The chain is that of `leading`.
    fn combine(&mut self, leading: &Good) {
        if self.newest.as_ref() != Some(&leading.true_name) {
            self.generation += 1;
            self.newest = Some(leading.true_name.clone());
        }
        let good: Vec<&Good> = self.answers.good().collect();
        let ttl = good.iter().map(|good| good.chain.ttl()).min().unwrap_or(0);
        let mut addresses: Vec<IpAddr> = Vec::new();
        for ip in good.iter().flat_map(|good| good.chain.addresses()) {
            if !addresses.contains(ip) {
                addresses.push(*ip);
            }
        }
        let rule = self.question.rule(&self.answers.cluster_domain);
        let names = leading.chain.names();
        let led_to = Rule { server_name: None, ..rule }.true_name(names);
        let destination = match led_to {
            Ok(name) => Arc::from(name.as_str()),
            Err(_) => leading.chain.end().clone(),
        };
        self.state.current = Some(Arc::new(Resolution {
            generation: self.generation,
            true_name: leading.true_name.clone(),
            destination,
            chain: leading.chain.names().to_vec(),
            addresses,
            ttl: self.limits.clamp(ttl, self.in_cluster),
            resolved_at: good.iter().map(|good| good.at).max().unwrap_or(leading.at),
        }));
    }
}

impl Finding {
    fn of(round: Round, question: &Question, cluster_domain: &str, now: Instant) -> Finding {
        let rule = question.rule(cluster_domain);
        let (leading, v4, v6) = match [round.v4, round.v6].map(|walked| good(walked, &rule, now)) {
            [Err(v4), Err(v6)] => return Finding::Failed { v4, v6 },
            [Ok(v4), v6] => (v4.clone(), Ok(v4), v6),
            [v4, Ok(v6)] => (v6.clone(), v4, Ok(v6)),
        };
        if !question.allows(&leading.true_name) {
            return Finding::Refused(leading);
        }
        Finding::Good { leading, families: Box::new([v4, v6]) }
    }
}

impl Limits {
    fn new(dns: &config::Dns) -> Limits {
        Limits {
            min_ttl: dns.min_ttl,
            max_ttl: dns.max_ttl,
            cluster_max_ttl: dns.cluster_max_ttl,
            stale: dns.stale,
            nxdomain_hold: dns.nxdomain_hold,
        }
    }

    /// Cluster DNS knows of a change at once, but a cache in front of it uses one TTL for its records and for external
    /// ones that they lead to.
    fn clamp(&self, seconds: u32, in_cluster: bool) -> Duration {
        let longest =
            if in_cluster { self.max_ttl.min(self.cluster_max_ttl) } else { self.max_ttl };
        Duration::from_secs(seconds.into()).min(longest).max(self.min_ttl)
    }
}

impl Remembered {
    /// `newest` is the current true name. An answer with another true name is dropped: its addresses must never be used
    /// with the new name.
    fn update(
        &mut self,
        result: Result<Good, ResolveError>,
        newest: &TrueName,
        limits: &Limits,
        now: Instant,
    ) {
        self.refused = None;
        match result {
            Ok(good) => {
                self.good = Some(good).filter(|good| good.true_name == *newest);
                self.failing = None;
            }
            Err(error) => self.fail(error.is_denial(), now),
        }
        let old_name = self.good.as_ref().is_some_and(|good| good.true_name != *newest);
        if old_name || self.expiry(limits).is_some_and(|expiry| expiry <= now) {
            self.good = None;
        }
    }

    fn fail(&mut self, denied: bool, now: Instant) {
        let failing = self.failing.get_or_insert(Failing {
            since: now,
            denied_since: None,
            denied_now: false,
        });
        failing.denied_now = denied;
        if denied {
            failing.denied_since.get_or_insert(now);
        }
    }

    fn is_missing(&self) -> bool {
        self.good.is_none() && self.failing.is_some_and(|failing| !failing.denied_now)
    }

    fn expiry(&self, limits: &Limits) -> Option<Instant> {
        let is_known = self.good.is_some() || self.refused.is_some();
        let failing = self.failing.filter(|_| is_known)?;
        let stale = failing.since + limits.stale;
        let denied = failing.denied_since.filter(|_| failing.denied_now);
        Some(denied.map_or(stale, |since| stale.min(since + limits.nxdomain_hold)))
    }
}

fn good(
    walked: Result<Chain, ResolveError>,
    rule: &Rule<'_>,
    now: Instant,
) -> Result<Good, ResolveError> {
    let chain = walked?;
    let true_name = rule.true_name(chain.names()).map_err(ResolveError::Chain)?;
    Ok(Good { true_name, chain, at: now })
}

/// How much an error explains: "there is no AAAA" explains nothing if A timed out.
fn telling(error: &ResolveError) -> u8 {
    match error {
        ResolveError::Lookup { error, .. } => match error.failure {
            Failure::NoData => 0,
            Failure::NxDomain => 1,
            _ => 2,
        },
        _ => 3,
    }
}

#[cfg(test)]
mod tests;
