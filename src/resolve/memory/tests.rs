use super::*;
use crate::{
    config::NamePattern,
    resolve::{
        chain::{Record, Walked},
        error::{LookupError, Place},
        names::tests::settings,
    },
};

const ALIAS: &str = "db.default.svc.cluster.local";
const SECOND: Duration = Duration::from_secs(1);

fn question(allow: &[&str]) -> Arc<Question> {
    Arc::new(Question {
        alias: Arc::from("db"),
        target: None,
        server_name: None,
        chain_match: Vec::new(),
        allow: allow.iter().map(|pattern| NamePattern((*pattern).into())).collect(),
        plaintext: false,
        purpose: crate::resolve::Purpose::Dial,
    })
}

fn memory(allow: &[&str]) -> Memory {
    Memory::new(question(allow), &settings())
}

fn leads_to(target: &str, ttls: [u32; 2], ip: &str) -> Result<Chain, ResolveError> {
    let records = [
        Record::cname(ALIAS, ttls[0], target),
        Record::address(target, ttls[1], ip.parse().unwrap()),
    ];
    match Chain::new(ALIAS).walk(&records) {
        Ok(Walked::Complete(chain)) => Ok(chain),
        other => panic!("{other:?}"),
    }
}

fn fails(failure: Failure) -> Result<Chain, ResolveError> {
    Err(ResolveError::Lookup {
        chain: vec![Arc::from(ALIAS)],
        place: Place::Service,
        error: Box::new(LookupError::new(ALIAS, &["192.0.2.53:53".parse().unwrap()], failure)),
    })
}

fn absorb(
    memory: &mut Memory,
    now: Instant,
    v4: Result<Chain, ResolveError>,
    v6: Result<Chain, ResolveError>,
) {
    memory.absorb(Round { v4, v6 }, "cluster.local", now);
}

fn addresses(memory: &Memory) -> Vec<String> {
    let current = memory.state().current.as_ref();
    current.map_or_else(Vec::new, |current| {
        current.addresses.iter().map(ToString::to_string).collect()
    })
}

#[test]
fn a_short_alias_ttl_rules_over_a_long_address_ttl() {
    let mut memory = memory(&[]);
    absorb(
        &mut memory,
        Instant::now(),
        leads_to("a.example", [5, 86400], "192.0.2.1"),
        fails(Failure::NoData),
    );
    assert_eq!(memory.outlook(), Outlook::Whole(5 * SECOND));
    absorb(
        &mut memory,
        Instant::now(),
        leads_to("a.example", [86400, 86400], "192.0.2.1"),
        fails(Failure::NoData),
    );
    assert_eq!(memory.outlook(), Outlook::Whole(5 * SECOND), "no longer than cluster_max_ttl");
    absorb(
        &mut memory,
        Instant::now(),
        leads_to("a.example", [0, 0], "192.0.2.1"),
        fails(Failure::NoData),
    );
    assert_eq!(memory.outlook(), Outlook::Whole(5 * SECOND), "no shorter than min_ttl");
}

#[test]
fn a_family_that_fails_never_hurts_the_other() {
    let now = Instant::now();
    let mut memory = memory(&[]);
    absorb(&mut memory, now, leads_to("a.example", [5, 5], "192.0.2.1"), fails(Failure::ServFail));
    assert_eq!(addresses(&memory), ["192.0.2.1"]);
    assert_eq!(memory.state().error, None);
    absorb(&mut memory, now, fails(Failure::Timeout), leads_to("a.example", [5, 5], "2001:db8::1"));
    assert_eq!(addresses(&memory), ["192.0.2.1", "2001:db8::1"], "the last good A stays");
    assert_eq!(memory.state().stale_since, None);
}

#[test]
fn each_family_goes_when_its_own_time_is_over() {
    let start = Instant::now();
    let both = |memory: &mut Memory, now, v6| {
        absorb(memory, now, leads_to("a.example", [5, 5], "192.0.2.1"), v6)
    };
    let mut memory = memory(&[]);
    both(&mut memory, start, leads_to("a.example", [5, 5], "2001:db8::1"));
    both(&mut memory, start + 5 * SECOND, fails(Failure::NoData));
    assert_eq!(addresses(&memory), ["192.0.2.1", "2001:db8::1"]);
    assert_eq!(memory.expiry(), Some(start + 35 * SECOND));
    memory.expire(start + 35 * SECOND);
    assert_eq!(addresses(&memory), ["192.0.2.1"]);
}

