//! Why an alias could not be resolved. Each message ends with the key that fixes it.

use super::{
    chain::{ChainError, TrueName, arrows},
    environment::Unknown,
    names::{NameError, looks_like_address},
};
use crate::{config::NamePattern, fault::Kind};
use std::{fmt, net::SocketAddr, sync::Arc};

/// Why there is no (new) resolution. Its text is [`what`](ResolveError::what) and [`fix`](ResolveError::fix).
#[derive(Clone, Debug, PartialEq)]
pub enum ResolveError {
    /// DNS gave no addresses.
    Lookup {
        /// The names up to the one that failed.
        chain: Vec<Arc<str>>,
        /// Where that name comes from.
        place: Place,
        /// What the servers said.
        error: Box<LookupError>,
    },
    /// DNS responded, but the records form no chain, or the chain gives no true name.
    Chain(ChainError),
    /// `allow` does not list the true name from DNS.
    NotAllowed(Arc<Refusal>),
    /// The alias or the target is not a valid DNS name.
    Name(NameError),
    /// It is not known which namespace or cluster domain completes the name.
    Unknown {
        /// The name.
        name: String,
        /// Why.
        why: Unknown,
    },
}

/// Where a name whose lookup failed comes from. This decides which key fixes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// The alias, as a Service of the cluster.
    Service,
    /// The alias, as a name outside the cluster.
    Alias,
    /// `target:` in the configuration.
    Target,
    /// `via:` in the configuration.
    Proxy,
    /// A later name of the chain.
    Chain,
    /// A client of the forward proxy.
    Client,
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
            ResolveError::Unknown { name, why } => {
                format!("the namespace that completes `{name}` is not known: {why}")
            }
        }
    }

    /// The key or command that fixes it.
    pub fn fix(&self) -> String {
        match self {
            ResolveError::Lookup { place, error, .. } => {
                lookup_fix(&error.name, *place, &error.failure).to_owned()
            }
            ResolveError::Chain(error) => error.fix().to_owned(),
            ResolveError::NotAllowed(refusal) => refusal.fix(),
            ResolveError::Name(_) => "correct the alias' `name:` or its `target:`".to_owned(),
            ResolveError::Unknown { .. } => {
                "let truename read the file, or set `dns.namespace` and `dns.cluster_domain`"
                    .to_owned()
            }
        }
    }

    /// The names, as far as they are known.
    pub fn chain(&self) -> &[Arc<str>] {
        match self {
            ResolveError::Lookup { chain, .. } => chain,
            ResolveError::Chain(error) => error.chain(),
            ResolveError::NotAllowed(refusal) => &refusal.chain,
            ResolveError::Name(_) | ResolveError::Unknown { .. } => &[],
        }
    }

    /// The kind of failure, as for all other failures.
    pub fn kind(&self) -> Kind {
        match self.is_timeout() {
            true => Kind::DnsTimeout,
            false => Kind::DnsError,
        }
    }

    /// Whether the queries timed out: 504 rather than 503.
    pub fn is_timeout(&self) -> bool {
        match self {
            ResolveError::Lookup { error, .. } => match &error.failure {
                Failure::Tcp(_, failure) => **failure == Failure::Timeout,
                failure => *failure == Failure::Timeout,
            },
            _ => false,
        }
    }

    /// Whether DNS responded that there is nothing usable. The last good answer is then used for `nxdomain_hold`, not for
    /// `stale`.
    pub fn is_denial(&self) -> bool {
        match self {
            ResolveError::Lookup { error, .. } => error.is_denial(),
            ResolveError::Chain(_) | ResolveError::NotAllowed(_) | ResolveError::Name(_) => true,
            ResolveError::Unknown { .. } => false,
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
            ResolveError::Lookup { error, .. } => Some(&**error),
            ResolveError::Chain(error) => Some(error),
            ResolveError::Name(error) => Some(error),
            ResolveError::Unknown { why, .. } => Some(why),
            ResolveError::NotAllowed(_) => None,
        }
    }
}

/// For failures that are not the servers' fault.
const OWN_LIMIT: &str = "the limit of this proxy is reached, not that of the DNS server: let the proxy open more files (`ulimit -Hn`), or lower `listener.max_connections`";

