//! The DNS client: one question to the servers in turn, and the whole walk for one name.
//!
//! hickory brings the message format, UDP with retransmission, the TCP fallback and the merging of equal questions in
//! flight. Its resolver above that is not used: it caches, reads the hosts file and loses links of the chain.

use super::{
    chain::{Chain, Record, Walked},
    error::{Place, ResolveError},
    names::fold,
};
use hickory_resolver::{
    NameServerPool, PoolContext, TlsConfig,
    config::{ConnectionConfig, NameServerConfig, ResolverOpts},
    net::{
        DnsError, DnsHandle, NetError, NoRecords, runtime::TokioRuntimeProvider, xfer::FirstAnswer,
    },
    proto::{
        op::{DnsRequestOptions, Message, Query, ResponseCode},
        rr::{DNSClass, Name, RData, RecordType},
    },
};
use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// For one server; then the next has its turn.
const TRY: Duration = Duration::from_secs(2);
/// For one family's walk, follow-up questions included.
const WALK: Duration = Duration::from_millis(4500);
/// What a family that is slow may cost one that has answered. Time for one retransmission.
const GRACE: Duration = Duration::from_millis(500);

/// An address family, asked for apart from the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// A records.
    V4,
    /// AAAA records.
    V6,
}

impl Family {
    fn record_type(self) -> RecordType {
        match self {
            Family::V4 => RecordType::A,
            Family::V6 => RecordType::AAAA,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.record_type())
    }
}

/// What both families came to.
#[derive(Debug)]
pub struct Round {
    /// The A walk.
    pub v4: Result<Chain, ResolveError>,
    /// The AAAA walk.
    pub v6: Result<Chain, ResolveError>,
}

impl Round {
    /// For a target in digits: they are the whole answer, whichever family is asked.
    pub fn of_ip(ip: IpAddr) -> Round {
        Round { v4: Ok(Chain::of_ip(ip)), v6: Ok(Chain::of_ip(ip)) }
    }
}

/// Asks a fixed list of servers. Equal questions in flight share one query.
pub struct Client {
    servers: Vec<Server>,
    /// Index of the server that answered last: a dead one before it costs its time only once.
    preferred: AtomicUsize,
}

struct Server {
    address: SocketAddr,
    pool: NameServerPool<TokioRuntimeProvider>,
}

impl Client {
    /// A client of these servers; a missing one is an error of the first lookup, not of this.
    pub fn new(servers: &[SocketAddr]) -> Client {
        Client {
            servers: servers.iter().copied().map(Server::new).collect(),
            preferred: AtomicUsize::new(0),
        }
    }

    /// The servers, as given.
    pub fn servers(&self) -> Vec<SocketAddr> {
        self.servers.iter().map(|server| server.address).collect()
    }

    /// Walks from the name to its addresses, both families at once; `place` says where the name comes from. When one
    /// family has its addresses, the other has only a moment more: a server that is silent about AAAA delays nobody.
    pub async fn both(&self, name: &str, place: Place) -> Round {
        let (a, aaaa) = (self.walk(name, place, Family::V4), self.walk(name, place, Family::V6));
        tokio::pin!(a, aaaa);
        let (mut v4, mut v6) = (None, None);
        let grace = sleep(WALK);
        tokio::pin!(grace);
        while v4.is_none() || v6.is_none() {
            let good = tokio::select! {
                result = &mut a, if v4.is_none() => v4.insert(result).is_ok(),
                result = &mut aaaa, if v6.is_none() => v6.insert(result).is_ok(),
                () = &mut grace => break,
            };
            if good {
                grace.as_mut().reset(Instant::now() + GRACE);
            }
        }
        let late = |family| ResolveError::Lookup {
            chain: vec![Arc::from(fold(name))],
            place,
            error: self.silence(name, family),
        };
        Round {
            v4: v4.unwrap_or_else(|| Err(late(Family::V4))),
            v6: v6.unwrap_or_else(|| Err(late(Family::V6))),
        }
    }

