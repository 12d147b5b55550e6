//! What a handshake offers to the server.

/// The application protocols to offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Alpn {
    /// `http/1.1` only.
    Http1,
    /// `h2` only, and the server must accept it.
    Http2,
    /// `h2`, then `http/1.1`.
    Http2Or1,
    /// The protocols of `tcp.alpn`, if any.
    Listed,
    /// None: for databases.
    None,
}

/// The parts of a handshake's offer that a server may refuse.
#[derive(Clone, Copy, Debug)]
pub struct Offer {
    pub(super) alpn: Alpn,
    /// The long ClientHello of a post-quantum key exchange.
    pub(super) post_quantum: bool,
    pub(super) client_certificate: bool,
    /// No TLS 1.2.
    pub(super) requires_tls13: bool,
}

impl Alpn {
    /// What was offered, for messages.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Alpn::Http1 => "http/1.1",
            Alpn::Http2 => "h2",
            Alpn::Http2Or1 => "h2 or http/1.1",
            Alpn::Listed => "what `tcp.alpn` lists",
            Alpn::None => "what was offered",
        }
    }

    pub(super) fn protocols(self, listed: &[String]) -> Vec<Vec<u8>> {
        let names: &[&[u8]] = match self {
            Alpn::Http1 => &[b"http/1.1"],
            Alpn::Http2 => &[b"h2"],
            Alpn::Http2Or1 => &[b"h2", b"http/1.1"],
            Alpn::Listed => return listed.iter().map(|name| name.clone().into_bytes()).collect(),
            Alpn::None => &[],
        };
        names.iter().map(|name| name.to_vec()).collect()
    }
}
