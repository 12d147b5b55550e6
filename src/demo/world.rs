//! The demo's world: the cluster's DNS, four origins, and a database in two regions, on a separate thread.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::mpsc,
    thread::{self, JoinHandle},
    time::Duration,
};

use tokio::{runtime, sync::oneshot};

use super::{
    authority::{Authority, AuthorityError, LeafOptions},
    database::{Database, Orders},
    dns::{self, DnsServer},
    origin::Origin,
    ports::{ListenError, listen_on_one_port},
};
use crate::{
    config::{self, Config},
    folder::PrivateFolder,
};

/// The name that the application uses.
pub const ALIAS: &str = "webscaler-manual";
/// The same name in the cluster's DNS.
pub const ALIAS_IN_DNS: &str = "webscaler-manual.default.svc.cluster.local";
/// The true name of the alias, and the only name in the origins' certificate.
pub const TRUE_NAME: &str = "httpbin.org";
/// The addresses of the true name in DNS.
pub const ADDRESSES: [IpAddr; 4] = [
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, 11)),
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, 12)),
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, 13)),
    IpAddr::V4(Ipv4Addr::new(127, 0, 0, 14)),
];
/// The name that the application uses for its database.
pub const DATABASE: &str = "webscaler-db";
/// The same name in the cluster's DNS.
pub const DATABASE_IN_DNS: &str = "webscaler-db.default.svc.cluster.local";
/// The regions of the database.
pub const REGIONS: [Region; 2] = [
    Region { name: "eu", true_name: "db-eu.example.com", address: Ipv4Addr::new(127, 0, 0, 21) },
    Region { name: "us", true_name: "db-us.example.com", address: Ipv4Addr::new(127, 0, 0, 22) },
];
/// The TTL that CoreDNS uses for an `ExternalName`.
const TTL: u32 = 5;
/// That of the database's names, so that nobody waits for the move.
const DATABASE_TTL: u32 = 1;

/// A region of the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// What it says when it is asked.
    pub name: &'static str,
    /// The only name in its server's certificate.
    pub true_name: &'static str,
    /// The server's address.
    pub address: Ipv4Addr,
}

/// The running world. Dropping it stops it and removes its folder.
#[derive(Debug)]
pub struct World {
    inhabitants: Inhabitants,
    folder: PrivateFolder,
    root_file: PathBuf,
    config_file: PathBuf,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Inhabitants {
    dns: DnsServer,
    authority: Authority,
    origins: Vec<Origin>,
    port: u16,
    databases: Vec<Database>,
    orders: Orders,
}

impl World {
    /// Starts DNS and origins on free ports, and returns when all of them listen.
    pub fn start() -> Result<Self, WorldError> {
        let (stop, stopped) = oneshot::channel();
        let (started, starting) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("demo-world".to_owned())
            .spawn(move || live(&started, stopped))
            .map_err(WorldError::Thread)?;
        let inhabitants = starting.recv().map_err(|_| WorldError::Ended)??;

        let folder = PrivateFolder::create().map_err(WorldError::Folder)?;
        let root_file = folder
            .write("root.pem", inhabitants.authority.root_pem())
            .map_err(WorldError::Folder)?;
        let mut world = Self {
            inhabitants,
            folder,
            root_file,
            config_file: PathBuf::new(),
            stop: Some(stop),
            thread: Some(thread),
        };
        // For `truename exec`, which uses a part of it.
        let config = world.config().to_yaml();
        world.config_file =
            world.folder.write("truename.yaml", &config).map_err(WorldError::Folder)?;
        Ok(world)
    }

    /// The cluster's DNS.
    pub fn dns(&self) -> &DnsServer {
        &self.inhabitants.dns
    }

    /// The issuer of the origins' certificate.
    pub fn authority(&self) -> &Authority {
        &self.inhabitants.authority
    }

    /// The authority's root, as a file.
    pub fn root_file(&self) -> &Path {
        &self.root_file
    }

    /// [`config`](Self::config), as a file.
    pub fn config_file(&self) -> &Path {
        &self.config_file
    }

    /// The folder of the local authority of a proxy in this world.
    pub fn authority_folder(&self) -> PathBuf {
        self.folder.path().join("truename")
    }

    /// The origins, in the order of [`ADDRESSES`].
    pub fn origins(&self) -> &[Origin] {
        &self.inhabitants.origins
    }

    /// The port of all origins.
    pub fn port(&self) -> u16 {
        self.inhabitants.port
    }

    /// The port of the database's servers.
    pub fn database_port(&self) -> u16 {
        self.inhabitants.databases.first().map_or(0, |database| database.address().port())
    }

    /// What has been written to the database.
    pub fn orders(&self) -> &Orders {
        &self.inhabitants.orders
    }

    /// Lets the alias of the database lead to this region.
    pub fn move_database(&self, region: Region) {
        self.dns().zone([dns::cname(DATABASE_IN_DNS, DATABASE_TTL, region.true_name)]);
    }

