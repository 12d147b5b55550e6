//! Sends one query to a DNS server and shows the response, as nslookup does.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::Duration,
};

use hickory_proto::{
    ProtoError,
    op::{Message, Query},
    rr::{Name, RData, RecordType},
    serialize::binary::DecodeError,
};
use tokio::{
    net::UdpSocket,
    time::{error::Elapsed, timeout},
};

const DEADLINE: Duration = Duration::from_secs(5);

/// A record of the answer section, in the order of the packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// `owner canonical name = target`.
    Cname {
        /// The alias.
        owner: String,
        /// The target.
        target: String,
    },
    /// `owner` has this address.
    Address {
        /// The owner.
        owner: String,
        /// The address.
        ip: IpAddr,
    },
}

/// Queries `server` for the IPv4 addresses of `name`, without search lists.
pub async fn nslookup(server: SocketAddr, name: &str) -> Result<Vec<Line>, NslookupError> {
    let mut question = Message::query();
    let name = Name::from_ascii(format!("{}.", name.trim_end_matches('.')))?;
    question.add_query(Query::query(name, RecordType::A));

    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    // Connected, so that datagrams from others are ignored.
    socket.connect(server).await?;
    socket.send(&question.to_vec()?).await?;
    let mut buffer = [0; 4096];
    let length = timeout(DEADLINE, socket.recv(&mut buffer)).await??;
    let response = Message::from_vec(&buffer[..length])?;

    let show = |name: &Name| name.to_ascii().trim_end_matches('.').to_owned();
    let lines = response.answers.iter().filter_map(|record| {
        let owner = show(&record.name);
        match &record.data {
            RData::CNAME(target) => Some(Line::Cname { owner, target: show(&target.0) }),
            RData::A(ip) => Some(Line::Address { owner, ip: ip.0.into() }),
            _ => None,
        }
    });
    Ok(lines.collect())
}

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum NslookupError {
    /// The query is invalid.
    #[error("invalid query: {0}")]
    Question(#[from] ProtoError),
    /// A socket error.
    #[error("cannot reach the DNS server: {0}")]
    Socket(#[from] io::Error),
    /// A timeout.
    #[error("the DNS server did not respond within 5 s")]
    Silence(#[from] Elapsed),
    /// The response is not a valid DNS message.
    #[error("cannot parse the DNS server's response: {0}")]
    Response(#[from] DecodeError),
}
