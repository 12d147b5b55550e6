//! A running proxy: start, reload and shutdown.
//! The only module that depends on all others.

mod certificates;
mod listen_sockets;
mod plan;
mod serving;

use std::{
    collections::{HashMap, VecDeque},
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    thread,
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{
    runtime::{self, Runtime},
    sync::{mpsc, oneshot, watch},
    task::spawn_blocking,
    time::{Instant, interval, sleep_until, timeout},
};

use certificates::CertificateWatcher;
use listen_sockets::{ListenSockets, Purpose, is_ipv6_only};
use plan::{Inventory, Loaded, Plan};
use serving::Parts;

use crate::{
    admin::{self, Snapshot},
    command::{Command, Commands, StartError},
    config::{self, Config},
    connect::AddressPolicy,
    drain::Drain,
    files,
    forward::Passthrough,
    listener::{Bound, Workers},
    resolve::{Environment, Resolver},
    serve::Server,
    telemetry::{Failures, Metrics, set_log_level},
    tls::server::{self, ServerTls},
    upstream::Registry,
};

const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// How often repeated failures are reported.
const FAILURE_REPORTS: Duration = Duration::from_secs(1);

/// The time until the next attempt to rename the aliases if it fails, for example because their certificates
/// cannot be written.
const RENAME_AGAIN: Duration = Duration::from_secs(5);

/// How long a socket is kept after more specific ones have replaced it: TCP handshakes may be in progress.
const HANDSHAKES: Duration = Duration::from_secs(1);

/// How often the file of `proxy.credentials` is checked. A change takes effect at the second check.
const CREDENTIALS_CHECK: Duration = Duration::from_millis(500);

/// A running proxy. It continues when this is dropped; [`shutdown`](Self::shutdown) ends it.
#[derive(Debug)]
pub struct App {
    commands: Commands,
    listeners: Vec<SocketAddr>,
    proxy: Option<SocketAddr>,
    admin: Option<SocketAddr>,
    ended: watch::Receiver<bool>,
}

impl App {
    /// Binds all listeners and starts the threads. DNS and targets need not be available.
    ///
    /// Blocks for some milliseconds while trust stores are read.
    pub fn start(config: Config) -> Result<Self, StartError> {
        let (commands, queue) = Commands::channel();
        Self::start_with(config, commands, queue)
    }

    /// The same with a channel of the caller's.
    pub(crate) fn start_with(
        config: Config,
        commands: Commands,
        queue: mpsc::Receiver<Command>,
    ) -> Result<Self, StartError> {
        if config.aliases.is_empty() {
            return Err(StartError::NoAlias);
        }
        let workers = match config.workers {
            0 => thread::available_parallelism().map_or(1, usize::from),
            workers => workers,
        };
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
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
        let address = |configured: &_| control.sockets.address(Purpose::Aliases(*configured));
        let configured = control.config.aliases.iter().flat_map(|alias| &alias.listen);
        let listeners = configured.filter_map(address).collect();
        let proxy = control.proxy_address(&control.config);
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

    /// A handle for commands to it.
    pub fn commands(&self) -> &Commands {
        &self.commands
    }

    /// Waits until the proxy has ended for any reason.
    pub async fn ended(&self) {
        let _ = self.ended.clone().wait_for(|ended| *ended).await;
    }

    /// Ends the proxy and waits for its end.
    pub async fn shutdown(self) {
        self.commands.shutdown().await;
        self.ended().await;
    }
}

/// The state of the control thread.
struct Control {
    config: Config,
    registry: Registry,
    /// The namespace and cluster domain that completed the aliases' names.
    environment: Environment,
    renaming: Renaming,
    policy: Arc<ArcSwap<AddressPolicy>>,
    server: Arc<Server>,
    threads: Workers,
    sockets: ListenSockets,
    /// When the last sockets were replaced.
    closing_since: Instant,
    admin: Option<SocketAddr>,
    snapshot: Arc<Snapshot>,
    metrics: Metrics,
    /// `None` before the first configuration is in use.
    certificates: Option<CertificateWatcher>,
}

impl Control {
    fn new(
        config: Config,
        workers: usize,
        commands: Commands,
    ) -> Result<(Self, Option<Bound>), StartError> {
        let metrics = Metrics::install();
        let server = Arc::new(Server {
            serving: ArcSwap::default(),
            tls: ServerTls::new()?,
            failures: Failures::default(),
            header_failures: Failures::default(),
            accept_failures: Failures::default(),
            drain: Drain::default(),
        });
        let bind = |address| Bound::listening(address, is_ipv6_only(&config, None, address));
        let admin = config.admin.listen.map(bind).transpose().map_err(StartError::Admin)?;
        let policy = Arc::<ArcSwap<AddressPolicy>>::default();
        let resolver = Resolver::new(config.dns.clone());
        let environment = resolver.environment();
        let mut control = Self {
            renaming: Renaming::of(&environment),
            environment,
            registry: Registry::new(resolver, policy.clone(), workers),
            policy,
            threads: Workers::start(&server, workers, config.listener.max_connections)?,
            sockets: ListenSockets::default(),
            closing_since: Instant::now(),
            admin: admin.as_ref().map(|bound| bound.address),
            snapshot: Arc::new(Snapshot::new(commands, metrics.clone())),
            server,
            metrics,
            certificates: None,
            config: Config::default(),
        };
        match Plan::first(config, &control.inventory()) {
            Ok(plan) => control.commit(plan),
            Err(error) => {
                // The threads have already started.
                control.server.drain.stopped().cancel();
                return Err(error);
            }
        }
        Ok((control, admin))
    }

    /// The state that a plan starts from.
    fn inventory(&self) -> Inventory {
        Inventory {
            upstream: self.registry.inventory(),
            sockets: self.sockets.clone(),
            admin: self.admin,
            certificates: self.certificates.as_ref().map(|current| current.keeper().clone()),
        }
    }

    /// Applies a plan, which was made for the current state. Nothing here fails or waits.
    fn commit(&mut self, plan: Plan) {
        let Plan { config, sockets, loaded } = plan;
        let Loaded { credentials, aliases, environment, certificates, shown } = loaded;
        self.certificates = Some(certificates);
        let addresses = sockets.at_work.iter().map(|listening| listening.bound.address);
        let own = addresses.chain(self.admin);
        self.policy.store(Arc::new(AddressPolicy::new(&config.policy, own)));
        self.renaming = Renaming::of(&environment);
        self.environment = environment;
        self.registry.commit(&aliases, &config.dns);
        let allowed = config.proxy.passthrough == config::Passthrough::Allow;
        let resolver = self.registry.resolver().clone();
        let parts = Parts {
            config: &config,
            aliases: &aliases,
            sockets: &sockets,
            passthrough: allowed.then(|| Passthrough::new(resolver, self.policy.clone())),
            credentials,
            certificates: shown,
            drain: &self.server.drain,
        };
        let serving = Arc::new(parts.serving(&self.server.serving.load()));
        let before = self.server.serving.swap(serving.clone());
        for (id, listener) in &before.listeners {
            if !serving.listeners.contains_key(id) {
                listener.drain.begin();
            }
        }
        if config.policy != self.config.policy {
            aliases.iter().for_each(|alias| alias.enforce_policy());
        }
        let old_sockets = std::mem::replace(&mut self.sockets, sockets);
        self.sockets.fresh().for_each(|bound| self.threads.accept(bound));
        old_sockets.close_all_but(&self.sockets);
        self.closing_since = Instant::now();
        self.announce(&config, &old_sockets);
        self.snapshot.update(aliases, config.clone());
        self.config = config;
    }

    /// The address of the forward proxy.
    fn proxy_address(&self, config: &Config) -> Option<SocketAddr> {
        self.sockets.address(Purpose::Proxy(config.proxy.listen?))
    }

    /// Closes sockets that were replaced, once no handshakes can be in progress on them.
    fn close_replaced(&mut self) {
        if self.closing_since.elapsed() >= HANDSHAKES {
            self.sockets.closing.drain(..).for_each(|bound| bound.close());
        }
    }

    /// Logs the new addresses of aliases.
    fn announce(&self, new: &Config, old_sockets: &ListenSockets) {
        if is_open(&new.proxy) && !is_open(&self.config.proxy) {
            tracing::warn!(
                "the forward proxy is open to other machines without credentials: set \
                 `proxy.credentials` to a file of USER:PASSWORD lines",
            );
        }
        let old_proxy = self.config.proxy.listen.map(Purpose::Proxy);
        let old_proxy = old_proxy.and_then(|purpose| old_sockets.address(purpose));
        if let Some(address) = self.proxy_address(new).filter(|new| old_proxy != Some(*new)) {
            tracing::info!(%address, "forward proxy listening");
        }
        let old: HashMap<&str, &config::Alias> =
            self.config.aliases.iter().map(|alias| (alias.name.as_str(), alias)).collect();
        for alias in &new.aliases {
            let before = old.get(alias.name.as_str());
            for configured in &alias.listen {
                let is_new = before.is_none_or(|before| !before.listen.contains(configured));
                let address = self.sockets.address(Purpose::Aliases(*configured));
                if let Some(address) = address.filter(|_| is_new) {
                    tracing::info!(%address, alias = alias.name, "listening");
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
            let left = self.drain().await;
            if left > 0 {
                tracing::warn!(
                    connections = left,
                    "`shutdown_grace` is over: closed the remaining connections",
                );
            }
            drop(self.registry);
            if let Some(certificates) = self.certificates.take() {
                certificates.close().await;
            }
            tracing::info!("stopped");
        });
        // Does not wait for files on a volume that hangs.
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
                () = self.renaming.due(self.registry.resolver(), &self.environment), if reloads.is_idle() => {
                    reloads.waiting.push_back(self.rename());
                }
                _ = upkeep.tick() => self.metrics.upkeep(),
                _ = reports.tick() => {
                    self.server.report_failures();
                    if reloads.planning.is_none() {
                        self.close_replaced();
                    }
                }
                shown = changed(&mut self.certificates) => self.show(shown),
            }
        }
    }

    /// Lets connections finish within `shutdown_grace`. Returns how many were closed at its end. Certificates and
    /// reports are maintained in the meantime.
    async fn drain(&mut self) -> usize {
        let grace = self.config.shutdown_grace;
        tracing::info!(connections = self.server.drain.alive(), ?grace, "draining");
        let server = self.server.clone();
        let mut finished = pin!(server.drain.finish(grace));
        let mut upkeep = interval(METRICS_UPKEEP);
        let mut reports = interval(FAILURE_REPORTS);
        loop {
            tokio::select! {
                left = &mut finished => return left,
                _ = upkeep.tick() => self.metrics.upkeep(),
                _ = reports.tick() => self.server.report_failures(),
                shown = changed(&mut self.certificates) => self.show(shown),
            }
        }
    }

    /// Reloads the same configuration, because resolv.conf has another namespace or cluster domain, which gives
    /// the aliases other names.
    fn rename(&mut self) -> (Box<Config>, Reply) {
        let wanted = self.registry.resolver().environment();
        let is_again = self.renaming.last.completes_like(&wanted);
        let Environment { namespace, cluster_domain, .. } = &wanted;
        if !is_again {
            tracing::info!(
                namespace,
                cluster_domain,
                "renaming the aliases: resolv.conf has changed",
            );
        }
        self.renaming = Renaming::of(&wanted);
        let (reply, done) = oneshot::channel();
        tokio::spawn(async move {
            match done.await {
                Ok(Ok(())) if is_again => tracing::info!("the aliases have their new names"),
                // The error was logged at the first attempt.
                Ok(Err(error)) if is_again => tracing::debug!(%error, "cannot rename the aliases"),
                Ok(Err(error)) => tracing::warn!(
                    %error,
                    "cannot rename the aliases; they keep their previous names until this is fixed",
                ),
                _ => {}
            }
        });
        (Box::new(self.config.clone()), reply)
    }

    /// Uses these certificates from the next handshake on.
    fn show(&self, certificates: server::ServerCertificates) {
        let serving = self.server.serving.load().showing(certificates);
        self.server.serving.store(Arc::new(serving));
    }

    fn reload(&mut self, plan: Plan) {
        let (old, new) = (&self.config, &plan.config);
        let level = (new.log.level != old.log.level).then_some(new.log.level);
        let waiting = waiting_for_a_restart(old, new);
        self.commit(plan);
        // Only if the file has changed, because `POST /log` may have set another level.
        if let Some(level) = level {
            set_log_level(level);
        }
        if !waiting.is_empty() {
            tracing::warn!(keys = waiting.join(", "), "these settings take effect after a restart");
        }
    }
}

/// When to rename the aliases.
struct Renaming {
    /// What the last attempt was for.
    last: Environment,
    again: Instant,
}

impl Renaming {
    /// An attempt for this environment now.
    fn of(environment: &Environment) -> Self {
        Self { last: environment.clone(), again: Instant::now() + RENAME_AGAIN }
    }

    /// Waits until resolv.conf has another namespace or cluster domain, or until it is time to try again because
    /// the last attempt failed and `in_force` is still in use.
    async fn due(&self, resolver: &Resolver, in_force: &Environment) {
        let again = async {
            sleep_until(self.again).await;
            resolver.moved_from(in_force).await;
        };
        tokio::select! {
            () = resolver.moved_from(&self.last) => {}
            () = again => {}
        }
    }
}

type Reply = oneshot::Sender<Result<(), StartError>>;
type Planning = Pin<Box<dyn Future<Output = Result<Plan, StartError>>>>;

/// Reloads: one that is being planned, and others that wait.
#[derive(Default)]
struct Reloads {
    planning: Option<(Planning, Reply)>,
    /// Each caller waits for its reply, so there is at most one per caller.
    waiting: VecDeque<(Box<Config>, Reply)>,
}

impl Reloads {
    fn is_idle(&self) -> bool {
        self.planning.is_none() && self.waiting.is_empty()
    }

    /// Begins the next one, unless one is in progress.
    fn begin(&mut self, now: impl FnOnce() -> Inventory) {
        if self.planning.is_none()
            && let Some((config, reply)) = self.waiting.pop_front()
        {
            self.planning = Some((Box::pin(Plan::make(*config, now())), reply));
        }
    }

    /// Waits until a plan is ready. Cancel safe.
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

/// Reloads the current file of `proxy.credentials` when it changes.
async fn follow_credentials(server: Arc<Server>) {
    let mut checks = interval(CREDENTIALS_CHECK);
    loop {
        checks.tick().await;
        let credentials = {
            let serving = server.serving.load();
            serving.forward_proxy().and_then(|proxy| proxy.credentials.clone())
        };
        let Some(credentials) = credentials else { continue };
        let look = spawn_blocking(move || credentials.refresh());
        // A file that hangs must not block the file of the next configuration.
        let _ = timeout(files::READ_TIMEOUT, look).await;
    }
}

/// Whether the forward proxy is open to other machines without credentials.
fn is_open(proxy: &config::ForwardProxy) -> bool {
    let beyond = proxy.listen.is_some_and(|listen| !listen.ip().to_canonical().is_loopback());
    beyond && proxy.credentials.is_none()
}

/// The changed keys that only take effect at the start.
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

async fn changed(certificates: &mut Option<CertificateWatcher>) -> server::ServerCertificates {
    match certificates {
        Some(certificates) => certificates.changed().await,
        None => std::future::pending().await,
    }
}
