//! A whole proxy on this machine, requests through it, and how long they take:
//!
//!     cargo bench --bench end_to_end
//!
//! The proxy, a TLS origin and a client share the process and the machine, one request runs at a
//! time, and its time is that of all three. `direct` is the same client at the same origin without
//! the proxy, so that what stands between them is what the proxy adds.

// Its world is made as tests make theirs.
#![allow(clippy::unwrap_used)]

use std::{
    convert::Infallible,
    io,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::Arc,
    thread,
    time::Duration,
};

use bytes::Bytes;
use criterion::{Criterion, SamplingMode, Throughput};
use http::{Request, Response, Version, header::HOST};
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::{
    body::Incoming,
    client::conn::{http1, http2},
    server,
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, pem::PemObject as _},
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    runtime::Builder,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use truename::{
    App,
    config::{Alias, Config, Target, Trust},
    demo::authority::{Authority, LeafOptions},
};

const ALIAS: &str = "webscaler-manual";
const TRUE_NAME: &str = "httpbin.org";

const SMALL: &str = "/small";
const LARGE: &str = "/large";

fn main() {
    let world = World::start();
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_secs(1))
        .measurement_time(Duration::from_secs(5))
        .configure_from_args();
    for (name, way, path, bytes) in [
        ("1 KiB/direct, TLS", Way::Direct, SMALL, 1024),
        ("1 KiB/plaintext in, TLS out", Way::Plaintext, SMALL, 1024),
        ("1 KiB/TLS in, TLS out", Way::Tls, SMALL, 1024),
        ("1 KiB/HTTP2 in, HTTP2 out", Way::Http2, SMALL, 1024),
        ("1 MiB/direct, TLS", Way::Direct, LARGE, 1024 * 1024),
        ("1 MiB/plaintext in, TLS out", Way::Plaintext, LARGE, 1024 * 1024),
        ("1 MiB/TLS in, TLS out", Way::Tls, LARGE, 1024 * 1024),
        ("1 MiB/HTTP2 in, HTTP2 out", Way::Http2, LARGE, 1024 * 1024),
    ] {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let mut client = runtime.block_on(world.client(way));
        // What is measured is a request that was answered, by the version that its name says.
        let (version, length) = runtime.block_on(client.ask(path));
        assert_eq!((version, length), (way.version_at_origin(), bytes), "{name}");

        let mut group = criterion.benchmark_group("a request");
        group.sampling_mode(SamplingMode::Flat).throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(name, |bencher| {
            bencher.iter(|| runtime.block_on(client.ask(path)));
        });
        group.finish();
    }
    criterion.final_summary();
    world.end();
}

/// How requests get to the origin.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Without the proxy.
    Direct,
    /// Plaintext HTTP/1.1 to the proxy.
    Plaintext,
    /// HTTP/1.1 over TLS to the proxy.
    Tls,
    /// HTTP/2 with prior knowledge to the proxy, and HTTP/2 over TLS from there.
    Http2,
}

impl Way {
    fn version_at_origin(self) -> Version {
        if self == Self::Http2 { Version::HTTP_2 } else { Version::HTTP_11 }
    }
}

/// An origin on a thread of its own, and a proxy before it with one worker.
struct World {
    origin: SocketAddr,
    proxy: App,
    /// For the origin's certificate.
    roots: RootCertStore,
    /// For the proxy's.
    local_roots: RootCertStore,
    _folder: tempfile::TempDir,
}

impl World {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::new("truename bench root").unwrap();
        let leaf = authority.issue(&[TRUE_NAME], &[], LeafOptions::default()).unwrap();
        let tls = TlsAcceptor::from(leaf.server_config(&["h2", "http/1.1"]).unwrap());
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))).unwrap();
        let origin = listener.local_addr().unwrap();
        thread::spawn(move || runtime.block_on(serve(listener, tls)));

        let root = folder.path().join("root.pem");
        std::fs::write(&root, authority.root_pem()).unwrap();
        let state = folder.path().join("authority");
        let proxy = App::start(config(origin, &root, &state)).unwrap();
        let local_root = CertificateDer::from_pem_file(state.join("ca.pem")).unwrap();
        let mut local_roots = RootCertStore::empty();
        local_roots.add(local_root).unwrap();
        let roots = Arc::unwrap_or_clone(authority.roots());
        Self { origin, proxy, roots, local_roots, _folder: folder }
    }

    async fn client(&self, way: Way) -> Client {
        let proxy = self.proxy.listeners()[0];
        let address = if way == Way::Direct { self.origin } else { proxy };
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        match way {
            Way::Direct => {
                Client::http1(tls(stream, TRUE_NAME, &self.roots).await, TRUE_NAME).await
            }
            Way::Plaintext => Client::http1(stream, ALIAS).await,
            Way::Tls => Client::http1(tls(stream, ALIAS, &self.local_roots).await, ALIAS).await,
            Way::Http2 => Client::http2(stream).await,
        }
    }

    fn end(self) {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(self.proxy.shutdown());
    }
}

