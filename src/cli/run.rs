//! `truename run`: runs the proxy until a signal ends it.

mod awaited;
mod file;

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use metrics::counter;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};

use awaited::Awaited;
use file::{ConfigFile, Look};

use super::{
    EXIT_INTERNAL, EXIT_USAGE,
    signals::{FATAL, arrivals, exit_code, outlive_file_size_limit},
};
use crate::{
    app::App,
    command::{Commands, ReloadRequest, StartError},
    config::{
        Alias, Argument, ArgumentError, BadValue, Config, LoadError, Problems, Protocol,
        listen_address,
    },
    files, telemetry,
};

/// The shells' exit code for a command that was ended by SIGINT.
const EXIT_INTERRUPTED: u8 = 130;

/// Run the proxy
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Run {
    /// The aliases to serve.
    #[arg(
        value_name = "[PROTOCOL://]ALIAS[=TARGET[:PORT]]",
        env = "TRUENAME_ALIASES",
        value_delimiter = ',',
        help = "Aliases to serve: NAME (resolved by DNS), NAME=TARGET[:PORT], or such as postgres://NAME"
    )]
    pub aliases: Vec<String>,

    /// The configuration file
    #[arg(long, value_name = "FILE", env = "TRUENAME_CONFIG")]
    pub config: Option<PathBuf>,

    /// Listen on this address, or on this port of 127.0.0.1, instead of what the file says
    #[arg(long, value_name = "ADDR", env = "TRUENAME_LISTEN", value_delimiter = ',')]
    pub listen: Vec<String>,

    /// Listen on this address as an HTTP forward proxy
    #[arg(long, value_name = "ADDR", env = "TRUENAME_PROXY")]
    pub proxy: Option<String>,

    /// Serve probes, metrics and status on this address; `none` turns them off
    #[arg(long, value_name = "ADDR", env = "TRUENAME_ADMIN")]
    pub admin: Option<String>,
}

