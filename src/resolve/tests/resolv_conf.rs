//! What follows from resolv.conf, and from its changes.

use super::*;

#[tokio::test]
async fn new_settings_keep_what_resolv_conf_has_said() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "search prod.svc.k8s.corp").unwrap();
    let resolver = Resolver::with_resolv_conf(settings(Vec::new()), resolv_conf(file.path()));
    assert_eq!(resolver.environment().namespace, "prod");
    std::fs::write(file.path(), "").unwrap();
    resolver.configure(settings(vec!["192.0.2.53:53".parse().unwrap()]));
    assert_eq!(resolver.environment().namespace, "prod");
}

/// Regression: the alias was resolved in the namespace `default`, which may be another tenant's.
#[tokio::test]
async fn a_resolv_conf_that_is_there_and_cannot_be_read_leads_into_no_other_namespace() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("resolv.conf");
    // It has no first byte: EIO.
    std::os::unix::fs::symlink("/proc/self/mem", &path).unwrap();
    let server = server().await;
    let prod = "webscaler-manual.prod.svc.cluster.local";
    for name in [ALIAS, prod] {
        server.zone([cname(name, 5, "httpbin.org"), address("httpbin.org", 5, V4)]);
    }
    let resolver = Resolver::with_resolv_conf(settings(vec![server.address()]), resolv_conf(&path));
    let mut subscription = resolver.watch(question());
    let state = until(&mut subscription, |state| state.error.is_some()).await;
    let error = state.error.clone().unwrap().to_string();
    assert!(error.contains("resolv.conf cannot be read"), "{error}");
    assert!(resolver.addresses("webscaler-manual").await.is_err());
    assert_eq!(resolver.addresses("httpbin.org").await.unwrap(), [V4]);
    let text = "search prod.svc.cluster.local\n";
    let file = folder.path().join("new");
    std::fs::write(&file, text).unwrap();
    std::fs::rename(file, &path).unwrap();
    until(&mut subscription, |state| state.current.is_some()).await;
    assert_eq!(server.queries(ALIAS, RecordType::A), 0);
    assert!(server.queries(prod, RecordType::A) > 0);
}

/// Regression: until the query for the new name was answered or timed out, the answer for the old one was used.
#[tokio::test]
async fn a_resolv_conf_of_another_namespace_ends_the_service_of_the_former_one_before_dns_responds()
{
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("resolv.conf");
    std::fs::write(&path, "search default.svc.cluster.local\n").unwrap();
    let server = server().await;
    server.zone([cname(ALIAS, 5, "httpbin.org"), address("httpbin.org", 5, V4)]);
    let prod = "webscaler-manual.prod.svc.cluster.local";
    server.respond(prod, DnsResponse::Silence);
    let resolver = Resolver::with_resolv_conf(settings(vec![server.address()]), resolv_conf(&path));
    let mut subscription = resolver.watch(question());
    until(&mut subscription, |state| state.current.is_some()).await;
    std::fs::write(&path, "search prod.svc.cluster.local\n").unwrap();
    let state = until(&mut subscription, |state| state.current.is_none()).await;
    assert!(state.is_pending(), "only after the query for {prod} timed out: {state:?}");
}

#[tokio::test]
async fn a_changed_resolv_conf_is_noticed() {
    let server = server().await;
    for namespace in ["default", "prod"] {
        let name = format!("webscaler-manual.{namespace}.svc.k8s.corp");
        server.zone([cname(&name, 5, &format!("{namespace}.example"))]);
        server.zone([address(&format!("{namespace}.example"), 5, V4)]);
    }
    let mut file = tempfile::NamedTempFile::new().unwrap();
    writeln!(file, "search default.svc.k8s.corp").unwrap();
    let settings = settings(vec![server.address()]);
    let resolver = Resolver::with_resolv_conf(settings, resolv_conf(file.path()));
    let mut subscription = resolver.watch(question());
    until(&mut subscription, |state| true_name(state) == Some("default.example")).await;
    std::fs::write(file.path(), "search prod.svc.k8s.corp\n").unwrap();
    until(&mut subscription, |state| true_name(state) == Some("prod.example")).await;
}
