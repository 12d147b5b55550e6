//! Idle timers: how somebody who waits notices that nothing has moved for too long.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::time::{Instant, Sleep, sleep_until};

/// Nothing came for as long as `timeouts.idle` says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("nothing was received for {0:?} (`timeouts.idle`)")]
pub struct Idle(pub Duration);

/// Measures how long nothing has moved.
///
/// Kept for as long as there may be something to wait for, as setting a timer costs more than all the
/// rest: it is set by the first wait and moved when it fires. What moves costs a store.
#[derive(Debug, Default)]
pub struct IdleTimer(Option<Box<Armed>>);

#[derive(Debug)]
struct Armed {
    /// Since when somebody has waited. None where something has moved since.
    since: Option<Instant>,
    timer: Pin<Box<Sleep>>,
}

impl IdleTimer {
    /// Something has moved.
    pub fn moved(&mut self) {
        if let Some(armed) = &mut self.0 {
            armed.since = None;
        }
    }

    /// For somebody who waits: ready once nothing has moved for `limit`.
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

/// A limit may be longer than there is time.
fn later(since: Instant, limit: Duration) -> Instant {
    const FAR: Duration = Duration::from_secs(30 * 365 * 24 * 3600);
    since + limit.min(FAR)
}
