//! The story: why TLS fails for an alias, and how truename fixes that. Every line is the result of an actual
//! request.

mod database;

use std::{
    collections::BTreeMap,
    io::{self, Write},
    net::{IpAddr, SocketAddr},
    path::Path,
    sync::Arc,
};

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, pem::PemObject},
};
use tokio::task::JoinSet;

pub use database::tell_of_database;

use super::{
    curl::{self, CurlError, Reply},
    nslookup::{Line, nslookup},
    origin::Visit,
    page::Page,
    world::{ADDRESSES, ALIAS, ALIAS_IN_DNS, TRUE_NAME, World},
};

const TARGET: &str = "/anything?test=value";
/// How many requests show the load balancing.
const REQUESTS: usize = 40;
/// Slow enough that all of them are in flight at once, so that they are balanced like those of a busy proxy.
const BUSY_TARGET: &str = "/delay/0.1";

/// The roots in a file.
pub fn roots(file: &Path) -> Result<Arc<RootCertStore>, Box<dyn std::error::Error>> {
    let mut roots = RootCertStore::empty();
    for root in CertificateDer::pem_file_iter(file)? {
        roots.add(root?)?;
    }
    Ok(Arc::new(roots))
}

/// The claims of the story, and whether they held.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Story {
    claims: Vec<Claim>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Claim {
    text: String,
    held: bool,
}

impl Story {
    /// Whether all claims held; `false` if there are none.
    pub fn held(&self) -> bool {
        !self.claims.is_empty() && self.claims.iter().all(|claim| claim.held)
    }

    /// The claims that did not hold.
    pub fn failures(&self) -> impl Iterator<Item = &str> {
        self.claims.iter().filter(|claim| !claim.held).map(|claim| claim.text.as_str())
    }

    /// How many claims there are.
    pub fn len(&self) -> usize {
        self.claims.len()
    }

    /// Whether there are no claims yet.
    pub fn is_empty(&self) -> bool {
        self.claims.is_empty()
    }

    fn claim(
        &mut self,
        page: &mut Page<impl Write>,
        held: bool,
        text: impl Into<String>,
    ) -> io::Result<()> {
        let text = text.into();
        page.verdict(held, &text)?;
        self.claims.push(Claim { text, held });
        Ok(())
    }
}

/// The proxy of the story.
#[derive(Clone, Debug)]
pub struct Proxy {
    /// The alias' listener.
    pub alias: SocketAddr,
    /// The forward proxy.
    pub forward: SocketAddr,
    /// The roots of its local authority.
    pub roots: Arc<RootCertStore>,
    /// The listener of the database's alias.
    pub database: SocketAddr,
}

/// Tells the story of `world` with a proxy, but for [`tell_of_database`]. Fails only if the page cannot be written.
pub async fn tell(world: &World, proxy: &Proxy, page: &mut Page<impl Write>) -> io::Result<Story> {
    let mut story = Story::default();
    what_dns_says(world, page, &mut story).await?;
    without_truename(world, page, &mut story).await?;
    with_truename(world, proxy.alias, page, &mut story).await?;
    through_the_forward_proxy(world, proxy, page, &mut story).await?;
    the_balance(proxy.alias, page, &mut story).await?;
    Ok(story)
}

async fn what_dns_says(
    world: &World,
    page: &mut Page<impl Write>,
    story: &mut Story,
) -> io::Result<()> {
    let server = world.dns().address();
    page.chapter("1. An ExternalName is only an alias in DNS")?;
    page.command(&format!("nslookup -port={} {ALIAS_IN_DNS} {}", server.port(), server.ip()))?;
    let lines = match nslookup(server, ALIAS_IN_DNS).await {
        Ok(lines) => lines,
        Err(error) => {
            page.line(&error.to_string())?;
            Vec::new()
        }
    };
    let mut leads_to = None;
    let mut addresses = Vec::new();
    for line in lines {
        match line {
            Line::Cname { owner, target } => {
                page.line(&format!("{owner}  canonical name = {target}"))?;
                leads_to = Some(target);
            }
            Line::Address { owner, ip } => {
                page.line(&format!("Name: {owner}  Address: {ip}"))?;
                addresses.push(ip);
            }
        }
    }
    addresses.sort();
    let held = leads_to.as_deref() == Some(TRUE_NAME) && addresses == ADDRESSES;
    story.claim(page, held, format!("{ALIAS} leads to {TRUE_NAME}, which has four addresses"))
}

