//! Bytes between a stream and the codec.

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
    idle::IdleTimer,
    stream::{ByteStream, Socket},
};

/// What is read at once, and what a peer that sends much is read by.
const READ: usize = 16 * 1024;
const READ_BULK: usize = 64 * 1024;

/// Room for most messages: taken once, and used again for the next ones.
const ROOM: usize = 4 * 1024;

/// Room for most heads.
const HEAD_ROOM: usize = 1024;

/// No more is taken on before some of it is written.
const MAX_WAITING: usize = 64 * 1024;
const MAX_PIECES: usize = 32;
const MAX_SLICES: usize = MAX_PIECES + 4;

/// How often a peer that takes nothing is looked after before it is given up.
const LOOKS: u32 = 4;

/// What came and was not understood yet.
#[derive(Debug, Default)]
pub struct Inbox {
    /// The bytes.
    pub bytes: BytesMut,
    /// The last read was filled: there may be much more.
    bulk: bool,
    /// How much there was of a head that was not complete.
    seen: usize,
}

impl Inbox {
    /// Takes off the empty lines ahead of a request (RFC 9112 §2.2): some clients send one behind a body.
    pub fn skip_empty_lines(&mut self) {
        while let [b'\r', b'\n', ..] | [b'\n', ..] = &self.bytes[..] {
            let length = if self.bytes[0] == b'\r' { 2 } else { 1 };
            self.bytes.advance(length);
        }
    }

    /// Whether there is anything of a head, and not just the beginning of an empty line.
    pub fn has_begun(&self) -> bool {
        !matches!(&self.bytes[..], [] | [b'\r'])
    }

    /// Whether a head may be complete, or wrong, that was not when there was less of it. A line end
    /// tells, or that it has doubled: one that comes byte by byte is not read anew at each.
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

    /// A head was taken off: the next is another.
    pub fn head_taken(&mut self) {
        self.seen = 0;
    }

    /// Reads what there is; 0 at the end.
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
        // Through the stack: who waits for a peer's first word has no buffer meanwhile.
        let mut scratch = [const { MaybeUninit::uninit() }; READ];
        let mut buffer = ReadBuf::uninit(&mut scratch);
        ready!(Pin::new(stream).poll_read(cx, &mut buffer))?;
        self.bulk = buffer.remaining() == 0;
        if buffer.filled().len() > self.bytes.capacity() - self.bytes.len() {
            // Also takes back what no part of a message is held of any more.
            self.bytes.reserve(buffer.filled().len().max(ROOM));
        }
        self.bytes.extend_from_slice(buffer.filled());
        Poll::Ready(Ok(buffer.filled().len()))
    }

    /// Gives the memory back where there is nothing in it.
    pub fn release(&mut self) {
        if self.bytes.is_empty() {
            self.bytes = BytesMut::new();
        }
    }

    /// All that is left.
    pub fn take(&mut self) -> Bytes {
        std::mem::take(&mut self.bytes).freeze()
    }
}

/// What is to be written, in order.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Heads, and bodies that are short enough to go with them: one buffer, and one plain write. Its
    /// room is used again.
    first: Vec<u8>,
    /// What of it is written. A head is far shorter than what this can count.
    sent: u32,
    /// What comes behind it.
    pieces: VecDeque<Bytes>,
    /// How much is in `pieces`.
    waiting: usize,
    /// Something was written, and may still be held by TLS.
    unflushed: bool,
    /// Once the peer has been waited for.
    watch: Option<Box<Watch>>,
}

/// Measures how long a peer has taken nothing.
#[derive(Debug, Default)]
struct Watch {
    idle: IdleTimer,
    /// What it had taken when that was last looked at.
    taken: u64,
    /// How many looks have found no more.
    looks: u32,
}

impl Outbox {
    /// Adds to what is to be written.
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

    /// Whether it has room for a short word, however many there are.
    pub fn has_room(&self) -> bool {
        self.first.len() + self.waiting < MAX_WAITING
    }

    /// Whether all is written.
    pub fn is_empty(&self) -> bool {
        self.first.is_empty() && self.pieces.is_empty() && !self.unflushed
    }

    /// Forgets what is not written.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Gives the memory back where there is nothing in it.
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

    /// For somebody who waits for [`poll_flush`](Self::poll_flush): ready once the peer has taken nothing for
    /// `limit`.
    ///
    /// A socket takes more only when much of what it holds has gone. So its peer is asked after, and not
    /// the socket: a few looks tell a slow one from one that has stopped.
    pub fn poll_idle<S: ByteStream>(
        &mut self,
        cx: &mut Context<'_>,
        limit: Duration,
        stream: &S,
    ) -> Poll<()> {
        let watch = self.watch.get_or_insert_default();
        while watch.idle.poll(cx, limit / LOOKS).is_ready() {
            let taken = stream.socket().map_or(0, Socket::acknowledged);
            watch.looks = if taken == watch.taken { watch.looks + 1 } else { 0 };
            watch.taken = taken;
            if watch.looks >= LOOKS {
                return Poll::Ready(());
            }
            watch.idle.moved();
        }
        Poll::Pending
    }

    fn unsent(&self) -> &[u8] {
        &self.first[self.sent as usize..]
    }

    fn written(&mut self, mut count: usize) {
        if let Some(watch) = &mut self.watch {
            watch.idle.moved();
            watch.looks = 0;
        }
        let of_first = count.min(self.unsent().len());
        self.sent += of_first as u32;
        count -= of_first;
        if self.unsent().is_empty() {
            self.sent = 0;
            self.first.clear();
            // A head may be of any size; what is kept for the next is not.
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
