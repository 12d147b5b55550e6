//! Metric handles, looked up once and kept: a look-up costs twenty times what a count does.

use std::{sync::OnceLock, time::Duration};

use http::{Method, StatusCode};
use metrics::{Counter, Gauge, Histogram, counter, gauge, histogram};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use parking_lot::Mutex;

use super::{process, stderr};
use crate::error::ProxyErrorType;

/// Seconds. From a cached answer on loopback to a slow report.
const LATENCY_BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];

/// The process' metrics. One for all proxies in a process, as the `metrics` crate has it.
#[derive(Clone, Debug)]
pub struct Metrics {
    handle: Option<PrometheusHandle>,
}

impl Metrics {
    /// Installs the recorder, the first time; a program that embeds truename and has a recorder
    /// of its own keeps it.
    pub fn install() -> Self {
        static METRICS: OnceLock<Metrics> = OnceLock::new();
        let install = || {
            let builder = PrometheusBuilder::new()
                .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &LATENCY_BUCKETS);
            let handle = builder.ok().and_then(|builder| {
                let recorder = builder.build_recorder();
                let handle = recorder.handle();
                ::metrics::set_global_recorder(recorder).ok().map(|()| handle)
            });
            gauge!("truename_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
            describe();
            Metrics { handle }
        };
        METRICS.get_or_init(install).clone()
    }

    /// Empties the histograms' buffers into their buckets: to be called every few seconds.
    pub fn upkeep(&self) {
        if let Some(handle) = &self.handle {
            handle.run_upkeep();
        }
    }

    /// All metrics in Prometheus' text format. Takes milliseconds: not for a worker.
    pub fn render(&self) -> String {
        counter!("truename_log_lines_dropped_total").absolute(stderr::dropped());
        let mut text = self.handle.as_ref().map(PrometheusHandle::render).unwrap_or_default();
        process::write(&mut text);
        text
    }
}

/// The help texts of `# HELP`.
fn describe() {
    use ::metrics::{describe_counter, describe_gauge, describe_histogram};
    describe_counter!("truename_http_requests_total", "Requests answered, by method and status.");
    describe_histogram!(
        "truename_http_request_duration_seconds",
        "From a request's head to its response's end."
    );
    describe_gauge!("truename_http_requests_in_flight", "Requests that have not ended.");
    describe_counter!("truename_downstream_connections_total", "Connections from applications.");
    describe_gauge!("truename_downstream_connections_active", "Connections from applications now.");
    describe_histogram!("truename_upstream_connect_duration_seconds", "TCP connects to endpoints.");
    describe_histogram!(
        "truename_upstream_tls_handshake_duration_seconds",
        "TLS handshakes with endpoints."
    );
    describe_counter!("truename_upstream_errors_total", "Failures, by their name in RFC 9209.");
    describe_counter!("truename_retries_total", "Requests sent again, by reason.");
    describe_counter!("truename_bytes_total", "Body bytes, by direction.");
    describe_counter!("truename_true_name_changes_total", "Times an alias led to a new true name.");
    describe_counter!("truename_policy_refusals_total", "True names and addresses refused.");
    describe_counter!("truename_dns_lookups_total", "DNS queries, by result.");
    describe_histogram!("truename_dns_lookup_duration_seconds", "DNS queries.");
    describe_gauge!(
        "truename_upstream_certificate_not_after_seconds",
        "Expiry of the certificate seen last, in Unix time, also when it was refused."
    );
    describe_counter!("truename_config_reloads_total", "Reloads of the configuration, by result.");
    describe_counter!(
        "truename_log_lines_dropped_total",
        "Log lines that nobody read in time, or that could not be written."
    );
    describe_gauge!("truename_build_info", "1, with the version.");
}

/// A connection from an application, counted while it lives for one alias: the only one of its
/// listener, or the one that its first request asked for.
#[derive(Debug)]
pub struct DownstreamConnection {
    protocol: &'static str,
    tls: bool,
    active: OnceLock<Gauge>,
}

impl DownstreamConnection {
    /// Not counted yet. `protocol` is its name in ALPN.
    pub fn new(protocol: &'static str, tls: bool) -> Self {
        Self { protocol, tls, active: OnceLock::new() }
    }

    /// Counts it for an alias, the first time.
    pub fn belongs_to(&self, alias: &AliasMetrics) {
        self.active.get_or_init(|| {
            alias.connection(self.protocol, self.tls);
            alias.connections.increment(1.0);
            alias.connections.clone()
        });
    }
}

impl Drop for DownstreamConnection {
    fn drop(&mut self) {
        if let Some(active) = self.active.get() {
            active.decrement(1.0);
        }
    }
}

