//! What changes between the two sides of a request. Pure: parts in, parts out.

use std::net::IpAddr;

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Uri, Version,
    header::{
        ACCESS_CONTROL_ALLOW_ORIGIN, ALT_SVC, AUTHORIZATION, CONNECTION, CONTENT_LENGTH,
        CONTENT_LOCATION, COOKIE, EXPECT, FORWARDED, HOST, LINK, LOCATION, ORIGIN, REFERER,
        REFRESH, SET_COOKIE, STRICT_TRANSPORT_SECURITY, TE, TRANSFER_ENCODING, UPGRADE,
    },
    request,
    uri::{Authority, PathAndQuery, Scheme},
};

use super::urls;
use crate::config::Forwarded;

pub use super::view::{ClientView, TargetView};

/// RFC 9110 §7.6.1, and two that are not standardized. `Transfer-Encoding` belongs to each side.
const HOP_BY_HOP: [&str; 8] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "transfer-encoding",
    "upgrade",
];

/// Why a request is malformed or ambiguous.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// RFC 9112 §3.2.
    #[error("the request has no Host")]
    NoHost,
    /// RFC 9112 §3.2.
    #[error("the request has more than one Host")]
    SeveralHosts,
    /// RFC 9113 §8.3.1.
    #[error("`:authority` is `{authority}` and Host is `{host}`")]
    HostMismatch {
        /// The pseudo-header.
        authority: String,
        /// The field.
        host: String,
    },
    /// RFC 9110 §7.2.
    #[error("`{0}` is not a host")]
    InvalidHost(String),
    /// Not a path, an absolute URL, or `*`.
    #[error("`{0}` is not a valid request target for an alias")]
    InvalidTarget(String),
}

/// The authority that the client meant, as it wrote it; `None` where HTTP/1.0 left it out.
pub fn authority(head: &request::Parts) -> Result<Option<Authority>, BadRequest> {
    let mut hosts = head.headers.get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(BadRequest::SeveralHosts);
    }
    let host = match host {
        None => None,
        Some(value) => Some(parse_host(value)?),
    };
    let authority = match (head.uri.authority(), host) {
        (Some(authority), Some(host)) if head.version == Version::HTTP_2 => {
            if !authority.as_str().eq_ignore_ascii_case(host.as_str()) {
                return Err(BadRequest::HostMismatch {
                    authority: authority.to_string(),
                    host: host.to_string(),
                });
            }
            Some(authority.clone())
        }
        // RFC 9112 §3.2.2: the absolute form overrides Host.
        (Some(authority), _) => Some(authority.clone()),
        (None, host) => host,
    };
    match authority {
        Some(authority) => {
            let bytes = authority.as_str().as_bytes();
            if bytes.contains(&b'@') || matches!(bytes, [] | [b':', ..]) {
                return Err(BadRequest::InvalidHost(authority.to_string()));
            }
            Ok(Some(authority))
        }
        None if head.version == Version::HTTP_10 => Ok(None),
        None => Err(BadRequest::NoHost),
    }
}

fn parse_host(value: &HeaderValue) -> Result<Authority, BadRequest> {
    let invalid = || BadRequest::InvalidHost(String::from_utf8_lossy(value.as_bytes()).into());
    if value.is_empty() {
        return Err(BadRequest::NoHost);
    }
    Authority::try_from(value.as_bytes()).map_err(|_| invalid())
}

/// Which of [`HOP_BY_HOP`] a message has. Most have none or one: one pass over the names that are there
/// costs a fraction of looking each of them up.
#[derive(Clone, Copy)]
struct Hops(u8);

impl Hops {
    fn of(headers: &HeaderMap) -> Self {
        let hop = |name: &HeaderName| HOP_BY_HOP.iter().position(|hop| *hop == name.as_str());
        Self(headers.keys().filter_map(hop).fold(0, |hops, hop| hops | 1 << hop))
    }

    fn none(self) -> bool {
        self.0 == 0
    }

