//! Where an alias leads: seen from both ends of the proxy.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    sync::Arc,
};

use crate::support::{
    client, loopback,
    proxy::{Proxy, Setup},
    raw_origin::RawOrigin,
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts, trust, within,
};
use rustls::ServerConfig;
use serde_json::json;
use truename::demo::{
    authority::LeafOptions,
    dns::{self, DnsResponse, RecordType},
};

const OTHER: &str = "other.example";

#[tokio::test]
async fn the_true_name_is_the_first_outside_the_cluster_and_no_later_one() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::respond);
    let middle = "middle.default.svc.cluster.local";
    scene.dns.zone([
        dns::cname(ALIAS_IN_DNS, 60, middle),
        dns::cname(middle, 60, "HTTPBIN.org"),
        dns::cname(TRUE_NAME, 60, "edge.cdn.example"),
        dns::address("edge.cdn.example", 60, scene.addresses[0]),
    ]);
    let proxy = Proxy::start(&scene.yaml("")).await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 200);
    origins[0].assert_called(TRUE_NAME, &scene.authority(TRUE_NAME));
    let status = proxy.status().await;
    let chain = json!([ALIAS_IN_DNS, middle, TRUE_NAME, "edge.cdn.example"]);
    assert_eq!(status["aliases"][0]["targets"][0]["chain"], chain);
}

#[tokio::test]
async fn chain_match_takes_a_later_name_of_the_chain() {
    let mut scene = Scene::new(1).await;
    let origin = serve(&mut scene, &["db.rds.example"], "ok");
    scene.dns.zone([
        dns::cname(TRUE_NAME, 60, "db.rds.example"),
        dns::cname("db.rds.example", 60, "ec2.example"),
        dns::address("ec2.example", 60, scene.addresses[0]),
    ]);
    let proxy = Proxy::start(&scene.yaml(&tls("chain_match: [\"*.rds.example\"]"))).await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 200);
    origin.assert_called("db.rds.example", &scene.authority("db.rds.example"));
}

#[tokio::test]
async fn server_name_is_sni_and_verified_name_and_host_together() {
    let mut scene = Scene::new(1).await;
    let origin = serve(&mut scene, &[OTHER], "ok");
    let proxy = Proxy::start(&scene.yaml(&tls(&format!("server_name: {OTHER}")))).await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 200);
    origin.assert_called(OTHER, &scene.authority(OTHER));
}

#[tokio::test]
async fn a_true_name_that_no_certificate_can_be_valid_for_is_a_tls_error() {
    let mut scene = Scene::new(1).await;
    let origin = serve(&mut scene, &[TRUE_NAME], "ok");
    let proxy = Proxy::start(&scene.restless_yaml("")).await;
    let address = proxy.address(ALIAS).await;
    let until = |status: u16| {
        within("the alias to move", async move {
            loop {
                let response = client::get(address, ALIAS, "/").await;
                if response.status() == status {
                    return response;
                }
            }
        })
    };
    until(200).await;
    scene.dns.remove(ALIAS_IN_DNS);
    scene.dns.zone([
        dns::cname(ALIAS_IN_DNS, 60, "web-.example.com"),
        dns::address("web-.example.com", 60, scene.addresses[0]),
    ]);
    let response = until(502).await;
    let proxy_status = response.field("proxy-status").unwrap();
    assert!(proxy_status.contains("error=tls_certificate_error"), "{proxy_status}");
    let problem = response.json();
    assert_eq!(problem["stage"], "tls");
    let told = problem["detail"].as_str().unwrap();
    assert!(told.contains("no certificate can be valid for `web-.example.com`"), "{problem}");
    assert!(problem["fix"].as_str().unwrap().contains("tls.server_name"), "{problem}");
    assert_eq!(problem["chain"], json!([ALIAS_IN_DNS, "web-.example.com"]));
    let requests = origin.seen().requests.len();

    scene.dns.remove(ALIAS_IN_DNS);
    scene.dns.zone([dns::cname(ALIAS_IN_DNS, 60, TRUE_NAME)]);
    until(200).await;
    assert!(origin.seen().requests.len() > requests);
}

