//! Where names are resolved: the configuration, completed from resolv.conf.

use super::names::{absolute, fold};
use crate::{config, files::reading};
use nix::net::if_::if_nametoindex;
use parking_lot::Mutex;
use std::{
    fs::File,
    io::{self, Read},
    net::{Ipv6Addr, SocketAddr, SocketAddrV6},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};
use tokio::{
    sync::{self, oneshot},
    time::{Instant, sleep, timeout_at},
};

/// A file that is being written is looked at again after this long: two looks that agree are believed.
const SETTLE: Duration = Duration::from_millis(100);
/// Looks at a file that changes all the time, for one lookup.
const MAX_LOOKS: usize = 5;
/// How long lookups wait for a file on a volume that does not respond; then what it said before holds.
const READ_TIMEOUT: Duration = Duration::from_secs(1);
/// Of a larger file, what stands behind this is not read.
const MAX_SIZE: u64 = 64 * 1024;

/// The file that says what the configuration leaves open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvConf {
    /// Where it is.
    pub path: PathBuf,
    /// The port of its servers, as its lines have none.
    pub port: u16,
}

impl Default for ResolvConf {
    fn default() -> ResolvConf {
        ResolvConf { path: PathBuf::from("/etc/resolv.conf"), port: 53 }
    }
}

/// Where names are resolved: the servers, and what a bare alias is completed with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment {
    /// In the order in which they are tried.
    pub servers: Vec<SocketAddr>,
    /// The namespace of a bare alias.
    pub namespace: String,
    /// Folded; `cluster.local` unless something else is configured.
    pub cluster_domain: String,
}

impl Environment {
    fn new(dns: &config::Dns, reading: Reading) -> Environment {
        let (namespace, domain) =
            reading.cluster.unwrap_or_else(|| ("default".into(), "cluster.local".into()));
        Environment {
            servers: match dns.servers.as_slice() {
                [] => reading.servers,
                configured => configured.iter().map(address).collect(),
            },
            namespace: dns.namespace.as_deref().map_or(namespace, fold),
            cluster_domain: dns.cluster_domain.as_deref().map_or(domain, fold),
        }
    }

    /// Whether a bare alias is completed in the same way.
    pub fn completes_like(&self, other: &Environment) -> bool {
        (&self.namespace, &self.cluster_domain) == (&other.namespace, &other.cluster_domain)
    }

    /// The name that DNS is asked for, without the trailing dot: see [`absolute`].
    pub fn absolute(&self, alias: &str) -> String {
        absolute(alias, &self.namespace, &self.cluster_domain)
    }
}

/// Reads resolv.conf time and again, and remembers what it said.
///
/// **Invariant:** what a file once said is never taken back by one that says nothing: another namespace is another
/// tenant's. A file that cannot be read, is empty or lacks the search list or the servers keeps what it lacks; only
/// another search list and other servers replace them.
#[derive(Debug)]
pub struct Source {
    file: ResolvConf,
    known: Mutex<Known>,
    /// Held while the file is read. One read that does not come back is all that there is.
    pending: sync::Mutex<Option<Pending>>,
    /// Something else is known than before.
    changes: sync::watch::Sender<()>,
}

/// The file is being read, on another thread.
#[derive(Debug)]
struct Pending {
    text: oneshot::Receiver<io::Result<Vec<u8>>>,
    deadline: Instant,
}

#[derive(Debug, Default)]
struct Known {
    /// None before the file has said anything.
    reading: Option<Reading>,
    is_unreadable: bool,
}

/// What the file says, as far as it matters here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Reading {
    servers: Vec<SocketAddr>,
    /// Namespace and domain of the search list.
    cluster: Option<(String, String)>,
}

impl Source {
    /// Nothing is read yet.
    pub fn new(file: ResolvConf) -> Source {
        Source {
            file,
            known: Mutex::default(),
            pending: sync::Mutex::default(),
            changes: sync::watch::Sender::default(),
        }
    }

    /// As it is known now. Reads the file only if nothing is known, and the configuration leaves something open: then
    /// this blocks.
    pub fn known(&self, dns: &config::Dns) -> Environment {
        let is_unknown = self.known.lock().reading.is_none();
        if is_unknown && is_needed(dns) {
            let text = read(&self.file.path);
            if let Some(first) = self.look(text) {
                self.know(first);
            }
        }
        self.environment(dns)
    }

    /// Waits until a bare alias is completed otherwise than in `before`. Reads nothing.
    pub async fn moved_from(&self, before: &Environment, dns: &config::Dns) {
        let mut changes = self.changes.subscribe();
        while self.environment(dns).completes_like(before) && changes.changed().await.is_ok() {}
    }

    /// As it is now. The file is small and read anew each time, so that a change is never missed; one that changed is
    /// read until two looks agree, for it may be half-written.
    pub async fn read(&self, dns: &config::Dns) -> Environment {
        if is_needed(dns) {
            let mut before = self.known.lock().reading.clone();
            for _ in 0..MAX_LOOKS {
                let text = self.text().await;
                if self.is_settled(text, &mut before) {
                    break;
                }
                sleep(SETTLE).await;
            }
        }
        self.environment(dns)
    }

    fn environment(&self, dns: &config::Dns) -> Environment {
        Environment::new(dns, self.known.lock().reading.clone().unwrap_or_default())
    }

