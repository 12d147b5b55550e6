//! The origin's side of an exchange: the response, and the progress of the request.

use std::{
    task::{Context, Poll, ready},
    time::Duration,
};

use ::http::HeaderName;
use bytes::Bytes;
use http_body::{Frame, SizeHint};

use super::super::{Record, error::is_of_the_body};
use crate::{
    body::{BoxError, strip_trailers},
    connect::TargetStream,
    fault::ProxyErrorType,
    http1::ClientConnection,
    idle::{Idle, UnreadTimer},
    upstream::{Lease, SendError},
};

/// The origin's side after the response's head. Holds the connection until the end, and then gives it back.
pub(super) struct OriginSide {
    origin: Option<Origin>,
    record: Box<Record>,
    idle: Duration,
    timer: UnreadTimer,
    /// How much of the request's body had been sent at the last check.
    sent: u64,
    /// The fields nominated by `Connection` in its head; they are removed from its trailers too.
    nominated: Vec<HeaderName>,
}

impl OriginSide {
    pub(super) fn new(
        origin: Origin,
        record: Box<Record>,
        idle: Duration,
        nominated: Vec<HeaderName>,
    ) -> Self {
        let mut side = Self {
            origin: Some(origin),
            record,
            idle,
            timer: UnreadTimer::default(),
            sent: 0,
            nominated,
        };
        if side.is_end_stream() {
            side.give_back();
        }
        side
    }

    pub(super) fn idle(&self) -> Duration {
        self.idle
    }

    pub(super) fn is_end_stream(&self) -> bool {
        self.origin.as_ref().is_none_or(Origin::is_end_stream)
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        self.origin.as_ref().map_or(SizeHint::with_exact(0), Origin::size_hint)
    }

    /// Continues with the request's body while nothing of the response can be written.
    pub(super) fn poll_progress(&mut self, cx: &mut Context<'_>) {
        self.origin.iter_mut().for_each(|origin| origin.poll_progress(cx));
    }

    /// The next part of the response's body. Also continues with the request's body.
    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(origin) = &mut self.origin else { return Poll::Ready(None) };
        let Poll::Ready(mut frame) = origin.poll_frame(cx) else {
            ready!(self.poll_stalled(cx));
            self.record.broke(ProxyErrorType::HttpResponseTimeout);
            self.origin = None;
            return Poll::Ready(Some(Err(Idle(self.idle).into())));
        };
        self.timer.moved();
        match &mut frame {
            Some(Ok(frame)) => {
                if let Some(trailers) = frame.trailers_mut() {
                    strip_trailers(trailers, &self.nominated);
                }
                self.record.passed_on(frame.data_ref().map_or(0, Bytes::len));
                if self.is_end_stream() {
                    self.give_back();
                }
            }
            Some(Err(error)) => {
                tracing::debug!(%error, "a response broke off");
                let broke = self.origin.take().is_some_and(|origin| origin.broke_off(error));
                self.record.broke(match broke {
                    true => ProxyErrorType::HttpResponseIncomplete,
                    false => ProxyErrorType::HttpRequestError,
                });
            }
            None => self.give_back(),
        }
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    /// Ready once the origin has neither sent anything nor read anything of the request for `timeouts.idle`, and no more
    /// of the request has come. One side may be silent while the other sends.
    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let sent = self.record.request().sent();
        if sent != self.sent {
            self.sent = sent;
            self.timer.moved();
        }
        // Without a body there is nothing that it could be slow to read.
        let acknowledged = || match &self.origin {
            Some(origin) if sent > 0 => origin.acknowledged(),
            _ => 0,
        };
        self.timer.poll(cx, self.idle, acknowledged)
    }

    fn give_back(&mut self) {
        if let Some(origin) = self.origin.take() {
            origin.give_back();
        }
    }
}

/// The connection that a response arrives on.
pub(in crate::forward) enum Origin {
    /// That of an alias, and for how long its target says that it will keep it.
    Alias(Lease, Option<Duration>),
    /// That of a host that is not an alias.
    Host(ClientConnection<TargetStream>),
}

impl Origin {
    pub(super) fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, SendError>>> {
        match self {
            Self::Alias(lease, _) => lease.poll_frame(cx),
            Self::Host(client) => client.poll_frame(cx).map_err(SendError::Http1),
        }
    }

    pub(super) fn poll_progress(&mut self, cx: &mut Context<'_>) {
        match self {
            Self::Alias(lease, _) => lease.poll_progress(cx),
            Self::Host(client) => client.poll_progress(cx),
        }
    }

    /// How much the target's kernel has acknowledged, if the connection carries only this request.
    fn acknowledged(&self) -> u64 {
        match self {
            Self::Alias(lease, _) => lease.acknowledged(),
            Self::Host(client) => client.acknowledged(),
        }
    }

    pub(super) fn is_end_stream(&self) -> bool {
        match self {
            Self::Alias(lease, _) => lease.is_end_stream(),
            Self::Host(client) => client.is_end_stream(),
        }
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        match self {
            Self::Alias(lease, _) => lease.size_hint(),
            Self::Host(client) => client.size_hint(),
        }
    }

    /// The response has ended.
    pub(super) fn give_back(self) {
        if let Self::Alias(lease, keep_alive) = self {
            lease.give_back(keep_alive);
        }
    }

    /// Whether the target is the one that broke off: a client that leaves is not a failure of the target.
    pub(super) fn broke_off(self, error: &SendError) -> bool {
        match self {
            Self::Alias(lease, _) if is_of_the_body(error, lease.generation()) => false,
            Self::Alias(lease, _) => {
                lease.failed("the response broke off");
                true
            }
            Self::Host(_) => !error.is_of_the_body(),
        }
    }
}
