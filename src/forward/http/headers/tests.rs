//! What must hold for any message, however odd.

#![allow(clippy::unwrap_used)]

use http::{Method, Request};
use proptest::{collection::vec, prelude::*, sample::select};

use super::*;

const NAMES: [&str; 16] = [
    "host",
    "connection",
    "keep-alive",
    "proxy-connection",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "transfer-encoding",
    "upgrade",
    "content-length",
    "trailer",
    "expect",
    "x-one",
    "x-two",
    "cookie",
    "set-cookie",
];

/// Names, tokens that mean something, and what means nothing, in lists.
fn value() -> impl Strategy<Value = HeaderValue> {
    let token = prop_oneof![
        select(NAMES.as_slice()).prop_map(|name| name.as_bytes().to_vec()),
        select(&["X-ONE", "close", "Upgrade", "trailers", "gzip", "websocket", "h2c", "", " "])
            .prop_map(|token: &str| token.as_bytes().to_vec()),
        vec(prop_oneof![0x20..0x7f_u8, 0x80..=0xff_u8], 0..6),
    ];
    vec(token, 0..4).prop_map(|tokens| HeaderValue::from_bytes(&tokens.join(&b", "[..])).unwrap())
}

fn fields() -> impl Strategy<Value = HeaderMap> {
    vec((select(NAMES.as_slice()), value()), 0..12).prop_map(|fields| {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(HeaderName::from_static(name), value);
        }
        headers
    })
}

fn values<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Vec<&'a HeaderValue> {
    headers.get_all(name).iter().collect()
}

/// Whether a field is of one connection only: by its name, or because the message says so.
fn is_of_the_hop(headers: &HeaderMap, name: &HeaderName) -> bool {
    let nominated = headers.get_all(CONNECTION).iter().any(|line| {
        line.as_bytes()
            .split(|byte| *byte == b',')
            .any(|token| token.trim_ascii().eq_ignore_ascii_case(name.as_str().as_bytes()))
    });
    HOP_BY_HOP.contains(&name.as_str()) || nominated && *name != HOST && *name != CONTENT_LENGTH
}

/// Every field that is not of the hop stands as it stood.
fn assert_end_to_end_fields_stay(
    before: &HeaderMap,
    after: &HeaderMap,
    but: &[HeaderName],
) -> Result<(), TestCaseError> {
    for name in before.keys().filter(|name| !but.contains(name)) {
        if is_of_the_hop(before, name) {
            prop_assert!(!after.contains_key(name), "{name}");
        } else {
            prop_assert_eq!(values(before, name), values(after, name), "{}", name);
        }
    }
    prop_assert!(after.keys().all(|name| before.contains_key(name) || *name == CONNECTION));
    Ok(())
}

