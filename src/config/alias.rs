//! One alias: where it listens, where it leads, and how.

use std::{net::SocketAddr, ops::RangeInclusive, path::PathBuf, time::Duration};

use super::{
    form::*,
    names::{NamePattern, ProxyUrl, Target},
    postgres::Postgres,
    scalars::*,
    table::{Section, choice, default_sections, section},
    tls::Tls,
};

/// A time limit that is `off`.
pub const NEVER: Duration = Duration::MAX;

/// Where an HTTP alias listens by default.
pub const DEFAULT_LISTEN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8080);

section! {
    /// A name that the application uses, and where it leads.
    pub struct Alias {
        /// The name the application uses, such as `webscaler-manual`: lower-case, IDNA-encoded, no trailing dot.
        name: String as Name,
        /// Addresses to listen on; a bare port means 127.0.0.1:PORT. HTTP aliases may share one. The default of
        /// other protocols is 127.0.0.1 with the port of the target.
        listen: Vec<SocketAddr> as List<ListenAddress> = vec![DEFAULT_LISTEN],
        /// What the application speaks; never guessed from a port number or name.
        protocol: Protocol as OneOf<Protocol> = Protocol::Http,
        /// Whether the application speaks TLS; auto takes TLS and plaintext, but for smtp, imap and pop3, whose servers
        /// speak first, it means false.
        tls_in: TlsIn as OneOf<TlsIn> = TlsIn::Auto,
        /// Further Host names that this alias answers to; `*` means any.
        hosts: Vec<String> as List<HostName> = Vec::new(),
        /// The target: a name, IP, name:port or IP:port; null: follow the alias in DNS.
        target: Option<Target> as Nullable<TargetText> = None,
        /// Further targets, used in order when those before them have no usable endpoint.
        failover: Vec<Target> as List<TargetText> = Vec::new(),
        /// The target's port. The default is 5432 for postgres, 3306 for mysql, 587 for smtp, 143 for imap, 110 for
        /// pop3, and 389 for ldap; required for tcp.
        port: u16 as Port = 443,
        /// Reach the target through this HTTP proxy, by CONNECT.
        via: Option<Via> as Nullable<UrlOr<Via>> = None,
        /// The Host sent to the target: the true name (rewrite), the application's own (preserve), or a literal.
        host: HostHeader as HostChoice = HostHeader::Rewrite,
        /// Use the alias' name in Location (also Content-Location, Refresh and Link), Set-Cookie Domain and
        /// Access-Control-Allow-Origin of responses, and the true name in Origin and Referer of requests;
        /// drop Alt-Svc and Strict-Transport-Security.
        repair: bool as Bool = true,
        /// Which forwarding headers to add to requests.
        forwarded: Forwarded as OneOf<Forwarded> = Forwarded::Off,
        /// True names that this alias may lead to; empty means any.
        allow: Vec<NamePattern> as List<Pattern> = Vec::new(),
        /// The PROXY protocol, which tells the next hop who the client is.
        proxy_protocol: ProxyProtocol as Sub<ProxyProtocol> = ProxyProtocol::default(),
        /// What happens to open connections when the true name changes.
        on_change: OnChange as OneOf<OnChange> = OnChange::Drain,
        /// How long open connections may continue after the true name has changed.
        drain: Duration as Time = Duration::from_secs(30),
        /// TLS to the target.
        tls: Tls as Sub<Tls> = Tls::default(),
        /// HTTP to the target.
        http: Http as Sub<Http> = Http::default(),
        /// Raw TCP to the target.
        tcp: Tcp as Sub<Tcp> = Tcp::default(),
        /// How an endpoint is chosen.
        balance: Balance as OneOf<Balance> = Balance::P2c,
        /// Connections kept for reuse.
        pool: Pool as Sub<Pool> = Pool::default(),
        /// Timeouts.
        timeouts: Timeouts as Sub<Timeouts> = Timeouts::default(),
        /// Retries.
        retry: Retry as Sub<Retry> = Retry::default(),
        /// Health of endpoints.
        health: Health as Sub<Health> = Health::default(),
        /// Limits. Requests over a limit get a 503 at once; connections of other protocols get an error, or are reset.
        limits: Limits as Sub<Limits> = Limits::default(),
        /// PostgreSQL.
        postgres: Postgres as Sub<Postgres> = Postgres::default(),
    }
}

