//! Average latency: it rises fast to a peak, and forgets it over [`DECAY`] or, with many measurements, over
//! about twenty responses.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// Over this time, an old measurement loses about two thirds of its weight.
pub(super) const DECAY: Duration = Duration::from_secs(10);

/// The weight of one slow response: a lasting peak has its effect with the third one, and a short one, from a busy
/// machine, has little.
const RISE: f32 = 0.5;

/// The weight of one quick response, however soon it follows the previous one.
const FALL: f32 = 1.0 / 16.0;

/// The latency of a failure: an endpoint that refuses in a microsecond must not look fast.
pub(super) const PENALTY: Duration = Duration::from_secs(1);

/// A measurement this old no longer counts, and the endpoint is used as if it were new. This gives an endpoint that
/// was slow, and was not picked since then, a second chance.
pub(super) const STALE: Duration = Duration::from_secs(30);

/// A peak-sensitive, exponentially weighted moving average in one word.
///
/// The upper half is the average in seconds (`f32` bits; zero: nothing measured), the lower half is the time of its
/// last change in milliseconds. Both change together, so that a reader never combines one sample's average with
/// another sample's time. The time wraps after 49 days, which at worst gives one sample a wrong age.
#[derive(Debug)]
pub(super) struct PeakEwma(AtomicU64);

impl Clone for PeakEwma {
    fn clone(&self) -> PeakEwma {
        PeakEwma(AtomicU64::new(self.0.load(Relaxed)))
    }
}

impl PeakEwma {
    /// Starts at `seed`, or with nothing measured.
    pub(super) fn new(seed: Option<Duration>, now: u64) -> PeakEwma {
        PeakEwma(AtomicU64::new(seed.map_or(0, |seed| pack(seconds(seed), now))))
    }

    /// Adds a response time.
    pub(super) fn observe(&self, sample: Duration, now: u64) {
        let sample = seconds(sample);
        self.change(
            |old, age| match old {
                Some(old) if age < STALE => {
                    let kept = match sample > old {
                        true => 1.0 - RISE,
                        false => (-age.as_secs_f32() / DECAY.as_secs_f32()).exp().min(1.0 - FALL),
                    };
                    pack(old * kept + sample * (1.0 - kept), now)
                }
                _ => pack(sample, now),
            },
            now,
        );
    }

    /// Adds a failure, which never makes an endpoint look better than before.
    pub(super) fn penalise(&self, now: u64) {
        self.change(|old, _| pack(old.unwrap_or(0.0).max(seconds(PENALTY)), now), now);
    }

    /// Forgets everything.
    pub(super) fn forget(&self) {
        self.0.store(0, Relaxed);
    }

    /// The average in seconds; `None` if nothing was measured recently.
    pub(super) fn load(&self, now: u64) -> Option<f32> {
        let word = self.0.load(Relaxed);
        average(word).filter(|_| age(word, now) < STALE)
    }

    fn change(&self, next: impl Fn(Option<f32>, Duration) -> u64, now: u64) {
        // The closure always returns `Some`, so the update always succeeds.
        let _ =
            self.0.fetch_update(Relaxed, Relaxed, |word| Some(next(average(word), age(word, now))));
    }
}

fn pack(average: f32, now: u64) -> u64 {
    u64::from(average.to_bits()) << 32 | u64::from(now as u32)
}

fn average(word: u64) -> Option<f32> {
    let average = f32::from_bits((word >> 32) as u32);
    (average > 0.0).then_some(average)
}

/// The clocks of two threads may differ slightly: a time in the future has age zero.
fn age(word: u64, now: u64) -> Duration {
    let elapsed = (now as u32).wrapping_sub(word as u32) as i32;
    Duration::from_millis(u64::try_from(elapsed).unwrap_or(0))
}

/// Never zero, which means "nothing measured".
fn seconds(sample: Duration) -> f32 {
    sample.as_secs_f32().max(1e-6)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn assert_near(ewma: &PeakEwma, now: u64, expected: Duration) {
        let got = ewma.load(now).unwrap();
        let expected = expected.as_secs_f32();
        assert!((got - expected).abs() < expected * 0.01, "{got} is not near {expected}");
    }

    #[test]
    fn a_peak_that_lasts_is_believed_and_one_that_does_not_is_soon_forgotten() {
        let ewma = PeakEwma::new(None, 0);
        ewma.observe(10 * MS, 0);
        ewma.observe(100 * MS, 1);
        assert_near(&ewma, 1, 55 * MS);
        ewma.observe(100 * MS, 1);
        ewma.observe(100 * MS, 1);
        assert!(ewma.load(1).unwrap() > 0.085);

        (0..40).for_each(|_| ewma.observe(10 * MS, 1));
        assert!(ewma.load(1).unwrap() < 0.02);
    }

    #[test]
    fn a_lower_sample_counts_as_time_passes() {
        let ewma = PeakEwma::new(Some(100 * MS), 0);
        ewma.observe(10 * MS, 10_000);
        // e^-1 of the old remains.
        assert_near(&ewma, 10_000, Duration::from_secs_f32(0.1 * 0.3679 + 0.01 * 0.6321));
    }

    #[test]
    fn an_old_measurement_is_no_measurement() {
        let ewma = PeakEwma::new(Some(100 * MS), 0);
        assert!(ewma.load(29_999).is_some());
        assert_eq!(ewma.load(30_000), None);
        ewma.observe(10 * MS, 30_000);
        assert_near(&ewma, 30_000, 10 * MS);
    }

    #[test]
    fn a_failure_weighs_as_the_penalty_and_never_flatters() {
        let fast = PeakEwma::new(Some(MS), 0);
        fast.penalise(1);
        assert_near(&fast, 1, PENALTY);

        let slow = PeakEwma::new(Some(7 * PENALTY), 0);
        slow.penalise(1);
        assert_near(&slow, 1, 7 * PENALTY);
    }

    #[test]
    fn a_sample_from_the_past_has_no_negative_age() {
        let ewma = PeakEwma::new(Some(100 * MS), 1_000);
        ewma.observe(10 * MS, 999);
        assert_near(&ewma, 1_000, Duration::from_secs_f32(0.1 * 15.0 / 16.0 + 0.01 / 16.0));
    }

    #[test]
    fn nothing_known_is_told_apart_from_a_zero_sample() {
        let ewma = PeakEwma::new(None, 0);
        assert_eq!(ewma.load(0), None);
        ewma.observe(Duration::ZERO, 0);
        assert!(ewma.load(0).is_some());
        ewma.forget();
        assert_eq!(ewma.load(0), None);
    }
}
