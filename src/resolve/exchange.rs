//! One query to one server: over UDP, and over TCP if the response does not fit into a datagram.
//!
//! hickory provides the message format. The sockets are our own: a connected UDP socket reports at once that no server
//! listens, and takes no datagrams from other hosts. Each query uses a new socket, so that its port is as hard to guess
//! as its id.

use super::error::{Failure, WhyTcp};
use hickory_proto::op::{Edns, Message, Query, ResponseCode};
use nix::errno::Errno;
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UdpSocket},
    time::{Instant, timeout_at},
};

/// Datagrams get lost: the query is sent again after this long, then after twice as long, and so on.
const FIRST_RESEND: Duration = Duration::from_millis(350);
/// The advertised UDP payload size (DNS Flag Day 2020): such datagrams are not fragmented on the way.
const MAX_PAYLOAD: u16 = 1232;
/// The size that we accept: some servers exceed the advertised one.
const BUFFER: usize = 4096;
/// This many datagrams that are not a response to the query are an attempt to guess its id.
const MAX_UNRELATED: usize = 64;
const HEADER: usize = 12;

/// Sends the query. Any response code may be returned, but only of a response to this query. `server_timeout` applies
/// to UDP and to TCP separately; `deadline` applies to both together.
pub(super) async fn exchange(
    server: SocketAddr,
    query: &Query,
    server_timeout: Duration,
    deadline: Instant,
) -> Result<Message, Failure> {
    let until = || deadline.min(Instant::now() + server_timeout);
    let mut asked = Asked::new(query, true)?;
    loop {
        let message = match asked.over_udp(server, until()).await? {
            Heard::Message(message) => message,
            Heard::AskOverTcp(why) => {
                let heard = timeout_at(until(), asked.over_tcp(server)).await;
                heard
                    .unwrap_or(Err(Failure::Timeout))
                    .map_err(|failure| Failure::Tcp(why, Box::new(failure)))?
            }
        };
        let ignorant = matches!(
            message.response_code,
            // hickory takes BADVERS for BADSIG, which has the same number.
            ResponseCode::FormErr | ResponseCode::NotImp | ResponseCode::BADSIG
        );
        // RFC 6891 §7: a server that does not know EDNS.
        if !ignorant || !asked.edns {
            return Ok(message);
        }
        asked = Asked::new(query, false)?;
    }
}

enum Heard {
    Message(Message),
    AskOverTcp(WhyTcp),
}

/// A query as it is sent.
struct Asked<'a> {
    query: &'a Query,
    id: u16,
    edns: bool,
    octets: Vec<u8>,
    /// The same without EDNS.
    plain: Vec<u8>,
}

