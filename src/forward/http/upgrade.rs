//! A `101`: from then on both connections carry bytes of a protocol that is not ours.

use std::{sync::Arc, time::Duration};

use ::http::{
    Extensions, HeaderName, HeaderValue, Method, Response, StatusCode,
    header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE},
    request,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::oneshot;

use super::{
    super::{Downstream, Record, tunnel::tunnel},
    Body,
};
use crate::{fault::ProxyErrorType, http2::Protocol, stream::ByteStream, upstream::Lease};

/// The client's side of a connection that may come to speak another protocol: an extension of the
/// request that asks for it.
#[derive(Clone, Debug)]
pub struct Upgrade(Arc<Mutex<Option<oneshot::Receiver<Stream>>>>);

/// Whoever hands the stream over, once the response is written that says so.
pub type UpgradeSender = oneshot::Sender<Stream>;

type Stream = Box<dyn ByteStream>;

impl Upgrade {
    /// Both ends of the handing over.
    pub fn new() -> (UpgradeSender, Self) {
        let (handover, stream) = oneshot::channel();
        (handover, Self(Arc::new(Mutex::new(Some(stream)))))
    }

    /// What the server left for a request that asks to switch; none for a caller of the library.
    pub(super) fn take(extensions: &mut Extensions) -> Option<Self> {
        extensions.remove()
    }

    /// The stream; `None` where it is not handed over.
    pub async fn stream(self) -> Option<Stream> {
        let stream = self.0.lock().take();
        stream?.await.ok()
    }
}

/// Whether a stream of HTTP/2 asks to become another protocol (RFC 8441).
pub fn is_extended_connect(head: &request::Parts) -> bool {
    head.method == Method::CONNECT && head.extensions.get::<Protocol>().is_some()
}

/// Writes an extended CONNECT as the upgrade that HTTP/1.1 has for it; any origin speaks that.
/// Returns whether it was one.
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
        // RFC 8441 §5 leaves the key out, and RFC 6455 §4.1 demands it.
        let key = BASE64_STANDARD.encode(fastrand::u128(..).to_be_bytes());
        if let Ok(key) = HeaderValue::try_from(key) {
            head.headers.insert(SEC_WEBSOCKET_KEY, key);
        }
    }
    true
}

/// Writes a `101` as the response to an extended CONNECT.
pub fn translate_switch<B>(response: &mut Response<B>) {
    *response.status_mut() = StatusCode::OK;
    const GONE: [HeaderName; 3] = [UPGRADE, CONNECTION, SEC_WEBSOCKET_ACCEPT];
    for name in GONE {
        response.headers_mut().remove(name);
    }
}

/// Passes the `101` on and joins the two connections in a task of their own.
pub(super) fn switch(
    response: Response<()>,
    client: Upgrade,
    mut lease: Lease,
    mut record: Box<Record>,
    idle: Duration,
    downstream: &Downstream,
) -> Response<Body> {
    let guard = downstream.drain.guard();
    // The client's connection is the tunnel's from now on.
    let connection = downstream.connection.clone();
    tokio::spawn(async move {
        // The client's side is ready once the 101 is written, or never.
        let (Some(client), Some(origin)) = (client.stream().await, lease.take_tunnel()) else {
            tracing::debug!("an upgrade was not completed");
            record.broke(ProxyErrorType::HttpUpgradeFailed);
            return;
        };
        let kill = lease.generation().killed();
        let carried = tunnel(client, origin, idle, kill).await;
        record.carried(carried);
        drop((lease, guard, connection));
    });
    response.map(|()| Body::whole(Bytes::new()))
}
