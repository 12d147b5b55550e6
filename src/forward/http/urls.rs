//! Rewrites URLs in a response's fields from the target's origin to the alias'. Pure, and on bytes: what
//! servers write there is not always ASCII, and everything after the origin stays as it was.

use super::view::{ClientView, TargetView};

/// A URL of the target in the alias' name; `None` for any other.
pub(super) fn url(url: &[u8], client: &ClientView, target: TargetView<'_>) -> Option<Vec<u8>> {
    let rest = strip_target(url, target)?;
    let mut repaired = Vec::with_capacity(url.len() + client.authority.as_str().len());
    // A reference without a scheme stays without one.
    if !url.starts_with(b"//") {
        repaired.extend_from_slice(client.scheme.as_bytes());
        repaired.push(b':');
    }
    repaired.extend_from_slice(b"//");
    repaired.extend_from_slice(client.authority.as_str().as_bytes());
    repaired.extend_from_slice(rest);
    Some(repaired)
}

/// The same for `Refresh: 5; url=…`, as browsers read it (HTML, "shared declarative refresh steps").
pub(super) fn refresh(
    value: &[u8],
    client: &ClientView,
    target: TargetView<'_>,
) -> Option<Vec<u8>> {
    let place = url_of_refresh(value)?;
    let repaired = url(&value[place.clone()], client, target)?;
    Some([&value[..place.start], &repaired, &value[place.end..]].concat())
}

/// The same for each target of a `Link` (RFC 8288 §3), which is written in angle brackets.
pub(super) fn link(value: &[u8], client: &ClientView, target: TargetView<'_>) -> Option<Vec<u8>> {
    let mut repaired = Vec::new();
    let mut copied = 0;
    let mut at = 0;
    while at < value.len() {
        match value[at] {
            // A quoted parameter may contain anything.
            b'"' => at += quoted(&value[at..]),
            b'<' => {
                let start = at + 1;
                let length = value[start..].iter().position(|byte| *byte == b'>')?;
                at = start + length;
                if let Some(url) = url(&value[start..at], client, target) {
                    repaired.extend_from_slice(&value[copied..start]);
                    repaired.extend_from_slice(&url);
                    copied = at;
                }
            }
            _ => at += 1,
        }
    }
    if copied == 0 {
        return None;
    }
    repaired.extend_from_slice(&value[copied..]);
    Some(repaired)
}

/// What follows the target's own origin in a URL; `None` for any other origin.
///
/// A target behind a TLS proxy may write `http` URLs for itself. A client that follows them would
/// bypass the alias and TLS.
pub(super) fn strip_target<'a>(url: &'a [u8], target: TargetView<'_>) -> Option<&'a [u8]> {
    let (scheme, authority, rest) = split_origin(url)?;
    let https = target.scheme == "https";
    let own = target.authority.as_str();
    let is = |name: &str, port: &str| {
        let bare = authority.strip_suffix(port.as_bytes()).unwrap_or(authority);
        bare.eq_ignore_ascii_case(name.as_bytes())
    };
    let same = if scheme.is_empty() || scheme.eq_ignore_ascii_case(target.scheme.as_bytes()) {
        is(own, if https { ":443" } else { ":80" })
    } else {
        https
            && scheme.eq_ignore_ascii_case(b"http")
            && (is(own, ":443") || is(target.authority.host(), ":80"))
    };
    same.then_some(rest)
}

/// Scheme (empty for `//authority/…`), authority, and what follows.
pub(super) fn split_origin(url: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let (scheme, rest) = match url.strip_prefix(b"//") {
        Some(rest) => (&url[..0], rest),
        None => {
            let end = url.windows(3).position(|window| window == b"://")?;
            (&url[..end], &url[end + 3..])
        }
    };
    let legal = |byte: &u8| byte.is_ascii_alphanumeric() || b"+-.".contains(byte);
    let is_scheme = scheme.iter().all(legal) && (!scheme.is_empty() || url.starts_with(b"//"));
    let end = rest.iter().position(|byte| b"/?#".contains(byte)).unwrap_or(rest.len());
    is_scheme.then(|| (scheme, &rest[..end], &rest[end..]))
}

