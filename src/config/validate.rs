//! Checks of several values together: names, listeners, targets and files that do not fit.

use std::{
    collections::{HashMap, HashSet},
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use ipnet::IpNet;

use super::{
    Alias, Config, Postgres, Protocol, RetryOn, Target, TargetHost, TlsIn, TlsMode, available,
    credentials::read_credentials, file::regular, host_names, places::Places, problems::Found,
    table::Section,
};
use crate::files::reading;

/// Reports all problems of a configuration whose single values are valid.
pub(super) fn problems(config: &Config, places: &Places, problems: &mut Found) {
    let mut check = Check { config, places, problems };
    for (path, key) in available::refused(config) {
        let what = format!("`{key}` is not available in this version; leave it out");
        check.report(&path, &what);
    }
    let bound = check.bound();
    check.names();
    check.listeners(&bound);
    check.hosts();
    check.proxy_headers();
    check.order_of_durations();
    for (index, alias) in config.aliases.iter().enumerate() {
        let path = format!("aliases[{index}]");
        check.targets(&path, alias, &bound);
        check.allowed(&path, alias);
        check.trust(&path, alias);
        check.protocol(&path, alias);
        check.via(&path, alias, &bound);
    }
    check.listener_certificate();
    check.proxy_credentials();
}

struct Check<'a> {
    config: &'a Config,
    places: &'a Places,
    problems: &'a mut Found,
}

/// An address that the process would listen on.
struct Bound {
    /// The path of the key.
    path: String,
    address: SocketAddr,
    owner: Owner,
}

impl Bound {
    /// HTTP aliases are distinguished by their Host, so several may share an address. But one alias may not list it
    /// twice.
    fn shares_with(&self, other: &Self) -> bool {
        self.is_http() && other.is_http() && self.owner != other.owner
    }

    fn is_http(&self) -> bool {
        self.protocol() == Some(Protocol::Http)
    }

    /// The protocol, if this belongs to an alias.
    fn protocol(&self) -> Option<Protocol> {
        match self.owner {
            Owner::Alias { protocol, .. } => Some(protocol),
            Owner::Proxy | Owner::Admin => None,
        }
    }
}

/// The addresses of the listeners so far, indexed so that not every pair has to be compared.
#[derive(Default)]
struct Taken<'a> {
    by_port: HashMap<u16, HashMap<IpAddr, Vec<&'a Bound>>>,
}

impl<'a> Taken<'a> {
    fn overlapping(&self, address: SocketAddr) -> Vec<&'a Bound> {
        let Some(by_address) = self.by_port.get(&address.port()) else { return Vec::new() };
        let ip = address.ip().to_canonical();
        if ip.is_unspecified() {
            let all = by_address.values().flatten().copied();
            return all.filter(|bound| overlap(bound.address, address)).collect();
        }
        let any: IpAddr = match ip {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        let at = |ip| by_address.get(&ip).into_iter().flatten().copied();
        at(ip).chain(at(any)).filter(|bound| overlap(bound.address, address)).collect()
    }

