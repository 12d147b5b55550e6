//! `truename run`: the proxy, until a signal ends it.

use std::{
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use metrics::counter;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    runtime,
    signal::unix::{Signal, SignalKind, signal},
    time::{MissedTickBehavior, interval, sleep},
};

use super::{EXIT_INTERNAL, EXIT_USAGE};
use crate::{
    app::App,
    command::StartError,
    config::{Alias, ArgumentError, BadValue, Config, LoadError, Problems, listen_address},
    telemetry,
};

/// How often the configuration file is compared: a ConfigMap arrives by a swap of links that file
/// watches miss from the second time on.
const FILE_CHECK: Duration = Duration::from_secs(1);

/// How long a file that changed must stay the same before it is read, and how often that is asked.
const SETTLE: Duration = Duration::from_millis(100);
const SETTLE_ROUNDS: usize = 10;

/// The proxy
#[derive(Clone, Debug, Default, clap::Args)]
pub struct Run {
    /// What to serve: a name that DNS is asked for, or with its target told
    #[arg(value_name = "ALIAS[=TARGET[:PORT]]", env = "TRUENAME_ALIASES", value_delimiter = ',')]
    pub aliases: Vec<String>,

    /// The configuration file
    #[arg(long, value_name = "FILE", env = "TRUENAME_CONFIG")]
    pub config: Option<PathBuf>,

    /// Where to listen, instead of what the file says: an address, or a port on 127.0.0.1
    #[arg(long, value_name = "ADDR", env = "TRUENAME_LISTEN", value_delimiter = ',')]
    pub listen: Vec<String>,

    /// Where to listen as an HTTP forward proxy
    #[arg(long, value_name = "ADDR", env = "TRUENAME_PROXY")]
    pub proxy: Option<String>,

    /// Where to answer probes and show metrics and status; `none` to do neither
    #[arg(long, value_name = "ADDR", env = "TRUENAME_ADMIN")]
    pub admin: Option<String>,
}

