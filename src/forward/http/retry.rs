//! Whether a request may be sent again: the rules of `retry`, as a pure function of the attempt's outcome.

use std::net::SocketAddr;

use ::http::StatusCode;

use super::attempt::{Asked, Outcome};
use crate::{
    config::{self, RetryOn},
    fault::{Blame, Fault, Kind, Stage, Taken},
    telemetry::RetryReason,
};

/// What has been tried so far.
#[derive(Debug, Default)]
pub(super) struct Tried {
    /// Endpoints that failed: others are preferred.
    pub(super) failed: Vec<SocketAddr>,
    /// Retries that counted.
    pub(super) retries: u32,
    /// A kept connection turned out to be dead: the others may be too, so only new ones are used.
    pub(super) renewed: bool,
    /// Whether the connection of the last attempt had served before.
    pub(super) kept: bool,
    /// Whether there is an endpoint or a target that has not been tried.
    pub(super) elsewhere: bool,
}

/// What is done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// The outcome becomes the response.
    Respond,
    /// It is sent again.
    Again(Retry),
}

/// Where a request is sent again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum On {
    /// A new connection, to whichever endpoint is picked.
    NewConnection,
    /// Any connection to another endpoint, or to another target.
    AnotherEndpoint,
}

/// A further attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Retry {
    pub(super) reason: RetryReason,
    pub(super) on: On,
    /// Whether it counts neither against `retry.attempts` nor against `retry.budget`.
    pub(super) is_free: bool,
}

/// Decides what to do next; `retry.budget` is checked after this.
pub(super) fn next<Response>(
    outcome: &Outcome<Response>,
    asked: Asked<'_>,
    tried: &Tried,
    rules: &config::Retry,
) -> Next {
    let listed = |when| rules.when.contains(&when);
    let (on, reason) = match outcome {
        Outcome::Response(status, _) => match *status {
            // The target gave notice that a kept connection had been idle for too long, just when it was used
            // again (RFC 9110 §15.5.9). The request had arrived by then: if it is not idempotent, the client
            // has to decide whether to repeat it.
            StatusCode::REQUEST_TIMEOUT if tried.kept && asked.is_safe_to_repeat() => {
                (On::NewConnection, RetryReason::Reuse)
            }
            status if listed(RetryOn::Status(status.as_u16())) && asked.is_safe_to_repeat() => {
                (On::AnotherEndpoint, RetryReason::Status)
            }
            _ => return Next::Respond,
        },
        Outcome::Unconnected(fault) => {
            if !(listed(RetryOn::Connect) && tried.elsewhere && is_worth_another_endpoint(fault)) {
                return Next::Respond;
            }
            (On::AnotherEndpoint, RetryReason::Connect)
        }
        Outcome::Lost(fault) => match (fault.blame(), fault.taken()) {
            (Blame::Client, _) | (_, Taken::Some) => return Next::Respond,
            // `timeouts.connect` covers all attempts to connect, and it is over.
            _ if fault.kind() == Kind::ConnectTimeout => return Next::Respond,
            (_, Taken::Nothing) => (On::NewConnection, RetryReason::Reuse),
            (_, Taken::Unknown) if !asked.is_safe_to_repeat() => return Next::Respond,
            // The connection serves on, so that the request needs no other.
            (_, Taken::Unknown) if fault.kind() == Kind::StreamReset => {
                if !listed(RetryOn::Reset) {
                    return Next::Respond;
                }
                (On::AnotherEndpoint, RetryReason::Reset)
            }
            // A kept connection most likely failed because it was being closed (RFC 9112 §9.3.1).
            (_, Taken::Unknown) if tried.kept => (On::NewConnection, RetryReason::Reuse),
            (_, Taken::Unknown) if listed(RetryOn::Reset) => {
                (On::NewConnection, RetryReason::Reset)
            }
            (_, Taken::Unknown) => return Next::Respond,
        },
    };
    // The first kept connection that turns out to be dead does not count as a failure of the target.
    let is_free = reason == RetryReason::Reuse && tried.kept && !tried.renewed;
    if !(is_free || tried.retries < rules.attempts) || !asked.body.can_rewind() {
        return Next::Respond;
    }
    Next::Again(Retry { reason, on, is_free })
}

impl Tried {
    /// Notes an attempt that is followed by another one.
    pub(super) fn note(&mut self, outcome: &Outcome, again: Retry) {
        if let Outcome::Response(_, received) = outcome
            && again.on == On::AnotherEndpoint
        {
            self.failed.push(received.lease.endpoint());
        }
        self.count(again);
    }

    fn count(&mut self, again: Retry) {
        self.renewed |= again.on == On::NewConnection;
        self.retries += u32::from(!again.is_free);
    }

    /// Whether the attempt that was just granted is the last that `retry.attempts` allows.
    pub(super) fn is_last(&self, rules: &config::Retry) -> bool {
        self.retries >= rules.attempts
    }

    /// Whether the next attempt is the last that `retry.attempts` allows.
    pub(super) fn is_last_next(&self, rules: &config::Retry) -> bool {
        self.retries + 1 >= rules.attempts
    }
}

/// Whether requests to come should go to the next target, where this one has no other endpoint.
///
/// A late response does not count: it may be late because of what was asked for.
pub(super) fn speaks_against_target(fault: &Fault) -> bool {
    let is_late = fault.kind() == Kind::ResponseTimeout && fault.stage() == Stage::Response;
    matches!(fault.blame(), Blame::Endpoint | Blame::Target) && !is_late
}

/// Whether another endpoint, or another target, may do better.
fn is_worth_another_endpoint(fault: &Fault) -> bool {
    matches!(fault.blame(), Blame::Connection | Blame::Endpoint | Blame::Target)
}

#[cfg(test)]
mod tests;
