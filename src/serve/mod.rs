//! One connection from an application: detected, then served request by request.

mod client_stream;
mod credentials;
mod dedicated;
pub mod detect;
mod forward_proxy;
mod http1;
mod http2;
mod listen_socket;
mod mysql;
mod postgres;
mod proxy_header;
mod request_timer;
mod service;
mod session;
mod starttls;
mod tcp;

use std::{io::ErrorKind, net::SocketAddr, sync::Arc};

use ::http::{Request, Response};
use arc_swap::ArcSwap;
use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    net::TcpStream,
    time::{Instant, timeout_at},
};

pub use credentials::Credentials;
pub use listen_socket::{ListenSocketId, ListenSocketUse, ListenerId, Part, covers};
pub use service::{ForwardProxy, Listener, Reached, Service, Serving, UNBOUND};

use client_stream::{ClientStream, linger};
use detect::{DetectError, HTTP2_PREFACE, Protocol, detect};
use http1::{Http1Connection, Served};

use crate::{
    body::RequestBody,
    drain::Drain,
    forward::{self, Downstream},
    protocol,
    proxy_header::Addresses,
    stream::{ByteStream, Place, Prefixed, Socket},
    telemetry::{DownstreamConnection, Failures},
    tls::{
        Negotiated,
        server::{AcceptError, Accepted, Asked, ServerTls},
    },
    upstream::Alias,
};

/// What all connections share.
pub struct Server {
    /// The current configuration.
    pub serving: ArcSwap<Serving>,
    /// For clients that speak TLS.
    pub tls: ServerTls,
    /// Handshakes that fail, by listener and reason.
    pub failures: Failures<(SocketAddr, String)>,
    /// The same for PROXY headers.
    pub header_failures: Failures<(SocketAddr, String)>,
    /// The same for connections that could not be accepted.
    pub accept_failures: Failures<(SocketAddr, String)>,
    /// The process's drain.
    pub drain: Drain,
}

/// A connection: the listener it arrived on, and its two ends.
#[derive(Clone)]
pub struct Arrival {
    /// The listener, as it was when the connection or its latest request began.
    pub listener: Arc<Listener>,
    /// The application's connection. If it began with a PROXY header, this is what the header says.
    pub client: Arc<Addresses>,
    /// The socket's own address, whatever a PROXY header says.
    pub local: SocketAddr,
    /// The worker that serves it.
    pub worker: usize,
    /// Set for the inside of a tunnel through the forward proxy.
    tunnel: Option<Arc<Tunnelled>>,
}

/// What the inside of a tunnel needs.
struct Tunnelled {
    /// The alias that the CONNECT named.
    alias: Arc<Alias>,
    /// The forward proxy's drain, which ends the tunnel too.
    proxy: Drain,
}

impl Arrival {
    /// A connection that has been accepted.
    pub fn new(
        listener: Arc<Listener>,
        peer: SocketAddr,
        local: SocketAddr,
        worker: usize,
    ) -> Box<Self> {
        let client = Arc::new(Addresses { source: peer, destination: local });
        Box::new(Self { listener, client, local, worker, tunnel: None })
    }

    /// Follows the listener if a reload has changed it. One that was removed stays as it was.
    fn follow(&mut self, server: &Server) {
        let serving = server.serving.load();
        if let Some(now) = serving.listeners.get(&self.listener.id)
            && !Arc::ptr_eq(now, &self.listener)
        {
            self.listener = now.clone();
        }
    }

    /// Whether the current request is the last: the proxy is draining, or the listener was removed.
    fn is_ending(&self) -> bool {
        self.listener.drain.has_begun()
            || self.tunnel.as_ref().is_some_and(|tunnel| tunnel.proxy.has_begun())
    }

    /// Waits for the drain of its listener, or of the proxy.
    fn ending(&self) -> impl Future<Output = ()> + use<> {
        let (listener, tunnel) = (self.listener.clone(), self.tunnel.clone());
        async move {
            match tunnel {
                None => listener.drain.begun().await,
                Some(tunnel) => tokio::select! {
                    () = listener.drain.begun() => {}
                    () = tunnel.proxy.begun() => {}
                },
            }
        }
    }

