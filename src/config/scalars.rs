//! The forms of single values.

use std::{
    any::type_name,
    marker::PhantomData,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    ops::RangeInclusive,
    path::PathBuf,
    time::Duration,
};

use base64::{Engine, prelude::BASE64_STANDARD};
use serde_json::{Value as Json, json};

use super::{
    HostHeader, NEVER, NamePattern, NameServer, ProxyUrl, ProxyVersion, RetryOn, Target, Via,
    form::{Form, OneOf, Scalar, Sub},
    names::normal_name,
    quantity,
    reader::Reader,
    tree::{Kind, Node},
};

/// `true` or `false`.
pub(crate) struct Bool;

impl Scalar for Bool {
    type Value = bool;

    const QUOTABLE: bool = false;

    fn expected() -> String {
        "`true` or `false` without quotes".to_owned()
    }

    fn parse(text: &str) -> Result<bool, String> {
        match text {
            "true" | "True" | "TRUE" => Ok(true),
            "false" | "False" | "FALSE" => Ok(false),
            _ => Err(format!("`{text}` is not `true` or `false`")),
        }
    }

    fn print(value: &bool) -> Json {
        json!(value)
    }

    fn schema() -> Json {
        json!({ "type": "boolean" })
    }
}

/// A whole number from `MIN` to `MAX`.
pub(crate) struct Whole<T, const MIN: u32, const MAX: u32>(PhantomData<T>);

/// A number that may be zero.
pub(crate) type Count = Whole<usize, 0, { u32::MAX }>;

/// A number above zero.
pub(crate) type Positive<T> = Whole<T, 1, { u32::MAX }>;

/// The port of a target.
pub(crate) type Port = Whole<u16, 1, 65535>;

impl<T, const MIN: u32, const MAX: u32> Scalar for Whole<T, MIN, MAX>
where
    T: Copy + TryFrom<u32> + serde::Serialize,
{
    type Value = T;

    const QUOTABLE: bool = false;

    fn expected() -> String {
        format!("a whole number from {MIN} to {MAX} without quotes")
    }

    fn parse(text: &str) -> Result<T, String> {
        // `parse` would take a sign.
        let digits = text.bytes().all(|b| b.is_ascii_digit());
        let number = digits.then(|| text.parse().ok()).flatten();
        number
            .filter(|number| (MIN..=MAX).contains(number))
            .and_then(|number| T::try_from(number).ok())
            .ok_or_else(|| format!("`{text}` is not a whole number from {MIN} to {MAX}"))
    }

    fn print(value: &T) -> Json {
        json!(value)
    }

    fn schema() -> Json {
        debug_assert!(T::try_from(MAX).is_ok(), "{} cannot hold {MAX}", type_name::<T>());
        json!({ "type": "integer", "minimum": MIN, "maximum": MAX })
    }
}

