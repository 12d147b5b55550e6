//! Access control of the admin listener.
//!
//! The listener has no credentials. Access depends on the caller's address. Web pages in a local browser can
//! also send requests to loopback, so requests with marks of a browser are refused.

use std::net::IpAddr;

use ::http::{HeaderMap, HeaderName, HeaderValue, Method, header, request, uri::Authority};

/// Sent by browsers with every request to loopback; a page cannot set or remove it.
const SEC_FETCH_SITE: HeaderName = HeaderName::from_static("sec-fetch-site");

/// Both ends of a connection.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ends {
    /// The client's address.
    pub(super) peer: IpAddr,
    /// The address that it connected to.
    pub(super) local: IpAddr,
}

/// Why a request is refused; `None` if it is allowed.
pub(super) fn refusal(head: &request::Parts, ends: Ends) -> Option<&'static str> {
    let path = head.uri.path();
    let is_probe = matches!(path, "/livez" | "/readyz");
    let is_public = is_probe || path == "/metrics";
    if !is_public && !is_loopback(ends.peer) {
        return Some("available on loopback only: use `kubectl port-forward`\n");
    }
    // From outside, a scraper may use any name for the pod. On loopback, a foreign name is that of a web page
    // with DNS rebinding. A probe reveals nothing that such a page could not measure, and kubelet sends the Host
    // of the manifest.
    let by_own_name = is_probe || is_public && !is_loopback(ends.local);
    if !by_own_name && !is_called_by_own_name(head) {
        return Some(
            "available by IP address or as localhost only: the request's Host is another name, as in a \
            DNS rebinding attack\n",
        );
    }
    // A page may send a POST to any origin.
    (head.method == Method::POST && is_from_page(&head.headers))
        .then_some("not available to web pages: use curl or another program\n")
}

fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

/// Whether the request's Host is an address or `localhost`, or is missing, as HTTP/1.0 allows. A browser always
/// sends the name of the URL.
fn is_called_by_own_name(head: &request::Parts) -> bool {
    let target = head.uri.authority().is_none_or(|authority| is_own(authority.host()));
    target && head.headers.get_all(header::HOST).iter().all(is_own_host)
}

fn is_own_host(host: &HeaderValue) -> bool {
    Authority::try_from(host.as_bytes()).is_ok_and(|authority| is_own(authority.host()))
}

/// An address cannot be used for DNS rebinding.
fn is_own(host: &str) -> bool {
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    host.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok()
}

fn is_from_page(headers: &HeaderMap) -> bool {
    // `none` means that the user entered the URL.
    let by_person = |site: &HeaderValue| site.as_bytes() == b"none";
    headers.contains_key(header::ORIGIN)
        || headers.get_all(SEC_FETCH_SITE).iter().any(|site| !by_person(site))
}

#[cfg(test)]
mod tests {
    use super::*;
    use ::http::Request;

    fn is_allowed(
        method: Method,
        target: &str,
        fields: &[(&str, &str)],
        [peer, local]: [&str; 2],
    ) -> bool {
        let mut request = Request::builder().method(method).uri(target);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let (head, ()) = request.body(()).unwrap().into_parts();
        let ends = Ends { peer: peer.parse().unwrap(), local: local.parse().unwrap() };
        refusal(&head, ends).is_none()
    }

    #[test]
    fn a_page_of_a_name_rebound_to_loopback_reads_nothing() {
        let is_allowed =
            |host, path| is_allowed(Method::GET, path, &[("host", host)], ["127.0.0.1"; 2]);
        for host in ["localhost:9990", "LOCALHOST", "127.0.0.1:9990", "[::1]:9990", "10.0.0.7"] {
            for path in ["/status", "/config", "/metrics"] {
                assert!(is_allowed(host, path), "{host} {path}");
            }
        }
        for host in ["attacker.example:9990", "localhost.attacker.example", "", "a b", "[a]"] {
            for path in ["/status", "/config", "/metrics", "/"] {
                assert!(!is_allowed(host, path), "{host} {path}");
            }
            assert!(is_allowed(host, "/readyz"), "{host}");
        }
    }

    #[test]
    fn every_name_that_a_request_says_counts() {
        let is_allowed = |target, fields| is_allowed(Method::GET, target, fields, ["127.0.0.1"; 2]);
        assert!(is_allowed("/metrics", &[]), "HTTP/1.0 does not require one");
        assert!(!is_allowed("/metrics", &[("host", "localhost"), ("host", "attacker.example")]));
        assert!(!is_allowed("http://attacker.example/metrics", &[("host", "localhost")]));
        assert!(is_allowed("http://localhost:9990/metrics", &[("host", "localhost:9990")]));
    }

    #[test]
    fn a_scraper_beyond_loopback_may_know_the_pod_by_any_name() {
        let host = [("host", "truename.monitoring.svc:9990")];
        let ends = ["10.0.0.9", "10.0.0.7"];
        assert!(is_allowed(Method::GET, "/metrics", &host, ends));
        assert!(!is_allowed(Method::GET, "/metrics", &host, ["127.0.0.1", "127.0.0.1"]));
        assert!(!is_allowed(
            Method::GET,
            "/metrics",
            &host,
            ["::ffff:127.0.0.1", "::ffff:127.0.0.1"]
        ));
    }

    #[test]
    fn from_outside_only_probes_and_metrics_are_available() {
        let is_allowed = |peer, method, path| is_allowed(method, path, &[], [peer, peer]);
        for path in ["/livez", "/readyz", "/metrics"] {
            assert!(is_allowed("10.0.0.7", Method::GET, path), "{path}");
        }
        let inner = ["/status", "/config", "/quit", "/reload", "/log", "/", "/livez/../status"];
        for path in inner {
            for peer in ["10.0.0.7", "fd00::7", "::ffff:10.0.0.7"] {
                assert!(!is_allowed(peer, Method::GET, path), "{peer} {path}");
                assert!(!is_allowed(peer, Method::POST, path), "{peer} {path}");
            }
            for peer in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
                assert!(is_allowed(peer, Method::POST, path), "{peer} {path}");
            }
        }
    }

    #[test]
    fn no_page_changes_anything() {
        let is_allowed =
            |fields: &[(&str, &str)]| is_allowed(Method::POST, "/quit", fields, ["127.0.0.1"; 2]);
        assert!(is_allowed(&[]));
        assert!(is_allowed(&[("sec-fetch-site", "none")]));
        for field in [
            ("origin", "https://evil.example"),
            ("origin", "null"),
            ("origin", "http://localhost:3000"),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
        ] {
            assert!(!is_allowed(&[field]), "{field:?}");
        }
    }
}
