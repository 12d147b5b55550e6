//! `truename exec`: runs a command with a private proxy.

mod addresses;
mod environment;
mod hosts;
mod job;

use std::{
    env,
    ffi::{OsStr, OsString},
    io,
    net::{Ipv4Addr, SocketAddr},
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{ExitCode, ExitStatus},
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    process::{Child, Command},
    runtime,
    signal::unix::{self, SignalKind, signal},
    sync::mpsc,
};

use addresses::{Addresses, Place};
pub use hosts::WithHosts;
use hosts::{Entry, HostsError};
use job::Job;

use super::{
    EXIT_INTERNAL, EXIT_USAGE, run,
    signals::{self, FATAL, Keyboard, outlive_file_size_limit},
};
use crate::{
    app::App,
    command::StartError,
    config::{self, Config, LogLevel},
    files,
    resolve::{Resolver, names},
    telemetry,
    tls::{
        store::{self, Store, StoreError},
        truststore::TrustStore,
    },
};

/// As shells have it.
const EXIT_NOT_EXECUTABLE: u8 = 126;
/// As shells have it.
const EXIT_NOT_FOUND: u8 = 127;

/// The proxy's `shutdown_grace`: once the command has ended, there are no clients to wait for.
const GRACE: Duration = Duration::from_secs(1);

/// How long the command waits for the lines before it to be written, if stderr is not read.
const BEFORE_COMMAND: Duration = Duration::from_millis(200);

/// The signals that are passed on to the command, besides those in `FATAL`. SIGWINCH is included for the moment in
/// which the command is being started: without a handler it would be discarded.
const SIGNALS: [Signal; 4] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM, Signal::SIGWINCH];

/// Run a command through a private proxy and exit with its status
///
/// The proxy listens on a free port of 127.0.0.1 for as long as the command runs, and the command gets
/// the usual variables for a proxy and its CA certificates. The certificates are made for this run and are valid
/// for the aliases' names only. Java gets a trust store in `JAVA_TOOL_OPTIONS`. Programs that read no such
/// variable (GnuTLS, as in Debian's wget) need an option, such as `--ca-certificate=$SSL_CERT_FILE`. Node
/// reads proxy variables since versions 22.21 and 24.
///
/// Programs that have no setting for a proxy, or speak another protocol, find the aliases in a hosts file that only the
/// command and its children see, where the system permits that.
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Exec {
    /// The aliases.
    #[arg(
        value_name = "[PROTOCOL://]ALIAS[=TARGET[:PORT]]",
        help = "Aliases: NAME (resolved by DNS), NAME=TARGET[:PORT], or such as postgres://NAME"
    )]
    pub aliases: Vec<String>,

    /// A configuration file: its aliases and settings are used, its listeners are not
    #[arg(long, value_name = "FILE", env = "TRUENAME_CONFIG")]
    pub config: Option<PathBuf>,

    /// Leave the hosts file as it is
    #[arg(long)]
    pub no_hosts: bool,

    /// Print nothing about the proxy
    #[arg(short, long)]
    pub quiet: bool,

    /// The command, with its arguments
    #[arg(last = true, required = true, value_name = "CMD")]
    pub command: Vec<OsString>,
}

