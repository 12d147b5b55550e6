//! A TLS-aware sidecar proxy: an alias in, its verified true name out.
//!
//! An *alias* is a name that an application uses, such as a Kubernetes Service of type `ExternalName`. Its *true
//! name* is the first name of its CNAME chain outside the cluster. truename follows the chain, opens TLS to the true
//! name with that SNI and certificate name, sends it as `Host`, and balances over its addresses on pooled connections.
//!
//! The `truename` command does this in a process of its own. This library does it within a Rust program.
//!
//! # Calling aliases
//!
//! A [`Client`] sends requests to aliases, without any listener. It is a [`tower::Service`], so that tower's layers
//! can go around it.
//!
//! ```no_run
//! use truename::{Client, config::{Alias, Config}};
//!
//! # async fn call() -> Result<(), Box<dyn std::error::Error>> {
//! let alias = Alias::from_arg("webscaler-manual=httpbin.org")?;
//! let client = Client::new(&Config { aliases: vec![alias], ..Config::default() })?;
//! let request = http::Request::get("http://webscaler-manual/anything");
//! let response = client.send(request.body(String::new())?).await;
//! println!("{}", response.status());
//! # Ok(())
//! # }
//! ```
//!
//! A request always gets a response: what goes wrong becomes one with a status of 4xx or 5xx and a problem document
//! (RFC 9457) that says what failed, where, and which setting fixes it.
//!
//! # Running a proxy
//!
//! An [`App`] is the whole proxy, with listeners, workers and the admin listener:
//!
//! ```no_run
//! use truename::{App, config::Config};
//!
//! # async fn serve() -> Result<(), Box<dyn std::error::Error>> {
//! let config = Config::parse("version: 1\naliases: [{name: webscaler-manual, listen: [0]}]", "inline")?;
//! let app = App::start(config)?;
//! println!("listening on {}", app.listeners()[0]);
//! app.shutdown().await;
//! # Ok(())
//! # }
//! ```
//!
//! # Configuration
//!
//! [`config`] reads the same YAML as the command, reports every problem in it with line and column, and prints it and
//! its JSON Schema. The keys are described in the reference of the repository.
//!
//! # Testing against it
//!
//! [`demo`] has a cluster's DNS, a certificate authority and HTTPS servers on loopback: a world in which to test
//! programs that use truename, as `examples/embed.rs` does.

// They panic if the output cannot be written. `telemetry::say` does not.
#![warn(clippy::print_stderr, clippy::print_stdout)]

pub mod config;
pub mod demo;

pub use app::App;
pub use client::{Client, ClientError};
pub use command::{Commands, ReloadError, StartError};
pub use forward::Body;
pub use resolve::Resolver;

// The parts of the proxy that this repository's own program, benches, fuzz targets and tests use. No promise is made of
// them.
#[doc(hidden)]
pub mod balance;
#[doc(hidden)]
pub mod cli;
#[doc(hidden)]
pub mod connect;
#[doc(hidden)]
pub mod fault;
#[doc(hidden)]
pub mod forward;
#[doc(hidden)]
pub mod http1;
#[doc(hidden)]
pub mod http2;
#[doc(hidden)]
pub mod pool;
#[doc(hidden)]
pub mod protocol;
#[doc(hidden)]
pub mod proxy_header;
#[doc(hidden)]
pub mod resolve;
#[doc(hidden)]
pub mod route;
#[doc(hidden)]
pub mod telemetry;
#[doc(hidden)]
pub mod tls;
#[doc(hidden)]
pub mod upstream;
#[doc(hidden)]
pub use serve::detect;

mod admin;
mod app;
mod body;
mod client;
mod command;
mod drain;
mod files;
mod folder;
mod idle;
mod limit;
mod listener;
mod serve;
mod stream;
