//! The body of a request that is sent upstream.

mod replay;
mod trailers;

use std::{
    fmt::Debug,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderName, response};
use http_body::{Body, Frame, SizeHint};
use http_body_util::combinators::UnsyncBoxBody;
use parking_lot::Mutex;
use tokio::time::{Sleep, sleep};

pub use trailers::strip_trailers;

use replay::Replay;

use crate::idle::{Idle, IdleTimer};

/// The error of a body's source.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// How long a body waits for `100 Continue` before it is sent anyway (RFC 9110 §10.1.1: a client must not wait
/// indefinitely).
const CONTINUE_TIMEOUT: Duration = Duration::from_secs(1);

/// Passes `1xx` responses on to the client, ahead of the final one.
pub trait Interim: Debug + Send + Sync {
    /// Passes this one on, if the client's version of HTTP has `1xx`. Never waits.
    fn pass_on(&self, head: response::Parts);
}

/// A client's connection, as the source of its requests' bodies.
pub trait Connection: Debug + Send + Sync {
    /// The next frame of the body of the request number `request`; an error once the connection serves the next
    /// request, or if the client has sent nothing for `idle`.
    fn poll_frame(
        &self,
        request: u64,
        idle: Option<Duration>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>>;

    /// Whether that body has ended.
    fn is_end_stream(&self, request: u64) -> bool;
}

/// A request body that streams, and that can be started over as long as little of it was sent.
#[derive(Debug)]
pub struct RequestBody {
    /// `None` if there is no body.
    stream: Option<Arc<Mutex<Stream>>>,
    /// The attempt this handle reads for: once the body was started over, it gets no more.
    attempt: u32,
    /// Passes on to the client what comes ahead of the response; none if the client does not support that.
    interim: Option<Arc<dyn Interim>>,
}

#[derive(Debug)]
struct Stream {
    source: Source,
    /// The attempt that may read.
    attempt: u32,
    /// The source's size hint before anything was read from it.
    size: SizeHint,
    /// What was read from the source, for another attempt.
    replay: Replay,
    /// The current attempt has reached the end. This differs from the source's end: an empty body of unknown length
    /// must end again in each attempt, because the head is the same.
    ended: bool,
    /// The source has ended, and must not be polled again.
    exhausted: bool,
    /// The task that waits for the end.
    waiting: Option<Waker>,
    bytes: u64,
    /// How much of what was read its reader could not send yet.
    unsent: usize,
    gate: Option<Gate>,
    /// The fields nominated by `Connection` in the request's head; they are removed from its trailers too.
    nominated: Vec<HeaderName>,
    /// How long its sender may be silent in the middle of it.
    idle: Option<Duration>,
    /// Measures this if the source does not.
    timer: IdleTimer,
}

#[derive(Debug)]
enum Source {
    Boxed(UnsyncBoxBody<Bytes, BoxError>),
    Http1 { connection: Arc<dyn Connection>, request: u64, size: SizeHint },
}

/// Holds a body back until the origin says `100 Continue`.
///
/// As long as it is not read, the HTTP server does not send `100 Continue` to the client either.
#[derive(Debug)]
struct Gate {
    waker: Option<Waker>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl RequestBody {
    /// No body at all.
    pub fn empty() -> Self {
        Self { stream: None, attempt: 0, interim: None }
    }

    /// The body of the request number `request` on an HTTP/1 connection, of this size.
    pub fn http1(connection: Arc<dyn Connection>, request: u64, size: SizeHint) -> Self {
        Self::stream(Source::Http1 { connection, request, size })
    }

    /// Any other body.
    pub fn boxed<B>(body: B) -> Self
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        if body.is_end_stream() {
            return Self::empty();
        }
        use http_body_util::BodyExt;
        Self::stream(Source::Boxed(body.map_err(Into::into).boxed_unsync()))
    }

