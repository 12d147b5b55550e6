//! The configuration: plain data, validated once at the edge.

mod alias;
mod argument;
mod available;
mod credentials;
mod document;
mod file;
mod follow;
mod form;
mod host_names;
mod names;
mod places;
mod postgres;
mod problems;
mod process;
mod quantity;
mod reader;
mod scalars;
mod suggest;
mod table;
mod tls;
mod tree;
mod validate;

use std::time::Duration;

pub use alias::*;
pub(crate) use argument::Argument;
pub use argument::ArgumentError;
pub use credentials::{CredentialsError, read_credentials};
pub use document::{Document, LoadError};
pub use file::{FileError, read_file, read_file_or_pipe};
pub use follow::{Contents, Followed};
pub use names::{
    BadName, BadNameServer, BadProxyUrl, BadTarget, NamePattern, NameServer, ProxyUrl, Target,
    TargetHost, normal_name,
};
pub use postgres::*;
pub use problems::{Position, Problem, Problems};
pub use process::*;
pub(crate) use quantity::print_duration;
pub use quantity::{BadValue, duration, listen_address};
pub use tls::*;

use form::*;
use scalars::*;
use table::{default_sections, section};

section! {
    /// The whole configuration.
    pub struct Config {
        /// The aliases.
        aliases: Vec<Alias> as List<Sub<Alias>> = Vec::new(),
        /// Settings of all listeners.
        listener: Listener as Sub<Listener> = Listener::default(),
        /// The HTTP forward proxy.
        proxy: ForwardProxy as Sub<ForwardProxy> = ForwardProxy::default(),
        /// How names are resolved.
        dns: Dns as Sub<Dns> = Dns::default(),
        /// Which addresses a target may have.
        policy: Policy as Sub<Policy> = Policy::default(),
        /// Use of the Kubernetes API.
        kubernetes: Kubernetes as Sub<Kubernetes> = Kubernetes::default(),
        /// The local certificate authority for TLS listeners.
        ca: LocalCa as Sub<LocalCa> = LocalCa::default(),
        /// Probes, metrics and status.
        admin: Admin as Sub<Admin> = Admin::default(),
        /// What is logged, and how.
        log: Log as Sub<Log> = Log::default(),
        /// Worker threads; 0 means one per CPU this process may use.
        workers: usize as Whole<usize, 0, 1024> = 0,
        /// How long open connections may continue after the signal to stop.
        shutdown_grace: Duration as Time = Duration::from_secs(30),
        /// Required for a listener outside loopback.
        allow_non_loopback: bool as Bool = false,
    }
}

default_sections!(Config);

#[cfg(test)]
mod tests;
