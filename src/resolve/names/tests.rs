use super::*;
use proptest::prelude::*;

pub(crate) fn settings() -> config::Dns {
    config::Config::default().dns
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
