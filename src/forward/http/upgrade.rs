//! A `101`: from then on both connections carry bytes of another protocol.

use std::time::Duration;

use ::http::{
    HeaderName, HeaderValue, Method, Response, StatusCode,
    header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE},
    request,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use tokio_util::task::task_tracker::TaskTrackerToken;

use super::super::{Downstream, Record, tunnel::tunnel};
use crate::{fault::ProxyErrorType, http2::Protocol, stream::ByteStream, upstream::Lease};

/// What follows a response that switches protocols.
pub enum Switch {
    /// Both sides as a tunnel.
    Upgrade(Box<Upgraded>),
    /// The tunnel of a CONNECT, which the maker of the response knows.
    Connect,
}

/// Whether an HTTP/2 request asks to switch to another protocol (RFC 8441).
pub fn is_extended_connect(head: &request::Parts) -> bool {
    head.method == Method::CONNECT && head.extensions.get::<Protocol>().is_some()
}

/// Turns an extended CONNECT into the HTTP/1.1 upgrade, which any origin understands. Returns whether it
/// was one.
pub fn translate_extended_connect(head: &mut request::Parts) -> bool {
    if !is_extended_connect(head) {
        return false;
    }
    let Some(protocol) = head.extensions.remove::<Protocol>() else { return false };
    let Ok(name) = HeaderValue::from_str(protocol.as_str()) else { return false };
    head.method = Method::GET;
    head.headers.insert(UPGRADE, name);
    head.headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    if protocol.as_str().eq_ignore_ascii_case("websocket") {
        // RFC 8441 §5 omits the key, and RFC 6455 §4.1 requires it.
        let key = BASE64_STANDARD.encode(fastrand::u128(..).to_be_bytes());
        if let Ok(key) = HeaderValue::try_from(key) {
            head.headers.insert(SEC_WEBSOCKET_KEY, key);
        }
    }
    true
}

/// Turns a `101` into the response to an extended CONNECT.
pub fn translate_switch<B>(response: &mut Response<B>) {
    *response.status_mut() = StatusCode::OK;
    const GONE: [HeaderName; 3] = [UPGRADE, CONNECTION, SEC_WEBSOCKET_ACCEPT];
    for name in GONE {
        response.headers_mut().remove(name);
    }
}

/// An upgrade whose `101` is being written: the origin's side, which waits for the client's.
pub struct Upgraded {
    lease: Lease,
    record: Box<Record>,
    idle: Duration,
    _guard: TaskTrackerToken,
}

impl Upgraded {
    pub(super) fn new(
        lease: Lease,
        record: Box<Record>,
        idle: Duration,
        downstream: &Downstream,
    ) -> Self {
        Self { lease, record, idle, _guard: downstream.drain.guard() }
    }

    /// Copies between the client's connection and the origin's, until the tunnel ends.
    pub async fn run(mut self: Box<Self>, client: Box<dyn ByteStream>) {
        let Some(origin) = self.lease.take_tunnel() else { return self.failed() };
        let kill = self.lease.info().wire.take_over();
        let carried = tunnel(client, origin, self.idle, kill).await;
        self.record.carried(carried);
    }

    /// The client's side is not available.
    pub(super) fn failed(mut self: Box<Self>) {
        tracing::debug!("an upgrade was not completed");
        self.record.broke(ProxyErrorType::HttpUpgradeFailed);
    }
}
