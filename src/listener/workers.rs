//! The workers: a thread each, with a runtime of its own.
//!
//! Every worker waits at every socket, and whoever is awake first accepts: no thread, no hop and
//! no second registration stand between a connection and its worker. Who accepts is not who serves,
//! though: a connection goes to the worker that has the fewest, which is the accepting one unless
//! another has fewer. With `SO_REUSEPORT` the kernel would decide by a hash, and few connections
//! could all meet on one worker.

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

/// What a worker is told.
enum Order {
    /// To accept on this socket, with the others, until it is to close.
    Accept(Arc<Bound>),
    /// To serve what another has accepted.
    Serve(Dispatched),
}

/// A connection on its way to a worker.
struct Dispatched {
    stream: std::net::TcpStream,
    arrival: Box<Arrival>,
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

/// The workers' threads.
pub struct Workers {
    seats: Arc<Seats>,
    closed: CancellationToken,
}

impl Workers {
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

    /// Has them accept on a socket until it is to close.
    pub fn accept(&self, bound: &Arc<Bound>) {
        for seat in &self.seats.seats {
            // The threads are there until this is dropped, or the whole proxy stops.
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

    /// Waits until there may be another connection; `None` where the proxy has ended.
    pub(super) async fn permit(&self) -> Option<OwnedSemaphorePermit> {
        self.seats.limit.clone().acquire_owned().await.ok()
    }

    /// Serves a new connection, or has it served.
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
            // Made in here, as a future that is moved into another is kept twice.
            server.connection(stream, arrival, Box::new(taken)).await;
        });
    }
}