    /// Fields nominated by `Connection` are removed too (RFC 9110 §7.6.1) and returned: they must not
    /// appear in the trailers either.
    fn strip(self, headers: &mut HeaderMap) -> Vec<HeaderName> {
        let mut nominated = Vec::new();
        if headers.contains_key(CONNECTION) {
            nominated = tokens(headers, &CONNECTION)
                // `Keep-Alive` itself, the most common option, is removed anyway.
                .filter(|token| !token.eq_ignore_ascii_case("keep-alive"))
                .filter_map(|token| HeaderName::try_from(token).ok())
                // Nominating an end-to-end field would let a client remove what routing depends on.
                .filter(|name| *name != HOST && *name != CONTENT_LENGTH)
                .collect();
            for name in &nominated {
                headers.remove(name);
            }
        }
        for (hop, name) in HOP_BY_HOP.into_iter().enumerate() {
            if self.0 & 1 << hop != 0 {
                headers.remove(name);
            }
        }
        nominated
    }
}

/// Removes the fields that concern only the connection the request arrived on, and returns the names that
/// `Connection` nominated.
///
/// An upgrade keeps its own two fields; `TE: trailers` is passed on, because gRPC needs it.
pub fn strip_request(headers: &mut HeaderMap, upgrade: bool) -> Vec<HeaderName> {
    let hops = Hops::of(headers);
    if hops.none() {
        return Vec::new();
    }
    let trailers = wants_trailers(headers);
    let protocol = upgrade.then(|| headers.get(UPGRADE).cloned()).flatten();
    let nominated = hops.strip(headers);
    let mut connection = Vec::new();
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
        connection.push("TE");
    }
    if let Some(protocol) = protocol {
        headers.insert(UPGRADE, protocol);
        connection.push("Upgrade");
    }
    // RFC 9110 §10.1.4 and §7.8: a sender of these must name them in Connection.
    match connection.as_slice() {
        ["TE"] => headers.insert(CONNECTION, HeaderValue::from_static("TE")),
        ["Upgrade"] => headers.insert(CONNECTION, HeaderValue::from_static("Upgrade")),
        ["TE", "Upgrade"] => headers.insert(CONNECTION, HeaderValue::from_static("TE, Upgrade")),
        _ => None,
    };
    nominated
}

/// RFC 9110 §10.1.4.
fn wants_trailers(headers: &HeaderMap) -> bool {
    tokens(headers, &TE).any(|token| token.eq_ignore_ascii_case("trailers"))
}

/// Removes the fields that concern only the connection the response arrived on, and returns the names that
/// `Connection` nominated. A `101` keeps its two.
pub fn strip_response(headers: &mut HeaderMap, switching: bool) -> Vec<HeaderName> {
    let hops = Hops::of(headers);
    if hops.none() {
        return Vec::new();
    }
    // RFC 9112 §6.3: with both, Transfer-Encoding overrides, and the length must not be passed on.
    if headers.contains_key(TRANSFER_ENCODING) {
        headers.remove(CONTENT_LENGTH);
    }
    let protocol = switching.then(|| headers.get(UPGRADE).cloned()).flatten();
    let nominated = hops.strip(headers);
    if let Some(protocol) = protocol {
        headers.insert(UPGRADE, protocol);
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    }
    nominated
}

/// Removes what is meant for the forward proxy only, above all credentials.
pub fn strip_proxy(headers: &mut HeaderMap) {
    let names = headers.keys().filter(|name| name.as_str().starts_with("proxy-"));
    for name in names.cloned().collect::<Vec<_>>() {
        headers.remove(name);
    }
}

/// The comma-separated tokens of a field, over all its lines.
fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    let lines = headers.get_all(name).into_iter().map(HeaderValue::as_bytes);
    // One line that is not text must not hide the others.
    let tokens = lines.flat_map(|line| line.split(|byte| *byte == b','));
    let tokens = tokens.filter_map(|token| std::str::from_utf8(token).ok());
    tokens.map(str::trim).filter(|token| !token.is_empty())
}

