use std::{collections::BTreeSet, fs, net::IpAddr, os::unix::fs::symlink, sync::Arc};

use super::{
    Serving, Stem, Store,
    choice::{Lack, changes, fits, lacks, preferred},
};
use crate::tls::{
    authority::{Authority, DAY, Root, Seconds, Subject, now},
    server::{Asked, ServerCertificates},
};

const LIFETIME: Seconds = 5 * 365 * DAY;

fn subject<const N: usize>(names: [&str; N]) -> Subject {
    Subject::new(names[0], names.map(str::to_owned), [])
}

fn authority(subject: &Subject, made: Seconds) -> Arc<Authority> {
    let [set] = <[BTreeSet<String>; 1]>::try_from(subject.sets()).unwrap();
    Arc::new(Authority::make(&subject.alias, &set, &subject.addresses, made).unwrap())
}

#[test]
fn the_oldest_is_preferred_that_has_a_month_left() {
    let shop = subject(["shop", "shop.default"]);
    let now = now();
    let [ending, old, new] =
        [20 * DAY, 200 * DAY, LIFETIME].map(|left| authority(&shop, now - LIFETIME + left));
    let future = authority(&shop, now + 40 * DAY);
    let ended = authority(&shop, now - LIFETIME - 1);
    let all = [&new, &ended, &ending, &future, &old].map(Arc::clone).to_vec();
    let order = preferred(all.clone(), &[], now);
    let ids = |all: &[Arc<Authority>]| {
        all.iter().map(|one| one.root().id().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ids(&order), ids(&[old.clone(), new.clone(), ending.clone()]));
    // Served authorities stay in use, because clients may know no others.
    let order = preferred(all.clone(), std::slice::from_ref(&new), now);
    assert_eq!(ids(&order), ids(&[new.clone(), old.clone(), ending.clone()]));
    let order = preferred(all, std::slice::from_ref(&ending), now);
    assert_eq!(ids(&order), ids(&[old.clone(), new, ending.clone()]));
    // The clock is set back by a year, or is years ahead.
    assert_eq!(
        ids(&preferred(vec![old.clone(), ending.clone()], &[], now - 2 * LIFETIME)).len(),
        0
    );
    let next = changes(std::slice::from_ref(&old), now).unwrap();
    assert!(next > now && next <= old.root().not_after());
}

#[test]
fn a_successor_is_made_a_year_before_the_end_and_another_when_a_name_or_address_is_new() {
    let shop = subject(["shop", "shop.default"]);
    let now = now();
    let lack = |subject: &Subject, left: &[Seconds]| {
        let has: Vec<_> = left.iter().map(|left| authority(&shop, now - LIFETIME + left)).collect();
        let has = preferred(has, &[], now);
        lacks(subject, &has, now)
    };
    let all = shop.sets().remove(0);
    let lacked = |required| vec![Lack { names: all.clone(), required }];
    assert_eq!(lack(&shop, &[]), lacked(true));
    assert_eq!(lack(&shop, &[364 * DAY]), lacked(false));
    assert_eq!(lack(&shop, &[366 * DAY]), []);
    assert_eq!(lack(&shop, &[10 * DAY, 400 * DAY]), []);
    let wider = subject(["shop", "shop.default", "pay.example"]);
    let wide = wider.sets().remove(0);
    assert_eq!(lack(&wider, &[LIFETIME]), [Lack { names: wide, required: true }]);
    // One of two sets: the one with the new name.
    let deeper = subject(["shop", "shop.default", "www.shop"]);
    let www = BTreeSet::from(["localhost".to_owned(), "www.shop".to_owned()]);
    assert_eq!(lack(&deeper, &[LIFETIME]), [Lack { names: www, required: true }]);
    let elsewhere: IpAddr = "127.0.1.1".parse().unwrap();
    let elsewhere = Subject::new("shop", ["shop", "shop.default"].map(str::to_owned), [elsewhere]);
    assert_eq!(lack(&elsewhere, &[LIFETIME]), lacked(false));
    // An alias without a name that a certificate can be valid for.
    let number = Subject::new("10", ["10".to_owned()], []);
    assert_eq!(lacks(&number, &[], now).len(), 1);
    assert_eq!(lacks(&number, &[authority(&number, now)], now), []);
}

#[test]
fn one_that_is_valid_for_a_name_that_was_taken_away_does_not_fit() {
    let (narrow, wide) = (subject(["shop"]), subject(["shop", "pay.example"]));
    let now = now();
    let root = |subject: &Subject| authority(subject, now).root().clone();
    let fit = |root: &Root, subject: &Subject| fits(root, subject);
    assert!(fit(&root(&narrow), &wide) && fit(&root(&wide), &wide) && fit(&root(&narrow), &narrow));
    assert!(!fit(&root(&wide), &narrow));
}

#[test]
fn aliases_that_did_not_change_share_what_they_had() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::at(&folder.path().join("ca"));
    let mut subjects: Vec<Subject> =
        (0..40).map(|number| subject([&*format!("alias-{number}")])).collect();
    let first = store.serve(&subjects, &Serving::default()).unwrap();
    assert!(first.is_current());
    let again = store.serve(&subjects, &first).unwrap();
    assert!(again.shows_what(&first));
    subjects[7] = subject(["alias-7", "pay.example"]);
    let changed = store.serve(&subjects, &again).unwrap();
    assert!(!changed.shows_what(&first));
    let (before, after) = (first.certificates(), changed.certificates());
    for (alias, shown) in &before {
        assert_eq!(Arc::ptr_eq(shown, &after[alias]), alias != "alias-7", "{alias}");
    }
    // Another process finds the same, except for what it does not serve.
    let other = Store::at(&folder.path().join("ca"));
    let found = other.serve(&subjects[..7], &Serving::default()).unwrap();
    for (alias, shown) in found.certificates() {
        assert!(*shown == *after[&alias], "{alias}");
    }
    assert_eq!(store.find().unwrap().len(), 41);
    assert_eq!(store.remove("alias-7").unwrap(), 2);
    assert_eq!(store.find().unwrap().len(), 39);
}

