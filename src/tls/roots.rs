//! The certificates that an alias trusts. They are parsed once, however many aliases trust them.

use super::{
    anchor::{Terms, Use, Useless},
    leaf::{Date, Leaf},
    lists::{Lists, own_key},
    pem::certificates,
    shared::{Digest, Shared},
    system::{self, Found},
};
use crate::{
    config::{self, Contents},
    files::reading,
    tls::{TlsConfigError, TlsFault},
};
use parking_lot::Mutex;
use rustls::{
    crypto::{WebPkiSupportedAlgorithms, aws_lc_rs},
    pki_types::{CertificateDer, TrustAnchor, UnixTime},
};
use std::{
    collections::HashSet,
    path::Path,
    sync::{Arc, Weak},
};
use webpki::anchor_from_trusted_cert;

/// Seconds: a certificate expires soon in the last third of its lifetime, but no earlier than this.
const SOON: i64 = 30 * 24 * 60 * 60;

/// The root stores of one load, so that aliases with equal settings read them once.
///
/// Keep it for the length of a load, and then drop it: the next load reads the files again. Roots from
/// equal files are shared with all earlier loads that are in use.
#[derive(Default)]
pub struct RootStores {
    loaded: Vec<(config::Trust, Arc<Roots>)>,
    system: Option<Arc<System>>,
    /// Whether to use those of another load in progress.
    borrows_system: bool,
}

/// The system's roots.
type System = Vec<CertificateDer<'static>>;

/// The result of the last read, for as long as that load is in progress.
static SYSTEM: Mutex<Last> = Mutex::new(Last { system: Weak::new(), from_env: None });

struct Last {
    system: Weak<System>,
    /// The contents of the files that environment variables name.
    from_env: Option<Contents>,
}

/// The roots of one [`config::Trust`].
#[derive(Default)]
pub(super) struct Roots {
    /// The trust anchors.
    pub(super) anchors: Vec<TrustAnchor<'static>>,
    /// One for each of the first anchors. The built-in ones come last and have none: expired ones are
    /// removed when they are compiled.
    terms: Vec<Terms>,
    /// Certificates that are trusted as the certificate of a server.
    servers: HashSet<CertificateDer<'static>>,
}

impl RootStores {
    /// For one of many aliases whose files have changed at the same time: the first reads the system's roots for all.
    pub fn of_changed_files() -> Self {
        Self { borrows_system: true, ..Self::default() }
    }

    pub(super) fn load(
        &mut self,
        trust: &config::Trust,
    ) -> Result<Arc<Roots>, Vec<TlsConfigError>> {
        if let Some((_, roots)) = self.loaded.iter().find(|(known, _)| known == trust) {
            return Ok(roots.clone());
        }
        let roots = self.read(trust)?;
        self.loaded.push((trust.clone(), roots.clone()));
        Ok(roots)
    }

    fn read(&mut self, trust: &config::Trust) -> Result<Arc<Roots>, Vec<TlsConfigError>> {
        static IN_USE: Shared<Roots> = Shared::new();

        let mut roots = Roots::default();
        let errors: Vec<_> =
            trust.files.iter().filter_map(|path| roots.add_file(path).err()).collect();
        if !errors.is_empty() {
            return Err(errors);
        }
        let system = if trust.system { self.system() } else { Arc::default() };
        IN_USE.find_or_make(roots.digest(&system, trust.webpki), || {
            for certificate in system.iter() {
                // Some distributions have certificates that cannot be parsed; the others are used.
                if let Err(error) = roots.add(certificate) {
                    tracing::debug!(%error, "one of the system's root certificates cannot be used");
                }
            }
            if trust.webpki {
                roots.add_built_in();
            }
            if roots.anchors.is_empty() && roots.servers.is_empty() {
                return Err(vec![TlsConfigError::new("tls.ca", TlsFault::NoRoots)]);
            }
            Ok(roots)
        })
    }

    /// If `SSL_CERT_FILE` or `SSL_CERT_DIR` is set, it replaces the system's roots, but neither the built-in
    /// ones nor those of `tls.ca.files`.
    fn system(&mut self) -> Arc<System> {
        if let Some(system) = &self.system {
            return system.clone();
        }
        // Waiting for the lock means waiting for the same files.
        let _reading = reading(&system::place());
        let mut last = SYSTEM.lock();
        // Before they are read, so that a change in between is noticed.
        let from_env = system::FromEnv::read().map(|from_env| from_env.followed().look());
        let may_borrow = self.borrows_system && last.from_env == from_env;
        let borrowed = last.system.upgrade().filter(|_| may_borrow);
        let system = borrowed.unwrap_or_else(|| {
            let Found { certificates, errors } = system::load();
            for error in &errors {
                tracing::debug!(%error, "some of the system's root certificates cannot be read");
            }
            // A machine may have no roots, and some roots of a distribution may be damaged. But if variables name
            // them, that is a mistake.
            let is_from_env = from_env.is_some();
            let is_lacking = is_from_env || !errors.is_empty();
            if certificates.is_empty() && is_lacking || is_from_env && !errors.is_empty() {
                tracing::warn!(
                    place = %system::place().display(),
                    error = errors.first(),
                    trusted = certificates.len(),
                    "CA certificates of the system cannot be read and are not trusted: fix the file or folder, \
                    point `SSL_CERT_FILE` or `SSL_CERT_DIR` to another one, or set `tls.ca.system: false`",
                );
            }
            Arc::new(certificates)
        });
        *last = Last { system: Arc::downgrade(&system), from_env };
        self.system = Some(system.clone());
        system
    }
}

