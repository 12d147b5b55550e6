//! How a worker accepts on one socket.

use std::{io, time::Duration};

use socket2::SockRef;
use tokio::{net::TcpStream, time::sleep};

use super::{Bound, workers::Worker};

/// Out of descriptors, `accept` fails at once, again and again: then it waits, ever longer.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

impl Worker {
    /// Accepts until the socket is to close.
    pub(super) async fn accept(&self, bound: &Bound) {
        let address = bound.configured;
        tokio::select! {
            result = self.accept_all(bound) => if let Err(error) = result {
                tracing::error!(%address, %error, "listening has ended");
            },
            () = bound.closing() => tracing::debug!(%address, "no longer listening"),
        }
    }

    async fn accept_all(&self, bound: &Bound) -> io::Result<()> {
        let listener = bound.to_tokio()?;
        let mut back_off = BACK_OFF.0;
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    back_off = BACK_OFF.0;
                    // What is over the limit waits in the kernel's backlog, behind this one. A
                    // permit taken before would be kept from other sockets while nobody comes here.
                    let Some(permit) = self.permit().await else { return Ok(()) };
                    match self.server.listener_of(bound.id, &stream) {
                        Some(listener) => self.take(stream, peer, listener, permit),
                        None => refuse(&stream),
                    }
                }
                Err(error) if is_clients_own(&error) => {}
                Err(error) => {
                    let kind = (bound.configured, error.to_string());
                    if self.server.accept_failures.begins(kind, "") {
                        tracing::warn!(
                            listener = %bound.configured,
                            %error,
                            "accepting failed; trying again",
                        );
                    }
                    sleep(back_off).await;
                    back_off = (back_off * 2).min(BACK_OFF.1);
                }
            }
        }
    }
}

/// Ends a connection that came to an address that is no longer listened on: as if it had been refused.
fn refuse(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// The connection died before it was accepted: nothing is wrong here.
fn is_clients_own(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}
