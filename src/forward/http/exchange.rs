//! An HTTP exchange: one loop that owns both sides and passes the response's head, body and trailers to the
//! client while the rest of the request goes to the origin.
//!
//! The loop decides, for every version of HTTP on either side, what happens with:
//!
//! * **A client that leaves**: its request is cancelled. This is noticed before the response's head, and
//!   whenever there is nothing to pass on.
//! * **An early response**: it is passed on at once. The rest of the request is sent in the meantime.
//! * **A full window**: while the client reads nothing, nothing more is read of the response, but the rest of
//!   the request is still sent. A client that reads nothing for `timeouts.idle` is given up.
//! * **A stalled exchange**: if neither the response nor the rest of the request moves for `timeouts.idle`, the
//!   response breaks off.
//! * **A response that breaks off**: what arrived of it is still passed on, and the client is shown that it is
//!   incomplete.
//! * **The end**: once the client's side has accepted the end of the response, the connection to the origin is
//!   given back and the request's record is written. So a response that was read completely has a record.
//! * **A switch of protocols**: after a `101`, the task continues with both connections as a tunnel.
//!
//! The two sides implement this: a [`ClientSide`] for its version of HTTP, and the
//! [`OriginSide`](super::origin::OriginSide) for the response and the rest of the request. A program that
//! uses the library is its own client side, and polls the origin's through the [`Body`].
//!
//! Before the head, an exchange is a request on its way ([`super::request`]), which the loop runs, with
//! `timeouts.connect` and `timeouts.response`. Its `1xx` go to the client's side as they come
//! ([`Interim`](crate::body::Interim)), and the loop writes them.