#[test]
fn timeouts_keep_the_last_good_answer_for_stale() {
    let start = Instant::now();
    let mut memory = memory(&[]);
    absorb(&mut memory, start, leads_to("a.example", [5, 5], "192.0.2.1"), fails(Failure::NoData));
    for failure in [Failure::Timeout, Failure::ServFail, Failure::Refused] {
        absorb(&mut memory, start + 5 * SECOND, fails(failure.clone()), fails(failure));
        assert_eq!(addresses(&memory), ["192.0.2.1"]);
        assert_eq!(memory.state().stale_since, Some(start + 5 * SECOND));
        assert_eq!(memory.expiry(), Some(start + 3605 * SECOND));
    }
    memory.expire(start + 3605 * SECOND - SECOND);
    assert_eq!(addresses(&memory), ["192.0.2.1"]);
    memory.expire(start + 3605 * SECOND);
    assert_eq!(memory.state().current, None);
    assert!(memory.state().error.is_some() && memory.state().stale_since.is_none());
}

#[test]
fn denials_keep_it_for_nxdomain_hold_and_a_timeout_between_starts_nothing_anew() {
    let start = Instant::now();
    let mut memory = memory(&[]);
    absorb(&mut memory, start, leads_to("a.example", [5, 5], "192.0.2.1"), fails(Failure::NoData));
    absorb(&mut memory, start, fails(Failure::NxDomain), fails(Failure::NxDomain));
    assert_eq!(memory.expiry(), Some(start + 30 * SECOND));
    absorb(&mut memory, start + 10 * SECOND, fails(Failure::Timeout), fails(Failure::Timeout));
    assert_eq!(memory.expiry(), Some(start + 3600 * SECOND));
    absorb(&mut memory, start + 40 * SECOND, fails(Failure::NxDomain), fails(Failure::NxDomain));
    assert_eq!(memory.state().current, None);
}

#[test]
fn a_good_answer_ends_all_holds() {
    let start = Instant::now();
    let mut memory = memory(&[]);
    let good = || leads_to("a.example", [5, 5], "192.0.2.1");
    absorb(&mut memory, start, good(), fails(Failure::NoData));
    absorb(&mut memory, start, fails(Failure::NxDomain), fails(Failure::NxDomain));
    absorb(&mut memory, start + 29 * SECOND, good(), fails(Failure::NoData));
    assert_eq!((memory.expiry(), &memory.state().error), (None, &None));
}

#[test]
fn a_new_true_name_is_a_new_generation_and_takes_no_old_addresses_along() {
    let now = Instant::now();
    let mut memory = memory(&[]);
    let generation = |memory: &Memory| memory.state().current.as_ref().unwrap().generation;
    let old = || leads_to("old.example", [5, 5], "192.0.2.1");
    absorb(&mut memory, now, old(), leads_to("old.example", [5, 5], "2001:db8::1"));
    assert_eq!(generation(&memory), 1);
    absorb(&mut memory, now, leads_to("old.example", [5, 5], "192.0.2.7"), fails(Failure::NoData));
    assert_eq!(generation(&memory), 1, "a rotation");
    absorb(&mut memory, now, leads_to("new.example", [5, 5], "192.0.2.2"), fails(Failure::Timeout));
    assert_eq!((generation(&memory), addresses(&memory)), (2, vec!["192.0.2.2".to_owned()]));
    absorb(&mut memory, now, old(), fails(Failure::NoData));
    assert_eq!(generation(&memory), 3, "back again is a failover too");
}

#[test]
fn families_that_disagree_are_not_mixed() {
    let mut memory = memory(&[]);
    let v6 = leads_to("b.example", [5, 5], "2001:db8::1");
    absorb(&mut memory, Instant::now(), leads_to("a.example", [5, 5], "192.0.2.1"), v6);
    assert_eq!(addresses(&memory), ["192.0.2.1"]);
    assert_eq!(memory.state().current.as_ref().unwrap().true_name.as_str(), "a.example");
}

#[test]
fn the_same_name_after_an_outage_is_no_failover() {
    let start = Instant::now();
    let mut memory = memory(&[]);
    let good = || leads_to("a.example", [5, 5], "192.0.2.1");
    absorb(&mut memory, start, good(), fails(Failure::NoData));
    absorb(&mut memory, start, fails(Failure::NxDomain), fails(Failure::NxDomain));
    memory.expire(start + 31 * SECOND);
    assert_eq!(memory.state().current, None);
    absorb(&mut memory, start + 40 * SECOND, good(), fails(Failure::NoData));
    assert_eq!(memory.state().current.as_ref().unwrap().generation, 1);
}

