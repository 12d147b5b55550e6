//! An application's socket, and a stream with what was read from it before anyone knew what it
//! speaks.

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
    time::timeout,
};

use crate::socket::Socket;

/// How long a client that was refused may go on sending before the connection is reset under it:
/// a reset can take the answer away from it unread.
const LINGER: Duration = Duration::from_secs(1);
const LINGER_BYTES: usize = 1024 * 1024;

/// The byte stream of a socket. The socket itself is shared with whoever closes it in the end.
#[derive(Debug)]
pub struct SocketStream {
    read: OwnedReadHalf,
    socket: Arc<Socket>,
}

impl SocketStream {
    /// Its bytes, and the socket.
    pub fn new(stream: TcpStream) -> (Self, Arc<Socket>) {
        let (read, socket) = Socket::split(stream);
        let socket = Arc::new(socket);
        (Self { read, socket: socket.clone() }, socket)
    }
}

impl AsyncRead for SocketStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.read).poll_read(cx, buf)
    }
}

impl AsyncWrite for SocketStream {
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

/// Lets a refused client read its answer: closes our side, and reads on for a while what it is
/// still sending.
pub async fn linger(socket: &Socket) {
    let _ = socket.shutdown();
    let stream = socket.stream();
    let drain = async {
        let mut scrap = [0; 4096];
        let mut read = 0;
        while read < LINGER_BYTES && stream.readable().await.is_ok() {
            match stream.try_read(&mut scrap) {
                Ok(0) => return,
                Ok(length) => read += length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    };
    let _ = timeout(LINGER, drain).await;
}
