//! The demo on one machine, offline: a cluster's DNS, TLS origins, and the proxy between them.
//!
//! [`world`] is the environment of the proxy. [`story`] shows what an application gets with and without it.
//! The tests of the whole proxy use the same parts.

pub mod authority;
pub mod curl;
pub mod database;
pub mod dns;
pub mod httpbin;
pub mod nslookup;
pub mod origin;
pub mod page;
pub mod ports;
pub mod story;
pub mod world;
