//! The DNS client: sends a query to the servers in turn, and follows the whole chain of a name.

use super::{
    chain::{Chain, Record, Walked},
    error::{Failure, LookupError, Place, ResolveError},
    exchange::exchange,
    names::fold,
};
use hickory_proto::{
    op::{Message, Query, ResponseCode},
    rr::{DNSClass, Name, RData, RecordType},
};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Weak},
    time::Duration,
};
use tokio::{
    sync::{OnceCell, Semaphore},
    time::{Instant, sleep, timeout_at},
};

/// The longest time for one server. Then the next one is asked.
const TRY: Duration = Duration::from_secs(2);
/// The time limit of one family's walk, including follow-up queries.
const WALK: Duration = Duration::from_millis(4500);
/// How long to wait for the second family once the first has its addresses. Time for one retransmission.
const GRACE: Duration = Duration::from_millis(500);

/// How long the servers before the preferred one are skipped. Then one query starts with the first server again,
/// because it may be back, and it may know names that the others do not.
const RETURN: Duration = Duration::from_secs(10);

/// The most queries for aliases at a time. Each has a socket, and a thousand aliases must not use up the process'
/// file descriptors.
const MAX_IN_FLIGHT: usize = 192;
/// The same for the clients of a forward proxy. They have their own limit, so that names whose queries time out do
/// not delay an alias.
const MAX_IN_FLIGHT_FOR_CLIENTS: usize = 64;

/// An address family. Each has its own queries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

/// The results of both families.
#[derive(Debug)]
pub struct Round {
    /// The A walk.
    pub v4: Result<Chain, ResolveError>,
    /// The AAAA walk.
    pub v6: Result<Chain, ResolveError>,
}

impl Round {
    /// The addresses of both families. If there are none, the error is preferably one that may go away with time.
    pub fn into_addresses(self) -> Result<Vec<IpAddr>, ResolveError> {
        match (self.v4, self.v6) {
            (Ok(v4), Ok(v6)) => Ok([v4.addresses(), v6.addresses()].concat()),
            (Ok(one), Err(_)) | (Err(_), Ok(one)) => Ok(one.addresses().to_vec()),
            (Err(v4), Err(v6)) => Err(if v4.is_denial() { v6 } else { v4 }),
        }
    }

    /// The names of both walks, starting with the queried one.
    pub fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        [&self.v4, &self.v6].into_iter().flat_map(|walked| match walked {
            Ok(chain) => chain.names(),
            Err(error) => error.chain(),
        })
    }

    /// For a target that is an IP address: it is the result for both families.
    pub fn of_ip(ip: IpAddr) -> Round {
        Round { v4: Ok(Chain::of_ip(ip)), v6: Ok(Chain::of_ip(ip)) }
    }
}

/// Queries a fixed list of servers. Equal queries in flight are sent once.
pub struct DnsClient {
    servers: Vec<SocketAddr>,
    preferred: Mutex<Preferred>,
    /// The key is what is queried, and whether it is for a client of a forward proxy.
    in_flight: Mutex<HashMap<(String, Family, bool), Weak<Flight>>>,
    permits: Semaphore,
    permits_for_clients: Semaphore,
}

/// The server that responded last. So a dead server before it costs its timeout only once.
struct Preferred {
    index: usize,
    /// Since when, or when a query last started with the first server instead.
    since: Instant,
}

/// The first caller sends the query. If it is cancelled, another one does.
type Flight = OnceCell<Result<Answer, LookupError>>;

impl DnsClient {
    /// A client of these servers. If there are none, lookups fail.
    pub fn new(servers: &[SocketAddr]) -> DnsClient {
        DnsClient {
            servers: servers.to_vec(),
            preferred: Mutex::new(Preferred { index: 0, since: Instant::now() }),
            in_flight: Mutex::default(),
            permits: Semaphore::new(MAX_IN_FLIGHT),
            permits_for_clients: Semaphore::new(MAX_IN_FLIGHT_FOR_CLIENTS),
        }
    }

    /// The servers, as given.
    pub fn servers(&self) -> &[SocketAddr] {
        &self.servers
    }

