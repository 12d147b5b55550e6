//! One connection from an application: detected, then served request by request.

mod downstream;
mod socket;

use std::{convert::Infallible, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use ::http::{Request, Response};
use arc_swap::ArcSwap;
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{net::TcpStream, time::Instant};

use downstream::{Downstream, Served, Turn};
use socket::{Socket, linger};

use crate::{
    body::RequestBody,
    config,
    detect::{DetectError, Protocol, detect},
    drain::Drain,
    forward::{self, Arrival},
    route::Routes,
    telemetry::DownstreamConnection,
};

/// What an alert says to a client that speaks TLS to a listener without it: fatal,
/// `handshake_failure` (RFC 8446 §6).
const TLS_ALERT: [u8; 7] = [0x15, 3, 1, 0, 2, 2, 40];

/// HTTP/2 keep-alive towards applications: one that vanished does not hold its streams for ever.
const H2_PING_INTERVAL: Duration = Duration::from_secs(30);
const H2_PING_TIMEOUT: Duration = Duration::from_secs(20);

/// What every connection is served with.
pub struct Server {
    /// The routes of now.
    pub routes: ArcSwap<Routes>,
    /// The listeners' settings.
    pub settings: ArcSwap<config::Listener>,
    /// The end.
    pub drain: Drain,
}

impl Server {
    /// Serves a connection to its end.
    pub async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        listener: SocketAddr,
        worker: usize,
    ) {
        let _guard = self.drain.guard();
        let settings = self.settings.load_full();
        let Ok(local) = stream.local_addr() else { return };

        let deadline = Instant::now() + settings.header_timeout;
        let detected = tokio::select! {
            detected = detect(&stream, deadline) => detected,
            () = self.drain.stopped().cancelled_owned() => return,
        };
        let (protocol, prefix) = match detected {
            Ok(detected) => detected,
            Err(DetectError::Silent) => return,
            Err(error) => {
                tracing::debug!(%peer, %listener, %error, "connection given up");
                return;
            }
        };
        let (name, is_tls) = match protocol {
            Protocol::Http1 => ("http/1.1", false),
            Protocol::Http2 => ("h2", false),
            Protocol::Tls => ("none", true),
        };
        let connection = Arc::new(DownstreamConnection::new(name, is_tls));
        if let [only] = self.routes.load().upstreams(listener) {
            connection.belongs_to(&only.config().name);
        }
        let drain = self.drain.clone();
        let connection = Some(connection);
        let arrival = Arrival { listener, peer, local, scheme: "http", worker, drain, connection };
        let stream = Arc::new(stream);
        let socket = Socket::new(prefix, stream.clone());
        match protocol {
            Protocol::Http1 => {
                if self.http1(socket, arrival, &settings).await == Http1End::Refused {
                    linger(&stream).await;
                }
            }
            Protocol::Http2 => self.http2(socket, arrival, &settings).await,
            Protocol::Tls => refuse_tls(&stream, &arrival).await,
        }
    }

    async fn http1(
        &self,
        stream: Socket,
        arrival: Arrival,
        settings: &config::Listener,
    ) -> Http1End {
        let turn = Turn::new();
        let io = Downstream::new(stream, turn.clone(), settings.header_timeout);
        let service = service_fn(|request| async {
            turn.serve();
            let (head, body) = self.respond(request, &arrival).await.into_parts();
            let body = Served::new(head.status, body, &turn);
            Ok::<_, Infallible>(Response::from_parts(head, body))
        });
        let connection = http1::Builder::new()
            .preserve_header_case(true)
            .auto_date_header(false)
            .max_header_size(settings.max_header_size)
            .header_read_timeout(None)
            .keep_alive(!self.drain.has_begun())
            .serve_connection(TokioIo::new(io), service)
            .with_upgrades();
        let result = {
            let mut connection = pin!(connection);
            tokio::select! {
                result = connection.as_mut() => result,
                () = self.drain.begun(), if !self.drain.has_begun() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            }
        };
        explain(result, &arrival);
        if turn.was_refused() { Http1End::Refused } else { Http1End::Done }
    }

    async fn http2(self: Arc<Self>, stream: Socket, arrival: Arrival, settings: &config::Listener) {
        let arrival = Arc::new(arrival);
        // A stream is a task of hyper's own, and owns what it needs.
        let service = {
            let (server, arrival) = (self.clone(), arrival.clone());
            service_fn(move |request| {
                let (server, arrival) = (server.clone(), arrival.clone());
                async move { Ok::<_, Infallible>(server.respond(request, &arrival).await) }
            })
        };
        let connection = http2::Builder::new(TokioExecutor::new())
            .auto_date_header(false)
            .max_header_list_size(settings.max_header_size.try_into().unwrap_or(u32::MAX))
            .timer(TokioTimer::new())
            .keep_alive_interval(H2_PING_INTERVAL)
            .keep_alive_timeout(H2_PING_TIMEOUT)
            .serve_connection(TokioIo::new(stream), service);
        let mut connection = pin!(connection);
        let result = tokio::select! {
            result = connection.as_mut() => result,
            () = self.drain.begun() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        explain(result, &arrival);
    }

    async fn respond(
        &self,
        request: Request<Incoming>,
        arrival: &Arrival,
    ) -> Response<forward::Body> {
        let routes = self.routes.load_full();
        forward::serve(request.map(RequestBody::incoming), arrival, &routes).await
    }
}

async fn refuse_tls(stream: &TcpStream, arrival: &Arrival) {
    tracing::warn!(
        listener = %arrival.listener,
        peer = %arrival.peer,
        "a client speaks TLS, which listeners do not take in this version: use http:// to the \
         proxy; it makes the TLS to the target",
    );
    // Seven bytes into an empty buffer.
    let _ = stream.try_write(&TLS_ALERT);
    linger(stream).await;
}

/// How an HTTP/1 connection ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Http1End {
    Done,
    /// With an answer that the client may not have read yet.
    Refused,
}

fn explain(result: Result<(), hyper::Error>, arrival: &Arrival) {
    if let Err(error) = result {
        let source = std::error::Error::source(&error).map(ToString::to_string);
        tracing::debug!(
            listener = %arrival.listener,
            peer = %arrival.peer,
            %error,
            source,
            "connection ended",
        );
    }
}
