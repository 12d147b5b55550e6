//! The server's half: a client's connection, and the streams that it opens.

use std::{
    future::poll_fn,
    io,
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, server::SendResponse};
use http::{Request, Response, request};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::{
    Coalesced, Credit, Incoming, MAX_STREAMS, Output, ReceiveWindow, SEND_BUFFER, STREAM_WINDOW,
    Sender, Writer, coalesced,
    frames::{Flood, Frames, Inspected},
    keep_alive::KeepAlive,
    rooms::Rooms,
};
use crate::{
    idle::IdleTimer,
    stream::{Backlog, ByteStream, Socket},
};

/// So that a client that has vanished does not hold its streams forever.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// How long a client may read nothing, on any stream, although there is something for it.
const UNREAD: Duration = Duration::from_secs(60);

/// A stream that is reset this soon, before its response, counts towards [`ConnectionError::Resets`].
const EARLY: Duration = Duration::from_secs(1);

/// The memory that a `1xx` takes beyond its fields while it waits to be written.
const INTERIM_OVERHEAD: usize = 512;

/// How many streams that we have reset are remembered, and for how long: what the client sends on them is ignored,
/// as for an upload that was refused.
const RESET_STREAMS: usize = 10_000;
const RESET_DURATION: Duration = Duration::from_secs(5);

/// How many frames a connection survives for streams that are no longer remembered, or that are errors of one stream.
/// `h2` counts them for as long as the connection lives; its default is 1,024. The replies take some 3 MiB if the
/// client does not read.
const RESET_ERRORS: usize = 10_000;

/// By how much unread DATA frames may fall short of 256 bytes each, in total. `h2` counts those of streams that we
/// have reset for as long as the connection lives. Some 16,000 unread frames of one byte take 2.5 MiB.
const SMALL_FRAMES: usize = 4 * 1024 * 1024;

/// From this many streams on, a client is judged by the share of them that it has reset.
const JUDGED_FROM: usize = 500;

/// How a connection fails.
#[derive(Debug, thiserror::Error)]
pub enum ConnectionError {
    /// The client violated the protocol, or the connection ended early.
    #[error(transparent)]
    Http2(#[from] h2::Error),
    /// The socket failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// No reply to a PING, and nothing else was received.
    #[error(
        "nothing was received for {PING_INTERVAL:?}, and no reply to a PING within {PING_TIMEOUT:?}"
    )]
    Silent,
    /// The client reads nothing.
    #[error("the client read nothing for {UNREAD:?}")]
    Unread,
    /// Too many frames that are cheap to send.
    #[error(transparent)]
    Flood(#[from] Flood),
    /// The client resets most of its requests at once.
    #[error("the client reset {resets} of its {streams} streams within {EARLY:?}")]
    Resets {
        /// This many.
        resets: usize,
        /// Of this many.
        streams: usize,
    },
    /// A head, or another frame, that is not completed.
    #[error("a frame was not complete within `listener.header_timeout`")]
    Slow,
}

/// A client's connection, owned by the task that drives it.
pub struct Connection<S: ByteStream> {
    h2: h2::server::Connection<Coalesced<Inspected<S>>, Bytes>,
    writer: Writer<Inspected<S>>,
    window: ReceiveWindow,
    output: Arc<Output>,
    keep_alive: KeepAlive,
    rooms: Rooms,
    /// How long a frame may take to arrive.
    header_timeout: Duration,
    slow: IdleTimer,
    /// The frame that was incomplete at the last check.
    midway: Option<u64>,
    /// Streams so far.
    streams: usize,
    /// Those that were reset early.
    resets: Arc<AtomicUsize>,
    /// Why the connection is being ended.
    fault: Option<ConnectionError>,
}

/// A request, and what sends its response.
pub struct Exchange {
    /// The request's head.
    pub head: request::Parts,
    /// Its body; `None` if its head ended the stream.
    pub body: Option<Incoming>,
    /// Sends its response.
    pub responder: Responder,
}

/// Sends a response's head, and any `1xx` ahead of it. Clones refer to the same stream.
#[derive(Clone, Debug)]
pub struct Responder(Arc<Responding>);

#[derive(Debug)]
struct Responding {
    stream: Mutex<SendResponse<Bytes>>,
    /// The response has begun.
    has_begun: AtomicBool,
    output: Arc<Output>,
    since: Instant,
    /// The connection's streams that were reset early.
    resets: Arc<AtomicUsize>,
}

