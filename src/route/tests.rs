use std::net::{Ipv4Addr, SocketAddr};

use super::*;
use crate::{
    config::{self, Alias, TlsMode},
    connect::AddressPolicy,
    resolve::{ResolvConf, Resolver, names::absolute},
    upstream::Registry,
};
use arc_swap::ArcSwap;
use proptest::{
    collection::vec,
    prelude::*,
    sample::{select, subsequence},
};
use tokio::runtime::Builder;

const NAMESPACE: &str = "default";
const DOMAIN: &str = "cluster.local";
const LOCAL: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
/// Few, so that they collide: aliases, further names, and Hosts of clients.
const NAMES: [&str; 10] = [
    "a",
    "a.default",
    "a.default.svc",
    "a.prod",
    "b",
    "b.prod.svc.cluster.local",
    "vendor.example.com",
    "example.com",
    "svc",
    "default.svc",
];

fn listeners() -> [SocketAddr; 2] {
    [8080, 8081].map(|port| SocketAddr::new(LOCAL, port))
}

fn alias() -> impl Strategy<Value = Alias> {
    let hosts = subsequence(vec!["a", "b", "other.example", "Vendor.example.com", "*"], 0..3);
    let listen = subsequence(listeners().to_vec(), 0..=2);
    (select(&NAMES[..]), hosts, listen).prop_map(|(name, hosts, listen)| {
        let mut alias = Alias::named(name);
        alias.hosts = hosts.into_iter().map(str::to_owned).collect();
        alias.listen = listen;
        // No DNS server is configured and no roots are read, because this test needs neither.
        alias.tls.mode = TlsMode::Plaintext;
        alias
    })
}

fn host() -> impl Strategy<Value = String> {
    let known = [&NAMES[..], &["other.example", "localhost", "127.0.0.1", "127.0.0.2", "*"]];
    let known = (select(known.concat()), vec(any::<bool>(), 24), select(vec!["", ".", ".."]));
    let known = known.prop_map(|(name, upper, end)| {
        let letters = name.chars().zip(upper.iter().cycle());
        let name: String = letters
            .map(|(letter, upper)| if *upper { letter.to_ascii_uppercase() } else { letter })
            .collect();
        name + end
    });
    prop_oneof![4 => known, 1 => "[a-z.*\\[\\]:]{0,12}"]
}

/// The routes of one listener.
fn routes(aliases: &[Alias], listener: SocketAddr) -> Routes {
    let dns = config::Dns {
        namespace: Some(NAMESPACE.to_owned()),
        cluster_domain: Some(DOMAIN.to_owned()),
        ..config::Config::default().dns
    };
    let nowhere = ResolvConf { path: "/nonexistent/resolv.conf".into(), ..ResolvConf::default() };
    let resolver = Resolver::with_resolv_conf(dns, nowhere);
    let policy = Arc::new(ArcSwap::from_pointee(AddressPolicy::default()));
    let here = aliases.iter().filter(|alias| alias.listen.contains(&listener));
    let here: Vec<Alias> = here.cloned().collect();
    let inventory = Registry::new(resolver.clone(), policy, 1).inventory();
    let aliases = inventory.plan(&here, &resolver.settings()).unwrap();
    Routes::new(&aliases)
}

/// Which of `aliases` should be served according to the reference.
fn expected(aliases: &[Alias], listener: SocketAddr, host: &str) -> Option<usize> {
    let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
    let here: Vec<_> =
        (0..aliases.len()).filter(|n| aliases[*n].listen.contains(&listener)).collect();
    let full = |name: &str| absolute(name, NAMESPACE, DOMAIN);
    let has_name = |n: &usize| {
        let alias = &aliases[*n];
        let further = || alias.hosts.iter().any(|further| further.to_ascii_lowercase() == host);
        // With two dots at the end, it is no valid name.
        let is_name = host != "*" && !host.ends_with('.');
        is_name && (full(&alias.name) == full(&host) || further())
    };
    let alone = || match here.as_slice() {
        [only] if host == "localhost" || host == LOCAL.to_string() => Some(*only),
        _ => None,
    };
    let any = || here.iter().copied().find(|n| aliases[*n].hosts.iter().any(|host| host == "*"));
    let named = |n: &usize| aliases[*n].name == host;
    let first = |has_name: &dyn Fn(&usize) -> bool| here.iter().copied().find(|n| has_name(n));
    first(&named).or_else(|| first(&has_name)).or_else(alone).or_else(any)
}

