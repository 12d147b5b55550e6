//! The write buffer under a connection.
//!
//! `h2` writes each DATA frame of 256 bytes or more by itself, and flushes. With many streams that is a system
//! call, and under TLS a record, for each of them. So its writes are collected here, a flush does nothing, and
//! the connection's driver [writes everything](Writer::poll_driven) once `h2` has no more.
//!
//! `h2` gives up when a write fails, and reads no more. But a server that closes a connection may have said why: with
//! a TLS alert, a GOAWAY or a response. So an origin's connection is [read to its end](Writer::read_to_end) first.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

use crate::{idle::UnreadTimer, stream::is_from_tls};

/// How much is collected before it is written anyway.
const CAPACITY: usize = 64 * 1024;

/// For how long what was received is read after a write has failed. If the connection is lost, its end follows at once.
const REST: Duration = Duration::from_secs(1);

/// A buffer that has grown larger than this is not kept.
const KEPT: usize = 16 * 1024;

/// Both ends of a stream whose writes are collected: one for `h2`, and one for the driver.
pub fn coalesced<S>(stream: S) -> (Coalesced<S>, Writer<S>) {
    let buffered = Arc::new(Mutex::new(Buffered {
        stream,
        buffer: BytesMut::new(),
        is_held_up: false,
        unwritten: UnreadTimer::default(),
        moved: 0,
        reads_to_end: false,
        lost: None,
    }));
    (Coalesced(buffered.clone()), Writer(buffered))
}

/// The end for `h2`. The lock is never contended: both ends are on one task.
#[derive(Debug)]
pub struct Coalesced<S>(Arc<Mutex<Buffered<S>>>);

/// The end for the connection's driver.
#[derive(Debug)]
pub struct Writer<S>(Arc<Mutex<Buffered<S>>>);

#[derive(Debug)]
struct Buffered<S> {
    stream: S,
    buffer: BytesMut,
    /// `h2` waits for room in the buffer.
    is_held_up: bool,
    /// Measures how long the peer has read nothing of it.
    unwritten: UnreadTimer,
    /// Bytes read and written.
    moved: u64,
    /// Whether a failed write leaves what was received to be read.
    reads_to_end: bool,
    /// Set once a write has failed. From then on, what `h2` writes goes nowhere.
    lost: Option<Lost>,
}

/// A write that failed.
#[derive(Debug)]
struct Lost {
    error: io::Error,
    /// How long is left to read the rest.
    rest: Pin<Box<Sleep>>,
}

