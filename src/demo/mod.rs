//! The whole story on one machine, offline: a cluster's DNS, TLS origins, and the proxy between.

pub mod authority;
pub mod dns;
pub mod httpbin;
pub mod origin;

use std::{
    io,
    net::{IpAddr, SocketAddr},
};

use tokio::net::TcpListener;

/// How often a port that is free on the first address may be taken on another before we give up.
const PORT_ATTEMPTS: usize = 64;

/// Listens on all of `addresses` at one port that is free on each, as the endpoints of one target
/// do: a target has one port. The listeners stand in the order of their addresses.
pub fn listen_on_one_port(addresses: &[IpAddr]) -> Result<Vec<TcpListener>, ListenError> {
    let mut taken = None;
    for _ in 0..PORT_ATTEMPTS {
        match try_one_port(addresses) {
            Err(error) if error.source.kind() == io::ErrorKind::AddrInUse => taken = Some(error),
            settled => return settled,
        }
    }
    taken.map_or(Ok(Vec::new()), Err)
}

fn try_one_port(addresses: &[IpAddr]) -> Result<Vec<TcpListener>, ListenError> {
    let mut listeners: Vec<TcpListener> = Vec::with_capacity(addresses.len());
    let mut port = 0;
    for ip in addresses {
        let address = SocketAddr::new(*ip, port);
        let listener = bind(address).map_err(|source| ListenError { address, source })?;
        port = listener.local_addr().map_err(|source| ListenError { address, source })?.port();
        listeners.push(listener);
    }
    Ok(listeners)
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let listener = std::net::TcpListener::bind(address)?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
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
