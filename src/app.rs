//! A running proxy: built from a configuration, changed by another, and brought to its end.
//! The only module that knows all others.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::SocketAddr,
    sync::{Arc, OnceLock},
    thread,
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{
    runtime::{self, Runtime},
    sync::{mpsc, oneshot, watch},
    time::interval,
};
use tokio_util::sync::CancellationToken;

use crate::{
    admin::{self, Snapshot},
    config::{self, Config},
    connect::AddressPolicy,
    drain::Drain,
    listener::{BindError, Bound, Listeners},
    resolve::Resolver,
    route::Routes,
    serve::Server,
    telemetry::{Metrics, set_log_level},
    tls::{RootStores, TlsConfigError},
    upstream::Upstream,
};

const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// Why a configuration cannot be put to work.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An alias' address cannot be listened on.
    #[error("{0}; the key is the alias' `listen`, the flag --listen")]
    Bind(#[from] BindError),
    /// The admin listener's address cannot be listened on.
    #[error("{0}; the key is `admin.listen`, the flag --admin")]
    Admin(BindError),
    /// An alias' TLS settings cannot be used.
    #[error("alias `{alias}`: {source}")]
    Tls {
        /// Whose.
        alias: String,
        /// Why.
        source: TlsConfigError,
    },
    /// The configuration has no alias.
    #[error("there is no alias to serve: name one, as in `truename run webscaler-manual`")]
    NoAlias,
    /// Threads or runtimes.
    #[error("cannot start: {0}")]
    Io(#[from] io::Error),
    /// The proxy that was to be changed has ended.
    #[error("the proxy has ended")]
    Ended,
}

/// A running proxy. It goes on when this is dropped; [`shutdown`](Self::shutdown) ends it.
#[derive(Debug)]
pub struct App {
    commands: Commands,
    listeners: Vec<SocketAddr>,
    admin: Option<SocketAddr>,
    ended: watch::Receiver<bool>,
}

/// What may be asked of a running proxy.
#[derive(Clone, Debug)]
pub struct Commands {
    control: mpsc::Sender<Command>,
    /// To whoever owns the configuration's file, where somebody does.
    owner: Arc<OnceLock<mpsc::Sender<ReloadRequest>>>,
}

#[derive(Debug)]
enum Command {
    Reload(Box<Config>, oneshot::Sender<Result<(), StartError>>),
    Shutdown,
}

/// Somebody wants the configuration's file to be read again, and waits for what comes of it.
#[derive(Debug)]
pub struct ReloadRequest(oneshot::Sender<Result<(), String>>);

impl ReloadRequest {
    /// Says what came of it; an error is the text of the file's problems.
    pub fn answer(self, result: Result<(), String>) {
        // Who asked may have left meanwhile.
        let _ = self.0.send(result);
    }
}

/// Why a file's configuration is not at work after it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// It has problems, or cannot be put to work; the old one stays.
    #[error("{0}")]
    Refused(String),
    /// There is no file: another program told the configuration.
    #[error(
        "this proxy was not started from a file: start it with `truename run --config FILE`, or \
         restart it with other arguments"
    )]
    NoFile,
    /// The proxy is draining, or has ended.
    #[error("the proxy is draining: start another one with the new configuration")]
    Ended,
}

impl Commands {
    /// Puts another configuration to work. The old one stays where the new one fails.
    pub async fn reload(&self, config: Config) -> Result<(), StartError> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Reload(Box::new(config), reply);
        self.control.send(command).await.map_err(|_| StartError::Ended)?;
        answer.await.map_err(|_| StartError::Ended)?
    }

    /// Has the configuration's file read again, by whoever owns it.
    pub async fn reload_file(&self) -> Result<(), ReloadError> {
        let owner = self.owner.get().ok_or(ReloadError::NoFile)?;
        let (reply, answer) = oneshot::channel();
        owner.send(ReloadRequest(reply)).await.map_err(|_| ReloadError::Ended)?;
        answer.await.map_err(|_| ReloadError::Ended)?.map_err(ReloadError::Refused)
    }

    /// Begins the end: whatever is being served may finish, for `shutdown_grace`.
    pub async fn shutdown(&self) {
        let _ = self.control.send(Command::Shutdown).await;
    }
}

