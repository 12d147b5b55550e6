use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    sync::Arc,
};

use proptest::prelude::*;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::{CertificateDer, pem::PemObject};
use x509_parser::parse_x509_certificate;

use super::{
    Authority, AuthorityError, DAY, Root, Subject, issue,
    names::{LOCALHOST, MOST, is_below, nested, sets},
    now, pem,
};

fn names<const N: usize>(names: [&str; N]) -> BTreeSet<String> {
    names.map(str::to_owned).into()
}

fn addresses() -> BTreeSet<Ipv4Addr> {
    BTreeSet::from([Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 1, 1)])
}

fn made(at: i64) -> Authority {
    Authority::make("shop", &names(["shop", "a.default", LOCALHOST]), &addresses(), at).unwrap()
}

#[test]
fn no_name_of_a_set_lies_below_another() {
    let app = names(["app", "app.app", "app.app.svc", "app.app.svc.cluster.local"]);
    let found = sets(&app);
    assert_eq!(found[0], names(["app", "app.app.svc", "app.app.svc.cluster.local", LOCALHOST]));
    assert_eq!(found[1..], [names(["app.app", LOCALHOST])]);
    let deep = names(["a", "b.a", "c.b.a", "x.a", "localhost", "x.localhost"]);
    let expected = [
        names(["a", LOCALHOST]),
        // `localhost` would permit names below it.
        names(["b.a", "x.a", "x.localhost"]),
        names(["c.b.a", LOCALHOST]),
    ];
    assert_eq!(sets(&deep), expected);
    assert_eq!(sets(&BTreeSet::new()), [names([LOCALHOST])]);
    let many: BTreeSet<String> = (0..250).map(|number| format!("host-{number}")).collect();
    assert_eq!(sets(&many).iter().map(BTreeSet::len).collect::<Vec<_>>(), [100, 100, 53]);
}

proptest! {
    #[test]
    fn sets_hold_every_name_once_and_none_below_another(
        names in prop::collection::btree_set("([ab]\\.){0,4}[ab]|([ab]\\.){0,2}localhost", 0..40),
    ) {
        let sets = sets(&names);
        for set in &sets {
            prop_assert!(set.len() <= MOST && !set.is_empty());
            let below = |one: &String| set.iter().any(|other| is_below(one, other));
            prop_assert!(!set.iter().any(below), "{set:?}");
            prop_assert_eq!(nested(set), None);
        }
        for name in names.iter().filter(|name| *name != LOCALHOST) {
            prop_assert_eq!(sets.iter().filter(|set| set.contains(name)).count(), 1);
        }
        let below = names.iter().any(|one| names.iter().any(|other| is_below(one, other)));
        prop_assert_eq!(nested(&names).is_some(), below);
    }

    #[test]
    fn any_root_passes_its_own_checks(
        names in prop::collection::btree_set("[a-z_][a-z0-9_]{0,9}(\\.[a-z]{1,9}){0,3}", 0..12),
    ) {
        for set in sets(&names) {
            let authority = Authority::make("alias", &set, &addresses(), now()).unwrap();
            prop_assert_eq!(authority.root().names(), &set);
        }
    }

    #[test]
    fn any_bytes_are_no_root_and_no_certificates(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        prop_assert!(Root::from_pem(&bytes).is_err());
        prop_assert!(Root::parse(CertificateDer::from(bytes.clone())).is_err());
        prop_assert!(Authority::from_pem(&bytes, made(now()).root()).is_err());
    }
}

#[test]
fn the_longest_names_and_the_most_of_them_are_taken() {
    let long =
        format!("{}.{}.{}.{}", "a".repeat(63), "b".repeat(63), "c".repeat(63), "d".repeat(57));
    let many: BTreeSet<String> =
        (100..200).map(|number| format!("{number}{}", &long[3..])).collect();
    for set in sets(&many) {
        let authority = Authority::make(&long, &set, &addresses(), now()).unwrap();
        let again = Authority::from_pem(authority.to_pem().as_bytes(), authority.root()).unwrap();
        assert_eq!(again.root().names(), &set);
        assert!(authority.to_pem().len() < 512 * 1024, "{}", authority.to_pem().len());
        assert!(pem(authority.root().der()).len() < 128 * 1024);
    }
}

#[test]
fn it_is_what_it_was_when_it_is_read_again() {
    let authority = made(now());
    let root = Arc::new(Root::from_pem(pem(authority.root().der()).as_bytes()).unwrap());
    assert_eq!(&root, authority.root());
    let again = Authority::from_pem(authority.to_pem().as_bytes(), &root).unwrap();
    assert_eq!(again.to_pem(), authority.to_pem());
    assert!(again.addresses().eq(&addresses()));
    let both = [&again, &authority].map(|one| one.certified(now()));
    assert_eq!(both[0].named.cert, both[1].named.cert);
    assert_eq!(both[0].unnamed.cert, both[1].unnamed.cert);
}

#[test]
fn parts_of_two_authorities_are_none() {
    let (one, other) = (made(now()), made(now()));
    let (one_pem, other_pem) = (one.to_pem(), other.to_pem());
    let key_end = "-----END PRIVATE KEY-----\n";
    let (one_key, _) = one_pem.split_once(key_end).unwrap();
    let (_, other_certificates) = other_pem.split_once(key_end).unwrap();
    let usable = |text: &str| Authority::from_pem(text.as_bytes(), other.root()).is_ok();
    assert!(usable(&other_pem));
    let mixed = format!("{one_key}{key_end}{other_certificates}");
    let half = &other_pem[..other_pem.len() / 3];
    for text in ["", &one_pem, &mixed, one_key, other_certificates, half] {
        assert!(!usable(text), "{text}");
    }
}