    /// Waits until the connection has to end, if no request has arrived since `since`.
    #[allow(clippy::manual_async_fn, reason = "an async fn keeps its arguments twice")]
    fn unused(&self, since: Instant) -> impl Future<Output = ()> + use<> {
        let (listener, tunnel) = (self.listener.clone(), self.tunnel.clone());
        async move {
            let Some(tunnel) = tunnel else { return listener.drain.unused(since).await };
            let either = async {
                tokio::select! {
                    () = listener.drain.unused(since) => {}
                    () = tunnel.proxy.unused(since) => {}
                }
            };
            Box::pin(either).await;
        }
    }
}

impl Server {
    /// Serves a connection to its end. A tunnel may outlast this call, and keeps holding `place`.
    pub async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        mut arrival: Box<Arrival>,
        place: Place,
    ) {
        let _guard = self.drain.guard();
        let (mut stream, socket) = ClientStream::new(stream, place);
        // If the connection is gone already, that shows soon enough.
        let _ = socket.watch(arrival.listener.keepalive());

        let accepted = Instant::now();
        let deadline = accepted + arrival.listener.settings.header_timeout;
        if arrival.has_proxy_header() {
            let read = Box::pin(self.proxy_header(&socket, &mut arrival, deadline));
            if !read.await {
                return;
            }
        }
        if arrival.listener.alias().is_some() {
            let end = Box::pin(self.dedicated(stream, &socket, arrival)).await;
            return self.close(&socket, end).await;
        }
        let detected = tokio::select! {
            detected = detect(&mut stream, deadline) => detected,
            () = arrival.unused(accepted) => return,
        };
        let (protocol, prefix) = match detected {
            Ok(detected) => detected,
            Err(DetectError::Silent) => {
                drop(self.counted(&arrival, "none", false));
                return;
            }
            Err(error) => {
                drop(self.counted(&arrival, "none", false));
                let (peer, listener) = (arrival.client.source, arrival.listener.address);
                tracing::debug!(%peer, %listener, %error, "no protocol detected on a connection");
                return;
            }
        };
        let stream = Prefixed::new(prefix, stream);
        let end = match arrival.listener.service {
            Service::Http(_) | Service::Alias(..) => {
                self.speak(protocol, stream, arrival, deadline).await
            }
            // Whatever it speaks: the HTTP/1 parser refuses it with an error.
            Service::ForwardProxy(_) => Box::pin(self.proxied(stream, &socket, arrival)).await,
        };
        self.close(&socket, end).await;
    }

    /// Closes a client's connection.
    async fn close(&self, socket: &Socket, end: End) {
        match end {
            End::Lingers => Box::pin(linger(socket, &self.drain)).await,
            End::Reset => socket.reset_on_close(),
            End::Done => {}
        }
    }

    /// Serves the protocol that was detected.
    ///
    /// Here and above, rare branches are boxed, because a connection's future has room for its largest branch
    /// for as long as it lives.
    async fn speak<S>(
        self: &Arc<Self>,
        protocol: Protocol,
        stream: S,
        arrival: Box<Arrival>,
        deadline: Instant,
    ) -> End
    where
        S: ByteStream + 'static,
    {
        match protocol {
            Protocol::Http1 => {
                let downstream = self.downstream(&arrival, "http/1.1", "http", None);
                self.requests(stream, downstream, arrival).await
            }
            Protocol::Http2 => {
                let downstream = self.downstream(&arrival, "h2", "http", None);
                Box::pin(self.http2(stream, downstream, arrival)).await
            }
            Protocol::Tls => Box::pin(self.secured(stream, arrival, deadline)).await,
        }
    }

    /// Serves a connection that begins with TLS.
    async fn secured<S>(
        self: &Arc<Self>,
        stream: S,
        arrival: Box<Arrival>,
        deadline: Instant,
    ) -> End
    where
        S: ByteStream + 'static,
    {
        match Box::pin(self.accept(stream, &arrival, deadline)).await {
            Some(Accepted { stream, server_name, alpn: Negotiated::Http2 }) => {
                let downstream = self.downstream(&arrival, "h2", "https", server_name);
                match Box::pin(self.preface(stream, &arrival, deadline)).await {
                    Some(stream) => Box::pin(self.http2(stream, downstream, arrival)).await,
                    None => End::Done,
                }
            }
            Some(Accepted { stream, server_name, .. }) => {
                let downstream = self.downstream(&arrival, "http/1.1", "https", server_name);
                Box::pin(self.requests(stream, downstream, arrival)).await
            }
            None => {
                drop(self.counted(&arrival, "none", true));
                End::Lingers
            }
        }
    }

    /// What the exchanges of the connection know of it. Counts it as long as the value lives.
    fn downstream(
        &self,
        arrival: &Arrival,
        protocol: &'static str,
        scheme: &'static str,
        server_name: Option<String>,
    ) -> Downstream {
        let connection = Some(self.counted(arrival, protocol, scheme == "https"));
        let Arrival { ref listener, ref client, local, worker, .. } = *arrival;
        let (listener, drain) = (listener.address, self.drain.clone());
        Downstream {
            listener,
            client: client.clone(),
            local,
            scheme,
            server_name,
            worker,
            drain,
            can_switch: true,
            connection,
        }
    }

    /// The connection in the metrics.
    fn counted(
        &self,
        arrival: &Arrival,
        protocol: &'static str,
        tls: bool,
    ) -> Arc<DownstreamConnection> {
        let connection = Arc::new(DownstreamConnection::new(protocol, tls));
        if let Some(only) = arrival.listener.routes().only() {
            connection.belongs_to(&only.worker(arrival.worker).metrics);
        }
        connection
    }

    /// Completes the TLS handshake with a client; `None` if it fails.
    async fn accept<S>(
        &self,
        stream: S,
        arrival: &Arrival,
        deadline: Instant,
    ) -> Option<Accepted<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (listener, peer) = (arrival.listener.address, arrival.client.source);
        let routes = arrival.listener.routes();
        let choose = |name: Option<&str>| {
            let found = match (&arrival.tunnel, name) {
                (Some(tunnel), None) => Some((&tunnel.alias, false)),
                _ => routes.shown(name),
            };
            let alias = found.map(|(alias, _)| alias.config().name.as_str());
            let any = found.is_some_and(|(_, any)| any);
            let asked = Asked { alias, any, name, address: arrival.local.ip() };
            self.serving.load().certificates.find(asked).cloned()
        };
        let spoken = arrival.listener.alias().map(|alias| protocol::accepted_alpn(alias.config()));
        let handshake = self.tls.accept(stream, choose, || routes.served(), spoken.as_deref());
        let shaken = tokio::select! {
            shaken = timeout_at(deadline, handshake) => shaken,
            () = arrival.unused(Instant::now()) => return None,
        };
        match shaken {
            Ok(Ok(accepted)) => Some(accepted),
            // The client changed its mind, as browsers do that connect ahead of time.
            Ok(Err(AcceptError::Handshake(error))) if error.kind() == ErrorKind::UnexpectedEof => {
                tracing::debug!(%listener, %peer, %error, "a client left during its TLS handshake");
                None
            }
            Ok(Err(error)) => {
                if self.failures.begins((listener, error.to_string()), peer.to_string()) {
                    tracing::warn!(%listener, %peer, %error, "client TLS handshake failed");
                }
                None
            }
            Err(_) => {
                tracing::debug!(%listener, %peer, "client TLS handshake timed out (`listener.header_timeout`)");
                None
            }
        }
    }

    /// Logs what became of handshakes, accepts and requests for no alias that failed: to be called every second or so.
    pub fn report_failures(&self) {
        let (refused, others) = (Failures::of_refused(), Failures::of_other_hosts());
        for report in refused.reports().into_iter().chain(others.reports()) {
            let stage = report.kind.as_ref().map(|kind| kind.stage);
            let error = report.kind.as_ref().map_or("various", |kind| kind.error);
            let (failures, seconds) = (report.count, report.lasted.as_secs());
            if report.has_ended {
                tracing::info!(
                    stage,
                    error,
                    failures,
                    seconds,
                    "requests no longer fail for this reason: {}",
                    report.detail,
                );
            } else {
                tracing::info!(
                    stage,
                    error,
                    failures,
                    seconds,
                    "requests still fail; the latest: {}",
                    report.detail,
                );
            }
        }
        for report in self.accept_failures.reports() {
            let (listener, reason) = report.kind.unzip();
            let listener = listener.map(tracing::field::display);
            let reason = reason.as_deref().unwrap_or("various");
            let failures = report.count;
            if report.has_ended {
                tracing::info!(listener, failures, reason, "connections are accepted again");
            } else {
                tracing::warn!(listener, failures, reason, "connections still cannot be accepted");
            }
        }
        for (failures, what) in
            [(&self.failures, "client TLS handshakes"), (&self.header_failures, "PROXY headers")]
        {
            for report in failures.reports() {
                let (listener, reason) = report.kind.unzip();
                let listener = listener.map(tracing::field::display);
                let reason = reason.as_deref().unwrap_or("various");
                let (failures, latest) = (report.count, report.detail);
                if report.has_ended {
                    tracing::info!(
                        listener,
                        failures,
                        reason,
                        "{what} no longer fail for this reason",
                    );
                } else {
                    tracing::warn!(
                        listener,
                        failures,
                        reason,
                        latest_peer = latest,
                        "{what} still fail",
                    );
                }
            }
        }
    }

    /// HTTP/1 requests for the listener's aliases.
    fn requests<S>(
        &self,
        stream: S,
        downstream: Downstream,
        arrival: Box<Arrival>,
    ) -> impl Future<Output = End>
    where
        S: ByteStream + 'static,
    {
        let connection = Http1Connection::new(stream);
        // A block, as an async fn keeps its arguments twice.
        async move {
            let respond = |request, listener| self.respond(request, &downstream, listener);
            match connection.serve(downstream.scheme == "https", self, arrival, respond).await {
                Served::Ended(end) => end,
                // An alias refuses CONNECT.
                Served::Connected(_) => End::Done,
            }
        }
    }

    /// Reads an HTTP/2 client's preface, for which `h2` would wait forever. `None` if it does not arrive in
    /// time.
    async fn preface<S: AsyncRead + Unpin>(
        &self,
        mut stream: S,
        arrival: &Arrival,
        deadline: Instant,
    ) -> Option<Prefixed<S>> {
        let mut preface = [0; HTTP2_PREFACE.len()];
        tokio::select! {
            read = timeout_at(deadline, stream.read_exact(&mut preface)) => read.ok()?.ok()?,
            () = arrival.unused(Instant::now()) => return None,
        };
        // `h2` checks it.
        Some(Prefixed::new(Bytes::copy_from_slice(&preface), stream))
    }

    fn respond(
        &self,
        request: Request<RequestBody>,
        downstream: &Downstream,
        listener: Arc<Listener>,
    ) -> impl Future<Output = Response<forward::Body>> {
        let (mut head, body) = request.into_parts();
        // A block, as an async fn keeps its arguments twice.
        async move { forward::serve(&mut head, body, downstream, listener.routes()).await }
    }

    /// A listener as it is now; one that a reload removed stays as it was.
    fn current(&self, listener: &Arc<Listener>) -> Arc<Listener> {
        let serving = self.serving.load();
        serving.listeners.get(&listener.id).unwrap_or(listener).clone()
    }
}

