//! A target under one true name, from the DNS response that brings the name to the one that replaces it.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
};

use arc_swap::{ArcSwap, ArcSwapOption};
use http::{HeaderValue, uri::Authority};
use parking_lot::Mutex;
use rustls::pki_types::ServerName;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    balance::Balancer,
    config,
    connect::{Destination, Identity, Wire},
    pool::PoolKey,
    protocol::Opening,
    resolve::{Resolution, TrueName},
    tls::{self, Alpn, ClientTls, Negotiated, TlsError},
};

/// Everything that follows from one [`TrueName`] and the settings: SNI, verified name, `Host`, endpoints.
///
/// **Invariant:** all of it is derived here, from the same resolution.
pub struct Generation {
    /// Which of the alias' targets it belongs to.
    target: u32,
    number: u64,
    true_name: TrueName,
    port: u16,
    /// The port of its endpoints, which may be a proxy's.
    endpoint_port: u16,
    is_proxied: bool,
    /// What the proxy is asked for.
    destination: ArcSwapOption<Destination>,
    tls: Option<(Arc<ClientTls>, ServerName<'static>)>,
    /// What is said before TLS.
    opening: Option<Opening>,
    authority: Authority,
    host: HeaderValue,
    resolution: ArcSwap<Resolution>,
    balancer: Arc<Balancer>,
    retired: AtomicBool,
    /// Cancelled when its sessions should end between messages.
    drain: CancellationToken,
    kill: CancellationToken,
    /// The connections without a task of their own, which a kill has to end.
    wires: Arc<Mutex<Vec<Open>>>,
}

struct Open {
    endpoint: SocketAddr,
    wire: Weak<Wire>,
}

impl Generation {
    /// For the target with this number, under the true name of `resolution`. What is known of the endpoints of the
    /// generation `before` is kept.
    ///
    /// Fails if the true name cannot be a TLS server name or a `Host`.
    pub fn new(
        alias: &config::Alias,
        target: (u32, u16),
        resolution: Arc<Resolution>,
        tls: Option<Arc<ClientTls>>,
        before: Option<&Self>,
    ) -> Result<Self, TlsError> {
        let (policy, health) = (alias.balance, alias.health.passive.clone());
        let balancer = match before {
            Some(before) => before.balancer.heir(policy, health),
            None => Balancer::new(policy, health),
        };
        let generation = Self::build(alias, target, resolution.clone(), tls, Arc::new(balancer))?;
        generation.rotate(resolution);
        Ok(generation)
    }

    fn build(
        alias: &config::Alias,
        (target, port): (u32, u16),
        resolution: Arc<Resolution>,
        tls: Option<Arc<ClientTls>>,
        balancer: Arc<Balancer>,
    ) -> Result<Self, TlsError> {
        let true_name = resolution.true_name.clone();
        let default_port = if tls.is_some() { 443 } else { 80 };
        let mut authority = match true_name.ip() {
            Some(std::net::IpAddr::V6(v6)) => format!("[{v6}]"),
            _ => true_name.as_str().to_owned(),
        };
        if port != default_port {
            authority.push_str(&format!(":{port}"));
        }
        let unusable = || TlsError::Name { name: true_name.to_string() };
        let host = HeaderValue::from_str(&authority).map_err(|_| unusable())?;
        let tls = match tls {
            Some(tls) => Some((tls, tls::server_name(&true_name)?)),
            None => None,
        };
        Ok(Self {
            target,
            number: resolution.generation,
            port,
            is_proxied: alias.via.is_some(),
            destination: ArcSwapOption::new(
                alias.via.is_some().then(|| destination(&resolution, port)),
            ),
            endpoint_port: alias.via.as_ref().map_or(port, |via| via.url.port),
            tls,
            opening: Opening::of(alias),
            authority: Authority::try_from(authority).map_err(|_| unusable())?,
            host,
            balancer,
            resolution: ArcSwap::new(resolution),
            retired: AtomicBool::new(false),
            drain: CancellationToken::new(),
            kill: CancellationToken::new(),
            wires: Arc::default(),
            true_name,
        })
    }

    /// Whether new requests may use it under these settings.
    pub fn is_of(&self, alias: &config::Alias, tls: Option<&Arc<ClientTls>>) -> bool {
        let trust = tls.map_or(0, |tls| tls.generation());
        trust == self.trust()
            && self.opening == Opening::of(alias)
            && self.balancer.has_settings(alias.balance, &alias.health.passive)
    }

