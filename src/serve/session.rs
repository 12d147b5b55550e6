//! Connections to an alias whose protocol has a conversation before its session: the start is run over both sides,
//! with the dial and the client's TLS where it asks for them.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::either::Either;

use super::{End, Server, dedicated::Dedicated};
use crate::{
    fault::Fault,
    forward::{StartError, Starting, Turn, Unconnected, close, tell},
    protocol::{
        Side, Start,
        postgres::{CancelKey, HeldKey},
    },
    stream::{ByteStream, Prefixed},
    tls::server::TlsStream,
    upstream::{Holder, Link},
};

/// How long a session may take to begin, once there is a connection to the target: PostgreSQL's
/// `authentication_timeout`, and a little more, so that it is the server that gives up first.
const LOGIN: Duration = Duration::from_secs(65);

/// How long a target is listened to whose client has left.
const LAST_WORD: Duration = Duration::from_secs(5);

/// The client's side of a session, whose TLS may begin later.
pub(super) type ClientSide<S> = Either<S, Box<TlsStream<Prefixed<S>>>>;

/// What a session goes on with.
pub(super) type Started<S, P> = (ClientSide<S>, Link, Starting<P>, Option<HeldKey<Holder>>);

/// A session that has not begun.
pub(super) struct Session<'a, S, P> {
    server: &'a Arc<Server>,
    dedicated: &'a mut Dedicated,
    pub(super) starting: Starting<P>,
    client: Option<ClientSide<S>>,
    pub(super) link: Option<Link>,
    /// By which the session can be cancelled, once it is about to begin.
    held: Option<HeldKey<Holder>>,
    deadline: Instant,
}

impl<'a, S: ByteStream + 'static, P: Start> Session<'a, S, P> {
    /// A session of `client`, which has until `deadline` to ask for a connection to the target.
    pub(super) fn new(
        server: &'a Arc<Server>,
        dedicated: &'a mut Dedicated,
        client: ClientSide<S>,
        starting: Starting<P>,
        deadline: Instant,
    ) -> Self {
        let (client, link, held) = (Some(client), None, None);
        Self { server, dedicated, starting, client, link, held, deadline }
    }

    /// Runs the start. If no session comes of it, both sides have been sent the end, and only the client's connection is
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
                    // Whether there is one is not said: a CancelRequest has no response.
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
                    self.dedicated.connection.sent(self.starting.sent());
                    self.mark_role();
                    let (Some(client), Some(link)) = (self.client, self.link) else {
                        return Err(End::Reset);
                    };
                    return Ok((client, link, self.starting, self.held));
                }
                Ok(Turn::Close) => {
                    self.dedicated
                        .connection
                        .ended_by(self.starting.ended().unwrap_or(Side::Client));
                    self.hear_target().await;
                    break Bytes::new();
                }
                Err(Stop::Fault(fault)) => {
                    self.dedicated.connection.failed(&fault);
                    break self.starting.refusal(&fault);
                }
                Err(Stop::Left) => {
                    self.dedicated.connection.left();
                    break Bytes::new();
                }
            }
        };
        self.close(&refusal).await;
        Err(End::Lingers)
    }

    /// It cannot be served, although there is a connection to the target.
    pub(super) fn failed(&mut self, fault: &Fault) {
        self.dedicated.connection.failed(fault);
    }

    /// The client has left: what the target is due to say decides what it can be sent in the end.
    async fn hear_target(&mut self) {
        if let Some(link) = &mut self.link {
            let hearing = self.starting.hear_target(&mut link.session.stream);
            let _ = timeout(LAST_WORD, hearing).await;
        }
    }

    /// Ends both connections without a session.
    pub(super) async fn close(&mut self, refusal: &[u8]) {
        self.dedicated.connection.sent(self.starting.sent());
        // Before the client gets the error, and comes again.
        self.mark_role();
        if let Some(client) = &mut self.client {
            tell(client, refusal).await;
        }
        if let Some(link) = self.link.take() {
            let (mut stream, in_use) = link.into_stream();
            if close(&mut stream, &self.starting.closing_message()).await {
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
                () = self.dedicated.arrival.unused(self.dedicated.accepted), if !has_link => return Err(Stop::Left),
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
        match self.server.accept(stream, &self.dedicated.arrival, deadline).await {
            Some(accepted) => {
                self.client = Some(Either::Right(accepted.stream));
                self.starting.secured();
                Ok(())
            }
            None => Err(self.dedicated.refused_tls()),
        }
    }

    async fn dial(&mut self) -> Result<(), Unconnected> {
        self.decide(false);
        self.connect().await
    }

    pub(super) async fn connect(&mut self) -> Result<(), Unconnected> {
        self.dedicated.connection.admit().map_err(Unconnected::Failed)?;
        let client = self.client.as_ref().and_then(ByteStream::socket);
        // A server that speaks first would count an attempt that ends when its client leaves.
        let watched = client.filter(|_| !self.starting.start().awaits_target());
        let link = self.dedicated.connection.connect(watched).await?;
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
            self.link = Some(self.dedicated.connection.secure(link).await?);
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
        let Some(holder) = self.dedicated.connection.alias().cancel_keys().holder(key) else {
            self.dedicated.connection.left();
            return false;
        };
        match self.dedicated.connection.connect_to(&holder).await {
            Ok(link) => self.dialled(link),
            Err(_) => return false,
        }
        true
    }

    fn hold(&mut self, key: CancelKey) {
        if let Some(link) = &self.link {
            let alias = self.dedicated.connection.alias();
            self.held = alias.cancel_keys().hold(key, link.holder(alias));
        }
    }

    /// Says whether the client speaks TLS, unless that is known.
    fn decide(&self, tls: bool) {
        let tls = tls || matches!(self.client, Some(Either::Right(_)));
        self.dedicated.downstream.decide(tls);
    }
}

/// Why a start does not go on.
enum Stop {
    Fault(Fault),
    /// The client has left, or has not come to anything in time.
    Left,
}
