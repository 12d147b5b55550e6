//! The admin listener: health, metrics, status. Served on the control thread, from snapshots.

mod access;
mod connections;
mod scrape;
mod status;

use std::{
    convert::Infallible,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use ::http::{
    HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE, X_CONTENT_TYPE_OPTIONS},
};
use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::{Either, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::TcpStream,
    sync::{Mutex, MutexGuard},
    task::yield_now,
    time::{Instant, sleep, timeout},
};

use access::Ends;
use connections::{Connections, InUse, Place};
use scrape::Scrape;

use crate::{
    command::{Commands, ReloadError},
    config::{Config, LogLevel},
    listener::Bound,
    telemetry::{Metrics, set_log_level},
    upstream::Alias,
};

/// How often a failure to accept is logged. At the limit of open files, it repeats many times a second.
const FAILURE_REPORTS: Duration = Duration::from_secs(60);
/// The time limit for a request's head, including the idle time before it.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// The size limit of a head, and of a response that is not read.
const MAX_BUFFER: usize = 32 * 1024;
/// The lifetime of a connection. After it, no further request is accepted.
const CONNECTION_LIMIT: Duration = Duration::from_secs(300);
/// The time limit for the response that is then being written.
const LAST_RESPONSE: Duration = Duration::from_secs(10);

/// The data of the admin listener. The control thread replaces it as a whole.
pub struct Snapshot {
    aliases: ArcSwap<Vec<Arc<Alias>>>,
    config: ArcSwapOption<Config>,
    commands: Commands,
    metrics: Metrics,
    turns: Turns,
}

impl Snapshot {
    /// An empty snapshot.
    pub fn new(commands: Commands, metrics: Metrics) -> Self {
        Self {
            aliases: ArcSwap::default(),
            config: ArcSwapOption::empty(),
            commands,
            metrics,
            turns: Turns::default(),
        }
    }

    /// Sets another configuration in use.
    pub fn update(&self, aliases: Vec<Arc<Alias>>, config: Config) {
        self.aliases.store(Arc::new(aliases));
        self.config.store(Some(Arc::new(config)));
    }
}

/// Serialises work that takes milliseconds with thousands of aliases: one caller at a time, with time for
/// probes, DNS and reloads, which share the thread, between two callers.
#[derive(Default)]
struct Turns(Mutex<()>);

impl Turns {
    /// Waits for a turn, which lasts until the guard is dropped.
    async fn next(&self) -> MutexGuard<'_, ()> {
        let turn = self.0.lock().await;
        yield_now().await;
        turn
    }
}

/// Serves until the runtime ends.
pub async fn serve(bound: Bound, snapshot: Arc<Snapshot>) {
    let listener = match bound.to_tokio() {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "the admin listener has failed");
            return;
        }
    };
    let connections = Connections::default();
    let (mut failures, mut reported) = (0_u64, None);
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                failures += 1;
                if reported.is_none_or(|reported: Instant| reported.elapsed() >= FAILURE_REPORTS) {
                    reported = Some(Instant::now());
                    tracing::warn!(failures, %error, "the admin listener could not accept a connection");
                }
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let Ok(local) = stream.local_addr() else { continue };
        let ends = Ends { peer: peer.ip(), local: local.ip() };
        let (place, made_room) = connections.admit(peer.ip());
        tokio::spawn(converse(stream, ends, place, snapshot.clone()));
        if made_room {
            // In a flood, the connection is read before further ones make it close.
            yield_now().await;
        }
    }
}

