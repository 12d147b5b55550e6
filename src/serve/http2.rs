//! A client's HTTP/2 connection, with a task for each of its streams.

use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
};

use ::http::{HeaderMap, Method, Request, Response, StatusCode, header::CONTENT_LENGTH, response};
use bytes::Bytes;
use http_body::Body as _;
use tokio::{
    task::yield_now,
    time::{Duration, Instant, sleep, timeout},
};

use super::{Arrival, End, Listener, Server};
use crate::{
    body::{Interim, RequestBody},
    forward::{self, Downstream, Upgrade, headers},
    http2::{
        Reason, Sender, Tunnel,
        server::{Connection, ConnectionError, Exchange, Responder},
    },
    idle::IdleTimer,
    stream::ByteStream,
};

/// How long a client that has asked for nothing has to reply to the GOAWAY, while it has no stream.
const GOODBYE: Duration = Duration::from_millis(250);

/// The same for a client that has sent requests: another may be on its way.
const GOODBYE_AFTER_USE: Duration = Duration::from_secs(1);

/// Passes `1xx` on.
#[derive(Debug)]
struct Ahead(Responder);

/// How a response's body ended.
enum Pumped {
    /// All of it was sent.
    Whole,
    /// The client reset the stream.
    Gone,
    /// The client does not read.
    Unread,
    /// It broke off.
    Broken,
}

impl Server {
    /// HTTP/2 requests for the listener's aliases.
    pub(super) async fn http2<S>(
        self: &Arc<Self>,
        stream: S,
        downstream: Downstream,
        arrival: Box<Arrival>,
    ) -> End
    where
        S: ByteStream + 'static,
    {
        let downstream = Arc::new(downstream);
        if let Err(error) = self.streams(stream, &downstream, arrival).await {
            let source = std::error::Error::source(&error).map(ToString::to_string);
            tracing::debug!(
                listener = %downstream.listener,
                peer = %downstream.peer,
                %error,
                source,
                "connection ended",
            );
        }
        End::Done
    }

    async fn streams<S>(
        self: &Arc<Self>,
        stream: S,
        downstream: &Arc<Downstream>,
        mut arrival: Box<Arrival>,
    ) -> Result<(), ConnectionError>
    where
        S: ByteStream + 'static,
    {
        let settings = &arrival.listener.settings;
        let (max_size, header_timeout) = (settings.max_header_size, settings.header_timeout);
        let mut connection = Connection::handshake(stream, max_size, header_timeout).await?;
        {
            let mut unused = pin!(arrival.unused(Instant::now()));
            loop {
                // Biased, so that a burst of requests does not poll the drain each time.
                let next = tokio::select! {
                    biased;
                    next = connection.accept() => next,
                    () = unused.as_mut() => break,
                };
                let Some(exchange) = next else { return Ok(()) };
                connection.spawn(self.begin(exchange?, downstream, &mut arrival));
            }
        }
        connection.graceful_shutdown();
        loop {
            let limit = if connection.was_used() { GOODBYE_AFTER_USE } else { GOODBYE };
            let next = tokio::select! {
                next = connection.accept() => next,
                () = sleep(limit) => match connection.has_streams() {
                    true => continue,
                    false => break,
                },
            };
            let Some(exchange) = next else { return Ok(()) };
            connection.spawn(self.begin(exchange?, downstream, &mut arrival));
        }
        // The client may not read before it asks for something: this tells it which requests were taken.
        connection.shutdown();
        let ended = async { while let Some(Ok(_)) = connection.accept().await {} };
        let _ = timeout(GOODBYE, ended).await;
        Ok(())
    }

    /// Each request is served with the listener as it is now.
    fn begin(
        self: &Arc<Self>,
        exchange: Exchange,
        downstream: &Arc<Downstream>,
        arrival: &mut Arrival,
    ) -> impl Future<Output = ()> + Send + use<> {
        arrival.follow(self);
        self.clone().exchange(exchange, downstream.clone(), arrival.listener.clone())
    }