/// The protocol that a request asks to switch to (RFC 9110 §7.8).
pub fn upgrade(head: &request::Parts) -> Option<&HeaderValue> {
    let protocol = head.headers.get(UPGRADE)?;
    let asked = tokens(&head.headers, &CONNECTION).any(|t| t.eq_ignore_ascii_case("upgrade"));
    // h2c concerns this hop only; upstream, ALPN decides.
    let h2c = protocol.as_bytes().eq_ignore_ascii_case(b"h2c");
    (asked && head.version == Version::HTTP_11 && !h2c).then_some(protocol)
}

/// Whether the client waits for `100 Continue` before it sends the body.
pub fn expects_continue(headers: &HeaderMap) -> bool {
    headers.get(EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Whether a client wants its connection kept after this request (RFC 9112 §9.3), and whether it
/// wants trailers.
pub fn wishes(version: Version, headers: &HeaderMap) -> (bool, bool) {
    if Hops::of(headers).none() {
        return (version != Version::HTTP_10, false);
    }
    let has = |wanted: &str| tokens(headers, &CONNECTION).any(|t| t.eq_ignore_ascii_case(wanted));
    let keep_alive = !has("close") && (version != Version::HTTP_10 || has("keep-alive"));
    (keep_alive, wants_trailers(headers))
}

/// Whether the connection may be used again after this response, and for how long the origin says it will
/// keep it.
pub fn keep_alive(version: Version, headers: &HeaderMap) -> (bool, Option<std::time::Duration>) {
    if Hops::of(headers).none() {
        return (version != Version::HTTP_10, None);
    }
    let has = |wanted: &str| tokens(headers, &CONNECTION).any(|t| t.eq_ignore_ascii_case(wanted));
    // Messages with both lengths are used to smuggle requests: the connection is not trusted.
    let ambiguous = headers.contains_key(TRANSFER_ENCODING) && headers.contains_key(CONTENT_LENGTH);
    let reusable = match version {
        Version::HTTP_10 => has("keep-alive"),
        _ => !has("close"),
    };
    let keep_alive = HeaderName::from_static("keep-alive");
    let timeout = tokens(headers, &keep_alive)
        .find_map(|token| token.strip_prefix("timeout=")?.trim_matches('"').parse().ok())
        .map(std::time::Duration::from_secs);
    (reusable && !ambiguous, timeout)
}

/// Writes the request's target and Host in the form that the upstream connection needs.
///
/// Path and query keep their bytes. `has_body`: a body follows whose length the headers do not give.
pub fn address(
    head: &mut request::Parts,
    scheme: &str,
    host: &HeaderValue,
    http2: bool,
    has_body: bool,
) -> Result<(), BadRequest> {
    let bare = head.uri.scheme().is_none() && head.uri.authority().is_none();
    if !http2 {
        if head.version == Version::HTTP_2 {
            restore_http1(head, has_body);
        }
        head.version = Version::HTTP_11;
        head.headers.insert(HOST, host.clone());
        // A request with neither is taken for one without a body.
        if has_body && !head.headers.contains_key(CONTENT_LENGTH) {
            head.headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
        }
        if bare {
            return Ok(());
        }
    }
    let path = std::mem::take(&mut head.uri).into_parts().path_and_query;
    let mut path = path.unwrap_or(PathAndQuery::from_static("/"));
    if path.as_str().starts_with('?') {
        // RFC 9112 §3.2.1, RFC 9113 §8.3.1: an empty path is sent as "/".
        let rooted = format!("/{}", path.as_str());
        path = PathAndQuery::try_from(&rooted).map_err(|_| BadRequest::InvalidTarget(rooted))?;
    }
    let mut uri = http::uri::Parts::default();
    if http2 {
        uri.scheme = Some(match scheme {
            "http" => Scheme::HTTP,
            _ => Scheme::HTTPS,
        });
        uri.authority = Some(Authority::try_from(host.as_bytes()).map_err(|_| {
            BadRequest::InvalidHost(String::from_utf8_lossy(host.as_bytes()).into())
        })?);
        head.version = Version::HTTP_2;
        head.headers.remove(HOST);
        head.headers.remove(CONNECTION);
        head.headers.remove(TRANSFER_ENCODING);
    }
    uri.path_and_query = Some(path.clone());
    head.uri =
        Uri::from_parts(uri).map_err(|_| BadRequest::InvalidTarget(path.as_str().to_owned()))?;
    Ok(())
}

/// Adds or joins what HTTP/2 lets a request omit or split, and HTTP/1.1 requires.
fn restore_http1(head: &mut request::Parts, has_body: bool) {
    // RFC 9113 §8.2.3: outside of HTTP/2, the cookie pairs are one field.
    let crumbs: Vec<&[u8]> =
        head.headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if crumbs.len() > 1
        && let Ok(cookie) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..]))
    {
        head.headers.insert(COOKIE, cookie);
    }
    // RFC 9110 §8.6: for methods that usually have content, servers require a length (411), even of 0.
    let usual = matches!(head.method, Method::POST | Method::PUT | Method::PATCH);
    if usual && !has_body && !head.headers.contains_key(CONTENT_LENGTH) {
        head.headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
    }
}

