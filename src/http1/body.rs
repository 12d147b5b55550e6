//! Bodies: their framing on the wire.

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue};
use http_body::{Frame, SizeHint};

use super::{
    Outbox,
    head::{Framing, push_fields},
};

/// The limit of a chunk-size line with its extensions, and of all extensions of a body together: they are
/// ignored, but have to be read.
const MAX_SIZE_LINE: usize = 4096;
const MAX_EXTENSIONS: usize = 16 * 1024;

/// The limits of trailers.
const MAX_TRAILERS: usize = 16 * 1024;
const MAX_TRAILER_FIELDS: usize = 64;

/// Why a body does not match its framing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// The connection ended before the body did.
    #[error("the body broke off")]
    Incomplete,
    /// A chunk whose size cannot be read.
    #[error("invalid chunked coding")]
    Chunk,
    /// Too many chunk extensions or trailers.
    #[error("chunk extensions or trailers are too long")]
    TooLarge,
    /// More than its `Content-Length`.
    #[error("the body is longer than its Content-Length")]
    TooLong,
}

/// Reads a body.
#[derive(Debug)]
pub struct Decoder(DecoderState);

#[derive(Debug)]
enum DecoderState {
    Length(u64),
    Close,
    /// A chunk size is next; with the bytes of extensions so far.
    Size(usize),
    /// Within a chunk; with the bytes left, and the bytes of extensions so far.
    Chunk(u64, usize),
    /// The line end after a chunk is next.
    ChunkEnd(usize),
    Trailers,
    Done,
}

impl Decoder {
    /// A body that begins.
    pub fn new(framing: Framing) -> Self {
        Self(match framing {
            Framing::Length(0) => DecoderState::Done,
            Framing::Length(length) => DecoderState::Length(length),
            Framing::Chunked => DecoderState::Size(0),
            Framing::Close => DecoderState::Close,
        })
    }

    /// No body, or one that has ended.
    pub fn done() -> Self {
        Self(DecoderState::Done)
    }

    /// Whether the body has ended.
    pub fn is_done(&self) -> bool {
        matches!(self.0, DecoderState::Done)
    }

    /// How much is still to come, as far as it is known.
    pub fn size_hint(&self) -> SizeHint {
        match self.0 {
            DecoderState::Length(left) => SizeHint::with_exact(left),
            DecoderState::Done => SizeHint::with_exact(0),
            _ => SizeHint::default(),
        }
    }

    /// The next frame in `bytes`; `None` if more bytes are needed, or the body [has
    /// ended](Self::is_done). Removes what it has decoded from `bytes`.
    pub fn decode(&mut self, bytes: &mut BytesMut) -> Result<Option<Frame<Bytes>>, BodyError> {
        loop {
            match &mut self.0 {
                DecoderState::Done => return Ok(None),
                DecoderState::Close => return Ok(piece(bytes, u64::MAX).map(Frame::data)),
                DecoderState::Length(left) => {
                    let Some(data) = piece(bytes, *left) else { return Ok(None) };
                    *left -= data.len() as u64;
                    if *left == 0 {
                        self.0 = DecoderState::Done;
                    }
                    return Ok(Some(Frame::data(data)));
                }
                DecoderState::Chunk(left, extensions) => {
                    let Some(data) = piece(bytes, *left) else { return Ok(None) };
                    *left -= data.len() as u64;
                    if *left == 0 {
                        self.0 = DecoderState::ChunkEnd(*extensions);
                        self.skip_end(bytes);
                    }
                    return Ok(Some(Frame::data(data)));
                }
                DecoderState::ChunkEnd(extensions) => {
                    let extensions = *extensions;
                    match &bytes[..] {
                        [] | [b'\r'] => return Ok(None),
                        [b'\r', b'\n', ..] => bytes.advance(2),
                        _ => return Err(BodyError::Chunk),
                    }
                    self.0 = DecoderState::Size(extensions);
                }
                DecoderState::Size(extensions) => {
                    let Some((size, line, extension)) = chunk_size(bytes)? else { return Ok(None) };
                    let extensions = *extensions + extension;
                    if extensions > MAX_EXTENSIONS {
                        return Err(BodyError::TooLarge);
                    }
                    bytes.advance(line);
                    self.0 = match size {
                        0 => DecoderState::Trailers,
                        size => DecoderState::Chunk(size, extensions),
                    };
                }
                DecoderState::Trailers => {
                    let Some(trailers) = trailers(bytes)? else { return Ok(None) };
                    self.0 = DecoderState::Done;
                    return Ok((!trailers.is_empty()).then(|| Frame::trailers(trailers)));
                }
            }
        }
    }

    /// Decodes the end of a body if it has arrived with the last chunk, so that the chunk is known to be the
    /// last. Anything else is left for the next call.
    fn skip_end(&mut self, bytes: &mut BytesMut) {
        const END: &[u8] = b"\r\n0\r\n\r\n";
        if bytes.starts_with(END) {
            bytes.advance(END.len());
            self.0 = DecoderState::Done;
        }
    }

    /// The connection has ended. Returns whether that ends the body.
    pub fn end(&mut self) -> Result<(), BodyError> {
        match self.0 {
            DecoderState::Close | DecoderState::Done => {
                self.0 = DecoderState::Done;
                Ok(())
            }
            _ => Err(BodyError::Incomplete),
        }
    }
}

