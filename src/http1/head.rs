//! Heads: from bytes to the `http` crate's parts, and back.

use std::mem::MaybeUninit;

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, Version,
    header::{CONTENT_LENGTH, TRANSFER_ENCODING},
    request, response,
    uri::PathAndQuery,
};

/// A request with more fields is refused, as by most servers. Responses with more are rare, and cost an
/// allocation.
const MAX_FIELDS: usize = 100;

/// A response with more is refused: as many fields as fit into a head of the maximal size would take ten
/// times its memory here.
const MAX_RESPONSE_FIELDS: usize = 2048;

/// `http::Uri` allows no more.
const MAX_TARGET: usize = u16::MAX as usize - 1;

/// Why a head is malformed or ambiguous.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeadError {
    /// It breaks the grammar of RFC 9112.
    #[error("{0}")]
    Malformed(httparse::Error),
    /// A method, target or field that is not valid.
    #[error("invalid {0}")]
    Invalid(&'static str),
    /// A request line that ends in the version of another protocol, as those of RTSP and SIP do.
    #[error("the request line is of another protocol")]
    OtherProtocol,
    /// More bytes than allowed.
    #[error("the head is too large")]
    TooLarge,
    /// The target has a `#`: a fragment is not part of it (RFC 9112 §3.2), and `http::Uri` would drop it
    /// silently.
    #[error("the target has a fragment")]
    Fragment,
    /// More than 100 fields in a request, 2,048 in a response.
    #[error("the head has too many fields")]
    TooManyFields,
    /// A target of more than 65,534 bytes.
    #[error("the target is too long")]
    TargetTooLong,
    /// Not a number, or two that differ.
    #[error("Content-Length is not a single number")]
    Length,
    /// A coding other than `chunked`, or any coding in HTTP/1.0 (RFC 9112 §6.1).
    #[error("Transfer-Encoding is not `chunked`, or the message is HTTP/1.0")]
    Coding,
}

/// Where a body ends (RFC 9112 §6.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// After this many bytes.
    Length(u64),
    /// With the last chunk and its trailers.
    Chunked,
    /// With the connection.
    Close,
}

/// How the names in a head were written, because a `HeaderMap` has them in lower case only. An extension of
/// the message.
#[derive(Clone, Debug)]
pub struct Spelling {
    head: Bytes,
    /// Where each name is.
    names: Vec<(u32, u32)>,
}

/// A response's reason phrase, if it is not the usual one of its status. An extension of the response.
#[derive(Clone, Debug)]
pub struct Reason(Bytes);

/// Removes a request's head from `bytes`, once it is complete.
pub fn parse_request(
    bytes: &mut BytesMut,
    max_size: usize,
) -> Result<Option<request::Parts>, HeadError> {
    let mut fields = [const { MaybeUninit::uninit() }; MAX_FIELDS];
    let mut parsed = httparse::Request::new(&mut []);
    let config = httparse::ParserConfig::default();
    let length = match config.parse_request_with_uninit_headers(&mut parsed, bytes, &mut fields) {
        Ok(httparse::Status::Complete(length)) if length <= max_size => length,
        Ok(httparse::Status::Partial) if bytes.len() < max_size => return Ok(None),
        Ok(_) => return Err(too_large(parsed.path)),
        Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooManyFields),
        Err(httparse::Error::Version) if names_other_protocol(bytes) => {
            return Err(HeadError::OtherProtocol);
        }
        Err(error) => return Err(HeadError::Malformed(error)),
    };
    let version = version(parsed.version);
    let method = Method::from_bytes(parsed.method.unwrap_or_default().as_bytes())
        .map_err(|_| HeadError::Invalid("method"))?;
    let target = parsed.path.unwrap_or_default();
    if target.len() > MAX_TARGET {
        return Err(HeadError::TargetTooLong);
    }
    if memchr::memchr(b'#', target.as_bytes()).is_some() {
        return Err(HeadError::Fragment);
    }
    let target = span(bytes, target.as_bytes());
    let mut spans = Spans::new();
    spans.find(bytes, parsed.headers);
    let head = bytes.split_to(length).freeze();
    let target = slice(&head, target);
    let uri = Uri::from_maybe_shared(target.clone()).map_err(|_| HeadError::Invalid("target"))?;
    let uri = match method {
        Method::OPTIONS if has_no_path(&target) => whole_server(uri)?,
        _ => uri,
    };
    let (mut parts, ()) = Request::new(()).into_parts();
    parts.method = method;
    parts.uri = uri;
    parts.version = version;
    if let Some(spelling) = fill(&mut parts.headers, head, spans)? {
        parts.extensions.insert(spelling);
    }
    Ok(Some(parts))
}

