//! Trust stores for programs: files with local roots and public ones.

use std::{collections::HashSet, path::PathBuf};

use rustls::pki_types::CertificateDer;

use super::{authority::pem, system};

/// The traditional password of Java's own store. Ours is not protected and accepts any password.
pub const JAVA_PASSWORD: &str = "changeit";

/// Object identifiers in DER.
mod oid {
    /// PKCS #7: data.
    pub const DATA: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x07, 0x01];
    /// PKCS #12: a bag with a certificate.
    pub const CERT_BAG: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x0c, 0x0a, 0x01, 0x03];
    /// PKCS #9: an X.509 certificate.
    pub const X509: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x16, 0x01];
    /// PKCS #9: a friendly name.
    pub const FRIENDLY_NAME: &[u8] = &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x09, 0x14];
    /// Oracle: what the certificate is trusted for. Without it, Java ignores the certificate.
    pub const TRUSTED_KEY_USAGE: &[u8] =
        &[0x60, 0x86, 0x48, 0x01, 0x86, 0xf9, 0x66, 0xad, 0xca, 0x7b, 0x01, 0x01];
    /// RFC 5280: any usage.
    pub const ANY_USAGE: &[u8] = &[0x55, 0x1d, 0x25, 0x00];
}

const INTEGER: u8 = 0x02;
const OCTET_STRING: u8 = 0x04;
const OBJECT_IDENTIFIER: u8 = 0x06;
const BMP_STRING: u8 = 0x1e;
const SEQUENCE: u8 = 0x30;
const SET: u8 = 0x31;
/// `[0] EXPLICIT`
const EXPLICIT: u8 = 0xa0;

/// Roots without duplicates.
#[derive(Debug)]
pub struct TrustStore {
    roots: Vec<CertificateDer<'static>>,
}

impl TrustStore {
    /// `roots` first; then the roots of this machine (or of `SSL_CERT_FILE`, if it is set; the public
    /// roots, if there are none), and those in `files`, as far as these can be read. A program that gets one
    /// file of roots does not use any others.
    pub fn with(
        mut roots: Vec<CertificateDer<'static>>,
        files: impl IntoIterator<Item = PathBuf>,
    ) -> Self {
        let mut found = system::load();
        if found.certificates.is_empty() {
            roots.extend_from_slice(webpki_root_certs::TLS_SERVER_ROOT_CERTS);
        }
        files.into_iter().for_each(|file| found.add_file(&file));
        roots.extend(found.certificates);
        let mut seen = HashSet::new();
        roots.retain(|root| seen.insert(root.clone()));
        Self { roots }
    }

    /// For OpenSSL and most other libraries.
    pub fn to_pem(&self) -> String {
        self.roots.iter().map(pem).collect()
    }

    /// For Java.
    pub fn to_pkcs12(&self) -> Vec<u8> {
        to_pkcs12(&self.roots.iter().collect::<Vec<_>>())
    }
}

/// A trust store for Java 8 and later (PKCS #12, RFC 7292), neither encrypted nor authenticated: the
/// certificates are public, and a well-known password would protect nothing.
pub(super) fn to_pkcs12(roots: &[&CertificateDer<'_>]) -> Vec<u8> {
    let bags: Vec<u8> = roots
        .iter()
        .enumerate()
        .flat_map(|(index, root)| bag(&format!("root-{index}"), root))
        .collect();
    let contents = data(&tlv(SEQUENCE, &[&bags]));
    let authenticated = data(&tlv(SEQUENCE, &[&contents]));
    tlv(SEQUENCE, &[&tlv(INTEGER, &[&[3]]), &authenticated])
}

/// A certificate that is trusted for any usage.
fn bag(name: &str, root: &CertificateDer<'_>) -> Vec<u8> {
    let certificate = tlv(EXPLICIT, &[&tlv(OCTET_STRING, &[root])]);
    let certificate = tlv(SEQUENCE, &[&identifier(oid::X509), &certificate]);
    let name: Vec<u8> = name.encode_utf16().flat_map(u16::to_be_bytes).collect();
    let attributes = [
        attribute(oid::FRIENDLY_NAME, &tlv(BMP_STRING, &[&name])),
        attribute(oid::TRUSTED_KEY_USAGE, &identifier(oid::ANY_USAGE)),
    ];
    tlv(
        SEQUENCE,
        &[
            &identifier(oid::CERT_BAG),
            &tlv(EXPLICIT, &[&certificate]),
            &tlv(SET, &[&attributes[0], &attributes[1]]),
        ],
    )
}

fn attribute(name: &[u8], value: &[u8]) -> Vec<u8> {
    tlv(SEQUENCE, &[&identifier(name), &tlv(SET, &[value])])
}

fn data(contents: &[u8]) -> Vec<u8> {
    let contents = tlv(EXPLICIT, &[&tlv(OCTET_STRING, &[contents])]);
    tlv(SEQUENCE, &[&identifier(oid::DATA), &contents])
}

fn identifier(oid: &[u8]) -> Vec<u8> {
    tlv(OBJECT_IDENTIFIER, &[oid])
}

/// A DER value with these parts as its contents.
fn tlv(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    let mut value = Vec::with_capacity(length + 6);
    value.push(tag);
    if length < 0x80 {
        value.push(length as u8);
    } else {
        let bytes = length.to_be_bytes();
        let significant = &bytes[length.leading_zeros() as usize / 8..];
        value.push(0x80 | significant.len() as u8);
        value.extend_from_slice(significant);
    }
    for part in parts {
        value.extend_from_slice(part);
    }
    value
}