fn piece(bytes: &mut BytesMut, most: u64) -> Option<Bytes> {
    if bytes.is_empty() {
        return None;
    }
    let length = usize::try_from(most).unwrap_or(usize::MAX).min(bytes.len());
    Some(if length == bytes.len() { bytes.split() } else { bytes.split_to(length) }.freeze())
}

/// A chunk's size, and the lengths of its line and of its extensions.
fn chunk_size(bytes: &[u8]) -> Result<Option<(u64, usize, usize)>, BodyError> {
    let seen = &bytes[..bytes.len().min(MAX_SIZE_LINE)];
    let Some(end) = memchr::memchr(b'\n', seen) else {
        let hopeless = seen.len() == MAX_SIZE_LINE;
        // Refused early if it cannot be a size: the line may never end.
        let begun = seen.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
        let odd = seen.get(begun).is_some_and(|byte| !matches!(byte, b'\r' | b';' | b' ' | b'\t'));
        return match () {
            () if hopeless => Err(BodyError::TooLarge),
            () if odd || begun > 16 => Err(BodyError::Chunk),
            () => Ok(None),
        };
    };
    let line = seen[..end].strip_suffix(b"\r").ok_or(BodyError::Chunk)?;
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (digits, rest) = line.split_at(digits);
    let size = std::str::from_utf8(digits).ok().filter(|digits| digits.len() <= 16);
    let size = size.and_then(|digits| u64::from_str_radix(digits, 16).ok());
    // RFC 9112 §7.1.1: "bad" white space is a space or a tab.
    let space = rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
    let extension = &rest[space..];
    // Some implementations take a bare CR for a line end.
    if !matches!(extension, [] | [b';', ..]) || memchr::memchr(b'\r', extension).is_some() {
        return Err(BodyError::Chunk);
    }
    // Padding, which some servers write, does not count as an extension: a long body has much of it.
    Ok(Some((size.ok_or(BodyError::Chunk)?, end + 1, extension.len())))
}

/// The trailers after the last chunk, and the empty line that ends them.
fn trailers(bytes: &mut BytesMut) -> Result<Option<HeaderMap>, BodyError> {
    if bytes.starts_with(b"\r\n") {
        bytes.advance(2);
        return Ok(Some(HeaderMap::new()));
    }
    let mut parsed = [httparse::EMPTY_HEADER; MAX_TRAILER_FIELDS];
    let (length, fields) = match httparse::parse_headers(bytes, &mut parsed) {
        Ok(httparse::Status::Complete((length, fields))) if length <= MAX_TRAILERS => {
            (length, fields)
        }
        Ok(httparse::Status::Partial) if bytes.len() < MAX_TRAILERS => return Ok(None),
        Ok(_) | Err(httparse::Error::TooManyHeaders) => {
            return Err(BodyError::TooLarge);
        }
        Err(_) => return Err(BodyError::Chunk),
    };
    let mut trailers = HeaderMap::with_capacity(fields.len());
    for field in fields {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| BodyError::Chunk)?;
        let value = HeaderValue::from_bytes(field.value).map_err(|_| BodyError::Chunk)?;
        trailers.append(name, value);
    }
    bytes.advance(length);
    Ok(Some(trailers))
}

/// Writes a body.
#[derive(Debug)]
pub struct Encoder {
    framing: Framing,
    trailers: bool,
}

impl Encoder {
    /// A body that begins. `trailers`: whether they are written; without chunks they never are.
    pub fn new(framing: Framing, trailers: bool) -> Self {
        Self { framing, trailers }
    }

    /// Whether only the connection's end marks the end of the body.
    pub fn ends_with_connection(&self) -> bool {
        self.framing == Framing::Close
    }

    /// Writes a frame. Nothing may follow trailers.
    pub fn push(&mut self, frame: Frame<Bytes>, out: &mut Outbox) -> Result<(), BodyError> {
        let data = match frame.into_data() {
            Ok(data) => data,
            Err(frame) => {
                if self.trailers
                    && let (Framing::Chunked, Ok(trailers)) = (self.framing, frame.into_trailers())
                {
                    let mut end = b"0\r\n".to_vec();
                    push_fields(&mut end, &trailers, None);
                    end.extend_from_slice(b"\r\n");
                    out.push(end);
                    // Trailers end the body.
                    self.framing = Framing::Length(0);
                }
                return Ok(());
            }
        };
        match &mut self.framing {
            Framing::Close => out.push(data),
            Framing::Length(left) => {
                *left = left.checked_sub(data.len() as u64).ok_or(BodyError::TooLong)?;
                out.push(data);
            }
            // An empty chunk would end the body.
            Framing::Chunked if data.is_empty() => {}
            Framing::Chunked => {
                out.push(format!("{:x}\r\n", data.len()));
                out.push(data);
                out.push(&b"\r\n"[..]);
            }
        }
        Ok(())
    }

    /// Ends the body, unless it has ended with trailers.
    pub fn finish(&mut self, out: &mut Outbox) -> Result<(), BodyError> {
        match self.framing {
            Framing::Close | Framing::Length(0) => {}
            Framing::Length(_) => return Err(BodyError::Incomplete),
            Framing::Chunked => {
                out.push(&b"0\r\n\r\n"[..]);
                self.framing = Framing::Length(0);
            }
        }
        Ok(())
    }
}
