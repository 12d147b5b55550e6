//! An HTTPS origin that responds like httpbin.org, and records its requests.

use std::{
    collections::VecDeque,
    convert::Infallible,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderValue, Method, Request, Response, StatusCode, Version,
    header::{CONTENT_LENGTH, SERVER},
};
use http_body::{Body, Frame, SizeHint};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use hyper::{body::Incoming, server::conn, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use parking_lot::Mutex;
use rustls::{HandshakeKind, ServerConfig};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;

use super::httpbin::{self, HttpbinBody, HttpbinResponse};

/// Bodies are stored to be echoed. Larger ones get 413.
const MAX_BODY: usize = 1024 * 1024;
/// Connections beyond this limit wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 1024;
/// How many requests [`Origin::visits`] has; the oldest are removed first.
const MAX_VISITS: usize = 4096;
/// The time limit for a handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection without requests is closed after this.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// The pause after an error of `accept`, such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A running origin. Dropping it closes its listener and all connections.
#[derive(Debug)]
pub struct Origin {
    address: SocketAddr,
    ledger: Arc<Ledger>,
    /// The accept loop, which owns the tasks of the connections.
    _tasks: JoinSet<()>,
}

impl Origin {
    /// Binds `address` and serves with `tls`, which has the certificate and the ALPN.
    pub async fn start(address: SocketAddr, tls: Arc<ServerConfig>) -> io::Result<Self> {
        Self::serve(TcpListener::bind(address).await?, tls)
    }

    /// Serves on a bound listener.
    pub fn serve(listener: TcpListener, tls: Arc<ServerConfig>) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let ledger = Arc::new(Ledger::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, tls.into(), ledger.clone()));
        Ok(Self { address, ledger, _tasks: tasks })
    }

    /// Its address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The current totals.
    pub fn counts(&self) -> Counts {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            connections: read(&self.ledger.connections),
            handshakes_failed: read(&self.ledger.handshakes_failed),
            handshakes_resumed: read(&self.ledger.handshakes_resumed),
            requests: read(&self.ledger.requests),
        }
    }

    /// The latest requests, oldest first.
    pub fn visits(&self) -> Vec<Visit> {
        self.ledger.visits.lock().iter().cloned().collect()
    }
}

/// Totals since the origin started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// TCP connections accepted.
    pub connections: u64,
    /// Handshakes that failed or timed out.
    pub handshakes_failed: u64,
    /// Handshakes that resumed a session.
    pub handshakes_resumed: u64,
    /// Responses sent.
    pub requests: u64,
}

/// A request as the origin received it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Visit {
    /// SNI, if there was one.
    pub sni: Option<String>,
    /// `Host`, or `:authority`.
    pub host: Option<String>,
    /// The method.
    pub method: Method,
    /// Path and query, byte for byte.
    pub target: String,
    /// The version of HTTP.
    pub version: Version,
    /// The client's address.
    pub peer: SocketAddr,
}

#[derive(Debug, Default)]
struct Ledger {
    connections: AtomicU64,
    handshakes_failed: AtomicU64,
    handshakes_resumed: AtomicU64,
    requests: AtomicU64,
    visits: Mutex<VecDeque<Visit>>,
}