use std::{
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use ::http::{Response, StatusCode, header::CONTENT_LENGTH, response};
use bytes::Bytes;
use http_body::{Body as _, Frame};
use tokio::task::yield_now;

use super::{Body, upgrade::Switch};

/// The client's side of one exchange, in its version of HTTP.
pub trait ClientSide {
    /// Whether the request's method is HEAD, so that the response has no body.
    fn is_head(&self) -> bool;

    /// Begins the response. Returns whether a body follows the head.
    fn begin(
        &mut self,
        head: response::Parts,
        body: &Body,
        content: Content,
    ) -> Result<bool, Stopped>;

    /// Whether some of what was accepted has to be written before there is room for more.
    fn is_full(&self) -> bool;

    /// Accepts a part of the body. `is_last`: nothing follows.
    fn push(&mut self, frame: Frame<Bytes>, is_last: bool) -> Result<(), Stopped>;

    /// Ends the body, if the last part was not marked as such.
    fn finish(&mut self) -> Result<(), Stopped>;

    /// Writes what was accepted. `idle`: how long the client may read nothing of it.
    fn poll_flush(&mut self, cx: &mut Context<'_>, idle: Duration) -> Poll<Result<(), Stopped>>;

    /// Ready once the client has left. Polled while there is nothing to write.
    fn poll_gone(&mut self, cx: &mut Context<'_>) -> Poll<()>;

    /// Shows a client that is still there, if possible, that the response is incomplete.
    fn break_off(&mut self, why: Stopped);
}

/// The length of a response's body, according to its head.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// There is none, whatever the head says of its length.
    None,
    /// This many bytes.
    Length(u64),
    /// Until it ends.
    Unknown,
}

/// How an exchange ended whose response was passed on completely.
pub enum Done {
    /// The client's connection is free for the next request.
    Responded,
    /// The client's side speaks another protocol from here on.
    Switched(Switch),
}

/// Why an exchange ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// The client has left, or nothing more can be written to it.
    Gone,
    /// The client reads nothing of the response.
    Unread,
    /// The response broke off.
    Broken,
}

/// Runs an exchange to its end: the request until its response's head is there, and then both.
///
/// `request` is emptied as soon as there is no more of it to run.
pub async fn exchange<C, F>(
    mut request: Pin<&mut Option<F>>,
    client: &mut C,
) -> Result<Done, Stopped>
where
    C: ClientSide,
    F: Future<Output = Response<Body>>,
{
    let mut exchange = Exchange { phase: Phase::Request, idle: Duration::ZERO };
    let result = poll_fn(|cx| exchange.poll(cx, request.as_mut(), client)).await;
    if let Err(stopped) = &result {
        request.set(None);
        exchange.stop(*stopped, client).await;
    }
    result
}

struct Exchange {
    phase: Phase,
    /// How long the client may read nothing of the response.
    idle: Duration,
}

enum Phase {
    /// There is no response yet.
    Request,
    /// The response's body is passed on.
    Body(Body),
    /// Everything was accepted, and some may have to be written.
    End(Done),
}

/// How much of a body the client's side has accepted.
enum Taken {
    /// All that has arrived.
    Everything,
    /// The client's side is full.
    Some,
    /// All of it.
    End,
}

impl Exchange {
    fn poll<C, F>(
        &mut self,
        cx: &mut Context<'_>,
        mut request: Pin<&mut Option<F>>,
        client: &mut C,
    ) -> Poll<Result<Done, Stopped>>
    where
        C: ClientSide,
        F: Future<Output = Response<Body>>,
    {
        loop {
            let mut is_waiting = false;
            match &mut self.phase {
                Phase::Request => {
                    let Some(running) = request.as_mut().as_pin_mut() else {
                        return Poll::Ready(Err(Stopped::Gone));
                    };
                    let Poll::Ready(response) = running.poll(cx) else {
                        return client.poll_gone(cx).map(|()| Err(Stopped::Gone));
                    };
                    request.set(None);
                    self.begin(response, client)?;
                    continue;
                }
                Phase::Body(body) => match take_on(cx, body, client)? {
                    Taken::Everything => is_waiting = true,
                    Taken::Some => {}
                    Taken::End => self.phase = Phase::End(Done::Responded),
                },
                Phase::End(_) => {}
            }
            match client.poll_flush(cx, self.idle)? {
                Poll::Ready(()) => match &mut self.phase {
                    Phase::End(done) => {
                        return Poll::Ready(Ok(std::mem::replace(done, Done::Responded)));
                    }
                    _ if is_waiting => {
                        return client.poll_gone(cx).map(|()| Err(Stopped::Gone));
                    }
                    _ => {}
                },
                Poll::Pending => {
                    // The window is full. The request continues.
                    if let Phase::Body(body) = &mut self.phase {
                        body.poll_progress(cx);
                    }
                    return Poll::Pending;
                }
            }
        }
    }

    fn begin<C: ClientSide>(
        &mut self,
        response: Response<Body>,
        client: &mut C,
    ) -> Result<(), Stopped> {
        let (mut head, mut body) = response.into_parts();
        self.idle = body.idle();
        let content = complete(&mut head, &body, client.is_head());
        let switch = body.take_switch();
        let begun = client.begin(head, &body, content);
        self.phase = match switch {
            Some(switch) => Phase::End(Done::Switched(switch)),
            None if begun == Ok(true) => Phase::Body(body),
            // The request's record ends here.
            None => Phase::End(Done::Responded),
        };
        begun.map(drop)
    }

    async fn stop<C: ClientSide>(&mut self, stopped: Stopped, client: &mut C) {
        // The connection to the origin is of no more use.
        let phase = std::mem::replace(&mut self.phase, Phase::End(Done::Responded));
        if let Phase::End(Done::Switched(Switch::Upgrade(upgraded))) = phase {
            upgraded.failed();
        }
        match stopped {
            Stopped::Gone => return,
            Stopped::Unread => {
                tracing::debug!(idle = ?self.idle, "a client reads nothing of its response");
            }
            Stopped::Broken => {
                // What arrived of it should still be written, if that is possible at once.
                let _ = poll_fn(|cx| Poll::Ready(client.poll_flush(cx, self.idle))).await;
                yield_now().await;
            }
        }
        client.break_off(stopped);
    }
}

fn take_on<C: ClientSide>(
    cx: &mut Context<'_>,
    body: &mut Body,
    client: &mut C,
) -> Result<Taken, Stopped> {
    while !client.is_full() {
        match Pin::new(&mut *body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                let is_last = body.is_end_stream();
                client.push(frame, is_last)?;
                if is_last {
                    return Ok(Taken::End);
                }
            }
            Poll::Ready(None) => {
                client.finish()?;
                return Ok(Taken::End);
            }
            Poll::Ready(Some(Err(_))) => return Err(Stopped::Broken),
            Poll::Pending => return Ok(Taken::Everything),
        }
    }
    Ok(Taken::Some)
}

/// Adds the length of a response's body to its head, if it is known and missing. An empty body is left to the
/// version of HTTP.
fn complete(head: &mut response::Parts, body: &Body, is_head: bool) -> Content {
    if head.status == StatusCode::NO_CONTENT || head.status.is_informational() {
        // RFC 9110 §8.6: not even a length of 0.
        head.headers.remove(CONTENT_LENGTH);
        return Content::None;
    }
    let size = body.size_hint().exact();
    let stated = head.headers.get(CONTENT_LENGTH);
    let stated = stated.and_then(|value| value.to_str().ok()?.parse().ok());
    // The body of a response to HEAD is not here: only the origin knows its length.
    if let (None, Some(size @ 1..)) = (stated, size) {
        head.headers.insert(CONTENT_LENGTH, size.into());
    }
    if is_head || head.status == StatusCode::NOT_MODIFIED {
        return Content::None;
    }
    stated.or(size).map_or(Content::Unknown, Content::Length)
}
