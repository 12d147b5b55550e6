//! Where a request comes from and goes to, by the names that each side uses.

use http::{HeaderValue, uri::Authority};

/// The origin as the client sees it: what `repair` translates from and to.
#[derive(Clone, Debug)]
pub struct ClientView {
    /// `http`, or `https` on a TLS listener.
    pub scheme: &'static str,
    /// Host as the client wrote it.
    pub authority: Authority,
    /// The request's `Origin`, if it was the alias' and has been rewritten.
    pub origin: Option<HeaderValue>,
}

/// Where the request goes.
#[derive(Clone, Copy, Debug)]
pub struct TargetView<'a> {
    /// `https`, or `http` to a plaintext target.
    pub scheme: &'static str,
    /// The target's own authority: the true name, with its port where that is not the default, or the
    /// Host that is configured.
    pub authority: &'a Authority,
}
