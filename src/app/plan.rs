//! A configuration made ready to be put to work. All that can fail is here, and all that can block.

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

/// A reload waits so long for an address that is taken: the workers close the sockets that the one before it has
/// dropped, each in its own time.
const RELEASE: Duration = Duration::from_millis(250);
/// How often it tries.
const RELEASE_CHECK: Duration = Duration::from_millis(10);

/// What is at work now, as far as a plan goes on with it.
pub struct Inventory {
    pub upstream: upstream::Inventory,
    pub sockets: ListenSockets,
    /// Where the admin listener is.
    pub admin: Option<SocketAddr>,
    /// None before the first configuration is at work.
    pub certificates: Option<Keeper>,
}

/// What can be put to work without fail. Dropped, it leaves no trace.
pub struct Plan {
    pub config: Config,
    pub sockets: ListenSockets,
    pub loaded: Loaded,
}

/// What comes of the files that a configuration names.
pub struct Loaded {
    pub credentials: Option<Arc<Credentials>>,
    /// In the configuration's order.
    pub aliases: Vec<Arc<Alias>>,
    /// What their names were completed by.
    pub environment: Environment,
    pub certificates: CertificateWatcher,
    pub shown: server::ServerCertificates,
}

impl Plan {
    /// Makes `config` ready. The files are read on another thread, as one may hang; not so the
    /// sockets, which must be free again when it is given up. They listen last, as what comes to them
    /// then has to be served.
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

    /// The same at the start, when nothing is at work that a file could hold up.
    pub fn first(config: Config, now: &Inventory) -> Result<Self, StartError> {
        let sockets = ListenSockets::bind(&config, &now.sockets, now.admin)?;
        let loaded = Loaded::load(&config, now)?;
        sockets.listen(&now.sockets, now.admin)?;
        Ok(Self { config, sockets, loaded })
    }
}

/// Binds the sockets of `config`. An address that is taken may be free in a moment.
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
    /// Reads what is not read yet. Blocking.
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
