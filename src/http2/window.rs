//! How much a peer may send ahead of the readers of its streams.
//!
//! `h2` gives credit to the stream and the connection together, so unread data takes from the window that all
//! streams share. A connection with a window of only a few streams stalls once that many are not read. One with
//! a window of all its streams lets a single peer fill megabytes.
//!
//! So the window is adjusted: each unread stream adds its own window to the connection's for as long as it is
//! unread, from a budget for the whole process. What remains for the streams that are read is always the same.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Waker},
};

use parking_lot::Mutex;

use super::{STREAM_WINDOW, UNREAD_STREAMS, UNREAD_UPSTREAM, UPSTREAM_WINDOW};

/// The window that every connection begins with (RFC 9113 §6.9.2).
const INITIAL: u32 = 65_535;

/// How many streams' windows a connection has in addition, while any of its streams may receive.
const SPARE: usize = 4;

/// This many unread streams beyond the window wake the connection's task. Fewer wait until it is polled anyway.
const STEP: usize = 2;

static BUDGET: Budget = Budget::new(UNREAD_STREAMS);
static UPSTREAM_BUDGET: Budget = Budget::new(UNREAD_UPSTREAM);

/// The windows left for the unread streams of all connections.
#[derive(Debug)]
struct Budget {
    left: AtomicUsize,
}

impl Budget {
    const fn new(streams: usize) -> Self {
        Self { left: AtomicUsize::new(streams) }
    }

    /// Takes up to `wanted`, as much as is left.
    fn take(&self, wanted: usize) -> usize {
        let taken = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
            Some(left - left.min(wanted))
        });
        taken.map_or(0, |left| left.min(wanted))
    }

    fn give_back(&self, streams: usize) {
        self.left.fetch_add(streams, Ordering::Relaxed);
    }
}

/// A connection's window, owned by the task that drives it.
#[derive(Debug)]
pub struct ReceiveWindow {
    credit: Arc<Credit>,
    budget: &'static Budget,
    /// A stream's window.
    stream: u32,
    /// Streams' windows that it has beyond [`INITIAL`].
    granted: usize,
}

/// What a connection's streams report.
#[derive(Debug, Default)]
pub struct Credit {
    /// Streams that may receive.
    open: AtomicUsize,
    /// Those of them that may have unread data.
    unread: AtomicUsize,
    /// Windows granted, for streams to compare with.
    granted: AtomicUsize,
    /// The connection's task.
    driver: Mutex<Option<Waker>>,
}

/// One stream, from its head to the end of what it receives. Counts as unread until it is read.
#[derive(Debug)]
pub struct Unread {
    credit: Arc<Credit>,
    is_unread: bool,
}

impl ReceiveWindow {
    /// For a connection to an origin.
    pub fn upstream() -> Self {
        let stream = UPSTREAM_WINDOW;
        Self { credit: Arc::default(), budget: &UPSTREAM_BUDGET, stream, granted: 0 }
    }

    /// For the connection's streams.
    pub fn credit(&self) -> &Arc<Credit> {
        &self.credit
    }

    /// The connection's new window (`set_target_window_size`), if it has changed. To be polled whenever the
    /// connection was polled; wakes its task.
    pub fn poll_resized(&mut self, cx: &mut Context<'_>) -> Option<u32> {
        let open = self.credit.open.load(Ordering::Relaxed);
        let unread = self.credit.unread.load(Ordering::Relaxed);
        let wanted = if open == 0 { 0 } else { unread + SPARE };
        let before = self.granted;
        if wanted > before {
            self.granted += self.budget.take(wanted - before);
        } else if wanted + STEP < before || open == 0 {
            self.budget.give_back(before - wanted);
            self.granted = wanted;
        }
        if self.granted != before {
            self.credit.granted.store(self.granted, Ordering::Relaxed);
        }
        let mut driver = self.credit.driver.lock();
        if driver.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
            *driver = Some(cx.waker().clone());
        }
        let streams = u32::try_from(self.granted).unwrap_or(u32::MAX);
        let size = INITIAL.saturating_add(streams.saturating_mul(self.stream));
        (self.granted != before).then_some(size.min(i32::MAX as u32))
    }
}

impl Default for ReceiveWindow {
    fn default() -> Self {
        Self { credit: Arc::default(), budget: &BUDGET, stream: STREAM_WINDOW, granted: 0 }
    }
}

