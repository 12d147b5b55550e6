//! `truename ca`: manages the local certificate authorities, one per alias, for applications that speak TLS.

mod print;

use std::{
    collections::BTreeSet,
    io::{self, Write},
    path::{Path, PathBuf},
};

use super::{EXIT_FAILED, EXIT_USAGE};
use crate::{
    config::{
        Alias, ArgumentError, BadName, Config, LoadError, Log, LogFormat, LogLevel, normal_name,
    },
    resolve::{Resolver, names},
    telemetry,
    tls::{
        authority::{self, AuthorityError, Subject, names::LOCALHOST, pem},
        store::{Serving, Store, StoreError, alias_part, write_new},
    },
};

/// Manage the local certificate authorities for applications that speak TLS
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Ca {
    /// Create a certificate authority for each alias that has none, and print how to trust them
    ///
    /// `truename run` does the same when it starts.
    Init {
        /// The aliases, besides those of the configuration
        #[arg(value_name = "ALIAS")]
        aliases: Vec<String>,
        /// Where they are
        #[command(flatten)]
        place: Place,
    },
    /// Issue a certificate for another server that is reached by names of an alias
    ///
    /// The certificate is issued by a certificate authority of its own, which is constrained to these names and
    /// 127.0.0.0/8 and whose key is discarded. Its root is added to the roots file that applications trust.
    /// The certificate is valid for 790 days. Anyone who has its key can impersonate that server to every
    /// application that trusts the roots.
    Issue {
        /// The names that the certificate is valid for
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
        /// Write NAME.pem and NAME-key.pem to this folder instead of to stdout; existing files are kept
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Where they are
        #[command(flatten)]
        place: Place,
    },
    /// List the authorities: names, validity, fingerprints and files
    Show {
        /// Print JSON
        #[arg(long)]
        json: bool,
        /// Where they are
        #[command(flatten)]
        place: Place,
    },
    /// Remove all authorities of an alias; a running proxy that serves it creates another
    ///
    /// Running applications trust the old root until they are restarted.
    Remove {
        /// The alias, as shown by `truename ca show`
        #[arg(value_name = "ALIAS", required = true)]
        aliases: Vec<String>,
        /// Where they are
        #[command(flatten)]
        place: Place,
    },
}

/// The folder of the authorities.
#[derive(Clone, Debug, clap::Args)]
pub struct Place {
    /// The configuration file
    #[arg(long, value_name = "FILE", env = "TRUENAME_CONFIG")]
    config: Option<PathBuf>,
    /// The authorities' folder, if not the configuration's `ca.directory`
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
}

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
enum CaError {
    #[error("{0}")]
    Load(#[from] LoadError),
    #[error("{0}")]
    Argument(#[from] ArgumentError),
    #[error("{0}")]
    Name(#[from] BadName),
    #[error(
        "no alias to create an authority for: name one, as in `truename ca init webscaler-manual`, or pass the configuration with --config FILE"
    )]
    NoAlias,
    #[error("no folder for the authorities: pass one with --directory DIR, or set HOME")]
    NoDirectory,
    #[error("{} contains no authority: create one with `truename ca init ALIAS`", .0.display())]
    NoAuthority(PathBuf),
    #[error(
        "{} contains no authority of `{alias}`; `truename ca show` lists the ones it contains",
        .directory.display()
    )]
    NotThere { alias: String, directory: PathBuf },
    #[error(
        "`{name}` is not a name of an alias, and certificates are issued for no other names; {}",
        if .known.is_empty() {
            "`truename ca init ALIAS` adds an alias".to_owned()
        } else {
            format!("the names are {}; `truename ca init ALIAS` adds an alias", .known.join(", "))
        }
    )]
    NotAnAlias { name: String, known: Vec<String> },
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("{0}")]
    Authority(#[from] AuthorityError),
    #[error(
        "--out {}: this is the authorities' own folder; pass another one, for the other server to read",
        .0.display()
    )]
    OwnFolder(PathBuf),
    #[error("cannot write {}: {source}{}", .path.display(), way_out(.source))]
    Out { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Write(#[from] io::Error),
}

fn way_out(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AlreadyExists => "; existing files are not overwritten: move it away first",
        _ => "; pass another folder with --out DIR",
    }
}

