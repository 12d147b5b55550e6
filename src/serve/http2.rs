//! A client's HTTP/2 connection, with a task for each of its streams.

use std::{
    pin::pin,
    sync::Arc,
    task::{Context, Poll},
};

use ::http::{HeaderMap, Method, Request, Response, header::CONTENT_LENGTH, response};
use bytes::Bytes;
use http_body::{Body as _, Frame};
use tokio::time::{Duration, Instant, sleep, timeout};

use super::{Arrival, End, Listener, Server};
use crate::{
    body::{Interim, RequestBody},
    forward::{self, Body, ClientSide, Content, Done, Downstream, Stopped, Switch, headers},
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

/// The client's side of an exchange: its response, on its stream.
struct Responding {
    responder: Responder,
    /// Once the response has begun.
    sender: Option<Sender>,
    is_head: bool,
    /// What the client has no room for yet.
    piece: Bytes,
    /// `piece` is the last, and that is not sent yet.
    is_last: bool,
    /// Measures how long the client has taken nothing.
    unread: IdleTimer,
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
                peer = %downstream.client.source,
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
        let mut tunnelled = None;
        let body = match body {
            body if connects => {
                tunnelled = Some(body);
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
        let mut responding = Responding::new(responder, is_head);
        let done = {
            let request = Request::from_parts(head, body);
            let request = pin!(Some(self.respond(request, &downstream, listener)));
            forward::exchange(request, &mut responding).await
        };
        if let Ok(Done::Switched(Switch::Upgrade(upgraded))) = done
            && let (Some(incoming), Some(sender)) = (tunnelled, responding.into_sender())
        {
            let client = Box::new(Tunnel::new(incoming, sender));
            Box::pin(upgraded.run(client)).await;
        }
    }
}

impl Responding {
    fn new(responder: Responder, is_head: bool) -> Self {
        Self {
            responder,
            sender: None,
            is_head,
            piece: Bytes::new(),
            is_last: false,
            unread: IdleTimer::default(),
        }
    }

    fn into_sender(self) -> Option<Sender> {
        self.sender
    }
}

impl ClientSide for Responding {
    fn is_head(&self) -> bool {
        self.is_head
    }

    fn begin(
        &mut self,
        head: response::Parts,
        body: &Body,
        content: Content,
    ) -> Result<bool, Stopped> {
        let has_body = content != Content::None && !body.is_end_stream();
        let is_end = !has_body && !body.is_switching();
        let sender = self.responder.respond(Response::from_parts(head, ()), is_end);
        self.sender = Some(sender.map_err(|_| Stopped::Gone)?);
        Ok(has_body)
    }

    fn is_full(&self) -> bool {
        !self.piece.is_empty()
    }

    fn push(&mut self, frame: Frame<Bytes>, is_last: bool) -> Result<(), Stopped> {
        match frame.into_data() {
            Ok(data) => (self.piece, self.is_last) = (data, is_last),
            Err(frame) => {
                if let (Some(sender), Ok(trailers)) = (&mut self.sender, frame.into_trailers()) {
                    sender.send_trailers(trailers).map_err(|_| Stopped::Broken)?;
                }
            }
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Stopped> {
        self.is_last = true;
        Ok(())
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>, idle: Duration) -> Poll<Result<(), Stopped>> {
        let Some(sender) = &mut self.sender else { return Poll::Ready(Ok(())) };
        if self.piece.is_empty() && !self.is_last {
            return Poll::Ready(Ok(()));
        }
        let left = self.piece.len();
        let sent = sender.poll_send(cx, &mut self.piece, self.is_last);
        if self.piece.len() < left {
            self.unread.moved();
        }
        if let Poll::Ready(sent) = sent {
            self.is_last = false;
            return Poll::Ready(sent.map_err(|_| Stopped::Gone));
        }
        while self.unread.poll(cx, idle).is_ready() {
            // The client may be slow to read what its other streams have for it.
            if !sender.waits_for_connection() {
                return Poll::Ready(Err(Stopped::Unread));
            }
            self.unread.moved();
        }
        sender.poll_gone(cx).map(|()| Err(Stopped::Gone))
    }

    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.sender {
            Some(sender) => sender.poll_gone(cx),
            None => self.responder.poll_gone(cx),
        }
    }

    fn break_off(&mut self, why: Stopped) {
        let Some(sender) = &mut self.sender else { return };
        sender.reset(match why {
            Stopped::Unread | Stopped::Gone => Reason::CANCEL,
            Stopped::Broken => Reason::INTERNAL_ERROR,
        });
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
