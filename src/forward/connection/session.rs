//! A PostgreSQL session under way: its bytes pass as they are, and its messages say when it may end.

use std::{io, pin::pin, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    super::{
        start::Starting,
        tunnel::{self, Side, Watch},
    },
    Connection, End, cut,
};
use crate::{
    fault::Fault,
    protocol::postgres::{
        CancelKey, Conversation, ErrorResponse, HeldKey, LengthError, Startup, StartupError,
        TERMINATE,
    },
    stream::{ByteStream, Prefixed},
    upstream::{Alias, Caller, Holder, Link},
};

/// How long a client rests before it is told that its session ends: libpq takes an error that arrives with the
/// response to its last query for a notice.
const REST: Duration = Duration::from_millis(100);

/// The same for a client that has come during the drain: its first query may be on its way.
const FIRST_REST: Duration = Duration::from_millis(500);

/// How long closing a connection in order may take.
const CLOSING: Duration = Duration::from_secs(1);

/// How long a server may take to act on a CancelRequest.
const CANCELLING: Duration = Duration::from_secs(10);

/// A session that has begun.
#[derive(Debug)]
pub struct Begun {
    conversation: Conversation,
    held: Option<HeldKey<Holder>>,
    /// What waits from either side, as part of it.
    from_client: Bytes,
    from_target: Bytes,
}

impl Begun {
    /// The session that a start has come to.
    pub fn from_start(starting: Starting<Startup>, held: Option<HeldKey<Holder>>) -> Option<Self> {
        let (start, from_client, from_target) = starting.into_parts();
        let conversation = start.into_session()?;
        let (from_client, from_target) = (from_client.freeze(), from_target.freeze());
        Some(Self { conversation, held, from_client, from_target })
    }
}

/// How a session ends for the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// In order. The client may not have read the last that it was sent.
    Closed,
    /// It broke off.
    Broken,
}

