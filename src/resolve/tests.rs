//! The resolver against real sockets, with responses as Kubernetes' DNS really sends them.

mod proxied;
mod resolv_conf;

use super::{error::Failure, *};
use crate::demo::dns::{DnsResponse, DnsServer, RecordType, address, cname};
use std::{
    io::Write,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
};
use tokio::time::timeout;

const ALIAS: &str = "webscaler-manual.default.svc.cluster.local";
const V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
const V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1);
const DEADLINE: Duration = Duration::from_secs(10);

/// Short times, so that a test sees in moments what normally takes hours.
fn settings(servers: Vec<SocketAddr>) -> config::Dns {
    config::Dns {
        servers: servers.into_iter().map(Into::into).collect(),
        min_ttl: Duration::from_millis(50),
        max_ttl: Duration::from_millis(50),
        ..names::tests::settings()
    }
}

async fn server() -> DnsServer {
    DnsServer::start(SocketAddr::from(([127, 0, 0, 1], 0))).await.unwrap()
}

fn resolver(server: &DnsServer) -> Arc<Resolver> {
    with(settings(vec![server.address()]))
}

fn with(dns: config::Dns) -> Arc<Resolver> {
    Resolver::with_resolv_conf(dns, resolv_conf("/nonexistent/resolv.conf"))
}

fn resolv_conf(path: impl Into<PathBuf>) -> ResolvConf {
    ResolvConf { path: path.into(), ..ResolvConf::default() }
}

fn question() -> Question {
    Question {
        alias: Arc::from("webscaler-manual"),
        target: None,
        server_name: None,
        chain_match: Vec::new(),
        allow: Vec::new(),
        plaintext: false,
        purpose: Purpose::Dial,
    }
}

fn with_target(name: &str) -> Question {
    Question { target: Some(TargetHost::Name(name.into())), ..question() }
}

async fn resolve(server: &DnsServer) -> ResolutionState {
    timeout(DEADLINE, resolver(server).resolve(&question())).await.unwrap()
}

fn failure(state: &ResolutionState) -> (Failure, String) {
    match state.error.as_deref() {
        Some(error @ ResolveError::Lookup { error: lookup, .. }) => {
            (lookup.failure.clone(), error.to_string())
        }
        other => panic!("{other:?}"),
    }
}

async fn until(
    subscription: &mut Subscription,
    wished: impl Fn(&ResolutionState) -> bool,
) -> Arc<ResolutionState> {
    let state = timeout(DEADLINE, subscription.wait_for(wished)).await;
    state.expect("the state was not reached").expect("the task has ended")
}

fn true_name(state: &ResolutionState) -> Option<&str> {
    state.current.as_ref().map(|current| current.true_name.as_str())
}

// The responses of CoreDNS for each kind of externalName.

#[tokio::test]
async fn a_name_with_a_only() {
    let server = server().await;
    server.zone([cname(ALIAS, 5, "httpbin.org"), address("httpbin.org", 60, V4)]);
    let current = resolve(&server).await.current.unwrap();
    assert_eq!(current.true_name.as_str(), "httpbin.org");
    assert_eq!(current.chain, [Arc::from(ALIAS), Arc::<str>::from("httpbin.org")]);
    assert_eq!(current.addresses, [IpAddr::from(V4)]);
    assert_eq!(server.queries(ALIAS, RecordType::A), 1);
    assert_eq!(server.queries(ALIAS, RecordType::AAAA), 1);
}

#[tokio::test]
async fn a_cdn_chain_in_any_order() {
    let server = server().await;
    let records = vec![
        address("e123.edge.example", 20, V4),
        cname("vendor.cdn.example", 60, "e123.edge.example"),
        cname(ALIAS, 5, "www.vendor.example"),
        cname("www.vendor.example", 300, "vendor.cdn.example"),
    ];
    server.respond_to_type(ALIAS, RecordType::A, DnsResponse::Records(records));
    let current = resolve(&server).await.current.unwrap();
    assert_eq!(current.true_name.as_str(), "www.vendor.example");
    assert_eq!(current.chain.len(), 4);
}

