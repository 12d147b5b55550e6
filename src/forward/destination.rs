//! The destination of a request to the forward proxy: the authority of a CONNECT, or of an absolute URL.

use std::{fmt, net::IpAddr};

use http::{Method, request, uri::Authority};

use crate::config::normal_name;

/// The port of `http`.
const HTTP_PORT: u16 = 80;

/// A host and a port, as a client of the forward proxy named them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Destination {
    host: String,
    ip: Option<IpAddr>,
    port: u16,
}

/// Why a request has no clear destination.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DestinationError {
    /// RFC 9110 §9.3.6.
    #[error("the target of CONNECT must be HOST:PORT")]
    NotAuthority,
    /// Only a path, as in a request to an origin server.
    #[error(
        "this listener is a forward proxy, and the request names no host: send http://HOST/PATH \
         or CONNECT HOST:PORT"
    )]
    NotForProxy,
    /// A scheme that needs a tunnel, or an unknown one.
    #[error("the forward proxy requests only http:// URLs, not {0}://")]
    Scheme(String),
    /// RFC 9110 §4.2.4.
    #[error("a URL with a user name or password in it is not forwarded")]
    UserInfo,
    /// The host is not valid.
    #[error("`{0}` is neither a host name nor an address")]
    Host(String),
    /// The port is missing or not valid.
    #[error("`{0}` has no port between 1 and 65535")]
    Port(String),
}

impl Destination {
    /// What a request's target names.
    pub fn of(head: &request::Parts) -> Result<Self, DestinationError> {
        let uri = &head.uri;
        if head.method == Method::CONNECT {
            return match (uri.scheme(), uri.authority(), uri.path_and_query()) {
                (None, Some(authority), None) => Self::parse(authority, None),
                _ => Err(DestinationError::NotAuthority),
            };
        }
        match (uri.scheme_str(), uri.authority()) {
            (Some("http"), Some(authority)) => Self::parse(authority, Some(HTTP_PORT)),
            (Some(scheme), _) => Err(DestinationError::Scheme(scheme.to_owned())),
            (None, _) => Err(DestinationError::NotForProxy),
        }
    }

    fn parse(authority: &Authority, default_port: Option<u16>) -> Result<Self, DestinationError> {
        let text = authority.as_str();
        if text.contains('@') {
            return Err(DestinationError::UserInfo);
        }
        let host = authority.host();
        let port = match (text.strip_prefix(host).unwrap_or_default(), default_port) {
            // RFC 3986 §3.2.3: an empty port is the scheme's own.
            ("" | ":", Some(port)) => Some(port),
            (port, _) => port.strip_prefix(':').and_then(parse_port),
        };
        let port = port.ok_or_else(|| DestinationError::Port(text.to_owned()))?;
        let bad_host = || DestinationError::Host(host.to_owned());
        if let Some(inside) = host.strip_prefix('[') {
            let ip = inside.strip_suffix(']').and_then(|ip| ip.parse().ok());
            let ip = IpAddr::V6(ip.ok_or_else(bad_host)?);
            return Ok(Self { host: ip.to_string(), ip: Some(ip), port });
        }
        if let Ok(ip) = host.parse() {
            return Ok(Self { host: host.to_owned(), ip: Some(IpAddr::V4(ip)), port });
        }
        // Some programs take `127.1` and the like for addresses; they are never names.
        let host = normal_name(host).map_err(|_| bad_host())?;
        Ok(Self { host, ip: None, port })
    }

    /// The name in lower case without the final dot, or the address without brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The address, where it is one.
    pub fn ip(&self) -> Option<IpAddr> {
        self.ip
    }

    /// The port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The host and, where it is not that of `http`, the port: for a `Host`.
    pub fn http_host(&self) -> String {
        match self.port {
            HTTP_PORT => self.bracketed(),
            _ => self.to_string(),
        }
    }

    fn bracketed(&self) -> String {
        match self.ip {
            Some(IpAddr::V6(ip)) => format!("[{ip}]"),
            _ => self.host.clone(),
        }
    }
}

impl fmt::Display for Destination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.bracketed(), self.port)
    }
}

impl DestinationError {
    /// How to fix it.
    pub fn fix(&self) -> Option<String> {
        let fix = match self {
            Self::NotAuthority | Self::Port(_) => "name the port, as in `CONNECT httpbin.org:443`",
            Self::NotForProxy => {
                "ask the alias' own listener, or set `http_proxy` to this address instead of \
                 calling it"
            }
            Self::Scheme(_) => "open a tunnel with CONNECT, as programs do for `https_proxy`",
            Self::UserInfo => "send the credentials in `Authorization`",
            Self::Host(_) => return None,
        };
        Some(fix.into())
    }
}

/// Digits only: `parse` alone would take `+80`.
fn parse_port(text: &str) -> Option<u16> {
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|port| digits && *port != 0)
}

#[cfg(test)]
mod tests;