fn config(origin: SocketAddr, root: &Path, state: &Path) -> Config {
    let mut alias = Alias::named(ALIAS);
    alias.listen = vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 0))];
    alias.target = Some(origin.to_string().parse::<Target>().unwrap());
    alias.tls.server_name = Some(TRUE_NAME.to_owned());
    alias.tls.ca = Trust { system: false, webpki: false, files: vec![root.to_owned()] };
    let mut config = Config { aliases: vec![alias], workers: 1, ..Config::default() };
    config.policy.allow_addresses = vec!["127.0.0.0/8".parse().unwrap()];
    config.ca.directory = Some(state.to_owned());
    config.admin.listen = None;
    config.log.access = false;
    config.shutdown_grace = Duration::from_secs(1);
    config
}

async fn tls(
    stream: TcpStream,
    name: &str,
    roots: &RootCertStore,
) -> tokio_rustls::client::TlsStream<TcpStream> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots.clone())
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let name = ServerName::try_from(name.to_owned()).unwrap();
    TlsConnector::from(Arc::new(config)).connect(name, stream).await.unwrap()
}

/// One connection, whose driver runs whenever a request does.
enum Client {
    Http1(http1::SendRequest<Empty<Bytes>>, &'static str),
    Http2(http2::SendRequest<Empty<Bytes>>),
}

impl Client {
    async fn http1<S>(stream: S, host: &'static str) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self::Http1(sender, host)
    }

    async fn http2(stream: TcpStream) -> Self {
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .adaptive_window(true)
            .handshake(TokioIo::new(stream))
            .await
            .unwrap();
        tokio::spawn(connection);
        Self::Http2(sender)
    }

    /// One request, and its answer to the last byte: the version that the origin saw, and the length.
    async fn ask(&mut self, path: &str) -> (Version, usize) {
        let response = match self {
            Self::Http1(sender, host) => {
                sender.ready().await.unwrap();
                let request = Request::get(path).header(HOST, *host).body(Empty::new()).unwrap();
                sender.send_request(request).await.unwrap()
            }
            Self::Http2(sender) => {
                sender.ready().await.unwrap();
                let uri = format!("http://{ALIAS}{path}");
                let request = Request::get(uri).body(Empty::new()).unwrap();
                sender.send_request(request).await.unwrap()
            }
        };
        assert_eq!(response.status(), 200);
        let seen = response.headers()["x-version"].as_bytes();
        let version = if seen == b"HTTP/2.0" { Version::HTTP_2 } else { Version::HTTP_11 };
        let mut body = response.into_body();
        let mut length = 0;
        while let Some(frame) = body.frame().await {
            length += frame.unwrap().into_data().map_or(0, |data| data.len());
        }
        (version, length)
    }
}

/// Answers until the process ends.
async fn serve(listener: TcpListener, tls: TlsAcceptor) -> io::Result<()> {
    let bodies = [(SMALL, 1024), (LARGE, 1024 * 1024)]
        .map(|(path, length)| (path, Bytes::from(vec![b'x'; length])));
    let bodies = Arc::new(bodies);
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let (tls, bodies) = (tls.clone(), bodies.clone());
        tokio::spawn(async move {
            let Ok(stream) = tls.accept(stream).await else { return };
            let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            let answer = service_fn(move |request: Request<Incoming>| {
                let found = bodies.iter().find(|(path, _)| *path == request.uri().path());
                let body = found.map(|(_, body)| body.clone()).unwrap_or_default();
                let version = format!("{:?}", request.version());
                let response = Response::builder().header("x-version", version);
                std::future::ready(Ok::<_, Infallible>(response.body(Full::new(body)).unwrap()))
            });
            // How a connection ends is its client's affair.
            let io = TokioIo::new(stream);
            let _ = if is_http2 {
                server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(io, answer)
                    .await
            } else {
                server::conn::http1::Builder::new().serve_connection(io, answer).await
            };
        });
    }
}
