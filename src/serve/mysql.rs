//! Connections of MySQL clients. The server speaks first, so that the target is dialled before the client has said
//! anything.

use std::sync::Arc;

use bytes::BytesMut;
use tokio::{task::spawn_blocking, time::timeout};
use tokio_util::either::Either;

use super::{
    End, Server,
    dedicated::Dedicated,
    session::{ClientSide, Session},
    tcp::{CLIENT_HELLO_WAIT, says_hello},
};
use crate::{
    config::{TlsIn, TlsMode},
    forward::{StartError, Starting, Unconnected},
    protocol::mysql::{ClientPackets, ClientTls, RsaKey, Settings, Startup},
    stream::{ByteStream, Prefixed, receive},
    upstream::Link,
};

impl Server {
    /// Serves a connection of a MySQL client.
    pub(super) async fn mysql<S>(self: &Arc<Self>, stream: S, mut dedicated: Dedicated) -> End
    where
        S: ByteStream + 'static,
    {
        // Boxed: a session may live for days, and would keep the room for its start.
        let started = Box::pin(self.start_mysql(stream, &mut dedicated)).await;
        let Dedicated { connection, downstream: _counted, .. } = dedicated;
        match started {
            Ok((client, link, packets)) => {
                match connection.carry_mysql(client, link, packets).await {
                    true => End::Done,
                    false => End::Reset,
                }
            }
            Err(end) => end,
        }
    }

    async fn start_mysql<S>(
        self: &Arc<Self>,
        stream: S,
        dedicated: &mut Dedicated,
    ) -> Result<(Prefixed<ClientSide<S>>, Link, ClientPackets), End>
    where
        S: ByteStream + 'static,
    {
        let Dedicated { arrival, accepted, downstream, connection } = &*dedicated;
        let alias = connection.alias().clone();
        let config = alias.config();
        let target_tls = config.tls.mode != TlsMode::Plaintext;
        let deadline = *accepted + arrival.listener.settings.header_timeout;
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
                    Ok(Ok(0) | Err(_)) => return Err(dedicated.left()),
                    Ok(first) => says_hello(first, &mut stream, &mut early, wait).await,
                    Err(_) => Ok(false),
                };
                match is_direct {
                    Err(_) => return Err(dedicated.left()),
                    Ok(false) => (Either::Left(stream), ClientTls::Required, early),
                    Ok(true) => {
                        downstream.decide(true);
                        let stream = Prefixed::new(early.split().freeze(), stream);
                        match self.accept(stream, arrival, deadline).await {
                            Some(accepted) => {
                                (Either::Right(accepted.stream), ClientTls::Off, early)
                            }
                            None => return Err(dedicated.refused_tls()),
                        }
                    }
                }
            }
        };
        let settings = Settings { client_tls, target_tls, key: key().await };
        let starting = Starting::new(Startup::new(settings), early);
        let mut session = Session::new(self, dedicated, client, starting, deadline);
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
            session.failed(&fault);
            let refusal = session.starting.refusal(&fault);
            session.close(&refusal).await;
            return Err(End::Lingers);
        }
        let (client, mut link, starting, _) = session.begin().await?;
        let (start, from_client, from_target) = starting.into_parts();
        link.session.early = from_target.freeze();
        Ok((Prefixed::new(from_client.freeze(), client), link, start.client_packets()))
    }
}

/// The process' key. It is made once, on a thread that may block.
async fn key() -> Option<Arc<RsaKey>> {
    match RsaKey::at_hand() {
        Some(key) => Some(key),
        None => spawn_blocking(RsaKey::of_process).await.ok().flatten(),
    }
}
