//! Which listener a socket belongs to.

use std::{
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicU64, Ordering},
};

use tokio::net::TcpStream;

/// Identifies a listener, even if its address changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListenerId(u64);

/// Identifies a listening socket, even if its address changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListenSocketId(u64);

impl ListenSocketId {
    /// A new one.
    pub fn unique() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl ListenerId {
    /// A new one.
    pub fn unique() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// Which listeners a socket serves.
#[derive(Clone, Debug)]
pub enum ListenSocketUse {
    /// All its connections belong to this listener.
    Open(ListenerId),
    /// It accepts more connections than are configured, and only these are served: it is about to close, or it
    /// is a `[::]` for both families of which only IPv6 is still configured.
    Parts(Vec<Part>),
}

/// Some connections of a socket.
#[derive(Clone, Debug)]
pub struct Part {
    /// The address they were made to. It may be a wildcard.
    pub address: SocketAddr,
    /// If that is `[::]`, whether IPv4 is excluded.
    pub ipv6_only: bool,
    /// The listener they belong to.
    pub listener: ListenerId,
}

impl ListenSocketUse {
    /// The listener of a new connection; `None` if it no longer belongs to any.
    pub fn listener(&self, stream: &TcpStream) -> Option<ListenerId> {
        match self {
            Self::Open(listener) => Some(*listener),
            Self::Parts(parts) => {
                let local = stream.local_addr().ok()?;
                let found = parts.iter().find(|part| covers(part.address, part.ipv6_only, local));
                found.map(|part| part.listener)
            }
        }
    }
}

/// Whether a socket on `wide` accepts connections to `narrow`.
pub fn covers(wide: SocketAddr, ipv6_only: bool, narrow: SocketAddr) -> bool {
    let is_inside = match (wide.ip(), narrow.ip().to_canonical()) {
        (wide, narrow) if wide.to_canonical() == narrow => true,
        (IpAddr::V4(wide), IpAddr::V4(_)) => wide.is_unspecified(),
        (IpAddr::V6(wide), IpAddr::V6(_)) => wide.is_unspecified(),
        (IpAddr::V6(wide), IpAddr::V4(_)) => wide.is_unspecified() && !ipv6_only,
        (IpAddr::V4(_), IpAddr::V6(_)) => false,
    };
    wide.port() == narrow.port() && is_inside
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_covers_the_addresses_of_its_family_and_that_of_ipv6_may_cover_both() {
        let covered = |wide: &str, ipv6_only, narrow: &str| {
            covers(wide.parse().unwrap(), ipv6_only, narrow.parse().unwrap())
        };
        for (wide, narrow) in [
            ("127.0.0.1:80", "127.0.0.1:80"),
            ("127.0.0.1:80", "[::ffff:127.0.0.1]:80"),
            ("0.0.0.0:80", "127.0.0.1:80"),
            ("[::]:80", "[::1]:80"),
        ] {
            assert!(covered(wide, true, narrow), "{wide} {narrow}");
        }
        assert!(covered("[::]:80", false, "127.0.0.1:80"));
        assert!(covered("[::]:80", false, "0.0.0.0:80"));
        assert!(!covered("[::]:80", true, "127.0.0.1:80"));
        for (wide, narrow) in [
            ("127.0.0.1:80", "0.0.0.0:80"),
            ("127.0.0.1:80", "127.0.0.2:80"),
            ("0.0.0.0:80", "127.0.0.1:81"),
            ("0.0.0.0:80", "[::1]:80"),
        ] {
            assert!(!covered(wide, false, narrow), "{wide} {narrow}");
        }
    }
}
