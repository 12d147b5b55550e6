//! One connection from an application: detected, then served request by request.

mod credentials;
mod http1;
mod http2;
mod patience;
mod proxy;
mod socket;
mod sockets;

use std::{io::ErrorKind, net::SocketAddr, sync::Arc, time::Duration};

use ::http::{Request, Response};
use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    net::TcpStream,
    time::{Instant, timeout_at},
};

pub use credentials::Credentials;
pub use proxy::ForwardProxy;
pub use sockets::{SocketId, SocketUse, Sockets, covers};

use http1::Line;
use socket::{SocketStream, linger};

use crate::{
    body::RequestBody,
    config,
    detect::{DetectError, HTTP2_PREFACE, Protocol, detect},
    drain::Drain,
    forward::{self, Arrival},
    route::Routes,
    socket::{ByteStream, Place, Prefixed},
    telemetry::{DownstreamConnection, Failures},
    tls::{
        Negotiated,
        server::{AcceptError, Accepted, Asked, Certificates, ServerTls},
    },
    upstream::Upstream,
};

/// What every connection is served with.
pub struct Server {
    /// The routes of now.
    pub routes: ArcSwap<Routes>,
    /// The listening sockets.
    pub sockets: ArcSwap<Sockets>,
    /// The listeners' settings.
    pub settings: ArcSwap<config::Listener>,
    /// The forward proxy, where there is one.
    pub proxy: ArcSwapOption<ForwardProxy>,
    /// For those who speak TLS.
    pub tls: ServerTls,
    /// Handshakes that fail, by listener and reason.
    pub failures: Failures<(SocketAddr, String)>,
    /// The same of connections that could not be accepted.
    pub accept_failures: Failures<(SocketAddr, String)>,
    /// The end.
    pub drain: Drain,
}

/// Who is served, and where it came in.
#[derive(Clone, Copy)]
struct Client<'a> {
    entrance: Entrance<'a>,
    peer: SocketAddr,
    local: SocketAddr,
    worker: usize,
}

/// Where a client came in.
#[derive(Clone, Copy)]
enum Entrance<'a> {
    /// A listener, as configured.
    Listener(SocketAddr),
    /// A tunnel to an alias.
    Tunnel(&'a Arc<Upstream>),
}

impl Client<'_> {
    /// Inside of a tunnel, the alias'.
    fn listener(&self) -> SocketAddr {
        match self.entrance {
            Entrance::Listener(listener) => listener,
            Entrance::Tunnel(alias) => Routes::entrance(alias),
        }
    }
}

impl Server {
    /// The listener that a new connection on a socket is of; `None` where it is nobody's any more.
    pub fn listener_of(&self, socket: SocketId, stream: &TcpStream) -> Option<SocketAddr> {
        self.sockets.load().get(&socket)?.listener(stream)
    }

    /// Serves a connection to its end. A tunnel that it becomes may outlast this, and holds its place.
    pub async fn connection(
        self: Arc<Self>,
        stream: TcpStream,
        peer: SocketAddr,
        listener: SocketAddr,
        worker: usize,
        place: Place,
    ) {
        let _guard = self.drain.guard();
        let settings = self.settings.load_full();
        let Some(local) = local_address(&stream, listener) else { return };
        let (mut stream, socket) = SocketStream::new(stream, place);
        // One that is gone already shows that soon enough.
        let _ = socket.watch(self.keepalive(listener));

        let accepted = Instant::now();
        let deadline = accepted + settings.header_timeout;
        let detected = tokio::select! {
            detected = detect(&mut stream, deadline) => detected,
            () = self.drain.unused(accepted) => return,
        };
        let (protocol, prefix) = match detected {
            Ok(detected) => detected,
            Err(DetectError::Silent) => {
                drop(self.counted(listener, worker, "none", false));
                return;
            }
            Err(error) => {
                drop(self.counted(listener, worker, "none", false));
                tracing::debug!(%peer, %listener, %error, "connection given up");
                return;
            }
        };
        let stream = Prefixed::new(prefix, stream);
        let client = Client { entrance: Entrance::Listener(listener), peer, local, worker };
        let proxy = self.proxy.load_full().filter(|proxy| proxy.listen == listener);
        let end = match proxy {
            // Whatever it speaks: HTTP/1 is where it is told that nothing else is spoken here.
            Some(proxy) => Box::pin(self.proxied(&proxy, stream, client, &settings)).await,
            None => self.speak(protocol, stream, client, deadline, &settings).await,
        };
        if end == End::Lingers {
            Box::pin(linger(&socket, &self.drain)).await;
        }
    }

