//! The whole story on one machine, offline: a cluster's DNS, TLS origins, and the proxy between.
//!
//! [`world`] is what the proxy meets, [`story`] what an application meets without it and with it.
//! The tests of the whole proxy live in the same world.

pub mod authority;
pub mod curl;
pub mod dns;
pub mod httpbin;
pub mod nslookup;
pub mod origin;
pub mod page;
pub mod ports;
pub mod story;
pub mod world;
