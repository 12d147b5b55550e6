//! What still holds: the last good answer of each family, for how long it may serve, and when a name is new. Pure, given
//! the time.

use super::{
    Question, Resolution, State, TrueName,
    chain::{Chain, Rule},
    error::{Failure, Refusal, ResolveError},
    lookup::Round,
    names::in_domain,
};
use crate::config;
use std::{net::IpAddr, sync::Arc, time::Duration};
use tokio::time::Instant;

/// However long DNS has failed, it is asked again after this long.
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// While there is nothing to serve: whoever mends the Service waits for the proxy to see it.
const LONGEST_RETRY_UNSERVED: Duration = Duration::from_secs(5);

/// The answers to one question over time.
#[derive(Debug)]
pub struct Memory {
    question: Arc<Question>,
    limits: Limits,
    v4: Remembered,
    v6: Remembered,
    /// The true name of the newest generation, also while it has no addresses left.
    newest: Option<TrueName>,
    generation: u64,
    /// Of the newest answer, also of a refused one; none after a failure.
    ttl: Option<Duration>,
    /// Whether the name that was asked for, or any it led through, is the cluster's.
    in_cluster: bool,
    state: State,
}

#[derive(Clone, Copy, Debug)]
struct Limits {
    min_ttl: Duration,
    max_ttl: Duration,
    cluster_max_ttl: Duration,
    stale: Duration,
    nxdomain_hold: Duration,
}

/// What the newest round means for when to ask again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outlook {
    /// Good for this TTL.
    Whole(Duration),
    /// Good for this TTL, but a family failed that has nothing to fall back on: its addresses may be those that work.
    Partial(Duration),
    /// No new answer, with or without an old one to serve.
    Failed {
        /// The longest time until DNS is asked again.
        longest: Duration,
    },
}

/// One family's last good answer, and since when it has had no newer one.
#[derive(Debug, Default)]
struct Remembered {
    good: Option<Good>,
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
    /// Since when DNS has been saying that there is nothing. A time-out in between does not start it anew.
    denied_since: Option<Instant>,
    denied_now: bool,
}

impl Memory {
    /// Nothing known yet.
    pub fn new(question: Arc<Question>, dns: &config::Dns) -> Memory {
        Memory {
            question,
            limits: Limits {
                min_ttl: dns.min_ttl,
                max_ttl: dns.max_ttl,
                cluster_max_ttl: dns.cluster_max_ttl,
                stale: dns.stale,
                nxdomain_hold: dns.nxdomain_hold,
            },
            v4: Remembered::default(),
            v6: Remembered::default(),
            newest: None,
            generation: 0,
            ttl: None,
            in_cluster: false,
            state: State::default(),
        }
    }

