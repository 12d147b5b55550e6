//! One end of a connection, whichever: a test's client or a scripted origin.

use std::{io, net::SocketAddr, os::fd::AsFd};

use socket2::{SockRef, Socket};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpStream,
};
use tokio_rustls::{client, server};

use super::{
    message::{Framing, Message, split_field},
    within,
};

/// Bytes both ways.
pub trait Wire: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Wire for T {}

/// More than this in one message is a test that went wrong.
const MAX_MESSAGE: usize = 64 * 1024 * 1024;

/// One end of a connection; dropping it closes without `close_notify`, as a crash would.
pub struct Peer {
    wire: Box<dyn Wire>,
    /// The same socket again, for what no stream of bytes can do.
    socket: Socket,
    unread: Vec<u8>,
    /// The name in the ClientHello; at the client's end, none.
    pub server_name: Option<String>,
    /// The protocol that ALPN chose.
    pub alpn: Option<String>,
}

impl Peer {
    /// An end without TLS.
    pub fn plain(tcp: TcpStream) -> Self {
        let socket = duplicate(&tcp);
        Self { wire: Box::new(tcp), socket, unread: Vec::new(), server_name: None, alpn: None }
    }

    /// The server's end of a TLS connection.
    pub fn tls_server(tls: server::TlsStream<TcpStream>) -> Self {
        let (tcp, session) = tls.get_ref();
        Self {
            socket: duplicate(tcp),
            unread: Vec::new(),
            server_name: session.server_name().map(str::to_owned),
            alpn: session.alpn_protocol().map(|name| String::from_utf8_lossy(name).into_owned()),
            wire: Box::new(tls),
        }
    }

    /// The client's end of a TLS connection.
    pub fn tls_client(tls: client::TlsStream<TcpStream>) -> Self {
        let (tcp, session) = tls.get_ref();
        Self {
            socket: duplicate(tcp),
            unread: Vec::new(),
            server_name: None,
            alpn: session.alpn_protocol().map(|name| String::from_utf8_lossy(name).into_owned()),
            wire: Box::new(tls),
        }
    }

    /// The connection itself, for a protocol of another kind; nothing may have been read ahead.
    pub fn into_wire(self) -> Box<dyn Wire> {
        assert!(self.unread.is_empty(), "read ahead: {:?}", self.unread);
        self.wire
    }

    /// This end's address.
    pub fn address(&self) -> SocketAddr {
        self.socket.local_addr().unwrap().as_socket().unwrap()
    }

    /// Sends exactly these bytes.
    #[track_caller]
    pub fn send(&mut self, bytes: impl AsRef<[u8]>) -> impl Future<Output = ()> {
        let sent = self.try_send(bytes);
        within("room to send", async move { sent.await.unwrap() })
    }