proptest! {
    #[test]
    fn a_request_loses_what_is_of_its_hop_and_nothing_else(before in fields(), upgrade: bool) {
        let mut after = before.clone();
        strip_request(&mut after, upgrade);
        assert_end_to_end_fields_stay(&before, &after, &[CONNECTION, TE, UPGRADE])?;

        let trailers = tokens(&before, &TE).any(|token| token.eq_ignore_ascii_case("trailers"));
        prop_assert_eq!(after.get(TE).map(HeaderValue::as_bytes), trailers.then_some(&b"trailers"[..]));
        prop_assert_eq!(after.get(UPGRADE), before.get(UPGRADE).filter(|_| upgrade));
        // Connection names exactly what is left for the next hop.
        let left = [TE, UPGRADE].into_iter().filter(|name| after.contains_key(name));
        let named: Vec<_> =
            tokens(&after, &CONNECTION).map(|token| HeaderName::try_from(token).unwrap()).collect();
        prop_assert_eq!(named, left.collect::<Vec<_>>());

        let once = after.clone();
        strip_request(&mut after, upgrade);
        prop_assert_eq!(once, after);
    }

    #[test]
    fn a_response_loses_what_is_of_its_hop_and_nothing_else(before in fields(), switching: bool) {
        let mut after = before.clone();
        strip_response(&mut after, switching);
        assert_end_to_end_fields_stay(&before, &after, &[CONNECTION, UPGRADE, CONTENT_LENGTH])?;
        let length = before.get(CONTENT_LENGTH).filter(|_| !before.contains_key(TRANSFER_ENCODING));
        prop_assert_eq!(after.get(CONTENT_LENGTH), length);
        prop_assert_eq!(after.get(UPGRADE), before.get(UPGRADE).filter(|_| switching));
        prop_assert_eq!(after.contains_key(CONNECTION), after.contains_key(UPGRADE));
    }

    #[test]
    fn a_target_keeps_its_bytes_whatever_the_connection(
        path in "/[!$-;=@-_a-z|~\\PC&&[^\"#<>?`\\\\{}]]{0,20}",
        query in proptest::option::of("[!$-;=?-~]{0,20}"),
        absolute: bool,
        http2: bool,
    ) {
        let target = format!("{path}{}", query.map(|query| format!("?{query}")).unwrap_or_default());
        let uri = if absolute { format!("http://alias:1{target}") } else { target.clone() };
        // What http refuses never comes so far.
        prop_assume!(uri.parse::<Uri>().is_ok());
        let mut head = head(Request::get(uri).header(HOST, "alias"));
        let host = HeaderValue::from_static("httpbin.org:8443");
        address(&mut head, "https", &host, http2, false).unwrap();
        prop_assert_eq!(head.uri.path_and_query().unwrap().as_str(), target);
        if http2 {
            prop_assert_eq!(head.uri.scheme_str(), Some("https"));
            prop_assert_eq!(head.uri.authority().unwrap().as_str(), "httpbin.org:8443");
            prop_assert!(head.headers.is_empty());
        } else {
            prop_assert_eq!(head.uri.authority(), None);
            prop_assert_eq!(&head.headers[HOST], &host);
        }
    }

    #[test]
    fn a_host_is_one_name_or_refused(hosts in vec(vec(0x20..=0xff_u8, 0..12), 0..3)) {
        let mut head = head(Request::get("/"));
        for host in hosts.iter().filter_map(|host| HeaderValue::from_bytes(host).ok()) {
            head.headers.append(HOST, host);
        }
        let sent = values(&head.headers, &HOST);
        match authority(&head) {
            Ok(authority) => {
                let authority = authority.unwrap();
                prop_assert_eq!(sent.len(), 1);
                prop_assert_eq!(authority.as_str().as_bytes(), sent[0].as_bytes());
                prop_assert!(!authority.host().is_empty() && !authority.as_str().contains('@'));
            }
            Err(BadRequest::SeveralHosts) => prop_assert!(sent.len() > 1),
            Err(BadRequest::NoHost) => prop_assert!(sent.is_empty() || sent[0].is_empty()),
            Err(_) => prop_assert_eq!(sent.len(), 1),
        }
    }

    #[test]
    fn a_location_at_the_target_comes_back_at_the_alias(
        own in "https://httpbin[.]org:8443|http://httpbin[.]org(:8443|:80)?",
        rest in vec(0x20..=0xff_u8, 0..20),
    ) {
        let rest = if rest.is_empty() { rest } else { [&b"/"[..], &rest].concat() };
        let Ok(location) = HeaderValue::from_bytes(&[own.as_bytes(), &rest].concat()) else {
            return Ok(());
        };
        let mut headers = HeaderMap::from_iter([(LOCATION, location)]);
        repair_response(&mut headers, &client(), target());
        let expected = [&b"http://alias:8080"[..], &rest].concat();
        prop_assert_eq!(headers[LOCATION].as_bytes(), &expected);
    }

    #[test]
    fn a_location_elsewhere_stays(
        scheme in "https?",
        authority in "(www[.])?(httpbin[.]org|evil)(:(8443|443|1))?(@evil|[.]evil|%2f)?",
        rest in "([/?#][!-~]{0,20})?",
    ) {
        let own = ["https://httpbin.org:8443", "http://httpbin.org:8443", "http://httpbin.org"];
        prop_assume!(!own.contains(&&*format!("{scheme}://{authority}")));
        let location = format!("{scheme}://{authority}{rest}");
        prop_assert_eq!(&repaired(LOCATION, &location), &location);
    }

    #[test]
    fn a_location_of_any_bytes_stays_unless_it_is_the_targets(location in vec(0x20..=0xff_u8, 0..30)) {
        let Ok(location) = HeaderValue::from_bytes(&location) else { return Ok(()) };
        let mut headers = HeaderMap::from_iter([(LOCATION, location.clone())]);
        repair_response(&mut headers, &client(), target());
        prop_assert_eq!(&headers[LOCATION], &location);
    }

    #[test]
    fn a_cookie_keeps_every_attribute_but_the_targets_domain(
        attributes in vec("(Path|Secure|HttpOnly|domain2|Domain|dOmAiN) ?(= ?[.]?(httpbin[.]org|org|evil[.]org|/|))?", 0..5),
    ) {
        let is_own = |attribute: &&String| {
            let Some((name, domain)) = attribute.split_once('=') else { return false };
            let domain = domain.trim().trim_start_matches('.');
            name.trim().eq_ignore_ascii_case("domain") && ["httpbin.org", "org"].contains(&domain)
        };
        let cookie = |attributes: Vec<&String>| {
            let mut parts = vec!["a=b".to_owned()];
            parts.extend(attributes.into_iter().cloned());
            parts.join("; ")
        };
        let sent = cookie(attributes.iter().collect());
        let kept = cookie(attributes.iter().filter(|attribute| !is_own(attribute)).collect());
        prop_assert_eq!(repaired(SET_COOKIE, &sent), kept);
    }

    #[test]
    fn a_signature_over_host_is_seen_wherever_it_stands(
        before in vec("[a-z-]{1,8}", 0..3),
        after in vec("[a-z-]{1,8}", 0..3),
        host in "(host|Host|HOST)",
    ) {
        let list = |separator: &str| {
            let host = [host.clone()];
            [&before[..], &host[..], &after[..]].concat().join(separator)
        };
        let signed = format!(
            "AWS4-HMAC-SHA256 Credential=a/b, SignedHeaders={}, Signature=c", list(";")
        );
        prop_assert!(signs_host(&head(Request::get("/").header(AUTHORIZATION, signed.clone()))));
        let others = signed.replace(&list(";"), "x-host;hosts");
        prop_assert!(!signs_host(&head(Request::get("/").header(AUTHORIZATION, others))));
        for separator in [";", "%3B", "%3b"] {
            let uri = format!("/o?a=b&X-Amz-SignedHeaders={}&c", list(separator));
            prop_assert!(signs_host(&head(Request::get(uri))));
        }
        let uri = format!("/o?SignedHeaders={}", list(";"));
        prop_assert!(!signs_host(&head(Request::get(uri))));
    }

    #[test]
    fn a_connection_is_kept_after_a_response_only_if_its_end_is_clear(headers in fields()) {
        let (reusable, _) = keep_alive(Version::HTTP_11, &headers);
        let close = tokens(&headers, &CONNECTION).any(|token| token.eq_ignore_ascii_case("close"));
        let both =
            headers.contains_key(TRANSFER_ENCODING) && headers.contains_key(CONTENT_LENGTH);
        prop_assert_eq!(reusable, !close && !both);
    }
}