impl<S> Writer<S> {
    /// Has what was received be read before `h2` learns that a write failed.
    pub fn read_to_end(&self) {
        self.0.lock().reads_to_end = true;
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Writer<S> {
    /// Polls a connection with `poll`, and writes what it has produced. Pending once both have to wait.
    pub fn poll_driven<T>(
        &self,
        cx: &mut Context<'_>,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<io::Result<T>> {
        let mut was_lost = false;
        loop {
            if let Poll::Ready(end) = poll(cx) {
                return Poll::Ready(Ok(end));
            }
            let mut buffered = self.0.lock();
            let was_held_up = std::mem::take(&mut buffered.is_held_up);
            ready!(buffered.poll_flush(cx))?;
            match &mut buffered.lost {
                None if was_held_up => {}
                None => return Poll::Pending,
                Some(lost) if was_lost => {
                    ready!(lost.rest.as_mut().poll(cx));
                    return Poll::Ready(Err(lost.error()));
                }
                Some(_) => was_lost = true,
            }
        }
    }

    /// Whether everything has been given to the stream beneath.
    pub fn is_flushed(&self) -> bool {
        let buffered = self.0.lock();
        buffered.buffer.is_empty() && !buffered.is_held_up
    }

    /// How many bytes were received, or taken by the peer.
    pub fn moved(&self) -> u64 {
        self.0.lock().moved
    }

    /// For a driver that waits: ready once the peer has read nothing for `limit` although there is something to
    /// write. `acknowledged`: how much of the stream beneath the peer has acknowledged.
    pub fn poll_unread(
        &self,
        cx: &mut Context<'_>,
        limit: Duration,
        acknowledged: impl Fn(&S) -> u64,
    ) -> Poll<()> {
        let Buffered { stream, buffer, unwritten, .. } = &mut *self.0.lock();
        if buffer.is_empty() {
            unwritten.moved();
            return Poll::Pending;
        }
        unwritten.poll(cx, limit, || acknowledged(stream))
    }

    /// Releases memory that a connection without streams does not need.
    pub fn rest(&self) {
        let mut buffered = self.0.lock();
        if buffered.buffer.is_empty() {
            buffered.buffer = BytesMut::new();
        }
    }

    /// Does something with the stream beneath.
    pub fn with_stream<T>(&self, with: impl FnOnce(&S) -> T) -> T {
        with(&self.0.lock().stream)
    }
}

impl<S: AsyncWrite + Unpin> Buffered<S> {
    /// Writes until less than `left` is in the buffer.
    fn poll_drain(&mut self, cx: &mut Context<'_>, left: usize) -> Poll<io::Result<()>> {
        while self.buffer.len() >= left {
            match ready!(Pin::new(&mut self.stream).poll_write(cx, &self.buffer)) {
                Ok(0) => return Poll::Ready(self.lose(io::ErrorKind::WriteZero.into())),
                Ok(written) => {
                    self.buffer.advance(written);
                    self.moved += written as u64;
                }
                Err(error) => return Poll::Ready(self.lose(error)),
            }
            self.unwritten.moved();
        }
        Poll::Ready(Ok(()))
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.buffer.is_empty() {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_drain(cx, 1))?;
        if self.buffer.capacity() > KEPT {
            self.buffer = BytesMut::new();
        } else {
            self.buffer.clear();
        }
        match self.lost {
            Some(_) => Poll::Ready(Ok(())),
            None => match ready!(Pin::new(&mut self.stream).poll_flush(cx)) {
                Ok(()) => Poll::Ready(Ok(())),
                Err(error) => Poll::Ready(self.lose(error)),
            },
        }
    }

    /// A write has failed.
    fn lose(&mut self, error: io::Error) -> io::Result<()> {
        if !self.reads_to_end {
            return Err(error);
        }
        self.buffer.clear();
        self.lost = Some(Lost { error, rest: Box::pin(sleep(REST)) });
        Ok(())
    }

    /// Adds as much of `bytes` as there is `room` for, and gives how much that was.
    fn take(&mut self, bytes: &[u8], room: usize) -> usize {
        let length = bytes.len().min(room);
        if self.lost.is_none() {
            self.buffer.extend_from_slice(&bytes[..length]);
        }
        length
    }

    /// Ready with how much may be added.
    fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        if self.buffer.len() >= CAPACITY {
            let drained = self.poll_drain(cx, CAPACITY);
            self.is_held_up = drained.is_pending();
            ready!(drained)?;
        }
        Poll::Ready(Ok(CAPACITY - self.buffer.len()))
    }
}

impl Lost {
    /// The error, which may be reported twice.
    fn error(&self) -> io::Error {
        match self.error.raw_os_error() {
            Some(errno) => io::Error::from_raw_os_error(errno),
            None => io::Error::new(self.error.kind(), self.error.to_string()),
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Coalesced<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut buffered = self.0.lock();
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut buffered.stream).poll_read(cx, buf));
        let length = buf.filled().len() - before;
        buffered.moved += length as u64;
        Poll::Ready(match (read, &buffered.lost) {
            (Err(error), Some(_)) if is_from_tls(&error) => Err(error),
            (Err(_), Some(lost)) => Err(lost.error()),
            (Ok(()), Some(lost)) if length == 0 => Err(lost.error()),
            (read, _) => read,
        })
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Coalesced<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut buffered = self.0.lock();
        let room = ready!(buffered.poll_room(cx))?;
        Poll::Ready(Ok(buffered.take(bytes, room)))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut buffered = self.0.lock();
        let mut room = ready!(buffered.poll_room(cx))?;
        let mut taken = 0;
        for slice in slices {
            let length = buffered.take(slice, room);
            taken += length;
            room -= length;
        }
        Poll::Ready(Ok(taken))
    }