    /// Walks from the name to its addresses, for both families at once; `place` is where the name comes from. Once one
    /// family has its addresses, the other has only `GRACE` left, so that a server that ignores AAAA queries delays nothing.
    pub async fn both(&self, name: &str, place: Place) -> Round {
        let (a, aaaa) = (self.walk(name, place, Family::V4), self.walk(name, place, Family::V6));
        tokio::pin!(a, aaaa);
        let started = Instant::now();
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
            // Its walk is dropped, so it is counted here.
            count("timeout", started);
            Err(ResolveError::Lookup {
                chain: vec![Arc::from(fold(name))],
                place,
                error: Box::new(self.timed_out(name)),
            })
        };
        Round { v4: v4.unwrap_or_else(late), v6: v6.unwrap_or_else(late) }
    }

    /// Walks from the name until `is_enough`, and does without addresses, for a proxy resolves the rest: it is no error
    /// where DNS says that there is nothing, unless the name is a Service.
    pub async fn names(
        &self,
        name: &str,
        place: Place,
        is_enough: impl Fn(&[Arc<str>]) -> bool,
    ) -> Result<Chain, ResolveError> {
        let goes_on = |chain: &Chain| !is_enough(chain.names());
        match self.walk_while(name, place, Family::V4, goes_on).await? {
            Reached::Addresses(chain) => Ok(chain),
            Reached::Enough(chain) => Ok(chain.lasting()),
            Reached::Nothing(chain, error) => {
                let is_service = chain.names().len() == 1 && place == Place::Service;
                match error.is_denial() && !is_service {
                    true => Ok(chain.lasting()),
                    false => Err(unresolved(&chain, place, error)),
                }
            }
        }
    }

    /// Walks from the name to its addresses of one family. Takes less than five seconds.
    pub async fn walk(
        &self,
        name: &str,
        place: Place,
        family: Family,
    ) -> Result<Chain, ResolveError> {
        match self.walk_while(name, place, family, |_| true).await? {
            Reached::Addresses(chain) | Reached::Enough(chain) => Ok(chain),
            Reached::Nothing(chain, error) => Err(unresolved(&chain, place, error)),
        }
    }

    /// Walks from the name to its addresses of one family, as long as the chain `goes_on`. A CNAME without addresses does
    /// not say why there are none, so its target is queried separately.
    async fn walk_while(
        &self,
        name: &str,
        place: Place,
        family: Family,
        goes_on: impl Fn(&Chain) -> bool,
    ) -> Result<Reached, ResolveError> {
        let deadline = Instant::now() + WALK;
        let mut chain = Chain::new(name);
        // This ends: each iteration but the last makes the chain longer, and its length is limited.
        while goes_on(&chain) {
            let end = chain.end().clone();
            let response = match self.ask(&end, family, place, deadline).await {
                Ok(response) => response,
                Err(error) => return Ok(Reached::Nothing(chain, error)),
            };
            match chain.walk(&response.records).map_err(ResolveError::Chain)? {
                Walked::Complete(chain) => return Ok(Reached::Addresses(chain)),
                Walked::AskForEnd(longer) => chain = longer,
                Walked::Nothing(chain) => {
                    let error = LookupError::new(&end, &[response.server], response.about_others());
                    return Ok(Reached::Nothing(chain, error));
                }
            }
        }
        Ok(Reached::Enough(chain))
    }

    /// Sends one query to the servers in turn, until one responds.
    async fn ask(
        &self,
        name: &str,
        family: Family,
        place: Place,
        deadline: Instant,
    ) -> Result<Answer, LookupError> {
        let started = Instant::now();
        let result = self.ask_together(name, family, place, deadline).await;
        let label = result.as_ref().map_or_else(LookupError::label, |_| "ok");
        count(label, started);
        tracing::debug!(name, %family, result = label, "queried DNS");
        result
    }

    /// Sends a query, or waits for an equal one in flight.
    async fn ask_together(
        &self,
        name: &str,
        family: Family,
        place: Place,
        deadline: Instant,
    ) -> Result<Answer, LookupError> {
        let mut is_first = false;
        let flight = self.flight(name, family, place);
        let asked = flight.get_or_init(|| {
            is_first = true;
            self.ask_in_turn(name, family, place, deadline)
        });
        let result = timeout_at(deadline, asked).await.cloned();
        match result {
            // The other query timed out, but we have time left.
            Ok(Err(error)) if error.failure == Failure::Timeout && !is_first => {
                self.ask_in_turn(name, family, place, deadline).await
            }
            Ok(result) => result,
            Err(_) => Err(self.timed_out(name)),
        }
    }

    fn flight(&self, name: &str, family: Family, place: Place) -> Arc<Flight> {
        let mut in_flight = self.in_flight.lock();
        if in_flight.len() == in_flight.capacity() {
            // Before the map grows: so it never has more than twice the entries that are in flight.
            in_flight.retain(|_, flight| flight.strong_count() > 0);
        }
        let key = (name.to_owned(), family, place == Place::Client);
        let entry = in_flight.entry(key).or_default();
        entry.upgrade().unwrap_or_else(|| {
            let flight = Arc::default();
            *entry = Arc::downgrade(&flight);
            flight
        })
    }

    async fn ask_in_turn(
        &self,
        name: &str,
        family: Family,
        place: Place,
        deadline: Instant,
    ) -> Result<Answer, LookupError> {
        let count = self.servers.len();
        if count == 0 {
            return Err(LookupError::new(name, &[], Failure::NoServers));
        }
        let query = query(name, family)?;
        let permits = match place {
            Place::Client => &self.permits_for_clients,
            _ => &self.permits,
        };
        let Ok(_permit) = timeout_at(deadline, permits.acquire()).await else {
            return Err(self.timed_out(name));
        };
        let (first, before) = self.first();
        // So that the last of many servers is reached even if none before it responds.
        let server_timeout = TRY.min(WALK / u32::try_from(count).unwrap_or(u32::MAX));
        let mut failures: Vec<Option<Failure>> = vec![None; count];
        // Twice: a single server whose responses were lost gets a second chance.
        for turn in 0..2 * count {
            let index = (first + turn) % count;
            let server = self.servers[index];
            let response = exchange(server, &query, server_timeout, deadline).await;
            match response.and_then(|message| Answer::read(&message, server)) {
                Ok(answer) => {
                    self.responded(index, before);
                    return Ok(answer);
                }
                Err(failure) => {
                    let error = LookupError::new(name, &[server], failure);
                    if error.is_denial() {
                        self.responded(index, before);
                        return Err(error);
                    }
                    // A timeout does not replace what the server responded before.
                    if failures[index].is_none() || error.failure != Failure::Timeout {
                        failures[index] = Some(error.failure);
                    }
                }
            }
            let all_silent = failures.iter().flatten().all(|failure| *failure == Failure::Timeout);
            if Instant::now() >= deadline || turn + 1 == count && !all_silent {
                break;
            }
        }
        let servers = self.servers.iter().zip(failures);
        let failed = servers.filter_map(|(server, failure)| Some((*server, failure?)));
        Err(LookupError::of_all(name, failed).unwrap_or_else(|| self.timed_out(name)))
    }

    /// The server to start with, and the one that is preferred.
    fn first(&self) -> (usize, usize) {
        let mut preferred = self.preferred.lock();
        let index = preferred.index;
        if index == 0 || preferred.since.elapsed() < RETURN {
            return (index, index);
        }
        preferred.since = Instant::now();
        (0, index)
    }

    /// `index` has responded to a query; `before` was preferred when the query started. If the preferred server has
    /// changed since then, the response says nothing about the current one.
    fn responded(&self, index: usize, before: usize) {
        let mut preferred = self.preferred.lock();
        if preferred.index == before && index != before {
            *preferred = Preferred { index, since: Instant::now() };
        }
    }

    fn timed_out(&self, name: &str) -> LookupError {
        LookupError::new(name, &self.servers, Failure::Timeout)
    }
}