impl Alias {
    /// An alias with every other key at its default.
    ///
    /// The name must be in normal form: use [`super::normal_name`] for one that a user typed.
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::blank() }
    }
}

choice! {
    /// What the application speaks to an alias.
    pub enum Protocol {
        /// HTTP/1.1 and HTTP/2.
        Http = "http",
        /// Bytes both ways.
        Tcp = "tcp",
        /// PostgreSQL, whose TLS begins with an SSLRequest.
        Postgres = "postgres",
        /// MySQL and MariaDB, whose TLS begins after the server's greeting.
        Mysql = "mysql",
        /// SMTP, whose TLS begins with STARTTLS.
        Smtp = "smtp",
        /// IMAP, whose TLS begins with STARTTLS.
        Imap = "imap",
        /// POP3, whose TLS begins with STLS.
        Pop3 = "pop3",
        /// LDAP, whose TLS begins with StartTLS.
        Ldap = "ldap",
    }
}

impl Protocol {
    /// The port of a target that names none; `None` if one must be named.
    pub fn default_port(self) -> Option<u16> {
        match self {
            Self::Http => Some(443),
            Self::Tcp => None,
            Self::Postgres => Some(5432),
            Self::Mysql => Some(3306),
            Self::Smtp => Some(587),
            Self::Imap => Some(143),
            Self::Pop3 => Some(110),
            Self::Ldap => Some(389),
        }
    }

    /// Whether the server speaks first, so that a client that speaks TLS cannot be told from one that waits.
    pub fn server_speaks_first(self) -> bool {
        match self {
            Self::Mysql | Self::Smtp | Self::Imap | Self::Pop3 => true,
            Self::Http | Self::Tcp | Self::Postgres | Self::Ldap => false,
        }
    }
}

choice! {
    /// Whether applications speak TLS to an alias.
    pub enum TlsIn {
        /// The first bytes decide.
        Auto = "auto",
        /// They speak TLS.
        Always = "true",
        /// They do not speak TLS: a ClientHello is not detected.
        Never = "false",
    }
}

/// The Host that is sent to a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostHeader {
    /// The true name.
    Rewrite,
    /// What the application sent.
    Preserve,
    /// This value.
    Literal(String),
}

choice! {
    /// Which forwarding headers to add to requests.
    pub enum Forwarded {
        /// None.
        Off = "false",
        /// X-Forwarded-For, X-Forwarded-Proto, X-Forwarded-Host.
        XForwarded = "x-forwarded",
        /// Forwarded, as in RFC 7239.
        Rfc7239 = "rfc7239",
    }
}

choice! {
    /// What happens to open connections when the true name changes.
    pub enum OnChange {
        /// They are closed after the alias' `drain`, or when they end.
        Drain = "drain",
        /// They are closed.
        Close = "close",
        /// They stay open until they end.
        Keep = "keep",
    }
}

section! {
    /// An HTTP proxy.
    #[derive(Eq)]
    pub struct Via {
        /// The proxy, such as `http://proxy.corp:3128`.
        url: ProxyUrl as ProxyUrlText,
        /// A file with a line `USER:PASSWORD`, for Basic authentication; reloaded when it changes.
        credentials: Option<PathBuf> as Nullable<File> = None,
    }
}

section! {
    /// The PROXY protocol: a header at the start of a connection, with the address of the client.
    #[derive(Eq)]
    pub struct ProxyProtocol {
        /// Networks whose connections to this alias' listeners begin with a PROXY header, of version 1 or 2. The
        /// header is required from these networks and not looked for from others.
        accept: Vec<ipnet::IpNet> as List<Network> = Vec::new(),
        /// The version of the header to send to the target, or `off`.
        send: Option<ProxyVersion> as ProxyVersionOrOff = None,
    }
}

choice! {
    /// A version of the PROXY protocol.
    pub enum ProxyVersion {
        /// A line of text.
        V1 = "v1",
        /// Binary.
        V2 = "v2",
    }
}

section! {
    /// HTTP to the target.
    #[derive(Copy, Eq)]
    pub struct Http {
        /// The version of HTTP to the target; auto: the same as the application's.
        version: HttpVersion as OneOf<HttpVersion> = HttpVersion::Auto,
    }
}

choice! {
    /// A version of HTTP.
    pub enum HttpVersion {
        /// What the application speaks.
        Auto = "auto",
        /// HTTP/1.1.
        Http1 = "1.1",
        /// HTTP/2.
        Http2 = "2",
    }
}

