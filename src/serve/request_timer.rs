//! How long a client may be silent.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

/// A client may keep an idle connection this long. Longer than any client's own timer: who
/// closes first must not be the proxy, for the client may just then send.
const KEEP_ALIVE: Duration = Duration::from_secs(3600);

/// A connection that waits this long for its next request gives back what it does not need for that.
const LULL: Duration = Duration::from_secs(1);

/// How long a client may take for a head, and from one to the next.
pub(super) struct RequestTimer {
    /// A head has begun.
    pub(super) in_head: bool,
    /// Nothing has been asked for a while.
    resting: bool,
    since: Instant,
    /// At or before the deadline in force. Never moved for a request that is quick.
    timer: Option<Pin<Box<Sleep>>>,
}

impl RequestTimer {
    /// With a new client, of which there was a first word.
    pub(super) fn new() -> Self {
        Self { in_head: true, resting: false, since: Instant::now(), timer: None }
    }

    /// A request was answered.
    pub(super) fn idle(&mut self) {
        self.in_head = false;
        self.resting = false;
        self.since = Instant::now();
    }

    /// A part of a head is there.
    pub(super) fn head(&mut self) {
        if !self.in_head {
            self.in_head = true;
            self.since = Instant::now();
        }
    }

    /// Ready when the client has been silent for too long, within a head that may take `header_timeout`
    /// or between two.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>, header_timeout: Duration) -> Poll<()> {
        loop {
            let timer = match self.in_head {
                true => header_timeout,
                false if self.resting => KEEP_ALIVE,
                false => LULL,
            };
            let deadline = self.since + timer;
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

    /// Whether nothing has been asked for a while: then memory is given back.
    pub(super) fn rests(&self) -> bool {
        self.resting
    }
}
