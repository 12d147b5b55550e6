//! Whether a server's certificate proves the true name, and if not, why not.

/// Why a certificate was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// Its names do not include the true name.
    NotValidForName,
    /// Its last day has passed.
    Expired,
    /// Its first day has not come.
    NotYetValid,
    /// No trusted root vouches for it.
    UnknownIssuer,
    /// It vouches for itself, and nobody said to trust it.
    SelfSigned,
    /// A revocation list names it.
    Revoked,
    /// It was issued for something other than a server.
    WrongUsage,
    /// None of the keys in its chain is pinned.
    PinMismatch,
    /// A signature does not match: the server does not hold the certificate's key, or it is forged.
    BadSignature,
    /// Anything else, in rustls' words.
    Other(String),
}

/// A refused certificate: what was expected, and what it says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyFailure {
    /// Why it was refused.
    pub reason: Reason,
    /// The true name that it should have borne.
    pub expected: String,
    /// The DNS names and IP addresses that it bears (subject alternative names).
    pub presented: Vec<String>,
    /// The subject's common name; it counts for nothing, but tells people which certificate it is.
    pub common_name: Option<String>,
    /// Its issuer's distinguished name.
    pub issuer: String,
    /// Unix seconds; `None` where the certificate could not be read.
    pub not_before: Option<i64>,
    /// Unix seconds; `None` where the certificate could not be read.
    pub not_after: Option<i64>,
    /// Pin of the leaf's key, `sha256/BASE64`, as `tls.pins` takes it.
    pub pin: Option<String>,
}
