//! The part of a request's body that is kept so that the request may be sent again.

use bytes::{Bytes, BytesMut};

/// How much of a body is kept.
///
/// A request whose body outgrows it cannot be sent again.
pub(super) const REPLAY_LIMIT: usize = 64 * 1024;

/// Pieces up to this size are joined, because each piece has an overhead of its own.
pub(super) const KEPT_AS_ONE: usize = 4 * 1024;

/// The beginning of a body: everything read from its sender so far, or nothing once that is too much.
///
/// An attempt first sends what is kept, and then what it reads from the sender, which is kept for the next attempt.
#[derive(Debug)]
pub(super) struct Replay {
    kept: Vec<Bytes>,
    /// How much is in `kept`.
    size: usize,
    /// How many pieces of `kept` the current attempt has sent.
    position: usize,
    /// A part of the body was not kept.
    is_incomplete: bool,
}

impl Replay {
    /// For a body of which nothing was read.
    pub(super) fn new() -> Self {
        Self { kept: Vec::new(), size: 0, position: 0, is_incomplete: false }
    }

    /// Whether another attempt can send the whole body.
    pub(super) fn is_complete(&self) -> bool {
        !self.is_incomplete
    }

    /// The next piece of the current attempt; `None` once the rest has to be read from the sender.
    pub(super) fn next(&mut self) -> Option<Bytes> {
        let piece = self.kept.get(self.position)?.clone();
        self.position += 1;
        Some(piece)
    }

    /// Whether the current attempt has sent none of what is kept.
    pub(super) fn is_at_start(&self) -> bool {
        self.position == 0
    }

    /// Whether the current attempt has sent all of what is kept.
    pub(super) fn is_at_end(&self) -> bool {
        self.position == self.kept.len()
    }

    /// Keeps what the current attempt has read from the sender and sends.
    pub(super) fn keep(&mut self, data: &Bytes) {
        if self.is_incomplete {
            return;
        }
        self.size += data.len();
        if self.size > REPLAY_LIMIT {
            self.forget();
            return;
        }
        match self.kept.last_mut() {
            Some(last) if last.len() + data.len() <= KEPT_AS_ONE => append(last, data),
            _ => self.kept.push(data.clone()),
        }
        self.position = self.kept.len();
    }

    /// Keeps nothing from now on, and drops what was kept.
    pub(super) fn forget(&mut self) {
        self.is_incomplete = true;
        self.kept = Vec::new();
        self.position = 0;
    }

    /// Starts over, for another attempt.
    pub(super) fn rewind(&mut self) {
        self.position = 0;
    }

    /// How many pieces are kept.
    #[cfg(test)]
    pub(super) fn pieces(&self) -> usize {
        self.kept.len()
    }
}

fn append(kept: &mut Bytes, data: &[u8]) {
    let mut whole = std::mem::take(kept).try_into_mut().unwrap_or_else(|shared| {
        let mut copy = BytesMut::with_capacity(KEPT_AS_ONE);
        copy.extend_from_slice(&shared);
        copy
    });
    whole.extend_from_slice(data);
    *kept = whole.freeze();
}
