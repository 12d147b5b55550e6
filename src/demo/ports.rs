//! Listeners that belong together.

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use tokio::net::TcpListener;

/// How often a port that is free on the first address may be taken on another before we give up.
const ATTEMPTS: usize = 64;

/// Listens on all of `addresses` at one port that is free on each, as the endpoints of one target
/// do: a target has one port. The listeners stand in the order of their addresses.
pub fn listen_on_one_port(addresses: &[IpAddr]) -> Result<Vec<TcpListener>, ListenError> {
    let mut taken = None;
    for _ in 0..ATTEMPTS {
        match try_one_port(addresses) {
            Err(error) if error.source.kind() == io::ErrorKind::AddrInUse => taken = Some(error),
            settled => return settled,
        }
    }
    taken.map_or(Ok(Vec::new()), Err)
}

fn try_one_port(addresses: &[IpAddr]) -> Result<Vec<TcpListener>, ListenError> {
    let mut listeners = Vec::with_capacity(addresses.len());
    let mut port = 0;
    for ip in addresses {
        let address = SocketAddr::new(*ip, port);
        let (listener, bound) =
            listen(address).map_err(|source| ListenError { address, source })?;
        port = bound.port();
        listeners.push(listener);
    }
    Ok(listeners)
}

fn listen(address: SocketAddr) -> io::Result<(TcpListener, SocketAddr)> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    let bound = listener.local_addr()?;
    Ok((TcpListener::from_std(listener)?, bound))
}

/// An address of the demo's world that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot listen on {address}: {source}; every address of 127.0.0.0/8 must be loopback, which is \
     so on Linux and needs `sudo ifconfig lo0 alias {ip} up` on macOS",
    ip = address.ip()
)]
pub struct ListenError {
    address: SocketAddr,
    source: io::Error,
}