proptest! {
    #[test]
    fn a_host_leads_to_the_alias_with_that_name_and_any_other_nowhere(
        aliases in vec(alias(), 0..5),
        hosts in vec(host(), 8),
    ) {
        let runtime = Builder::new_current_thread().enable_time().build().unwrap();
        let _entered = runtime.enter();
        for listener in listeners() {
            let routes = routes(&aliases, listener);
            for host in &hosts {
                let found = routes.find(LOCAL, Some(host));
                let wished = expected(&aliases, listener, host);
                let same = match (&found, wished) {
                    (Ok(found), Some(n)) => **found.config() == aliases[n],
                    (Err(error), None) => {
                        prop_assert!(error.to_string().contains(&**host));
                        true
                    }
                    _ => false,
                };
                let found = found.map(|found| found.config().clone());
                prop_assert!(same, "{host:?} on {listener}: {found:?}, not {wished:?}");
            }
            for name in routes.by_host.keys() {
                prop_assert!(routes.find(LOCAL, Some(name)).is_ok(), "{name}");
                let found = routes.find(LOCAL, Some(name)).unwrap();
                let (shown, _) = routes.shown(Some(name)).unwrap();
                prop_assert!(Arc::ptr_eq(shown, &found), "{name}");
            }
        }
        prop_assert!(Routes::default().find(LOCAL, Some("a")).is_err());
    }

    #[test]
    fn a_request_without_a_host_is_for_an_only_alias_or_for_that_of_any_name(
        aliases in vec(alias(), 0..4),
    ) {
        let runtime = Builder::new_current_thread().enable_time().build().unwrap();
        let _entered = runtime.enter();
        for listener in listeners() {
            let routes = routes(&aliases, listener);
            let here: Vec<_> =
                aliases.iter().filter(|alias| alias.listen.contains(&listener)).collect();
            let any = || here.iter().find(|alias| alias.hosts.iter().any(|host| host == "*"));
            let wished = if here.len() == 1 { here.first() } else { any() };
            let found = routes.find(LOCAL, None).ok();
            prop_assert_eq!(found.as_ref().map(|found| &**found.config()), wished.copied());
        }
    }
}

/// Regression: with thousands of aliases, the error filled a header of 56 KB and a log line of 360 KB.
#[test]
fn an_error_names_a_few_of_many_names_and_shows_the_beginning_of_a_long_host() {
    let listener = listeners()[0];
    let runtime = Builder::new_current_thread().enable_time().build().unwrap();
    let _entered = runtime.enter();
    let many: Vec<Alias> = (0..3000)
        .map(|n| {
            let mut alias = Alias::named(format!("service-{n}"));
            (alias.listen, alias.tls.mode) = (vec![listener], TlsMode::Plaintext);
            alias
        })
        .collect();
    let routes = routes(&many, listener);
    let host = "x".repeat(60_000);
    let error = routes.find(LOCAL, Some(&host)).map(drop).unwrap_err();
    let text = format!("{error}; {}", error.fix().unwrap());
    assert!(text.len() < 500, "{} characters", text.len());
    assert!(text.contains("xxx...` (60000 characters)"), "{text}");
    assert!(text.contains("service-0, service-1, ") && text.contains(" and 2990 more"), "{text}");
    let served = routes.served();
    assert!(served.starts_with("service-0, service-0.default, "), "{served}");
    assert!(served.ends_with(" and 11990 more"), "{served}");
    assert_eq!(Routes::default().served(), "none");
}
