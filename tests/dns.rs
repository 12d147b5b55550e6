//! DNS at its worst, with the whole proxy before it: dead servers, answers that flap, addresses
//! that change with every response, names at the limits of what is a name.

use std::{
    fs,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use crate::support::{
    client, loopback,
    proxy::{Proxy, Setup},
    raw_origin::RawOrigin,
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts, trust, within,
};
use http::Request;
use http_body_util::BodyExt;
use tokio::{net::UdpSocket, task::JoinSet};
use truename::{
    Client,
    config::{self, Config},
    demo::dns::{self, DnsResponse, DnsServer, RecordType},
    resolve::{ResolvConf, Resolver},
};

const GET: &str = "GET / HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n";

#[tokio::test]
async fn a_dead_server_ahead_of_a_good_one_fails_no_request() {
    // One says nothing, at the other nobody listens.
    let silent = UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let gone = UdpSocket::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    for dead in [silent.local_addr().unwrap(), gone] {
        let mut scene = Scene::new(1).await;
        let _origins = scene.script(scripts::respond);
        let servers = format!("servers: [\"{dead}\", ");
        let proxy = Proxy::start(&scene.restless_yaml("").replace("servers: [", &servers)).await;
        let address = proxy.address(ALIAS).await;
        assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);

        // A change is seen all the same.
        scene.dns.zone([dns::cname(ALIAS_IN_DNS, 0, "nowhere.example")]);
        scene.dns.zone([dns::address("nowhere.example", 0, scene.addresses[0])]);
        proxy.logged("nowhere.example").await;
    }
}

#[tokio::test]
async fn a_server_that_dies_while_it_runs_is_followed_by_the_next() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let second = DnsServer::start(([127, 0, 0, 1], 0).into()).await.unwrap();
    second.zone([dns::cname(ALIAS_IN_DNS, 0, "second.example")]);
    second.zone([dns::address("second.example", 0, scene.addresses[0])]);
    let servers = format!("\", \"{}\"], cluster", second.address());
    let yaml = scene.restless_yaml("").replace("\"], cluster", &servers);
    let proxy = Proxy::start(&yaml).await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    assert_eq!(second.queries(ALIAS_IN_DNS, RecordType::A), 0, "asked out of turn");

    scene.dns.respond(ALIAS_IN_DNS, DnsResponse::Silence);
    within("the second server to be asked", second.wait_for_queries(ALIAS_IN_DNS, 2)).await;
    proxy.logged("second.example").await;
}

#[tokio::test]
async fn a_proxy_that_starts_before_dns_serves_as_soon_as_there_is_one() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let address = SocketAddr::new(loopback::address(), scene.dns.address().port());
    let yaml = scene.yaml("").replace(&scene.dns.address().to_string(), &address.to_string());
    let proxy = Proxy::start(&yaml).await;
    let listener = proxy.address(ALIAS).await;
    let response = client::get(listener, ALIAS, "/").await;
    assert!([503, 504].contains(&response.status()), "{}", response.text());
    assert_eq!(response.json()["stage"], "resolve");

    // As CoreDNS does: refused connections at first, then SERVFAIL until it has seen the cluster.
    let dns = DnsServer::start(address).await.unwrap();
    dns.respond(ALIAS_IN_DNS, DnsResponse::ServFail);
    within("a question", dns.wait_for_queries(ALIAS_IN_DNS, 2)).await;
    dns.zone([dns::cname(ALIAS_IN_DNS, 60, TRUE_NAME)]);
    dns.zone([dns::address(TRUE_NAME, 60, scene.addresses[0])]);
    dns.restore(ALIAS_IN_DNS);
    within("a response", async {
        while client::get(listener, ALIAS, "/").await.status() != 200 {}
    })
    .await;
}

/// Two servers at one port, as a line of resolv.conf has none.
async fn servers_at_one_port() -> [DnsServer; 2] {
    for _ in 0..16 {
        let first = DnsServer::start((loopback::address(), 0).into()).await.unwrap();
        let port = first.address().port();
        if let Ok(second) = DnsServer::start((loopback::address(), port).into()).await {
            return [first, second];
        }
    }
    panic!("no port is free at two addresses");
}