    /// Walks from the name to its addresses of one family. A CNAME without addresses says nothing about why, so that its
    /// target is asked for by itself. Takes less than five seconds.
    pub async fn walk(
        &self,
        name: &str,
        place: Place,
        family: Family,
    ) -> Result<Chain, ResolveError> {
        let deadline = Instant::now() + WALK;
        let mut chain = Chain::new(name);
        // Ends: each turn but the last makes the chain longer, which the walk allows up to its bound.
        loop {
            let end = chain.end().clone();
            let error = match self.ask(&end, family, deadline).await {
                Ok(answer) => match chain.walk(&answer.records).map_err(ResolveError::Chain)? {
                    Walked::Complete(chain) => return Ok(chain),
                    Walked::AskForEnd(longer) => {
                        chain = longer;
                        continue;
                    }
                    Walked::Nothing(same) => {
                        chain = same;
                        LookupError::NoData { name: end.to_string(), server: answer.server }
                    }
                },
                Err(error) => error,
            };
            let first = chain.names().len() == 1;
            return Err(ResolveError::Lookup {
                chain: chain.names().to_vec(),
                place: if first { place } else { Place::Chain },
                error,
            });
        }
    }

    /// One question, to the servers in turn until one answers.
    async fn ask(
        &self,
        name: &str,
        family: Family,
        deadline: Instant,
    ) -> Result<Answer, LookupError> {
        let started = Instant::now();
        let result = self.ask_in_turn(name, family, deadline).await;
        let label = result.as_ref().map_or_else(LookupError::label, |_| "ok");
        metrics::counter!("truename_dns_lookups_total", "result" => label).increment(1);
        metrics::histogram!("truename_dns_lookup_duration_seconds").record(started.elapsed());
        tracing::debug!(name, %family, result = label, "asked DNS");
        result
    }

    async fn ask_in_turn(
        &self,
        name: &str,
        family: Family,
        deadline: Instant,
    ) -> Result<Answer, LookupError> {
        let count = self.servers.len();
        if count == 0 {
            return Err(LookupError::NoServers);
        }
        let query = query(name, family)?;
        let first = self.preferred.load(Ordering::Relaxed);
        let mut failed = None;
        // Twice: a lone server whose answers were lost gets a second chance.
        for turn in 0..2 * count {
            let index = (first + turn) % count;
            let server = &self.servers[index];
            let attempt = timeout(TRY, server.ask(&query, family));
            match timeout_at(deadline, attempt).await {
                Err(_) => break,
                Ok(Err(_) | Ok(Err(LookupError::Timeout { .. }))) => {}
                Ok(Ok(Err(error))) if !error.is_denial() => {
                    failed.get_or_insert(error);
                }
                Ok(Ok(answer)) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return answer;
                }
            }
            if turn + 1 == count && failed.is_some() {
                break;
            }
        }
        Err(failed.unwrap_or_else(|| self.silence(name, family)))
    }

    fn silence(&self, name: &str, family: Family) -> LookupError {
        LookupError::Timeout { name: name.to_owned(), family, servers: self.servers() }
    }
}

impl Server {
    fn new(address: SocketAddr) -> Server {
        let mut connections = vec![ConnectionConfig::udp(), ConnectionConfig::tcp()];
        for connection in &mut connections {
            connection.port = address.port();
        }
        // One pool a server: a pool of several would not go on to the next after SERVFAIL, nor say who answered.
        let config = NameServerConfig::new(address.ip(), true, connections);
        let mut options = ResolverOpts::default();
        options.timeout = TRY;
        // Names come back as they were asked: some forwarders do not keep the case.
        options.case_randomization = false;
        let context = Arc::new(PoolContext::new(options, TlsConfig {}));
        Server {
            address,
            pool: NameServerPool::from_config([config], context, TokioRuntimeProvider::default()),
        }
    }

    async fn ask(&self, query: &Query, family: Family) -> Result<Answer, LookupError> {
        let name = fold(&query.name().to_ascii());
        let server = self.address;
        let response = self.pool.lookup(query.clone(), DnsRequestOptions::default());
        let message = match response.first_answer().await {
            Ok(response) => response.into_message(),
            Err(error) => return Err(self.explain(name, family, error)),
        };
        match message.response_code {
            // NXDOMAIN with a CNAME is about the CNAME's target (RFC 2308, section 2.1): the walk asks for that.
            ResponseCode::NoError | ResponseCode::NXDomain => {
                Ok(Answer { records: records(&message), server })
            }
            code => Err(LookupError::Code { name, server, code }),
        }
    }