fn lookup_fix(name: &str, place: Place, failure: &Failure) -> &'static str {
    match (failure, place) {
        (Failure::NxDomain | Failure::NoData, Place::Target | Place::Chain)
            if looks_like_address(name) =>
        {
            "the name looks like a mistyped IP address: write the address, without leading zeros, in `target:`"
        }
        (Failure::NxDomain, Place::Service) => {
            "either there is no such Service (create it, or correct `name:`, where two labels mean SERVICE.NAMESPACE, `dns.namespace` or `dns.cluster_domain`), or its `externalName` is an IP address, which DNS cannot return: write the address in `target:`"
        }
        (Failure::NoData, Place::Service) => {
            "the Service exists but leads nowhere: its `externalName` is the Service itself, part of a loop, or a Service that is missing or has no endpoints; correct `externalName`, or set `target:`"
        }
        (Failure::NxDomain | Failure::NoData, Place::Alias) => {
            "correct the alias' `name:`, or set `target:`"
        }
        (Failure::NxDomain | Failure::NoData, Place::Target) => "correct `target:`",
        (Failure::NxDomain | Failure::NoData, Place::Proxy) => "correct `via:`",
        (Failure::NxDomain | Failure::NoData | Failure::Unaskable(_), Place::Client) => {
            "correct the host in the request, or make it an alias with a `target:`"
        }
        (Failure::NxDomain | Failure::NoData, Place::Chain) => {
            "correct the Service's `externalName` or the CNAME record that leads there, or set `target:`"
        }
        (Failure::ServFail | Failure::Code(_), _) => {
            "check that server's log and its upstream servers (CoreDNS: `forward`), or set other servers in `dns.servers`"
        }
        (Failure::Refused, _) => {
            "that server does not serve this client or this name: set other servers in `dns.servers`"
        }
        (Failure::Timeout, Place::Service) => {
            "check that the servers are right (`dns.servers`, else resolv.conf) and that no NetworkPolicy blocks port 53; CoreDNS also sends no response for an `externalName` with a label of more than 63 characters"
        }
        (Failure::ConnectionRefused, _) => {
            "no server listens there: start it, or set other servers in `dns.servers`"
        }
        (Failure::Exhausted(_), _) => OWN_LIMIT,
        (Failure::Tcp(_, failure), _) if matches!(**failure, Failure::Exhausted(_)) => OWN_LIMIT,
        (Failure::Tcp(..), _) => {
            "large responses come over TCP: allow TCP port 53 too (in a NetworkPolicy or firewall), or set other servers in `dns.servers`"
        }
        (Failure::Timeout | Failure::Io(_), _) => {
            "check that the servers are right (`dns.servers`, else resolv.conf) and that no NetworkPolicy blocks port 53"
        }
        (Failure::Unaskable(_), _) => "correct the alias' `name:` or its `target:`",
        (Failure::Malformed(_), _) => {
            "check that a DNS server listens there, or set other servers in `dns.servers`"
        }
        (Failure::NoServers, _) => "set at least one server in `dns.servers`",
    }
}

/// A query that returned no records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LookupError {
    /// The queried name.
    pub name: String,
    /// The servers that failed in this way; after a timeout, all that did not respond.
    pub servers: Vec<SocketAddr>,
    /// How they failed.
    pub failure: Failure,
    /// How other servers failed, which explains less.
    pub others: Vec<(Vec<SocketAddr>, Failure)>,
}

/// How a query fails.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The name does not exist, for any type.
    NxDomain,
    /// The name has no address of this family.
    NoData,
    /// The server could not resolve the name.
    ServFail,
    /// The server refused to resolve the name.
    Refused,
    /// Any other response code.
    Code(String),
    /// No response in time.
    Timeout,
    /// No server listens there.
    ConnectionRefused,
    /// The query had to be repeated over TCP, and that failed.
    Tcp(WhyTcp, Box<Failure>),
    /// What arrived is not a response to the query, or not a usable one.
    Malformed(String),
    /// The query could not be sent, or the response could not be received.
    Io(String),
    /// The same, because this process or machine has run out of something, such as descriptors.
    Exhausted(String),
    /// The name does not fit into a query.
    Unaskable(String),
    /// There is no server to query.
    NoServers,
}

/// Why a query is sent over TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhyTcp {
    /// The response did not fit into a datagram.
    Truncated,
    /// Too many datagrams arrived that are not a response.
    Unrelated,
}

impl LookupError {
    pub(super) fn new(name: &str, servers: &[SocketAddr], failure: Failure) -> LookupError {
        let (name, servers) = (name.to_owned(), servers.to_vec());
        LookupError { name, servers, failure, others: Vec::new() }
    }

