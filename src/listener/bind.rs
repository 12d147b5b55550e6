//! Listening sockets: bound when a configuration is planned, listening when it is applied.
//!
//! The kernel gives a connection to the socket with the most specific address, and resets the connections in a
//! socket's queue when it closes. So a listener that widens (127.0.0.1:80 → 0.0.0.0:80) keeps its
//! specific socket beside the wide one, and one that narrows keeps the wide one for a moment.

use std::{
    io,
    net::{Ipv6Addr, SocketAddr, TcpListener as StdListener},
    sync::Arc,
};

use nix::errno::Errno;
use socket2::{Domain, Protocol, SockRef, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, WaitForCancellationFuture};

use crate::serve::{ListenSocketId, covers};

/// How many connections the kernel queues before they are accepted.
const BACKLOG: i32 = 1024;

/// An address that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}; {}", way_out(.source, *.is_of_admin))]
pub struct BindError {
    /// As configured.
    pub address: SocketAddr,
    /// The error from the kernel.
    pub source: io::Error,
    /// Whether the admin listener of this process has the address.
    pub is_of_admin: bool,
}

impl BindError {
    /// Whether the address is already in use.
    pub fn is_taken(&self) -> bool {
        self.source.kind() == io::ErrorKind::AddrInUse
    }
}

fn way_out(error: &io::Error, is_of_admin: bool) -> &'static str {
    let lacking = [Errno::EMFILE, Errno::ENFILE].map(|errno| errno as i32);
    if error.raw_os_error().is_some_and(|errno| lacking.contains(&errno)) {
        return "raise the limit of open files (`ulimit -Hn`)";
    }
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "choose a port above 1023, or allow pods to bind low ones with the sysctl \
             net.ipv4.ip_unprivileged_port_start=0"
        }
        io::ErrorKind::AddrInUse if is_of_admin => {
            "this proxy's admin listener has it until the next start: choose another port, or restart"
        }
        io::ErrorKind::AddrInUse => {
            "another process has it: choose another port (0 takes any free one)"
        }
        io::ErrorKind::AddrNotAvailable => "this machine has no such address",
        _ => "choose another address",
    }
}

/// A bound socket with its addresses.
#[derive(Debug)]
pub struct Bound {
    /// The id of the socket.
    pub id: ListenSocketId,
    /// The address as configured. Routes are found by it.
    pub configured: SocketAddr,
    /// The actual address, with the port that the kernel chose if 0 is configured.
    pub address: SocketAddr,
    /// Whether it is `[::]` without IPv4 addresses.
    ipv6_only: bool,
    socket: StdListener,
    closing: CancellationToken,
}

impl Bound {
    /// Binds, and listens.
    pub fn listening(configured: SocketAddr, ipv6_only: bool) -> Result<Self, BindError> {
        let bound = Self::new(configured, ipv6_only, &[])?;
        bound.listen(&[])?;
        Ok(bound)
    }

    /// Binds beside sockets of ours that may have some of the same addresses. `ipv6_only`: `[::]` does not include
    /// IPv4 addresses.
    pub fn new(
        configured: SocketAddr,
        ipv6_only: bool,
        ours: &[Arc<Self>],
    ) -> Result<Self, BindError> {
        let error = |source| BindError { address: configured, source, is_of_admin: false };
        let ipv6_only = ipv6_only && configured.ip() == Ipv6Addr::UNSPECIFIED;
        let together = Together::new(ours, configured);
        let socket = bind(configured, ipv6_only, together.has_others()).map_err(error)?;
        Ok(Self {
            id: ListenSocketId::unique(),
            configured,
            address: socket.local_addr().map_err(error)?,
            ipv6_only,
            socket,
            closing: CancellationToken::new(),
        })
    }

    /// Starts listening. Connections to more specific addresses of `ours` still go to those sockets.
    pub fn listen(&self, ours: &[Arc<Self>]) -> Result<(), BindError> {
        let together = Together::new(ours, self.address);
        let socket = SockRef::from(&self.socket);
        let shared = socket.set_reuse_port(together.has_others());
        let listening = shared.and_then(|()| socket.listen(BACKLOG));
        let listening = listening.and_then(|()| socket.set_reuse_port(false));
        let error = |source| BindError { address: self.configured, source, is_of_admin: false };
        listening.map_err(error)
    }

    /// Whether it accepts all connections that a socket with this address would.
    pub fn takes_all_of(&self, address: SocketAddr, ipv6_only: bool) -> bool {
        self.address == address && (!self.ipv6_only || ipv6_only)
    }

    /// Whether this socket accepts connections to `address`.
    pub fn covers(&self, address: SocketAddr) -> bool {
        covers(self.address, self.ipv6_only, address)
    }

    /// Whether it is `[::]` with IPv4 addresses.
    pub fn is_of_both_families(&self) -> bool {
        self.address.ip() == Ipv6Addr::UNSPECIFIED && !self.ipv6_only
    }

