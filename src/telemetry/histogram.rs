//! Durations in buckets.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

/// Upper bounds in microseconds: from a cached response on loopback to a slow report.
const BOUNDS: [u64; 14] = [
    500, 1_000, 2_500, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 500_000, 1_000_000,
    2_500_000, 10_000_000, 60_000_000,
];

/// The same in seconds, for the recorder's series.
pub(super) const LATENCY_BUCKETS: [f64; BOUNDS.len()] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];

/// A histogram that all threads can record into.
#[derive(Debug, Default)]
pub(super) struct Histogram {
    /// Not cumulative, unlike in a scrape. The last one has the values above all bounds.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    nanoseconds: AtomicU64,
}

/// The totals of one or several histograms at one time.
#[derive(Default)]
pub(super) struct Totals {
    pub(super) buckets: [u64; BOUNDS.len() + 1],
    pub(super) seconds: f64,
}

impl Histogram {
    pub(super) fn record(&self, duration: Duration) {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let over = |bound: &&u64| nanoseconds > **bound * 1000;
        let bucket = BOUNDS.iter().take_while(over).count();
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.nanoseconds.fetch_add(nanoseconds, Relaxed);
    }
}

impl Totals {
    pub(super) fn of<'a>(histograms: impl IntoIterator<Item = &'a Histogram>) -> Self {
        let mut totals = Self::default();
        for histogram in histograms {
            for (total, bucket) in totals.buckets.iter_mut().zip(&histogram.buckets) {
                *total += bucket.load(Relaxed);
            }
            totals.seconds += histogram.nanoseconds.load(Relaxed) as f64 / 1e9;
        }
        totals
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bound_belongs_to_its_bucket() {
        let histogram = Histogram::default();
        for (index, seconds) in LATENCY_BUCKETS.iter().enumerate() {
            let bound = Duration::from_secs_f64(*seconds);
            assert_eq!(bound, Duration::from_micros(BOUNDS[index]));
            histogram.record(bound);
            histogram.record(bound + Duration::from_nanos(1));
        }
        let totals = Totals::of([&histogram]);
        assert_eq!(totals.buckets[0], 1);
        assert!(totals.buckets[1..BOUNDS.len()].iter().all(|count| *count == 2));
        assert_eq!(totals.buckets[BOUNDS.len()], 1);
        let sum = 2.0 * LATENCY_BUCKETS.iter().sum::<f64>();
        assert!((totals.seconds - sum).abs() < 1e-6, "{}", totals.seconds);
    }
}
