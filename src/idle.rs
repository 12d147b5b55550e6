//! Idle timers.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

/// Nothing was received for `timeouts.idle`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nothing was received for {0:?} (`timeouts.idle`)")]
pub struct Idle(pub Duration);

/// Measures how long there has been no progress.
///
/// Kept as long as it may be needed, because setting a timer is the expensive part: the first wait sets it, and it is
/// moved only when it fires. Progress costs one store.
#[derive(Debug, Default)]
pub struct IdleTimer(Option<Box<Armed>>);

#[derive(Debug)]
struct Armed {
    /// When the wait began. None if there was progress since.
    since: Option<Instant>,
    timer: Pin<Box<Sleep>>,
}

impl IdleTimer {
    /// There was progress.
    pub fn moved(&mut self) {
        if let Some(armed) = &mut self.0 {
            armed.since = None;
        }
    }

    /// For a task that waits: ready once there has been no progress for `limit`.
    pub fn poll(&mut self, cx: &mut Context<'_>, limit: Duration) -> Poll<()> {
        let Armed { since, timer } = &mut **self.0.get_or_insert_with(|| {
            let now = Instant::now();
            Box::new(Armed { since: Some(now), timer: Box::pin(sleep_until(later(now, limit))) })
        });
        let deadline = later(*since.get_or_insert_with(Instant::now), limit);
        if timer.deadline() > deadline {
            timer.as_mut().reset(deadline);
        }
        loop {
            ready!(timer.as_mut().poll(cx));
            if Instant::now() >= deadline {
                return Poll::Ready(());
            }
            timer.as_mut().reset(deadline);
        }
    }
}

/// Measures how long a peer has taken nothing of what is sent to it.
///
/// A socket becomes writable only after much of its buffer has drained. So progress is measured by what the peer has
/// acknowledged: a few checks tell a slow peer from one that has stopped.
#[derive(Debug, Default)]
pub struct UnreadTimer {
    idle: IdleTimer,
    /// What it had acknowledged at the last check.
    taken: u64,
    /// How many checks in a row have found no progress.
    checks: u32,
}

/// How often a peer that takes nothing is checked before it is given up.
const CHECKS: u32 = 4;

impl UnreadTimer {
    /// There was progress.
    pub fn moved(&mut self) {
        self.idle.moved();
        self.checks = 0;
    }

    /// For a task that waits: ready once there has been no progress for `limit`. `acknowledged`: how much the peer has
    /// acknowledged so far.
    pub fn poll(
        &mut self,
        cx: &mut Context<'_>,
        limit: Duration,
        acknowledged: impl Fn() -> u64,
    ) -> Poll<()> {
        loop {
            ready!(self.idle.poll(cx, limit / CHECKS));
            let taken = acknowledged();
            self.checks = if taken == self.taken { self.checks + 1 } else { 0 };
            self.taken = taken;
            if self.checks >= CHECKS {
                return Poll::Ready(());
            }
            self.idle.moved();
        }
    }
}

/// A limit may be longer than an `Instant` can hold.
fn later(since: Instant, limit: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
    since + limit.min(FAR)
}
