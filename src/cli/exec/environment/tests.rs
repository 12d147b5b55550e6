use std::collections::HashMap;

use super::*;

const NAMES: [&str; 4] = [
    "webscaler-manual",
    "webscaler-manual.default",
    "webscaler-manual.default.svc",
    "webscaler-manual.default.svc.cluster.local",
];

fn variables(inherited: &[(&str, &str)]) -> HashMap<&'static str, String> {
    let names = NAMES.map(str::to_owned);
    let environment = ProxyEnvironment {
        proxy: "127.0.0.1:4321".parse().unwrap(),
        names: &names,
        bundle: Path::new("/tmp/a b/bundle.pem"),
        truststore: Path::new("/tmp/a b/roots.p12"),
    };
    let find = |name: &str| {
        inherited.iter().find(|(key, _)| *key == name).map(|(_, value)| OsString::from(value))
    };
    let variables = environment.variables(find).into_iter();
    variables.map(|(name, value)| (name, value.into_string().unwrap())).collect()
}

#[test]
fn every_habit_of_finding_a_proxy_finds_this_one() {
    let variables = variables(&[("https_proxy", "http://corporate:3128")]);
    for name in PROXY {
        assert_eq!(variables[name], "http://127.0.0.1:4321", "{name}");
    }
    for name in ROOTS {
        assert_eq!(variables[name], "/tmp/a b/bundle.pem", "{name}");
    }
    assert_eq!(variables["NODE_USE_ENV_PROXY"], "1");
}

#[test]
fn no_proxy_loses_what_would_swallow_an_alias_and_nothing_else() {
    let machine = "localhost,127.0.0.1,::1";
    for swallowing in [
        "webscaler-manual",
        "WebScaler-Manual.default.",
        ".svc",
        "svc:443",
        "*.cluster.local",
        "cluster.local",
        "local",
        "*",
        ".default.svc.cluster.local",
    ] {
        let inherited = format!("internal.example,{swallowing}, 10.0.0.0/8");
        let variables = variables(&[("NO_PROXY", &inherited)]);
        let expected = format!("{machine},internal.example,10.0.0.0/8");
        assert_eq!(variables["NO_PROXY"], expected, "{swallowing}");
        assert_eq!(variables["no_proxy"], expected, "{swallowing}");
    }
    for harmless in ["other", "manual", "er-manual", ".example.com", "fe80::1", "192.168.0.1:80"] {
        let variables = variables(&[("no_proxy", harmless)]);
        assert_eq!(variables["NO_PROXY"], format!("{machine},{harmless}"));
    }
}

#[test]
fn both_spellings_of_no_proxy_are_heard() {
    let variables = variables(&[("no_proxy", "a.example"), ("NO_PROXY", "b.example,a.example")]);
    assert_eq!(variables["no_proxy"], "localhost,127.0.0.1,::1,a.example,b.example");
}

#[test]
fn options_for_java_follow_those_that_were_there() {
    let options = variables(&[(JAVA, "-Xmx64m -Dhttps.proxyHost=corporate")]).remove(JAVA).unwrap();
    let rest = options.strip_prefix("-Xmx64m -Dhttps.proxyHost=corporate ").unwrap();
    assert!(rest.contains("-Dhttps.proxyHost=127.0.0.1 -Dhttps.proxyPort=4321 "), "{rest}");
    assert!(rest.contains("\"-Djavax.net.ssl.trustStore=/tmp/a b/roots.p12\""), "{rest}");
    assert!(variables(&[])[JAVA].starts_with("-Dhttp.proxyHost=127.0.0.1 "));
}
