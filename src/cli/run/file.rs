//! The configuration file of a proxy: its contents when it was read, and whether they have changed.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use nix::errno::Errno;
use tokio::{
    task::{JoinHandle, spawn_blocking},
    time::{sleep, timeout},
};

use crate::{
    cli::check,
    command::StartError,
    config::{Config, Document, FileError, LoadError, Problems},
    files,
};

/// How often the configuration file is compared. File watches would miss updates of a ConfigMap from the
/// second one on, because it is updated by swapping symbolic links.
const CHECK: Duration = Duration::from_secs(1);

/// How long a changed file must stay the same before it is used, and how often this is checked at most.
const SETTLE: Duration = Duration::from_millis(100);
const SETTLE_ROUNDS: usize = 10;

/// The configuration file as it was read.
#[derive(Clone)]
pub struct ConfigFile {
    /// Where it is.
    pub path: PathBuf,
    /// `false` for a pipe (`--config <(…)`), which can be read only once.
    pub is_followed: bool,
    /// Its text, or why it could not be read.
    contents: Result<String, Arc<LoadError>>,
}

impl ConfigFile {
    /// Reads it for the first time. Blocking.
    pub fn read(path: &Path) -> Self {
        let _reading = files::reading(path);
        let is_followed = fs::metadata(path).is_ok_and(|file| file.is_file());
        Self { path: path.to_owned(), is_followed, contents: Config::read(path).map_err(Arc::new) }
    }

    /// Reads it again. Blocking.
    pub fn again(&self) -> Self {
        if !self.is_followed {
            return Self::read(&self.path);
        }
        let _reading = files::reading(&self.path);
        // Opening a pipe in its place would wait for a writer.
        let contents = Config::read_regular(&self.path).map_err(Arc::new);
        Self { contents, ..self.clone() }
    }

    /// Parses it.
    pub fn parse(&self) -> Result<Config, Arc<LoadError>> {
        let text = self.contents.as_ref().map_err(Arc::clone)?;
        Config::parse(text, &self.path.to_string_lossy()).map_err(|error| Arc::new(error.into()))
    }

    /// If the error is of certificates or keys, checks them again for errors with positions in the file.
    /// Blocking.
    pub fn loadable(&self, error: &StartError) -> Result<(), Problems> {
        let is_tls = matches!(error, StartError::Tls { .. } | StartError::ListenerTls(_));
        let Some(text) = self.contents.as_ref().ok().filter(|_| is_tls) else { return Ok(()) };
        let mut document = Document::parse(text, &self.path.to_string_lossy());
        check::load(&mut document);
        document.finish().map(drop)
    }

    /// The files with certificates, keys, lists and credentials that it names, as far as it can be parsed.
    pub fn named_files(&self) -> Vec<PathBuf> {
        let Ok(text) = &self.contents else { return Vec::new() };
        let document = Document::parse(text, &self.path.to_string_lossy());
        let Some(config) = document.config() else { return Vec::new() };
        let of_aliases = config.aliases.iter().flat_map(|alias| alias.tls.files());
        let listener = [&config.listener.tls.certificate, &config.listener.tls.key];
        let others = listener.into_iter().chain([&config.proxy.credentials]).flatten();
        let named: BTreeSet<&PathBuf> = of_aliases.chain(others).collect();
        named.into_iter().cloned().collect()
    }

    fn is_same(&self, other: &Self) -> bool {
        match (&self.contents, &other.contents) {
            (Ok(one), Ok(other)) => one == other,
            (Err(one), Err(other)) => one.to_string() == other.to_string(),
            _ => false,
        }
    }

    /// Whether the error is probably temporary.
    fn is_passing(&self) -> bool {
        let Err(error) = &self.contents else { return false };
        let LoadError::Unreadable { source: FileError::Io(error), .. } = &**error else {
            return false;
        };
        // A missing file is being replaced, and a lack of resources says nothing about the file.
        let lacking = [Errno::EMFILE, Errno::ENFILE, Errno::ENOMEM].map(|errno| errno as i32);
        error.kind() == io::ErrorKind::NotFound
            || error.raw_os_error().is_some_and(|errno| lacking.contains(&errno))
    }
}

/// Checks the file. A read that hangs is not started again, even if `changed` is cancelled.
#[derive(Default)]
pub struct Look {
    reading: Option<JoinHandle<ConfigFile>>,
    is_late: bool,
}

impl Look {
    /// Waits until the contents have changed and then stay the same for a moment: an editor truncates the
    /// file before it writes, and a half-written file may be a valid configuration, too.
    pub async fn changed(&mut self, file: Option<&ConfigFile>) {
        let Some(file) = file.filter(|file| file.is_followed) else {
            return std::future::pending().await;
        };
        loop {
            sleep(CHECK).await;
            let Some(mut now) = self.change(file).await else { continue };
            for _ in 0..SETTLE_ROUNDS {
                sleep(SETTLE).await;
                match self.change(&now).await {
                    Some(new) => now = new,
                    None => break,
                }
            }
            if !now.is_same(file) {
                return;
            }
        }
    }

    /// The file as it is now, if it has changed.
    async fn change(&mut self, file: &ConfigFile) -> Option<ConfigFile> {
        let reading = self.reading.get_or_insert_with(|| {
            let file = file.clone();
            spawn_blocking(move || file.again())
        });
        let read = match timeout(files::READ_TIMEOUT, &mut *reading).await {
            Ok(read) => read,
            Err(_) => {
                if !std::mem::replace(&mut self.is_late, true) {
                    tracing::warn!(
                        file = %file.path.display(),
                        "the configuration file cannot be read: the volume that it is on does not \
                         respond; changes of it are not noticed meanwhile",
                    );
                }
                reading.await
            }
        };
        *self = Self::default();
        read.ok().filter(|now| !now.is_passing() && !now.is_same(file))
    }
}