#[tokio::test]
async fn a_chain_that_stays_in_the_cluster_has_no_true_name() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    scene.dns.zone([dns::address(ALIAS_IN_DNS, 60, scene.addresses[0])]);
    let proxy = Proxy::start(&scene.yaml("")).await;
    let response = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    assert_eq!(response.status(), 503);
    let fix = response.json()["fix"].as_str().unwrap().to_owned();
    assert!(fix.contains("server_name") && fix.contains("plaintext"), "{fix}");
}

#[tokio::test]
async fn a_chain_that_loops_is_shown() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let ring =
        [dns::cname(ALIAS_IN_DNS, 60, "a.example"), dns::cname("a.example", 60, ALIAS_IN_DNS)];
    scene.dns.respond(ALIAS_IN_DNS, DnsResponse::Records(ring.to_vec()));
    let proxy = Proxy::start(&scene.yaml("")).await;
    let response = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    assert_eq!((response.status(), &response.json()["stage"]), (503, &json!("resolve")));
    let detail = response.json()["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains(&format!("{ALIAS_IN_DNS} → a.example → {ALIAS_IN_DNS}")), "{detail}");
}

#[tokio::test]
async fn a_configured_target_may_be_a_name_or_an_address_each_with_or_without_port() {
    for with_port in [false, true] {
        let mut scene = Scene::new(1).await;
        let (ip, port) = (scene.addresses[0], scene.port);
        let leaf = trust::authority().issue(&[OTHER], &[ip], LeafOptions::default()).unwrap();
        let origin = serve_as(&mut scene, leaf.server_config(&["http/1.1"]).unwrap(), "ok");
        scene.dns.zone([dns::address(OTHER, 60, ip)]);
        // Without a port it is the alias' own.
        let target = |host: &str| match with_port {
            true => format!("port: 1\ntarget: \"{host}:{port}\""),
            false => format!("target: \"{host}\""),
        };
        let yaml = |target: &str| {
            let yaml = scene.yaml(target);
            match with_port {
                true => yaml.replacen(&format!("    port: {port}\n"), "", 1),
                false => yaml,
            }
        };

        let proxy = Proxy::start(&yaml(&target(OTHER))).await;
        assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.text(), "ok");
        origin.assert_called(OTHER, &scene.authority(OTHER));
        let proxy = Proxy::start(&yaml(&target(&ip.to_string()))).await;
        assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.text(), "ok");
        let seen = origin.seen();
        assert_eq!(seen.server_names[1], None, "an address is no SNI (RFC 6066)");
        assert_eq!(seen.requests[1].field("host"), Some(&*format!("{ip}:{port}")));
        assert_eq!(
            scene.dns.queries(ALIAS_IN_DNS, RecordType::A),
            0,
            "DNS was asked for the alias"
        );
    }
}

#[tokio::test]
async fn a_true_name_that_is_not_allowed_is_refused_from_the_start() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::respond);
    let proxy = Proxy::start(&scene.yaml("allow: [\"*.example.com\"]")).await;
    let response = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    assert_eq!(response.status(), 403);
    let problem = response.json();
    assert_eq!(problem["type"], "urn:truename:error:http_request_denied");
    assert_eq!(problem["stage"], "policy");
    assert_eq!(problem["chain"], json!([ALIAS_IN_DNS, TRUE_NAME]));
    assert!(problem["fix"].as_str().unwrap().contains("add \"httpbin.org\" to `allow`"));
    assert_eq!(origins[0].seen().connections, 0);
}

#[tokio::test]
async fn neither_the_hosts_file_nor_a_search_list_is_asked() {
    let mut scene = Scene::new(1).await;
    let origin = serve(&mut scene, &["localhost"], "ok");
    let hosts = std::fs::read_to_string("/etc/hosts").unwrap();
    assert!(hosts.contains("localhost"), "this machine's hosts file has nothing to lead astray");
    scene.dns.zone([dns::address("localhost", 60, scene.addresses[0])]);
    let proxy = Proxy::start(&scene.yaml("target: localhost")).await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 200);
    origin.assert_called("localhost", &scene.authority("localhost"));

    let proxy = Proxy::start(&scene.yaml("target: nowhere")).await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 503);
    assert!(scene.dns.queries("nowhere", RecordType::A) > 0);
    for longer in ["nowhere.default.svc.cluster.local", "nowhere.svc.cluster.local"] {
        assert_eq!(scene.dns.queries(longer, RecordType::A), 0, "{longer}");
    }
}

