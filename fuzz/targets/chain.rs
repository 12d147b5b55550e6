//! A DNS answer's records, in any order and however tangled: the walk ends, finds no name under
//! the cluster's domain, and does not depend on their order.
#![no_main]

use libfuzzer_sys::fuzz_target;
use truename::resolve::chain::{Chain, MAX_STEPS, Record, Rule, Walked};

/// Few names, so that links meet; some of them in the cluster.
const NAMES: [&str; 8] = [
    "alias.default.svc.cluster.local",
    "other.default.svc.cluster.local",
    "cluster.local",
    "vendor.example",
    "cdn.example",
    "Edge.Example.",
    "notcluster.local",
    "a.b.c.example",
];

fuzz_target!(|bytes: &[u8]| {
    let name = |byte: u8| NAMES[usize::from(byte) % NAMES.len()];
    let records: Vec<Record> = bytes
        .chunks_exact(4)
        .take(64)
        .map(|record| match record[0] % 3 {
            0 => Record::address(name(record[1]), record[2].into(), [10, 0, 0, record[3]].into()),
            _ => Record::cname(name(record[1]), record[2].into(), name(record[3])),
        })
        .collect();
    let walk = |records: &[Record]| Chain::new(NAMES[0]).walk(records);
    let walked = walk(&records);
    let reversed: Vec<Record> = records.iter().rev().cloned().collect();
    assert_eq!(walked.is_ok(), walk(&reversed).is_ok(), "{records:?}");

    let Ok(Walked::Complete(chain) | Walked::AskForEnd(chain) | Walked::Nothing(chain)) = walked
    else {
        return;
    };
    let names = chain.names();
    assert!(names.len() <= MAX_STEPS + 1, "{names:?}");
    let rule = Rule {
        cluster_domain: "cluster.local",
        server_name: None,
        chain_match: &[],
        is_configured: false,
        plaintext: false,
    };
    if let Ok(true_name) = rule.true_name(names) {
        let text = true_name.as_str();
        assert!(text != "cluster.local" && !text.ends_with(".cluster.local"), "{text}");
        assert_eq!(text, text.to_ascii_lowercase());
        assert!(!text.ends_with('.'));
    }
});