/// Whether the request has an AWS Signature Version 4 that covers its Host, in a header or in the query:
/// then rewriting the Host breaks the signature.
pub fn signs_host(head: &request::Parts) -> bool {
    let lists_host = |list: &str| list.split(';').any(|name| name.eq_ignore_ascii_case("host"));
    let in_header = head.headers.get_all(AUTHORIZATION).iter().any(|value| {
        let Ok(value) = value.to_str() else { return false };
        let Some((scheme, parameters)) = value.split_once(' ') else { return false };
        scheme.starts_with("AWS4-")
            && parameters
                .split(',')
                .filter_map(|parameter| parameter.trim().strip_prefix("SignedHeaders="))
                .any(lists_host)
    });
    let in_query = || {
        head.uri.query().into_iter().flat_map(|query| query.split('&')).any(|pair| {
            let Some((name, value)) = pair.split_once('=') else { return false };
            name.eq_ignore_ascii_case("X-Amz-SignedHeaders")
                && lists_host(&value.replace("%3B", ";").replace("%3b", ";"))
        })
    };
    in_header || in_query()
}

/// What [`repair_request`] replaced.
#[derive(Clone, Debug, Default)]
pub struct Repaired {
    /// The former `Origin`.
    pub origin: Option<HeaderValue>,
    referer: Option<HeaderValue>,
}

impl Repaired {
    /// Restores it, for another attempt that may go to another true name.
    pub fn undo(self, headers: &mut HeaderMap) {
        if let Some(origin) = self.origin {
            headers.insert(ORIGIN, origin);
        }
        if let Some(referer) = self.referer {
            headers.insert(REFERER, referer);
        }
    }
}

/// Rewrites `Origin` and `Referer` to the true name where they are the alias' own.
pub fn repair_request(
    headers: &mut HeaderMap,
    is_alias: impl Fn(&str) -> bool,
    target: TargetView<'_>,
) -> Repaired {
    let translate = |value: &HeaderValue| {
        let (_, authority, rest) = urls::split_origin(value.as_bytes())?;
        let authority = std::str::from_utf8(authority).ok()?;
        let host = authority.rsplit_once(':').map_or(authority, |(host, _)| host);
        if !(is_alias(authority) || is_alias(host)) {
            return None;
        }
        let own = format!("{}://{}", target.scheme, target.authority).into_bytes();
        HeaderValue::try_from([&own[..], rest].concat()).ok()
    };
    let mut replace = |name: HeaderName| {
        let value = headers.get(&name).and_then(translate)?;
        headers.insert(name, value)
    };
    Repaired { referer: replace(REFERER), origin: replace(ORIGIN) }
}