impl Ca {
    /// Runs the command and returns the exit code.
    pub fn run(&self, out: &mut impl Write) -> io::Result<u8> {
        // For warnings about files in the folder that are ignored.
        telemetry::init_log(&Log { format: LogFormat::Text, level: LogLevel::Warn, access: false });
        let result = match self {
            Self::Init { aliases, place } => init(aliases, place, out),
            Self::Issue { names, out: folder, place } => {
                issue(names, folder.as_deref(), place, out)
            }
            Self::Show { json, place } => show(*json, place, out),
            Self::Remove { aliases, place } => remove(aliases, place, out),
        };
        let error = match result {
            Ok(()) => return Ok(0),
            Err(CaError::Write(error)) => return Err(error),
            Err(error) => error,
        };
        telemetry::say(format_args!("truename: {error}"));
        Ok(match error {
            CaError::NoAuthority(_)
            | CaError::NotThere { .. }
            | CaError::NotAnAlias { .. }
            | CaError::Authority(_)
            | CaError::Out { .. } => EXIT_FAILED,
            _ => EXIT_USAGE,
        })
    }
}

impl Place {
    fn configuration(&self) -> Result<Config, CaError> {
        Ok(match &self.config {
            Some(path) => Config::load(path)?,
            None => Config::default(),
        })
    }

    fn store(&self, config: &Config) -> Result<Store, CaError> {
        match self.directory.as_deref().or(config.ca.directory.as_deref()) {
            Some(directory) => Ok(Store::at(directory)),
            None => Store::of_user().ok_or(CaError::NoDirectory),
        }
    }
}

fn init(aliases: &[String], place: &Place, out: &mut impl Write) -> Result<(), CaError> {
    let mut config = place.configuration()?;
    for argument in aliases {
        let alias = Alias::from_arg(argument)?;
        if !config.aliases.iter().any(|there| there.name == alias.name) {
            config.aliases.push(alias);
        }
    }
    if config.aliases.is_empty() {
        return Err(CaError::NoAlias);
    }
    let subjects = subjects(&config);
    let store = place.store(&config)?;
    // An authority that cannot be stored is of no use.
    store.check_safety()?;
    let before = ids(&store)?;
    store.serve(&subjects, &Serving::default())?;
    let found = store.find()?;
    let made = found.iter().filter(|found| !before.contains(found.root.id())).count();
    match made {
        0 => writeln!(out, "Every alias already has a certificate authority.")?,
        1 => writeln!(out, "Created 1 certificate authority.")?,
        made => writeln!(out, "Created {made} certificate authorities.")?,
    }
    print::list(&store, &found, out)?;
    print::how_to_trust(&store, out)?;
    Ok(())
}

