//! What a server may send, byte by byte, over real sockets.

mod servers;

use super::*;
use crate::demo::dns::{self, DnsServer};
use futures_util::future::join_all;
use std::net::Ipv4Addr;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UdpSocket},
};

const NAME: &str = "alias.example";
const IP: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// A pointer to the question's name.
const OWNER: &[u8] = b"\xc0\x0c";
const OTHER: &[u8] = b"\x05other\x07example\0";
const A: u16 = 1;
const NS: u16 = 2;
const CNAME: u16 = 5;
const SOA: u16 = 6;
const DNAME: u16 = 39;
const IN: u16 = 1;
const CHAOS: u16 = 3;
const ANY: u16 = 255;

/// A response in parts. Each row of the table may alter any of them.
#[derive(Clone)]
struct Reply {
    id: Vec<u8>,
    flags: u16,
    questions: Vec<Vec<u8>>,
    sections: [Vec<Vec<u8>>; 3],
    tail: Vec<u8>,
    knows_edns: bool,
}

impl Reply {
    /// NOERROR for this query, without a record.
    fn to(query: &[u8]) -> Reply {
        let name = query[12..].iter().position(|octet| *octet == 0).unwrap();
        Reply {
            id: query[..2].to_vec(),
            flags: 0x8180,
            questions: vec![query[12..12 + name + 5].to_vec()],
            sections: Default::default(),
            tail: Vec::new(),
            knows_edns: u16::from_be_bytes([query[10], query[11]]) > 0,
        }
    }

    fn answer(mut self, owner: &[u8], kind: [u16; 2], ttl: u32, data: &[u8]) -> Reply {
        self.sections[0].push(record(owner, kind, ttl, data));
        self
    }

    fn authority(mut self, kind: u16, data: &[u8]) -> Reply {
        self.sections[1].push(record(b"\0", [kind, IN], 5, data));
        self
    }

    fn additional(mut self, record: Vec<u8>) -> Reply {
        self.sections[2].push(record);
        self
    }

    /// The queried address.
    fn good(self) -> Reply {
        self.answer(OWNER, [A, IN], 60, &IP.octets())
    }

    fn code(mut self, code: u16) -> Reply {
        self.flags |= code;
        self
    }

    fn octets(&self) -> Vec<u8> {
        let mut octets = self.id.clone();
        octets.extend(self.flags.to_be_bytes());
        for count in
            [self.questions.len()].into_iter().chain(self.sections.each_ref().map(Vec::len))
        {
            octets.extend((count as u16).to_be_bytes());
        }
        octets.extend(self.questions.concat());
        octets.extend(self.sections.concat().concat());
        octets.extend(&self.tail);
        octets
    }
}

fn record(owner: &[u8], [kind, class]: [u16; 2], ttl: u32, data: &[u8]) -> Vec<u8> {
    let mut octets = owner.to_vec();
    octets.extend(kind.to_be_bytes());
    octets.extend(class.to_be_bytes());
    octets.extend(ttl.to_be_bytes());
    octets.extend((data.len() as u16).to_be_bytes());
    octets.extend(data);
    octets
}

type Script = fn(Reply) -> Vec<Vec<u8>>;

/// The name of the case, what is sent over UDP and over TCP, and what the error says.
type TcpRow = (&'static str, Script, Option<Script>, Result<(), &'static str>);

/// Sends the datagrams of `udp` for each query. Over TCP, writes what `tcp` returns as it is, including its length.
/// Without `tcp`, nothing listens there.
async fn serve(
    udp: impl Fn(Reply) -> Vec<Vec<u8>> + Send + 'static,
    tcp: Option<Script>,
) -> SocketAddr {
    let (socket, listener) = loop {
        let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        if let Ok(listener) = TcpListener::bind(socket.local_addr().unwrap()).await {
            break (socket, listener);
        }
    };
    let address = socket.local_addr().unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        loop {
            let (length, peer) = socket.recv_from(&mut buffer).await.unwrap();
            for datagram in udp(Reply::to(&buffer[..length])) {
                let _ = socket.send_to(&datagram, peer).await;
            }
        }
    });
    if let Some(tcp) = tcp {
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut query = vec![0; usize::from(stream.read_u16().await.unwrap())];
                stream.read_exact(&mut query).await.unwrap();
                let pieces = tcp(Reply::to(&query));
                let silent = pieces.is_empty();
                for piece in pieces {
                    stream.write_all(&piece).await.unwrap();
                }
                if silent {
                    // Held open without a response.
                    tokio::spawn(async move { stream.read_u8().await });
                }
            }
        });
    }
    address
}

