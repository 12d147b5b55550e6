//! Why an alias has no new answer, in words that end with the key that mends it.

use super::{
    chain::{ChainError, TrueName, arrows},
    lookup::LookupError,
    names::{NameError, looks_like_address},
};
use crate::config::NamePattern;
use std::{fmt, sync::Arc};

/// Why a question has no (new) resolution. Its text is [`what`](ResolveError::what) and [`fix`](ResolveError::fix).
#[derive(Clone, Debug, PartialEq)]
pub enum ResolveError {
    /// DNS gave no addresses.
    Lookup {
        /// The names up to the one that failed.
        chain: Vec<Arc<str>>,
        /// Where that name comes from.
        place: Place,
        /// What the servers said.
        error: LookupError,
    },
    /// DNS answered, but the answer makes no chain or no true name.
    Chain(ChainError),
    /// DNS gave a true name that `allow` does not list.
    NotAllowed(Arc<Refusal>),
    /// The alias or the target cannot be asked for.
    Name(NameError),
}

/// Where the name comes from that a lookup failed for: it decides which key mends it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The alias, as a Service of the cluster.
    Service,
    /// The alias, as a name outside the cluster.
    Alias,
    /// `target:` in the configuration.
    Target,
    /// A later name of the chain.
    Chain,
}

impl ResolveError {
    /// What happened, and where.
    pub fn what(&self) -> String {
        match self {
            ResolveError::Lookup { chain, error, .. } if chain.len() > 1 => {
                format!("{error} (the chain is {})", arrows(chain))
            }
            ResolveError::Lookup { error, .. } => error.to_string(),
            ResolveError::Chain(error) => error.to_string(),
            ResolveError::NotAllowed(refusal) => refusal.what(),
            ResolveError::Name(error) => {
                format!("`{}` cannot be a DNS name: {}", error.name, error.reason)
            }
        }
    }

    /// The key or command that mends it.
    pub fn fix(&self) -> String {
        match self {
            ResolveError::Lookup { chain, place, error } => {
                lookup_fix(chain.last().map_or("", |name| name), *place, error).to_owned()
            }
            ResolveError::Chain(error) => error.fix().to_owned(),
            ResolveError::NotAllowed(refusal) => refusal.fix(),
            ResolveError::Name(_) => "correct the alias' `name:` or its `target:`".to_owned(),
        }
    }

    /// The names, as far as they are known.
    pub fn chain(&self) -> &[Arc<str>] {
        match self {
            ResolveError::Lookup { chain, .. } => chain,
            ResolveError::Chain(error) => error.chain(),
            ResolveError::NotAllowed(refusal) => &refusal.chain,
            ResolveError::Name(_) => &[],
        }
    }

    /// Whether nobody answered in time: 504 rather than 503.
    pub fn is_timeout(&self) -> bool {
        matches!(self, ResolveError::Lookup { error: LookupError::Timeout { .. }, .. })
    }

    /// Whether DNS did answer, and said that there is nothing usable: the last good answer then serves for
    /// `nxdomain_hold`, not for `stale`.
    pub fn is_denial(&self) -> bool {
        match self {
            ResolveError::Lookup { error, .. } => error.is_denial(),
            ResolveError::Chain(_) | ResolveError::NotAllowed(_) | ResolveError::Name(_) => true,
        }
    }
}

impl fmt::Display for ResolveError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.what(), self.fix())
    }
}

impl std::error::Error for ResolveError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            ResolveError::Lookup { error, .. } => Some(error),
            ResolveError::Chain(error) => Some(error),
            ResolveError::Name(error) => Some(error),
            ResolveError::NotAllowed(_) => None,
        }
    }
}

fn lookup_fix(name: &str, place: Place, error: &LookupError) -> &'static str {
    match (error, place) {
        (
            LookupError::NxDomain { .. } | LookupError::NoData { .. },
            Place::Target | Place::Chain,
        ) if looks_like_address(name) => {
            "the name looks like a mistyped IP address: write the address, without leading zeros, in `target:`"
        }
        (LookupError::NxDomain { .. }, Place::Service) => {
            "there is no such Service (create it, or correct `name:`, `dns.namespace` or `dns.cluster_domain`), or its `externalName` is an IP address, which DNS cannot show: write the address in `target:`"
        }
        (LookupError::NoData { .. }, Place::Service) => {
            "the Service is there but leads nowhere: its `externalName` is itself, a ring, or a Service that is missing or has no endpoints; correct `externalName`, or name the target in `target:`"
        }
        (LookupError::NxDomain { .. } | LookupError::NoData { .. }, Place::Alias) => {
            "correct the alias' `name:`, or say where it leads in `target:`"
        }
        (LookupError::NxDomain { .. } | LookupError::NoData { .. }, Place::Target) => {
            "correct `target:`"
        }
        (LookupError::NxDomain { .. } | LookupError::NoData { .. }, Place::Chain) => {
            "correct the Service's `externalName` or the CNAME record that leads there, or name the target in `target:`"
        }
        (LookupError::ServFail { .. } | LookupError::Code { .. }, _) => {
            "look at that server's log and its upstream servers (CoreDNS: `forward`), or choose others in `dns.servers`"
        }
        (LookupError::Refused { .. }, _) => {
            "that server does not serve this client or this name: choose others in `dns.servers`"
        }
        (LookupError::Timeout { .. }, Place::Service) => {
            "check that the servers are right (`dns.servers`, else resolv.conf) and that a NetworkPolicy lets port 53 through; CoreDNS also stays silent for an `externalName` with a label of more than 63 characters"
        }
        (LookupError::Timeout { .. } | LookupError::Io { .. }, _) => {
            "check that the servers are right (`dns.servers`, else resolv.conf) and that a NetworkPolicy lets port 53 through"
        }
        (LookupError::Unaskable { .. }, _) => "correct the alias' `name:` or its `target:`",
        (LookupError::Malformed { .. }, _) => {
            "check that a DNS server listens there, or choose others in `dns.servers`"
        }
        (LookupError::NoServers, _) => "name at least one server in `dns.servers`",
    }
}

/// A true name that DNS gives and `allow` refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// What was refused.
    pub true_name: TrueName,
    /// How DNS led there.
    pub chain: Vec<Arc<str>>,
    /// What is allowed.
    pub allow: Vec<NamePattern>,
}

impl Refusal {
    /// What happened.
    pub fn what(&self) -> String {
        let allowed: Vec<_> = self.allow.iter().map(|pattern| pattern.0.as_str()).collect();
        format!(
            "the alias leads to {}, which `allow` does not list (it lists {}); the chain is {}",
            self.true_name,
            allowed.join(", "),
            arrows(&self.chain)
        )
    }

    /// The key that mends it.
    pub fn fix(&self) -> String {
        format!(
            "if the change is wanted, add \"{}\" to `allow`; else correct the Service's `externalName`",
            self.true_name
        )
    }
}