    /// Serves a stream, from its request's head to its response's end.
    async fn exchange(
        self: Arc<Self>,
        exchange: Exchange,
        downstream: Arc<Downstream>,
        listener: Arc<Listener>,
    ) {
        let Exchange { mut head, body, responder } = exchange;
        let is_head = head.method == Method::HEAD;
        let connects = forward::is_extended_connect(&head);
        let Ok(length) = content_length(&mut head.headers, connects) else {
            return responder.reset(Reason::PROTOCOL_ERROR);
        };
        let (mut handover, mut tunnelled) = (None, None);
        let body = match body {
            body if connects => {
                let (sender, upgrade) = Upgrade::new();
                head.extensions.insert(upgrade);
                (handover, tunnelled) = (Some(sender), Some(body));
                RequestBody::empty()
            }
            None => RequestBody::empty(),
            Some(mut body) => {
                body.expect(length);
                if headers::expects_continue(&head.headers) {
                    body.tell_to_go_on(responder.clone());
                }
                RequestBody::boxed(body)
            }
        };
        let body = body.with_interim(Arc::new(Ahead(responder.clone())));
        let response = {
            let request = Request::from_parts(head, body);
            let mut responding = pin!(self.respond(request, &downstream, listener));
            poll_fn(|cx| match responding.as_mut().poll(cx) {
                Poll::Ready(response) => Poll::Ready(Some(response)),
                // The client has reset the stream: the request is cancelled.
                Poll::Pending => responder.poll_gone(cx).map(|()| None),
            })
            .await
        };
        let Some(response) = response else { return };
        let (mut head, body) = response.into_parts();
        if let (Some(handover), Some(incoming)) = (handover, tunnelled)
            && head.status.is_success()
        {
            if let Ok(sender) = responder.respond(Response::from_parts(head, ()), false) {
                // Nobody receives it if the switch failed.
                let _ = handover.send(Box::new(Tunnel::new(incoming, sender)));
            }
            return;
        }
        let has_body = complete(&mut head, &body, is_head);
        let Ok(sender) = responder.respond(Response::from_parts(head, ()), !has_body) else {
            return;
        };
        if has_body {
            pump(body, sender).await;
        }
    }
}

/// Completes a response's head. Returns whether a body follows.
fn complete(head: &mut response::Parts, body: &forward::Body, is_head: bool) -> bool {
    let length = body.size_hint().exact();
    if is_head || [StatusCode::NO_CONTENT, StatusCode::NOT_MODIFIED].contains(&head.status) {
        // The body of a response to HEAD is not here: only the origin knows its length.
        if is_head && let Some(length @ 1..) = length {
            head.headers.entry(CONTENT_LENGTH).or_insert_with(|| length.into());
        }
        return false;
    }
    if body.is_end_stream() {
        return false;
    }
    if let Some(length) = length {
        head.headers.entry(CONTENT_LENGTH).or_insert_with(|| length.into());
    }
    true
}

/// Sends a response's body, as fast as the client takes it.
async fn pump(mut body: forward::Body, mut sender: Sender) {
    let idle = body.idle();
    let mut unread = IdleTimer::default();
    let (mut piece, mut is_last) = (Bytes::new(), false);
    let pumped = poll_fn(|cx| {
        loop {
            if !piece.is_empty() || is_last {
                let left = piece.len();
                let sent = sender.poll_send(cx, &mut piece, is_last);
                if piece.len() < left {
                    unread.moved();
                }
                match sent {
                    Poll::Ready(Ok(())) if is_last => return Poll::Ready(Pumped::Whole),
                    Poll::Ready(Ok(())) => {}
                    Poll::Ready(Err(_)) => return Poll::Ready(Pumped::Gone),
                    Poll::Pending => {
                        // The request's body may continue in the meantime.
                        body.poll_progress(cx);
                        while unread.poll(cx, idle).is_ready() {
                            // The client may be busy reading its other streams.
                            if !sender.waits_for_connection() {
                                return Poll::Ready(Pumped::Unread);
                            }
                            unread.moved();
                        }
                        return sender.poll_gone(cx).map(|()| Pumped::Gone);
                    }
                }
            }
            match Pin::new(&mut body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => (piece, is_last) = (data, body.is_end_stream()),
                    Err(frame) => {
                        let Ok(trailers) = frame.into_trailers() else { continue };
                        return Poll::Ready(match sender.send_trailers(trailers) {
                            Ok(()) => Pumped::Whole,
                            Err(_) => Pumped::Broken,
                        });
                    }
                },
                Poll::Ready(None) => is_last = true,
                Poll::Ready(Some(Err(_))) => return Poll::Ready(Pumped::Broken),
                Poll::Pending => return sender.poll_gone(cx).map(|()| Pumped::Gone),
            }
        }
    })
    .await;
    match pumped {
        Pumped::Whole | Pumped::Gone => {}
        Pumped::Unread => {
            tracing::debug!(?idle, "a client reads nothing of its response");
            sender.reset(Reason::CANCEL);
        }
        Pumped::Broken => {
            // What arrived of it should still be written: a reset drops what is not.
            yield_now().await;
            sender.reset(Reason::INTERNAL_ERROR);
        }
    }
}

/// The length of a request's body, if its head has one. An error for a CONNECT, which has no content.
fn content_length(fields: &mut HeaderMap, connects: bool) -> Result<Option<u64>, ()> {
    let Some(length) = fields.get(CONTENT_LENGTH) else { return Ok(None) };
    if connects {
        return Err(());
    }
    // If there are several they are equal: `h2` refuses others.
    let length = length.clone();
    let size = length.to_str().ok().and_then(|length| length.parse().ok());
    fields.insert(CONTENT_LENGTH, length);
    Ok(size)
}

impl Interim for Ahead {
    fn pass_on(&self, mut head: response::Parts) {
        headers::strip_response(&mut head.headers, false);
        self.0.send_informational(Response::from_parts(head, ()));
    }
}