/// Removes a response's head from `bytes`, once it is complete.
pub fn parse_response(
    bytes: &mut BytesMut,
    max_size: usize,
) -> Result<Option<response::Parts>, HeadError> {
    let mut fields = [const { MaybeUninit::uninit() }; MAX_FIELDS];
    let mut spans = Spans::new();
    let line = match response_line(bytes, max_size, &mut fields, &mut spans) {
        Err(HeadError::TooManyFields) => {
            let mut fields = vec![MaybeUninit::uninit(); MAX_RESPONSE_FIELDS];
            response_line(bytes, max_size, &mut fields, &mut spans)?
        }
        line => line?,
    };
    let Some(StatusLine { version, status, reason, length }) = line else { return Ok(None) };
    let head = bytes.split_to(length).freeze();
    let (mut parts, ()) = Response::new(()).into_parts();
    parts.status = status;
    parts.version = version;
    if let Some(reason) = reason {
        parts.extensions.insert(Reason(slice(&head, reason)));
    }
    if let Some(spelling) = fill(&mut parts.headers, head, spans)? {
        parts.extensions.insert(spelling);
    }
    Ok(Some(parts))
}

/// Whether a target is an absolute URL that ends with its authority.
fn has_no_path(target: &[u8]) -> bool {
    let scheme = memchr::memmem::find(target, b"://");
    scheme.is_some_and(|at| !target[at + 3..].iter().any(|byte| matches!(byte, b'/' | b'?')))
}

/// RFC 9112 §3.2.4: OPTIONS for a URL without a path concerns the server as a whole. `http::Uri` has made
/// its path "/", which is a resource.
fn whole_server(uri: Uri) -> Result<Uri, HeadError> {
    let mut parts = uri.into_parts();
    parts.path_and_query = Some(PathAndQuery::from_static("*"));
    Uri::from_parts(parts).map_err(|_| HeadError::Invalid("target"))
}

/// A response's first line, and the length of its head.
struct StatusLine {
    version: Version,
    status: StatusCode,
    reason: Option<Span>,
    length: usize,
}

/// Finds the parts of a response's head, with room for so many `fields`; `None` if it is not complete.
fn response_line<'a>(
    bytes: &'a [u8],
    max_size: usize,
    fields: &mut [MaybeUninit<httparse::Header<'a>>],
    spans: &mut Spans,
) -> Result<Option<StatusLine>, HeadError> {
    let mut parsed = httparse::Response::new(&mut []);
    let config = httparse::ParserConfig::default();
    let length = match config.parse_response_with_uninit_headers(&mut parsed, bytes, fields) {
        Ok(httparse::Status::Complete(length)) if length <= max_size => length,
        Ok(httparse::Status::Partial) if bytes.len() < max_size => return Ok(None),
        Ok(_) => return Err(HeadError::TooLarge),
        Err(httparse::Error::TooManyHeaders) => return Err(HeadError::TooManyFields),
        Err(error) => return Err(HeadError::Malformed(error)),
    };
    let status = StatusCode::from_u16(parsed.code.unwrap_or_default())
        .map_err(|_| HeadError::Invalid("status"))?;
    let reason = parsed.reason.filter(|reason| {
        !reason.is_empty() && status.canonical_reason().is_none_or(|usual| usual != *reason)
    });
    let reason = reason.map(|reason| span(bytes, reason.as_bytes()));
    spans.find(bytes, parsed.headers);
    Ok(Some(StatusLine { version: version(parsed.version), status, reason, length }))
}

fn too_large(target: Option<&str>) -> HeadError {
    match target {
        Some(target) if target.len() > MAX_TARGET => HeadError::TargetTooLong,
        _ => HeadError::TooLarge,
    }
}

/// Whether the third and last word of a request line is a version, and not one of HTTP.
fn names_other_protocol(bytes: &[u8]) -> bool {
    let line = bytes.split(|byte| matches!(byte, b'\r' | b'\n')).next().unwrap_or_default();
    let mut words = line.splitn(3, |byte| *byte == b' ').skip(2);
    words.next().is_some_and(|version| {
        version.first().is_some_and(u8::is_ascii_uppercase)
            && version.iter().all(|byte| byte.is_ascii_graphic())
            && !version.get(..4).is_some_and(|name| name.eq_ignore_ascii_case(b"HTTP"))
    })
}

fn version(minor: Option<u8>) -> Version {
    if minor == Some(0) { Version::HTTP_10 } else { Version::HTTP_11 }
}

type Span = (u32, u32);

