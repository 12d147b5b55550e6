//! Which addresses may be dialled, asked at the last moment before the dial.
//!
//! A name can change its address between any earlier check and the connection (DNS rebinding),
//! so nothing but the address in hand counts.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use ipnet::IpNet;

use crate::config::{self, AddressClass};

/// Instance metadata services: AWS, Azure, GCP and others; AWS over IPv6; Alibaba; Oracle.
const METADATA: [IpAddr; 4] = [
    IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)),
    IpAddr::V6(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254)),
    IpAddr::V4(Ipv4Addr::new(100, 100, 100, 200)),
    IpAddr::V4(Ipv4Addr::new(192, 0, 0, 192)),
];

/// Why an address is not dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The address is of a class in `policy.deny_addresses`.
    #[error("{} is {}, which `policy.deny_addresses` refuses", .endpoint.ip(), describe(*class))]
    Class {
        /// The address as DNS or the target gave it, with the port.
        endpoint: SocketAddr,
        /// The class it falls into.
        class: AddressClass,
    },
    /// The address is one that this proxy listens on: dialling it would be a loop.
    #[error("{0} is a listener of this very proxy")]
    OwnListener(SocketAddr),
}

impl Denied {
    /// What was to be dialled.
    pub fn endpoint(&self) -> SocketAddr {
        match self {
            Self::Class { endpoint, .. } | Self::OwnListener(endpoint) => *endpoint,
        }
    }
}

/// The rules of `policy`, with this proxy's own listeners.
#[derive(Debug, Default)]
pub struct AddressPolicy {
    deny: Vec<AddressClass>,
    allow: Vec<IpNet>,
    listeners: HashSet<SocketAddr>,
}

impl AddressPolicy {
    /// The rules of `policy`; `listeners` are the addresses that this proxy is bound to.
    pub fn new(policy: &config::Policy, listeners: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self {
            deny: policy.deny_addresses.clone(),
            allow: policy.allow_addresses.clone(),
            listeners: listeners.into_iter().collect(),
        }
    }

    /// Says whether `endpoint` may be dialled.
    ///
    /// `allow_addresses` overrides a class, never the proxy's own listeners. IPv4-mapped,
    /// IPv4-compatible and NAT64 forms count as the IPv4 address that they reach.
    pub fn check(&self, endpoint: SocketAddr) -> Result<(), Denied> {
        let address = embedded_ipv4(endpoint.ip());
        if self.is_own(SocketAddr::new(address, endpoint.port())) {
            return Err(Denied::OwnListener(endpoint));
        }
        let allowed = |net: &IpNet| net.contains(&address) || net.contains(&endpoint.ip());
        if self.allow.iter().any(allowed) {
            return Ok(());
        }
        match self.deny.iter().find(|class| belongs(address, **class)) {
            Some(&class) => Err(Denied::Class { endpoint, class }),
            None => Ok(()),
        }
    }

    /// Says whether a connection that is up may be used: it may have come back to this proxy.
    ///
    /// A wildcard listener takes connections to every address of its host, which the kernel alone
    /// knows. To such an address it dials from that very address.
    pub fn check_connected(&self, local: SocketAddr, endpoint: SocketAddr) -> Result<(), Denied> {
        let wildcard =
            |own: &SocketAddr| own.port() == endpoint.port() && own.ip().is_unspecified();
        match local.ip() == endpoint.ip() && self.listeners.iter().any(wildcard) {
            true => Err(Denied::OwnListener(endpoint)),
            false => Ok(()),
        }
    }

    /// A wildcard listener takes connections to every loopback address, and the unspecified
    /// address dials loopback.
    fn is_own(&self, endpoint: SocketAddr) -> bool {
        self.listeners.iter().any(|own| {
            own.port() == endpoint.port()
                && (own.ip() == endpoint.ip()
                    || own.ip().is_unspecified() && endpoint.ip().is_loopback()
                    || endpoint.ip().is_unspecified())
        })
    }
}

fn belongs(address: IpAddr, class: AddressClass) -> bool {
    match class {
        AddressClass::Loopback => address.is_loopback(),
        AddressClass::LinkLocal => match address {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        },
        AddressClass::Metadata => METADATA.contains(&address),
        AddressClass::Multicast => {
            address.is_multicast() || address == IpAddr::V4(Ipv4Addr::BROADCAST)
        }
        // RFC 1122 §3.2.1.3: all of 0.0.0.0/8 is "this network"; Linux dials 0.0.0.0 as loopback.
        AddressClass::Unspecified => match address {
            IpAddr::V4(v4) => v4.octets()[0] == 0,
            IpAddr::V6(v6) => v6.is_unspecified(),
        },
    }
}