#[test]
fn a_folder_is_read_again_only_when_it_changed() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::at(folder.path());
    store.serve(&[subject(["shop"])], &Serving::default()).unwrap();
    // It was changed just now, and timestamps are coarse.
    assert!(!store.is_unchanged());
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(60);
    for path in [folder.path().to_owned(), store.roots_file(), store.bundle(), store.truststore()] {
        fs::File::open(path).unwrap().set_modified(long_ago).unwrap();
    }
    store.known.lock().stamp = Some(store.stamp());
    assert!(store.is_unchanged());
    fs::write(folder.path().join("anything"), "").unwrap();
    assert!(!store.is_unchanged());
}

#[test]
fn the_longest_alias_has_files() {
    let folder = tempfile::tempdir().unwrap();
    let long =
        format!("{}.{}.{}.{}", "a".repeat(63), "b".repeat(63), "c".repeat(63), "d".repeat(61));
    let store = Store::at(folder.path());
    let subjects = [subject([&long])];
    let serving = store.serve(&subjects, &Serving::default()).unwrap();
    let again = store.serve(&subjects, &Serving::default()).unwrap();
    assert!(*serving.certificates()[&long] == *again.certificates()[&long]);
    assert_eq!(store.find().unwrap().len(), 1);
    assert_eq!(store.remove(&long).unwrap(), 1);
}

