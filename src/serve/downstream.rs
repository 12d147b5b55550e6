//! The application's end of an HTTP/1 connection, as hyper reads and writes it.
//!
//! hyper has a timer for heads, but arms it anew for each request and counts a connection that
//! merely waits for the next one as a slow head; and what it refuses it refuses without a word.
//! So the stream itself knows whose turn it is, and steps in: it gives up on a head that does
//! not come to its end with a 408, closes what idles too long, and says why a head was refused.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use ::http::{Method, StatusCode};
use bytes::{Buf, Bytes};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};

use crate::{
    body::BoxError,
    forward::{Body, Problem, RefusedHead},
};

/// A client may keep an idle connection this long. Longer than any client's own patience: who
/// closes first must not be the proxy, for the client may just then send.
const KEEP_ALIVE: Duration = Duration::from_secs(3600);

/// What hyper answers by itself, before any service has seen a request.
const REFUSALS: [(&[u8], RefusedHead); 3] = [
    (
        b"HTTP/1.1 400 Bad Request\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
        RefusedHead::Malformed,
    ),
    (
        b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
        RefusedHead::TooLarge,
    ),
    (
        b"HTTP/1.1 414 URI Too Long\r\nconnection: close\r\ncontent-length: 0\r\n\r\n",
        RefusedHead::TargetTooLong,
    ),
];

const IDLE: u8 = 0;
const HEAD: u8 = 1;
const SERVED: u8 = 2;

/// Whose turn it is on a connection, shared by its stream and its service.
#[derive(Debug)]
pub struct Turn {
    phase: AtomicU8,
    born: Instant,
    /// When the phase began, in milliseconds after `born`.
    since: AtomicU64,
    refused: AtomicBool,
    /// Nothing of an answer is still on its way out: what is written next, unasked, is hyper's own.
    flushed: AtomicBool,
}

impl Turn {
    /// A new connection, whose first bytes have come.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            phase: AtomicU8::new(HEAD),
            born: Instant::now(),
            since: AtomicU64::new(0),
            refused: AtomicBool::new(false),
            flushed: AtomicBool::new(true),
        })
    }

    /// A request's head is complete.
    pub fn serve(&self) {
        self.flushed.store(false, Ordering::Relaxed);
        self.phase.store(SERVED, Ordering::Relaxed);
    }

    /// Whether the client's last head was refused, or given up on.
    pub fn was_refused(&self) -> bool {
        self.refused.load(Ordering::Relaxed)
    }

    /// Whether hyper has nobody's answer to write but its own. Its next request may have come with
    /// the last one, so that a client that seems idle can be refused too.
    fn is_hypers(&self) -> bool {
        self.phase() != SERVED && self.flushed.load(Ordering::Relaxed)
    }

    fn begin(&self, phase: u8) {
        self.since.store(self.born.elapsed().as_millis() as u64, Ordering::Relaxed);
        self.phase.store(phase, Ordering::Relaxed);
    }

    fn phase(&self) -> u8 {
        self.phase.load(Ordering::Relaxed)
    }

    fn since(&self) -> Instant {
        self.born + Duration::from_millis(self.since.load(Ordering::Relaxed))
    }
}

/// The byte stream that hyper serves HTTP/1 on.
#[derive(Debug)]
pub struct Downstream<S> {
    stream: S,
    turn: Arc<Turn>,
    header_timeout: Duration,
    /// Whether there is a farewell to say: a bare socket's is its closing.
    tls: bool,
    /// At or before the deadline in force. Never moved for a request that is quick.
    timer: Option<Pin<Box<Sleep>>>,
    /// An answer of our own, on its way out.
    answer: Bytes,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Downstream<S> {
    /// `stream` is plaintext, or the inside of TLS.
    pub fn new(stream: S, turn: Arc<Turn>, header_timeout: Duration, tls: bool) -> Self {
        Self { stream, turn, header_timeout, tls, timer: None, answer: Bytes::new() }
    }

    /// Waits for bytes, but not for ever.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            let deadline = match self.turn.phase() {
                IDLE => self.turn.since() + KEEP_ALIVE,
                HEAD => self.turn.since() + self.header_timeout,
                // Whoever serves the request has deadlines of its own.
                _ => return Poll::Pending,
            };
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
            if timer.deadline() > deadline {
                timer.as_mut().reset(deadline);
            }
            ready!(timer.as_mut().poll(cx));
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            timer.as_mut().reset(deadline);
        }
    }

    fn refuse(&mut self, head: RefusedHead) {
        self.turn.refused.store(true, Ordering::Relaxed);
        self.answer = Problem::refused_head(head).to_http1();
    }

    fn poll_answer(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.answer.is_empty() {
            let written = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.answer))?;
            self.answer.advance(written);
        }
        Pin::new(&mut self.stream).poll_flush(cx)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for Downstream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.turn.was_refused() {
            ready!(self.poll_answer(cx))?;
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        match Pin::new(&mut self.stream).poll_read(cx, buf) {
            Poll::Ready(result) => {
                if self.turn.phase() == IDLE && buf.filled().len() > before {
                    self.turn.begin(HEAD);
                }
                Poll::Ready(result)
            }
            Poll::Pending => {
                ready!(self.poll_patience(cx));
                // Never into the middle of an answer that the client is slow to read.
                if self.turn.phase() == HEAD && self.turn.is_hypers() {
                    self.refuse(RefusedHead::TooSlow);
                    ready!(self.poll_answer(cx))?;
                }
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Downstream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.turn.is_hypers() {
            ready!(self.poll_answer(cx))?;
            if let Some((_, head)) = REFUSALS.iter().find(|(refusal, _)| *refusal == buf) {
                self.refuse(*head);
                let _ = self.poll_answer(cx)?;
                return Poll::Ready(Ok(buf.len()));
            }
        }
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.turn.is_hypers() {
            let first = bufs.iter().find(|buf| !buf.is_empty()).map_or(&[][..], |buf| &**buf);
            return self.poll_write(cx, first);
        }
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_answer(cx))?;
        // hyper flushes when it has written all that it had.
        if self.turn.phase() != SERVED {
            self.turn.flushed.store(true, Ordering::Relaxed);
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_answer(cx))?;
        // What hyper shuts down it drops at once. A tunnel's half is shut down, and goes on.
        if !self.tls && self.turn.phase() != SERVED {
            return Poll::Ready(Ok(()));
        }
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A response's body; when hyper is done with it, it is the client's turn again.
pub struct Served {
    body: Body,
    turn: Option<Arc<Turn>>,
}

impl Served {
    /// A switch of protocols or a tunnel hands the stream over for good: then no turn follows.
    pub fn new(method: &Method, status: StatusCode, body: Body, turn: &Arc<Turn>) -> Self {
        let switch = status == StatusCode::SWITCHING_PROTOCOLS;
        let hands_over = switch || method == Method::CONNECT && status.is_success();
        Self { body, turn: (!hands_over).then(|| turn.clone()) }
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(turn) = &self.turn {
            turn.begin(IDLE);
        }
    }
}

impl HttpBody for Served {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
