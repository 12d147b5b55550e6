use super::*;
use proptest::{prelude::*, sample::subsequence};

const ALIAS: &str = "webscaler-manual.default.svc.cluster.local";

fn ip(last: u8) -> IpAddr {
    IpAddr::from([192, 0, 2, last])
}

fn names(text: &[&str]) -> Vec<Arc<str>> {
    text.iter().map(|name| Arc::from(*name)).collect()
}

fn rule() -> Rule<'static> {
    Rule {
        cluster_domain: "cluster.local",
        server_name: None,
        chain_match: &[],
        is_configured: false,
        plaintext: false,
    }
}

fn walk(question: &str, records: &[Record]) -> Result<Walked, ChainError> {
    Chain::new(question).walk(records)
}

#[test]
fn the_chain_follows_the_links_and_not_the_packet() {
    let records = [
        Record::address("e123.edge.example", 20, ip(2)),
        Record::cname("vendor.cdn.example", 60, "e123.edge.example"),
        Record::address("e123.edge.example", 20, ip(1)),
        Record::cname(ALIAS, 5, "www.vendor.example"),
        Record::cname("www.vendor.example", 300, "vendor.cdn.example"),
    ];
    let Ok(Walked::Complete(chain)) = walk(ALIAS, &records) else { panic!("no addresses") };
    let expected = [ALIAS, "www.vendor.example", "vendor.cdn.example", "e123.edge.example"];
    assert_eq!(chain.names(), names(&expected));
    assert_eq!(chain.addresses(), [ip(2), ip(1)]);
    assert_eq!(chain.ttl(), 5);
    assert_eq!(rule().true_name(chain.names()).unwrap().as_str(), "www.vendor.example");
}

#[test]
fn records_of_other_names_have_no_say() {
    let records = [
        Record::cname(ALIAS, 30, "httpbin.org"),
        Record::address("httpbin.org", 60, ip(1)),
        Record::address("elsewhere.example", 1, ip(9)),
        Record::cname("elsewhere.example", 1, ALIAS),
    ];
    let Ok(Walked::Complete(chain)) = walk(ALIAS, &records) else { panic!("no addresses") };
    assert_eq!((chain.addresses(), chain.ttl()), (&[ip(1)][..], 30));
}

#[test]
fn a_lone_cname_asks_for_its_target_and_goes_on_from_there() {
    let Ok(Walked::AskForEnd(chain)) = walk(ALIAS, &[Record::cname(ALIAS, 5, "HTTPBIN.org.")])
    else {
        panic!("no query for the end");
    };
    assert_eq!(&**chain.end(), "httpbin.org");
    let Ok(Walked::Complete(chain)) = chain.walk(&[Record::address("httpbin.org", 3, ip(1))])
    else {
        panic!("no addresses");
    };
    assert_eq!(chain.names(), names(&[ALIAS, "httpbin.org"]));
    assert_eq!(chain.ttl(), 3);
}

#[test]
fn an_answer_about_nothing_is_nothing() {
    assert!(matches!(walk(ALIAS, &[]), Ok(Walked::Nothing(_))));
    let other = [Record::address("other.example", 5, ip(1))];
    assert!(matches!(walk(ALIAS, &other), Ok(Walked::Nothing(_))));
}

#[test]
fn a_loop_is_shown() {
    let records =
        [Record::cname("b.example", 5, "a.example"), Record::cname("a.example", 5, "b.example")];
    let error = walk("a.example", &records).unwrap_err();
    assert_eq!(error.to_string(), "the CNAME chain loops: a.example → b.example → a.example");
}

/// Regression: its addresses were used with an empty true name.
#[test]
fn the_root_of_dns_is_no_host() {
    let records =
        [Record::cname("a.example", 5, "."), Record::address(".", 5, "192.0.2.1".parse().unwrap())];
    let error = walk("a.example", &records).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the CNAME chain a.example ends at the root of DNS (`.`), which is not a host"
    );
}

#[test]
fn a_loop_that_closes_only_in_a_later_answer_is_found_too() {
    let Ok(Walked::AskForEnd(chain)) =
        walk("a.example", &[Record::cname("a.example", 5, "b.example")])
    else {
        panic!("no query for the end");
    };
    let error = chain.walk(&[Record::cname("b.example", 5, "a.example")]).unwrap_err();
    assert!(matches!(error, ChainError::Loop { .. }), "{error}");
}

