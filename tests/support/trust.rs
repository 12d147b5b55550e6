//! Whom this world trusts: one throw-away authority for all tests of a process.

use std::sync::{Arc, OnceLock};

use rustls::ServerConfig;
use truename::demo::authority::{Authority, LeafOptions};

/// The authority whose root is `$FOLDER/root.pem` in every proxy's configuration.
pub fn authority() -> &'static Authority {
    static AUTHORITY: OnceLock<Authority> = OnceLock::new();
    AUTHORITY.get_or_init(|| Authority::new("truename test root").unwrap())
}

/// A server that proves `names`, by HTTP/2 or HTTP/1.1.
pub fn server(names: &[&str]) -> Arc<ServerConfig> {
    server_with_alpn(names, &["h2", "http/1.1"])
}

/// A server that proves `names` and speaks `alpn`; scripted origins speak HTTP/1.1 only.
pub fn server_with_alpn(names: &[&str], alpn: &[&str]) -> Arc<ServerConfig> {
    let leaf = authority().issue(names, &[], LeafOptions::default()).unwrap();
    leaf.server_config(alpn).unwrap()
}