#[test]
fn a_refused_change_keeps_the_last_good_one() {
    let start = Instant::now();
    let mut memory = memory(&["*.good.example"]);
    absorb(
        &mut memory,
        start,
        leads_to("a.good.example", [5, 5], "192.0.2.1"),
        fails(Failure::NoData),
    );
    absorb(
        &mut memory,
        start + 5 * SECOND,
        leads_to("evil.example", [5, 5], "192.0.2.66"),
        fails(Failure::NoData),
    );
    assert_eq!(addresses(&memory), ["192.0.2.1"]);
    let refused = memory.state().refused.clone().unwrap();
    assert_eq!(refused.true_name.as_str(), "evil.example");
    assert!(refused.fix().contains("\"evil.example\" to `allow`"));
    assert_eq!(
        (memory.expiry(), memory.outlook()),
        (None, Outlook::Whole(5 * SECOND)),
        "it stays, and DNS is queried again"
    );
    absorb(
        &mut memory,
        start + 9 * SECOND,
        leads_to("b.good.example", [5, 5], "192.0.2.2"),
        fails(Failure::NoData),
    );
    assert_eq!(
        (addresses(&memory), &memory.state().refused),
        (vec!["192.0.2.2".to_owned()], &None)
    );
}

#[test]
fn a_first_answer_that_is_refused_serves_nothing() {
    let mut memory = memory(&["good.example"]);
    absorb(
        &mut memory,
        Instant::now(),
        leads_to("evil.example", [5, 5], "192.0.2.66"),
        fails(Failure::NoData),
    );
    assert_eq!(memory.state().current, None);
    assert!(matches!(memory.state().error.as_deref(), Some(ResolveError::NotAllowed(_))));
}

#[test]
fn a_chain_into_the_cluster_is_a_denial() {
    let start = Instant::now();
    let mut memory = memory(&[]);
    absorb(&mut memory, start, leads_to("a.example", [5, 5], "192.0.2.1"), fails(Failure::NoData));
    let inside = leads_to("pg.default.svc.cluster.local", [5, 5], "10.96.0.7");
    absorb(&mut memory, start, inside, fails(Failure::NoData));
    assert_eq!(addresses(&memory), ["192.0.2.1"]);
    assert_eq!(memory.expiry(), Some(start + 30 * SECOND));
    let error = memory.state().error.as_ref().unwrap().to_string();
    assert!(
        error.contains("ends inside the cluster") && error.contains("`tls.server_name`"),
        "{error}"
    );
}

#[test]
fn a_family_that_may_still_come_is_asked_for_soon() {
    let now = Instant::now();
    let mut memory = memory(&[]);
    let v6 = || leads_to("a.example", [5, 5], "2001:db8::1");
    absorb(&mut memory, now, fails(Failure::Timeout), v6());
    assert_eq!(memory.outlook(), Outlook::Partial(5 * SECOND));
    absorb(&mut memory, now, fails(Failure::NoData), v6());
    assert_eq!(
        memory.outlook(),
        Outlook::Whole(5 * SECOND),
        "there are no A records: nothing is missing"
    );
    absorb(&mut memory, now, fails(Failure::NoData), fails(Failure::Timeout));
    assert_eq!(memory.outlook(), Outlook::Failed { longest: 5 * SECOND }, "a cluster's name");
}

#[test]
fn each_family_is_held_for_what_was_said_about_it() {
    let start = Instant::now();
    let mut memory = memory(&[]);
    let v6 = leads_to("a.example", [5, 5], "2001:db8::1");
    absorb(&mut memory, start, leads_to("a.example", [5, 5], "192.0.2.1"), v6);
    absorb(&mut memory, start, fails(Failure::NoData), fails(Failure::Timeout));
    memory.expire(start + 30 * SECOND);
    assert_eq!(addresses(&memory), ["2001:db8::1"]);
    assert_eq!(memory.expiry(), Some(start + 3600 * SECOND));
}

#[test]
fn the_more_telling_error_is_shown() {
    let mut memory = memory(&[]);
    absorb(&mut memory, Instant::now(), fails(Failure::NoData), fails(Failure::Timeout));
    assert!(memory.state().error.as_ref().unwrap().is_timeout());
}

#[test]
fn names_of_the_cluster_are_asked_for_as_often_as_cluster_max_ttl_says_and_others_by_their_ttl() {
    let limits = |min_ttl, max_ttl, cluster_max_ttl| config::Dns {
        min_ttl: min_ttl * SECOND,
        max_ttl: max_ttl * SECOND,
        cluster_max_ttl: cluster_max_ttl * SECOND,
        ..settings()
    };
    for (name, ttl, dns, expected) in [
        (ALIAS, 30, settings(), 5),
        (ALIAS, 3, settings(), 5),
        (ALIAS, 30, limits(1, 60, 2), 2),
        (ALIAS, 1, limits(1, 60, 2), 1),
        (ALIAS, 30, limits(10, 60, 5), 10),
        (ALIAS, 30, limits(1, 3, 5), 3),
        ("api.example", 30, settings(), 30),
        ("api.example", 3600, settings(), 60),
    ] {
        let mut memory = Memory::new(question(&[]), &dns);
        let records = [
            Record::cname(name, ttl, "edge.example"),
            Record::address("edge.example", ttl, "192.0.2.1".parse().unwrap()),
        ];
        let Ok(Walked::Complete(chain)) = Chain::new(name).walk(&records) else { panic!() };
        absorb(&mut memory, Instant::now(), Ok(chain.clone()), Ok(chain));
        let expected = Outlook::Whole(expected * SECOND);
        assert_eq!(memory.outlook(), expected, "{name} {ttl} {dns:?}");
    }
}

