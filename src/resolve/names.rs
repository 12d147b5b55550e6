//! Names: their normal form, and the absolute name to query.

use super::environment::Environment;
use crate::config;
use std::net::IpAddr;

/// The name to query, folded. Queries are absolute: search lists are not used.
///
/// One label is a Service of this namespace, and two labels are `service.namespace`. A name that ends in `.svc` lacks
/// only the domain. Any other name, and any name with a trailing dot, is complete.
pub fn absolute(alias: &str, namespace: &str, domain: &str) -> String {
    let name = fold(alias);
    if alias.ends_with('.') || in_domain(&name, domain) {
        return name;
    }
    match name.split('.').count() {
        1 => format!("{name}.{namespace}.svc.{domain}"),
        2 if !name.ends_with(".svc") => format!("{name}.svc.{domain}"),
        3.. if name.ends_with(".svc") => format!("{name}.{domain}"),
        _ => name,
    }
}

/// The name to query for a host that is not an alias, and a second one in case the first does not exist: the host as
/// it is, or the Service that it means in a pod.
pub fn candidates(host: &str, namespace: &str, domain: &str) -> (String, Option<String>) {
    let name = fold(host);
    let service = absolute(&name, namespace, domain);
    // `payments.prod` is a Service of another namespace only if there is no public name like that.
    if name.split('.').count() == 2 && !name.ends_with(".svc") && service != name {
        return (name, Some(service));
    }
    (service, None)
}

/// Every form in which an application may write the alias, the shortest first. Routing accepts all of them.
pub fn forms(alias: &str, namespace: &str, domain: &str) -> Vec<String> {
    let full = absolute(alias, namespace, domain);
    let service =
        full.strip_suffix(domain).and_then(|rest| rest.strip_suffix(".svc.")).map(str::to_owned);
    let mut forms = Vec::new();
    if let Some(service) = service {
        let bare = service.strip_suffix(namespace);
        forms.extend(bare.and_then(|name| name.strip_suffix('.')).map(str::to_owned));
        forms.push(format!("{service}.svc"));
        forms.insert(forms.len() - 1, service);
    }
    forms.push(full);
    forms
}

/// The names that an alias accepts regardless of DNS: its forms, and those of its `hosts` that are not patterns.
pub fn of_alias(alias: &config::Alias, environment: &Environment) -> Vec<String> {
    let mut names = forms(&alias.name, &environment.namespace, &environment.cluster_domain);
    let extra = alias.hosts.iter().filter(|host| *host != "*");
    names.extend(extra.map(|host| fold(host)));
    names
}

/// Whether the name is the domain or is below it. Both are folded.
pub fn in_domain(name: &str, domain: &str) -> bool {
    name.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The form in which names from DNS are compared: lower-case, without the trailing dot.
pub fn fold(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

/// The normal form of a name that a person wrote: folded, IDNA-encoded, and within the limits of DNS (RFC 1035,
/// section 2.3.4). Normalising twice changes nothing.
pub fn normalise(name: &str) -> Result<String, NameError> {
    let refuse = |reason| NameError { name: name.to_owned(), reason };
    let encoded = idna::domain_to_ascii(name.strip_suffix('.').unwrap_or(name))
        .map_err(|_| refuse("it has characters that no host name may have"))?;
    if encoded.is_empty() {
        return Err(refuse("it is empty"));
    }
    if encoded.len() > 253 {
        return Err(refuse("it is longer than 253 characters"));
    }
    if encoded.split('.').any(str::is_empty) {
        return Err(refuse("it has an empty label (two dots in a row)"));
    }
    if encoded.split('.').any(|label| label.len() > 63) {
        return Err(refuse("a label (between two dots) is longer than 63 characters"));
    }
    Ok(encoded)
}

/// Whether the name consists of digits and dots, such as `010.1.2.3`: probably a mistyped address.
pub fn looks_like_address(name: &str) -> bool {
    name.parse::<IpAddr>().is_ok() || name.chars().all(|c| c.is_ascii_digit() || c == '.')
}

/// A name that is not possible in DNS.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` cannot be a DNS name: {reason}; correct it in `aliases[].name` or `target:`")]
pub struct NameError {
    /// The name as written.
    pub name: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

#[cfg(test)]
pub(super) mod tests;