    fn stream(source: Source) -> Self {
        let stream = Stream {
            size: source.size_hint(),
            source,
            attempt: 0,
            replay: Replay::new(),
            ended: false,
            exhausted: false,
            waiting: None,
            bytes: 0,
            unsent: 0,
            gate: None,
            nominated: Vec::new(),
            idle: None,
            timer: IdleTimer::default(),
        };
        Self { stream: Some(Arc::new(Mutex::new(stream))), ..Self::empty() }
    }

    /// Sets what passes `1xx` responses on to the client.
    pub fn with_interim(self, interim: Arc<dyn Interim>) -> Self {
        Self { interim: Some(interim), ..self }
    }

    /// What passes on the responses ahead of the final one.
    pub fn interim(&self) -> Option<&Arc<dyn Interim>> {
        self.interim.as_ref()
    }

    /// A second handle to the same body, to be kept while the first is being sent.
    pub fn handle(&self) -> Self {
        Self { stream: self.stream.clone(), attempt: self.attempt, interim: self.interim.clone() }
    }

    /// Starts the body over for another attempt. `false` if too much of it was sent, or its trailers.
    pub fn rewind(&self) -> bool {
        let Some(stream) = &self.stream else { return true };
        let mut stream = stream.lock();
        stream.replay.rewind();
        stream.ended = false;
        stream.unsent = 0;
        stream.replay.is_complete()
    }

    /// The body for the next attempt, once it was started over: a reader for the previous attempt gets no more of it,
    /// because that would be missing in this one.
    pub fn next_try(mut self) -> Self {
        if let Some(stream) = &self.stream {
            let mut stream = stream.lock();
            stream.attempt = stream.attempt.wrapping_add(1);
            self.attempt = stream.attempt;
        }
        self
    }

    /// Whether [`rewind`](Self::rewind) would succeed.
    pub fn can_rewind(&self) -> bool {
        self.stream.as_ref().is_none_or(|stream| stream.lock().replay.is_complete())
    }

