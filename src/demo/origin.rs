//! An HTTPS origin that answers as httpbin.org does, and keeps count of what it saw.

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

use super::httpbin::{self, Answer, AnswerBody};

/// Bodies are kept whole to be echoed: larger ones get 413.
const MAX_BODY: usize = 1024 * 1024;
/// Connections past these wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 1024;
/// Requests that [`Origin::visits`] remembers; the oldest go first.
const MAX_VISITS: usize = 4096;
/// A handshake takes longer only when the peer gave up.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection that asks for nothing is closed after this.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
/// For how long accepting pauses after an error such as too many open files.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A running origin; dropping it closes its listener and every connection.
#[derive(Debug)]
pub struct Origin {
    address: SocketAddr,
    ledger: Arc<Ledger>,
    /// Holds the accept loop, whose own set holds the connections: dropping it ends them all.
    _tasks: JoinSet<()>,
}

impl Origin {
    /// Binds `address` and serves there with `tls`; the certificate and the ALPN are its caller's.
    pub async fn start(address: SocketAddr, tls: Arc<ServerConfig>) -> io::Result<Self> {
        Self::serve(TcpListener::bind(address).await?, tls)
    }

    /// Serves on a listener that is bound already.
    pub fn serve(listener: TcpListener, tls: Arc<ServerConfig>) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let ledger = Arc::new(Ledger::default());
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, tls.into(), ledger.clone()));
        Ok(Self { address, ledger, _tasks: tasks })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What happened so far.
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
    /// Handshakes that did not come to an end: refused by either side, or not in time.
    pub handshakes_failed: u64,
    /// Handshakes that resumed an earlier session.
    pub handshakes_resumed: u64,
    /// Requests answered.
    pub requests: u64,
}

/// One request as the origin saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Visit {
    /// The name in the ClientHello, if there was one.
    pub sni: Option<String>,
    /// `Host`, or `:authority`.
    pub host: Option<String>,
    /// The method.
    pub method: Method,
    /// Path and query, byte for byte.
    pub target: String,
    /// The version of HTTP.
    pub version: Version,
    /// Who asked.
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
    // The permit comes first, so that a connection too many is not accepted only to wait here.
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

    // How a connection ends is its client's affair: there is nobody here to tell.
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

/// Who is at the other end of one connection.
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

        // The deadline is for a client that stops in the midst of its body.
        let body = timeout(IDLE_TIMEOUT, Limited::new(body, MAX_BODY).collect()).await;
        let answer = match body {
            Ok(Ok(body)) => httpbin::answer(&head, &body.to_bytes(), self.peer.ip()),
            Ok(Err(error)) if error.is::<LengthLimitError>() => Answer::text(
                StatusCode::PAYLOAD_TOO_LARGE,
                &format!("this origin keeps bodies whole and takes at most {MAX_BODY} bytes"),
            ),
            Ok(Err(error)) => Answer::text(StatusCode::BAD_REQUEST, &error.to_string()),
            Err(_) => Answer::text(StatusCode::REQUEST_TIMEOUT, "the body did not come to its end"),
        };
        sleep(answer.delay).await;
        self.respond(answer, head.method == Method::HEAD)
    }

    fn note(&self, visit: Visit) {
        let mut visits = self.ledger.visits.lock();
        if visits.len() == MAX_VISITS {
            visits.pop_front();
        }
        visits.push_back(visit);
        self.ledger.requests.fetch_add(1, Ordering::Relaxed);
    }

    fn respond(&self, answer: Answer, is_head: bool) -> Response<ResponseBody> {
        let (mut frames, length) = match answer.body {
            AnswerBody::Whole(body) => (VecDeque::from([body.clone()]), Some(body.len() as u64)),
            AnswerBody::Streamed(frames) => (frames.into(), None),
        };
        if is_head {
            frames.clear();
        }
        let mut response = Response::new(ResponseBody { frames });
        *response.status_mut() = answer.status;
        let headers = response.headers_mut();
        *headers = answer.headers;
        // RFC 9110, section 8.6: neither 204 nor 304 says a length that is not a 200's.
        if let Some(length) = length
            && !matches!(answer.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
        {
            headers.insert(CONTENT_LENGTH, length.into());
        }
        headers.insert(SERVER, HeaderValue::from_static("truename-demo"));
        // An address's digits, dots and colons are always a good field value.
        if let Ok(local) = HeaderValue::from_str(&self.local.to_string()) {
            headers.insert("x-served-by", local);
        }
        response
    }
}

/// The one body this origin sends: what is left of it, a frame at a time.
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
        // No more is known than `Content-Length` says, so that a stream stays chunked.
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests;