async fn accept(listener: TcpListener, tls: TlsAcceptor, ledger: Arc<Ledger>) {
    let permits = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    // The permit comes first, so that connections over the limit are not accepted.
    while let Ok(permit) = permits.clone().acquire_owned().await {
        while connections.try_join_next().is_some() {}
        let Ok((tcp, peer)) = listener.accept().await else {
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        ledger.connections.fetch_add(1, Ordering::Relaxed);
        let (tls, ledger) = (tls.clone(), ledger.clone());
        connections.spawn(async move {
            serve_connection(tcp, peer, tls, ledger).await;
            drop(permit);
        });
    }
}

async fn serve_connection(tcp: TcpStream, peer: SocketAddr, tls: TlsAcceptor, ledger: Arc<Ledger>) {
    let (Ok(local), Ok(())) = (tcp.local_addr(), tcp.set_nodelay(true)) else { return };
    let Ok(Ok(stream)) = timeout(HANDSHAKE_TIMEOUT, tls.accept(tcp)).await else {
        ledger.handshakes_failed.fetch_add(1, Ordering::Relaxed);
        return;
    };
    let session = stream.get_ref().1;
    if session.handshake_kind() == Some(HandshakeKind::Resumed) {
        ledger.handshakes_resumed.fetch_add(1, Ordering::Relaxed);
    }
    let is_h2 = session.alpn_protocol() == Some(b"h2");
    let visitor = Arc::new(Visitor {
        sni: session.server_name().map(str::to_owned),
        peer,
        local: local.ip(),
        ledger,
    });
    let service = service_fn(move |request| {
        let visitor = visitor.clone();
        async move { Ok::<_, Infallible>(visitor.visit(request).await) }
    });

    // Errors of a connection are the client's, and are not reported.
    let io = TokioIo::new(stream);
    let _ = if is_h2 {
        conn::http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .keep_alive_interval(IDLE_TIMEOUT)
            .serve_connection(io, service)
            .await
    } else {
        conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(IDLE_TIMEOUT)
            .serve_connection(io, service)
            .await
    };
}

/// The client of a connection.
struct Visitor {
    sni: Option<String>,
    peer: SocketAddr,
    local: IpAddr,
    ledger: Arc<Ledger>,
}

impl Visitor {
    async fn visit(&self, request: Request<Incoming>) -> Response<ResponseBody> {
        let (head, body) = request.into_parts();
        self.note(Visit {
            sni: self.sni.clone(),
            host: httpbin::host(&head.uri, &head.headers).map(str::to_owned),
            method: head.method.clone(),
            target: head.uri.path_and_query().map(|target| target.to_string()).unwrap_or_default(),
            version: head.version,
            peer: self.peer,
        });

        // The deadline is for a client that stops in the middle of its body.
        let body = timeout(IDLE_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await;
        let planned = match body {
            Ok(Ok(body)) => httpbin::respond(&head, &body.to_bytes(), self.peer.ip()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => HttpbinResponse::text(
                StatusCode::PAYLOAD_TOO_LARGE,
                &format!("this origin accepts bodies of at most {MAX_BODY} bytes"),
            ),
            Ok(Err(error)) => HttpbinResponse::text(StatusCode::BAD_REQUEST, &error.to_string()),
            Err(_) => {
                HttpbinResponse::text(StatusCode::REQUEST_TIMEOUT, "timed out reading the body")
            }
        };
        sleep(planned.delay).await;
        self.respond(planned, head.method == Method::HEAD)
    }

    fn note(&self, visit: Visit) {
        let mut visits = self.ledger.visits.lock();
        if visits.len() == MAX_VISITS {
            visits.pop_front();
        }
        visits.push_back(visit);
        self.ledger.requests.fetch_add(1, Ordering::Relaxed);
    }

    fn respond(&self, planned: HttpbinResponse, is_head: bool) -> Response<ResponseBody> {
        let (mut frames, length) = match planned.body {
            HttpbinBody::Whole(body) => (VecDeque::from([body.clone()]), Some(body.len() as u64)),
            HttpbinBody::Streamed(frames) => (frames.into(), None),
        };
        if is_head {
            frames.clear();
        }
        let mut response = Response::new(ResponseBody { frames });
        *response.status_mut() = planned.status;
        let headers = response.headers_mut();
        *headers = planned.headers;
        // RFC 9110, section 8.6: 204 has no Content-Length, and that of 304 would be the length of a 200.
        if let Some(length) = length
            && !matches!(planned.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
        {
            headers.insert(CONTENT_LENGTH, length.into());
        }
        headers.insert(SERVER, HeaderValue::from_static("truename-demo"));
        // An address is always a valid field value.
        if let Ok(local) = HeaderValue::from_str(&self.local.to_string()) {
            headers.insert("x-served-by", local);
        }
        response
    }
}

/// The rest of a response's body, frame by frame.
struct ResponseBody {
    frames: VecDeque<Bytes>,
}

impl Body for ResponseBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.frames.pop_front().map(|frame| Ok(Frame::data(frame))))
    }

    fn is_end_stream(&self) -> bool {
        self.frames.is_empty()
    }

    fn size_hint(&self) -> SizeHint {
        // Without a `Content-Length`, the size is unknown, so that a stream is chunked.
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests;
