//! Ejects endpoints that fail repeatedly, for a while.

use crate::config;
use std::{
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// One endpoint's record of failures. Times are milliseconds since the endpoint was created.
///
/// Reads are lock-free and may see a change half done, which at worst affects one pick. The set serialises changes
/// to `until`, `spared` and `ejections` by [`eject`](Self::eject).
#[derive(Debug)]
pub(super) struct Outlier {
    /// Consecutive failures: a success resets them to zero.
    failures: AtomicU32,
    /// Consecutive ejections: each one doubles the time.
    ejections: AtomicU32,
    /// The end of the ejection.
    until: AtomicU64,
    /// Whether it is used despite `until`, because there was no other endpoint.
    spared: AtomicBool,
    /// The last result of the active health check.
    healthy: AtomicBool,
}

impl Outlier {
    pub(super) fn new() -> Outlier {
        Outlier {
            failures: AtomicU32::new(0),
            ejections: AtomicU32::new(0),
            until: AtomicU64::new(0),
            spared: AtomicBool::new(false),
            healthy: AtomicBool::new(true),
        }
    }

    pub(super) fn clone(&self) -> Outlier {
        Outlier {
            failures: AtomicU32::new(self.failures.load(Relaxed)),
            ejections: AtomicU32::new(self.ejections.load(Relaxed)),
            until: AtomicU64::new(self.until.load(Relaxed)),
            spared: AtomicBool::new(self.spared.load(Relaxed)),
            healthy: AtomicBool::new(self.healthy.load(Relaxed)),
        }
    }

    /// Counts a failure and returns how many there are in a row.
    pub(super) fn failed(&self) -> u32 {
        let counted = |failures: u32| Some(failures.saturating_add(1));
        let before = self.failures.fetch_update(Relaxed, Relaxed, counted).unwrap_or(u32::MAX);
        before.saturating_add(1)
    }

    /// Clears the record. The common case writes nothing, so that workers do not contend for the cache line.
    pub(super) fn succeeded(&self) {
        if self.failures.load(Relaxed) == 0 && self.until.load(Relaxed) == 0 {
            return;
        }
        self.failures.store(0, Relaxed);
        self.ejections.store(0, Relaxed);
        self.until.store(0, Relaxed);
        self.spared.store(false, Relaxed);
    }

    /// Ejects the endpoint, unless `spare`. Returns for how long, if this call ejected it.
    ///
    /// The number of failures is kept: the first failure after the ejection ejects again, for longer.
    pub(super) fn eject(
        &self,
        now: u64,
        spare: bool,
        health: &config::PassiveHealth,
    ) -> Option<Duration> {
        let running = self.until.load(Relaxed) > now;
        let spared = self.spared.load(Relaxed);
        if running && (!spared || spare) {
            return None;
        }
        // Turning a spared ejection into a real one does not count as another one.
        let doublings = self.ejections.load(Relaxed).saturating_sub(u32::from(running));
        let factor = 1_u32.checked_shl(doublings).unwrap_or(u32::MAX);
        let length = health.eject.saturating_mul(factor).min(health.max_eject);
        self.ejections.store(doublings.saturating_add(1), Relaxed);
        self.spared.store(spare, Relaxed);
        let length_ms = u64::try_from(length.as_millis()).unwrap_or(u64::MAX);
        self.until.store(now.saturating_add(length_ms), Relaxed);
        (!spare).then_some(length)
    }

    /// Sets the result of an active check. A good one also ends an ejection.
    pub(super) fn mark_healthy(&self, healthy: bool) {
        self.healthy.store(healthy, Relaxed);
        if healthy {
            self.succeeded();
        }
    }

    pub(super) fn failures(&self) -> u32 {
        self.failures.load(Relaxed)
    }

    /// Whether it may be picked.
    pub(super) fn is_usable(&self, now: u64) -> bool {
        self.healthy.load(Relaxed) && (self.until.load(Relaxed) <= now || self.spared.load(Relaxed))
    }

    /// Whether it works, as far as is known. An endpoint that is used only because there is no other does not.
    pub(super) fn is_healthy(&self, now: u64) -> bool {
        self.healthy.load(Relaxed) && self.until.load(Relaxed) <= now
    }

    /// The remaining time of an ejection.
    pub(super) fn ejected_for(&self, now: u64) -> Option<Duration> {
        let left = self.until.load(Relaxed).saturating_sub(now);
        (left > 0 && !self.spared.load(Relaxed)).then(|| Duration::from_millis(left))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn health() -> config::PassiveHealth {
        config::PassiveHealth {
            failures: 3,
            eject: Duration::from_secs(10),
            max_eject: Duration::from_secs(35),
        }
    }

    #[test]
    fn ejections_double_up_to_the_limit() {
        let outlier = Outlier::new();
        let mut now = 0;
        for seconds in [10, 20, 35, 35] {
            let length = Duration::from_secs(seconds);
            assert_eq!(outlier.eject(now, false, &health()), Some(length));
            assert!(!outlier.is_usable(now));
            now += seconds * 1_000;
            assert!(outlier.is_usable(now), "back after {seconds} s");
        }
    }

    #[test]
    fn an_ejected_endpoint_is_not_ejected_again() {
        let outlier = Outlier::new();
        assert!(outlier.eject(0, false, &health()).is_some());
        assert_eq!(outlier.eject(5_000, false, &health()), None);
        assert_eq!(outlier.ejected_for(5_000), Some(Duration::from_secs(5)));
    }

    #[test]
    fn a_success_clears_failures_doublings_and_the_ejection() {
        let outlier = Outlier::new();
        outlier.failed();
        outlier.eject(0, false, &health());
        outlier.succeeded();
        assert_eq!(outlier.failures(), 0);
        assert!(outlier.is_usable(1));
        assert_eq!(outlier.eject(1, false, &health()), Some(Duration::from_secs(10)));
    }

    #[test]
    fn one_that_is_spared_is_usable_but_not_healthy_for_as_long() {
        let outlier = Outlier::new();
        assert_eq!(outlier.eject(0, true, &health()), None);
        assert!(outlier.is_usable(0));
        assert!(!outlier.is_healthy(9_999));
        assert!(outlier.is_healthy(10_000));
        assert_eq!(outlier.ejected_for(0), None);
    }

    #[test]
    fn one_that_is_spared_is_ejected_once_another_can_take_over() {
        let outlier = Outlier::new();
        outlier.eject(0, true, &health());
        assert_eq!(outlier.eject(1_000, false, &health()), Some(Duration::from_secs(10)));
        assert!(!outlier.is_usable(1_000));
        assert_eq!(outlier.eject(11_000, false, &health()), Some(Duration::from_secs(20)));
    }

    #[test]
    fn the_failure_count_does_not_wrap() {
        let outlier = Outlier::new();
        outlier.failures.store(u32::MAX, Relaxed);
        assert_eq!(outlier.failed(), u32::MAX);
        assert_eq!(outlier.failures(), u32::MAX);
    }

    #[test]
    fn a_failing_health_check_takes_it_out_and_a_good_one_brings_it_back() {
        let outlier = Outlier::new();
        outlier.mark_healthy(false);
        assert!(!outlier.is_usable(0));
        outlier.eject(0, false, &health());
        outlier.mark_healthy(true);
        assert!(outlier.is_usable(0));
    }
}
