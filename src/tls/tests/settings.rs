//! What is loaded, what is shared, and what is refused with which message.

use super::trust::list;
use super::*;
use crate::tls::{
    anchor::{Terms, Use},
    source::Source,
};
use std::sync::Arc;

#[test]
fn files_add_to_the_built_in_roots() {
    let ca = Ca::new("Extra");
    let mut settings = Settings::trusting(&ca);
    settings.tls.ca.webpki = true;
    let roots = RootStores::default().load(&settings.tls.ca).unwrap();
    assert_eq!(roots.anchors.len(), webpki_roots::TLS_SERVER_ROOTS.len() + 1);
}

#[tokio::test]
async fn files_add_to_the_system_roots() {
    let ca = Ca::new("Extra");
    let mut settings = Settings::trusting(&ca);
    settings.tls.ca.system = true;
    settings.tls.ca.webpki = true;
    let roots = RootStores::default().load(&settings.tls.ca).unwrap();
    let mut expected = rustls::RootCertStore::empty();
    expected.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
    // Other certificates that a machine trusts, such as Debian's snakeoil, are not CAs.
    let issues = |root: &CertificateDer<'_>| matches!(Terms::read(root), Ok((Use::Issuer, _)));
    let system = rustls_native_certs::load_native_certs().certs;
    expected.add_parsable_certificates(system.into_iter().filter(issues));
    let known: Vec<_> = roots.anchors.iter().map(|root| &root.subject_public_key_info).collect();
    assert!(expected.roots.iter().all(|root| known.contains(&&root.subject_public_key_info)));
    accepted(ca.issue(&[NAME]).server(), &settings.load(), NAME).await;
}

#[tokio::test]
async fn a_byte_order_mark_hides_no_certificate_key_or_list() {
    let (first, second) = (Ca::new("First"), Ca::new("Second"));
    let mut settings = Settings::trusting_pem(&format!("\u{feff}{}{}", first.pem(), second.pem()));
    let key = KeyPair::generate().unwrap();
    let client = leaf_params(&["client"]).signed_by(&key, &second.0).unwrap();
    settings.tls.client_certificate = Some(config::ClientCertificate {
        cert: settings.file("client.pem", format!("\u{feff}{}", client.pem())),
        key: settings.file("client.key", format!("\u{feff}{}", key.serialize_pem())),
    });
    settings.tls.crls = vec![settings.file("list.pem", format!("\u{feff}{}", list(&first, &[])))];
    for ca in [&first, &second] {
        accepted(ca.issue(&[NAME]).server(), &settings.load(), NAME).await;
    }
}

/// Regression: if files had been joined without a newline between them, or with a byte order mark, only the first
/// counted: another CA was unknown, and certificates that another list revokes were accepted.
#[tokio::test]
async fn nothing_is_lost_where_files_were_joined_without_a_newline() {
    let (first, second) = (Ca::new("First"), Ca::new("Second"));
    for between in ["", "\u{feff}", "\n\u{feff}", " ", "\r\n\u{feff}"] {
        let join = |one: &str, other: &str| format!("{}{between}{other}", one.trim_end());
        let mut settings = Settings::trusting_pem(&join(&first.pem(), &second.pem()));
        for ca in [&first, &second] {
            accepted(ca.issue(&[NAME]).server(), &settings.load(), NAME).await;
        }
        let lists = join(&list(&first, &[666]), &list(&second, &[666]));
        settings.tls.crls = vec![settings.file("lists.pem", lists)];
        for ca in [&first, &second] {
            let revoked = |params: &mut CertificateParams| params.serial_number = Some(666.into());
            let server = ca.issue_with(&[NAME], revoked).server();
            let failure = refusal(server, &settings.load(), NAME).await;
            assert_eq!(failure.reason, Reason::Revoked, "{between:?}: {failure}");
        }
    }
}

/// Regression: the new certificate was ignored until it changed again.
#[test]
fn a_listeners_certificate_is_read_again_where_there_was_no_descriptor_for_it() {
    let settings = Settings::trusting_nobody();
    let pair = KeyPair::generate().unwrap();
    let certificate = |name| leaf_params(&[name]).self_signed(&pair).unwrap().pem();
    let key = settings.file("key.pem", pair.serialize_pem());
    let mut source = Source::files(&settings.file("cert.pem", certificate("old")), &key);
    assert!(!source.look(&[], false).unwrap());
    settings.file("cert.pem", certificate("new"));
    assert!(!source.look(&[], false).unwrap());
    assert!(source.look(&[], false).unwrap());
    let unread = Source::files(&settings.directory.path().join("nowhere"), &key).certificates();
    assert!(!source.take(&unread));
    assert!(source.look(&[], false).unwrap());
    let loaded = source.certificates();
    assert!(loaded.is_ok() && source.take(&loaded));
    assert!(!source.look(&[], false).unwrap());
}