    /// A listener on it for this runtime. There can be several.
    pub fn to_tokio(&self) -> io::Result<TcpListener> {
        TcpListener::from_std(self.socket.try_clone()?)
    }

    /// A connection from the queue, for this runtime.
    pub fn next_waiting(&self) -> Option<(TcpStream, SocketAddr)> {
        let (stream, peer) = self.socket.accept().ok()?;
        stream.set_nonblocking(true).ok()?;
        Some((TcpStream::from_std(stream).ok()?, peer))
    }

    /// Asks the workers to stop accepting on it. It closes once they have dropped it.
    pub fn close(&self) {
        self.closing.cancel();
    }

    /// Waits for [`close`](Self::close).
    pub fn closing(&self) -> WaitForCancellationFuture<'_> {
        self.closing.cancelled()
    }
}

fn bind(address: SocketAddr, ipv6_only: bool, shares: bool) -> io::Result<StdListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // A restart must not wait for the connections of the previous run to leave TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    // Connections inherit this.
    socket.set_tcp_nodelay(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(ipv6_only)?;
    }
    socket.set_reuse_port(shares)?;
    socket.bind(&address.into())?;
    socket.set_reuse_port(false)?;
    Ok(socket.into())
}

/// Lets sockets of ours whose addresses overlap share their port until it is dropped. No longer, because another process
/// of the same user could share it too. And no others: thousands of aliases may have the same port, each at an address
/// of its own.
struct Together<'a>(Vec<&'a Bound>);

impl<'a> Together<'a> {
    fn new(ours: &'a [Arc<Bound>], address: SocketAddr) -> Self {
        let overlap = |bound: &&Bound| overlap(bound.address, address);
        let together = Self(ours.iter().map(Arc::as_ref).filter(overlap).collect());
        together.share(true);
        together
    }

    fn has_others(&self) -> bool {
        !self.0.is_empty()
    }

    fn share(&self, may_share: bool) {
        for bound in &self.0 {
            // If this fails, the bind fails too.
            let _ = SockRef::from(&bound.socket).set_reuse_port(may_share);
        }
    }
}

impl Drop for Together<'_> {
    fn drop(&mut self) {
        self.share(false);
    }
}

/// Whether a connection could come to either.
fn overlap(one: SocketAddr, other: SocketAddr) -> bool {
    let (one_ip, other_ip) = (one.ip().to_canonical(), other.ip().to_canonical());
    one.port() == other.port()
        && (one_ip == other_ip || one_ip.is_unspecified() || other_ip.is_unspecified())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sockets_whose_addresses_overlap_share_a_port() {
        let bind = |ip: &str, port| {
            let address = SocketAddr::new(ip.parse().unwrap(), port);
            Arc::new(Bound::new(address, false, &[]).unwrap())
        };
        let first = bind("127.0.0.1", 0);
        let port = first.address.port();
        let ours = [first, bind("127.0.0.2", port), bind("127.0.0.3", port)];
        let sharing = |ip: &str, port| {
            let _together = Together::new(&ours, SocketAddr::new(ip.parse().unwrap(), port));
            ours.each_ref().map(|bound| SockRef::from(&bound.socket).reuse_port().unwrap())
        };
        assert_eq!(sharing("127.0.0.2", port), [false, true, false]);
        assert_eq!(sharing("::ffff:127.0.0.1", port), [true, false, false]);
        assert_eq!(sharing("127.0.0.4", port), [false; 3]);
        for wide in ["0.0.0.0", "::"] {
            assert_eq!(sharing(wide, port), [true; 3], "{wide}");
            assert_eq!(sharing(wide, port ^ 1), [false; 3], "{wide}");
        }
    }

    #[test]
    fn a_bind_error_says_how_to_fix_it() {
        let message = |kind: io::ErrorKind, is_of_admin| {
            let address = ([127, 0, 0, 1], 443).into();
            BindError { address, source: kind.into(), is_of_admin }.to_string()
        };
        let denied = message(io::ErrorKind::PermissionDenied, false);
        assert!(
            denied.starts_with("cannot listen on 127.0.0.1:443: permission denied; "),
            "{denied}"
        );
        assert!(denied.contains("a port above 1023"), "{denied}");
        assert!(denied.contains("net.ipv4.ip_unprivileged_port_start"), "{denied}");
        assert!(message(io::ErrorKind::AddrInUse, false).contains("another process has it"));
        assert!(
            message(io::ErrorKind::AddrInUse, true).contains("this proxy's admin listener has it")
        );
        assert!(message(io::ErrorKind::AddrNotAvailable, false).contains("no such address"));
        let source = io::Error::from(Errno::EMFILE);
        let address = ([127, 0, 0, 1], 8080).into();
        let lacking = BindError { address, source, is_of_admin: false }.to_string();
        assert!(lacking.ends_with("; raise the limit of open files (`ulimit -Hn`)"), "{lacking}");
    }
}
