//! A `101`: from then on both connections carry bytes of another protocol.

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

/// The client's side of a connection that may switch to another protocol: an extension of the request
/// that asks for it.
#[derive(Clone, Debug)]
pub struct Upgrade(Arc<Mutex<Option<oneshot::Receiver<Stream>>>>);

/// Sends the client's stream, once the response that switches is written.
pub type UpgradeSender = oneshot::Sender<Stream>;

type Stream = Box<dyn ByteStream>;

impl Upgrade {
    /// Both ends.
    pub fn new() -> (UpgradeSender, Self) {
        let (handover, stream) = oneshot::channel();
        (handover, Self(Arc::new(Mutex::new(Some(stream)))))
    }

    /// The client's side of a request that asks to switch; none for calls by the library.
    pub(super) fn take(extensions: &mut Extensions) -> Option<Self> {
        extensions.remove()
    }

    /// The stream; `None` if it is not sent.
    pub async fn stream(self) -> Option<Stream> {
        let stream = self.0.lock().take();
        stream?.await.ok()
    }
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
    // From now on the tunnel owns the client's connection.
    let connection = downstream.connection.clone();
    tokio::spawn(async move {
        // The client's side is sent once the 101 is written, or never.
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
