//! Log lines that any client can cause at will: some are written, the others are counted.

use std::{collections::HashMap, net::SocketAddr, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::time::{Instant, sleep_until};

/// So many lines in each window: what is wrong with a client is in the first.
const LINES: u32 = 5;
const WINDOW: Duration = Duration::from_secs(1);

/// The TLS handshakes that have failed of late, by listener.
#[derive(Clone, Default)]
pub struct Failures(Arc<Mutex<HashMap<SocketAddr, Window>>>);

struct Window {
    ends: Instant,
    written: u32,
    left_out: u64,
}

impl Failures {
    /// Whether another line may be written for this listener. If not, a line at the window's end
    /// says how many were not.
    pub(super) fn admit(&self, listener: SocketAddr) -> bool {
        let Some(window) = self.count(listener, Instant::now()) else { return true };
        if window.left_out == 1 {
            tokio::spawn(self.clone().sum_up(listener, window.ends));
        }
        false
    }

    /// Counts one; where its line is to be left out, gives the window as it is then.
    fn count(&self, listener: SocketAddr, now: Instant) -> Option<Window> {
        let mut windows = self.0.lock();
        // As many remain as there are listeners. Where lines were left out, their sum is awaited.
        windows.retain(|_, window| window.left_out > 0 || window.ends > now);
        let new = || Window { ends: now + WINDOW, written: 0, left_out: 0 };
        let window = windows.entry(listener).or_insert_with(new);
        if window.written < LINES {
            window.written += 1;
            return None;
        }
        window.left_out += 1;
        Some(Window { ..*window })
    }

    async fn sum_up(self, listener: SocketAddr, at: Instant) {
        sleep_until(at).await;
        let Some(window) = self.0.lock().remove(&listener) else { return };
        tracing::warn!(
            %listener,
            left_out = window.left_out,
            "TLS with clients failed more often than is logged one by one",
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listener(port: u16) -> SocketAddr {
        ([127, 0, 0, 1], port).into()
    }

    #[tokio::test]
    async fn each_listener_has_some_lines_a_window_and_a_count_of_the_others() {
        let (failures, now) = (Failures::default(), Instant::now());
        let written = |port, times| {
            (0..times).filter(|_| failures.count(listener(port), now).is_none()).count()
        };
        assert_eq!((written(1, 3), written(1, 1000)), (3, 2));
        assert_eq!(written(2, 10), 5, "another listener has its own");
        assert_eq!(failures.count(listener(1), now).unwrap().left_out, 999);
        failures.clone().sum_up(listener(1), now).await;
        assert_eq!(written(1, 4), 4, "summed up, and begun anew");
    }

    #[tokio::test]
    async fn listeners_that_are_quiet_again_leave_nothing_behind() {
        let (failures, now) = (Failures::default(), Instant::now());
        for port in 1..=100 {
            assert!(failures.count(listener(port), now).is_none());
        }
        assert!(failures.count(listener(101), now + WINDOW).is_none());
        assert_eq!(failures.0.lock().len(), 1);
    }
}
