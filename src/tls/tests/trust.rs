//! What a trusted certificate may be used for, and until when.

use super::*;
use crate::tls::{leaf::Leaf, lists::Lists};
use rcgen::{
    CertificateRevocationListParams, GeneralSubtree, KeyIdMethod, NameConstraints,
    RevokedCertParams, SerialNumber, date_time_ymd,
};

type Change = fn(&mut CertificateParams);

/// A CA whose certificate is changed before it is signed.
fn ca(name: &str, change: Change) -> Ca {
    again(name, KeyPair::generate().unwrap(), change)
}

/// Another certificate for an existing key of a CA.
fn again(name: &str, key: KeyPair, change: Change) -> Ca {
    let mut params = Ca::params(name);
    change(&mut params);
    Ca(CertifiedIssuer::self_signed(params, key).unwrap())
}

fn same_key(ca: &Ca) -> KeyPair {
    KeyPair::from_pem(&ca.0.key().serialize_pem()).unwrap()
}

/// A certificate that `issuer` signs for an existing key of another CA.
fn cross_signed(issuer: &Ca, other: &Ca, name: &str, change: Change) -> CertificateDer<'static> {
    let mut params = Ca::params(name);
    change(&mut params);
    params.signed_by(other.0.key(), &issuer.0).unwrap().der().clone()
}

pub(super) fn list(issuer: &Ca, revoked: &[u64]) -> String {
    list_with(issuer, revoked, KeyIdMethod::Sha256)
}

fn list_with(issuer: &Ca, revoked: &[u64], key_identifier_method: KeyIdMethod) -> String {
    let revoked_certs = revoked.iter().map(|serial| RevokedCertParams {
        serial_number: SerialNumber::from(*serial),
        revocation_time: date_time_ymd(2024, 1, 1),
        reason_code: None,
        invalidity_date: None,
    });
    let list = CertificateRevocationListParams {
        this_update: date_time_ymd(2024, 1, 1),
        next_update: date_time_ymd(2090, 1, 1),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: revoked_certs.collect(),
        key_identifier_method,
    };
    list.signed_by(&issuer.0).unwrap().pem().unwrap()
}

fn with_serial(ca: &Ca, serial: u64) -> Identity {
    ca.issue_with(&[NAME], |params| params.serial_number = Some(SerialNumber::from(serial)))
}

fn pem(certificate: &CertificateDer<'_>) -> String {
    crate::tls::authority::pem(certificate)
}

fn pin(certificate: &CertificateDer<'_>) -> String {
    Leaf::parse(certificate).unwrap().pin()
}

#[tokio::test]
async fn a_root_that_has_expired_or_is_not_valid_yet_is_not_trusted() {
    let past: Change = |params| params.not_after = date_time_ymd(2021, 2, 3);
    let future: Change = |params| params.not_before = date_time_ymd(2990, 2, 3);
    for (change, expected) in
        [(past, "expired at 2021-02-03"), (future, "not valid before 2990-02-03")]
    {
        let root = ca("Old Root", change);
        let failure =
            refusal(root.issue(&[NAME]).server(), &Settings::trusting(&root).load(), NAME).await;
        assert!(failure.to_string().contains(expected), "{failure}");
        assert!(failure.to_string().contains("`CN=Old Root`"), "{failure}");
        assert!(failure.hint().contains("tls.ca.files"), "{}", failure.hint());
    }
}

#[tokio::test]
async fn a_root_that_was_renewed_with_its_key_is_trusted_beside_its_predecessor() {
    let root = Ca::new("Root");
    let old = again("Root", same_key(&root), |params| params.not_after = date_time_ymd(2021, 2, 3));
    for both in [old.pem() + &root.pem(), root.pem() + &old.pem()] {
        let tls = Settings::trusting_pem(&both).load();
        accepted(root.issue(&[NAME]).server(), &tls, NAME).await;
    }
}