impl Drop for ReceiveWindow {
    fn drop(&mut self) {
        self.budget.give_back(self.granted);
    }
}

impl Credit {
    /// Begins a stream that may receive.
    pub fn open(self: &Arc<Self>) -> Unread {
        self.open.fetch_add(1, Ordering::Relaxed);
        let mut stream = Unread { credit: self.clone(), is_unread: false };
        stream.unread();
        stream
    }
}

impl Unread {
    /// The reader has everything that was received, has given credit for it, and waits for more.
    pub fn read(&mut self) {
        if std::mem::take(&mut self.is_unread) {
            self.credit.unread.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// There may be unread data.
    pub fn unread(&mut self) {
        if std::mem::replace(&mut self.is_unread, true) {
            return;
        }
        let unread = self.credit.unread.fetch_add(1, Ordering::Relaxed) + 1;
        let room = self.credit.granted.load(Ordering::Relaxed);
        if unread + SPARE > room + STEP
            && let Some(driver) = &*self.credit.driver.lock()
        {
            driver.wake_by_ref();
        }
    }
}

impl Drop for Unread {
    fn drop(&mut self) {
        self.read();
        self.credit.open.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: u32 = STREAM_WINDOW;

    fn window(budget: usize) -> ReceiveWindow {
        let budget = Box::leak(Box::new(Budget::new(budget)));
        ReceiveWindow { credit: Arc::default(), budget, stream: ONE, granted: 0 }
    }

    fn resized(window: &mut ReceiveWindow) -> Option<u32> {
        window.poll_resized(&mut Context::from_waker(Waker::noop()))
    }

    #[test]
    fn streams_that_are_not_read_leave_the_others_as_much_as_before() {
        let mut window = window(100);
        assert_eq!(resized(&mut window), None, "nothing to receive");
        let first = window.credit().open();
        assert_eq!(resized(&mut window), Some(INITIAL + 5 * ONE));
        let stalled: Vec<_> = (0..50).map(|_| window.credit().open()).collect();
        assert_eq!(resized(&mut window), Some(INITIAL + 55 * ONE));
        drop(stalled);
        assert_eq!(resized(&mut window), Some(INITIAL + 5 * ONE));
        drop(first);
        assert_eq!(resized(&mut window), Some(INITIAL));
        assert_eq!(window.budget.left.load(Ordering::Relaxed), 100);
    }

    #[test]
    fn a_stream_that_is_read_and_waits_takes_none_of_the_budget() {
        let mut window = window(100);
        let mut streams: Vec<_> = (0..50).map(|_| window.credit().open()).collect();
        streams.iter_mut().for_each(Unread::read);
        assert_eq!(resized(&mut window), Some(INITIAL + 4 * ONE));
        streams.iter_mut().for_each(Unread::unread);
        streams.iter_mut().for_each(Unread::unread);
        assert_eq!(resized(&mut window), Some(INITIAL + 54 * ONE));
    }

    #[test]
    fn all_connections_together_get_no_more_than_the_budget() {
        let mut first = window(10);
        let (credit, budget) = (Arc::default(), first.budget);
        let mut second = ReceiveWindow { credit, budget, stream: ONE, granted: 0 };
        let streams: Vec<_> = (0..4).map(|_| first.credit().open()).collect();
        assert_eq!(resized(&mut first), Some(INITIAL + 8 * ONE));
        let _others: Vec<_> = (0..9).map(|_| second.credit().open()).collect();
        assert_eq!(resized(&mut second), Some(INITIAL + 2 * ONE));
        assert_eq!(resized(&mut second), None, "there is no more");
        drop(streams);
        assert_eq!(resized(&mut first), Some(INITIAL));
        assert_eq!(resized(&mut second), Some(INITIAL + 10 * ONE));
        drop(second);
        assert_eq!(first.budget.left.load(Ordering::Relaxed), 10);
    }

    #[tokio::test]
    async fn the_connection_learns_of_streams_that_its_window_has_no_room_for() {
        let mut window = window(100);
        let credit = window.credit().clone();
        let resized = tokio::spawn(std::future::poll_fn(move |cx| match window.poll_resized(cx) {
            Some(size) if size >= INITIAL + 14 * ONE => std::task::Poll::Ready(()),
            _ => std::task::Poll::Pending,
        }));
        tokio::task::yield_now().await;
        let _streams: Vec<_> = (0..10).map(|_| credit.open()).collect();
        resized.await.unwrap();
    }
}
