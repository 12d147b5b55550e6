//! The sockets of a configuration: which are kept, which are new, and which are closed.

use std::{
    collections::HashSet,
    io,
    net::{Ipv6Addr, SocketAddr},
    sync::Arc,
};

use foldhash::HashMap;

use crate::{
    command::StartError,
    config::Config,
    listener::{BindError, Bound},
    serve::{ListenSocketId, ListenSocketUse, ListenerId, Part, covers},
};

/// What a socket accepts connections for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// The aliases with this address in their `listen`.
    Aliases(SocketAddr),
    /// `proxy.listen`
    Proxy(SocketAddr),
}

/// A socket with its purpose.
#[derive(Clone)]
pub struct Listening {
    pub bound: Arc<Bound>,
    pub purpose: Purpose,
    /// For `[::]`, whether connections to IPv4 addresses are not served. A socket that was bound before IPv4
    /// addresses were configured still accepts them.
    pub ipv6_only: bool,
    pub role: Role,
}

/// How a socket relates to its purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It existed before.
    Kept,
    /// It was bound for the purpose.
    New,
    /// It existed before the purpose's own socket, which accepts all connections that this one does and more.
    Extra,
}

/// The sockets of a configuration.
#[derive(Clone, Default)]
pub struct ListenSockets {
    pub at_work: Vec<Listening>,
    /// Wide sockets that were replaced by more specific ones. Connections to these may still arrive at the
    /// wide ones.
    pub closing: Vec<Arc<Bound>>,
}

impl ListenSockets {
    /// The sockets of `config`. Existing ones are reused where they fit. The others are bound, but do not
    /// listen yet: nothing has changed if this is dropped.
    ///
    /// `admin` is the address of the admin listener.
    pub fn bind(
        config: &Config,
        now: &Self,
        admin: Option<SocketAddr>,
    ) -> Result<Self, StartError> {
        let mut free = Free::new(now);
        let mut sockets = Self::default();
        let mut missing = Vec::new();
        let mut purposes = purposes(config);
        // A socket of port 0 is first of all for the purpose that it was bound for.
        purposes.sort_by_key(|purpose| purpose.address().port() != 0);
        for purpose in purposes {
            let ipv6_only = is_ipv6_only(config, admin, purpose.address());
            match free.take(purpose, ipv6_only) {
                Some(bound) => {
                    let role = Role::Kept;
                    sockets.at_work.push(Listening { bound, purpose, ipv6_only, role });
                }
                None => missing.push((purpose, ipv6_only)),
            }
        }
        let mut ours: Vec<_> = now.all().cloned().collect();
        for (purpose, ipv6_only) in missing {
            let bound = Bound::new(purpose.address(), ipv6_only, &ours);
            let bound = Arc::new(bound.map_err(|error| purpose.error(error, admin))?);
            ours.push(bound.clone());
            let role = Role::New;
            sockets.at_work.push(Listening { bound, purpose, ipv6_only, role });
        }
        for bound in free.left() {
            let wide = sockets
                .own()
                .find(|wide| covers(wide.bound.address, wide.ipv6_only, bound.address))
                .cloned();
            if let Some(wide) = wide {
                sockets.at_work.push(Listening { bound, role: Role::Extra, ..wide });
            } else if sockets.own().any(|narrow| bound.covers(narrow.bound.address)) {
                sockets.closing.push(bound);
            }
        }
        Ok(sockets)
    }

    /// Makes the new ones listen. Connections queue in them until a worker accepts.
    pub fn listen(&self, now: &Self, admin: Option<SocketAddr>) -> Result<(), StartError> {
        let ours: Vec<_> = self.all().chain(now.all()).cloned().collect();
        for listening in self.own().filter(|listening| listening.role == Role::New) {
            let result = listening.bound.listen(&ours);
            result.map_err(|error| listening.purpose.error(error, admin))?;
        }
        Ok(())
    }

    /// The sockets that no worker accepts on yet.
    pub fn fresh(&self) -> impl Iterator<Item = &Arc<Bound>> {
        let new = self.own().filter(|listening| listening.role == Role::New);
        new.map(|listening| &listening.bound)
    }

    /// The sockets as the workers use them.
    pub fn uses(
        &self,
        listener: impl Fn(Purpose) -> Option<ListenerId>,
    ) -> HashMap<ListenSocketId, ListenSocketUse> {
        let at_work = self.at_work.iter().filter_map(|listening| {
            let takes_more = listening.ipv6_only && listening.bound.is_of_both_families();
            let socket_use = match takes_more {
                true => ListenSocketUse::Parts(self.parts(&listening.bound, &listener)),
                false => ListenSocketUse::Open(listener(listening.purpose)?),
            };
            Some((listening.bound.id, socket_use))
        });
        let closing = self
            .closing
            .iter()
            .map(|wide| (wide.id, ListenSocketUse::Parts(self.parts(wide, &listener))));
        at_work.chain(closing).collect()
    }