/// Regression: `ca remove` removed the authorities of both.
#[test]
fn aliases_that_begin_with_the_same_characters_have_authorities_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let long = |end: &str| {
        let labels = ["a", "b", "c"].map(|letter| letter.repeat(63));
        format!("{}.{end}", labels.join("."))
    };
    let (one, other) = (long(&"d".repeat(61)), long(&"e".repeat(61)));
    let prefix = long(&"d".repeat(8));
    let store = Store::at(folder.path());
    let subjects = [&one, &other, &prefix].map(|alias| subject([alias]));
    let serving = store.serve(&subjects, &Serving::default()).unwrap();
    assert_eq!(store.find().unwrap().len(), 3);
    assert_eq!(store.remove(&one).unwrap(), 1);
    assert_eq!(store.remove(&one).unwrap(), 0);
    let again = store.serve(&subjects[1..], &Serving::default()).unwrap();
    for alias in [&other, &prefix] {
        assert!(*serving.certificates()[alias] == *again.certificates()[alias], "{alias}");
        assert_eq!(store.remove(alias).unwrap(), 1, "{alias}");
    }
}

/// Regression: when the clock was years ahead for a moment, all authorities seemed to have expired and were deleted.
#[test]
fn a_clock_that_leaps_ahead_and_back_loses_no_authority() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::at(folder.path());
    let serving = store.serve(&[subject(["shop"])], &Serving::default()).unwrap();
    store.serve(&[subject(["former"])], &serving).unwrap();
    let roots = || store.find().unwrap().len();
    let maintain = |serving: &Serving, now: Seconds| {
        let mut known = store.known.lock();
        let listing = store.list(&mut known).unwrap();
        known.maintained = 0;
        let maintenance = store.begin_maintenance(&listing, &mut known, now).unwrap();
        store.maintain(maintenance, &listing, serving, &mut known);
    };
    for leap in [40 * DAY, 2 * LIFETIME] {
        maintain(&Serving::default(), now() + leap);
        assert_eq!(roots(), 2, "{leap}");
    }
    maintain(&serving, now());
    assert_eq!(roots(), 2);
    // According to that clock, others have been in use.
    let served: Vec<_> = serving.held().map(|(stem, _)| store.root_file(&stem)).collect();
    let later = now() + 40 * DAY;
    let yesterday = std::time::UNIX_EPOCH + std::time::Duration::from_secs((later - DAY) as u64);
    for path in served {
        fs::File::options().write(true).open(path).unwrap().set_modified(yesterday).unwrap();
    }
    maintain(&serving, later);
    assert_eq!(roots(), 1);
}

#[test]
fn a_name_is_found_in_whichever_of_an_alias_authorities_has_it() {
    let app = subject(["app", "app.app", "app.app.svc"]);
    let serving = Serving::in_memory(&[app], &Serving::default()).unwrap();
    let certificates = ServerCertificates::local(serving.certificates());
    let address = "127.0.0.1".parse().unwrap();
    let valid = |name: Option<&str>, any: bool, of: &str| {
        let key = certificates.find(Asked { alias: Some("app"), any, name, address })?;
        Some(crate::tls::server::is_valid_for(key, of))
    };
    for name in ["app", "app.app", "app.app.svc", "APP.app", "localhost"] {
        assert_eq!(valid(Some(name), false, &name.to_lowercase()), Some(true), "{name}");
    }
    assert_eq!(valid(Some("cash.app"), false, "cash.app"), None);
    assert_eq!(valid(Some("cash.app"), true, "cash.app"), Some(false));
    for name in ["app", "127.0.0.1", "localhost"] {
        assert_eq!(valid(None, false, name), Some(true), "{name}");
    }
}

#[test]
fn a_stem_is_what_its_files_are_called() {
    let root = authority(&subject(["a.b"]), now()).root().clone();
    let stem = Stem::new("a.b", &root);
    assert_eq!(stem.root_file(), format!("a.b.{}.root.pem", root.id()));
    assert_eq!(root.id().len(), 16);
}

