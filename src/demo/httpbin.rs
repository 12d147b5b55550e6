//! The responses of httpbin.org that the demo and the tests need: a pure function from a request to
//! an [`HttpbinResponse`].
//!
//! There are two differences: request headers of proxies (`X-Forwarded-For`, `Via`, …) are shown, which
//! httpbin.org hides, and a multipart body is shown as a whole in `data` instead of being parsed.

use std::{collections::BTreeMap, net::IpAddr, time::Duration};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header, request};
use serde::Serialize;
use serde_json::Value;

/// The longest `/delay`, as on httpbin.org.
const MAX_DELAY: Duration = Duration::from_secs(10);
/// The most `/bytes`, as on httpbin.org.
const MAX_BYTES: usize = 100 * 1024;
/// The most lines of `/stream`, as on httpbin.org.
const MAX_LINES: usize = 100;

/// A response and its delay.
#[derive(Debug)]
pub struct HttpbinResponse {
    /// The status.
    pub status: StatusCode,
    /// The header fields, except Content-Length and Date.
    pub headers: HeaderMap,
    /// The body.
    pub body: HttpbinBody,
    /// How long to wait before the response.
    pub delay: Duration,
}

/// A body of known length, or a streamed one.
#[derive(Debug)]
pub enum HttpbinBody {
    /// Sent as a whole, with its length.
    Whole(Bytes),
    /// Sent piece by piece, without a length: chunked in HTTP/1.1.
    Streamed(Vec<Bytes>),
}

/// The response to a request from `peer` with `body`.
pub fn respond(head: &request::Parts, body: &[u8], peer: IpAddr) -> HttpbinResponse {
    let seen = Seen { head, body, peer };
    let mut response = seen.route();
    // Every response allows browsers to call httpbin.org from any page.
    let origin = head.headers.get(header::ORIGIN).cloned();
    response.headers.insert(
        header::ACCESS_CONTROL_ALLOW_ORIGIN,
        origin.unwrap_or(HeaderValue::from_static("*")),
    );
    response
        .headers
        .insert(header::ACCESS_CONTROL_ALLOW_CREDENTIALS, HeaderValue::from_static("true"));
    response
}

impl HttpbinResponse {
    fn empty(status: StatusCode) -> Self {
        Self {
            status,
            headers: HeaderMap::new(),
            body: HttpbinBody::Whole(Bytes::new()),
            delay: Duration::ZERO,
        }
    }

    fn json(value: &impl Serialize) -> Self {
        match serde_json::to_vec_pretty(value) {
            Ok(mut text) => {
                text.push(b'\n');
                Self::empty(StatusCode::OK)
                    .with(header::CONTENT_TYPE, "application/json")
                    .body(text.into())
            }
            Err(error) => Self::text(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
        }
    }

    /// A response with a line of text as its body.
    pub fn text(status: StatusCode, text: &str) -> Self {
        Self::empty(status)
            .with(header::CONTENT_TYPE, "text/plain; charset=utf-8")
            .body(format!("{text}\n").into())
    }

    fn redirect(status: StatusCode, location: &str) -> Self {
        Self::empty(status).with(header::LOCATION, location)
    }

    /// Omits the field if the value is invalid, because it may come from the client's query.
    fn with(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.append(name, value);
        }
        self
    }

    fn body(mut self, body: Bytes) -> Self {
        self.body = HttpbinBody::Whole(body);
        self
    }
}

/// A request as it was received.
struct Seen<'a> {
    head: &'a request::Parts,
    body: &'a [u8],
    peer: IpAddr,
}