fn issue(
    names: &[String],
    folder: Option<&Path>,
    place: &Place,
    out: &mut impl Write,
) -> Result<(), CaError> {
    let config = place.configuration()?;
    let store = place.store(&config)?;
    store.check_safety()?;
    // An invalid name, such as an address, is refused like any other name that is not an alias'.
    let names: BTreeSet<String> =
        names.iter().map(|name| normal_name(name).unwrap_or_else(|_| name.clone())).collect();
    let known = known_names(&config, &store)?;
    if let Some(name) = names.iter().find(|name| !known.contains(*name)) {
        let known = known.into_iter().take(print::MANY).collect();
        return Err(CaError::NotAnAlias { name: name.clone(), known });
    }
    let Some(first) = names.first() else { return Err(CaError::NoAlias) };
    let issued = authority::issue(&names, authority::now())?;
    let certificate = pem(&issued.certificate);
    let Some(folder) = folder else {
        store.add_issued(first, &issued)?;
        return Ok(write!(out, "{certificate}{}", issued.key_pem)?);
    };
    let file_name = alias_part(first);
    let certificate_file = folder.join(format!("{file_name}.pem"));
    let key_file = folder.join(format!("{file_name}-key.pem"));
    let unwritten = |path: &Path| {
        let path = path.to_owned();
        move |source| CaError::Out { path, source }
    };
    std::fs::create_dir_all(folder).map_err(unwritten(folder))?;
    let is_same = |one: &Path, other: &Path| one.canonicalize().ok() == other.canonicalize().ok();
    if store.directory().exists() && is_same(folder, store.directory()) {
        return Err(CaError::OwnFolder(folder.to_owned()));
    }
    write_new(&key_file, 0o600, issued.key_pem.as_bytes()).map_err(unwritten(&key_file))?;
    let written = write_new(&certificate_file, 0o644, certificate.as_bytes())
        .map_err(unwritten(&certificate_file))
        .map(|()| {
            store.add_issued(first, &issued).inspect_err(|_| {
                let _ = std::fs::remove_file(&certificate_file);
            })
        });
    match written {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            let _ = std::fs::remove_file(&key_file);
            return Err(error.into());
        }
        Err(error) => {
            let _ = std::fs::remove_file(&key_file);
            return Err(error);
        }
    }
    writeln!(out, "certificate  {}", certificate_file.display())?;
    writeln!(out, "key          {}", key_file.display())?;
    writeln!(out, "until        {}", authority::timestamp(issued.not_after))?;
    writeln!(out, "root         in {}", store.roots_file().display())?;
    Ok(())
}

fn show(as_json: bool, place: &Place, out: &mut impl Write) -> Result<(), CaError> {
    let store = place.store(&place.configuration()?)?;
    let found = store.find()?;
    if found.is_empty() {
        return Err(CaError::NoAuthority(store.directory().to_owned()));
    }
    if as_json {
        return Ok(print::json(&store, &found, out)?);
    }
    Ok(print::list(&store, &found, out)?)
}

fn remove(aliases: &[String], place: &Place, out: &mut impl Write) -> Result<(), CaError> {
    let store = place.store(&place.configuration()?)?;
    for alias in aliases {
        let alias = normal_name(alias)?;
        match store.remove(&alias)? {
            0 => {
                let directory = store.directory().to_owned();
                return Err(CaError::NotThere { alias, directory });
            }
            1 => writeln!(out, "Removed 1 authority of `{alias}`.")?,
            count => writeln!(out, "Removed {count} authorities of `{alias}`.")?,
        }
    }
    writeln!(out, "Restart the applications that trusted a removed root.")?;
    Ok(())
}

/// The aliases of a configuration with the names that their certificates must be valid for.
fn subjects(config: &Config) -> Vec<Subject> {
    let environment = Resolver::new(config.dns.clone()).environment();
    let subject = |alias: &Alias| {
        let listen = alias.listen.iter().map(std::net::SocketAddr::ip);
        Subject::new(&alias.name, names::of_alias(alias, &environment), listen)
    };
    config.aliases.iter().map(subject).collect()
}

/// The names of all aliases that are configured or have an authority.
fn known_names(config: &Config, store: &Store) -> Result<BTreeSet<String>, CaError> {
    let mut known: BTreeSet<String> =
        subjects(config).into_iter().flat_map(|subject| subject.names).collect();
    for found in store.find()? {
        known.extend(found.root.names().iter().filter(|name| *name != LOCALHOST).cloned());
    }
    Ok(known)
}

fn ids(store: &Store) -> Result<BTreeSet<String>, CaError> {
    Ok(store.find()?.iter().map(|found| found.root.id().to_owned()).collect())
}