#[tokio::test]
async fn an_alias_that_leads_to_the_proxy_itself_is_a_loop_not_a_storm() {
    let own = loopback::listen_anywhere().local_addr().unwrap();
    let scene = Scene::new(1).await;
    scene.dns.zone([dns::address("loop.example", 60, own.ip())]);
    let yaml = |keys: &str| {
        let yaml = scene.yaml(keys).replace("127.0.0.1:0", &own.to_string());
        yaml.replace(&format!("port: {}", scene.port), &format!("port: {}", own.port()))
    };
    // Written out, it is refused before anything is bound.
    let proxy = Setup::new(&yaml(&format!("target: \"{own}\""))).spawn();
    assert_eq!(proxy.exit().await.code(), Some(2));
    assert!(proxy.log().contains("requests would loop"), "{}", proxy.log());

    // `scene.yaml` allows all of 127.0.0.0/8: that is not meant for the proxy itself.
    let proxy = Proxy::start(&yaml("target: loop.example")).await;
    let response = client::get(own, ALIAS, "/").await;
    assert_eq!(response.status(), 508, "{}", response.text());
    let problem = response.json();
    assert_eq!(problem["type"], "urn:truename:error:proxy_loop_detected");
    assert_eq!(problem["endpoint"], own.to_string());
    let total = "truename_downstream_connections_total{alias=\"webscaler-manual\",\
                 protocol=\"http/1.1\",tls=\"false\"}";
    assert_eq!(proxy.metric(total).await, Some(1.0), "it called itself");
}

#[tokio::test]
async fn the_proxy_is_known_behind_two_names_another_alias_and_a_mapped_address() {
    let [own, others] = [(); 2].map(|()| loopback::listen_anywhere().local_addr().unwrap());
    let scene = Scene::new(1).await;
    let IpAddr::V4(own_v4) = own.ip() else { panic!("{own}") };
    scene.dns.zone([
        dns::cname("loop.example", 60, "again.example"),
        dns::address("again.example", 60, own_v4),
        dns::address("mapped.example", 60, own_v4.to_ipv6_mapped()),
        dns::address("others.example", 60, others.ip()),
    ]);
    let mut yaml = scene.yaml(&format!("target: \"loop.example:{}\"", own.port()));
    yaml = yaml.replace("127.0.0.1:0", &own.to_string());
    for (name, listen, target) in [
        ("mapped", others, format!("mapped.example:{}", own.port())),
        ("third", own, format!("others.example:{}", others.port())),
    ] {
        yaml += &format!(
            "\n  - {{name: {name}, listen: [\"{listen}\"], target: \"{target}\", \
             tls: {{mode: plaintext}}}}"
        );
    }
    let proxy = Proxy::start(&yaml).await;
    for (listener, alias) in [(own, ALIAS), (others, "mapped"), (own, "third")] {
        let response = client::get(listener, alias, "/").await;
        assert_eq!(response.status(), 508, "{alias}: {}", response.text());
        let series = "truename_downstream_connections_total";
        let total = format!("{series}{{alias=\"{alias}\",protocol=\"http/1.1\",tls=\"false\"}}");
        assert_eq!(proxy.metric(&total).await, Some(1.0), "{alias}: it called itself");
    }
}

/// Which addresses a wildcard listener takes, only the kernel knows.
#[tokio::test]
async fn a_wildcard_listener_is_known_by_any_address_of_its_host() {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    // Nothing is sent: this asks for a route.
    if socket.connect("192.0.2.1:9").is_err() {
        eprintln!("this machine has no address but loopback: nothing to be known by");
        return;
    }
    let host = socket.local_addr().unwrap().ip();
    let own = TcpListener::bind("0.0.0.0:0").unwrap().local_addr().unwrap();
    let scene = Scene::new(1).await;
    scene.dns.zone([dns::address("loop.example", 60, host)]);
    let keys = format!("target: \"loop.example:{}\"\ntls: {{mode: plaintext}}", own.port());
    let yaml = scene.yaml(&keys).replace("127.0.0.1:0", &own.to_string());
    let _proxy = Proxy::start(&format!("allow_non_loopback: true\n{yaml}")).await;
    let at_loopback = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), own.port());
    let response = client::get(at_loopback, ALIAS, "/").await;
    assert_eq!(response.status(), 508, "{}", response.text());
    assert_eq!(response.json()["endpoint"], SocketAddr::new(host, own.port()).to_string());
}

