//! The IPv4 addresses that an IPv6 address carries.

use std::net::{IpAddr, Ipv4Addr};

/// The IPv4 addresses that packets to `address` may reach: none for most, more than one where the
/// form leaves open which octets are meant.
///
/// A network-specific NAT64 prefix cannot be told from any other prefix.
pub(super) fn embedded_ipv4(address: IpAddr) -> impl Iterator<Item = IpAddr> {
    let found = match address {
        IpAddr::V4(_) => Vec::new(),
        IpAddr::V6(v6) => carried(v6.octets(), v6.segments()),
    };
    found.into_iter().map(IpAddr::V4)
}

fn carried(octets: [u8; 16], segments: [u16; 8]) -> Vec<Ipv4Addr> {
    let at = |[a, b, c, d]: [usize; 4]| Ipv4Addr::from([a, b, c, d].map(|index| octets[index]));
    let last = at([12, 13, 14, 15]);
    match segments {
        // IPv4-mapped (RFC 4291 §2.5.5.2), IPv4-translated (RFC 2765 §2.1).
        [0, 0, 0, 0, 0, 0xffff, _, _] | [0, 0, 0, 0, 0xffff, 0, _, _] => vec![last],
        // IPv4-compatible (RFC 4291 §2.5.5.1), which :: and ::1 are not.
        [0, 0, 0, 0, 0, 0, high, low] if high != 0 || low > 1 => vec![last],
        // NAT64's well-known prefix (RFC 6052 §2.1).
        [0x64, 0xff9b, 0, 0, 0, 0, _, _] => vec![last],
        [0x64, 0xff9b, 1, ..] => local_nat64(octets),
        // 6to4 (RFC 3056 §2).
        [0x2002, ..] => vec![at([2, 3, 4, 5])],
        // Teredo (RFC 4380 §4): the client, with its bits inverted, behind its server.
        [0x2001, 0, ..] => vec![Ipv4Addr::from(!u32::from(last)), at([4, 5, 6, 7])],
        // ISATAP (RFC 5214 §6.1), under any prefix.
        [_, _, _, _, 0 | 0x200, 0x5efe, _, _] => vec![last],
        _ => Vec::new(),
    }
}

/// NAT64's local prefix, `64:ff9b:1::/48` (RFC 8215): networks choose a prefix within it, and its
/// length decides where the IPv4 address is (RFC 6052 §2.2). What stands behind it is zero.
fn local_nat64(octets: [u8; 16]) -> Vec<Ipv4Addr> {
    let at = |[a, b, c, d]: [usize; 4]| Ipv4Addr::from([a, b, c, d].map(|index| octets[index]));
    let zero_from = |first: usize| octets[first..].iter().all(|octet| *octet == 0);
    if !zero_from(12) || zero_from(6) {
        // A prefix of 96 bits; or a shorter one, whose last octets these are.
        let mut found = vec![at([12, 13, 14, 15])];
        if zero_from(13) && !zero_from(12) {
            found.push(at([9, 10, 11, 12]));
        }
        return found;
    }
    let mut found = vec![at([9, 10, 11, 12]), at([7, 9, 10, 11])];
    if zero_from(11) {
        found.push(at([6, 7, 9, 10]));
    }
    // Where another reading is meant, the octets of this one may well begin with zeros.
    found.retain(|ip| ip.octets()[0] != 0);
    found
}