/// Why the command was not run, or its end not observed.
#[derive(Debug, thiserror::Error)]
enum ExecError {
    #[error("{0}")]
    Config(#[from] run::ConfigError),
    #[error("{0}")]
    Start(#[from] StartError),
    #[error("cannot make a private folder: {0}; name a folder that can be written in TMPDIR")]
    Folder(io::Error),
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("the private proxy is not listening")]
    NoProxy,
    #[error("no command to run")]
    NoCommand,
    #[error("cannot run {}: {source}", command.display())]
    Spawn { command: OsString, source: io::Error },
    #[error("{0} received before the command was started")]
    Interrupted(Signal),
    #[error("cannot watch the command: {0}")]
    Io(#[from] io::Error),
}

impl Exec {
    /// Runs the command to its end.
    pub fn run(&self) -> ExitCode {
        match self.perform() {
            Ok(status) => ExitCode::from(code(status)),
            Err(error) => {
                if let ExecError::Spawn { command, source } = &error {
                    say_not_run(command, source);
                } else {
                    telemetry::say(format_args!("truename exec: {error}"));
                }
                ExitCode::from(match &error {
                    ExecError::Config(_) | ExecError::Folder(_) | ExecError::NoCommand => {
                        EXIT_USAGE
                    }
                    ExecError::Start(StartError::Io(_) | StartError::Ended) => EXIT_INTERNAL,
                    ExecError::Start(_) => EXIT_USAGE,
                    ExecError::Spawn { source, .. } => code_of(source),
                    ExecError::Interrupted(signal) => of_signal(*signal as i32),
                    ExecError::Store(_) | ExecError::NoProxy | ExecError::Io(_) => EXIT_INTERNAL,
                })
            }
        }
    }

    fn perform(&self) -> Result<ExitStatus, ExecError> {
        // Before there are other threads.
        let keyboard = Keyboard::new()?;
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let result = runtime.block_on(async {
            // Before there is a command, so that an early signal is handled.
            let mut arrivals = Arrivals::new(&keyboard)?;
            outlive_file_size_limit()?;
            // If SIGCHLD were ignored, the exit status of the command would be lost.
            let children = signal(SignalKind::child())?;
            let exec = self.clone();
            let ready = tokio::select! {
                ready = files::work(move || exec.prepare()) => ready.map_err(StartError::from)??,
                Some(signal) = arrivals.end() => return Err(ExecError::Interrupted(signal)),
            };
            let Ready { app, mut command, .. } = ready;
            let result = match keyboard.start(|| command.spawn()) {
                Ok(child) => attend(child, arrivals, children).await.map_err(ExecError::Io),
                Err(source) => {
                    let command = self.command.first().cloned().unwrap_or_default();
                    Err(ExecError::Spawn { command, source })
                }
            };
            app.shutdown().await;
            result
        });
        // The exit does not wait for files that hang.
        runtime.shutdown_background();
        result
    }

    /// Starts the proxy and prepares the command. Blocking, because files are read.
    fn prepare(&self) -> Result<Ready, ExecError> {
        let folder = Store::temporary().map_err(|error| match error {
            StoreError::Write { source, .. } => ExecError::Folder(source),
            error => error.into(),
        })?;
        let config = self.configuration(folder.directory())?;
        telemetry::init_log(&config.log);
        let names = names_of(&config);
        let (app, places) = start(config)?;
        let command = self.command(&app, &folder, &names, &places)?;
        Ok(Ready { app, command, _folder: folder })
    }

    /// The aliases of the file and the arguments, and the settings of their targets. Listeners are private.
    fn configuration(&self, folder: &Path) -> Result<Config, ExecError> {
        let mut config = run::with_aliases(self.config.as_deref(), &self.aliases)?;
        for alias in &mut config.aliases {
            alias.listen.clear();
        }
        config.proxy.listen = Some(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)));
        // Credentials are for a proxy that others reach. The command has none.
        config.proxy.credentials = None;
        config.admin.listen = None;
        config.ca.directory = Some(folder.to_owned());
        config.listener.tls = config::ListenerTls::default();
        config.shutdown_grace = GRACE;
        // The terminal belongs to the command, unless another level is configured.
        if config.log.level == LogLevel::Info {
            config.log.level = LogLevel::Error;
        }
        config.validate("the command line").map_err(run::ConfigError::from)?;
        Ok(config)
    }

    fn command(
        &self,
        app: &App,
        store: &Store,
        names: &[Vec<String>],
        places: &[Place],
    ) -> Result<Command, ExecError> {
        let proxy = app.proxy().ok_or(ExecError::NoProxy)?;
        let files = environment::ROOTS.into_iter().filter_map(env::var_os).map(PathBuf::from);
        let trust = TrustStore::with(store.roots()?, files);
        let bundle = store.directory().join("roots.pem");
        store::write(&bundle, 0o644, trust.to_pem().as_bytes())?;
        let truststore = store.directory().join("roots.p12");
        store::write(&truststore, 0o644, &trust.to_pkcs12())?;
        let hosts = store.directory().join("hosts");
        let has_hosts = match self.no_hosts {
            true => Err(HostsError::Declined),
            false => prepare_hosts(&hosts, names, places),
        };
        if !self.quiet {
            let aliases = self.aliases.join(", ");
            let aliases = if aliases.is_empty() { "the file's aliases" } else { &aliases };
            telemetry::say(format_args!(
                "truename exec: proxy http://{proxy} for {aliases}, roots in {}; {}",
                bundle.display(),
                addresses::describe(places, has_hosts.as_ref().map(|_| ())),
            ));
            // So that the command's own output follows this line.
            telemetry::flush(BEFORE_COMMAND);
        }

        let environment = environment::ProxyEnvironment {
            proxy,
            names: &names.concat(),
            bundle: &bundle,
            truststore: &truststore,
        };
        let words: Vec<&OsStr> = match has_hosts {
            Ok(true) => WithHosts::command_line(&hosts, &self.command).collect(),
            _ => self.command.iter().map(OsString::as_os_str).collect(),
        };
        let [program, arguments @ ..] = &words[..] else { return Err(ExecError::NoCommand) };
        let mut command = Command::new(program);
        command.args(arguments).envs(environment.variables(|name| env::var_os(name)));
        Ok(command)
    }
}