/// Where each field's name and value are, for as long as the parser borrows them.
struct Spans {
    few: [(Span, Span); MAX_FIELDS],
    count: usize,
    /// All of them, if there are more than a few.
    many: Vec<(Span, Span)>,
    has_capitals: bool,
}

impl Spans {
    fn new() -> Self {
        Self {
            few: [((0, 0), (0, 0)); MAX_FIELDS],
            count: 0,
            many: Vec::new(),
            has_capitals: false,
        }
    }

    fn find(&mut self, bytes: &[u8], fields: &[httparse::Header<'_>]) {
        let place = |field: &httparse::Header<'_>| {
            (span(bytes, field.name.as_bytes()), span(bytes, field.value))
        };
        if fields.len() > MAX_FIELDS {
            self.many = fields.iter().map(place).collect();
        }
        for (field, slot) in fields.iter().zip(&mut self.few) {
            *slot = place(field);
            self.count += 1;
        }
        let mut names = fields.iter().flat_map(|field| field.name.bytes());
        self.has_capitals = names.any(|byte| byte.is_ascii_uppercase());
    }

    fn all(&self) -> &[(Span, Span)] {
        if self.many.is_empty() { &self.few[..self.count] } else { &self.many }
    }
}

/// Where `part` is in `whole`, which contains it.
fn span(whole: &[u8], part: &[u8]) -> Span {
    let start = (part.as_ptr() as usize).saturating_sub(whole.as_ptr() as usize);
    (start as u32, (start + part.len()) as u32)
}

fn slice(head: &Bytes, (start, end): Span) -> Bytes {
    head.slice(start as usize..end as usize)
}

/// Puts the fields into `headers`, whose values share the head's bytes.
fn fill(headers: &mut HeaderMap, head: Bytes, spans: Spans) -> Result<Option<Spelling>, HeadError> {
    let fields = spans.all();
    headers.reserve(fields.len());
    for ((start, end), value) in fields {
        let name = HeaderName::from_bytes(&head[*start as usize..*end as usize])
            .map_err(|_| HeadError::Invalid("field name"))?;
        let value = HeaderValue::from_maybe_shared(slice(&head, *value))
            .map_err(|_| HeadError::Invalid("field value"))?;
        headers.append(name, value);
    }
    let names = || fields.iter().map(|(name, _)| *name).collect();
    Ok(spans.has_capitals.then(|| Spelling { names: names(), head }))
}

/// How a request's body is framed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestFraming {
    /// Where the body ends; `None` if there is none.
    pub body: Option<Framing>,
    /// The head has both `Content-Length` and `Transfer-Encoding`, as in an attempt to smuggle a request: the
    /// connection must be closed after the response (RFC 9112 §6.1).
    pub conflicting: bool,
}

/// How a request's body is framed. Removes a `Content-Length` that `Transfer-Encoding` overrides.
pub fn request_framing(parts: &mut request::Parts) -> Result<RequestFraming, HeadError> {
    let length = length(&mut parts.headers, false)?;
    if parts.headers.contains_key(TRANSFER_ENCODING) {
        // RFC 9112 §6.3: the coding overrides, and the length must not be passed on.
        parts.headers.remove(CONTENT_LENGTH);
        return match coding(parts.version, &parts.headers)? {
            // Nothing would mark its end.
            Framing::Close => Err(HeadError::Coding),
            framing => Ok(RequestFraming { body: Some(framing), conflicting: length.is_some() }),
        };
    }
    let body = length.filter(|length| *length > 0).map(Framing::Length);
    Ok(RequestFraming { body, conflicting: false })
}