#[test]
fn a_listeners_key_that_cannot_be_used_is_told_apart_from_one_of_another_certificate() {
    let settings = Settings::trusting_nobody();
    let certificate = settings.file("cert.pem", Ca::new("Listener").pem());
    let other = KeyPair::generate().unwrap().serialize_pem();
    for (key, said) in [
        (
            "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n",
            "openssl pkey",
        ),
        ("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "openssl pkey"),
        ("-----BEGIN PRIVATE KEY-----\nAAAA\n", "truncated"),
        (&other, "do not match"),
    ] {
        let key = settings.file("key.pem", key);
        let error = Source::files(&certificate, &key).certificates().unwrap_err().to_string();
        assert!(error.contains(said) && error.contains("key.pem"), "{error}");
    }
}

/// rustls-native-certs takes the variable for all of the system's roots, so it must not replace all of ours. It runs
/// in its own process, because the variable belongs to the process.
#[test]
fn ssl_cert_file_replaces_neither_files_nor_built_in_roots() {
    let settings = Settings::trusting(&Ca::new("Corporate CA"));
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "tls::tests::settings::files_add_to_the_system_roots"])
        .env("SSL_CERT_FILE", &settings.tls.ca.files[0])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

/// Regression: the built-in one was left out, and its servers were refused.
#[test]
fn a_root_that_has_expired_here_does_not_stand_for_the_built_in_one_with_its_key() {
    for (years, count) in [(-1, 2), (1, 1)] {
        // Until 2050, the year has two digits.
        let before_2050 =
            |root: &&CertificateDer<'_>| Terms::read(root).unwrap().1.not_after < 2_524_608_000;
        let built_in = webpki_root_certs::TLS_SERVER_ROOT_CERTS.iter().find(before_2050).unwrap();
        let mut settings = Settings::trusting_nobody();
        let root = crate::tls::authority::pem(&until(built_in, years));
        settings.tls.ca.files = vec![settings.file("root.pem", root)];
        settings.tls.ca.webpki = true;
        let roots = RootStores::default().load(&settings.tls.ca).unwrap();
        let first = &roots.anchors[0];
        let same = roots.anchors.iter().filter(|root| {
            (&root.subject, &root.subject_public_key_info)
                == (&first.subject, &first.subject_public_key_info)
        });
        assert_eq!(same.count(), count, "{years}");
    }
}

/// The same certificate with another expiry, this many years from now. Its signature is no longer valid.
fn until(certificate: &CertificateDer<'_>, years: i64) -> CertificateDer<'static> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).unwrap();
    let now = x509_parser::time::ASN1Time::now().to_datetime();
    let year = i64::from(now.year()) + years;
    let mut der = certificate.to_vec();
    let end = parsed.validity().not_after.to_datetime();
    let text = |year: i64| {
        let (month, day) = (u8::from(end.month()), end.day());
        let (hour, minute, second) = (end.hour(), end.minute(), end.second());
        format!("{:02}{month:02}{day:02}{hour:02}{minute:02}{second:02}Z", year % 100)
    };
    let (old, new) = (text(i64::from(end.year())), text(year));
    let at = der.windows(old.len()).position(|window| window == old.as_bytes()).unwrap();
    der[at..at + new.len()].copy_from_slice(new.as_bytes());
    der.into()
}

#[test]
fn a_root_that_the_system_has_too_is_kept_once() {
    let mut settings = Settings::trusting_nobody();
    settings.tls.ca.system = true;
    settings.tls.ca.webpki = true;
    let roots = RootStores::default().load(&settings.tls.ca).unwrap();
    let mut keys: Vec<_> = roots
        .anchors
        .iter()
        .map(|root| (root.subject.to_vec(), root.subject_public_key_info.to_vec()))
        .filter(|key| {
            webpki_roots::TLS_SERVER_ROOTS.iter().any(|root| {
                root.subject.as_ref() == key.0 && root.subject_public_key_info.as_ref() == key.1
            })
        })
        .collect();
    let all = keys.len();
    keys.sort();
    keys.dedup();
    assert_eq!(keys.len(), webpki_roots::TLS_SERVER_ROOTS.len());
    // Two certificates with one key can both be in the system's store, but this is rare.
    assert!(all - keys.len() < 5, "{all} roots for {} keys", keys.len());
}

#[test]
fn equal_files_are_kept_once_however_often_they_are_loaded() {
    let mut settings = Settings::trusting(&Ca::new("One"));
    let load = |settings: &Settings| RootStores::default().load(&settings.tls.ca).unwrap();
    let roots = load(&settings);
    assert!(Arc::ptr_eq(&roots, &load(&settings)));
    let copy = Settings::trusting_pem(&fs::read_to_string(&settings.tls.ca.files[0]).unwrap());
    assert!(Arc::ptr_eq(&roots, &load(&copy)));
    settings.tls.ca.webpki = true;
    let more = load(&settings);
    assert!(!Arc::ptr_eq(&roots, &more));
    settings.file("ca.pem", Ca::new("Two").pem());
    assert!(!Arc::ptr_eq(&more, &load(&settings)));
}