fn framed(reply: &Reply) -> Vec<Vec<u8>> {
    let octets = reply.octets();
    vec![(octets.len() as u16).to_be_bytes().to_vec(), octets]
}

fn truncated(mut reply: Reply) -> Vec<Vec<u8>> {
    reply.flags |= 0x200;
    vec![reply.octets()]
}

async fn walk(server: SocketAddr, family: Family) -> Result<Chain, String> {
    let chain = DnsClient::new(&[server]).walk(NAME, Place::Alias, family).await;
    chain.map_err(|error| error.what().replace(&server.to_string(), "SERVER"))
}

#[tokio::test]
async fn every_odd_response_works_or_is_explained() {
    let rows: [(&str, Script, Result<&str, &str>); 35] = [
        ("a good one", |r| vec![r.good().octets()], Ok("192.0.2.1")),
        (
            "an address that blocks",
            |r| vec![r.answer(OWNER, [A, IN], 60, &[0; 4]).octets()],
            Ok("0.0.0.0"),
        ),
        (
            "a CNAME beside an address",
            |r| {
                let cname = r.answer(OWNER, [CNAME, IN], 60, OTHER);
                let both = cname.answer(OWNER, [A, IN], 60, &[192, 0, 2, 9]);
                vec![both.answer(OTHER, [A, IN], 60, &IP.octets()).octets()]
            },
            Ok("192.0.2.1"),
        ),
        (
            "a DNAME with its CNAME",
            |r| {
                let dname = r.answer(b"\x07example\0", [DNAME, IN], 60, b"\x03org\0");
                let cname = dname.answer(OWNER, [CNAME, IN], 60, OTHER);
                vec![cname.answer(OTHER, [A, IN], 60, &IP.octets()).octets()]
            },
            Ok("192.0.2.1"),
        ),
        (
            "garbage behind it",
            |mut r| {
                r.tail = vec![0xff; 40];
                vec![r.good().octets()]
            },
            Ok("192.0.2.1"),
        ),
        (
            "the question in other case",
            |mut r| {
                r.questions[0].make_ascii_uppercase();
                vec![r.good().octets()]
            },
            Ok("192.0.2.1"),
        ),
        (
            "a stranger's before it",
            |r| {
                let mut stranger = r.clone().answer(OWNER, [A, IN], 60, &[192, 0, 2, 66]);
                stranger.id[0] ^= 1;
                vec![stranger.octets(), Vec::new(), r.good().octets()]
            },
            Ok("192.0.2.1"),
        ),
        (
            "a server that knows no EDNS",
            |r| match r.knows_edns {
                true => vec![r.code(1).octets()],
                false => vec![r.good().octets()],
            },
            Ok("192.0.2.1"),
        ),
        (
            "a server, or a firewall before it, that drops EDNS",
            |r| match r.knows_edns {
                true => Vec::new(),
                false => vec![r.good().octets()],
            },
            Ok("192.0.2.1"),
        ),
        (
            "an address of another name",
            |r| vec![r.answer(OTHER, [A, IN], 60, &IP.octets()).octets()],
            Err(
                "cannot be used: it is about other.example and other names, not about the queried name",
            ),
        ),
        (
            "another class",
            |r| vec![r.answer(OWNER, [A, CHAOS], 60, &IP.octets()).octets()],
            Err("it has no address and no CNAME, but CH A"),
        ),
        (
            "the class ANY",
            |r| vec![r.answer(OWNER, [A, ANY], 60, &IP.octets()).octets()],
            Err("it has no address and no CNAME, but ANY A"),
        ),
        (
            "a DNAME alone",
            |r| vec![r.answer(b"\x07example\0", [DNAME, IN], 60, b"\x03org\0").octets()],
            Err("no CNAME, but IN DNAME"),
        ),
        (
            "another question",
            |mut r| {
                r.questions[0] = [OTHER, &[0, 1, 0, 1]].concat();
                vec![r.good().octets()]
            },
            Err("it is about another question (other.example. IN A)"),
        ),
        (
            "another type",
            |mut r| {
                let at = r.questions[0].len() - 3;
                r.questions[0][at] = 28;
                vec![r.good().octets()]
            },
            Err("it is about another question (alias.example. IN AAAA)"),
        ),
        (
            "no question",
            |mut r| {
                r.questions.clear();
                vec![r.octets()]
            },
            Err("it does not repeat the question"),
        ),
        (
            "two questions",
            |mut r| {
                r.questions.push(r.questions[0].clone());
                vec![r.good().octets()]
            },
            Err("it has more than one question"),
        ),
        (
            "another id only",
            |mut r| {
                r.id[1] ^= 1;
                vec![r.good().octets()]
            },
            Err("it does not have the id of the query"),
        ),
        (
            "the query itself",
            |mut r| {
                r.flags = 0x0100;
                vec![r.octets()]
            },
            Err("it is a query, not a response"),
        ),
        (
            "another operation",
            |mut r| {
                r.flags |= 4 << 11;
                vec![r.octets()]
            },
            Err("it is a response to another operation (4)"),
        ),
        (
            "less than a header",
            |r| vec![r.octets()[..9].to_vec()],
            Err("it is shorter than the header of a DNS message"),
        ),
        (
            "an address of three octets",
            |r| vec![r.answer(OWNER, [A, IN], 60, &[1, 2, 3]).octets()],
            Err("cannot be used: "),
        ),
        (
            "a label of more than 63",
            |r| {
                vec![
                    r.answer(&[&[0x41][..], &[b'a'; 65], &[0]].concat(), [A, IN], 60, &IP.octets())
                        .octets(),
                ]
            },
            Err("cannot be used: "),
        ),
        (
            "a name that points at itself",
            |r| {
                let here = (12 + r.questions[0].len()) as u8;
                vec![r.answer(&[0xc0, here], [A, IN], 60, &IP.octets()).octets()]
            },
            Err("cannot be used: "),
        ),
        (
            "counts that lie",
            |r| {
                let mut octets = r.good().octets();
                octets[6] = 0x10;
                vec![octets]
            },
            Err("cannot be used: "),
        ),
        ("nothing", |r| vec![r.octets()], Err("SERVER has no address for alias.example (NODATA)")),
        ("nothing, with its SOA", |r| vec![r.authority(SOA, &[0; 22]).octets()], Err("(NODATA)")),
        (
            "a referral",
            |r| vec![r.authority(NS, OTHER).octets()],
            Err("it refers to other servers: this one does not resolve names"),
        ),
        (
            "REFUSED",
            |r| vec![r.code(5).octets()],
            Err("SERVER refused to resolve alias.example (REFUSED)"),
        ),
        ("FORMERR", |r| vec![r.code(1).octets()], Err("could not resolve alias.example (FORMERR)")),
        (
            "NOTIMP without the question",
            |mut r| {
                r.questions.clear();
                vec![r.code(4).octets()]
            },
            Err("could not resolve alias.example (NOTIMP)"),
        ),
        (
            "YXDOMAIN",
            |r| vec![r.code(6).octets()],
            Err("could not resolve alias.example (YXDOMAIN)"),
        ),
        (
            "BADVERS",
            |r| vec![r.additional(record(b"\0", [41, 1232], 0x0100_0000, b"")).octets()],
            Err("could not resolve alias.example (BADVERS)"),
        ),
        (
            "an unknown code",
            |r| vec![r.code(13).octets()],
            Err("could not resolve alias.example (RCODE 13)"),
        ),
        (
            "NXDOMAIN and an address of another name",
            |r| vec![r.code(3).answer(OTHER, [A, IN], 60, &IP.octets()).octets()],
            Err("does not exist (NXDOMAIN)"),
        ),
    ];
    let outcomes = rows.iter().map(|(what, script, expected)| async move {
        let walked = walk(serve(*script, None).await, Family::V4).await;
        match (walked, expected) {
            (Ok(chain), Ok(ip)) => {
                assert_eq!(chain.addresses(), [ip.parse::<IpAddr>().unwrap()], "{what}")
            }
            (Err(error), Err(words)) => assert!(error.contains(words), "{what}: {error}"),
            (other, _) => panic!("{what}: {other:?}"),
        }
    });
    join_all(outcomes).await;
}