/// Starts the proxy with the aliases at addresses where programs without a setting for a proxy find them.
fn start(mut config: Config) -> Result<(App, Vec<Place>), StartError> {
    let mut addresses = Addresses::default();
    loop {
        let places = addresses.place(&mut config.aliases);
        match App::start(config.clone()) {
            // Somebody took an address after it had been found free.
            Err(StartError::Bind(_)) if places.iter().any(|place| place.address.is_ok()) => {}
            started => return Ok((started?, places)),
        }
    }
}

/// Writes the hosts file of the aliases that have addresses. Whether there is one: without addresses none is needed.
fn prepare_hosts(path: &Path, names: &[Vec<String>], places: &[Place]) -> Result<bool, HostsError> {
    let entries = names.iter().zip(places).filter_map(|(names, place)| {
        let address = *place.address.as_ref().ok()?;
        let names = names.iter().filter(|name| !name.contains('*')).cloned().collect();
        Some(Entry { address, names })
    });
    let entries: Vec<_> = entries.collect();
    if entries.is_empty() {
        return Ok(false);
    }
    hosts::prepare(path, &entries).map(|()| true)
}

/// The command, and everything that must exist while it runs.
struct Ready {
    app: App,
    command: Command,
    _folder: Store,
}

/// Passes signals on until the command ends, and stops when the command stops.
///
/// As the first process of a container, it is also the parent of orphaned processes.
async fn attend(
    mut child: Child,
    mut arrivals: Arrivals,
    mut children: unix::Signal,
) -> io::Result<ExitStatus> {
    let pid = child.id().and_then(|pid| pid.try_into().ok()).map(Pid::from_raw);
    let Some(job) = pid.map(Job) else { return child.wait().await };
    loop {
        tokio::select! {
            status = child.wait() => return status,
            Some(()) = children.recv() => {
                job::reap_others(job);
                job.stop_with_it();
            }
            Some((signal, typed)) = arrivals.next() => {
                // The terminal also sends these to the command, which must not get them twice.
                if !(typed && job.is_in_foreground()) {
                    // The command may have just ended. The next iteration notices that.
                    let _ = kill(job.0, signal);
                }
            }
        }
    }
}

/// The received signals.
struct Arrivals {
    keyboard: mpsc::Receiver<(Signal, bool)>,
    others: mpsc::Receiver<Signal>,
}

impl Arrivals {
    fn new(keyboard: &Keyboard) -> io::Result<Self> {
        let others = [&SIGNALS[..], &FATAL].concat();
        Ok(Self { keyboard: keyboard.arrivals()?, others: signals::arrivals(&others)? })
    }

    /// The next signal that ends a process by default.
    async fn end(&mut self) -> Option<Signal> {
        loop {
            let (signal, _) = self.next().await?;
            if signal != Signal::SIGWINCH {
                return Some(signal);
            }
        }
    }

    /// The next signal, and whether it may come from the terminal.
    async fn next(&mut self) -> Option<(Signal, bool)> {
        tokio::select! {
            arrival = self.keyboard.recv() => arrival,
            // This includes the keyboard's signals only while the command is being started. Their origin is
            // unknown, and it is better to pass them on twice than to lose them.
            signal = self.others.recv() => Some((signal?, false)),
        }
    }
}

fn say_not_run(command: &OsStr, error: &io::Error) {
    telemetry::say(format_args!("truename exec: cannot run {}: {error}", command.display()));
}

/// The exit code of a command that cannot be run.
fn code_of(error: &io::Error) -> u8 {
    match error.kind() {
        io::ErrorKind::NotFound => EXIT_NOT_FOUND,
        _ => EXIT_NOT_EXECUTABLE,
    }
}

fn code(status: ExitStatus) -> u8 {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    code.or(status.signal().map(of_signal)).unwrap_or(EXIT_INTERNAL)
}

fn of_signal(number: i32) -> u8 {
    signals::exit_code(number).unwrap_or(EXIT_INTERNAL)
}

/// All names of each alias.
fn names_of(config: &Config) -> Vec<Vec<String>> {
    let environment = Resolver::new(config.dns.clone()).environment();
    let forms = |alias: &config::Alias| {
        names::forms(&alias.name, &environment.namespace, &environment.cluster_domain)
    };
    let aliases = config.aliases.iter();
    aliases.map(|alias| forms(alias).into_iter().chain(alias.hosts.clone()).collect()).collect()
}