impl<'a> Asked<'a> {
    fn new(query: &'a Query, edns: bool) -> Result<Asked<'a>, Failure> {
        // With a random id.
        let mut message = Message::query();
        message.metadata.recursion_desired = true;
        message.add_query(query.clone());
        let encoded =
            |message: &Message| message.to_vec().map_err(|e| Failure::Unaskable(e.to_string()));
        let plain = encoded(&message)?;
        if edns {
            let mut edns = Edns::new();
            edns.set_max_payload(MAX_PAYLOAD);
            message.set_edns(edns);
        }
        let octets = encoded(&message)?;
        Ok(Asked { query, id: message.metadata.id, edns, octets, plain })
    }

    async fn over_udp(&self, server: SocketAddr, until: Instant) -> Result<Heard, Failure> {
        let socket = connected(server).await.map_err(|error| failure(server, &error))?;
        let mut buffer = vec![0; BUFFER];
        let mut unrelated = 0;
        let mut now = Instant::now();
        // Even if many servers share the time, there is a second try.
        let first = FIRST_RESEND.min(until.saturating_duration_since(now) / 2);
        let mut pause = first;
        while now < until {
            // One more would have too little time.
            let is_last = now + pause + first > until;
            // Some firewalls drop EDNS: two tries with it are enough, and the last one is without.
            let is_plain = pause > 2 * first || is_last && pause > first;
            let octets = if is_plain { &self.plain } else { &self.octets };
            socket.send(octets).await.map_err(|error| failure(server, &error))?;
            let resend = if is_last { until } else { now + pause };
            pause *= 2;
            while let Ok(received) = timeout_at(resend, socket.recv(&mut buffer)).await {
                let length = received.map_err(|error| failure(server, &error))?;
                match self.judge(&buffer[..length]) {
                    Judged::Response(message) if message.truncation => {
                        return Ok(Heard::AskOverTcp(WhyTcp::Truncated));
                    }
                    Judged::Response(message) => return Ok(Heard::Message(*message)),
                    Judged::Cut => return Ok(Heard::AskOverTcp(WhyTcp::Truncated)),
                    // It may have been longer.
                    Judged::Unusable(_) if length == BUFFER => {
                        return Ok(Heard::AskOverTcp(WhyTcp::Truncated));
                    }
                    Judged::Unusable(reason) => return Err(Failure::Malformed(reason)),
                    Judged::Unrelated => unrelated += 1,
                }
                if unrelated == MAX_UNRELATED {
                    return Ok(Heard::AskOverTcp(WhyTcp::Unrelated));
                }
            }
            now = resend;
        }
        Err(match unrelated {
            0 => Failure::Timeout,
            _ => Failure::Malformed("it does not have the id of the query".to_owned()),
        })
    }

    async fn over_tcp(&self, server: SocketAddr) -> Result<Message, Failure> {
        let failed = |error: io::Error| failure(server, &error);
        let mut stream = TcpStream::connect(server).await.map_err(failed)?;
        let length = u16::try_from(self.octets.len())
            .map_err(|_| Failure::Unaskable("the query is too long".to_owned()))?;
        let framed = [&length.to_be_bytes()[..], &self.octets].concat();
        stream.write_all(&framed).await.map_err(failed)?;
        let length = stream.read_u16().await.map_err(failed)?;
        let mut octets = vec![0; usize::from(length)];
        stream.read_exact(&mut octets).await.map_err(failed)?;
        match self.judge(&octets) {
            Judged::Response(message) => Ok(*message),
            Judged::Unusable(reason) => Err(Failure::Malformed(reason)),
            Judged::Cut => Err(Failure::Malformed("it is truncated over TCP too".to_owned())),
            Judged::Unrelated => {
                Err(Failure::Malformed("it does not have the id of the query".to_owned()))
            }
        }
    }

    /// Checks what arrived. Its header is checked before anything else.
    fn judge(&self, octets: &[u8]) -> Judged {
        let unusable = |reason: &str| Judged::Unusable(reason.to_owned());
        let Some((&[i, d, high, low, q, u], _)) = octets.split_first_chunk::<6>() else {
            return Judged::Unrelated;
        };
        if u16::from_be_bytes([i, d]) != self.id {
            return Judged::Unrelated;
        }
        if octets.len() < HEADER {
            return unusable("it is shorter than the header of a DNS message");
        }
        let (is_response, opcode, is_truncated) =
            (high & 0x80 != 0, high >> 3 & 0xf, high & 2 != 0);
        if !is_response {
            return unusable("it is a query, not a response");
        }
        if opcode != 0 {
            return Judged::Unusable(format!("it is a response to another operation ({opcode})"));
        }
        let questions = u16::from_be_bytes([q, u]);
        if questions > 1 {
            return unusable("it has more than one question");
        }
        let message = match Message::from_vec(octets) {
            Ok(message) => message,
            // It may be truncated within a record.
            Err(_) if is_truncated => return Judged::Cut,
            Err(error) => return Judged::Unusable(error.to_string()),
        };
        // Servers that could not read the query cannot repeat the question.
        let denies = !matches!(
            ResponseCode::from(0, low & 0xf),
            ResponseCode::NoError | ResponseCode::NXDomain
        );
        match message.queries.first() {
            Some(repeated) if !same(repeated, self.query) => Judged::Unusable(format!(
                "it is about another question ({} {} {})",
                repeated.name(),
                repeated.query_class(),
                repeated.query_type()
            )),
            None if !denies => unusable("it does not repeat the question"),
            _ => Judged::Response(Box::new(message)),
        }
    }
}

enum Judged {
    /// A response to this query.
    Response(Box<Message>),
    /// The same, but truncated.
    Cut,
    /// It has the query's id, but is not a response to it.
    Unusable(String),
    /// Not for this query: it is late, or an attempt to guess the id.
    Unrelated,
}

fn same(one: &Query, other: &Query) -> bool {
    // Names are compared without regard to case.
    one.name() == other.name()
        && one.query_type() == other.query_type()
        && one.query_class() == other.query_class()
}

async fn connected(server: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    Ok(socket)
}

fn failure(server: SocketAddr, error: &io::Error) -> Failure {
    let without_scope =
        |v6: std::net::SocketAddrV6| v6.ip().is_unicast_link_local() && v6.scope_id() == 0;
    let exhausted = [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM, Errno::ENOBUFS];
    let errno = error.raw_os_error().map(Errno::from_raw);
    match (error.kind(), server) {
        _ if errno.is_some_and(|errno| exhausted.contains(&errno)) => {
            Failure::Exhausted(error.to_string())
        }
        (io::ErrorKind::ConnectionRefused, _) => Failure::ConnectionRefused,
        (io::ErrorKind::TimedOut, _) => Failure::Timeout,
        (io::ErrorKind::UnexpectedEof, _) => {
            Failure::Io("it closed the connection before its response was complete".to_owned())
        }
        (io::ErrorKind::InvalidInput, SocketAddr::V6(v6)) if without_scope(v6) => Failure::Io(
            "a link-local address needs an interface of this machine, as in fe80::1%eth0 \
             (in `dns.servers`: \"[fe80::1%eth0]\")"
                .to_owned(),
        ),
        _ => Failure::Io(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use hickory_proto::rr::{Name, RecordType};
    use proptest::prelude::*;

    proptest! {
        /// A panic ends the process.
        #[test]
        fn no_octets_make_the_reader_panic(
            flags in 0x8000_u16..=0x87ff,
            counts in prop::collection::vec(0_u16..3, 4),
            tail in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let query = Query::query(Name::from_ascii("alias.example.").unwrap(), RecordType::A);
            let asked = Asked::new(&query, true).unwrap();
            let mut octets = [asked.id.to_be_bytes(), flags.to_be_bytes()].concat();
            octets.extend(counts.iter().flat_map(|count| count.to_be_bytes()));
            // A question, followed by what looks like a record of this name.
            octets.extend(&asked.plain[12..]);
            octets.extend([0xc0, 12, 0]);
            octets.extend(tail);
            for end in 0..octets.len() {
                let _ = asked.judge(&octets[..end]);
            }
        }
    }
}
