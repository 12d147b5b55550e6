//! An alias' TLS material: certificates and keys from files, reloaded when the files change.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use tokio::{task::spawn_blocking, time::sleep};

use crate::{
    config::{self, Contents, Followed, TlsMode},
    files::Settling,
    protocol,
    tls::{ClientTls, RootStores, TlsConfigErrors, files_from_env},
};

/// How often the files are compared.
const FILE_CHECK: Duration = Duration::from_secs(2);

/// How soon they are compared again after a change.
const SECOND_LOOK: Duration = Duration::from_secs(1);

/// The largest file that can be loaded.
const MAX_COMPARED: usize = 64 << 20;

/// What [`ClientTls`] was loaded from, and the current load.
pub struct Material {
    settings: config::Tls,
    /// The ALPN protocols that are offered.
    alpn: Vec<String>,
    has_files: bool,
    /// Locked for as long as they are read: not on a thread that must not wait.
    files: Mutex<Followed>,
    loaded: ArcSwapOption<ClientTls>,
    /// Of the files' contents, loadable or not.
    looks: Mutex<Settling<Contents>>,
}

impl Material {
    /// Loads it for the first time. Blocking.
    pub fn load(alias: &config::Alias, roots: &mut RootStores) -> Result<Self, TlsConfigErrors> {
        let (settings, alpn) = (&alias.tls, protocol::offered_alpn(alias));
        let mut files: Vec<_> = settings.files().cloned().collect();
        if settings.ca.system && settings.mode == TlsMode::Verify {
            files.extend(files_from_env());
        }
        let has_files = !files.is_empty();
        let mut files = Followed::new(files, MAX_COMPARED);
        let looks = Settling::new(files.look());
        Ok(Self {
            loaded: ArcSwapOption::new(
                ClientTls::load_offering(settings, &alpn, roots)?.map(Arc::new),
            ),
            settings: settings.clone(),
            alpn,
            looks: Mutex::new(looks),
            files: Mutex::new(files),
            has_files,
        })
    }

    /// Whether an alias with these settings would load the same.
    pub fn is_of(&self, alias: &config::Alias) -> bool {
        self.settings == alias.tls && self.alpn == protocol::offered_alpn(alias)
    }

    /// The current load; `None` on plaintext.
    pub fn current(&self) -> Option<Arc<ClientTls>> {
        self.loaded.load_full()
    }

    /// Waits until changed files have been loaded.
    ///
    /// If they cannot be loaded, such as a key that does not match its certificate, the last good load stays in use:
    /// the other half of the pair may follow.
    pub async fn renewed(self: &Arc<Self>, alias: &str) {
        if !self.has_files {
            return std::future::pending().await;
        }
        loop {
            let next = if self.looks.lock().is_unsettled() { SECOND_LOOK } else { FILE_CHECK };
            sleep(next).await;
            let material = self.clone();
            // Reading trust stores takes milliseconds, which the control thread does not have.
            match spawn_blocking(move || material.reload()).await {
                Ok(Ok(true)) => {
                    tracing::info!(alias, "certificate files changed and are now in use");
                    return;
                }
                Ok(Ok(false)) => {}
                Ok(Err(error)) => tracing::warn!(
                    alias,
                    %error,
                    "certificate files changed and cannot be used; the previous ones stay in use",
                ),
                Err(_) => return std::future::pending().await,
            }
        }
    }

    fn reload(&self) -> Result<bool, TlsConfigErrors> {
        let (settings, alpn) = (&self.settings, &self.alpn);
        self.reload_by(|| {
            ClientTls::load_offering(settings, alpn, &mut RootStores::of_changed_files())
        })
    }

    fn reload_by(
        &self,
        load: impl FnOnce() -> Result<Option<ClientTls>, TlsConfigErrors>,
    ) -> Result<bool, TlsConfigErrors> {
        let mut files = self.files.lock();
        let now = files.look();
        if !self.looks.lock().has_changed(now.clone()) {
            return Ok(false);
        }
        let tls = load();
        // They have changed while they were loaded.
        if files.look() != now {
            return Ok(false);
        }
        // The files can be read: what failed is the process, which has run out of descriptors. The next look tries again.
        if now.are_complete() && tls.as_ref().is_err_and(TlsConfigErrors::are_io) {
            return Ok(false);
        }
        self.looks.lock().take();
        self.loaded.store(tls?.map(Arc::new));
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::demo::authority::Authority;

    /// Regression: half of a bundle is one, too, and servers of the other half were refused.
    #[test]
    fn a_bundle_that_is_still_being_written_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.pem");
        let [old, one, two] =
            ["old", "one", "two"].map(|name| Authority::new(name).unwrap().root_pem().to_owned());
        fs::write(&file, &old).unwrap();
        let mut alias = config::Alias::named("a");
        alias.tls.ca = config::Trust { system: false, webpki: false, files: vec![file.clone()] };
        let material = Material::load(&alias, &mut RootStores::default()).unwrap();
        let settings = alias.tls;
        let first = material.current().unwrap();
        let is_first = || Arc::ptr_eq(&first, &material.current().unwrap());

        assert!(!material.reload().unwrap());
        fs::write(&file, &one).unwrap();
        assert!(!material.reload().unwrap() && is_first());
        fs::write(&file, one.clone() + &two).unwrap();
        assert!(!material.reload().unwrap() && is_first());
        assert!(material.reload().unwrap() && !is_first());
        assert!(!material.reload().unwrap());

        // A file that could not be read without descriptors is loaded by the next check.
        fs::write(&file, &two).unwrap();
        assert!(!material.reload().unwrap());
        let missing =
            config::Trust { files: vec![folder.path().join("nowhere")], ..settings.ca.clone() };
        let failing = config::Tls { ca: missing, ..settings.clone() };
        let load = || ClientTls::load(&failing, &mut RootStores::default());
        assert!(!material.reload_by(load).unwrap());
        assert!(material.reload().unwrap());

        // An error is logged once.
        fs::write(&file, "no certificate").unwrap();
        assert!(!material.reload().unwrap());
        assert!(material.reload().is_err());
        assert!(!material.reload().unwrap());
    }
}
