//! Sends one GET on a new connection, and reports errors as curl does.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::{
    CertificateError, ClientConfig, RootCertStore,
    pki_types::{InvalidDnsNameError, ServerName},
};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    time::{error::Elapsed, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

const DEADLINE: Duration = Duration::from_secs(20);
const MAX_BODY: usize = 1024 * 1024;

/// A response with any status.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The status.
    pub status: StatusCode,
    /// `x-served-by`: the address of the origin that responded.
    pub served_by: Option<String>,
    /// The body; null if it is not JSON.
    pub body: Value,
}

/// `curl -H 'Host: HOST' http://ADDRESS/TARGET`.
pub async fn http(address: SocketAddr, host: &str, target: &str) -> Result<Reply, CurlError> {
    timeout(DEADLINE, async { exchange(dial(address).await?, host, target).await }).await?
}

/// `curl --resolve NAME:PORT:ADDRESS https://NAME/TARGET`: `name` is SNI, verified name and `Host`.
pub async fn https(
    address: SocketAddr,
    name: &str,
    roots: Arc<RootCertStore>,
    target: &str,
) -> Result<Reply, CurlError> {
    timeout(DEADLINE, async {
        exchange(handshake(dial(address).await?, name, roots).await?, name, target).await
    })
    .await?
}

/// `curl --cacert ROOTS --proxy PROXY https://NAME/TARGET`: through CONNECT, with [`https`]
/// inside of it.
pub async fn https_through(
    proxy: SocketAddr,
    name: &str,
    roots: Arc<RootCertStore>,
    target: &str,
) -> Result<Reply, CurlError> {
    timeout(DEADLINE, async {
        let authority = format!("{name}:443");
        let request = Request::connect(&authority).header(header::HOST, &authority);
        let (mut sender, connection) = http1::handshake(TokioIo::new(dial(proxy).await?)).await?;
        tokio::spawn(connection.with_upgrades());
        let mut response = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
        if !response.status().is_success() {
            return Err(CurlError::Tunnel(response.status()));
        }
        let tunnel = TokioIo::new(hyper::upgrade::on(&mut response).await?);
        exchange(handshake(tunnel, name, roots).await?, name, target).await
    })
    .await?
}

pub(super) async fn handshake<S>(
    stream: S,
    name: &str,
    roots: Arc<RootCertStore>,
) -> Result<TlsStream<S>, CurlError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    let server_name = ServerName::try_from(name.to_owned())?;
    let tls = TlsConnector::from(Arc::new(config)).connect(server_name, stream).await;
    tls.map_err(|error| CurlError::of_handshake(error, name))
}

async fn dial(address: SocketAddr) -> Result<TcpStream, CurlError> {
    TcpStream::connect(address).await.map_err(|source| CurlError::Connect { address, source })
}

async fn exchange<S>(stream: S, host: &str, target: &str) -> Result<Reply, CurlError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let request = Request::get(target).header(header::HOST, host).body(Empty::<Bytes>::new())?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Ends with `sender`. Its errors are also errors of the response.
    tokio::spawn(connection);
    let (head, body) = sender.send_request(request).await?.into_parts();
    let body = Limited::new(body, MAX_BODY).collect().await.map_err(CurlError::Body)?;
    let served_by = head.headers.get("x-served-by").and_then(|value| value.to_str().ok());
    Ok(Reply {
        status: head.status,
        served_by: served_by.map(str::to_owned),
        body: serde_json::from_slice(&body.to_bytes()).unwrap_or_default(),
    })
}

/// Why there is no response.
#[derive(Debug, thiserror::Error)]
pub enum CurlError {
    /// The name, the target or the host is not valid in a request.
    #[error("invalid request: {0}")]
    Request(#[from] http::Error),
    /// The name cannot be verified.
    #[error("invalid request: {0}")]
    Name(#[from] InvalidDnsNameError),
    /// The connection was refused.
    #[error("(7) Failed to connect to {address}: {source}")]
    Connect {
        /// The address.
        address: SocketAddr,
        /// The error.
        source: io::Error,
    },
    /// The proxy refused the tunnel.
    #[error("(56) CONNECT tunnel failed, response {0}")]
    Tunnel(StatusCode),
    /// The certificate is for other names.
    #[error(
        "(60) SSL: no alternative certificate subject name matches target host name '{expected}'"
    )]
    NameMismatch {
        /// The name of the URL.
        expected: String,
        /// The names that the certificate is valid for.
        presented: Vec<String>,
    },
    /// The certificate is invalid for another reason.
    #[error("(60) SSL certificate problem: {0}")]
    Certificate(CertificateError),
    /// The TLS handshake failed.
    #[error("(35) TLS connect error: {0}")]
    Handshake(io::Error),
    /// The TLS configuration is invalid.
    #[error("cannot speak TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// An HTTP error.
    #[error("(56) {0}")]
    Http(#[from] hyper::Error),
    /// The body could not be read.
    #[error("(56) the response's body: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    /// A timeout.
    #[error("(28) Operation timed out after 20 s")]
    Timeout(#[from] Elapsed),
}

impl CurlError {
    fn of_handshake(error: io::Error, expected: &str) -> Self {
        let cause = error.get_ref().and_then(|cause| cause.downcast_ref::<rustls::Error>());
        match cause {
            Some(rustls::Error::InvalidCertificate(CertificateError::NotValidForNameContext {
                presented,
                ..
            })) => Self::NameMismatch {
                expected: expected.to_owned(),
                presented: presented.iter().map(|name| plain_name(name)).collect(),
            },
            Some(rustls::Error::InvalidCertificate(other)) => Self::Certificate(other.clone()),
            _ => Self::Handshake(error),
        }
    }
}

/// rustls formats a certificate's names as `DnsName("httpbin.org")`.
fn plain_name(shown: &str) -> String {
    let name = shown.strip_prefix("DnsName(\"").and_then(|rest| rest.strip_suffix("\")"));
    name.unwrap_or(shown).to_owned()
}