#[tokio::test]
async fn a_trusted_certificate_without_a_ca_is_valid_for_its_own_server_only() {
    let changes: [Change; 3] = [
        |params| params.is_ca = IsCa::NoCa,
        |params| params.is_ca = IsCa::ExplicitNoCa,
        |params| params.key_usages = vec![KeyUsagePurpose::DigitalSignature],
    ];
    for change in changes {
        let key = KeyPair::generate().unwrap();
        let mut params = leaf_params(&[NAME]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        change(&mut params);
        // rcgen takes it for a CA anyway.
        let server = Ca(CertifiedIssuer::self_signed(params.clone(), key).unwrap());
        let tls = Settings::trusting(&server).load();
        let mut forger = params;
        forger.key_usages = Vec::new();
        forger.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let forger = Ca(CertifiedIssuer::self_signed(forger, same_key(&server)).unwrap());
        let failure = refusal(forger.issue(&[NAME]).server(), &tls, NAME).await;
        assert!(matches!(failure.reason, Reason::UnknownIssuer | Reason::SelfSigned), "{failure}");
        let own = Identity::new(vec![server.der()], server.0.key());
        accepted(own.server(), &tls, NAME).await;
    }
}

#[tokio::test]
async fn a_servers_certificate_can_be_trusted_without_its_issuer() {
    let unknown = Ca::new("Unknown");
    let identity = unknown.issue(&[NAME]);
    let tls = Settings::trusting_pem(&pem(&identity.chain[0])).load();
    accepted(identity.server(), &tls, NAME).await;
    let other = unknown.issue(&[NAME]);
    assert_eq!(refusal(other.server(), &tls, NAME).await.reason, Reason::UnknownIssuer);
}

#[tokio::test]
async fn what_can_verify_nothing_is_refused_unless_others_are_in_its_file() {
    let changes: [(Change, &str); 4] = [
        (|params| params.is_ca = IsCa::ExplicitNoCa, "it is neither a CA"),
        (
            |params| {
                params.is_ca = IsCa::NoCa;
                params.key_usages = Vec::new();
            },
            "it is neither a CA",
        ),
        (|params| params.key_usages = vec![KeyUsagePurpose::CrlSign], "lacks keyCertSign"),
        (
            |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth],
            "serverAuth",
        ),
    ];
    for (change, expected) in changes {
        let (useless, root) = (ca("Useless", change), Ca::new("Root"));
        let error = Settings::trusting(&useless).error();
        assert!(error.contains("`tls.ca.files`") && error.contains(expected), "{error}");
        let tls = Settings::trusting_pem(&(useless.pem() + &root.pem())).load();
        accepted(root.issue(&[NAME]).server(), &tls, NAME).await;
    }
}

#[tokio::test]
async fn a_revoked_certificate_that_is_itself_trusted_is_refused() {
    // A self-signed one, and one with an unknown issuer.
    let mut params = leaf_params(&[NAME]);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.serial_number = Some(SerialNumber::from(666));
    let own = Ca(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap());
    let by_itself = Identity::new(vec![own.der()], own.0.key());
    let issuer = Ca::new("Issuer");
    let issued = with_serial(&issuer, 666);
    for (identity, issuer) in [(by_itself, &own), (issued, &issuer)] {
        let mut settings = Settings::trusting_pem(&pem(&identity.chain[0]));
        settings.tls.crls = vec![settings.file("list.pem", list(issuer, &[666]))];
        let failure = refusal(identity.server(), &settings.load(), NAME).await;
        assert_eq!(failure.reason, Reason::Revoked);
    }
}

#[test]
fn equal_lists_are_kept_once_however_often_they_are_loaded() {
    let root = Ca::new("Root");
    let settings = Settings::trusting(&root);
    let file = settings.file("list.pem", list(&root, &[666]));
    let load = || {
        let mut lists = Lists::default();
        lists.add_file(&file).unwrap();
        lists
    };
    let first = load();
    assert!(first.shares_with(&load()));
    settings.file("list.pem", list(&root, &[667]));
    assert!(!first.shares_with(&load()));
}