/// An error in the configuration.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConfigError {
    #[error("{0}")]
    Load(#[from] Arc<LoadError>),
    #[error("{0}")]
    Argument(#[from] ArgumentError),
    #[error("{flag}: {source}")]
    Flag { flag: &'static str, source: BadValue },
    #[error("{0}")]
    Problems(#[from] Problems),
}

/// Why the proxy did not start.
#[derive(Debug, thiserror::Error)]
enum NotStarted {
    #[error("{0}")]
    Config(#[from] ConfigError),
    #[error("truename: {0}")]
    Start(#[from] StartError),
}

/// A proxy, and what its configuration is followed with.
struct Started {
    app: App,
    /// None if the command line is the configuration.
    file: Option<ConfigFile>,
    /// From the admin listener.
    requests: mpsc::Receiver<ReloadRequest>,
}

impl Run {
    /// Runs the proxy to its end.
    pub fn run(&self) -> ExitCode {
        super::block_on(self.perform())
    }

    async fn perform(&self) -> ExitCode {
        // Before anything else, so that an early signal is handled.
        let signals = Signals::new().and_then(|signals| Ok((signals, arrivals(&FATAL)?)));
        let ((signals, hangup), mut fatal) = match signals {
            Ok(signals) => signals,
            Err(error) => {
                telemetry::say(format_args!("truename: cannot start: {error}"));
                return ExitCode::from(EXIT_INTERNAL);
            }
        };
        tokio::select! {
            code = self.live(signals, hangup) => code,
            Some(signal) = fatal.recv() => {
                telemetry::say(format_args!("truename: ended by {signal}"));
                ExitCode::from(exit_code(signal as i32).unwrap_or(EXIT_INTERNAL))
            }
        }
    }

    async fn live(&self, mut signals: Signals, hangup: Signal) -> ExitCode {
        let started = tokio::select! {
            started = self.start() => started,
            // There are no connections yet.
            () = signals.end() => return ExitCode::SUCCESS,
        };
        match started {
            Ok(Started { app, file, requests }) => tokio::select! {
                code = signals.obey(&app) => code,
                () = self.follow(&app, hangup, requests, file) => ExitCode::from(EXIT_INTERNAL),
            },
            Err(error) => {
                telemetry::say(&error);
                ExitCode::from(match error {
                    NotStarted::Start(StartError::Io(_) | StartError::Ended) => EXIT_INTERNAL,
                    _ => EXIT_USAGE,
                })
            }
        }
    }

    /// Reads the configuration and starts the proxy. Files that hang do not block signals.
    async fn start(&self) -> Result<Started, NotStarted> {
        let (file, config) = self.load(None).await.map_err(StartError::from)?;
        let config = config?;
        telemetry::init_log(&config.log);
        raise_file_limit(config.listener.max_connections);
        if let Some(file) = file.as_ref().filter(|file| !file.is_followed) {
            let file = file.path.display();
            tracing::info!(%file, "the configuration is a pipe, which is read only once: reloads are off");
        }
        // Before anything listens: the admin listener takes requests at once.
        let (commands, queue, requests) = Commands::with_file();
        files::work(move || match App::start_with(config, commands, queue) {
            Ok(app) => Ok(Started { app, file, requests }),
            Err(error) => match file.as_ref().map_or(Ok(()), |file| file.loadable(&error)) {
                Ok(()) => Err(error.into()),
                Err(problems) => Err(ConfigError::from(problems).into()),
            },
        })
        .await
        .map_err(StartError::from)?
    }

    /// Reads the file again and merges it with the command line. `before` is the file as it was last
    /// read.
    async fn load(
        &self,
        before: Option<ConfigFile>,
    ) -> Result<(Option<ConfigFile>, Result<Config, ConfigError>), files::WorkError> {
        let run = self.clone();
        files::work(move || {
            let file = before.map(|file| file.again());
            let file = file.or_else(|| run.config.as_deref().map(ConfigFile::read));
            let config = file.as_ref().map_or_else(|| Ok(Config::default()), ConfigFile::parse);
            let config = config.map_err(ConfigError::from);
            (file, config.and_then(|config| run.configuration(config)))
        })
        .await
    }

    /// Applies the command line to the file's configuration.
    fn configuration(&self, file: Config) -> Result<Config, ConfigError> {
        let mut config = merged(file, &self.aliases)?;
        if !self.listen.is_empty() {
            let listen = self
                .listen
                .iter()
                .map(|text| address("--listen", text))
                .collect::<Result<Vec<SocketAddr>, _>>()?;
            // HTTP aliases may share an address, others cannot: each keeps its own, unless there are no others.
            let is_http = |alias: &Alias| alias.protocol == Protocol::Http;
            let has_http = config.aliases.iter().any(is_http);
            for alias in config.aliases.iter_mut().filter(|alias| !has_http || is_http(alias)) {
                alias.listen.clone_from(&listen);
            }
        }
        if let Some(proxy) = &self.proxy {
            config.proxy.listen = Some(address("--proxy", proxy)?);
        }
        match self.admin.as_deref() {
            Some("none") => config.admin.listen = None,
            Some(admin) => config.admin.listen = Some(address("--admin", admin)?),
            None => {}
        }
        config.validate("the command line")?;
        Ok(config)
    }

    /// Reloads on a signal, on a request of the admin listener, and when the file changes. If a configuration was
    /// rejected, also when files that it names change.
    async fn follow(
        &self,
        app: &App,
        mut hangup: Signal,
        mut requests: mpsc::Receiver<ReloadRequest>,
        mut file: Option<ConfigFile>,
    ) {
        let mut look = Look::default();
        let mut awaited = None;
        loop {
            let (request, is_asked) = tokio::select! {
                _ = hangup.recv() => (None, true),
                Some(request) = requests.recv() => (Some(request), true),
                () = look.changed(file.as_ref()) => (None, true),
                () = Awaited::changed(&mut awaited) => (None, false),
            };
            let known = awaited.as_ref().filter(|_| !is_asked);
            let known = known.map(|awaited: &Awaited| awaited.error.as_str());
            let Some(result) = self.reload(app, &mut file, known).await else {
                tracing::info!("draining: the configuration is no longer reloaded");
                // The admin listener then reports this for pending and later requests.
                drop((request, requests));
                return std::future::pending().await;
            };
            awaited = match (&result, file.clone()) {
                (Err(error), Some(refused)) => {
                    let files = files::work(move || refused.named_files()).await;
                    Awaited::of_refused(files.unwrap_or_default(), error.clone(), awaited)
                }
                _ => None,
            };
            if let Some(request) = request {
                request.reply(result);
            }
        }
    }

    /// Applies the file's configuration. Reports the result in log and metrics, unless it is the `known` error.
    /// `None` if the proxy is draining and keeps its configuration.
    async fn reload(
        &self,
        app: &App,
        seen: &mut Option<ConfigFile>,
        known: Option<&str>,
    ) -> Option<Result<(), String>> {
        let Some(path) = self.config.as_deref() else {
            tracing::warn!("nothing to reload: the configuration is the command line");
            return Some(Err("no file to reload: start the proxy with --config FILE".into()));
        };
        let result = match self.load(seen.clone()).await {
            Ok((file, config)) => {
                *seen = file;
                match config {
                    Ok(config) => match app.commands().reload(config).await {
                        Ok(()) => Ok(()),
                        Err(StartError::Ended) => return None,
                        Err(error) => Err(explained(error, seen.clone()).await),
                    },
                    Err(error) => Err(error.to_string()),
                }
            }
            Err(error) => Err(error.to_string()),
        };
        if known.is_some() && known == result.as_ref().err().map(String::as_str) {
            return Some(result);
        }
        // Counted before it is logged, so that readers of the line find it counted.
        let label = if result.is_ok() { "ok" } else { "error" };
        counter!("truename_config_reloads_total", "result" => label).increment(1);
        let file = path.display();
        match &result {
            Ok(()) => tracing::info!(%file, "configuration reloaded"),
            Err(error) => {
                tracing::error!(
                    %file,
                    error,
                    "new configuration rejected; the running one stays in effect",
                );
            }
        }
        Some(result)
    }
}

/// Why a configuration was rejected, with positions in the file if they can be found.
async fn explained(error: StartError, file: Option<ConfigFile>) -> String {
    let places = files::work(move || {
        let found = file.map_or(Ok(()), |file| file.loadable(&error));
        found.map_or_else(|problems| problems.to_string(), |()| error.to_string())
    });
    places.await.unwrap_or_else(|error| error.to_string())
}

/// The file's configuration, if there is a file, with the aliases of the command line.
pub(super) fn with_aliases(
    file: Option<&Path>,
    arguments: &[String],
) -> Result<Config, ConfigError> {
    let config = match file {
        Some(path) => ConfigFile::read(path).parse()?,
        None => Config::default(),
    };
    merged(config, arguments)
}

fn merged(mut config: Config, arguments: &[String]) -> Result<Config, ConfigError> {
    for argument in arguments {
        let argument = Argument::parse(argument)?;
        match config.aliases.iter_mut().find(|alias| alias.name == argument.name) {
            Some(alias) => argument.amend(alias)?,
            None => config.aliases.push(argument.into_alias()?),
        }
    }
    Ok(config)
}

/// Every connection is an open file. The soft limit, often 1024, exists for programs that use
/// `select()`; the hard limit is the one that administrators set.
fn raise_file_limit(max_connections: usize) {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        Ok(hard)
    });
    match raised {
        Ok(limit) if limit < max_connections as u64 => tracing::warn!(
            limit,
            max_connections,
            "the limit of open files is lower than `listener.max_connections`: raise it \
             (`ulimit -Hn`), or lower the setting",
        ),
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "cannot raise the limit of open files"),
    }
}

/// Parses the address of a flag.
pub(super) fn address(flag: &'static str, text: &str) -> Result<SocketAddr, ConfigError> {
    listen_address(text).map_err(|source| ConfigError::Flag { flag, source })
}

/// The signals that end a proxy.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// The second one, SIGHUP, requests a reload.
    fn new() -> io::Result<(Self, Signal)> {
        outlive_file_size_limit()?;
        let terminate = signal(SignalKind::terminate())?;
        let interrupt = signal(SignalKind::interrupt())?;
        Ok((Self { terminate, interrupt }, signal(SignalKind::hangup())?))
    }

    async fn end(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }

    /// Handles signals until the proxy has ended for any reason.
    async fn obey(&mut self, app: &App) -> ExitCode {
        let mut interrupts = 0;
        loop {
            tokio::select! {
                () = app.ended() => return ExitCode::SUCCESS,
                _ = self.terminate.recv() => app.commands().shutdown().await,
                _ = self.interrupt.recv() => {
                    interrupts += 1;
                    if interrupts > 1 {
                        tracing::warn!("second signal: not waiting for open connections");
                        return ExitCode::from(EXIT_INTERRUPTED);
                    }
                    app.commands().shutdown().await;
                }
            }
        }
    }
}
