//! Which client a connection belongs to.

use std::{
    hash::{Hash, Hasher},
    sync::{Arc, Weak},
};

use crate::proxy_header::Addresses;

/// One connection of a client. It is the same only as long as it is open: another client may get its port.
#[derive(Clone, Debug)]
pub struct ClientId(Weak<Addresses>);

impl ClientId {
    /// That of a client's connection, which holds the addresses for as long as it is open.
    pub fn of(client: &Arc<Addresses>) -> Self {
        Self(Arc::downgrade(client))
    }

    /// Whether the client's connection is closed.
    pub fn has_left(&self) -> bool {
        self.0.strong_count() == 0
    }
}

impl PartialEq for ClientId {
    fn eq(&self, other: &Self) -> bool {
        self.0.ptr_eq(&other.0)
    }
}

impl Eq for ClientId {}

impl Hash for ClientId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.as_ptr().hash(state);
    }
}
