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
        let unread = error.is_some_and(|error| error.verdict().proves_unread());
        let begun = error.is_some() && lease.has_begun_to_answer();
        if !unread && !begun && is_safe_to_repeat(&head.method, body) {
            // What a pooled connection fails at is expected to be its own end (RFC 9112 §9.3.1).
            let resets = self.upstream.config().retry.when.contains(&RetryOn::Reset);
            return if lease.is_reused() { Some("reuse") } else { resets.then_some("reset") };
        }
        let verdict = lease.verdict(error).await;
        tracing::debug!(?verdict, endpoint = %lease.endpoint(), "a request was lost");
        verdict.proves_unread().then_some("reuse")
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
            self.record.retried(reason);
            return true;
        }
        self.may_retry(reason, tries)
    }

    pub(super) fn may_reconnect(&mut self, error: &AcquireError, tries: &mut Tries) -> bool {
        let worth = match error {
            AcquireError::Connect(error) => error.is_worth_another_endpoint(),
            AcquireError::Http { .. } => true,
            AcquireError::NoEndpoint
            | AcquireError::Late { .. }
            | AcquireError::ConnectionLimit { .. } => false,
        };
        worth
            && self.upstream.config().retry.when.contains(&RetryOn::Connect)
            && self.may_retry("connect", tries)
    }

    /// Whether the next try is the last that `retry.attempts` allows.
    pub(super) fn is_last_try(&self, tries: &Tries) -> bool {
        tries.retries + 1 >= self.upstream.config().retry.attempts
    }

    pub(super) fn may_retry(&mut self, reason: &'static str, tries: &mut Tries) -> bool {
        if tries.retries >= self.upstream.config().retry.attempts || !self.upstream.withdraw() {
            return false;
        }
        tries.retries += 1;
        self.record.retried(reason);
        true
    }

    pub(super) fn may_repeat_status(
        &self,
        status: StatusCode,
        method: &Method,
        body: &RequestBody,
    ) -> bool {
        let when = RetryOn::Status(status.as_u16());
        is_safe_to_repeat(method, body) && self.upstream.config().retry.when.contains(&when)
    }
}

/// Whether to repeat a request does no harm, whatever came of it.
fn is_safe_to_repeat(method: &Method, body: &RequestBody) -> bool {
    method.is_idempotent() && body.is_untouched()
}

/// Whether a kept connection was used again just when its origin gave notice, by a 408, that it had
/// waited for that long enough (RFC 9110 §15.5.9). The request was there by then: it is for the
/// client to say whether one that is not idempotent is sent again.
pub(super) fn is_idle_timeout(
    status: StatusCode,
    lease: &Lease,
    method: &Method,
    body: &RequestBody,
) -> bool {
    status == StatusCode::REQUEST_TIMEOUT && lease.is_reused() && is_safe_to_repeat(method, body)
}