async fn without_truename(
    world: &World,
    page: &mut Page<impl Write>,
    story: &mut Story,
) -> io::Result<()> {
    let origin = SocketAddr::new(ADDRESSES[0], world.port());
    page.chapter("2. Without truename: TLS expects the alias, and no certificate is valid for it")?;
    page.command(&command_without_truename(world))?;
    let response = curl::https(origin, ALIAS, world.authority().roots(), TARGET).await;
    let held = match response {
        Ok(reply) => {
            page.line(&format!("{}, although the name is wrong", reply.status))?;
            false
        }
        Err(error) => {
            page.line(&format!("curl: {error}"))?;
            match &error {
                CurlError::NameMismatch { expected, presented } => {
                    page.line(&format!("the expected name             {expected}"))?;
                    page.line(&format!("the certificate's only name   {}", presented.join(", ")))?;
                    expected == ALIAS && *presented == [TRUE_NAME]
                }
                _ => false,
            }
        }
    };
    story.claim(page, held, "the certificate is not valid for the alias, so curl refuses it")
}

async fn with_truename(
    world: &World,
    proxy: SocketAddr,
    page: &mut Page<impl Write>,
    story: &mut Story,
) -> io::Result<()> {
    page.chapter("3. With truename: plain HTTP to the alias, verified TLS to its true name")?;
    page.command(&command_with_truename(proxy))?;
    let response = curl::http(proxy, ALIAS, TARGET).await;
    let reply = match &response {
        Ok(reply) => {
            page.line(&describe(reply))?;
            Some(reply)
        }
        Err(error) => {
            page.line(&format!("curl: {error}"))?;
            None
        }
    };
    let succeeded =
        reply.is_some_and(|reply| reply.status == 200 && reply.body["args"]["test"] == "value");
    story.claim(page, succeeded, "the same request succeeds through truename")?;

    let visit = reply.and_then(|reply| visit_of(world, reply));
    let (sni, host) = match &visit {
        Some(visit) => (visit.sni.as_deref(), visit.host.as_deref()),
        None => (None, None),
    };
    page.line("what the origin saw")?;
    page.line(&format!("  SNI   {}", sni.unwrap_or("-")))?;
    page.line(&format!(
        "  Host  {}   (with its port, because that is not 443)",
        host.unwrap_or("-")
    ))?;
    // RFC 9110, section 7.2: `Host` has the port unless it is the scheme's default.
    let true_host = format!("{TRUE_NAME}:{}", world.port());
    let held = sni == Some(TRUE_NAME) && host == Some(true_host.as_str());
    story.claim(page, held, format!("SNI and Host were {TRUE_NAME}"))
}

async fn through_the_forward_proxy(
    world: &World,
    proxy: &Proxy,
    page: &mut Page<impl Write>,
    story: &mut Story,
) -> io::Result<()> {
    page.chapter("4. The URL that failed, through truename as a forward proxy")?;
    page.command(&command_with_proxy(world, proxy.forward))?;
    let response = curl::https_through(proxy.forward, ALIAS, proxy.roots.clone(), TARGET).await;
    let reply = match &response {
        Ok(reply) => {
            page.line(&describe(reply))?;
            Some(reply)
        }
        Err(error) => {
            page.line(&format!("curl: {error}"))?;
            None
        }
    };
    let visit = reply.and_then(|reply| visit_of(world, reply));
    let held = reply
        .is_some_and(|reply| reply.status == 200 && reply.body["args"]["test"] == "value")
        && visit.is_some_and(|visit| visit.sni.as_deref() == Some(TRUE_NAME));
    page.line("`truename exec` sets all of this up for a program:")?;
    page.to_try(&command_with_exec(world))?;
    story.claim(page, held, format!("https://{ALIAS} works, and both certificates are verified"))
}