    fn add(&mut self, bound: &'a Bound) {
        let at_port = self.by_port.entry(bound.address.port()).or_default();
        let here = at_port.entry(bound.address.ip().to_canonical()).or_default();
        // HTTP aliases may share an address: the first and the latest of them represent all.
        match here.as_mut_slice() {
            [first, .., latest] if first.shares_with(bound) && latest.is_http() => *latest = bound,
            _ => here.push(bound),
        }
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Owner {
    Alias { index: usize, protocol: Protocol },
    Proxy,
    Admin,
}

impl Check<'_> {
    fn report(&mut self, path: &str, what: &str) {
        if let Some(problem) = self.places.problem(path, what) {
            self.problems.push(problem);
        }
    }

    /// The key that the user wrote, if only one of the two is given.
    fn written<'k>(&self, key: &'k str, other: &'k str) -> &'k str {
        if self.places.was_given(other) && !self.places.was_given(key) { other } else { key }
    }

    /// "aliases[0] (`webscaler-manual`, line 3)"
    fn called(&self, index: usize) -> String {
        let path = format!("aliases[{index}]");
        let name = &self.config.aliases[index].name;
        match self.places.find(&path) {
            Some(position) => format!("{path} (`{name}`, line {})", position.line),
            None => format!("{path} (`{name}`)"),
        }
    }

    fn names(&mut self) {
        let mut first = HashMap::new();
        for (index, alias) in self.config.aliases.iter().enumerate() {
            let path = format!("aliases[{index}].name");
            if self.places.is_unreadable(&path) {
                continue;
            }
            let first = *first.entry(alias.name.as_str()).or_insert(index);
            if first != index {
                let first = self.called(first);
                let what = format!("duplicate alias `{}`: {first} has the same name", alias.name);
                self.report(&path, &what);
            }
        }
    }

    fn bound(&self) -> Vec<Bound> {
        let mut bound = Vec::new();
        for (index, alias) in self.config.aliases.iter().enumerate() {
            for (nth, &address) in alias.listen.iter().enumerate() {
                let path = format!("aliases[{index}].listen[{nth}]");
                let owner = Owner::Alias { index, protocol: alias.protocol };
                bound.push(Bound { path, address, owner });
            }
        }
        let own = [
            ("proxy.listen", self.config.proxy.listen, Owner::Proxy),
            ("admin.listen", self.config.admin.listen, Owner::Admin),
        ];
        for (path, address, owner) in own {
            let bind = |address| Bound { path: path.to_owned(), address, owner };
            bound.extend(address.map(bind));
        }
        // If a value could not be read, its default is not what the user wanted.
        bound.retain(|bound| !self.places.is_unreadable(&bound.path));
        bound
    }

    fn listeners(&mut self, bound: &[Bound]) {
        let mut taken = Taken::default();
        for listener in bound {
            let address = listener.address;
            if !self.config.allow_non_loopback && !address.ip().to_canonical().is_loopback() {
                let what = format!(
                    "{address} can be reached from outside this machine: listen on 127.0.0.1, \
                     or set `allow_non_loopback: true` at the top of the file"
                );
                self.report(&listener.path, &what);
            }
            for earlier in taken.overlapping(address) {
                // The problem is reported at what the user wrote, not at a default that conflicts with it.
                let at_earlier = self.written(&listener.path, &earlier.path) == earlier.path;
                let (at, other) =
                    if at_earlier { (earlier, listener) } else { (listener, earlier) };
                if let Some(what) = self.conflict(at, other, bound) {
                    self.report(&at.path, &what);
                }
            }
            taken.add(listener);
        }
    }

    fn conflict(&self, at: &Bound, other: &Bound, all: &[Bound]) -> Option<String> {
        let (address, taken) = (at.address, other.address);
        if address == taken && at.shares_with(other) {
            return None;
        }
        // Port 0 is a different port each time, except for aliases: they share one.
        let both_are_aliases = at.protocol().is_some() && other.protocol().is_some();
        if address.port() == 0 && !(both_are_aliases && at.owner != other.owner) {
            return None;
        }
        let holder = match other.owner {
            Owner::Alias { index, .. } => self.called(index),
            Owner::Proxy => "proxy.listen".to_owned(),
            Owner::Admin => "admin.listen".to_owned(),
        };
        if let (Owner::Alias { index, .. }, Owner::Alias { index: same, .. }) =
            (at.owner, other.owner)
            && index == same
        {
            return Some(format!(
                "{address} is already covered by {taken} of this alias; keep one"
            ));
        }
        let mut protocols = [at, other].into_iter().filter_map(Bound::protocol);
        let fix = match protocols.find(|protocol| *protocol != Protocol::Http) {
            None => "give one of them another port".to_owned(),
            Some(protocol) => {
                let instead = match free_address(address.port(), all) {
                    Some(free) => free.to_string(),
                    None => "another port".to_owned(),
                };
                let protocol = protocol.word();
                format!(
                    "an alias of `protocol: {protocol}` needs its own address, such as {instead}"
                )
            }
        };
        Some(format!("{address} conflicts with {taken} of {holder}: {fix}"))
    }

    fn hosts(&mut self) {
        let aliases = &self.config.aliases;
        let mut served = HashMap::new();
        for (index, alias) in aliases.iter().enumerate() {
            let names = host_names::names(alias, &self.config.dns);
            // Two aliases may have many forms in common on many listeners. One of them is enough to report.
            let mut reported = HashSet::from([index]);
            for (address, (name, key)) in alias
                .listen
                .iter()
                .flat_map(|address| names.iter().map(move |name| (address, name)))
            {
                let first = *served.entry((*address, name.clone())).or_insert(index);
                let duplicate = aliases[first].name == alias.name;
                if !duplicate && reported.insert(first) {
                    let first = self.called(first);
                    let what = format!(
                        "the Host `{name}` already belongs to {first} on the same listener; \
                        give one of them its own `listen`"
                    );
                    self.report(&format!("aliases[{index}].{key}"), &what);
                }
            }
        }
    }

    /// Whether a connection begins with a PROXY header has to be known before its Host is.
    fn proxy_headers(&mut self) {
        let aliases = &self.config.aliases;
        let networks = |index: usize| -> HashSet<_> {
            aliases[index].proxy_protocol.accept.iter().map(IpNet::trunc).collect()
        };
        let mut first_at = HashMap::new();
        for (index, alias) in aliases.iter().enumerate() {
            let is_other = |address: &&SocketAddr| {
                let first = *first_at.entry(**address).or_insert(index);
                first != index && networks(first) != networks(index)
            };
            if let Some(address) = alias.listen.iter().find(is_other) {
                let first = first_at[address];
                let [path, of_first] =
                    [index, first].map(|index| format!("aliases[{index}].proxy_protocol.accept"));
                let at_first = self.written(&path, &of_first) == of_first;
                let (at, other) = if at_first { (of_first, index) } else { (path, first) };
                let what = format!(
                    "this differs from `proxy_protocol.accept` of {}, which listens on {address} too: \
                     a PROXY header comes before the Host, so give both the same networks, or one of \
                     them its own `listen`",
                    self.called(other)
                );
                self.report(&at, &what);
            }
        }
    }

    fn order_of_durations(&mut self) {
        let dns = &self.config.dns;
        if dns.min_ttl > dns.max_ttl && !self.places.is_unreadable("dns.max_ttl") {
            let what = format!("min_ttl ({:?}) is above max_ttl ({:?})", dns.min_ttl, dns.max_ttl);
            let path = self.written("dns.min_ttl", "dns.max_ttl");
            self.report(path, &what);
        }
        for (index, alias) in self.config.aliases.iter().enumerate() {
            let passive = &alias.health.passive;
            let eject = format!("aliases[{index}].health.passive.eject");
            let max_eject = format!("aliases[{index}].health.passive.max_eject");
            if passive.eject > passive.max_eject && !self.places.is_unreadable(&max_eject) {
                let what = format!(
                    "eject ({:?}) is above max_eject ({:?})",
                    passive.eject, passive.max_eject
                );
                let path = self.written(&eject, &max_eject).to_owned();
                self.report(&path, &what);
            }
        }
    }

    fn targets(&mut self, path: &str, alias: &Alias, bound: &[Bound]) {
        for (path, target) in targets(path, alias) {
            let own = addresses(target, alias.port)
                .find_map(|address| bound.iter().find(|bound| reaches(address, bound.address)));
            if let Some(own) = own {
                let what = format!(
                    "`{target}` is this proxy's own {} ({}): requests would loop",
                    own.path, own.address
                );
                self.report(&path, &what);
            }
        }
    }

    /// If the file alone determines the true name, it must be one that the file allows.
    fn allowed(&mut self, path: &str, alias: &Alias) {
        if alias.allow.is_empty() || self.places.is_unreadable(&format!("{path}.allow")) {
            return;
        }
        if let Some(name) = &alias.tls.server_name {
            // It is the true name of all targets.
            if !alias.allow.iter().any(|pattern| pattern.matches(name)) {
                let what = format!("`{name}` is not in `allow`; add it there");
                self.report(&format!("{path}.tls.server_name"), &what);
            }
            return;
        }
        for (at, target) in targets(path, alias) {
            match &target.host {
                TargetHost::Name(name) if !can_be_allowed(alias, name) => {
                    let what = format!("`{name}` is not in `allow`; add it there");
                    self.report(&at, &what);
                }
                TargetHost::Ip(ip) => {
                    let what = format!(
                        "`{ip}` is an address, and `allow` has names only: set `tls.server_name` to the \
                        name that its certificate is valid for, or leave `allow` empty"
                    );
                    self.report(&at, &what);
                }
                TargetHost::Name(_) => {}
            }
        }
    }

    fn trust(&mut self, path: &str, alias: &Alias) {
        let ca = &alias.tls.ca;
        let nobody = !ca.system && !ca.webpki && ca.files.is_empty();
        if alias.tls.mode == TlsMode::Verify
            && nobody
            && !self.places.is_unreadable(&format!("{path}.tls.ca.files"))
        {
            let what = "no certificate could be verified: set `system` or `webpki` to true, \
            or list a file of certificate authorities in `files`";
            self.report(&format!("{path}.tls.ca"), what);
        }
        for (nth, file) in ca.files.iter().enumerate() {
            self.file(&format!("{path}.tls.ca.files[{nth}]"), file);
        }
        for (nth, file) in alias.tls.crls.iter().enumerate() {
            self.file(&format!("{path}.tls.crls[{nth}]"), file);
        }
        if let Some(pair) = &alias.tls.client_certificate {
            self.file(&format!("{path}.tls.client_certificate.cert"), &pair.cert);
            self.file(&format!("{path}.tls.client_certificate.key"), &pair.key);
        }
    }

    /// Keys of another protocol.
    fn protocol(&mut self, path: &str, alias: &Alias) {
        let protocol = alias.protocol.word();
        if alias.protocol != Protocol::Tcp && !alias.tcp.alpn.is_empty() {
            let what = "`tcp` is for `protocol: tcp` only; leave it out";
            self.report(&format!("{path}.tcp"), what);
        }
        if alias.protocol != Protocol::Postgres && alias.postgres != Postgres::default() {
            let what = "`postgres` is for `protocol: postgres` only; leave it out";
            self.report(&format!("{path}.postgres"), what);
        }
        if alias.protocol == Protocol::Http {
            if alias.tls_in != TlsIn::Auto {
                let what =
                    "`tls_in` is not available for `protocol: http` in this version; leave it out";
                self.report(&format!("{path}.tls_in"), what);
            }
            return;
        }
        let blank = Alias::blank();
        for (key, is_set) in [
            ("host", alias.host != blank.host),
            ("repair", alias.repair != blank.repair),
            ("forwarded", alias.forwarded != blank.forwarded),
            ("http", alias.http != blank.http),
            ("pool.max_idle", alias.pool.max_idle != blank.pool.max_idle),
            ("pool.idle_timeout", alias.pool.idle_timeout != blank.pool.idle_timeout),
            ("pool.max_lifetime", alias.pool.max_lifetime != blank.pool.max_lifetime),
            ("timeouts.response", alias.timeouts.response != blank.timeouts.response),
        ] {
            if is_set {
                let what = format!(
                    "`{key}` is for `protocol: http` only, and this alias is `{protocol}`; leave it out"
                );
                self.report(&format!("{path}.{key}"), &what);
            }
        }
        for (nth, when) in alias.retry.when.iter().enumerate() {
            if *when != RetryOn::Connect {
                let what = format!(
                    "a `{protocol}` alias retries on `connect` only: what has been sent cannot be sent again"
                );
                self.report(&format!("{path}.retry.when[{nth}]"), &what);
            }
        }
        if alias.tls.mode == TlsMode::Plaintext && !alias.tcp.alpn.is_empty() {
            let what =
                "`alpn` is part of TLS, and `tls.mode` is `plaintext`; leave one of them out";
            self.report(&format!("{path}.tcp.alpn"), what);
        }
    }

    fn via(&mut self, path: &str, alias: &Alias, bound: &[Bound]) {
        let Some(via) = &alias.via else { return };
        let proxy = Target { host: via.url.host.clone(), port: Some(via.url.port) };
        let own = addresses(&proxy, via.url.port)
            .find_map(|address| bound.iter().find(|bound| reaches(address, bound.address)));
        if let Some(own) = own {
            let what = format!(
                "`{}` is this proxy's own {} ({}): requests would loop",
                via.url, own.path, own.address
            );
            self.report(&format!("{path}.via"), &what);
        }
        if let Some(file) = &via.credentials
            && let Err(error) = read_credentials(file)
        {
            let what = format!("cannot use the file `{}`: {error}", file.display());
            self.report(&format!("{path}.via.credentials"), &what);
        }
    }

    fn listener_certificate(&mut self) {
        let tls = &self.config.listener.tls;
        match (&tls.certificate, &tls.key) {
            (Some(_), None) => {
                self.report("listener.tls.certificate", "`certificate` requires `key`");
            }
            (None, Some(_)) => {
                self.report("listener.tls.key", "`key` requires `certificate`");
            }
            _ => {}
        }
        for (path, file) in
            [("listener.tls.certificate", &tls.certificate), ("listener.tls.key", &tls.key)]
        {
            if let Some(file) = file {
                self.file(path, file);
            }
        }
    }

    fn proxy_credentials(&mut self) {
        if let Some(file) = &self.config.proxy.credentials
            && let Err(error) = read_credentials(file)
        {
            let what = format!("cannot use the file `{}`: {error}", file.display());
            self.report("proxy.credentials", &what);
        }
    }

    fn file(&mut self, path: &str, file: &Path) {
        if self.places.is_unreadable(path) {
            return;
        }
        let _reading = reading(file);
        // Opening it shows whether it may be read.
        let found = regular(file).and_then(|()| Ok(fs::File::open(file)?));
        if let Err(error) = found {
            self.report(path, &format!("cannot read the file `{}`: {error}", file.display()));
        }
    }
}

/// The configured targets, with their paths.
fn targets<'a>(path: &str, alias: &'a Alias) -> impl Iterator<Item = (String, &'a Target)> {
    let first = alias.target.iter().map(move |target| (format!("{path}.target"), target));
    let others = alias.failover.iter().enumerate();
    first.chain(others.map(move |(nth, target)| (format!("{path}.failover[{nth}]"), target)))
}