#[test]
fn what_failed_is_tried_again_though_the_folder_stays_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::at(folder.path());
    let first = store.serve(&[subject(["shop"])], &Serving::default()).unwrap();
    fs::remove_file(store.roots_file()).unwrap();
    fs::create_dir_all(store.roots_file().join("x")).unwrap();
    // What was served before stays in use, and new authorities are not served before they are trusted.
    assert!(store.serve(&[subject(["shop"])], &first).unwrap().shows_what(&first));
    assert!(store.known.lock().stamp.is_none());
    assert!(store.serve(&[subject(["shop"]), subject(["other"])], &first).is_err());
    assert!(store.known.lock().stamp.is_none() && !store.is_unchanged());
    fs::remove_dir_all(store.roots_file()).unwrap();
    let now = store.serve(&[subject(["shop"]), subject(["other"])], &first).unwrap();
    assert_eq!(now.certificates().len(), 2);
    assert!(store.known.lock().stamp.is_some());
}

/// Regression: another authority was created, and `ca.pem` lost a root.
#[test]
fn an_authority_that_cannot_be_read_just_now_stays_in_use_and_is_read_later() {
    let folder = tempfile::tempdir().unwrap();
    let [shop, other] = ["shop", "other"].map(|name| subject([name]));
    let store = Store::at(folder.path());
    let first = store.serve(std::slice::from_ref(&shop), &Serving::default()).unwrap();
    let [(stem, _)] = first.held().collect::<Vec<_>>().try_into().unwrap();
    let (trusted, away) = (fs::read(store.roots_file()).unwrap(), folder.path().join("away"));
    let both = [shop.clone(), other];
    for file in [store.key_file(&stem), store.root_file(&stem)] {
        fs::rename(&file, &away).unwrap();
        // It has no first byte: EIO.
        symlink("/proc/self/mem", &file).unwrap();
        for store in [Store::at(folder.path()), Store::at(folder.path()).best_effort()] {
            let error = store.serve(&both, &Serving::default()).unwrap_err();
            assert!(error.may_pass() && error.to_string().contains("cannot read"), "{error}");
        }
        assert_eq!(fs::read(store.roots_file()).unwrap(), trusted);
        // One that is served already is not read again.
        assert!(store.serve(&both[..1], &first).unwrap().shows_what(&first));
        fs::rename(&away, &file).unwrap();
    }
    let again = Store::at(folder.path()).serve(&both, &Serving::default()).unwrap();
    assert!(*again.certificates()["shop"] == *first.certificates()["shop"]);
}

#[test]
fn an_alias_with_two_authorities_is_served_with_the_one_that_can_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let shop = [subject(["shop"])];
    let [old, new] = [1, 0].map(|age| authority(&shop[0], now() - age * DAY));
    let store = Store::at(folder.path());
    for one in [&old, &new] {
        store.save_new(&Stem::new("shop", one.root()), one, true, true).unwrap();
    }
    let key = store.key_file(&Stem::new("shop", old.root()));
    let away = folder.path().join("away");
    fs::rename(&key, &away).unwrap();
    symlink("/proc/self/mem", &key).unwrap();
    let serving = store.serve(&shop, &Serving::default()).unwrap();
    let held = |serving: &Serving| serving.held().map(|(stem, _)| stem.id).collect::<BTreeSet<_>>();
    let id = |one: &Authority| one.root().id().to_owned();
    assert_eq!(held(&serving), [id(&new)].into());
    assert!(!store.is_unchanged());
    fs::rename(&away, &key).unwrap();
    let serving = store.serve(&shop, &serving).unwrap();
    assert_eq!(held(&serving), [id(&old), id(&new)].into());
    assert_eq!(store.find().unwrap().len(), 2);
}

#[test]
fn a_new_key_is_not_left_behind_where_its_root_cannot_be_written() {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::at(folder.path());
    let shop = subject(["shop"]);
    let authority = authority(&shop, now());
    let stem = Stem::new("shop", authority.root());
    // No file can replace a folder that is not empty.
    fs::create_dir_all(folder.path().join(stem.root_file()).join("x")).unwrap();
    assert!(store.save_new(&stem, &authority, true, true).is_err());
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
}