    /// The same with other TLS material and settings. The endpoints, what is known of them, and what ends the
    /// connections stay.
    pub fn renew(
        &self,
        alias: &config::Alias,
        tls: Option<Arc<ClientTls>>,
    ) -> Result<Self, TlsError> {
        let (policy, health) = (alias.balance, &alias.health.passive);
        let balancer = match self.balancer.has_settings(policy, health) {
            true => self.balancer.clone(),
            false => Arc::new(self.balancer.heir(policy, health.clone())),
        };
        balancer.trust_anew();
        let target = (self.target, self.port);
        let renewed = Self::build(alias, target, self.resolution(), tls, balancer)?;
        let (drain, kill) = (self.drain.clone(), self.kill.clone());
        Ok(Self { drain, kill, wires: self.wires.clone(), ..renewed })
    }

    /// Uses the addresses of a newer resolution with the same true name.
    pub fn rotate(&self, resolution: Arc<Resolution>) {
        let endpoints: Vec<SocketAddr> = resolution
            .addresses
            .iter()
            .map(|address| SocketAddr::new(*address, self.endpoint_port))
            .collect();
        self.balancer.update(&endpoints, Instant::now());
        if self.is_proxied {
            self.destination.store(Some(destination(&resolution, self.port)));
        }
        self.resolution.store(resolution);
    }

    /// The number of its target.
    pub fn target(&self) -> u32 {
        self.target
    }

    /// Its target's port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Which of the target's true names this is.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// The name that is SNI, verified name and `Host`.
    pub fn true_name(&self) -> &TrueName {
        &self.true_name
    }

    /// The latest resolution.
    pub fn resolution(&self) -> Arc<Resolution> {
        self.resolution.load_full()
    }

    /// Settings and name for the handshake; `None` on plaintext.
    pub fn tls(&self) -> Option<(&ClientTls, &ServerName<'static>)> {
        self.tls.as_ref().map(|(tls, name)| (&**tls, name))
    }

    /// What a handshake verifies and offers; `None` on plaintext.
    pub fn identity(&self, alpn: Alpn) -> Option<Identity<'_>> {
        self.tls().map(|(tls, server_name)| Identity { tls, server_name, alpn })
    }

    /// What is said before TLS, if anything.
    pub fn opening(&self) -> Option<Opening> {
        self.opening.clone()
    }

    /// `https`, or `http` where `tls.mode` is `plaintext`.
    pub fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    /// The true name, with the port where it is not the scheme's default.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// The authority, as the value of `Host`.
    pub fn host(&self) -> &HeaderValue {
        &self.host
    }

    /// Its endpoints.
    pub fn balancer(&self) -> &Balancer {
        &self.balancer
    }

    /// The key of this generation's pooled connections to a destination.
    pub fn pool_key(
        &self,
        endpoint: SocketAddr,
        protocol: Negotiated,
        destination: Option<&Arc<Destination>>,
    ) -> PoolKey {
        let true_name = self.true_name.clone();
        let (trust, destination) = (self.trust(), destination.cloned());
        PoolKey { endpoint, true_name, protocol, trust, destination, client: None }
    }

    /// Whether a request of this generation could use a connection kept under `key`.
    pub fn makes(&self, key: &PoolKey) -> bool {
        key.true_name == self.true_name
            && key.trust == self.trust()
            && key.destination == self.destination()
            && self.has_endpoint(key.endpoint)
    }

    /// What its proxy is asked for; none without a proxy. The true name may stay the same while this changes.
    pub fn destination(&self) -> Option<Arc<Destination>> {
        if self.is_proxied { self.destination.load_full() } else { None }
    }

    fn trust(&self) -> u64 {
        self.tls.as_ref().map_or(0, |(tls, _)| tls.generation())
    }

    /// Whether `endpoint` is among the addresses of the latest resolution.
    pub fn has_endpoint(&self, endpoint: SocketAddr) -> bool {
        endpoint.port() == self.endpoint_port
            && self.resolution.load().addresses.contains(&endpoint.ip())
    }

