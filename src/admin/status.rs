//! The current status of all aliases, as JSON.

use std::sync::Arc;

use serde::Serialize;
use tokio::time::Instant;

use crate::{
    balance::EndpointState,
    upstream::{Alias, EndpointStatus},
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

/// Collects the status.
pub fn status(aliases: &[Arc<Alias>]) -> Status {
    Status {
        version: env!("CARGO_PKG_VERSION"),
        aliases: aliases.iter().map(|alias| alias_status(alias)).collect(),
    }
}

fn alias_status(alias: &Alias) -> AliasStatus {
    let now = Instant::now();
    let targets = alias.targets().iter().map(|target| {
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
        alias: alias.config().name.clone(),
        listen: alias.config().listen.iter().map(ToString::to_string).collect(),
        targets: targets.collect(),
        endpoints: alias.endpoints().into_iter().map(endpoint).collect(),
        connections_idle: alias.idle(),
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

pub(super) fn word(state: EndpointState) -> &'static str {
    match state {
        EndpointState::Active => "active",
        EndpointState::Ejected => "ejected",
        EndpointState::Retiring => "retiring",
    }
}
