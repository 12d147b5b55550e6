//! The certificates that listeners show: issued, renewed before they end, taken anew when their
//! files change.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::{Instant, sleep_until, timeout},
};

use crate::{
    config::Config,
    tls::{
        authority::{Authority, is_certifiable},
        server,
        source::{Issued, Source, SourceError},
        store::{Opened, Store, StoreError},
    },
};

/// How often files are compared, and the clock is: a laptop's may jump while it sleeps.
const CHECK: Duration = Duration::from_secs(1);

/// The least time between two looks, however short-lived the certificates.
const MIN_CHECK: Duration = Duration::from_millis(100);

/// How long the end waits for a look that is under way.
const CLOSE: Duration = Duration::from_millis(200);

/// The certificates in force, and the look at their files that is under way.
///
/// Files are read and keys are made on the runtime's blocking pool: a volume that hangs holds up
/// neither DNS nor the admin listener, and nothing waits for it at the end.
pub struct Certificates {
    keeper: Keeper,
    check: Option<JoinHandle<(Keeper, Option<server::Certificates>)>>,
    next_check: Instant,
}

/// Where the certificates in force come from. Everything it does may block.
#[derive(Clone)]
struct Keeper {
    source: Source,
    /// `ca.directory`
    directory: Option<PathBuf>,
    /// The names of each alias.
    aliases: Vec<BTreeSet<String>>,
    renew_at: Option<SystemTime>,
    /// Of the files' contents when they were last looked at, usable or not.
    seen: u64,
}

impl Certificates {
    /// Issues a certificate for each alias, given by its names. An authority that was in use
    /// `before` a reload stays, as far as it can. Blocking.
    ///
    /// Fails only where files or a folder are configured that cannot be used.
    pub fn issue(
        config: &Config,
        aliases: Vec<BTreeSet<String>>,
        before: Option<&Self>,
    ) -> Result<(Self, server::Certificates), SourceError> {
        let (keeper, shown) = Keeper::issue(config, aliases, before.map(|before| &before.keeper))?;
        let next_check = Instant::now() + keeper.pause();
        Ok((Self { keeper, check: None, next_check }, shown))
    }

    /// Waits until other certificates are to be served. Loses nothing where it is dropped.
    pub async fn changed(&mut self) -> server::Certificates {
        loop {
            let check = match &mut self.check {
                Some(check) => check,
                None => {
                    sleep_until(self.next_check).await;
                    let mut keeper = self.keeper.clone();
                    self.check.insert(spawn_blocking(move || {
                        let shown = keeper.refresh();
                        (keeper, shown)
                    }))
                }
            };
            let checked = check.await;
            self.check = None;
            let mut shown = None;
            match checked {
                Ok((keeper, new)) => (self.keeper, shown) = (keeper, new),
                Err(error) => tracing::error!(%error, "looking at the certificates failed"),
            }
            self.next_check = Instant::now() + self.keeper.pause();
            if let Some(shown) = shown {
                return shown;
            }
        }
    }

    /// Ends: a temporary folder goes with this, unless a look that hangs still needs it.
    pub async fn close(self) {
        if let Some(check) = self.check {
            let _ = timeout(CLOSE, check).await;
        }
    }
}

impl Keeper {
    fn issue(
        config: &Config,
        mut aliases: Vec<BTreeSet<String>>,
        before: Option<&Self>,
    ) -> Result<(Self, server::Certificates), SourceError> {
        for names in &mut aliases {
            names.retain(|name| is_certifiable(name));
        }
        let directory = &config.ca.directory;
        let files = &config.listener.tls;
        let source = match (&files.certificate, &files.key) {
            (Some(certificate), Some(key)) => {
                Source::Files { certificate: certificate.clone(), key: key.clone() }
            }
            _ => {
                let names = aliases.iter().flatten().cloned().collect();
                let before = before.filter(|before| before.directory == *directory);
                let (authority, store) = match before.map(|before| &before.source) {
                    Some(Source::Local { authority, store, .. }) => {
                        reopened(store.as_ref(), &names, authority)?
                    }
                    _ => opened(directory.as_ref(), &names)?,
                };
                Source::Local { authority, store, lifetime: config.ca.leaf_lifetime }
            }
        };
        let mut keeper = Self {
            seen: source.fingerprint(),
            source,
            directory: directory.clone(),
            aliases,
            renew_at: None,
        };
        let shown = keeper.take()?;
        Ok((keeper, shown))
    }

