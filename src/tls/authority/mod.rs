//! Local certificate authorities: one for each alias, so that applications can trust its
//! certificates.
//!
//! A root signs the certificates of one alias, and its key is discarded before the root is published. Only the
//! key of the certificates themselves is stored. Whoever steals it can impersonate the alias, but cannot sign
//! anything, even if a TLS library ignores name constraints.
//!
//! **Invariant:** no key that can sign a certificate leaves [`Authority::make`].
//! **Invariant:** a root is constrained to exactly the names of its certificates: they are permitted,
//! and all names below them are excluded. If one name is below another, such constraints are not possible,
//! so they get separate authorities ([`names::sets`]).

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

/// Certificates are valid from this long ago: clocks may be wrong by that much.
pub const EARLY: Seconds = 30 * DAY;

/// Why an authority or its certificates cannot be created or used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A certificate cannot be created.
    #[error("cannot create a certificate: {0}")]
    Generate(#[from] rcgen::Error),
    /// A root was not created by truename.
    #[error("{0}")]
    Root(#[from] RootError),
    /// A file does not contain the key and the certificates of a root.
    #[error("not a key with its certificates: {0}")]
    Parse(String),
    /// The TLS library does not accept a key.
    #[error("cannot use a key: {0}")]
    Key(#[from] rustls::Error),
    /// No root can be constrained to these names.
    #[error(
        "`{below}` is below `{name}`, and no certificate authority can be constrained to exactly these two \
        names: issue a certificate for each"
    )]
    Nested {
        /// One of the names.
        name: String,
        /// The name below it.
        below: String,
    },
    /// More names than TLS libraries accept.
    #[error(
        "{count} names are too many for one certificate: at most {} work everywhere",
        names::MOST
    )]
    TooMany {
        /// How many there are.
        count: usize,
    },
}

/// The current time.
pub fn now() -> Seconds {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_secs().try_into().unwrap_or(Seconds::MAX)
}

/// In the format of RFC 3339.
pub fn timestamp(time: Seconds) -> String {
    Date(time).to_string()
}

fn system_time(time: Seconds) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(time.try_into().unwrap_or(0))
}

#[cfg(test)]
mod tests;