#[tokio::test]
async fn dual_stack_and_ipv6_only() {
    let server = server().await;
    server.zone([cname(ALIAS, 5, "v6.example"), address("v6.example", 60, V6)]);
    assert_eq!(resolve(&server).await.current.unwrap().addresses, [IpAddr::from(V6)]);
    server.zone([address("v6.example", 60, V6), address("v6.example", 60, V4)]);
    let both = [IpAddr::from(V4), IpAddr::from(V6)];
    assert_eq!(resolve(&server).await.current.unwrap().addresses, both);
}

/// CoreDNS sends the same response for NODATA, NXDOMAIN, SERVFAIL and a timeout upstream. The response for the target
/// tells them apart.
#[tokio::test]
async fn a_lone_cname_is_explained_by_its_target() {
    let server = server().await;
    server.zone([cname(ALIAS, 5, "gone.example")]);
    for (response, expected) in [
        (DnsResponse::NoData { soa: true }, Failure::NoData),
        (DnsResponse::NoData { soa: false }, Failure::NoData),
        (DnsResponse::NxDomain, Failure::NxDomain),
        (DnsResponse::ServFail, Failure::ServFail),
        (DnsResponse::Refused, Failure::Refused),
    ] {
        server.respond("gone.example", response);
        let (failure, text) = failure(&resolve(&server).await);
        assert_eq!(failure, expected, "{text}");
        assert!(text.contains(&format!("the chain is {ALIAS} → gone.example")), "{text}");
        assert!(text.contains(&server.address().to_string()), "{text}");
    }
}

#[tokio::test]
async fn a_lone_cname_whose_target_has_addresses_of_its_own() {
    let server = server().await;
    let alone = DnsResponse::Records(vec![cname(ALIAS, 5, "httpbin.org")]);
    server.respond(ALIAS, alone);
    server.zone([address("httpbin.org", 60, V4)]);
    let state = resolve(&server).await;
    assert_eq!(true_name(&state), Some("httpbin.org"));
    assert_eq!(state.current.unwrap().addresses, [IpAddr::from(V4)]);
}

#[tokio::test]
async fn an_upstream_cname_to_nothing_shows_both_links() {
    let server = server().await;
    server.zone([
        cname(ALIAS, 5, "www.vendor.example"),
        cname("www.vendor.example", 60, "gone.example"),
    ]);
    let (failure, text) = failure(&resolve(&server).await);
    assert_eq!(failure, Failure::NxDomain);
    assert!(text.contains("www.vendor.example → gone.example"), "{text}");
}

/// As plain resolvers do, unlike CoreDNS.
#[tokio::test]
async fn nxdomain_without_a_service_names_digits_as_a_cause() {
    let server = server().await;
    let (failure, text) = failure(&resolve(&server).await);
    assert_eq!(failure, Failure::NxDomain);
    assert!(text.contains(&format!("{ALIAS} does not exist")), "{text}");
    assert!(
        text.contains("`externalName` is an IP address") && text.contains("`target:`"),
        "{text}"
    );
}

#[tokio::test]
async fn digits_that_are_no_address_are_noticed() {
    let server = server().await;
    server.zone([cname(ALIAS, 5, "010.1.2.3")]);
    let (_, text) = failure(&resolve(&server).await);
    assert!(text.contains("mistyped IP address"), "{text}");
}

#[tokio::test]
async fn a_label_of_64_characters_never_gets_a_response() {
    let server = server().await;
    server.zone([cname(ALIAS, 5, &format!("{}.example", "a".repeat(64)))]);
    let state = resolve(&server).await;
    assert!(state.error.as_ref().unwrap().is_timeout());
    let (_, text) = failure(&state);
    assert!(text.contains("63 characters"), "{text}");
}

