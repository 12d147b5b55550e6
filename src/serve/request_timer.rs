//! How long a client may be silent before and within a request's head.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

/// A client may keep an idle connection this long: longer than any client's own idle timer, because if the
/// proxy closed first, the client might be sending a request just then.
const KEEP_ALIVE: Duration = Duration::from_secs(3600);

/// After this long without a request, a connection releases memory that it does not need while idle.
const LULL: Duration = Duration::from_secs(1);

/// Limits how long a client takes for a head, and between two requests.
pub(super) struct RequestTimer {
    /// A head has begun.
    pub(super) in_head: bool,
    /// The connection has been idle for [`LULL`].
    resting: bool,
    since: Instant,
    /// Fires at or before the current deadline. Not moved for quick requests.
    timer: Option<Pin<Box<Sleep>>>,
}

impl RequestTimer {
    /// For a new client that has sent its first bytes.
    pub(super) fn new() -> Self {
        Self { in_head: true, resting: false, since: Instant::now(), timer: None }
    }

    /// The response is complete.
    pub(super) fn idle(&mut self) {
        self.in_head = false;
        self.resting = false;
        self.since = Instant::now();
    }

    /// A part of a head has arrived.
    pub(super) fn head(&mut self) {
        if !self.in_head {
            self.in_head = true;
            self.since = Instant::now();
        }
    }

    /// Ready once the client has taken too long: `header_timeout` for a head, or [`KEEP_ALIVE`] between two
    /// requests.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, header_timeout: Duration) -> Poll<()> {
        loop {
            let limit = match self.in_head {
                true => header_timeout,
                false if self.resting => KEEP_ALIVE,
                false => LULL,
            };
            let deadline = self.since + limit;
            let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
            if timer.deadline() > deadline {
                timer.as_mut().reset(deadline);
            }
            ready!(timer.as_mut().poll(cx));
            if Instant::now() < deadline {
                timer.as_mut().reset(deadline);
            } else if self.in_head || self.resting {
                return Poll::Ready(());
            } else {
                self.resting = true;
            }
        }
    }

    /// Whether the connection has been idle for a while, so that memory is released.
    pub(super) fn rests(&self) -> bool {
        self.resting
    }
}