#[test]
fn sixteen_steps_are_followed_and_no_more() {
    let link =
        |n: usize| Record::cname(&format!("n{n}.example"), 5, &format!("n{}.example", n + 1));
    let records: Vec<_> = (0..MAX_STEPS).map(link).collect();
    assert!(matches!(walk("n0.example", &records), Ok(Walked::AskForEnd(_))));
    let records: Vec<_> = (0..=MAX_STEPS).map(link).collect();
    assert!(matches!(walk("n0.example", &records), Err(ChainError::TooLong { .. })));
}

#[test]
fn a_fork_is_an_error_rather_than_a_draw() {
    let mut records =
        vec![Record::cname(ALIAS, 5, "b.example"), Record::cname(ALIAS, 5, "a.example")];
    let error = walk(ALIAS, &records).unwrap_err();
    records.reverse();
    assert_eq!(walk(ALIAS, &records).unwrap_err(), error);
    assert!(error.to_string().contains("to a.example and to b.example"), "{error}");
}

#[test]
fn aliases_of_aliases_are_skipped() {
    let chain =
        names(&[ALIAS, "other.prod.svc.cluster.local", "api.vendor.com", "d111.cloudfront.net"]);
    assert_eq!(rule().true_name(&chain).unwrap().as_str(), "api.vendor.com");
}

#[test]
fn the_cluster_domain_is_not_always_cluster_local() {
    let chain = names(&["a.ns.svc.k8s.corp", "b.ns.svc.k8s.corp", "notk8s.corp"]);
    let rule = Rule { cluster_domain: "k8s.corp", ..rule() };
    assert_eq!(rule.true_name(&chain).unwrap().as_str(), "notk8s.corp");
}

#[test]
fn a_chain_that_ends_in_the_cluster_has_no_true_name_but_in_plaintext() {
    let chain = names(&[ALIAS, "db.prod.svc.cluster.local"]);
    let error = rule().true_name(&chain).unwrap_err();
    assert!(
        error.to_string().contains("webscaler-manual.default.svc.cluster.local → db.prod"),
        "{error}"
    );
    assert!(
        error.fix().contains("`tls.server_name`") && error.fix().contains("`tls.mode: plaintext`")
    );
    let plaintext = Rule { plaintext: true, ..rule() };
    assert_eq!(plaintext.true_name(&chain).unwrap().as_str(), "db.prod.svc.cluster.local");
}

#[test]
fn server_name_overrides_and_chain_match_chooses() {
    let vanity = [NamePattern("*.rds.amazonaws.com".into())];
    let chain =
        names(&[ALIAS, "db.corp.com", "xyz.eu.rds.amazonaws.com", "ec2-1.compute.amazonaws.com"]);
    let matching = Rule { chain_match: &vanity, ..rule() };
    assert_eq!(matching.true_name(&chain).unwrap().as_str(), "xyz.eu.rds.amazonaws.com");
    let unmatched = names(&[ALIAS, "db.corp.com"]);
    assert_eq!(matching.true_name(&unmatched).unwrap().as_str(), "db.corp.com");
    let named = Rule { server_name: Some("Bücher.Example."), ..matching };
    assert_eq!(named.true_name(&chain).unwrap().as_str(), "xn--bcher-kva.example");
}

#[test]
fn an_alias_outside_the_cluster_is_its_own_true_name_until_a_cname_says_more() {
    assert_eq!(rule().true_name(&names(&["api.vendor.com"])).unwrap().as_str(), "api.vendor.com");
    let chain = names(&["db.corp.com", "xyz.rds.amazonaws.com"]);
    assert_eq!(rule().true_name(&chain).unwrap().as_str(), "xyz.rds.amazonaws.com");
    assert!(rule().true_name(&names(&[ALIAS])).is_err());
}

#[test]
fn a_configured_target_is_its_own_true_name() {
    let configured = Rule { is_configured: true, ..rule() };
    let chain = names(&["api.vendor.com", "d111.cloudfront.net"]);
    assert_eq!(configured.true_name(&chain).unwrap().as_str(), "api.vendor.com");
    let address = Chain::of_ip("2001:db8::1".parse().unwrap());
    let true_name = configured.true_name(address.names()).unwrap();
    assert!(true_name.is_ip());
    assert_eq!(true_name.to_string(), "2001:db8::1");
    let named = Rule { server_name: Some("db.example"), ..configured };
    assert!(!named.true_name(address.names()).unwrap().is_ip());
}

#[test]
fn a_star_stands_for_one_or_more_labels() {
    let pattern = NamePattern("*.example.com".into());
    assert!(pattern.matches("a.example.com") && pattern.matches("a.b.example.com"));
    assert!(
        !pattern.matches("example.com")
            && !pattern.matches("badexample.com")
            && !pattern.matches(".example.com")
    );
}