/// The IPv4 address inside an IPv6 one that merely carries it (RFC 4291 §2.5.5, RFC 6052 §2.1).
fn embedded_ipv4(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else { return address };
    let last = |v6: Ipv6Addr| {
        let [.., a, b, c, d] = v6.octets();
        IpAddr::V4(Ipv4Addr::new(a, b, c, d))
    };
    match v6.segments() {
        [0, 0, 0, 0, 0, 0xffff, _, _] | [0x64, 0xff9b, 0, 0, 0, 0, _, _] => last(v6),
        [0, 0, 0, 0, 0, 0, high, low] if high != 0 || low > 1 => last(v6),
        _ => address,
    }
}

fn describe(class: AddressClass) -> &'static str {
    match class {
        AddressClass::Loopback => "a loopback address",
        AddressClass::LinkLocal => "a link-local address",
        AddressClass::Metadata => "a cloud metadata service",
        AddressClass::Multicast => "a multicast or broadcast address",
        AddressClass::Unspecified => "an unspecified address",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(allow: &[&str]) -> AddressPolicy {
        let policy = config::Policy {
            deny_addresses: vec![
                AddressClass::Loopback,
                AddressClass::LinkLocal,
                AddressClass::Metadata,
                AddressClass::Multicast,
                AddressClass::Unspecified,
            ],
            allow_addresses: allow.iter().map(|net| net.parse().unwrap()).collect(),
        };
        AddressPolicy::new(&policy, ["127.0.0.1:8080".parse().unwrap()])
    }

    fn denied(policy: &AddressPolicy, address: &str) -> bool {
        policy.check(SocketAddr::new(address.parse().unwrap(), 443)).is_err()
    }

    #[test]
    fn denied_ranges_are_denied_in_every_form() {
        let policy = policy(&[]);
        for address in [
            "127.0.0.1",
            "127.9.9.9",
            "::1",
            "169.254.0.1",
            "fe80::1",
            "169.254.169.254",
            "fd00:ec2::254",
            "100.100.100.200",
            "192.0.0.192",
            "224.0.0.1",
            "ff02::1",
            "255.255.255.255",
            "0.0.0.0",
            "0.1.2.3",
            "::",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::127.0.0.1",
            "64:ff9b::a9fe:a9fe",
            "::127.0.0.1",
        ] {
            assert!(denied(&policy, address), "{address}");
        }
    }

    #[test]
    fn private_and_public_addresses_pass() {
        let policy = policy(&[]);
        for address in [
            "10.0.0.5",
            "172.16.3.4",
            "192.168.1.1",
            "100.64.0.1",
            "93.184.216.34",
            "fd12::1",
            "2606:2800:220:1::1",
            "::ffff:10.0.0.1",
            "64:ff9b::808:808",
        ] {
            assert!(!denied(&policy, address), "{address}");
        }
    }

    #[test]
    fn an_allowed_network_overrides_a_class_but_never_an_own_listener() {
        let policy = policy(&["127.0.0.0/8"]);
        assert!(!denied(&policy, "127.0.0.1"));
        assert!(!denied(&policy, "::ffff:127.0.0.1"));
        for own in ["127.0.0.1:8080", "[::ffff:127.0.0.1]:8080", "0.0.0.0:8080", "[::]:8080"] {
            let own = own.parse().unwrap();
            assert_eq!(policy.check(own), Err(Denied::OwnListener(own)));
        }
    }

    #[test]
    fn a_wildcard_listener_makes_every_loopback_address_its_own() {
        let policy =
            AddressPolicy::new(&config::Policy::default(), ["0.0.0.0:80".parse().unwrap()]);
        let own = "127.3.2.1:80".parse().unwrap();
        assert_eq!(policy.check(own), Err(Denied::OwnListener(own)));
    }

    #[test]
    fn a_wildcard_listener_is_its_own_at_the_address_that_the_connection_comes_from() {
        let own = ["0.0.0.0:80".parse().unwrap(), "10.0.0.9:81".parse().unwrap()];
        let policy = AddressPolicy::new(&config::Policy::default(), own);
        let check = |local: &str, endpoint: &str| {
            policy.check_connected(local.parse().unwrap(), endpoint.parse().unwrap())
        };
        let own = "10.0.0.5:80";
        assert_eq!(check("10.0.0.5:40000", own), Err(Denied::OwnListener(own.parse().unwrap())));
        for (local, endpoint) in [
            ("10.0.0.5:40000", "10.0.0.6:80"),
            ("10.0.0.5:40000", "10.0.0.5:443"),
            // Another process may listen there.
            ("10.0.0.5:40000", "10.0.0.5:81"),
        ] {
            assert_eq!(check(local, endpoint), Ok(()), "{local} {endpoint}");
        }
    }
}
