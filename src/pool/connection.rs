//! HTTP over one upstream connection. The task that has a request on it reads and writes it; an HTTP/2
//! connection, which many share, has a task of its own.

use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Response, request};
use http_body::{Frame, SizeHint};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{ConnectionInfo, Counted, Http2, Lead};
use crate::{
    body::{Interim, RequestBody},
    connect::{Session, TargetStream, Verdict},
    http1, http2,
    stream::Prefixed,
    tls::Negotiated,
};

/// A connection that a request can be sent on.
#[derive(Debug)]
pub enum Connection {
    /// For one request at a time.
    Http1(Http1),
    /// Shared by many.
    Http2(Http2),
}

/// An HTTP/1.1 connection.
#[derive(Debug)]
pub struct Http1 {
    /// None after a switch to another protocol.
    client: Option<Box<http1::ClientConnection<TargetStream>>>,
    /// Its connection.
    pub info: Arc<ConnectionInfo>,
}

/// Why a request has no response, or no more of it.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// On HTTP/1.1.
    #[error(transparent)]
    Http1(#[from] http1::ExchangeError),
    /// On HTTP/2.
    #[error(transparent)]
    Http2(#[from] http2::ExchangeError),
}

impl SendError {
    /// How much of the request the origin had, as far as the error alone shows it. For HTTP/2, where many requests
    /// share the connection, that is more than the connection can tell.
    pub fn verdict(&self) -> Verdict {
        match self {
            Self::Http1(http1::ExchangeError::NotFree)
            | Self::Http2(http2::ExchangeError::NotSent(_) | http2::ExchangeError::NoStream(_)) => {
                Verdict::Unsent
            }
            Self::Http2(error) if error.is_refusal() => Verdict::StreamRefused,
            Self::Http2(error) if error.is_shutdown() => Verdict::BeyondGoaway,
            Self::Http1(_) | Self::Http2(_) => Verdict::Unknown,
        }
    }

    /// Whether the origin stopped reading the request.
    pub fn is_unread(&self) -> bool {
        matches!(
            self,
            Self::Http1(http1::ExchangeError::Unread(_))
                | Self::Http2(http2::ExchangeError::Unread(_))
        )
    }

    /// Whether the origin allowed no stream for the request.
    pub fn is_without_stream(&self) -> bool {
        matches!(self, Self::Http2(http2::ExchangeError::NoStream(_)))
    }

    /// Whether the origin reset only the request's stream, although it may have processed the request.
    pub fn is_stream_reset(&self) -> bool {
        matches!(self, Self::Http2(error) if error.is_reset())
    }

    /// Whether the request's own body broke off.
    pub fn is_of_the_body(&self) -> bool {
        matches!(
            self,
            Self::Http1(http1::ExchangeError::RequestBody(_))
                | Self::Http2(http2::ExchangeError::RequestBody(_))
        )
    }

    /// Whether the connection's end caused the error, as when it was ended on purpose.
    pub fn is_cut_off(&self) -> bool {
        use http2::ExchangeError::{Connection, GoAway, NotSent};
        match self {
            Self::Http1(error) => !matches!(error, http1::ExchangeError::RequestBody(_)),
            Self::Http2(error) => matches!(error, NotSent(_) | Connection(_) | GoAway(_)),
        }
    }

    /// Whether the connection ended before the response's head was complete.
    pub fn is_incomplete(&self) -> bool {
        use http1::ExchangeError::{Closed, NotFree};
        match self {
            Self::Http1(error) => matches!(error, Closed | NotFree),
            Self::Http2(error) => error.is_end(),
        }
    }

    /// Whether what was received is not HTTP.
    pub fn is_malformed(&self) -> bool {
        use http2::ExchangeError::{Protocol, SwitchingProtocols};
        match self {
            Self::Http1(error) => matches!(error, http1::ExchangeError::Head(_)),
            Self::Http2(error) => matches!(error, Protocol(_) | SwitchingProtocols),
        }
    }
}

impl Connection {
    /// Starts HTTP on a new connection: HTTP/2 if ALPN chose it, or with `prior_knowledge`.
    ///
    /// The task that drives it ends with the connection, at the latest when `kill` is cancelled.
    pub async fn start(
        session: Session,
        prior_knowledge: bool,
        expires: Instant,
        counted: Counted,
        kill: CancellationToken,
    ) -> Result<Self, SendError> {
        let Session { stream, wire, facts, .. } = session;
        let http2 = prior_knowledge || facts.alpn == Negotiated::Http2;
        let info = Arc::new(ConnectionInfo { wire, facts, expires, counted });
        if http2 {
            Ok(Self::Http2(Http2::start(stream, info, kill).await?))
        } else {
            let client = Some(Box::new(http1::ClientConnection::new(stream)));
            Ok(Self::Http1(Http1 { client, info }))
        }
    }

    /// Its connection.
    pub fn info(&self) -> &Arc<ConnectionInfo> {
        match self {
            Self::Http1(http1) => &http1.info,
            Self::Http2(http2) => &http2.info,
        }
    }

    /// Whether requests have to be in the form of HTTP/2.
    pub fn is_http2(&self) -> bool {
        matches!(self, Self::Http2(_))
    }

    /// Ends the dial's flight, once it is known how many requests may share the connection.
    pub fn land(&self, flight: Lead) {
        if let Self::Http2(http2) = self {
            http2.land(flight);
        }
    }

    /// Sends a request and returns its response's head; [`poll_frame`](Self::poll_frame) then reads the body.
    /// `probe`: the connection has served before. `limit`: how long an HTTP/2 peer may allow no streams.
    pub async fn send(
        &mut self,
        head: &request::Parts,
        body: RequestBody,
        probe: bool,
        interim: Option<&Arc<dyn Interim>>,
        limit: Duration,
    ) -> Result<Response<()>, SendError> {
        match self {
            Self::Http1(http1) => match &mut http1.client {
                Some(client) => Ok(client.send(head, body, probe, interim).await?),
                None => Err(http1::ExchangeError::NotFree.into()),
            },
            // Boxed, because otherwise the futures of HTTP/1 requests would have room for it.
            Self::Http2(http2) => Ok(Box::pin(http2.send(head, body, interim, limit)).await?),
        }
    }

    /// The response's body, as [`Body::poll_frame`] has it.
    pub fn poll_frame(
        &mut self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, SendError>>> {
        match self {
            Self::Http1(Http1 { client: Some(client), .. }) => {
                client.poll_frame(cx).map_err(SendError::Http1)
            }
            Self::Http2(http2) => match http2.exchange_mut() {
                Some(exchange) => exchange.poll_frame(cx).map_err(SendError::Http2),
                None => Poll::Ready(None),
            },
            Self::Http1(_) => Poll::Ready(None),
        }
    }

    /// Continues with the request's body, for a caller that is not reading the response's.
    pub fn poll_progress(&mut self, cx: &mut Context<'_>) {
        match self {
            Self::Http1(Http1 { client: Some(client), .. }) => client.poll_progress(cx),
            Self::Http2(http2) => {
                if let Some(exchange) = http2.exchange_mut() {
                    exchange.poll_progress(cx);
                }
            }
            Self::Http1(_) => {}
        }
    }

    /// Whether the response's body has ended.
    pub fn is_end_stream(&self) -> bool {
        match self {
            Self::Http1(http1) => http1.client.as_ref().is_none_or(|client| client.is_end_stream()),
            Self::Http2(http2) => http2.exchange().is_none_or(|exchange| exchange.is_end_stream()),
        }
    }

    /// How much of the response's body is still to come.
    pub fn size_hint(&self) -> SizeHint {
        match self {
            Self::Http1(Http1 { client: Some(client), .. }) => client.size_hint(),
            Self::Http2(http2) => {
                http2.exchange().map_or(SizeHint::with_exact(0), |exchange| exchange.size_hint())
            }
            Self::Http1(_) => SizeHint::with_exact(0),
        }
    }

    /// How much the origin's kernel has acknowledged, if the connection carries only one request.
    pub fn acknowledged(&self) -> u64 {
        match self {
            Self::Http1(http1) => http1.client.as_ref().map_or(0, |client| client.acknowledged()),
            Self::Http2(_) => 0,
        }
    }

    /// The stream after a `101`; none for HTTP/2, which has no such response.
    pub fn take_tunnel(&mut self) -> Option<Prefixed<TargetStream>> {
        match self {
            Self::Http1(http1) => http1.client.take().and_then(|client| client.into_tunnel()),
            Self::Http2(_) => None,
        }
    }
}

impl Http1 {
    /// Whether it can take the next request, as far as it was checked.
    pub fn is_free(&self) -> bool {
        self.client.as_ref().is_some_and(|client| client.is_free())
    }

    /// Whether its idle peer is still there and has sent nothing.
    pub fn is_still_free(&mut self) -> bool {
        self.client.as_mut().is_some_and(|client| client.is_still_free())
    }

    /// Releases memory that it does not need while idle.
    pub(super) fn rest(&mut self) {
        if let Some(client) = &mut self.client {
            client.rest();
        }
        self.info.wire.rest();
    }
}

impl Drop for Http1 {
    fn drop(&mut self) {
        if let Some(client) = &mut self.client {
            client.close();
        }
    }
}