    /// Renews what ends soon, and takes changed files into service. What cannot be used leaves
    /// the last good certificates in force.
    fn refresh(&mut self) -> Option<server::Certificates> {
        let now = self.source.fingerprint();
        let changed = std::mem::replace(&mut self.seen, now) != now;
        let due = self.renew_at.is_some_and(|at| at <= SystemTime::now());
        if !(changed || due) {
            return None;
        }
        match self.renew() {
            Ok(certificates) => {
                tracing::info!("the listeners' certificates have been renewed");
                Some(certificates)
            }
            Err(error) => {
                tracing::warn!(
                    %error,
                    "the listeners' certificates cannot be renewed; the last good ones stay",
                );
                None
            }
        }
    }

    fn renew(&mut self) -> Result<server::Certificates, SourceError> {
        if let Source::Local { authority, store, .. } = &mut self.source {
            let names = self.aliases.iter().flatten().cloned().collect();
            (*authority, _) = reopened(store.as_ref(), &names, authority)?;
            self.seen = self.source.fingerprint();
        }
        self.take()
    }

    fn take(&mut self) -> Result<server::Certificates, SourceError> {
        let Issued { certificates, renew_at, uncovered } = self.source.issue(&self.aliases)?;
        self.renew_at = renew_at;
        for name in uncovered {
            tracing::warn!(
                name,
                "the certificate in `listener.tls.certificate` is not valid for this name of an \
                 alias: clients that ask for it over TLS will refuse it",
            );
        }
        Ok(certificates)
    }

    /// How long until the next look.
    fn pause(&self) -> Duration {
        let until = |at: SystemTime| at.duration_since(SystemTime::now()).unwrap_or_default();
        self.renew_at.map_or(CHECK, until).clamp(MIN_CHECK, CHECK)
    }
}

/// The authority of `ca.directory`; where none is configured, that of a temporary folder or of this
/// process' memory will do: TLS that nobody trusts yet is no reason not to start.
fn opened(
    directory: Option<&PathBuf>,
    names: &BTreeSet<String>,
) -> Result<(Arc<Authority>, Option<Store>), SourceError> {
    let open = |store: Store| -> Result<_, StoreError> {
        Ok((told(&store, store.open(names, None)?), Some(store)))
    };
    if let Some(directory) = directory {
        return Ok(open(Store::at(directory))?);
    }
    let temporary = || Store::temporary().and_then(open);
    let first = match Store::of_user() {
        Some(store) => open(store).or_else(|error| {
            tracing::warn!(%error, "the local authority is kept in a temporary folder");
            temporary()
        }),
        None => temporary(),
    };
    Ok(match first {
        Ok(opened) => opened,
        Err(error) => {
            tracing::warn!(%error, "the local authority is kept in memory: nobody can trust it");
            (Arc::new(Authority::generate(names)?), None)
        }
    })
}

/// The authority in use, if it will still do; else what its folder has instead, or a new one.
fn reopened(
    store: Option<&Store>,
    names: &BTreeSet<String>,
    held: &Arc<Authority>,
) -> Result<(Arc<Authority>, Option<Store>), StoreError> {
    let Some(store) = store else {
        let still = held.covers(names);
        let authority = if still { held.clone() } else { Arc::new(Authority::generate(names)?) };
        return Ok((authority, None));
    };
    match store.open(names, Some(held)) {
        Ok(opened) => Ok((told(store, opened), Some(store.clone()))),
        Err(error) if held.covers(names) => {
            tracing::warn!(%error, "the local authority stays the one in memory");
            Ok((held.clone(), Some(store.clone())))
        }
        Err(error) => Err(error),
    }
}

/// Says in the log where a new authority is.
fn told(store: &Store, opened: Opened) -> Arc<Authority> {
    if let Some(reason) = opened.renewed {
        tracing::info!(
            reason,
            root = %store.root().display(),
            bundle = %store.bundle().display(),
            "new local authority: let applications that speak TLS trust its root",
        );
    }
    Arc::new(opened.authority)
}
