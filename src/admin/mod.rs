//! The admin listener: health, metrics, status. Served on the control thread, from snapshots.

mod status;

use std::{
    convert::Infallible,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use ::http::{
    HeaderMap, HeaderValue, Method, Request, Response, StatusCode,
    header::{ALLOW, CONTENT_TYPE, HOST, ORIGIN},
    uri::Authority,
};
use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    sync::Semaphore,
    time::{sleep, timeout},
};

use crate::{
    command::{Commands, ReloadError},
    config::{Config, LogLevel},
    listener::Bound,
    telemetry::{Metrics, set_log_level},
    upstream::Upstream,
};

/// Admin connections at once: scrapers and people, no more.
const MAX_CONNECTIONS: usize = 64;
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
const CONNECTION_LIMIT: Duration = Duration::from_secs(300);

/// What the admin listener shows. The control thread replaces it whole.
pub struct Snapshot {
    upstreams: ArcSwap<Vec<Arc<Upstream>>>,
    config: ArcSwapOption<Config>,
    commands: Commands,
    metrics: Metrics,
}

impl Snapshot {
    /// Nothing yet.
    pub fn new(commands: Commands, metrics: Metrics) -> Self {
        Self { upstreams: ArcSwap::default(), config: ArcSwapOption::empty(), commands, metrics }
    }

    /// Shows another configuration at work.
    pub fn update(&self, upstreams: Vec<Arc<Upstream>>, config: Config) {
        self.upstreams.store(Arc::new(upstreams));
        self.config.store(Some(Arc::new(config)));
    }
}

