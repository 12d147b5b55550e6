//! A DNS server on loopback, with UDP and TCP, that responds from a table which may change while it runs.
//!
//! There are two kinds of entries. *Zone* records are returned as CoreDNS does for an `ExternalName`: the chain is
//! followed as far as the table has it, a chain that leads out of the cluster without an address is a lone CNAME, one
//! that ends inside is NODATA. An *exact* response is for one name and type, and is sent as it is.

use hickory_proto::{
    op::{Message, Metadata, ResponseCode},
    rr::{
        Name, RData, Record as WireRecord,
        rdata::{A, AAAA, CNAME, SOA},
    },
};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    str::FromStr,
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::watch,
    task::{AbortHandle, JoinSet},
    time::timeout,
};

pub use hickory_proto::rr::RecordType;

const CLUSTER: &str = "cluster.local";
/// How many names the query counter has at most, so that clients cannot make it grow without limit.
const MAX_COUNTED: usize = 4096;
const MAX_TCP_CONNECTIONS: usize = 64;
const TCP_IDLE: Duration = Duration::from_secs(10);

/// A resource record. Names may be in any case, with or without the trailing dot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// The owner name.
    pub owner: String,
    /// The TTL in seconds.
    pub ttl: u32,
    /// The data.
    pub data: Data,
}

/// The data of a [`Record`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// The owner is an alias of this name.
    Cname(String),
    /// An A or AAAA record.
    Address(IpAddr),
}

/// `owner ttl CNAME target`.
pub fn cname(owner: &str, ttl: u32, target: &str) -> Record {
    Record { owner: owner.to_owned(), ttl, data: Data::Cname(target.to_owned()) }
}

/// `owner ttl A address`, or AAAA.
pub fn address(owner: &str, ttl: u32, ip: impl Into<IpAddr>) -> Record {
    Record { owner: owner.to_owned(), ttl, data: Data::Address(ip.into()) }
}

/// The response to a query.
#[derive(Clone, Debug)]
pub enum DnsResponse {
    /// NOERROR with these records, in this order.
    Records(Vec<Record>),
    /// NXDOMAIN, with the SOA.
    NxDomain,
    /// NOERROR without records.
    NoData {
        /// CoreDNS sends the SOA; some forwarders do not.
        soa: bool,
    },
    /// SERVFAIL.
    ServFail,
    /// REFUSED.
    Refused,
    /// No response.
    Silence,
    /// TC and only the CNAMEs over UDP, these records over TCP.
    Truncated(Vec<Record>),
    /// The right id, followed by octets that are not a DNS message.
    Garbage,
}

/// A running server. It stops when this is dropped.
#[derive(Debug)]
pub struct DnsServer {
    address: SocketAddr,
    table: Arc<Table>,
    tasks: [AbortHandle; 2],
}

impl DnsServer {
    /// Binds UDP and TCP on the same port. Port 0 chooses one that is free for both.
    pub async fn start(address: SocketAddr) -> io::Result<DnsServer> {
        let (udp, tcp) = bind(address).await?;
        let address = udp.local_addr()?;
        let table = Arc::new(Table::default());
        let tasks = [
            tokio::spawn(serve_udp(udp, table.clone())).abort_handle(),
            tokio::spawn(serve_tcp(tcp, table.clone())).abort_handle(),
        ];
        Ok(DnsServer { address, table, tasks })
    }

    /// Its address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sets records of the zone. They replace the previous zone records of their owners.
    pub fn zone(&self, records: impl IntoIterator<Item = Record>) {
        let mut fresh: HashMap<String, Vec<Record>> = HashMap::new();
        for record in records {
            fresh.entry(key(&record.owner)).or_default().push(record);
        }
        self.table.entries.lock().zone.extend(fresh);
    }

    /// Sets the exact response to A and AAAA queries for the name.
    pub fn respond(&self, name: &str, response: DnsResponse) {
        self.respond_to_type(name, RecordType::A, response.clone());
        self.respond_to_type(name, RecordType::AAAA, response);
    }

