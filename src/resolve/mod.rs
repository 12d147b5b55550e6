//! From an alias to its true name and addresses, in the background.

use std::{net::IpAddr, sync::Arc, time::Duration};
use tokio::time::Instant;

/// The one name that is SNI, verified certificate name and `Host`.
///
/// Made in [`chain`] and nowhere else. Lower-case, IDNA-encoded, without the trailing dot; or an IP address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum TrueName {
    Name(Arc<str>),
    Ip(IpAddr),
}

/// One good answer: immutable, published whole.
#[derive(Debug)]
pub struct Resolution {
    /// Grows by one with each new true name (a failover); stays for new addresses (a rotation).
    pub generation: u64,
    pub true_name: TrueName,
    /// The names from the alias to its addresses, in the order of the links, no trailing dots.
    pub chain: Vec<Arc<str>>,
    /// Both families, in the order DNS gave them; never empty.
    pub addresses: Vec<IpAddr>,
    /// Clamped minimum over the chain.
    pub ttl: Duration,
    pub resolved_at: Instant,
}