    /// `h2` then copies less: what it would collect itself is collected here.
    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Does nothing, on purpose.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut buffered = self.0.lock();
        ready!(buffered.poll_flush(cx))?;
        Pin::new(&mut buffered.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{collections::VecDeque, future::poll_fn};

    /// Takes a given number of bytes per write, and remembers each write.
    #[derive(Debug, Default)]
    struct Socket {
        takes: VecDeque<usize>,
        written: Vec<Vec<u8>>,
        /// What was received before the peer closed it; then nothing can be written.
        received: Option<VecDeque<Poll<io::Result<&'static [u8]>>>>,
    }

    impl AsyncRead for Socket {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            let Some(received) = &mut self.received else { return Poll::Pending };
            match received.pop_front() {
                Some(Poll::Ready(read)) => buf.put_slice(read?),
                Some(Poll::Pending) => {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                None => {}
            }
            Poll::Ready(Ok(()))
        }
    }

    impl AsyncWrite for Socket {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            if self.received.is_some() {
                return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
            }
            let Some(takes) = self.takes.pop_front() else { return Poll::Pending };
            let bytes = &bytes[..takes.min(bytes.len())];
            self.written.push(bytes.to_vec());
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    fn takes(takes: impl IntoIterator<Item = usize>) -> Socket {
        Socket { takes: takes.into_iter().collect(), written: Vec::new(), received: None }
    }

    fn noop() -> Context<'static> {
        Context::from_waker(std::task::Waker::noop())
    }

    #[test]
    fn what_is_written_and_flushed_piece_by_piece_goes_out_as_one() {
        let (mut h2, writer) = coalesced(takes([usize::MAX]));
        let mut pieces = ["head", " and ", "body"].iter();
        let polled = writer.poll_driven(&mut noop(), |cx| {
            for piece in pieces.by_ref() {
                assert!(Pin::new(&mut h2).poll_write(cx, piece.as_bytes()).is_ready());
                assert!(Pin::new(&mut h2).poll_flush(cx).is_ready());
            }
            Poll::<()>::Pending
        });
        assert!(polled.is_pending());
        assert!(writer.is_flushed());
        assert_eq!(writer.with_stream(|socket| socket.written.concat()), b"head and body");
        assert_eq!(writer.with_stream(|socket| socket.written.len()), 1);
    }

    #[test]
    fn a_socket_that_takes_nothing_bounds_the_buffer_and_one_that_takes_again_is_given_the_rest() {
        let (mut h2, writer) = coalesced(takes([10]));
        let (mut left, frame) = (3 * CAPACITY, [0; 16 * 1024]);
        let mut poll = |writer: &Writer<Socket>| {
            writer.poll_driven(&mut noop(), |cx| {
                while left > 0 {
                    match Pin::new(&mut h2).poll_write(cx, &frame[..left.min(frame.len())]) {
                        Poll::Ready(written) => left -= written.unwrap(),
                        Poll::Pending => return Poll::Pending,
                    }
                }
                Poll::<()>::Pending
            })
        };
        assert!(poll(&writer).is_pending());
        assert!(!writer.is_flushed());
        assert_eq!(writer.0.lock().buffer.len(), CAPACITY);

        writer.0.lock().stream.takes = [usize::MAX; 8].into();
        assert!(poll(&writer).is_pending());
        assert!(writer.is_flushed());
        let written = writer.with_stream(|socket| socket.written.concat().len());
        assert_eq!(written, 3 * CAPACITY);
    }

    /// Regression: of ten targets that demanded a client certificate of a large upload, one had its alert ignored.
    #[tokio::test]
    async fn what_was_received_is_read_after_a_write_has_failed() {
        let frame = || Poll::Ready(Ok(&b"a frame"[..]));
        let fails = |kind, what: &str| Poll::Ready(Err(io::Error::new(kind, what.to_owned())));
        let alert = || fails(io::ErrorKind::InvalidData, "an alert");
        for (received, reason) in [
            (vec![frame(), alert()], "an alert"),
            (vec![Poll::Pending, frame(), Poll::Pending, alert()], "an alert"),
            (vec![Poll::Pending, frame()], "broken pipe"),
            (vec![frame(), fails(io::ErrorKind::UnexpectedEof, "no close_notify")], "broken pipe"),
            (vec![], "broken pipe"),
        ] {
            let is_frame = |read: &Poll<io::Result<_>>| matches!(read, Poll::Ready(Ok(_)));
            let frames = received.iter().filter(|read| is_frame(read)).count();
            let mut socket = takes([]);
            socket.received = Some(received.into());
            let (mut h2, writer) = coalesced(socket);
            writer.read_to_end();
            let (mut read, mut is_written) = (Vec::new(), false);
            // `h2` writes, and reads when it is polled again.
            let mut poll = |cx: &mut Context<'_>| {
                if !std::mem::replace(&mut is_written, true) {
                    for _ in 0..2 {
                        let written = Pin::new(&mut h2).poll_write(cx, &[0; CAPACITY]);
                        assert!(matches!(written, Poll::Ready(Ok(_))), "{written:?}");
                    }
                    return Poll::Pending;
                }
                loop {
                    let mut bytes = [0; 100];
                    let mut buf = ReadBuf::new(&mut bytes);
                    match ready!(Pin::new(&mut h2).poll_read(cx, &mut buf)) {
                        Ok(()) => read.push(buf.filled().to_vec()),
                        Err(error) => return Poll::Ready(error),
                    }
                }
            };
            let error = poll_fn(|cx| writer.poll_driven(cx, &mut poll)).await.unwrap();
            assert_eq!(error.to_string(), reason);
            assert_eq!(read, vec![b"a frame".to_vec(); frames]);
        }
    }

    #[tokio::test]
    async fn a_peer_that_takes_nothing_is_noticed() {
        let (mut h2, writer) = coalesced(takes([2]));
        let limit = Duration::from_millis(20);
        let write = poll_fn(|cx| Pin::new(&mut h2).poll_write(cx, b"abc"));
        assert_eq!(write.await.unwrap(), 3);
        let unread = poll_fn(|cx| {
            let _ = writer.poll_driven(cx, |_| Poll::<()>::Pending);
            writer.poll_unread(cx, limit, |_| 0)
        });
        let started = tokio::time::Instant::now();
        unread.await;
        assert!(started.elapsed() >= limit);
    }
}