    /// Sends these bytes to a peer that may be gone.
    pub async fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        self.wire.write_all(bytes.as_ref()).await?;
        self.wire.flush().await
    }

    /// The next request; `None` where the connection ends before one begins.
    pub async fn request(&mut self) -> Option<Message> {
        let head = self.head().await?;
        let framing = Framing::of_request(&head);
        Some(self.message(head, framing).await)
    }

    /// The next response, to a GET.
    #[track_caller]
    pub fn response(&mut self) -> impl Future<Output = Message> {
        self.response_to("GET")
    }

    /// The next response, to `method`; 1xx are responses too.
    #[track_caller]
    pub fn response_to(&mut self, method: &str) -> impl Future<Output = Message> {
        within("a response", async move {
            let head = self.head().await.expect("a response, not the connection's end");
            let framing = Framing::of_response(&head, method);
            self.message(head, framing).await
        })
    }

    /// The head alone: the body is left to be read.
    pub async fn head(&mut self) -> Option<String> {
        let end = self.position(b"\r\n\r\n").await?;
        Some(String::from_utf8(self.take(end)).expect("a head in ASCII"))
    }

    /// The next bytes there are, at least one; empty at the end.
    pub async fn some(&mut self) -> Vec<u8> {
        if self.unread.is_empty() {
            self.fill().await.unwrap_or_default();
        }
        std::mem::take(&mut self.unread)
    }

    /// Exactly so many bytes.
    #[track_caller]
    pub fn exactly(&mut self, count: usize) -> impl Future<Output = Vec<u8>> {
        within("bytes", async move {
            while self.unread.len() < count {
                let more = self.fill().await.unwrap();
                assert_ne!(more, 0, "ended after {:?}", String::from_utf8_lossy(&self.unread));
            }
            self.take(count)
        })
    }

    /// Exactly so many bytes, or `None` where the connection ends before.
    pub async fn try_exactly(&mut self, count: usize) -> Option<Vec<u8>> {
        while self.unread.len() < count {
            if self.fill().await.unwrap_or_default() == 0 {
                return None;
            }
        }
        Some(self.take(count))
    }

    /// All bytes until the other end closes.
    #[track_caller]
    pub fn rest(&mut self) -> impl Future<Output = io::Result<Vec<u8>>> {
        within("the end", async move {
            while self.fill().await? != 0 {}
            Ok(std::mem::take(&mut self.unread))
        })
    }

    /// Waits until the other end closes or resets, whatever it sends before.
    #[track_caller]
    pub fn closed(&mut self) -> impl Future<Output = ()> {
        within("the other end to close", self.hold())
    }

    /// The same without a deadline: for an origin that sits there.
    pub async fn hold(&mut self) {
        while self.fill().await.is_ok_and(|count| count != 0) {
            self.unread.clear();
        }
    }

    /// Whether the kernel holds bytes that were not read yet.
    pub fn has_arrived(&self) -> bool {
        let mut byte = [std::mem::MaybeUninit::uninit()];
        self.socket.peek(&mut byte).is_ok_and(|count| count > 0)
    }

    /// Waits until the connection breaks, and reads nothing meanwhile.
    #[track_caller]
    pub fn until_broken(&self) -> impl Future<Output = ()> {
        let socket = &self.socket;
        within("the connection to break", async move {
            while matches!(socket.take_error(), Ok(None)) {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
        })
    }

    /// Says that no more will be sent (TLS close_notify, then FIN); reading goes on.
    pub async fn finish(&mut self) {
        self.wire.shutdown().await.ok();
    }

    /// The same by a FIN alone, as a crash or a careless server would, though there may be TLS.
    pub fn finish_tcp(&self) {
        self.socket.shutdown(std::net::Shutdown::Write).unwrap();
    }

    /// Ends with a RST.
    pub fn reset(self) {
        reset_at_close(&self.socket);
    }

    async fn message(&mut self, head: String, framing: Framing) -> Message {
        let mut message =
            Message { head, body: Vec::new(), framed_body: Vec::new(), trailers: Vec::new() };
        match framing {
            Framing::None => {}
            Framing::Length(length) => {
                message.body = self.exactly(length).await;
                message.framed_body = message.body.clone();
            }
            Framing::Chunked => self.chunks(&mut message).await,
            Framing::Close => {
                message.body = self.rest().await.expect("a body that ends, not a reset");
                message.framed_body = message.body.clone();
            }
        }
        message
    }

    async fn chunks(&mut self, message: &mut Message) {
        loop {
            let line = self.line(message).await;
            let size = line.split(';').next().unwrap_or_default();
            let size = usize::from_str_radix(size, 16)
                .unwrap_or_else(|_| panic!("no chunk size: {line:?}"));
            if size == 0 {
                break;
            }
            let mut chunk = self.exactly(size + 2).await;
            message.framed_body.extend_from_slice(&chunk);
            assert_eq!(chunk.split_off(size), b"\r\n");
            message.body.append(&mut chunk);
        }
        loop {
            let line = self.line(message).await;
            if line.is_empty() {
                return;
            }
            let (name, value) = split_field(&line);
            message.trailers.push((name.to_owned(), value.to_owned()));
        }
    }

    async fn line(&mut self, message: &mut Message) -> String {
        let end = self.position(b"\r\n").await.expect("a line, not the connection's end");
        let mut line = self.take(end);
        message.framed_body.extend_from_slice(&line);
        line.truncate(end - 2);
        String::from_utf8(line).expect("a line in ASCII")
    }

    /// Reads until `pattern` has come: how many bytes there are up to its end.
    async fn position(&mut self, pattern: &[u8]) -> Option<usize> {
        loop {
            let found = self.unread.windows(pattern.len()).position(|window| window == pattern);
            if let Some(start) = found {
                return Some(start + pattern.len());
            }
            if self.fill().await.unwrap_or_default() == 0 {
                let unread = String::from_utf8_lossy(&self.unread);
                assert!(unread.is_empty(), "ended within a message: {unread:?}");
                return None;
            }
        }
    }

    fn take(&mut self, count: usize) -> Vec<u8> {
        let rest = self.unread.split_off(count);
        std::mem::replace(&mut self.unread, rest)
    }

    async fn fill(&mut self) -> io::Result<usize> {
        assert!(self.unread.len() < MAX_MESSAGE, "a message without an end");
        self.wire.read_buf(&mut self.unread).await
    }
}

/// Makes the next close a RST: zero is how long it lingers for what is not sent yet.
pub fn reset_at_close(socket: &impl AsFd) {
    SockRef::from(socket).set_linger(Some(std::time::Duration::ZERO)).unwrap();
}

fn duplicate(tcp: &TcpStream) -> Socket {
    SockRef::from(tcp).try_clone().unwrap()
}
