//! A configuration that was refused is tried again when files that it names change: a ConfigMap and the Secret that
//! belongs to it come one after the other, and so do the halves of a pair.

use std::{path::PathBuf, time::Duration};

use tokio::{task::spawn_blocking, time::sleep};

use crate::{
    config::{Contents, Followed},
    files::Settling,
};

/// How often the files are compared.
const CHECK: Duration = Duration::from_secs(1);

/// No file that can be loaded is larger.
const MAX_COMPARED: usize = 64 << 20;

/// The files that a refused configuration names.
pub struct Awaited {
    paths: Vec<PathBuf>,
    files: Followed,
    looks: Settling<Option<Contents>>,
    /// Why it was refused.
    pub error: String,
}

impl Awaited {
    /// Those of a configuration that was refused for this `error`, as another may have been `before`; `None` where it
    /// names no file.
    pub fn of_refused(paths: Vec<PathBuf>, error: String, before: Option<Self>) -> Option<Self> {
        if let Some(before) = before.filter(|before| before.paths == paths) {
            return Some(Self { error, ..before });
        }
        let files = Followed::new(paths.iter().cloned(), MAX_COMPARED);
        // What they held when they were read is not known, so that the first looks find a change.
        let looks = Settling::new(None);
        (!paths.is_empty()).then_some(Self { paths, files, looks, error })
    }

    /// Waits until they hold something else than at the last attempt.
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