#[tokio::test]
async fn a_fault_of_a_ca_in_the_chain_is_not_told_of_the_servers_certificate() {
    let past: Change = |params| params.not_after = date_time_ymd(2021, 2, 3);
    let future: Change = |params| params.not_before = date_time_ymd(2990, 2, 3);
    let clients: Change =
        |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let revoked: Change = |params| params.serial_number = Some(SerialNumber::from(666));
    let root = Ca::new("Root");
    let mut settings = Settings::trusting(&root);
    settings.tls.crls = vec![settings.file("list.pem", list(&root, &[666]))];
    let tls = settings.load();
    for (change, expected) in [
        (past, "expired at 2021-02-03"),
        (future, "is not valid before 2990-02-03"),
        (clients, "may not issue certificates for servers"),
        (revoked, "is revoked by a list in `tls.crls`"),
    ] {
        let mut params = Ca::params("Intermediate");
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let intermediate = Ca(CertifiedIssuer::signed_by(params, key, &root.0).unwrap());
        let mut identity = intermediate.issue(&[NAME]);
        identity.chain.push(intermediate.der());
        let failure = refusal(identity.server(), &tls, NAME).await;
        let text = failure.to_string();
        assert!(text.contains("was refused: the CA certificate `CN=Intermediate`"), "{text}");
        assert!(text.contains(expected), "{text}");
        assert!(failure.hint().contains("the chain that the server sends"), "{}", failure.hint());
    }
}

#[tokio::test]
async fn every_list_of_an_issuer_is_looked_into() {
    let root = Ca::new("Root");
    let mut settings = Settings::trusting(&root);
    settings.tls.crls = vec![
        settings.file("old.pem", list(&root, &[])),
        settings.file("new.pem", list(&root, &[666])),
    ];
    let tls = settings.load();
    assert_eq!(refusal(with_serial(&root, 666).server(), &tls, NAME).await.reason, Reason::Revoked);
    accepted(with_serial(&root, 667).server(), &tls, NAME).await;
}

#[tokio::test]
async fn a_list_counts_for_the_key_that_signed_it_and_no_other_of_that_name() {
    let (old, new) = (Ca::new("Root"), Ca::new("Root"));
    for has_key_id in [true, false] {
        let with_serial = |ca: &Ca, serial: u64| {
            ca.issue_with(&[NAME], |params| {
                params.serial_number = Some(SerialNumber::from(serial));
                params.use_authority_key_identifier_extension = has_key_id;
            })
        };
        for order in [["old.pem", "new.pem"], ["new.pem", "old.pem"]] {
            let mut settings = Settings::trusting(&old);
            let new_root = settings.file("new-root.pem", new.pem());
            settings.tls.ca.files.push(new_root);
            settings.file("old.pem", list(&old, &[666]));
            settings.file("new.pem", list(&new, &[777]));
            settings.tls.crls = order.map(|name| settings.directory.path().join(name)).to_vec();
            let tls = settings.load();
            for (ca, revoked, good) in [(&old, 666, 777), (&new, 777, 666)] {
                let failure = refusal(with_serial(ca, revoked).server(), &tls, NAME).await;
                assert_eq!(failure.reason, Reason::Revoked, "{failure}");
                accepted(with_serial(ca, good).server(), &tls, NAME).await;
            }
        }
    }
}

#[tokio::test]
async fn a_list_that_another_key_of_the_same_name_signed_makes_nobody_suspect() {
    let (root, other) = (Ca::new("Root"), Ca::new("Root"));
    let mut settings = Settings::trusting(&root);
    settings.tls.crls = vec![settings.file("list.pem", list(&other, &[666]))];
    let change = |params: &mut CertificateParams| {
        params.serial_number = Some(SerialNumber::from(666));
        params.use_authority_key_identifier_extension = true;
    };
    accepted(root.issue_with(&[NAME], change).server(), &settings.load(), NAME).await;
}

/// Regression: it was ignored. A key with several certificates may have several identifiers: hashes by different
/// methods, or any value that the CA chooses.
#[tokio::test]
async fn a_list_that_calls_its_key_by_another_identifier_counts_all_the_same() {
    let root = Ca::new("Root");
    let mut settings = Settings::trusting(&root);
    let other_id = KeyIdMethod::PreSpecified(vec![7; 20]);
    settings.tls.crls = vec![settings.file("list.pem", list_with(&root, &[666], other_id))];
    let tls = settings.load();
    for (serial, is_revoked) in [(666, true), (667, false)] {
        let change = |params: &mut CertificateParams| {
            params.serial_number = Some(SerialNumber::from(serial));
            params.use_authority_key_identifier_extension = true;
        };
        let server = root.issue_with(&[NAME], change).server();
        match is_revoked {
            true => assert_eq!(refusal(server, &tls, NAME).await.reason, Reason::Revoked),
            false => accepted(server, &tls, NAME).await,
        }
    }
}

