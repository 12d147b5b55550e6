//! Listening sockets, and which worker serves what comes in.
//!
//! Every worker waits at every socket, and whoever is awake first accepts: no thread, no hop and
//! no second registration stand between a connection and its worker. Who accepts is not who serves,
//! though: a connection goes to the worker that has the fewest, which is the accepting one unless
//! another has fewer. With `SO_REUSEPORT` the kernel would decide by a hash, and few connections
//! could all meet on one worker.

use std::{
    io,
    net::{SocketAddr, TcpListener as StdListener},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    time::sleep,
};
use tokio_util::sync::CancellationToken;

use crate::serve::Server;

/// Connections that the kernel keeps while nobody accepts.
const BACKLOG: i32 = 1024;

/// Out of descriptors, `accept` fails at once, again and again: then it waits, ever longer.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

/// An address that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}: {source}; {}", way_out(.source))]
pub struct BindError {
    /// As configured.
    pub address: SocketAddr,
    /// What the kernel said.
    pub source: io::Error,
}

fn way_out(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "choose a port above 1023, or let pods bind low ones with the sysctl \
             net.ipv4.ip_unprivileged_port_start=0"
        }
        io::ErrorKind::AddrInUse => {
            "another process has it: choose another port (0 takes any free one)"
        }
        io::ErrorKind::AddrNotAvailable => "this machine has no such address",
        _ => "choose another address",
    }
}

/// A socket that is bound, and to what.
#[derive(Debug)]
pub struct Bound {
    /// The address as configured: what routes are found by.
    pub configured: SocketAddr,
    /// The address that the kernel gave: the port, where 0 was asked for.
    pub address: SocketAddr,
    socket: StdListener,
}

impl Bound {
    /// Binds and listens.
    pub fn bind(configured: SocketAddr) -> Result<Self, BindError> {
        let error = |source| BindError { address: configured, source };
        let socket = listen(configured).map_err(error)?;
        let address = socket.local_addr().map_err(error)?;
        Ok(Self { configured, address, socket })
    }

    /// For a runtime of the caller's.
    pub fn into_tokio(self) -> io::Result<TcpListener> {
        TcpListener::from_std(self.socket)
    }
}

