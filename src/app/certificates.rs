//! The certificates of the listeners: issued, renewed before they expire, and reloaded when their
//! files change.

use std::{path::PathBuf, time::Duration};

use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep_until, timeout},
};

use crate::{
    config::Config,
    tls::{
        authority::Subject,
        server,
        source::{Source, SourceError},
    },
};

/// How often the files and the clock are checked: a laptop's clock may jump while it sleeps.
const CHECK: Duration = Duration::from_secs(1);

/// How long a shutdown waits for a running check.
const CLOSE: Duration = Duration::from_millis(200);

/// The certificates in use, and the running check of their files.
///
/// Files are read and keys are generated on the runtime's blocking pool: a volume that hangs blocks
/// neither DNS nor the admin listener nor a shutdown.
pub struct CertificateWatcher {
    keeper: Keeper,
    check: Option<JoinHandle<(Keeper, Option<server::ServerCertificates>)>>,
    next_check: Instant,
}

/// The source of the certificates in use. All its functions may block.
#[derive(Clone)]
pub struct Keeper {
    source: Source,
    /// `ca.directory`
    directory: Option<PathBuf>,
    subjects: Vec<Subject>,
    /// The certificates that were last loaded from files; `None` for local authorities.
    configured: Option<server::ServerCertificates>,
    /// Why the last check failed.
    failure: Option<String>,
}

impl CertificateWatcher {
    /// Loads or issues certificates for each alias. Those in use `before` a reload are kept where possible.
    /// Blocking.
    ///
    /// Fails only if configured files or a configured folder cannot be used.
    pub fn issue(
        config: &Config,
        subjects: Vec<Subject>,
        before: Option<&Keeper>,
    ) -> Result<(Self, server::ServerCertificates), SourceError> {
        let (keeper, shown) = Keeper::issue(config, subjects, before)?;
        let next_check = Instant::now() + CHECK;
        Ok((Self { keeper, check: None, next_check }, shown))
    }

    /// The state that a reload starts from.
    pub fn keeper(&self) -> &Keeper {
        &self.keeper
    }

    /// Waits until other certificates must be served. Cancel safe.
    pub async fn changed(&mut self) -> server::ServerCertificates {
        loop {
            let check = match &mut self.check {
                Some(check) => check,
                None => {
                    sleep_until(self.next_check).await;
                    let mut keeper = self.keeper.clone();
                    self.check.insert(spawn_blocking(move || {
                        let shown = keeper.look();
                        (keeper, shown)
                    }))
                }
            };
            let checked = check.await;
            self.check = None;
            let mut shown = None;
            match checked {
                Ok((keeper, new)) => (self.keeper, shown) = (keeper, new),
                Err(error) => tracing::error!(%error, "checking the certificates failed"),
            }
            self.next_check = Instant::now() + CHECK;
            if let Some(shown) = shown {
                return shown;
            }
        }
    }

    /// Ends. A temporary folder is removed, unless a check that hangs still needs it.
    pub async fn close(self) {
        if let Some(check) = self.check {
            let _ = timeout(CLOSE, check).await;
        }
    }
}

impl Keeper {
    fn issue(
        config: &Config,
        subjects: Vec<Subject>,
        before: Option<&Self>,
    ) -> Result<(Self, server::ServerCertificates), SourceError> {
        let directory = &config.ca.directory;
        let files = &config.listener.tls;
        let same = before.filter(|before| before.directory == *directory);
        let source = match (&files.certificate, &files.key, same.map(|same| &same.source)) {
            (Some(certificate), Some(key), _) => Source::files(certificate, key),
            (_, _, Some(local @ Source::Local { .. })) => {
                let mut local = local.clone();
                local.look(&subjects, true)?;
                local
            }
            _ => Source::local(directory.as_deref(), &subjects)?,
        };
        let (shown, keeper) = match source.certificates() {
            Ok(shown) => {
                let configured = shown.configured_key().is_some().then(|| shown.clone());
                let directory = directory.clone();
                (shown, Self { source, directory, subjects, configured, failure: None })
            }
            Err(error) => {
                // The same files as before: the other file of the pair may not be written yet.
                let before = before.filter(|before| before.source.has_files_of(&source));
                let Some(before) = before else { return Err(error) };
                let Some(shown) = before.configured.clone() else { return Err(error) };
                let mut keeper = Self { subjects, directory: directory.clone(), ..before.clone() };
                keeper.complain(&error);
                (shown, keeper)
            }
        };
        keeper.warn_of_uncovered(&shown);
        Ok((keeper, shown))
    }

    /// Loads changed files, and renews what is about to expire. The current certificates stay in use if the new
    /// ones cannot be used.
    fn look(&mut self) -> Option<server::ServerCertificates> {
        let looked = match self.source.look(&self.subjects, false) {
            Ok(false) => return None,
            Ok(true) => {
                let loaded = self.source.certificates();
                if !self.source.take(&loaded) {
                    return None;
                }
                // A warning from now on is about other files than before.
                self.failure = None;
                loaded
            }
            Err(error) => Err(error),
        };
        match looked {
            Ok(shown) => {
                self.warn_of_uncovered(&shown);
                if self.configured.is_some() {
                    self.configured = Some(shown.clone());
                }
                tracing::info!("listener certificates renewed");
                Some(shown)
            }
            Err(error) => {
                self.complain(&error);
                None
            }
        }
    }

    fn complain(&mut self, error: &SourceError) {
        let failure = error.to_string();
        if self.failure.as_ref() != Some(&failure) {
            tracing::warn!(
                error = failure,
                "cannot renew the listener certificates; the current ones stay in use",
            );
        }
        self.failure = Some(failure);
    }

    fn warn_of_uncovered(&self, shown: &server::ServerCertificates) {
        for name in self.source.uncovered(&self.subjects, shown) {
            tracing::warn!(
                name,
                "the certificate in `listener.tls.certificate` is not valid for this name of an \
                 alias: clients that ask for it over TLS will refuse it",
            );
        }
    }
}
