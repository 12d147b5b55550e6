//! Targets that a proxy resolves.

use super::*;

#[tokio::test]
async fn a_target_behind_a_proxy_needs_a_true_name_and_no_addresses() {
    let server = server().await;
    let proxied = || Question { purpose: Purpose::AskProxy, ..question() };
    let ask = async |question: Question| {
        timeout(DEADLINE, resolver(&server).resolve(&question)).await.unwrap()
    };
    server.zone([cname(ALIAS, 5, "vendor.example")]);
    let current = ask(proxied()).await.current.unwrap();
    assert_eq!(current.true_name.as_str(), "vendor.example");
    assert_eq!((&*current.destination, current.addresses.len()), ("vendor.example", 0));
    assert_eq!(server.queries("vendor.example", RecordType::A), 0);

    let server_name = Some("certificate.example".to_owned());
    let current = ask(Question { server_name, ..proxied() }).await.current.unwrap();
    assert_eq!(current.true_name.as_str(), "certificate.example");
    assert_eq!(&*current.destination, "vendor.example");

    let target = Some(TargetHost::Name("target.example".into()));
    let current = ask(Question { target, ..proxied() }).await.current.unwrap();
    assert_eq!(current.true_name.as_str(), "target.example");
    assert_eq!(server.queries("target.example", RecordType::A), 0);

    // The rest of the chain may matter, as far as DNS knows it.
    let chain_match = vec![NamePattern::new("*.edge.example").unwrap()];
    let matching = || Question { chain_match: chain_match.clone(), ..proxied() };
    let state = ask(matching()).await;
    assert_eq!(true_name(&state), Some("vendor.example"), "{:?}", state.error);
    server.zone([cname("vendor.example", 5, "e1.edge.example")]);
    assert_eq!(true_name(&ask(matching()).await), Some("e1.edge.example"));

    server.remove(ALIAS);
    let (failure, _) = failure(&ask(proxied()).await);
    assert_eq!(failure, Failure::NxDomain, "there is no such Service");
}
