//! Buffers between a stream and the codec.

use std::{
    collections::VecDeque,
    io::{self, IoSlice},
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

use crate::{
    idle::UnreadTimer,
    stream::{ByteStream, Socket},
};

/// How much is read at once, normally and from a peer that sends much.
const READ: usize = 16 * 1024;
const READ_BULK: usize = 64 * 1024;

/// Enough for most messages; allocated once and reused.
const ROOM: usize = 4 * 1024;

/// Enough for most heads.
const HEAD_ROOM: usize = 1024;

/// Beyond these, some has to be written before more is added.
const MAX_WAITING: usize = 64 * 1024;
const MAX_PIECES: usize = 32;
const MAX_SLICES: usize = MAX_PIECES + 4;

/// Bytes that were read and are not parsed yet.
#[derive(Debug, Default)]
pub struct Inbox {
    /// The bytes.
    pub bytes: BytesMut,
    /// The last read was filled: there may be much more.
    bulk: bool,
    /// How much of an incomplete head has been checked.
    seen: usize,
}

impl Inbox {
    /// Removes empty lines ahead of a request (RFC 9112 §2.2): some clients send one after a body.
    pub fn skip_empty_lines(&mut self) {
        while let [b'\r', b'\n', ..] | [b'\n', ..] = &self.bytes[..] {
            let length = if self.bytes[0] == b'\r' { 2 } else { 1 };
            self.bytes.advance(length);
        }
    }

    /// Whether a head has begun, rather than an empty line.
    pub fn has_begun(&self) -> bool {
        !matches!(&self.bytes[..], [] | [b'\r'])
    }

    /// Whether parsing the head again is worthwhile: a line has ended since the last attempt, or the head has
    /// doubled in size. So one that arrives byte by byte is not parsed at each byte.
    pub fn may_have_head(&mut self, max_size: usize) -> bool {
        let length = self.bytes.len();
        let seen = self.seen.min(length);
        let may = length > 0
            && (length >= 2 * seen
                || length >= max_size
                || memchr::memchr(b'\n', &self.bytes[seen..]).is_some());
        if may {
            self.seen = length;
        }
        may
    }

    /// A head was removed; another one follows.
    pub fn head_taken(&mut self) {
        self.seen = 0;
    }

    /// Reads what has arrived; 0 at the end.
    pub fn poll_fill<S: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut S,
    ) -> Poll<io::Result<usize>> {
        if self.bulk {
            self.bytes.reserve(READ_BULK);
            let read = poll_read_buf(Pin::new(stream), cx, &mut self.bytes);
            if !matches!(read, Poll::Ready(Ok(READ..))) {
                self.bulk = false;
                self.release();
            }
            return read;
        }
        // By way of the stack: a connection that waits for its first byte holds no buffer.
        let mut scratch = [const { MaybeUninit::uninit() }; READ];
        let mut buffer = ReadBuf::uninit(&mut scratch);
        ready!(Pin::new(stream).poll_read(cx, &mut buffer))?;
        self.bulk = buffer.remaining() == 0;
        if buffer.filled().len() > self.bytes.capacity() - self.bytes.len() {
            // Also reclaims memory that no part of a message refers to any more.
            self.bytes.reserve(buffer.filled().len().max(ROOM));
        }
        self.bytes.extend_from_slice(buffer.filled());
        Poll::Ready(Ok(buffer.filled().len()))
    }

    /// Releases the memory if it is empty.
    pub fn release(&mut self) {
        if self.bytes.is_empty() {
            self.bytes = BytesMut::new();
        }
    }

    /// Everything that is left.
    pub fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.bytes).freeze()
    }
}

/// Bytes to write, in order.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Heads, and bodies that are short enough to go with them: one buffer, which is reused, and one plain
    /// write.
    first: Vec<u8>,
    /// How much of it is written. A head is far shorter than this can count.
    sent: u32,
    /// What follows it.
    pieces: VecDeque<Bytes>,
    /// How much is in `pieces`.
    waiting: usize,
    /// Something was written, and may still be held by TLS.
    unflushed: bool,
    /// Set once the peer had to be waited for.
    unread: Option<Box<UnreadTimer>>,
}

