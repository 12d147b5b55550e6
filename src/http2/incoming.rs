//! The receiving side of a stream.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{Reason, RecvStream};
use http::{Response, StatusCode};
use http_body::{Body, Frame, SizeHint};

use super::{Unread, server::Responder};
use crate::body::BoxError;

/// Why a stream's body is incomplete.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// With any code: a reset is never a clean end.
    #[error("the stream was reset ({0:?})")]
    Reset(Reason),
    /// The connection ended.
    #[error("the connection broke off")]
    Connection(#[source] h2::Error),
}

/// A body that arrives on a stream. The peer gets credit for more as it is read.
pub struct Incoming {
    stream: RecvStream,
    unread: Unread,
    size: Option<u64>,
    /// The sender waits for `100 Continue`.
    waiting: Option<Responder>,
    /// All data has arrived; trailers may follow.
    is_behind_data: bool,
    is_ended: bool,
}

impl Incoming {
    pub(super) fn new(stream: RecvStream, unread: Unread) -> Self {
        Self { stream, unread, size: None, waiting: None, is_behind_data: false, is_ended: false }
    }

    /// Sets how long it will be. `h2` checks that.
    pub fn expect(&mut self, size: Option<u64>) {
        self.size = size;
    }

    /// Sends `100 Continue` once it is read and nothing has arrived yet.
    pub fn tell_to_go_on(&mut self, responder: Responder) {
        self.waiting = Some(responder);
    }

    /// The next piece of data, without giving credit for more; `None` after the last.
    pub(super) fn poll_data(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Bytes, ReceiveError>>> {
        loop {
            let Poll::Ready(data) = self.stream.poll_data(cx) else {
                self.unread.read();
                if let Some(responder) = self.waiting.take() {
                    let mut head = Response::new(());
                    *head.status_mut() = StatusCode::CONTINUE;
                    responder.send_informational(head);
                }
                return Poll::Pending;
            };
            self.unread.unread();
            match data {
                Some(Ok(data)) if data.is_empty() => {}
                Some(Ok(data)) => return Poll::Ready(Some(Ok(data))),
                Some(Err(error)) => return Poll::Ready(Some(Err(error.into()))),
                None => return Poll::Ready(None),
            }
        }
    }

    /// Gives credit for this much more.
    pub(super) fn release(&mut self, length: usize) {
        // Fails only for more than was received.
        let _ = self.stream.flow_control().release_capacity(length);
    }
}

impl Body for Incoming {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.is_ended {
            return Poll::Ready(None);
        }
        if !self.is_behind_data {
            match ready!(self.poll_data(cx)) {
                Some(Ok(data)) => {
                    self.release(data.len());
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => {
                    self.is_ended = true;
                    return Poll::Ready(Some(Err(error.into())));
                }
                None => self.is_behind_data = true,
            }
        }
        let trailers = ready!(self.stream.poll_trailers(cx));
        self.is_ended = true;
        Poll::Ready(match trailers {
            Ok(trailers) => trailers.map(|trailers| Ok(Frame::trailers(trailers))),
            Err(error) => Some(Err(ReceiveError::from(error).into())),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.is_ended || self.stream.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.size.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}

impl From<h2::Error> for ReceiveError {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_reset() => Self::Reset(reason),
            _ => Self::Connection(error),
        }
    }
}