/// An origin for each name, at the scene's addresses, which says its name.
fn origins_called(scene: &mut Scene, names: [&'static str; 2]) -> [RawOrigin; 2] {
    let mut listeners = scene.take_listeners().into_iter();
    names.map(|name| {
        let tls = trust::server_with_alpn(&[name], &["http/1.1"]);
        RawOrigin::start(listeners.next().unwrap(), Some(tls), move |arrival| {
            scripts::always(arrival, scripts::ok(name))
        })
    })
}

#[tokio::test]
async fn the_servers_of_a_changed_resolv_conf_are_asked_without_a_restart() {
    const OTHER: &str = "other.example";
    let mut scene = Scene::new(2).await;
    let [old, new] = origins_called(&mut scene, [TRUE_NAME, OTHER]);
    let [first, second] = servers_at_one_port().await;
    for (server, name, ip) in
        [(&first, TRUE_NAME, scene.addresses[0]), (&second, OTHER, scene.addresses[1])]
    {
        server.zone([dns::cname(ALIAS_IN_DNS, 0, name), dns::address(name, 0, ip)]);
    }

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("resolv.conf");
    // By rename, as the kubelet writes it.
    let name_server = |server: &DnsServer| {
        let fresh = folder.path().join("fresh");
        fs::write(&fresh, format!("nameserver {}\n", server.address().ip())).unwrap();
        fs::rename(fresh, &path).unwrap();
    };
    name_server(&first);
    let root = folder.path().join("root.pem");
    fs::write(&root, trust::authority().root_pem()).unwrap();
    let yaml = scene.restless_yaml("").replace("$FOLDER", folder.path().to_str().unwrap());
    let config = Config::parse(&yaml, "the test").unwrap();
    let dns = config::Dns { servers: Vec::new(), ..config.dns.clone() };
    let resolv_conf = ResolvConf { path: path.clone(), port: first.address().port() };
    let resolver = Resolver::with_resolv_conf(dns, resolv_conf);
    let client = Client::with_resolver(&config, &resolver).unwrap();
    let get = async || {
        let response = client.send(Request::get("/").body(String::new()).unwrap()).await;
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        let text = String::from_utf8(body.to_vec()).unwrap();
        assert_eq!(status, 200, "{text}");
        text
    };

    assert_eq!(get().await, TRUE_NAME);
    drop(first);
    assert_eq!(get().await, TRUE_NAME, "the last good answer");
    assert_eq!(second.queries(ALIAS_IN_DNS, RecordType::A), 0, "nobody has named it yet");
    name_server(&second);
    within("a response from where the new server leads", async { while get().await != OTHER {} })
        .await;
    old.assert_called(TRUE_NAME, &scene.authority(TRUE_NAME));
    new.assert_called(OTHER, &scene.authority(OTHER));
}

/// Regression: an emptied file sent requests of `prod` to the alias of the same name in `default`.
/// Regression: DNS followed, but the alias still had its names in the old namespace.
#[tokio::test]
async fn an_alias_answers_to_its_names_in_the_namespace_that_resolv_conf_comes_to_say() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let other = "webscaler-manual.prod.svc.cluster.local";
    scene.dns.zone([dns::cname(ALIAS_IN_DNS, 0, TRUE_NAME), dns::cname(other, 0, TRUE_NAME)]);
    let proxy = following_resolv_conf(&scene, "").await;
    let address = proxy.address(ALIAS).await;
    let [old, new] = ["webscaler-manual.default", "webscaler-manual.prod"];
    assert_eq!(client::get(address, old, "/").await.status(), 200);
    assert_eq!(client::get(address, new, "/").await.status(), 404);

    let resolv_conf = proxy.folder().join("resolv.conf");
    std::fs::write(resolv_conf, "search prod.svc.cluster.local\n").unwrap();
    within("the names of the other namespace", async {
        while client::get(address, new, "/").await.status() != 200 {}
    })
    .await;
    assert_eq!(client::get(address, old, "/").await.status(), 404);
}

/// Regression: it was tried once.
#[tokio::test]
async fn an_alias_whose_new_certificates_cannot_be_written_gets_its_new_names_later() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let other = "webscaler-manual.prod.svc.cluster.local";
    scene.dns.zone([dns::cname(other, 0, TRUE_NAME)]);
    let proxy = following_resolv_conf(&scene, "ca: {directory: \"$FOLDER/ca\"}\n").await;
    let address = proxy.address(ALIAS).await;
    let [folder, aside] = ["ca", "aside"].map(|name| proxy.folder().join(name));
    fs::rename(&folder, &aside).unwrap();
    fs::write(&folder, "no folder").unwrap();
    let resolv_conf = proxy.folder().join("resolv.conf");
    fs::write(resolv_conf, "search prod.svc.cluster.local\n").unwrap();
    proxy.logged("cannot rename the aliases").await;
    fs::remove_file(&folder).unwrap();
    fs::rename(&aside, &folder).unwrap();
    within("the names of the other namespace", async {
        while client::get(address, "webscaler-manual.prod", "/").await.status() != 200 {}
    })
    .await;
}

