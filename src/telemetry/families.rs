//! Series in Prometheus' text format, family by family.

use std::{
    fmt::{Display, Write},
    sync::atomic::{AtomicU64, Ordering::Relaxed},
};

use super::{
    histogram::{LATENCY_BUCKETS, Totals},
    series::{AliasSeries, PROTOCOLS, RetryReason},
};
use crate::fault::ProxyErrorType;

/// All metrics with one name, which a scrape has together. `write` adds those of a source.
pub struct Family<Source> {
    /// Its name.
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// The help text, on one line.
    pub help: &'static str,
    /// Writes the lines of one alias.
    pub write: fn(&Source, &mut Lines<'_>),
}

/// The lines of one alias in one family.
pub struct Lines<'a> {
    out: &'a mut String,
    name: &'static str,
    alias: &'a str,
}

impl<Source> Family<Source> {
    /// Adds an alias' series. `headed` is whether `out` already has the family's header. It is set once the
    /// header is written: a family without series has no header.
    pub fn add(&self, source: &Source, alias: &str, headed: &mut bool, out: &mut String) {
        let before = out.len();
        if !*headed {
            let Self { name, kind, help, .. } = self;
            let _ = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        }
        let head = out.len();
        (self.write)(source, &mut Lines { out, name: self.name, alias });
        if out.len() == head {
            out.truncate(before);
        } else {
            *headed = true;
        }
    }
}

impl Lines<'_> {
    /// A series: its labels after `alias`, and its value.
    pub fn add(&mut self, labels: &[(&str, &str)], value: impl Display) {
        self.series("", labels, value);
    }

    fn series(&mut self, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
        self.out.push_str(self.name);
        self.out.push_str(suffix);
        self.out.push_str("{alias=\"");
        escape(self.alias, self.out);
        for (label, value) in labels {
            self.out.push_str("\",");
            self.out.push_str(label);
            self.out.push_str("=\"");
            escape(value, self.out);
        }
        let _ = writeln!(self.out, "\"}} {value}");
    }

    fn histogram(&mut self, label: Option<(&str, &str)>, totals: &Totals) {
        let mut cumulative = 0;
        for (index, count) in totals.buckets.iter().enumerate() {
            cumulative += count;
            let bound = LATENCY_BUCKETS.get(index).map_or("+Inf".into(), ToString::to_string);
            let le = ("le", bound.as_str());
            match label {
                Some(label) => self.series("_bucket", &[label, le], cumulative),
                None => self.series("_bucket", &[le], cumulative),
            }
        }
        self.series("_sum", label.as_slice(), totals.seconds);
        self.series("_count", label.as_slice(), cumulative);
    }
}

/// A label's value in the text format.
fn escape(value: &str, out: &mut String) {
    for character in value.chars() {
        match character {
            '\\' => out.push_str("\\\\"),
            '"' => out.push_str("\\\""),
            '\n' => out.push_str("\\n"),
            other => out.push(other),
        }
    }
}

