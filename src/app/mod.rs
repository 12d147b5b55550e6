//! A running proxy: built from a configuration, changed by another, and brought to its end.
//! The only module that knows all others.

mod certificates;
mod plan;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Weak},
    thread,
    time::Duration,
};

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::{
    runtime::{self, Runtime},
    sync::{mpsc, oneshot, watch},
    task::spawn_blocking,
    time::{interval, timeout},
};
use tokio_util::sync::CancellationToken;

use certificates::Certificates;
use plan::{Inventory, Loaded, Plan, Running, Sockets};

use crate::{
    admin::{self, Snapshot},
    command::{Command, Commands, StartError},
    config::{self, Config},
    connect::AddressPolicy,
    drain::Drain,
    files,
    forward::Passthrough,
    listener::{Bound, Listeners},
    resolve::Resolver,
    route::Routes,
    serve::{ForwardProxy, Server},
    telemetry::{Failures, Metrics, set_log_level},
    tls::server::{self, ServerTls},
    upstream::Upstream,
};

const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// How often it is asked whether a failure goes on or has ended.
const FAILURE_REPORTS: Duration = Duration::from_secs(1);

/// How often the file of `proxy.credentials` is looked at; a change is taken at the second look.
const CREDENTIALS_CHECK: Duration = Duration::from_millis(500);

