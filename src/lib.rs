//! A TLS-aware sidecar proxy: an alias in, its verified true name out.

// They panic where nobody reads: `telemetry::say` does not.
#![warn(clippy::print_stderr, clippy::print_stdout)]

pub mod admin;
pub mod app;
pub mod balance;
pub mod body;
pub mod cli;
pub mod client;
pub mod command;
pub mod config;
pub mod connect;
pub mod demo;
pub mod detect;
pub mod drain;
pub mod error;
pub mod files;
pub mod folder;
pub mod forward;
pub mod http1;
pub mod http2;
pub mod idle;
pub mod listener;
pub mod pool;
pub mod resolve;
pub mod route;
pub mod serve;
pub mod socket;
pub mod telemetry;
pub mod tls;
pub mod upstream;

pub use client::{Client, ClientError};
