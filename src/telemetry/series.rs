//! An alias' series: atomics, counted by the workers and read at each scrape.
//!
//! They start at 0, because `increase()` ignores a counter's first value, and disappear with the
//! alias. The recorder of the `metrics` crate can do neither, so it has only the process' series.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicI64, AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use ::http::{Method, StatusCode};
use parking_lot::Mutex;

use super::histogram::Histogram;
use crate::{config::Protocol, connect::Facts, fault::ProxyErrorType};

/// Why a request is sent again: the `reason` of `truename_retries_total`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryReason {
    /// No connection could be made.
    Connect,
    /// A new connection was lost.
    Reset,
    /// A kept connection was lost, or the target provably did not read the request.
    Reuse,
    /// The response's status is listed in `retry.when`.
    Status,
}

impl RetryReason {
    /// All reasons, in the order of their declaration.
    pub const ALL: [Self; 4] = [Self::Connect, Self::Reset, Self::Reuse, Self::Status];

    /// The label.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Reset => "reset",
            Self::Reuse => "reuse",
            Self::Status => "status",
        }
    }
}

/// The protocols of downstream connections; `none` is for those that ended before it was known.
pub(super) const PROTOCOLS: [&str; 6] = ["http/1.1", "h2", "tcp", "postgres", "mysql", "none"];

/// Requests by method and status are stored in blocks of this many; most aliases need one block.
const BLOCK: usize = 8;

/// No certificate has been seen yet.
const NEVER: i64 = i64::MIN;

/// The series of one alias, for as long as it is configured.
#[derive(Debug)]
pub struct AliasSeries {
    alias: Box<str>,
    /// The alias' own, by its index in [`PROTOCOLS`]; 0 for all of HTTP.
    protocol: AtomicUsize,
    shards: Box<[Shard]>,
    pub(super) connect_duration: Histogram,
    pub(super) handshake_duration: [Histogram; 2],
    /// In the order of [`ProxyErrorType::ALL`].
    pub(super) errors: [AtomicU64; ProxyErrorType::ALL.len()],
    /// In the order of [`RetryReason::ALL`].
    pub(super) retries: [AtomicU64; RetryReason::ALL.len()],
    pub(super) addresses_refused: AtomicU64,
    pub(super) true_names_refused: AtomicU64,
    pub(super) true_name_changes: AtomicU64,
    not_after: AtomicI64,
    endpoints: Mutex<HashMap<SocketAddr, Arc<EndpointSeries>>>,
}

/// The connections to one endpoint, counted for as long as the alias has it.
#[derive(Debug, Default)]
pub struct EndpointSeries {
    total: AtomicU64,
    active: AtomicUsize,
}

/// The counters of requests and connections. Each worker has its own, on separate cache lines.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Shard {
    pub(super) in_flight: AtomicI64,
    pub(super) duration: Histogram,
    pub(super) bytes_in: AtomicU64,
    pub(super) bytes_out: AtomicU64,
    pub(super) connections: AtomicI64,
    /// By protocol, and by whether there was TLS.
    pub(super) accepted: [[AtomicU64; 2]; PROTOCOLS.len()],
    requests: Requests,
}

impl AliasSeries {
    /// All series at 0, for this many workers.
    pub fn new(alias: &str, workers: usize) -> Arc<Self> {
        Arc::new(Self {
            alias: alias.into(),
            protocol: AtomicUsize::new(0),
            shards: (0..workers.max(1)).map(|_| Shard::default()).collect(),
            connect_duration: Histogram::default(),
            handshake_duration: Default::default(),
            errors: Default::default(),
            retries: Default::default(),
            addresses_refused: AtomicU64::new(0),
            true_names_refused: AtomicU64::new(0),
            true_name_changes: AtomicU64::new(0),
            not_after: AtomicI64::new(NEVER),
            endpoints: Mutex::default(),
        })
    }

    /// How many workers count here.
    pub fn workers(&self) -> usize {
        self.shards.len()
    }

    /// Sets the alias' protocol. It is HTTP by default.
    pub fn set_protocol(&self, protocol: Protocol) {
        let word = protocol.word();
        let index = PROTOCOLS.iter().position(|known| *known == word).unwrap_or(0);
        self.protocol.store(index, Relaxed);
    }

    pub(super) fn is_http(&self) -> bool {
        self.protocol.load(Relaxed) == 0
    }

