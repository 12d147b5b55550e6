//! What is known of a client's connection: what was read, what is left of a body, whether it has left.

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

/// How much of a request's body is read that nobody wants, and for how long, so that its connection can
/// serve the next request; and how much where that is known to be there.
pub const SKIP: u64 = 1024 * 1024;
const SKIP_NOW: u64 = 128 * 1024;

/// How often somebody looks whether the client of a body that nobody reads is still there.
const LOOK_OUT: Duration = Duration::from_secs(1);

/// A connection's state, which its task and the bodies of its requests share.
pub struct ServerConnection<S> {
    /// None once it speaks another protocol.
    pub stream: Option<S>,
    pub inbox: Inbox,
    /// What goes out ahead of a response: `1xx` only.
    pub outbox: Outbox,
    /// The body of the request at hand.
    pub body: Decoder,
    /// The number of that request: a body that outlives it must not read the next one.
    pub request: u64,
    /// The client waits for `100 Continue`, which it gets when somebody wants the body.
    pub expects: bool,
    /// The client understands `1xx`, and its response has not begun.
    pub interim: bool,
    /// The connection's own task, to be woken when the body has ended: nobody reads then.
    pub owner: Option<Waker>,
    /// Whoever wants the body waits for the client.
    wanted: bool,
    /// The client has kept them waiting for too long.
    given_up: bool,
    /// Measures how long the client has sent nothing of it.
    idle: IdleTimer,
    /// Measures for how long nobody has wanted it.
    unwanted: IdleTimer,
    /// How long the client may read nothing of the response at hand.
    pub unread: Duration,
}

impl<S: ByteStream> ServerConnection<S> {
    /// Of a connection that nothing was read from.
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
            unread: Duration::ZERO,
        }
    }

    /// A request begins, with this body.
    pub fn begin(&mut self, body: Decoder) {
        self.body = body;
        // How long the client was silent before, or whoever wanted its last body, says nothing of this one.
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

    /// For somebody who waits for that: ready once the client has read nothing for too long.
    pub fn poll_unread(&mut self, cx: &mut Context<'_>, out: &mut Outbox) -> Poll<()> {
        match &self.stream {
            Some(stream) => out.poll_idle(cx, self.unread, stream),
            None => Poll::Pending,
        }
    }

    /// Writes what goes out ahead of a response, as far as that can be done now.
    pub fn poll_ahead(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if let Some(stream) = &mut self.stream
            && !self.outbox.is_empty()
            && let Poll::Ready(result) = self.outbox.poll_flush(cx, stream)
        {
            return result;
        }
        Ok(())
    }

    /// Makes the connection's end a reset: nothing else tells that a response is not whole.
    pub fn reset_on_close(&self) {
        if let Some(socket) = self.stream.as_ref().and_then(ByteStream::socket) {
            socket.reset_on_close();
        }
    }

    /// Gives back what a connection that waits does not need.
    pub fn rest(&mut self) {
        self.inbox.release();
        self.outbox.release();
        if let Some(socket) = self.stream.as_ref().and_then(ByteStream::socket) {
            socket.rest();
        }
    }

    /// Whether the client has left. Whoever has a body to read learns of it by that.
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
        // Of one that has sent its next request already no more is read: that must wait.
        !self.inbox.bytes.is_empty() && self.poll_left(cx)
    }

    /// Whether the client has left behind what nobody reads yet: a body that its origin is slow to take, or
    /// its next request. Nothing wakes anybody then: what came before stands in the way.
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

    /// Passes over what is left of a body that nobody wanted; `false` where that is not all there.
    pub fn skip_body(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        self.poll_skip(&mut cx, &mut { SKIP_NOW }) == Poll::Ready(true)
    }

    /// The same, for no more than `left` bytes of it. Ready with `false` where there is more, or it is
    /// broken.
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

    /// Whether what is left of a request's body can be passed over once its response is written, so that
    /// the connection may be kept. `unwanted`: nobody reads it any more.
    pub fn may_skip_body(&mut self, unwanted: bool) -> bool {
        if unwanted && self.skip_body() {
            return true;
        }
        // Of chunks nobody knows how many come.
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
