//! Which certificates are accepted for a name, and the errors of those that are not.

use super::*;
use crate::tls::leaf::Leaf;
use rcgen::{
    CertificateRevocationListParams, KeyIdMethod, RevokedCertParams, SerialNumber, date_time_ymd,
};
use rustls::{
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};

fn pin(certificate: &CertificateDer<'_>) -> String {
    Leaf::parse(certificate).unwrap().pin()
}

#[tokio::test]
async fn a_certificate_for_the_name_is_accepted() {
    let ca = Ca::new("Root");
    let tls = Settings::trusting(&ca).load();
    let end = date_time_ymd(2090, 5, 6);
    let server = ca.issue_with(&[NAME], |params| params.not_after = end).server();
    let handshake = meet(server, &tls, Alpn::None, NAME).await.0.unwrap();
    assert_eq!(handshake.not_after, Some(end.unix_timestamp()));
    assert_eq!(handshake.version, "TLSv1.3");
    assert!(!handshake.resumed);
}

#[tokio::test]
async fn wildcards_stand_for_exactly_one_label() {
    let ca = Ca::new("Root");
    let tls = Settings::trusting(&ca).load();
    let server = || ca.issue(&["*.example.com"]).server();
    accepted(server(), &tls, "api.example.com").await;
    for wrong in ["example.com", "a.api.example.com", "apiexample.com"] {
        assert_eq!(refusal(server(), &tls, wrong).await.reason, Reason::NotValidForName);
    }
}

#[tokio::test]
async fn another_name_is_refused_and_both_are_said() {
    let ca = Ca::new("Example Root");
    let tls = Settings::trusting(&ca).load();
    let end = date_time_ymd(2090, 5, 6);
    let names = ["example.com", "*.example.com", "192.0.2.7"];
    let server = ca.issue_with(&names, |params| params.not_after = end).server();
    let failure = refusal(server, &tls, "httpbin.org").await;
    assert_eq!(failure.reason, Reason::NotValidForName);
    assert_eq!(
        failure.to_string(),
        "certificate is not valid for `httpbin.org`: it is valid for `example.com`, `*.example.com`, `192.0.2.7`; issued by CN=Example Root; valid until 2090-05-06T00:00:00Z"
    );
    assert!(failure.hint().contains("`tls.server_name: example.com`"), "{}", failure.hint());
}

#[tokio::test]
async fn a_common_name_does_not_count() {
    let ca = Ca::new("Root");
    let tls = Settings::trusting(&ca).load();
    let server = ca
        .issue_with(&[], |params| params.distinguished_name.push(DnType::CommonName, NAME))
        .server();
    let failure = refusal(server, &tls, NAME).await;
    assert_eq!(failure.reason, Reason::NotValidForName);
    assert_eq!(failure.common_name.as_deref(), Some(NAME));
    let text = failure.to_string();
    assert!(text.contains("only the common name `api.example.com`, which is not used"), "{text}");
    assert!(failure.hint().contains("subject alternative name"), "{}", failure.hint());
}

#[tokio::test]
async fn an_expired_one_is_refused_with_its_last_day() {
    let ca = Ca::new("Root");
    let tls = Settings::trusting(&ca).load();
    let end = date_time_ymd(2021, 2, 3);
    let server = ca.issue_with(&[NAME], |params| params.not_after = end).server();
    let failure = refusal(server, &tls, NAME).await;
    assert_eq!(failure.reason, Reason::Expired);
    assert_eq!(failure.not_after, Some(end.unix_timestamp()));
    assert!(failure.to_string().contains("until 2021-02-03T00:00:00Z"), "{failure}");
    assert!(failure.hint().contains("date -u"), "{}", failure.hint());
}

#[tokio::test]
async fn one_that_is_not_valid_yet_is_refused_with_its_first_day() {
    let ca = Ca::new("Root");
    let tls = Settings::trusting(&ca).load();
    let start = date_time_ymd(2990, 2, 3);
    let server = ca.issue_with(&[NAME], |params| params.not_before = start).server();
    let failure = refusal(server, &tls, NAME).await;
    assert_eq!(failure.reason, Reason::NotYetValid);
    assert!(failure.to_string().contains("from 2990-02-03T00:00:00Z"), "{failure}");
}

#[tokio::test]
async fn an_unknown_issuer_is_named_with_the_key_that_mends_it() {
    let tls = Settings::trusting(&Ca::new("Root")).load();
    let server = Ca::new("Corporate CA").issue(&[NAME]).server();
    let failure = refusal(server, &tls, NAME).await;
    assert_eq!(failure.reason, Reason::UnknownIssuer);
    assert!(failure.to_string().contains("issued by CN=Corporate CA"), "{failure}");
    assert!(failure.hint().contains("tls.ca.files"), "{}", failure.hint());
}

#[tokio::test]
async fn an_issuer_of_the_same_name_with_another_key_is_refused() {
    let tls = Settings::trusting(&Ca::new("Root")).load();
    let failure = refusal(Ca::new("Root").issue(&[NAME]).server(), &tls, NAME).await;
    assert!(matches!(failure.reason, Reason::UnknownIssuer | Reason::BadSignature), "{failure}");
}