impl App {
    /// Binds every listener and starts the threads. Neither DNS nor any target need be up.
    ///
    /// Blocking for some milliseconds, where trust stores are read.
    pub fn start(config: Config) -> Result<Self, StartError> {
        if config.aliases.is_empty() {
            return Err(StartError::NoAlias);
        }
        let workers = match config.workers {
            0 => thread::available_parallelism().map_or(1, usize::from),
            workers => workers,
        };
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let (control, queue) = mpsc::channel(8);
        let commands = Commands { control, owner: Arc::default() };
        let control = {
            let _guard = runtime.enter();
            Control::new(config, workers, commands.clone())
        };
        let (control, admin) = match control {
            Ok(control) => control,
            Err(error) => {
                runtime.shutdown_background();
                return Err(error);
            }
        };
        let listeners = control.bound.values().map(|listening| listening.address).collect();
        let admin_address = admin.as_ref().map(|bound| bound.address);
        let (end, ended) = watch::channel(false);
        thread::Builder::new().name("control".into()).spawn(move || {
            control.run(runtime, admin, queue);
            end.send_replace(true);
        })?;
        Ok(Self { commands, listeners, admin: admin_address, ended })
    }

    /// The addresses listened on.
    pub fn listeners(&self) -> &[SocketAddr] {
        &self.listeners
    }

    /// The admin listener's address.
    pub fn admin(&self) -> Option<SocketAddr> {
        self.admin
    }

    /// What may be asked of it, by others too.
    pub fn commands(&self) -> &Commands {
        &self.commands
    }

    /// The wishes that the configuration's file be read again, for the one who owns it: whoever
    /// asks first.
    pub fn reload_requests(&self) -> Option<mpsc::Receiver<ReloadRequest>> {
        let (owner, requests) = mpsc::channel(1);
        self.commands.owner.set(owner).is_ok().then_some(requests)
    }

    /// Waits until the proxy has ended, whoever ended it.
    pub async fn ended(&self) {
        let _ = self.ended.clone().wait_for(|ended| *ended).await;
    }

    /// Ends the proxy and waits until it has.
    pub async fn shutdown(self) {
        self.commands.shutdown().await;
        self.ended().await;
    }
}

/// An alias at work.
struct Running {
    upstream: Arc<Upstream>,
    stop: CancellationToken,
}

/// A socket at work.
struct Listening {
    address: SocketAddr,
    stop: CancellationToken,
}

/// The control thread's own.
struct Control {
    config: Config,
    workers: usize,
    resolver: Arc<Resolver>,
    policy: Arc<ArcSwap<AddressPolicy>>,
    server: Arc<Server>,
    listeners: Listeners,
    bound: HashMap<SocketAddr, Listening>,
    running: Vec<Running>,
    admin: Option<SocketAddr>,
    snapshot: Arc<Snapshot>,
    metrics: Metrics,
}

impl Control {
    fn new(
        config: Config,
        workers: usize,
        commands: Commands,
    ) -> Result<(Self, Option<Bound>), StartError> {
        let metrics = Metrics::install();
        let server = Arc::new(Server {
            routes: ArcSwap::default(),
            settings: ArcSwap::from_pointee(config.listener.clone()),
            drain: Drain::default(),
        });
        let admin = config.admin.listen.map(Bound::bind).transpose().map_err(StartError::Admin)?;
        let mut control = Self {
            workers,
            resolver: Resolver::new(config.dns.clone()),
            policy: Arc::default(),
            listeners: Listeners::start(&server, workers, config.listener.max_connections)?,
            bound: HashMap::new(),
            running: Vec::new(),
            admin: admin.as_ref().map(|bound| bound.address),
            snapshot: Arc::new(Snapshot::new(commands, metrics.clone())),
            server,
            metrics,
            config: Config::default(),
        };
        if let Err(error) = control.apply(config) {
            // The threads have started already, with nothing to do.
            control.server.drain.stopped().cancel();
            return Err(error);
        }
        Ok((control, admin))
    }

    /// Makes `config` the one at work. Everything that can fail comes first.
    fn apply(&mut self, config: Config) -> Result<(), StartError> {
        let wanted: HashSet<SocketAddr> =
            config.aliases.iter().flat_map(|alias| alias.listen.iter().copied()).collect();
        let mut new_bounds = Vec::new();
        for address in wanted.iter().filter(|address| !self.bound.contains_key(address)) {
            new_bounds.push(Bound::bind(*address)?);
        }
        let same_dns = self.config.dns == config.dns;
        let resolver =
            if same_dns { self.resolver.clone() } else { Resolver::new(config.dns.clone()) };
        let mut roots = RootStores::default();
        let mut aliases = Vec::with_capacity(config.aliases.len());
        for alias in &config.aliases {
            let unchanged =
                self.running.iter().find(|running| **running.upstream.config() == *alias);
            aliases.push(match unchanged.filter(|_| same_dns) {
                Some(running) => (running.upstream.clone(), Some(running.stop.clone())),
                None => (self.upstream(alias, &resolver, &mut roots)?, None),
            });
        }

        // From here on nothing fails.
        let kept = self.bound.iter().filter(|(configured, _)| wanted.contains(configured));
        let addresses = kept.map(|(_, listening)| listening.address);
        let new_addresses = new_bounds.iter().map(|bound| bound.address);
        let own = addresses.chain(new_addresses).chain(self.admin);
        self.policy.store(Arc::new(AddressPolicy::new(&config.policy, own)));
        let upstreams: Vec<_> = aliases.iter().map(|(upstream, _)| upstream.clone()).collect();
        self.server.routes.store(Arc::new(Routes::new(&upstreams)));
        self.server.settings.store(Arc::new(config.listener.clone()));
        for bound in new_bounds {
            self.listen(bound);
        }
        self.announce(&config);
        self.bound.retain(|configured, listening| {
            let keep = wanted.contains(configured);
            if !keep {
                listening.stop.cancel();
            }
            keep
        });
        let running = aliases.into_iter().map(|(upstream, running)| {
            let stop = running.unwrap_or_else(|| {
                let stop = CancellationToken::new();
                tokio::spawn(upstream.clone().run(stop.clone()));
                stop
            });
            Running { upstream, stop }
        });
        for old in std::mem::replace(&mut self.running, running.collect()) {
            if !upstreams.iter().any(|upstream| Arc::ptr_eq(upstream, &old.upstream)) {
                old.stop.cancel();
            }
        }
        self.resolver = resolver;
        self.snapshot.update(upstreams, config.clone());
        self.config = config;
        Ok(())
    }

