//! The whole story on one machine, offline: a cluster's DNS, TLS origins, and the proxy between.

pub mod authority;
pub mod dns;
pub mod httpbin;
pub mod origin;
