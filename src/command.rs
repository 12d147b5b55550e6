//! What may be asked of a running proxy, by whoever has a hand on it: the signals, the admin
//! listener, a program that embeds it. The control thread in `app` obeys.

use std::{
    io,
    path::PathBuf,
    sync::{Arc, OnceLock},
};

use tokio::sync::{mpsc, oneshot};

use crate::{
    config::{Config, CredentialsError},
    files::{Stuck, WorkError},
    listener::BindError,
    tls::{TlsConfigError, TlsConfigErrors, source::SourceError},
};

/// Commands that wait their turn; whoever has one more waits to ask.
const QUEUE: usize = 8;

/// What may be asked of a running proxy.
#[derive(Clone, Debug)]
pub struct Commands {
    control: mpsc::Sender<Command>,
    /// To whoever owns the configuration's file, where somebody does.
    owner: Arc<OnceLock<mpsc::Sender<ReloadRequest>>>,
}

/// What was asked of it.
#[derive(Debug)]
pub enum Command {
    /// To put another configuration to work, and to say whether that went well.
    Reload(Box<Config>, oneshot::Sender<Result<(), StartError>>),
    /// To end.
    Shutdown,
}

impl Commands {
    /// A way to ask, and where the questions arrive.
    pub fn channel() -> (Self, mpsc::Receiver<Command>) {
        let (sender, queue) = mpsc::channel(QUEUE);
        (Self { control: sender, owner: Arc::default() }, queue)
    }

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

    /// The wishes that the configuration's file be read again, for the one who owns it: whoever
    /// asks first.
    pub fn reload_requests(&self) -> Option<mpsc::Receiver<ReloadRequest>> {
        let (owner, requests) = mpsc::channel(1);
        self.owner.set(owner).is_ok().then_some(requests)
    }

    /// Begins the end: whatever is being served may finish, for `shutdown_grace`.
    pub async fn shutdown(&self) {
        let _ = self.control.send(Command::Shutdown).await;
    }
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

/// Why a configuration cannot be put to work.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An alias' address cannot be listened on.
    #[error("{0} (set by the alias' `listen` or --listen)")]
    Bind(#[from] BindError),
    /// The admin listener's address cannot be listened on.
    #[error("{0} (set by `admin.listen` or --admin)")]
    Admin(BindError),
    /// The forward proxy's address cannot be listened on.
    #[error("{0} (set by `proxy.listen` or --proxy)")]
    Proxy(BindError),
    /// The forward proxy's credentials cannot be used.
    #[error("`proxy.credentials`: cannot use the file `{}`: {source}", .file.display())]
    Credentials {
        /// Which.
        file: PathBuf,
        /// Why.
        source: CredentialsError,
    },
    /// An alias' TLS settings cannot be used.
    #[error("alias `{alias}`: {source}")]
    Tls {
        /// Whose.
        alias: String,
        /// Why.
        source: TlsConfigErrors,
    },
    /// The listeners' TLS settings cannot be used.
    #[error("{0}")]
    ListenerTls(#[from] SourceError),
    /// The TLS library.
    #[error("{0}")]
    TlsLibrary(#[from] TlsConfigError),
    /// A file that the configuration names hangs.
    #[error(transparent)]
    Stuck(Stuck),
    /// The configuration has no alias.
    #[error("no alias to serve: name one, as in `truename run webscaler-manual`")]
    NoAlias,
    /// Threads or runtimes.
    #[error("cannot start: {0}")]
    Io(#[from] io::Error),
    /// The proxy that was to be changed has ended.
    #[error("the proxy has ended")]
    Ended,
}

impl From<WorkError> for StartError {
    fn from(error: WorkError) -> Self {
        match error {
            WorkError::Stuck(stuck) => Self::Stuck(stuck),
            WorkError::Io(error) => Self::Io(error),
        }
    }
}