    /// Whether its connections may speak one of [`PROTOCOLS`].
    pub(super) fn speaks(&self, protocol: &str) -> bool {
        match protocol {
            "none" => true,
            "http/1.1" | "h2" => self.is_http(),
            own => PROTOCOLS[self.protocol.load(Relaxed)] == own,
        }
    }

    /// Counts a move to another true name.
    pub fn true_name_changed(&self, times: u64) {
        self.true_name_changes.fetch_add(times, Relaxed);
    }

    /// Counts a true name that `allow` refused.
    pub fn true_name_refused(&self) {
        self.true_names_refused.fetch_add(1, Relaxed);
    }

    /// The series of one endpoint; at 0 if it is new.
    pub fn endpoint(&self, address: SocketAddr) -> Arc<EndpointSeries> {
        self.endpoints.lock().entry(address).or_default().clone()
    }

    /// The series of all endpoints that connections were made to.
    pub fn endpoints(&self) -> HashMap<SocketAddr, Arc<EndpointSeries>> {
        self.endpoints.lock().clone()
    }

    /// Removes the endpoints that have left and have no open connections.
    pub fn retain_endpoints(&self, stays: impl Fn(SocketAddr) -> bool) {
        let mut endpoints = self.endpoints.lock();
        endpoints.retain(|address, endpoint| endpoint.active() > 0 || stays(*address));
    }

    /// Its name, the value of the label.
    pub fn alias(&self) -> &str {
        &self.alias
    }

    /// The sum of a value over all workers.
    pub(super) fn sum(&self, value: impl Fn(&Shard) -> u64) -> u64 {
        self.shards.iter().map(value).fold(0, u64::wrapping_add)
    }

    /// The sum of a gauge over all workers. A single worker's value may be below 0 for a moment.
    pub(super) fn level(&self, value: impl Fn(&Shard) -> &AtomicI64) -> i64 {
        self.shards.iter().map(|shard| value(shard).load(Relaxed)).sum::<i64>().max(0)
    }

    pub(super) fn durations(&self) -> impl Iterator<Item = &Histogram> {
        self.shards.iter().map(|shard| &shard.duration)
    }

    /// The expiry of the last certificate, in Unix time.
    pub(super) fn not_after(&self) -> Option<i64> {
        Some(self.not_after.load(Relaxed)).filter(|at| *at != NEVER)
    }

    /// Requests by method and status, in that order.
    pub(super) fn requests(&self) -> std::collections::BTreeMap<(&'static str, u16), u64> {
        let mut requests = std::collections::BTreeMap::new();
        for shard in &self.shards {
            shard.requests.each(|method, status, count| {
                *requests.entry((method, status)).or_default() += count;
            });
        }
        requests
    }
}

impl EndpointSeries {
    /// Connections made so far.
    pub fn total(&self) -> u64 {
        self.total.load(Relaxed)
    }

    /// Open connections, including idle ones.
    pub fn active(&self) -> usize {
        self.active.load(Relaxed)
    }

    /// Counts a new connection.
    pub fn opened(&self) {
        self.total.fetch_add(1, Relaxed);
        self.active.fetch_add(1, Relaxed);
    }

    /// Counts its end.
    pub fn closed(&self) {
        self.active.fetch_sub(1, Relaxed);
    }
}

/// The series of an alias, for one worker.
#[derive(Clone, Debug)]
pub struct AliasMetrics {
    series: Arc<AliasSeries>,
    shard: usize,
}

impl AliasMetrics {
    /// For the worker with this index.
    pub fn new(series: &Arc<AliasSeries>, worker: usize) -> Self {
        Self { series: series.clone(), shard: worker % series.shards.len() }
    }

