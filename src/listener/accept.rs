//! How a worker accepts on one socket.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use socket2::SockRef;
use tokio::{net::TcpStream, time::sleep};

use super::{Bound, workers::Worker};
use crate::serve::Arrival;

/// Out of descriptors, `accept` fails at once, again and again: then it waits, ever longer.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

impl Worker {
    /// Accepts until the socket is to close. Whoever has come to it by then and is still served waits for a permit by
    /// itself: the kernel resets what is left in the queue of a socket that closes.
    pub(super) async fn accept(self: &Arc<Self>, bound: &Bound) {
        tokio::select! {
            // First: it may have a connection at hand.
            biased;
            () = self.accept_all(bound) => {}
            () = bound.closing() => {}
        }
        while let Some((stream, peer)) = bound.next_waiting() {
            self.serve_in_turn(bound, stream, peer);
        }
        tracing::debug!(address = %bound.configured, "no longer listening");
    }

    async fn accept_all(self: &Arc<Self>, bound: &Bound) {
        let mut back_off = BackOff::new();
        // Each worker's own takes a descriptor, and there may be none left, as for a connection.
        let listener = loop {
            match bound.to_tokio() {
                Ok(listener) => break listener,
                Err(error) => self.accepting_failed(bound, &error, &mut back_off).await,
            }
        };
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    back_off = BackOff::new();
                    // What is over the limit waits in the kernel's backlog, behind this one. A
                    // permit taken before would be kept from other sockets while nobody comes here.
                    let permit = tokio::select! {
                        biased;
                        permit = self.permit() => permit,
                        () = bound.closing() => return self.serve_in_turn(bound, stream, peer),
                    };
                    let Some(permit) = permit else { return };
                    match self.arrival(bound, &stream, peer) {
                        Some(arrival) => self.take(stream, arrival, permit),
                        None => refuse(&stream),
                    }
                }
                Err(error) if is_clients_own(&error) => {}
                Err(error) => self.accepting_failed(bound, &error, &mut back_off).await,
            }
        }
    }

    /// Serves a connection once there is a permit for it.
    fn serve_in_turn(self: &Arc<Self>, bound: &Bound, stream: TcpStream, peer: SocketAddr) {
        let Some(arrival) = self.arrival(bound, &stream, peer) else { return refuse(&stream) };
        let worker = self.clone();
        tokio::spawn(async move {
            if let Some(permit) = worker.permit().await {
                worker.take(stream, arrival, permit);
            }
        });
    }

    /// Says so, where that is new, and waits before the next try.
    async fn accepting_failed(&self, bound: &Bound, error: &io::Error, back_off: &mut BackOff) {
        let listener = bound.configured;
        if self.server.accept_failures.begins((listener, error.to_string()), "") {
            tracing::warn!(%listener, %error, "accepting failed; trying again");
        }
        back_off.wait().await;
    }

    /// What a connection comes to; `None` where nobody listens there any more.
    fn arrival(&self, bound: &Bound, stream: &TcpStream, peer: SocketAddr) -> Option<Box<Arrival>> {
        let serving = self.server.serving.load();
        let listener = serving.listener_of(bound.id, stream)?.clone();
        // The kernel is asked only where the socket does not say it.
        let local = match bound.address.ip().is_unspecified() {
            true => stream.local_addr().ok()?,
            false => bound.address,
        };
        Some(Arrival::new(listener, peer, local, self.index))
    }
}

/// How long to wait before the next try.
struct BackOff(Duration);

impl BackOff {
    fn new() -> Self {
        Self(BACK_OFF.0)
    }

    async fn wait(&mut self) {
        sleep(self.0).await;
        self.0 = (self.0 * 2).min(BACK_OFF.1);
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
