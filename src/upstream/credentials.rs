//! The credentials for the proxy of `via`, reloaded when their file changes.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwapOption;
use base64::{Engine as _, prelude::BASE64_STANDARD};
use parking_lot::Mutex;
use tokio::{task::spawn_blocking, time::sleep};

use crate::{
    config::{self, Contents, CredentialsError, Followed, read_credentials},
    connect::Secret,
    files::Settling,
};

/// How often the file is compared.
const FILE_CHECK: Duration = Duration::from_secs(2);

/// How soon it is compared again after a change.
const SECOND_LOOK: Duration = Duration::from_secs(1);

/// The largest file that is compared.
const MAX_COMPARED: usize = 64 << 10;

/// What a proxy gets as `Proxy-Authorization`.
pub struct ProxyCredentials {
    file: Option<PathBuf>,
    /// Locked for as long as it is read: not on a thread that must not wait.
    followed: Mutex<Followed>,
    looks: Mutex<Settling<Contents>>,
    current: ArcSwapOption<Secret>,
}

impl ProxyCredentials {
    /// Reads them for the first time. Blocking.
    pub fn load(alias: &config::Alias) -> Self {
        let file = alias.via.as_ref().and_then(|via| via.credentials.clone());
        let mut followed = Followed::new(file.clone(), MAX_COMPARED);
        let looks = Settling::new(followed.look());
        let current = file.as_deref().and_then(|file| match authorization(file) {
            Ok(secret) => Some(Arc::new(secret)),
            Err(error) => {
                // The configuration was checked, so it has changed since: it is looked at again soon.
                warn(&alias.name, file, &error);
                None
            }
        });
        Self {
            file,
            followed: Mutex::new(followed),
            looks: Mutex::new(looks),
            current: ArcSwapOption::new(current),
        }
    }

    /// Whether an alias with these settings would load the same.
    pub fn is_of(&self, alias: &config::Alias) -> bool {
        self.file.as_deref() == alias.via.as_ref().and_then(|via| via.credentials.as_deref())
    }

    /// The current ones; none if none are configured.
    pub fn current(&self) -> Option<Arc<Secret>> {
        self.current.load_full()
    }

    /// Follows the file. What cannot be used leaves the former ones in use.
    pub async fn follow(self: &Arc<Self>, alias: &str) {
        let Some(file) = &self.file else { return std::future::pending().await };
        loop {
            let next = if self.looks.lock().is_unsettled() { SECOND_LOOK } else { FILE_CHECK };
            sleep(next).await;
            let credentials = self.clone();
            match spawn_blocking(move || credentials.reload()).await {
                Ok(None) => {}
                Ok(Some(Ok(()))) => {
                    tracing::info!(
                        alias,
                        "the credentials for the proxy of `via` changed and are now in use"
                    );
                }
                Ok(Some(Err(error))) => warn(alias, file, &error),
                Err(_) => return std::future::pending().await,
            }
        }
    }

    /// Reads the file if it has changed; `None` if not.
    fn reload(&self) -> Option<Result<(), CredentialsError>> {
        let now = self.followed.lock().look();
        if !self.looks.lock().has_changed(now) {
            return None;
        }
        self.looks.lock().take();
        let file = self.file.as_deref()?;
        Some(authorization(file).map(|secret| self.current.store(Some(Arc::new(secret)))))
    }
}

fn warn(alias: &str, file: &Path, error: &CredentialsError) {
    let file = file.display();
    tracing::warn!(alias, %file, %error, "the credentials for the proxy of `via` cannot be used");
}

/// The value of Proxy-Authorization (RFC 7617).
fn authorization(file: &Path) -> Result<Secret, CredentialsError> {
    // The file has a line at least, and of several the first counts.
    let line = read_credentials(file)?.into_iter().next().ok_or(CredentialsError::Empty)?;
    Ok(Secret(format!("Basic {}", BASE64_STANDARD.encode(line))))
}
