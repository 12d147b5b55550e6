//! From an alias to its true name and addresses, in the background.
//!
//! [`environment`] knows where names are resolved, [`names`] makes the absolute name to query, [`lookup`] asks the
//! servers in turn (each by `exchange`), [`chain`] walks the response and decides the true name, [`memory`] knows what
//! may still be used while DNS fails, and [`refresh`] repeats all of it before the TTL expires. The request path only
//! reads the latest [`ResolutionState`].

pub mod chain;
pub mod environment;
pub mod error;
mod exchange;
pub mod lookup;
pub mod memory;
pub mod names;
pub mod refresh;
mod report;
#[cfg(test)]
mod tests;

pub use chain::TrueName;
pub use environment::{Environment, ResolvConf};
pub use error::{Refusal, ResolveError};
pub use refresh::{Resolver, Subscription};

use crate::config::{self, NamePattern, TargetHost, TlsMode};
use chain::Rule;
use names::in_domain;
use std::{net::IpAddr, sync::Arc, time::Duration};
use tokio::time::Instant;

/// What is to be resolved, and the rules for its true name: one for each target of an alias.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// As configured; also the label of metrics and logs.
    pub alias: Arc<str>,
    /// The configured `target:`. Without one, DNS is asked for the alias.
    pub target: Option<TargetHost>,
    /// Overrides the true name.
    pub server_name: Option<String>,
    /// The first name of the chain that matches is the true name.
    pub chain_match: Vec<NamePattern>,
    /// True names that are accepted; empty accepts any.
    pub allow: Vec<NamePattern>,
    /// Without TLS, the true name may be inside the cluster.
    pub plaintext: bool,
    /// What is wanted of the name.
    pub purpose: Purpose,
}

/// What is wanted of a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Its true name and the addresses, which are dialled.
    Dial,
    /// Its true name: a proxy is asked for it, and resolves it.
    AskProxy,
    /// The addresses of that proxy.
    DialProxy,
}

impl Question {
    /// The question for one target of an alias; without a target, for the alias itself.
    pub fn new(alias: &config::Alias, target: Option<TargetHost>) -> Question {
        Question {
            alias: Arc::from(alias.name.as_str()),
            target,
            server_name: alias.tls.server_name.clone(),
            chain_match: alias.tls.chain_match.clone(),
            allow: alias.allow.clone(),
            plaintext: alias.tls.mode == TlsMode::Plaintext,
            purpose: if alias.via.is_some() { Purpose::AskProxy } else { Purpose::Dial },
        }
    }

    /// The question for the addresses of an alias' proxy.
    pub fn of_proxy(alias: &config::Alias, proxy: TargetHost) -> Question {
        Question {
            alias: Arc::from(alias.name.as_str()),
            target: Some(proxy),
            server_name: None,
            chain_match: Vec::new(),
            allow: Vec::new(),
            plaintext: true,
            purpose: Purpose::DialProxy,
        }
    }

    /// How the true name is derived from a chain.
    fn rule<'a>(&'a self, cluster_domain: &'a str) -> Rule<'a> {
        Rule {
            cluster_domain,
            server_name: self.server_name.as_deref(),
            chain_match: &self.chain_match,
            is_configured: self.target.is_some(),
            plaintext: self.plaintext,
        }
    }

    /// Whether these names of a chain are all that its true name depends on.
    fn is_settled(&self, names: &[Arc<str>], environment: &Environment) -> bool {
        let leads_out = || {
            let (first, last) = (names.first(), names.last());
            first != last && last.is_some_and(|last| !in_domain(last, &environment.cluster_domain))
        };
        self.chain_match.is_empty() && (self.target.is_some() || leads_out())
    }

    fn allows(&self, true_name: &TrueName) -> bool {
        self.allow.is_empty() || self.allow.iter().any(|p| p.matches(true_name.as_str()))
    }
}

/// One successful resolution. Immutable, published as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolution {
    /// Increases by one with each new true name (a failover). New addresses (a rotation) do not change it.
    pub generation: u64,
    /// The one name that everything upstream is derived from.
    pub true_name: TrueName,
    /// The host to ask a proxy for: what leads to the target, even where `tls.server_name` is another name.
    pub destination: Arc<str>,
    /// The names from the alias to its addresses, in the order of the links, no trailing dots.
    pub chain: Vec<Arc<str>>,
    /// Both families, in the order DNS gave them; empty only where a proxy is asked for the target.
    pub addresses: Vec<IpAddr>,
    /// The lowest TTL of the chain, within the configured limits.
    pub ttl: Duration,
    /// When DNS last confirmed any of this.
    pub resolved_at: Instant,
}

/// What is known about a [`Question`] now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ResolutionState {
    /// What new requests use: the last good answer, for as long as it may be used.
    pub current: Option<Arc<Resolution>>,
    /// Why the last attempt failed; none after a good answer.
    pub error: Option<Arc<ResolveError>>,
    /// Since when `current` has been an old answer.
    pub stale_since: Option<Instant>,
    /// The true name from DNS that `allow` refuses.
    pub refused: Option<Arc<Refusal>>,
}

impl ResolutionState {
    /// Whether there is no result yet, neither good nor bad.
    pub fn is_pending(&self) -> bool {
        self.current.is_none() && self.error.is_none()
    }

    /// Whether this is a true name from DNS that `allow` refuses.
    pub fn refuses(&self, true_name: &TrueName) -> bool {
        self.refused.as_ref().is_some_and(|refused| refused.true_name == *true_name)
    }
}