    /// For servers that all failed, each in its own way. `None` if there are none.
    pub(super) fn of_all(
        name: &str,
        failed: impl Iterator<Item = (SocketAddr, Failure)>,
    ) -> Option<LookupError> {
        let mut ways: Vec<(Vec<SocketAddr>, Failure)> = Vec::new();
        for (server, failure) in failed {
            match ways.iter_mut().find(|(_, known)| *known == failure) {
                Some((servers, _)) => servers.push(server),
                None => ways.push((vec![server], failure)),
            }
        }
        // A server's response explains more than that another server could not be reached.
        ways.sort_by_key(|(_, failure)| match failure {
            Failure::Timeout => 2,
            Failure::ConnectionRefused | Failure::Io(_) | Failure::Exhausted(_) => 1,
            _ => 0,
        });
        let others = ways.split_off(ways.len().min(1));
        let (servers, failure) = ways.pop()?;
        Some(LookupError { others, ..LookupError::new(name, &servers, failure) })
    }

    /// Whether this is a response that says that there is nothing.
    pub fn is_denial(&self) -> bool {
        matches!(self.failure, Failure::NxDomain | Failure::NoData | Failure::Unaskable(_))
    }

    /// The `result` label of `truename_dns_lookups_total`.
    pub fn label(&self) -> &'static str {
        match self.failure {
            Failure::NxDomain => "nxdomain",
            Failure::NoData => "nodata",
            Failure::ServFail => "servfail",
            Failure::Refused => "refused",
            Failure::Code(_) => "other_code",
            Failure::Timeout => "timeout",
            Failure::ConnectionRefused => "connection_refused",
            Failure::Tcp(..) => "tcp",
            Failure::Malformed(_) => "malformed",
            Failure::Io(_) | Failure::Exhausted(_) => "io",
            Failure::Unaskable(_) => "unaskable",
            Failure::NoServers => "no_servers",
        }
    }
}

impl fmt::Display for LookupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.failure.sentence(f, &self.name, &self.servers)?;
        for (servers, failure) in &self.others {
            f.write_str("; ")?;
            failure.sentence(f, &self.name, servers)?;
        }
        Ok(())
    }
}

impl Failure {
    fn sentence(
        &self,
        f: &mut fmt::Formatter<'_>,
        name: &str,
        servers: &[SocketAddr],
    ) -> fmt::Result {
        let plural = if servers.len() == 1 { "" } else { "s" };
        let server = servers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        match self {
            Failure::NxDomain => write!(f, "{server} says that {name} does not exist (NXDOMAIN)"),
            Failure::NoData => write!(f, "{server} has no address for {name} (NODATA)"),
            Failure::ServFail => write!(f, "{server} failed to resolve {name} (SERVFAIL)"),
            Failure::Refused => write!(f, "{server} refused to resolve {name} (REFUSED)"),
            Failure::Code(code) => write!(f, "{server} could not resolve {name} ({code})"),
            Failure::Timeout => write!(f, "{server} did not respond in time for {name}"),
            Failure::ConnectionRefused => {
                write!(f, "connection refused by nameserver{plural} {server}, queried for {name}")
            }
            Failure::Tcp(WhyTcp::Truncated, failure) => write!(
                f,
                "the response of {server} for {name} does not fit into a datagram, and over TCP {}",
                failure.over_tcp()
            ),
            Failure::Tcp(WhyTcp::Unrelated, failure) => write!(
                f,
                "{server} sent too many datagrams that are not a response for {name}, and over TCP {}",
                failure.over_tcp()
            ),
            Failure::Malformed(reason) => {
                write!(f, "the response of {server} for {name} cannot be used: {reason}")
            }
            Failure::Io(reason) | Failure::Exhausted(reason) => {
                write!(f, "{server} could not be queried for {name}: {reason}")
            }
            Failure::Unaskable(reason) => write!(f, "{name} cannot be queried in DNS: {reason}"),
            Failure::NoServers => {
                write!(
                    f,
                    "{name} cannot be resolved: `dns.servers` is empty and resolv.conf has no nameserver"
                )
            }
        }
    }

    fn over_tcp(&self) -> String {
        match self {
            Failure::ConnectionRefused => "it refused the connection".to_owned(),
            Failure::Timeout => "it did not respond in time".to_owned(),
            Failure::Malformed(reason) => format!("its response cannot be used: {reason}"),
            Failure::Io(reason) | Failure::Exhausted(reason) => {
                format!("it could not be queried: {reason}")
            }
            other => format!("it failed ({other:?})"),
        }
    }
}

impl std::error::Error for LookupError {}

/// A true name from DNS that `allow` refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The true name that was refused.
    pub true_name: TrueName,
    /// The chain that led there.
    pub chain: Vec<Arc<str>>,
    /// The patterns of `allow`.
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

    /// The key that fixes it.
    pub fn fix(&self) -> String {
        format!(
            "if the change is intended, add \"{}\" to `allow`; otherwise correct the Service's `externalName`",
            self.true_name
        )
    }
}
