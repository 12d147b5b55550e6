//! Runs the start of a session over its two streams.

mod error;

use std::{collections::VecDeque, future::pending, io};

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

pub use error::StartError;

use crate::{
    config::Role,
    fault::Fault,
    protocol::{Action, Event, MAX_BUFFERED, Side, Start, postgres::CancelKey},
};

/// A start under way, and the bytes that wait for it.
#[derive(Debug)]
pub struct Starting<S> {
    start: S,
    from_client: BytesMut,
    from_target: BytesMut,
    /// An event that the start has not received yet.
    news: Option<News>,
    /// Actions of the start that have not been executed yet.
    actions: VecDeque<Action>,
    fault: Option<Fault>,
    ended: Option<Side>,
    /// The bytes sent to the target and to the client.
    sent: (u64, u64),
}

/// What the owner of the start is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Turn {
    /// Connect to a target of the alias, and say so: [`Starting::dialled`].
    Dial,
    /// Connect to the endpoint that holds the session with this key, and say so; if there is none, close the
    /// client's connection without a response.
    DialHolder(CancelKey),
    /// Note that the session with this key is at the target.
    HoldKey(CancelKey),
    /// Make TLS with the client, and say so: [`Starting::secured`].
    StartTls,
    /// Make TLS with the target, verify it, and say so: [`Starting::target_secured`].
    StartTargetTls,
    /// The session has begun. What waits in the buffers is its own: [`Starting::into_parts`].
    Established,
    /// Close both connections.
    Close,
}

/// An event that is not about bytes.
#[derive(Clone, Copy, Debug)]
enum News {
    Dialled,
    Secured,
    TargetSecured,
    Ended(Side),
}

impl<S: Start> Starting<S> {
    /// `early` has come from the client already.
    pub fn new(start: S, early: BytesMut) -> Self {
        Self {
            start,
            from_client: early,
            from_target: BytesMut::new(),
            news: None,
            actions: VecDeque::new(),
            fault: None,
            ended: None,
            sent: (0, 0),
        }
    }

    /// The connection to the target is there.
    pub fn dialled(&mut self) {
        self.news = Some(News::Dialled);
    }

    /// The client's TLS is there.
    pub fn secured(&mut self) {
        self.news = Some(News::Secured);
    }

    /// Takes what has come from the client and was not taken: it belongs to TLS.
    pub fn take_from_client(&mut self) -> Bytes {
        self.from_client.split().freeze()
    }

    /// The target has sent this already.
    pub fn received(&mut self, early: &[u8]) {
        self.from_target.extend_from_slice(early);
    }

    /// The target's TLS is there, and the target is verified.
    pub fn target_secured(&mut self) {
        self.news = Some(News::TargetSecured);
    }

    /// Passes bytes on, until there is something else to do. There is a target from the dial on.
    ///
    /// This waits for peers without end: set a deadline. Nothing is lost when it is dropped between two turns.
    pub async fn next<C, T>(
        &mut self,
        client: &mut C,
        mut target: Option<&mut T>,
    ) -> Result<Turn, Fault>
    where
        C: AsyncRead + AsyncWrite + Unpin,
        T: AsyncRead + AsyncWrite + Unpin,
    {
        loop {
            while let Some(action) = self.actions.pop_front() {
                let sent = match action {
                    Action::Send(Side::Client, bytes) => {
                        self.sent.1 += bytes.len() as u64;
                        let sent = send(client, &bytes).await;
                        sent.map_err(|_| News::Ended(Side::Client))
                    }
                    // Why a target takes no more may be among what it has sent: it is read to its end.
                    Action::Send(Side::Target, bytes) => {
                        self.sent.0 += bytes.len() as u64;
                        if let Some(target) = target.as_deref_mut() {
                            let _ = send(target, &bytes).await;
                        }
                        Ok(())
                    }
                    Action::Dial => return Ok(Turn::Dial),
                    Action::DialHolder(key) => return Ok(Turn::DialHolder(key)),
                    Action::HoldKey(key) => return Ok(Turn::HoldKey(key)),
                    Action::StartTls => return Ok(Turn::StartTls),
                    Action::StartTargetTls => return Ok(Turn::StartTargetTls),
                    Action::Established => return Ok(Turn::Established),
                    Action::Close => return Ok(Turn::Close),
                };
                if let Err(news) = sent {
                    self.news = Some(news);
                }
            }
            if let Some(fault) = self.fault.take() {
                return Err(fault);
            }
            if !self.report() {
                self.read(client, target.as_deref_mut()).await;
            }
        }
    }

