//! Listening sockets, and the hand-over of their connections to the workers.
//!
//! One thread accepts for all and gives each connection to the worker with the fewest: with
//! `SO_REUSEPORT` the kernel decides by a hash, and few connections can all meet on one worker.

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
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A connection on its way to a worker.
struct Handover {
    stream: std::net::TcpStream,
    peer: SocketAddr,
    listener: SocketAddr,
    permit: OwnedSemaphorePermit,
}

/// A worker as the acceptor sees it.
struct Seat {
    connections: Arc<AtomicUsize>,
    queue: mpsc::UnboundedSender<Handover>,
}

/// The accepting thread and the workers.
pub struct Listeners {
    commands: mpsc::UnboundedSender<(Bound, CancellationToken)>,
    loads: Vec<Arc<AtomicUsize>>,
}

impl Listeners {
    /// Starts the threads. They end when this is dropped and their connections have ended, or
    /// with the drain of `server`.
    pub fn start(server: &Arc<Server>, workers: usize, max_connections: usize) -> io::Result<Self> {
        let mut seats = Vec::with_capacity(workers);
        for index in 0..workers {
            // Bounded by `max_connections`: a permit comes with each entry.
            let (queue, incoming) = mpsc::unbounded_channel();
            let connections = Arc::new(AtomicUsize::new(0));
            seats.push(Seat { connections: connections.clone(), queue });
            let server = server.clone();
            spawn(format!("worker-{index}"), work(server, index, incoming, connections))?;
        }
        let loads = seats.iter().map(|seat| seat.connections.clone()).collect();
        let (commands, bounds) = mpsc::unbounded_channel();
        let stopped = server.drain.stopped();
        spawn("accept".into(), accept_all(bounds, seats.into(), max_connections, stopped))?;
        Ok(Self { commands, loads })
    }

    /// Accepts on a socket until the token is cancelled.
    pub fn add(&self, bound: Bound) -> CancellationToken {
        let token = CancellationToken::new();
        // The thread is there until this is dropped, or the whole proxy stops.
        let _ = self.commands.send((bound, token.clone()));
        token
    }

    /// Connections now, for each worker.
    pub fn loads(&self) -> Vec<usize> {
        self.loads.iter().map(|load| load.load(Ordering::Relaxed)).collect()
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

async fn accept_all(
    mut bounds: mpsc::UnboundedReceiver<(Bound, CancellationToken)>,
    seats: Arc<[Seat]>,
    max_connections: usize,
    stopped: CancellationToken,
) {
    let limit = Arc::new(Semaphore::new(max_connections.min(Semaphore::MAX_PERMITS)));
    loop {
        let (bound, token) = tokio::select! {
            bound = bounds.recv() => match bound {
                Some(bound) => bound,
                None => return,
            },
            () = stopped.cancelled() => return,
        };
        let (seats, limit) = (seats.clone(), limit.clone());
        tokio::spawn(async move {
            let (configured, address) = (bound.configured, bound.address);
            tokio::select! {
                result = accept(bound, &seats, &limit) => if let Err(error) = result {
                    tracing::error!(%address, %error, "listening has ended");
                },
                () = token.cancelled() => {
                    tracing::debug!(%configured, %address, "no longer listening");
                }
            }
        });
    }
}

async fn accept(bound: Bound, seats: &[Seat], limit: &Arc<Semaphore>) -> io::Result<()> {
    let configured = bound.configured;
    let listener = bound.into_tokio()?;
    let mut back_off = BACK_OFF.0;
    loop {
        // Before the accept: what is over the limit waits in the kernel's backlog.
        let Ok(permit) = limit.clone().acquire_owned().await else { return Ok(()) };
        match listener.accept().await {
            Ok((stream, peer)) => {
                back_off = BACK_OFF.0;
                hand_over(stream, peer, configured, permit, seats);
            }
            Err(error) if is_clients_own(&error) => {}
            Err(error) => {
                tracing::warn!(listener = %configured, %error, "accepting failed; trying again");
                sleep(back_off).await;
                back_off = (back_off * 2).min(BACK_OFF.1);
            }
        }
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

fn hand_over(
    stream: TcpStream,
    peer: SocketAddr,
    listener: SocketAddr,
    permit: OwnedSemaphorePermit,
    seats: &[Seat],
) {
    let _ = stream.set_nodelay(true);
    let Ok(stream) = stream.into_std() else { return };
    let Some(seat) = seats.iter().min_by_key(|seat| seat.connections.load(Ordering::Relaxed))
    else {
        return;
    };
    seat.connections.fetch_add(1, Ordering::Relaxed);
    let _ = seat.queue.send(Handover { stream, peer, listener, permit });
}

async fn work(
    server: Arc<Server>,
    worker: usize,
    mut incoming: mpsc::UnboundedReceiver<Handover>,
    connections: Arc<AtomicUsize>,
) {
    let stopped = server.drain.stopped();
    loop {
        let handover = tokio::select! {
            handover = incoming.recv() => handover,
            () = stopped.cancelled() => return,
        };
        let Some(Handover { stream, peer, listener, permit }) = handover else {
            stopped.cancelled().await;
            return;
        };
        let taken = Taken { connections: connections.clone(), _permit: permit };
        let Ok(stream) = TcpStream::from_std(stream) else { continue };
        let connection = server.clone().connection(stream, peer, listener, worker);
        tokio::spawn(async move {
            connection.await;
            drop(taken);
        });
    }
}

/// A connection's place, given up when it ends.
struct Taken {
    connections: Arc<AtomicUsize>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }
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
