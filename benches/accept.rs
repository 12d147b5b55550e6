//! Ways for connections to reach workers, side by side. Who accepts gives each to the worker with the
//! fewest, where that is one thread for all or every worker at the same socket; with `SO_REUSEPORT`
//! each worker has a listener of its own, and the kernel chooses by a hash:
//!
//!     cargo bench --bench accept
//!
//! A model of the proxy with nothing in it but this choice: two workers, and requests that keep one
//! busy for as long as forwarding would. It prints the table of docs/performance.md.

// Sockets on loopback and threads of its own: what fails here fails for good.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
        mpsc as channel,
    },
    thread,
    time::Duration,
};

use socket2::{Domain, Socket, Type};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
    sync::mpsc,
    task::JoinSet,
    time::Instant,
};

const WORKERS: usize = 2;
/// What a request costs its worker, system calls apart.
const WORK: Duration = Duration::from_micros(20);
const ROUNDS: usize = 15;
const ROUND: Duration = Duration::from_millis(300);
/// A request and an answer, each sent whole.
const MESSAGE: [u8; 64] = [b'x'; 64];

fn main() {
    println!("{WORKERS} workers, {ROUNDS} rounds of {ROUND:?}; medians, and the worst round\n");
    println!(
        "| connections | way | on the busiest worker | requests/s | p99 ms | CPU us a request |\n\
         | --- | --- | --- | --- | --- | --- |"
    );
    let servers = [Way::Shared, Way::Acceptor, Way::ReusePort].map(Server::start);
    let runtime = runtime();
    for load in [Load::Kept(2), Load::Kept(8), Load::Kept(64), Load::Short(8)] {
        let mut rounds = servers.each_ref().map(|_| Vec::new());
        // In turns, so that all meet the same machine.
        for _ in 0..ROUNDS {
            for (server, rounds) in servers.iter().zip(&mut rounds) {
                rounds.push(runtime.block_on(round(server, load)));
            }
        }
        for (server, rounds) in servers.iter().zip(&rounds) {
            report(load, server.way, rounds);
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Load {
    /// So many connections, each with one request after the other.
    Kept(usize),
    /// So many clients, each with a new connection for every request.
    Short(usize),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// Every worker accepts from one socket.
    Shared,
    /// A thread of its own does.
    Acceptor,
    /// Every worker accepts from a socket of its own.
    ReusePort,
}

/// What happened in a round.
struct Round {
    /// Connections that the busiest worker got, of all.
    share: f64,
    rate: f64,
    p99: Duration,
    /// Of all the server's threads.
    cpu_per_request: f64,
}

async fn round(server: &Server, load: Load) -> Round {
    let before: Vec<usize> = server.served();
    let used = server.cpu();
    let started = Instant::now();
    let mut clients = JoinSet::new();
    let count = match load {
        Load::Kept(count) | Load::Short(count) => count,
    };
    for _ in 0..count {
        clients.spawn(client(server.address, started + ROUND, matches!(load, Load::Short(_))));
    }
    let mut latencies = clients.join_all().await.concat();
    let elapsed = started.elapsed();
    let used = server.cpu() - used;
    let got = server
        .served()
        .iter()
        .zip(&before)
        .map(|(after, before)| after - before)
        .collect::<Vec<_>>();
    latencies.sort_unstable();
    Round {
        share: *got.iter().max().unwrap() as f64 / got.iter().sum::<usize>() as f64,
        rate: latencies.len() as f64 / elapsed.as_secs_f64(),
        p99: latencies[latencies.len() * 99 / 100],
        cpu_per_request: used.as_secs_f64() * 1e6 / latencies.len() as f64,
    }
}

async fn client(server: SocketAddr, until: Instant, closes: bool) -> Vec<Duration> {
    let mut latencies = Vec::new();
    let mut kept = None;
    while Instant::now() < until {
        let begun = Instant::now();
        let mut stream = match kept.take() {
            Some(stream) => stream,
            None => connect(server).await,
        };
        stream.write_all(&MESSAGE).await.unwrap();
        stream.read_exact(&mut [0; MESSAGE.len()]).await.unwrap();
        latencies.push(begun.elapsed());
        kept = (!closes).then_some(stream);
    }
    latencies
}

async fn connect(server: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(server).await.unwrap();
    stream.set_nodelay(true).unwrap();
    // Closed by a reset: a port that waits for the last of its connection cannot be used again.
    stream.set_zero_linger().unwrap();
    stream
}

fn report(load: Load, way: Way, rounds: &[Round]) {
    let of = |figure: &dyn Fn(&Round) -> f64| {
        let mut figures: Vec<f64> = rounds.iter().map(figure).collect();
        figures.sort_unstable_by(f64::total_cmp);
        figures
    };
    let (shares, rates) = (of(&|round| round.share * 100.0), of(&|round| round.rate));
    let p99s = of(&|round| round.p99.as_secs_f64() * 1e3);
    let cpu = of(&|round| round.cpu_per_request);
    let (middle, last) = (rounds.len() / 2, rounds.len() - 1);
    let load = match load {
        Load::Kept(count) => format!("{count} kept"),
        Load::Short(count) => format!("{count} at a time, a request each"),
    };
    let way = match way {
        Way::Shared => "every worker, one socket",
        Way::Acceptor => "one thread",
        Way::ReusePort => "SO_REUSEPORT",
    };
    println!(
        "| {load} | {way} | {:.0}%, worst {:.0}% | {:.0}, worst {:.0} | {:.2}, worst {:.2} | {:.1} |",
        shares[middle],
        shares[last],
        rates[middle],
        rates[0],
        p99s[middle],
        p99s[last],
        cpu[middle],
    );
}

/// Workers that answer until the process ends.
struct Server {
    way: Way,
    address: SocketAddr,
    /// Connections that each worker has had.
    served: Vec<Arc<AtomicUsize>>,
    /// Its threads, as the kernel numbers them.
    threads: Vec<i32>,
}

impl Server {
    fn start(way: Way) -> Self {
        let first = listen((Ipv4Addr::LOCALHOST, 0).into());
        let address = first.local_addr().unwrap();
        let served: Vec<Arc<AtomicUsize>> = (0..WORKERS).map(|_| Arc::default()).collect();
        let (started, threads) = channel::channel();
        let begin = move |future: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| {
            let started = started.clone();
            thread::spawn(move || {
                started.send(nix::unistd::gettid().as_raw()).unwrap();
                runtime().block_on(future);
            });
            threads.recv().unwrap()
        };
        let mut numbers = Vec::new();
        match way {
            Way::ReusePort => {
                let others = (1..WORKERS).map(|_| listen(address)).collect::<Vec<_>>();
                for (listener, served) in [first].into_iter().chain(others).zip(&served) {
                    numbers.push(begin(Box::pin(accept_alone(listener, served.clone()))));
                }
            }
            Way::Shared | Way::Acceptor => {
                let (seats, queues): (Vec<Seat>, Vec<_>) = served.iter().map(Seat::new).unzip();
                for (own, queue) in queues.into_iter().enumerate() {
                    let (seat, seats) = (seats[own].clone(), seats.clone());
                    let socket = (way == Way::Shared).then(|| first.try_clone().unwrap());
                    numbers.push(begin(Box::pin(async move {
                        if let Some(socket) = socket {
                            tokio::spawn(accept_for_all(socket, seats, Some(own)));
                        }
                        work(queue, seat).await;
                    })));
                }
                if way == Way::Acceptor {
                    numbers.push(begin(Box::pin(accept_for_all(first, seats, None))));
                }
            }
        }
        Self { way, address, served, threads: numbers }
    }

    fn served(&self) -> Vec<usize> {
        self.served.iter().map(|served| served.load(Ordering::Relaxed)).collect()
    }

    /// What its threads have run, by the scheduler's clock.
    fn cpu(&self) -> Duration {
        let of_thread = |thread: &i32| {
            let path = format!("/proc/self/task/{thread}/schedstat");
            let text = fs::read_to_string(path).unwrap();
            text.split_whitespace().next().unwrap().parse().map(Duration::from_nanos).unwrap()
        };
        self.threads.iter().map(of_thread).sum()
    }
}

fn listen(address: SocketAddr) -> std::net::TcpListener {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_reuse_port(true).unwrap();
    socket.set_nonblocking(true).unwrap();
    socket.bind(&address.into()).unwrap();
    socket.listen(1024).unwrap();
    socket.into()
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

async fn accept_alone(listener: std::net::TcpListener, served: Arc<AtomicUsize>) {
    let listener = TcpListener::from_std(listener).unwrap();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        served.fetch_add(1, Ordering::Relaxed);
        tokio::spawn(serve(stream));
    }
}

/// A worker as those see it who give it connections.
#[derive(Clone)]
struct Seat {
    open: Arc<AtomicUsize>,
    served: Arc<AtomicUsize>,
    queue: mpsc::UnboundedSender<std::net::TcpStream>,
}

impl Seat {
    fn new(served: &Arc<AtomicUsize>) -> (Self, mpsc::UnboundedReceiver<std::net::TcpStream>) {
        let (queue, incoming) = mpsc::unbounded_channel();
        (Self { open: Arc::default(), served: served.clone(), queue }, incoming)
    }

    /// Serves a connection that was counted when it was given.
    fn take(&self, stream: TcpStream) {
        self.served.fetch_add(1, Ordering::Relaxed);
        let open = self.open.clone();
        tokio::spawn(async move {
            serve(stream).await;
            open.fetch_sub(1, Ordering::Relaxed);
        });
    }
}

/// Gives each to the worker with the fewest; that may be `own`, which needs no hand-over.
async fn accept_for_all(listener: std::net::TcpListener, seats: Vec<Seat>, own: Option<usize>) {
    let listener = TcpListener::from_std(listener).unwrap();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        stream.set_nodelay(true).unwrap();
        let load =
            |index: &usize| (seats[*index].open.load(Ordering::Relaxed), Some(*index) != own);
        let least = (0..seats.len()).min_by_key(load).unwrap();
        seats[least].open.fetch_add(1, Ordering::Relaxed);
        if Some(least) == own {
            seats[least].take(stream);
        } else {
            seats[least].queue.send(stream.into_std().unwrap()).unwrap();
        }
    }
}

async fn work(mut incoming: mpsc::UnboundedReceiver<std::net::TcpStream>, seat: Seat) {
    while let Some(stream) = incoming.recv().await {
        seat.take(TcpStream::from_std(stream).unwrap());
    }
}

async fn serve(mut stream: TcpStream) {
    let mut request = [0; MESSAGE.len()];
    while stream.read_exact(&mut request).await.is_ok() {
        let begun = Instant::now();
        while begun.elapsed() < WORK {
            std::hint::spin_loop();
        }
        if stream.write_all(&MESSAGE).await.is_err() {
            return;
        }
    }
}
