//! The protocols that an alias may speak besides HTTP, as state machines without I/O: bytes go in, and what
//! is to be done comes out.
//!
//! A protocol has two of them. Its *opening* is what is said to the target before TLS, on each connection
//! that is tried. Its [`Start`] has both sides, from the client's first byte to where the session begins.

pub mod postgres;

use bytes::{Bytes, BytesMut};

use crate::fault::Fault;

/// One of the two sides of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The application.
    Client,
    /// The server behind the alias.
    Target,
}

/// The start of a session.
///
/// Whoever runs it reports what happens and does what is asked for, in that order, and never reads more than
/// [`MAX_BUFFERED`] bytes that were not taken. Bytes that it leaves in a buffer are offered again after every
/// event, as long as that takes some of them.
pub trait Start {
    /// Takes note of an event, and adds what is to be done.
    ///
    /// What was added before an error is to be done as well. After an error nothing more is reported: the
    /// client gets the [`refusal`](Self::refusal), and both connections end.
    fn on(&mut self, event: Event<'_>, actions: &mut Vec<Action>) -> Result<(), Fault>;

    /// What the client is sent where the session cannot start; empty where it can be sent nothing.
    fn refusal(&self, why: &Fault) -> Bytes;
}

/// How many bytes of one side may wait to be taken.
pub const MAX_BUFFERED: usize = 128 * 1024;

/// What has happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// A side has sent bytes. Those that are taken are removed.
    Bytes(Side, &'a mut BytesMut),
    /// The connection to the target is there, and verified.
    Dialled,
    /// The client's TLS handshake is done.
    Secured,
    /// A side has closed its connection. All that it sent before has been offered.
    Ended(Side),
}

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Send bytes.
    Send(Side, Bytes),
    /// Open a connection to a target of the alias.
    Dial,
    /// Open a connection to the endpoint that holds the session with this key; close the client's without a
    /// word where there is none.
    DialHolder(postgres::CancelKey),
    /// Make TLS with the client, once everything has been sent. Bytes that have come meanwhile end the session:
    /// somebody may have put them in front of the client's.
    StartTls,
    /// The session has begun: bytes in the buffers belong to it.
    Established,
    /// End both connections, once everything has been sent.
    Close,
}

/// What to do next on a connection to a target that has no TLS yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send bytes.
    Send(Bytes),
    /// Receive more.
    Receive,
    /// Make TLS.
    StartTls,
}
