//! The application's side.

use std::{io, net::SocketAddr, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, Request, response};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::{ClientConfig, RootCertStore, pki_types::ServerName};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{message::Message, peer::Peer, within};

/// Connects in the clear.
#[track_caller]
pub fn connect(address: SocketAddr) -> impl Future<Output = Peer> {
    within("a connection", async move { Peer::plain(dial(address).await) })
}

/// Connects with TLS and verifies `name`; the error is rustls', wrapped.
#[track_caller]
pub fn connect_tls(
    address: SocketAddr,
    name: &str,
    roots: Arc<RootCertStore>,
    alpn: &[&str],
) -> impl Future<Output = io::Result<Peer>> {
    within(
        "a TLS connection",
        async move { handshake(dial(address).await, name, roots, alpn).await },
    )
}

/// Shakes hands on a connection that is there.
#[track_caller]
pub fn handshake(
    tcp: TcpStream,
    name: &str,
    roots: Arc<RootCertStore>,
    alpn: &[&str],
) -> impl Future<Output = io::Result<Peer>> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    within("a handshake", async move {
        let tls = TlsConnector::from(Arc::new(config)).connect(name, tcp).await;
        tls.map(Peer::tls_client)
    })
}

/// A GET on a connection of its own, which closes after.
#[track_caller]
pub fn get(address: SocketAddr, host: &str, target: &str) -> impl Future<Output = Message> {
    let request = format!("GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
    within("a response", async move {
        let mut peer = connect(address).await;
        peer.send(request).await;
        peer.response().await
    })
}

/// An HTTP/2 connection.
#[derive(Clone)]
pub struct H2 {
    sender: http2::SendRequest<Full<Bytes>>,
}

/// A whole HTTP/2 response.
#[derive(Clone, Debug)]
pub struct H2Response {
    /// Status and header fields.
    pub head: response::Parts,
    /// All data.
    pub body: Bytes,
    /// The fields after the data.
    pub trailers: Option<HeaderMap>,
}

impl H2 {
    /// In the clear, by prior knowledge.
    #[track_caller]
    pub fn connect(address: SocketAddr) -> impl Future<Output = Self> {
        within("an HTTP/2 connection", async move { Self::over(connect(address).await).await })
    }

    /// Over a connection that is there, such as a TLS one whose ALPN chose `h2`.
    pub async fn over(peer: Peer) -> Self {
        let io = TokioIo::new(peer.into_wire());
        let (sender, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
        tokio::spawn(connection);
        Self { sender }
    }

    /// Sends a request (the URI's authority is `:authority`) and reads the response whole.
    #[track_caller]
    pub fn send(
        &mut self,
        request: Request<Full<Bytes>>,
    ) -> impl Future<Output = hyper::Result<H2Response>> {
        within("an HTTP/2 response", async move {
            self.sender.ready().await?;
            let (head, body) = self.sender.send_request(request).await?.into_parts();
            let body = body.collect().await?;
            let trailers = body.trailers().cloned();
            Ok(H2Response { head, body: body.to_bytes(), trailers })
        })
    }

    /// A GET of a whole `http://authority/path`.
    #[track_caller]
    pub fn get(&mut self, uri: &str) -> impl Future<Output = hyper::Result<H2Response>> {
        self.send(Request::get(uri).body(Full::default()).unwrap())
    }
}

async fn dial(address: SocketAddr) -> TcpStream {
    let tcp = TcpStream::connect(address).await;
    let tcp = tcp.unwrap_or_else(|error| panic!("cannot connect to {address}: {error}"));
    tcp.set_nodelay(true).unwrap();
    tcp
}
