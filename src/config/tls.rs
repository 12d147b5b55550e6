//! TLS to a target.

use std::path::PathBuf;

use super::{
    form::*,
    names::NamePattern,
    scalars::*,
    table::{choice, default_sections, section},
};

section! {
    /// TLS to a target.
    pub struct Tls {
        /// Whether to use TLS, and whether to verify the target's certificate.
        mode: TlsMode as OneOf<TlsMode> = TlsMode::Verify,
        /// Overrides the true name for SNI, verification and Host: a name or an IP.
        server_name: Option<String> as Nullable<ServerName> = None,
        /// Patterns: the first name of the chain that matches is the true name.
        chain_match: Vec<NamePattern> as List<Pattern> = Vec::new(),
        /// Which certificate authorities to trust.
        ca: Trust as Sub<Trust> = Trust::default(),
        /// The client certificate; reloaded as a pair when the files change.
        client_certificate: Option<ClientCertificate> as Nullable<Sub<ClientCertificate>> = None,
        /// `sha256/BASE64` of public keys; at least one of them must be in the verified chain.
        pins: Vec<String> as List<Pin> = Vec::new(),
        /// Files of certificate revocation lists; a revoked leaf is refused.
        crls: Vec<PathBuf> as List<File> = Vec::new(),
        /// The lowest TLS version.
        min_version: TlsVersion as OneOf<TlsVersion> = TlsVersion::V1_2,
        /// Offer X25519MLKEM768 first; set to false if a middlebox drops long ClientHellos.
        post_quantum: bool as Bool = true,
    }
}

choice! {
    /// Whether to use TLS, and whether to verify the target's certificate.
    pub enum TlsMode {
        /// TLS, with the certificate verified for the true name.
        Verify = "verify",
        /// TLS, with any certificate.
        InsecureSkipVerify = "insecure_skip_verify",
        /// No TLS.
        Plaintext = "plaintext",
    }
}

choice! {
    /// A version of TLS.
    pub enum TlsVersion {
        /// TLS 1.2.
        V1_2 = "1.2",
        /// TLS 1.3.
        V1_3 = "1.3",
    }
}

section! {
    /// Which certificate authorities to trust: those of all sources together.
    pub struct Trust {
        /// Those of the system.
        system: bool as Bool = true,
        /// Those built in.
        webpki: bool as Bool = true,
        /// PEM files of further certificate authorities.
        files: Vec<PathBuf> as List<File> = Vec::new(),
    }
}

section! {
    /// A certificate with its key.
    pub struct ClientCertificate {
        /// PEM file of the certificate and its intermediates.
        cert: PathBuf as File,
        /// PEM file of the private key.
        key: PathBuf as File,
    }
}

default_sections!(Tls, Trust);

impl Tls {
    /// All configured files.
    pub fn files(&self) -> impl Iterator<Item = &PathBuf> {
        let pair = self.client_certificate.iter().flat_map(|pair| [&pair.cert, &pair.key]);
        self.ca.files.iter().chain(&self.crls).chain(pair)
    }
}