impl Roots {
    /// A file without any certificate that could verify a server is an error. A bundle may contain other
    /// certificates too.
    fn add_file(&mut self, path: &Path) -> Result<(), TlsConfigError> {
        const KEY: &str = "tls.ca.files";

        let mut useless = None;
        let mut useful = false;
        let algorithms = aws_lc_rs::default_provider().signature_verification_algorithms;
        for certificate in certificates(path, KEY)? {
            let count = self.terms.len();
            match self.add(&certificate) {
                Ok(()) => {
                    if let Some(terms) = self.terms.get_mut(count) {
                        terms.own_key = own_key(&certificate, &algorithms);
                    }
                    warn_of_dates(KEY, path, &certificate);
                    // A CA certificate too: `openssl req -x509` makes such certificates for servers.
                    self.servers.insert(certificate);
                    useful = true;
                }
                Err(error @ Useless::Unfit(_)) => {
                    useless.get_or_insert(error);
                }
                Err(error) => return Err(TlsConfigError::root(path, &error)),
            }
        }
        match useless {
            Some(error) if !useful => Err(TlsConfigError::root(path, &error)),
            Some(error) => {
                let file = path.display();
                tracing::warn!(key = KEY, %file, %error, "a certificate cannot verify anything and is ignored");
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Adds the built-in roots that are missing. Most are in the system's roots already and would only cost
    /// memory. A root that was renewed with its old key may be there in its old, expired version.
    fn add_built_in(&mut self) {
        let key = |root: &TrustAnchor<'static>| {
            (root.subject.clone(), root.subject_public_key_info.clone())
        };
        let now = i64::try_from(UnixTime::now().as_secs()).unwrap_or(i64::MAX);
        let there = self.anchors.iter().zip(&self.terms);
        let valid = there.filter(|(_, terms)| terms.not_before <= now && now <= terms.not_after);
        let known: HashSet<_> = valid.map(|(root, _)| key(root)).collect();
        let built_in = webpki_roots::TLS_SERVER_ROOTS.iter();
        self.anchors.extend(built_in.filter(|root| !known.contains(&key(root))).cloned());
    }

    /// The digest of the roots so far, with those that will be added.
    fn digest(&self, system: &[CertificateDer<'_>], built_in: bool) -> Digest {
        let mut files: Vec<_> = self.servers.iter().map(|it| Digest::of(it)).collect();
        files.sort_unstable();
        let system: Vec<_> = system.iter().map(|it| Digest::of(it)).collect();
        let parts =
            [Digest::of_all(&files), Digest::of_all(&system), Digest::of(&[built_in.into()])];
        Digest::of_all(&parts)
    }

    /// Trusts a certificate for its intended use.
    fn add(&mut self, certificate: &CertificateDer<'static>) -> Result<(), Useless> {
        let (usage, terms) = Terms::read(certificate)?;
        match usage {
            Use::Issuer => {
                let anchor = anchor_from_trusted_cert(certificate)
                    .map_err(|error| Useless::Unreadable(format!("it is damaged ({error})")))?;
                self.anchors.push(anchor.to_owned());
                self.terms.push(terms);
            }
            Use::Server => {
                self.servers.insert(certificate.clone());
            }
        }
        Ok(())
    }

    /// Why a trust anchor, one of `anchors`, cannot be used at `now`.
    pub(super) fn fault(
        &self,
        anchor: &TrustAnchor<'_>,
        now: UnixTime,
        lists: &Lists,
        algorithms: &WebPkiSupportedAlgorithms,
    ) -> Option<String> {
        self.terms(anchor)?.fault(now, lists, algorithms)
    }

    /// Whether a chain with this many intermediates is longer than the anchor allows.
    pub(super) fn is_too_long(&self, anchor: &TrustAnchor<'_>, intermediates: usize) -> bool {
        self.terms(anchor).is_some_and(|terms| terms.is_too_long(intermediates))
    }

    fn terms(&self, anchor: &TrustAnchor<'_>) -> Option<&Terms> {
        // By identity: a root that was renewed with its old key is equal to its predecessor. webpki returns a
        // reference to the anchor that it was given.
        let index = self.anchors.iter().position(|known| std::ptr::eq(known, anchor))?;
        self.terms.get(index)
    }

    /// Whether the certificate is itself trusted, as the certificate of a server.
    pub(super) fn has_server(&self, certificate: &CertificateDer<'_>) -> bool {
        self.servers.contains(certificate)
    }
}

/// Logs a certificate that has expired or expires soon.
pub(super) fn warn_of_dates(key: &'static str, path: &Path, certificate: &CertificateDer<'_>) {
    let Some(certificate) = Leaf::parse(certificate) else { return };
    let (subject, file) = (certificate.subject(), path.display());
    let (not_before, not_after) = (certificate.not_before(), certificate.not_after());
    let now = i64::try_from(UnixTime::now().as_secs()).unwrap_or(i64::MAX);
    if now > not_after {
        let since = Date(not_after);
        tracing::warn!(key, %file, subject, %since, "certificate expired: replace it");
    } else if now < not_before {
        let from = Date(not_before);
        tracing::warn!(key, %file, subject, %from, "a certificate is not valid yet");
    } else if not_after - now < SOON.min((not_after - not_before) / 3) {
        let until = Date(not_after);
        tracing::warn!(key, %file, subject, %until, "a certificate expires soon: replace it");
    }
}
