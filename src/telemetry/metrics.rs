//! The process' series, with the `metrics` crate. Those of aliases are in `series`.

use std::sync::OnceLock;

use metrics::{counter, describe_counter, describe_gauge, describe_histogram, gauge};
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

use super::{histogram::LATENCY_BUCKETS, process, stderr};

/// The results of a query in `resolve`.
const DNS_RESULTS: [&str; 13] = [
    "ok",
    "nxdomain",
    "nodata",
    "servfail",
    "refused",
    "other_code",
    "timeout",
    "connection_refused",
    "tcp",
    "malformed",
    "io",
    "unaskable",
    "no_servers",
];

/// The process' metrics. All proxies of a process share them, because the `metrics` crate is global.
#[derive(Clone, Debug)]
pub struct Metrics {
    handle: Option<PrometheusHandle>,
}

impl Metrics {
    /// Installs the recorder, the first time. A program that embeds truename and has its own recorder keeps
    /// it.
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

    /// Moves the histograms' buffers into their buckets. To be called every few seconds.
    pub fn upkeep(&self) {
        if let Some(handle) = &self.handle {
            handle.run_upkeep();
        }
    }

    /// The process' series in Prometheus' text format. Takes milliseconds: do not call it on a worker.
    pub fn render(&self) -> String {
        counter!("truename_log_lines_dropped_total").absolute(stderr::dropped());
        let mut text = self.handle.as_ref().map(PrometheusHandle::render).unwrap_or_default();
        process::write(&mut text);
        text
    }
}

/// The help texts of the process' series, and 0 for all labels that are known in advance.
fn describe() {
    describe_counter!("truename_dns_lookups_total", "DNS queries, by result.");
    describe_histogram!("truename_dns_lookup_duration_seconds", "DNS queries.");
    describe_counter!("truename_config_reloads_total", "Reloads of the configuration, by result.");
    describe_counter!(
        "truename_log_lines_dropped_total",
        "Log lines dropped because they could not be written in time."
    );
    describe_counter!(
        "truename_proxy_header_errors_total",
        "Connections closed because their PROXY protocol header was missing or invalid."
    );
    counter!("truename_proxy_header_errors_total").absolute(0);
    describe_gauge!("truename_build_info", "1, with the version.");
    for result in DNS_RESULTS {
        counter!("truename_dns_lookups_total", "result" => result).absolute(0);
    }
    for result in ["ok", "error"] {
        counter!("truename_config_reloads_total", "result" => result).absolute(0);
    }
}