    /// The alias leads elsewhere now: connections made for this name are not used again.
    pub fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
    }

    /// Whether another generation has taken over.
    pub fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
    }

    /// Has sessions that can end between messages do so.
    pub fn drain(&self) {
        self.drain.cancel();
    }

    /// Cancelled by [`drain`](Self::drain).
    pub fn draining(&self) -> CancellationToken {
        self.drain.clone()
    }

    /// Ends the connections that are still open.
    pub fn kill(&self) {
        self.kill.cancel();
        self.cut(|_| true);
    }

    /// Ends those of the connections that are open to certain endpoints.
    pub fn cut(&self, to: impl Fn(SocketAddr) -> bool) {
        for open in self.wires.lock().extract_if(.., |open| to(open.endpoint)) {
            open.wire.upgrade().iter().for_each(|wire| wire.cut());
        }
    }

    /// A connection was made that [`kill`](Self::kill) has to end.
    pub fn made(&self, endpoint: SocketAddr, wire: &Arc<Wire>) {
        let mut wires = self.wires.lock();
        if wires.len() == wires.capacity() {
            // Before it grows, so that it is never longer than twice the number of open connections.
            wires.retain(|open| open.wire.strong_count() > 0);
        }
        wires.push(Open { endpoint, wire: Arc::downgrade(wire) });
        drop(wires);
        if self.kill.is_cancelled() {
            wire.cut();
        }
    }

    /// Cancelled when the connections of this generation must end.
    pub fn killed(&self) -> CancellationToken {
        self.kill.clone()
    }
}

fn destination(resolution: &Resolution, port: u16) -> Arc<Destination> {
    Arc::new(Destination { host: resolution.destination.clone(), port })
}

impl fmt::Debug for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generation")
            .field("number", &self.number)
            .field("true_name", &self.true_name)
            .field("port", &self.port)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::{config::Config, tls::RootStores};

    #[test]
    fn a_port_is_named_only_where_it_is_not_the_schemes_own() {
        for (mode, name, port, host) in [
            ("verify", "httpbin.org", 443, "httpbin.org"),
            ("verify", "httpbin.org", 80, "httpbin.org:80"),
            ("verify", "httpbin.org", 8443, "httpbin.org:8443"),
            ("plaintext", "httpbin.org", 80, "httpbin.org"),
            ("plaintext", "httpbin.org", 443, "httpbin.org:443"),
            ("verify", "192.0.2.1", 443, "192.0.2.1"),
            ("verify", "2001:db8::1", 443, "[2001:db8::1]"),
            ("verify", "2001:db8::1", 8443, "[2001:db8::1]:8443"),
        ] {
            let generation = generation(mode, name, port);
            assert_eq!(generation.host(), host);
            assert_eq!(generation.authority(), host);
            assert_eq!(generation.true_name().as_str(), name);
        }
    }

    /// Two targets behind one proxy have the same endpoints, and with `tls.server_name` the same true name.
    #[test]
    fn a_connection_through_a_proxy_is_kept_for_its_destination() {
        let endpoint = "192.0.2.1:3128".parse().unwrap();
        let via = "plaintext}, via: \"http://192.0.2.1:3128\", limits: {requests: 0";
        let [one, same, other] = [443, 443, 8443].map(|port| generation(via, "httpbin.org", port));
        let key_of = |generation: &Generation| {
            generation.pool_key(endpoint, Negotiated::Http1, generation.destination().as_ref())
        };
        let key = key_of(&one);
        assert!(same.makes(&key));
        assert!(!other.makes(&key));
        assert_ne!(key_of(&other), key);
    }

    fn generation(mode: &str, name: &str, port: u16) -> Generation {
        let yaml = format!("version: 1\naliases: [{{name: alias, tls: {{mode: {mode}}}}}]\n");
        let config = Config::parse(&yaml, "truename.yaml").unwrap();
        let alias = &config.aliases[0];
        let tls = tls::ClientTls::load(&alias.tls, &mut RootStores::default()).unwrap();
        let resolution = Resolution {
            generation: 1,
            true_name: TrueName::for_test(name),
            destination: name.into(),
            chain: Vec::new(),
            addresses: vec!["192.0.2.1".parse().unwrap()],
            ttl: std::time::Duration::from_secs(60),
            resolved_at: Instant::now(),
        };
        Generation::new(alias, (1, port), Arc::new(resolution), tls.map(Arc::new), None).unwrap()
    }
}