#[tokio::test]
async fn a_chain_may_pass_intermediates_but_the_server_must_send_them() {
    let root = Ca::new("Root");
    let tls = Settings::trusting(&root).load();
    let intermediate = root.intermediate("Intermediate");
    let mut whole = intermediate.issue(&[NAME]);
    whole.chain.push(intermediate.der());
    accepted(whole.server(), &tls, NAME).await;

    let failure = refusal(intermediate.issue(&[NAME]).server(), &tls, NAME).await;
    assert_eq!(failure.reason, Reason::UnknownIssuer);
    assert!(failure.hint().contains("intermediate"), "{}", failure.hint());
}

#[tokio::test]
async fn one_for_clients_only_is_refused() {
    let ca = Ca::new("Root");
    let tls = Settings::trusting(&ca).load();
    let usage = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let server = ca.issue_with(&[NAME], |params| params.extended_key_usages = usage).server();
    let failure = refusal(server, &tls, NAME).await;
    assert_eq!(failure.reason, Reason::WrongUsage);
    assert!(failure.hint().contains("serverAuth"), "{}", failure.hint());
}

#[tokio::test]
async fn a_self_signed_one_is_refused_until_it_is_trusted_by_itself() {
    let with_ca_flag = || {
        let mut params = leaf_params(&[NAME]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
    };
    for params in [leaf_params(&[NAME]), with_ca_flag()] {
        let stranger = Settings::trusting(&Ca::new("Root")).load();
        let (identity, _) = Identity::self_signed(params.clone());
        let failure = refusal(identity.server(), &stranger, NAME).await;
        assert_eq!(failure.reason, Reason::SelfSigned);
        assert!(failure.hint().contains("tls.ca.files"), "{}", failure.hint());

        let (identity, pem) = Identity::self_signed(params);
        accepted(identity.server(), &Settings::trusting_pem(&pem).load(), NAME).await;
    }
}

#[tokio::test]
async fn a_self_signed_one_that_is_trusted_must_still_be_right() {
    type Change = fn(&mut CertificateParams);
    let cases: [(Change, &str, Reason); 3] = [
        (|_| {}, "other.example.com", Reason::NotValidForName),
        (|params| params.not_after = date_time_ymd(2021, 1, 1), NAME, Reason::Expired),
        (|params| params.not_before = date_time_ymd(2990, 1, 1), NAME, Reason::NotYetValid),
    ];
    for (change, as_name, reason) in cases {
        let mut params = leaf_params(&[NAME]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        change(&mut params);
        let (identity, pem) = Identity::self_signed(params);
        let tls = Settings::trusting_pem(&pem).load();
        assert_eq!(refusal(identity.server(), &tls, as_name).await.reason, reason);
    }
}

#[tokio::test]
async fn an_address_is_proved_by_an_address_and_no_name_is_sent() {
    let ca = Ca::new("Root");
    let tls = Settings::trusting(&ca).load();
    for address in ["192.0.2.7", "2001:db8::7"] {
        let (client, server) = meet(ca.issue(&[address]).server(), &tls, Alpn::None, address).await;
        assert!(client.is_ok());
        assert_eq!(server.unwrap().get_ref().1.server_name(), None);

        let failure = refusal(ca.issue(&["192.0.2.8", NAME]).server(), &tls, address).await;
        assert_eq!(failure.reason, Reason::NotValidForName);
        assert_eq!(failure.presented, ["192.0.2.8", NAME]);
    }
}

#[tokio::test]
async fn a_pin_may_be_of_any_key_in_the_chain() {
    let root = Ca::new("Root");
    let intermediate = root.intermediate("Intermediate");
    let identity = || {
        let mut identity = intermediate.issue(&[NAME]);
        identity.chain.push(intermediate.der());
        identity
    };
    for pinned in [root.der(), intermediate.der()] {
        let mut settings = Settings::trusting(&root);
        settings.tls.pins = vec![pin(&Ca::new("Backup").der()), pin(&pinned)];
        accepted(identity().server(), &settings.load(), NAME).await;
    }
    let leaf = identity();
    let mut settings = Settings::trusting(&root);
    settings.tls.pins = vec![pin(&leaf.chain[0])];
    accepted(leaf.server(), &settings.load(), NAME).await;
}

#[tokio::test]
async fn a_chain_without_a_pinned_key_is_refused_and_the_pin_to_add_is_said() {
    let ca = Ca::new("Root");
    let mut settings = Settings::trusting(&ca);
    settings.tls.pins = vec![pin(&Ca::new("Other").der())];
    let identity = ca.issue(&[NAME]);
    let expected = pin(&identity.chain[0]);
    let failure = refusal(identity.server(), &settings.load(), NAME).await;
    assert_eq!(failure.reason, Reason::PinMismatch);
    assert!(failure.hint().contains(&expected), "{}", failure.hint());
}

#[tokio::test]
async fn a_pinned_certificate_that_is_only_sent_along_does_not_help() {
    let honest = Ca::new("Honest");
    let careless = Ca::new("Careless");
    let mut settings = Settings::trusting(&honest);
    let file = settings.file("careless.pem", careless.pem());
    settings.tls.ca.files.push(file);
    settings.tls.pins = vec![pin(&honest.der())];

    let mut identity = careless.issue(&[NAME]);
    identity.chain.push(honest.der());
    let failure = refusal(identity.server(), &settings.load(), NAME).await;
    assert_eq!(failure.reason, Reason::PinMismatch);
}

#[tokio::test]
async fn a_revoked_one_is_refused_and_others_are_not() {
    let ca = Ca::new("Root");
    let elsewhere = Ca::new("Without a list");
    let list = CertificateRevocationListParams {
        this_update: date_time_ymd(2024, 1, 1),
        next_update: date_time_ymd(2090, 1, 1),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: vec![RevokedCertParams {
            serial_number: SerialNumber::from(666),
            revocation_time: date_time_ymd(2024, 1, 1),
            reason_code: None,
            invalidity_date: None,
        }],
        key_identifier_method: KeyIdMethod::Sha256,
    };
    let list = list.signed_by(&ca.0).unwrap();
    let with_serial = |serial: u64| {
        let serial = Some(SerialNumber::from(serial));
        ca.issue_with(&[NAME], |params| params.serial_number = serial).server()
    };
    for (file, content) in
        [("crl.pem", list.pem().unwrap().into_bytes()), ("crl.der", list.der().to_vec())]
    {
        let mut settings = Settings::trusting(&ca);
        let other = settings.file("other.pem", elsewhere.pem());
        settings.tls.ca.files.push(other);
        settings.tls.crls = vec![settings.file(file, content)];
        let tls = settings.load();
        assert_eq!(refusal(with_serial(666), &tls, NAME).await.reason, Reason::Revoked);
        accepted(with_serial(667), &tls, NAME).await;
        accepted(elsewhere.issue(&[NAME]).server(), &tls, NAME).await;
    }
}

#[tokio::test]
async fn without_verification_anything_goes_and_the_name_is_still_sent() {
    let mut settings = Settings::trusting_nobody();
    settings.tls.mode = TlsMode::InsecureSkipVerify;
    let tls = settings.load();
    let old = date_time_ymd(2021, 1, 1);
    let server =
        Ca::new("Any").issue_with(&["other.example.com"], |params| params.not_after = old).server();
    let (client, server) = meet(server, &tls, Alpn::None, NAME).await;
    assert_eq!(client.unwrap().not_after, Some(old.unix_timestamp()));
    assert_eq!(server.unwrap().get_ref().1.server_name(), Some(NAME));
}

#[tokio::test]
async fn without_verification_a_pin_still_holds() {
    let ca = Ca::new("Any");
    let identity = ca.issue(&["other.example.com"]);
    let mut settings = Settings::trusting_nobody();
    settings.tls.mode = TlsMode::InsecureSkipVerify;
    settings.tls.pins = vec![pin(&identity.chain[0])];
    let tls = settings.load();
    let stolen = identity.chain.clone();
    accepted(identity.server(), &tls, NAME).await;
    let failure = refusal(ca.issue(&["other.example.com"]).server(), &tls, NAME).await;
    assert_eq!(failure.reason, Reason::PinMismatch);
    // A server that sends the pinned certificate without having its key is refused.
    assert_eq!(refusal(impostor(stolen), &tls, NAME).await.reason, Reason::BadSignature);
}

#[tokio::test]
async fn a_certificate_without_its_key_is_refused() {
    let ca = Ca::new("Root");
    let tls = Settings::trusting(&ca).load();
    let failure = refusal(impostor(ca.issue(&[NAME]).chain), &tls, NAME).await;
    assert_eq!(failure.reason, Reason::BadSignature);
    assert_eq!(failure.expected, NAME);
}

#[tokio::test]
async fn what_a_stranger_wrote_into_a_certificate_is_bounded_and_printable() {
    let ca = Ca::new("Evil\r\nSet-Cookie: a=b\u{202e}\u{2066}");
    let tls = Settings::trusting(&Ca::new("Root")).load();
    let names: Vec<String> = (0..500).map(|n| format!("n{n}.example.com")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let failure = refusal(ca.issue(&names).server(), &tls, NAME).await;
    let text = failure.to_string();
    assert!(!text.contains(char::is_control), "{text:?}");
    assert!(!text.contains(['\u{202e}', '\u{2066}']), "{text:?}");
    assert!(text.len() < 1_000, "{text}");
    assert_eq!(failure.presented.len(), 100);
}

/// A server that sends a chain whose key it does not have.
fn impostor(chain: Vec<CertificateDer<'static>>) -> ServerConfig {
    let own = PrivatePkcs8KeyDer::from(KeyPair::generate().unwrap().serialize_der()).into();
    let key = aws_lc_rs::sign::any_supported_type(&own).unwrap();
    let mut server = Ca::new("Unused").issue(&[NAME]).server();
    server.cert_resolver = Arc::new(Always(Arc::new(CertifiedKey::new(chain, key))));
    server
}

#[derive(Debug)]
struct Always(Arc<CertifiedKey>);

impl ResolvesServerCert for Always {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}
