//! Our side of a connection to an origin: a request out, its response in.

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use super::{
    BodyError, Decoder, Encoder, Framing, HeadError, Inbox, Outbox, parse_response, push_request,
    response_framing,
};
use crate::{
    body::{BoxError, Interim, RequestBody},
    stream::{ByteStream, Prefixed, Socket, is_from_tls},
};
use bytes::Bytes;
use http::{
    Method, Response, StatusCode,
    header::{CONTENT_LENGTH, TRANSFER_ENCODING},
    request,
};
use http_body::{Body, Frame, SizeHint};

/// A response's head may be this long.
const MAX_HEAD: usize = 256 * 1024;

/// Why there is no response, or no more of it.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The connection had ended, or unsolicited bytes had arrived, before anything was written.
    #[error("the connection could no longer be used")]
    NotFree,
    /// The request's body broke off.
    #[error("the request's body broke off")]
    RequestBody(#[source] BoxError),
    /// The peer read nothing of the request for `timeouts.idle`.
    #[error("the origin read nothing of the request for {0:?} (`timeouts.idle`)")]
    Unread(Duration),
    /// Writing failed, and no response had arrived.
    #[error("writing the request")]
    Write(#[source] io::Error),
    /// Reading failed.
    #[error("reading the response")]
    Read(#[source] io::Error),
    /// The connection ended before the response's head was complete.
    #[error("the connection was closed before the response's head was complete")]
    Closed,
    /// What arrived is not a valid response head.
    #[error("{0}")]
    Head(HeadError),
    /// The response's body does not match its framing.
    #[error("{0}")]
    Body(BodyError),
}

/// A connection for one request at a time.
#[derive(Debug)]
pub struct ClientConnection<S> {
    stream: S,
    inbox: Inbox,
    outbox: Outbox,
    upload: Option<Upload>,
    response: Decoder,
    /// How long the peer may read nothing of a request.
    idle: Option<Duration>,
    /// Whether another request may follow on the connection.
    reusable: bool,
    /// An error of the request that happened while the response's body was not being read. Reported when it is.
    lost: Option<ExchangeError>,
    /// A write has noticed that the peer reset the connection. The kernel reports that once only: to a read, it then
    /// looks as if the peer had ended its side.
    was_reset: bool,
}

/// A request's body that is being sent.
#[derive(Debug)]
struct Upload {
    body: RequestBody,
    encoder: Encoder,
}

impl<S: ByteStream> ClientConnection<S> {
    /// A new connection.
    pub fn new(stream: S) -> Self {
        Self {
            stream,
            inbox: Inbox::default(),
            outbox: Outbox::default(),
            upload: None,
            response: Decoder::done(),
            idle: None,
            reusable: true,
            lost: None,
            was_reset: false,
        }
    }

    /// Sends a request and returns its response's head. The response's body is read with
    /// [`poll_frame`](Self::poll_frame), which also continues with the request's body.
    ///
    /// `probe`: the connection has served before, so check first whether it is still free. `interim` gets
    /// every `1xx` except `101`; a `100` instead starts a body that was held back. Has no deadline: that is
    /// the caller's. If the future is dropped before it is ready, the connection cannot be used again.
    pub async fn send(
        &mut self,
        head: &request::Parts,
        body: RequestBody,
        probe: bool,
        interim: Option<&Arc<dyn Interim>>,
    ) -> Result<Response<()>, ExchangeError> {
        if probe {
            let free = poll_fn(|cx| Poll::Ready(self.poll_free(cx))).await;
            if !free {
                self.reusable = false;
                return Err(ExchangeError::NotFree);
            }
        }
        self.begin(head, body);
        let mut failed = None;
        // The probe has just found nothing to read, and has registered to be woken.
        let mut waiting = probe;
        poll_fn(|cx| {
            let waits = std::mem::take(&mut waiting);
            self.poll_response(cx, &head.method, waits, &mut failed, interim)
        })
        .await
    }

    /// Whether nothing has arrived since the last response, according to the kernel, before anything is
    /// written.
    fn poll_free(&mut self, cx: &mut Context<'_>) -> bool {
        self.is_free() && self.inbox.poll_fill(cx, &mut self.stream).is_pending()
    }

    /// Whether the connection can take a request, as far as it was checked.
    pub fn is_free(&self) -> bool {
        self.reusable
            && self.response.is_done()
            && self.upload.is_none()
            && self.outbox.is_empty()
            && self.inbox.bytes.is_empty()
    }

    /// Whether an idle connection is still free. Registers no waker.
    pub fn is_still_free(&mut self) -> bool {
        self.poll_free(&mut Context::from_waker(Waker::noop()))
    }

    fn begin(&mut self, head: &request::Parts, body: RequestBody) {
        self.outbox.push_head(|out| push_request(out, head));
        self.reusable = false;
        self.idle = body.idle();
        if body.is_end_stream() {
            return;
        }
        let length = head.headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
        let framing = match length.and_then(|length| length.parse().ok()) {
            Some(length) => Framing::Length(length),
            None => Framing::Chunked,
        };
        debug_assert_eq!(framing == Framing::Chunked, head.headers.contains_key(TRANSFER_ENCODING));
        self.upload = Some(Upload { body, encoder: Encoder::new(framing, true) });
    }

    fn poll_response(
        &mut self,
        cx: &mut Context<'_>,
        method: &Method,
        waits: bool,
        failed: &mut Option<io::Error>,
        interim: Option<&Arc<dyn Interim>>,
    ) -> Poll<Result<Response<()>, ExchangeError>> {
        if failed.is_none()
            && let Poll::Ready(Err(error)) = self.poll_upload(cx)
        {
            match error {
                // The peer may have responded before it closed.
                ExchangeError::Write(error) => *failed = Some(error),
                error => return Poll::Ready(Err(error)),
            }
        }
        if waits && failed.is_none() {
            return Poll::Pending;
        }
        let lost = |failed: &mut Option<io::Error>, error| {
            failed.take().map_or(error, ExchangeError::Write)
        };
        loop {
            if self.inbox.may_have_head(MAX_HEAD) {
                match parse_response(&mut self.inbox.bytes, MAX_HEAD) {
                    Err(error) => return Poll::Ready(Err(ExchangeError::Head(error))),
                    Ok(None) => {}
                    Ok(Some(head)) if is_interim(head.status) => {
                        self.inbox.head_taken();
                        if head.status == StatusCode::CONTINUE {
                            self.upload.iter().for_each(|upload| upload.body.proceed());
                        } else if let Some(interim) = interim {
                            interim.pass_on(head);
                        }
                        continue;
                    }
                    Ok(Some(mut head)) => {
                        self.inbox.head_taken();
                        let framing = response_framing(method, &mut head);
                        let framing = framing.map_err(ExchangeError::Head)?;
                        self.response = Decoder::new(framing);
                        // From now on the response may continue even if the peer stops reading the request.
                        self.idle = None;
                        self.reusable = framing != Framing::Close
                            && head.status != StatusCode::SWITCHING_PROTOCOLS
                            && failed.is_none();
                        return Poll::Ready(Ok(Response::from_parts(head, ())));
                    }
                }
            }
            match ready!(self.inbox.poll_fill(cx, &mut self.stream)) {
                Ok(0) => return Poll::Ready(Err(lost(failed, ExchangeError::Closed))),
                Ok(_) => {}
                Err(error) if is_from_tls(&error) => {
                    return Poll::Ready(Err(ExchangeError::Read(error)));
                }
                Err(error) => return Poll::Ready(Err(lost(failed, ExchangeError::Read(error)))),
            }
        }
    }

    /// Writes what there is of the request. Ready when nothing more will be written.
    fn poll_upload(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ExchangeError>> {
        loop {
            while let Some(upload) = &mut self.upload
                && !self.outbox.is_full()
            {
                match upload.poll(cx, &mut self.outbox) {
                    Poll::Ready(Ok(true)) => self.upload = None,
                    Poll::Ready(Ok(false)) => {}
                    Poll::Ready(Err(error)) => {
                        self.upload = None;
                        // The peer would take the next request for the rest of this one's body.
                        self.reusable = false;
                        return Poll::Ready(Err(ExchangeError::RequestBody(error)));
                    }
                    Poll::Pending => break,
                }
            }
            if self.outbox.is_empty() {
                return if self.upload.is_none() { Poll::Ready(Ok(())) } else { Poll::Pending };
            }
            let error = match self.outbox.poll_flush(cx, &mut self.stream) {
                Poll::Ready(Ok(())) => continue,
                Poll::Ready(Err(error)) => {
                    // After a FIN it would be `BrokenPipe`.
                    self.was_reset |= error.kind() == io::ErrorKind::ConnectionReset;
                    ExchangeError::Write(error)
                }
                Poll::Pending => {
                    let Some(idle) = self.idle else { return Poll::Pending };
                    ready!(self.outbox.poll_idle(cx, idle, &self.stream));
                    ExchangeError::Unread(idle)
                }
            };
            self.abandon();
            return Poll::Ready(Err(error));
        }
    }

    /// Continues with the request's body, for a caller that is not reading the response's.
    pub fn poll_progress(&mut self, cx: &mut Context<'_>) {
        if self.upload.is_some() || !self.outbox.is_empty() {
            // If writing fails, reading the response will show it, unless it is complete already.
            if let Poll::Ready(Err(error @ ExchangeError::RequestBody(_))) = self.poll_upload(cx) {
                self.lost = Some(error);
            }
        }
    }

    /// The response's body, as [`Body::poll_frame`] has it.
    pub fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ExchangeError>>> {
        self.poll_progress(cx);
        if let Some(error) = self.lost.take() {
            return self.broken(error);
        }
        loop {
            match self.response.decode(&mut self.inbox.bytes) {
                Err(error) => return self.broken(ExchangeError::Body(error)),
                Ok(Some(frame)) => return Poll::Ready(Some(Ok(frame))),
                Ok(None) if self.response.is_done() => return Poll::Ready(None),
                Ok(None) => {}
            }
            match ready!(self.inbox.poll_fill(cx, &mut self.stream)) {
                Ok(0) if self.was_reset => {
                    let error = io::ErrorKind::ConnectionReset.into();
                    return self.broken(ExchangeError::Read(error));
                }
                Ok(0) => match self.response.end() {
                    Ok(()) => return Poll::Ready(None),
                    Err(error) => return self.broken(ExchangeError::Body(error)),
                },
                Ok(_) => {}
                Err(error) => return self.broken(ExchangeError::Read(error)),
            }
        }
    }

    fn broken<T>(&mut self, error: ExchangeError) -> Poll<Option<Result<T, ExchangeError>>> {
        self.reusable = false;
        self.response = Decoder::done();
        Poll::Ready(Some(Err(error)))
    }

    /// Whether the response's body has ended.
    pub fn is_end_stream(&self) -> bool {
        self.response.is_done()
    }

    /// How much of the response's body is still to come.
    pub fn size_hint(&self) -> SizeHint {
        self.response.size_hint()
    }

    /// The stream, after a head that switched protocols; none within a request's body, whose rest would be
    /// taken for the other protocol.
    pub fn into_tunnel(mut self) -> Option<Prefixed<S>> {
        let whole = self.upload.is_none() && self.outbox.is_empty();
        whole.then(|| Prefixed::new(self.inbox.take(), self.stream))
    }

    /// How much the peer's kernel has acknowledged.
    pub fn acknowledged(&self) -> u64 {
        self.stream.socket().map_or(0, Socket::acknowledged)
    }

    /// Releases an idle connection's memory.
    pub fn rest(&mut self) {
        self.inbox.release();
        self.outbox.release();
    }

    /// Gives up the request because the peer has stopped reading it.
    fn abandon(&mut self) {
        // Otherwise the kernel would keep what it still holds for the peer.
        if let Some(socket) = self.stream.socket()
            && !self.outbox.is_empty()
        {
            socket.reset_on_close();
        }
        self.outbox.clear();
        self.upload = None;
        self.reusable = false;
    }

    /// Shuts the stream down (with `close_notify` under TLS) if that is possible without waiting.
    pub fn close(&mut self) {
        self.abandon();
        let mut cx = Context::from_waker(Waker::noop());
        let _ = Pin::new(&mut self.stream).poll_shutdown(&mut cx);
    }
}

impl Upload {
    /// Adds the next frame of the body; `true` at its end.
    fn poll(&mut self, cx: &mut Context<'_>, out: &mut Outbox) -> Poll<Result<bool, BoxError>> {
        match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
            Some(frame) => self.encoder.push(frame?, out)?,
            None => {
                self.encoder.finish(out)?;
                return Poll::Ready(Ok(true));
            }
        }
        if self.body.is_end_stream() {
            self.encoder.finish(out)?;
            return Poll::Ready(Ok(true));
        }
        Poll::Ready(Ok(false))
    }
}

fn is_interim(status: StatusCode) -> bool {
    status.is_informational() && status != StatusCode::SWITCHING_PROTOCOLS
}
