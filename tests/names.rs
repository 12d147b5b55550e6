//! Where an alias leads: seen from both ends of the proxy.

// Its helpers are part of the tests.
#![allow(clippy::unwrap_used)]

mod support;

use std::sync::Arc;

use rustls::ServerConfig;
use serde_json::json;
use support::{
    client, loopback,
    proxy::{Proxy, Setup},
    raw_origin::RawOrigin,
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts, trust,
};
use truename::demo::{
    authority::LeafOptions,
    dns::{self, Answer, RecordType},
};

const OTHER: &str = "other.example";

#[tokio::test]
async fn the_true_name_is_the_first_outside_the_cluster_and_no_later_one() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::answer);
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
async fn a_chain_that_stays_in_the_cluster_has_no_true_name() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::answer);
    scene.dns.zone([dns::address(ALIAS_IN_DNS, 60, scene.addresses[0])]);
    let proxy = Proxy::start(&scene.yaml("")).await;
    let answer = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    assert_eq!(answer.status(), 503);
    let fix = answer.json()["fix"].as_str().unwrap().to_owned();
    assert!(fix.contains("server_name") && fix.contains("plaintext"), "{fix}");
}

#[tokio::test]
async fn a_chain_that_loops_is_shown() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::answer);
    let ring =
        [dns::cname(ALIAS_IN_DNS, 60, "a.example"), dns::cname("a.example", 60, ALIAS_IN_DNS)];
    scene.dns.answer(ALIAS_IN_DNS, Answer::Records(ring.to_vec()));
    let proxy = Proxy::start(&scene.yaml("")).await;
    let answer = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    assert_eq!((answer.status(), &answer.json()["stage"]), (503, &json!("resolve")));
    let detail = answer.json()["detail"].as_str().unwrap().to_owned();
    assert!(detail.contains(&format!("{ALIAS_IN_DNS} → a.example → {ALIAS_IN_DNS}")), "{detail}");
}

#[tokio::test]
async fn a_told_target_may_be_a_name_or_an_address_each_with_or_without_port() {
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
    let origins = scene.script(scripts::answer);
    let proxy = Proxy::start(&scene.yaml("allow: [\"*.example.com\"]")).await;
    let answer = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    assert_eq!(answer.status(), 403);
    let problem = answer.json();
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
    assert!(proxy.log().contains("requests would go round in a loop"), "{}", proxy.log());

    // `scene.yaml` allows all of 127.0.0.0/8: that is not meant for the proxy itself.
    let proxy = Proxy::start(&yaml("target: loop.example")).await;
    let answer = client::get(own, ALIAS, "/").await;
    assert_eq!(answer.status(), 508, "{}", answer.text());
    let problem = answer.json();
    assert_eq!(problem["type"], "urn:truename:error:proxy_loop_detected");
    assert_eq!(problem["endpoint"], own.to_string());
    let total = "truename_downstream_connections_total{alias=\"webscaler-manual\",\
                 protocol=\"http/1.1\",tls=\"false\"}";
    assert_eq!(proxy.metric(total).await, Some(1.0), "it called itself");
}

#[tokio::test]
async fn an_address_that_policy_denies_is_not_dialled() {
    let mut scene = Scene::new(1).await;
    let origins = scene.script(scripts::answer);
    let yaml = scene.yaml("").replace("127.0.0.0/8", "10.0.0.0/8");
    let proxy = Proxy::start(&yaml).await;
    let answer = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
    assert_eq!(answer.status(), 403);
    let problem = answer.json();
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
