//! Which listener a socket is of.

use std::{
    net::{IpAddr, SocketAddr},
    sync::atomic::{AtomicU64, Ordering},
};

use tokio::net::TcpStream;

/// A listener, whatever becomes of its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListenerId(u64);

/// A listening socket, whatever becomes of its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListenSocketId(u64);

impl ListenSocketId {
    /// One that no other socket has.
    pub fn unique() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl ListenerId {
    /// One that no other listener has.
    pub fn unique() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

/// What a socket is for.
#[derive(Clone, Debug)]
pub enum ListenSocketUse {
    /// All its connections are this listener's.
    Open(ListenerId),
    /// It takes more connections than are to be served: only these are. It is about to close, or it is a
    /// `[::]` for both families, of which only that of IPv6 is configured by now.
    Parts(Vec<Part>),
}

/// Some connections of a socket.
#[derive(Clone, Debug)]
pub struct Part {
    /// The address that they come to. It may be a wildcard.
    pub address: SocketAddr,
    /// Where that is `[::]`, not those of IPv4.
    pub ipv6_only: bool,
    /// Whose they are.
    pub listener: ListenerId,
}

impl ListenSocketUse {
    /// The listener of a new connection; `None` where it is nobody's any more.
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

/// Whether a socket on `wide` takes connections to `narrow`.
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
