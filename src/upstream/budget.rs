//! How many requests may be sent again: a share of those of the last ten seconds, and a few more, so that an
//! alias with little traffic can retry at all.
//!
//! A retry is granted from the share if it is not used up; others are granted while fewer than
//! [`BESIDES`] of them were granted in the current second. So when everything fails, a target gets
//! its requests, the share of them again, and three more per second.

use std::{
    array,
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use tokio::time::Instant;

/// The share is one of the requests of so many seconds, the one at hand included.
const WINDOW: u32 = 10;

/// Retries per second beyond the share.
const BESIDES: u64 = 3;

/// Counts requests and grants retries, without a lock: each worker counts its own requests, and only retries
/// write to what is shared.
#[derive(Debug)]
pub struct Budget {
    /// The bits of an `f64`.
    share: AtomicU64,
    began: Instant,
    requests: Vec<Seconds>,
    shared: Seconds,
    besides: Seconds,
}

impl Budget {
    /// `share` is from 0 to 1; with 0 nothing is sent again.
    pub fn new(share: f64, workers: usize, now: Instant) -> Self {
        Self {
            share: AtomicU64::new(share.to_bits()),
            began: now,
            requests: (0..workers.max(1)).map(|_| Seconds::default()).collect(),
            shared: Seconds::default(),
            besides: Seconds::default(),
        }
    }

    /// Sets another share.
    pub fn set_share(&self, share: f64) {
        self.share.store(share.to_bits(), Ordering::Relaxed);
    }

    fn share(&self) -> f64 {
        f64::from_bits(self.share.load(Ordering::Relaxed))
    }

    /// Counts a request.
    pub fn deposit(&self, worker: usize, now: Instant) {
        if self.share() > 0.0 {
            self.requests[worker % self.requests.len()].add(self.second(now));
        }
    }

    /// Whether one more retry is granted, which is then counted.
    pub fn withdraw(&self, now: Instant) -> bool {
        let share = self.share();
        if share <= 0.0 {
            return false;
        }
        let second = self.second(now);
        let requests: u64 = self.requests.iter().map(|seconds| seconds.sum(second, WINDOW)).sum();
        // Rounding must not cost a retry.
        let granted = (share * requests as f64 + 1e-6) as u64;
        self.shared.take(second, WINDOW, granted) || self.besides.take(second, 1, BESIDES)
    }

    /// The second that `now` is in, from 1 on.
    fn second(&self, now: Instant) -> u32 {
        let elapsed: Duration = now.saturating_duration_since(self.began);
        u32::try_from(elapsed.as_secs()).unwrap_or(u32::MAX - 1) + 1
    }
}

/// A count for each of the last seconds. In each slot the second is above its count, so that both
/// change at once. Not in one cache line with another worker's.
#[derive(Debug)]
#[repr(align(128))]
struct Seconds([AtomicU64; WINDOW as usize]);

impl Default for Seconds {
    fn default() -> Self {
        Self(array::from_fn(|_| AtomicU64::new(0)))
    }
}

impl Seconds {
    fn slot(&self, second: u32) -> &AtomicU64 {
        &self.0[(second % WINDOW) as usize]
    }

    fn add(&self, second: u32) {
        let next = |slot| match unpack(slot) {
            (counted, count) if counted == second => Some(pack(second, count.saturating_add(1))),
            // A late thread must not discard what others have counted since.
            (counted, _) if counted > second => None,
            _ => Some(pack(second, 1)),
        };
        let _ = self.slot(second).fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
    }

    fn remove(&self, second: u32) {
        let next = |slot| match unpack(slot) {
            (counted, count @ 1..) if counted == second => Some(pack(second, count - 1)),
            _ => None,
        };
        let _ = self.slot(second).fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
    }

    /// The count of the `window` seconds that end with `second`.
    fn sum(&self, second: u32, window: u32) -> u64 {
        let counts = self.0.iter().map(|slot| unpack(slot.load(Ordering::Relaxed)));
        let recent = counts
            .filter(|(counted, _)| *counted <= second && second - counted < window && *counted > 0);
        recent.map(|(_, count)| u64::from(count)).sum()
    }

    /// Counts one more, unless that exceeds `limit`. Counts first and checks afterwards: if several threads reach
    /// the limit at once, none exceeds it, although all may be refused.
    fn take(&self, second: u32, window: u32, limit: u64) -> bool {
        if self.sum(second, window) >= limit {
            return false;
        }
        self.add(second);
        let taken = self.sum(second, window) <= limit;
        if !taken {
            self.remove(second);
        }
        taken
    }
}

fn pack(second: u32, count: u32) -> u64 {
    u64::from(second) << 32 | u64::from(count)
}

fn unpack(slot: u64) -> (u32, u32) {
    ((slot >> 32) as u32, slot as u32)
}

#[cfg(test)]
mod tests;
