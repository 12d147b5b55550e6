//! Whether the origin had anything of a request that was lost: which observation proves what.
//!
//! A kept connection may be closed by its origin at the very moment at which it is used again. To
//! send the request once more is right only if the origin can have read nothing of it. [`Verdict`] is
//! the whole table of what can be observed; each row says what it proves.
//!
//! On TCP there is one proof, made of three facts, none of which is one by itself:
//!
//! - *The origin sent its FIN before it had a byte.* Each segment says how much its sender's kernel
//!   had received when it left. A FIN behind which nothing is acknowledged left before the request
//!   came. But a FIN says only that no more will be sent: who half-closes may go on to read.
//! - *Its kernel answered the request with a RST.* That is what a kernel does with bytes for a socket
//!   that is closed for reading too. But a RST also comes from a close with `SO_LINGER` 0, from a
//!   close over other bytes that nobody read, and from a crash, after the request was read.
//! - *Nothing was acknowledged up to then.* A socket that is still open acknowledges what comes. But
//!   a kernel may put that off, by 40 ms as a rule, and by then the application has read.
//!
//! Together they leave out whoever closed as a whole. What they cannot leave out is an origin that
//! gives up the direction that its response would go in, then reads a request, acts upon it, and
//! aborts its connection, all of it before its kernel has acknowledged anything. An end said by TLS
//! (`close_notify`) takes the place of none of the three: it says of the connection's end no more
//! than a FIN does, and the RST behind it may be any.

/// What was observed of a request that has no response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The connection had ended before anything of the request was given to the kernel.
    Unsent,
    /// HTTP/2: the stream was reset with `REFUSED_STREAM` (RFC 9113 §8.7).
    StreamRefused,
    /// HTTP/2: a GOAWAY without an error, whose last stream is an earlier one (RFC 9113 §6.8).
    BeyondGoaway,
    /// The origin's FIN, which acknowledges nothing of it, and then a RST.
    Closed,
    /// Some of it was acknowledged: the origin's kernel had it, and perhaps its application.
    Acknowledged,
    /// A RST without a FIN before it.
    Reset,
    /// A byte of a response came.
    Begun,
    /// None of these within a second, or nothing that the kernel tells.
    Unknown,
}

impl Verdict {
    /// Whether it is proved that the origin has read nothing of the request, and will not: then it
    /// may be sent again, whatever its method.
    pub fn proves_unread(self) -> bool {
        match self {
            Self::Unsent | Self::StreamRefused | Self::BeyondGoaway | Self::Closed => true,
            Self::Acknowledged | Self::Reset | Self::Begun | Self::Unknown => false,
        }
    }
}

/// How a peer has ended its side of a connection, as far as the kernel has said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Not at all.
    Open,
    /// With a FIN.
    Fin,
    /// With a RST that came behind its FIN.
    FinThenReset,
    /// With a RST alone.
    Reset,
    /// By other means: a time-out, or by ourselves.
    Other,
}

/// What the kernel knows of a connection and of what was written to it since a mark.
#[derive(Clone, Copy, Debug)]
pub(super) struct Observation {
    /// Whether anything was given to the kernel.
    pub(super) written: bool,
    /// Whether it is known that nothing of that is acknowledged.
    pub(super) unacknowledged: bool,
    /// The peer's side.
    pub(super) end: End,
}

impl Observation {
    /// What that comes to; `None` while the peer's kernel has more to say.
    pub(super) fn verdict(self) -> Option<Verdict> {
        match (self.written, self.end, self.unacknowledged) {
            (false, ..) => Some(Verdict::Unsent),
            (true, End::Reset, _) => Some(Verdict::Reset),
            (true, End::Other, _) => Some(Verdict::Unknown),
            (true, End::Open | End::Fin | End::FinThenReset, false) => Some(Verdict::Acknowledged),
            (true, End::FinThenReset, true) => Some(Verdict::Closed),
            (true, End::Open | End::Fin, true) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ENDS: [End; 5] = [End::Open, End::Fin, End::FinThenReset, End::Reset, End::Other];

    #[test]
    fn of_what_was_written_only_a_fin_and_a_reset_without_an_acknowledgement_prove_it_unread() {
        for end in ENDS {
            for unacknowledged in [false, true] {
                let seen = Observation { written: true, unacknowledged, end };
                let proved = seen.verdict().is_some_and(Verdict::proves_unread);
                assert_eq!(proved, end == End::FinThenReset && unacknowledged, "{seen:?}");
            }
        }
    }

    #[test]
    fn what_was_not_written_was_not_read() {
        for end in ENDS {
            for unacknowledged in [false, true] {
                let seen = Observation { written: false, unacknowledged, end };
                assert_eq!(seen.verdict(), Some(Verdict::Unsent));
            }
        }
    }

    /// What is final must not be waited for, and a verdict must not change with what comes later.
    #[test]
    fn a_verdict_stands_whatever_comes_after_it() {
        let later = |end: End| match end {
            End::Open => &ENDS[..],
            End::Fin => &[End::Fin, End::FinThenReset],
            End::FinThenReset => &[End::FinThenReset],
            End::Reset => &[End::Reset],
            End::Other => &[End::Other],
        };
        for end in ENDS {
            let seen = Observation { written: true, unacknowledged: false, end };
            for end in later(end) {
                let then = Observation { end: *end, ..seen };
                let proves = |seen: Observation| seen.verdict().map(Verdict::proves_unread);
                assert_eq!(proves(seen), proves(then), "{seen:?}, then {then:?}");
            }
        }
    }
}