impl Outbox {
    /// Adds bytes.
    pub fn push(&mut self, piece: impl Into<Bytes>) {
        let piece = piece.into();
        if self.pieces.is_empty() && self.first.len() + piece.len() <= ROOM {
            self.first.extend_from_slice(&piece);
        } else if !piece.is_empty() {
            self.waiting += piece.len();
            self.pieces.push_back(piece);
        }
    }

    /// Adds a head, as `write` writes it.
    pub fn push_head(&mut self, write: impl FnOnce(&mut Vec<u8>)) {
        if self.pieces.is_empty() {
            self.first.reserve(HEAD_ROOM);
            write(&mut self.first);
        } else {
            let mut head = Vec::with_capacity(HEAD_ROOM);
            write(&mut head);
            self.push(head);
        }
    }

    /// Whether some must be written before more is added.
    pub fn is_full(&self) -> bool {
        self.waiting >= MAX_WAITING || self.pieces.len() >= MAX_PIECES
    }

    /// Whether a short piece may be added, which bounds how many of them wait.
    pub fn has_room(&self) -> bool {
        self.first.len() + self.waiting < MAX_WAITING
    }

    /// Whether all is written.
    pub fn is_empty(&self) -> bool {
        self.first.is_empty() && self.pieces.is_empty() && !self.unflushed
    }

    /// Drops what is not written.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Releases the memory if it is empty.
    pub fn release(&mut self) {
        if self.is_empty() {
            self.clear();
        }
    }

    /// Writes until nothing is left.
    pub fn poll_flush<S: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        stream: &mut S,
    ) -> Poll<io::Result<()>> {
        while !self.first.is_empty() || !self.pieces.is_empty() {
            let written = if self.pieces.is_empty() {
                ready!(Pin::new(&mut *stream).poll_write(cx, self.unsent()))?
            } else {
                let mut slices = [IoSlice::new(&[]); MAX_SLICES];
                let first = (!self.first.is_empty()).then(|| self.unsent());
                let pieces = self.pieces.iter().map(|piece| &piece[..]);
                let mut count = 0;
                for (slice, piece) in slices.iter_mut().zip(first.into_iter().chain(pieces)) {
                    *slice = IoSlice::new(piece);
                    count += 1;
                }
                ready!(Pin::new(&mut *stream).poll_write_vectored(cx, &slices[..count]))?
            };
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.unflushed = true;
            self.written(written);
        }
        if self.unflushed {
            ready!(Pin::new(stream).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// Ready once the peer has read nothing for `limit`. To be polled while [`poll_flush`](Self::poll_flush)
    /// is pending.
    pub fn poll_idle<S: ByteStream>(
        &mut self,
        cx: &mut Context<'_>,
        limit: Duration,
        stream: &S,
    ) -> Poll<()> {
        let acknowledged = || stream.socket().map_or(0, Socket::acknowledged);
        self.unread.get_or_insert_default().poll(cx, limit, acknowledged)
    }

    fn unsent(&self) -> &[u8] {
        &self.first[self.sent as usize..]
    }

    fn written(&mut self, mut count: usize) {
        if let Some(unread) = &mut self.unread {
            unread.moved();
        }
        let of_first = count.min(self.unsent().len());
        self.sent += of_first as u32;
        count -= of_first;
        if self.unsent().is_empty() {
            self.sent = 0;
            self.first.clear();
            // A head may be large; only a limited buffer is kept for the next one.
            self.first.shrink_to(ROOM);
        }
        self.waiting -= count;
        while count > 0 {
            let Some(piece) = self.pieces.front_mut() else { return };
            let step = count.min(piece.len());
            piece.advance(step);
            count -= step;
            if piece.is_empty() {
                self.pieces.pop_front();
            }
        }
    }
}
