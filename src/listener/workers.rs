//! The workers: each is a thread with its own runtime.
//!
//! Every worker waits on every socket, and the first one to wake up accepts, so there is no separate accept thread
//! and no extra hop. The accepting worker may not be the one that serves: a connection goes to the worker that has
//! the fewest, which is the accepting one unless another has fewer. With `SO_REUSEPORT`, the kernel would decide by
//! a hash, and a few connections could all end up on one worker.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use parking_lot::Mutex;
use tokio::{
    net::TcpStream,
    runtime,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
};
use tokio_util::sync::CancellationToken;

use super::Bound;
use crate::serve::{Arrival, Server};

/// A message to a worker.
enum Order {
    /// Accept on this socket, like all other workers, until it is to close.
    Accept(Arc<Bound>),
    /// Serve a connection that another worker has accepted.
    Serve(Dispatched),
}

/// A connection on its way to a worker.
struct Dispatched {
    stream: std::net::TcpStream,
    arrival: Box<Arrival>,
    taken: Taken,
}

/// What other workers know about a worker.
struct Seat {
    connections: Arc<AtomicUsize>,
    orders: mpsc::UnboundedSender<Order>,
}

/// The shared state of the workers.
struct Seats {
    seats: Vec<Seat>,
    limit: Arc<Semaphore>,
    /// Held while a seat is chosen and taken, so that two connections do not choose the same one.
    choosing: Mutex<()>,
}

/// The workers' threads.
pub struct Workers {
    seats: Arc<Seats>,
    closed: CancellationToken,
}

impl Workers {
    /// Starts the workers' threads. They end when this is dropped and their connections have
    /// ended, or with the drain of `server`.
    pub fn start(server: &Arc<Server>, workers: usize, max_connections: usize) -> io::Result<Self> {
        // Bounded by `max_connections`, because each connection in a queue has a permit.
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

    /// Lets all workers accept on a socket until it is to close.
    pub fn accept(&self, bound: &Arc<Bound>) {
        for seat in &self.seats.seats {
            // The threads run until this is dropped or the proxy stops.
            let _ = seat.orders.send(Order::Accept(bound.clone()));
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.closed.cancel();
    }
}

impl Seats {
    /// Takes a place at the worker with the fewest connections; at `own`, if none has fewer.
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

/// A connection's place, until it is dropped.
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

/// Runs a future on a thread with its own runtime.
fn spawn<F>(name: String, future: F) -> io::Result<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name(name).spawn(move || runtime.block_on(future))?;
    Ok(())
}

/// One thread's part.
pub(super) struct Worker {
    pub(super) server: Arc<Server>,
    pub(super) index: usize,
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
                Some(Order::Serve(Dispatched { stream, arrival, taken })) => {
                    if let Ok(stream) = TcpStream::from_std(stream) {
                        self.serve(stream, arrival, taken);
                    }
                }
                Some(Order::Accept(bound)) => {
                    let (worker, closed) = (self.clone(), closed.clone());
                    tokio::spawn(async move {
                        tokio::select! {
                            () = worker.accept(&bound) => {}
                            () = closed.cancelled() => {}
                        }
                    });
                }
                None => break,
            }
        }
        stopped.cancelled().await;
    }

    /// Waits until there may be another connection; `None` once the proxy has ended.
    pub(super) async fn permit(&self) -> Option<OwnedSemaphorePermit> {
        self.seats.limit.clone().acquire_owned().await.ok()
    }

    /// Serves a new connection, or passes it to another worker.
    pub(super) fn take(
        &self,
        stream: TcpStream,
        mut arrival: Box<Arrival>,
        permit: OwnedSemaphorePermit,
    ) {
        let (index, taken) = self.seats.take(self.index, permit);
        if index == self.index {
            self.serve(stream, arrival, taken);
        } else if let Ok(stream) = stream.into_std() {
            arrival.worker = index;
            let handover = Dispatched { stream, arrival, taken };
            let _ = self.seats.seats[index].orders.send(Order::Serve(handover));
        }
    }

    fn serve(&self, stream: TcpStream, arrival: Box<Arrival>, taken: Taken) {
        let server = self.server.clone();
        tokio::spawn(async move {
            // Created inside, because moving a future into another one stores it twice.
            server.connection(stream, arrival, Box::new(taken)).await;
        });
    }
}
