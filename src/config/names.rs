//! Names, name patterns and targets, as a user writes them.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

use thiserror::Error;

/// The port of DNS.
const DNS_PORT: u16 = 53;

/// The form in which names are compared and sent: lower-case, IDNA-encoded, without the trailing dot.
pub fn normal_name(text: &str) -> Result<String, BadName> {
    let bad = |why| BadName { text: text.to_owned(), why };
    let undotted = text.strip_suffix('.').unwrap_or(text);
    if undotted.is_empty() {
        return Err(bad("it is empty"));
    }
    if undotted.contains("://") {
        return Err(bad("it has a scheme; write only the name"));
    }
    if undotted.starts_with("*.") {
        return Err(bad("a pattern is not allowed here"));
    }
    let ascii =
        idna::domain_to_ascii(undotted).map_err(|_| bad("it cannot be encoded for DNS (IDNA)"))?;
    if ascii.len() > 253 {
        return Err(bad("it is longer than 253 bytes"));
    }
    for label in ascii.split('.') {
        if label.is_empty() {
            return Err(bad("a label is empty"));
        }
        if label.len() > 63 {
            return Err(bad("a label is longer than 63 bytes"));
        }
        // Hostnames have no underscores, but other names in DNS do.
        if !label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_') {
            return Err(bad("a name contains only letters, digits, `-`, `_` and `.`"));
        }
        if label.starts_with('-') || label.ends_with('-') {
            return Err(bad("a label begins or ends with `-`"));
        }
    }
    // Other software would take a name that ends in digits (10.0.0.256) for an IPv4 address.
    if ascii.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()))
        && ascii.contains('.')
    {
        return Err(bad("its last label is a number, as in an IP address"));
    }
    Ok(ascii)
}

/// A name that is not possible in DNS or in a certificate.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{text}` is not a name: {why}; an example is `httpbin.org`")]
pub struct BadName {
    text: String,
    why: &'static str,
}

/// `httpbin.org` or `*.example.com` (one or more labels in place of the star).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamePattern(pub String);

impl NamePattern {
    /// A pattern in normal form.
    pub fn new(text: &str) -> Result<Self, BadName> {
        match text.strip_prefix("*.") {
            Some(parent) => Ok(Self(format!("*.{}", normal_name(parent)?))),
            None if text.contains('*') => Err(BadName {
                text: text.to_owned(),
                why: "`*` must be the whole first label, as in `*.example.com`",
            }),
            None => Ok(Self(normal_name(text)?)),
        }
    }

    /// Whether `name` is this name, or is below the parent of the star.
    pub fn matches(&self, name: &str) -> bool {
        let name = name.strip_suffix('.').unwrap_or(name);
        match self.0.strip_prefix('*') {
            // `parent` keeps its dot, so that neither the bare apex nor `notexample.com` matches.
            Some(parent) => name
                .len()
                .checked_sub(parent.len())
                .filter(|labels| *labels > 0)
                .and_then(|labels| name.get(labels..))
                .is_some_and(|tail| tail.eq_ignore_ascii_case(parent)),
            None => name.eq_ignore_ascii_case(&self.0),
        }
    }

    /// Whether some name matches both.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        match (self.0.strip_prefix('*'), other.0.strip_prefix('*')) {
            (Some(one), Some(two)) => one.ends_with(two) || two.ends_with(one),
            (None, _) => other.matches(&self.0),
            (_, None) => self.matches(&other.0),
        }
    }
}

impl FromStr for NamePattern {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        Self::new(text)
    }
}

impl fmt::Display for NamePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A target: an IP or a name, with its own port if one is given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The name or IP.
    pub host: TargetHost,
    /// Its port; `None` means the alias' `port`.
    pub port: Option<u16>,
}

/// The name or IP of a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TargetHost {
    /// An address: DNS is not used.
    Ip(IpAddr),
    /// Lower-case, IDNA-encoded, no trailing dot.
    Name(String),
}

impl FromStr for Target {
    type Err = BadTarget;

    fn from_str(text: &str) -> Result<Self, BadTarget> {
        let bad = |why: String| BadTarget { text: text.to_owned(), why };
        if text.contains("://") || text.contains('/') {
            return Err(bad("a target has no scheme and no path".to_owned()));
        }
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let (digits, after) =
                rest.split_once(']').ok_or_else(|| bad("the bracket is not closed".to_owned()))?;
            let ip: Ipv6Addr =
                digits.parse().map_err(|_| bad(format!("`{digits}` is not an IPv6 address")))?;
            let port = match after {
                "" => None,
                _ => Some(after.strip_prefix(':').ok_or_else(|| {
                    bad(format!("expected `:PORT` after the bracket, found `{after}`"))
                })?),
            };
            (TargetHost::Ip(ip.into()), port)
        } else if text.parse::<Ipv6Addr>().is_ok() || text.matches(':').count() > 1 {
            return Err(bad(format!("an IPv6 address must be in brackets, `[{text}]`")));
        } else {
            let (host, port) = match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            };
            let host = match host.parse::<IpAddr>() {
                Ok(ip) => TargetHost::Ip(ip),
                Err(_) => TargetHost::Name(normal_name(host).map_err(|e| bad(e.why.to_owned()))?),
            };
            (host, port)
        };
        let port = match port {
            Some(digits) => Some(
                port_number(digits)
                    .ok_or_else(|| bad(format!("`{digits}` is not a port from 1 to 65535")))?,
            ),
            None => None,
        };
        Ok(Self { host, port })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.host {
            TargetHost::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]")?,
            TargetHost::Ip(ip) => write!(f, "{ip}")?,
            TargetHost::Name(name) => f.write_str(name)?,
        }
        match self.port {
            Some(port) => write!(f, ":{port}"),
            None => Ok(()),
        }
    }
}