/// The series that an alias counts itself.
pub const SERIES: [Family<AliasSeries>; 13] = [
    Family {
        name: "truename_http_requests_total",
        kind: "counter",
        help: "Requests completed, by method and status.",
        write: |series, lines| {
            for ((method, code), count) in series.requests() {
                lines.add(&[("method", method), ("code", &code.to_string())], count);
            }
        },
    },
    Family {
        name: "truename_http_request_duration_seconds",
        kind: "histogram",
        help: "Time from a request's head to the end of its response.",
        write: |series, lines| {
            if series.is_http() {
                lines.histogram(None, &Totals::of(series.durations()));
            }
        },
    },
    Family {
        name: "truename_http_requests_in_flight",
        kind: "gauge",
        help: "Requests in progress.",
        write: |series, lines| {
            if series.is_http() {
                lines.add(&[], series.level(|shard| &shard.in_flight));
            }
        },
    },
    Family {
        name: "truename_downstream_connections_total",
        kind: "counter",
        help: "Connections from applications.",
        write: |series, lines| {
            for (index, protocol) in PROTOCOLS.iter().enumerate() {
                let is_own = series.speaks(protocol);
                for (tls, word) in [(0, "false"), (1, "true")] {
                    let count = series.sum(|shard| count(&shard.accepted[index][tls]));
                    if is_own || count > 0 {
                        lines.add(&[("protocol", protocol), ("tls", word)], count);
                    }
                }
            }
        },
    },
    Family {
        name: "truename_downstream_connections_active",
        kind: "gauge",
        help: "Open connections from applications.",
        write: |series, lines| lines.add(&[], series.level(|shard| &shard.connections)),
    },
    Family {
        name: "truename_upstream_connect_duration_seconds",
        kind: "histogram",
        help: "TCP connects to endpoints.",
        write: |series, lines| lines.histogram(None, &Totals::of([&series.connect_duration])),
    },
    Family {
        name: "truename_upstream_tls_handshake_duration_seconds",
        kind: "histogram",
        help: "TLS handshakes with endpoints.",
        write: |series, lines| {
            for (resumed, durations) in ["false", "true"].iter().zip(&series.handshake_duration) {
                lines.histogram(Some(("resumed", resumed)), &Totals::of([durations]));
            }
        },
    },
    Family {
        name: "truename_upstream_certificate_not_after_seconds",
        kind: "gauge",
        help: "Expiry of the last certificate seen, in Unix time, even if it was refused.",
        // Absent before a certificate was seen: at 0, it would have expired in 1970.
        write: |series, lines| series.not_after().iter().for_each(|at| lines.add(&[], at)),
    },
    Family {
        name: "truename_upstream_errors_total",
        kind: "counter",
        help: "Errors, by RFC 9209 type.",
        write: |series, lines| {
            for (error, times) in ProxyErrorType::ALL.iter().zip(&series.errors) {
                lines.add(&[("error", error.as_str())], count(times));
            }
        },
    },
    Family {
        name: "truename_retries_total",
        kind: "counter",
        help: "Retries, by reason.",
        write: |series, lines| {
            for (reason, times) in RetryReason::ALL.iter().zip(&series.retries) {
                lines.add(&[("reason", reason.as_str())], count(times));
            }
        },
    },
    Family {
        name: "truename_bytes_total",
        kind: "counter",
        help: "Bytes of bodies, tunnels and connections, by direction.",
        write: |series, lines| {
            lines.add(&[("direction", "in")], series.sum(|shard| count(&shard.bytes_in)));
            lines.add(&[("direction", "out")], series.sum(|shard| count(&shard.bytes_out)));
        },
    },
    Family {
        name: "truename_true_name_changes_total",
        kind: "counter",
        help: "Changes of an alias' true name.",
        write: |series, lines| lines.add(&[], count(&series.true_name_changes)),
    },
    Family {
        name: "truename_policy_refusals_total",
        kind: "counter",
        help: "True names and addresses refused.",
        write: |series, lines| {
            lines.add(&[("reason", "address")], count(&series.addresses_refused));
            lines.add(&[("reason", "true_name")], count(&series.true_names_refused));
        },
    },
];

fn count(counter: &AtomicU64) -> u64 {
    counter.load(Relaxed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::AliasMetrics;

    fn rendered(series: &AliasSeries) -> String {
        let mut out = String::new();
        for family in &SERIES {
            family.add(series, series.alias(), &mut false, &mut out);
        }
        out
    }

    #[test]
    fn no_certificate_is_not_one_that_expired_in_1970() {
        let series = AliasSeries::new("a", 1);
        assert!(!rendered(&series).contains("certificate_not_after"));
        let metrics = AliasMetrics::new(&series, 0);
        metrics.certificate(None);
        assert!(!rendered(&series).contains("certificate_not_after"));
        metrics.certificate(Some(1_900_000_000));
        let line = "truename_upstream_certificate_not_after_seconds{alias=\"a\"} 1900000000\n";
        assert!(rendered(&series).contains(line), "{}", rendered(&series));
    }

    #[test]
    fn no_value_of_a_label_ends_it() {
        let series = AliasSeries::new("a\"} 1\nb\\", 1);
        let text = rendered(&series);
        assert!(text.lines().all(|line| line.contains("{alias=\"") || line.starts_with("# ")));
        assert!(text.contains("truename_http_requests_in_flight{alias=\"a\\\"} 1\\nb\\\\\"} 0\n"));
    }
}
