//! The client's side of an exchange: the response, written to the connection.

use std::{
    task::{Context, Poll, ready},
    time::Duration,
};

use ::http::{Method, Version, header::CONTENT_LENGTH, response};
use bytes::Bytes;
use http_body::Frame;

use super::{Arrival, Http1Connection};
use crate::{
    forward::{Body, ClientSide, Content, Done, Stopped, Switch},
    http1::{BodyError, Encoder, Framing, Outbox, push_response},
    stream::{ByteStream, Prefixed},
};

/// The parts of a request that its response depends on.
pub(super) struct Asked {
    pub(super) method: Method,
    pub(super) version: Version,
    pub(super) keep_alive: bool,
    /// `TE: trailers`.
    pub(super) trailers: bool,
}

/// The response to the current request.
pub(super) struct Responding<'a, S> {
    connection: &'a Http1Connection<S>,
    arrival: &'a Arrival,
    asked: Asked,
    out: Outbox,
    /// None if no body follows the head.
    encoder: Option<Encoder>,
    /// The connection may serve again.
    keep: bool,
}

/// What became of a response.
pub(super) enum Responded {
    /// The next request may come.
    Kept,
    /// The next request may come, after the rest of this one's body.
    Behind,
    /// It was the last.
    Last,
    /// The connection speaks another protocol.
    Switched(Box<dyn ByteStream>, Switch),
    /// The client has left, or the response broke off.
    Broken,
}

impl<'a, S: ByteStream + 'static> Responding<'a, S> {
    pub(super) fn new(
        connection: &'a Http1Connection<S>,
        arrival: &'a Arrival,
        asked: Asked,
    ) -> Self {
        Self { connection, arrival, asked, out: Outbox::default(), encoder: None, keep: false }
    }

    /// Makes the connection ready for what follows.
    pub(super) fn end(self, result: Result<Done, Stopped>) -> Responded {
        let mut state = self.connection.lock();
        state.request += 1;
        state.outbox = self.out;
        let switch = match result {
            Ok(Done::Responded) => None,
            Ok(Done::Switched(switch)) => Some(switch),
            Err(_) => return Responded::Broken,
        };
        if let Some(switch) = switch {
            state.outbox.release();
            let left = state.inbox.take();
            return match state.stream.take() {
                Some(stream) => Responded::Switched(Box::new(Prefixed::new(left, stream)), switch),
                None => Responded::Broken,
            };
        }
        match state.skip_body() {
            _ if !self.keep => Responded::Last,
            true => Responded::Kept,
            false => Responded::Behind,
        }
    }

    /// How the body is framed; `None` if there is none.
    fn framing(&self, head: &mut response::Parts, content: Content) -> Option<Framing> {
        match (content, self.asked.version) {
            (Content::None, _) => None,
            (Content::Length(length), _) => {
                if length == 0 {
                    // HTTP/1 has no other way to say so.
                    head.headers.entry(CONTENT_LENGTH).or_insert_with(|| 0.into());
                }
                Some(Framing::Length(length))
            }
            (Content::Unknown, Version::HTTP_10) => Some(Framing::Close),
            (Content::Unknown, _) => Some(Framing::Chunked),
        }
    }
}

impl<S: ByteStream + 'static> ClientSide for Responding<'_, S> {
    fn is_head(&self) -> bool {
        self.asked.method == Method::HEAD
    }

    fn begin(
        &mut self,
        mut head: response::Parts,
        body: &Body,
        content: Content,
    ) -> Result<bool, Stopped> {
        let is_switching = body.is_switching();
        let may_keep = self.asked.keep_alive && !self.arrival.is_ending();
        let is_lost = {
            let mut state = self.connection.lock();
            state.interim = false;
            self.out = std::mem::take(&mut state.outbox);
            // A client that waits for `100 Continue` may send the body or not, so what it sends next is
            // ambiguous. It gets no `100` any more: that would be in the middle of the response.
            let undecided = std::mem::take(&mut state.expects);
            // The rest of a refused request's body is not read.
            let is_lost = undecided || !state.may_skip_body(body.is_own());
            if is_switching && !state.body.is_done() {
                // The rest of the body would be taken for the other protocol.
                tracing::debug!(
                    "the origin switched protocols before the request's body had ended"
                );
                return Err(Stopped::Gone);
            }
            is_lost
        };
        let framing = if is_switching { None } else { self.framing(&mut head, content) };
        if framing == Some(Framing::Close) {
            // Until it is complete, whatever ends the connection: this client, a stall, the end of the process.
            self.connection.lock().reset_on_close();
        }
        self.keep = may_keep && !is_lost && framing != Some(Framing::Close);
        head.version = self.asked.version;
        let (version, keep) = (self.asked.version, self.keep);
        self.out.push_head(|out| {
            push_response(out, &head);
            if framing == Some(Framing::Chunked) {
                out.extend_from_slice(b"transfer-encoding: chunked\r\n");
            }
            match version {
                _ if is_switching => {}
                Version::HTTP_10 if keep => out.extend_from_slice(b"connection: keep-alive\r\n"),
                Version::HTTP_11 if !keep => out.extend_from_slice(b"connection: close\r\n"),
                _ => {}
            }
            out.extend_from_slice(b"\r\n");
        });
        // RFC 9110 §6.5.1: without `TE: trailers`, trailers are left out.
        self.encoder = framing.map(|framing| Encoder::new(framing, self.asked.trailers));
        Ok(self.encoder.is_some())
    }

    fn is_full(&self) -> bool {
        self.out.is_full()
    }

    fn push(&mut self, frame: Frame<Bytes>, is_last: bool) -> Result<(), Stopped> {
        let Some(encoder) = &mut self.encoder else { return Ok(()) };
        encoder.push(frame, &mut self.out).map_err(broken)?;
        if is_last { self.finish() } else { Ok(()) }
    }

    fn finish(&mut self) -> Result<(), Stopped> {
        let Some(encoder) = &mut self.encoder else { return Ok(()) };
        encoder.finish(&mut self.out).map_err(broken)
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>, idle: Duration) -> Poll<Result<(), Stopped>> {
        if self.out.is_empty() {
            return Poll::Ready(Ok(()));
        }
        let mut state = self.connection.lock();
        if let Poll::Ready(flushed) = state.poll_flush(cx, &mut self.out) {
            return Poll::Ready(flushed.map_err(|_| Stopped::Gone));
        }
        ready!(state.poll_unread(cx, &mut self.out, idle));
        Poll::Ready(Err(Stopped::Unread))
    }

    /// Also writes what goes ahead of the response.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.connection.lock();
        if state.poll_ahead(cx).is_err() || state.poll_gone(cx) {
            return Poll::Ready(());
        }
        Poll::Pending
    }

    fn break_off(&mut self, why: Stopped) {
        // Otherwise the kernel would keep what a client that reads nothing has not taken.
        if why == Stopped::Unread {
            self.connection.lock().reset_on_close();
        }
    }
}

fn broken(error: BodyError) -> Stopped {
    tracing::debug!(%error, "a response's body does not match its head");
    Stopped::Broken
}
