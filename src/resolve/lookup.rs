//! The DNS client: one question to the servers in turn, and the whole walk for one name.
//!
//! hickory brings the message format, UDP with retransmission, the TCP fallback and the merging of equal questions in
//! flight. Its resolver above that is not used: it caches, reads the hosts file and loses links of the chain.

use super::{
    chain::{Chain, Record, Walked},
    error::{Failure, LookupError, Place, ResolveError},
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

/// For one server at most; then the next has its turn.
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
    /// The addresses of both families. Where there are none, the error is the one that time may mend, if either is.
    pub fn into_addresses(self) -> Result<Vec<IpAddr>, ResolveError> {
        match (self.v4, self.v6) {
            (Ok(v4), Ok(v6)) => Ok([v4.addresses(), v6.addresses()].concat()),
            (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(one.addresses().to_vec()),
            (Err(v4), Err(v6)) => Err(if v4.is_denial() { v6 } else { v4 }),
        }
    }

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
        let late = || {
            Err(ResolveError::Lookup {
                chain: vec![Arc::from(fold(name))],
                place,
                error: self.silence(name),
            })
        };
        Round { v4: v4.unwrap_or_else(late), v6: v6.unwrap_or_else(late) }
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
                        LookupError::new(&end, &[answer.server], Failure::NoData)
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
            return Err(LookupError::new(name, &[], Failure::NoServers));
        }
        let query = query(name, family)?;
        let first = self.preferred.load(Ordering::Relaxed);
        // So that the last of many silent servers is reached too.
        let patience = TRY.min(WALK / u32::try_from(count).unwrap_or(u32::MAX));
        let mut failed = None;
        // Twice: a lone server whose answers were lost gets a second chance.
        for turn in 0..2 * count {
            let index = (first + turn) % count;
            let server = &self.servers[index];
            let attempt = timeout(patience, server.ask(&query));
            let Ok(attempt) = timeout_at(deadline, attempt).await else {
                break;
            };
            match attempt {
                Err(_) | Ok(Err(Failure::Timeout)) => {}
                Ok(Err(failure)) => {
                    let error = LookupError::new(name, &[server.address], failure);
                    if error.is_denial() {
                        self.preferred.store(index, Ordering::Relaxed);
                        return Err(error);
                    }
                    failed.get_or_insert(error);
                }
                Ok(Ok(records)) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    let server = server.address;
                    return Ok(Answer { records, server });
                }
            }
            if turn + 1 == count && failed.is_some() {
                break;
            }
        }
        Err(failed.unwrap_or_else(|| self.silence(name)))
    }

    fn silence(&self, name: &str) -> LookupError {
        LookupError::new(name, &self.servers(), Failure::Timeout)
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

    async fn ask(&self, query: &Query) -> Result<Vec<Record>, Failure> {
        let response = self.pool.lookup(query.clone(), DnsRequestOptions::default());
        let message = response.first_answer().await.map_err(explain)?;
        match message.response_code {
            // NXDOMAIN with a CNAME is about the CNAME's target (RFC 2308, section 2.1): the walk asks for that.
            ResponseCode::NoError | ResponseCode::NXDomain => Ok(records(&message)),
            code => Err(Failure::Code(code.to_str().to_owned())),
        }
    }
}

fn explain(error: NetError) -> Failure {
    match error {
        NetError::Dns(DnsError::NoRecordsFound(NoRecords {
            response_code: ResponseCode::NXDomain,
            ..
        })) => Failure::NxDomain,
        NetError::Dns(DnsError::NoRecordsFound(_)) => Failure::NoData,
        NetError::Dns(DnsError::ResponseCode(code)) => match code {
            ResponseCode::ServFail => Failure::ServFail,
            ResponseCode::Refused => Failure::Refused,
            code => Failure::Code(code.to_str().to_owned()),
        },
        NetError::Timeout => Failure::Timeout,
        NetError::Io(error) => Failure::Io(error.to_string()),
        other => Failure::Malformed(other.to_string()),
    }
}

struct Answer {
    records: Vec<Record>,
    server: SocketAddr,
}

fn query(name: &str, family: Family) -> Result<Query, LookupError> {
    // The dot makes it absolute: no search list has a say.
    let absolute = Name::from_ascii(format!("{name}."))
        .map_err(|error| LookupError::new(name, &[], Failure::Unaskable(error.to_string())))?;
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
