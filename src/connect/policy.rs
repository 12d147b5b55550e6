//! Which addresses may be dialled, checked immediately before the dial.
//!
//! A name's address can change between an earlier check and the connection (DNS rebinding), so only the address
//! that is about to be dialled counts.

mod embedded;
#[cfg(test)]
mod tests;

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use embedded::embedded_ipv4;
use ipnet::IpNet;

use crate::config::{self, AddressClass};

/// Where clouds serve the credentials of machines and pods, as documented by each provider.
///
/// Some are link-local too: they stay denied if `deny_addresses` omits `link_local`.
const METADATA_V4: [Ipv4Addr; 9] = [
    // AWS, Azure, Google Cloud, Oracle Cloud, OpenStack, DigitalOcean, Hetzner, IBM and others.
    Ipv4Addr::new(169, 254, 169, 254),
    // AWS: the roles of ECS tasks, and of pods in EKS.
    Ipv4Addr::new(169, 254, 170, 2),
    Ipv4Addr::new(169, 254, 170, 23),
    // Azure's WireServer: extensions' settings and certificates.
    Ipv4Addr::new(168, 63, 129, 16),
    // Alibaba Cloud.
    Ipv4Addr::new(100, 100, 100, 200),
    // Oracle Cloud Classic.
    Ipv4Addr::new(192, 0, 0, 192),
    // Tencent Cloud.
    Ipv4Addr::new(169, 254, 0, 23),
    Ipv4Addr::new(169, 254, 10, 10),
    // Scaleway.
    Ipv4Addr::new(169, 254, 42, 42),
];

/// The same over IPv6.
const METADATA_V6: [Ipv6Addr; 8] = [
    // AWS: instances, and pods in EKS. Its DNS and time servers (::253, ::123) have no secrets.
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x23),
    // Google Cloud.
    Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),
    // Oracle Cloud.
    Ipv6Addr::new(0xfd00, 0xc1, 0, 0, 0, 0, 0xa9fe, 0xa9fe),
    // Alibaba Cloud.
    Ipv6Addr::new(0xfd00, 0x100, 0, 0, 0, 0, 0x100, 0x200),
    // Akamai (Linode).
    Ipv6Addr::new(0xfd00, 0xa9fe, 0xa9fe, 0, 0, 0, 0, 1),
    // Scaleway.
    Ipv6Addr::new(0xfd00, 0x42, 0, 0, 0, 0, 0, 0x42),
    // OpenStack, Akamai.
    Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0xa9fe, 0xa9fe),
];

/// Why an address is not dialled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Denied {
    /// The address is of a class in `policy.deny_addresses`.
    #[error("{} {}, which `policy.deny_addresses` refuses", .endpoint.ip(), describe(*reached, *endpoint, *class))]
    Class {
        /// The address as DNS or the target gave it, with the port.
        endpoint: SocketAddr,
        /// The address itself, or an IPv4 address that it embeds.
        reached: IpAddr,
        /// Its class.
        class: AddressClass,
    },
    /// The address is one that this proxy listens on: dialling it would be a loop.
    #[error("{0} is one of this proxy's own listeners")]
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
            // A listener on an IPv4-mapped address accepts connections to the IPv4 address.
            listeners: listeners.into_iter().map(canonical).collect(),
        }
    }

    /// Whether `endpoint` may be dialled.
    ///
    /// `allow_addresses` overrides a class, but never the proxy's own listeners. An IPv6 address that embeds an
    /// IPv4 one is checked by both, because a translator would reach the IPv4 address.
    pub fn check(&self, endpoint: SocketAddr) -> Result<(), Denied> {
        let ip = endpoint.ip();
        let reached = || std::iter::once(ip).chain(embedded_ipv4(ip));
        if reached().any(|ip| self.is_own(SocketAddr::new(ip, endpoint.port()))) {
            return Err(Denied::OwnListener(endpoint));
        }
        let allowed = |ip: IpAddr| self.allow.iter().any(|net| net.contains(&ip));
        if allowed(ip) {
            return Ok(());
        }
        for reached in reached().filter(|ip| !allowed(*ip)) {
            if let Some(&class) = self.deny.iter().find(|class| belongs(reached, **class)) {
                return Err(Denied::Class { endpoint, reached, class });
            }
        }
        Ok(())
    }

    /// Whether an established connection may be used: it may lead back to this proxy.
    ///
    /// A wildcard listener accepts connections to every address of its host, and only the kernel knows these. The
    /// kernel dials such an address from the same address.
    pub fn check_connected(&self, local: SocketAddr, endpoint: SocketAddr) -> Result<(), Denied> {
        let wildcard =
            |own: &SocketAddr| own.port() == endpoint.port() && takes_all(own.ip(), endpoint.ip());
        match local.ip().to_canonical() == endpoint.ip().to_canonical()
            && self.listeners.iter().any(wildcard)
        {
            true => Err(Denied::OwnListener(endpoint)),
            false => Ok(()),
        }
    }

    /// A wildcard listener accepts connections to every loopback address, and dialling the unspecified address
    /// reaches loopback.
    fn is_own(&self, endpoint: SocketAddr) -> bool {
        self.listeners.iter().any(|own| {
            own.port() == endpoint.port()
                && (own.ip() == endpoint.ip()
                    || takes_all(own.ip(), endpoint.ip()) && endpoint.ip().is_loopback()
                    || endpoint.ip().is_unspecified())
        })
    }
}

/// Whether a listener on `own` accepts connections to all addresses of the family of `ip`: `0.0.0.0` accepts none
/// over IPv6, where another process may listen.
fn takes_all(own: IpAddr, ip: IpAddr) -> bool {
    own.is_unspecified() && (own.is_ipv6() || ip.to_canonical().is_ipv4())
}

fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn belongs(address: IpAddr, class: AddressClass) -> bool {
    match class {
        AddressClass::Loopback => address.is_loopback(),
        AddressClass::LinkLocal => match address {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        },
        AddressClass::Metadata => match address {
            IpAddr::V4(v4) => METADATA_V4.contains(&v4),
            IpAddr::V6(v6) => METADATA_V6.contains(&v6),
        },
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

fn describe(reached: IpAddr, endpoint: SocketAddr, class: AddressClass) -> String {
    let class = match class {
        AddressClass::Loopback => "a loopback address",
        AddressClass::LinkLocal => "a link-local address",
        AddressClass::Metadata => "a cloud metadata service",
        AddressClass::Multicast => "a multicast or broadcast address",
        AddressClass::Unspecified => {
            "an unspecified address (DNS filters give it for blocked names)"
        }
    };
    match reached == endpoint.ip() {
        true => format!("is {class}"),
        false => format!("leads to {reached}, {class}"),
    }
}
