//! Connections to an alias of a protocol other than HTTP: each has a connection to the target of its own.

use std::sync::Arc;

use tokio::time::Instant;

use super::{Arrival, End, Server};
use crate::{
    config::Protocol,
    forward::Connection,
    protocol::starttls::StartTls,
    stream::{ByteStream, Socket},
    telemetry::DownstreamConnection,
};

/// Such a connection.
pub(super) struct Dedicated {
    pub arrival: Box<Arrival>,
    pub accepted: Instant,
    pub downstream: DownstreamConnection,
    pub connection: Connection,
}

impl Server {
    /// Serves a connection to the listener of an alias of another protocol, or a CONNECT tunnel to it, on the client's
    /// socket. Unless both sides have closed, it ends in a reset: a failure must not look like the end of the data.
    pub(super) async fn dedicated<S>(
        self: &Arc<Self>,
        stream: S,
        socket: &Socket,
        arrival: Box<Arrival>,
    ) -> End
    where
        S: ByteStream + 'static,
    {
        let mut cut = ResetOnDrop(Some(socket));
        let end = self.alias_connection(stream, arrival).await;
        if end != End::Reset {
            cut.0 = None;
        }
        end
    }

    /// Serves it as its alias' protocol says.
    async fn alias_connection<S>(self: &Arc<Self>, stream: S, arrival: Box<Arrival>) -> End
    where
        S: ByteStream + 'static,
    {
        let Some(dedicated) = self.accepted(arrival) else { return End::Reset };
        let protocol = dedicated.connection.alias().config().protocol;
        // Boxed, all of them: a connection of one protocol would keep the room for those of another.
        match protocol {
            Protocol::Postgres => Box::pin(self.postgres(stream, dedicated)).await,
            Protocol::Mysql => Box::pin(self.mysql(stream, dedicated)).await,
            _ => match StartTls::of(protocol) {
                Some(protocol) => Box::pin(self.starttls(protocol, stream, dedicated)).await,
                None => Box::pin(self.tcp(stream, dedicated)).await,
            },
        }
    }

    /// Begins to serve it, as the listener is configured now. `None` if its alias is gone.
    fn accepted(self: &Arc<Self>, mut arrival: Box<Arrival>) -> Option<Dedicated> {
        let accepted = Instant::now();
        arrival.follow(self);
        let alias = arrival.listener.alias()?;
        let downstream = DownstreamConnection::undecided(alias.config().protocol.word());
        downstream.belongs_to(&alias.worker(arrival.worker).metrics);
        let (worker, client) = (arrival.worker, &arrival.client);
        let stopped = self.drain.stopped();
        let connection = Connection::new(alias, worker, client, accepted, stopped);
        Some(Dedicated { arrival, accepted, downstream, connection })
    }
}

impl Dedicated {
    /// The client left before a session began.
    pub fn left(&mut self) -> End {
        self.connection.left();
        End::Done
    }

    /// The client's TLS handshake failed. It may still have to read the alert.
    pub fn refused_tls(&mut self) -> End {
        self.connection.left();
        End::Lingers
    }
}

/// Makes closing a reset, even if the connection's task is dropped with its worker.
struct ResetOnDrop<'a>(Option<&'a Socket>);

impl Drop for ResetOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(socket) = self.0 {
            socket.reset_on_close();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::client_stream::ClientStream;

    fn size_of_future<A, B, C, F>(_: impl FnOnce(A, B, C) -> F) -> usize {
        size_of::<F>()
    }

    /// What each of ten thousand idle sessions costs beside its TLS.
    #[test]
    fn futures_of_sessions_keep_their_size() {
        type Shared = &'static Arc<Server>;
        let connection = size_of_future(|server: Shared, stream: ClientStream, arrival| {
            server.alias_connection(stream, arrival)
        });
        let postgres = size_of_future(|server: Shared, stream: ClientStream, dedicated| {
            server.postgres(stream, dedicated)
        });
        assert!(connection <= 1024, "a connection of any protocol: {connection} bytes");
        assert!(postgres <= 7424, "a session of PostgreSQL: {postgres} bytes");
    }
}
