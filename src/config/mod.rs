//! The configuration: plain data, validated once at the edge.

mod alias;
mod argument;
mod form;
mod names;
mod process;
mod table;
mod tls;

use std::time::Duration;

pub use alias::*;
pub use argument::ArgumentError;
pub use names::{BadName, BadTarget, NamePattern, Target, TargetHost, normal_name};
pub use process::*;
pub use tls::*;

use form::*;
use table::{default_sections, section};

section! {
    /// The whole configuration.
    pub struct Config {
        /// The aliases.
        aliases: Vec<Alias> as List<Sub<Alias>> = Vec::new(),
        /// What all listeners have in common.
        listener: Listener as Sub<Listener> = Listener::default(),
        /// The HTTP forward proxy.
        proxy: ForwardProxy as Sub<ForwardProxy> = ForwardProxy::default(),
        /// How names are looked up.
        dns: Dns as Sub<Dns> = Dns::default(),
        /// Which addresses a target may have.
        policy: Policy as Sub<Policy> = Policy::default(),
        /// Talking to the Kubernetes API.
        kubernetes: Kubernetes as Sub<Kubernetes> = Kubernetes::default(),
        /// The local certificate authority for TLS listeners.
        ca: LocalCa as Sub<LocalCa> = LocalCa::default(),
        /// Probes, metrics and status.
        admin: Admin as Sub<Admin> = Admin::default(),
        /// What is logged, and how.
        log: Log as Sub<Log> = Log::default(),
        /// Worker threads; 0 means one per CPU this process may use.
        workers: usize as Workers = 0,
        /// How long open connections may go on after the signal to stop.
        shutdown_grace: Duration as Time = Duration::from_secs(30),
        /// A listener outside loopback needs this said.
        allow_non_loopback: bool as Bool = false,
    }
}

<<<<<<< HEAD
default_sections!(Config);
=======
#[derive(Clone, Debug, PartialEq)]
pub struct Alias {
    pub name: String,
    pub listen: Vec<SocketAddr>,
    pub protocol: Protocol,
    pub hosts: Vec<String>,
    pub target: Option<Target>,
    pub failover: Vec<Target>,
    pub port: u16,
    pub host: HostHeader,
    pub repair: bool,
    pub forwarded: Forwarded,
    pub allow: Vec<NamePattern>,
    pub on_change: OnChange,
    pub drain: Duration,
    pub tls: Tls,
    pub http: Http,
    pub balance: Balance,
    pub pool: Pool,
    pub timeouts: Timeouts,
    pub retry: Retry,
    pub health: Health,
    pub limits: Limits,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Http,
    Tcp,
    Postgres,
}

/// What a target names: an IP or a name, with its own port where one is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    pub host: TargetHost,
    pub port: Option<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetHost {
    Ip(std::net::IpAddr),
    /// Lower-case, IDNA-encoded, no trailing dot.
    Name(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostHeader {
    Rewrite,
    Preserve,
    Literal(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forwarded {
    Off,
    XForwarded,
    Rfc7239,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnChange {
    Drain,
    Close,
    Keep,
}

/// `httpbin.org` or `*.example.com` (one or more labels in place of the star).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamePattern(pub String);

impl NamePattern {
    /// Whether the name, folded, is the pattern or has one or more labels in place of its star.
    pub fn matches(&self, name: &str) -> bool {
        match self.0.strip_prefix("*.") {
            Some(parent) => name
                .strip_suffix(parent)
                .and_then(|labels| labels.strip_suffix('.'))
                .is_some_and(|labels| !labels.is_empty()),
            None => self.0 == name,
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Tls {
    pub mode: TlsMode,
    pub server_name: Option<String>,
    pub chain_match: Vec<NamePattern>,
    pub ca: Trust,
    pub client_certificate: Option<ClientCertificate>,
    pub pins: Vec<String>,
    pub crls: Vec<PathBuf>,
    pub min_version: TlsVersion,
    pub post_quantum: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsMode {
    Verify,
    InsecureSkipVerify,
    Plaintext,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsVersion {
    V1_2,
    V1_3,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Trust {
    pub system: bool,
    pub webpki: bool,
    pub files: Vec<PathBuf>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ClientCertificate {
    pub cert: PathBuf,
    pub key: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Http {
    pub version: HttpVersion,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HttpVersion {
    Auto,
    Http1,
    Http2,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    P2c,
    RoundRobin,
    Random,
    LeastRequest,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    /// Per endpoint; 0 is no limit.
    pub max_connections: usize,
    pub max_idle: usize,
    pub idle_timeout: Duration,
    pub max_lifetime: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Timeouts {
    pub connect: Duration,
    pub response: Option<Duration>,
    pub idle: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Retry {
    pub attempts: u32,
    /// Share of the requests, 0.0 to 1.0.
    pub budget: f64,
    pub on: Vec<RetryOn>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryOn {
    Connect,
    Reset,
    Status(u16),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Health {
    pub passive: PassiveHealth,
    pub active: Option<ActiveHealth>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct PassiveHealth {
    pub failures: u32,
    pub eject: Duration,
    pub max_eject: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ActiveHealth {
    pub interval: Duration,
    pub timeout: Duration,
    pub path: Option<String>,
    pub expect: std::ops::RangeInclusive<u16>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    pub requests: usize,
    pub queue: usize,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Listener {
    pub tls: ListenerTls,
    pub max_connections: usize,
    pub header_timeout: Duration,
    pub max_header_size: usize,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ListenerTls {
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct ForwardProxy {
    pub listen: Option<SocketAddr>,
    pub passthrough: Passthrough,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passthrough {
    Allow,
    Deny,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Dns {
    /// Empty: those of /etc/resolv.conf.
    pub servers: Vec<SocketAddr>,
    pub cluster_domain: Option<String>,
    pub namespace: Option<String>,
    pub min_ttl: Duration,
    pub max_ttl: Duration,
    pub stale: Duration,
    pub nxdomain_hold: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    pub deny_addresses: Vec<AddressClass>,
    pub allow_addresses: Vec<ipnet::IpNet>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressClass {
    Loopback,
    LinkLocal,
    Metadata,
    Multicast,
    Unspecified,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Kubernetes {
    pub watch: bool,
}

#[derive(Clone, Debug, PartialEq)]
pub struct LocalCa {
    pub directory: Option<PathBuf>,
    pub leaf_lifetime: Duration,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Admin {
    pub listen: Option<SocketAddr>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Log {
    pub format: LogFormat,
    pub level: LogLevel,
    pub access: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogFormat {
    Auto,
    Text,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}
>>>>>>> resolve
