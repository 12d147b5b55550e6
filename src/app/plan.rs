//! A configuration made ready to be put to work. All that can fail is here, and all that can block.

use std::{collections::HashMap, net::SocketAddr, sync::Arc};

use arc_swap::ArcSwap;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::{
    certificates::{Certificates, Keeper},
    sockets::Sockets,
};
use crate::{
    command::StartError,
    config::{self, Config},
    connect::AddressPolicy,
    files,
    resolve::Resolver,
    serve::Credentials,
    telemetry::AliasSeries,
    tls::{RootStores, authority::Subject, server},
    upstream::Upstream,
};

/// What is at work now, as far as a plan goes on with it.
pub struct Inventory {
    pub config: Config,
    pub workers: usize,
    pub resolver: Arc<Resolver>,
    pub policy: Arc<ArcSwap<AddressPolicy>>,
    pub sockets: Sockets,
    /// Where the admin listener is.
    pub admin: Option<SocketAddr>,
    pub running: Vec<Running>,
    /// None before the first configuration is at work.
    pub certificates: Option<Keeper>,
}

/// An alias at work.
#[derive(Clone)]
pub struct Running {
    pub upstream: Arc<Upstream>,
    pub stop: CancellationToken,
}

/// What can be put to work without fail. Dropped, it leaves no trace.
pub struct Plan {
    pub config: Config,
    pub sockets: Sockets,
    pub loaded: Loaded,
}

/// What comes of the files that a configuration names.
pub struct Loaded {
    pub resolver: Arc<Resolver>,
    pub credentials: Option<Arc<Credentials>>,
    /// In the configuration's order; with what ends it where it is at work already.
    pub aliases: Vec<(Arc<Upstream>, Option<CancellationToken>)>,
    pub certificates: Certificates,
    pub shown: server::Certificates,
}

impl Plan {
    /// Makes `config` ready. The files are read on another thread, as one may hang; not so the
    /// sockets, which must be free again when it is given up. They listen last, as what comes to them
    /// then has to be served.
    pub async fn make(config: Config, now: Inventory) -> Result<Self, StartError> {
        let sockets = Sockets::bind(&config, &now.sockets, now.admin)?;
        let runtime = Handle::current();
        let (config, now, loaded) = files::work(move || {
            let _guard = runtime.enter();
            let loaded = Loaded::load(&config, &now);
            (config, now, loaded)
        })
        .await?;
        let loaded = loaded?;
        sockets.listen(&now.sockets, now.admin)?;
        Ok(Self { config, sockets, loaded })
    }

    /// The same at the start, when nothing is at work that a file could hold up.
    pub fn first(config: Config, now: &Inventory) -> Result<Self, StartError> {
        let sockets = Sockets::bind(&config, &now.sockets, now.admin)?;
        let loaded = Loaded::load(&config, now)?;
        sockets.listen(&now.sockets, now.admin)?;
        Ok(Self { config, sockets, loaded })
    }
}

impl Loaded {
    /// Reads what is not read yet. Blocking; must run inside of the control thread's runtime, which
    /// new aliases resolve on.
    pub fn load(config: &Config, now: &Inventory) -> Result<Self, StartError> {
        let credentials = credentials(&config.proxy)?;
        let same_dns = now.config.dns == config.dns;
        let resolver = match same_dns {
            true => now.resolver.clone(),
            false => now.resolver.with_settings(config.dns.clone()),
        };
        let mut roots = RootStores::default();
        let running: HashMap<&str, &Running> = now
            .running
            .iter()
            .map(|running| (running.upstream.config().name.as_str(), running))
            .collect();
        let mut aliases = Vec::with_capacity(config.aliases.len());
        for alias in &config.aliases {
            let running = running.get(alias.name.as_str()).copied();
            let unchanged = running.filter(|running| **running.upstream.config() == *alias);
            aliases.push(match unchanged.filter(|_| same_dns) {
                Some(running) => (running.upstream.clone(), Some(running.stop.clone())),
                None => (now.upstream(alias, running, &resolver, &mut roots)?, None),
            });
        }
        let subjects = aliases.iter().map(|(upstream, _)| {
            let alias = upstream.config();
            let listen = alias.listen.iter().map(SocketAddr::ip);
            Subject::new(&alias.name, upstream.hosts().iter().cloned(), listen)
        });
        let (certificates, shown) =
            Certificates::issue(config, subjects.collect(), now.certificates.as_ref())?;
        Ok(Self { resolver, credentials, aliases, certificates, shown })
    }
}

impl Inventory {
    fn upstream(
        &self,
        alias: &config::Alias,
        before: Option<&Running>,
        resolver: &Arc<Resolver>,
        roots: &mut RootStores,
    ) -> Result<Arc<Upstream>, StartError> {
        let config = Arc::new(alias.clone());
        // What was counted stays, whatever else of the alias is new.
        let series = match before {
            Some(old) => old.upstream.series().clone(),
            None => AliasSeries::new(&alias.name, self.workers),
        };
        let upstream = Upstream::new(config, resolver, roots, self.policy.clone(), series);
        upstream
            .map(Arc::new)
            .map_err(|source| StartError::Tls { alias: alias.name.clone(), source })
    }
}

fn credentials(proxy: &config::ForwardProxy) -> Result<Option<Arc<Credentials>>, StartError> {
    let Some(file) = proxy.credentials.clone() else { return Ok(None) };
    match Credentials::load(file.clone()) {
        Ok(credentials) => Ok(Some(Arc::new(credentials))),
        Err(source) => Err(StartError::Credentials { file, source }),
    }
}