/// Whether a target with this name can have an allowed true name: its own, or a later one of its chain that
/// `tls.chain_match` chooses.
fn can_be_allowed(alias: &Alias, name: &str) -> bool {
    let chosen = &alias.tls.chain_match;
    let is_chosen = chosen.iter().any(|pattern| pattern.matches(name));
    alias.allow.iter().any(|allowed| {
        allowed.matches(name)
            || !is_chosen && chosen.iter().any(|pattern| pattern.overlaps(allowed))
    })
}

/// Whether the two addresses cannot be bound at the same time; for port 0, whether they are the same.
fn overlap(a: SocketAddr, b: SocketAddr) -> bool {
    // An IPv4-mapped address is the IPv4 address.
    let (one, other) = (a.ip().to_canonical(), b.ip().to_canonical());
    let same_family = one.is_ipv4() == other.is_ipv4();
    let includes = same_family && (one.is_unspecified() || other.is_unspecified());
    a.port() == b.port() && (one == other || a.port() != 0 && includes)
}

/// A loopback address other than 127.0.0.1 on which no configured listener uses `port`.
fn free_address(port: u16, bound: &[Bound]) -> Option<SocketAddr> {
    let mut candidates = (1..=254).map(|last| SocketAddr::from(([127, 0, 1, last], port)));
    candidates.find(|candidate| !bound.iter().any(|bound| overlap(bound.address, *candidate)))
}