    fn explain(&self, name: String, family: Family, error: NetError) -> LookupError {
        let server = self.address;
        match error {
            NetError::Dns(DnsError::NoRecordsFound(NoRecords { response_code, .. })) => {
                match response_code {
                    ResponseCode::NXDomain => LookupError::NxDomain { name, server },
                    _ => LookupError::NoData { name, server },
                }
            }
            NetError::Dns(DnsError::ResponseCode(code)) => match code {
                ResponseCode::ServFail => LookupError::ServFail { name, server },
                ResponseCode::Refused => LookupError::Refused { name, server },
                code => LookupError::Code { name, server, code },
            },
            NetError::Timeout => LookupError::Timeout { name, family, servers: vec![server] },
            NetError::Io(error) => LookupError::Io { name, server, reason: error.to_string() },
            other => LookupError::Malformed { name, server, reason: other.to_string() },
        }
    }
}

struct Answer {
    records: Vec<Record>,
    server: SocketAddr,
}

fn query(name: &str, family: Family) -> Result<Query, LookupError> {
    // The dot makes it absolute: no search list has a say.
    let absolute = Name::from_ascii(format!("{name}.")).map_err(|error| {
        LookupError::Unaskable { name: name.to_owned(), reason: error.to_string() }
    })?;
    Ok(Query::query(absolute, family.record_type()))
}

fn records(message: &Message) -> Vec<Record> {
    let internet = message.answers.iter().filter(|record| record.dns_class == DNSClass::IN);
    internet
        .filter_map(|record| {
            let owner = record.name.to_ascii();
            match &record.data {
                RData::CNAME(target) => Some(Record::cname(&owner, record.ttl, &target.to_ascii())),
                RData::A(ip) => Some(Record::address(&owner, record.ttl, ip.0.into())),
                RData::AAAA(ip) => Some(Record::address(&owner, record.ttl, ip.0.into())),
                _ => None,
            }
        })
        .collect()
}

/// What a server said instead of an answer, or that none said anything.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LookupError {
    /// The name does not exist, for any type.
    #[error("{server} says that {name} does not exist (NXDOMAIN)")]
    NxDomain { name: String, server: SocketAddr },
    /// The name exists without such records.
    #[error("{server} has no address for {name} (NODATA)")]
    NoData { name: String, server: SocketAddr },
    /// The server could not find out.
    #[error("{server} failed to resolve {name} (SERVFAIL)")]
    ServFail { name: String, server: SocketAddr },
    /// The server would not say.
    #[error("{server} refuses to resolve {name} (REFUSED)")]
    Refused { name: String, server: SocketAddr },
    /// Any other response code.
    #[error("{server} answered {code} for {name}")]
    Code { name: String, server: SocketAddr, code: ResponseCode },
    /// No server answered in time.
    #[error("no answer for {name} ({family}) in time from {}", list(servers))]
    Timeout { name: String, family: Family, servers: Vec<SocketAddr> },
    /// What came back is no DNS message.
    #[error("{server} answered for {name} with something that is no DNS message ({reason})")]
    Malformed { name: String, server: SocketAddr, reason: String },
    /// The question could not be sent, or the answer not be received.
    #[error("{server} could not be asked for {name}: {reason}")]
    Io { name: String, server: SocketAddr, reason: String },
    /// The name does not fit into a question.
    #[error("DNS cannot be asked for {name}: {reason}")]
    Unaskable { name: String, reason: String },
    /// There is nobody to ask.
    #[error("no DNS server is known: resolv.conf names none")]
    NoServers,
}

impl LookupError {
    /// Whether this is an answer, to the effect that there is nothing.
    pub fn is_denial(&self) -> bool {
        matches!(
            self,
            LookupError::NxDomain { .. }
                | LookupError::NoData { .. }
                | LookupError::Unaskable { .. }
        )
    }

    /// The `result` label of `truename_dns_lookups_total`.
    pub fn label(&self) -> &'static str {
        match self {
            LookupError::NxDomain { .. } => "nxdomain",
            LookupError::NoData { .. } => "nodata",
            LookupError::ServFail { .. } => "servfail",
            LookupError::Refused { .. } => "refused",
            LookupError::Code { .. } => "other_code",
            LookupError::Timeout { .. } => "timeout",
            LookupError::Malformed { .. } => "malformed",
            LookupError::Io { .. } => "io",
            LookupError::Unaskable { .. } => "unaskable",
            LookupError::NoServers => "no_servers",
        }
    }
}

fn list(servers: &[SocketAddr]) -> String {
    servers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}