/// Why there is no configuration to run.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConfigError {
    #[error("{0}")]
    Load(#[from] LoadError),
    #[error("{0}")]
    Argument(#[from] ArgumentError),
    #[error("{flag}: {source}")]
    Flag { flag: &'static str, source: BadValue },
    #[error("{0}")]
    Problems(#[from] Problems),
}

impl Run {
    /// Runs the proxy to its end.
    pub fn run(&self) -> ExitCode {
        // Before it is read for use: a change that comes during the start is one to be noticed.
        let seen = self.contents();
        let config = match self.configuration() {
            Ok(config) => config,
            Err(error) => {
                telemetry::say(&error);
                return ExitCode::from(EXIT_USAGE);
            }
        };
        telemetry::init_log(&config.log);
        raise_file_limit(config.listener.max_connections);
        let runtime = match runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                telemetry::say(format_args!("truename: cannot start: {error}"));
                return ExitCode::from(EXIT_INTERNAL);
            }
        };
        runtime.block_on(async {
            // Before anything listens: a signal that comes early must find its handler.
            let signals = match Signals::new() {
                Ok(signals) => signals,
                Err(error) => {
                    telemetry::say(format_args!("truename: cannot start: {error}"));
                    return ExitCode::from(EXIT_INTERNAL);
                }
            };
            match App::start(config) {
                Ok(app) => self.attend(app, signals, seen).await,
                Err(error) => {
                    telemetry::say(format_args!("truename: {error}"));
                    ExitCode::from(match error {
                        StartError::Io(_) | StartError::Ended => EXIT_INTERNAL,
                        _ => EXIT_USAGE,
                    })
                }
            }
        })
    }

    /// The file, and what the command line adds to it or says instead.
    fn configuration(&self) -> Result<Config, ConfigError> {
        let mut config = with_aliases(self.config.as_deref(), &self.aliases)?;
        if !self.listen.is_empty() {
            let listen = self
                .listen
                .iter()
                .map(|text| address("--listen", text))
                .collect::<Result<Vec<SocketAddr>, _>>()?;
            for alias in &mut config.aliases {
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

    /// Obeys signals, and follows the file from what was `seen` of it, until the proxy has ended.
    async fn attend(&self, app: App, mut signals: Signals, mut seen: Option<Vec<u8>>) -> ExitCode {
        let mut checks = interval(FILE_CHECK);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Nobody else asks for them: this is the proxy's own process.
        let Some(mut requests) = app.commands().reload_requests() else {
            return ExitCode::from(EXIT_INTERNAL);
        };
        let mut interrupts = 0;
        loop {
            tokio::select! {
                () = app.ended() => return ExitCode::SUCCESS,
                _ = signals.terminate.recv() => app.commands().shutdown().await,
                _ = signals.interrupt.recv() => {
                    interrupts += 1;
                    if interrupts > 1 {
                        tracing::warn!("interrupted twice: not waiting for open connections");
                        return ExitCode::from(130);
                    }
                    app.commands().shutdown().await;
                }
                _ = signals.hangup.recv() => {
                    seen = self.contents();
                    let _ = self.reload(&app).await;
                }
                Some(request) = requests.recv() => {
                    seen = self.contents();
                    request.answer(self.reload(&app).await);
                }
                _ = checks.tick(), if self.config.is_some() => {
                    // A file that is gone for a moment is being replaced.
                    let changed = self.contents().is_some_and(|now| seen.as_ref() != Some(&now));
                    if changed && let Some(now) = self.settled().await {
                        seen = Some(now);
                        let _ = self.reload(&app).await;
                    }
                }
            }
        }
    }

    /// The file once it stays the same for a moment: an editor empties it before it writes, and what
    /// stands between may well be a configuration, too.
    async fn settled(&self) -> Option<Vec<u8>> {
        let mut before = self.contents()?;
        for _ in 0..SETTLE_ROUNDS {
            sleep(SETTLE).await;
            let now = self.contents()?;
            if now == before {
                break;
            }
            before = now;
        }
        Some(before)
    }

    fn contents(&self) -> Option<Vec<u8>> {
        Config::read(self.config.as_deref()?).ok().map(String::into_bytes)
    }

    /// Puts the file's configuration to work; says in log and metrics what came of it, too.
    async fn reload(&self, app: &App) -> Result<(), String> {
        let Some(file) = self.config.as_deref() else {
            tracing::warn!("there is nothing to reload: the configuration is the command line");
            return Err("there is no file to read: start the proxy with --config FILE".into());
        };
        let result = match self.configuration() {
            Ok(config) => app.commands().reload(config).await.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        let file = file.display();
        let label = match &result {
            Ok(()) => {
                tracing::info!(%file, "configuration reloaded");
                "ok"
            }
            Err(error) => {
                tracing::error!(
                    %file,
                    error,
                    "the new configuration is refused; the running one stays",
                );
                "error"
            }
        };
        counter!("truename_config_reloads_total", "result" => label).increment(1);
        result
    }
}

/// The file, if there is one, and the aliases that the command line tells besides.
pub(super) fn with_aliases(
    file: Option<&Path>,
    arguments: &[String],
) -> Result<Config, ConfigError> {
    let mut config = match file {
        Some(path) => Config::load(path)?,
        None => Config::default(),
    };
    for argument in arguments {
        let told = Alias::from_arg(argument)?;
        match config.aliases.iter_mut().find(|alias| alias.name == told.name) {
            Some(alias) if told.target.is_some() => alias.target = told.target,
            Some(_) => {}
            None => config.aliases.push(told),
        }
    }
    Ok(config)
}

/// Every connection is an open file. The soft limit on those, often 1024, is there for programs that
/// `select()`; the hard limit is what the administrator means.
fn raise_file_limit(max_connections: usize) {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        Ok(hard)
    });
    match raised {
        Ok(limit) if limit < max_connections as u64 => tracing::warn!(
            limit,
            max_connections,
            "this process may open fewer files than `listener.max_connections`: raise its limit \
             (`ulimit -Hn`), or lower the key",
        ),
        Ok(_) => {}
        Err(error) => tracing::warn!(%error, "the limit of open files cannot be raised"),
    }
}

/// The address that a flag says.
pub(super) fn address(flag: &'static str, text: &str) -> Result<SocketAddr, ConfigError> {
    listen_address(text).map_err(|source| ConfigError::Flag { flag, source })
}

/// The signals that a proxy obeys.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }
}
