//! Why an alias has no new answer, in words that end with the key that mends it.

use super::{
    chain::{ChainError, TrueName, arrows},
    names::{NameError, looks_like_address},
};
use crate::{config::NamePattern, fault::Kind};
use std::{fmt, net::SocketAddr, sync::Arc};

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
        error: Box<LookupError>,
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
        }
    }

    /// The key or command that mends it.
    pub fn fix(&self) -> String {
        match self {
            ResolveError::Lookup { place, error, .. } => {
                lookup_fix(&error.name, *place, &error.failure).to_owned()
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

    /// What happened, in the terms of all failures.
    pub fn kind(&self) -> Kind {
        match self.is_timeout() {
            true => Kind::DnsTimeout,
            false => Kind::DnsError,
        }
    }

    /// Whether nobody answered in time: 504 rather than 503.
    pub fn is_timeout(&self) -> bool {
        match self {
            ResolveError::Lookup { error, .. } => match &error.failure {
                Failure::Tcp(_, failure) => **failure == Failure::Timeout,
                failure => *failure == Failure::Timeout,
            },
            _ => false,
        }
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
            ResolveError::Lookup { error, .. } => Some(&**error),
            ResolveError::Chain(error) => Some(error),
            ResolveError::Name(error) => Some(error),
            ResolveError::NotAllowed(_) => None,
        }
    }
}

/// Where the servers are not at fault.
const OWN_LIMIT: &str = "this proxy's own limit is reached, not the DNS server's: let it open more files (`ulimit -Hn`), or lower `listener.max_connections`";

fn lookup_fix(name: &str, place: Place, failure: &Failure) -> &'static str {
    match (failure, place) {
        (Failure::NxDomain | Failure::NoData, Place::Target | Place::Chain)
            if looks_like_address(name) =>
        {
            "the name looks like a mistyped IP address: write the address, without leading zeros, in `target:`"
        }
        (Failure::NxDomain, Place::Service) => {
            "there is no such Service (create it, or correct `name:`, where two labels mean SERVICE.NAMESPACE, `dns.namespace` or `dns.cluster_domain`), or its `externalName` is an IP address, which DNS cannot show: write the address in `target:`"
        }
        (Failure::NoData, Place::Service) => {
            "the Service is there but leads nowhere: its `externalName` is itself, a ring, or a Service that is missing or has no endpoints; correct `externalName`, or name the target in `target:`"
        }
        (Failure::NxDomain | Failure::NoData, Place::Alias) => {
            "correct the alias' `name:`, or say where it leads in `target:`"
        }
        (Failure::NxDomain | Failure::NoData, Place::Target) => "correct `target:`",
        (Failure::NxDomain | Failure::NoData | Failure::Unaskable(_), Place::Client) => {
            "correct the host in the request, or make it an alias with a `target:`"
        }
        (Failure::NxDomain | Failure::NoData, Place::Chain) => {
            "correct the Service's `externalName` or the CNAME record that leads there, or name the target in `target:`"
        }
        (Failure::ServFail | Failure::Code(_), _) => {
            "look at that server's log and its upstream servers (CoreDNS: `forward`), or choose others in `dns.servers`"
        }
        (Failure::Refused, _) => {
            "that server does not serve this client or this name: choose others in `dns.servers`"
        }
        (Failure::Timeout, Place::Service) => {
            "check that the servers are right (`dns.servers`, else resolv.conf) and that a NetworkPolicy lets port 53 through; CoreDNS also stays silent for an `externalName` with a label of more than 63 characters"
        }
        (Failure::ConnectionRefused, _) => {
            "nobody listens there: start that server, or choose others in `dns.servers`"
        }
        (Failure::Exhausted(_), _) => OWN_LIMIT,
        (Failure::Tcp(_, failure), _) if matches!(**failure, Failure::Exhausted(_)) => OWN_LIMIT,
        (Failure::Tcp(..), _) => {
            "responses that do not fit into a datagram come over TCP: let port 53 through for TCP too (a NetworkPolicy, a firewall), or choose other servers in `dns.servers`"
        }
        (Failure::Timeout | Failure::Io(_), _) => {
            "check that the servers are right (`dns.servers`, else resolv.conf) and that a NetworkPolicy lets port 53 through"
        }
        (Failure::Unaskable(_), _) => "correct the alias' `name:` or its `target:`",
        (Failure::Malformed(_), _) => {
            "check that a DNS server listens there, or choose others in `dns.servers`"
        }
        (Failure::NoServers, _) => "name at least one server in `dns.servers`",
    }
}