#[tokio::test]
async fn chain_match_server_name_and_allow_go_together() {
    const MATCHED: &str = "db.rds.example";
    const MATCH: &str = "chain_match: [\"*.rds.example\"]";
    for (tls_keys, allow, leads_to) in [
        (MATCH.to_owned(), "\"*.rds.example\"", Some(MATCHED)),
        (MATCH.to_owned(), "\"*.example\"", Some(MATCHED)),
        // What was not chosen need not be allowed, and its being allowed does not help.
        (MATCH.to_owned(), "httpbin.org", None),
        (MATCH.to_owned(), "\"*.db.rds.example\"", None),
        (format!("{MATCH}, server_name: {OTHER}"), OTHER, Some(OTHER)),
        (format!("{MATCH}, server_name: {OTHER}"), "\"*.example\"", Some(OTHER)),
        ("chain_match: [\"*.nowhere.example\"]".to_owned(), "\"*.org\"", Some(TRUE_NAME)),
        ("chain_match: [\"*.nowhere.example\"]".to_owned(), "\"*.rds.example\"", None),
    ] {
        let mut scene = Scene::new(1).await;
        let origin = serve(&mut scene, &[TRUE_NAME, MATCHED, OTHER], "ok");
        scene.dns.zone([
            dns::cname(TRUE_NAME, 60, MATCHED),
            dns::address(MATCHED, 60, scene.addresses[0]),
        ]);
        let keys = format!("{}\nallow: [{allow}]", tls(&tls_keys));
        let proxy = Proxy::start(&scene.yaml(&keys)).await;
        let response = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
        match leads_to {
            Some(name) => {
                assert_eq!(response.status(), 200, "{keys}: {}", response.text());
                origin.assert_called(name, &scene.authority(name));
            }
            None => {
                assert_eq!(response.status(), 403, "{keys}: {}", response.text());
                assert_eq!(origin.seen().connections, 0, "{keys}");
            }
        }
    }
}

#[tokio::test]
async fn an_ipv4_mapped_address_is_dialled() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::respond);
    let IpAddr::V4(v4) = scene.addresses[0] else { panic!("not on 127.0.0.0/8") };
    scene.dns.remove(TRUE_NAME);
    scene.dns.zone([dns::address(TRUE_NAME, 60, v4.to_ipv6_mapped())]);
    let proxy = Proxy::start(&scene.yaml("")).await;
    assert_eq!(client::get(proxy.address(ALIAS).await, ALIAS, "/").await.status(), 200);
    origins[0].assert_called(TRUE_NAME, &scene.authority(TRUE_NAME));
}

#[tokio::test]
async fn no_form_of_a_denied_address_is_dialled() {
    for ip in [
        "169.254.169.254",
        "::ffff:169.254.169.254",
        "64:ff9b::169.254.169.254",
        "::169.254.0.1",
        "64:ff9b:1::169.254.169.254",
        "2002:a9fe:a9fe::1",
        "2001:db8::5efe:169.254.0.1",
        "168.63.129.16",
        "fd00:ec2::23",
        "fd20:ce::254",
        "fe80::1",
        "fd00:ec2::254",
        "0.0.0.0",
        "::ffff:224.0.0.1",
    ] {
        let scene = Scene::new(1).await;
        let ip: IpAddr = ip.parse().unwrap();
        scene.dns.zone([dns::address(TRUE_NAME, 60, ip)]);
        let proxy = Proxy::start(&scene.yaml("")).await;
        let response = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
        assert_eq!(response.status(), 403, "{ip}: {}", response.text());
        let problem = response.json();
        assert_eq!(problem["type"], "urn:truename:error:destination_ip_prohibited", "{problem}");
        assert_eq!(problem["endpoint"], SocketAddr::new(ip, scene.port).to_string());
    }
}

