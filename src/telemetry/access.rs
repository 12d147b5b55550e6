//! The access log: one line per request, without query strings and header values, and one per connection for
//! protocols that have no requests.

use std::{net::SocketAddr, time::Duration};

/// The target of access log events, for filters.
pub const TARGET: &str = "access";

/// The contents of one line.
#[derive(Debug)]
#[allow(missing_docs, reason = "the names are those of the log")]
pub struct Access<'a> {
    pub alias: &'a str,
    pub true_name: &'a str,
    pub endpoint: Option<SocketAddr>,
    pub protocol: &'static str,
    pub method: &'a str,
    pub path: &'a str,
    pub status: u16,
    pub error: &'static str,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub duration: Duration,
    pub upstream: Option<Duration>,
    pub retries: u32,
    pub reused: bool,
    pub tls_version: &'static str,
    pub trace_id: &'a str,
}

impl Access<'_> {
    /// Writes the line.
    pub fn log(&self) {
        tracing::info!(
            target: TARGET,
            alias = self.alias,
            true_name = self.true_name,
            endpoint = self.endpoint.map(display),
            protocol = self.protocol,
            method = self.method,
            path = self.path,
            status = self.status,
            error = self.error,
            bytes_in = self.bytes_in,
            bytes_out = self.bytes_out,
            duration_ms = millis(self.duration),
            upstream_ms = self.upstream.map(millis),
            retries = self.retries,
            reused = self.reused,
            tls_version = self.tls_version,
            trace_id = self.trace_id,
            "request",
        );
    }
}

/// The contents of one line about a connection whose protocol has no requests.
#[derive(Debug)]
#[allow(missing_docs, reason = "the names are those of the log")]
pub struct ConnectionAccess<'a> {
    pub alias: &'a str,
    pub true_name: &'a str,
    pub endpoint: Option<SocketAddr>,
    pub protocol: &'static str,
    /// How it ended; `open` if it has not ended.
    pub end: &'static str,
    pub error: &'static str,
    pub bytes_in: u64,
    pub bytes_out: u64,
    pub duration: Duration,
    /// How long it took to connect.
    pub upstream: Option<Duration>,
    pub retries: u32,
    /// The TLS version to the target.
    pub tls_version: &'static str,
}

impl ConnectionAccess<'_> {
    /// Writes the line.
    pub fn log(&self) {
        tracing::info!(
            target: TARGET,
            alias = self.alias,
            true_name = self.true_name,
            endpoint = self.endpoint.map(display),
            protocol = self.protocol,
            end = self.end,
            error = self.error,
            bytes_in = self.bytes_in,
            bytes_out = self.bytes_out,
            duration_ms = millis(self.duration),
            upstream_ms = self.upstream.map(millis),
            retries = self.retries,
            reused = false,
            tls_version = self.tls_version,
            "connection",
        );
    }
}

/// Milliseconds, rounded to microseconds.
fn millis(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1000.0
}