impl<S: ByteStream> Connection<S> {
    /// For a client that has sent the preface. There is no deadline for it here.
    pub async fn handshake(
        stream: S,
        max_header_size: usize,
        header_timeout: Duration,
    ) -> Result<Self, ConnectionError> {
        let (stream, writer) = coalesced(Inspected::new(stream, Frames::of_client()));
        let handshake = h2::server::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .max_concurrent_streams(MAX_STREAMS)
            .max_send_buffer_size(SEND_BUFFER)
            .max_header_list_size(max_header_size.try_into().unwrap_or(u32::MAX))
            // Beyond that `h2` ends the connection, and an honest client may cancel many requests at once.
            .max_pending_accept_reset_streams(JUDGED_FROM)
            .max_concurrent_reset_streams(RESET_STREAMS)
            .reset_stream_duration(RESET_DURATION)
            .max_local_error_reset_streams(Some(RESET_ERRORS))
            .data_frame_budget(SMALL_FRAMES)
            .enable_connect_protocol()
            .handshake(stream);
        let mut handshake = pin!(handshake);
        let mut h2 =
            poll_fn(|cx| writer.poll_driven(cx, |cx| handshake.as_mut().poll(cx))).await??;
        let keep_alive = KeepAlive::new(h2.ping_pong(), PING_INTERVAL, PING_TIMEOUT);
        Ok(Self {
            h2,
            writer,
            window: ReceiveWindow::default(),
            output: Arc::default(),
            keep_alive,
            rooms: Rooms::default(),
            header_timeout,
            slow: IdleTimer::default(),
            midway: None,
            streams: 0,
            resets: Arc::default(),
            fault: None,
        })
    }

    /// The next request; `None` at the connection's end. To be awaited until then, because this also drives the
    /// open streams.
    pub async fn accept(&mut self) -> Option<Result<Exchange, ConnectionError>> {
        poll_fn(|cx| self.poll_accept(cx)).await
    }

