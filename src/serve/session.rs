//! Connections to an alias whose protocol has a conversation before its session: the start is run over both sides,
//! with the dial and the client's TLS where it asks for them.

use std::{sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use tokio::time::{Instant, timeout_at};
use tokio_util::either::Either;

use super::{Arrival, End, Server};
use crate::{
    config::TlsIn,
    fault::Fault,
    forward::{Begun, Connection, Ended, StartError, Starting, Turn, Unconnected, close, tell},
    protocol::{
        Side, Start,
        postgres::{CancelKey, ClientTls, HeldKey, Settings, Startup},
    },
    stream::{ByteStream, Prefixed, receive},
    telemetry::DownstreamConnection,
    tls::server::TlsStream,
    upstream::{Holder, Link},
};

/// How long a session may take to begin, once there is a connection to the target: PostgreSQL's
/// `authentication_timeout`, and a little more, so that it is the server that gives up first.
const LOGIN: Duration = Duration::from_secs(65);

/// The first byte of a TLS handshake.
const TLS_HANDSHAKE: u8 = 0x16;

/// The client's side of a session, whose TLS may begin later.
pub(super) type ClientSide<S> = Either<S, Box<TlsStream<Prefixed<S>>>>;

/// What a session goes on with.
pub(super) type Started<S, P> = (ClientSide<S>, Link, Starting<P>, Option<HeldKey<Holder>>);

/// A session that has not begun.
pub(super) struct Session<'a, S, P> {
    pub(super) server: &'a Arc<Server>,
    pub(super) arrival: &'a Arrival,
    pub(super) downstream: &'a DownstreamConnection,
    pub(super) connection: &'a mut Connection,
    pub(super) starting: Starting<P>,
    pub(super) client: Option<ClientSide<S>>,
    pub(super) link: Option<Link>,
    /// By which the session can be cancelled, once it is about to begin.
    pub(super) held: Option<HeldKey<Holder>>,
    pub(super) accepted: Instant,
    pub(super) deadline: Instant,
}

impl Server {
    /// Serves a connection of a PostgreSQL client.
    pub(super) async fn postgres<S>(self: &Arc<Self>, stream: S, mut arrival: Box<Arrival>) -> End
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
            Box::pin(self.start_postgres(stream, &arrival, &downstream, &mut connection)).await;
        let (client, link, begun) = match started {
            Ok(started) => started,
            Err(end) => return end,
        };
        match connection.converse(client, link, begun, arrival.ending()).await {
            Ended::Closed => End::Lingers,
            Ended::Broken => End::Reset,
        }
    }

    async fn start_postgres<S>(
        self: &Arc<Self>,
        mut stream: S,
        arrival: &Arrival,
        downstream: &DownstreamConnection,
        connection: &mut Connection,
    ) -> Result<(ClientSide<S>, Link, Begun), End>
    where
        S: ByteStream + 'static,
    {
        let accepted = Instant::now();
        let deadline = accepted + arrival.listener.settings.header_timeout;
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
            () = arrival.unused(accepted) => return Err(left(connection)),
        };
        // Whoever connects and leaves has looked whether somebody listens.
        if !matches!(first, Ok(Ok(1..))) {
            return Err(left(connection));
        }
        let is_direct = client_tls != ClientTls::Off && early.first() == Some(&TLS_HANDSHAKE);
        let client = if is_direct {
            downstream.decide(true);
            let stream = Prefixed::new(early.split().freeze(), stream);
            match self.accept(stream, arrival, deadline).await {
                Some(accepted) => Either::Right(accepted.stream),
                None => return Err(refused_tls(connection)),
            }
        } else {
            Either::Left(stream)
        };
        let (role, channel_binding) = (config.postgres.role, config.postgres.channel_binding);
        let start = Startup::new(Settings { role, channel_binding, client_tls }, is_direct);
        let session = Session {
            server: self,
            arrival,
            downstream,
            connection,
            starting: Starting::new(start, early),
            client: Some(client),
            link: None,
            held: None,
            accepted,
            deadline,
        };
        let (client, link, starting, held) = session.begin().await?;
        let begun = Begun::from_start(starting, held).ok_or(End::Reset)?;
        Ok((client, link, begun))
    }
}

impl<S: ByteStream + 'static, P: Start> Session<'_, S, P> {
    /// Runs the start. If no session comes of it, both sides have been told, and only the client's connection is
    /// still to be closed.
    pub(super) async fn begin(mut self) -> Result<Started<S, P>, End> {
        let refusal = loop {
            match self.turn().await {
                Ok(Turn::StartTls) => {
                    if let Err(end) = self.secure().await {
                        self.close(&[]).await;
                        return Err(end);
                    }
                }
                Ok(Turn::Dial) => match self.dial().await {
                    Ok(()) => {}
                    Err(Unconnected::Failed(fault)) => break self.starting.refusal(&fault),
                    Err(Unconnected::Left) => break Bytes::new(),
                },
                Ok(Turn::DialHolder(key)) => {
                    // Whether there is one is not said: nobody reads what comes in response to a CancelRequest.
                    if !self.dial_holder(&key).await {
                        break Bytes::new();
                    }
                }
                Ok(Turn::StartTargetTls) => {
                    if let Err(fault) = self.secure_target().await {
                        break self.starting.refusal(&fault);
                    }
                }
                Ok(Turn::HoldKey(key)) => self.hold(key),
                Ok(Turn::Established) => {
                    self.connection.sent(self.starting.sent());
                    self.mark_role();
                    let (Some(client), Some(link)) = (self.client, self.link) else {
                        return Err(End::Reset);
                    };
                    return Ok((client, link, self.starting, self.held));
                }
                Ok(Turn::Close) => {
                    self.connection.ended_by(self.starting.ended().unwrap_or(Side::Client));
                    break Bytes::new();
                }
                Err(Stop::Fault(fault)) => {
                    self.connection.failed(&fault);
                    break self.starting.refusal(&fault);
                }
                Err(Stop::Left) => {
                    self.connection.left();
                    break Bytes::new();
                }
            }
        };
        self.close(&refusal).await;
        Err(End::Lingers)
    }

