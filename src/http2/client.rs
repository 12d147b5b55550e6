//! The client's half: a connection to an origin, and a stream for each request.
//!
//! One task polls the [`Connection`]. A stream has no task: as on HTTP/1, the owner of the [`Exchange`] polls it,
//! and dropping it resets the stream.

mod exchange;

use std::{
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use h2::{
    Ping, PingPong,
    client::{Builder, SendRequest},
};
use http::request;
use tokio::time::{sleep, timeout};

pub use exchange::{Exchange, ExchangeError};

use super::{
    Coalesced, Credit, Flood, Output, ReceiveWindow, SEND_BUFFER, UPSTREAM_WINDOW, Writer,
    coalesced,
    frames::{Frames, Inspected},
};
use crate::{body::RequestBody, stream::ByteStream};

/// Response heads larger than this are refused.
const MAX_RESPONSE_HEAD: u32 = 256 * 1024;

/// How many streams that we have reset are remembered, and for how long: frames that the peer had sent before it
/// learned of the reset are ignored. To what comes later, `h2` replies with a reset.
const RESET_STREAMS: usize = 10_000;
const RESET_DURATION: Duration = Duration::from_secs(5);

/// By how much DATA frames may fall short of 256 bytes each, as long as they have not been read. `h2` counts those of
/// streams that we have reset without end. Some 65,000 unread frames of a byte take 10 MiB.
const SMALL_FRAMES: usize = 16 * 1024 * 1024;

/// These notice a peer that has vanished before the kernel would.
const PING_INTERVAL: Duration = Duration::from_secs(30);
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// A handle to a connection, for beginning requests.
#[derive(Clone)]
pub struct ClientConnection {
    sender: SendRequest<Bytes>,
    credit: Arc<Credit>,
    output: Arc<Output>,
}

/// Reads from and writes to the socket. Ends when the peer closes, or once there is neither a
/// [`ClientConnection`] nor an [`Exchange`] left.
pub struct Connection<S> {
    inner: h2::client::Connection<Coalesced<Inspected<S>>, Bytes>,
    writer: Writer<Inspected<S>>,
    window: ReceiveWindow,
    output: Arc<Output>,
}

/// Starts HTTP/2 on a new connection. At most `streams` are begun before the peer has announced its limit.
pub async fn handshake<S: ByteStream>(
    io: S,
    streams: usize,
) -> Result<(ClientConnection, Connection<S>, OriginKeepAlive), ExchangeError> {
    let (io, writer) = coalesced(Inspected::new(io, Frames::of_origin()));
    writer.read_to_end();
    let window = ReceiveWindow::upstream();
    let mut builder = Builder::new();
    builder
        .enable_push(false)
        .initial_max_send_streams(streams)
        .initial_window_size(UPSTREAM_WINDOW)
        .max_send_buffer_size(SEND_BUFFER)
        .max_header_list_size(MAX_RESPONSE_HEAD)
        .max_concurrent_reset_streams(RESET_STREAMS)
        .reset_stream_duration(RESET_DURATION)
        // How many frames come of streams that `h2` has forgotten depends on our clients: no number of them
        // ends the connection. What an origin sends for nothing is counted.
        .max_local_error_reset_streams(None)
        .data_frame_budget(SMALL_FRAMES);
    let (sender, mut inner) = builder.handshake(io).await?;
    let pings = inner.ping_pong();
    let output = Arc::<Output>::default();
    let client =
        ClientConnection { sender, credit: window.credit().clone(), output: output.clone() };
    Ok((client, Connection { inner, writer, window, output }, OriginKeepAlive(pings)))
}

impl ClientConnection {
    /// Whether further requests may be begun: the peer has not sent a GOAWAY, and the connection has not ended.
    pub fn is_open(&mut self) -> bool {
        let mut cx = Context::from_waker(Waker::noop());
        // A handle is pending while the request that it has begun has no stream yet.
        matches!(self.sender.poll_ready(&mut cx), Poll::Ready(Ok(())))
    }

    /// Begins a request. The [`Exchange`] moves its body and its response.
    pub fn begin(
        &mut self,
        head: &request::Parts,
        body: RequestBody,
    ) -> Result<Exchange, ExchangeError> {
        Exchange::begin(&mut self.sender, &self.credit, &self.output, head, body)
    }
}

impl<S> Connection<S>
where
    S: ByteStream,
{
    /// How many streams the peer allows; until it has announced that, the number given to [`handshake`].
    pub fn max_streams(&self) -> usize {
        self.inner.max_concurrent_send_streams()
    }
}

impl<S: ByteStream> Future for Connection<S> {
    // What else went wrong reaches the streams.
    type Output = Result<(), Flood>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Self { inner, writer, window, output } = &mut *self;
        let ended = writer.poll_driven(cx, |cx| {
            let ended = Pin::new(&mut *inner).poll(cx);
            if let Some(size) = window.poll_resized(cx) {
                inner.set_target_window_size(size);
            }
            ended
        });
        output.written(writer.is_flushed());
        let (begun, sent) = (output.begun(), output.sent());
        if let Some(flood) = writer.with_stream(|stream| stream.frames().flood(begun, sent)) {
            return Poll::Ready(Err(flood));
        }
        ended.map(|_| Ok(()))
    }
}

/// Sends PINGs to a silent origin while requests wait for it. Polled apart from the connection, which is polled
/// for every frame.
pub struct OriginKeepAlive(Option<PingPong>);

impl OriginKeepAlive {
    /// Ready once the peer has not responded to a PING. One is sent if streams are open (`is_waiting`) and nothing
    /// has been received since `has_spoken` was last called. `takes`: whether the peer has taken some of what waited
    /// for it when that was last called: the PING is behind that.
    pub async fn lost(
        self,
        is_waiting: impl Fn() -> bool,
        mut has_spoken: impl FnMut() -> bool,
        mut takes: impl FnMut() -> bool,
    ) {
        let Some(mut pings) = self.0 else { return };
        loop {
            sleep(PING_INTERVAL).await;
            if has_spoken() || !is_waiting() {
                continue;
            }
            takes();
            let mut pong = pin!(pings.ping(Ping::opaque()));
            loop {
                match timeout(PING_TIMEOUT, pong.as_mut()).await {
                    Ok(Ok(_)) => break,
                    Err(_) if takes() => {}
                    // An ended connection needs no PING.
                    Ok(Err(_)) | Err(_) => return,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
