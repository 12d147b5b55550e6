//! The write buffer under a connection.
//!
//! `h2` writes each DATA frame of 256 bytes or more by itself, and flushes. With many streams that is a system
//! call, and under TLS a record, for each of them. So its writes are collected here, a flush does nothing, and
//! the connection's driver [writes everything](Writer::poll_driven) once `h2` has no more.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::idle::IdleTimer;

/// How much is collected before it is written anyway.
const CAPACITY: usize = 64 * 1024;

/// A buffer that has grown larger than this is not kept.
const KEPT: usize = 16 * 1024;

/// Both ends of a stream whose writes are collected: one for `h2`, and one for the driver.
pub fn coalesced<S>(stream: S) -> (Coalesced<S>, Writer<S>) {
    let buffered = Arc::new(Mutex::new(Buffered {
        stream,
        buffer: BytesMut::new(),
        is_held_up: false,
        unwritten: IdleTimer::default(),
        moved: 0,
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
    unwritten: IdleTimer,
    /// Bytes read and written.
    moved: u64,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Writer<S> {
    /// Polls a connection with `poll`, and writes what it has produced. Pending once both have to wait.
    pub fn poll_driven<T>(
        &self,
        cx: &mut Context<'_>,
        mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>,
    ) -> Poll<io::Result<T>> {
        loop {
            if let Poll::Ready(end) = poll(cx) {
                return Poll::Ready(Ok(end));
            }
            let mut buffered = self.0.lock();
            let was_held_up = std::mem::take(&mut buffered.is_held_up);
            ready!(buffered.poll_flush(cx))?;
            if !was_held_up {
                return Poll::Pending;
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
    /// write.
    pub fn poll_unread(&self, cx: &mut Context<'_>, limit: Duration) -> Poll<()> {
        let mut buffered = self.0.lock();
        if buffered.buffer.is_empty() {
            buffered.unwritten.moved();
            return Poll::Pending;
        }
        buffered.unwritten.poll(cx, limit)
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
            match ready!(Pin::new(&mut self.stream).poll_write(cx, &self.buffer))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                written => {
                    self.buffer.advance(written);
                    self.moved += written as u64;
                }
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
        Pin::new(&mut self.stream).poll_flush(cx)
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

impl<S: AsyncRead + Unpin> AsyncRead for Coalesced<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut buffered = self.0.lock();
        let before = buf.filled().len();
        let read = Pin::new(&mut buffered.stream).poll_read(cx, buf);
        buffered.moved += (buf.filled().len() - before) as u64;
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Coalesced<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut buffered = self.0.lock();
        let length = ready!(buffered.poll_room(cx))?.min(bytes.len());
        buffered.buffer.extend_from_slice(&bytes[..length]);
        Poll::Ready(Ok(length))
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
            let length = slice.len().min(room);
            buffered.buffer.extend_from_slice(&slice[..length]);
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
    }

    impl AsyncRead for Socket {
        fn poll_read(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            _: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl AsyncWrite for Socket {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
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
        Socket { takes: takes.into_iter().collect(), written: Vec::new() }
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

    #[tokio::test]
    async fn a_peer_that_takes_nothing_is_noticed() {
        let (mut h2, writer) = coalesced(takes([2]));
        let limit = Duration::from_millis(20);
        let write = poll_fn(|cx| Pin::new(&mut h2).poll_write(cx, b"abc"));
        assert_eq!(write.await.unwrap(), 3);
        let unread = poll_fn(|cx| {
            let _ = writer.poll_driven(cx, |_| Poll::<()>::Pending);
            writer.poll_unread(cx, limit)
        });
        let started = tokio::time::Instant::now();
        unread.await;
        assert!(started.elapsed() >= limit);
    }
}