/// A chain of distinct names inside and outside the cluster, with its TTLs, and addresses at its end.
fn arbitrary_chain() -> impl Strategy<Value = (Vec<String>, Vec<u32>, Vec<u8>)> {
    let name = prop_oneof![
        "[a-d]\\.svc\\.cluster\\.local",
        "[a-d]\\.(vendor|cdn)\\.example",
        "[a-d]cluster\\.local"
    ];
    (proptest::collection::hash_set(name, 1..8), proptest::collection::hash_set(0u8..50, 1..5))
        .prop_flat_map(|(names, ips)| {
            let names: Vec<String> = names.into_iter().collect();
            let ips: Vec<u8> = ips.into_iter().collect();
            let records = names.len() - 1 + ips.len();
            (
                Just(names).prop_shuffle(),
                proptest::collection::vec(0u32..100_000, records),
                Just(ips),
            )
        })
}

fn records_of((names, ttls, ips): &(Vec<String>, Vec<u32>, Vec<u8>)) -> Vec<Record> {
    let links =
        names.windows(2).zip(ttls).map(|(pair, ttl)| Record::cname(&pair[0], *ttl, &pair[1]));
    let end = &names[names.len() - 1];
    let addresses = ips
        .iter()
        .zip(&ttls[names.len() - 1..])
        .map(|(last, ttl)| Record::address(end, *ttl, ip(*last)));
    links.chain(addresses).collect()
}

proptest! {
    #[test]
    fn the_order_of_records_never_matters(
        (chain, shuffled) in arbitrary_chain().prop_flat_map(|chain| {
            let shuffled = Just(records_of(&chain)).prop_shuffle();
            (Just(chain), shuffled)
        })
    ) {
        let question = chain.0[0].as_str();
        let Ok(Walked::Complete(walked)) = walk(question, &shuffled) else { panic!("no addresses") };
        prop_assert_eq!(walked.names().iter().map(|n| n.to_string()).collect::<Vec<_>>(), chain.0);
        prop_assert_eq!(walked.ttl(), *chain.1.iter().min().unwrap());
        let mut found = walked.addresses().to_vec();
        let mut given: Vec<_> = chain.2.iter().map(|last| ip(*last)).collect();
        found.sort();
        given.sort();
        prop_assert_eq!(found, given);
    }

    #[test]
    fn an_answer_split_over_several_packets_gives_the_same_chain(
        (chain, first) in arbitrary_chain().prop_flat_map(|chain| {
            let links = records_of(&chain)[..chain.0.len() - 1].to_vec();
            let first = subsequence(links.clone(), 0..=links.len());
            (Just(chain), first)
        })
    ) {
        let question = chain.0[0].as_str();
        let records = records_of(&chain);
        let walked = match walk(question, &first).unwrap() {
            Walked::AskForEnd(started) | Walked::Nothing(started) => started.walk(&records).unwrap(),
            Walked::Complete(_) => panic!("addresses out of nowhere"),
        };
        let Walked::Complete(walked) = walked else { panic!("no addresses") };
        prop_assert_eq!(walked.ttl(), *chain.1.iter().min().unwrap());
    }

    #[test]
    fn the_true_name_is_never_in_the_cluster_and_never_the_alias(chain in arbitrary_chain(), matched in any::<bool>()) {
        let patterns = [NamePattern("*.local".into()), NamePattern("*.cdn.example".into())];
        let rule = Rule { chain_match: if matched { &patterns } else { &[] }, ..rule() };
        let chain: Vec<Arc<str>> = chain.0.iter().map(|name| Arc::from(name.as_str())).collect();
        if let Ok(true_name) = rule.true_name(&chain) {
            prop_assert!(!in_domain(true_name.as_str(), "cluster.local"));
            prop_assert!(chain.len() == 1 || true_name.as_str() != &*chain[0]);
        }
    }

    #[test]
    fn every_loop_is_found(chain in arbitrary_chain(), back in any::<prop::sample::Index>()) {
        let names = &chain.0;
        let mut records: Vec<_> = names.windows(2).map(|pair| Record::cname(&pair[0], 5, &pair[1])).collect();
        let back = &names[back.index(names.len())];
        records.push(Record::cname(&names[names.len() - 1], 5, back));
        let Err(ChainError::Loop { chain }) = walk(&names[0], &records) else { panic!("no loop") };
        prop_assert_eq!(&**chain.last().unwrap(), back.as_str());
    }
}