    /// For what belongs to no alias: requests that were refused before an alias was found, and what the
    /// forward proxy passes through. There is one for the process, with an empty label.
    pub fn of_no_alias() -> &'static Self {
        static NO_ALIAS: OnceLock<AliasMetrics> = OnceLock::new();
        NO_ALIAS.get_or_init(|| Self::new(&AliasSeries::new("", 1), 0))
    }

    /// All series of the alias.
    pub fn series(&self) -> &Arc<AliasSeries> {
        &self.series
    }

    fn shard(&self) -> &Shard {
        &self.series.shards[self.shard]
    }

    /// Counts a request that begins.
    pub fn begun(&self) {
        self.shard().in_flight.fetch_add(1, Relaxed);
    }

    /// Counts a request that ends. `status` is the one that was sent to the client.
    pub fn finished(&self, method: &Method, status: StatusCode, totals: &RequestTotals) {
        let shard = self.shard();
        shard.in_flight.fetch_sub(1, Relaxed);
        shard.requests.count(method_label(method), status);
        shard.duration.record(totals.duration);
        shard.bytes_in.fetch_add(totals.bytes_in, Relaxed);
        shard.bytes_out.fetch_add(totals.bytes_out, Relaxed);
    }

    /// Counts a request that is refused. `method` is `None` if its head could not be parsed.
    pub fn refused(
        &self,
        method: Option<&Method>,
        status: StatusCode,
        error: ProxyErrorType,
        duration: Duration,
    ) {
        let shard = self.shard();
        shard.requests.count(method.map_or(OTHER, method_label), status);
        shard.duration.record(duration);
        self.error(error);
    }

    /// Counts a failure.
    pub fn error(&self, error: ProxyErrorType) {
        self.series.errors[error as usize].fetch_add(1, Relaxed);
    }

    /// Counts a retry.
    pub fn retry(&self, reason: RetryReason) {
        self.series.retries[reason as usize].fetch_add(1, Relaxed);
    }

    /// Counts bytes of a connection, which may still be open.
    pub fn carried(&self, bytes_in: u64, bytes_out: u64) {
        self.shard().bytes_in.fetch_add(bytes_in, Relaxed);
        self.shard().bytes_out.fetch_add(bytes_out, Relaxed);
    }

    /// Counts an address that `policy` refused.
    pub fn address_refused(&self) {
        self.series.addresses_refused.fetch_add(1, Relaxed);
    }

    /// Records a new connection.
    pub fn connected(&self, facts: &Facts) {
        self.series.connect_duration.record(facts.tcp_time);
        self.handshaken(facts);
    }

    /// Records a TLS handshake, if there was one.
    pub fn handshaken(&self, facts: &Facts) {
        if facts.tls_version.is_some() {
            self.series.handshake_duration[usize::from(facts.resumed)].record(facts.tls_time);
        }
        self.certificate(facts.not_after);
    }

    /// Records the expiry of a certificate, accepted or not.
    pub fn certificate(&self, not_after: Option<i64>) {
        if let Some(not_after) = not_after {
            self.series.not_after.store(not_after, Relaxed);
        }
    }
}

/// The totals of a request at its end.
#[derive(Clone, Copy, Debug)]
#[allow(missing_docs, reason = "the names are those of the access log")]
pub struct RequestTotals {
    pub duration: Duration,
    pub bytes_in: u64,
    pub bytes_out: u64,
}

/// A connection from an application. While it is open, it counts for one alias: the only one of its
/// listener, or the one of its first request. A connection that reaches no alias counts for none.
#[derive(Debug)]
pub struct DownstreamConnection {
    protocol: &'static str,
    /// Unknown until one side has spoken, if the server may speak first.
    tls: OnceLock<bool>,
    /// The alias that it counts for; `None` if the connection inside of it is counted instead.
    alias: OnceLock<Option<AliasMetrics>>,
}

impl DownstreamConnection {
    /// Not counted yet. `protocol` is its name in ALPN.
    pub fn new(protocol: &'static str, tls: bool) -> Self {
        Self { protocol, tls: tls.into(), alias: OnceLock::new() }
    }

    /// The same, when it is not known yet whether the client speaks TLS.
    pub fn undecided(protocol: &'static str) -> Self {
        Self { protocol, tls: OnceLock::new(), alias: OnceLock::new() }
    }

    /// Sets whether the client speaks TLS. Only the first call has an effect.
    pub fn decide(&self, tls: bool) {
        if self.tls.set(tls).is_ok()
            && let Some(Some(alias)) = self.alias.get()
        {
            self.count(alias, tls);
        }
    }

    /// Counts it for an alias. Only the first call has an effect.
    pub fn belongs_to(&self, alias: &AliasMetrics) {
        self.alias.get_or_init(|| {
            if let Some(tls) = self.tls.get() {
                self.count(alias, *tls);
            }
            alias.shard().connections.fetch_add(1, Relaxed);
            Some(alias.clone())
        });
    }

    fn count(&self, alias: &AliasMetrics, tls: bool) {
        let protocol = PROTOCOLS.iter().position(|known| *known == self.protocol);
        let accepted = &alias.shard().accepted[protocol.unwrap_or(PROTOCOLS.len() - 1)];
        accepted[usize::from(tls)].fetch_add(1, Relaxed);
    }

    /// The connection inside of it is to be counted instead, unless this one was counted already.
    pub fn wraps_another(&self) {
        self.alias.get_or_init(|| None);
    }
}