    /// The keep-alive of a listener's connections. Its aliases may share it, and whose requests come is
    /// not known yet: the longest counts.
    fn keepalive(&self, listener: SocketAddr) -> Duration {
        let of_aliases = self.routes.load().keepalive(listener);
        of_aliases.unwrap_or(config::Timeouts::default().keepalive)
    }

    /// Serves what was detected.
    ///
    /// Here and above, what most connections do not come to is boxed: a connection's future has
    /// room for the largest of its branches, for as long as it lives.
    async fn speak<S>(
        self: &Arc<Self>,
        protocol: Protocol,
        stream: S,
        client: Client<'_>,
        deadline: Instant,
        settings: &config::Listener,
    ) -> End
    where
        S: ByteStream + 'static,
    {
        match protocol {
            Protocol::Http1 => {
                let arrival = self.arrival(client, "http/1.1", "http", None);
                self.requests(stream, arrival, settings).await
            }
            Protocol::Http2 => {
                let arrival = self.arrival(client, "h2", "http", None);
                Box::pin(self.http2(stream, arrival, settings)).await
            }
            Protocol::Tls => Box::pin(self.secured(stream, client, deadline, settings)).await,
        }
    }

    /// Serves what is under TLS.
    async fn secured<S>(
        self: &Arc<Self>,
        stream: S,
        client: Client<'_>,
        deadline: Instant,
        settings: &config::Listener,
    ) -> End
    where
        S: ByteStream + 'static,
    {
        match Box::pin(self.accept(stream, client, deadline)).await {
            Some(Accepted { stream, server_name, alpn: Negotiated::Http2 }) => {
                let arrival = self.arrival(client, "h2", "https", server_name);
                match Box::pin(self.preface(stream, deadline)).await {
                    Some(stream) => Box::pin(self.http2(stream, arrival, settings)).await,
                    None => End::Done,
                }
            }
            Some(Accepted { stream, server_name, .. }) => {
                let arrival = self.arrival(client, "http/1.1", "https", server_name);
                Box::pin(self.requests(stream, arrival, settings)).await
            }
            None => {
                drop(self.counted(client.listener(), client.worker, "none", true));
                End::Lingers
            }
        }
    }

    /// What the connection says of its requests. Counts it for as long as the value lives.
    fn arrival(
        &self,
        client: Client<'_>,
        protocol: &'static str,
        scheme: &'static str,
        server_name: Option<String>,
    ) -> Arrival {
        let Client { peer, local, worker, .. } = client;
        let listener = client.listener();
        let connection = Some(self.counted(listener, worker, protocol, scheme == "https"));
        let drain = self.drain.clone();
        Arrival { listener, peer, local, scheme, server_name, worker, drain, connection }
    }

    /// The connection in the metrics.
    fn counted(
        &self,
        listener: SocketAddr,
        worker: usize,
        protocol: &'static str,
        tls: bool,
    ) -> Arc<DownstreamConnection> {
        let connection = Arc::new(DownstreamConnection::new(protocol, tls));
        if let [only] = self.routes.load().upstreams(listener) {
            connection.belongs_to(&only.worker(worker).metrics);
        }
        connection
    }