#[tokio::test]
async fn a_resolv_conf_that_is_emptied_leads_no_request_into_another_namespace() {
    const OTHER: &str = "default.example";
    let mut scene = Scene::new(2).await;
    let [own, others] = origins_called(&mut scene, [TRUE_NAME, OTHER]);
    let in_prod = "webscaler-manual.prod.svc.cluster.local";
    scene.dns.zone([dns::cname(in_prod, 0, TRUE_NAME), dns::cname(ALIAS_IN_DNS, 0, OTHER)]);
    scene.dns.zone([dns::address(OTHER, 0, scene.addresses[1])]);
    scene.dns.remove(TRUE_NAME);
    scene.dns.zone([dns::address(TRUE_NAME, 0, scene.addresses[0])]);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("resolv.conf");
    let search = "search prod.svc.cluster.local svc.cluster.local cluster.local\n";
    fs::write(&path, search).unwrap();
    let root = folder.path().join("root.pem");
    fs::write(&root, trust::authority().root_pem()).unwrap();
    let yaml = scene.restless_yaml("").replace("$FOLDER", folder.path().to_str().unwrap());
    let config = Config::parse(&yaml, "the test").unwrap();
    let dns = config::Dns { namespace: None, cluster_domain: None, ..config.dns.clone() };
    let resolv_conf = ResolvConf { path: path.clone(), port: 53 };
    let resolver = Resolver::with_resolv_conf(dns, resolv_conf);
    let client = Client::with_resolver(&config, &resolver).unwrap();
    let get = async || {
        let response = client.send(Request::get("/").body(String::new()).unwrap()).await;
        let body = response.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(body.to_vec()).unwrap()
    };
    assert_eq!(get().await, TRUE_NAME);

    let asked = || [RecordType::A, RecordType::AAAA].map(|kind| scene.dns.queries(in_prod, kind));
    for text in ["", "nameserver 192.0.2.1\n", "search example.com\n", "search prod"] {
        fs::write(&path, text).unwrap();
        let before: usize = asked().iter().sum();
        within("two rounds", scene.dns.wait_for_queries(in_prod, before + 4)).await;
        assert_eq!(get().await, TRUE_NAME, "{text:?}");
    }
    fs::remove_file(&path).unwrap();
    let before: usize = asked().iter().sum();
    within("two rounds", scene.dns.wait_for_queries(in_prod, before + 4)).await;
    assert_eq!(get().await, TRUE_NAME);
    assert_eq!(scene.dns.queries(ALIAS_IN_DNS, RecordType::A), 0);

    // What says something else is followed.
    fs::write(&path, search.replace("prod", "default")).unwrap();
    within("the other namespace", async { while get().await != OTHER {} }).await;
    own.assert_called(TRUE_NAME, &scene.authority(TRUE_NAME));
    others.assert_called(OTHER, &scene.authority(OTHER));
}