impl Drop for DownstreamConnection {
    fn drop(&mut self) {
        self.decide(false);
        self.belongs_to(AliasMetrics::of_no_alias());
        if let Some(Some(alias)) = self.alias.get() {
            alias.shard().connections.fetch_sub(1, Relaxed);
        }
    }
}

/// Requests by method and status. Grows as needed and never moves, so counting takes no lock.
#[derive(Debug, Default)]
struct Requests {
    slots: [Slot; BLOCK],
    more: OnceLock<Box<Requests>>,
}

/// Free while its key is 0.
#[derive(Debug, Default)]
struct Slot {
    key: AtomicU32,
    count: AtomicU64,
}

impl Requests {
    fn count(&self, method: u32, status: StatusCode) {
        // A status has three digits, and there is a fixed list of methods.
        let key = (method + 1) * 1000 + u32::from(status.as_u16());
        let mut block = self;
        loop {
            if let Some(slot) = block.slots.iter().find(|slot| slot.is_of(key)) {
                slot.count.fetch_add(1, Relaxed);
                return;
            }
            block = block.more.get_or_init(Box::default);
        }
    }

    fn each(&self, mut f: impl FnMut(&'static str, u16, u64)) {
        let mut block = Some(self);
        while let Some(Self { slots, more }) = block {
            for slot in slots {
                let key = slot.key.load(Relaxed);
                let method = (key / 1000).checked_sub(1).and_then(|m| METHODS.get(m as usize));
                if let (Some(method), Ok(status)) = (method, u16::try_from(key % 1000)) {
                    f(method, status, slot.count.load(Relaxed));
                }
            }
            block = more.get().map(|more| &**more);
        }
    }
}

impl Slot {
    /// Whether it counts `key`. If it was free, it does from now on.
    fn is_of(&self, key: u32) -> bool {
        match self.key.load(Relaxed) {
            0 => match self.key.compare_exchange(0, key, Relaxed, Relaxed) {
                Ok(_) => true,
                Err(taken) => taken == key,
            },
            taken => taken == key,
        }
    }
}

/// Clients may send any method, but the values of a label must be bounded.
const METHODS: [&str; 10] =
    ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE", "other"];

/// The last of them.
const OTHER: u32 = 9;

fn method_label(method: &Method) -> u32 {
    match *method {
        Method::GET => 0,
        Method::HEAD => 1,
        Method::POST => 2,
        Method::PUT => 3,
        Method::PATCH => 4,
        Method::DELETE => 5,
        Method::OPTIONS => 6,
        Method::CONNECT => 7,
        Method::TRACE => 8,
        _ => OTHER,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_method_and_status_is_counted_as_what_it_is() {
        let requests = Requests::default();
        let all = METHODS.map(|name| {
            let method = Method::from_bytes(name.as_bytes()).unwrap();
            (name, method)
        });
        for status in 100..=599 {
            for (name, method) in &all {
                let times = if *name == "GET" { 2 } else { 1 };
                for _ in 0..times {
                    requests.count(method_label(method), StatusCode::from_u16(status).unwrap());
                }
            }
        }
        let mut seen = 0;
        requests.each(|method, status, count| {
            assert_eq!(count, if method == "GET" { 2 } else { 1 }, "{method} {status}");
            seen += 1;
        });
        assert_eq!(seen, METHODS.len() * 500);
    }

    #[test]
    fn workers_that_meet_a_status_first_at_once_count_it_once_each() {
        let requests = Requests::default();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for status in (100..=599).cycle().take(20_000) {
                        requests.count(0, StatusCode::from_u16(status).unwrap());
                    }
                });
            }
        });
        let mut found = Vec::new();
        requests.each(|_, status, count| found.push((status, count)));
        found.sort_unstable();
        assert_eq!(found, (100..=599).map(|status| (status, 160)).collect::<Vec<_>>());
    }

    #[test]
    fn what_one_worker_takes_up_another_may_put_down() {
        let series = AliasSeries::new("a", 2);
        let [one, other] = [0, 1].map(|worker| AliasMetrics::new(&series, worker));
        one.begun();
        other.begun();
        let totals = RequestTotals { duration: Duration::ZERO, bytes_in: 1, bytes_out: 2 };
        other.finished(&Method::GET, StatusCode::OK, &totals);
        other.finished(&Method::GET, StatusCode::OK, &totals);
        assert_eq!(series.level(|shard| &shard.in_flight), 0);
        assert_eq!(series.requests().into_iter().collect::<Vec<_>>(), [(("GET", 200), 2)]);
    }
}
