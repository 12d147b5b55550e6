//! The state of a client's connection: its buffers, the request's body, and whether the client has left.

use std::{
    io,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::Frame;

use super::{BodyError, Decoder, Inbox, Outbox};
use crate::{
    body::BoxError,
    idle::{Idle, IdleTimer},
    stream::{ByteStream, Socket},
};

/// How much of an unwanted request body is read and discarded so that its connection can serve the next
/// request; and how much of it at once, if it has arrived already.
pub const SKIP: u64 = 1024 * 1024;
const SKIP_NOW: u64 = 128 * 1024;

/// How often a client is checked for having left while nobody reads its request's body.
const LOOK_OUT: Duration = Duration::from_secs(1);

/// A connection's state, shared by its task and its requests' bodies.
pub struct ServerConnection<S> {
    /// None after a switch to another protocol.
    pub stream: Option<S>,
    pub inbox: Inbox,
    /// What is written ahead of a response: `1xx` only.
    pub outbox: Outbox,
    /// The current request's body.
    pub body: Decoder,
    /// The number of the request: a body that outlives it must not read the next request's.
    pub request: u64,
    /// The client waits for `100 Continue`, which is sent when the body is first read.
    pub expects: bool,
    /// The client understands `1xx`, and its response has not begun.
    pub interim: bool,
    /// The connection's own task, woken when the body has ended, because it then reads the connection.
    pub owner: Option<Waker>,
    /// The reader of the body waits for the client.
    wanted: bool,
    /// The client has sent nothing for too long.
    given_up: bool,
    /// Measures how long the client has sent nothing of the body.
    idle: IdleTimer,
    /// Measures how long nobody has read the body.
    unwanted: IdleTimer,
}

impl<S: ByteStream> ServerConnection<S> {
    /// A new connection.
    pub fn new(stream: S) -> Self {
        Self {
            stream: Some(stream),
            inbox: Inbox::default(),
            outbox: Outbox::default(),
            body: Decoder::done(),
            request: 0,
            expects: false,
            interim: false,
            owner: None,
            wanted: false,
            given_up: false,
            idle: IdleTimer::default(),
            unwanted: IdleTimer::default(),
        }
    }

    /// A request begins, with this body.
    pub fn begin(&mut self, body: Decoder) {
        self.body = body;
        // Silence before this request does not count.
        self.wanted = false;
        self.idle.moved();
        self.unwanted.moved();
    }

    /// Reads; `false` at the end.
    pub fn poll_fill(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let Some(stream) = &mut self.stream else { return Poll::Ready(false) };
        Poll::Ready(matches!(ready!(self.inbox.poll_fill(cx, stream)), Ok(1..)))
    }

    pub fn poll_flush(&mut self, cx: &mut Context<'_>, out: &mut Outbox) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Some(stream) => out.poll_flush(cx, stream),
            None => Poll::Ready(Ok(())),
        }
    }

    /// Ready once the client has read nothing for `idle`. To be polled while waiting for the client to read.
    pub fn poll_unread(
        &mut self,
        cx: &mut Context<'_>,
        out: &mut Outbox,
        idle: Duration,
    ) -> Poll<()> {
        match &self.stream {
            Some(stream) => out.poll_idle(cx, idle, stream),
            None => Poll::Pending,
        }
    }

    /// Writes what goes ahead of a response, as far as possible now.
    pub fn poll_ahead(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if let Some(stream) = &mut self.stream
            && !self.outbox.is_empty()
            && let Poll::Ready(result) = self.outbox.poll_flush(cx, stream)
        {
            return result;
        }
        Ok(())
    }

    /// Makes the connection end with a reset in any case: nothing else shows the client that a response is
    /// incomplete.
    pub fn reset_on_close(&self) {
        if let Some(socket) = self.stream.as_ref().and_then(ByteStream::socket) {
            socket.reset_on_close();
        }
    }

    /// The response is complete after all.
    pub fn deliver_on_close(&self) {
        if let Some(socket) = self.stream.as_ref().and_then(ByteStream::socket) {
            socket.deliver_on_close();
        }
    }

    /// Releases memory that an idle connection does not need.
    pub fn rest(&mut self) {
        self.inbox.release();
        self.outbox.release();
        if let Some(socket) = self.stream.as_ref().and_then(ByteStream::socket) {
            socket.rest();
        }
    }

    /// Whether the client has left. While a body is being read, its reader notices that.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.body.is_done() {
            if self.owner.as_ref().is_none_or(|owner| !owner.will_wake(cx.waker())) {
                self.owner = Some(cx.waker().clone());
            }
            return self.poll_left(cx);
        }
        if self.inbox.bytes.is_empty() && self.poll_fill(cx) == Poll::Ready(false) {
            return true;
        }
        // If the client has sent its next request already, no more is read until this one is done.
        !self.inbox.bytes.is_empty() && self.poll_left(cx)
    }

    /// Whether the client has left while nobody reads what it sent: a body that its origin is slow to read, or
    /// its next request. No waker fires then, because unread bytes come first, so this polls.
    fn poll_left(&mut self, cx: &mut Context<'_>) -> bool {
        while self.unwanted.poll(cx, LOOK_OUT).is_ready() {
            let socket = self.stream.as_ref().and_then(ByteStream::socket);
            if !self.wanted && socket.is_some_and(Socket::has_peer_left) {
                return true;
            }
            self.unwanted.moved();
        }
        false
    }

    /// Discards what is left of an unwanted body; `false` if not all of it has arrived.
    pub fn skip_body(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        self.poll_skip(&mut cx, &mut { SKIP_NOW }) == Poll::Ready(true)
    }

    /// The same, for at most `left` bytes. Ready with `false` if there is more, or it is malformed.
    pub fn poll_skip(&mut self, cx: &mut Context<'_>, left: &mut u64) -> Poll<bool> {
        loop {
            match self.body.decode(&mut self.inbox.bytes) {
                _ if self.body.is_done() => return Poll::Ready(true),
                Ok(Some(frame)) => {
                    let length = frame.data_ref().map_or(0, Bytes::len) as u64;
                    let Some(less) = left.checked_sub(length) else { return Poll::Ready(false) };
                    *left = less;
                }
                Err(_) => return Poll::Ready(false),
                Ok(None) => {
                    if !ready!(self.poll_fill(cx)) {
                        return Poll::Ready(false);
                    }
                }
            }
        }
    }

    /// Whether the rest of a request's body can be discarded once its response is written, so that the
    /// connection may be kept. `unwanted`: nobody reads it any more.
    pub fn may_skip_body(&mut self, unwanted: bool) -> bool {
        if unwanted && self.skip_body() {
            return true;
        }
        // A chunked body may have any length.
        !self.given_up && self.body.size_hint().exact().is_some_and(|left| left <= SKIP)
    }

    pub fn poll_frame(
        &mut self,
        idle: Option<Duration>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if std::mem::take(&mut self.expects) {
            self.outbox.push(&b"HTTP/1.1 100 Continue\r\n\r\n"[..]);
            self.poll_ahead(cx)?;
        }
        self.unwanted.moved();
        self.wanted = false;
        loop {
            let frame = self.body.decode(&mut self.inbox.bytes);
            if self.body.is_done()
                && let Some(owner) = self.owner.take()
            {
                owner.wake();
            }
            match frame {
                Ok(Some(frame)) => return Poll::Ready(Some(Ok(frame))),
                Ok(None) if self.body.is_done() => return Poll::Ready(None),
                Ok(None) => {}
                Err(error) => return Poll::Ready(Some(Err(error.into()))),
            }
            match self.poll_fill(cx) {
                Poll::Ready(true) => self.idle.moved(),
                Poll::Ready(false) => return Poll::Ready(Some(Err(BodyError::Incomplete.into()))),
                Poll::Pending => {
                    self.wanted = true;
                    let Some(idle) = idle else { return Poll::Pending };
                    ready!(self.idle.poll(cx, idle));
                    self.given_up = true;
                    return Poll::Ready(Some(Err(Idle(idle).into())));
                }
            }
        }
    }
}