#[test]
fn one_of_its_certificates_is_valid_at_any_time_of_its_root() {
    let authority = made(now());
    let (begin, end) = (authority.root().not_before(), authority.root().not_after());
    assert_eq!(begin, now() - 30 * DAY);
    let mut seen = Vec::new();
    let mut at = begin;
    while at < end {
        assert!(authority.is_valid(at), "{at}");
        let shown = authority.certified(at);
        for key in [shown.named, shown.unnamed] {
            let (_, x509) = parse_x509_certificate(&key.cert[0]).unwrap();
            let validity = x509.validity();
            assert!(validity.not_before.timestamp() <= at && at < validity.not_after.timestamp());
            // Clients' clocks may be wrong by a month either way, except near the ends of the root's validity.
            let early = validity.not_before.timestamp() <= at - 30 * DAY;
            assert!(early || at < begin + 30 * DAY, "{at}");
            let days = (validity.not_after.timestamp() - validity.not_before.timestamp()) / DAY;
            assert!(days <= 825, "{days}");
            if !seen.contains(&key.cert) {
                seen.push(key.cert.clone());
            }
        }
        let next = authority.changes(at);
        assert!(next.is_none_or(|next| next > at));
        at += 10 * DAY;
    }
    assert_eq!(seen.len(), 6, "each has its turn");
    assert!(!authority.is_valid(end) && !authority.is_valid(begin - 1));
    // If the clock is set back, the earlier one is used; after the last expiry, the last one.
    assert!(!authority.certified(end + DAY).named.cert.is_empty());
}

#[test]
fn names_are_for_who_gives_one_and_addresses_for_who_does_not() {
    let authority = made(now());
    let shown = authority.certified(now());
    for (key, name, valid) in [
        (&shown.named, "shop", true),
        (&shown.named, LOCALHOST, true),
        (&shown.named, "127.0.0.1", false),
        (&shown.named, "www.shop", false),
        (&shown.unnamed, "shop", true),
        (&shown.unnamed, "127.0.0.1", true),
        (&shown.unnamed, "127.0.1.1", true),
        (&shown.unnamed, "127.0.0.2", false),
    ] {
        assert_eq!(crate::tls::server::is_valid_for(key, name), valid, "{name}");
    }
}

#[test]
fn serial_numbers_differ() {
    // NSS refuses two certificates of one issuer with the same serial number.
    let text = made(now()).to_pem();
    let serials: BTreeSet<Vec<u8>> = CertificateDer::pem_slice_iter(text.as_bytes())
        .map(|der| parse_x509_certificate(&der.unwrap()).unwrap().1.raw_serial().to_vec())
        .collect();
    assert_eq!(serials.len(), 6);
}

#[test]
fn what_x509_cannot_constrain_is_not_issued() {
    let nested = issue(&names(["example.com", "www.example.com"]), now()).unwrap_err();
    assert!(matches!(nested, AuthorityError::Nested { .. }));
    assert!(nested.to_string().starts_with("`www.example.com` is below `example.com`"), "{nested}");
    let many = (0..101).map(|number| format!("host-{number}")).collect();
    assert!(matches!(issue(&many, now()), Err(AuthorityError::TooMany { count: 101 })));
    let issued = issue(&names(["shop", "shop.default"]), now()).unwrap();
    assert_eq!(issued.root.names(), &names(["shop", "shop.default"]));
}

#[test]
fn a_certificate_of_another_kind_is_no_root() {
    let certificate = CertificateParams::new(["shop".to_owned()]).unwrap();
    let certificate = certificate.self_signed(&KeyPair::generate().unwrap()).unwrap();
    let error = Root::parse(certificate.der().clone()).unwrap_err();
    assert!(error.to_string().contains("path length 0"), "{error}");
    let leaf = made(now()).certified(now()).named.cert[0].clone();
    assert!(Root::parse(leaf.into_owned()).unwrap_err().to_string().contains("not self-signed"));
    let root = made(now()).root().der().clone();
    let mut longer = root.to_vec();
    longer.push(0);
    assert!(Root::parse(longer.into()).is_err());
    // Any bit that differs.
    for at in (0..root.len()).step_by(7) {
        let mut damaged = root.to_vec();
        damaged[at] ^= 1;
        assert!(Root::parse(damaged.into()).is_err(), "{at}");
    }
}

#[test]
fn a_subject_has_what_can_be_certified_and_the_loopback_addresses() {
    let listen: [IpAddr; 4] =
        ["127.0.1.1", "::1", "10.0.0.1", "::ffff:127.0.0.9"].map(|text| text.parse().unwrap());
    let names = ["10", "shop", "my_service", "*"].map(str::to_owned);
    let subject = Subject::new("10", names, listen);
    assert_eq!(subject.main.as_deref(), Some("shop"));
    assert_eq!(subject.names, self::names(["my_service", "shop"]));
    let expected = ["127.0.0.1", "127.0.0.9", "127.0.1.1"].map(|text| text.parse().unwrap());
    assert_eq!(subject.addresses, expected.into());
}
