//! Addresses and ports that no other test uses, on a machine where tests run in parallel.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use socket2::{Domain, Socket, Type};
use tokio::net::TcpListener;

/// `count` addresses of 127.0.0.0/8 that nobody else in this process has, and hardly anybody else
/// on this machine: where two processes meet, their ports still differ.
pub fn addresses(count: usize) -> Vec<IpAddr> {
    (0..count).map(|_| address()).collect()
}

/// One such address.
pub fn address() -> IpAddr {
    // 13 bits of process, 10 of number, above the addresses that people use by hand.
    const FIRST: u32 = u32::from_be_bytes([127, 64, 0, 1]);
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed) % (1 << 10);
    let process = process::id() % (1 << 12);
    Ipv4Addr::from_bits(FIRST + (process << 10) + number).into()
}

/// Listeners on all of `addresses`, at one port that was free on each: the endpoints of one target.
pub fn listen(addresses: &[IpAddr]) -> Vec<TcpListener> {
    truename::demo::ports::listen_on_one_port(addresses).unwrap()
}

/// A listener on a port of its own choice, on an address of its own.
pub fn listen_anywhere() -> TcpListener {
    listen(&[address()]).remove(0)
}

/// A port that no other test has, and no connection gets by chance: it is above those that the system hands out.
pub fn port_of_its_own() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed) + process::id() * 4;
    (61_000 + number % 4_500) as u16
}

/// An address at which connecting neither succeeds nor fails: the SYN gets no reply.
pub struct Blackhole {
    /// Where not to get a response.
    pub address: SocketAddr,
    _full_backlog: Vec<Socket>,
}

impl Blackhole {
    /// Takes `address` (port 0: any), and keeps it as long as this lives.
    pub fn bind(address: SocketAddr) -> Self {
        Self::of(std::net::TcpListener::bind(address).unwrap())
    }

    /// Takes the place of a listener that nobody has connected to yet. It is not closed for that and bound once
    /// more: a process that another test starts just then holds the address until it runs its program.
    pub fn of(listener: std::net::TcpListener) -> Self {
        let listener = Socket::from(listener);
        // Linux completes handshakes until the accept queue is over its length and then drops SYNs:
        // a queue of none is full with the first connection that nobody accepts.
        listener.listen(0).unwrap();
        let address = listener.local_addr().unwrap().as_socket().unwrap();
        let filler = Socket::new(Domain::for_address(address), Type::STREAM, None).unwrap();
        filler.connect(&address.into()).unwrap();
        Self { address, _full_backlog: vec![listener, filler] }
    }
}