/// Rewrites what leads to the target to the alias' name: `Location`, `Content-Location`, `Refresh`, `Link`,
/// `Set-Cookie` and `Access-Control-Allow-Origin`, where they are the target's own. Removes what the target
/// says about its own name only: `Alt-Svc`, and `Strict-Transport-Security`, which would keep a client of
/// `localhost` from everything that is served there without TLS.
pub fn repair_response(headers: &mut HeaderMap, client: &ClientView, target: TargetView<'_>) {
    headers.remove(ALT_SVC);
    headers.remove(STRICT_TRANSPORT_SECURITY);
    for (name, value) in headers.iter_mut() {
        let bytes = value.as_bytes();
        let repaired = if *name == LOCATION || *name == CONTENT_LOCATION {
            urls::url(bytes, client, target)
        } else if *name == REFRESH {
            urls::refresh(bytes, client, target)
        } else if *name == LINK {
            urls::link(bytes, client, target)
        } else if *name == SET_COOKIE {
            without_domain(bytes, target.authority.host())
        } else if *name == ACCESS_CONTROL_ALLOW_ORIGIN {
            allowed_origin(bytes, client, target)
        } else {
            None
        };
        if let Some(Ok(repaired)) = repaired.map(HeaderValue::try_from) {
            *value = repaired;
        }
    }
}

/// The target allows its own origin, which to the client is the alias'.
fn allowed_origin(value: &[u8], client: &ClientView, target: TargetView<'_>) -> Option<Vec<u8>> {
    if urls::strip_target(value, target) != Some(b"") {
        return None;
    }
    Some(match &client.origin {
        Some(origin) => origin.as_bytes().to_vec(),
        None => format!("{}://{}", client.scheme, client.authority).into_bytes(),
    })
}

/// A cookie for the true name, or for a domain above it, becomes one for the host that the client asked
/// for: without `Domain`, because clients refuse a domain of a single label.
fn without_domain(cookie: &[u8], host: &str) -> Option<Vec<u8>> {
    let mut kept: Vec<&[u8]> = Vec::new();
    let mut dropped = false;
    for attribute in cookie.split(|byte| *byte == b';') {
        if !kept.is_empty() && is_domain_of(attribute, host) {
            dropped = true;
        } else {
            kept.push(attribute);
        }
    }
    dropped.then(|| kept.join(&b";"[..]))
}

fn is_domain_of(attribute: &[u8], host: &str) -> bool {
    let Ok(attribute) = std::str::from_utf8(attribute) else { return false };
    let Some((name, domain)) = attribute.split_once('=') else { return false };
    let domain = domain.trim().trim_start_matches('.').to_ascii_lowercase();
    name.trim().eq_ignore_ascii_case("domain")
        && (host == domain || host.strip_suffix(&domain).is_some_and(|rest| rest.ends_with('.')))
}

/// Adds who sent the request, if the alias is configured to.
pub fn add_forwarded(
    headers: &mut HeaderMap,
    forwarded: Forwarded,
    peer: IpAddr,
    client: &ClientView,
) {
    match forwarded {
        Forwarded::Off => {}
        Forwarded::XForwarded => {
            append_list(headers, HeaderName::from_static("x-forwarded-for"), &peer.to_string());
            let proto = HeaderValue::from_static(client.scheme);
            headers.insert(HeaderName::from_static("x-forwarded-proto"), proto);
            if let Ok(host) = HeaderValue::from_str(client.authority.as_str()) {
                headers.insert(HeaderName::from_static("x-forwarded-host"), host);
            }
        }
        Forwarded::Rfc7239 => {
            // RFC 7239 §6: IPv6 addresses are in brackets and quotes; a port requires quotes too.
            let node = match peer {
                IpAddr::V4(v4) => v4.to_string(),
                IpAddr::V6(v6) => format!("\"[{v6}]\""),
            };
            let element =
                format!("for={node};host=\"{}\";proto={}", client.authority, client.scheme);
            append_list(headers, FORWARDED, &element);
        }
    }
}

fn append_list(headers: &mut HeaderMap, name: HeaderName, element: &str) {
    let mut list: Vec<&str> =
        headers.get_all(&name).iter().filter_map(|value| value.to_str().ok()).collect();
    list.push(element);
    if let Ok(value) = HeaderValue::try_from(list.join(", ")) {
        headers.insert(name, value);
    }
}

/// The trace id of a W3C `traceparent`, for the access log.
pub fn trace_id(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get("traceparent")?.to_str().ok()?;
    let id = value.split('-').nth(1)?;
    (id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some(id)
}

#[cfg(test)]
mod tests;
