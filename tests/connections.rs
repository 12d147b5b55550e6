//! Connections are spread over the workers: each goes to the one that has the fewest.
//!
//! What a worker has is read from the kernel: the sockets that its epoll instance watches. No
//! metric tells it, and none needs to.

use std::{collections::BTreeSet, fs, net::SocketAddr, slice};

use crate::support::{
    client,
    peer::Peer,
    proxy::Proxy,
    raw_origin::RawOrigin,
    scene::{ALIAS, Scene},
    scripts, within,
};

const ACTIVE: &str = "truename_downstream_connections_active{alias=\"webscaler-manual\"}";

/// The numbers that the kernel gives sockets.
type Sockets = BTreeSet<u64>;

#[tokio::test]
async fn each_connection_goes_to_the_worker_that_has_the_fewest() {
    for workers in [2, 3] {
        let stage = Stage::new(workers).await;
        let mut clients = Vec::new();
        for connections in [2, 8, 64] {
            clients.extend(stage.connect(connections - clients.len()).await);
            let shares = stage.shares(&clients);
            let (fewest, most) = (shares[0], shares[workers - 1]);
            let spread = format!("{connections} connections over {workers} workers: {shares:?}");
            assert_eq!(shares.iter().sum::<usize>(), connections, "{spread}");
            assert!(most - fewest <= 1, "{spread}");
        }
    }
}

#[tokio::test]
async fn connections_that_close_make_room_on_their_worker() {
    let stage = Stage::new(2).await;
    let clients = stage.connect(8).await;
    let one = stage.by_worker(&clients).pop_first().unwrap();
    let is_of_one = |client: &Peer| one.is_superset(&stage.sockets(slice::from_ref(client)));
    let (mut closing, mut clients): (Vec<Peer>, Vec<Peer>) =
        clients.into_iter().partition(is_of_one);
    clients.extend(closing.pop());
    stage.close(closing, &mut clients).await;
    assert_eq!(stage.shares(&clients), [1, 4]);

    clients.extend(stage.connect(3).await);
    assert_eq!(stage.shares(&clients), [4, 4]);
}

#[tokio::test]
async fn short_connections_do_not_upset_the_balance_of_long_ones() {
    let stage = Stage::new(2).await;
    let mut clients = stage.connect(2).await;
    for _ in 0..20 {
        let passing = stage.connect(1).await;
        stage.close(passing, &mut clients).await;
    }
    clients.extend(stage.connect(6).await);
    assert_eq!(stage.shares(&clients), [4, 4]);
}

/// A proxy with so many workers, and an origin.
struct Stage {
    proxy: Proxy,
    address: SocketAddr,
    workers: usize,
    _origins: Vec<RawOrigin>,
    _scene: Scene,
}

impl Stage {
    async fn new(workers: usize) -> Self {
        let mut scene = Scene::new(1).await;
        let origins = scene.script(scripts::respond);
        let proxy = Proxy::start(&format!("{}workers: {workers}\n", scene.yaml(""))).await;
        let address = proxy.address(ALIAS).await;
        Self { proxy, address, workers, _origins: origins, _scene: scene }
    }

    /// Connections with a response each, so that they have arrived at their workers.
    async fn connect(&self, count: usize) -> Vec<Peer> {
        let mut clients = Vec::with_capacity(count);
        for _ in 0..count {
            let mut client = client::connect(self.address).await;
            ask(&mut client).await;
            clients.push(client);
        }
        clients
    }

    /// Closes some, and returns when their workers have taken note. `others` are all that stay.
    async fn close(&self, clients: Vec<Peer>, others: &mut [Peer]) {
        drop(clients);
        within("the proxy to close its ends", async {
            while self.proxy.metric(ACTIVE).await != Some(others.len() as f64) {
                tokio::task::yield_now().await;
            }
        })
        .await;
        // A worker that responds has finished what it did before.
        for other in others {
            ask(other).await;
        }
    }

    /// How many of the connections each worker has, the fewest first.
    fn shares(&self, clients: &[Peer]) -> Vec<usize> {
        let mut shares: Vec<usize> = self.by_worker(clients).iter().map(Sockets::len).collect();
        // A worker without any of them is not to be seen.
        shares.resize(self.workers.max(shares.len()), 0);
        shares.sort_unstable();
        shares
    }

    /// The proxy's ends of the connections, as its epoll instances have them.
    fn by_worker(&self, clients: &[Peer]) -> BTreeSet<Sockets> {
        let sockets = self.sockets(clients);
        assert_eq!(sockets.len(), clients.len(), "every connection is open");
        let folder = format!("/proc/{}/fdinfo", self.proxy.pid());
        let files = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        // A file descriptor may close while it is looked at. An instance has two of them.
        let instances = files.filter_map(|file| fs::read_to_string(file).ok());
        let watched = instances.map(|text| {
            let inodes = text.lines().filter(|line| line.starts_with("tfd:")).map(|line| {
                let (_, inode) = line.split_once("ino:").unwrap();
                u64::from_str_radix(inode.split_whitespace().next().unwrap(), 16).unwrap()
            });
            inodes.filter(|inode| sockets.contains(inode)).collect::<Sockets>()
        });
        watched.filter(|watched| !watched.is_empty()).collect()
    }

    /// The proxy's ends of the connections.
    fn sockets(&self, clients: &[Peer]) -> Sockets {
        let own = in_proc(self.address);
        let others: BTreeSet<String> = clients.iter().map(|peer| in_proc(peer.address())).collect();
        let table = fs::read_to_string(format!("/proc/{}/net/tcp", self.proxy.pid())).unwrap();
        let of_line = |line: &str| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let found = fields.get(1)? == &own && others.contains(*fields.get(2)?);
            found.then(|| fields[9].parse().unwrap())
        };
        table.lines().filter_map(of_line).collect()
    }
}

async fn ask(client: &mut Peer) {
    client.send(format!("GET / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    assert_eq!(client.response().await.text(), "ok");
}

/// An address as `/proc/net/tcp` writes it.
fn in_proc(address: SocketAddr) -> String {
    let SocketAddr::V4(address) = address else { panic!("{address} is not IPv4") };
    format!("{:08X}:{:04X}", u32::from_ne_bytes(address.ip().octets()), address.port())
}
