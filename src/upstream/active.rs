//! Which target of an alias requests go to, where it has several.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use tokio::time::Instant;

/// The target that is used in place of those before it, and until when. One word, so that both change
/// together and a request reads them with one load.
///
/// The upper half is the target's number (0: none, so the first is used), the lower half the end in tenths
/// of a second since it was created.
///
/// Time alone ends it: what was left is tried again by the next request. Health checks will have a better
/// reason, which belongs here: to have been well for `failback`.
#[derive(Debug)]
pub(super) struct Active {
    born: Instant,
    word: AtomicU64,
}

impl Active {
    pub(super) fn new(now: Instant) -> Self {
        Self { born: now, word: AtomicU64::new(0) }
    }

    /// The number of the target in use; none if the first is used.
    pub(super) fn get(&self, now: Instant) -> Option<u32> {
        let (number, until) = unpack(self.word.load(Relaxed));
        (number != 0 && self.tenths(now) < until).then_some(number)
    }

    /// Uses `next` for `time`, unless another thread has changed `current`, which [`get`](Self::get) returned.
    /// Without `next`, the first is used again.
    pub(super) fn change(
        &self,
        current: Option<u32>,
        next: Option<u32>,
        time: Duration,
        now: Instant,
    ) {
        let until = self.tenths(now + time).saturating_add(1);
        let word = next.map_or(0, |next| pack(next, until));
        let _ = self.word.fetch_update(Relaxed, Relaxed, |before| {
            let (number, until) = unpack(before);
            let in_force = (number != 0 && self.tenths(now) < until).then_some(number);
            (in_force == current).then_some(word)
        });
    }

    fn tenths(&self, now: Instant) -> u32 {
        let tenths = now.saturating_duration_since(self.born).as_millis() / 100;
        u32::try_from(tenths).unwrap_or(u32::MAX)
    }
}

fn pack(number: u32, until: u32) -> u64 {
    u64::from(number) << 32 | u64::from(until)
}

fn unpack(word: u64) -> (u32, u32) {
    ((word >> 32) as u32, word as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_change_holds_for_its_time() {
        let now = Instant::now();
        let active = Active::new(now);
        assert_eq!(active.get(now), None);
        active.change(None, Some(2), SECOND, now);
        assert_eq!(active.get(now + SECOND), Some(2));
        assert_eq!(active.get(now + 2 * SECOND), None);
        active.change(None, Some(3), 1000 * SECOND, now + 2 * SECOND);
        assert_eq!(active.get(now + 1000 * SECOND), Some(3));
        active.change(Some(3), None, SECOND, now + 1000 * SECOND);
        assert_eq!(active.get(now + 1000 * SECOND), None);
    }

    #[test]
    fn whoever_comes_late_changes_nothing() {
        let now = Instant::now();
        let active = Active::new(now);
        active.change(None, Some(2), SECOND, now);
        active.change(None, Some(3), SECOND, now);
        assert_eq!(active.get(now), Some(2));
    }
}