#[tokio::test]
async fn a_name_that_comes_to_a_denied_address_is_not_followed_there() {
    let mut scene = Scene::new(2).await;
    let origins = scene.script(scripts::respond);
    let [good, denied] = [scene.addresses[0], scene.addresses[1]];
    let show = |ips: &[IpAddr]| {
        scene.dns.zone(ips.iter().map(|ip| dns::address(TRUE_NAME, 0, *ip)));
    };
    show(&[good]);
    let yaml = scene.restless_yaml("").replace("127.0.0.0/8", &format!("{good}/32"));
    let proxy = Proxy::start(&yaml).await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);

    show(&[denied]);
    within("a refusal", async {
        loop {
            match client::get(address, ALIAS, "/").await.status() {
                200 => {}
                status => return assert_eq!(status, 403),
            }
        }
    })
    .await;
    // Beside an address that is allowed, it costs nobody a request.
    show(&[denied, good]);
    within("a response", async { while client::get(address, ALIAS, "/").await.status() != 200 {} })
        .await;
    for _ in 0..20 {
        assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    }
    assert_eq!(origins[1].seen().connections, 0);
}

#[tokio::test]
async fn sixteen_links_are_followed_and_a_seventeenth_is_explained() {
    for (links, in_one_packet) in [(16, true), (16, false), (17, true), (17, false)] {
        let mut scene = Scene::new(1).await;
        let origin = serve(&mut scene, &["1.example"], "ok");
        let mut owner = ALIAS_IN_DNS.to_owned();
        for link in 1..=links {
            let next = format!("{link}.example");
            let record = dns::cname(&owner, 60, &next);
            match in_one_packet {
                true => scene.dns.zone([record]),
                false => scene.dns.respond(&owner, DnsResponse::Records(vec![record])),
            }
            owner = next;
        }
        scene.dns.zone([dns::address(&owner, 60, scene.addresses[0])]);
        let proxy = Proxy::start(&scene.yaml("")).await;
        let response = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
        if links == 16 {
            assert_eq!(response.status(), 200, "{}", response.text());
            origin.assert_called("1.example", &scene.authority("1.example"));
        } else {
            assert_eq!(response.status(), 503, "{}", response.text());
            let problem = response.json();
            assert_eq!(problem["stage"], "resolve");
            assert!(problem["detail"].as_str().unwrap().contains("16"), "{problem}");
        }
    }
}

#[tokio::test]
async fn an_address_that_policy_denies_is_not_dialled() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::respond);
    let yaml = scene.yaml("").replace("127.0.0.0/8", "10.0.0.0/8");
    let proxy = Proxy::start(&yaml).await;
    let response = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    assert_eq!(response.status(), 403);
    let problem = response.json();
    assert_eq!(problem["type"], "urn:truename:error:destination_ip_prohibited");
    assert_eq!(problem["stage"], "policy");
    let ip = scene.addresses[0].to_string();
    assert!(problem["detail"].as_str().unwrap().contains(&format!("{ip} is a loopback address")));
    assert!(problem["fix"].as_str().unwrap().contains(&format!("add {ip} to `policy.allow_addr")));
    assert_eq!(origins[0].seen().connections, 0);
    let series = "truename_policy_refusals_total{alias=\"webscaler-manual\",reason=\"address\"}";
    assert!(proxy.metric(series).await.unwrap() >= 1.0);
}

/// An origin at the scene's one address that proves `names`.
fn serve(scene: &mut Scene, names: &[&str], body: &'static str) -> RawOrigin {
    serve_as(scene, trust::server_with_alpn(names, &["http/1.1"]), body)
}

fn serve_as(scene: &mut Scene, tls: Arc<ServerConfig>, body: &'static str) -> RawOrigin {
    let listener = scene.take_listeners().remove(0);
    RawOrigin::start(listener, Some(tls), move |arrival| {
        scripts::always(arrival, scripts::ok(body))
    })
}

/// The keys of `tls` beside the trust in the tests' authority.
fn tls(keys: &str) -> String {
    format!("tls: {{ca: {{system: false, webpki: false, files: [\"$FOLDER/root.pem\"]}}, {keys}}}")
}
