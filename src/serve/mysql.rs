//! Connections of MySQL clients. The server speaks first, so that the target is dialled before the client has said
//! anything.

use std::sync::Arc;

use bytes::BytesMut;
use tokio::{
    task::spawn_blocking,
    time::{Instant, timeout},
};
use tokio_util::either::Either;

use super::{
    Arrival, End, Server,
    session::{ClientSide, Session, left, refused_tls},
    tcp::{CLIENT_HELLO_WAIT, says_hello},
};
use crate::{
    config::{TlsIn, TlsMode},
    forward::{Connection, StartError, Starting, Unconnected},
    protocol::mysql::{ClientTls, RsaKey, Settings, Startup},
    stream::{ByteStream, Prefixed, receive},
    telemetry::DownstreamConnection,
    upstream::Link,
};

impl Server {
    /// Serves a connection of a MySQL client.
    pub(super) async fn mysql<S>(self: &Arc<Self>, stream: S, mut arrival: Box<Arrival>) -> End
    where
        S: ByteStream + 'static,
    {
        let accepted = Instant::now();
        arrival.follow(self);
        let Some(alias) = arrival.listener.alias().cloned() else { return End::Reset };
        let downstream = DownstreamConnection::undecided(alias.config().protocol.word());
        downstream.belongs_to(&alias.worker(arrival.worker).metrics);
        let stopped = self.drain.stopped();
        let (worker, client) = (arrival.worker, &arrival.client);
        let mut connection = Connection::new(&alias, worker, client, accepted, stopped);
        // Boxed: a session may live for days, and would keep the room for its start.
        let started =
            Box::pin(self.start_mysql(stream, &arrival, &downstream, &mut connection)).await;
        match started {
            Ok((client, link)) => match connection.carry_mysql(client, link).await {
                true => End::Done,
                false => End::Reset,
            },
            Err(end) => end,
        }
    }

    async fn start_mysql<S>(
        self: &Arc<Self>,
        stream: S,
        arrival: &Arrival,
        downstream: &DownstreamConnection,
        connection: &mut Connection,
    ) -> Result<(Prefixed<ClientSide<S>>, Link), End>
    where
        S: ByteStream + 'static,
    {
        let config = connection.alias().config();
        let target_tls = config.tls.mode != TlsMode::Plaintext;
        let accepted = Instant::now();
        let deadline = accepted + arrival.listener.settings.header_timeout;
        let (client, client_tls, early) = match config.tls_in {
            TlsIn::Auto | TlsIn::Never => {
                downstream.decide(false);
                (Either::Left(stream), ClientTls::Off, BytesMut::new())
            }
            TlsIn::Always => {
                let mut stream = stream;
                let mut early = BytesMut::new();
                let first = timeout(CLIENT_HELLO_WAIT, receive(&mut stream, &mut early)).await;
                let wait = arrival.listener.settings.header_timeout;
                let is_direct = match first {
                    Ok(Ok(0) | Err(_)) => return Err(left(connection)),
                    Ok(first) => says_hello(first, &mut stream, &mut early, wait).await,
                    Err(_) => Ok(false),
                };
                match is_direct {
                    Err(_) => return Err(left(connection)),
                    Ok(false) => (Either::Left(stream), ClientTls::Required, early),
                    Ok(true) => {
                        downstream.decide(true);
                        let stream = Prefixed::new(early.split().freeze(), stream);
                        match self.accept(stream, arrival, deadline).await {
                            Some(accepted) => {
                                (Either::Right(accepted.stream), ClientTls::Off, early)
                            }
                            None => return Err(refused_tls(connection)),
                        }
                    }
                }
            }
        };
        let settings = Settings { client_tls, target_tls, key: key().await };
        let mut session = Session {
            server: self,
            arrival,
            downstream,
            connection,
            starting: Starting::new(Startup::new(settings), early),
            client: Some(client),
            link: None,
            held: None,
            accepted,
            deadline,
        };
        if let Err(unconnected) = session.connect().await {
            let refusal = match unconnected {
                Unconnected::Failed(fault) => session.starting.refusal(&fault),
                Unconnected::Left => return Err(End::Lingers),
            };
            session.close(&refusal).await;
            return Err(End::Lingers);
        }
        // A reload has changed `tls.mode` meanwhile: nothing goes on as it was configured before.
        if session.link.as_ref().is_some_and(|link| link.awaits_tls() != target_tls) {
            let fault = StartError::Moved.into();
            session.connection.failed(&fault);
            let refusal = session.starting.refusal(&fault);
            session.close(&refusal).await;
            return Err(End::Lingers);
        }
        let (client, mut link, starting, _) = session.begin().await?;
        let (_, from_client, from_target) = starting.into_parts();
        link.session.early = from_target.freeze();
        Ok((Prefixed::new(from_client.freeze(), client), link))
    }
}

/// The process' key. It is made once, on a thread that may block.
async fn key() -> Option<Arc<RsaKey>> {
    match RsaKey::at_hand() {
        Some(key) => Some(key),
        None => spawn_blocking(RsaKey::of_process).await.ok().flatten(),
    }
}
