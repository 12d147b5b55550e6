//! The contents of a folder: roots that pass all checks, keys, and files to ignore.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
    sync::Arc,
};

use super::{Known, StoreError, folder::read_file, may_pass};
use crate::{
    files::reading,
    tls::{authority::Root, shared::sha256},
};

const ROOT: &str = ".root.pem";
const KEY: &str = ".key.pem";
/// Marks an authority that was removed on purpose, for processes that still use it.
const REMOVED: &str = ".removed.";
/// The key of an earlier version, which had one authority for all aliases.
const FORMER: &str = "ca-key.pem";

/// Leaves room for the rest of a file name within 255 bytes, and within the 253 of a Secret.
const ALIAS_LENGTH: usize = 200;

/// How much of a longer one is kept, to leave room for a label with its digest.
const ALIAS_BEGINNING: usize = ALIAS_LENGTH - 1 - 2 * ALIAS_DIGEST;

/// How many bytes of the SHA-256 of a longer one are used.
const ALIAS_DIGEST: usize = 8;

/// A hundred long names take 60 KiB.
const LARGEST_ROOT: u64 = 128 * 1024;

/// More roots than any TLS library accepts are a mistake.
pub(super) const MOST_ROOTS: usize = 20_000;

/// The beginning of the names of an authority's files.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Stem {
    /// The alias; for a very long one, its beginning and a digest.
    pub alias: String,
    /// From the root's SHA-256.
    pub id: String,
}

/// A folder's contents.
#[derive(Debug, Default)]
pub(super) struct Listing {
    pub roots: BTreeMap<Stem, Arc<Root>>,
    pub keys: BTreeSet<Stem>,
    /// Ids.
    pub removed: BTreeSet<String>,
    /// Files that were left half-written.
    pub leftovers: Vec<String>,
}

impl Stem {
    pub(super) fn new(alias: &str, root: &Root) -> Self {
        Self { alias: alias_part(alias), id: root.id().to_owned() }
    }

    pub(super) fn root_file(&self) -> String {
        format!("{}.{}{ROOT}", self.alias, self.id)
    }

    pub(super) fn key_file(&self) -> String {
        format!("{}.{}{KEY}", self.alias, self.id)
    }

    pub(super) fn removed_file(&self) -> String {
        Self::removed(&self.id)
    }

    pub(super) fn removed(id: &str) -> String {
        format!("{REMOVED}{id}")
    }

    /// Parses a file's name without its suffix.
    fn parse(stem: &str) -> Option<Self> {
        let (alias, id) = stem.rsplit_once('.')?;
        let hexadecimal = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        let is_id = id.len() == 16 && id.bytes().all(hexadecimal);
        (is_id && !alias.is_empty()).then(|| Self { alias: alias.to_owned(), id: id.to_owned() })
    }
}

impl Listing {
    /// The stems of an alias, including those of keys without a root.
    pub(super) fn of_alias(&self, alias: &str) -> impl Iterator<Item = Stem> {
        let alias = alias_part(alias);
        let stems: BTreeSet<&Stem> = self.roots.keys().chain(&self.keys).collect();
        stems.into_iter().filter(move |stem| stem.alias == alias).cloned()
    }

    /// The roots of an alias.
    pub(super) fn roots_of(&self, alias: &str) -> impl Iterator<Item = (&Stem, &Arc<Root>)> {
        let first = Stem { alias: alias_part(alias), id: String::new() };
        let alias = first.alias.clone();
        self.roots.range(first..).take_while(move |(stem, _)| stem.alias == alias)
    }
}

/// The beginning of the names of an alias' files: the alias, or a part and a digest of one that is too long for that.
/// It is a valid name, because `ca remove` accepts what `ca show` shows.
pub fn alias_part(alias: &str) -> String {
    if alias.len() <= ALIAS_LENGTH {
        return alias.to_owned();
    }
    let beginning = alias[..ALIAS_BEGINNING].trim_end_matches(['.', '-']);
    let digest = sha256(alias.as_bytes()).into_iter().take(ALIAS_DIGEST);
    let digest: String = digest.map(|byte| format!("{byte:02x}")).collect();
    format!("{beginning}.{digest}")
}

/// Lists a folder. Reads new roots. Invalid files are logged once and ignored.
pub(super) fn list(directory: &Path, known: &mut Known) -> Result<Listing, StoreError> {
    let error = |source| StoreError::Read { path: directory.to_owned(), source };
    let mut listing = Listing::default();
    let mut stems = BTreeSet::new();
    let reading_names = reading(directory);
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(missing) if missing.kind() == io::ErrorKind::NotFound => return Ok(listing),
        Err(source) => return Err(error(source)),
    };
    for entry in entries {
        let name = entry.map_err(error)?.file_name();
        let Some(name) = name.to_str() else { continue };
        if let Some(id) = name.strip_prefix(REMOVED) {
            listing.removed.insert(id.to_owned());
        } else if name.starts_with(super::folder::BESIDE) {
            listing.leftovers.push(name.to_owned());
        } else if let Some(stem) = name.strip_suffix(ROOT).and_then(Stem::parse) {
            stems.insert(stem);
        } else if let Some(stem) = name.strip_suffix(KEY).and_then(Stem::parse) {
            listing.keys.insert(stem);
        } else if name == FORMER && known.is_news(FORMER.to_owned()) {
            tracing::warn!(
                file = %directory.join(FORMER).display(),
                "this key of an earlier version is no longer used, and its root is no longer among the \
                trusted ones: delete it, and restart the applications that trust the old root",
            );
        }
    }
    drop(reading_names);
    stems.retain(|stem| !listing.removed.contains(&stem.id));
    listing.keys.retain(|stem| !listing.removed.contains(&stem.id));
    for stem in stems {
        match known.roots.get(&stem) {
            Some(root) => drop(listing.roots.insert(stem, root.clone())),
            None => {
                let Some(root) = root_of(directory, &stem, known)? else { continue };
                known.roots.insert(stem.clone(), root.clone());
                listing.roots.insert(stem, root);
            }
        }
    }
    known.roots.retain(|stem, _| listing.roots.contains_key(stem));
    Ok(listing)
}

/// The root in a file; `None` if there is none that can be used.
fn root_of(
    directory: &Path,
    stem: &Stem,
    known: &mut Known,
) -> Result<Option<Arc<Root>>, StoreError> {
    let path = directory.join(stem.root_file());
    let why = match read_file(&path, LARGEST_ROOT) {
        Ok(text) => match Root::from_pem(&text) {
            Ok(root) if root.id() == stem.id => return Ok(Some(Arc::new(root))),
            Ok(_) => "its name does not match the certificate in it".to_owned(),
            Err(error) => error.to_string(),
        },
        // It was removed a moment ago.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // Without it, applications would trust less than before.
        Err(source) if may_pass(&source) => return Err(StoreError::Read { path, source }),
        Err(error) => error.to_string(),
    };
    if known.is_news_of_file(directory, stem.root_file()) {
        tracing::warn!(
            file = %path.display(),
            why,
            "a file in the folder of the local authority is ignored: applications will not trust it",
        );
    }
    Ok(None)
}