#[test]
fn a_token_that_is_no_text_does_not_hide_its_neighbours() {
    let mut headers = HeaderMap::new();
    headers.insert(CONNECTION, HeaderValue::from_bytes(b"\xff, x-one").unwrap());
    headers.insert("x-one", HeaderValue::from_static("1"));
    strip_request(&mut headers, false);
    assert!(headers.is_empty(), "{headers:?}");
}

#[test]
fn a_default_port_in_a_location_is_no_other_origin() {
    let authority = Authority::from_static("httpbin.org");
    let target = TargetView { scheme: "https", authority: &authority };
    let mut headers = HeaderMap::new();
    headers.insert(LOCATION, HeaderValue::from_static("https://httpbin.org:443/a"));
    repair_response(&mut headers, &client(), target);
    assert_eq!(headers[LOCATION], "http://alias:8080/a");
    headers.insert(LOCATION, HeaderValue::from_static("https://httpbin.org:80/a"));
    repair_response(&mut headers, &client(), target);
    assert_eq!(headers[LOCATION], "https://httpbin.org:80/a");
}

#[test]
fn forwarded_writes_ipv6_as_its_grammar_has_it() {
    let mut headers = HeaderMap::new();
    let peer = "2001:db8::1".parse().unwrap();
    add_forwarded(&mut headers, Forwarded::Rfc7239, peer, &client());
    assert_eq!(headers[FORWARDED], "for=\"[2001:db8::1]\";host=\"alias:8080\";proto=http");
    add_forwarded(&mut headers, Forwarded::XForwarded, peer, &client());
    assert_eq!(headers["x-forwarded-for"], "2001:db8::1");
}