#[tokio::test]
async fn a_name_that_flaps_ends_where_dns_ends() {
    const OTHER: &str = "other.example";
    let mut scene = Scene::new(2).await;
    let [old, new] = origins_called(&mut scene, [TRUE_NAME, OTHER]);
    scene.dns.zone([dns::address(TRUE_NAME, 0, scene.addresses[0])]);
    scene.dns.zone([dns::address(OTHER, 0, scene.addresses[1])]);
    let proxy = Proxy::start(&scene.restless_yaml("")).await;
    let address = proxy.address(ALIAS).await;

    assert_eq!(client::get(address, ALIAS, "/").await.text(), TRUE_NAME);

    // Requests all the while; none may fail, or reach one origin by the other's name.
    let over = Arc::new(AtomicBool::new(false));
    let load = tokio::spawn({
        let over = over.clone();
        async move {
            let mut peer = client::connect(address).await;
            while !over.load(Ordering::Relaxed) {
                peer.send(GET).await;
                let response = peer.response().await;
                assert_eq!(response.status(), 200, "{}", response.text());
            }
        }
    });
    for name in [OTHER, TRUE_NAME, OTHER, TRUE_NAME, OTHER] {
        scene.dns.zone([dns::cname(ALIAS_IN_DNS, 0, name)]);
        within(name, async {
            while proxy.status().await["aliases"][0]["targets"][0]["true_name"] != name {}
        })
        .await;
    }
    over.store(true, Ordering::Relaxed);
    load.await.unwrap();
    within("a response from where DNS ended", async {
        while client::get(address, ALIAS, "/").await.text() != OTHER {}
    })
    .await;
    let before = old.seen().requests.len();
    for _ in 0..20 {
        assert_eq!(client::get(address, ALIAS, "/").await.text(), OTHER);
    }
    assert_eq!(old.seen().requests.len(), before);
    old.assert_called(TRUE_NAME, &scene.authority(TRUE_NAME));
    new.assert_called(OTHER, &scene.authority(OTHER));
    let changes = "truename_true_name_changes_total{alias=\"webscaler-manual\"}";
    assert_eq!(proxy.metric(changes).await, Some(5.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_that_change_with_every_dns_response_fail_no_request_and_pile_up_no_connections()
{
    const SHOWN: usize = 8;
    const CLIENTS: usize = 4;
    const RESPONSES: usize = 12;
    let mut scene = Scene::new(100).await;
    let origins = scene.script(scripts::respond);
    let show = |first: usize| {
        let shown = (first * SHOWN..).take(SHOWN).map(|n| scene.addresses[n % 100]);
        scene.dns.zone(shown.map(|ip| dns::address(TRUE_NAME, 0, ip)));
    };
    show(0);
    let proxy = Proxy::start(&scene.restless_yaml("")).await;
    let address = proxy.address(ALIAS).await;

    let over = Arc::new(AtomicBool::new(false));
    let served = Arc::new(AtomicUsize::new(0));
    let mut load = JoinSet::new();
    for _ in 0..CLIENTS {
        let (over, served) = (over.clone(), served.clone());
        load.spawn(async move {
            let mut peer = client::connect(address).await;
            while !over.load(Ordering::Relaxed) {
                peer.send(GET).await;
                let response = peer.response().await;
                assert_eq!(response.status(), 200, "{}", response.text());
                served.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    for response in 1..=RESPONSES {
        show(response);
        let asked = scene.dns.queries(TRUE_NAME, RecordType::A)
            + scene.dns.queries(ALIAS_IN_DNS, RecordType::A);
        within("the next question", async {
            while scene.dns.queries(TRUE_NAME, RecordType::A)
                + scene.dns.queries(ALIAS_IN_DNS, RecordType::A)
                == asked
            {
                tokio::task::yield_now().await;
            }
        })
        .await;
        // And until somebody was served by what it brought.
        let first = &origins[response * SHOWN % 100..];
        within("a request to the new addresses", async {
            while first.iter().take(SHOWN).all(|origin| origin.seen().connections == 0) {
                tokio::task::yield_now().await;
            }
        })
        .await;
    }
    over.store(true, Ordering::Relaxed);
    while let Some(client) = load.join_next().await {
        client.unwrap();
    }
    assert!(served.load(Ordering::Relaxed) > RESPONSES * CLIENTS);
    // What is open is to addresses of the last response, and no more than there were clients.
    within("connections to addresses that left to be closed", async {
        loop {
            let open = |origin: &RawOrigin| origin.seen().connections - origin.seen().ended;
            let total: usize = origins.iter().map(open).sum();
            let last = RESPONSES * SHOWN;
            let shown: usize = (last..last + SHOWN).map(|n| open(&origins[n % 100])).sum();
            if total == shown {
                assert!(total <= SHOWN * CLIENTS, "{total} connections");
                return;
            }
            client::get(proxy.admin().await, "localhost", "/livez").await;
        }
    })
    .await;
    let most = origins.iter().map(|origin| origin.seen().connections).max().unwrap();
    assert!(most <= 2 * CLIENTS, "{most} connections to one address");
}

#[tokio::test]
async fn dns_is_asked_once_a_ttl_however_many_workers_and_requests() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let proxy = Proxy::start(&format!("workers: 4\n{}", scene.yaml(""))).await;
    let address = proxy.address(ALIAS).await;
    for _ in 0..40 {
        assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    }
    for kind in [RecordType::A, RecordType::AAAA] {
        assert_eq!(scene.dns.queries(ALIAS_IN_DNS, kind), 1, "{kind}");
        assert!(scene.dns.queries(TRUE_NAME, kind) <= 1, "{kind}");
    }
}

#[tokio::test]
async fn the_shortest_ttl_of_the_chain_rules() {
    // The alias' own, an address', and all of them, as a cache in front of CoreDNS writes them.
    for (of_alias, of_addresses) in [(1, 86_400), (86_400, 1), (1, 1)] {
        let mut scene = Scene::new(1).await;
        let _origins = scene.script(scripts::respond);
        scene.dns.zone([dns::cname(ALIAS_IN_DNS, of_alias, TRUE_NAME)]);
        scene.dns.zone([dns::address(TRUE_NAME, of_addresses, scene.addresses[0])]);
        scene.dns.zone([dns::address("next.example", 60, scene.addresses[0])]);
        let dns = "namespace: default, min_ttl: 250ms";
        let proxy = Proxy::start(&scene.yaml("").replace("namespace: default", dns)).await;
        proxy.logged(TRUE_NAME).await;
        // By the longer TTL, even at `max_ttl`, nobody would look for a minute.
        scene.dns.zone([dns::cname(ALIAS_IN_DNS, 60, "next.example")]);
        proxy.logged("next.example").await;
    }
}

/// Regression: it was seen after the TTL, up to half a minute later.
#[tokio::test]
async fn a_service_that_was_patched_is_seen_though_a_cache_shows_a_ttl_of_thirty_seconds() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    scene.dns.zone([dns::cname(ALIAS_IN_DNS, 30, TRUE_NAME)]);
    scene.dns.zone([dns::address("next.example", 30, scene.addresses[0])]);
    let proxy = Proxy::start(&scene.yaml("").replace(", cluster_max_ttl: 1m", "")).await;
    proxy.logged(TRUE_NAME).await;
    scene.dns.zone([dns::cname(ALIAS_IN_DNS, 30, "next.example")]);
    proxy.logged("next.example").await;
}

/// Regression: DNS was asked ever later, up to every five seconds, however many requests failed.
#[tokio::test]
async fn while_requests_fail_dns_is_asked_about_every_second() {
    let scene = Scene::new(1).await;
    scene.dns.remove(ALIAS_IN_DNS);
    let proxy = Proxy::start(&scene.yaml("")).await;
    let address = proxy.address(ALIAS).await;
    within("twelve questions", async {
        while scene.dns.queries(ALIAS_IN_DNS, RecordType::A) < 12 {
            assert_eq!(client::get(address, ALIAS, "/").await.status(), 503);
        }
    })
    .await;
}

#[tokio::test]
async fn sixty_addresses_that_fit_into_no_datagram_are_all_endpoints() {
    let mut scene = Scene::new(60).await;
    let _origins = scene.script(scripts::respond);
    let addresses = scene.addresses.iter().map(|ip| dns::address(TRUE_NAME, 60, *ip));
    let records = std::iter::once(dns::cname(ALIAS_IN_DNS, 60, TRUE_NAME)).chain(addresses);
    scene.dns.respond_to_type(
        ALIAS_IN_DNS,
        RecordType::A,
        DnsResponse::Truncated(records.collect()),
    );
    let proxy = Proxy::start(&scene.yaml("")).await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 200);
    let endpoints = proxy.status().await["aliases"][0]["endpoints"].as_array().unwrap().len();
    assert_eq!(endpoints, 60);
    assert_eq!(scene.dns.queries(ALIAS_IN_DNS, RecordType::A), 2, "by UDP, then by TCP");
    assert_eq!(scene.dns.queries(TRUE_NAME, RecordType::A), 0, "the CNAME left was the response");
}

/// An origin that proves `name`, where DNS leads by whatever spelling of it, and the proxy.
async fn leads_to(spelling: &str, name: &'static str, keys: &str) -> (RawOrigin, Proxy, Scene) {
    let mut scene = Scene::new(1).await;
    let tls = trust::server_with_alpn(&[name], &["http/1.1"]);
    let listener = scene.take_listeners().remove(0);
    let origin = RawOrigin::start(listener, Some(tls), scripts::respond);
    scene.dns.zone([dns::cname(ALIAS_IN_DNS, 60, spelling)]);
    scene.dns.zone([dns::address(name, 60, scene.addresses[0])]);
    let proxy = Proxy::start(&scene.yaml(keys)).await;
    (origin, proxy, scene)
}

#[tokio::test]
async fn every_spelling_of_a_name_is_one_name_on_the_wire() {
    for (spelling, name, keys) in [
        ("HTTPBIN.Org", "httpbin.org", ""),
        ("httpbin.org.", "httpbin.org", ""),
        ("", "httpbin.org", "target: HTTPBIN.org."),
        ("", "xn--bcher-kva.example", "target: bücher.example"),
        ("", "xn--bcher-kva.example", "target: BÜCHER.example."),
        ("xn--bcher-kva.example", "xn--bcher-kva.example", ""),
        ("my_service.example", "my_service.example", ""),
    ] {
        let spelling = if spelling.is_empty() { name } else { spelling };
        let (origin, proxy, scene) = leads_to(spelling, name, keys).await;
        let response = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
        assert_eq!(response.status(), 200, "{spelling} {keys}: {}", response.text());
        origin.assert_called(name, &scene.authority(name));
    }
}

#[tokio::test]
async fn the_longest_name_there_is_works_and_a_longer_one_is_explained() {
    // 253 characters, of labels of 63 and less.
    let label = "a".repeat(63);
    let longest = format!("{label}.{label}.{label}.{}.example", "b".repeat(53));
    assert_eq!(longest.len(), 253);
    let longest: &'static str = longest.leak();
    let (origin, proxy, scene) = leads_to(longest, longest, "").await;
    let response = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    assert_eq!(response.status(), 200, "{}", response.text());
    origin.assert_called(longest, &scene.authority(longest));

    // CoreDNS does not respond at all for an `externalName` that no DNS message can hold.
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    scene.dns.zone([dns::cname(ALIAS_IN_DNS, 60, &format!("{}.example", "a".repeat(64)))]);
    let proxy = Proxy::start(&scene.yaml("timeouts: {connect: 1s}")).await;
    let response = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    assert!([503, 504].contains(&response.status()), "{}", response.text());
    let problem = response.json();
    assert_eq!(problem["stage"], "resolve", "{problem}");
    assert!(!problem["fix"].as_str().unwrap().is_empty(), "{problem}");
}

#[tokio::test]
async fn a_target_that_is_no_name_is_told_before_anything_starts() {
    let scene = Scene::new(1).await;
    for target in [format!("{}.example", "a".repeat(64)), "a..b".to_owned(), "a b".to_owned()] {
        let yaml = scene.yaml(&format!("target: \"{target}\""));
        let proxy = crate::support::proxy::Setup::new(&yaml).spawn();
        let status = proxy.exit().await;
        assert_eq!(status.code(), Some(2), "{target}: {}", proxy.log());
        assert!(proxy.log().contains("target"), "{}", proxy.log());
    }
}

#[tokio::test]
async fn the_alias_is_found_by_any_case_port_and_dot_and_by_nothing_longer() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let proxy = Proxy::start(&scene.yaml("")).await;
    let address: SocketAddr = proxy.address(ALIAS).await;
    for host in [
        "WebScaler-Manual",
        "webscaler-manual.",
        "webscaler-manual.default.SVC.",
        "webscaler-manual:99",
    ] {
        assert_eq!(client::get(address, host, "/").await.status(), 200, "{host}");
    }
    let long = format!("{}.example", "a".repeat(64));
    let longer = "a.".repeat(1000) + "example";
    for host in ["webscaler-manual..", "webscaler_manual", ".webscaler-manual", &*long, &*longer] {
        let status = client::get(address, host, "/").await.status();
        assert!([400, 404].contains(&status), "{host}: {status}");
    }
}

/// A proxy with a view of /etc of its own, whose resolv.conf is in its folder. `keys` are of the file's top level.
async fn following_resolv_conf(scene: &Scene, keys: &str) -> Proxy {
    let yaml = scene.restless_yaml("").replace("namespace: default, ", "");
    let yaml = yaml.replace("cluster_domain: cluster.local, ", "") + keys;
    let setup = Setup::new(&yaml).file("resolv.conf", "search default.svc.cluster.local\n").shell(
        "exec unshare -rm sh -c 'mount --bind resolv.conf /etc/resolv.conf; exec \"$0\" \"$@\"' \
         \"$0\" \"$@\"; ",
    );
    setup.start().await
}
