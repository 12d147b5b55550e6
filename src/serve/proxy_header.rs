//! Reads the PROXY header that a connection from certain networks begins with.

use std::{io, sync::Arc};

use tokio::time::{Instant, timeout_at};

use super::{Arrival, Server};
use crate::{
    proxy_header::{Addresses, HeaderError, parse},
    stream::{Socket, take},
};

/// Why there is no header.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    /// As a port check does.
    #[error("the connection was closed before its PROXY protocol header")]
    Silent,
    #[error("the connection was closed within its PROXY protocol header")]
    Closed,
    #[error("no PROXY protocol header within `listener.header_timeout`")]
    Late,
    #[error("{0}")]
    Invalid(#[from] HeaderError),
    #[error("reading the PROXY protocol header: {0}")]
    Io(#[from] io::Error),
}

impl Arrival {
    /// Whether the connection begins with a PROXY header. Its peer decides that, never its bytes: anybody could send
    /// them.
    pub(super) fn has_proxy_header(&self) -> bool {
        self.listener.has_proxy_header(self.client.source.ip())
    }
}

impl Server {
    /// Reads the header. Returns whether the connection may be served.
    pub(super) async fn proxy_header(
        &self,
        socket: &Socket,
        arrival: &mut Arrival,
        deadline: Instant,
    ) -> bool {
        let result = tokio::select! {
            result = timeout_at(deadline, read(socket)) => result,
            () = arrival.unused(Instant::now()) => return false,
        };
        let error = match result.unwrap_or(Err(ReadError::Late)) {
            Ok(addresses) => {
                if let Some(addresses) = addresses {
                    arrival.client = Arc::new(addresses);
                }
                return true;
            }
            Err(error) => error,
        };
        drop(self.counted(arrival, "none", false));
        let (listener, peer) = (arrival.listener.address, arrival.client.source);
        if matches!(error, ReadError::Silent) {
            tracing::debug!(%listener, %peer, %error, "no PROXY header");
            return false;
        }
        metrics::counter!("truename_proxy_header_errors_total").increment(1);
        if self.header_failures.begins((listener, error.to_string()), peer.to_string()) {
            tracing::warn!(
                %listener,
                %peer,
                %error,
                fix = "let the peer send the header, or take its network out of `proxy_protocol.accept`",
                "a connection was closed: its PROXY header cannot be used",
            );
        }
        false
    }
}

async fn read(socket: &Socket) -> Result<Option<Addresses>, ReadError> {
    let mut ended = ReadError::Silent;
    let header = take(socket, |bytes| {
        ended = ReadError::Closed;
        let header = parse(bytes)?;
        Ok::<_, ReadError>(header.map(|header| (header.length, header.addresses)))
    });
    match header.await {
        Ok(addresses) => addresses.ok_or(ended),
        // Many port checks end with a reset.
        Err(ReadError::Io(_)) if matches!(ended, ReadError::Silent) => Err(ended),
        Err(error) => Err(error),
    }
}
