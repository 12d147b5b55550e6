//! The header of the PROXY protocol, versions 1 and 2: bytes to addresses, and back. Pure.
//!
//! As in HAProxy's specification (`doc/proxy-protocol.txt`). Of the extensions of version 2, only the checksum is
//! looked at.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::config::ProxyVersion;

/// The first bytes of version 2.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";

/// The first bytes of version 1.
const PROXY: &[u8] = b"PROXY ";

/// The longest header of version 1, with its end.
const LONGEST_V1: usize = 107;

/// The longest header of version 2. It may have 64 KiB, and real ones have less than one.
const LONGEST_V2: usize = 16 * 1024;

/// What comes before the addresses in version 2.
const FIXED: usize = 16;

/// The extension with the checksum.
const CRC32C: u8 = 3;

/// The two ends of a client's connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// Where the client connected from.
    pub source: SocketAddr,
    /// Where it connected to.
    pub destination: SocketAddr,
}

/// A whole header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// How many bytes it has.
    pub length: usize,
    /// The client's connection; none where the sender speaks for itself, as in a health check, or does not know.
    pub addresses: Option<Addresses>,
}

/// Bytes that are not a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct HeaderError(&'static str);

/// The header that `bytes` begin with; `None` while more of them are needed.
pub fn parse(bytes: &[u8]) -> Result<Option<Header>, HeaderError> {
    let begins = |with: &[u8]| bytes.iter().zip(with).all(|(one, other)| one == other);
    if begins(SIGNATURE) {
        parse_v2(bytes)
    } else if begins(PROXY) {
        parse_v1(bytes)
    } else {
        Err(HeaderError("the connection does not begin with a PROXY protocol header"))
    }
}

/// The header that describes a client's connection, or one that speaks for the sender itself.
pub fn encode(version: ProxyVersion, addresses: Option<&Addresses>) -> Vec<u8> {
    match version {
        ProxyVersion::V1 => encode_v1(addresses),
        ProxyVersion::V2 => encode_v2(addresses),
    }
}

fn parse_v1(bytes: &[u8]) -> Result<Option<Header>, HeaderError> {
    let possible = &bytes[..bytes.len().min(LONGEST_V1)];
    let Some(end) = possible.windows(2).position(|two| two == b"\r\n") else {
        return match bytes.len() < LONGEST_V1 {
            true => Ok(None),
            false => Err(HeaderError("a version 1 header has more than 107 bytes")),
        };
    };
    let header = |addresses| Ok(Some(Header { length: end + 2, addresses }));
    let line = bytes.get(PROXY.len()..end).unwrap_or_default();
    let line =
        std::str::from_utf8(line).map_err(|_| HeaderError("a version 1 header is not text"))?;
    let fields: Vec<&str> = line.split(' ').collect();
    match fields[..] {
        // Whatever follows is to be ignored.
        ["UNKNOWN", ..] => header(None),
        ["TCP4", source, destination, from, to] => {
            let address = |text: &str| text.parse::<Ipv4Addr>().map(IpAddr::V4);
            header(Some(v1_addresses([source, destination], address, [from, to])?))
        }
        ["TCP6", source, destination, from, to] => {
            let address = |text: &str| text.parse::<Ipv6Addr>().map(IpAddr::V6);
            header(Some(v1_addresses([source, destination], address, [from, to])?))
        }
        _ => Err(HeaderError(
            "a version 1 header is neither UNKNOWN, nor TCP4 or TCP6 with two addresses and two ports",
        )),
    }
}

fn v1_addresses<E>(
    addresses: [&str; 2],
    parse: impl Fn(&str) -> Result<IpAddr, E>,
    ports: [&str; 2],
) -> Result<Addresses, HeaderError> {
    let ip =
        |text| parse(text).map_err(|_| HeaderError("a version 1 header has an invalid address"));
    let port = |text: &str| {
        // `parse` would take a sign.
        let is_number = text.len() <= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        let port = is_number.then(|| text.parse().ok()).flatten();
        port.ok_or(HeaderError("a version 1 header has an invalid port"))
    };
    Ok(Addresses {
        source: address(ip(addresses[0])?, port(ports[0])?),
        destination: address(ip(addresses[1])?, port(ports[1])?),
    })
}

