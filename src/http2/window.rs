//! How much a peer may send ahead of those who read.
//!
//! `h2` gives credit back to stream and connection together, so what nobody reads takes from the window
//! that all streams share. A connection whose window is no larger than those of a few streams stands
//! still once as many are not read. One that has room for all of them lets a single peer fill megabytes.
//!
//! So the window follows what happens: each stream that is not being read adds its own window to the
//! connection's, for as long as that is so, out of a budget for the whole process. What is left to
//! streams that are read is always the same.

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

/// Streams' windows that a connection has besides, while any stream of it may receive.
const SPARE: usize = 4;

/// How many streams more than the window has room for wake the connection's task. Fewer can wait for the
/// next time that it is polled.
const STEP: usize = 2;

static BUDGET: Budget = Budget::new(UNREAD_STREAMS);
static UPSTREAM_BUDGET: Budget = Budget::new(UNREAD_UPSTREAM);

/// Streams' windows for all connections.
#[derive(Debug)]
struct Budget {
    left: AtomicUsize,
}

impl Budget {
    const fn new(streams: usize) -> Self {
        Self { left: AtomicUsize::new(streams) }
    }

    /// Takes as much as there is of `wanted`.
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

/// A connection's window, for the task that drives it.
#[derive(Debug)]
pub struct ReceiveWindow {
    credit: Arc<Credit>,
    budget: &'static Budget,
    /// A stream's window.
    stream: u32,
    /// Streams' windows that it has beyond [`INITIAL`].
    granted: usize,
}

/// What a connection's streams say of it.
#[derive(Debug, Default)]
pub struct Credit {
    /// Streams that may receive.
    open: AtomicUsize,
    /// Those of them that may hold what nobody has read.
    unread: AtomicUsize,
    /// Windows granted, for streams to compare with.
    granted: AtomicUsize,
    /// The connection's task.
    driver: Mutex<Option<Waker>>,
}

/// One stream, from its head to the end of what it receives. Unread until somebody reads it.
#[derive(Debug)]
pub struct Unread {
    credit: Arc<Credit>,
    is_unread: bool,
}

impl ReceiveWindow {
    /// Of a connection to an origin.
    pub fn upstream() -> Self {
        let stream = UPSTREAM_WINDOW;
        Self { credit: Arc::default(), budget: &UPSTREAM_BUDGET, stream, granted: 0 }
    }

    /// For the connection's streams.
    pub fn credit(&self) -> &Arc<Credit> {
        &self.credit
    }

    /// The size that the connection's window is to have from now on (`set_target_window_size`), where that
    /// has changed. To be asked whenever the connection was polled; its task is woken for it.
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
    /// A stream that may receive begins.
    pub fn open(self: &Arc<Self>) -> Unread {
        self.open.fetch_add(1, Ordering::Relaxed);
        let mut stream = Unread { credit: self.clone(), is_unread: false };
        stream.unread();
        stream
    }
}

impl Unread {
    /// Whoever reads it has everything that came, has given the credit for it back, and waits for more.
    pub fn read(&mut self) {
        if std::mem::take(&mut self.is_unread) {
            self.credit.unread.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// More has come than was read, or may have.
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
