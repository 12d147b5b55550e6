//! Commands to a running proxy, from signals, the admin listener or a program that embeds it. The control
//! thread in `app` executes them.

use std::{io, path::PathBuf};

use tokio::sync::{mpsc, oneshot};

use crate::{
    config::{Config, CredentialsError},
    files::{Stuck, WorkError},
    listener::BindError,
    tls::{TlsConfigError, TlsConfigErrors, source::SourceError},
};

/// How many commands are queued. Further callers wait.
const QUEUE: usize = 8;

/// Sends commands to a running proxy.
#[derive(Clone, Debug)]
pub struct Commands {
    control: mpsc::Sender<Command>,
    /// For the owner of the configuration file, if there is one.
    owner: Option<mpsc::Sender<ReloadRequest>>,
}

/// A command.
#[derive(Debug)]
pub enum Command {
    /// Apply another configuration, and report the result.
    Reload(Box<Config>, oneshot::Sender<Result<(), StartError>>),
    /// Shut down.
    Shutdown,
}

impl Commands {
    /// A sender and the queue of its commands. There is no configuration file.
    pub fn channel() -> (Self, mpsc::Receiver<Command>) {
        let (sender, queue) = mpsc::channel(QUEUE);
        (Self { control: sender, owner: None }, queue)
    }

    /// Also returns the requests to reload the configuration file, which wait until its owner takes them.
    pub fn with_file() -> (Self, mpsc::Receiver<Command>, mpsc::Receiver<ReloadRequest>) {
        let (commands, queue) = Self::channel();
        let (owner, requests) = mpsc::channel(1);
        (Self { owner: Some(owner), ..commands }, queue, requests)
    }

    /// Applies another configuration. On an error, the current one stays in use.
    pub async fn reload(&self, config: Config) -> Result<(), StartError> {
        let (reply, result) = oneshot::channel();
        let command = Command::Reload(Box::new(config), reply);
        self.control.send(command).await.map_err(|_| StartError::Ended)?;
        result.await.map_err(|_| StartError::Ended)?
    }

    /// Asks the owner of the configuration file to reload it.
    pub async fn reload_file(&self) -> Result<(), ReloadError> {
        let owner = self.owner.as_ref().ok_or(ReloadError::NoFile)?;
        let (reply, result) = oneshot::channel();
        owner.send(ReloadRequest(reply)).await.map_err(|_| ReloadError::Ended)?;
        result.await.map_err(|_| ReloadError::Ended)?.map_err(ReloadError::Refused)
    }

    /// Begins a graceful shutdown: connections may finish within `shutdown_grace`.
    pub async fn shutdown(&self) {
        let _ = self.control.send(Command::Shutdown).await;
    }
}

/// A request to reload the configuration file. Its sender waits for the result.
#[derive(Debug)]
pub struct ReloadRequest(oneshot::Sender<Result<(), String>>);

impl ReloadRequest {
    /// Reports the result; an error is the text of the file's problems.
    pub fn reply(self, result: Result<(), String>) {
        // The caller may have been dropped.
        let _ = self.0.send(result);
    }
}

/// Why a reload of the configuration file failed.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// It has problems or cannot be applied; the current one stays in use.
    #[error("{0}")]
    Refused(String),
    /// There is no file: the configuration comes from the command line or from another program.
    #[error(
        "this proxy was not started from a file: start it with `truename run --config FILE`, or \
         restart it with other arguments"
    )]
    NoFile,
    /// The proxy is draining, or has ended.
    #[error("the proxy is draining: start another one with the new configuration")]
    Ended,
}

/// Why a configuration cannot be applied.
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
    /// A file of the configuration hangs.
    #[error(transparent)]
    Stuck(Stuck),
    /// The configuration has no alias.
    #[error("no alias to serve: name one, as in `truename run webscaler-manual`")]
    NoAlias,
    /// Threads or runtimes.
    #[error("cannot start: {0}")]
    Io(#[from] io::Error),
    /// The proxy has ended.
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The proxy is ready before whoever follows its file has got that far.
    #[tokio::test]
    async fn a_reload_requested_before_the_file_is_followed_waits() {
        let (commands, _queue, mut requests) = Commands::with_file();
        let requested = tokio::spawn(async move { commands.reload_file().await });
        tokio::task::yield_now().await;
        requests.recv().await.unwrap().reply(Ok(()));
        requested.await.unwrap().unwrap();
        let (commands, _queue) = Commands::channel();
        assert!(matches!(commands.reload_file().await, Err(ReloadError::NoFile)));
    }
}