/// A running proxy. It goes on when this is dropped; [`shutdown`](Self::shutdown) ends it.
#[derive(Debug)]
pub struct App {
    commands: Commands,
    listeners: Vec<SocketAddr>,
    proxy: Option<SocketAddr>,
    admin: Option<SocketAddr>,
    ended: watch::Receiver<bool>,
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
        let (commands, queue) = Commands::channel();
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
        let address = |configured| control.bound.get(configured).map(|bound| bound.address);
        let configured = control.config.aliases.iter().flat_map(|alias| &alias.listen);
        let listeners = configured.filter_map(address).collect();
        let proxy = control.proxy.as_ref().map(|listening| listening.address);
        let admin_address = admin.as_ref().map(|bound| bound.address);
        let (end, ended) = watch::channel(false);
        thread::Builder::new().name("control".into()).spawn(move || {
            control.run(runtime, admin, queue);
            end.send_replace(true);
        })?;
        Ok(Self { commands, listeners, proxy, admin: admin_address, ended })
    }

    /// The addresses that the aliases listen on, in the configuration's order.
    pub fn listeners(&self) -> &[SocketAddr] {
        &self.listeners
    }

    /// The forward proxy's address.
    pub fn proxy(&self) -> Option<SocketAddr> {
        self.proxy
    }

    /// The admin listener's address.
    pub fn admin(&self) -> Option<SocketAddr> {
        self.admin
    }

    /// What may be asked of it, by others too.
    pub fn commands(&self) -> &Commands {
        &self.commands
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
    /// The forward proxy's.
    proxy: Option<Listening>,
    running: Vec<Running>,
    /// Aliases that were removed or changed, while requests of theirs go on.
    leaving: Vec<Weak<Upstream>>,
    admin: Option<SocketAddr>,
    snapshot: Arc<Snapshot>,
    metrics: Metrics,
    /// None before the first configuration is at work.
    certificates: Option<Certificates>,
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
            proxy: ArcSwapOption::empty(),
            tls: ServerTls::new()?,
            failures: Failures::default(),
            accept_failures: Failures::default(),
            drain: Drain::default(),
        });
        let admin = config.admin.listen.map(Bound::bind).transpose().map_err(StartError::Admin)?;
        let mut control = Self {
            workers,
            resolver: Resolver::new(config.dns.clone()),
            policy: Arc::default(),
            listeners: Listeners::start(&server, workers, config.listener.max_connections)?,
            bound: HashMap::new(),
            proxy: None,
            running: Vec::new(),
            leaving: Vec::new(),
            admin: admin.as_ref().map(|bound| bound.address),
            snapshot: Arc::new(Snapshot::new(commands, metrics.clone())),
            server,
            metrics,
            certificates: None,
            config: Config::default(),
        };
        let now = control.inventory();
        let plan = Sockets::bind(&config, &now).and_then(|sockets| {
            let loaded = Loaded::load(&config, &now)?;
            Ok(Plan { config, sockets, loaded })
        });
        match plan {
            Ok(plan) => control.commit(plan),
            Err(error) => {
                // The threads have started already, with nothing to do.
                control.server.drain.stopped().cancel();
                return Err(error);
            }
        }
        Ok((control, admin))
    }

    /// What a plan goes on with.
    fn inventory(&self) -> Inventory {
        Inventory {
            config: self.config.clone(),
            workers: self.workers,
            resolver: self.resolver.clone(),
            policy: self.policy.clone(),
            bound: self.bound.keys().copied().collect(),
            running: self.running.clone(),
            certificates: self.certificates.as_ref().map(|current| current.keeper().clone()),
        }
    }

    /// Puts a plan to work, which was made with what is at work now. Nothing here fails or waits.
    fn commit(&mut self, plan: Plan) {
        let Plan { config, sockets, loaded } = plan;
        let Loaded { resolver, credentials, aliases, certificates, shown } = loaded;
        let (bounds, new_proxy) = (sockets.aliases, sockets.proxy);
        let wanted = plan::addresses(&config);
        self.server.tls.serve(shown);
        self.certificates = Some(certificates);
        let kept = self.bound.iter().filter(|(configured, _)| wanted.contains(configured));
        let addresses = kept.map(|(_, listening)| listening.address);
        let new_addresses = bounds.iter().map(|bound| bound.address);
        let kept_proxy = self.proxy.as_ref().filter(|_| config.proxy.listen.is_some());
        let proxy = new_proxy.as_ref().map(|bound| bound.address);
        let proxy = proxy.or(kept_proxy.map(|listening| listening.address));
        let own = addresses.chain(new_addresses).chain(proxy).chain(self.admin);
        self.policy.store(Arc::new(AddressPolicy::new(&config.policy, own)));
        let upstreams: Vec<_> = aliases.iter().map(|(upstream, _)| upstream.clone()).collect();
        self.server.routes.store(Arc::new(Routes::new(&upstreams)));
        self.server.settings.store(Arc::new(config.listener.clone()));
        self.server.proxy.store(proxy.map(|listen| {
            let allowed = config.proxy.passthrough == config::Passthrough::Allow;
            let passthrough =
                allowed.then(|| Passthrough::new(resolver.clone(), self.policy.clone()));
            Arc::new(ForwardProxy { listen, passthrough, credentials })
        }));
        for bound in bounds {
            self.listen(bound);
        }
        self.replace_proxy(new_proxy, proxy.is_some());
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
        let kept: HashSet<*const Upstream> = upstreams.iter().map(Arc::as_ptr).collect();
        for old in std::mem::replace(&mut self.running, running.collect()) {
            if !kept.contains(&Arc::as_ptr(&old.upstream)) {
                old.stop.cancel();
                self.leaving.push(Arc::downgrade(&old.upstream));
            }
        }
        self.leaving.retain(|upstream| upstream.strong_count() > 0);
        if config.policy != self.config.policy {
            let leaving = self.leaving.iter().filter_map(Weak::upgrade);
            upstreams.iter().cloned().chain(leaving).for_each(|upstream| upstream.enforce_policy());
        }
        self.resolver = resolver;
        self.snapshot.update(upstreams, config.clone());
        self.config = config;
    }

    fn listen(&mut self, bound: Bound) {
        let (configured, address) = (bound.configured, bound.address);
        let stop = self.listeners.add(bound);
        self.bound.insert(configured, Listening { address, stop });
    }

    /// Puts `new` in the place of the forward proxy's socket; without one, `keep` says whether the
    /// old one stays.
    fn replace_proxy(&mut self, new: Option<Bound>, keep: bool) {
        if new.is_none() && keep {
            return;
        }
        let new = new.map(|mut bound| {
            // Port 0 is another port for each who asks for it: what was bound tells them apart.
            bound.configured = bound.address;
            let address = bound.address;
            tracing::info!(%address, "forward proxy listening");
            Listening { address, stop: self.listeners.add(bound) }
        });
        if let Some(old) = std::mem::replace(&mut self.proxy, new) {
            old.stop.cancel();
        }
    }

    /// Says where each alias listens, as far as that is new.
    fn announce(&self, new: &Config) {
        if is_open(&new.proxy) && !is_open(&self.config.proxy) {
            tracing::warn!(
                "whoever reaches the forward proxy may use it: name a file of USER:PASSWORD lines \
                 in `proxy.credentials`",
            );
        }
        let old: HashMap<&str, &config::Alias> =
            self.config.aliases.iter().map(|alias| (alias.name.as_str(), alias)).collect();
        for alias in &new.aliases {
            let before = old.get(alias.name.as_str());
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
            tokio::spawn(follow_credentials(self.server.clone()));
            self.obey(queue).await;
            let grace = self.config.shutdown_grace;
            tracing::info!(connections = self.server.drain.alive(), ?grace, "draining");
            let left = self.server.drain.finish(grace).await;
            if left > 0 {
                tracing::warn!(
                    connections = left,
                    "`shutdown_grace` is over: closed the connections that were left",
                );
            }
            for running in &self.running {
                running.stop.cancel();
            }
            if let Some(certificates) = self.certificates.take() {
                certificates.close().await;
            }
            tracing::info!("stopped");
        });
        // Nothing waits for files on a volume that hangs.
        runtime.shutdown_background();
    }

    async fn obey(&mut self, mut queue: mpsc::Receiver<Command>) {
        let mut upkeep = interval(METRICS_UPKEEP);
        let mut reports = interval(FAILURE_REPORTS);
        let mut reloads = Reloads::default();
        loop {
            reloads.begin(|| self.inventory());
            tokio::select! {
                command = queue.recv() => match command {
                    Some(Command::Reload(config, reply)) => reloads.waiting.push_back((config, reply)),
                    Some(Command::Shutdown) | None => return,
                },
                (plan, reply) = reloads.planned() => {
                    let _ = reply.send(plan.map(|plan| self.reload(plan)));
                }
                _ = upkeep.tick() => self.metrics.upkeep(),
                _ = reports.tick() => self.server.report_failures(),
                shown = changed(&mut self.certificates) => self.server.tls.serve(shown),
            }
        }
    }

    fn reload(&mut self, plan: Plan) {
        let (old, new) = (&self.config, &plan.config);
        let level = (new.log.level != old.log.level).then_some(new.log.level);
        let waiting = waiting_for_a_restart(old, new);
        self.commit(plan);
        // Only where the file says something new: it may have been changed by `POST /log`.
        if let Some(level) = level {
            set_log_level(level);
        }
        if !waiting.is_empty() {
            tracing::warn!(keys = waiting.join(", "), "these settings take effect after a restart");
        }
    }
}

