//! A TCP socket that has an owner beside its byte stream: one who asks the kernel about it, or
//! closes it in the end.

use std::{
    io,
    net::Shutdown,
    task::{Context, Poll, ready},
};

use socket2::SockRef;
use tokio::net::{
    TcpStream,
    tcp::{OwnedReadHalf, OwnedWriteHalf},
};

/// The socket, for writing and for questions. Its bytes are read from the other half.
///
/// tokio's own half reads, because it knows that a read which did not fill its buffer has emptied
/// the kernel's: one that goes through `try_read` asks once more for each read.
#[derive(Debug)]
pub struct Socket(Option<OwnedWriteHalf>);

impl Socket {
    /// The half to read from, and the socket.
    pub fn split(stream: TcpStream) -> (OwnedReadHalf, Self) {
        let (read, write) = stream.into_split();
        (read, Self(Some(write)))
    }

    /// The socket itself.
    pub fn stream(&self) -> &TcpStream {
        match &self.0 {
            Some(half) => half.as_ref(),
            None => unreachable!("taken by drop only"),
        }
    }

    /// Writes as soon as the kernel takes something, with `write`, which must not wait.
    pub fn poll_write(
        &self,
        cx: &mut Context<'_>,
        write: impl Fn(&TcpStream) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        let stream = self.stream();
        loop {
            ready!(stream.poll_write_ready(cx))?;
            match write(stream) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => return Poll::Ready(result),
            }
        }
    }

    /// Says that nothing more will be written. Not that the peer is gone already: others learn that.
    pub fn shutdown(&self) -> io::Result<()> {
        match SockRef::from(self.stream()).shutdown(Shutdown::Write) {
            Err(error) if error.kind() != io::ErrorKind::NotConnected => Err(error),
            _ => Ok(()),
        }
    }
}

impl Drop for Socket {
    /// Closing is left to the kernel: tokio's half would shut down for writing first.
    fn drop(&mut self) {
        if let Some(half) = self.0.take() {
            half.forget();
        }
    }
}
