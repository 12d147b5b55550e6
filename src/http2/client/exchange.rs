//! One request and its response, on one stream.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use h2::{
    Reason, RecvStream,
    client::{ResponseFuture, SendRequest},
};
use http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header::CONTENT_LENGTH, request,
};
use http_body::{Body as _, Frame, SizeHint};

use super::super::{Credit, Output, Sender, Unread};
use crate::{
    body::{BoxError, Interim, RequestBody},
    idle::IdleTimer,
};

/// Why there is no response, or no more of it.
#[derive(Debug, thiserror::Error)]
pub enum ExchangeError {
    /// The connection accepts no more requests, or ended before any of this one was written.
    #[error("the connection was closed before the request was sent")]
    NotSent(#[source] h2::Error),
    /// The peer allowed no streams for `timeouts.connect`.
    #[error("no stream was allowed for {0:?} (SETTINGS_MAX_CONCURRENT_STREAMS is 0)")]
    NoStream(Duration),
    /// The request cannot be expressed in HTTP/2.
    #[error("the request is not valid in HTTP/2")]
    Request(#[source] h2::Error),
    /// The request's body broke off.
    #[error("the request's body broke off")]
    RequestBody(#[source] BoxError),
    /// The peer read nothing of the request for `timeouts.idle`.
    #[error("the origin read nothing of the request for {0:?} (`timeouts.idle`)")]
    Unread(Duration),
    /// The peer reset the stream before the response was complete.
    #[error("the stream was reset before the response was complete: {0}")]
    Reset(Reason),
    /// The peer's GOAWAY says that it has not processed the request.
    #[error("the connection is being shut down and the request was not processed: {0}")]
    GoAway(Reason),
    /// The connection ended.
    #[error("the connection ended before the response was complete")]
    Connection(#[source] h2::Error),
    /// What arrived is not HTTP/2, or not a response.
    #[error("{0}")]
    Protocol(h2::Error),
    /// `101`, which HTTP/2 does not have (RFC 9113 §8.6).
    #[error("101 Switching Protocols is not valid in HTTP/2")]
    SwitchingProtocols,
}

impl ExchangeError {
    /// Whether the peer has not processed the request (RFC 9113 §8.7).
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Reset(Reason::REFUSED_STREAM))
    }

    /// Whether the peer is shutting the connection down gracefully, and has not processed the request (RFC 9113
    /// §6.8).
    pub fn is_shutdown(&self) -> bool {
        matches!(self, Self::GoAway(Reason::NO_ERROR))
    }

    /// Whether the peer reset the stream, although it may have processed the request. The connection goes on.
    pub fn is_reset(&self) -> bool {
        matches!(self, Self::Reset(_)) && !self.is_refusal()
    }

    /// Whether it is about a response that has arrived.
    fn is_of_response(&self) -> bool {
        match self {
            Self::SwitchingProtocols => true,
            // A connection that we end may have been ended for another stream.
            Self::Protocol(error) => error.is_reset(),
            _ => false,
        }
    }

    /// Whether the connection was closed, rather than broken.
    pub fn is_end(&self) -> bool {
        let (Self::NotSent(error) | Self::Connection(error)) = self else { return false };
        // How h2 reports the end of the input.
        error.get_io().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    }
}

impl From<h2::Error> for ExchangeError {
    fn from(error: h2::Error) -> Self {
        match error.reason() {
            Some(reason) if error.is_remote() && error.is_reset() => Self::Reset(reason),
            Some(reason) if error.is_remote() => Self::GoAway(reason),
            Some(_) => Self::Protocol(error),
            None => Self::Connection(error),
        }
    }
}

/// A request that was begun. If dropped before its end, it resets its stream.
pub struct Exchange {
    upload: Option<Upload>,
    response: Receiving,
    /// The response's part in the connection's window.
    unread: Unread,
    /// An error of the request that happened while the response's body was not being read. Reported when it is.
    lost: Option<ExchangeError>,
    is_head: bool,
    /// Something of the response has arrived: a `1xx`, or a head, even one that is not valid.
    has_begun: bool,
}

/// The response, as far as it has arrived.
enum Receiving {
    Head(ResponseFuture),
    Body(Download),
    Ended,
}

/// A response's body.
struct Download {
    stream: RecvStream,
    /// How much of it is still to come, if its head has a length.
    left: Option<u64>,
    /// The size of the last frame returned. The peer gets credit for it when the next one is polled, because by
    /// then it has been passed on.
    taken: usize,
}

/// A request's body that is being sent.
struct Upload {
    body: RequestBody,
    sender: Sender,
    /// What the peer's window has no room for yet.
    piece: Bytes,
    /// `piece` is the last.
    is_last: bool,
    /// How much of `piece` the body was told of as unsent.
    unsent: usize,
    /// How much is still to come, if the request's head has a length.
    left: Option<u64>,
    /// How long the peer may read nothing of it.
    idle: Option<Duration>,
    timer: IdleTimer,
}

impl Exchange {
    /// Sends a request's head, and ends the stream if there is no body.
    pub(super) fn begin(
        sender: &mut SendRequest<Bytes>,
        credit: &Arc<Credit>,
        output: &Arc<Output>,
        head: &request::Parts,
        body: RequestBody,
    ) -> Result<Self, ExchangeError> {
        let mut request = Request::new(());
        request.method_mut().clone_from(&head.method);
        request.uri_mut().clone_from(&head.uri);
        request.headers_mut().clone_from(&head.headers);
        *request.version_mut() = head.version;
        set_length(&mut request, body.size_hint().exact());
        let left = length(request.headers());
        let is_whole = body.is_end_stream();
        let (response, stream) = sender.send_request(request, is_whole).map_err(|error| {
            // Anything else would be a mistake of the caller.
            if error.is_io() || error.reason().is_some() {
                ExchangeError::NotSent(error)
            } else {
                ExchangeError::Request(error)
            }
        })?;
        output.begin();
        let upload = (!is_whole).then(|| Upload {
            idle: body.idle(),
            body,
            sender: Sender::new(stream, output.clone()),
            piece: Bytes::new(),
            is_last: false,
            unsent: 0,
            left,
            timer: IdleTimer::default(),
        });
        let is_head = head.method == Method::HEAD;
        let unread = credit.open();
        let response = Receiving::Head(response);
        Ok(Self { upload, response, unread, lost: None, is_head, has_begun: false })
    }

    /// The response's head, while the request's body is being sent. `interim` gets every `1xx`, except that a `100`
    /// starts a body that was held back.
    pub fn poll_head(
        &mut self,
        cx: &mut Context<'_>,
        interim: Option<&Arc<dyn Interim>>,
    ) -> Poll<Result<Response<()>, ExchangeError>> {
        if let Poll::Ready(Err(error)) = self.poll_upload(cx) {
            return Poll::Ready(Err(error));
        }
        let head = self.poll_response(cx, interim);
        match &head {
            Poll::Pending => self.unread.read(),
            Poll::Ready(Ok(_)) => self.has_begun = true,
            Poll::Ready(Err(error)) => self.has_begun |= error.is_of_response(),
        }
        head
    }

    fn poll_response(
        &mut self,
        cx: &mut Context<'_>,
        interim: Option<&Arc<dyn Interim>>,
    ) -> Poll<Result<Response<()>, ExchangeError>> {
        let Receiving::Head(response) = &mut self.response else { return Poll::Pending };
        // If the response were polled first, h2 would skip them.
        while let Some(head) = ready!(response.poll_informational(cx)).transpose()? {
            self.has_begun = true;
            match head.status() {
                StatusCode::SWITCHING_PROTOCOLS => {
                    return Poll::Ready(Err(ExchangeError::SwitchingProtocols));
                }
                // The body is sent by this task, which is woken.
                StatusCode::CONTINUE => self.upload.iter().for_each(|upload| upload.body.proceed()),
                _ => {
                    if let Some(interim) = interim {
                        interim.pass_on(head.into_parts().0);
                    }
                }
            }
        }
        let (head, stream) = ready!(Pin::new(response).poll(cx))?.into_parts();
        let empty = self.is_head
            || matches!(head.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
        let left = if empty { None } else { length(&head.headers) };
        self.response = Receiving::Body(Download { stream, left, taken: 0 });
        self.unread.unread();
        // From now on the response may continue even if the peer stops reading the request.
        self.upload.iter_mut().for_each(|upload| upload.idle = None);
        Poll::Ready(Ok(Response::from_parts(head, ())))
    }

    /// Sends what there is of the request's body. Ready when nothing more will be sent.
    fn poll_upload(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ExchangeError>> {
        let Some(upload) = &mut self.upload else { return Poll::Ready(Ok(())) };
        let sent = ready!(upload.poll(cx));
        if sent.is_err() {
            // Reset at once, so that it is not taken for the request's end.
            upload.sender.reset(Reason::CANCEL);
        }
        self.upload = None;
        Poll::Ready(sent)
    }

    /// Continues with the request's body, for a caller that is not reading the response's.
    pub fn poll_progress(&mut self, cx: &mut Context<'_>) {
        if let Poll::Ready(Err(error)) = self.poll_upload(cx) {
            self.lost = Some(error);
        }
    }

    /// The response's body, as [`Body::poll_frame`](http_body::Body::poll_frame) has it.
    pub fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, ExchangeError>>> {
        self.poll_progress(cx);
        let Receiving::Body(download) = &mut self.response else { return Poll::Ready(None) };
        let frame = match self.lost.take() {
            Some(error) => Some(Err(error)),
            None => match download.poll(cx) {
                Poll::Ready(frame) => frame,
                Poll::Pending => {
                    self.unread.read();
                    return Poll::Pending;
                }
            },
        };
        self.unread.unread();
        if !matches!(&frame, Some(Ok(frame)) if frame.is_data()) {
            self.response = Receiving::Ended;
        }
        Poll::Ready(frame)
    }

    /// Whether anything of the response has arrived.
    pub fn has_begun(&self) -> bool {
        self.has_begun
    }

    /// Whether the response's body has ended.
    pub fn is_end_stream(&self) -> bool {
        match &self.response {
            Receiving::Head(_) => false,
            Receiving::Body(download) => download.stream.is_end_stream(),
            Receiving::Ended => true,
        }
    }

    /// How much of the response's body is still to come.
    pub fn size_hint(&self) -> SizeHint {
        match &self.response {
            _ if self.is_end_stream() => SizeHint::with_exact(0),
            Receiving::Body(Download { left: Some(left), .. }) => SizeHint::with_exact(*left),
            _ => SizeHint::default(),
        }
    }
}

impl Download {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, ExchangeError>>> {
        let taken = std::mem::take(&mut self.taken);
        if taken > 0 {
            // Never more than what was received.
            let _ = self.stream.flow_control().release_capacity(taken);
        }
        while let Some(data) = ready!(self.stream.poll_data(cx)).transpose()? {
            // A frame that only ends the stream is empty.
            if !data.is_empty() {
                self.taken = data.len();
                self.left = self.left.map(|left| left.saturating_sub(data.len() as u64));
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
        }
        let trailers = ready!(self.stream.poll_trailers(cx))?;
        Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
    }
}

impl Upload {
    /// Ready once all of it is sent, or the peer reads no more: then its response says why.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ExchangeError>> {
        loop {
            if !self.piece.is_empty() || self.is_last {
                let before = self.piece.len();
                match self.sender.poll_send(cx, &mut self.piece, self.is_last) {
                    Poll::Ready(Ok(())) if !self.is_last => {
                        self.note_unsent(0);
                        self.timer.moved();
                    }
                    Poll::Ready(_) => {
                        self.note_unsent(0);
                        return Poll::Ready(Ok(()));
                    }
                    Poll::Pending => {
                        self.note_unsent(self.piece.len());
                        if self.piece.len() < before {
                            self.timer.moved();
                        }
                        let Some(idle) = self.idle else { return Poll::Pending };
                        ready!(self.timer.poll(cx, idle));
                        return Poll::Ready(Err(ExchangeError::Unread(idle)));
                    }
                }
            }
            match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(frame) => match frame.map_err(ExchangeError::RequestBody)?.into_data() {
                    Ok(data) => self.take(data)?,
                    Err(frame) => {
                        self.end()?;
                        let trailers = frame.into_trailers().unwrap_or_default();
                        // Fields that HTTP/2 forbids were removed before.
                        let _ = self.sender.send_trailers(trailers);
                        return Poll::Ready(Ok(()));
                    }
                },
                None => {
                    self.end()?;
                    self.is_last = true;
                }
            }
        }
    }

    fn note_unsent(&mut self, unsent: usize) {
        if self.unsent != unsent {
            self.unsent = unsent;
            self.body.set_unsent(unsent);
        }
    }

    fn take(&mut self, data: Bytes) -> Result<(), ExchangeError> {
        if let Some(left) = &mut self.left {
            let less = left.checked_sub(data.len() as u64);
            *left = less.ok_or_else(|| length_error("longer"))?;
        }
        self.is_last = self.body.is_end_stream();
        if self.is_last {
            self.end()?;
        }
        self.piece = data;
        Ok(())
    }

    /// Whether it may end here.
    fn end(&self) -> Result<(), ExchangeError> {
        match self.left {
            None | Some(0) => Ok(()),
            Some(_) => Err(length_error("shorter")),
        }
    }
}

fn length_error(than: &str) -> ExchangeError {
    let error = format!("the body is {than} than its Content-Length");
    ExchangeError::RequestBody(error.into())
}

/// Adds the `Content-Length` of a body whose length is known, even of an empty one where that is unusual.
fn set_length(request: &mut Request<()>, length: Option<u64>) {
    let Some(length) = length else { return };
    let usual = matches!(*request.method(), Method::POST | Method::PUT | Method::PATCH);
    if length > 0 || usual {
        request.headers_mut().entry(CONTENT_LENGTH).or_insert_with(|| HeaderValue::from(length));
    }
}

fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}