    /// Sets the exact response to queries for the name and type. It takes precedence over the zone.
    pub fn respond_to_type(&self, name: &str, kind: RecordType, response: DnsResponse) {
        let mut entries = self.table.entries.lock();
        entries.exact.insert((key(name), kind), response);
    }

    /// Removes the exact responses for the name, so that the zone is used again.
    pub fn restore(&self, name: &str) {
        let name = key(name);
        let mut entries = self.table.entries.lock();
        entries.exact.retain(|(owner, _), _| *owner != name);
    }

    /// Removes the name from the zone.
    pub fn remove(&self, name: &str) {
        self.table.entries.lock().zone.remove(&key(name));
    }

    /// The number of queries for this name and type, including those without a response.
    pub fn queries(&self, name: &str, kind: RecordType) -> usize {
        let counts = self.table.counts.borrow();
        counts.get(&(key(name), kind)).copied().unwrap_or(0)
    }

    /// Waits until there were `count` queries for the name since the start, of all types together.
    pub async fn wait_for_queries(&self, name: &str, count: usize) {
        let name = key(name);
        let asked = |counts: &HashMap<(String, RecordType), usize>| {
            let of_name = counts.iter().filter(|((owner, _), _)| *owner == name);
            of_name.map(|(_, n)| n).sum::<usize>() >= count
        };
        // The sender is in `self`, so this cannot fail.
        let _ = self.table.counts.subscribe().wait_for(asked).await;
    }
}

