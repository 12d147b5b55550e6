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

/// A file that has changed is read again after this long. Its contents count once two reads agree.
const SETTLE: Duration = Duration::from_millis(100);
/// The most reads of a file that keeps changing, per lookup.
const MAX_LOOKS: usize = 5;
/// How long lookups wait for a file on a volume that does not respond. Then they use its previous contents.
const READ_TIMEOUT: Duration = Duration::from_secs(1);
/// The rest of a larger file is not read.
const MAX_SIZE: u64 = 64 * 1024;

/// The file that provides what the configuration does not set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvConf {
    /// Its path.
    pub path: PathBuf,
    /// The port of its servers, because its lines have none.
    pub port: u16,
}

impl Default for ResolvConf {
    fn default() -> ResolvConf {
        ResolvConf { path: PathBuf::from("/etc/resolv.conf"), port: 53 }
    }
}

/// Where names are resolved: the servers, and what completes a bare alias.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment {
    /// In the order in which they are tried.
    pub servers: Vec<SocketAddr>,
    /// The namespace of a bare alias.
    pub namespace: String,
    /// Folded; `cluster.local` by default.
    pub cluster_domain: String,
    /// Set if namespace and cluster domain are not known, because the file that exists cannot be read. The names above
    /// are then those of another tenant.
    pub unknown: Option<Unknown>,
    /// Whether that concerns the cluster domain, and not only the namespace of bare aliases.
    is_domain_unknown: bool,
}

/// The file that has the namespace, but cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{} cannot be read: {reason}", .file.display())]
pub struct Unknown {
    /// The file.
    pub file: PathBuf,
    /// The reason.
    pub reason: String,
}

impl Environment {
    fn new(dns: &config::Dns, reading: Reading, unknown: Option<Unknown>) -> Environment {
        let (namespace, domain) =
            reading.cluster.unwrap_or_else(|| ("default".into(), "cluster.local".into()));
        Environment {
            servers: match dns.servers.as_slice() {
                [] => reading.servers,
                configured => configured.iter().map(address).collect(),
            },
            namespace: dns.namespace.as_deref().map_or(namespace, fold),
            cluster_domain: dns.cluster_domain.as_deref().map_or(domain, fold),
            is_domain_unknown: unknown.is_some() && dns.cluster_domain.is_none(),
            unknown: unknown.filter(|_| dns.namespace.is_none() || dns.cluster_domain.is_none()),
        }
    }

    /// Whether both complete a bare alias in the same way.
    pub fn completes_like(&self, other: &Environment) -> bool {
        (&self.namespace, &self.cluster_domain) == (&other.namespace, &other.cluster_domain)
    }

    /// Why it is not known what completes `name`.
    pub fn unknown_of(&self, name: &str) -> Option<&Unknown> {
        let is_bare = !fold(name).contains('.');
        self.unknown.as_ref().filter(|_| is_bare || self.is_domain_unknown)
    }

    /// The name to query, without the trailing dot: see [`absolute`].
    pub fn absolute(&self, alias: &str) -> String {
        absolute(alias, &self.namespace, &self.cluster_domain)
    }
}

/// Reads resolv.conf repeatedly, and remembers its contents.
///
/// **Invariant:** a value that the file once had is never lost because the file no longer has one: another namespace
/// belongs to another tenant. If the file cannot be read, is empty, or lacks the search list or the servers, the
/// previous ones stay in use. Only another search list or other servers replace them.
#[derive(Debug)]
pub struct Source {
    file: ResolvConf,
    known: Mutex<Known>,
    /// Held while the file is read. So at most one read can hang.
    pending: sync::Mutex<Option<Pending>>,
    /// What is known has changed.
    changes: sync::watch::Sender<()>,
}

/// The file is being read on another thread.
#[derive(Debug)]
struct Pending {
    text: oneshot::Receiver<io::Result<Vec<u8>>>,
    deadline: Instant,
}

#[derive(Debug, Default)]
struct Known {
    /// `None` before the file has been read with any usable contents.
    reading: Option<Reading>,
    is_unreadable: bool,
    /// Why the file, which exists, has not been read yet.
    unknown: Option<Unknown>,
}