    /// The configuration of a proxy in this world: one alias for HTTP and one for the database, on free ports.
    pub fn config(&self) -> Config {
        let alias = |name: &str, listen: Ipv4Addr, port: u16| {
            let mut alias = config::Alias::named(name);
            alias.listen = vec![SocketAddr::from((listen, 0))];
            alias.port = port;
            alias.tls.ca =
                config::Trust { system: false, webpki: false, files: vec![self.root_file.clone()] };
            alias
        };
        let mut database = alias(DATABASE, Ipv4Addr::new(127, 0, 1, 1), self.database_port());
        database.protocol = config::Protocol::Postgres;
        database.timeouts.idle = config::NEVER;

        let aliases = vec![alias(ALIAS, Ipv4Addr::LOCALHOST, self.port()), database];
        let mut config = Config { aliases, ..Config::default() };
        config.dns.min_ttl = Duration::from_secs(DATABASE_TTL.into());
        config.dns.servers = vec![self.dns().address().into()];
        config.dns.cluster_domain = Some("cluster.local".to_owned());
        config.dns.namespace = Some("default".to_owned());
        // Loopback addresses from DNS are denied by default.
        let loopback = ipnet::Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8);
        config.policy.allow_addresses = vec![loopback.into()];
        config.proxy.listen = Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        config.ca.directory = Some(self.authority_folder());
        config.admin.listen = None;
        // Ctrl-C need not wait for connections.
        config.shutdown_grace = Duration::from_secs(1);
        config
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // The thread may have ended already.
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn live(started: &mpsc::Sender<Result<Inhabitants, WorldError>>, stopped: oneshot::Receiver<()>) {
    let runtime = runtime::Builder::new_current_thread().enable_all().build();
    // The caller waits for this message, so the send cannot fail.
    let _ = match runtime {
        Err(error) => started.send(Err(WorldError::Thread(error))),
        Ok(runtime) => runtime.block_on(async {
            let sent = started.send(settle().await);
            // An error also means that the world was dropped.
            let _ = stopped.await;
            sent
        }),
    };
}

async fn settle() -> Result<Inhabitants, WorldError> {
    let dns = DnsServer::start((Ipv4Addr::LOCALHOST, 0).into()).await.map_err(WorldError::Dns)?;
    dns.zone([dns::cname(ALIAS_IN_DNS, TTL, TRUE_NAME)]);
    dns.zone(ADDRESSES.map(|ip| dns::address(TRUE_NAME, TTL, ip)));

    let authority = Authority::new("truename demo root")?;
    let leaf = authority.issue(&[TRUE_NAME], &[], LeafOptions::default())?;
    let tls = leaf.server_config(&["h2", "http/1.1"])?;
    let mut origins = Vec::with_capacity(ADDRESSES.len());
    for listener in listen_on_one_port(&ADDRESSES)? {
        origins.push(Origin::serve(listener, tls.clone()).map_err(WorldError::Origin)?);
    }
    let port = origins.first().map_or(0, |origin| origin.address().port());

    dns.zone([dns::cname(DATABASE_IN_DNS, DATABASE_TTL, REGIONS[0].true_name)]);
    let orders = Orders::default();
    let mut databases = Vec::with_capacity(REGIONS.len());
    let addresses = REGIONS.map(|region| region.address.into());
    for (region, listener) in REGIONS.iter().zip(listen_on_one_port(&addresses)?) {
        dns.zone([dns::address(region.true_name, DATABASE_TTL, region.address)]);
        let leaf = authority.issue(&[region.true_name], &[], LeafOptions::default())?;
        let database =
            Database::serve(listener, leaf.server_config(&[])?, region.name, orders.clone());
        databases.push(database.map_err(WorldError::Origin)?);
    }
    Ok(Inhabitants { dns, authority, origins, port, databases, orders })
}

/// Why the world could not start.
#[derive(Debug, thiserror::Error)]
pub enum WorldError {
    /// The addresses of the origins.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The certificate.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// An origin or a database on a bound listener.
    #[error("cannot serve an origin: {0}")]
    Origin(io::Error),
    /// The DNS server.
    #[error("cannot serve DNS on a free port of 127.0.0.1: {0}")]
    Dns(io::Error),
    /// The folder for the root certificate.
    #[error("cannot keep the demo's root certificate in a temporary folder: {0}; set TMPDIR")]
    Folder(io::Error),
    /// The thread, or the runtime on it.
    #[error("cannot start a thread for the demo's world: {0}")]
    Thread(io::Error),
    /// The thread ended without an error.
    #[error("the thread of the demo's world ended before it had started")]
    Ended,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proxy_of_this_world_trusts_and_asks_nobody_else() {
        let world = World::start().unwrap();
        let config = world.config();
        config.validate("the demo").unwrap();

        let trust = &config.aliases[0].tls.ca;
        assert!(!trust.system && !trust.webpki);
        assert_eq!(trust.files, [world.root_file()]);
        assert_eq!(config.dns.servers, [world.dns().address().into()]);
    }

    #[test]
    fn a_world_that_ends_frees_its_ports_and_its_folder() {
        let world = World::start().unwrap();
        let (port, root) = (world.port(), world.root_file().to_owned());
        let database_port = world.database_port();
        drop(world);

        assert!(!root.exists());
        let origins = ADDRESSES.map(|ip| (ip, port));
        let databases = REGIONS.map(|region| (region.address.into(), database_port));
        for server in origins.into_iter().chain(databases) {
            let gone = std::net::TcpStream::connect(server).unwrap_err();
            assert_eq!(gone.kind(), io::ErrorKind::ConnectionRefused);
        }
    }
}
