//! Which fields may be in trailers.

use http::{HeaderMap, HeaderName};

/// Fields that are meaningless or harmful in trailers (RFC 7230 §4.1.2, RFC 9110 §6.5.1). Some recipients merge
/// trailers into the header section: they must not bypass what is checked or rewritten there.
const FORBIDDEN: &[&str] = &[
    // Framing and content: a recipient that used these would read another message.
    "content-encoding",
    "content-length",
    "content-range",
    "content-type",
    "trailer",
    "transfer-encoding",
    // Connection-specific. In HTTP/2 they make the message malformed (RFC 9113 §8.2.2).
    "connection",
    "keep-alive",
    "proxy-connection",
    "te",
    "upgrade",
    // Routing.
    "forwarded",
    "host",
    "max-forwards",
    "via",
    // Authentication.
    "authorization",
    "cookie",
    "proxy-authenticate",
    "proxy-authorization",
    "set-cookie",
    "www-authenticate",
    // Request modifiers, and response control data.
    "age",
    "cache-control",
    "date",
    "expect",
    "expires",
    "location",
    "pragma",
    "range",
    "retry-after",
    "vary",
];

/// The same, as prefixes of names: conditions, and what proxies add about a request's origin.
const FORBIDDEN_PREFIXES: &[&str] = &["if-", "x-forwarded-"];

/// Removes the trailers that must not be forwarded. `nominated` are the fields nominated by `Connection` in the
/// message's header section, which applies to its trailers too (RFC 9110 §7.6.1).
pub fn strip_trailers(trailers: &mut HeaderMap, nominated: &[HeaderName]) {
    let mut dropped: Vec<HeaderName> = connection_options(trailers);
    dropped.extend(trailers.keys().filter(|name| is_forbidden(name.as_str())).cloned());
    for name in dropped.iter().chain(nominated) {
        trailers.remove(name);
    }
}

fn is_forbidden(name: &str) -> bool {
    FORBIDDEN.contains(&name) || FORBIDDEN_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

/// What a `Connection` field in the trailers names: it does not belong there, but it concerns this hop.
fn connection_options(trailers: &HeaderMap) -> Vec<HeaderName> {
    let lines = trailers.get_all(http::header::CONNECTION).into_iter();
    let options = lines.flat_map(|line| line.as_bytes().split(|byte| *byte == b','));
    options.filter_map(|option| HeaderName::from_bytes(option.trim_ascii()).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn what_frames_routes_or_authenticates_is_dropped_and_the_rest_stays() {
        let mut trailers = HeaderMap::new();
        for name in FORBIDDEN.iter().chain(&["if-match", "x-forwarded-for"]) {
            trailers.insert(HeaderName::from_static(name), HeaderValue::from_static("x"));
        }
        let kept = ["grpc-status", "grpc-message", "digest", "etag", "server-timing", "x-sum"];
        for name in kept.iter().chain(&["x-hop", "x-nominated"]) {
            trailers.append(HeaderName::from_static(name), HeaderValue::from_static("x"));
        }
        let connection = HeaderValue::from_static("close, X-Hop, not a name");
        trailers.insert(http::header::CONNECTION, connection);
        strip_trailers(&mut trailers, &[HeaderName::from_static("x-nominated")]);
        let mut left: Vec<_> = trailers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        let mut kept = kept.to_vec();
        kept.sort_unstable();
        assert_eq!(left, kept);
    }
}