/// The records of a response; at least one.
#[derive(Clone, Debug)]
struct Answer {
    records: Vec<Record>,
    /// NXDOMAIN with a CNAME is about the CNAME's target (RFC 2308, section 2.1), which the walk queries next.
    denies: bool,
    server: SocketAddr,
}

impl Answer {
    fn read(message: &Message, server: SocketAddr) -> Result<Answer, Failure> {
        let denies = match message.response_code {
            ResponseCode::NoError => false,
            ResponseCode::NXDomain => true,
            ResponseCode::ServFail => return Err(Failure::ServFail),
            ResponseCode::Refused => return Err(Failure::Refused),
            code => return Err(Failure::Code(mnemonic(code))),
        };
        let records = records(message);
        if !records.is_empty() {
            return Ok(Answer { records, denies, server });
        }
        let kinds = |records: &[hickory_proto::rr::Record]| {
            let kinds = records.iter().map(|r| format!("{} {}", r.dns_class, r.record_type()));
            kinds.collect::<Vec<_>>()
        };
        let authorities = kinds(&message.authorities);
        let has = |kind: &str| authorities.iter().any(|known| known == kind);
        Err(match message.answers.as_slice() {
            _ if denies => Failure::NxDomain,
            [] if has("IN NS") && !has("IN SOA") && !message.authoritative => Failure::Malformed(
                "it refers to other servers: this one does not resolve names for its clients"
                    .to_owned(),
            ),
            [] => Failure::NoData,
            others => Failure::Malformed(format!(
                "it has no address and no CNAME, but {}",
                kinds(others).join(", ")
            )),
        })
    }

