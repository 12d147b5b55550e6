//! A `101`: from then on both connections carry bytes of a protocol that is not ours.

use std::time::Duration;

use ::http::Response;
use bytes::Bytes;
use hyper::{body::Incoming, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;

use super::{
    Body, Exchange,
    tunnel::{End, tunnel},
};
use crate::{drain::Drain, error::ProxyErrorType, upstream::Lease};

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
