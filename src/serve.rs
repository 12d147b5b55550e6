//! One connection from an application: detected, then served request by request.

use std::{convert::Infallible, net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use ::http::Request;
use arc_swap::ArcSwap;
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use metrics::{counter, gauge};
use tokio::{io::AsyncWriteExt, net::TcpStream, time::Instant};

use crate::{
    config,
    detect::{DetectError, Prefixed, Protocol, detect},
    drain::Drain,
    forward::{self, Arrival},
    route::Routes,
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
        let arrival =
            Arrival { listener, peer, local, scheme: "http", worker, drain: self.drain.clone() };

        let deadline = Instant::now() + settings.header_timeout;
        let detected = tokio::select! {
            detected = detect(stream, deadline) => detected,
            () = self.drain.stopped().cancelled_owned() => return,
        };
        let (protocol, stream) = match detected {
            Ok(detected) => detected,
            Err(DetectError::Silent) => return,
            Err(error) => {
                tracing::debug!(%peer, %listener, %error, "connection given up");
                return;
            }
        };
        let _counted = Counted::new(&self.routes.load(), listener, protocol);
        match protocol {
            Protocol::Http1 => self.http1(stream, arrival, &settings).await,
            Protocol::Http2 => self.http2(stream, arrival, &settings).await,
            Protocol::Tls => refuse_tls(stream, &arrival).await,
        }
    }

    async fn http1(
        &self,
        stream: Prefixed<TcpStream>,
        arrival: Arrival,
        settings: &config::Listener,
    ) {
        let service = service_fn(|request| self.respond(request, &arrival));
        let connection = http1::Builder::new()
            .preserve_header_case(true)
            .auto_date_header(false)
            .max_header_size(settings.max_header_size)
            .timer(TokioTimer::new())
            .header_read_timeout(settings.header_timeout)
            .keep_alive(!self.drain.has_begun())
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let mut connection = pin!(connection);
        let result = tokio::select! {
            result = connection.as_mut() => result,
            () = self.drain.begun(), if !self.drain.has_begun() => {
                connection.as_mut().graceful_shutdown();
                connection.await
            }
        };
        explain(result, &arrival);
    }

    async fn http2(
        self: Arc<Self>,
        stream: Prefixed<TcpStream>,
        arrival: Arrival,
        settings: &config::Listener,
    ) {
        let arrival = Arc::new(arrival);
        // A stream is a task of hyper's own, and owns what it needs.
        let service = {
            let (server, arrival) = (self.clone(), arrival.clone());
            service_fn(move |request| {
                let (server, arrival) = (server.clone(), arrival.clone());
                async move { server.respond(request, &arrival).await }
            })
        };
        let connection = http2::Builder::new(TokioExecutor::new())
            .auto_date_header(false)
            .enable_connect_protocol()
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
    ) -> Result<hyper::Response<forward::Body>, Infallible> {
        let routes = self.routes.load_full();
        Ok(forward::serve(request, arrival, &routes).await)
    }
}

async fn refuse_tls(mut stream: Prefixed<TcpStream>, arrival: &Arrival) {
    tracing::warn!(
        listener = %arrival.listener,
        peer = %arrival.peer,
        "a client speaks TLS, which listeners do not take in this version: use http:// to the \
         proxy; it makes the TLS to the target",
    );
    let _ = stream.get_mut().write_all(&TLS_ALERT).await;
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

/// Counts a connection while it lives, for the alias where its listener has only one.
struct Counted(metrics::Gauge);

impl Counted {
    fn new(routes: &Routes, listener: SocketAddr, protocol: Protocol) -> Self {
        let alias = match routes.upstreams(listener) {
            [only] => only.config().name.clone(),
            _ => String::new(),
        };
        let (protocol, tls) = match protocol {
            Protocol::Http1 => ("http/1.1", "false"),
            Protocol::Http2 => ("h2", "false"),
            Protocol::Tls => ("none", "true"),
        };
        counter!(
            "truename_downstream_connections_total",
            "alias" => alias.clone(), "protocol" => protocol, "tls" => tls
        )
        .increment(1);
        let active = gauge!("truename_downstream_connections_active", "alias" => alias);
        active.increment(1.0);
        Self(active)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}
