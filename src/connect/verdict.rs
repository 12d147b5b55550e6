//! Whether the origin had received anything of a lost request: which observation proves what.
//!
//! An origin may close a kept connection at the moment it is used again. Sending the request once more is right
//! only if the origin cannot have read any of it. [`Verdict`] lists everything that can be observed, and what it
//! proves.
//!
//! On TCP there is one proof. It needs three facts, none of which is enough by itself:
//!
//! - *The origin sent its FIN before it had received a byte.* Each segment says how much its sender's kernel had
//!   received by then. A FIN that acknowledges nothing of the request was sent before the request arrived. But a
//!   FIN only says that no more will be sent: after a half-close, the origin may continue to read.
//! - *Its kernel replied to the request with a RST.* A kernel does that for bytes to a socket that is closed for
//!   reading too. But a RST also results from a close with `SO_LINGER` 0, from a close over other unread bytes,
//!   and from a crash, all possibly after the request was read.
//! - *Nothing was acknowledged up to then.* A socket that is still open acknowledges what it receives. But a kernel
//!   may delay that, usually by 40 ms, and the application may read the request in the meantime.
//!
//! Together they prove that the origin had closed both directions. There is one exception: an origin that shuts
//! down the direction of its response, then reads a request, acts on it and aborts the connection, all before its
//! kernel has acknowledged anything. TLS' `close_notify` replaces none of the three facts: it says no more than a
//! FIN does, and the RST after it may have any of these causes.

/// What was observed of a request that has no response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The connection had ended before anything of the request was given to the kernel.
    Unsent,
    /// HTTP/2: the stream was reset with `REFUSED_STREAM` (RFC 9113 §8.7).
    StreamRefused,
    /// HTTP/2: a GOAWAY without an error, whose last stream is an earlier one (RFC 9113 §6.8).
    BeyondGoaway,
    /// The origin's FIN, acknowledging nothing of it, and then a RST.
    Closed,
    /// Some of it was acknowledged: the origin's kernel had it, and its application may have.
    Acknowledged,
    /// A RST without a FIN before it.
    Reset,
    /// A byte of a response was received.
    Begun,
    /// None of these within a second, or nothing the kernel reports.
    Unknown,
}

impl Verdict {
    /// Whether it proves that the origin has not read the request and will not, so that the request may be sent
    /// again whatever its method.
    pub fn proves_unread(self) -> bool {
        match self {
            Self::Unsent | Self::StreamRefused | Self::BeyondGoaway | Self::Closed => true,
            Self::Acknowledged | Self::Reset | Self::Begun | Self::Unknown => false,
        }
    }
}

/// How a peer has ended its side of a connection, as reported by the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// Not at all.
    Open,
    /// With a FIN.
    Fin,
    /// With a RST after its FIN.
    FinThenReset,
    /// With a RST alone.
    Reset,
    /// In another way: by a timeout, or by us.
    Other,
}

/// What the kernel knows about a connection and what was written to it since a mark.
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
    /// The verdict; `None` while the peer's kernel may still send more.
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

    /// A final verdict is given at once, and later events do not change it.
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