#[test]
fn an_upgrade_is_asked_for_in_both_fields_and_by_http_1_1_alone() {
    let ask = |connection: &str, protocol: &str, version| {
        let request = Request::get("/").version(version).header(CONNECTION, connection);
        upgrade(&head(request.header(UPGRADE, protocol))).is_some()
    };
    assert!(ask("keep-alive, UPGRADE", "websocket", Version::HTTP_11));
    assert!(!ask("keep-alive", "websocket", Version::HTTP_11));
    assert!(!ask("upgrade", "H2C", Version::HTTP_11));
    assert!(!ask("upgrade", "websocket", Version::HTTP_10));
}

#[test]
fn a_query_without_a_path_is_sent_behind_a_slash() {
    let host = HeaderValue::from_static("httpbin.org");
    for http2 in [false, true] {
        let mut head = head(Request::get("http://alias?a=b").header(HOST, "alias"));
        address(&mut head, "https", &host, http2, false).unwrap();
        assert_eq!(head.uri.path_and_query().unwrap().as_str(), "/?a=b");
    }
}

#[test]
fn http_2_is_put_together_again_for_http_1_1() {
    let crumbs = || {
        let request = Request::builder().method(Method::POST).version(Version::HTTP_2).uri("/");
        head(request.header(COOKIE, "a=1").header(COOKIE, "b=2"))
    };
    let host = HeaderValue::from_static("httpbin.org");
    let mut to_http1 = crumbs();
    address(&mut to_http1, "https", &host, false, false).unwrap();
    assert_eq!(values(&to_http1.headers, &COOKIE), ["a=1; b=2"]);
    assert_eq!(to_http1.headers[CONTENT_LENGTH], "0");
    let mut to_http2 = crumbs();
    address(&mut to_http2, "https", &host, true, false).unwrap();
    assert_eq!(values(&to_http2.headers, &COOKIE), ["a=1", "b=2"]);
    assert_eq!(to_http2.headers.get(CONTENT_LENGTH), None);
}

fn head(request: http::request::Builder) -> request::Parts {
    request.body(()).unwrap().into_parts().0
}

fn client() -> ClientView {
    let authority = Authority::from_static("alias:8080");
    ClientView { scheme: "http", authority, origin: None }
}

fn target() -> TargetView<'static> {
    static AUTHORITY: std::sync::OnceLock<Authority> = std::sync::OnceLock::new();
    let authority = AUTHORITY.get_or_init(|| Authority::from_static("httpbin.org:8443"));
    TargetView { scheme: "https", authority }
}

/// The field after repair.
fn repaired(name: HeaderName, value: &str) -> String {
    let mut headers = HeaderMap::new();
    headers.insert(&name, value.parse().unwrap());
    repair_response(&mut headers, &client(), target());
    headers[name].to_str().unwrap().to_owned()
}
