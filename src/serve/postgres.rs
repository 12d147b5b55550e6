//! Connections of PostgreSQL clients.

use std::sync::Arc;

use bytes::BytesMut;
use tokio::time::timeout_at;
use tokio_util::either::Either;

use super::{
    End, Server,
    dedicated::Dedicated,
    session::{ClientSide, Session},
};
use crate::{
    config::TlsIn,
    forward::{Begun, Ended, Starting},
    protocol::postgres::{ClientTls, Settings, Startup},
    stream::{ByteStream, Prefixed, receive},
    upstream::Link,
};

/// The first byte of a TLS handshake.
const TLS_HANDSHAKE: u8 = 0x16;

impl Server {
    /// Serves a connection of a PostgreSQL client.
    pub(super) async fn postgres<S>(self: &Arc<Self>, stream: S, mut dedicated: Dedicated) -> End
    where
        S: ByteStream + 'static,
    {
        // Boxed: a session may live for days, and would keep the room for its start.
        let started = Box::pin(self.start_postgres(stream, &mut dedicated)).await;
        let (client, link, begun) = match started {
            Ok(started) => started,
            Err(end) => return end,
        };
        let Dedicated { arrival, connection, downstream: _counted, .. } = dedicated;
        match connection.converse(client, link, begun, arrival.ending()).await {
            Ended::Closed => End::Lingers,
            Ended::Broken => End::Reset,
        }
    }

    async fn start_postgres<S>(
        self: &Arc<Self>,
        mut stream: S,
        dedicated: &mut Dedicated,
    ) -> Result<(ClientSide<S>, Link, Begun), End>
    where
        S: ByteStream + 'static,
    {
        let Dedicated { arrival, accepted, downstream, connection } = &*dedicated;
        let deadline = *accepted + arrival.listener.settings.header_timeout;
        let alias = connection.alias().clone();
        let config = alias.config();
        let client_tls = match config.tls_in {
            TlsIn::Auto => ClientTls::Offered,
            TlsIn::Always => ClientTls::Required,
            TlsIn::Never => ClientTls::Off,
        };
        let mut early = BytesMut::new();
        let first = tokio::select! {
            first = timeout_at(deadline, receive(&mut stream, &mut early)) => first,
            () = arrival.unused(*accepted) => return Err(dedicated.left()),
        };
        // A client that connects and leaves is a probe of the port.
        if !matches!(first, Ok(Ok(1..))) {
            return Err(dedicated.left());
        }
        let is_direct = client_tls != ClientTls::Off && early.first() == Some(&TLS_HANDSHAKE);
        let client = if is_direct {
            downstream.decide(true);
            let stream = Prefixed::new(early.split().freeze(), stream);
            match self.accept(stream, arrival, deadline).await {
                Some(accepted) => Either::Right(accepted.stream),
                None => return Err(dedicated.refused_tls()),
            }
        } else {
            Either::Left(stream)
        };
        let (role, channel_binding) = (config.postgres.role, config.postgres.channel_binding);
        let start = Startup::new(Settings { role, channel_binding, client_tls }, is_direct);
        let starting = Starting::new(start, early);
        let session = Session::new(self, dedicated, client, starting, deadline);
        let (client, link, starting, held) = session.begin().await?;
        let begun = Begun::from_start(starting, held).ok_or(End::Reset)?;
        Ok((client, link, begun))
    }
}