section! {
    /// Raw TCP to the target.
    #[derive(Eq)]
    pub struct Tcp {
        /// The application protocols to offer to the target in the TLS handshake (ALPN).
        alpn: Vec<String> as List<AlpnName> = Vec::new(),
    }
}

choice! {
    /// How an endpoint is chosen.
    pub enum Balance {
        /// The better of two random ones by peak EWMA of latency.
        P2c = "p2c",
        /// Each in turn.
        RoundRobin = "round_robin",
        /// Any.
        Random = "random",
        /// The one with the fewest requests in flight; among equals, any.
        LeastRequest = "least_request",
    }
}

section! {
    /// Connections kept for reuse, counted per endpoint.
    pub struct Pool {
        /// Maximum connections to one endpoint; 0 means no limit.
        max_connections: usize as Count = 0,
        /// Maximum idle connections to one endpoint; extra ones are closed after a second.
        max_idle: usize as Count = 64,
        /// How long a connection may be idle before it is no longer reused.
        idle_timeout: Duration as Time = Duration::from_secs(50),
        /// How old a connection may be before it is no longer reused.
        max_lifetime: Duration as PositiveTime = Duration::from_secs(3600),
    }
}

section! {
    /// Timeouts.
    pub struct Timeouts {
        /// Covers TCP and TLS.
        connect: Duration as PositiveTime = Duration::from_secs(5),
        /// From the end of the request to the head of the response, or `off`.
        response: Option<Duration> as TimeOrOff = None,
        /// How long both sides of a tunnel or stream may send nothing, or one side may read nothing; or `off`,
        /// the default of all protocols except http.
        idle: Duration as TimeOrNever = Duration::from_secs(3600),
        /// How long a connection may be idle, on either side, before TCP sends keep-alive probes.
        keepalive: Duration as PositiveTime = Duration::from_secs(60),
    }
}

section! {
    /// Retries, on another endpoint.
    pub struct Retry {
        /// Maximum retries of a request; 0 means none.
        attempts: u32 as Whole<u32, 0, 10> = 2,
        /// How many retries are allowed, as a percentage of the requests, such as `20%`.
        budget: f64 as Percent = 0.2,
        /// What to retry on.
        when: Vec<RetryOn> as List<RetryReason> = vec![RetryOn::Connect],
    }
}

/// What to retry on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RetryOn {
    /// No connection could be made.
    Connect,
    /// The connection ended before the response began.
    Reset,
    /// The target responded with this status: 502, 503 or 504.
    Status(u16),
}

section! {
    /// Health of endpoints.
    pub struct Health {
        /// Based on the traffic itself.
        passive: PassiveHealth as Sub<PassiveHealth> = PassiveHealth::default(),
        /// Based on active checks; off by default.
        active: Option<ActiveHealth> as Nullable<Sub<ActiveHealth>> = None,
    }
}

section! {
    /// Ejection of endpoints whose connections fail.
    pub struct PassiveHealth {
        /// How many consecutive transport failures eject an endpoint; 0 means never.
        failures: u32 as Whole<u32, 0, { u32::MAX }> = 3,
        /// The length of the first ejection; it doubles with each further one.
        eject: Duration as PositiveTime = Duration::from_secs(10),
        /// The longest ejection.
        max_eject: Duration as PositiveTime = Duration::from_secs(300),
    }
}

section! {
    /// Active health checks.
    pub struct ActiveHealth {
        /// Time between checks.
        interval: Duration as PositiveTime = Duration::from_secs(10),
        /// How long a check may take.
        timeout: Duration as PositiveTime = Duration::from_secs(2),
        /// The path to request; without one, a check is TCP and TLS only.
        path: Option<String> as Nullable<RequestPath> = None,
        /// Statuses that pass.
        expect: RangeInclusive<u16> as StatusRange = 200..=399,
    }
}

section! {
    /// Limits. Requests over a limit get a 503 at once; connections of other protocols are reset. 0 means no
    /// limit.
    pub struct Limits {
        /// Concurrent requests; for protocols other than http, concurrent connections.
        requests: usize as Count = 0,
        /// Requests that may wait in a queue.
        queue: usize as Count = 0,
    }
}

default_sections!(
    ProxyProtocol,
    Http,
    Tcp,
    Pool,
    Timeouts,
    Retry,
    Health,
    PassiveHealth,
    ActiveHealth,
    Limits
);
