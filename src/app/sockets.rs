//! The sockets of a configuration: which are there already, which are new, and which have to go.

use std::{collections::HashSet, io, net::SocketAddr, sync::Arc};

use crate::{
    command::StartError,
    config::Config,
    listener::{BindError, Bound},
    serve::{self, SocketUse, covers},
};

/// What connections are accepted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Purpose {
    /// The aliases that have this in their `listen`.
    Aliases(SocketAddr),
    /// `proxy.listen`
    Proxy(SocketAddr),
}

/// A socket with its purpose.
#[derive(Clone)]
pub struct Listening {
    pub bound: Arc<Bound>,
    pub purpose: Purpose,
    /// It was there before the purpose's own socket, which takes all that this one does and more.
    pub is_extra: bool,
}

/// The sockets of a configuration.
#[derive(Clone, Default)]
pub struct Sockets {
    pub at_work: Vec<Listening>,
    /// Wide sockets that narrower ones have taken the place of. Connections to those may still be on
    /// their way through the wide ones.
    pub closing: Vec<Arc<Bound>>,
    /// Those of `at_work` that are new.
    pub new: Vec<Arc<Bound>>,
}

impl Sockets {
    /// The sockets of `config`. Those that are there serve again wherever they fit. The others are
    /// bound, but do not listen yet: nothing has changed where this is dropped.
    ///
    /// `admin` is where the admin listener is.
    pub fn bind(
        config: &Config,
        now: &Self,
        admin: Option<SocketAddr>,
    ) -> Result<Self, StartError> {
        let mut free: Vec<(Arc<Bound>, Option<Purpose>)> = now.with_purposes().collect();
        let mut sockets = Self::default();
        let mut missing = Vec::new();
        for purpose in purposes(config) {
            let ipv6_only = is_ipv6_only(config, admin, purpose.address());
            let fits = |(bound, of): &(Arc<Bound>, Option<Purpose>)| match purpose.address().port()
            {
                // Another port for each who asks for it.
                0 => *of == Some(purpose),
                _ => bound.takes_all_of(purpose.address(), ipv6_only),
            };
            match free.iter().position(fits) {
                Some(index) => sockets.add(free.swap_remove(index).0, purpose, false),
                None => missing.push((purpose, ipv6_only)),
            }
        }
        let mut ours: Vec<_> = now.with_purposes().map(|(bound, _)| bound).collect();
        for (purpose, ipv6_only) in missing {
            let bound = Bound::new(purpose.address(), ipv6_only, &ours);
            let bound = Arc::new(bound.map_err(|error| purpose.error(error, admin))?);
            ours.push(bound.clone());
            sockets.new.push(bound.clone());
            sockets.add(bound, purpose, false);
        }
        for (bound, _) in free {
            let mut own = sockets.at_work.iter().filter(|listening| !listening.is_extra);
            let wide = own.clone().find(|listening| listening.bound.covers(bound.address));
            if let Some(purpose) = wide.map(|wide| wide.purpose) {
                sockets.add(bound, purpose, true);
            } else if own.any(|narrow| bound.covers(narrow.bound.address)) {
                sockets.closing.push(bound);
            }
        }
        Ok(sockets)
    }

    /// Has the new ones listen. Connections wait in them until somebody accepts.
    pub fn listen(&self, now: &Self, admin: Option<SocketAddr>) -> Result<(), StartError> {
        let all = self.with_purposes().chain(now.with_purposes()).map(|(bound, _)| bound);
        let ours: Vec<_> = all.collect();
        for listening in &self.at_work {
            if self.new.iter().any(|new| Arc::ptr_eq(new, &listening.bound)) {
                let result = listening.bound.listen(&ours);
                result.map_err(|error| listening.purpose.error(error, admin))?;
            }
        }
        Ok(())
    }

    /// What the workers know of them.
    pub fn uses(&self) -> serve::Sockets {
        let listener = |purpose| match purpose {
            Purpose::Aliases(configured) => configured,
            Purpose::Proxy(configured) => self.address(purpose).unwrap_or(configured),
        };
        let at_work = self
            .at_work
            .iter()
            .map(|listening| (listening.bound.id, SocketUse::Open(listener(listening.purpose))));
        let closing = self.closing.iter().map(|wide| {
            let narrow = self.at_work.iter().filter(|narrow| wide.covers(narrow.bound.address));
            let narrow = narrow.map(|narrow| (narrow.bound.address, listener(narrow.purpose)));
            (wide.id, SocketUse::Closing(narrow.collect()))
        });
        at_work.chain(closing).collect()
    }

    /// Where connections for a purpose come to.
    pub fn address(&self, purpose: Purpose) -> Option<SocketAddr> {
        let mut own = self.at_work.iter().filter(|listening| !listening.is_extra);
        own.find(|listening| listening.purpose == purpose).map(|own| own.bound.address)
    }

    /// Closes those that are not among `kept`.
    pub fn close_all_but(&self, kept: &Self) {
        let kept: HashSet<_> = kept.with_purposes().map(|(bound, _)| bound.id).collect();
        for (bound, _) in self.with_purposes() {
            if !kept.contains(&bound.id) {
                bound.close();
            }
        }
    }

    fn add(&mut self, bound: Arc<Bound>, purpose: Purpose, is_extra: bool) {
        self.at_work.push(Listening { bound, purpose, is_extra });
    }

    fn with_purposes(&self) -> impl Iterator<Item = (Arc<Bound>, Option<Purpose>)> {
        let at_work = self.at_work.iter().map(|listening| {
            let purpose = (!listening.is_extra).then_some(listening.purpose);
            (listening.bound.clone(), purpose)
        });
        at_work.chain(self.closing.iter().map(|bound| (bound.clone(), None)))
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

/// What a configuration needs sockets for, in its order.
fn purposes(config: &Config) -> Vec<Purpose> {
    let of_aliases = config.aliases.iter().flat_map(|alias| &alias.listen);
    let purposes = of_aliases.copied().map(Purpose::Aliases);
    let purposes = purposes.chain(config.proxy.listen.map(Purpose::Proxy));
    let mut seen = HashSet::new();
    purposes.filter(|purpose| seen.insert(*purpose)).collect()
}

/// Whether `[::]` has to leave out the addresses of IPv4: where some of them are configured by
/// themselves.
pub fn is_ipv6_only(config: &Config, admin: Option<SocketAddr>, address: SocketAddr) -> bool {
    let purposes = purposes(config).into_iter().map(Purpose::address);
    let mut all = purposes.chain(config.admin.listen).chain(admin);
    all.any(|other| other.is_ipv4() && other.port() == address.port() && other.port() != 0)
}
