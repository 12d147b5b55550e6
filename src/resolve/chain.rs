//! The CNAME walk and the true-name rule. Pure: records in, names out.

use super::names::{self, in_domain};
use crate::config::NamePattern;
use std::{collections::HashMap, fmt, net::IpAddr, sync::Arc};

/// CNAMEs that are followed; real chains have four or five.
pub const MAX_STEPS: usize = 16;

/// The one name that is SNI, verified certificate name and `Host`; or an IP address, which the certificate must list.
///
/// Lower-case, IDNA-encoded, without the trailing dot. **Invariant:** only [`Rule`] makes one, so a `TrueName` is
/// always the result of the rule.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrueName {
    text: Arc<str>,
    ip: Option<IpAddr>,
}

impl TrueName {
    fn new(text: &str) -> TrueName {
        let ip: Option<IpAddr> = text.parse().ok();
        let text = match ip {
            Some(ip) => ip.to_string(),
            None => names::normalise(text).unwrap_or_else(|_| names::fold(text)),
        };
        TrueName { text: Arc::from(text), ip }
    }

    /// For tests of the modules that only use a true name.
    #[cfg(test)]
    pub(crate) fn for_test(text: &str) -> TrueName {
        TrueName::new(text)
    }

    /// The name, or the IP in digits (IPv6 without brackets).
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether this is an address: then no SNI is sent (RFC 6066, section 3).
    pub fn is_ip(&self) -> bool {
        self.ip.is_some()
    }

    /// The address, if this is one.
    pub fn ip(&self) -> Option<IpAddr> {
        self.ip
    }
}

impl fmt::Display for TrueName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// How the true name is derived from a chain: the settings that matter for it.
#[derive(Clone, Copy, Debug)]
pub struct Rule<'a> {
    /// An alias that is resolved by DNS never has a true name in or under this domain.
    pub cluster_domain: &'a str,
    /// Overrides everything else.
    pub server_name: Option<&'a str>,
    /// Chooses among the names outside the cluster.
    pub chain_match: &'a [NamePattern],
    /// The chain's first name comes from `target:`, and is its own true name.
    pub is_configured: bool,
    /// Nothing is verified, so the end of the chain may be inside the cluster.
    pub plaintext: bool,
}

impl Rule<'_> {
    /// The true name for a chain that begins with the alias (or the configured target).
    pub fn true_name(&self, chain: &[Arc<str>]) -> Result<TrueName, ChainError> {
        if let Some(name) = self.server_name {
            return Ok(TrueName::new(name));
        }
        let after_alias = if self.is_configured { 0 } else { 1 };
        let mut outside =
            chain.iter().skip(after_alias).filter(|name| !in_domain(name, self.cluster_domain));
        let matches = |name: &&Arc<str>| self.chain_match.iter().any(|p| p.matches(name));
        if let Some(name) = outside.clone().find(matches) {
            return Ok(TrueName::new(name));
        }
        match chain {
            [target, ..] if self.is_configured => return Ok(TrueName::new(target)),
            [alias] if !in_domain(alias, self.cluster_domain) => return Ok(TrueName::new(alias)),
            _ => {}
        }
        match (outside.next(), chain.last()) {
            (Some(name), _) => Ok(TrueName::new(name)),
            (None, Some(end)) if self.plaintext => Ok(TrueName::new(end)),
            _ => Err(ChainError::EndsInCluster {
                chain: chain.to_vec(),
                domain: Arc::from(self.cluster_domain),
            }),
        }
    }
}

/// A CNAME, A or AAAA record of a response. Its names are folded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    owner: Arc<str>,
    ttl: u32,
    data: Data,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Data {
    Cname(Arc<str>),
    Address(IpAddr),
}

impl Record {
    /// `owner ttl CNAME target`.
    pub fn cname(owner: &str, ttl: u32, target: &str) -> Record {
        Record {
            owner: Arc::from(names::fold(owner)),
            ttl,
            data: Data::Cname(Arc::from(names::fold(target))),
        }
    }

    /// The record's owner name.
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// `owner ttl A ip`, or AAAA.
    pub fn address(owner: &str, ttl: u32, ip: IpAddr) -> Record {
        Record { owner: Arc::from(names::fold(owner)), ttl, data: Data::Address(ip) }
    }
}

/// The names from the queried name towards the addresses, as far as they are known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    names: Vec<Arc<str>>,
    end: Arc<str>,
    addresses: Vec<IpAddr>,
    ttl: Option<u32>,
}

/// How far a walk got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Walked {
    /// The chain has its addresses.
    Complete(Chain),
    /// The response's CNAMEs lead to a name that it has no records for: query [`Chain::end`].
    AskForEnd(Chain),
    /// The response has no records for the queried name.
    Nothing(Chain),
}

impl Chain {
    /// The chain before any response.
    pub fn new(question: &str) -> Chain {
        let question: Arc<str> = Arc::from(names::fold(question));
        Chain { names: vec![question.clone()], end: question, addresses: Vec::new(), ttl: None }
    }

    /// The chain of a target that is an IP address: there is nothing to query, and nothing expires.
    pub fn of_ip(ip: IpAddr) -> Chain {
        Chain { addresses: vec![ip], ttl: Some(u32::MAX), ..Chain::new(&ip.to_string()) }
    }

