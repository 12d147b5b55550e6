//! Connections to an alias of mail or LDAP: the client speaks TLS from the first byte or not at all, STARTTLS is made
//! with the target, and then bytes are copied both ways. A client that cannot be served is told why.

use std::{io, sync::Arc, time::Duration};

use bytes::BytesMut;
use tokio::time::{Instant, timeout};

use super::{End, Server, dedicated::Dedicated, tcp::begins_with_hello};
use crate::{
    config::TlsIn,
    forward::{Connection, Unconnected, tell},
    protocol::starttls::StartTls,
    stream::{ByteStream, Prefixed, receive},
};

/// How long the request of an LDAP client is waited for that is to be told why it cannot be served: programs show the
/// response to a request, and nothing else.
const REQUEST: Duration = Duration::from_secs(5);

impl Server {
    /// Serves a connection of a client of this protocol.
    pub(super) async fn starttls<S>(
        self: &Arc<Self>,
        protocol: StartTls,
        mut stream: S,
        dedicated: Dedicated,
    ) -> End
    where
        S: ByteStream + 'static,
    {
        let Dedicated { arrival, accepted, downstream, mut connection } = dedicated;
        let alias = connection.alias().clone();
        let config = alias.config();
        let header_timeout = arrival.listener.settings.header_timeout;
        let mut read = BytesMut::new();
        let speaks_tls = match config.tls_in {
            TlsIn::Always => Ok(true),
            TlsIn::Never => Ok(false),
            TlsIn::Auto if config.protocol.server_speaks_first() => Ok(false),
            TlsIn::Auto => tokio::select! {
                speaks_tls = begins_with_hello(&mut stream, &mut read, header_timeout) => speaks_tls,
                () = arrival.unused(accepted) => Err(io::ErrorKind::ConnectionAborted.into()),
            },
        };
        let Ok(speaks_tls) = speaks_tls else {
            connection.left();
            return End::Done;
        };
        downstream.decide(speaks_tls);
        let stream = Prefixed::new(read.freeze(), stream);
        if !speaks_tls {
            return serve(connection, protocol, stream).await;
        }
        let deadline = Instant::now() + header_timeout;
        match Box::pin(self.accept(stream, &arrival, deadline)).await {
            Some(accepted) => serve(connection, protocol, accepted.stream).await,
            None => {
                connection.left();
                End::Lingers
            }
        }
    }
}

/// Connects, and copies bytes both ways.
async fn serve<D: ByteStream>(
    mut connection: Connection,
    protocol: StartTls,
    mut client: D,
) -> End {
    let connected = match connection.admit() {
        Ok(()) => connection.connect(client.socket()).await,
        Err(fault) => Err(Unconnected::Failed(fault)),
    };
    match connected {
        Ok(link) => match connection.carry(client, link).await {
            true => End::Done,
            false => End::Reset,
        },
        Err(Unconnected::Left) => End::Reset,
        Err(Unconnected::Failed(fault)) => {
            let mut sent = BytesMut::new();
            let request = async {
                while protocol.awaits_request(&sent)
                    && matches!(receive(&mut client, &mut sent).await, Ok(1..))
                {}
            };
            let _ = timeout(REQUEST, request).await;
            tell(&mut client, &protocol.refusal(&fault, &sent)).await;
            End::Lingers
        }
    }
}
