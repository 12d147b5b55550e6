//! Runs a start without I/O: what both sides send is in buffers, and what the start does is collected.

use bytes::BytesMut;

use super::{Action, Event, Side, Start};
use crate::fault::Fault;

/// Both sides of a start, and its runner.
pub struct Run<S> {
    pub start: S,
    /// What the client has sent and was not taken.
    pub client: BytesMut,
    /// The same of the target.
    pub target: BytesMut,
    pub to_client: Vec<u8>,
    pub to_target: Vec<u8>,
    /// The actions, except for sending.
    pub done: Vec<Action>,
    pub fault: Option<Fault>,
}

impl<S: Start> Run<S> {
    pub fn of(start: S) -> Self {
        Self {
            start,
            client: BytesMut::new(),
            target: BytesMut::new(),
            to_client: Vec::new(),
            to_target: Vec::new(),
            done: Vec::new(),
            fault: None,
        }
    }

    /// The client sends bytes.
    pub fn client(&mut self, bytes: &[u8]) {
        self.client.extend_from_slice(bytes);
        self.settle();
    }

    /// The target sends bytes.
    pub fn target(&mut self, bytes: &[u8]) {
        self.target.extend_from_slice(bytes);
        self.settle();
    }

    pub fn event(&mut self, event: Event<'_>) {
        if self.fault.is_none() {
            let mut actions = Vec::new();
            let result = self.start.on(event, &mut actions);
            self.act(actions, result);
        }
        self.settle();
    }

    /// Offers what is left, as long as some is taken.
    fn settle(&mut self) {
        loop {
            let before = (self.client.len(), self.target.len());
            for side in [Side::Client, Side::Target] {
                let buffer = match side {
                    Side::Client => &mut self.client,
                    Side::Target => &mut self.target,
                };
                if self.fault.is_none() && !buffer.is_empty() {
                    let mut actions = Vec::new();
                    let result = self.start.on(Event::Bytes(side, buffer), &mut actions);
                    self.act(actions, result);
                }
            }
            if before == (self.client.len(), self.target.len()) {
                return;
            }
        }
    }

    fn act(&mut self, actions: Vec<Action>, result: Result<(), Fault>) {
        for action in actions {
            match action {
                Action::Send(Side::Client, bytes) => self.to_client.extend_from_slice(&bytes),
                Action::Send(Side::Target, bytes) => self.to_target.extend_from_slice(&bytes),
                other => self.done.push(other),
            }
        }
        if let Err(fault) = result {
            self.fault = Some(fault);
        }
    }
}
