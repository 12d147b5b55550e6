//! Whether a request may be sent again: what is safe, what is configured, and what the budget has.

use std::net::SocketAddr;

use ::http::{Method, StatusCode, request};

use super::http::{Journey, is_of_the_body};
use crate::{
    body::RequestBody,
    config::RetryOn,
    upstream::{AcquireError, Lease},
};

/// How often a request was tried, and where.
#[derive(Default)]
pub(super) struct Tries {
    /// Endpoints that failed it: others come first.
    pub(super) failed: Vec<SocketAddr>,
    retries: u32,
    /// A pooled connection was dead: the others may be, too.
    pub(super) fresh: bool,
}

impl Journey<'_> {
    /// Whether and why a failed request may be sent again, whatever budget and attempts say.
    /// `error` is none where an answer came that was not for it.
    pub(super) async fn retry_reason(
        &self,
        lease: &Lease,
        error: Option<&hyper::Error>,
        unsent: bool,
        again: Option<&request::Parts>,
        body: &RequestBody,
    ) -> Option<&'static str> {
        if error.is_some_and(|error| is_of_the_body(error, lease.generation())) {
            return None;
        }
        // Nothing was written, or the origin's HTTP/2 says that it took nothing.
        if unsent || error.is_some_and(was_unprocessed) {
            return Some("reuse");
        }
        let begun = error.is_some() && lease.has_begun_to_answer();
        let idempotent = again.is_some_and(|head| head.method.is_idempotent());
        if idempotent && body.is_untouched() && !begun {
            // What a pooled connection fails at is expected to be its own end (RFC 9112 §9.3.1).
            let resets = self.upstream.config().retry.on.contains(&RetryOn::Reset);
            return if lease.is_reused() { Some("reuse") } else { resets.then_some("reset") };
        }
        (!begun && lease.was_refused().await).then_some("reuse")
    }

    /// Whether it is sent again. The first time that a pooled connection turned out dead is none of
    /// the origin's failures, and free; the connection after it is a new one.
    pub(super) fn may_repeat(
        &mut self,
        reason: &'static str,
        reused: bool,
        tries: &mut Tries,
    ) -> bool {
        if reason == "reuse" && reused && !tries.fresh {
            self.exchange.retried(reason);
            return true;
        }
        self.may_retry(reason, tries)
    }

    pub(super) fn may_reconnect(&mut self, error: &AcquireError, tries: &mut Tries) -> bool {
        let worth = match error {
            AcquireError::Connect(error) => error.is_worth_another_endpoint(),
            AcquireError::Http { .. } => true,
            AcquireError::NoEndpoint | AcquireError::ConnectionLimit { .. } => false,
        };
        worth
            && self.upstream.config().retry.on.contains(&RetryOn::Connect)
            && self.may_retry("connect", tries)
    }

    pub(super) fn may_retry(&mut self, reason: &'static str, tries: &mut Tries) -> bool {
        if tries.retries >= self.upstream.config().retry.attempts || !self.upstream.withdraw() {
            return false;
        }
        tries.retries += 1;
        self.exchange.retried(reason);
        true
    }

    /// Whether an answer, or a reset, may lead to another try: then the head is kept.
    pub(super) fn repeats_answers(&self, method: &Method) -> bool {
        let retries = &self.upstream.config().retry;
        method.is_idempotent() && retries.on.iter().any(|on| *on != RetryOn::Connect)
    }

    pub(super) fn may_repeat_status(
        &self,
        status: StatusCode,
        method: &Method,
        body: &RequestBody,
    ) -> bool {
        let on = RetryOn::Status(status.as_u16());
        method.is_idempotent()
            && body.is_untouched()
            && self.upstream.config().retry.on.contains(&on)
    }
}

/// Whether a kept connection was used again just when its origin gave notice that it had waited for
/// that long enough. A 408 says that the request did not arrive whole, so that it may be sent again
/// whatever its method (RFC 9110 §15.5.9).
pub(super) fn is_idle_timeout(status: StatusCode, lease: &Lease, body: &RequestBody) -> bool {
    let sent_whole = http_body::Body::is_end_stream(body);
    status == StatusCode::REQUEST_TIMEOUT && lease.is_reused() && sent_whole
}

/// RFC 9113 §8.7: a stream refused, or beyond the last one of a GOAWAY, was not processed.
fn was_unprocessed(error: &hyper::Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(h2) = cause.downcast_ref::<h2::Error>() {
            let refused = h2.reason() == Some(h2::Reason::REFUSED_STREAM);
            let gone = h2.is_go_away() && h2.reason() == Some(h2::Reason::NO_ERROR);
            return h2.is_remote() && (refused || gone);
        }
        source = cause.source();
    }
    false
}