    /// What to publish.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// What to expect until the next round.
    pub fn outlook(&self) -> Outlook {
        match self.ttl {
            Some(ttl) if self.v4.is_missing() || self.v6.is_missing() => Outlook::Partial(ttl),
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

    /// Takes in what both families came to.
    pub fn absorb(&mut self, round: Round, cluster_domain: &str, now: Instant) {
        self.in_cluster = round.names().any(|name| in_domain(name, cluster_domain));
        let question = self.question.clone();
        let rule = Rule {
            cluster_domain,
            server_name: question.server_name.as_deref(),
            chain_match: &question.chain_match,
            told: question.target.is_some(),
            plaintext: question.plaintext,
        };
        let [v4, v6] = [round.v4, round.v6].map(|walked| good(walked, &rule, now));
        // Should the families differ in the true name, one of them rules: mixed addresses would be called by a wrong one.
        let Some(fresh) = v4.as_ref().or(v6.as_ref()).ok().cloned() else {
            for (family, result) in [(&mut self.v4, &v4), (&mut self.v6, &v6)] {
                let denied = result.as_ref().is_err_and(ResolveError::is_denial);
                family.fail(denied, now);
            }
            let errors = [v4, v6].into_iter().filter_map(Result::err);
            return self.failed(errors.max_by_key(telling), now);
        };
        let allow = &question.allow;
        if !allow.is_empty() && !allow.iter().any(|p| p.matches(fresh.true_name.as_str())) {
            return self.refused(&fresh, now);
        }
        let limits = self.limits;
        for (family, result) in [(&mut self.v4, v4), (&mut self.v6, v6)] {
            family.update(result, &fresh.true_name, &limits, now);
        }
        self.combine(&fresh);
        self.ttl = self.state.current.as_ref().map(|current| current.ttl);
        self.state.error = None;
        self.state.refused = None;
        self.state.stale_since = None;
    }

    /// Lets go of what may not serve any longer.
    pub fn expire(&mut self, now: Instant) {
        let limits = self.limits;
        for family in [&mut self.v4, &mut self.v6] {
            if family.expiry(&limits).is_some_and(|expiry| expiry <= now) {
                family.good = None;
            }
        }
        let left = self.v4.good.as_ref().or(self.v6.good.as_ref());
        match left.cloned() {
            Some(good) => self.combine(&good),
            None => {
                self.state.current = None;
                self.state.stale_since = None;
            }
        }
    }

    /// When [`expire`](Memory::expire) will next have something to do, unless a good answer comes before.
    pub fn expiry(&self) -> Option<Instant> {
        let families = [&self.v4, &self.v6].into_iter();
        families.filter_map(|family| family.expiry(&self.limits)).min()
    }

    fn failed(&mut self, error: Option<ResolveError>, now: Instant) {
        self.ttl = None;
        self.state.refused = None;
        self.state.error = error.map(Arc::new);
        if self.state.current.is_some() {
            self.state.stale_since.get_or_insert(now);
        }
        self.expire(now);
    }

    /// The last good answer stays however long the refusal lasts: whoever listed `allow` trusts it more than DNS.
    fn refused(&mut self, fresh: &Good, now: Instant) {
        self.ttl = Some(self.limits.clamp(fresh.chain.ttl(), self.in_cluster));
        self.v4.failing = None;
        self.v6.failing = None;
        let refusal = Arc::new(Refusal {
            true_name: fresh.true_name.clone(),
            chain: fresh.chain.names().to_vec(),
            allow: self.question.allow.clone(),
        });
        if self.state.current.is_some() {
            self.state.stale_since.get_or_insert(now);
        }
        self.state.error = Some(Arc::new(ResolveError::NotAllowed(refusal.clone())));
        self.state.refused = Some(refusal);
    }

    /// Makes the resolution out of both families' answers, `leading` giving the chain.
    fn combine(&mut self, leading: &Good) {
        if self.newest.as_ref() != Some(&leading.true_name) {
            self.generation += 1;
            self.newest = Some(leading.true_name.clone());
        }
        let good: Vec<&Good> =
            [&self.v4, &self.v6].into_iter().filter_map(|f| f.good.as_ref()).collect();
        let ttl = good.iter().map(|good| good.chain.ttl()).min().unwrap_or(0);
        let mut addresses: Vec<IpAddr> = Vec::new();
        for ip in good.iter().flat_map(|good| good.chain.addresses()) {
            if !addresses.contains(ip) {
                addresses.push(*ip);
            }
        }
        self.state.current = Some(Arc::new(Resolution {
            generation: self.generation,
            true_name: leading.true_name.clone(),
            chain: leading.chain.names().to_vec(),
            addresses,
            ttl: self.limits.clamp(ttl, self.in_cluster),
            resolved_at: good.iter().map(|good| good.at).max().unwrap_or(leading.at),
        }));
    }
}

impl Limits {
    /// The cluster's DNS knows of a change at once, but a cache before it hands out one TTL for its records and for those
    /// behind them.
    fn clamp(&self, seconds: u32, in_cluster: bool) -> Duration {
        let longest =
            if in_cluster { self.max_ttl.min(self.cluster_max_ttl) } else { self.max_ttl };
        Duration::from_secs(seconds.into()).min(longest).max(self.min_ttl)
    }
}

impl Remembered {
    /// `newest` is the true name that holds now. An answer under another name is no answer to this question any more,
    /// and its addresses must never be called by the new name.
    fn update(
        &mut self,
        result: Result<Good, ResolveError>,
        newest: &TrueName,
        limits: &Limits,
        now: Instant,
    ) {
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
        let failing = self.failing.filter(|_| self.good.is_some())?;
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

/// Which of two families' errors says more: "there is no AAAA" explains nothing when A timed out.
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
