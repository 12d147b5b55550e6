//! The DNS client: one question to the servers in turn, and the whole walk for one name.

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

/// For one server at most; then the next has its turn.
const TRY: Duration = Duration::from_secs(2);
/// For one family's walk, follow-up questions included.
const WALK: Duration = Duration::from_millis(4500);
/// What a family that is slow may cost one that has answered. Time for one retransmission.
const GRACE: Duration = Duration::from_millis(500);

/// How long the servers ahead of the one that answered last are left in peace; then one question begins with the first
/// again. It may know names that the others deny, and be back by now.
const RETURN: Duration = Duration::from_secs(10);

/// Questions for aliases that are out at one time, each with a socket: a thousand aliases must not take all that this
/// process may open.
const MAX_IN_FLIGHT: usize = 192;
/// The same for the clients of a forward proxy, apart from those: names that nobody answers for keep no alias waiting.
const MAX_IN_FLIGHT_FOR_CLIENTS: usize = 64;

/// An address family, asked for apart from the other.
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

    /// The names of both walks, from the question on.
    pub fn names(&self) -> impl Iterator<Item = &Arc<str>> {
        [&self.v4, &self.v6].into_iter().flat_map(|walked| match walked {
            Ok(chain) => chain.names(),
            Err(error) => error.chain(),
        })
    }

    /// For a target in digits: they are the whole answer, whichever family is asked.
    pub fn of_ip(ip: IpAddr) -> Round {
        Round { v4: Ok(Chain::of_ip(ip)), v6: Ok(Chain::of_ip(ip)) }
    }
}

/// Asks a fixed list of servers. Equal questions in flight share one query.
pub struct DnsClient {
    servers: Vec<SocketAddr>,
    preferred: Mutex<Preferred>,
    /// By what is asked, and whether it is for a client of a forward proxy.
    in_flight: Mutex<HashMap<(String, Family, bool), Weak<Flight>>>,
    permits: Semaphore,
    permits_for_clients: Semaphore,
}

/// The server that answered last: a dead one before it costs its time only once.
struct Preferred {
    index: usize,
    /// Since when, or when a question last began with the first server in its place.
    since: Instant,
}

/// Whoever comes first asks; should he be cancelled, another does.
type Flight = OnceCell<Result<Answer, LookupError>>;

impl DnsClient {
    /// A client of these servers; a missing one is an error of the first lookup, not of this.
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

    /// Walks from the name to its addresses, both families at once; `place` says where the name comes from. When one
    /// family has its addresses, the other has only a moment more: a server that is silent about AAAA delays nobody.
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
            // Its question is given up, and with it whoever would have counted it.
            count("timeout", started);
            Err(ResolveError::Lookup {
                chain: vec![Arc::from(fold(name))],
                place,
                error: Box::new(self.silence(name)),
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
            let error = match self.ask(&end, family, place, deadline).await {
                Ok(answer) => match chain.walk(&answer.records).map_err(ResolveError::Chain)? {
                    Walked::Complete(chain) => return Ok(chain),
                    Walked::AskForEnd(longer) => {
                        chain = longer;
                        continue;
                    }
                    Walked::Nothing(same) => {
                        chain = same;
                        LookupError::new(&end, &[answer.server], answer.about_others())
                    }
                },
                Err(error) => error,
            };
            let first = chain.names().len() == 1;
            return Err(ResolveError::Lookup {
                chain: chain.names().to_vec(),
                place: if first { place } else { Place::Chain },
                error: Box::new(error),
            });
        }
    }

    /// One question, to the servers in turn until one answers.
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
        tracing::debug!(name, %family, result = label, "asked DNS");
        result
    }

    /// Asks, or waits for another who is asking the same.
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
            // The other's time was over, ours is not.
            Ok(Err(error)) if error.failure == Failure::Timeout && !is_first => {
                self.ask_in_turn(name, family, place, deadline).await
            }
            Ok(result) => result,
            Err(_) => Err(self.silence(name)),
        }
    }

    fn flight(&self, name: &str, family: Family, place: Place) -> Arc<Flight> {
        let mut in_flight = self.in_flight.lock();
        if in_flight.len() == in_flight.capacity() {
            // Before it grows: so it is never longer than twice what is in flight.
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
            return Err(self.silence(name));
        };
        let (first, before) = self.first();
        // So that the last of many silent servers is reached too.
        let server_timeout = TRY.min(WALK / u32::try_from(count).unwrap_or(u32::MAX));
        let mut failures: Vec<Option<Failure>> = vec![None; count];
        // Twice: a lone server whose answers were lost gets a second chance.
        for turn in 0..2 * count {
            let index = (first + turn) % count;
            let server = self.servers[index];
            let response = exchange(server, &query, server_timeout, deadline).await;
            match response.and_then(|message| Answer::read(&message, server)) {
                Ok(answer) => {
                    self.answered(index, before);
                    return Ok(answer);
                }
                Err(failure) => {
                    let error = LookupError::new(name, &[server], failure);
                    if error.is_denial() {
                        self.answered(index, before);
                        return Err(error);
                    }
                    // A time-out says nothing about what the server said before.
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
        Err(LookupError::of_all(name, failed).unwrap_or_else(|| self.silence(name)))
    }

    /// The server to begin with, and the one that is preferred meanwhile.
    fn first(&self) -> (usize, usize) {
        let mut preferred = self.preferred.lock();
        let index = preferred.index;
        if index == 0 || preferred.since.elapsed() < RETURN {
            return (index, index);
        }
        preferred.since = Instant::now();
        (0, index)
    }

    /// `index` has answered a question, at the beginning of which `before` was preferred. Whoever answers a question
    /// that began before the last change says nothing about the one that is preferred by now.
    fn answered(&self, index: usize, before: usize) {
        let mut preferred = self.preferred.lock();
        if preferred.index == before && index != before {
            *preferred = Preferred { index, since: Instant::now() };
        }
    }

    fn silence(&self, name: &str) -> LookupError {
        LookupError::new(name, &self.servers, Failure::Timeout)
    }
}

/// The records of a response that has some.
#[derive(Clone, Debug)]
struct Answer {
    records: Vec<Record>,
    /// NXDOMAIN with a CNAME is about the CNAME's target (RFC 2308, section 2.1): the walk asks for that.
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

    /// Why it says nothing about the name that was asked for.
    fn about_others(&self) -> Failure {
        match (self.denies, self.records.first()) {
            (false, Some(record)) => Failure::Malformed(format!(
                "it is about {} and other names, not about the one that was asked for",
                record.owner()
            )),
            _ => Failure::NxDomain,
        }
    }
}

/// Counts a question that has ended.
fn count(result: &'static str, started: Instant) {
    metrics::counter!("truename_dns_lookups_total", "result" => result).increment(1);
    metrics::histogram!("truename_dns_lookup_duration_seconds").record(started.elapsed());
}

/// As the RFCs write it.
fn mnemonic(code: ResponseCode) -> String {
    match code {
        // The same number, in a message that is signed; ours are not.
        ResponseCode::BADSIG => "BADVERS".to_owned(),
        ResponseCode::Unknown(code) => format!("RCODE {code}"),
        code => format!("{code:?}").to_ascii_uppercase(),
    }
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
            // RFC 2181, section 8: with its highest bit set it is 0.
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
