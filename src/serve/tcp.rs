//! Connections of raw TCP: the client may speak TLS or not, and bytes are copied both ways.

use std::{io, sync::Arc, time::Duration};

use bytes::BytesMut;
use tokio::time::{Instant, timeout, timeout_at};

use super::{End, Server, dedicated::Dedicated, detect::is_client_hello};
use crate::{
    config::TlsIn,
    forward::Connection,
    stream::{ByteStream, Prefixed, receive},
    upstream::Link,
};

/// How long to wait for a ClientHello with `tls_in: auto` before the target is dialled: the client may be waiting for
/// the server to speak first.
pub(super) const CLIENT_HELLO_WAIT: Duration = Duration::from_millis(200);

impl Server {
    /// Serves raw TCP.
    pub(super) async fn tcp<S>(self: &Arc<Self>, mut stream: S, dedicated: Dedicated) -> End
    where
        S: ByteStream + 'static,
    {
        let Dedicated { arrival, downstream, mut connection, .. } = dedicated;
        if connection.admit().is_err() {
            return End::Reset;
        }

        let header_timeout = arrival.listener.settings.header_timeout;
        let mut read = BytesMut::new();
        let mut target = None;
        let speaks_tls = match connection.alias().config().tls_in {
            TlsIn::Always => Ok(true),
            TlsIn::Never => Ok(false),
            TlsIn::Auto => {
                let first = receive(&mut stream, &mut read);
                match timeout(CLIENT_HELLO_WAIT, first).await {
                    Ok(first) => says_hello(first, &mut stream, &mut read, header_timeout).await,
                    Err(_) => {
                        let connected = connection.connect(stream.socket()).await;
                        let Ok(mut link) = connected else { return End::Reset };
                        let says_hello = tokio::select! {
                            biased;
                            first = receive(&mut stream, &mut read) => {
                                says_hello(first, &mut stream, &mut read, header_timeout).await
                            }
                            spoken = connection.first_bytes(&mut link) => match spoken {
                                true => Ok(false),
                                false => return End::Reset,
                            },
                        };
                        target = Some(link);
                        says_hello
                    }
                }
            }
        };
        let Ok(speaks_tls) = speaks_tls else {
            connection.left();
            return End::Reset;
        };
        downstream.decide(speaks_tls);
        let stream = Prefixed::new(read.freeze(), stream);
        if !speaks_tls {
            return carry(connection, stream, target).await;
        }
        let deadline = Instant::now() + header_timeout;
        match Box::pin(self.accept(stream, &arrival, deadline)).await {
            Some(accepted) => carry(connection, accepted.stream, target).await,
            None => {
                connection.left();
                End::Lingers
            }
        }
    }
}

/// Whether the client's first bytes begin a ClientHello. They are read into `read`. Those that have not come within
/// `header_timeout` begin none.
pub(super) async fn begins_with_hello<S: ByteStream>(
    stream: &mut S,
    read: &mut BytesMut,
    header_timeout: Duration,
) -> io::Result<bool> {
    match timeout(header_timeout, receive(stream, read)).await {
        Ok(first) => says_hello(first, stream, read, header_timeout).await,
        Err(_) => Ok(false),
    }
}

/// Whether the client's first bytes begin a ClientHello. `first` is the result of reading into `read` for the first
/// time. An incomplete one is waited for no longer than `header_timeout`.
pub(super) async fn says_hello<S: ByteStream>(
    first: io::Result<usize>,
    stream: &mut S,
    read: &mut BytesMut,
    header_timeout: Duration,
) -> io::Result<bool> {
    let deadline = Instant::now() + header_timeout;
    let mut received = first?;
    loop {
        match is_client_hello(read) {
            Some(is_hello) => return Ok(is_hello),
            None if received == 0 => return Ok(false),
            None => {}
        }
        received = match timeout_at(deadline, receive(stream, read)).await {
            Ok(received) => received?,
            Err(_) => return Ok(false),
        };
    }
}

/// Connects, unless there is a connection to the target already, and copies bytes both ways.
async fn carry<D: ByteStream>(mut connection: Connection, client: D, target: Option<Link>) -> End {
    let link = match target {
        Some(link) => link,
        None => match connection.connect(client.socket()).await {
            Ok(link) => link,
            Err(_) => return End::Reset,
        },
    };
    match connection.carry(client, link).await {
        true => End::Done,
        false => End::Reset,
    }
}
