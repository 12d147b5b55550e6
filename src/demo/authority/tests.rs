use rustls::{
    CertificateError, ClientConfig, ClientConnection, ServerConnection,
    pki_types::{ServerName, UnixTime},
};

use super::*;

#[test]
fn a_leaf_is_good_for_its_names_and_no_other() {
    let authority = Authority::new("test root").unwrap();
    let address: IpAddr = "127.0.0.11".parse().unwrap();
    let leaf = authority.issue(&["httpbin.org"], &[address], LeafOptions::default()).unwrap();

    assert_eq!(handshake(&authority, &leaf, "httpbin.org"), Ok(()));
    assert_eq!(handshake(&authority, &leaf, "127.0.0.11"), Ok(()));
    let refused = handshake(&authority, &leaf, "webscaler-manual").unwrap_err();
    assert!(
        matches!(
            &refused,
            rustls::Error::InvalidCertificate(
                CertificateError::NotValidForNameContext { presented, .. }
            ) if presented.iter().any(|name| name.contains("httpbin.org"))
        ),
        "{refused:?}"
    );
}

#[test]
fn an_expired_leaf_is_expired() {
    let authority = Authority::new("test root").unwrap();
    let leaf = authority.issue(&["httpbin.org"], &[], LeafOptions::expired()).unwrap();

    let refused = handshake(&authority, &leaf, "httpbin.org").unwrap_err();
    assert!(
        matches!(
            refused,
            rustls::Error::InvalidCertificate(CertificateError::ExpiredContext { .. })
        ),
        "{refused:?}"
    );
}

#[test]
fn a_common_name_alone_proves_nothing() {
    let authority = Authority::new("test root").unwrap();
    let options =
        LeafOptions { common_name: Some("httpbin.org".to_owned()), ..LeafOptions::default() };
    let leaf = authority.issue(&[], &[], options).unwrap();

    assert!(handshake(&authority, &leaf, "httpbin.org").is_err());
}

#[test]
fn a_client_certificate_does_not_serve() {
    let authority = Authority::new("test root").unwrap();
    let options = LeafOptions { usage: Usage::Client, ..LeafOptions::default() };
    let leaf = authority.issue(&["httpbin.org"], &[], options).unwrap();

    let refused = handshake(&authority, &leaf, "httpbin.org").unwrap_err();
    assert!(
        matches!(
            refused,
            rustls::Error::InvalidCertificate(CertificateError::InvalidPurposeContext { .. })
        ),
        "{refused:?}"
    );
}

#[test]
fn another_root_of_the_same_name_is_not_the_issuer() {
    let leaf = Authority::new("test root")
        .unwrap()
        .issue(&["httpbin.org"], &[], LeafOptions::default())
        .unwrap();

    assert!(handshake(&Authority::new("test root").unwrap(), &leaf, "httpbin.org").is_err());
}

#[test]
fn a_revoked_leaf_is_refused_by_who_reads_the_list() {
    use rustls::{
        client::{WebPkiServerVerifier, danger::ServerCertVerifier as _},
        pki_types::{CertificateRevocationListDer, pem::PemObject as _},
    };

    let authority = Authority::new("test root").unwrap();
    let good = authority.issue(&["httpbin.org"], &[], LeafOptions::default()).unwrap();
    let bad = authority.issue(&["httpbin.org"], &[], LeafOptions::default()).unwrap();
    let list = authority.revocation_list(&[&bad]).unwrap();
    let verifier = WebPkiServerVerifier::builder_with_provider(
        authority.roots(),
        Arc::new(rustls::crypto::aws_lc_rs::default_provider()),
    )
    .with_crls([CertificateRevocationListDer::from_pem_slice(list.as_bytes()).unwrap()])
    .build()
    .unwrap();

    let name = ServerName::try_from("httpbin.org").unwrap();
    let verify =
        |leaf: &Leaf| verifier.verify_server_cert(&leaf.chain[0], &[], &name, &[], UnixTime::now());
    assert!(verify(&good).is_ok());
    assert_eq!(
        verify(&bad).unwrap_err(),
        rustls::Error::InvalidCertificate(CertificateError::Revoked)
    );
}

/// A whole handshake in memory, by a client that trusts `authority` only.
fn handshake(authority: &Authority, leaf: &Leaf, name: &str) -> Result<(), rustls::Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(authority.roots())
        .with_no_client_auth();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    let mut client = ClientConnection::new(Arc::new(config), name)?;
    let mut server = ServerConnection::new(leaf.server_config(&["http/1.1"]).unwrap())?;

    let mut wire = Vec::new();
    while client.is_handshaking() || server.is_handshaking() {
        wire.clear();
        client.write_tls(&mut wire).unwrap();
        server.read_tls(&mut wire.as_slice()).unwrap();
        server.process_new_packets()?;
        wire.clear();
        while server.wants_write() {
            server.write_tls(&mut wire).unwrap();
        }
        let mut unread = wire.as_slice();
        while !unread.is_empty() {
            client.read_tls(&mut unread).unwrap();
            client.process_new_packets()?;
        }
    }
    Ok(())
}
