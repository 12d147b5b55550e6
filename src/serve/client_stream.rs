//! The byte stream of a client's socket, and the lingering close.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, tcp::OwnedReadHalf},
    time::{sleep, timeout},
};

use crate::{
    drain::Drain,
    stream::{ByteStream, Place, Socket},
};

/// How long, and how much, a client may continue to send after the last response before its connection is
/// reset: a reset can make the client lose a response that it has not read (RFC 9112 §9.6). Many clients
/// send a whole body before they read the response.
const LINGER: Duration = Duration::from_secs(30);
const LINGER_BYTES: usize = 256 * 1024 * 1024;

/// How long it may be silent during that time.
const LINGER_SILENCE: Duration = Duration::from_secs(5);

/// How long a draining proxy waits for such clients.
const LINGER_DRAINING: Duration = Duration::from_secs(1);

/// How much is discarded at once.
const SCRAP: usize = 16 * 1024;

/// The byte stream of a client's socket. The socket itself is shared with the code that closes it.
#[derive(Debug)]
pub struct ClientStream {
    read: OwnedReadHalf,
    socket: Arc<Socket>,
}

impl ClientStream {
    /// The stream, and the socket, which holds `place` until it closes.
    pub fn new(stream: TcpStream, place: Place) -> (Self, Arc<Socket>) {
        let (read, mut socket) = Socket::split(stream);
        socket.hold(place);
        let socket = Arc::new(socket);
        (Self { read, socket: socket.clone() }, socket)
    }
}

impl AsyncRead for ClientStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.read).poll_read(cx, buf)
    }
}

impl AsyncWrite for ClientStream {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.socket.poll_write(cx, |stream| stream.try_write(buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.socket.poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.socket.shutdown())
    }
}

impl ByteStream for ClientStream {
    fn socket(&self) -> Option<&Socket> {
        Some(&self.socket)
    }
}

/// Lets a client read its last response: closes our side, and for a while discards what the client still
/// sends.
pub async fn linger(socket: &Socket, drain: &Drain) {
    let _ = socket.shutdown();
    tokio::select! {
        _ = timeout(LINGER, discard(socket.stream())) => {}
        () = async {
            drain.begun().await;
            sleep(LINGER_DRAINING).await;
        } => {}
    }
}

/// Discards input until the client closes, is silent, or has sent too much.
async fn discard(stream: &TcpStream) {
    let mut left = LINGER_BYTES;
    while left > 0
        && let Ok(Ok(())) = timeout(LINGER_SILENCE, stream.readable()).await
    {
        let mut scrap = [0; SCRAP];
        match stream.try_read(&mut scrap) {
            Ok(0) => return,
            Ok(length) => left = left.saturating_sub(length),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}
