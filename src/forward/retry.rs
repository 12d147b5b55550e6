//! Whether a request may be sent again: what is safe, what is configured, and what the budget has.

use std::net::SocketAddr;

use ::http::{Method, StatusCode, request};

use super::http::{Journey, is_of_the_body};
use crate::{
    body::RequestBody,
    config::RetryOn,
    upstream::{AcquireError, Lease, SendError},
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
        error: Option<&SendError>,
        head: &request::Parts,
        body: &RequestBody,
    ) -> Option<&'static str> {
        if error.is_some_and(|error| is_of_the_body(error, lease.generation())) {
            return None;
        }
        if error.is_some_and(SendError::is_unprocessed) {
            return Some("reuse");
        }
        let begun = error.is_some() && lease.has_begun_to_answer();
        if head.method.is_idempotent() && body.is_untouched() && !begun {
            // What a pooled connection fails at is expected to be its own end (RFC 9112 §9.3.1).
            let resets = self.upstream.config().retry.when.contains(&RetryOn::Reset);
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
            && self.upstream.config().retry.when.contains(&RetryOn::Connect)
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

    pub(super) fn may_repeat_status(
        &self,
        status: StatusCode,
        method: &Method,
        body: &RequestBody,
    ) -> bool {
        let on = RetryOn::Status(status.as_u16());
        method.is_idempotent()
            && body.is_untouched()
            && self.upstream.config().retry.when.contains(&on)
    }
}

/// Whether a kept connection was used again just when its origin gave notice that it had waited for
/// that long enough. A 408 says that the request did not arrive whole, so that it may be sent again
/// whatever its method (RFC 9110 §15.5.9).
pub(super) fn is_idle_timeout(status: StatusCode, lease: &Lease, body: &RequestBody) -> bool {
    let sent_whole = http_body::Body::is_end_stream(body);
    status == StatusCode::REQUEST_TIMEOUT && lease.is_reused() && sent_whole
}
