//! `/metrics`, in pieces: with thousands of aliases it has many megabytes, which the proxy must not keep in
//! memory for a scraper that does not read.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http_body::{Body, Frame};
use tokio::time::Instant;

use super::status::word;
use crate::{
    balance::EndpointState,
    telemetry::{AliasMetrics, Family, Lines, SERIES},
    upstream::{Alias, EndpointStatus},
};

/// The size of a piece, which may be exceeded a little.
const PIECE: usize = 64 * 1024;

/// The body of one scrape.
pub(super) struct Scrape {
    /// The process' own series, until they are written.
    process: Option<String>,
    aliases: Arc<Vec<Arc<Alias>>>,
    /// What is next: a family, and one of its sources.
    family: usize,
    source: usize,
    /// The family's header is written.
    headed: bool,
    /// A piece was returned, and no other task has run since.
    in_a_row: bool,
}

impl Scrape {
    /// For these aliases. `process` are the series of the process, as text.
    pub(super) fn new(process: String, aliases: Arc<Vec<Arc<Alias>>>) -> Self {
        Self {
            process: Some(process),
            aliases,
            family: 0,
            source: 0,
            headed: false,
            in_a_row: false,
        }
    }

    fn piece(&mut self) -> Option<String> {
        let mut out = self.process.take().unwrap_or_default();
        while out.len() < PIECE && self.family < SERIES.len() + UPSTREAM.len() {
            if !self.add(&mut out) {
                (self.family, self.source, self.headed) = (self.family + 1, 0, false);
            }
        }
        (!out.is_empty()).then_some(out)
    }

    /// Adds the series of the next source; `false` if the family has no more.
    fn add(&mut self, out: &mut String) -> bool {
        let Self { aliases, headed, .. } = self;
        let source = self.source;
        self.source += 1;
        if let Some(family) = SERIES.get(self.family) {
            // Series that belong to no alias are first.
            let series = match source.checked_sub(1) {
                None => AliasMetrics::of_no_alias().series(),
                Some(index) => match aliases.get(index) {
                    Some(alias) => alias.series(),
                    None => return false,
                },
            };
            family.add(series, series.alias(), headed, out);
        } else {
            let Some(alias) = aliases.get(source) else { return false };
            let family = &UPSTREAM[self.family - SERIES.len()];
            family.add(alias, &alias.config().name, headed, out);
        }
        true
    }
}

impl Body for Scrape {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        // Probes, DNS and reloads share the thread, and run between the pieces.
        self.in_a_row = !self.in_a_row;
        if !self.in_a_row {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(self.piece().map(|piece| Ok(Frame::data(piece.into()))))
    }
}

/// Series that depend on endpoints and names. They are read from the current state, so that those of removed
/// endpoints disappear.
const UPSTREAM: [Family<Alias>; 6] = [
    Family {
        name: "truename_upstream_connections_total",
        kind: "counter",
        help: "Connections opened.",
        write: |alias, lines| by_endpoint(alias, lines, |e| e.connections_total),
    },
    Family {
        name: "truename_upstream_connections_active",
        kind: "gauge",
        help: "Open connections.",
        write: |alias, lines| by_endpoint(alias, lines, |e| e.connections_active as u64),
    },
    Family {
        name: "truename_endpoints",
        kind: "gauge",
        help: "Endpoints, by state.",
        write: |alias, lines| {
            let endpoints = alias.endpoints();
            for state in [EndpointState::Active, EndpointState::Retiring, EndpointState::Ejected] {
                let count = endpoints.iter().filter(|endpoint| endpoint.state == state).count();
                lines.add(&[("state", word(state))], count);
            }
        },
    },
    Family {
        name: "truename_upstream_connections_idle",
        kind: "gauge",
        help: "Idle connections in pools.",
        write: |alias, lines| lines.add(&[], alias.idle()),
    },
    Family {
        name: "truename_true_name_info",
        kind: "gauge",
        help: "1 for the current true name.",
        write: |alias, lines| {
            // Targets may share a name, with different ports.
            let states = alias.targets().iter().map(|target| target.state());
            let names: BTreeSet<String> = states
                .filter_map(|state| Some(state.current.as_ref()?.true_name.to_string()))
                .collect();
            for name in names {
                lines.add(&[("true_name", &name)], 1);
            }
        },
    },
    Family {
        name: "truename_dns_stale_seconds",
        kind: "gauge",
        help: "Age of the stale DNS response in use; 0 if it is fresh.",
        write: |alias, lines| {
            let states = alias.targets().iter().map(|target| target.state());
            let since = states.filter_map(|state| state.stale_since).min();
            let age = since.map(|since| Instant::now().saturating_duration_since(since));
            lines.add(&[], age.unwrap_or_default().as_secs_f64());
        },
    },
];

fn by_endpoint(alias: &Alias, lines: &mut Lines<'_>, value: impl Fn(&EndpointStatus) -> u64) {
    let mut addresses = BTreeSet::new();
    for endpoint in alias.endpoints() {
        // Targets may share an endpoint, too. Its connections are counted together.
        if addresses.insert(endpoint.address) {
            lines.add(&[("endpoint", &endpoint.address.to_string())], value(&endpoint));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::task::Waker;

    use super::*;

    #[test]
    fn others_have_a_turn_after_each_piece() {
        let mut scrape = Scrape::new("x".repeat(PIECE), Arc::default());
        let mut cx = Context::from_waker(Waker::noop());
        let mut poll = || Pin::new(&mut scrape).poll_frame(&mut cx);
        assert!(matches!(poll(), Poll::Ready(Some(Ok(frame))) if frame.is_data()));
        assert!(poll().is_pending());
        let Poll::Ready(Some(Ok(rest))) = poll() else { panic!("the rest is there") };
        assert!(rest.data_ref().unwrap().starts_with(b"# HELP "));
        assert!(poll().is_pending());
        assert!(matches!(poll(), Poll::Ready(None)));
    }
}
