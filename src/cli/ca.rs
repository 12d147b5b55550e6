//! `truename ca`: the local authority that vouches for aliases to applications that speak TLS.

use std::{
    collections::BTreeSet,
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde_json::json;

use super::{EXIT_FAILED, EXIT_USAGE};
use crate::{
    config::{Alias, ArgumentError, Config, LoadError, normal_name},
    resolve::{Resolver, names},
    telemetry,
    tls::{
        authority::{Authority, AuthorityError, is_certifiable},
        store::{Store, StoreError, write},
    },
};

/// The local certificate authority for applications that speak TLS
#[derive(Clone, Debug, clap::Subcommand)]
pub enum Ca {
    /// Make it for these aliases, unless it is there, and say how applications come to trust it
    Init {
        /// The aliases, besides those of the configuration
        #[arg(value_name = "ALIAS")]
        aliases: Vec<String>,
        /// Where it is
        #[command(flatten)]
        place: Place,
    },
    /// A certificate and its key as PEM, for names of which the authority may vouch
    Issue {
        /// The names that the certificate bears
        #[arg(value_name = "NAME", required = true)]
        names: Vec<String>,
        /// A folder for NAME.pem and NAME-key.pem, instead of stdout
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        /// Where it is
        #[command(flatten)]
        place: Place,
    },
    /// Its names, validity, fingerprint and files
    Show {
        /// For machines
        #[arg(long)]
        json: bool,
        /// Where it is
        #[command(flatten)]
        place: Place,
    },
}

/// Where the authority is.
#[derive(Clone, Debug, clap::Args)]
pub struct Place {
    /// The configuration file
    #[arg(long, value_name = "FILE", env = "TRUENAME_CONFIG")]
    config: Option<PathBuf>,
    /// The authority's folder, instead of the configuration's `ca.directory`
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
}

/// Why a command has done nothing.
#[derive(Debug, thiserror::Error)]
enum CaError {
    #[error("{0}")]
    Load(#[from] LoadError),
    #[error("{0}")]
    Argument(#[from] ArgumentError),
    #[error(
        "there is no alias to vouch for: name one, as in `truename ca init webscaler-manual`, or the \
         configuration with --config FILE"
    )]
    NoAlias,
    #[error("there is no folder for the authority: name one with --directory DIR, or set HOME")]
    NoDirectory,
    #[error("no authority is in {}: make one with `truename ca init ALIAS`", .0.display())]
    NoAuthority(PathBuf),
    #[error("{}: {source}; `truename ca init ALIAS` makes a new one", .directory.display())]
    Broken { directory: PathBuf, source: AuthorityError },
    #[error("{0}; `truename ca init ALIAS` adds an alias' names")]
    Refused(AuthorityError),
    #[error("{0}")]
    Store(#[from] StoreError),
    #[error("{0}")]
    Authority(#[from] AuthorityError),
    #[error("cannot make the folder {}: {source}; name another with --out DIR", .path.display())]
    Out { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Write(#[from] io::Error),
}

impl Ca {
    /// Does it, and gives the exit code.
    pub fn run(&self, out: &mut impl Write) -> io::Result<u8> {
        let result = match self {
            Self::Init { aliases, place } => init(aliases, place, out),
            Self::Issue { names, out: folder, place } => {
                issue(names, folder.as_deref(), place, out)
            }
            Self::Show { json, place } => show(*json, place, out),
        };
        let error = match result {
            Ok(()) => return Ok(0),
            Err(CaError::Write(error)) => return Err(error),
            Err(error) => error,
        };
        telemetry::say(format_args!("truename: {error}"));
        Ok(match error {
            CaError::NoAuthority(_) | CaError::Broken { .. } | CaError::Refused(_) => EXIT_FAILED,
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
        config.aliases.push(Alias::from_arg(argument)?);
    }
    let environment = Resolver::new(config.dns.clone()).environment();
    let mut names = BTreeSet::new();
    for alias in &config.aliases {
        let of_alias = names::of_alias(alias, &environment).into_iter();
        names.extend(of_alias.filter(|name| is_certifiable(name)));
    }
    if names.is_empty() {
        return Err(CaError::NoAlias);
    }
    let store = place.store(&config)?;
    let opened = store.open(&names, None)?;
    match opened.renewed {
        Some(reason) => writeln!(out, "A new authority, for {reason}.")?,
        None => writeln!(out, "The authority was there already.")?,
    }
    describe(&store, &opened.authority, out)?;
    how_to_trust(&store, out)?;
    Ok(())
}

fn issue(
    names: &[String],
    folder: Option<&Path>,
    place: &Place,
    out: &mut impl Write,
) -> Result<(), CaError> {
    let config = place.configuration()?;
    let authority = existing(&place.store(&config)?)?;
    // What is no name at all, such as an address, is refused by the authority as any other.
    let names: BTreeSet<String> =
        names.iter().map(|name| normal_name(name).unwrap_or_else(|_| name.clone())).collect();
    let leaf = authority.issue(&names, config.ca.leaf_lifetime).map_err(|error| match error {
        AuthorityError::NotPermitted { .. } => CaError::Refused(error),
        other => CaError::Authority(other),
    })?;
    let (certificate, key) = (leaf.chain_pem(), leaf.key.serialize_pem());
    let (Some(folder), Some(name)) = (folder, names.first()) else {
        return Ok(write!(out, "{certificate}{key}")?);
    };
    std::fs::create_dir_all(folder)
        .map_err(|source| CaError::Out { path: folder.to_owned(), source })?;
    let (certificate_file, key_file) =
        (folder.join(format!("{name}.pem")), folder.join(format!("{name}-key.pem")));
    write(&key_file, 0o600, key.as_bytes())?;
    write(&certificate_file, 0o644, certificate.as_bytes())?;
    writeln!(out, "certificate  {}", certificate_file.display())?;
    writeln!(out, "key          {}", key_file.display())?;
    writeln!(out, "until        {}", leaf.ends())?;
    Ok(())
}

fn show(as_json: bool, place: &Place, out: &mut impl Write) -> Result<(), CaError> {
    let store = place.store(&place.configuration()?)?;
    let authority = existing(&store)?;
    if !as_json {
        return Ok(describe(&store, &authority, out)?);
    }
    let shown = json!({
        "names": authority.names(),
        "not_before": authority.begins(),
        "not_after": authority.ends(),
        "fingerprint_sha256": authority.fingerprint(),
        "directory": store.directory(),
        "root": store.root(),
        "bundle": store.bundle(),
        "key": store.key(),
    });
    Ok(writeln!(out, "{shown:#}")?)
}

fn existing(store: &Store) -> Result<Authority, CaError> {
    let directory = || store.directory().to_owned();
    match store.read()? {
        None => Err(CaError::NoAuthority(directory())),
        Some(Err(source)) => Err(CaError::Broken { directory: directory(), source }),
        Some(Ok(authority)) => Ok(authority),
    }
}

fn describe(store: &Store, authority: &Authority, out: &mut impl Write) -> io::Result<()> {
    let mut names = authority.names().iter();
    writeln!(out, "names   {}", names.next().map_or("", String::as_str))?;
    for name in names {
        writeln!(out, "        {name}")?;
    }
    writeln!(out, "valid   {} to {}", authority.begins(), authority.ends())?;
    writeln!(out, "sha256  {}", authority.fingerprint())?;
    writeln!(out, "root    {}", store.root().display())?;
    writeln!(out, "bundle  {} (the root and the public roots)", store.bundle().display())?;
    writeln!(out, "key     {} (stays here)", store.key().display())
}

fn how_to_trust(store: &Store, out: &mut impl Write) -> io::Result<()> {
    let (root, bundle) = (store.root(), store.bundle());
    let (root, bundle) = (root.display(), bundle.display());
    writeln!(
        out,
        "
Applications that speak TLS to an alias have to trust the root:
  curl               curl --cacert {root} https://ALIAS:PORT/
  OpenSSL, Go, Ruby  SSL_CERT_FILE={bundle}
  Python requests    REQUESTS_CA_BUNDLE={bundle}
  Node.js            NODE_EXTRA_CA_CERTS={root}
  Java               keytool -importcert -noprompt -cacerts -storepass changeit -alias truename -file {root}
  Debian, Ubuntu     cp {root} /usr/local/share/ca-certificates/truename.crt && update-ca-certificates"
    )
}
