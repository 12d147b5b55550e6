//! The body of every response: the target's, or truename's own.

use std::{
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use ::http::HeaderName;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};

use super::{
    super::Record,
    origin::{Origin, OriginSide},
    upgrade::Switch,
};
use crate::body::BoxError;

/// How long a client may read nothing of a response that does not belong to an alias.
const OWN_IDLE: Duration = Duration::from_secs(60);

/// The body of every response, the target's or truename's own.
pub struct Body(Kind);

enum Kind {
    /// truename's own response.
    Whole(Option<Bytes>, Option<Box<Record>>),
    /// The origin's.
    Streaming(Box<OriginSide>),
    /// None: another protocol follows the head.
    Switching(Option<Switch>),
}

impl Body {
    /// A whole short response.
    pub fn whole(bytes: Bytes) -> Self {
        Self(Kind::Whole(Some(bytes), None))
    }

    /// No body: what follows the head is another protocol.
    pub fn switching(switch: Switch) -> Self {
        Self(Kind::Switching(Some(switch)))
    }

    /// The target's body, during which both sides may be silent for `idle`.
    pub(in crate::forward) fn streaming(
        origin: Origin,
        record: Box<Record>,
        idle: Duration,
        nominated: Vec<HeaderName>,
    ) -> Self {
        Self(Kind::Streaming(Box::new(OriginSide::new(origin, record, idle, nominated))))
    }

    /// Whether truename made it, so that nothing more of the request is needed.
    pub fn is_own(&self) -> bool {
        !matches!(self.0, Kind::Streaming(_))
    }

    /// Whether what follows the head is another protocol.
    pub fn is_switching(&self) -> bool {
        matches!(self.0, Kind::Switching(_))
    }

    /// What follows the head, if that is another protocol.
    pub(super) fn take_switch(&mut self) -> Option<Switch> {
        match &mut self.0 {
            Kind::Switching(switch) => switch.take(),
            Kind::Whole(..) | Kind::Streaming(_) => None,
        }
    }

    /// How long the client may read nothing of it.
    pub(super) fn idle(&self) -> Duration {
        match &self.0 {
            Kind::Whole(_, record) => {
                let alias = record.as_ref().and_then(|record| record.alias());
                alias.map_or(OWN_IDLE, |alias| alias.config().timeouts.idle)
            }
            Kind::Streaming(origin) => origin.idle(),
            Kind::Switching(_) => OWN_IDLE,
        }
    }

    /// Continues with the request's body while nothing of this one can be written.
    pub(super) fn poll_progress(&mut self, cx: &mut Context<'_>) {
        if let Kind::Streaming(origin) = &mut self.0 {
            origin.poll_progress(cx);
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
            Kind::Streaming(origin) => origin.poll_frame(cx),
            Kind::Switching(_) => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Kind::Whole(bytes, _) => bytes.as_ref().is_none_or(Bytes::is_empty),
            Kind::Streaming(origin) => origin.is_end_stream(),
            Kind::Switching(_) => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Kind::Whole(bytes, _) => {
                SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Kind::Streaming(origin) => origin.size_hint(),
            Kind::Switching(_) => SizeHint::with_exact(0),
        }
    }
}