/// Serves the requests of one connection.
async fn converse(stream: TcpStream, ends: Ends, place: Place, snapshot: Arc<Snapshot>) {
    let service = service_fn(|request| async {
        let in_use = place.in_use();
        let response = respond(request, ends, &snapshot).await;
        Ok::<_, Infallible>(response.map(|body| Held { body, _in_use: in_use }))
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        // A client such as `nc -N` closes its side after the request, and still reads the response.
        .half_close(true)
        .header_read_timeout(HEADER_TIMEOUT)
        .max_buf_size(MAX_BUFFER)
        .serve_connection(TokioIo::new(stream), service);
    let mut connection = pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        () = place.evicted() => return,
        () = sleep(CONNECTION_LIMIT) => connection.as_mut().graceful_shutdown(),
    }
    tokio::select! {
        _ = timeout(LAST_RESPONSE, connection) => {}
        () = place.evicted() => {}
    }
}

/// The contents of a response.
type Content = Either<Full<Bytes>, Scrape>;

/// A response's body. Its connection is in use until it ends.
struct Held {
    body: Content,
    _in_use: InUse,
}

impl HttpBody for Held {
    type Data = Bytes;
    type Error = <Content as HttpBody>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

async fn respond(request: Request<Incoming>, ends: Ends, snapshot: &Snapshot) -> Response<Content> {
    let (head, _) = request.into_parts();
    if let Some(reason) = access::refusal(&head, ends) {
        return text(StatusCode::FORBIDDEN, reason);
    }
    match (&head.method, head.uri.path()) {
        (&Method::GET | &Method::HEAD, "/livez" | "/readyz") => text(StatusCode::OK, "ok\n"),
        (&Method::GET | &Method::HEAD, "/metrics") => metrics(snapshot),
        (&Method::GET | &Method::HEAD, "/status") => {
            let _turn = snapshot.turns.next().await;
            json(&status::status(&snapshot.aliases.load()))
        }
        (&Method::GET | &Method::HEAD, "/config") => {
            let _turn = snapshot.turns.next().await;
            match snapshot.config.load_full() {
                Some(config) => json(&config.to_json()),
                None => text(StatusCode::SERVICE_UNAVAILABLE, "no configuration yet\n"),
            }
        }
        (&Method::POST, "/quit") => {
            snapshot.commands.shutdown().await;
            text(StatusCode::OK, "draining\n")
        }
        (&Method::POST, "/reload") => reload(&snapshot.commands).await,
        (&Method::POST, "/log") => log(head.uri.query().unwrap_or_default()),
        (_, "/livez" | "/readyz" | "/metrics" | "/status" | "/config") => only("GET, HEAD"),
        (_, "/quit" | "/reload" | "/log") => only("POST"),
        _ => text(
            StatusCode::NOT_FOUND,
            "GET /livez /readyz /metrics /status /config; POST /quit /reload /log?level=LEVEL\n",
        ),
    }
}

fn metrics(snapshot: &Snapshot) -> Response<Content> {
    let scrape = Scrape::new(snapshot.metrics.render(), snapshot.aliases.load_full());
    let mut response = text(StatusCode::OK, "");
    *response.body_mut() = Content::Right(scrape);
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

async fn reload(commands: &Commands) -> Response<Content> {
    match commands.reload_file().await {
        Ok(()) => text(StatusCode::OK, "reloaded\n"),
        Err(error) => {
            let status = match error {
                ReloadError::Refused(_) => StatusCode::UNPROCESSABLE_ENTITY,
                ReloadError::NoFile | ReloadError::Ended => StatusCode::CONFLICT,
            };
            text(status, format!("{error}\n"))
        }
    }
}

fn only(methods: &'static str) -> Response<Content> {
    let mut response = text(StatusCode::METHOD_NOT_ALLOWED, format!("only {methods}\n"));
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(methods));
    response
}

fn log(query: &str) -> Response<Content> {
    let level = match query.strip_prefix("level=") {
        Some("error") => LogLevel::Error,
        Some("warn") => LogLevel::Warn,
        Some("info") => LogLevel::Info,
        Some("debug") => LogLevel::Debug,
        Some("trace") => LogLevel::Trace,
        _ => {
            let body = "level must be error, warn, info, debug or trace: POST /log?level=debug\n";
            return text(StatusCode::BAD_REQUEST, body);
        }
    };
    set_log_level(level);
    text(StatusCode::OK, "ok\n")
}

fn json(value: &impl serde::Serialize) -> Response<Content> {
    let mut body = serde_json::to_vec_pretty(value).unwrap_or_default();
    body.push(b'\n');
    let mut response = text(StatusCode::OK, body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Content> {
    let mut response = Response::new(Content::Left(Full::new(body.into())));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    // So that pages of other origins cannot embed it as a script, an image or a frame.
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    let resource_policy = HeaderName::from_static("cross-origin-resource-policy");
    headers.insert(resource_policy, HeaderValue::from_static("same-origin"));
    response
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    #[test]
    fn what_takes_long_is_done_for_one_caller_at_a_time_and_others_come_in_between() {
        let turns = Turns::default();
        let mut cx = Context::from_waker(Waker::noop());
        let (mut one, mut another) = (pin!(turns.next()), pin!(turns.next()));
        assert!(one.as_mut().poll(&mut cx).is_pending(), "others come first");
        assert!(another.as_mut().poll(&mut cx).is_pending());
        let Poll::Ready(turn) = one.as_mut().poll(&mut cx) else { panic!("it has waited") };
        assert!(another.as_mut().poll(&mut cx).is_pending(), "it is one's turn");
        drop(turn);
        assert!(another.as_mut().poll(&mut cx).is_pending(), "others come in between");
        assert!(another.as_mut().poll(&mut cx).is_ready());
    }
}
