//! Settings of the process rather than of one alias.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use super::{
    NameServer,
    form::*,
    scalars::*,
    table::{choice, default_sections, section},
};

section! {
    /// Settings of all listeners.
    pub struct Listener {
        /// The certificate shown to applications that speak TLS.
        tls: ListenerTls as Sub<ListenerTls> = ListenerTls::default(),
        /// Maximum open connections; further ones wait in the kernel's backlog.
        max_connections: usize as Positive<usize> = 10_000,
        /// How long a connection may take to send a request's head.
        header_timeout: Duration as PositiveTime = Duration::from_secs(30),
        /// Largest head of a request.
        max_header_size: usize as HeaderSize = 64 * 1024,
    }
}

section! {
    /// Files to use instead of the local certificate authority.
    pub struct ListenerTls {
        /// PEM file of the certificate and its intermediates.
        certificate: Option<PathBuf> as Nullable<File> = None,
        /// PEM file of the private key.
        key: Option<PathBuf> as Nullable<File> = None,
    }
}

section! {
    /// The HTTP forward proxy: CONNECT and absolute-form requests.
    pub struct ForwardProxy {
        /// Its address; null means none.
        listen: Option<SocketAddr> as Nullable<ListenAddress> = None,
        /// What to do with hosts that are not an alias.
        passthrough: Passthrough as OneOf<Passthrough> = Passthrough::Allow,
        /// A file with one `USER:PASSWORD` per line, one of which clients must send; null means no credentials.
        credentials: Option<PathBuf> as Nullable<File> = None,
    }
}

choice! {
    /// What the forward proxy does with hosts that are not an alias.
    pub enum Passthrough {
        /// They are passed through.
        Allow = "allow",
        /// They are refused.
        Deny = "deny",
    }
}

section! {
    /// How names are resolved.
    pub struct Dns {
        /// DNS servers, as IP, IP:port or [fe80::1%eth0]; empty means those of /etc/resolv.conf. The hosts file is never read.
        servers: Vec<NameServer> as List<DnsServer> = Vec::new(),
        /// The cluster domain; null: from the search list, else cluster.local.
        cluster_domain: Option<String> as Nullable<Name> = None,
        /// The namespace of a bare alias; null: from the search list, else default.
        namespace: Option<String> as Nullable<Label> = None,
        /// The shortest time between two lookups of a name.
        min_ttl: Duration as Time = Duration::from_secs(5),
        /// The longest time between two lookups of a name.
        max_ttl: Duration as PositiveTime = Duration::from_secs(60),
        /// The longest time between two lookups of a name in the cluster domain.
        cluster_max_ttl: Duration as PositiveTime = Duration::from_secs(5),
        /// How long to use the last good response while DNS fails.
        stale: Duration as Time = Duration::from_secs(3600),
        /// How long to use the last good response while DNS says that the name does not exist.
        nxdomain_hold: Duration as Time = Duration::from_secs(30),
    }
}

section! {
    /// Which addresses a target may have.
    pub struct Policy {
        /// Kinds of addresses that are refused.
        deny_addresses: Vec<AddressClass> as List<OneOf<AddressClass>> = vec![
            AddressClass::Loopback,
            AddressClass::LinkLocal,
            AddressClass::Metadata,
            AddressClass::Multicast,
            AddressClass::Unspecified,
        ],
        /// Networks that override the denials.
        allow_addresses: Vec<ipnet::IpNet> as List<Network> = Vec::new(),
    }
}

choice! {
    /// A kind of address.
    pub enum AddressClass {
        /// 127.0.0.0/8 and ::1.
        Loopback = "loopback",
        /// 169.254.0.0/16 and fe80::/10.
        LinkLocal = "link_local",
        /// The metadata services of clouds, such as 169.254.169.254.
        Metadata = "metadata",
        /// 224.0.0.0/4 and ff00::/8.
        Multicast = "multicast",
        /// 0.0.0.0 and ::.
        Unspecified = "unspecified",
    }
}

section! {
    /// Use of the Kubernetes API.
    pub struct Kubernetes {
        /// Watch ExternalName Services in the API instead of querying DNS.
        watch: bool as Bool = false,
    }
}

section! {
    /// The local certificate authorities for TLS listeners.
    pub struct LocalCa {
        /// Where their files are; null: $XDG_STATE_HOME/truename, or a private temporary folder.
        directory: Option<PathBuf> as Nullable<File> = None,
    }
}

section! {
    /// Probes, metrics and status.
    pub struct Admin {
        /// Its address; null means none.
        listen: Option<SocketAddr> as Nullable<ListenAddress> =
            Some(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9990)),
    }
}

section! {
    /// What is logged, and how.
    pub struct Log {
        /// The format of the lines; auto: text on a terminal, else json.
        format: LogFormat as OneOf<LogFormat> = LogFormat::Auto,
        /// The lowest level that is logged.
        level: LogLevel as OneOf<LogLevel> = LogLevel::Info,
        /// Whether each request is logged.
        access: bool as Bool = true,
    }
}

choice! {
    /// How log lines are written.
    pub enum LogFormat {
        /// Text on a terminal, else JSON.
        Auto = "auto",
        /// For people.
        Text = "text",
        /// For machines.
        Json = "json",
    }
}

choice! {
    /// A level of severity.
    pub enum LogLevel {
        /// Something failed.
        Error = "error",
        /// Something needs attention.
        Warn = "warn",
        /// What an operator wants to know.
        Info = "info",
        /// What a developer wants to know.
        Debug = "debug",
        /// Everything.
        Trace = "trace",
    }
}

default_sections!(
    Listener,
    ListenerTls,
    ForwardProxy,
    Dns,
    Policy,
    Kubernetes,
    LocalCa,
    Admin,
    Log
);