/// One alias' handles, for one worker.
#[derive(Debug)]
pub struct AliasMetrics {
    alias: String,
    /// `truename_http_requests_in_flight`
    pub in_flight: Gauge,
    /// `truename_http_request_duration_seconds`
    pub duration: Histogram,
    /// `truename_bytes_total`, request bodies
    pub bytes_in: Counter,
    /// `truename_bytes_total`, response bodies
    pub bytes_out: Counter,
    connect_duration: Histogram,
    handshake_duration: [Histogram; 2],
    /// `truename_downstream_connections_active`
    connections: Gauge,
    /// By protocol, and whether there was TLS.
    accepted: Mutex<Vec<(&'static str, bool, Counter)>>,
    /// A few pairs in practice; a status is at most three digits, a method one of a closed list.
    requests: Mutex<Vec<(&'static str, StatusCode, Counter)>>,
}

impl AliasMetrics {
    /// Registers the alias' series.
    pub fn new(alias: &str) -> Self {
        let label = || alias.to_owned();
        let handshake = |resumed: &'static str| {
            histogram!(
                "truename_upstream_tls_handshake_duration_seconds",
                "alias" => label(), "resumed" => resumed
            )
        };
        Self {
            alias: label(),
            in_flight: gauge!("truename_http_requests_in_flight", "alias" => label()),
            duration: histogram!("truename_http_request_duration_seconds", "alias" => label()),
            bytes_in: counter!("truename_bytes_total", "alias" => label(), "direction" => "in"),
            bytes_out: counter!("truename_bytes_total", "alias" => label(), "direction" => "out"),
            connect_duration: histogram!(
                "truename_upstream_connect_duration_seconds", "alias" => label()
            ),
            handshake_duration: [handshake("false"), handshake("true")],
            connections: gauge!("truename_downstream_connections_active", "alias" => label()),
            accepted: Mutex::default(),
            requests: Mutex::default(),
        }
    }

    fn connection(&self, protocol: &'static str, tls: bool) {
        let mut accepted = self.accepted.lock();
        if let Some((_, _, counter)) = accepted.iter().find(|(p, t, _)| (*p, *t) == (protocol, tls))
        {
            counter.increment(1);
            return;
        }
        let counter = counter!(
            "truename_downstream_connections_total",
            "alias" => self.alias.clone(),
            "protocol" => protocol,
            "tls" => if tls { "true" } else { "false" }
        );
        counter.increment(1);
        accepted.push((protocol, tls, counter));
    }

    /// Counts an answered request.
    pub fn request(&self, method: &Method, status: StatusCode) {
        let method = known(method);
        let mut requests = self.requests.lock();
        if let Some((_, _, counter)) =
            requests.iter().find(|(m, s, _)| *m == method && *s == status)
        {
            counter.increment(1);
            return;
        }
        let counter = counter!(
            "truename_http_requests_total",
            "alias" => self.alias.clone(), "method" => method, "code" => status.as_str().to_owned()
        );
        counter.increment(1);
        requests.push((method, status, counter));
    }

    /// Counts a failure.
    pub fn error(&self, error: ProxyErrorType) {
        counter!(
            "truename_upstream_errors_total",
            "alias" => self.alias.clone(), "error" => error.as_str()
        )
        .increment(1);
    }

    /// Counts a request sent again.
    pub fn retry(&self, reason: &'static str) {
        counter!("truename_retries_total", "alias" => self.alias.clone(), "reason" => reason)
            .increment(1);
    }

    /// Counts an address that `policy` refused.
    pub fn address_refused(&self) {
        counter!(
            "truename_policy_refusals_total",
            "alias" => self.alias.clone(), "reason" => "address"
        )
        .increment(1);
    }

    /// Records a new connection.
    pub fn connected(&self, facts: &crate::connect::Facts) {
        self.connect_duration.record(facts.tcp_time);
        if facts.tls_version.is_some() {
            self.handshake_duration[usize::from(facts.resumed)].record(facts.tls_time);
        }
        self.certificate(facts.not_after);
    }

    /// Records the expiry of a certificate, accepted or not.
    pub fn certificate(&self, not_after: Option<i64>) {
        if let Some(not_after) = not_after {
            // Not registered before one was seen: at 0, it would have expired in 1970.
            gauge!("truename_upstream_certificate_not_after_seconds", "alias" => self.alias.clone())
                .set(not_after as f64);
        }
    }

    /// Records the end of a request.
    pub fn finished(&self, duration: Duration, bytes_in: u64, bytes_out: u64) {
        self.duration.record(duration);
        self.in_flight.decrement(1.0);
        self.bytes_in.increment(bytes_in);
        self.bytes_out.increment(bytes_out);
    }
}

/// A client chooses its methods freely, a label's values must be bounded.
fn known(method: &Method) -> &'static str {
    match *method {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        Method::OPTIONS => "OPTIONS",
        Method::CONNECT => "CONNECT",
        Method::TRACE => "TRACE",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_certificate_is_not_one_that_expired_in_1970() {
        let recorder = PrometheusBuilder::new().build_recorder();
        ::metrics::with_local_recorder(&recorder, || {
            let metrics = AliasMetrics::new("a");
            metrics.certificate(None);
            let rendered = recorder.handle().render();
            assert!(!rendered.contains("certificate_not_after"), "{rendered}");

            metrics.certificate(Some(1_900_000_000));
            let rendered = recorder.handle().render();
            let series = "truename_upstream_certificate_not_after_seconds{alias=\"a\"} 1900000000";
            assert!(rendered.contains(series), "{rendered}");
        });
    }
}