/// The relevant contents of the file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Reading {
    servers: Vec<SocketAddr>,
    /// Namespace and domain from the search list.
    cluster: Option<(String, String)>,
}

impl Source {
    /// Reads nothing yet.
    pub fn new(file: ResolvConf) -> Source {
        Source {
            file,
            known: Mutex::default(),
            pending: sync::Mutex::default(),
            changes: sync::watch::Sender::default(),
        }
    }

    /// The environment as far as it is known. Reads the file only if nothing is known of it and the configuration needs
    /// it; in that case, this blocks.
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

    /// Waits until bare aliases are completed differently than by `before`. Reads nothing.
    pub async fn moved_from(&self, before: &Environment, dns: &config::Dns) {
        let mut changes = self.changes.subscribe();
        while self.environment(dns).completes_like(before) && changes.changed().await.is_ok() {}
    }

    /// The current environment. The file is small, and is read each time, so that no change is missed. After a change it
    /// is read until two reads agree, because it may be half-written.
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
        let known = self.known.lock();
        Environment::new(dns, known.reading.clone().unwrap_or_default(), known.unknown.clone())
    }

    /// Reads the file without blocking this thread. If a read hangs, only the first lookups wait for it, and the file is
    /// not read again until that read has ended.
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

    /// Takes another read. Returns whether it agrees with the previous one, or has no usable contents.
    fn is_settled(&self, text: io::Result<Vec<u8>>, before: &mut Option<Reading>) -> bool {
        let Some(now) = self.look(text) else { return true };
        if before.as_ref().is_some_and(|before| *before != now) {
            *before = Some(now);
            return false;
        }
        self.know(now);
        true
    }

    /// The file's current contents, completed from the previous ones. `None` if there is nothing usable.
    fn look(&self, text: io::Result<Vec<u8>>) -> Option<Reading> {
        let mut known = self.known.lock();
        let text = match text {
            Ok(text) => text,
            Err(error) => {
                // It may be missing if everything is configured.
                let is_missing = error.kind() == io::ErrorKind::NotFound;
                if !known.is_unreadable && (known.reading.is_some() || !is_missing) {
                    tracing::warn!(
                        file = %self.file.path.display(), %error,
                        "resolv.conf cannot be read; {}",
                        match known.reading {
                            Some(_) => "its previous contents stay in use",
                            None => "aliases in its namespace cannot be resolved",
                        }
                    );
                }
                known.is_unreadable = true;
                known.unknown = (known.reading.is_none() && !is_missing)
                    .then(|| Unknown { file: self.file.path.clone(), reason: error.to_string() });
                return None;
            }
        };
        known.is_unreadable = false;
        known.unknown = None;
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
    /// On its own thread: those of the runtime may all be busy, and tokio panics if it cannot start another one.
    fn begin(path: PathBuf) -> io::Result<Pending> {
        let (done, text) = oneshot::channel();
        thread::Builder::new().name("resolv.conf".into()).spawn(move || {
            // If the resolver is gone, nothing waits for this.
            let _ = done.send(read(&path));
        })?;
        Ok(Pending { text, deadline: Instant::now() + READ_TIMEOUT })
    }
}

impl Reading {
    /// Parses the relevant lines as glibc does: the last of several search lists counts, and an invalid line does not
    /// affect the others.
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

/// Whether the configuration leaves anything to the file.
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

/// The address of a configured server, with the current interfaces.
fn address(server: &config::NameServer) -> SocketAddr {
    match (&server.interface, server.address) {
        (Some(interface), SocketAddr::V6(v6)) => through(*v6.ip(), v6.port(), interface),
        _ => server.address,
    }
}

/// `ip`, reached through an interface of this machine. If there is no such interface, the socket reports the error.
fn through(ip: Ipv6Addr, port: u16, interface: &str) -> SocketAddr {
    let number = || interface.parse().ok().or_else(|| if_nametoindex(interface).ok());
    let scope_id = if ip.is_unicast_link_local() { number().unwrap_or(0) } else { 0 };
    SocketAddrV6::new(ip, port, 0, scope_id).into()
}

/// Namespace and domain of a search list entry `<ns>.svc.<domain>`. `None` if it is not a valid DNS name.
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