fn parse_v2(bytes: &[u8]) -> Result<Option<Header>, HeaderError> {
    let Some(&[command, family, high, low]) = bytes.get(SIGNATURE.len()..FIXED) else {
        return Ok(None);
    };
    let is_local = match command {
        0x20 => true,
        0x21 => false,
        _ if command >> 4 != 2 => return Err(HeaderError("the header is of an unknown version")),
        _ => return Err(HeaderError("a version 2 header has an unknown command")),
    };
    // The sender is to be accepted whatever family it names for itself.
    if !is_local && (family >> 4 > 3 || family & 15 > 2) {
        return Err(HeaderError("a version 2 header has an unknown address family or protocol"));
    }
    let length = FIXED + usize::from(u16::from_be_bytes([high, low]));
    if length > LONGEST_V2 {
        return Err(HeaderError("a version 2 header has more than 16 KiB"));
    }
    let Some(whole) = bytes.get(..length) else { return Ok(None) };
    let header = |addresses| Ok(Some(Header { length, addresses }));
    // Without addresses, nothing else in the header has a meaning.
    if is_local || family >> 4 == 0 {
        return header(None);
    }
    let size = [0, 12, 36, 216][usize::from(family >> 4)];
    let Some((block, _)) = whole[FIXED..].split_at_checked(size) else {
        return Err(HeaderError("a version 2 header is shorter than its addresses"));
    };
    check_extensions(whole, FIXED + size)?;
    header(match (family, block) {
        (0x11, &[a, b, c, d, e, f, g, h, ref ports @ ..]) => {
            v2_addresses([[a, b, c, d].into(), [e, f, g, h].into()], ports)
        }
        (0x21, block) => block.split_at_checked(32).and_then(|(ips, ports)| {
            let ip = |octets: &[u8]| Some(IpAddr::from(<[u8; 16]>::try_from(octets).ok()?));
            v2_addresses([ip(&ips[..16])?, ip(&ips[16..])?], ports)
        }),
        // Unix sockets and UDP: the addresses are not those of a TCP connection.
        _ => None,
    })
}

fn v2_addresses([source, destination]: [IpAddr; 2], ports: &[u8]) -> Option<Addresses> {
    let &[a, b, c, d] = ports else { return None };
    Some(Addresses {
        source: address(source, u16::from_be_bytes([a, b])),
        destination: address(destination, u16::from_be_bytes([c, d])),
    })
}

/// The extensions are complete, and a checksum among them is right.
fn check_extensions(header: &[u8], mut at: usize) -> Result<(), HeaderError> {
    while at < header.len() {
        let cut = HeaderError("a version 2 header ends within an extension");
        let Some(&[kind, high, low]) = header.get(at..at + 3) else { return Err(cut) };
        let value = at + 3..at + 3 + usize::from(u16::from_be_bytes([high, low]));
        let Some(bytes) = header.get(value.clone()) else { return Err(cut) };
        if kind == CRC32C {
            let parts = [&header[..value.start], &[0; 4], &header[value.end..]];
            let sum = crc32c(parts.into_iter().flatten().copied());
            if bytes != sum.to_be_bytes() {
                return Err(HeaderError("the checksum of a version 2 header is wrong"));
            }
        }
        at = value.end;
    }
    Ok(())
}

/// RFC 3720, appendix B.4.
fn crc32c(bytes: impl Iterator<Item = u8>) -> u32 {
    !bytes.fold(!0, |sum, byte| {
        (0..8).fold(sum ^ u32::from(byte), |sum: u32, _| {
            sum >> 1 ^ if sum & 1 == 1 { 0x82f6_3b78 } else { 0 }
        })
    })
}

/// An IPv4 address is one in any notation.
fn address(ip: IpAddr, port: u16) -> SocketAddr {
    SocketAddr::new(ip.to_canonical(), port)
}

/// The addresses of a header, which are of one family.
enum Ips {
    V4([Ipv4Addr; 2]),
    V6([Ipv6Addr; 2]),
}

impl Ips {
    fn of(addresses: &Addresses) -> Self {
        let ips =
            [addresses.source, addresses.destination].map(|address| address.ip().to_canonical());
        match ips {
            [IpAddr::V4(source), IpAddr::V4(destination)] => Self::V4([source, destination]),
            ips => Self::V6(ips.map(|ip| match ip {
                IpAddr::V4(v4) => v4.to_ipv6_mapped(),
                IpAddr::V6(v6) => v6,
            })),
        }
    }
}

fn encode_v1(addresses: Option<&Addresses>) -> Vec<u8> {
    let Some(addresses) = addresses else { return b"PROXY UNKNOWN\r\n".to_vec() };
    let ips = match Ips::of(addresses) {
        Ips::V4([source, destination]) => format!("TCP4 {source} {destination}"),
        Ips::V6([source, destination]) => format!("TCP6 {source} {destination}"),
    };
    let (from, to) = (addresses.source.port(), addresses.destination.port());
    format!("PROXY {ips} {from} {to}\r\n").into_bytes()
}

fn encode_v2(addresses: Option<&Addresses>) -> Vec<u8> {
    let mut header = SIGNATURE.to_vec();
    let Some(addresses) = addresses else {
        header.extend([0x20, 0, 0, 0]);
        return header;
    };
    match Ips::of(addresses) {
        Ips::V4(ips) => {
            header.extend([0x21, 0x11, 0, 12]);
            header.extend(ips.into_iter().flat_map(|ip| ip.octets()));
        }
        Ips::V6(ips) => {
            header.extend([0x21, 0x21, 0, 36]);
            header.extend(ips.into_iter().flat_map(|ip| ip.octets()));
        }
    }
    header.extend(addresses.source.port().to_be_bytes());
    header.extend(addresses.destination.port().to_be_bytes());
    header
}

#[cfg(test)]
mod tests;
