//! A TLS-aware sidecar proxy: an alias in, its verified true name out.

pub mod config;
pub mod demo;
pub mod resolve;