impl Connection {
    /// Passes a session's messages on until it ends. Once `draining` has ended, the session ends between two of
    /// its transactions.
    pub async fn converse<D: ByteStream>(
        mut self,
        client: D,
        link: Link,
        begun: Begun,
        draining: impl Future<Output = ()>,
    ) -> Ended {
        let Begun { conversation, held, from_client, from_target } = begun;
        let (alias, worker) = (self.record.alias().clone(), self.record.worker());
        let addresses = self.client.clone();
        let caller = Caller { worker, client: Some(&addresses) };
        let holder = link.holder(&alias);
        let cancels = alias.config().postgres.cancel_on_disconnect;
        let cancel = held.as_ref().filter(|_| cancels).map(HeldKey::key);
        let (moved, stopped, leaving) = (link.cut(), self.stopped.clone(), link.draining());
        let (stream, in_use) = link.into_stream();
        let mut client = Prefixed::new(from_client, client);
        let mut target = Prefixed::new(from_target, stream);
        let first_role = conversation.server().role();
        let watch = Watched::new(conversation);
        let end = {
            let drained = async {
                tokio::select! {
                    () = draining => {}
                    () = leaving.cancelled() => {}
                }
                watch.drained().await;
            };
            // Pinned here: each future that it is handed down to would keep room for it.
            let kill = pin!(async {
                tokio::select! {
                    biased;
                    () = cut(&moved, &stopped) => match watch.can_tell() {
                        true => tunnel::End::Stopped,
                        false => tunnel::End::Killed,
                    },
                    () = watch.target_ended.cancelled() => tunnel::End::Stopped,
                    () = drained => tunnel::End::Stopped,
                }
            });
            let mut cancels = pin!(async {
                watch.client_left.cancelled().await;
                if let (Some(key), true) = (cancel, watch.is_waiting()) {
                    cancel_query(&alias, caller, &holder, key).await;
                }
            });
            let carried = self.tunnel(&mut client, &mut target, kill, &watch);
            let mut carried = pin!(carried);
            let ended = tokio::select! {
                end = &mut carried => Some(end),
                () = &mut cancels => None,
            };
            match ended {
                None => carried.await,
                Some(end) => {
                    if watch.client_left.is_cancelled() {
                        cancels.await;
                    }
                    end
                }
            }
        };
        // A standby may have been promoted meanwhile.
        let role = watch.state.lock().conversation.server().role();
        if let Some(role) = role.filter(|_| role != first_role) {
            holder.mark_role(role.as_configured());
        }
        let is_moved = moved.is_cancelled() || leaving.is_cancelled();
        let (told, end) = match (watch.violation(), end) {
            (Some(Violation { side, error, .. }), tunnel::End::Stopped) => {
                let fault = match side {
                    Side::Client => StartupError::ClientLength(error),
                    Side::Target => StartupError::ServerLength(error),
                };
                let told = watch.can_tell().then(|| ErrorResponse::of(&fault.into()));
                let error = io::Error::new(io::ErrorKind::InvalidData, error.to_string());
                (told, End::Broken(side, error))
            }
            // The client has no server left.
            (None, tunnel::End::Stopped) if watch.target_ended.is_cancelled() => {
                (None, End::Closed)
            }
            (None, tunnel::End::Stopped) => {
                let why = match is_moved {
                    true => "the alias leads to another server now",
                    false => "the proxy is shutting down",
                };
                let end = if is_moved { End::Moved } else { End::Shutdown };
                (Some(ErrorResponse::ending(why)), end)
            }
            (_, end) => {
                let end = End::of_tunnel(end);
                (None, end.unwrap_or_else(|| self.cut_by(&moved)))
            }
        };
        let is_closed = matches!(end, End::Closed);
        self.record.ended(end);
        let ended = match told {
            Some(error) => {
                tell(&mut client, &error.to_bytes()).await;
                Ended::Closed
            }
            None if is_closed => Ended::Closed,
            None => Ended::Broken,
        };
        let closing_message = if is_closed { &[] } else { &TERMINATE[..] };
        let ends_well = ended == Ended::Closed
            && (is_closed || watch.can_terminate())
            && close(&mut target, closing_message).await;
        if ends_well {
            in_use.ended();
        }
        ended
    }
}

/// Sends a client the last that it gets.
pub async fn tell<C: ByteStream>(client: &mut C, bytes: &[u8]) {
    let telling = async {
        client.write_all(bytes).await?;
        client.shutdown().await
    };
    let _ = timeout(CLOSING, telling).await;
}

/// Closes a connection to a target in order, and waits for it to do the same. Returns whether it has.
pub async fn close<T: ByteStream>(target: &mut T, closing_message: &[u8]) -> bool {
    let closing = async {
        target.write_all(closing_message).await?;
        target.shutdown().await?;
        let mut rest = BytesMut::new();
        while target.read_buf(&mut rest).await? > 0 {
            rest.clear();
        }
        io::Result::Ok(())
    };
    matches!(timeout(CLOSING, closing).await, Ok(Ok(())))
}

/// Has the server cancel what a session is waiting for.
async fn cancel_query(alias: &Arc<Alias>, caller: Caller<'_>, holder: &Holder, key: &CancelKey) {
    let cancelling = async {
        let link = holder.link(caller).await?;
        let (mut stream, in_use) = link.into_stream();
        if stream.write_all(&key.request()).await.is_ok() && close(&mut stream, &[]).await {
            in_use.ended();
        }
        Ok::<_, Fault>(())
    };
    if let Ok(Err(error)) = timeout(CANCELLING, Box::pin(cancelling)).await {
        let alias = &alias.config().name;
        tracing::debug!(alias, %error, "the query of a client that left was not cancelled");
    }
}

/// A session's messages, as they pass.
#[derive(Debug)]
struct Watched {
    state: Mutex<State>,
    client_left: CancellationToken,
    target_ended: CancellationToken,
}