    /// Ready once the current attempt has reached the body's end, and its reader has sent all of it.
    pub fn poll_ended(&self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(stream) = &self.stream else { return Poll::Ready(()) };
        let mut stream = stream.lock();
        if stream.ended && stream.unsent == 0 {
            return Poll::Ready(());
        }
        stream.waiting = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Whether nothing has been read from the sender yet.
    pub fn is_untouched(&self) -> bool {
        self.bytes() == 0
    }

    /// Bytes read from the sender so far.
    pub fn bytes(&self) -> u64 {
        self.stream.as_ref().map_or(0, |stream| stream.lock().bytes)
    }

    /// Says how much of what was read its reader cannot send yet. For a reader that holds back more than a socket's
    /// buffer does.
    pub fn set_unsent(&self, unsent: usize) {
        let Some(stream) = &self.stream else { return };
        let mut stream = stream.lock();
        if stream.attempt == self.attempt {
            stream.unsent = unsent;
            stream.wake_at_end();
        }
    }

    /// Bytes that were read from the sender so far, and sent.
    pub fn sent(&self) -> u64 {
        self.stream.as_ref().map_or(0, |stream| {
            let stream = stream.lock();
            stream.bytes.saturating_sub(stream.unsent as u64)
        })
    }

    /// The request will not be repeated: nothing more is kept.
    pub fn settle(&self) {
        let Some(stream) = &self.stream else { return };
        let mut stream = stream.lock();
        if stream.replay.is_at_end() {
            stream.replay.forget();
        }
    }

    /// Sets how long there may be no progress by its sender or its reader; `None` once a response has begun,
    /// whose progress then counts too.
    pub fn set_idle(&self, idle: Option<Duration>) {
        if let Some(stream) = &self.stream {
            stream.lock().idle = idle;
        }
    }

    /// The limit that was set.
    pub fn idle(&self) -> Option<Duration> {
        self.stream.as_ref().and_then(|stream| stream.lock().idle)
    }

    /// Sets which fields the request's head confines to its connection; they are removed from its trailers too.
    pub fn confine(&self, nominated: Vec<HeaderName>) {
        if let Some(stream) = &self.stream
            && !nominated.is_empty()
        {
            stream.lock().nominated = nominated;
        }
    }

    /// Holds the body back until [`proceed`](Self::proceed), for a second at most.
    pub fn hold(&self) {
        if let Some(stream) = &self.stream {
            stream.lock().gate = Some(Gate { waker: None, timer: None });
        }
    }

    /// Whether the body is held back.
    pub fn is_held(&self) -> bool {
        self.stream.as_ref().is_some_and(|stream| stream.lock().gate.is_some())
    }

    /// Lets a held body flow.
    pub fn proceed(&self) {
        let Some(stream) = &self.stream else { return };
        if let Some(Gate { waker: Some(waker), .. }) = stream.lock().gate.take() {
            waker.wake();
        }
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &self.stream {
            Some(stream) => {
                let mut stream = stream.lock();
                if stream.attempt != self.attempt {
                    return Poll::Ready(Some(Err("the request is being sent again".into())));
                }
                stream.poll_frame(cx)
            }
            None => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.stream.as_ref().is_none_or(|stream| stream.lock().ended)
    }

    fn size_hint(&self) -> SizeHint {
        self.stream.as_ref().map_or(SizeHint::with_exact(0), |stream| {
            let stream = stream.lock();
            if stream.replay.is_at_start() { stream.size } else { SizeHint::default() }
        })
    }
}

impl Stream {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Some(piece) = self.replay.next() {
            self.note_end();
            return Poll::Ready(Some(Ok(Frame::data(piece))));
        }
        if self.exhausted {
            self.note_end();
            return Poll::Ready(None);
        }
        if let Some(gate) = &mut self.gate {
            let timer = gate.timer.get_or_insert_with(|| Box::pin(sleep(CONTINUE_TIMEOUT)));
            if timer.as_mut().poll(cx).is_pending() {
                gate.waker = Some(cx.waker().clone());
                return Poll::Pending;
            }
            self.gate = None;
        }
        let mut frame = ready!(self.poll_source(cx));
        if let Some(Ok(frame)) = &mut frame {
            match frame.data_ref() {
                Some(data) => {
                    self.bytes += data.len() as u64;
                    self.replay.keep(data);
                }
                // Trailers end the body, and are not kept.
                None => self.replay.forget(),
            }
            if let Some(trailers) = frame.trailers_mut() {
                strip_trailers(trailers, &self.nominated);
            }
        }
        self.exhausted = frame.is_none() || self.source.is_end_stream();
        self.note_end();
        Poll::Ready(frame)
    }

    /// Notes the end, if it was reached.
    fn note_end(&mut self) {
        self.ended = self.exhausted && self.replay.is_at_end();
        self.wake_at_end();
    }

    fn wake_at_end(&mut self) {
        if self.ended
            && self.unsent == 0
            && let Some(waiting) = self.waiting.take()
        {
            waiting.wake();
        }
    }

    fn poll_source(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = self.source.poll_frame(self.idle, cx);
        match (self.idle, &self.source) {
            (None, _) | (_, Source::Http1 { .. }) => frame,
            (Some(_), _) if frame.is_ready() => {
                self.timer.moved();
                frame
            }
            (Some(idle), _) => {
                ready!(self.timer.poll(cx, idle));
                Poll::Ready(Some(Err(Idle(idle).into())))
            }
        }
    }
}

impl Source {
    fn poll_frame(
        &mut self,
        idle: Option<Duration>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self {
            Self::Boxed(body) => Pin::new(body).poll_frame(cx),
            Self::Http1 { connection, request, .. } => connection.poll_frame(*request, idle, cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Boxed(body) => body.is_end_stream(),
            Self::Http1 { connection, request, .. } => connection.is_end_stream(*request),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Boxed(body) => body.size_hint(),
            Self::Http1 { size, .. } => *size,
        }
    }
}

#[cfg(test)]
mod tests;
