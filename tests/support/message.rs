//! An HTTP/1.1 message as it stood on the wire.
//!
//! A reader of its own, and a strict one: what the proxy sends is judged by other code than the
//! proxy's.

/// A message, byte for byte.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// From the start line to the empty line, both included.
    pub head: String,
    /// The body without its framing.
    pub body: Vec<u8>,
    /// The body as it was framed, a chunked one's trailers included.
    pub framed_body: Vec<u8>,
    /// The trailers of a chunked body, as they were sent.
    pub trailers: Vec<(String, String)>,
}

impl Message {
    /// The first line, without its end.
    pub fn start_line(&self) -> &str {
        self.head.split("\r\n").next().unwrap()
    }

    /// The status of a response.
    pub fn status(&self) -> u16 {
        let start = self.start_line();
        let code = start.strip_prefix("HTTP/1.1 ").or(start.strip_prefix("HTTP/1.0 "));
        let code = code.unwrap_or_else(|| panic!("no response: {start:?}"));
        code.get(..3).unwrap_or_default().parse().unwrap()
    }

    /// The header fields in their order, with the case they were sent in.
    pub fn fields(&self) -> Vec<(&str, &str)> {
        self.head.trim_end().split("\r\n").skip(1).map(split_field).collect()
    }

    /// The one value of a field that may stand only once; `None` where it does not stand.
    #[track_caller]
    pub fn field(&self, name: &str) -> Option<&str> {
        let all = self.all(name);
        assert!(all.len() <= 1, "{name} stands more than once: {all:?}");
        all.first().copied()
    }

    /// Every value of a field, in order.
    pub fn all(&self, name: &str) -> Vec<&str> {
        let fields = self.fields().into_iter();
        fields.filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value).collect()
    }

    /// The body as text.
    #[track_caller]
    pub fn text(&self) -> &str {
        str::from_utf8(&self.body).unwrap()
    }

    /// The body as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body)
            .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&self.body)))
    }
}

/// How a message's body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is none.
    None,
    /// After so many bytes.
    Length(usize),
    /// With a chunk of no bytes.
    Chunked,
    /// With the connection.
    Close,
}

impl Framing {
    /// RFC 9112, section 6.3, for a request.
    pub fn of_request(head: &str) -> Self {
        match Self::declared(head) {
            // A request without a length has no body: it cannot end with its connection.
            Self::Close => Self::None,
            declared => declared,
        }
    }

    /// RFC 9112, section 6.3, for a response to `method`.
    pub fn of_response(head: &str, method: &str) -> Self {
        let status = head.split(' ').nth(1).unwrap_or_default();
        if method == "HEAD" || status.starts_with('1') || status == "204" || status == "304" {
            return Self::None;
        }
        if method == "CONNECT" && status.starts_with('2') {
            return Self::None;
        }
        Self::declared(head)
    }

    fn declared(head: &str) -> Self {
        let fields: Vec<_> = head.trim_end().split("\r\n").skip(1).map(split_field).collect();
        let values = |name: &str| -> Vec<&str> {
            let named = fields.iter().filter(|(key, _)| key.eq_ignore_ascii_case(name));
            named.map(|(_, value)| *value).collect()
        };
        let (codings, lengths) = (values("transfer-encoding"), values("content-length"));
        match (codings.as_slice(), lengths.as_slice()) {
            ([], []) => Self::Close,
            ([coding], []) if coding.eq_ignore_ascii_case("chunked") => Self::Chunked,
            ([], [length]) => Self::Length(length.parse().unwrap()),
            _ => panic!("a framing that smuggles: {head:?}"),
        }
    }
}

/// `name: value`, without the space around the value.
pub fn split_field(line: &str) -> (&str, &str) {
    let (name, value) = line.split_once(':').unwrap_or_else(|| panic!("no field: {line:?}"));
    assert!(!name.ends_with([' ', '\t']), "space before the colon: {line:?}");
    (name, value.trim_matches([' ', '\t']))
}
