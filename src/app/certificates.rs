//! The certificates that listeners show: issued, renewed before they end, taken anew when their
//! files change.

use std::{
    collections::BTreeSet,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use tokio::time::sleep;

use crate::{
    config::Config,
    tls::{
        authority::Authority,
        server::{Issued, ServerTls, Source, SourceError},
        store::{Store, StoreError},
    },
};

/// How often files are compared, and the clock is: a laptop's may jump while it sleeps.
const CHECK: Duration = Duration::from_secs(2);

/// Where the certificates in force come from.
pub struct Certificates {
    source: Source,
    /// The names of each alias.
    aliases: Vec<BTreeSet<String>>,
    renew_at: Option<SystemTime>,
    /// Of the files' contents when they were last looked at, usable or not.
    seen: u64,
}

impl Certificates {
    /// Issues a certificate for each alias, given by its names.
    ///
    /// Fails only where files are configured that cannot be used.
    pub fn issue(
        config: &Config,
        aliases: Vec<BTreeSet<String>>,
    ) -> Result<(Self, Issued), SourceError> {
        let files = &config.listener.tls;
        let source = match (&files.certificate, &files.key) {
            (Some(certificate), Some(key)) => {
                Source::Files { certificate: certificate.clone(), key: key.clone() }
            }
            _ => {
                let names = aliases.iter().flatten().cloned().collect();
                let authority = authority(config.ca.directory.as_deref(), &names)?;
                Source::Local(Box::new(authority), config.ca.leaf_lifetime)
            }
        };
        let seen = fingerprint(&source);
        let issued = source.issue(&aliases)?;
        for name in &issued.uncovered {
            tracing::warn!(
                name,
                "the certificate in `listener.tls.certificate` is not valid for this name of an \
                 alias: clients that ask for it over TLS will refuse it",
            );
        }
        Ok((Self { source, aliases, renew_at: issued.renew_at, seen }, issued))
    }

    /// Waits until it is time to look whether something has to be done.
    pub async fn tick(&self) {
        sleep(CHECK).await;
    }

    /// Renews what ends soon, and takes changed files into service. What cannot be used leaves
    /// the last good certificates in force.
    pub fn refresh(&mut self, tls: &ServerTls) {
        let now = fingerprint(&self.source);
        let changed = std::mem::replace(&mut self.seen, now) != now;
        let due = self.renew_at.is_some_and(|at| at <= SystemTime::now());
        if !changed && !due {
            return;
        }
        match self.source.issue(&self.aliases) {
            Ok(issued) => {
                self.renew_at = issued.renew_at;
                tls.serve(issued.certificates);
                tracing::info!("the listeners' certificates have been renewed");
            }
            Err(error) => tracing::warn!(
                %error,
                "the listeners' certificate files have changed and cannot be used; the last good \
                 ones stay",
            ),
        }
    }
}

/// The authority of `directory`, or of a temporary folder, or of this process' memory only: TLS
/// that nobody trusts yet is no reason not to start.
fn authority(directory: Option<&Path>, names: &BTreeSet<String>) -> Result<Authority, SourceError> {
    let open = |store: Store| -> Result<Authority, StoreError> {
        let opened = store.open(names)?;
        if let Some(reason) = opened.renewed {
            tracing::info!(
                reason,
                root = %store.root().display(),
                bundle = %store.bundle().display(),
                "new local authority: let applications that speak TLS trust its root",
            );
        }
        Ok(opened.authority)
    };
    let first = match Store::new(directory) {
        Some(store) => open(store),
        None => Store::temporary().and_then(open),
    };
    let error = match first {
        Ok(authority) => return Ok(authority),
        Err(error) => error,
    };
    tracing::warn!(%error, "the local authority is kept in a temporary folder");
    match Store::temporary().and_then(open) {
        Ok(authority) => Ok(authority),
        Err(error) => {
            tracing::warn!(%error, "the local authority is kept in memory: nobody can trust it");
            Ok(Authority::generate(names)?)
        }
    }
}

fn fingerprint(source: &Source) -> u64 {
    let Source::Files { certificate, key } = source else { return 0 };
    let mut hasher = DefaultHasher::new();
    let files: [&PathBuf; 2] = [certificate, key];
    for file in files {
        fs::read(file).ok().hash(&mut hasher);
    }
    hasher.finish()
}
