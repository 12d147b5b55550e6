//! Accepts the connections of one socket, on a worker.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use socket2::SockRef;
use tokio::{net::TcpStream, time::sleep};

use super::{Bound, workers::Worker};
use crate::serve::Arrival;

/// Without descriptors, `accept` fails at once each time. So the next attempt waits, longer each time.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(5), Duration::from_secs(1));

impl Worker {
    /// Accepts until the socket is to close. Connections in its queue are then accepted and wait for a permit
    /// on their own, because the kernel resets what is left in the queue of a socket that closes.
    pub(super) async fn accept(self: &Arc<Self>, bound: &Bound) {
        tokio::select! {
            // This comes first, because it may already have a connection.
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
        // Each worker's listener takes a descriptor, and there may be none left.
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
                    // Connections over the limit wait in the kernel's backlog, behind this one. If the
                    // permit were taken before `accept`, an idle socket would keep it from the others.
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

    /// Logs a new error, and waits before the next attempt.
    async fn accepting_failed(&self, bound: &Bound, error: &io::Error, back_off: &mut BackOff) {
        let listener = bound.configured;
        if self.server.accept_failures.begins((listener, error.to_string()), "") {
            tracing::warn!(%listener, %error, "cannot accept connections; trying again");
        }
        back_off.wait().await;
    }

    /// The details of a connection; `None` if its listener has been removed.
    fn arrival(&self, bound: &Bound, stream: &TcpStream, peer: SocketAddr) -> Option<Box<Arrival>> {
        let serving = self.server.serving.load();
        let listener = serving.listener_of(bound.id, stream)?.clone();
        // The kernel is only asked if the socket's address does not determine it.
        let local = match bound.address.ip().is_unspecified() {
            true => stream.local_addr().ok()?,
            false => bound.address,
        };
        Some(Arrival::new(listener, peer, local, self.index))
    }
}

/// The time before the next attempt.
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

/// Ends a connection to an address without a listener, as if it had been refused.
fn refuse(stream: &TcpStream) {
    let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

/// Whether the connection failed before it was accepted, which is no error of the listener.
fn is_clients_own(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}