    /// The same for good: a name that is not to be queried does not expire.
    pub fn lasting(self) -> Chain {
        Chain { ttl: Some(self.ttl.unwrap_or(u32::MAX)), ..self }
    }

    /// Continues from the end through the records of one response, which may be in any order.
    pub fn walk(mut self, records: &[Record]) -> Result<Walked, ChainError> {
        let start = self.end.clone();
        let mut links: HashMap<&str, Vec<(&Arc<str>, u32)>> = HashMap::new();
        for record in records {
            if let Data::Cname(target) = &record.data {
                let of_owner = links.entry(&record.owner).or_default();
                of_owner.push((target, record.ttl));
            }
        }
        while let Some(found) = links.get(&*self.end) {
            self.follow(found)?;
        }
        let end = self.end.clone();
        for record in records.iter().filter(|record| record.owner == end) {
            if let Data::Address(ip) = record.data {
                self.use_ttl(record.ttl);
                if !self.addresses.contains(&ip) {
                    self.addresses.push(ip);
                }
            }
        }
        Ok(if !self.addresses.is_empty() {
            Walked::Complete(self)
        } else if end != start {
            Walked::AskForEnd(self)
        } else {
            Walked::Nothing(self)
        })
    }

    fn follow(&mut self, links: &[(&Arc<str>, u32)]) -> Result<(), ChainError> {
        let Some((target, _)) = links.first() else {
            return Ok(());
        };
        // RFC 2181, section 10.1: one CNAME per name. With several, the order in the packet would decide.
        if let Some((other, _)) = links.iter().find(|(other, _)| other != target) {
            let mut targets = [Arc::clone(target), Arc::clone(other)];
            targets.sort();
            return Err(ChainError::Conflict { chain: self.names.clone(), targets });
        }
        if target.is_empty() {
            return Err(ChainError::Root { chain: self.names.clone() });
        }
        let repeated = self.names.contains(target);
        self.names.push(Arc::clone(target));
        if repeated {
            return Err(ChainError::Loop { chain: self.names.clone() });
        }
        if self.names.len() > MAX_STEPS + 1 {
            return Err(ChainError::TooLong { chain: self.names.clone() });
        }
        self.end = Arc::clone(target);
        for (_, ttl) in links {
            self.use_ttl(*ttl);
        }
        Ok(())
    }

    fn use_ttl(&mut self, ttl: u32) {
        self.ttl = Some(self.ttl.map_or(ttl, |least| least.min(ttl)));
    }

    /// From the queried name to the end.
    pub fn names(&self) -> &[Arc<str>] {
        &self.names
    }

    /// The last name: the one that has the addresses, or the one to query next.
    pub fn end(&self) -> &Arc<str> {
        &self.end
    }

    /// In the order of the response, each once.
    pub fn addresses(&self) -> &[IpAddr] {
        &self.addresses
    }

    /// The lowest TTL of all records that were used, in seconds; 0 before the first.
    pub fn ttl(&self) -> u32 {
        self.ttl.unwrap_or(0)
    }
}

/// Why the records form no chain, or the chain gives no true name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A name leads back to itself.
    #[error("the CNAME chain loops: {}", arrows(chain))]
    Loop {
        /// Up to and including the name that occurs twice.
        chain: Vec<Arc<str>>,
    },
    /// More than [`MAX_STEPS`].
    #[error("the CNAME chain has more than {MAX_STEPS} steps: {}", arrows(chain))]
    TooLong {
        /// As far as it was followed.
        chain: Vec<Arc<str>>,
    },
    /// Two CNAMEs for one name.
    #[error("the chain {} forks: its end has two CNAME records, to {} and to {}", arrows(chain), targets[0], targets[1])]
    Conflict {
        /// Up to the name with two CNAMEs.
        chain: Vec<Arc<str>>,
        /// Sorted, so that the order in the packet does not matter.
        targets: [Arc<str>; 2],
    },
    /// A CNAME to `.`, which means that the name is not in use.
    #[error("the CNAME chain {} ends at the root of DNS (`.`), which is not a host", arrows(chain))]
    Root {
        /// Up to the name that has this CNAME.
        chain: Vec<Arc<str>>,
    },
    /// No name of the chain lies outside the cluster.
    #[error(
        "the chain {} ends inside the cluster ({domain}), so none of its names can be the true name",
        arrows(chain)
    )]
    EndsInCluster {
        /// All of it.
        chain: Vec<Arc<str>>,
        /// The cluster's domain.
        domain: Arc<str>,
    },
}

impl ChainError {
    /// The names, starting with the queried one.
    pub fn chain(&self) -> &[Arc<str>] {
        match self {
            ChainError::Loop { chain }
            | ChainError::TooLong { chain }
            | ChainError::Conflict { chain, .. }
            | ChainError::Root { chain }
            | ChainError::EndsInCluster { chain, .. } => chain,
        }
    }

    /// The key that fixes it.
    pub fn fix(&self) -> &'static str {
        match self {
            ChainError::EndsInCluster { .. } => {
                "set `tls.server_name` to the name that the server's certificate is valid for, or set `tls.mode: plaintext` if the Service does not use TLS"
            }
            _ => {
                "correct the Service's `externalName` or the CNAME records it leads to, or name the target in `target:`"
            }
        }
    }
}

/// `a → b → c`, as chains are shown to people.
pub fn arrows(chain: &[Arc<str>]) -> String {
    chain.join(" → ")
}

#[cfg(test)]
mod tests;