    /// Reads the file without blocking this thread. A read that hangs is waited for once, not by each lookup, and the
    /// file is not read again before it has ended.
    async fn text(&self) -> io::Result<Vec<u8>> {
        let mut pending = self.pending.lock().await;
        let read = match &mut *pending {
            Some(read) => read,
            None => pending.insert(Pending::begin(self.file.path.clone())?),
        };
        let Ok(text) = timeout_at(read.deadline, &mut read.text).await else {
            let reason = "the volume or pipe it is on does not respond";
            return Err(io::Error::new(io::ErrorKind::TimedOut, reason));
        };
        *pending = None;
        text.unwrap_or_else(|_| Err(io::Error::other("the thread that reads it has panicked")))
    }

    /// Looks once more: whether the file says what it said at the look before, or nothing.
    fn is_settled(&self, text: io::Result<Vec<u8>>, before: &mut Option<Reading>) -> bool {
        let Some(now) = self.look(text) else { return true };
        if before.as_ref().is_some_and(|before| *before != now) {
            *before = Some(now);
            return false;
        }
        self.know(now);
        true
    }

    /// What the file says now, completed by what it said before; none if it says nothing.
    fn look(&self, text: io::Result<Vec<u8>>) -> Option<Reading> {
        let mut known = self.known.lock();
        let text = match text {
            Ok(text) => text,
            Err(error) => {
                // One that is not there is no fault where everything is configured.
                let is_missing = error.kind() == io::ErrorKind::NotFound;
                if !known.is_unreadable && (known.reading.is_some() || !is_missing) {
                    tracing::warn!(file = %self.file.path.display(), %error, "resolv.conf cannot be read; what it said before still holds");
                }
                known.is_unreadable = true;
                return None;
            }
        };
        known.is_unreadable = false;
        let mut reading = Reading::parse(&text, self.file.port);
        if let Some(before) = &known.reading {
            if reading.servers.is_empty() {
                reading.servers.clone_from(&before.servers);
            }
            reading.cluster = reading.cluster.or_else(|| before.cluster.clone());
        }
        Some(reading).filter(|reading| *reading != Reading::default())
    }

    fn know(&self, reading: Reading) {
        let mut known = self.known.lock();
        if known.reading.as_ref().is_some_and(|before| *before != reading) {
            let file = self.file.path.display();
            let search = reading.cluster.as_ref().map(|(ns, domain)| format!("{ns}.svc.{domain}"));
            tracing::info!(%file, servers = ?reading.servers, search, "resolv.conf has changed");
        }
        known.reading = Some(reading);
        drop(known);
        self.changes.send_replace(());
    }
}

impl Pending {
    /// On a thread of its own: those of the runtime may all be busy, and tokio panics where it can start none.
    fn begin(path: PathBuf) -> io::Result<Pending> {
        let (done, text) = oneshot::channel();
        thread::Builder::new().name("resolv.conf".into()).spawn(move || {
            // Nobody waits any longer where the resolver is gone.
            let _ = done.send(read(&path));
        })?;
        Ok(Pending { text, deadline: Instant::now() + READ_TIMEOUT })
    }
}

impl Reading {
    /// Of the lines that matter, as glibc understands them: of several search lists the last counts, and a line that
    /// cannot be understood does not spoil the others.
    fn parse(text: &[u8], port: u16) -> Reading {
        let text = String::from_utf8_lossy(text);
        let mut servers = Vec::new();
        let mut search = Vec::new();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            match words.next() {
                Some("nameserver") => {
                    servers.extend(words.next().and_then(|word| server(word, port)));
                }
                Some("search" | "domain") => search = words.collect(),
                _ => {}
            }
        }
        Reading { servers, cluster: search.into_iter().find_map(cluster_search) }
    }
}

/// Whether the configuration leaves anything open that the file says.
fn is_needed(dns: &config::Dns) -> bool {
    dns.servers.is_empty() || dns.namespace.is_none() || dns.cluster_domain.is_none()
}

fn read(path: &Path) -> io::Result<Vec<u8>> {
    let _reading = reading(path);
    let mut text = Vec::new();
    File::open(path)?.take(MAX_SIZE).read_to_end(&mut text)?;
    Ok(text)
}

fn server(word: &str, port: u16) -> Option<SocketAddr> {
    let Some((ip, scope)) = word.split_once('%') else {
        return Some(SocketAddr::new(word.parse().ok()?, port));
    };
    let ip: Ipv6Addr = ip.parse().ok()?;
    Some(through(ip, port, scope))
}

/// The address of a configured server, by the interfaces that there are now.
fn address(server: &config::NameServer) -> SocketAddr {
    match (&server.interface, server.address) {
        (Some(interface), SocketAddr::V6(v6)) => through(*v6.ip(), v6.port(), interface),
        _ => server.address,
    }
}

/// `ip`, reached by an interface of this machine. Without one that exists, the socket's error says so.
fn through(ip: Ipv6Addr, port: u16, interface: &str) -> SocketAddr {
    let number = || interface.parse().ok().or_else(|| if_nametoindex(interface).ok());
    let scope_id = if ip.is_unicast_link_local() { number().unwrap_or(0) } else { 0 };
    SocketAddrV6::new(ip, port, 0, scope_id).into()
}

/// Namespace and domain of a search list's `<ns>.svc.<domain>`; none where DNS cannot be asked for such a name.
fn cluster_search(entry: &str) -> Option<(String, String)> {
    let entry = fold(entry);
    let (namespace, rest) = entry.split_once('.')?;
    let domain = rest.strip_prefix("svc.")?;
    let is_label = |label: &str| {
        let letter = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        !label.is_empty() && label.chars().all(letter)
    };
    let usable = entry.split('.').all(is_label);
    usable.then(|| (namespace.to_owned(), domain.to_owned()))
}

#[cfg(test)]
mod tests;
