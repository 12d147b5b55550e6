//! A client's HTTP/1 connection, served one request at a time.

mod responding;

use std::{
    fmt,
    future::poll_fn,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use ::http::{Request, Response, Version, request, response};
use bytes::Bytes;
use http_body::Frame;
use parking_lot::{Mutex, MutexGuard};
use tokio::time::{Instant, timeout};

use responding::{Asked, Responded, Responding};

use super::{Arrival, End, Listener, Server, request_timer::RequestTimer};
use crate::{
    body::{BoxError, Connection, Interim, RequestBody},
    forward::{Body, Problem, RefusedHead, Switch, exchange, headers},
    http1::{
        Decoder, HeadError, Outbox, SKIP, ServerConnection, parse_request, push_response,
        request_framing,
    },
    stream::ByteStream,
    telemetry::AliasMetrics,
};

/// How long writing a refusal, or TLS' `close_notify`, may take.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A connection, shared by its task and by its requests' bodies, which are read by the code that sends them
/// upstream.
pub(super) struct Http1Connection<S>(Mutex<ServerConnection<S>>);

/// How long discarding the rest of a request's body may take.
const SKIP_TIME: Duration = Duration::from_secs(10);

/// Why there is no further request.
enum Last {
    Refused(RefusedHead),
    /// The last response is written, and the client may still be sending.
    Responded,
    /// The connection speaks another protocol.
    Switched(Box<dyn ByteStream>, Switch),
    /// The client has left between two requests, idled too long or speaks another protocol, or the proxy is to end.
    End,
    /// The client has left within a request, or its response broke off.
    Broken,
}

/// What became of a connection.
pub(super) enum Served {
    Ended(End),
    /// A CONNECT got a 200, and this is the client's side of the tunnel.
    Connected(Box<dyn ByteStream>),
}

impl<S: ByteStream + 'static> Http1Connection<S> {
    /// `stream` is plaintext, or the inside of TLS.
    pub fn new(stream: S) -> Arc<Self> {
        Arc::new(Self(Mutex::new(ServerConnection::new(stream))))
    }

    /// Serves requests until the connection ends, each with the listener as it is when its head is
    /// there; a tunnel is served to its end too. `tls`: the connection ends with a `close_notify`.
    pub async fn serve<A, F>(
        self: &Arc<Self>,
        tls: bool,
        server: &Server,
        arrival: Box<Arrival>,
        respond: A,
    ) -> Served
    where
        A: Fn(Request<RequestBody>, Arc<Listener>) -> F,
        F: Future<Output = Response<Body>>,
    {
        match self.serve_requests(server, arrival, respond).await {
            Last::Refused(head) => Box::pin(self.refuse(head)).await,
            Last::Responded => {}
            Last::End => {
                self.close(tls).await;
                return Served::Ended(End::Done);
            }
            Last::Switched(stream, Switch::Upgrade(upgraded)) => {
                Box::pin(upgraded.run(stream)).await;
                return Served::Ended(End::Done);
            }
            Last::Switched(stream, Switch::Connect) => return Served::Connected(stream),
            Last::Broken => return Served::Ended(End::Done),
        }
        self.close(tls).await;
        Served::Ended(End::Lingers)
    }

    /// The same, without what follows the last one.
    async fn serve_requests<A, F>(
        self: &Arc<Self>,
        server: &Server,
        mut arrival: Box<Arrival>,
        respond: A,
    ) -> Last
    where
        A: Fn(Request<RequestBody>, Arc<Listener>) -> F,
        F: Future<Output = Response<Body>>,
    {
        let mut timer = RequestTimer::new();
        let mut unused = pin!(arrival.unused(Instant::now()));
        // Room for a request's future, allocated once for many requests. An idle connection frees it
        // after a while.
        let mut room = None;
        loop {
            let next = poll_fn(|cx| {
                let next = self.poll_next(cx, &mut timer, server, &mut arrival);
                if next.is_pending() && self.lock().inbox.bytes.is_empty() {
                    if timer.rests() {
                        self.lock().rest();
                        room = None;
                    }
                    return unused.as_mut().poll(cx).map(|()| Err(Last::End));
                }
                next
            });
            let (asked, request) = match next.await {
                Ok(next) => next,
                Err(last) => return last,
            };
            let room = room.get_or_insert_with(|| Box::pin(None));
            room.set(Some(respond(request, arrival.listener.clone())));
            let mut responding = Responding::new(self, &arrival, asked);
            let result = exchange(room.as_mut(), &mut responding).await;
            match responding.end(result) {
                Responded::Kept => timer.idle(),
                Responded::Behind if Box::pin(self.skip_rest()).await => timer.idle(),
                Responded::Behind | Responded::Last => return Last::Responded,
                Responded::Switched(stream, switch) => return Last::Switched(stream, switch),
                Responded::Broken => return Last::Broken,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, ServerConnection<S>> {
        self.0.lock()
    }

    fn poll_next(
        self: &Arc<Self>,
        cx: &mut Context<'_>,
        timer: &mut RequestTimer,
        server: &Server,
        arrival: &mut Arrival,
    ) -> Poll<Result<(Asked, Request<RequestBody>), Last>> {
        let mut state = self.lock();
        loop {
            state.inbox.skip_empty_lines();
            if state.inbox.has_begun() {
                arrival.follow(server);
            }
            let max_size = arrival.listener.settings.max_header_size;
            if state.inbox.has_begun() && state.inbox.may_have_head(max_size) {
                match parse_request(&mut state.inbox.bytes, max_size) {
                    Ok(None) => timer.head(),
                    Ok(Some(head)) => {
                        state.inbox.head_taken();
                        drop(state);
                        return Poll::Ready(self.accept(head));
                    }
                    Err(HeadError::OtherProtocol) => return Poll::Ready(Err(Last::End)),
                    Err(error) => return Poll::Ready(Err(refused(&error))),
                }
            }
            match state.poll_fill(cx) {
                Poll::Ready(true) => {}
                Poll::Ready(false) => return Poll::Ready(Err(Last::End)),
                Poll::Pending => break,
            }
        }
        let begun = state.inbox.has_begun();
        drop(state);
        ready!(timer.poll(cx, arrival.listener.settings.header_timeout));
        // A client that has sent nothing gets no response.
        let slow = timer.in_head && begun;
        Poll::Ready(Err(if slow { Last::Refused(RefusedHead::TooSlow) } else { Last::End }))
    }

    /// A head is complete: the request begins.
    fn accept(
        self: &Arc<Self>,
        mut head: request::Parts,
    ) -> Result<(Asked, Request<RequestBody>), Last> {
        let framing = request_framing(&mut head).map_err(|error| refused(&error))?;
        let http11 = head.version == Version::HTTP_11;
        let (keep_alive, trailers) = headers::wishes(head.version, &head.headers);
        let keep_alive = keep_alive && !framing.conflicting;
        let method = head.method.clone();
        let asked = Asked { method, version: head.version, keep_alive, trailers };
        let mut state = self.lock();
        state.interim = http11;
        state.begin(framing.body.map_or_else(Decoder::done, Decoder::new));
        let body = match framing.body {
            None => RequestBody::empty(),
            Some(_) => {
                // A client that is sending its body already needs no `100 Continue`.
                state.expects = http11
                    && state.inbox.bytes.is_empty()
                    && headers::expects_continue(&head.headers);
                RequestBody::http1(self.clone(), state.request, state.body.size_hint())
            }
        };
        drop(state);
        let body = if http11 { body.with_interim(self.clone()) } else { body };
        Ok((asked, Request::from_parts(head, body)))
    }

    /// Discards what is left of a request's body; `false` if that is too much, or takes too long.
    async fn skip_rest(&self) -> bool {
        let mut left = SKIP;
        let skipped = poll_fn(|cx| self.lock().poll_skip(cx, &mut left));
        timeout(SKIP_TIME, skipped).await.unwrap_or(false)
    }

    async fn refuse(&self, head: RefusedHead) {
        let mut out = Outbox::default();
        let problem = Problem::refused_head(head);
        let metrics = AliasMetrics::of_no_alias();
        metrics.refused(None, problem.status(), problem.error(), Duration::ZERO);
        out.push(problem.to_http1());
        let _ = timeout(CLOSE_TIMEOUT, poll_fn(|cx| self.lock().poll_flush(cx, &mut out))).await;
    }

    async fn close(&self, tls: bool) {
        if tls {
            let close_notify = poll_fn(|cx| match &mut self.lock().stream {
                Some(stream) => Pin::new(stream).poll_shutdown(cx),
                None => Poll::Ready(Ok(())),
            });
            let _ = timeout(CLOSE_TIMEOUT, close_notify).await;
        }
    }
}

impl<S: ByteStream> Connection for Http1Connection<S> {
    fn poll_frame(
        &self,
        request: u64,
        idle: Option<Duration>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut state = self.0.lock();
        if state.request != request {
            return Poll::Ready(Some(Err("the request is over".into())));
        }
        state.poll_frame(idle, cx)
    }

    fn is_end_stream(&self, request: u64) -> bool {
        let state = self.0.lock();
        state.request != request || state.body.is_done()
    }
}

impl<S: ByteStream> Interim for Http1Connection<S> {
    fn pass_on(&self, mut head: response::Parts) {
        headers::strip_response(&mut head.headers, false);
        let mut state = self.0.lock();
        // A client that does not read them is not owed all.
        if state.interim && state.outbox.has_room() {
            state.outbox.push_head(|out| {
                push_response(out, &head);
                out.extend_from_slice(b"\r\n");
            });
            if let Some(owner) = state.owner.take() {
                owner.wake();
            }
        }
    }
}

impl<S> fmt::Debug for Http1Connection<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Http1Connection").finish_non_exhaustive()
    }
}

fn refused(error: &HeadError) -> Last {
    tracing::debug!(%error, "a request's head was refused");
    Last::Refused(match error {
        HeadError::TooLarge | HeadError::TooManyFields => RefusedHead::TooLarge,
        HeadError::TargetTooLong => RefusedHead::TargetTooLong,
        HeadError::Fragment => RefusedHead::Fragment,
        HeadError::Length => RefusedHead::Length,
        HeadError::Coding => RefusedHead::Coding,
        _ => RefusedHead::Malformed,
    })
}
