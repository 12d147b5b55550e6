//! Tries a rejected configuration again when files that it names change: a ConfigMap and its Secret are updated one
//! after the other, and so are a certificate and its key.

use std::{path::PathBuf, time::Duration};

use tokio::{task::spawn_blocking, time::sleep};

use crate::{
    config::{Contents, Followed},
    files::Settling,
};

/// How often the files are compared.
const CHECK: Duration = Duration::from_secs(1);

/// More than the largest file that can be loaded.
const MAX_COMPARED: usize = 64 << 20;

/// The files that a rejected configuration names.
pub struct Awaited {
    paths: Vec<PathBuf>,
    files: Followed,
    looks: Settling<Option<Contents>>,
    /// Why it was rejected.
    pub error: String,
}

impl Awaited {
    /// The files of a configuration that was rejected with this `error`. `before` are those of the previously
    /// rejected one. `None` if it names no files.
    pub fn of_refused(paths: Vec<PathBuf>, error: String, before: Option<Self>) -> Option<Self> {
        if let Some(before) = before.filter(|before| before.paths == paths) {
            return Some(Self { error, ..before });
        }
        let files = Followed::new(paths.iter().cloned(), MAX_COMPARED);
        // Their contents when they were read are unknown, so the first checks find a change.
        let looks = Settling::new(None);
        (!paths.is_empty()).then_some(Self { paths, files, looks, error })
    }

    /// Waits until their contents differ from those at the last attempt.
    pub async fn changed(awaited: &mut Option<Self>) {
        while let Some(Self { files, looks, .. }) = awaited {
            sleep(CHECK).await;
            let mut next = files.clone();
            let look = spawn_blocking(move || {
                let contents = next.look();
                (next, contents)
            });
            let Ok((next, contents)) = look.await else { break };
            *files = next;
            if looks.has_changed(Some(contents)) {
                looks.take();
                return;
            }
        }
        std::future::pending().await
    }
}