async fn the_balance(
    proxy: SocketAddr,
    page: &mut Page<impl Write>,
    story: &mut Story,
) -> io::Result<()> {
    page.chapter(&format!("5. {REQUESTS} requests at once, over all addresses of the true name"))?;
    let mut requests = JoinSet::new();
    for _ in 0..REQUESTS {
        requests.spawn(curl::http(proxy, ALIAS, BUSY_TARGET));
    }
    let mut served: BTreeMap<IpAddr, usize> = ADDRESSES.map(|ip| (ip, 0)).into();
    let mut failure = None;
    while let Some(response) = requests.join_next().await {
        let response = response.map_err(io::Error::other)?;
        let by = response.as_ref().ok().filter(|reply| reply.status == 200).and_then(served_by);
        match (by.and_then(|ip| served.get_mut(&ip)), response) {
            (Some(count), _) => *count += 1,
            (None, Ok(reply)) => failure = Some(describe(&reply)),
            (None, Err(error)) => failure = Some(format!("curl: {error}")),
        }
    }
    let longest = served.values().copied().max().unwrap_or_default();
    for (ip, count) in &served {
        page.bar(&ip.to_string(), *count, longest)?;
    }
    if let Some(failure) = failure {
        page.line(&format!("one failed with: {failure}"))?;
    }
    let succeeded = served.values().sum::<usize>();
    story.claim(page, succeeded == REQUESTS, format!("{succeeded} of {REQUESTS} succeeded"))?;
    let all = served.values().all(|count| *count > 0);
    story.claim(page, all, "every address served some requests")
}

/// Commands to try while the demo is running.
pub fn curl_lines(world: &World, proxy: &Proxy, page: &mut Page<impl Write>) -> io::Result<()> {
    let (database, proxy) = (proxy.database, proxy.alias);
    page.chapter("Try it yourself; press Ctrl-C to stop")?;
    page.to_try(&command_with_truename(proxy))?;
    page.to_try(&format!("curl 'http://{proxy}/headers'"))?;
    page.to_try(&format!("curl -i -H 'Host: {ALIAS}' 'http://{proxy}/status/418'"))?;
    page.to_try(&format!("curl -N -H 'Host: {ALIAS}' 'http://{proxy}/stream/3'"))?;
    page.to_try(&format!(
        "curl -i -H 'Host: {ALIAS}' 'http://{proxy}/redirect-to?url=https://{TRUE_NAME}:{}/get'",
        world.port()
    ))?;
    page.to_try(&command_with_exec(world))?;
    page.to_try(&database::psql(database, "SHOW region"))?;
    page.line("a name that is not an alias, to see an error:")?;
    page.to_try(&format!("curl -H 'Host: elsewhere' 'http://{proxy}/'"))?;
    page.line("and the request that fails without truename:")?;
    page.to_try(&command_without_truename(world))
}

fn command_with_truename(proxy: SocketAddr) -> String {
    format!("curl -H 'Host: {ALIAS}' 'http://{proxy}{TARGET}'")
}

fn command_with_proxy(world: &World, proxy: SocketAddr) -> String {
    let root = world.authority_folder().join("ca.pem");
    format!("curl --cacert {} --proxy http://{proxy} 'https://{ALIAS}{TARGET}'", root.display())
}

fn command_with_exec(world: &World) -> String {
    let file = world.config_file().display();
    // The path that this process was started with, because it may not be in PATH.
    let truename = std::env::args().next().unwrap_or_else(|| "truename".to_owned());
    format!("{truename} exec --config {file} -- curl 'https://{ALIAS}{TARGET}'")
}

fn command_without_truename(world: &World) -> String {
    let port = world.port();
    format!(
        "curl --cacert {} --resolve {ALIAS}:{port}:{} 'https://{ALIAS}:{port}{TARGET}'",
        world.root_file().display(),
        ADDRESSES[0]
    )
}

/// The status with the origin that responded, or with truename's explanation.
fn describe(reply: &Reply) -> String {
    match (&reply.served_by, reply.body["detail"].as_str()) {
        (Some(ip), _) => format!("{}, from {ip}", reply.status),
        (None, Some(detail)) => format!("{}: {detail}", reply.status),
        (None, None) => reply.status.to_string(),
    }
}

fn served_by(reply: &Reply) -> Option<IpAddr> {
    reply.served_by.as_ref()?.parse().ok()
}

/// The request that got `reply`: the latest one of its origin.
fn visit_of(world: &World, reply: &Reply) -> Option<Visit> {
    let ip = served_by(reply)?;
    let origin = world.origins().iter().find(|origin| origin.address().ip() == ip)?;
    origin.visits().pop()
}

#[cfg(test)]
mod tests;