    /// Why it has no records for the queried name.
    fn about_others(&self) -> Failure {
        match (self.denies, self.records.first()) {
            (false, Some(record)) => Failure::Malformed(format!(
                "it is about {} and other names, not about the queried name",
                record.owner()
            )),
            _ => Failure::NxDomain,
        }
    }
}

/// How far a walk has come.
enum Reached {
    /// To addresses.
    Addresses(Chain),
    /// As far as it was to go.
    Enough(Chain),
    /// To a name for which DNS has none.
    Nothing(Chain, LookupError),
}

/// Why a walk that began at `place` ended here.
fn unresolved(chain: &Chain, place: Place, error: LookupError) -> ResolveError {
    let names = chain.names().to_vec();
    let place = if names.len() == 1 { place } else { Place::Chain };
    ResolveError::Lookup { chain: names, place, error: Box::new(error) }
}

/// Counts a query that has ended.
fn count(result: &'static str, started: Instant) {
    metrics::counter!("truename_dns_lookups_total", "result" => result).increment(1);
    metrics::histogram!("truename_dns_lookup_duration_seconds").record(started.elapsed());
}

/// The name of the code in the RFCs.
fn mnemonic(code: ResponseCode) -> String {
    match code {
        // BADSIG has the same number, but exists only in signed messages. Ours are not signed.
        ResponseCode::BADSIG => "BADVERS".to_owned(),
        ResponseCode::Unknown(code) => format!("RCODE {code}"),
        code => format!("{code:?}").to_ascii_uppercase(),
    }
}

fn query(name: &str, family: Family) -> Result<Query, LookupError> {
    // The dot makes it absolute: search lists are not used.
    let absolute = Name::from_ascii(format!("{name}."))
        .map_err(|error| LookupError::new(name, &[], Failure::Unaskable(error.to_string())))?;
    Ok(Query::query(absolute, family.record_type()))
}

fn records(message: &Message) -> Vec<Record> {
    let internet = message.answers.iter().filter(|record| record.dns_class == DNSClass::IN);
    internet
        .filter_map(|record| {
            let owner = record.name.to_ascii();
            // RFC 2181, section 8: a TTL with its highest bit set counts as 0.
            let ttl = if i32::try_from(record.ttl).is_ok() { record.ttl } else { 0 };
            match &record.data {
                RData::CNAME(target) => Some(Record::cname(&owner, ttl, &target.to_ascii())),
                RData::A(ip) => Some(Record::address(&owner, ttl, ip.0.into())),
                RData::AAAA(ip) => Some(Record::address(&owner, ttl, ip.0.into())),
                _ => None,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests;
