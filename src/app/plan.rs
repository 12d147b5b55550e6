//! Prepares a configuration. Everything that can fail or block happens here.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use tokio::time::{Instant, sleep};

use super::{
    certificates::{CertificateWatcher, Keeper},
    listen_sockets::ListenSockets,
};
use crate::{
    command::StartError,
    config::{self, Config},
    files,
    resolve::Environment,
    serve::Credentials,
    tls::{authority::Subject, server},
    upstream::{self, Alias},
};

/// How long a reload waits for an address that is in use: the workers may not have closed the sockets that the
/// previous reload has dropped.
const RELEASE: Duration = Duration::from_millis(250);
/// The time between two attempts.
const RELEASE_CHECK: Duration = Duration::from_millis(10);

/// The current state that a plan starts from.
pub struct Inventory {
    pub upstream: upstream::Inventory,
    pub sockets: ListenSockets,
    /// The address of the admin listener.
    pub admin: Option<SocketAddr>,
    /// `None` before the first configuration is in use.
    pub certificates: Option<Keeper>,
}

/// A configuration that can be applied without errors. Dropping it has no effect.
pub struct Plan {
    pub config: Config,
    pub sockets: ListenSockets,
    pub loaded: Loaded,
}

/// What was loaded from the files of a configuration.
pub struct Loaded {
    pub credentials: Option<Arc<Credentials>>,
    /// In the configuration's order.
    pub aliases: Vec<Arc<Alias>>,
    /// The namespace and cluster domain that completed their names.
    pub environment: Environment,
    pub certificates: CertificateWatcher,
    pub shown: server::ServerCertificates,
}

impl Plan {
    /// Prepares `config`. Files are read on another thread, because they may hang. Sockets are not bound there,
    /// because they must be closed when this is cancelled. They start to listen last, because connections to
    /// them must be served from then on.
    pub async fn make(config: Config, now: Inventory) -> Result<Self, StartError> {
        if config.aliases.is_empty() {
            return Err(StartError::NoAlias);
        }
        let sockets = bind(&config, &now).await?;
        let (config, now, loaded) = files::work(move || {
            let loaded = Loaded::load(&config, &now);
            (config, now, loaded)
        })
        .await?;
        let loaded = loaded?;
        sockets.listen(&now.sockets, now.admin)?;
        Ok(Self { config, sockets, loaded })
    }

    /// The same at the start, when there is nothing that a file could block.
    pub fn first(config: Config, now: &Inventory) -> Result<Self, StartError> {
        let sockets = ListenSockets::bind(&config, &now.sockets, now.admin)?;
        let loaded = Loaded::load(&config, now)?;
        sockets.listen(&now.sockets, now.admin)?;
        Ok(Self { config, sockets, loaded })
    }
}

/// Binds the sockets of `config`. An address that is in use may be free in a moment.
async fn bind(config: &Config, now: &Inventory) -> Result<ListenSockets, StartError> {
    let deadline = Instant::now() + RELEASE;
    loop {
        match ListenSockets::bind(config, &now.sockets, now.admin) {
            Err(StartError::Bind(error) | StartError::Proxy(error))
                if error.is_taken() && Instant::now() < deadline =>
            {
                sleep(RELEASE_CHECK).await;
            }
            result => return result,
        }
    }
}

impl Loaded {
    /// Reads all files that have not been read yet. Blocking.
    pub fn load(config: &Config, now: &Inventory) -> Result<Self, StartError> {
        let credentials = credentials(&config.proxy)?;
        let environment = now.upstream.environment(&config.dns);
        let aliases = now.upstream.plan(&config.aliases, &config.dns);
        let aliases = aliases.map_err(|(alias, source)| StartError::Tls { alias, source })?;
        let subjects = aliases.iter().map(|alias| {
            let settings = alias.config();
            let listen = settings.listen.iter().map(SocketAddr::ip);
            Subject::new(&settings.name, alias.hosts().iter().cloned(), listen)
        });
        let (certificates, shown) =
            CertificateWatcher::issue(config, subjects.collect(), now.certificates.as_ref())?;
        Ok(Self { credentials, aliases, environment, certificates, shown })
    }
}

fn credentials(proxy: &config::ForwardProxy) -> Result<Option<Arc<Credentials>>, StartError> {
    let Some(file) = proxy.credentials.clone() else { return Ok(None) };
    match Credentials::load(file.clone()) {
        Ok(credentials) => Ok(Some(Arc::new(credentials))),
        Err(source) => Err(StartError::Credentials { file, source }),
    }
}