impl Drop for DnsServer {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn bind(address: SocketAddr) -> io::Result<(UdpSocket, TcpListener)> {
    let mut attempts = 0;
    loop {
        let udp = UdpSocket::bind(address).await?;
        match TcpListener::bind(udp.local_addr()?).await {
            Ok(tcp) => return Ok((udp, tcp)),
            // The port chosen for UDP may be in use for TCP.
            Err(error) if address.port() != 0 || attempts == 16 => return Err(error),
            Err(_) => attempts += 1,
        }
    }
}

async fn serve_udp(socket: UdpSocket, table: Arc<Table>) {
    let mut buffer = [0; 4096];
    // An error here is an ICMP message about a response that the client no longer waited for.
    loop {
        let Ok((length, peer)) = socket.recv_from(&mut buffer).await else {
            tokio::task::yield_now().await;
            continue;
        };
        if let Some(reply) = table.reply(&buffer[..length], Transport::Udp) {
            let _ = socket.send_to(&reply, peer).await;
        }
    }
}

async fn serve_tcp(listener: TcpListener, table: Arc<Table>) {
    // Owns the connections, so that they end with the server.
    let mut connections = JoinSet::new();
    loop {
        while connections.len() >= MAX_TCP_CONNECTIONS {
            connections.join_next().await;
        }
        while connections.try_join_next().is_some() {}
        if let Ok((stream, _)) = listener.accept().await {
            connections.spawn(serve_connection(stream, table.clone()));
        } else {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

async fn serve_connection(mut stream: TcpStream, table: Arc<Table>) -> io::Result<()> {
    loop {
        let length = timeout(TCP_IDLE, stream.read_u16()).await??;
        let mut request = vec![0; usize::from(length)];
        timeout(TCP_IDLE, stream.read_exact(&mut request)).await??;
        if let Some(reply) = table.reply(&request, Transport::Tcp) {
            let mut framed = (reply.len() as u16).to_be_bytes().to_vec();
            framed.extend(reply);
            timeout(TCP_IDLE, stream.write_all(&framed)).await??;
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Udp,
    Tcp,
}

#[derive(Debug, Default)]
struct Table {
    entries: Mutex<Entries>,
    counts: watch::Sender<HashMap<(String, RecordType), usize>>,
}

#[derive(Debug, Default)]
struct Entries {
    zone: HashMap<String, Vec<Record>>,
    exact: HashMap<(String, RecordType), DnsResponse>,
}

impl Table {
    /// The octets to send back; `None` for no response, and for what cannot be encoded: CoreDNS does not respond
    /// either for an `externalName` with a label of 64 characters.
    fn reply(&self, request: &[u8], transport: Transport) -> Option<Vec<u8>> {
        let request = Message::from_vec(request).ok()?;
        let query = request.queries.first()?;
        let (name, kind) = (key(&query.name().to_ascii()), query.query_type());
        self.count(&name, kind);
        let response = self.entries.lock().find(&name, kind);

        let mut reply = Message::response(request.id, request.op_code);
        reply.metadata = Metadata::response_from_request(&request.metadata);
        reply.metadata.authoritative = true;
        reply.add_query(query.clone());
        let (code, records, soa) = match response {
            DnsResponse::Records(records) => (ResponseCode::NoError, records, false),
            DnsResponse::NxDomain => (ResponseCode::NXDomain, Vec::new(), true),
            DnsResponse::NoData { soa } => (ResponseCode::NoError, Vec::new(), soa),
            DnsResponse::ServFail => (ResponseCode::ServFail, Vec::new(), false),
            DnsResponse::Refused => (ResponseCode::Refused, Vec::new(), false),
            DnsResponse::Silence => return None,
            DnsResponse::Truncated(records) if transport == Transport::Udp => {
                return truncated(reply, &records);
            }
            DnsResponse::Truncated(records) => (ResponseCode::NoError, records, false),
            DnsResponse::Garbage => {
                return Some([&request.id.to_be_bytes()[..], &[0xff; 10]].concat());
            }
        };
        reply.metadata.response_code = code;
        for record in &records {
            reply.add_answer(wire(record)?);
        }
        if soa {
            reply.add_authority(cluster_soa()?);
        }
        let octets = reply.to_vec().ok()?;
        if transport == Transport::Udp && octets.len() > usize::from(request.max_payload()) {
            return truncated(reply, &records);
        }
        Some(octets)
    }

    fn count(&self, name: &str, kind: RecordType) {
        self.counts.send_modify(|counts| {
            if counts.len() < MAX_COUNTED || counts.contains_key(&(name.to_owned(), kind)) {
                *counts.entry((name.to_owned(), kind)).or_default() += 1;
            }
        });
    }
}

impl Entries {
    fn find(&self, name: &str, kind: RecordType) -> DnsResponse {
        match self.exact.get(&(name.to_owned(), kind)) {
            Some(response) => response.clone(),
            None => self.follow(name, kind),
        }
    }

    fn follow(&self, name: &str, kind: RecordType) -> DnsResponse {
        let Some(own) = self.zone.get(name) else {
            return DnsResponse::NxDomain;
        };
        let mut records = own.as_slice();
        let mut chain: Vec<Record> = Vec::new();
        let mut end = name.to_owned();
        while let Some((alias, target)) = records.iter().find_map(link) {
            if chain.contains(alias) {
                // The forwarder returns SERVFAIL for a loop of the vendor, of which CoreDNS keeps only its own CNAMEs.
                chain.retain(|record| in_cluster(&key(&record.owner)));
                records = &[];
                break;
            }
            chain.push(alias.clone());
            end = key(target);
            match self.zone.get(&end) {
                Some(next) if kind != RecordType::CNAME => records = next,
                _ => {
                    records = &[];
                    break;
                }
            }
        }
        let addresses = records.iter().filter(|record| record.kind() == kind);
        chain.extend(addresses.cloned());
        match chain.last() {
            Some(last) if last.kind() == kind || !in_cluster(&end) => DnsResponse::Records(chain),
            _ => DnsResponse::NoData { soa: true },
        }
    }
}

/// TC with the records that CoreDNS keeps.
fn truncated(reply: Message, records: &[Record]) -> Option<Vec<u8>> {
    let mut reply = reply.truncate();
    for record in records.iter().filter(|record| record.kind() == RecordType::CNAME) {
        reply.add_answer(wire(record)?);
    }
    reply.to_vec().ok()
}

impl Record {
    fn kind(&self) -> RecordType {
        match self.data {
            Data::Cname(_) => RecordType::CNAME,
            Data::Address(IpAddr::V4(_)) => RecordType::A,
            Data::Address(IpAddr::V6(_)) => RecordType::AAAA,
        }
    }
}

fn link(record: &Record) -> Option<(&Record, &str)> {
    match &record.data {
        Data::Cname(target) => Some((record, target)),
        Data::Address(_) => None,
    }
}

fn key(name: &str) -> String {
    name.trim_end_matches('.').to_ascii_lowercase()
}

fn in_cluster(name: &str) -> bool {
    name.strip_suffix(CLUSTER).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn wire(record: &Record) -> Option<WireRecord> {
    let data = match &record.data {
        Data::Cname(target) => RData::CNAME(CNAME(absolute(target)?)),
        Data::Address(IpAddr::V4(ip)) => RData::A(A(*ip)),
        Data::Address(IpAddr::V6(ip)) => RData::AAAA(AAAA(*ip)),
    };
    Some(WireRecord::from_rdata(absolute(&record.owner)?, record.ttl, data))
}

fn cluster_soa() -> Option<WireRecord> {
    let [server, mailbox] = ["ns.dns.cluster.local", "hostmaster.cluster.local"].map(absolute);
    let soa = SOA::new(server?, mailbox?, 1, 7200, 1800, 86400, 5);
    Some(WireRecord::from_rdata(absolute(CLUSTER)?, 5, RData::SOA(soa)))
}

fn absolute(name: &str) -> Option<Name> {
    Name::from_str(&format!("{}.", name.trim_end_matches('.'))).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::op::Query;
    use std::net::Ipv4Addr;

    async fn ask(server: &DnsServer, name: &str, kind: RecordType) -> Message {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let mut request = Message::query();
        request.add_query(Query::query(absolute(name).unwrap(), kind));
        socket.send_to(&request.to_vec().unwrap(), server.address()).await.unwrap();
        let mut buffer = [0; 4096];
        let length = timeout(TCP_IDLE, socket.recv(&mut buffer)).await.unwrap().unwrap();
        Message::from_vec(&buffer[..length]).unwrap()
    }

    #[tokio::test]
    async fn it_responds_as_coredns_does() {
        let server = DnsServer::start(([127, 0, 0, 1], 0).into()).await.unwrap();
        let [alias, to_service] = ["a.default.svc.cluster.local", "b.default.svc.cluster.local"];
        let service = "c.default.svc.cluster.local";
        server.zone([cname(alias, 5, "httpbin.org."), cname(to_service, 5, service)]);
        server.zone([address("httpbin.org", 60, Ipv4Addr::LOCALHOST)]);
        server.zone([address(service, 5, Ipv4Addr::new(10, 96, 0, 7))]);
        let shape =
            |reply: &Message| (reply.response_code, reply.answers.len(), reply.authorities.len());

        let a = ask(&server, alias, RecordType::A).await;
        assert_eq!(shape(&a), (ResponseCode::NoError, 2, 0));
        assert!(a.authoritative && !a.recursion_available);
        let aaaa = ask(&server, alias, RecordType::AAAA).await;
        assert_eq!(shape(&aaaa), (ResponseCode::NoError, 1, 0), "the CNAME alone");
        let aaaa = ask(&server, to_service, RecordType::AAAA).await;
        assert_eq!(shape(&aaaa), (ResponseCode::NoError, 0, 1), "no CNAME into the cluster");
        let none = ask(&server, "d.default.svc.cluster.local", RecordType::A).await;
        assert_eq!(shape(&none), (ResponseCode::NXDomain, 0, 1));
        server.wait_for_queries(alias, 2).await;
        assert_eq!(server.queries(alias, RecordType::A), 1);
    }

    #[tokio::test]
    async fn what_does_not_fit_into_512_octets_is_truncated() {
        let server = DnsServer::start(([127, 0, 0, 1], 0).into()).await.unwrap();
        server.zone((0..60).map(|last| address("big.example", 5, Ipv4Addr::new(192, 0, 2, last))));
        server.zone([cname("alias.example", 5, "big.example")]);
        let reply = ask(&server, "big.example", RecordType::A).await;
        assert!(reply.truncation && reply.answers.is_empty());
        let reply = ask(&server, "alias.example", RecordType::A).await;
        assert!(reply.truncation && reply.answers.len() == 1, "the CNAME is left");
    }
}