#[tokio::test]
async fn one_label_is_absolute() {
    let server = server().await;
    server.zone([cname(ALIAS, 5, "db"), address("db", 60, V4)]);
    assert_eq!(true_name(&resolve(&server).await), Some("db"));
}

#[tokio::test]
async fn aliases_of_aliases_lead_out_in_the_end() {
    let server = server().await;
    server.zone([
        cname(ALIAS, 5, "second.default.svc.cluster.local"),
        cname("second.default.svc.cluster.local", 5, "third.prod.svc.cluster.local"),
        cname("third.prod.svc.cluster.local", 5, "httpbin.org."),
        address("httpbin.org", 60, V4),
    ]);
    assert_eq!(true_name(&resolve(&server).await), Some("httpbin.org"));
}

#[tokio::test]
async fn a_cluster_ip_service_has_no_true_name_but_in_plaintext() {
    let server = server().await;
    let service = "pg.default.svc.cluster.local";
    server.zone([cname(ALIAS, 5, service), address(service, 5, Ipv4Addr::new(10, 96, 0, 7))]);
    let error = resolve(&server).await.error.unwrap();
    assert!(error.fix().contains("`tls.mode: plaintext`"), "{error}");
    let plaintext = Question { plaintext: true, ..question() };
    let state = resolver(&server).resolve(&plaintext).await;
    assert_eq!(true_name(&state), Some(service));
}

#[tokio::test]
async fn a_service_that_leads_nowhere_or_to_itself() {
    let server = server().await;
    let other = "other.default.svc.cluster.local";
    for zone in [
        vec![cname(ALIAS, 5, "missing.default.svc.cluster.local")],
        vec![cname(ALIAS, 5, ALIAS)],
        vec![cname(ALIAS, 5, other), cname(other, 5, ALIAS)],
    ] {
        server.zone(zone);
        let (failure, text) = failure(&resolve(&server).await);
        assert_eq!(failure, Failure::NoData);
        assert!(text.contains("leads nowhere"), "{text}");
    }
}

#[tokio::test]
async fn a_loop_that_a_server_sends_is_shown() {
    let server = server().await;
    let ring = vec![cname(ALIAS, 5, "a.example"), cname("a.example", 5, ALIAS)];
    server.respond(ALIAS, DnsResponse::Records(ring));
    let error = resolve(&server).await.error.unwrap().to_string();
    assert!(error.contains(&format!("loops: {ALIAS} → a.example → {ALIAS}")), "{error}");
}

#[tokio::test]
async fn sixty_addresses_come_over_tcp() {
    let server = server().await;
    let addresses = (0..60).map(|last| address("big.example", 60, Ipv4Addr::new(192, 0, 2, last)));
    let records: Vec<_> =
        std::iter::once(cname(ALIAS, 5, "big.example")).chain(addresses).collect();
    server.respond_to_type(ALIAS, RecordType::A, DnsResponse::Truncated(records));
    assert_eq!(resolve(&server).await.current.unwrap().addresses.len(), 60);
    assert_eq!(server.queries(ALIAS, RecordType::A), 2);
}

// Servers that fail.

#[tokio::test]
async fn the_next_server_responds_when_one_fails() {
    let (bad, good) = (server().await, server().await);
    good.zone([cname(ALIAS, 5, "httpbin.org"), address("httpbin.org", 60, V4)]);
    for response in
        [DnsResponse::ServFail, DnsResponse::Refused, DnsResponse::Garbage, DnsResponse::Silence]
    {
        bad.respond(ALIAS, response);
        let resolver = with(settings(vec![bad.address(), good.address()]));
        let state = timeout(DEADLINE, resolver.resolve(&question())).await.unwrap();
        assert_eq!(true_name(&state), Some("httpbin.org"));
        // The one that responded is queried first from now on.
        let asked = bad.queries(ALIAS, RecordType::A);
        resolver.resolve(&question()).await;
        assert_eq!(bad.queries(ALIAS, RecordType::A), asked);
    }
}