    /// What the client is to be sent where the session cannot start.
    pub fn refusal(&self, why: &Fault) -> Bytes {
        self.start.refusal(why)
    }

    /// Lets a target say what it is due to say, to a client that has left. This waits for it without end.
    pub async fn hear_target<T: AsyncRead + Unpin>(&mut self, target: &mut T) {
        while self.start.awaits_target() {
            let event = Event::Bytes(Side::Target, &mut self.from_target);
            let heard = self.start.on(event, &mut Vec::new());
            let awaits_more = heard.is_ok() && self.start.awaits_target();
            if !awaits_more
                || !matches!(receive(Some(target), &mut self.from_target).await, Ok(1..))
            {
                return;
            }
        }
    }

    /// What the target is sent before its connection is closed without a session.
    pub fn closing_message(&self) -> Bytes {
        self.start.closing_message()
    }

    /// Which role the target has shown, once it has.
    pub fn server_role(&self) -> Option<Role> {
        self.start.server_role()
    }

    /// The side that has ended first, if one has.
    pub fn ended(&self) -> Option<Side> {
        self.ended
    }

    /// How much was sent to the target, and to the client.
    pub fn sent(&self) -> (u64, u64) {
        self.sent
    }

    /// The start.
    pub fn start(&self) -> &S {
        &self.start
    }

    /// The start, and what waits from the client and from the target.
    pub fn into_parts(self) -> (S, BytesMut, BytesMut) {
        (self.start, self.from_client, self.from_target)
    }

    /// Passes news or waiting bytes to the start. Returns whether this had any effect.
    fn report(&mut self) -> bool {
        let mut actions = Vec::new();
        let before = (self.from_client.len(), self.from_target.len());
        let news = self.news.take();
        let has_news = news.is_some();
        let result = match news {
            Some(News::Dialled) => self.start.on(Event::Dialled, &mut actions),
            Some(News::TargetSecured) => self.start.on(Event::TargetSecured, &mut actions),
            Some(News::Secured) => self.start.on(Event::Secured, &mut actions),
            Some(News::Ended(side)) => {
                self.ended.get_or_insert(side);
                self.start.on(Event::Ended(side), &mut actions)
            }
            None => self.offer(&mut actions),
        };
        self.fault = result.err();
        let acts = !actions.is_empty();
        self.actions.extend(actions);
        let after = (self.from_client.len(), self.from_target.len());
        has_news || acts || self.fault.is_some() || before != after
    }

    fn offer(&mut self, actions: &mut Vec<Action>) -> Result<(), Fault> {
        let sides = [(Side::Client, &mut self.from_client), (Side::Target, &mut self.from_target)];
        for (side, buffer) in sides {
            // What one side's bytes lead to comes before the other side's bytes.
            if !buffer.is_empty() && actions.is_empty() {
                self.start.on(Event::Bytes(side, buffer), actions)?;
            }
        }
        Ok(())
    }

    /// Reads from whoever sends first. A side that ends is news once all that it has sent was offered.
    async fn read<C, T>(&mut self, client: &mut C, target: Option<&mut T>)
    where
        C: AsyncRead + Unpin,
        T: AsyncRead + Unpin,
    {
        let from_client = receive(Some(client), &mut self.from_client);
        let from_target = receive(target, &mut self.from_target);
        let (side, read) = tokio::select! {
            read = from_client => (Side::Client, read),
            read = from_target => (Side::Target, read),
        };
        // A reset is an end as well.
        if read.unwrap_or(0) == 0 {
            self.news = Some(News::Ended(side));
        }
    }
}

/// Reads what fits; waits for ever where there is no such side, or no room.
async fn receive<R: AsyncRead + Unpin>(
    from: Option<&mut R>,
    buffer: &mut BytesMut,
) -> io::Result<usize> {
    match from {
        Some(from) if buffer.len() < MAX_BUFFERED => from.read_buf(buffer).await,
        _ => pending().await,
    }
}

async fn send<W: AsyncWrite + Unpin>(to: &mut W, bytes: &Bytes) -> io::Result<()> {
    to.write_all(bytes).await?;
    to.flush().await
}

#[cfg(test)]
mod tests;