/// How a connection ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Done,
    /// With a response that the client may not have read yet, and it may still be sending.
    Lingers,
    /// By a failure: the connection must be reset, so that the client does not take this for the end of the data.
    Reset,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::route::Routes;
    use tokio::net::TcpListener;

    /// What each of ten thousand connections costs before it sends anything, and what each request in flight
    /// adds. One careless `let` across an await can double either.
    #[tokio::test]
    async fn futures_keep_their_size() {
        let server = Arc::new(Server {
            serving: ArcSwap::default(),
            tls: ServerTls::new().unwrap(),
            failures: Failures::default(),
            header_failures: Failures::default(),
            accept_failures: Failures::default(),
            drain: Drain::default(),
        });
        let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = socket.local_addr().unwrap();
        let stream = TcpStream::connect(address).await.unwrap();
        let listener = Arc::new(Listener {
            id: ListenerId::unique(),
            address,
            widest: address,
            service: Service::Http(Routes::default()),
            settings: Arc::default(),
            drain: Drain::default(),
        });
        let arrival = Arrival::new(listener, address, address, 0);
        let downstream = server.downstream(&arrival, "http/1.1", "http", None);
        let served = arrival.listener.clone();
        let request = Request::new(RequestBody::empty());
        let request = size_of_val(&server.respond(request, &downstream, served));
        let connection = size_of_val(&server.clone().connection(stream, arrival, Box::new(())));
        assert!(connection <= 1312, "a connection: {connection} bytes");
        assert!(request <= 2560, "a request: {request} bytes");
    }
}