/// Regression: the serial numbers of one key were looked up in the list of another.
#[tokio::test]
async fn a_list_of_another_key_of_its_name_revokes_nothing_that_signs_itself() {
    let numbered: Change = |params| params.serial_number = Some(SerialNumber::from(666));
    let (root, other) = (ca("Root", numbered), Ca::new("Root"));
    let with_key_id: Change = |params| params.use_authority_key_identifier_extension = true;
    for (issuer, is_revoked) in [(&other, false), (&root, true)] {
        let mut settings = Settings::trusting(&root);
        settings.tls.crls = vec![settings.file("list.pem", list(issuer, &[666]))];
        let tls = settings.load();
        // As an issuer, and as a server's certificate.
        let itself = Identity::new(vec![root.der()], root.0.key());
        let issued = root.issue_with(&[NAME], with_key_id).server();
        match is_revoked {
            true => assert!(refusal(issued, &tls, NAME).await.to_string().contains("is revoked")),
            false => accepted(issued, &tls, NAME).await,
        }
        let reason = refusal(itself.server(), &tls, NAME).await.reason;
        assert_eq!(reason == Reason::Revoked, is_revoked, "{reason:?}");
    }
}

#[tokio::test]
async fn a_list_whose_signature_does_not_match_lets_nobody_pass() {
    let root = Ca::new("Root");
    let mut settings = Settings::trusting(&root);
    let (_, list) = x509_parser::pem::parse_x509_pem(list(&root, &[666]).as_bytes()).unwrap();
    let mut list = list.contents;
    // Within the signature, which is at the end.
    let end = list.len() - 1;
    list[end] ^= 1;
    settings.tls.crls = vec![settings.file("list.der", list)];
    for has_key_id in [true, false] {
        let change = |params: &mut CertificateParams| {
            params.use_authority_key_identifier_extension = has_key_id
        };
        let server = root.issue_with(&[NAME], change).server();
        let failure = refusal(server, &settings.load(), NAME).await;
        assert!(failure.to_string().contains("is not signed by it"), "{failure}");
    }
}

#[tokio::test]
async fn a_revoked_issuer_is_not_accepted_although_it_is_trusted_itself() {
    let root = Ca::new("Root");
    let mut params = Ca::params("Intermediate");
    params.serial_number = Some(SerialNumber::from(666));
    let key = KeyPair::generate().unwrap();
    let intermediate = Ca(CertifiedIssuer::signed_by(params, key, &root.0).unwrap());
    let mut settings = Settings::trusting(&intermediate);
    accepted(intermediate.issue(&[NAME]).server(), &settings.load(), NAME).await;
    settings.tls.crls = vec![settings.file("list.pem", list(&root, &[666]))];
    let failure = refusal(intermediate.issue(&[NAME]).server(), &settings.load(), NAME).await;
    assert!(failure.to_string().contains("is revoked"), "{failure}");
}

#[tokio::test]
async fn six_cas_between_are_followed_and_a_seventh_is_explained() {
    let root = Ca::new("Root");
    let tls = Settings::trusting(&root).load();
    let mut chain = vec![root];
    for count in 1..=7 {
        let next = chain[0].intermediate(&format!("CA {count}"));
        chain.insert(0, next);
        let mut identity = chain[0].issue(&[NAME]);
        identity.chain.extend(chain[..count].iter().map(Ca::der));
        if count <= 6 {
            accepted(identity.server(), &tls, NAME).await;
        } else {
            let failure = refusal(identity.server(), &tls, NAME).await;
            assert!(failure.to_string().contains("more than six CAs"), "{failure}");
        }
    }
}

#[tokio::test]
async fn a_chain_is_found_in_any_order_and_past_what_has_expired() {
    let (root, other) = (Ca::new("Root"), Ca::new("Other Root"));
    let intermediate = root.intermediate("Intermediate");
    let crossed = cross_signed(&other, &intermediate, "Intermediate", |_| {});
    let expired: Change = |params| params.not_after = date_time_ymd(2021, 2, 3);
    let stale = cross_signed(&root, &intermediate, "Intermediate", expired);
    let cycle = cross_signed(&intermediate, &root, "Root", |_| {});
    for trusted in [&root, &other] {
        let tls = Settings::trusting(trusted).load();
        let sent = [&stale, &crossed, &intermediate.der(), &cycle, &root.der()].map(Clone::clone);
        for turn in 0..sent.len() {
            let mut identity = intermediate.issue(&[NAME]);
            let mut rest = sent.to_vec();
            rest.rotate_left(turn);
            identity.chain.extend(rest);
            accepted(identity.server(), &tls, NAME).await;
        }
    }
}

