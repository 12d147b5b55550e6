//! An alias' endpoints, for status and metrics.

use std::{net::SocketAddr, time::Duration};

use tokio::time::Instant;

use super::Alias;
use crate::balance::EndpointState;

/// An endpoint as `status` and the metrics show it.
#[derive(Clone, Debug)]
pub struct EndpointStatus {
    /// Its address.
    pub address: SocketAddr,
    /// Whether it takes requests.
    pub state: EndpointState,
    /// Requests that it is serving.
    pub in_flight: u32,
    /// Its estimated latency.
    pub latency: Option<Duration>,
    /// Transport failures in a row.
    pub failures: u32,
    /// How long it stays ejected.
    pub ejected_for: Option<Duration>,
    /// Connections made so far.
    pub connections_total: u64,
    /// Connections open now.
    pub connections_active: usize,
}

impl Alias {
    /// Every endpoint that takes requests or still has connections, with its counts.
    pub fn endpoints(&self) -> Vec<EndpointStatus> {
        let now = Instant::now();
        let connections = self.state.series.endpoints();
        let count = |address: SocketAddr| {
            connections.get(&address).map_or((0, 0), |c| (c.total(), c.active()))
        };
        let generations = self.targets.iter().filter_map(|target| target.generation.load_full());
        let mut endpoints: Vec<_> = generations
            .flat_map(|generation| generation.balancer().endpoints())
            .map(|endpoint| {
                let (total, active) = count(endpoint.address());
                EndpointStatus {
                    address: endpoint.address(),
                    state: endpoint.state(now),
                    in_flight: endpoint.in_flight(),
                    latency: endpoint.latency(now),
                    failures: endpoint.consecutive_failures(),
                    ejected_for: endpoint.ejected_for(now),
                    connections_total: total,
                    connections_active: active,
                }
            })
            .collect();
        for (address, counts) in connections.iter() {
            if counts.active() > 0 && !endpoints.iter().any(|known| known.address == *address) {
                endpoints.push(EndpointStatus {
                    address: *address,
                    state: EndpointState::Retiring,
                    in_flight: 0,
                    latency: None,
                    failures: 0,
                    ejected_for: None,
                    connections_total: counts.total(),
                    connections_active: counts.active(),
                });
            }
        }
        endpoints
    }
}