/// A question that got no records.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LookupError {
    /// What was asked for.
    pub name: String,
    /// Who said so; after a time-out, all who did not.
    pub servers: Vec<SocketAddr>,
    /// What was said.
    pub failure: Failure,
    /// What others said, which explains less.
    pub others: Vec<(Vec<SocketAddr>, Failure)>,
}

/// What servers say instead of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The name does not exist, for any type.
    NxDomain,
    /// The name has no address of this family.
    NoData,
    /// The server could not find out.
    ServFail,
    /// The server would not say.
    Refused,
    /// Any other response code.
    Code(String),
    /// Nobody answered in time.
    Timeout,
    /// Nobody listens there.
    ConnectionRefused,
    /// The question had to be asked over TCP too, and that failed.
    Tcp(WhyTcp, Box<Failure>),
    /// What came back is no response to the question, or none that can be used.
    Malformed(String),
    /// The question could not be sent, or the answer not be received.
    Io(String),
    /// The same for want of something that this process or machine has run out of, such as descriptors.
    Exhausted(String),
    /// The name does not fit into a question.
    Unaskable(String),
    /// There is nobody to ask.
    NoServers,
}

/// Why a question is asked over TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WhyTcp {
    /// The response did not fit into a datagram.
    Truncated,
    /// Too many datagrams came that are no response.
    Strangers,
}

impl LookupError {
    pub(super) fn new(name: &str, servers: &[SocketAddr], failure: Failure) -> LookupError {
        let (name, servers) = (name.to_owned(), servers.to_vec());
        LookupError { name, servers, failure, others: Vec::new() }
    }

    /// Of servers that all failed, each in its way; none if there is none.
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
        // What a server said explains more than that another could not be asked.
        ways.sort_by_key(|(_, failure)| match failure {
            Failure::Timeout => 2,
            Failure::ConnectionRefused | Failure::Io(_) | Failure::Exhausted(_) => 1,
            _ => 0,
        });
        let others = ways.split_off(ways.len().min(1));
        let (servers, failure) = ways.pop()?;
        Some(LookupError { others, ..LookupError::new(name, &servers, failure) })
    }

    /// Whether this is an answer, to the effect that there is nothing.
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
                write!(f, "connection refused by nameserver{plural} {server}, asked for {name}")
            }
            Failure::Tcp(WhyTcp::Truncated, failure) => write!(
                f,
                "the response of {server} for {name} does not fit into a datagram, and over TCP {}",
                failure.over_tcp()
            ),
            Failure::Tcp(WhyTcp::Strangers, failure) => write!(
                f,
                "{server} sent too many datagrams that are no response for {name}, and over TCP {}",
                failure.over_tcp()
            ),
            Failure::Malformed(reason) => {
                write!(f, "the response of {server} for {name} cannot be used: {reason}")
            }
            Failure::Io(reason) | Failure::Exhausted(reason) => {
                write!(f, "{server} could not be asked for {name}: {reason}")
            }
            Failure::Unaskable(reason) => write!(f, "DNS cannot be asked for {name}: {reason}"),
            Failure::NoServers => {
                write!(
                    f,
                    "{name} cannot be resolved: `dns.servers` is empty and resolv.conf names no server"
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
                format!("it could not be asked: {reason}")
            }
            other => format!("it failed ({other:?})"),
        }
    }
}

impl std::error::Error for LookupError {}

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
