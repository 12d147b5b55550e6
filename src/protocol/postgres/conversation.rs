//! A session under way: messages pass in both directions, and only their headers are looked at.

use super::{LengthError, Scanner, ServerParameters};
use crate::protocol::Side;

/// What is known of a session from the messages that have passed.
#[derive(Debug)]
pub struct Conversation {
    client: Scanner,
    target: Scanner,
    progress: Progress,
}

/// What the messages come to.
#[derive(Debug)]
struct Progress {
    parameters: ServerParameters,
    /// ReadyForQuery still to come.
    due: u32,
    /// Whether the client has sent messages to which its Sync belongs, and not the Sync.
    unsynced: bool,
    /// Whether the client's last request was a Query or a FunctionCall: it needs no Sync.
    simple: bool,
    /// From the server's CopyInResponse to the next ReadyForQuery.
    copies: bool,
    /// Whether the server reads nothing but the client's copy, and passes over a Sync.
    takes_copy: bool,
    /// Whether the session is in a transaction.
    in_transaction: bool,
    /// Whether the client has sent Terminate.
    terminated: bool,
}

impl Conversation {
    /// Of a session with a server that has just become ready for the first time.
    pub(super) fn new(parameters: ServerParameters) -> Self {
        let progress = Progress {
            parameters,
            due: 0,
            unsynced: false,
            simple: false,
            copies: false,
            takes_copy: false,
            in_transaction: false,
            terminated: false,
        };
        Self { client: Scanner::default(), target: Scanner::default(), progress }
    }

    /// Takes note of bytes that one side sends the other. They pass as they are; where they are no messages,
    /// they must not, and the session ends.
    pub fn pass(&mut self, from: Side, bytes: &[u8]) -> Result<(), LengthError> {
        let Self { client, target, progress } = self;
        match from {
            Side::Client => client.scan(bytes, |tag, _| progress.client(tag)),
            Side::Target => target.scan(bytes, |tag, body| progress.target(tag, body)),
        }
    }

    /// Whether the session may end without harm: the client waits for nothing and is in no transaction.
    ///
    /// An ErrorResponse that follows right behind a ReadyForQuery is lost on libpq, which takes it for a notice.
    /// So let the client rest for a moment before it is told, or tell it in response to its next request, which
    /// the server has not seen.
    pub fn is_idle(&self) -> bool {
        let Progress { due, unsynced, copies, in_transaction, .. } = self.progress;
        due == 0 && !unsynced && !copies && !in_transaction && self.is_between_messages()
    }

    /// Whether the client can be told that the session ends, and the server too: neither has sent half a
    /// message.
    pub fn is_between_messages(&self) -> bool {
        self.has_whole_messages(Side::Client) && self.has_whole_messages(Side::Target)
    }

    /// Whether a side has not sent half a message.
    pub fn has_whole_messages(&self, from: Side) -> bool {
        match from {
            Side::Client => self.client.is_between_messages(),
            Side::Target => self.target.is_between_messages(),
        }
    }

    /// Whether the server is at work for the client, which a CancelRequest would end.
    pub fn is_waiting(&self) -> bool {
        self.progress.due > 0 || self.progress.unsynced || self.progress.copies
    }

    /// Whether the client has sent Terminate: that the connection ends then is no failure.
    pub fn has_terminated(&self) -> bool {
        self.progress.terminated
    }

    /// What the server reports of itself. A session stays where it is when the role changes.
    pub fn server(&self) -> &ServerParameters {
        &self.progress.parameters
    }
}

impl Progress {
    fn client(&mut self, tag: u8) {
        match tag {
            // Query and FunctionCall.
            b'Q' | b'F' => {
                self.due = self.due.saturating_add(1);
                (self.simple, self.unsynced) = (true, false);
            }
            b'S' if self.takes_copy => {}
            b'S' => {
                self.due = self.due.saturating_add(1);
                (self.simple, self.unsynced) = (false, false);
            }
            // Parse, Bind, Describe, Execute, Close; and Flush, during a copy too.
            b'P' | b'B' | b'D' | b'E' | b'C' => (self.simple, self.unsynced) = (false, true),
            // CopyDone and CopyFail.
            b'c' | b'f' => self.takes_copy = false,
            b'X' => self.terminated = true,
            _ => {}
        }
    }

    fn target(&mut self, tag: u8, body: &[u8]) {
        match tag {
            b'Z' => {
                self.due = self.due.saturating_sub(1);
                (self.copies, self.takes_copy) = (false, false);
                self.in_transaction = body != b"I";
            }
            // CopyInResponse.
            b'G' => {
                (self.copies, self.takes_copy) = (true, true);
                // The Sync that libpq sends along with the Execute is passed over: another one follows the copy.
                if !self.simple {
                    self.due = 0;
                }
            }
            // A copy that fails is over, and a Sync counts again.
            b'E' => self.takes_copy = false,
            b'S' => {
                self.parameters.report(body);
            }
            _ => {}
        }
    }
}
