//! The variables that make programs use a proxy and trust its certificates.

use std::{
    ffi::{OsStr, OsString},
    net::SocketAddr,
    path::Path,
};

use crate::tls::truststore::JAVA_PASSWORD;

/// Variables that programs read a proxy from. There is no standard, only conventions.
const PROXY: [&str; 6] =
    ["http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"];

/// Variables that they read exempt hosts from.
const NO_PROXY: [&str; 2] = ["no_proxy", "NO_PROXY"];

/// Variables that they read a file of roots from: OpenSSL and Go, curl, Python's requests, Node, AWS' tools,
/// git, Deno.
pub const ROOTS: [&str; 7] = [
    "SSL_CERT_FILE",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "NODE_EXTRA_CA_CERTS",
    "AWS_CA_BUNDLE",
    "GIT_SSL_CAINFO",
    "DENO_CERT",
];

const JAVA: &str = "JAVA_TOOL_OPTIONS";

/// Exempt, because the command may have its own servers on this machine.
const THIS_MACHINE: [&str; 3] = ["localhost", "127.0.0.1", "::1"];

/// The contents of the variables.
pub struct ProxyEnvironment<'a> {
    /// The private proxy.
    pub proxy: SocketAddr,
    /// All names of all aliases.
    pub names: &'a [String],
    /// Roots as PEM.
    pub bundle: &'a Path,
    /// Roots for Java.
    pub truststore: &'a Path,
}

impl ProxyEnvironment<'_> {
    /// The variables to set, given those that are set already.
    pub fn variables(
        &self,
        inherited: impl Fn(&str) -> Option<OsString>,
    ) -> Vec<(&'static str, OsString)> {
        let proxy = OsString::from(format!("http://{}", self.proxy));
        let mut variables: Vec<(&'static str, OsString)> = Vec::new();
        variables.extend(PROXY.map(|name| (name, proxy.clone())));
        // Both get the entries of both, whichever a program reads.
        let exempt = NO_PROXY.into_iter().filter_map(&inherited);
        let exempt: Vec<String> =
            exempt.map(|value| value.to_string_lossy().into_owned()).collect();
        let exempt = OsString::from(without_aliases(&exempt.join(","), self.names));
        variables.extend(NO_PROXY.map(|name| (name, exempt.clone())));
        variables.extend(ROOTS.map(|name| (name, self.bundle.into())));
        // Node ignores the proxy variables without this.
        variables.push(("NODE_USE_ENV_PROXY", "1".into()));
        variables.push((JAVA, self.java(inherited(JAVA).as_deref())));
        variables
    }

    /// Java has properties instead of variables. Existing options are kept, and ours come last and win.
    fn java(&self, inherited: Option<&OsStr>) -> OsString {
        let (host, port) = (self.proxy.ip(), self.proxy.port());
        let mut options = inherited.map(OsStr::to_owned).unwrap_or_default();
        let mut add = |option: String| {
            if !options.is_empty() {
                options.push(" ");
            }
            options.push(option);
        };
        for scheme in ["http", "https"] {
            add(format!("-D{scheme}.proxyHost={host}"));
            add(format!("-D{scheme}.proxyPort={port}"));
        }
        add("-Dhttp.nonProxyHosts=localhost|127.*|[::1]".to_owned());
        add(format!("\"-Djavax.net.ssl.trustStore={}\"", self.truststore.display()));
        add("-Djavax.net.ssl.trustStoreType=PKCS12".to_owned());
        add(format!("-Djavax.net.ssl.trustStorePassword={JAVA_PASSWORD}"));
        options
    }
}

/// A `NO_PROXY` that exempts this machine and the entries of `inherited`, except those that would make an
/// alias bypass the proxy.
fn without_aliases(inherited: &str, names: &[String]) -> String {
    let entries = inherited.split([',', ' ', '\t']).filter(|entry| !entry.is_empty());
    let mut kept: Vec<&str> = Vec::new();
    for entry in THIS_MACHINE.into_iter().chain(entries) {
        let swallows = names.iter().any(|name| covers(entry, name));
        if !swallows && !kept.contains(&entry) {
            kept.push(entry);
        }
    }
    kept.join(",")
}

/// Whether an entry exempts `name` in any program's interpretation: as a suffix, with or without a dot or
/// a star before it, with or without a port.
fn covers(entry: &str, name: &str) -> bool {
    let entry = entry.to_ascii_lowercase();
    let host = match entry.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => host,
        _ => &entry,
    };
    if host == "*" {
        return true;
    }
    let suffix = host.trim_start_matches('*').trim_start_matches('.').trim_end_matches('.');
    !suffix.is_empty()
        && name.strip_suffix(suffix).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

#[cfg(test)]
mod tests;
