//! The scene of most tests: the cluster's DNS, an alias that leads to a true name with so many
//! addresses, and the configuration of a proxy between.

use std::net::{IpAddr, Ipv4Addr};

use tokio::net::TcpListener;
use truename::demo::{
    dns::{self, DnsServer},
    origin::Origin,
};

use super::{
    loopback,
    raw_origin::{Arrival, RawOrigin},
    trust,
};

/// What the application calls it.
pub const ALIAS: &str = "webscaler-manual";
/// The same in the cluster's DNS.
pub const ALIAS_IN_DNS: &str = "webscaler-manual.default.svc.cluster.local";
/// Where it leads.
pub const TRUE_NAME: &str = "httpbin.org";
/// Seconds: long enough that only a test that asks for it sees a refresh.
const TTL: u32 = 60;

/// DNS, and a port on each address of the true name, where nothing listens yet.
pub struct Scene {
    /// The cluster's DNS.
    pub dns: DnsServer,
    /// The addresses of the true name.
    pub addresses: Vec<IpAddr>,
    /// The port of all its endpoints.
    pub port: u16,
    listeners: Vec<TcpListener>,
}

impl Scene {
    /// A true name with `endpoints` addresses.
    pub async fn new(endpoints: usize) -> Self {
        let addresses = loopback::addresses(endpoints);
        let listeners = loopback::listen(&addresses);
        let port = listeners[0].local_addr().unwrap().port();
        let dns = DnsServer::start((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
        dns.zone([dns::cname(ALIAS_IN_DNS, TTL, TRUE_NAME)]);
        dns.zone(addresses.iter().map(|ip| dns::address(TRUE_NAME, TTL, *ip)));
        Self { dns, addresses, port, listeners }
    }

    /// Takes the listeners, one for each address: those that are dropped refuse connections.
    pub fn take_listeners(&mut self) -> Vec<TcpListener> {
        std::mem::take(&mut self.listeners)
    }

    /// Serves as httpbin.org does, by HTTP/2 or HTTP/1.1, at every address.
    pub fn serve(&mut self) -> Vec<Origin> {
        let tls = trust::server(&[TRUE_NAME]);
        let listeners = self.take_listeners().into_iter();
        listeners.map(|listener| Origin::serve(listener, tls.clone()).unwrap()).collect()
    }

    /// Runs a script at every address, behind TLS and HTTP/1.1.
    pub fn script<Script, Run>(&mut self, script: Script) -> Vec<RawOrigin>
    where
        Script: Fn(Arrival) -> Run + Clone + Send + Sync + 'static,
        Run: Future<Output = ()> + Send + 'static,
    {
        let tls = trust::server_with_alpn(&[TRUE_NAME], &["http/1.1"]);
        let listeners = self.take_listeners().into_iter();
        listeners
            .map(|listener| RawOrigin::start(listener, Some(tls.clone()), script.clone()))
            .collect()
    }

    /// A proxy's configuration: `keys` are further lines of the alias, unindented. Where they have a
    /// `tls:` it stands instead of the one that trusts `$FOLDER/root.pem` only.
    pub fn yaml(&self, keys: &str) -> String {
        let mut alias = format!("listen: [\"127.0.0.1:0\"]\nport: {}\n", self.port);
        if !keys.lines().any(|line| line.starts_with("tls:")) {
            alias.push_str(
                "tls: {ca: {system: false, webpki: false, files: [\"$FOLDER/root.pem\"]}}\n",
            );
        }
        alias.push_str(keys);
        let alias: String = alias.lines().map(|line| format!("    {line}\n")).collect();
        format!(
            "version: 1\n\
             dns: {{servers: [\"{}\"], cluster_domain: cluster.local, namespace: default, \
             cluster_max_ttl: 1m}}\n\
             policy: {{allow_addresses: [\"127.0.0.0/8\"]}}\n\
             aliases:\n  - name: {ALIAS}\n{alias}",
            self.dns.address()
        )
    }

    /// The same for a proxy that asks DNS four times a second, and has one worker and so one pool.
    pub fn restless_yaml(&self, keys: &str) -> String {
        let dns = "namespace: default, min_ttl: 250ms, max_ttl: 250ms";
        format!("workers: 1\n{}", self.yaml(keys).replace("namespace: default", dns))
    }

    /// A name with the port, which is not the default one here: its `Host`.
    pub fn authority(&self, name: &str) -> String {
        format!("{name}:{}", self.port)
    }
}
