//! A `101`: from then on both connections carry bytes of a protocol that is not ours.

use std::time::Duration;

use ::http::{
    HeaderName, HeaderValue, Method, Response, StatusCode,
    header::{CONNECTION, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE},
    request,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use bytes::Bytes;
use hyper::{body::Incoming, ext::Protocol, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;

use super::{
    Body, Exchange,
    tunnel::{End, tunnel},
};
use crate::{drain::Drain, error::ProxyErrorType, upstream::Lease};

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

/// Writes a `101` as the answer to an extended CONNECT.
pub fn translate_switch<B>(response: &mut Response<B>) {
    *response.status_mut() = StatusCode::OK;
    const GONE: [HeaderName; 3] = [UPGRADE, CONNECTION, SEC_WEBSOCKET_ACCEPT];
    for name in GONE {
        response.headers_mut().remove(name);
    }
}

/// Passes the `101` on and joins the two connections in a task of their own.
pub fn switch(
    mut response: Response<Incoming>,
    client: OnUpgrade,
    lease: Lease,
    mut exchange: Box<Exchange>,
    idle: Duration,
    drain: &Drain,
) -> Response<Body> {
    let origin = hyper::upgrade::on(&mut response);
    let guard = drain.guard();
    tokio::spawn(async move {
        // The client's side is ready once the 101 is written, or never.
        let (client, origin) = match tokio::try_join!(client, origin) {
            Ok(sides) => sides,
            Err(error) => {
                tracing::debug!(%error, "an upgrade came to nothing");
                exchange.broke(ProxyErrorType::HttpUpgradeFailed);
                return;
            }
        };
        let kill = lease.generation().killed();
        let carried = tunnel(TokioIo::new(client), TokioIo::new(origin), idle, kill).await;
        exchange.carried(carried.bytes_in, carried.bytes_out);
        match carried.end {
            End::Closed | End::Killed => {}
            End::Broken(error) => tracing::debug!(%error, "a tunnel broke"),
            End::Idle => exchange.broke(ProxyErrorType::ConnectionTimeout),
        }
        drop((lease, guard));
    });
    response.map(|_| Body::whole(Bytes::new()))
}
