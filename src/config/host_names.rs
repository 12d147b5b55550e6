//! The Host names that an alias answers to, as far as the configuration alone determines them.

use super::{Alias, Dns};

/// Each name with the key (of the alias) that it comes from.
///
/// The namespace and domain from resolv.conf are unknown here, so two forms of one alias are recognised as the same
/// only if the configuration sets these.
pub(super) fn names(alias: &Alias, dns: &Dns) -> Vec<(String, String)> {
    let mut names: Vec<_> =
        kubernetes_forms(&alias.name, dns).into_iter().map(|name| (name, "name".into())).collect();
    let hosts = alias.hosts.iter().enumerate();
    names.extend(hosts.map(|(nth, host)| (host.clone(), format!("hosts[{nth}]"))));
    names
}

fn kubernetes_forms(name: &str, dns: &Dns) -> Vec<String> {
    let mut forms = vec![name.to_owned()];
    let within = dns.cluster_domain.as_ref().and_then(|domain| {
        name.strip_suffix(domain.as_str()).and_then(|rest| rest.strip_suffix('.'))
    });
    let short = within.unwrap_or(name);
    let labels: Vec<&str> = short.split('.').collect();
    let (service, namespace) = match (labels.as_slice(), &dns.namespace) {
        (&[service], Some(namespace)) => (service, namespace.as_str()),
        // `a.svc` lacks the namespace, so it is a full name.
        (&[_, "svc"], _) => return forms,
        (&[service, namespace] | &[service, namespace, "svc"], _) => (service, namespace),
        _ => return forms,
    };
    if dns.namespace.as_deref() == Some(namespace) {
        forms.push(service.to_owned());
    }
    forms.push(format!("{service}.{namespace}"));
    forms.push(format!("{service}.{namespace}.svc"));
    if let Some(domain) = &dns.cluster_domain {
        forms.push(format!("{service}.{namespace}.svc.{domain}"));
    }
    forms
}