    fn upstream(
        &self,
        alias: &config::Alias,
        resolver: &Arc<Resolver>,
        roots: &mut RootStores,
    ) -> Result<Arc<Upstream>, StartError> {
        let config = Arc::new(alias.clone());
        let upstream = Upstream::new(config, resolver, roots, self.policy.clone(), self.workers);
        upstream
            .map(Arc::new)
            .map_err(|source| StartError::Tls { alias: alias.name.clone(), source })
    }

    fn listen(&mut self, bound: Bound) {
        let (configured, address) = (bound.configured, bound.address);
        let stop = self.listeners.add(bound);
        self.bound.insert(configured, Listening { address, stop });
    }

    /// Says where each alias listens, as far as that is new.
    fn announce(&self, new: &Config) {
        for alias in &new.aliases {
            let before = self.config.aliases.iter().find(|before| before.name == alias.name);
            for configured in &alias.listen {
                let is_new = before.is_none_or(|before| !before.listen.contains(configured));
                if let Some(listening) = self.bound.get(configured).filter(|_| is_new) {
                    tracing::info!(address = %listening.address, alias = alias.name, "listening");
                }
            }
        }
    }

    /// The control thread, until the proxy has ended.
    fn run(mut self, runtime: Runtime, admin: Option<Bound>, queue: mpsc::Receiver<Command>) {
        runtime.block_on(async {
            if let Some(bound) = admin {
                tracing::info!(address = %bound.address, "admin listening");
                tokio::spawn(admin::serve(bound, self.snapshot.clone()));
            }
            self.obey(queue).await;
            let grace = self.config.shutdown_grace;
            tracing::info!(connections = self.server.drain.alive(), ?grace, "draining");
            if !self.server.drain.finish(grace).await {
                tracing::warn!(
                    connections = self.server.drain.alive(),
                    "`shutdown_grace` is over, and connections were cut off",
                );
            }
            for running in &self.running {
                running.stop.cancel();
            }
            tracing::info!("stopped");
        });
    }

    async fn obey(&mut self, mut queue: mpsc::Receiver<Command>) {
        let mut upkeep = interval(METRICS_UPKEEP);
        loop {
            tokio::select! {
                command = queue.recv() => match command {
                    Some(Command::Reload(config, reply)) => {
                        let _ = reply.send(self.reload(*config));
                    }
                    Some(Command::Shutdown) | None => return,
                },
                _ = upkeep.tick() => self.metrics.upkeep(),
            }
        }
    }

    fn reload(&mut self, config: Config) -> Result<(), StartError> {
        if config.aliases.is_empty() {
            return Err(StartError::NoAlias);
        }
        let level = (config.log.level != self.config.log.level).then_some(config.log.level);
        let waiting = waiting_for_a_restart(&self.config, &config);
        self.apply(config)?;
        // Only where the file says something new: it may have been changed by `POST /log`.
        if let Some(level) = level {
            set_log_level(level);
        }
        if !waiting.is_empty() {
            tracing::warn!(keys = waiting.join(", "), "these take effect at the next start");
        }
        Ok(())
    }
}

/// The keys that were changed and are read at the start only.
fn waiting_for_a_restart(old: &Config, new: &Config) -> Vec<&'static str> {
    let changed = [
        ("admin", old.admin != new.admin),
        ("workers", old.workers != new.workers),
        ("listener.max_connections", {
            old.listener.max_connections != new.listener.max_connections
        }),
        ("log.format", old.log.format != new.log.format),
        ("log.access", old.log.access != new.log.access),
    ];
    changed.into_iter().filter(|(_, changed)| *changed).map(|(key, _)| key).collect()
}