/// Bytes that are no message.
#[derive(Clone, Copy, Debug)]
struct Violation {
    side: Side,
    error: LengthError,
    /// Whether the side's last message has been passed on in part.
    is_within_message: bool,
}

#[derive(Debug)]
struct State {
    conversation: Conversation,
    /// Whether bytes of the client, and of the target, are being passed on.
    client_writes: bool,
    target_writes: bool,
    /// Whether anything has passed since this was reset.
    moved: bool,
    /// Whether the client has sent anything.
    has_asked: bool,
    /// Whether the response to the client's next request is the end of the session.
    refuses: bool,
    violation: Option<Violation>,
}

impl Watched {
    fn new(conversation: Conversation) -> Self {
        let state = State {
            conversation,
            client_writes: false,
            target_writes: false,
            moved: false,
            has_asked: false,
            refuses: false,
            violation: None,
        };
        Self {
            state: Mutex::new(state),
            client_left: CancellationToken::new(),
            target_ended: CancellationToken::new(),
        }
    }

    /// Waits until the session may end: the client rests between two transactions. One that does not rest is told in
    /// response to its next request, which the server does not get.
    async fn drained(&self) {
        let is_new = {
            let mut state = self.state.lock();
            state.refuses = state.has_asked;
            !state.has_asked
        };
        if is_new {
            self.rested(FIRST_REST).await;
        } else {
            self.rested(REST).await;
        }
    }

    async fn rested(&self, rest: Duration) {
        loop {
            self.state.lock().moved = false;
            sleep(rest).await;
            let state = self.state.lock();
            if !state.moved && state.may_end() {
                return;
            }
        }
    }

    /// Whether the client can be sent a message.
    fn can_tell(&self) -> bool {
        self.state.lock().can_tell()
    }

    /// Whether the server can be.
    fn can_terminate(&self) -> bool {
        let state = self.state.lock();
        !state.client_writes && state.has_passed_whole_messages(Side::Client)
    }

    fn is_waiting(&self) -> bool {
        self.state.lock().conversation.is_waiting()
    }

    fn violation(&self) -> Option<Violation> {
        self.state.lock().violation
    }
}

impl State {
    fn can_tell(&self) -> bool {
        !self.target_writes && self.has_passed_whole_messages(Side::Target)
    }

    /// Whether what was passed on from a side ends with a message.
    fn has_passed_whole_messages(&self, from: Side) -> bool {
        let broken_off = self.violation.filter(|violation| violation.side == from);
        broken_off.is_none_or(|violation| !violation.is_within_message)
            && self.conversation.has_whole_messages(from)
    }

    fn may_end(&self) -> bool {
        self.conversation.is_idle() && !self.client_writes && !self.target_writes
    }
}

impl Watch for Watched {
    fn admits(&self, from: Side, bytes: &[u8]) -> bool {
        let mut state = self.state.lock();
        if from == Side::Client {
            let leaves = bytes.first() == TERMINATE.first();
            if state.refuses && state.may_end() && !leaves {
                return false;
            }
            (state.client_writes, state.has_asked) = (true, true);
        } else {
            state.target_writes = true;
        }
        state.moved = true;
        let is_within_message = !state.conversation.has_whole_messages(from);
        if let Err(error) = state.conversation.pass(from, bytes) {
            // Nothing of these bytes is passed on: a message that has begun before them stays half a message.
            match from {
                Side::Client => state.client_writes = false,
                Side::Target => state.target_writes = false,
            }
            state.violation = Some(Violation { side: from, error, is_within_message });
            return false;
        }
        true
    }

    fn passed(&self, from: Side) {
        let mut state = self.state.lock();
        state.moved = true;
        match from {
            Side::Client => state.client_writes = false,
            Side::Target => state.target_writes = false,
        }
    }

    fn ended(&self, side: Side) {
        match side {
            Side::Client => self.client_left.cancel(),
            Side::Target => self.target_ended.cancel(),
        }
    }

    fn left(&self, side: Side) {
        if side == Side::Client {
            self.client_left.cancel();
        }
    }
}
