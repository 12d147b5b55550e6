use super::*;
use proptest::prelude::*;
use std::time::Duration;

pub(crate) fn settings() -> config::Dns {
    config::Dns {
        servers: Vec::new(),
        cluster_domain: None,
        namespace: None,
        min_ttl: Duration::from_secs(5),
        max_ttl: Duration::from_secs(60),
        stale: Duration::from_secs(3600),
        nxdomain_hold: Duration::from_secs(30),
    }
}

const POD: &[u8] = b"search prod.svc.k8s.corp svc.k8s.corp k8s.corp\nnameserver 10.96.0.10\n\
    nameserver fd00::a\noptions ndots:5\n";

#[test]
fn a_pods_resolv_conf_says_all() {
    let environment = Environment::parse(&settings(), POD, 53);
    assert_eq!(
        environment.servers,
        ["10.96.0.10:53".parse().unwrap(), "[fd00::a]:53".parse().unwrap()]
    );
    assert_eq!((&*environment.namespace, &*environment.cluster_domain), ("prod", "k8s.corp"));
    assert_eq!(environment.absolute("db"), "db.prod.svc.k8s.corp");
}

#[test]
fn the_configuration_overrides_the_file() {
    let server = "127.0.0.1:5353".parse().unwrap();
    let dns = config::Dns {
        servers: vec![server],
        cluster_domain: Some("Cluster.Local.".into()),
        namespace: Some("qa".into()),
        ..settings()
    };
    let environment = Environment::parse(&dns, POD, 53);
    assert_eq!(environment.servers, [server]);
    assert_eq!(environment.absolute("db"), "db.qa.svc.cluster.local");
}

#[test]
fn a_laptop_has_the_defaults() {
    let environment = Environment::parse(
        &settings(),
        b"search home.example\nnonsense here\nnameserver 192.0.2.53\n",
        53,
    );
    assert_eq!(environment.servers, ["192.0.2.53:53".parse().unwrap()]);
    assert_eq!(
        (&*environment.namespace, &*environment.cluster_domain),
        ("default", "cluster.local")
    );
    let nothing = Environment::read(
        &settings(),
        &ResolvConf { path: "/nonexistent/resolv.conf".into(), ..ResolvConf::default() },
    );
    assert!(nothing.servers.is_empty());
}

#[test]
fn an_alias_is_completed_by_its_form() {
    let absolute = |alias| absolute(alias, "default", "cluster.local");
    assert_eq!(absolute("webscaler-manual"), "webscaler-manual.default.svc.cluster.local");
    assert_eq!(absolute("Web.Prod"), "web.prod.svc.cluster.local");
    assert_eq!(absolute("web.prod.svc"), "web.prod.svc.cluster.local");
    assert_eq!(absolute("web.prod.svc.cluster.local"), "web.prod.svc.cluster.local");
    assert_eq!(absolute("web.prod.svc.cluster.local."), "web.prod.svc.cluster.local");
    assert_eq!(absolute("pod-0.web.prod.svc"), "pod-0.web.prod.svc.cluster.local");
    assert_eq!(absolute("api.vendor.com"), "api.vendor.com");
    assert_eq!(absolute("vendor.com."), "vendor.com");
}

#[test]
fn routing_knows_every_form() {
    let expected = [
        "webscaler-manual",
        "webscaler-manual.default",
        "webscaler-manual.default.svc",
        "webscaler-manual.default.svc.cluster.local",
    ];
    for alias in expected {
        assert_eq!(forms(alias, "default", "cluster.local"), expected);
    }
    let elsewhere = ["web.prod", "web.prod.svc", "web.prod.svc.cluster.local"];
    assert_eq!(
        forms("web.prod", "default", "cluster.local"),
        elsewhere,
        "no bare form in another namespace"
    );
    assert_eq!(forms("api.vendor.com", "default", "cluster.local"), ["api.vendor.com"]);
}

#[test]
fn a_name_has_one_form() {
    assert_eq!(normalise("HTTPBin.org.").unwrap(), "httpbin.org");
    assert_eq!(normalise("Bücher.example").unwrap(), "xn--bcher-kva.example");
    for (bad, reason) in [
        ("", "empty"),
        (".", "empty"),
        ("a..b", "two dots"),
        (&"a".repeat(64), "63"),
        (&"a.".repeat(150), "253"),
    ] {
        let error = normalise(bad).unwrap_err().to_string();
        assert!(error.contains(reason), "{bad}: {error}");
    }
}

#[test]
fn mistyped_addresses_are_noticed() {
    assert!(looks_like_address("010.1.2.3") && looks_like_address("256.1.1.1"));
    assert!(!looks_like_address("1.example") && !looks_like_address("db"));
}

proptest! {
    #[test]
    fn normalising_twice_changes_nothing(name in "[a-zA-Z0-9üßé._-]{1,40}") {
        if let Ok(once) = normalise(&name) {
            prop_assert_eq!(normalise(&once), Ok(once));
        }
    }

    #[test]
    fn every_form_of_an_alias_asks_for_the_same_name(alias in "[a-z]{1,8}(\\.[a-z]{1,8}){0,3}") {
        let full = absolute(&alias, "default", "cluster.local");
        for form in forms(&alias, "default", "cluster.local") {
            prop_assert_eq!(absolute(&form, "default", "cluster.local"), &*full);
        }
    }
}

#[test]
fn a_host_that_is_no_alias_is_asked_for_as_it_stands_and_then_as_a_service() {
    let of = |host| candidates(host, "prod", "cluster.local");
    let only = |name: &str| (name.to_owned(), None);
    assert_eq!(of("payments"), only("payments.prod.svc.cluster.local"));
    assert_eq!(of("payments.other.svc"), only("payments.other.svc.cluster.local"));
    let full = "payments.other.svc.cluster.local";
    assert_eq!(of(full), only(full));
    assert_eq!(of("www.httpbin.org"), only("www.httpbin.org"));
    let service = "httpbin.org.svc.cluster.local".to_owned();
    assert_eq!(of("HttpBin.org"), ("httpbin.org".to_owned(), Some(service)));
}
