//! Whom a program shall trust besides the public: the files that programs take their roots from.

use std::{
    collections::HashSet,
    fs,
    path::PathBuf,
    time::{SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::digest::{self, SHA1_FOR_LEGACY_USE_ONLY};
use rustls::pki_types::{CertificateDer, pem::PemObject};

use super::store::pem;

/// What Java's own store has always been locked with: it guards nothing, and `keytool` asks for it.
pub const JAVA_PASSWORD: &str = "changeit";

/// Roots, each once.
#[derive(Debug)]
pub struct TrustStore {
    roots: Vec<CertificateDer<'static>>,
}

impl TrustStore {
    /// `root` first; then what this machine trusts (as `SSL_CERT_FILE` has it, where that is set;
    /// the public roots where there is nothing), and what is in `files` as far as they can be
    /// read: a program that is given one file loses all others.
    pub fn with(root: &CertificateDer<'_>, files: impl IntoIterator<Item = PathBuf>) -> Self {
        let mut roots = vec![root.clone().into_owned()];
        let native = rustls_native_certs::load_native_certs().certs;
        if native.is_empty() {
            roots.extend_from_slice(webpki_root_certs::TLS_SERVER_ROOT_CERTS);
        }
        roots.extend(native);
        for file in files {
            let Ok(text) = fs::read(file) else { continue };
            roots.extend(CertificateDer::pem_slice_iter(&text).flatten());
        }
        let mut seen = HashSet::new();
        roots.retain(|root| seen.insert(root.clone()));
        Self { roots }
    }

    /// For OpenSSL and most others.
    pub fn to_pem(&self) -> String {
        self.roots.iter().map(pem).collect()
    }

    /// For Java: its own format (JKS, version 2), which every Java reads.
    pub fn to_jks(&self) -> Vec<u8> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut store = Vec::new();
        store.extend(0xFEED_FEED_u32.to_be_bytes());
        store.extend(2_u32.to_be_bytes());
        store.extend((self.roots.len() as u32).to_be_bytes());
        for (index, root) in self.roots.iter().enumerate() {
            // The tag of a certificate that is trusted, as against a key.
            store.extend(2_u32.to_be_bytes());
            put_text(&mut store, &format!("root-{index}"));
            store.extend((now.as_millis() as u64).to_be_bytes());
            put_text(&mut store, "X.509");
            store.extend((root.len() as u32).to_be_bytes());
            store.extend_from_slice(root);
        }
        let password = JAVA_PASSWORD.encode_utf16().flat_map(u16::to_be_bytes);
        let mut keyed: Vec<u8> = password.collect();
        keyed.extend_from_slice(b"Mighty Aphrodite");
        keyed.extend_from_slice(&store);
        store.extend_from_slice(digest::digest(&SHA1_FOR_LEGACY_USE_ONLY, &keyed).as_ref());
        store
    }
}

/// Java's `writeUTF`; ASCII only.
fn put_text(store: &mut Vec<u8>, text: &str) {
    store.extend((text.len() as u16).to_be_bytes());
    store.extend_from_slice(text.as_bytes());
}