/// How long the body of a response to `method` is (RFC 9112 §6.3).
pub fn response_framing(
    method: &Method,
    parts: &mut response::Parts,
) -> Result<Framing, HeadError> {
    let bodiless = parts.status.is_informational()
        || matches!(parts.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
        || *method == Method::HEAD
        || *method == Method::CONNECT && parts.status.is_success();
    if bodiless {
        return Ok(Framing::Length(0));
    }
    if parts.headers.contains_key(TRANSFER_ENCODING) {
        return coding(parts.version, &parts.headers);
    }
    Ok(length(&mut parts.headers, true)?.map_or(Framing::Close, Framing::Length))
}

/// The framing of a message with these codings. Only `chunked` is supported: any other would have to be
/// decoded or passed on.
fn coding(version: Version, headers: &HeaderMap) -> Result<Framing, HeadError> {
    // RFC 9112 §6.1: HTTP/1.0 has no codings, and a message that has one is not trusted.
    if version == Version::HTTP_10 {
        return Err(HeadError::Coding);
    }
    let mut lines = headers.get_all(TRANSFER_ENCODING).iter();
    match (lines.next().map(|line| line.as_bytes().trim_ascii()), lines.next()) {
        (Some(coding), None) if coding.eq_ignore_ascii_case(b"chunked") => Ok(Framing::Chunked),
        // RFC 2616's name for no coding.
        (Some(coding), None) if coding.eq_ignore_ascii_case(b"identity") => Ok(Framing::Close),
        _ => Err(HeadError::Coding),
    }
}

/// The value of all `Content-Length` fields, which are merged into one: some implementations misread several.
/// A response may have one even without a body (RFC 9110 §8.6).
fn length(headers: &mut HeaderMap, lists: bool) -> Result<Option<u64>, HeadError> {
    let mut length = None;
    let mut count = 0;
    for value in headers.get_all(CONTENT_LENGTH) {
        for number in value.as_bytes().split(|byte| lists && *byte == b',') {
            let number = if lists { number.trim_ascii() } else { number };
            // `parse` would accept a sign.
            let digits = !number.is_empty() && number.iter().all(u8::is_ascii_digit);
            let number = std::str::from_utf8(number).ok().filter(|_| digits);
            let number: u64 = number.and_then(|text| text.parse().ok()).ok_or(HeadError::Length)?;
            if length.is_some_and(|length| length != number) {
                return Err(HeadError::Length);
            }
            length = Some(number);
            count += 1;
        }
    }
    if count > 1
        && let Some(length) = length
    {
        headers.insert(CONTENT_LENGTH, length.into());
    }
    Ok(length)
}

/// Writes a request's head, and the empty line at its end.
pub fn push_request(out: &mut Vec<u8>, parts: &request::Parts) {
    let target = parts.uri.path_and_query().map_or("/", |target| target.as_str());
    out.extend_from_slice(parts.method.as_str().as_bytes());
    out.push(b' ');
    if target.starts_with('?') {
        // RFC 9112 §3.2.1: an empty path is sent as "/".
        out.push(b'/');
    }
    out.extend_from_slice(target.as_bytes());
    out.extend_from_slice(b" HTTP/1.1\r\n");
    push_fields(out, &parts.headers, parts.extensions.get());
    out.extend_from_slice(b"\r\n");
}

/// Writes a response's head in its version, without the empty line at its end.
pub fn push_response(out: &mut Vec<u8>, parts: &response::Parts) {
    let version: &[u8] =
        if parts.version == Version::HTTP_10 { b"HTTP/1.0 " } else { b"HTTP/1.1 " };
    out.extend_from_slice(version);
    out.extend_from_slice(parts.status.as_str().as_bytes());
    out.push(b' ');
    match parts.extensions.get::<Reason>() {
        Some(Reason(reason)) => out.extend_from_slice(reason),
        None => out.extend_from_slice(parts.status.canonical_reason().unwrap_or("").as_bytes()),
    }
    out.extend_from_slice(b"\r\n");
    push_fields(out, &parts.headers, parts.extensions.get());
}

/// Writes fields, each name as it was received.
pub(super) fn push_fields(out: &mut Vec<u8>, headers: &HeaderMap, spelling: Option<&Spelling>) {
    let mut cursor = 0;
    for (name, value) in headers {
        let name = name.as_str().as_bytes();
        out.reserve(name.len() + value.len() + 4);
        out.extend_from_slice(spelling.map_or(name, |spelling| spelling.of(name, &mut cursor)));
        out.extend_from_slice(b": ");
        out.extend_from_slice(value.as_bytes());
        out.extend_from_slice(b"\r\n");
    }
}

impl Spelling {
    /// How `name` was written. The search begins at `cursor`, because most fields are written in the order in
    /// which they arrived.
    fn of<'a>(&'a self, name: &'a [u8], cursor: &mut usize) -> &'a [u8] {
        for step in 0..self.names.len() {
            let mut index = *cursor + step;
            if index >= self.names.len() {
                index -= self.names.len();
            }
            let (start, end) = self.names[index];
            let written = &self.head[start as usize..end as usize];
            if spells(written, name) {
                *cursor = if index + 1 == self.names.len() { 0 } else { index + 1 };
                return written;
            }
        }
        name
    }
}

/// Whether `written` is `name`, which is in lower case.
fn spells(written: &[u8], name: &[u8]) -> bool {
    // Without a branch for each byte, so that the compiler can vectorize it.
    let differ =
        |differ: u8, (written, name): (&u8, &u8)| differ | (written.to_ascii_lowercase() ^ name);
    written.len() == name.len() && written.iter().zip(name).fold(0, differ) == 0
}
