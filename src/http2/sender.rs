//! What is sent on a stream, as the peer's windows and the connection allow.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker, ready},
};

use bytes::Bytes;
use h2::{Reason, SendStream};
use http::HeaderMap;
use parking_lot::Mutex;

/// How much `h2` may hold for one stream: what the peer's windows allow, until the connection is written.
pub const SEND_BUFFER: usize = 64 * 1024;

/// The same for all streams of a connection whose peer does not read.
const QUEUED: usize = 256 * 1024;

/// The longest DATA frame that every peer takes.
const MAX_FRAME: u64 = 16 * 1024;

/// What the streams of a connection have given to `h2`, and its task has not seen written.
#[derive(Debug, Default)]
pub struct Output {
    queued: AtomicUsize,
    /// The peer takes nothing at the moment, of any stream.
    is_blocked: AtomicBool,
    /// DATA frames so far.
    sent: AtomicU64,
    /// Requests begun so far, on a connection to an origin.
    begun: AtomicU64,
    /// The streams that wait until it is.
    waiting: Mutex<Vec<Waker>>,
}

/// The stream's other side takes nothing more: it was reset, or went with its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream is closed")]
pub struct Gone;

/// The sending side of a stream behind its head. Dropped before its end, it resets the stream (CANCEL), once
/// what was sent is written.
pub struct Sender {
    stream: SendStream<Bytes>,
    output: Arc<Output>,
}

impl Output {
    /// For the connection's task: whether all of it is written.
    pub fn written(&self, all: bool) {
        if self.is_blocked.load(Ordering::Relaxed) == all {
            self.is_blocked.store(!all, Ordering::Relaxed);
        }
        if all && self.queued.swap(0, Ordering::Relaxed) >= QUEUED {
            self.waiting.lock().drain(..).for_each(Waker::wake);
        }
    }

    /// How many DATA frames were sent, at least.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// Notes a request that is begun.
    pub fn begin(&self) {
        self.begun.fetch_add(1, Ordering::Relaxed);
    }

    /// How many requests were begun.
    pub fn begun(&self) -> u64 {
        self.begun.load(Ordering::Relaxed)
    }

    /// Notes a head ahead of the response; `false` where the peer does not read, and it is better left out.
    pub fn queue_interim(&self, length: usize) -> bool {
        let has_room = self.queued.load(Ordering::Relaxed) < QUEUED;
        if has_room {
            self.queued.fetch_add(length, Ordering::Relaxed);
        }
        has_room
    }

    fn queue(&self, length: usize) {
        self.queued.fetch_add(length, Ordering::Relaxed);
        self.sent.fetch_add(1 + length as u64 / MAX_FRAME, Ordering::Relaxed);
    }

    fn poll_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        if self.queued.load(Ordering::Relaxed) < QUEUED {
            return Poll::Ready(());
        }
        let mut waiting = self.waiting.lock();
        // It may have been written just now.
        if self.queued.load(Ordering::Relaxed) < QUEUED {
            return Poll::Ready(());
        }
        if !waiting.iter().any(|waker| waker.will_wake(cx.waker())) {
            waiting.push(cx.waker().clone());
        }
        Poll::Pending
    }
}

impl Sender {
    pub(super) fn new(stream: SendStream<Bytes>, output: Arc<Output>) -> Self {
        Self { stream, output }
    }

    /// Sends `data`, of which what is left over stays where it is. Ready once there is none. `is_last`: with
    /// it the stream ends.
    pub fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        data: &mut Bytes,
        is_last: bool,
    ) -> Poll<Result<(), Gone>> {
        while !data.is_empty() {
            let piece = data.split_to(ready!(self.poll_ready(cx, data.len()))?);
            self.output.queue(piece.len());
            let is_end = is_last && data.is_empty();
            self.stream.send_data(piece, is_end).map_err(|_| Gone)?;
            if is_end {
                return Poll::Ready(Ok(()));
            }
        }
        if is_last {
            self.stream.send_data(Bytes::new(), true).map_err(|_| Gone)?;
        }
        Poll::Ready(Ok(()))
    }

    /// How much of `wanted` may be sent now, at least one byte.
    pub(super) fn poll_ready(
        &mut self,
        cx: &mut Context<'_>,
        wanted: usize,
    ) -> Poll<Result<usize, Gone>> {
        ready!(self.output.poll_room(cx));
        self.stream.reserve_capacity(wanted.min(SEND_BUFFER));
        loop {
            // First of all: `h2` tells of increases only.
            let capacity = self.stream.capacity();
            if capacity > 0 {
                return Poll::Ready(Ok(capacity.min(wanted)));
            }
            match ready!(self.stream.poll_capacity(cx)) {
                Some(Ok(_)) => {}
                Some(Err(_)) | None => return Poll::Ready(Err(Gone)),
            }
        }
    }

    /// Whether the connection as a whole, rather than this stream's window, is what is waited for.
    pub fn waits_for_connection(&self) -> bool {
        self.output.is_blocked.load(Ordering::Relaxed)
    }

    /// Ends the stream with trailers.
    pub fn send_trailers(&mut self, trailers: HeaderMap) -> Result<(), Gone> {
        self.stream.send_trailers(trailers).map_err(|error| {
            tracing::debug!(%error, "trailers were not passed on");
            Gone
        })
    }

    /// Breaks the stream off. What is not written yet is dropped.
    pub fn reset(&mut self, reason: Reason) {
        self.stream.send_reset(reason);
    }

    /// Ready once the peer wants no more of it. To be asked before it ends.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.stream.poll_reset(cx).map(drop)
    }
}