    /// Ends both connections without a session.
    pub(super) async fn close(&mut self, refusal: &[u8]) {
        self.connection.sent(self.starting.sent());
        // Before the client is told, and comes again.
        self.mark_role();
        if let Some(client) = &mut self.client {
            tell(client, refusal).await;
        }
        if let Some(link) = self.link.take() {
            let (mut stream, in_use) = link.into_stream();
            if close(&mut stream, &self.starting.farewell()).await {
                in_use.ended();
            }
        }
    }

    /// Notes the role that the server has shown, for whoever chooses an endpoint next.
    fn mark_role(&self) {
        if let (Some(link), Some(role)) = (&self.link, self.starting.server_role()) {
            link.mark_role(role);
        }
    }

    /// The next thing to do.
    async fn turn(&mut self) -> Result<Turn, Stop> {
        let stopped = self.server.drain.stopped();
        let moved = self.link.as_ref().map(|link| link.cut());
        let has_link = self.link.is_some();
        loop {
            let (deadline, limit) = self.limit();
            let Some(client) = &mut self.client else { return Err(Stop::Left) };
            let target = self.link.as_mut().map(|link| &mut link.session.stream);
            let cut = async {
                match &moved {
                    Some(moved) => moved.cancelled().await,
                    None => std::future::pending().await,
                }
            };
            let turn = tokio::select! {
                biased;
                () = stopped.cancelled() => return Err(Stop::Left),
                () = cut => return Err(Stop::Fault(StartError::Moved.into())),
                turn = timeout_at(deadline, self.starting.next(client, target)) => turn,
                () = self.arrival.unused(self.accepted), if !has_link => return Err(Stop::Left),
            };
            match (turn, limit) {
                (Ok(turn), _) => return turn.map_err(Stop::Fault),
                // It may have done what the limit was for.
                (Err(_), Some(_)) if self.limit().1.is_none() => {}
                (Err(_), Some(limit)) => return Err(Stop::Fault(StartError::Silent(limit).into())),
                (Err(_), None) if has_link => {
                    return Err(Stop::Fault(StartError::Late(LOGIN).into()));
                }
                (Err(_), None) => return Err(Stop::Left),
            }
        }
    }

    /// Makes TLS with the client.
    async fn secure(&mut self) -> Result<(), End> {
        self.decide(true);
        let Some(Either::Left(stream)) = self.client.take() else { return Err(End::Reset) };
        let stream = Prefixed::new(self.starting.take_from_client(), stream);
        let (deadline, _) = self.limit();
        match self.server.accept(stream, self.arrival, deadline).await {
            Some(accepted) => {
                self.client = Some(Either::Right(accepted.stream));
                self.starting.secured();
                Ok(())
            }
            None => Err(refused_tls(self.connection)),
        }
    }

    async fn dial(&mut self) -> Result<(), Unconnected> {
        self.decide(false);
        self.connect().await
    }

    pub(super) async fn connect(&mut self) -> Result<(), Unconnected> {
        self.connection.admit().map_err(Unconnected::Failed)?;
        let client = self.client.as_ref().and_then(ByteStream::socket);
        let link = self.connection.connect(client).await?;
        self.dialled(link);
        Ok(())
    }

    fn dialled(&mut self, mut link: Link) {
        self.starting.received(&std::mem::take(&mut link.session.early));
        self.link = Some(link);
        self.starting.dialled();
        self.deadline = Instant::now() + LOGIN;
    }

    /// Makes TLS with the target.
    async fn secure_target(&mut self) -> Result<(), Fault> {
        if let Some(link) = self.link.take() {
            self.link = Some(self.connection.secure(link).await?);
        }
        self.starting.target_secured();
        Ok(())
    }

    /// Until when it may take, and the limit that the client has, if it has one of its own.
    fn limit(&self) -> (Instant, Option<Duration>) {
        match self.starting.start().client_limit() {
            Some(limit) if self.link.is_some() => {
                let dialled = self.deadline - LOGIN;
                (self.deadline.min(dialled + limit), Some(limit))
            }
            _ => (self.deadline, None),
        }
    }

    async fn dial_holder(&mut self, key: &CancelKey) -> bool {
        let Some(holder) = self.connection.alias().cancel_keys().holder(key) else {
            self.connection.left();
            return false;
        };
        match self.connection.connect_to(&holder).await {
            Ok(link) => self.dialled(link),
            Err(_) => return false,
        }
        true
    }

    fn hold(&mut self, key: CancelKey) {
        if let Some(link) = &self.link {
            self.held = self.connection.alias().cancel_keys().hold(key, link.holder());
        }
    }

    /// Says whether the client speaks TLS, unless that is known.
    fn decide(&self, tls: bool) {
        let tls = tls || matches!(self.client, Some(Either::Right(_)));
        self.downstream.decide(tls);
    }
}

/// Why a start does not go on.
enum Stop {
    Fault(Fault),
    /// The client has left, or has not come to anything in time.
    Left,
}

pub(super) fn left(connection: &mut Connection) -> End {
    connection.left();
    End::Done
}

pub(super) fn refused_tls(connection: &mut Connection) -> End {
    connection.left();
    End::Lingers
}
