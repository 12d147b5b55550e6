//! An upstream that is a function from request to response, by HTTP/2 or HTTP/1.1 as ALPN chose:
//! for trailers, streams and whatever httpbin.org does not do.

use std::{convert::Infallible, net::SocketAddr, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, Full, combinators::BoxBody};
use hyper::{body::Incoming, server::conn, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::ServerConfig;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

/// Any body.
pub type Body = BoxBody<Bytes, Infallible>;

/// A running origin; dropping it closes its listener and every connection.
pub struct ServiceOrigin {
    /// Where it listens.
    pub address: SocketAddr,
    _tasks: JoinSet<()>,
}

impl ServiceOrigin {
    /// Responds to every request with the result of `handle`.
    pub fn start<Handle, Run>(listener: TcpListener, tls: Arc<ServerConfig>, handle: Handle) -> Self
    where
        Handle: Fn(Request<Incoming>) -> Run + Clone + Send + Sync + 'static,
        Run: Future<Output = Response<Body>> + Send + 'static,
    {
        let address = listener.local_addr().unwrap();
        let tls = TlsAcceptor::from(tls);
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((tcp, _)) = listener.accept().await {
                connections.spawn(serve(tcp, tls.clone(), handle.clone()));
            }
        });
        Self { address, _tasks: tasks }
    }

    /// Responds to `/stream` with a body whose sending end comes out of the channel, and anything else
    /// with `ok`.
    pub fn streaming(
        listener: TcpListener,
        tls: Arc<ServerConfig>,
    ) -> (Self, mpsc::UnboundedReceiver<StreamSender>) {
        let (streams, started) = mpsc::unbounded_channel();
        let origin = Self::start(listener, tls, move |request| {
            let streams = streams.clone();
            async move {
                if request.uri().path() != "/stream" {
                    return Response::new(whole("ok"));
                }
                let (sender, body) = streamed();
                streams.send(sender).unwrap();
                Response::new(body)
            }
        });
        (origin, started)
    }
}

async fn serve<Handle, Run>(tcp: TcpStream, tls: TlsAcceptor, handle: Handle)
where
    Handle: Fn(Request<Incoming>) -> Run + Clone + Send + 'static,
    Run: Future<Output = Response<Body>> + Send + 'static,
{
    let Ok(stream) = tls.accept(tcp).await else { return };
    let is_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    let io = TokioIo::new(stream);
    let service = service_fn(move |request| {
        let handle = handle.clone();
        async move { Ok::<_, Infallible>(handle(request).await) }
    });
    // What the proxy does to the connection is for the test to say, at the other end.
    if is_h2 {
        conn::http2::Builder::new(TokioExecutor::new()).serve_connection(io, service).await.ok();
    } else {
        let http1 = conn::http1::Builder::new();
        http1.serve_connection(io, service).with_upgrades().await.ok();
    }
}

/// A body that is there at once.
pub fn whole(body: impl Into<Bytes>) -> Body {
    Full::new(body.into()).boxed()
}

/// A body that a test sends bit by bit, and the end of it: dropping the sender ends the body.
pub fn streamed() -> (StreamSender, Body) {
    let (frames, receiver) = mpsc::channel(1);
    (StreamSender { frames }, Streamed { receiver }.boxed())
}

/// The sending end of a streamed body.
#[derive(Clone)]
pub struct StreamSender {
    frames: mpsc::Sender<Frame<Bytes>>,
}

impl StreamSender {
    /// Sends data; false where nobody reads any more.
    pub async fn data(&self, data: impl Into<Bytes>) -> bool {
        self.frames.send(Frame::data(data.into())).await.is_ok()
    }

    /// Sends the trailers.
    pub async fn trailers(&self, trailers: HeaderMap) -> bool {
        self.frames.send(Frame::trailers(trailers)).await.is_ok()
    }

    /// Waits until nobody reads any more: the proxy let go of the request.
    pub async fn closed(&self) {
        super::within("the body's reader to go", self.frames.closed()).await;
    }
}

struct Streamed {
    receiver: mpsc::Receiver<Frame<Bytes>>,
}

impl http_body::Body for Streamed {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.receiver.poll_recv(context).map(|frame| frame.map(Ok))
    }
}