    /// Shakes hands with an application that speaks TLS; `None` where that fails.
    async fn accept<S>(
        &self,
        stream: S,
        client: Client<'_>,
        deadline: Instant,
    ) -> Option<Accepted<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let (listener, peer) = (client.listener(), client.peer);
        let routes = self.routes.load_full();
        let choose = |certificates: &Certificates, name: Option<&str>| {
            let found = match (client.entrance, name) {
                (Entrance::Tunnel(alias), None) => Some((alias, false)),
                _ => routes.shown(listener, name),
            };
            let alias = found.map(|(alias, _)| alias.config().name.as_str());
            let any = found.is_some_and(|(_, any)| any);
            certificates.find(Asked { alias, any, name, address: client.local.ip() }).cloned()
        };
        let handshake = self.tls.accept(stream, choose, || routes.names(listener));
        let shaken = tokio::select! {
            shaken = timeout_at(deadline, handshake) => shaken,
            () = self.drain.unused(Instant::now()) => return None,
        };
        match shaken {
            Ok(Ok(accepted)) => Some(accepted),
            // It changed its mind, as browsers do that connect ahead of need.
            Ok(Err(AcceptError::Handshake(error))) if error.kind() == ErrorKind::UnexpectedEof => {
                tracing::debug!(%listener, %peer, %error, "a client left during its TLS handshake");
                None
            }
            Ok(Err(error)) => {
                if self.failures.begins((listener, error.to_string()), peer.to_string()) {
                    tracing::warn!(%listener, %peer, %error, "TLS with a client failed");
                }
                None
            }
            Err(_) => {
                tracing::debug!(%listener, %peer, "no TLS within `listener.header_timeout`");
                None
            }
        }
    }

    /// Logs what became of handshakes and accepts that failed: to be called every second or so.
    pub fn report_failures(&self) {
        for report in self.accept_failures.reports() {
            let (listener, reason) = report.kind.unzip();
            let listener = listener.map(tracing::field::display);
            let reason = reason.as_deref().unwrap_or("various");
            let failures = report.count;
            if report.has_ended {
                tracing::info!(listener, failures, reason, "accepting no longer fails");
            } else {
                tracing::warn!(listener, failures, reason, "accepting goes on failing");
            }
        }
        for report in self.failures.reports() {
            let (listener, reason) = report.kind.unzip();
            let listener = listener.map(tracing::field::display);
            let reason = reason.as_deref().unwrap_or("various");
            let (failures, latest) = (report.count, report.detail);
            if report.has_ended {
                tracing::info!(
                    listener,
                    failures,
                    reason,
                    "TLS with clients no longer fails for this reason",
                );
            } else {
                tracing::warn!(
                    listener,
                    failures,
                    reason,
                    latest_peer = latest,
                    "TLS with clients goes on failing",
                );
            }
        }
    }

    /// HTTP/1 requests for the listener's aliases.
    async fn requests<S>(&self, stream: S, arrival: Arrival, settings: &config::Listener) -> End
    where
        S: ByteStream + 'static,
    {
        let line = Line::new(stream);
        let tls = arrival.scheme == "https";
        let answer = |request| self.respond(request, &arrival);
        line.serve(tls, settings, &self.drain, answer).await
    }

    /// Reads an HTTP/2 client's preface: `h2` would wait for it without end. `None` where it does not
    /// come in time.
    async fn preface<S: AsyncRead + Unpin>(
        &self,
        mut stream: S,
        deadline: Instant,
    ) -> Option<Prefixed<S>> {
        let mut preface = [0; HTTP2_PREFACE.len()];
        tokio::select! {
            read = timeout_at(deadline, stream.read_exact(&mut preface)) => read.ok()?.ok()?,
            () = self.drain.unused(Instant::now()) => return None,
        };
        // Whether it is one is for `h2` to say.
        Some(Prefixed::new(Bytes::copy_from_slice(&preface), stream))
    }

    async fn respond(
        &self,
        request: Request<RequestBody>,
        arrival: &Arrival,
    ) -> Response<forward::Body> {
        let routes = self.routes.load_full();
        forward::serve(request, arrival, &routes).await
    }
}

/// How a connection ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    Done,
    /// With a response that the client may not have read yet, while it may still be sending.
    Lingers,
}

/// Where a client came in. The kernel is asked only where the listener does not say it.
fn local_address(stream: &TcpStream, listener: SocketAddr) -> Option<SocketAddr> {
    if listener.ip().is_unspecified() || listener.port() == 0 {
        return stream.local_addr().ok();
    }
    Some(listener)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    /// What each of ten thousand connections costs before it says a word, and what each request
    /// that is under way adds. One careless `let` across an await can double either.
    #[tokio::test]
    async fn futures_keep_their_size() {
        let server = Arc::new(Server {
            routes: ArcSwap::default(),
            sockets: ArcSwap::default(),
            settings: ArcSwap::default(),
            proxy: ArcSwapOption::empty(),
            tls: ServerTls::new().unwrap(),
            failures: Failures::default(),
            accept_failures: Failures::default(),
            drain: Drain::default(),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stream = TcpStream::connect(address).await.unwrap();
        let entrance = Entrance::Listener(address);
        let client = Client { entrance, peer: address, local: address, worker: 0 };
        let arrival = server.arrival(client, "http/1.1", "http", None);
        let routes = Routes::default();
        let request = Request::new(RequestBody::empty());

        let connection =
            size_of_val(&server.clone().connection(stream, address, address, 0, Box::new(())));
        let request = size_of_val(&forward::serve(request, &arrival, &routes));
        assert!(connection <= 2320, "a connection: {connection} bytes");
        assert!(request <= 4864, "a request: {request} bytes");
    }
}
