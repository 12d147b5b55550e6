//! Local certificate authorities: one for each alias, so that applications can trust its
//! certificates.
//!
//! A root signs the certificates of one alias, and its key is dropped before anybody sees the root.
//! What is kept is the key of the certificates themselves. Whoever steals that can pretend to be the
//! alias, and can sign nothing, whatever a TLS library makes of name constraints.
//!
//! **Invariant:** no key that can sign a certificate leaves [`Authority::make`].
//! **Invariant:** a root is constrained to exactly the names of its certificates: they are permitted,
//! and all names below them are excluded. Names of which one lies below another cannot be told apart
//! that way, so they get authorities of their own ([`names::sets`]).

mod certificates;
mod make;
pub mod names;
mod root;
mod subject;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use certificates::{Authority, Certified, ServerCertificate, pem};
pub use make::{Issued, issue};
pub use root::{Root, RootError};
pub use subject::Subject;

use super::leaf::Date;

/// Seconds since 1970.
pub type Seconds = i64;

/// A day.
pub const DAY: Seconds = 24 * 3600;

/// All begin this long ago: clocks may be wrong by as much.
pub const EARLY: Seconds = 30 * DAY;

/// Why an authority or its certificates cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// Making or signing a certificate.
    #[error("cannot make a certificate: {0}")]
    Generate(#[from] rcgen::Error),
    /// A root that is not one of ours.
    #[error("{0}")]
    Root(#[from] RootError),
    /// A file that does not hold the key and the certificates that belong to a root.
    #[error("not a key with its certificates: {0}")]
    Parse(String),
    /// A key that the TLS library does not take.
    #[error("cannot use a key: {0}")]
    Key(#[from] rustls::Error),
    /// Names that no root can be constrained to.
    #[error(
        "`{below}` lies below `{name}`, and no certificate authority can be constrained to these two \
         names alone: issue a certificate for each"
    )]
    Nested {
        /// The one.
        name: String,
        /// The other.
        below: String,
    },
    /// More names than TLS libraries take.
    #[error(
        "{count} names are too many for one certificate: at most {} work everywhere",
        names::MOST
    )]
    TooMany {
        /// How many.
        count: usize,
    },
}

/// The time now.
pub fn now() -> Seconds {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_secs().try_into().unwrap_or(Seconds::MAX)
}

/// As RFC 3339 has it.
pub fn timestamp(time: Seconds) -> String {
    Date(time).to_string()
}

fn system_time(time: Seconds) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(time.try_into().unwrap_or(0))
}

#[cfg(test)]
mod tests;
