//! Through an HTTP proxy: CONNECT, and what the proxy makes of it.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use tokio::io::AsyncWriteExt as _;

use super::{Wire, WireStream};
use crate::{
    fault::{Blame, Kind},
    stream::take,
};

/// The longest head of a response.
const LONGEST_HEAD: usize = 16 * 1024;

/// How much of a status line an error shows.
const SHOWN: usize = 80;

/// The proxy that a target is reached through.
#[derive(Clone, Copy, Debug)]
pub struct Via<'a> {
    /// The proxy, as configured.
    pub proxy: &'a str,
    /// What it is asked for.
    pub destination: &'a Destination,
    /// The value of Proxy-Authorization.
    pub authorization: Option<&'a Secret>,
}

/// What a proxy is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Destination {
    /// A name or an IP.
    pub host: Arc<str>,
    /// Its port.
    pub port: u16,
}

impl Destination {
    /// Where the proxy would go, as far as that is known here: it resolves names itself.
    pub fn address(&self) -> Option<SocketAddr> {
        // RFC 6761 §6.3.
        let is_own = &*self.host == "localhost" || self.host.ends_with(".localhost");
        let ip = if is_own { Some(Ipv4Addr::LOCALHOST.into()) } else { self.host.parse().ok() };
        ip.map(|ip| SocketAddr::new(ip, self.port))
    }

    fn authority(&self) -> String {
        match self.host.parse() {
            Ok(IpAddr::V6(v6)) => format!("[{v6}]:{}", self.port),
            _ => format!("{}:{}", self.host, self.port),
        }
    }
}

/// What must not be shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(secret)")
    }
}

/// Why a proxy opened no tunnel.
#[derive(Debug, thiserror::Error)]
pub enum ViaError {
    /// It responded with another status than 2xx.
    #[error("it responded to CONNECT {authority} with `{line}`")]
    Refused {
        /// What it was asked for.
        authority: String,
        /// The status.
        status: u16,
        /// The status line.
        line: String,
        /// Whether credentials were sent.
        had_credentials: bool,
    },
    /// It did not respond in time.
    #[error("it did not respond to CONNECT within {0:?} (`timeouts.connect`)")]
    Late(Duration),
    /// It closed the connection before its response.
    #[error("it closed the connection before it had responded to CONNECT")]
    Closed,
    /// What it sent is not a response.
    #[error("what it sent is not an HTTP response")]
    NotHttp,
    /// The response's head is too long.
    #[error("the head of its response has more than 16 KiB")]
    TooLong,
    /// The connection was lost.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl ViaError {
    /// What happened, and who is to blame: what the proxy says of the target is no failure of the proxy's.
    pub(super) fn facts(&self) -> (Kind, Blame) {
        match self {
            // Every target is reached through this proxy.
            Self::Refused { status: 401 | 407, .. } => (Kind::Unreachable, Blame::Alias),
            Self::Refused { status: 504, .. } | Self::Late(_) => {
                (Kind::ConnectTimeout, Blame::Target)
            }
            Self::Refused { .. } => (Kind::Unreachable, Blame::Target),
            Self::Closed | Self::Io(_) => (Kind::ConnectionLost, Blame::Endpoint),
            Self::NotHttp | Self::TooLong => (Kind::Unreachable, Blame::Endpoint),
        }
    }

    /// What to change.
    pub(super) fn fix(&self) -> &'static str {
        match self {
            // Some proxies say 401.
            Self::Refused { status: 401 | 407, had_credentials: false, .. } => {
                "the proxy requires credentials: write USER:PASSWORD into a file, and name it in \
                 `via: {url: …, credentials: FILE}`"
            }
            Self::Refused { status: 401 | 407, .. } => {
                "the proxy does not accept these credentials, or not as Basic authentication: correct the file of \
                 `via.credentials`"
            }
            Self::Refused { status: 400..=499, .. } => {
                "allow CONNECT to this name and port in the proxy's rules"
            }
            Self::Refused { .. } => {
                "the proxy cannot reach the target: see its log, and check that it can resolve this name"
            }
            Self::Late(_) => {
                "check that the proxy can reach the target (it may be waiting for it), or raise `timeouts.connect`"
            }
            Self::Closed | Self::NotHttp | Self::TooLong | Self::Io(_) => {
                "check that `via` names an HTTP proxy that takes plaintext at this port"
            }
        }
    }
}

