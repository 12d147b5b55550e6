//! Names: their one form, the absolute name to ask for, and what resolv.conf says about the cluster.

use crate::config;
use std::{
    net::{IpAddr, SocketAddr},
    path::PathBuf,
};

/// The file that says what the configuration leaves open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ResolvConf {
    /// Where it is.
    pub path: PathBuf,
    /// The port of its servers, as its lines have none.
    pub port: u16,
}

impl Default for ResolvConf {
    fn default() -> ResolvConf {
        ResolvConf { path: PathBuf::from("/etc/resolv.conf"), port: 53 }
    }
}

/// Where names are resolved: the servers, and what a bare alias is completed with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Environment {
    /// In the order in which they are tried.
    pub servers: Vec<SocketAddr>,
    /// The namespace of a bare alias.
    pub namespace: String,
    /// Folded; `cluster.local` unless told otherwise.
    pub cluster_domain: String,
}

impl Environment {
    /// The configuration, completed from a resolv.conf. A file that cannot be read counts as empty: with `dns.servers`
    /// nobody needs it, and without them the lookup's error says that there are none.
    pub fn read(dns: &config::Dns, resolv_conf: &ResolvConf) -> Environment {
        let text = std::fs::read(&resolv_conf.path).unwrap_or_default();
        Environment::parse(dns, &text, resolv_conf.port)
    }

    /// The configuration, completed from the text of a resolv.conf, whose servers have this port.
    pub fn parse(dns: &config::Dns, resolv_conf: &[u8], port: u16) -> Environment {
        // As in glibc, a line that cannot be understood does not spoil the others.
        let (parsed, _) = resolv_conf::Config::parse_with_errors(resolv_conf);
        let search = parsed.get_search().into_iter().flatten();
        let found = search.into_iter().find_map(|entry| cluster_search(entry));
        let (namespace, domain) =
            found.unwrap_or_else(|| ("default".into(), "cluster.local".into()));
        let mut servers = dns.servers.clone();
        if servers.is_empty() {
            let ips = parsed.nameservers.into_iter().map(IpAddr::from);
            servers.extend(ips.map(|ip| SocketAddr::new(ip, port)));
        }
        Environment {
            servers,
            namespace: dns.namespace.as_deref().map_or(namespace, fold),
            cluster_domain: dns.cluster_domain.as_deref().map_or(domain, fold),
        }
    }

    /// The name that DNS is asked for, without the trailing dot: see [`absolute`].
    pub fn absolute(&self, alias: &str) -> String {
        absolute(alias, &self.namespace, &self.cluster_domain)
    }
}

/// Namespace and domain of a search list's `<ns>.svc.<domain>`.
fn cluster_search(entry: &str) -> Option<(String, String)> {
    let entry = fold(entry);
    let (namespace, rest) = entry.split_once('.')?;
    let domain = rest.strip_prefix("svc.")?;
    let complete = !namespace.is_empty() && !domain.is_empty();
    complete.then(|| (namespace.to_owned(), domain.to_owned()))
}

/// The name that DNS is asked for, folded. The query itself is absolute: search lists play no part.
///
/// One label is a Service of this namespace and two are `service.namespace`; whatever ends in `.svc` lacks only the
/// domain; the rest, and all that was written with a trailing dot, is a full name.
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

/// The name to ask for, for a host that is no alias, and another where DNS does not know the first: as it stands, or
/// as the Service that it is in a pod.
pub fn candidates(host: &str, namespace: &str, domain: &str) -> (String, Option<String>) {
    let name = fold(host);
    let service = absolute(&name, namespace, domain);
    // `payments.prod` is a Service of another namespace only if the internet knows no such name.
    if name.split('.').count() == 2 && !name.ends_with(".svc") && service != name {
        return (name, Some(service));
    }
    (service, None)
}

/// Every form in which an application may write the alias, the shortest first: what routing answers to.
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

/// The names that an alias answers to, whatever DNS says: its forms, and those of its `hosts` that are no pattern.
pub fn of_alias(alias: &config::Alias, environment: &Environment) -> Vec<String> {
    let mut names = forms(&alias.name, &environment.namespace, &environment.cluster_domain);
    let extra = alias.hosts.iter().filter(|host| *host != "*");
    names.extend(extra.map(|host| fold(host)));
    names
}

/// Whether the name is the domain or lies under it; both folded.
pub fn in_domain(name: &str, domain: &str) -> bool {
    name.strip_suffix(domain).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The form in which names from DNS are compared: lower-case, without the trailing dot.
pub fn fold(name: &str) -> String {
    name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase()
}

/// The one form of a name that a person wrote: folded and IDNA-encoded; checked for what DNS can carry (RFC 1035,
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

/// Whether the name is made of digits and dots, as `010.1.2.3`: an address that somebody mistyped.
pub fn looks_like_address(name: &str) -> bool {
    name.parse::<IpAddr>().is_ok() || name.chars().all(|c| c.is_ascii_digit() || c == '.')
}

/// A name that DNS cannot carry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{name}` cannot be a DNS name: {reason}; correct it in `aliases[].name` or `target:`")]
pub struct NameError {
    /// As it was written.
    pub name: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

#[cfg(test)]
pub(super) mod tests;
