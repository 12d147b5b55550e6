//! What may be asked of a running proxy, by whoever has a hand on it: the signals, the admin
//! listener, a program that embeds it. The control thread in `app` obeys.

use std::io;

use tokio::sync::{mpsc, oneshot};

use crate::{config::Config, listener::BindError, tls::TlsConfigError};

/// Commands that wait their turn; whoever has one more waits to ask.
const QUEUE: usize = 8;

/// What may be asked of a running proxy.
#[derive(Clone, Debug)]
pub struct Commands(mpsc::Sender<Command>);

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
        (Self(sender), queue)
    }

    /// Puts another configuration to work. The old one stays where the new one fails.
    pub async fn reload(&self, config: Config) -> Result<(), StartError> {
        let (reply, answer) = oneshot::channel();
        let command = Command::Reload(Box::new(config), reply);
        self.0.send(command).await.map_err(|_| StartError::Ended)?;
        answer.await.map_err(|_| StartError::Ended)?
    }

    /// Begins the end: whatever is being served may finish, for `shutdown_grace`.
    pub async fn shutdown(&self) {
        let _ = self.0.send(Command::Shutdown).await;
    }
}

/// Why a configuration cannot be put to work.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An address cannot be listened on.
    #[error("{0}")]
    Bind(#[from] BindError),
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
