//! A client's HTTP/1 connection, served one request at a time.

use std::{
    fmt,
    future::poll_fn,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use ::http::{
    Method, Request, Response, StatusCode, Version, header::CONTENT_LENGTH, request, response,
};
use bytes::Bytes;
use http_body::{Body as _, Frame};
use parking_lot::{Mutex, MutexGuard};
use tokio::time::{Instant, timeout};

use super::{Arrival, End, Listener, Server, request_timer::RequestTimer};
use crate::{
    body::{BoxError, Connection, Interim, RequestBody},
    forward::{Body, Problem, RefusedHead, Upgrade, UpgradeSender, headers},
    http1::{
        BodyError, Decoder, Encoder, Framing, HeadError, Outbox, SKIP, ServerConnection,
        parse_request, push_response, request_framing,
    },
    stream::{ByteStream, Prefixed},
    telemetry::AliasMetrics,
};

/// How long writing a refusal, or TLS' `close_notify`, may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// A connection, shared by its task and by its requests' bodies, which are read by the code that sends them
/// upstream.
pub(super) struct Http1Connection<S>(Mutex<ServerConnection<S>>);

/// How long discarding the rest of a request's body may take.
const SKIP_TIME: Duration = Duration::from_secs(10);

/// Why there is no further request.
enum Last {
    Refused(RefusedHead),
    /// The last response is written, and the client may still be sending.
    Answered,
    /// The client has left, or idled too long, or the proxy is to end.
    End,
}

/// What of a request its response is written by.
struct Asked {
    method: Method,
    version: Version,
    keep_alive: bool,
    /// `TE: trailers`.
    trailers: bool,
    handover: Option<UpgradeSender>,
}

/// A response on its way out.
struct Writing {
    out: Outbox,
    /// None once its end is written down, and where there is none.
    body: Option<Body>,
    encoder: Option<Encoder>,
    /// The connection may serve again.
    keep: bool,
    switching: bool,
}

/// What came of a response.
enum Answered {
    /// The next request may come.
    Kept,
    /// The next request may come, behind what is left of the body.
    Behind,
    /// It was the last.
    Last,
    /// The client has left, or the response broke off.
    Broken,
}

impl<S: ByteStream + 'static> Http1Connection<S> {
    /// `stream` is plaintext, or the inside of TLS.
    pub fn new(stream: S) -> Arc<Self> {
        Arc::new(Self(Mutex::new(ServerConnection::new(stream))))
    }

    /// Serves requests until the connection ends, each with the listener as it is when its head is
    /// there. `tls`: it has a farewell to say.
    pub async fn serve<A, F>(
        self: &Arc<Self>,
        tls: bool,
        server: &Server,
        mut arrival: Box<Arrival>,
        answer: A,
    ) -> End
    where
        A: Fn(Request<RequestBody>, Arc<Listener>) -> F,
        F: Future<Output = Response<Body>>,
    {
        let mut timer = RequestTimer::new();
        let mut unused = pin!(arrival.unused(Instant::now()));
        // Room for a response's future, taken once for many requests. A connection that waits for
        // its next request has none after a while.
        let mut answering = None;
        let last = loop {
            let next = poll_fn(|cx| {
                let next = self.poll_next(cx, &mut timer, server, &mut arrival);
                if next.is_pending() && self.lock().inbox.bytes.is_empty() {
                    if timer.rests() {
                        self.lock().rest();
                        answering = None;
                    }
                    return unused.as_mut().poll(cx).map(|()| Err(Last::End));
                }
                next
            });
            let (asked, request) = match next.await {
                Ok(next) => next,
                Err(last) => break last,
            };
            let answering = answering.get_or_insert_with(|| Box::pin(None));
            answering.set(Some(answer(request, arrival.listener.clone())));
            let answer = poll_fn(|cx| self.poll_answer(cx, answering.as_mut())).await;
            // A client that has left takes its request along.
            answering.set(None);
            let Some(answer) = answer else { return End::Done };
            let keep = !arrival.is_ending();
            let Some(mut writing) = self.begin_answer(answer, &asked, keep) else {
                return End::Done;
            };
            let written = poll_fn(|cx| self.poll_respond(cx, &mut writing)).await;
            match self.end_answer(writing, asked.handover, written) {
                Answered::Kept => timer.idle(),
                Answered::Behind if Box::pin(self.skip_rest()).await => timer.idle(),
                Answered::Behind | Answered::Last => break Last::Answered,
                Answered::Broken => return End::Done,
            }
        };
        let end = match last {
            Last::Refused(head) => {
                Box::pin(self.refuse(head)).await;
                End::Lingers
            }
            Last::Answered => End::Lingers,
            Last::End => End::Done,
        };
        self.close(tls).await;
        end
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
        // A client that has asked for nothing gets no response.
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
        let mut handover = None;
        if head.method == Method::CONNECT || headers::upgrade(&head).is_some() {
            let (sender, upgrade) = Upgrade::new();
            head.extensions.insert(upgrade);
            handover = Some(sender);
        }
        let (keep_alive, trailers) = headers::wishes(head.version, &head.headers);
        let keep_alive = keep_alive && !framing.conflicting;
        let method = head.method.clone();
        let asked = Asked { method, version: head.version, keep_alive, trailers, handover };
        let mut state = self.lock();
        state.interim = http11;
        state.begin(framing.body.map_or_else(Decoder::done, Decoder::new));
        let body = match framing.body {
            None => RequestBody::empty(),
            Some(_) => {
                // A client whose body is coming already is not told to go on.
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

    /// Waits for the response, and notices a client that leaves meanwhile: then there is none.
    fn poll_answer<F: Future<Output = Response<Body>>>(
        &self,
        cx: &mut Context<'_>,
        answer: Pin<&mut Option<F>>,
    ) -> Poll<Option<Response<Body>>> {
        let Some(answer) = answer.as_pin_mut() else { return Poll::Ready(None) };
        if let Poll::Ready(answer) = answer.poll(cx) {
            return Poll::Ready(Some(answer));
        }
        let mut state = self.lock();
        if state.poll_ahead(cx).is_err() || state.poll_gone(cx) {
            return Poll::Ready(None);
        }
        Poll::Pending
    }

    /// Writes a response's head down; `None` where there can be no such response. Not async: the
    /// connection's future would have room for the head as long as it lives.
    fn begin_answer(
        &self,
        answer: Response<Body>,
        asked: &Asked,
        may_keep: bool,
    ) -> Option<Writing> {
        let (mut head, body) = answer.into_parts();
        let (mut out, keep) = {
            let mut state = self.lock();
            state.interim = false;
            // A client that was not told to go on may do so or not: nobody can tell what it sends
            // next. It is not told any more: that would stand in the midst of the response.
            let undecided = std::mem::take(&mut state.expects);
            // And what a client is still sending to a request that was refused, nobody reads.
            let lost = undecided || !state.may_skip_body(body.is_own());
            (std::mem::take(&mut state.outbox), asked.keep_alive && may_keep && !lost)
        };
        let switching = head.status == StatusCode::SWITCHING_PROTOCOLS
            || asked.method == Method::CONNECT && head.status.is_success();
        if switching && !self.lock().body.is_done() {
            // What is left of the body would be the first words of the other protocol.
            tracing::debug!("the origin switched protocols before the request's body had ended");
            return None;
        }
        let framing = if switching { None } else { framing(&mut head, &body, asked) };
        let keep = keep && framing != Some(Framing::Close);
        head.version = asked.version;
        out.push_head(|out| {
            push_response(out, &head);
            if framing == Some(Framing::Chunked) {
                out.extend_from_slice(b"transfer-encoding: chunked\r\n");
            }
            match asked.version {
                _ if switching => {}
                Version::HTTP_10 if keep => out.extend_from_slice(b"connection: keep-alive\r\n"),
                Version::HTTP_11 if !keep => out.extend_from_slice(b"connection: close\r\n"),
                _ => {}
            }
            out.extend_from_slice(b"\r\n");
        });
        // RFC 9110 §6.5.1: who does not want trailers gets the body without.
        let encoder = framing.map(|framing| Encoder::new(framing, asked.trailers));
        // Where there is none to write, its end is here, and the end of the request's record.
        self.lock().unread = body.idle();
        let body = encoder.is_some().then_some(body);
        Some(Writing { out, body, encoder, keep, switching })
    }

    /// Makes the connection ready for what follows a response.
    fn end_answer(
        &self,
        writing: Writing,
        handover: Option<UpgradeSender>,
        written: bool,
    ) -> Answered {
        let Writing { out, body, keep, switching, .. } = writing;
        // The connection to the origin is in it: not under the lock.
        drop(body);
        let mut state = self.lock();
        state.request += 1;
        state.outbox = out;
        if !written {
            return Answered::Broken;
        }
        if switching {
            let left = state.inbox.take();
            if let (Some(handover), Some(stream)) = (handover, state.stream.take()) {
                // Nobody waits for it where the switch came to nothing.
                let _ = handover.send(Box::new(Prefixed::new(left, stream)));
            }
            return Answered::Broken;
        }
        match state.skip_body() {
            _ if !keep => Answered::Last,
            true => Answered::Kept,
            false => Answered::Behind,
        }
    }

    /// Writes what there is of a response; `false` where that is not all, and never will be.
    fn poll_respond(&self, cx: &mut Context<'_>, writing: &mut Writing) -> Poll<bool> {
        let Writing { out, body, encoder, .. } = writing;
        let mut waiting = false;
        loop {
            while let (Some(reading), Some(encoding)) = (&mut *body, &mut *encoder)
                && !waiting
                && !out.is_full()
            {
                let ended = match Pin::new(&mut *reading).poll_frame(cx) {
                    Poll::Ready(Some(Ok(frame))) => {
                        encoding.push(frame, out).map(|()| reading.is_end_stream())
                    }
                    Poll::Ready(None) => Ok(true),
                    // What came of it is still worth writing, if that can be done at once.
                    Poll::Ready(Some(Err(_))) => Err(BodyError::Incomplete),
                    Poll::Pending => {
                        waiting = true;
                        break;
                    }
                };
                let ended = ended.and_then(|ended| match ended {
                    true => encoding.finish(out).map(|()| true),
                    false => Ok(false),
                });
                match ended {
                    // The request's record ends with its response's body, so that who has read the
                    // response finds it written down.
                    Ok(true) => (*body, *encoder) = (None, None),
                    Ok(false) => {}
                    Err(error) => {
                        tracing::debug!(%error, "a response broke off");
                        let mut state = self.lock();
                        let _ = state.poll_flush(cx, out);
                        if encoding.ends_with_connection() {
                            state.reset_on_close();
                        }
                        return Poll::Ready(false);
                    }
                }
            }
            if out.is_empty() {
                if encoder.is_none() {
                    return Poll::Ready(true);
                }
                return if self.lock().poll_gone(cx) { Poll::Ready(false) } else { Poll::Pending };
            }
            let mut state = self.lock();
            match state.poll_flush(cx, out) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(_)) => return Poll::Ready(false),
                Poll::Pending if state.poll_unread(cx, out).is_ready() => {
                    tracing::debug!(idle = ?state.unread, "a client reads nothing of its response");
                    // What the kernel still holds for it would stay there.
                    state.reset_on_close();
                    return Poll::Ready(false);
                }
                Poll::Pending => break,
            }
        }
        body.iter_mut().for_each(|body| body.poll_progress(cx));
        Poll::Pending
    }

    /// Reads what is left of a request's body; `false` where that is too much, or takes too long.
    async fn skip_rest(&self) -> bool {
        let mut left = SKIP;
        let skipped = poll_fn(|cx| self.lock().poll_skip(cx, &mut left));
        timeout(SKIP_TIME, skipped).await.unwrap_or(false)
    }

    async fn refuse(&self, head: RefusedHead) {
        let mut out = Outbox::default();
        let problem = Problem::refused_head(head);
        let nobody = AliasMetrics::of_no_alias();
        nobody.refused(None, problem.status(), problem.error(), Duration::ZERO);
        out.push(problem.to_http1());
        let _ = timeout(FAREWELL, poll_fn(|cx| self.lock().poll_flush(cx, &mut out))).await;
    }

    async fn close(&self, tls: bool) {
        if tls {
            let farewell = poll_fn(|cx| match &mut self.lock().stream {
                Some(stream) => Pin::new(stream).poll_shutdown(cx),
                None => Poll::Ready(Ok(())),
            });
            let _ = timeout(FAREWELL, farewell).await;
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

/// How the client is told where the body ends; `None` where there is no body. Completes the head by
/// it, but for `Transfer-Encoding`.
fn framing(head: &mut response::Parts, body: &Body, asked: &Asked) -> Option<Framing> {
    let size = body.size_hint().exact();
    if head.status == StatusCode::NO_CONTENT || head.status.is_informational() {
        // RFC 9110 §8.6: not even a length of none.
        head.headers.remove(CONTENT_LENGTH);
        return None;
    }
    let stated =
        head.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    if asked.method == Method::HEAD || head.status == StatusCode::NOT_MODIFIED {
        // Of a body that was left out nothing is known but what the origin said.
        if let (None, Some(size @ 1..)) = (stated, size) {
            head.headers.insert(CONTENT_LENGTH, size.into());
        }
        return None;
    }
    if let Some(length) = stated {
        return Some(Framing::Length(length));
    }
    match (size, asked.version) {
        (Some(size), _) => {
            head.headers.insert(CONTENT_LENGTH, size.into());
            Some(Framing::Length(size))
        }
        (None, Version::HTTP_10) => Some(Framing::Close),
        (None, _) => Some(Framing::Chunked),
    }
}