type Reply = oneshot::Sender<Result<(), StartError>>;
type Planning = Pin<Box<dyn Future<Output = Result<Plan, StartError>>>>;

/// Reloads: one that is being planned, and others that wait their turn.
#[derive(Default)]
struct Reloads {
    planning: Option<(Planning, Reply)>,
    /// Whoever asks waits for its reply, so that there are no more than those who ask.
    waiting: VecDeque<(Box<Config>, Reply)>,
}

impl Reloads {
    /// Begins the next, unless one is under way.
    fn begin(&mut self, now: impl FnOnce() -> Inventory) {
        if self.planning.is_none()
            && let Some((config, reply)) = self.waiting.pop_front()
        {
            self.planning = Some((Box::pin(Plan::make(*config, now())), reply));
        }
    }

    /// Waits until one is ready. Loses nothing where it is dropped.
    async fn planned(&mut self) -> (Result<Plan, StartError>, Reply) {
        loop {
            if let Some((planning, _)) = &mut self.planning {
                let plan = planning.await;
                if let Some((_, reply)) = self.planning.take() {
                    return (plan, reply);
                }
            }
            std::future::pending::<()>().await;
        }
    }
}

/// Follows the file of `proxy.credentials`, whichever it is.
async fn follow_credentials(server: Arc<Server>) {
    let mut checks = interval(CREDENTIALS_CHECK);
    loop {
        checks.tick().await;
        let proxy = server.proxy.load_full();
        let Some(credentials) = proxy.and_then(|proxy| proxy.credentials.clone()) else { continue };
        let look = spawn_blocking(move || credentials.refresh());
        // One that hangs must not keep that of the next configuration from being followed.
        let _ = timeout(files::PATIENCE, look).await;
    }
}

/// Whether anybody who reaches this machine may use the forward proxy.
fn is_open(proxy: &config::ForwardProxy) -> bool {
    let beyond = proxy.listen.is_some_and(|listen| !listen.ip().to_canonical().is_loopback());
    beyond && proxy.credentials.is_none()
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

async fn changed(certificates: &mut Option<Certificates>) -> server::Certificates {
    match certificates {
        Some(certificates) => certificates.changed().await,
        None => std::future::pending().await,
    }
}