fn listen(address: SocketAddr) -> io::Result<StdListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    // A restart must not wait for the connections of the last run to leave TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    // Connections inherit it.
    socket.set_tcp_nodelay(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// What a worker is told.
enum Order {
    /// To accept on this socket, with the others, until the token is cancelled.
    Accept(Arc<StdListener>, SocketAddr, CancellationToken),
    /// To serve what another has accepted.
    Serve(Handover),
}

/// A connection on its way to a worker.
struct Handover {
    stream: std::net::TcpStream,
    peer: SocketAddr,
    listener: SocketAddr,
    taken: Taken,
}

/// A worker as the others see it.
struct Seat {
    connections: Arc<AtomicUsize>,
    orders: mpsc::UnboundedSender<Order>,
}

/// What the workers share.
struct Seats {
    seats: Vec<Seat>,
    limit: Arc<Semaphore>,
    /// Held to choose a seat and to take it: two that choose at once would choose the same.
    choosing: Mutex<()>,
}

/// The workers, and where they accept.
pub struct Listeners {
    seats: Arc<Seats>,
    closed: CancellationToken,
}

impl Listeners {
    /// Starts the workers' threads. They end when this is dropped and their connections have
    /// ended, or with the drain of `server`.
    pub fn start(server: &Arc<Server>, workers: usize, max_connections: usize) -> io::Result<Self> {
        // Bounded by `max_connections`: a permit comes with each connection in a queue.
        let (senders, queues): (Vec<_>, Vec<_>) =
            (0..workers).map(|_| mpsc::unbounded_channel()).unzip();
        let seat = |orders| Seat { connections: Arc::default(), orders };
        let seats = Arc::new(Seats {
            seats: senders.into_iter().map(seat).collect(),
            limit: Arc::new(Semaphore::new(max_connections.min(Semaphore::MAX_PERMITS))),
            choosing: Mutex::new(()),
        });
        let closed = CancellationToken::new();
        for (index, orders) in queues.into_iter().enumerate() {
            let worker = Worker { server: server.clone(), index, seats: seats.clone() };
            spawn(format!("worker-{index}"), Arc::new(worker).run(orders, closed.clone()))?;
        }
        Ok(Self { seats, closed })
    }

    /// Accepts on a socket until the token is cancelled.
    pub fn add(&self, bound: Bound) -> CancellationToken {
        let token = self.closed.child_token();
        let socket = Arc::new(bound.socket);
        for seat in &self.seats.seats {
            // The threads are there until this is dropped, or the whole proxy stops.
            let order = Order::Accept(socket.clone(), bound.configured, token.clone());
            let _ = seat.orders.send(order);
        }
        token
    }
}

impl Drop for Listeners {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}

impl Seats {
    /// Takes a place at the worker with the fewest connections: at `own`, if none has fewer.
    fn take(&self, own: usize, permit: OwnedSemaphorePermit) -> (usize, Taken) {
        let _choosing = self.choosing.lock();
        let load = |index: usize| self.seats[index].connections.load(Ordering::Relaxed);
        let others = (0..self.seats.len()).filter(|index| *index != own);
        let least =
            others.min_by_key(|index| load(*index)).filter(|least| load(*least) < load(own));
        let index = least.unwrap_or(own);
        let connections = self.seats[index].connections.clone();
        connections.fetch_add(1, Ordering::Relaxed);
        (index, Taken { connections, _permit: permit })
    }
}

/// A connection's place, given up when it ends.
#[derive(Debug)]
struct Taken {
    connections: Arc<AtomicUsize>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A thread with a runtime of its own, for one future.
fn spawn<F>(name: String, future: F) -> io::Result<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name(name).spawn(move || runtime.block_on(future))?;
    Ok(())
}

/// One thread's part.
struct Worker {
    server: Arc<Server>,
    index: usize,
    seats: Arc<Seats>,
}

impl Worker {
    async fn run(
        self: Arc<Self>,
        mut orders: mpsc::UnboundedReceiver<Order>,
        closed: CancellationToken,
    ) {
        let stopped = self.server.drain.stopped();
        loop {
            let order = tokio::select! {
                order = orders.recv() => order,
                () = closed.cancelled() => break,
                () = stopped.cancelled() => return,
            };
            match order {
                Some(Order::Serve(Handover { stream, peer, listener, taken })) => {
                    if let Ok(stream) = TcpStream::from_std(stream) {
                        self.serve(stream, peer, listener, taken);
                    }
                }
                Some(Order::Accept(socket, address, token)) => {
                    let worker = self.clone();
                    tokio::spawn(async move {
                        tokio::select! {
                            result = worker.accept(&socket, address) => if let Err(error) = result {
                                tracing::error!(%address, %error, "listening has ended");
                            },
                            () = token.cancelled() => {
                                tracing::debug!(%address, "no longer listening");
                            }
                        }
                    });
                }
                None => break,
            }
        }
        stopped.cancelled().await;
    }

    async fn accept(&self, socket: &StdListener, configured: SocketAddr) -> io::Result<()> {
        let listener = TcpListener::from_std(socket.try_clone()?)?;
        let mut back_off = BACK_OFF.0;
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    back_off = BACK_OFF.0;
                    // What is over the limit waits in the kernel's backlog, behind this one. A
                    // permit taken before would be kept from other sockets while nobody comes here.
                    let permit = self.seats.limit.clone().acquire_owned();
                    let Ok(permit) = permit.await else { return Ok(()) };
                    self.take(stream, peer, configured, permit);
                }
                Err(error) if is_clients_own(&error) => {}
                Err(error) => {
                    let kind = (configured, error.to_string());
                    if self.server.accept_failures.begins(kind, "") {
                        tracing::warn!(
                            listener = %configured,
                            %error,
                            "accepting failed; trying again",
                        );
                    }
                    sleep(back_off).await;
                    back_off = (back_off * 2).min(BACK_OFF.1);
                }
            }
        }
    }

    /// Serves a new connection, or has it served.
    fn take(
        &self,
        stream: TcpStream,
        peer: SocketAddr,
        listener: SocketAddr,
        permit: OwnedSemaphorePermit,
    ) {
        let (index, taken) = self.seats.take(self.index, permit);
        if index == self.index {
            self.serve(stream, peer, listener, taken);
        } else if let Ok(stream) = stream.into_std() {
            let handover = Handover { stream, peer, listener, taken };
            let _ = self.seats.seats[index].orders.send(Order::Serve(handover));
        }
    }

    fn serve(&self, stream: TcpStream, peer: SocketAddr, listener: SocketAddr, taken: Taken) {
        let (server, index) = (self.server.clone(), self.index);
        tokio::spawn(async move {
            // Made in here, as a future that is moved into another is kept twice.
            server.connection(stream, peer, listener, index, Box::new(taken)).await;
        });
    }
}

/// The connection died before it was accepted: nothing is wrong here.
fn is_clients_own(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_cannot_be_bound_is_told_with_the_way_out() {
        let told = |kind: io::ErrorKind| {
            BindError { address: ([127, 0, 0, 1], 443).into(), source: kind.into() }.to_string()
        };
        let denied = told(io::ErrorKind::PermissionDenied);
        assert!(
            denied.starts_with("cannot listen on 127.0.0.1:443: permission denied; "),
            "{denied}"
        );
        assert!(denied.contains("a port above 1023"), "{denied}");
        assert!(denied.contains("net.ipv4.ip_unprivileged_port_start"), "{denied}");
        assert!(told(io::ErrorKind::AddrInUse).contains("another process has it"));
        assert!(told(io::ErrorKind::AddrNotAvailable).contains("no such address"));
    }
}