/// Has the proxy open a tunnel. What the target sends first stays in the kernel.
pub(super) async fn open_tunnel(
    stream: &mut WireStream,
    wire: &Wire,
    via: &Via<'_>,
) -> Result<(), ViaError> {
    let (authority, authorization) = (via.destination.authority(), via.authorization);
    let mut request = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n");
    if let Some(Secret(authorization)) = authorization {
        request.push_str(&format!("Proxy-Authorization: {authorization}\r\n"));
    }
    request.push_str("\r\n");
    stream.write_all(request.as_bytes()).await?;
    loop {
        let line = take(wire.socket(), head).await?.ok_or(ViaError::Closed)?;
        let status = line.status;
        match status {
            // Something is still to come.
            100..=199 => {}
            200..=299 => return Ok(()),
            _ => {
                return Err(ViaError::Refused {
                    authority,
                    status,
                    line: line.shown,
                    had_credentials: authorization.is_some(),
                });
            }
        }
    }
}

/// A status line.
#[derive(Debug, PartialEq, Eq)]
struct StatusLine {
    status: u16,
    /// For an error.
    shown: String,
}

/// The length and the status line of the head that `bytes` begin with; `None` while more of them are needed.
fn head(bytes: &[u8]) -> Result<Option<(usize, StatusLine)>, ViaError> {
    let begins = bytes.iter().zip(b"HTTP/1.").all(|(one, other)| one == other);
    if !begins {
        return Err(ViaError::NotHttp);
    }
    let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") else {
        return if bytes.len() < LONGEST_HEAD { Ok(None) } else { Err(ViaError::TooLong) };
    };
    let line = bytes[..end].split(|byte| *byte == b'\r').next().unwrap_or_default();
    let status = match line.get(7..) {
        Some(&[minor, b' ', a, b, c, ref rest @ ..])
            if [minor, a, b, c].iter().all(u8::is_ascii_digit)
                && rest.first().is_none_or(|byte| *byte == b' ') =>
        {
            [a, b, c].iter().fold(0, |status, digit| status * 10 + u16::from(digit - b'0'))
        }
        _ => return Err(ViaError::NotHttp),
    };
    let shown = String::from_utf8_lossy(line);
    let shown = shown.chars().filter(|char| !char.is_control()).take(SHOWN).collect();
    Ok(Some((end + 4, StatusLine { status, shown })))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_ends_with_an_empty_line() {
        let response = b"HTTP/1.0 200 Connection established\r\nVia: 1.1 proxy\r\n\r\nhello";
        let length = response.len() - 5;
        for cut in 0..length {
            assert!(head(&response[..cut]).unwrap().is_none(), "{cut}");
        }
        let line = StatusLine { status: 200, shown: "HTTP/1.0 200 Connection established".into() };
        assert_eq!(head(response).unwrap(), Some((length, line)));
        let (_, line) = head(b"HTTP/1.1 407\r\n\r\n").unwrap().unwrap();
        assert_eq!(line.status, 407);
    }

    #[test]
    fn what_is_no_head_is_refused() {
        for bytes in
            ["SSH-2.0-x\r\n", "HTTP/2 200\r\n\r\n", "HTTP/1.1 20\r\n\r\n", "HTTP/1.1 2000\r\n\r\n"]
        {
            assert!(matches!(head(bytes.as_bytes()), Err(ViaError::NotHttp)), "{bytes}");
        }
        let long = [b"HTTP/1.1 200 OK\r\nX: ".as_slice(), &[b'x'; LONGEST_HEAD]].concat();
        assert!(matches!(head(&long), Err(ViaError::TooLong)));
    }

    #[test]
    fn an_error_shows_no_more_than_a_line() {
        let line = format!("HTTP/1.1 503 \u{1b}[31m{}\r\n\r\n", "x".repeat(500));
        let (_, line) = head(line.as_bytes()).unwrap().unwrap();
        assert_eq!(line.shown.len(), SHOWN);
        assert!(!line.shown.contains('\u{1b}'));
    }
}