impl Seen<'_> {
    fn route(&self) -> HttpbinResponse {
        let path = self.head.uri.path();
        // `*` and CONNECT's empty path have no slash.
        let asked = path.strip_prefix('/').unwrap_or(path);
        let (first, rest) = asked.split_once('/').unwrap_or((asked, ""));
        let reads = matches!(self.head.method, Method::GET | Method::HEAD);
        match (first, rest) {
            ("anything", _) => HttpbinResponse::json(&self.everything()),
            ("delay", seconds) => self.delay(seconds),
            ("status", code) => status(code),
            ("redirect-to", "") => self.redirect_to(),
            ("get" | "headers" | "cookies" | "bytes" | "stream", _) if !reads => {
                HttpbinResponse::empty(StatusCode::METHOD_NOT_ALLOWED)
                    .with(header::ALLOW, "GET, HEAD")
            }
            ("get", "") => HttpbinResponse::json(&self.basics()),
            ("headers", "") => {
                HttpbinResponse::json(&BTreeMap::from([("headers", self.headers())]))
            }
            ("cookies", "") => {
                HttpbinResponse::json(&BTreeMap::from([("cookies", self.cookies())]))
            }
            ("cookies", "set") => self.set_cookies(),
            ("bytes", count) => bytes(count),
            ("stream", count) => self.stream(count),
            _ => HttpbinResponse::text(StatusCode::NOT_FOUND, &format!("there is no {path} here")),
        }
    }

    fn basics(&self) -> Basics {
        Basics {
            args: fold(self.query()),
            headers: self.headers(),
            origin: self.peer.to_string(),
            url: self.url(),
        }
    }

    fn everything(&self) -> Everything {
        let is_form =
            self.head.headers.get(header::CONTENT_TYPE).is_some_and(|kind| {
                kind.as_bytes().starts_with(b"application/x-www-form-urlencoded")
            });
        let (data, form) = if is_form {
            (String::new(), fold(form_urlencoded::parse(self.body)))
        } else {
            (self.data(), BTreeMap::new())
        };
        Everything {
            args: fold(self.query()),
            json: serde_json::from_str(&data).unwrap_or(Value::Null),
            data,
            files: BTreeMap::new(),
            form,
            headers: self.headers(),
            method: self.head.method.to_string(),
            origin: self.peer.to_string(),
            url: self.url(),
        }
    }

    fn data(&self) -> String {
        match str::from_utf8(self.body) {
            Ok(text) => text.to_owned(),
            Err(_) => format!(
                "data:application/octet-stream;base64,{}",
                BASE64_STANDARD.encode(self.body)
            ),
        }
    }

    fn query(&self) -> form_urlencoded::Parse<'_> {
        form_urlencoded::parse(self.head.uri.query().unwrap_or_default().as_bytes())
    }

    fn parameter(&self, name: &str) -> Option<String> {
        self.query().find(|(key, _)| key == name).map(|(_, value)| value.into_owned())
    }

    /// `Host`, or `:authority` in HTTP/2.
    fn host(&self) -> String {
        match host(&self.head.uri, &self.head.headers) {
            Some(host) => host.to_owned(),
            None => String::new(),
        }
    }

    fn url(&self) -> String {
        let path = self.head.uri.path_and_query().map_or("/", |path| path.as_str());
        format!("https://{}{path}", self.host())
    }

    /// httpbin.org gets fields through WSGI: names in title case, repeated fields joined with commas.
    fn headers(&self) -> BTreeMap<String, String> {
        let mut shown = BTreeMap::from([("Host".to_owned(), self.host())]);
        for name in self.head.headers.keys().filter(|name| **name != header::HOST) {
            let values = self.head.headers.get_all(name).iter();
            let values: Vec<_> =
                values.map(|value| String::from_utf8_lossy(value.as_bytes())).collect();
            shown.insert(title_case(name.as_str()), values.join(","));
        }
        shown
    }

    fn cookies(&self) -> BTreeMap<String, String> {
        self.head
            .headers
            .get_all(header::COOKIE)
            .iter()
            .filter_map(|field| field.to_str().ok())
            .flat_map(|field| field.split(';'))
            .filter_map(|pair| pair.trim().split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    fn set_cookies(&self) -> HttpbinResponse {
        self.query().fold(
            HttpbinResponse::redirect(StatusCode::FOUND, "/cookies"),
            |response, (name, value)| {
                response.with(header::SET_COOKIE, &format!("{name}={value}; Secure; Path=/"))
            },
        )
    }

    fn redirect_to(&self) -> HttpbinResponse {
        let Some(url) = self.parameter("url") else {
            return HttpbinResponse::text(StatusCode::BAD_REQUEST, "redirect-to needs ?url=");
        };
        let asked = self.parameter("status_code").and_then(|code| code.parse().ok());
        let status = asked.filter(StatusCode::is_redirection).unwrap_or(StatusCode::FOUND);
        HttpbinResponse::redirect(status, &url)
    }

    fn delay(&self, seconds: &str) -> HttpbinResponse {
        match seconds.parse().map(Duration::try_from_secs_f64) {
            Ok(Ok(delay)) => HttpbinResponse {
                delay: delay.min(MAX_DELAY),
                ..HttpbinResponse::json(&self.everything())
            },
            _ => HttpbinResponse::text(StatusCode::BAD_REQUEST, "delay takes a number of seconds"),
        }
    }

    fn stream(&self, count: &str) -> HttpbinResponse {
        let Ok(count) = count.parse::<usize>() else {
            return HttpbinResponse::text(
                StatusCode::BAD_REQUEST,
                "stream takes a number of lines",
            );
        };
        let basics = self.basics();
        let lines = (0..count.min(MAX_LINES))
            .filter_map(|id| serde_json::to_vec(&Line { basics: &basics, id }).ok())
            .map(|mut line| {
                line.push(b'\n');
                Bytes::from(line)
            });
        HttpbinResponse {
            body: HttpbinBody::Streamed(lines.collect()),
            ..HttpbinResponse::empty(StatusCode::OK)
        }
        .with(header::CONTENT_TYPE, "application/json")
    }
}

/// The `Host` of a request in any version of HTTP.
pub fn host<'a>(uri: &'a Uri, headers: &'a HeaderMap) -> Option<&'a str> {
    let field = headers.get(header::HOST).and_then(|host| host.to_str().ok());
    field.or_else(|| uri.authority().map(|authority| authority.as_str()))
}

fn status(code: &str) -> HttpbinResponse {
    // A 1xx response is not final: a client would wait for another one.
    let Some(status) = code.parse::<StatusCode>().ok().filter(|code| !code.is_informational())
    else {
        return HttpbinResponse::text(StatusCode::BAD_REQUEST, "Invalid status code");
    };
    let response = HttpbinResponse::empty(status);
    match status.as_u16() {
        301 | 302 | 303 | 305 | 307 => response.with(header::LOCATION, "/redirect/1"),
        401 => response.with(header::WWW_AUTHENTICATE, "Basic realm=\"Fake Realm\""),
        _ => response,
    }
}

fn bytes(count: &str) -> HttpbinResponse {
    let Ok(count) = count.parse::<usize>() else {
        return HttpbinResponse::text(StatusCode::BAD_REQUEST, "bytes takes a number of bytes");
    };
    let random = std::iter::repeat_with(|| fastrand::u8(..)).take(count.min(MAX_BYTES)).collect();
    HttpbinResponse::empty(StatusCode::OK)
        .with(header::CONTENT_TYPE, "application/octet-stream")
        .body(random)
}

fn title_case(name: &str) -> String {
    let mut start = true;
    name.chars()
        .map(|letter| {
            let shown = if start { letter.to_ascii_uppercase() } else { letter };
            start = letter == '-';
            shown
        })
        .collect()
}

/// The value of a key that occurs once; a list for one that occurs several times.
fn fold(pairs: form_urlencoded::Parse<'_>) -> BTreeMap<String, Value> {
    let mut folded = BTreeMap::new();
    for (key, value) in pairs {
        let value = Value::from(value.into_owned());
        match folded.get_mut(&*key) {
            None => {
                folded.insert(key.into_owned(), value);
            }
            Some(Value::Array(values)) => values.push(value),
            Some(first) => *first = Value::Array(vec![first.take(), value]),
        }
    }
    folded
}

// The fields of these are in alphabetical order, because httpbin.org sorts its keys.

#[derive(Serialize)]
struct Basics {
    args: BTreeMap<String, Value>,
    headers: BTreeMap<String, String>,
    origin: String,
    url: String,
}

#[derive(Serialize)]
struct Everything {
    args: BTreeMap<String, Value>,
    data: String,
    files: BTreeMap<String, Value>,
    form: BTreeMap<String, Value>,
    headers: BTreeMap<String, String>,
    json: Value,
    method: String,
    origin: String,
    url: String,
}

#[derive(Serialize)]
struct Line<'a> {
    #[serde(flatten)]
    basics: &'a Basics,
    id: usize,
}

#[cfg(test)]
mod tests;
