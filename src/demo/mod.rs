//! What `truename demo` and the tests stand on: real servers on loopback that need no network.

pub mod dns;
