//! The forward proxy: clients name the host they want, and an alias is served as on its own listener.

use std::sync::Arc;

use ::http::{Method, Request, Response, header::PROXY_AUTHORIZATION};
use parking_lot::Mutex;
use tokio::time::Instant;

use super::{
    Arrival, End, Listener, Reached, Server, Service, Tunnelled,
    detect::detect,
    http1::{Http1Connection, Served},
};
use crate::{
    body::RequestBody,
    config::Protocol,
    forward::{
        self, Downstream, ForwardError, Incoming, PassthroughError, Switch, Tunnel,
        destination::Destination,
    },
    route::Routes,
    stream::{ByteStream, Prefixed, Socket},
    telemetry::AliasMetrics,
};

/// Where a CONNECT tunnel leads.
enum Onward {
    /// An alias, as if on its listener.
    Alias(Reached),
    /// A host that is not an alias.
    Host(Box<Tunnel>),
}

/// The tunnel of a CONNECT that gets a 200.
type PendingTunnel = Mutex<Option<Onward>>;

impl Server {
    /// Serves a connection to the forward proxy: its requests, and then the tunnel if a CONNECT opened one.
    /// The forward proxy speaks HTTP/1.1 without TLS only.
    pub(super) async fn proxied<S>(
        self: &Arc<Self>,
        stream: S,
        socket: &Socket,
        arrival: Box<Arrival>,
    ) -> End
    where
        S: ByteStream + 'static,
    {
        let pending = PendingTunnel::default();
        let downstream = self.downstream(&arrival, "http/1.1", "http", None);
        let connection = Http1Connection::new(stream);
        let served = {
            let respond =
                |request, proxy| self.respond_as_proxy(proxy, request, &downstream, &pending);
            connection.serve(false, self, arrival.clone(), respond).await
        };
        let tunnel = match served {
            Served::Ended(end) => return end,
            Served::Connected(tunnel) => tunnel,
        };
        let Some(onward) = pending.into_inner() else { return End::Done };
        match onward {
            Onward::Host(host) => {
                host.run(tunnel, &self.drain).await;
                End::Done
            }
            Onward::Alias(Reached { alias, listener }) => {
                let proxy = arrival.listener.drain.clone();
                let tunnelled = Some(Arc::new(Tunnelled { alias, proxy }));
                let listener = self.current(&listener);
                let arrival = Arrival { listener, tunnel: tunnelled, ..*arrival };
                self.inside(tunnel, socket, Box::new(arrival)).await
            }
        }
    }

    async fn respond_as_proxy(
        &self,
        proxy: Arc<Listener>,
        request: Request<RequestBody>,
        downstream: &Downstream,
        pending: &PendingTunnel,
    ) -> Response<forward::Body> {
        let started = Instant::now();
        let (mut head, body) = request.into_parts();
        let Service::ForwardProxy(proxy) = &proxy.service else {
            return forward::serve(&mut head, body, downstream, Routes::none()).await;
        };
        if let Some(credentials) = &proxy.credentials
            && !credentials.admit(&head.headers)
        {
            let given = head.headers.contains_key(PROXY_AUTHORIZATION);
            let fault = ForwardError::Credentials { given }.into();
            return forward::refuse(&head, &fault, downstream, started);
        }
        let destination = match Destination::of(&head) {
            Ok(destination) => destination,
            Err(error) => {
                let fault = ForwardError::from(error).into();
                return forward::refuse(&head, &fault, downstream, started);
            }
        };
        let connects = head.method == Method::CONNECT;
        let alias = proxy.aliases.get(destination.host()).cloned();
        let onward = match (alias, &proxy.passthrough) {
            (Some(alias), _) if connects => {
                if let Some(connection) = &downstream.connection {
                    connection.wraps_another();
                }
                Onward::Alias(alias)
            }
            (Some(Reached { alias, .. }), _) => {
                if let Some(connection) = &downstream.connection {
                    connection.belongs_to(&alias.worker(downstream.worker).metrics);
                }
                let config = alias.config();
                if config.protocol != Protocol::Http {
                    let (alias, protocol) = (config.name.clone(), config.protocol.word());
                    let fault = ForwardError::OtherProtocol { alias, protocol }.into();
                    return forward::refuse(&head, &fault, downstream, started);
                }
                let authority = match forward::headers::authority(&head) {
                    Ok(authority) => authority,
                    Err(error) => {
                        return forward::refuse(&head, &error.into(), downstream, started);
                    }
                };
                forward::headers::strip_proxy(&mut head.headers);
                let incoming = Incoming { head: &mut head, body, authority, started };
                return forward::forward(incoming, &alias, downstream).await;
            }
            (None, None) => {
                let fault = PassthroughError::Refused(destination).into();
                return forward::refuse(&head, &fault, downstream, started);
            }
            (None, Some(passthrough)) if connects => {
                if let Some(connection) = &downstream.connection {
                    connection.belongs_to(AliasMetrics::of_no_alias());
                }
                match passthrough.tunnel(&head, &destination, started).await {
                    Ok(tunnel) => Onward::Host(tunnel),
                    Err(refusal) => return refusal,
                }
            }
            (None, Some(passthrough)) => {
                if let Some(connection) = &downstream.connection {
                    connection.belongs_to(AliasMetrics::of_no_alias());
                }
                let request = Request::from_parts(head, body);
                return passthrough.forward(request, &destination, started).await;
            }
        };
        *pending.lock() = Some(onward);
        Response::new(forward::Body::switching(Switch::Connect))
    }

    /// Serves the inside of a tunnel to an alias like a connection to the alias' listener.
    async fn inside<S>(
        self: &Arc<Self>,
        mut stream: S,
        socket: &Socket,
        arrival: Box<Arrival>,
    ) -> End
    where
        S: ByteStream + 'static,
    {
        if arrival.listener.alias().is_some() {
            return Box::pin(self.dedicated(stream, socket, arrival)).await;
        }
        let since = Instant::now();
        let deadline = since + arrival.listener.settings.header_timeout;
        let detected = tokio::select! {
            detected = detect(&mut stream, deadline) => detected,
            () = arrival.unused(since) => return End::Done,
        };
        match detected {
            Ok((protocol, prefix)) => {
                let stream = Prefixed::new(prefix, stream);
                self.speak(protocol, stream, arrival, deadline).await
            }
            Err(error) => {
                tracing::debug!(peer = %arrival.client.source, %error, "no protocol detected in a tunnel");
                End::Done
            }
        }
    }
}