/// Where an HTTP proxy listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProxyUrl {
    /// Its name or IP.
    pub host: TargetHost,
    /// Its port.
    pub port: u16,
}

/// Stands for one that is missing, until that is reported.
impl Default for ProxyUrl {
    fn default() -> Self {
        Self { host: TargetHost::Ip(Ipv4Addr::UNSPECIFIED.into()), port: 0 }
    }
}

impl FromStr for ProxyUrl {
    type Err = BadProxyUrl;

    fn from_str(text: &str) -> Result<Self, BadProxyUrl> {
        let bad = |why: &str| BadProxyUrl { why: why.to_owned() };
        // First: what else is wrong with it would show it.
        if text.contains('@') {
            return Err(bad(
                "it has credentials; write them into a file, and name that in `credentials`",
            ));
        }
        let authority = match text.split_once("://") {
            Some(("http", authority)) => authority,
            Some(("https", _)) => return Err(bad("TLS to the proxy is not supported")),
            Some(_) => return Err(bad("it is not the URL of an HTTP proxy")),
            None => return Err(bad("it has no `http://`")),
        };
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let target = authority.parse::<Target>().map_err(|error| bad(&error.why))?;
        let port = target.port.ok_or_else(|| bad("it has no port"))?;
        Ok(Self { host: target.host, port })
    }
}

impl fmt::Display for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", Target { host: self.host.clone(), port: Some(self.port) })
    }
}

/// A URL that is not one of a proxy. It is not shown: it may contain a password.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("this cannot be used as the URL of a proxy: {why}; an example is `http://proxy.corp:3128`")]
pub struct BadProxyUrl {
    why: String,
}

/// A target that cannot be parsed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "`{text}` is not a target: {why}; write a name or an IP with or without a port, \
     such as `httpbin.org`, `10.0.0.7:8443` or `[2001:db8::7]:443`"
)]
pub struct BadTarget {
    text: String,
    why: String,
}

/// A DNS server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NameServer {
    /// Where it listens.
    pub address: SocketAddr,
    /// The interface of a link-local address: its name, or its number.
    pub interface: Option<String>,
}

impl From<SocketAddr> for NameServer {
    fn from(address: SocketAddr) -> Self {
        Self { address, interface: None }
    }
}

impl FromStr for NameServer {
    type Err = BadNameServer;

    fn from_str(text: &str) -> Result<Self, BadNameServer> {
        let bad = |why: String| BadNameServer { text: text.to_owned(), why };
        let (plain, interface) = match text.split_once('%') {
            Some((ip, rest)) => {
                let end = rest.find(']').unwrap_or(rest.len());
                (format!("{ip}{}", &rest[end..]), Some(rest[..end].to_owned()))
            }
            None => (text.to_owned(), None),
        };
        if let Ok(ip) = plain.parse::<Ipv6Addr>() {
            let interface = interface.map_or_else(String::new, |interface| format!("%{interface}"));
            return Err(bad(format!("an IPv6 address must be in brackets, `[{ip}{interface}]`")));
        }
        let (ip, port) = match plain.parse() {
            Ok(Target { host: TargetHost::Ip(ip), port }) => (ip, port.unwrap_or(DNS_PORT)),
            _ => return Err(bad("it is not an IP or IP:port".to_owned())),
        };
        if let Some(interface) = &interface {
            let is_link_local = matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
            if !is_link_local {
                return Err(bad(format!("`{ip}` is not link-local, so it takes no interface")));
            }
            if interface.is_empty() || interface.contains(|c: char| c.is_whitespace() || c == '/') {
                return Err(bad(format!("`{interface}` is not an interface such as `eth0`")));
            }
        }
        Ok(Self { address: SocketAddr::new(ip, port), interface })
    }
}

impl fmt::Display for NameServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.interface {
            Some(interface) => {
                write!(f, "[{}%{interface}]:{}", self.address.ip(), self.address.port())
            }
            None => self.address.fmt(f),
        }
    }
}

/// A DNS server that cannot be parsed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "`{text}` is not a DNS server: {why}; write an IP or IP:port, such as `10.96.0.10`, `10.96.0.10:5353`, \
     `[fd00::a]:53` or `[fe80::1%eth0]`"
)]
pub struct BadNameServer {
    text: String,
    why: String,
}

/// A port from 1 to 65535, in plain digits.
pub(crate) fn port_number(digits: &str) -> Option<u16> {
    // `parse` would take a sign.
    let plain = digits.bytes().all(|b| b.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten().filter(|port| *port != 0)
}
