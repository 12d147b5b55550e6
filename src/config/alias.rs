//! One alias: where it listens, where it leads, and how.

use std::{net::SocketAddr, ops::RangeInclusive, time::Duration};

use super::{
    form::*,
    names::{NamePattern, Target},
    scalars::*,
    table::{Section, choice, default_sections, section},
    tls::Tls,
};

/// A limit of time that is `off`.
pub const NEVER: Duration = Duration::MAX;

/// Where an HTTP alias listens when nobody says.
pub const DEFAULT_LISTEN: SocketAddr =
    SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8080);

section! {
    /// A name that the application uses, and what it leads to.
    pub struct Alias {
        /// The name the application uses, such as `webscaler-manual`: lower-case, IDNA-encoded, no trailing dot.
        name: String as Name,
        /// Addresses to listen on; a bare port means 127.0.0.1:PORT. HTTP aliases may share one. An alias of
        /// another protocol listens on 127.0.0.1 and its target's port unless this says otherwise.
        listen: Vec<SocketAddr> as List<ListenAddress> = vec![DEFAULT_LISTEN],
        /// What the application speaks; never guessed from a port number or name.
        protocol: Protocol as OneOf<Protocol> = Protocol::Http,
        /// Whether the application speaks TLS; auto takes TLS and plaintext.
        tls_in: TlsIn as OneOf<TlsIn> = TlsIn::Auto,
        /// Further Host names that this alias answers to; `*` is any.
        hosts: Vec<String> as List<HostName> = Vec::new(),
        /// The target: a name, IP, name:port or IP:port; null: follow the alias in DNS.
        target: Option<Target> as Nullable<TargetText> = None,
        /// Further targets, used in order when those before them have no usable endpoint.
        failover: Vec<Target> as List<TargetText> = Vec::new(),
        /// The target's port; 5432 where the protocol is postgres, and required where it is tcp.
        port: u16 as Port = 443,
        /// The Host sent to the target: the true name (rewrite), the application's own (preserve), or a literal.
        host: HostHeader as HostChoice = HostHeader::Rewrite,
        /// Give Location (also Content-Location, Refresh and Link), Set-Cookie Domain and
        /// Access-Control-Allow-Origin back in the alias' name, send Origin and Referer in the true name,
        /// drop Alt-Svc and Strict-Transport-Security.
        repair: bool as Bool = true,
        /// Which forwarding headers to add to requests.
        forwarded: Forwarded as OneOf<Forwarded> = Forwarded::Off,
        /// True names that this alias may lead to; empty means any.
        allow: Vec<NamePattern> as List<Pattern> = Vec::new(),
        /// What happens to open connections when the true name changes.
        on_change: OnChange as OneOf<OnChange> = OnChange::Drain,
        /// How long open connections may go on after the true name changed.
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
        /// Deadlines on the target.
        timeouts: Timeouts as Sub<Timeouts> = Timeouts::default(),
        /// Retries.
        retry: Retry as Sub<Retry> = Retry::default(),
        /// Health of endpoints.
        health: Health as Sub<Health> = Health::default(),
        /// Limits beyond which requests get a 503 at once, and connections of other protocols are reset.
        limits: Limits as Sub<Limits> = Limits::default(),
    }
}

impl Alias {
    /// An alias with every other key at its default.
    ///
    /// The name is taken as it is: normalise one that a user typed with [`super::normal_name`].
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
    }
}

choice! {
    /// Whether applications speak TLS to an alias.
    pub enum TlsIn {
        /// The first bytes decide.
        Auto = "auto",
        /// They must.
        Always = "true",
        /// They do not: a ClientHello is not looked for.
        Never = "false",
    }
}

/// The Host that a target is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HostHeader {
    /// The true name.
    Rewrite,
    /// What the application sent.
    Preserve,
    /// This.
    Literal(String),
}

choice! {
    /// Which forwarding headers requests get.
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
        /// They may end within the alias' `drain`.
        Drain = "drain",
        /// They are closed.
        Close = "close",
        /// They go on until they end.
        Keep = "keep",
    }
}

section! {
    /// HTTP to the target.
    #[derive(Copy, Eq)]
    pub struct Http {
        /// The version spoken to the target; auto is what the application speaks.
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
        /// How long a connection may be idle and still be used again.
        idle_timeout: Duration as Time = Duration::from_secs(50),
        /// How old a connection may be and still be used again.
        max_lifetime: Duration as PositiveTime = Duration::from_secs(3600),
    }
}

section! {
    /// Deadlines on the target.
    pub struct Timeouts {
        /// Covers TCP and TLS.
        connect: Duration as PositiveTime = Duration::from_secs(5),
        /// From the end of the request to the head of the response, or `off`.
        response: Option<Duration> as TimeOrOff = None,
        /// How long both sides of a tunnel or stream may send nothing, or one side read nothing; or `off`
        /// ([`NEVER`]), the default of all protocols but http.
        idle: Duration as TimeOrNever = Duration::from_secs(3600),
        /// How long a connection may be silent, on either side, before TCP probes whether its peer is there.
        keepalive: Duration as PositiveTime = Duration::from_secs(60),
    }
}

section! {
    /// Retries, on another endpoint.
    pub struct Retry {
        /// Maximum retries of a request; 0 means none.
        attempts: u32 as Whole<u32, 0, 10> = 2,
        /// Share of the requests that may be retries, such as `20%`.
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
    /// The target answered so: 502, 503 or 504.
    Status(u16),
}

section! {
    /// Health of endpoints.
    pub struct Health {
        /// From the traffic itself.
        passive: PassiveHealth as Sub<PassiveHealth> = PassiveHealth::default(),
        /// From active checks; off unless set.
        active: Option<ActiveHealth> as Nullable<Sub<ActiveHealth>> = None,
    }
}

section! {
    /// Ejection of endpoints whose connections fail.
    pub struct PassiveHealth {
        /// Consecutive transport failures that eject an endpoint; 0 ejects none.
        failures: u32 as Whole<u32, 0, { u32::MAX }> = 3,
        /// The first ejection's length; each further one doubles.
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
        /// The path to request; without one a check is TCP and TLS only.
        path: Option<String> as Nullable<RequestPath> = None,
        /// Statuses that pass.
        expect: RangeInclusive<u16> as StatusRange = 200..=399,
    }
}

section! {
    /// Limits beyond which requests get a 503 at once, and connections of other protocols are reset; 0 means
    /// no limit.
    pub struct Limits {
        /// Concurrent requests; of protocols other than http, connections.
        requests: usize as Count = 0,
        /// Requests that may wait in a queue.
        queue: usize as Count = 0,
    }
}

default_sections!(Http, Tcp, Pool, Timeouts, Retry, Health, PassiveHealth, ActiveHealth, Limits);