/// Whether a connection to `target` would arrive at the listener on `bound`.
fn reaches(target: SocketAddr, bound: SocketAddr) -> bool {
    let (target_ip, bound_ip) = (target.ip().to_canonical(), bound.ip().to_canonical());
    // `0.0.0.0` accepts no connections over IPv6; `::` also accepts those over IPv4.
    let takes_family = bound_ip.is_ipv6() || target_ip.is_ipv4();
    let by_wildcard = bound_ip.is_unspecified() && target_ip.is_loopback() && takes_family;
    // Linux routes a connection to the unspecified address to loopback.
    let to_wildcard = target_ip.is_unspecified() && bound_ip.is_loopback();
    target.port() == bound.port() && (target_ip == bound_ip || by_wildcard || to_wildcard)
}

/// The addresses of a target as far as they are known without DNS.
fn addresses(target: &Target, default_port: u16) -> impl Iterator<Item = SocketAddr> {
    let port = target.port.unwrap_or(default_port);
    let ips = match &target.host {
        TargetHost::Ip(ip) => [Some(*ip), None],
        TargetHost::Name(name) if name == "localhost" => {
            [Some(IpAddr::V4(Ipv4Addr::LOCALHOST)), Some(IpAddr::V6(Ipv6Addr::LOCALHOST))]
        }
        TargetHost::Name(_) => [None, None],
    };
    ips.into_iter().flatten().map(move |ip| SocketAddr::new(ip, port))
}
