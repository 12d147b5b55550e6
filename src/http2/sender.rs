//! The sending side of a stream, as the peer's windows and the connection allow.

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

/// How much `h2` may buffer for one stream, within the peer's windows, until the connection is written.
pub const SEND_BUFFER: usize = 64 * 1024;

/// The same for all streams of a connection whose peer does not read.
const QUEUED: usize = 256 * 1024;

/// The longest DATA frame that every peer accepts.
const MAX_FRAME: u64 = 16 * 1024;

/// What a connection's streams have given to `h2` and is not written yet.
#[derive(Debug, Default)]
pub struct Output {
    queued: AtomicUsize,
    /// The peer is reading nothing at the moment, of any stream.
    is_blocked: AtomicBool,
    /// DATA frames so far.
    sent: AtomicU64,
    /// Requests begun so far, on a connection to an origin.
    begun: AtomicU64,
    /// The streams that wait until it is.
    waiting: Mutex<Vec<Waker>>,
}

/// The peer reads no more of the stream: it was reset, or its connection ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream is closed")]
pub struct Gone;

/// The sending side of a stream, after its head. If dropped before its end, it resets the stream (CANCEL) once
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

    /// Notes a `1xx`; `false` if it should be left out because the peer does not read.
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
        // It may just have been written.
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

    /// Sends `data`, removing what was sent. Ready once all of it was. `is_last`: the stream ends with it.
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
            // Checked first, because `h2` reports increases only.
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

    /// Whether the connection as a whole, rather than this stream's window, is what blocks.
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

    /// Resets the stream. What is not written yet is dropped.
    pub fn reset(&mut self, reason: Reason) {
        self.stream.send_reset(reason);
    }

    /// Ready once the peer has reset the stream. To be polled before the stream ends.
    pub fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.stream.poll_reset(cx).map(drop)
    }
}