/// Implements [`Scalar`] for a value written as one string, by functions from and to text.
macro_rules! text_form {
    (
        $(#[doc = $about:literal])+
        $form:ident: $ty:ty, $expected:literal, $schema:expr,
        $parse:expr, $print:expr
    ) => {
        $(#[doc = $about])+
        pub(crate) struct $form;

        impl Scalar for $form {
            type Value = $ty;

            fn expected() -> String {
                $expected.to_owned()
            }

            fn parse(text: &str) -> Result<$ty, String> {
                let parse: fn(&str) -> Result<$ty, String> = $parse;
                parse(text)
            }

            fn print(value: &$ty) -> Json {
                let print: fn(&$ty) -> Json = $print;
                print(value)
            }

            fn schema() -> Json {
                $schema
            }
        }
    };
}

text_form! {
    /// A DNS name in normal form.
    Name: String, "a name such as `webscaler-manual`",
    json!({ "type": "string", "examples": ["webscaler-manual"] }),
    |text| match text.parse::<IpAddr>() {
        Ok(_) => Err(format!("`{text}` is an address; this must be a name")),
        Err(_) => normal_name(text).map_err(|e| e.to_string()),
    },
    |name| json!(name)
}

text_form! {
    /// One label of a DNS name.
    Label: String, "a namespace such as `default`",
    json!({ "type": "string", "pattern": "^[^.]+$", "examples": ["default"] }),
    |text| match normal_name(text) {
        Ok(name) if !name.contains('.') => Ok(name),
        Ok(name) => Err(format!("`{name}` has dots; a namespace is one word such as `default`")),
        Err(error) => Err(error.to_string()),
    },
    |label| json!(label)
}

text_form! {
    /// A name or IP in a Host field, without port, an IPv6 address in brackets; or `*`.
    HostName: String, "a Host name such as `api.example.com`, or `*` for any",
    json!({ "type": "string", "examples": ["api.example.com", "*"] }),
    |text| {
        if text == "*" {
            return Ok(text.to_owned());
        }
        if text.contains('*') {
            return Err(format!("`{text}` is neither a name nor `*`, which matches any name"));
        }
        match bracketed(text).parse::<Target>() {
            Ok(host @ Target { port: None, .. }) => Ok(host.to_string()),
            Ok(_) => Err(format!("`{text}` has a port; ports in a Host are ignored, so leave it out")),
            Err(error) => Err(error.to_string()),
        }
    },
    |host| json!(host)
}

text_form! {
    /// The name or IP that a certificate must be valid for.
    ServerName: String, "a name such as `httpbin.org`, or an IP",
    json!({ "type": "string", "examples": ["httpbin.org"] }),
    |text| {
        let digits = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
        match digits.parse::<IpAddr>() {
            Ok(ip) => Ok(ip.to_string()),
            Err(_) => normal_name(text).map_err(|e| format!("{e}; an IP is allowed here too")),
        }
    },
    |name| json!(name)
}

text_form! {
    /// A name, or a pattern of names.
    Pattern: NamePattern, "a name such as `httpbin.org`, or a pattern such as `*.example.com`",
    json!({ "type": "string", "examples": ["httpbin.org", "*.example.com"] }),
    |text| NamePattern::new(text).map_err(|e| match text {
        "*" => "`*` alone would allow everything: leave the list empty for that".to_owned(),
        _ => e.to_string(),
    }),
    |pattern| json!(pattern.0)
}

text_form! {
    /// A name or IP, with or without port.
    TargetText: Target, "a target such as `httpbin.org`, `10.0.0.7:8443` or `[2001:db8::7]:443`",
    json!({ "type": "string", "examples": ["httpbin.org", "10.0.0.7:8443", "[2001:db8::7]:443"] }),
    |text| text.parse().map_err(|e: super::BadTarget| e.to_string()),
    |target| json!(target.to_string())
}

text_form! {
    /// Where an HTTP proxy listens.
    ProxyUrlText: ProxyUrl, "the URL of a proxy such as `http://proxy.corp:3128`",
    json!({ "type": "string", "examples": ["http://proxy.corp:3128"] }),
    |text| text.parse().map_err(|e: super::BadProxyUrl| e.to_string()),
    |url| json!(url.to_string())
}

/// A section, or only its `url`.
pub(crate) struct UrlOr<S>(PhantomData<S>);

impl Form for UrlOr<Via> {
    type Value = Via;

    fn read(node: &Node, reader: &mut Reader) -> Option<Via> {
        match &node.kind {
            Kind::Scalar { .. } => {
                let url = <ProxyUrlText as Form>::read(node, reader)?;
                Some(Via { url, credentials: None })
            }
            _ => Sub::<Via>::read(node, reader),
        }
    }

    fn print(via: &Via) -> Json {
        match via.credentials {
            None => <ProxyUrlText as Form>::print(&via.url),
            Some(_) => Sub::<Via>::print(via),
        }
    }

    fn schema() -> Json {
        json!({ "anyOf": [Sub::<Via>::schema(), <ProxyUrlText as Form>::schema()] })
    }
}

text_form! {
    /// The Host that is sent to a target.
    HostChoice: HostHeader, "`rewrite`, `preserve`, or a literal such as `httpbin.org`",
    json!({
        "anyOf": [{ "enum": ["rewrite", "preserve"] }, { "type": "string" }],
        "examples": ["httpbin.org"],
    }),
    |text| match text {
        "rewrite" => Ok(HostHeader::Rewrite),
        "preserve" => Ok(HostHeader::Preserve),
        literal => match literal.parse::<Target>() {
            Ok(host) => match host.to_string().as_str() {
                word @ ("rewrite" | "preserve") => {
                    Err(format!("`{literal}` is not a literal Host: write `{word}`"))
                }
                host => Ok(HostHeader::Literal(host.to_owned())),
            },
            Err(error) => Err(format!("neither `rewrite` nor `preserve`, nor a literal Host: {error}")),
        },
    },
    |host| match host {
        HostHeader::Rewrite => json!("rewrite"),
        HostHeader::Preserve => json!("preserve"),
        HostHeader::Literal(literal) => json!(literal),
    }
}

text_form! {
    /// An address to listen on.
    ListenAddress: SocketAddr, "an address such as `127.0.0.1:8080`, or a port",
    json!({
        "anyOf": [{ "type": "string" }, { "type": "integer", "minimum": 0, "maximum": 65535 }],
        "examples": ["127.0.0.1:8080", "[::1]:8080", 8080],
    }),
    |text| quantity::listen_address(text).map_err(|e| e.to_string()),
    |address| json!(address.to_string())
}

text_form! {
    /// A DNS server: IP, or IP:port.
    DnsServer: NameServer, "a DNS server such as `10.96.0.10`, `10.96.0.10:5353` or `[fd00::a]:53`",
    json!({ "type": "string", "examples": ["10.96.0.10", "10.96.0.10:5353"] }),
    |text| text.parse().map_err(|e: super::BadNameServer| e.to_string()),
    |server| json!(server.to_string())
}

text_form! {
    /// A network, or one address.
    Network: ipnet::IpNet, "a network such as `10.0.0.0/8`",
    json!({ "type": "string", "examples": ["10.0.0.0/8", "fd00::/8"] }),
    |text| text
        .parse::<ipnet::IpNet>()
        .or_else(|_| text.parse::<IpAddr>().map(ipnet::IpNet::from))
        .map_err(|_| format!("`{text}` is not a network such as `10.0.0.0/8` or `fd00::/8`")),
    |network| json!(network.to_string())
}

text_form! {
    /// A length of time, which may be zero.
    Time: Duration, "a duration such as `250ms`, `5s` or `1h`",
    duration_schema(),
    |text| quantity::duration(text).map_err(|e| e.to_string()),
    |time| json!(quantity::print_duration(*time))
}

text_form! {
    /// A length of time above zero.
    PositiveTime: Duration, "a duration such as `250ms`, `5s` or `1h`",
    duration_schema(),
    |text| match Time::parse(text)? {
        Duration::ZERO => Err(format!("`{text}` must be longer than zero, such as `5s`")),
        time => Ok(time),
    },
    |time| json!(quantity::print_duration(*time))
}

text_form! {
    /// A length of time above zero, or `off`.
    TimeOrOff: Option<Duration>, "a duration such as `5s`, or `off`",
    // YAML 1.1 tools such as Helm turn `off` into `false`.
    json!({ "anyOf": [{ "enum": ["off", false, "false"] }, duration_schema()] }),
    |text| match text {
        "off" | "false" => Ok(None),
        _ => PositiveTime::parse(text).map(Some).map_err(|e| format!("{e}, or `off`")),
    },
    |time| json!(time.map_or_else(|| "off".to_owned(), quantity::print_duration))
}

text_form! {
    /// The same, where `off` is a limit that is never reached: [`NEVER`].
    TimeOrNever: Duration, "a duration such as `1h`, or `off`",
    <TimeOrOff as Scalar>::schema(),
    |text| TimeOrOff::parse(text).map(|time| time.unwrap_or(NEVER)),
    |time| <TimeOrOff as Scalar>::print(&Some(*time).filter(|time| *time != NEVER))
}

text_form! {
    /// A version of the PROXY protocol, or `off`.
    ProxyVersionOrOff: Option<ProxyVersion>, "`off`, `v1` or `v2`",
    // YAML 1.1 tools such as Helm turn `off` into `false`.
    json!({ "enum": ["off", "v1", "v2", false, "false"] }),
    |text| match text {
        "off" | "false" => Ok(None),
        _ => OneOf::parse(text).map(Some).map_err(|_| format!("`{text}` is not `off`, `v1` or `v2`")),
    },
    |version| json!(version.map_or("off", ProxyVersion::word))
}

text_form! {
    /// An application protocol's name in ALPN (RFC 7301): 1 to 255 characters.
    AlpnName: String, "the name of an application protocol such as `mqtt`",
    json!({ "type": "string", "minLength": 1, "maxLength": 255, "examples": ["mqtt"] }),
    |text| match text.len() {
        1..=255 => Ok(text.to_owned()),
        length => Err(format!("the name of an application protocol has 1 to 255 bytes; this one has {length}")),
    },
    |name| json!(name)
}

text_form! {
    /// The size of a request's head.
    HeaderSize: usize, "a size such as `64KiB`",
    json!({
        "anyOf": [{ "type": "string" }, { "type": "integer", "minimum": 1024, "maximum": 8_388_608 }],
        "examples": ["64KiB"],
    }),
    |text| match quantity::size(text)? {
        size @ 1024..=8_388_608 => Ok(size),
        _ => Err(format!("`{text}` is not between `1KiB` and `8MiB`")),
    },
    |size| json!(quantity::print_size(*size))
}

text_form! {
    /// A percentage.
    Percent: f64, "a percentage such as `20%`",
    json!({ "type": "string", "pattern": "^[0-9]+(\\.[0-9]+)?%$", "examples": ["20%"] }),
    quantity::percent,
    |share| json!(quantity::print_percent(*share))
}

text_form! {
    /// A range of statuses, or a single one.
    StatusRange: RangeInclusive<u16>, "statuses such as `200-399`, or one such as `204`",
    json!({
        "anyOf": [{ "type": "string" }, { "type": "integer", "minimum": 100, "maximum": 599 }],
        "examples": ["200-399", 204],
    }),
    |text| {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        match (first.parse(), last.parse()) {
            (Ok(first), Ok(last)) if 100 <= first && first <= last && last <= 599 => Ok(first..=last),
            _ => Err(format!("`{text}` is not a range of statuses within 100-599, such as `200-399`")),
        }
    },
    |range| json!(format!("{}-{}", range.start(), range.end()))
}

text_form! {
    /// What to retry on.
    RetryReason: RetryOn, "one of `connect`, `reset`, `502`, `503` or `504`",
    json!({ "enum": ["connect", "reset", 502, 503, 504, "502", "503", "504"] }),
    |text| match text {
        "connect" => Ok(RetryOn::Connect),
        "reset" => Ok(RetryOn::Reset),
        "502" => Ok(RetryOn::Status(502)),
        "503" => Ok(RetryOn::Status(503)),
        "504" => Ok(RetryOn::Status(504)),
        _ => Err(format!("`{text}` is not {}", RetryReason::expected())),
    },
    |reason| match reason {
        RetryOn::Connect => json!("connect"),
        RetryOn::Reset => json!("reset"),
        RetryOn::Status(status) => json!(status),
    }
}

text_form! {
    /// The digest of a public key.
    Pin: String, "a pin such as `sha256/BASE64` of a public key",
    json!({ "type": "string", "pattern": "^sha256/[A-Za-z0-9+/]{43}=$" }),
    |text| {
        let digest = text.strip_prefix("sha256/").and_then(|digits| BASE64_STANDARD.decode(digits).ok());
        match digest {
            Some(digest) if digest.len() == 32 => Ok(text.to_owned()),
            _ => Err(format!(
                "`{text}` is not `sha256/` and the BASE64 of 32 bytes; `openssl x509 -in CERT -pubkey -noout \
                 | openssl pkey -pubin -outform der | openssl dgst -sha256 -binary | base64` prints them"
            )),
        }
    },
    |pin| json!(pin)
}

text_form! {
    /// The path of a request.
    RequestPath: String, "a path such as `/healthz`",
    json!({ "type": "string", "pattern": "^/", "examples": ["/healthz"] }),
    |text| match text.parse::<http::uri::PathAndQuery>() {
        Ok(_) if text.starts_with('/') && !text.contains('#') => Ok(text.to_owned()),
        _ => Err(format!("`{text}` is not a path such as `/healthz`")),
    },
    |path| json!(path)
}

/// A path in the file system; a relative one is relative to the folder of the configuration.
pub(crate) struct File;

impl Form for File {
    type Value = PathBuf;

    fn read(node: &Node, reader: &mut Reader) -> Option<PathBuf> {
        match &node.kind {
            Kind::Scalar { text, .. } if !text.is_empty() && !node.is_null() => {
                Some(reader.folder.join(text))
            }
            _ => {
                let found = node.describe();
                reader.problem(node.at, &format!("expected a path, found {found}"));
                None
            }
        }
    }

    fn print(path: &PathBuf) -> Json {
        json!(path.to_string_lossy())
    }

    fn schema() -> Json {
        json!({ "type": "string", "minLength": 1 })
    }
}

fn duration_schema() -> Json {
    json!({
        "type": "string",
        "pattern": "^([0-9]+(ns|us|ms|s|m|h|d))+$",
        "examples": ["250ms", "5s", "1h"],
    })
}

/// An IPv6 address as written in a Host field.
fn bracketed(text: &str) -> String {
    match text.parse::<Ipv6Addr>() {
        Ok(ip) => format!("[{ip}]"),
        Err(_) => text.to_owned(),
    }
}