    fn poll_accept(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Exchange, ConnectionError>>> {
        loop {
            let h2 = &mut self.h2;
            match self.writer.poll_driven(cx, |cx| pin!(h2.accept()).poll(cx)) {
                Poll::Ready(Ok(Some(Ok((request, mut respond))))) => {
                    self.streams += 1;
                    if respond.poll_reset(cx).is_pending() {
                        return Poll::Ready(Some(Ok(self.exchange(request, respond))));
                    }
                    // Reset before it was accepted.
                    self.resets.fetch_add(1, Ordering::Relaxed);
                    continue;
                }
                Poll::Ready(Ok(Some(Err(error)))) => return Poll::Ready(Some(Err(error.into()))),
                Poll::Ready(Ok(None)) => return Poll::Ready(self.fault.take().map(Err)),
                Poll::Ready(Err(error)) => return self.failed(error.into()),
                Poll::Pending => {}
            }
            if let Some(fault) = self.fault.take() {
                // The client does not even read the GOAWAY.
                return self.failed(fault);
            }
            let is_flushed = self.writer.is_flushed();
            self.output.written(is_flushed);
            let taken = |stream: &Inspected<S>| stream.socket().map_or(0, Socket::acknowledged);
            if !is_flushed && self.writer.poll_unread(cx, UNREAD, taken).is_ready() {
                return self.failed(ConnectionError::Unread);
            }
            if let Poll::Ready(fault) = self.poll_fault(cx) {
                self.h2.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                self.fault = Some(fault);
                continue;
            }
            let resized = self.window.poll_resized(cx);
            if let Some(size) = resized {
                self.h2.set_target_window_size(size);
            }
            let writer = &self.writer;
            let takes = |backlog: &mut Backlog| {
                writer.with_stream(|stream| backlog.has_moved(stream.socket()))
            };
            match self.keep_alive.poll(cx, writer.moved(), takes) {
                Poll::Ready(Err(_)) => return self.failed(ConnectionError::Silent),
                Poll::Pending if resized.is_none() => return Poll::Pending,
                Poll::Pending => {}
                // The PING has to be written even if nothing else happens on the connection.
                Poll::Ready(Ok(())) => self.rest(),
            }
        }
    }

    /// Ready once the client sends too many frames, or takes too long for one.
    fn poll_fault(&mut self, cx: &mut Context<'_>) -> Poll<ConnectionError> {
        let sent = self.output.sent();
        let look = |stream: &Inspected<S>| {
            let frames = stream.frames();
            (frames.flood(frames.streams(), sent), frames.midway())
        };
        let (flood, midway) = self.writer.with_stream(look);
        if let Some(flood) = flood {
            return Poll::Ready(flood.into());
        }
        let (streams, resets) = (self.streams, self.resets.load(Ordering::Relaxed));
        if streams > JUDGED_FROM && resets * 2 > streams {
            return Poll::Ready(ConnectionError::Resets { resets, streams });
        }
        if midway != self.midway {
            self.midway = midway;
            self.slow.moved();
        }
        match midway {
            Some(_) => self.slow.poll(cx, self.header_timeout).map(|()| ConnectionError::Slow),
            None => Poll::Pending,
        }
    }

    fn exchange(&mut self, request: Request<RecvStream>, respond: SendResponse<Bytes>) -> Exchange {
        let (head, body) = request.into_parts();
        let responder = Responder(Arc::new(Responding {
            stream: Mutex::new(respond),
            has_begun: AtomicBool::new(false),
            output: self.output.clone(),
            since: Instant::now(),
            resets: self.resets.clone(),
        }));
        let body = (!body.is_end_stream()).then(|| Incoming::new(body, self.credit().open()));
        Exchange { head, body, responder }
    }

    fn credit(&self) -> &Arc<Credit> {
        self.window.credit()
    }

    /// Ends the connection with a reset: anything else would look like a clean end, or stay with the kernel.
    fn failed<T>(&self, error: ConnectionError) -> Poll<Option<Result<T, ConnectionError>>> {
        self.writer
            .with_stream(|stream| stream.socket().into_iter().for_each(Socket::reset_on_close));
        Poll::Ready(Some(Err(error)))
    }

    /// Tells the client that no further streams are served (GOAWAY).
    pub fn graceful_shutdown(&mut self) {
        self.h2.graceful_shutdown();
    }

    /// Ends the connection, telling the client which stream is the last that was served (GOAWAY).
    pub fn shutdown(&mut self) {
        self.h2.abrupt_shutdown(Reason::NO_ERROR);
    }

    /// Whether any stream is open.
    pub fn has_streams(&self) -> bool {
        self.h2.has_streams()
    }

    /// Whether there were any.
    pub fn was_used(&self) -> bool {
        self.streams > 0
    }

    /// Runs a stream as a task of its own.
    pub fn spawn(&self, stream: impl Future<Output = ()> + Send + 'static) {
        self.rooms.spawn(stream);
    }

    /// Releases memory that an idle connection does not need.
    fn rest(&self) {
        self.rooms.rest();
        self.writer.rest();
        self.writer.with_stream(|stream| stream.socket().into_iter().for_each(Socket::rest));
    }
}

impl Responder {
    /// Sends a `1xx`. If it cannot be sent, it is dropped, and so are those of a client that does not read. One that
    /// comes after the response's head would be an error of the protocol, which `h2` does not prevent.
    pub fn send_informational(&self, head: Response<()>) {
        if self.0.has_begun.load(Ordering::Relaxed) {
            return;
        }
        let fields = head.headers().iter();
        let length: usize = fields.map(|(name, value)| name.as_str().len() + value.len()).sum();
        if !self.0.output.queue_interim(INTERIM_OVERHEAD + length) {
            return;
        }
        if let Err(error) = self.0.stream.lock().send_informational(head) {
            tracing::debug!(%error, "a 1xx was not passed on");
        }
    }

    /// Sends the response's head. The sender sends the rest.
    pub fn respond(&self, head: Response<()>, is_end: bool) -> Result<Sender, h2::Error> {
        self.0.has_begun.store(true, Ordering::Relaxed);
        let stream = self.0.stream.lock().send_response(head, is_end)?;
        Ok(Sender::new(stream, self.0.output.clone()))
    }

    /// Ready once the client has reset the stream. To be polled before the response is sent.
    pub fn poll_gone(&self, cx: &mut Context<'_>) -> Poll<()> {
        ready!(self.0.stream.lock().poll_reset(cx)).ok();
        if self.0.since.elapsed() < EARLY {
            self.0.resets.fetch_add(1, Ordering::Relaxed);
        }
        Poll::Ready(())
    }

    /// Refuses the request.
    pub fn reset(&self, reason: Reason) {
        self.0.stream.lock().send_reset(reason);
    }
}
