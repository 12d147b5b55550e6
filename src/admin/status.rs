//! What is known of every alias now, as JSON and as metrics.

use std::{
    collections::BTreeSet,
    fmt::{Display, Write},
    sync::Arc,
};

use serde::Serialize;
use tokio::time::Instant;

use crate::{
    balance::State,
    upstream::{EndpointStatus, Target, Upstream},
};

/// `GET /status`.
#[derive(Debug, Serialize)]
pub struct Status {
    version: &'static str,
    aliases: Vec<AliasStatus>,
}

#[derive(Debug, Serialize)]
struct AliasStatus {
    alias: String,
    listen: Vec<String>,
    targets: Vec<TargetStatus>,
    endpoints: Vec<Endpoint>,
    connections_idle: usize,
}

#[derive(Debug, Serialize)]
struct TargetStatus {
    true_name: Option<String>,
    port: u16,
    chain: Vec<String>,
    ttl_seconds: Option<f64>,
    age_seconds: Option<f64>,
    stale_seconds: Option<f64>,
    error: Option<String>,
    refused: Option<String>,
}

#[derive(Debug, Serialize)]
struct Endpoint {
    address: String,
    state: &'static str,
    in_flight: u32,
    latency_ms: Option<f64>,
    failures: u32,
    ejected_seconds: Option<f64>,
    connections_active: usize,
    connections_total: u64,
}

/// Takes it down.
pub fn status(upstreams: &[Arc<Upstream>]) -> Status {
    Status {
        version: env!("CARGO_PKG_VERSION"),
        aliases: upstreams.iter().map(|upstream| alias(upstream)).collect(),
    }
}

fn alias(upstream: &Upstream) -> AliasStatus {
    let now = Instant::now();
    let targets = upstream.targets().iter().map(|target| {
        let state = target.state();
        let current = state.current.as_ref();
        let seconds = |since: Instant| now.saturating_duration_since(since).as_secs_f64();
        TargetStatus {
            true_name: current.map(|current| current.true_name.to_string()),
            port: target.port(),
            chain: current
                .map(|current| current.chain.iter().map(|name| name.to_string()).collect())
                .unwrap_or_default(),
            ttl_seconds: current.map(|current| current.ttl.as_secs_f64()),
            age_seconds: current.map(|current| seconds(current.resolved_at)),
            stale_seconds: state.stale_since.map(seconds),
            error: state.error.as_ref().map(|error| error.to_string()),
            refused: state.refused.as_ref().map(|refusal| refusal.true_name.to_string()),
        }
    });
    AliasStatus {
        alias: upstream.config().name.clone(),
        listen: upstream.config().listen.iter().map(ToString::to_string).collect(),
        targets: targets.collect(),
        endpoints: upstream.endpoints().into_iter().map(endpoint).collect(),
        connections_idle: upstream.idle(),
    }
}

fn endpoint(endpoint: EndpointStatus) -> Endpoint {
    Endpoint {
        address: endpoint.address.to_string(),
        state: word(endpoint.state),
        in_flight: endpoint.in_flight,
        latency_ms: endpoint.latency.map(|latency| latency.as_secs_f64() * 1000.0),
        failures: endpoint.failures,
        ejected_seconds: endpoint.ejected_for.map(|ejected| ejected.as_secs_f64()),
        connections_active: endpoint.connections_active,
        connections_total: endpoint.connections_total,
    }
}

fn word(state: State) -> &'static str {
    match state {
        State::Active => "active",
        State::Ejected => "ejected",
        State::Retiring => "retiring",
    }
}

/// The series that come and go with endpoints and names: written from what is there now, so that those of
/// one that left disappear, which the recorder cannot do.
pub fn endpoint_metrics(upstreams: &[Arc<Upstream>], out: &mut String) {
    let now = Instant::now();
    let mut totals = String::new();
    let mut active = String::new();
    let mut states = String::new();
    let mut idle = String::new();
    let mut names = String::new();
    let mut stale = String::new();
    for upstream in upstreams {
        let alias = escape(&upstream.config().name);
        let mut counts = [(State::Active, 0), (State::Retiring, 0), (State::Ejected, 0)];
        let mut addresses = BTreeSet::new();
        for endpoint in upstream.endpoints() {
            // Targets may share an endpoint, too; its connections were counted together.
            if addresses.insert(endpoint.address) {
                let labels = format!("{{alias=\"{alias}\",endpoint=\"{}\"}}", endpoint.address);
                let total = endpoint.connections_total;
                line(&mut totals, "truename_upstream_connections_total", &labels, total);
                let open = endpoint.connections_active;
                line(&mut active, "truename_upstream_connections_active", &labels, open);
            }
            for (state, count) in &mut counts {
                *count += u64::from(*state == endpoint.state);
            }
        }
        for (state, count) in counts {
            let labels = format!("{{alias=\"{alias}\",state=\"{}\"}}", word(state));
            line(&mut states, "truename_endpoints", &labels, count);
        }
        let labels = format!("{{alias=\"{alias}\"}}");
        line(&mut idle, "truename_upstream_connections_idle", &labels, upstream.idle());
        let states: Vec<_> = upstream.targets().iter().map(Target::state).collect();
        let since = states.iter().filter_map(|state| state.stale_since).min();
        let seconds = since.map_or(0.0, |since| now.saturating_duration_since(since).as_secs_f64());
        line(&mut stale, "truename_dns_stale_seconds", &labels, seconds);
        // Targets may share a name, as those of two ports do.
        let true_names: BTreeSet<String> = states
            .iter()
            .filter_map(|state| Some(escape(state.current.as_ref()?.true_name.as_str())))
            .collect();
        for name in true_names {
            let labels = format!("{{alias=\"{alias}\",true_name=\"{name}\"}}");
            line(&mut names, "truename_true_name_info", &labels, 1);
        }
    }
    let families = [
        ("truename_upstream_connections_total", "counter", "Connections made.", totals),
        ("truename_upstream_connections_active", "gauge", "Connections open.", active),
        ("truename_endpoints", "gauge", "Endpoints, by state.", states),
        ("truename_upstream_connections_idle", "gauge", "Connections idle in pools.", idle),
        ("truename_true_name_info", "gauge", "1 for the true name of now.", names),
        (
            "truename_dns_stale_seconds",
            "gauge",
            "For how long an alias has lived on an old answer; 0 when it is fresh.",
            stale,
        ),
    ];
    for (name, kind, help, lines) in families {
        if !lines.is_empty() {
            let _ = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n{lines}\n");
        }
    }
}

fn line(out: &mut String, name: &str, labels: &str, value: impl Display) {
    let _ = writeln!(out, "{name}{labels} {value}");
}

/// A label's value in the text format.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