#[tokio::test]
async fn the_last_of_four_servers_is_reached() {
    let servers = [server().await, server().await, server().await, server().await];
    for silent in &servers[..3] {
        silent.respond(ALIAS, DnsResponse::Silence);
    }
    servers[3].zone([cname(ALIAS, 5, "httpbin.org"), address("httpbin.org", 60, V4)]);
    let resolver = with(settings(servers.iter().map(DnsServer::address).collect()));
    assert_eq!(true_name(&resolver.resolve(&question()).await), Some("httpbin.org"));
}

#[tokio::test]
async fn nxdomain_is_an_answer_and_ends_the_search() {
    let (first, second) = (server().await, server().await);
    second.zone([address(ALIAS, 5, V4)]);
    let resolver = with(settings(vec![first.address(), second.address()]));
    assert_eq!(failure(&resolver.resolve(&question()).await).0, Failure::NxDomain);
    assert_eq!(second.queries(ALIAS, RecordType::A), 0);
}

#[tokio::test]
async fn garbage_and_silence_are_told_apart_in_time() {
    let server = server().await;
    server.respond(ALIAS, DnsResponse::Garbage);
    assert!(matches!(failure(&resolve(&server).await).0, Failure::Malformed(_)));
    server.respond(ALIAS, DnsResponse::Silence);
    let started = Instant::now();
    assert_eq!(failure(&resolve(&server).await).0, Failure::Timeout);
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

#[tokio::test]
async fn no_server_at_all_names_the_key() {
    let state = with(settings(Vec::new())).resolve(&question()).await;
    let (failure, text) = failure(&state);
    assert_eq!(failure, Failure::NoServers);
    assert!(text.contains("`dns.servers`"), "{text}");
}

#[tokio::test]
async fn silence_about_one_family_does_not_delay_the_other() {
    let server = server().await;
    server.zone([cname(ALIAS, 5, "httpbin.org"), address("httpbin.org", 60, V4)]);
    server.respond_to_type(ALIAS, RecordType::AAAA, DnsResponse::Silence);
    let started = Instant::now();
    assert_eq!(true_name(&resolve(&server).await), Some("httpbin.org"));
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

#[tokio::test]
async fn a_family_that_comes_late_is_taken_in_soon() {
    let server = server().await;
    let hour = Duration::from_secs(3600);
    let dns = config::Dns { min_ttl: hour, max_ttl: hour, ..settings(vec![server.address()]) };
    server.zone([
        cname(ALIAS, 5, "both.example"),
        address("both.example", 60, V6),
        address("both.example", 60, V4),
    ]);
    server.respond_to_type(ALIAS, RecordType::A, DnsResponse::Silence);
    let mut subscription = with(dns).watch(question());
    let state = until(&mut subscription, |state| state.current.is_some()).await;
    assert_eq!(state.current.as_ref().unwrap().addresses, [IpAddr::from(V6)]);
    server.restore(ALIAS);
    let both = |state: &ResolutionState| {
        state.current.as_ref().is_some_and(|current| current.addresses.len() == 2)
    };
    until(&mut subscription, both).await;
}

// Configured targets.

#[tokio::test]
async fn a_configured_name_is_its_own_true_name() {
    let server = server().await;
    server
        .zone([cname("api.vendor.com", 5, "edge.cdn.example"), address("edge.cdn.example", 5, V4)]);
    let state = resolver(&server).resolve(&with_target("api.vendor.com")).await;
    assert_eq!(true_name(&state), Some("api.vendor.com"));
    assert_eq!(server.queries(ALIAS, RecordType::A), 0);
}

#[tokio::test]
async fn a_configured_address_needs_no_dns() {
    let target = Some(TargetHost::Ip(V6.into()));
    let question = Question { target, ..question() };
    let current = with(settings(Vec::new())).resolve(&question).await.current.unwrap();
    assert!(current.true_name.is_ip());
    assert_eq!(current.addresses, [IpAddr::from(V6)]);
}

// Over time.

#[tokio::test]
async fn a_change_is_followed_and_followed_back() {
    let server = server().await;
    server.zone([
        cname(ALIAS, 5, "old.example"),
        address("old.example", 5, V4),
        address("new.example", 5, V6),
    ]);
    let mut subscription = resolver(&server).watch(question());
    assert!(subscription.state().is_pending());
    for (target, generation) in
        [("old.example", 1), ("new.example", 2), ("old.example", 3), ("new.example", 4)]
    {
        server.zone([cname(ALIAS, 5, target)]);
        let state = until(&mut subscription, |state| true_name(state) == Some(target)).await;
        assert_eq!(state.current.as_ref().unwrap().generation, generation);
    }
    assert!(subscription.state().current.as_ref().unwrap().addresses == [IpAddr::from(V6)]);
}

#[tokio::test]
async fn start_up_without_dns_recovers_soon() {
    let server = server().await;
    server.respond(ALIAS, DnsResponse::ServFail);
    let mut subscription = resolver(&server).watch(question());
    until(&mut subscription, |state| state.error.is_some()).await;
    server.restore(ALIAS);
    server.zone([cname(ALIAS, 5, "httpbin.org"), address("httpbin.org", 5, V4)]);
    let started = Instant::now();
    let state = until(&mut subscription, |state| state.current.is_some()).await;
    assert_eq!(state.error, None);
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
}

#[tokio::test]
async fn the_last_good_answer_serves_while_dns_fails_and_then_goes() {
    let server = server().await;
    server.zone([cname(ALIAS, 5, "httpbin.org"), address("httpbin.org", 5, V4)]);
    let stale = Duration::from_millis(600);
    let dns = config::Dns { stale, ..settings(vec![server.address()]) };
    let mut subscription = with(dns).watch(question());
    until(&mut subscription, |state| state.current.is_some()).await;
    server.respond(ALIAS, DnsResponse::ServFail);
    let state = until(&mut subscription, |state| state.error.is_some()).await;
    assert_eq!(true_name(&state), Some("httpbin.org"));
    let since = state.stale_since.unwrap();
    let state = until(&mut subscription, |state| state.current.is_none()).await;
    assert!(since.elapsed() >= stale);
    assert_eq!(failure(&state).0, Failure::ServFail);
    server.restore(ALIAS);
    until(&mut subscription, |state| state.current.is_some() && state.error.is_none()).await;
}

#[tokio::test]
async fn a_deleted_service_serves_for_nxdomain_hold() {
    let server = server().await;
    server.zone([cname(ALIAS, 5, "httpbin.org"), address("httpbin.org", 5, V4)]);
    let nxdomain_hold = Duration::from_millis(400);
    let dns = config::Dns { nxdomain_hold, ..settings(vec![server.address()]) };
    let mut subscription = with(dns).watch(question());
    until(&mut subscription, |state| state.current.is_some()).await;
    server.remove(ALIAS);
    let state = until(&mut subscription, |state| state.error.is_some()).await;
    assert!(state.current.is_some());
    let since = state.stale_since.unwrap();
    until(&mut subscription, |state| state.current.is_none()).await;
    assert!(since.elapsed() >= nxdomain_hold);
}

#[tokio::test]
async fn a_refused_change_is_shown_and_not_followed() {
    let server = server().await;
    server.zone([cname(ALIAS, 5, "api.good.example"), address("api.good.example", 5, V4)]);
    let allow = vec![NamePattern("*.good.example".into())];
    let mut subscription = resolver(&server).watch(Question { allow, ..question() });
    until(&mut subscription, |state| state.current.is_some()).await;
    server.zone([cname(ALIAS, 5, "evil.example"), address("evil.example", 5, V4)]);
    let state = until(&mut subscription, |state| state.refused.is_some()).await;
    assert_eq!(true_name(&state), Some("api.good.example"));
    server.zone([cname(ALIAS, 5, "api.good.example")]);
    until(&mut subscription, |state| state.refused.is_none() && state.error.is_none()).await;
}

#[tokio::test]
async fn a_refresh_may_be_asked_for() {
    let server = server().await;
    server.zone([cname(ALIAS, 5, "old.example"), address("old.example", 5, V4)]);
    let hour = Duration::from_secs(3600);
    let dns = config::Dns { min_ttl: hour, max_ttl: hour, ..settings(vec![server.address()]) };
    let mut subscription = with(dns).watch(question());
    until(&mut subscription, |state| state.current.is_some()).await;
    server.zone([cname(ALIAS, 5, "new.example"), address("new.example", 5, V4)]);
    subscription.refresh();
    until(&mut subscription, |state| true_name(state) == Some("new.example")).await;
}

#[tokio::test]
async fn lookups_are_counted_by_result() {
    let recorder = metrics_exporter_prometheus::PrometheusBuilder::new().build_recorder();
    let handle = recorder.handle();
    // The runtime of a test is this very thread.
    let _guard = metrics::set_default_local_recorder(&recorder);
    let server = server().await;
    server.zone([cname(ALIAS, 5, "a.example"), address("a.example", 5, V4)]);
    let mut subscription = resolver(&server).watch(question());
    until(&mut subscription, |state| true_name(state) == Some("a.example")).await;
    server.respond(ALIAS, DnsResponse::ServFail);
    until(&mut subscription, |state| state.error.is_some()).await;
    let text = handle.render();
    for line in [
        r#"truename_dns_lookups_total{result="ok"}"#,
        r#"truename_dns_lookups_total{result="servfail"}"#,
        r#"truename_dns_lookup_duration_seconds"#,
    ] {
        assert!(text.contains(line), "{line} is not in:\n{text}");
    }
}

#[tokio::test]
async fn the_task_ends_with_its_last_subscription() {
    let server = server().await;
    server.zone([cname(ALIAS, 5, "httpbin.org"), address("httpbin.org", 5, V4)]);
    let resolver = resolver(&server);
    let mut subscription = resolver.watch(question());
    until(&mut subscription, |state| state.current.is_some()).await;
    drop(subscription);
    // The task holds the only other copy.
    timeout(DEADLINE, async {
        while Arc::strong_count(&resolver) > 1 {
            tokio::task::yield_now().await;
        }
    })
    .await
    .expect("the task is still running");
}

#[tokio::test]
async fn aliases_of_one_name_share_the_query_in_flight() {
    let server = server().await;
    server.zone([cname(ALIAS, 5, "httpbin.org"), address("httpbin.org", 5, V4)]);
    // Nothing is needed from resolv.conf, so both query at once.
    let resolver = with(config::Dns {
        namespace: Some("default".into()),
        cluster_domain: Some("cluster.local".into()),
        ..settings(vec![server.address()])
    });
    let question = question();
    tokio::join!(resolver.resolve(&question), resolver.resolve(&question));
    assert_eq!(server.queries(ALIAS, RecordType::A), 1);
}

/// Regression: lookups for clients of a forward proxy used up the limit, and aliases had to wait.
#[tokio::test]
async fn clients_names_without_a_dns_response_keep_no_alias_waiting() {
    let server = server().await;
    server.zone([cname(ALIAS, 5, "httpbin.org"), address("httpbin.org", 5, V4)]);
    let names: Vec<_> = (0..300).map(|n| format!("n{n}.example")).collect();
    names.iter().for_each(|name| server.respond(name, DnsResponse::Silence));
    let client = lookup::DnsClient::new(&[server.address()]);
    let for_clients = names.iter().map(|name| client.both(name, error::Place::Client));
    tokio::select! {
        biased;
        _ = futures_util::future::join_all(for_clients) => panic!("the alias waits for them"),
        round = client.both(ALIAS, error::Place::Service) => assert!(round.v4.is_ok(), "{round:?}"),
    }
}
