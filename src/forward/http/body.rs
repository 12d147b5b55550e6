//! The body of every response: the target's, with what has to happen when it ends, or truename's own.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use ::http::HeaderName;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};

use super::super::{Record, error::is_of_the_body};
use crate::{
    body::{BoxError, strip_trailers},
    connect::TargetStream,
    fault::ProxyErrorType,
    http1::ClientConnection,
    idle::{Idle, IdleTimer},
    upstream::{Lease, SendError},
};

/// How long a client may read nothing of a response that does not belong to an alias.
const OWN_IDLE: Duration = Duration::from_secs(60);

/// The body of every response, whoever made it.
pub struct Body(Kind);

enum Kind {
    /// truename's own response.
    Whole(Option<Bytes>, Option<Box<Record>>),
    /// The origin's.
    Streaming(Box<Streaming>),
}

/// A response that is being passed on. Holds the connection until its end, and then gives it back.
struct Streaming {
    origin: Option<Origin>,
    record: Box<Record>,
    idle: Duration,
    timer: IdleTimer,
    /// How much of the request's body had arrived at the last check.
    request_bytes: u64,
    /// The fields nominated by `Connection` in its head; they are removed from its trailers too.
    nominated: Vec<HeaderName>,
}

/// The connection that a response arrives on.
pub(in crate::forward) enum Origin {
    /// That of an alias, and for how long its target says that it will keep it.
    Alias(Lease, Option<Duration>),
    /// That of a host that is not an alias.
    Host(ClientConnection<TargetStream>),
}

impl Body {
    /// A whole short response.
    pub fn whole(bytes: Bytes) -> Self {
        Self(Kind::Whole(Some(bytes), None))
    }

    /// The target's body, during which both sides may be silent for `idle`.
    pub(in crate::forward) fn streaming(
        origin: Origin,
        record: Box<Record>,
        idle: Duration,
        nominated: Vec<HeaderName>,
    ) -> Self {
        let mut streaming = Box::new(Streaming {
            origin: Some(origin),
            record,
            idle,
            timer: IdleTimer::default(),
            request_bytes: 0,
            nominated,
        });
        if streaming.is_end_stream() {
            streaming.give_back();
        }
        Self(Kind::Streaming(streaming))
    }

    /// Whether truename made it, so that nothing more of the request is needed.
    pub fn is_own(&self) -> bool {
        matches!(self.0, Kind::Whole(..))
    }

    /// Removes the content of truename's own response, for a HEAD request.
    pub fn omit_own_content(&mut self) {
        if let Kind::Whole(bytes, _) = &mut self.0 {
            *bytes = None;
        }
    }

    /// How long the client may read nothing of it.
    pub fn idle(&self) -> Duration {
        match &self.0 {
            Kind::Whole(_, record) => {
                let alias = record.as_ref().and_then(|record| record.alias());
                alias.map_or(OWN_IDLE, |alias| alias.config().timeouts.idle)
            }
            Kind::Streaming(streaming) => streaming.idle,
        }
    }

    /// Continues with the request's body while nothing of this one can be written.
    pub fn poll_progress(&mut self, cx: &mut Context<'_>) {
        match &mut self.0 {
            Kind::Whole(..) => {}
            Kind::Streaming(streaming) => {
                streaming.origin.iter_mut().for_each(|origin| origin.poll_progress(cx));
            }
        }
    }

    /// Attaches the record of the request to truename's own response.
    pub(super) fn record(&mut self, record: Box<Record>) {
        if let Kind::Whole(_, none) = &mut self.0 {
            *none = Some(record);
        }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.0 {
            Kind::Whole(bytes, record) => {
                let bytes = bytes.take().filter(|bytes| !bytes.is_empty());
                if let (Some(bytes), Some(record)) = (&bytes, record) {
                    record.passed_on(bytes.len());
                }
                Poll::Ready(bytes.map(|bytes| Ok(Frame::data(bytes))))
            }
            Kind::Streaming(streaming) => streaming.poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Whole(bytes, _) => bytes.as_ref().is_none_or(Bytes::is_empty),
            Kind::Streaming(streaming) => streaming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Whole(bytes, _) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Kind::Streaming(streaming) => streaming.size_hint(),
        }
    }
}

impl Streaming {
    fn is_end_stream(&self) -> bool {
        self.origin.as_ref().is_none_or(Origin::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.origin.as_ref().map_or(SizeHint::with_exact(0), Origin::size_hint)
    }

    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(origin) = &mut self.origin else { return Poll::Ready(None) };
        let Poll::Ready(mut frame) = origin.poll_frame(cx) else {
            // One side may be silent while the other sends.
            let request_bytes = self.record.request().bytes();
            if request_bytes != self.request_bytes {
                self.request_bytes = request_bytes;
                self.timer.moved();
            }
            ready!(self.timer.poll(cx, self.idle));
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

    fn give_back(&mut self) {
        if let Some(Origin::Alias(lease, keep_alive)) = self.origin.take() {
            lease.give_back(keep_alive);
        }
    }
}

impl Origin {
    fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, SendError>>> {
        match self {
            Self::Alias(lease, _) => lease.poll_frame(cx),
            Self::Host(client) => client.poll_frame(cx).map_err(SendError::Http1),
        }
    }

    fn poll_progress(&mut self, cx: &mut Context<'_>) {
        match self {
            Self::Alias(lease, _) => lease.poll_progress(cx),
            Self::Host(client) => client.poll_progress(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Alias(lease, _) => lease.is_end_stream(),
            Self::Host(client) => client.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Alias(lease, _) => lease.size_hint(),
            Self::Host(client) => client.size_hint(),
        }
    }

    /// Whether the target is the one that broke off: a client that leaves is not a failure of the target.
    fn broke_off(self, error: &SendError) -> bool {
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
