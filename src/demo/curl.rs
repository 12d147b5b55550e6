//! Makes one GET on a connection of its own, as curl does, and says why it failed as curl would.

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

/// An answer, whatever its status.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The status.
    pub status: StatusCode,
    /// `x-served-by`: the address of the origin that answered.
    pub served_by: Option<String>,
    /// The body; null where it is no JSON.
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

/// `curl --cacert ROOTS --proxy PROXY https://NAME/TARGET`: through CONNECT, and all of [`https`]
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
        let mut answer = sender.send_request(request.body(Empty::<Bytes>::new())?).await?;
        if !answer.status().is_success() {
            return Err(CurlError::Tunnel(answer.status()));
        }
        let tunnel = TokioIo::new(hyper::upgrade::on(&mut answer).await?);
        exchange(handshake(tunnel, name, roots).await?, name, target).await
    })
    .await?
}

async fn handshake<S>(
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
    // Ends with `sender`; what goes wrong with it, the response tells.
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

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum CurlError {
    /// The name, the target or the host cannot stand in a request.
    #[error("cannot ask: {0}")]
    Request(#[from] http::Error),
    /// No name to verify.
    #[error("cannot ask: {0}")]
    Name(#[from] InvalidDnsNameError),
    /// Nobody listens.
    #[error("(7) Failed to connect to {address}: {source}")]
    Connect {
        /// Where to.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The proxy opens no tunnel.
    #[error("(56) CONNECT tunnel failed, response {0}")]
    Tunnel(StatusCode),
    /// The certificate is for other names.
    #[error(
        "(60) SSL: no alternative certificate subject name matches target host name '{expected}'"
    )]
    NameMismatch {
        /// The name that was asked for.
        expected: String,
        /// The names that the certificate bears.
        presented: Vec<String>,
    },
    /// The certificate is bad in another way.
    #[error("(60) SSL certificate problem: {0}")]
    Certificate(CertificateError),
    /// The TLS handshake.
    #[error("(35) TLS connect error: {0}")]
    Handshake(io::Error),
    /// The TLS configuration.
    #[error("cannot speak TLS: {0}")]
    Tls(#[from] rustls::Error),
    /// HTTP.
    #[error("(56) {0}")]
    Http(#[from] hyper::Error),
    /// The body.
    #[error("(56) the response's body: {0}")]
    Body(Box<dyn std::error::Error + Send + Sync>),
    /// Too slow.
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

/// rustls shows a certificate's names as `DnsName("httpbin.org")`.
fn plain_name(shown: &str) -> String {
    let name = shown.strip_prefix("DnsName(\"").and_then(|rest| rest.strip_suffix("\")"));
    name.unwrap_or(shown).to_owned()
}