#[test]
fn equal_trust_is_parsed_once_and_other_trust_is_not_mixed_up() {
    let first = Settings::trusting(&Ca::new("One"));
    let second = Settings::trusting(&Ca::new("Two"));
    let mut stores = RootStores::default();
    let roots = stores.load(&first.tls.ca).unwrap();
    assert!(Arc::ptr_eq(&roots, &stores.load(&first.tls.ca).unwrap()));
    assert!(!Arc::ptr_eq(&roots, &stores.load(&second.tls.ca).unwrap()));
}

#[test]
fn each_load_is_a_generation() {
    let settings = Settings::trusting(&Ca::new("Root"));
    assert_ne!(settings.load().generation(), settings.load().generation());
}

#[test]
fn plaintext_is_no_tls_and_reads_nothing() {
    let mut settings = Settings::trusting_nobody();
    settings.tls.mode = TlsMode::Plaintext;
    settings.tls.ca.files = vec!["/nonexistent/ca.pem".into()];
    assert!(ClientTls::load(&settings.tls, &mut RootStores::default()).unwrap().is_none());
}

#[test]
fn nobody_to_trust_is_an_error() {
    assert!(Settings::trusting_nobody().error().contains("`tls.ca`"));
}

#[test]
fn files_that_cannot_be_used_are_named_with_their_keys() {
    let ca = Ca::new("Root");
    let pem = |settings: &Settings| settings.file("good.pem", ca.pem());
    let key = |settings: &Settings| {
        settings.file("good.key", KeyPair::generate().unwrap().serialize_pem())
    };
    type Break<'a> = &'a dyn Fn(&mut Settings);
    let cases: [(Break<'_>, &str, &str); 9] = [
        (&|s| s.tls.ca.files = vec![s.directory.path().join("bad")], "`tls.ca.files`", "bad"),
        (&|s| s.tls.ca.files = vec![s.file("bad", "text")], "`tls.ca.files`", "BEGIN CERTIFICATE"),
        (
            &|s| {
                s.tls.ca.files =
                    vec![s.file("bad", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----")]
            },
            "`tls.ca.files`",
            "valid PEM",
        ),
        (
            &|s| {
                s.tls.ca.files =
                    vec![s.file(
                        "bad",
                        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----",
                    )]
            },
            "`tls.ca.files`",
            "cannot be trusted",
        ),
        (
            &|s| s.tls.ca.files = vec![s.file("bad", ca.der())],
            "`tls.ca.files`",
            "openssl x509 -inform der",
        ),
        (&|s| s.tls.crls = vec![s.file("bad", "text")], "`tls.crls`", "revocation list"),
        (
            &|s| {
                s.tls.client_certificate =
                    Some(config::ClientCertificate { cert: pem(s), key: s.file("bad", "text") })
            },
            "`tls.client_certificate.key`",
            "openssl pkey",
        ),
        (
            &|s| {
                s.tls.client_certificate =
                    Some(config::ClientCertificate { cert: s.file("bad", "text"), key: key(s) })
            },
            "`tls.client_certificate.cert`",
            "BEGIN CERTIFICATE",
        ),
        (
            &|s| {
                s.tls.client_certificate = Some(config::ClientCertificate {
                    cert: pem(s),
                    key: s.directory.path().join("bad"),
                })
            },
            "`tls.client_certificate.key`",
            "cannot read",
        ),
    ];
    for (break_it, key, detail) in cases {
        let mut settings = Settings::trusting(&ca);
        break_it(&mut settings);
        let error = settings.error();
        let file = settings.directory.path().join("bad").display().to_string();
        for part in [key, detail, &file] {
            assert!(error.contains(part), "`{part}` is not in: {error}");
        }
    }
}

#[test]
fn a_key_of_another_certificate_is_detected() {
    let ca = Ca::new("Root");
    let mut settings = Settings::trusting(&ca);
    settings.tls.client_certificate = Some(config::ClientCertificate {
        cert: settings.file("client.pem", ca.pem()),
        key: settings.file("client.key", KeyPair::generate().unwrap().serialize_pem()),
    });
    let error = settings.error();
    for part in ["`tls.client_certificate`", "client.pem", "client.key", "does not match"] {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

#[test]
fn a_bad_pin_is_refused_in_either_mode() {
    for mode in [TlsMode::Verify, TlsMode::InsecureSkipVerify] {
        let mut settings = Settings::trusting(&Ca::new("Root"));
        settings.tls.mode = mode;
        settings.tls.pins = vec!["sha256/oops".to_owned()];
        assert!(settings.error().contains("`sha256/oops` is not a pin"));
    }
}

#[test]
fn a_name_that_no_certificate_can_bear_is_refused() {
    let error = server_name(&TrueName::for_test("not a name")).unwrap_err();
    assert!(error.to_string().contains("`not a name`"));
    assert!(error.hint().unwrap().contains("tls.server_name"));
    assert!(server_name(&TrueName::for_test("_dmarc.example.com")).is_ok());
}