/// Serves until the runtime ends.
pub async fn serve(bound: Bound, snapshot: Arc<Snapshot>) {
    let listener = match bound.into_tokio() {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "the admin listener has ended");
            return;
        }
    };
    let limit = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(permit) = limit.clone().acquire_owned().await else { return };
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "the admin listener could not accept");
                sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let snapshot = snapshot.clone();
        tokio::spawn(async move {
            let service = service_fn(|request| async {
                Ok::<_, Infallible>(answer(request, peer, &snapshot).await)
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            let _ = timeout(CONNECTION_LIMIT, connection).await;
            drop(permit);
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    peer: SocketAddr,
    snapshot: &Snapshot,
) -> Response<Full<Bytes>> {
    let (method, path) = (request.method(), request.uri().path());
    if let Some(reason) = forbidden(method, path, request.headers(), peer.ip()) {
        return text(StatusCode::FORBIDDEN, reason);
    }
    match (method, path) {
        (&Method::GET | &Method::HEAD, "/livez" | "/readyz") => text(StatusCode::OK, "ok\n"),
        (&Method::GET | &Method::HEAD, "/metrics") => metrics(snapshot),
        (&Method::GET | &Method::HEAD, "/status") => {
            json(&status::status(&snapshot.upstreams.load()))
        }
        (&Method::GET | &Method::HEAD, "/config") => match snapshot.config.load_full() {
            Some(config) => json(&config.to_json()),
            None => text(StatusCode::SERVICE_UNAVAILABLE, "no configuration yet\n"),
        },
        (&Method::POST, "/quit") => {
            snapshot.commands.shutdown().await;
            text(StatusCode::OK, "draining\n")
        }
        (&Method::POST, "/reload") => reload(&snapshot.commands).await,
        (&Method::POST, "/log") => log(request.uri().query().unwrap_or_default()),
        (_, "/livez" | "/readyz" | "/metrics" | "/status" | "/config") => only("GET, HEAD"),
        (_, "/quit" | "/reload" | "/log") => only("POST"),
        _ => text(
            StatusCode::NOT_FOUND,
            "GET /livez /readyz /metrics /status /config; POST /quit /reload /log?level=LEVEL\n",
        ),
    }
}

/// Why a request is not for whoever sends it.
fn forbidden(
    method: &Method,
    path: &str,
    headers: &HeaderMap,
    peer: IpAddr,
) -> Option<&'static str> {
    let is_for_all = matches!(path, "/livez" | "/readyz" | "/metrics");
    if !is_for_all && !peer.to_canonical().is_loopback() {
        return Some("answered on loopback only: reach it with `kubectl port-forward`\n");
    }
    if !is_for_all && !headers.get(HOST).is_none_or(is_own_host) {
        return Some("answered by address or as localhost only: another Host is a rebound name\n");
    }
    // A page in a browser can send such a request across origins, but not without this.
    let changes_something = method == Method::POST;
    (changes_something && headers.contains_key(ORIGIN)).then_some("not from a browser\n")
}

/// A page whose name was rebound to loopback still says its own name.
fn is_own_host(host: &HeaderValue) -> bool {
    let Ok(authority) = Authority::try_from(host.as_bytes()) else { return false };
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok()
}

fn metrics(snapshot: &Snapshot) -> Response<Full<Bytes>> {
    let upstreams = snapshot.upstreams.load();
    let mut body = snapshot.metrics.render();
    status::endpoint_metrics(&upstreams, &mut body);
    let mut response = text(StatusCode::OK, body);
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

async fn reload(commands: &Commands) -> Response<Full<Bytes>> {
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

fn only(methods: &'static str) -> Response<Full<Bytes>> {
    let mut response = text(StatusCode::METHOD_NOT_ALLOWED, format!("only {methods}\n"));
    response.headers_mut().insert(ALLOW, HeaderValue::from_static(methods));
    response
}

fn log(query: &str) -> Response<Full<Bytes>> {
    let level = match query.strip_prefix("level=") {
        Some("error") => LogLevel::Error,
        Some("warn") => LogLevel::Warn,
        Some("info") => LogLevel::Info,
        Some("debug") => LogLevel::Debug,
        Some("trace") => LogLevel::Trace,
        _ => {
            let body = "level is one of error, warn, info, debug, trace: POST /log?level=debug\n";
            return text(StatusCode::BAD_REQUEST, body);
        }
    };
    set_log_level(level);
    text(StatusCode::OK, "ok\n")
}

fn json(value: &impl serde::Serialize) -> Response<Full<Bytes>> {
    let mut body = serde_json::to_vec_pretty(value).unwrap_or_default();
    body.push(b'\n');
    let mut response = text(StatusCode::OK, body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_of_a_name_rebound_to_loopback_reads_nothing() {
        let answers = |host: &'static str, path: &str| {
            let headers = HeaderMap::from_iter([(HOST, HeaderValue::from_static(host))]);
            forbidden(&Method::GET, path, &headers, IpAddr::from([127, 0, 0, 1])).is_none()
        };
        for host in ["localhost:9990", "LOCALHOST", "127.0.0.1:9990", "[::1]:9990"] {
            assert!(answers(host, "/status"), "{host}");
        }
        for host in ["attacker.example:9990", "localhost.attacker.example", "", "a b"] {
            assert!(!answers(host, "/status"), "{host}");
            assert!(!answers(host, "/config"), "{host}");
            assert!(answers(host, "/readyz"), "{host}");
        }
    }

    #[test]
    fn from_outside_only_probes_and_metrics_are_answered() {
        let answers = |peer: &str, method: Method, path: &str| {
            forbidden(&method, path, &HeaderMap::new(), peer.parse().unwrap()).is_none()
        };
        for path in ["/livez", "/readyz", "/metrics"] {
            assert!(answers("10.0.0.7", Method::GET, path), "{path}");
        }
        let inner = ["/status", "/config", "/quit", "/reload", "/log", "/", "/livez/../status"];
        for path in inner {
            for peer in ["10.0.0.7", "fd00::7", "::ffff:10.0.0.7"] {
                assert!(!answers(peer, Method::GET, path), "{peer} {path}");
                assert!(!answers(peer, Method::POST, path), "{peer} {path}");
            }
            for peer in ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"] {
                assert!(answers(peer, Method::POST, path), "{peer} {path}");
            }
        }
    }
}