#[test]
fn another_question_judges_anew_what_is_known() {
    let start = Instant::now();
    let mut memory = memory(&[]);
    absorb(&mut memory, start, leads_to("a.example", [5, 5], "192.0.2.1"), fails(Failure::NoData));
    let timeout = || fails(Failure::Timeout);
    absorb(&mut memory, start + SECOND, timeout(), timeout());
    let true_name = |memory: &Memory| {
        memory.state().current.as_ref().map(|current| current.true_name.to_string())
    };

    memory.adopt(question(&["a.example"]), &settings(), start + SECOND);
    assert_eq!(true_name(&memory).as_deref(), Some("a.example"));
    assert!(memory.state().stale_since.is_some() && memory.state().error.is_some());
    let server_name = Some("b.example".to_owned());
    let renamed = Arc::new(Question { server_name, ..(*question(&[])).clone() });
    memory.adopt(renamed, &settings(), start + SECOND);
    assert_eq!(true_name(&memory).as_deref(), Some("b.example"));
    assert_eq!(memory.state().current.as_ref().unwrap().generation, 2, "it is another name");
    memory.adopt(question(&["elsewhere.example"]), &settings(), start + SECOND);
    assert_eq!(true_name(&memory), None);
    assert!(memory.state().refused.is_some(), "without waiting for DNS");
}

#[test]
fn other_settings_hold_for_what_is_known() {
    let start = Instant::now();
    let mut memory = memory(&[]);
    absorb(&mut memory, start, leads_to("a.example", [5, 5], "192.0.2.1"), fails(Failure::NoData));
    absorb(&mut memory, start, fails(Failure::Timeout), fails(Failure::Timeout));
    let shorter = config::Dns { stale: SECOND, ..settings() };
    memory.adopt(question(&[]), &shorter, start);
    assert_eq!(memory.expiry(), Some(start + SECOND));
    memory.adopt(question(&[]), &shorter, start + SECOND);
    assert_eq!(memory.state().current, None);
}

#[test]
fn what_others_know_of_a_name_serves_for_what_is_left_of_its_time() {
    let start = Instant::now();
    let mut other = memory(&[]);
    absorb(&mut other, start, leads_to("a.example", [5, 5], "192.0.2.1"), fails(Failure::NoData));
    absorb(&mut other, start + SECOND, fails(Failure::Timeout), fails(Failure::Timeout));
    let mut memory = memory(&["*.example"]);
    memory.recall(other.answers().clone(), start + 2 * SECOND);
    assert_eq!(addresses(&memory), ["192.0.2.1"]);
    assert_eq!(memory.state().stale_since, Some(start + SECOND));
    assert_eq!(memory.expiry(), other.expiry());
}

#[test]
fn answers_about_another_name_are_none_to_this_question() {
    let start = Instant::now();
    let mut memory = memory(&[]);
    absorb(&mut memory, start, leads_to("a.example", [5, 5], "192.0.2.1"), fails(Failure::NoData));
    let elsewhere = || {
        Err(ResolveError::Lookup {
            chain: vec![Arc::from("db.prod.svc.cluster.local")],
            place: Place::Service,
            error: Box::new(LookupError::new("db", &[], Failure::Timeout)),
        })
    };
    absorb(&mut memory, start + SECOND, elsewhere(), elsewhere());
    assert_eq!(memory.state().current, None, "it is another tenant's");
}

/// Regression: while the new name was refused, the answer to the former one served without end.
#[test]
fn a_refused_true_name_keeps_no_answer_about_another_name() {
    let start = Instant::now();
    let mut memory = memory(&["a.example"]);
    absorb(&mut memory, start, leads_to("a.example", [5, 5], "192.0.2.1"), fails(Failure::NoData));
    let prod = "db.prod.svc.cluster.local";
    let records = [
        Record::cname(prod, 5, "b.example"),
        Record::address("b.example", 5, "192.0.2.2".parse().unwrap()),
    ];
    let Ok(Walked::Complete(chain)) = Chain::new(prod).walk(&records) else { panic!("no chain") };
    absorb(&mut memory, start + SECOND, Ok(chain), fails(Failure::NoData));
    assert!(memory.state().refused.is_some());
    assert_eq!(memory.state().current, None, "it is another tenant's");
}