#[tokio::test]
async fn a_ttl_with_its_highest_bit_set_is_none() {
    for (ttl, expected) in [(0x7fff_ffff, 0x7fff_ffff), (0x8000_0000, 0), (u32::MAX, 0)] {
        let script = move |r: Reply| vec![r.answer(OWNER, [A, IN], ttl, &IP.octets()).octets()];
        assert_eq!(walk(serve(script, None).await, Family::V4).await.unwrap().ttl(), expected);
    }
}

#[tokio::test]
async fn what_does_not_fit_into_a_datagram_comes_over_tcp_or_is_explained() {
    let cut: Script = |r| {
        let mut octets = truncated(r.good()).remove(0);
        octets.truncate(octets.len() - 3);
        vec![octets]
    };
    let flood: Script = |mut r| {
        r.id[0] ^= 1;
        vec![r.octets(); 80]
    };
    let long: Script = |r| vec![(0..300).fold(r, |r, _| r.good()).octets()];
    let rows: [TcpRow; 11] = [
        ("more than the advertised payload size", long, Some(|r| framed(&r.good())), Ok(())),
        ("over TCP", truncated, Some(|r| framed(&r.good())), Ok(())),
        ("a record cut through", cut, Some(|r| framed(&r.good())), Ok(())),
        ("a flood of other ids", flood, Some(|r| framed(&r.good())), Ok(())),
        (
            "TCP refused",
            truncated,
            None,
            Err(
                "the response of SERVER for alias.example does not fit into a datagram, and over TCP it refused the connection",
            ),
        ),
        (
            "a flood, and TCP refused",
            flood,
            None,
            Err("too many datagrams that are not a response"),
        ),
        (
            "no response over TCP",
            truncated,
            Some(|_| Vec::new()),
            Err("and over TCP it did not respond in time"),
        ),
        (
            "closed at once",
            truncated,
            Some(|_| vec![Vec::new()]),
            Err("it closed the connection before its response"),
        ),
        (
            "a length that lies",
            truncated,
            Some(|r| {
                let mut pieces = framed(&r.good());
                pieces[0] = vec![0xff, 0xff];
                pieces
            }),
            Err("it closed the connection before its response was complete"),
        ),
        (
            "a length of nothing",
            truncated,
            Some(|_| vec![vec![0, 0]]),
            Err("over TCP its response cannot be used"),
        ),
        (
            "another id over TCP",
            truncated,
            Some(|mut r| {
                r.id[0] ^= 1;
                framed(&r.good())
            }),
            Err("over TCP its response cannot be used: it does not have the id of the query"),
        ),
    ];
    let outcomes = rows.iter().map(|(what, udp, tcp, expected)| async move {
        let walked = walk(serve(*udp, *tcp).await, Family::V4).await;
        match (walked, expected) {
            (Ok(chain), Ok(())) => assert_eq!(chain.addresses(), [IpAddr::V4(IP)], "{what}"),
            (Err(error), Err(words)) => assert!(error.contains(words), "{what}: {error}"),
            (other, _) => panic!("{what}: {other:?}"),
        }
    });
    join_all(outcomes).await;
}