    /// The parts of a wide socket whose connections are served.
    fn parts(&self, wide: &Bound, listener: &impl Fn(Purpose) -> Option<ListenerId>) -> Vec<Part> {
        let inside = self.at_work.iter().filter(|narrow| wide.covers(narrow.bound.address));
        let part = |narrow: &Listening| {
            let listener = listener(narrow.purpose)?;
            Some(Part { address: narrow.bound.address, ipv6_only: narrow.ipv6_only, listener })
        };
        inside.filter_map(part).collect()
    }

    /// The address that connections for a purpose arrive at.
    pub fn address(&self, purpose: Purpose) -> Option<SocketAddr> {
        self.own().find(|own| own.purpose == purpose).map(|own| own.bound.address)
    }

    /// Closes those that are not among `kept`.
    pub fn close_all_but(&self, kept: &Self) {
        let kept: HashSet<_> = kept.all().map(|bound| bound.id).collect();
        for bound in self.all() {
            if !kept.contains(&bound.id) {
                bound.close();
            }
        }
    }

    /// One for each purpose.
    fn own(&self) -> impl Iterator<Item = &Listening> {
        self.at_work.iter().filter(|listening| listening.role != Role::Extra)
    }

    fn all(&self) -> impl Iterator<Item = &Arc<Bound>> {
        self.at_work.iter().map(|listening| &listening.bound).chain(&self.closing)
    }
}

/// The existing sockets that have no new purpose yet.
struct Free {
    by_address: HashMap<SocketAddr, Vec<Arc<Bound>>>,
    /// Those of port 0, which is a different port for each purpose.
    any_port: HashMap<Purpose, Arc<Bound>>,
}

impl Free {
    fn new(now: &ListenSockets) -> Self {
        let mut free = Self { by_address: HashMap::default(), any_port: HashMap::default() };
        for bound in now.all() {
            free.by_address.entry(bound.address).or_default().push(bound.clone());
        }
        let any_port = now.own().filter(|own| own.purpose.address().port() == 0);
        free.any_port = any_port.map(|own| (own.purpose, own.bound.clone())).collect();
        free
    }

    fn take(&mut self, purpose: Purpose, ipv6_only: bool) -> Option<Arc<Bound>> {
        let address = match self.any_port.get(&purpose) {
            Some(bound) => bound.address,
            None => purpose.address(),
        };
        let there = self.by_address.get_mut(&address)?;
        let index = there.iter().position(|bound| bound.takes_all_of(address, ipv6_only))?;
        Some(there.swap_remove(index))
    }

    fn left(self) -> impl Iterator<Item = Arc<Bound>> {
        self.by_address.into_values().flatten()
    }
}

impl Purpose {
    /// As configured.
    fn address(self) -> SocketAddr {
        match self {
            Self::Aliases(address) | Self::Proxy(address) => address,
        }
    }

    fn error(self, error: BindError, admin: Option<SocketAddr>) -> StartError {
        let address = error.address;
        let meets = |admin| covers(admin, false, address) || covers(address, false, admin);
        let is_taken = error.source.kind() == io::ErrorKind::AddrInUse;
        let error = BindError { is_of_admin: is_taken && admin.is_some_and(meets), ..error };
        match self {
            Self::Aliases(_) => StartError::Bind(error),
            Self::Proxy(_) => StartError::Proxy(error),
        }
    }
}

/// The purposes of a configuration, in its order.
fn purposes(config: &Config) -> Vec<Purpose> {
    let of_aliases = config.aliases.iter().flat_map(|alias| &alias.listen);
    let purposes = of_aliases.copied().map(Purpose::Aliases);
    let purposes = purposes.chain(config.proxy.listen.map(Purpose::Proxy));
    let mut seen = HashSet::new();
    purposes.filter(|purpose| seen.insert(*purpose)).collect()
}

/// Whether `[::]` must not include IPv4 addresses, because some of them are configured
/// separately.
pub fn is_ipv6_only(config: &Config, admin: Option<SocketAddr>, address: SocketAddr) -> bool {
    if address.ip() != Ipv6Addr::UNSPECIFIED {
        return false;
    }
    let purposes = purposes(config).into_iter().map(Purpose::address);
    let mut all = purposes.chain(config.admin.listen).chain(admin);
    all.any(|other| other.is_ipv4() && other.port() == address.port() && other.port() != 0)
}
