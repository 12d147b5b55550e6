//! The local authority in its folder.

use super::*;
use crate::tls::{
    authority::{Authority, AuthorityError, is_certifiable},
    store::Store,
};
use std::collections::BTreeSet;

const DAY: Duration = Duration::from_secs(24 * 3600);

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn it_permits_its_names_and_nothing_beneath_or_beside_them() {
    let authority = Authority::generate(&names(&["shop", "a.default", "default"])).unwrap();
    for permitted in ["shop", "a.default", "default"] {
        assert!(authority.permits(permitted), "{permitted}");
    }
    for other in ["www.shop", "x.a.default", "workshop", "hop", "example.org", "127.0.0.1", ""] {
        assert!(!authority.permits(other), "{other}");
        let refusal = authority.issue(&names(&["shop", other]), DAY).unwrap_err();
        assert!(matches!(refusal, AuthorityError::NotPermitted { .. }), "{refusal}");
    }
    // No constraint can tell these two apart, as one of them is needed.
    assert!(authority.permits("b.default"));
}

#[test]
fn it_is_what_it_was_when_it_is_read_again() {
    for names in [names(&["shop", "a.default"]), names(&["my_service"]), names(&[])] {
        let authority = Authority::generate(&names).unwrap();
        let again = Authority::from_pem(authority.to_pem().as_bytes()).unwrap();
        assert_eq!(again.names(), authority.names());
        assert_eq!(again.fingerprint(), authority.fingerprint());
        assert_eq!((again.begins(), again.ends()), (authority.begins(), authority.ends()));
        assert_eq!(again.permits("x.shop"), authority.permits("x.shop"));
    }
    assert!(!Authority::generate(&names(&[])).unwrap().permits("example.org"));
}

#[test]
fn parts_of_two_authorities_are_none() {
    let (one, other) = (Ca::new("one"), Authority::generate(&names(&["shop"])).unwrap());
    let (key, certificates) = {
        let pem = other.to_pem();
        let (key, certificates) = pem.split_once("-----BEGIN CERTIFICATE").unwrap();
        (key.to_owned(), format!("-----BEGIN CERTIFICATE{certificates}"))
    };
    let stranger = KeyPair::generate().unwrap().serialize_pem();
    let own = format!("{}{}{}", one.0.key().serialize_pem(), one.pem(), one.pem());
    for text in ["", &key, &certificates, &format!("{stranger}{certificates}"), &own] {
        assert!(Authority::from_pem(text.as_bytes()).is_err(), "{text}");
    }
}

#[test]
fn a_root_near_its_end_is_replaced_and_keeps_its_names() {
    let folder = TempDir::new().unwrap();
    let store = Store::at(folder.path());
    let ending = Authority::lasting(&names(&["shop", "pay"]), 29 * DAY).unwrap();
    fs::write(store.key(), ending.to_pem()).unwrap();
    let opened = store.open(&names(&["shop"]), Some(&ending)).unwrap();
    assert_eq!(opened.renewed, Some("the one that was there ends soon"));
    assert!(opened.authority.covers(&names(&["shop", "pay"])));

    let lasting = Authority::lasting(&names(&["shop", "pay"]), 31 * DAY).unwrap();
    fs::write(store.key(), lasting.to_pem()).unwrap();
    let opened = store.open(&names(&["shop"]), None).unwrap();
    assert_eq!((opened.renewed, opened.authority.ends()), (None, lasting.ends()));
    // What applications read is brought in line with it.
    assert_eq!(fs::read_to_string(store.root()).unwrap(), lasting.root_pem());
}

#[test]
fn a_leaf_never_outlives_its_root() {
    let authority = Authority::lasting(&names(&["shop"]), DAY).unwrap();
    let leaf = authority.issue(&names(&["shop"]), 7 * DAY).unwrap();
    assert_eq!(leaf.not_after, authority.not_after());
}

#[test]
fn what_no_client_can_ask_for_is_not_certified() {
    for name in ["webscaler-manual", "my_service", "a.default.svc.cluster.local", "xn--bcher-kva"] {
        assert!(is_certifiable(name), "{name}");
    }
    for name in ["10", "127.0.0.1", "::1", "", "*", "a b"] {
        assert!(!is_certifiable(name), "{name}");
    }
}

#[tokio::test]
async fn its_leaves_are_accepted_by_our_own_verifier_underscores_included() {
    let authority = Authority::generate(&names(&["my_service", "shop.default"])).unwrap();
    let tls = Settings::trusting_pem(&authority.root_pem()).load();
    for name in ["my_service", "shop.default"] {
        let leaf = authority.issue(&names(&[name]), DAY).unwrap();
        let key = PrivatePkcs8KeyDer::from(leaf.key.serialize_der()).into();
        accepted(Identity { chain: leaf.chain, key }.server(), &tls, name).await;
    }
}