/// Where the URL of a `Refresh` is.
fn url_of_refresh(value: &[u8]) -> Option<std::ops::Range<usize>> {
    let skip = |mut at: usize, wanted: fn(u8) -> bool| {
        while value.get(at).is_some_and(|byte| wanted(*byte)) {
            at += 1;
        }
        at
    };
    let space: fn(u8) -> bool = |byte| matches!(byte, b' ' | b'\t');
    let begin = skip(0, space);
    let time = skip(begin, |byte| byte.is_ascii_digit() || byte == b'.');
    let mut at = skip(time, space);
    if matches!(value.get(at), Some(b';' | b',')) {
        at = skip(at + 1, space);
    }
    if time == begin || at == time {
        return None;
    }
    if value.get(at..at + 3).is_some_and(|word| word.eq_ignore_ascii_case(b"url")) {
        let equals = skip(at + 3, space);
        if value.get(equals) == Some(&b'=') {
            at = skip(equals + 1, space);
        }
    }
    let quote = value.get(at).copied().filter(|byte| matches!(byte, b'\'' | b'"'));
    let start = at + usize::from(quote.is_some());
    let length = quote.and_then(|quote| value[start..].iter().position(|byte| *byte == quote));
    Some(start..length.map_or(value.len(), |length| start + length))
}

/// The length of the quoted string that begins here, including its quotes (RFC 9110 §5.6.4).
fn quoted(value: &[u8]) -> usize {
    let mut at = 1;
    while at < value.len() {
        match value[at] {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    value.len().max(1)
}

#[cfg(test)]
mod tests {
    use http::uri::Authority;
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const OWN: &str = "https://httpbin.org";
    const ALIAS: &str = "http://alias:8080";

    fn repair(
        what: fn(&[u8], &ClientView, TargetView<'_>) -> Option<Vec<u8>>,
        value: &[u8],
    ) -> Vec<u8> {
        let client = ClientView {
            scheme: "http",
            authority: Authority::from_static("alias:8080"),
            origin: None,
        };
        let authority = Authority::from_static("httpbin.org");
        let target = TargetView { scheme: "https", authority: &authority };
        what(value, &client, target).unwrap_or_else(|| value.to_vec())
    }

    proptest! {
        #[test]
        fn of_a_link_every_target_of_ours_is_repaired_and_nothing_else(
            links in vec(
                (
                    prop_oneof![Just(OWN), Just("https://cdn.example"), Just("")],
                    "/[!-;=?-~]{0,8}",
                    "(; ?(rel=next|title=\"([a-z<>,;]|\\\\[\"a])*\"|x)){0,3}",
                ),
                0..5,
            ),
        ) {
            let list = |own: &str| {
                let link = |(origin, path, rest): &(&str, String, String)| {
                    let origin = if *origin == OWN { own } else { *origin };
                    format!("<{origin}{path}>{rest}")
                };
                links.iter().map(link).collect::<Vec<_>>().join(", ")
            };
            let repaired = repair(link, list(OWN).as_bytes());
            prop_assert_eq!(String::from_utf8(repaired).unwrap(), list(ALIAS));
        }

        #[test]
        fn of_a_refresh_the_url_is_repaired_and_nothing_else(
            before in " ?[0-9]{1,3}([.][0-9])? ?[;,] ?((url|URL|uRl) ?= ?)?",
            quote in "['\"]?",
            path in "/[a-z?=&;,]{0,8}",
            after in "[a-z ]{0,3}",
        ) {
            let close = if quote.is_empty() { String::new() } else { format!("{quote}{after}") };
            let value = |own: &str| format!("{before}{quote}{own}{path}{close}");
            let repaired = repair(refresh, value(OWN).as_bytes());
            prop_assert_eq!(String::from_utf8(repaired).unwrap(), value(ALIAS));
        }

        #[test]
        fn what_does_not_name_the_target_stays(value in vec(any::<u8>(), 0..60)) {
            for what in [url, refresh, link] {
                prop_assert_eq!(&repair(what, &value), &value);
            }
        }

        #[test]
        fn no_bytes_around_the_targets_name_make_repair_panic(
            before in vec("[<>\"\\\\;,= 0-9url'%]{0,4}|\u{e9}", 0..4),
            after in vec(any::<u8>(), 0..20),
        ) {
            let value = [before.concat().as_bytes(), OWN.as_bytes(), &after].concat();
            for what in [url, refresh, link] {
                repair(what, &value);
            }
        }
    }
}