#[tokio::test]
async fn an_expired_root_does_not_hide_another_that_issued_the_certificate_too() {
    let old = ca("Old Root", |params| params.not_after = date_time_ymd(2021, 2, 3));
    let new = Ca::new("New Root");
    let intermediate = new.intermediate("Intermediate");
    let by_old = cross_signed(&old, &intermediate, "Intermediate", |_| {});
    let tls = Settings::trusting_pem(&(old.pem() + &new.pem())).load();
    let mut identity = intermediate.issue(&[NAME]);
    identity.chain.extend([by_old.clone(), intermediate.der()]);
    accepted(identity.server(), &tls, NAME).await;
    let mut identity = intermediate.issue(&[NAME]);
    identity.chain.push(by_old);
    assert!(matches!(refusal(identity.server(), &tls, NAME).await.reason, Reason::Issuer(_)));
}

#[tokio::test]
async fn a_pin_is_looked_for_on_every_chain_there_is() {
    let (one, two) = (Ca::new("One"), Ca::new("Two"));
    let intermediate = one.intermediate("Intermediate");
    let by_two = cross_signed(&two, &intermediate, "Intermediate", |_| {});
    for pinned in [&one, &two] {
        let mut settings = Settings::trusting_pem(&(one.pem() + &two.pem()));
        settings.tls.pins = vec![pin(&pinned.der())];
        let mut identity = intermediate.issue(&[NAME]);
        identity.chain.extend([intermediate.der(), by_two.clone()]);
        accepted(identity.server(), &settings.load(), NAME).await;
    }
}

#[tokio::test]
async fn a_pin_holds_for_a_certificate_that_is_itself_trusted() {
    let issuer = Ca::new("Issuer");
    for (right, reason) in [(true, None), (false, Some(Reason::PinMismatch))] {
        let identity = issuer.issue(&[NAME]);
        let mut settings = Settings::trusting_pem(&pem(&identity.chain[0]));
        let pinned = if right { identity.chain[0].clone() } else { issuer.der() };
        settings.tls.pins = vec![pin(&pinned)];
        let met = meet(identity.server(), &settings.load(), Alpn::None, NAME).await.0;
        let met = met.err().map(|error| match error {
            TlsError::Certificate(failure) => failure.reason,
            other => panic!("{other}"),
        });
        assert_eq!(met, reason);
    }
}

#[tokio::test]
async fn a_pin_of_the_root_holds_though_the_certificate_is_trusted_itself_too() {
    let root = Ca::new("Root");
    let identity = root.issue(&[NAME]);
    let mut settings = Settings::trusting_pem(&(root.pem() + &pem(&identity.chain[0])));
    settings.tls.pins = vec![pin(&root.der())];
    accepted(identity.server(), &settings.load(), NAME).await;
}

#[tokio::test]
async fn a_root_bounds_the_length_of_chains_and_the_names() {
    let short = ca("Short", |params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
    let tls = Settings::trusting(&short).load();
    accepted(short.issue(&[NAME]).server(), &tls, NAME).await;
    let intermediate = short.intermediate("Intermediate");
    let mut identity = intermediate.issue(&[NAME]);
    identity.chain.push(intermediate.der());
    assert!(matches!(refusal(identity.server(), &tls, NAME).await.reason, Reason::Issuer(_)));

    let narrow = ca("Narrow", |params| {
        params.name_constraints = Some(NameConstraints {
            permitted_subtrees: vec![GeneralSubtree::DnsName("example.com".into())],
            excluded_subtrees: Vec::new(),
        });
    });
    let tls = Settings::trusting(&narrow).load();
    accepted(narrow.issue(&[NAME]).server(), &tls, NAME).await;
    let failure = refusal(narrow.issue(&["httpbin.org"]).server(), &tls, "httpbin.org").await;
    assert!(failure.to_string().contains("may not issue certificates for this name"), "{failure}");
}
