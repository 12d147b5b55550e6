//! The library's client: calls aliases from a Rust program, without a listener.
//!
//! Requests of a [`Client`] are handled like those of a listener: with the same routes, retries, balancer,
//! pools and errors. It is a [`tower::Service`], so that it can be wrapped in tower's layers. It uses no layers
//! itself.
//!
//! ```no_run
//! use truename::{Client, config::{Alias, Config}};
//!
//! # async fn call() -> Result<(), Box<dyn std::error::Error>> {
//! let alias = Alias::from_arg("webscaler-manual=httpbin.org")?;
//! let client = Client::new(&Config { aliases: vec![alias], ..Config::default() })?;
//! let request = http::Request::get("http://webscaler-manual/anything");
//! let response = client.send(request.body(String::new())?).await;
//! println!("{}", response.status());
//! # Ok(())
//! # }
//! ```

use std::{
    convert::Infallible,
    fmt,
    net::{Ipv4Addr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use http::{HeaderValue, Request, Response, header::HOST};
use http_body::Body;
use tokio::runtime::Handle;
use tower::Service;

use crate::{
    body::{BoxError, RequestBody},
    config::{self, Config, Problems, Protocol},
    connect::AddressPolicy,
    drain::Drain,
    forward::{self, Downstream},
    proxy_header::Addresses,
    resolve::Resolver,
    route::Routes,
    tls::TlsConfigErrors,
    upstream::Registry,
};

/// A placeholder for a listener's address.
const NOWHERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// Why a client cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The configuration has problems.
    #[error("{0}")]
    Problems(#[from] Problems),
    /// It has no alias.
    #[error("there is no alias to call: give the configuration one in `aliases`")]
    NoAlias,
    /// An alias' TLS settings cannot be used.
    #[error("alias `{alias}`: {source}")]
    Tls {
        /// The alias.
        alias: String,
        /// The errors.
        source: TlsConfigErrors,
    },
    /// There is no runtime for the background tasks.
    #[error("a client needs a tokio runtime: create it inside `Runtime::block_on` or a task")]
    NoRuntime,
}

/// Calls aliases. Clones share everything. The background tasks end when the last one is dropped.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    routes: Routes,
    downstream: Downstream,
    /// The Host for requests without one, if there is only one alias.
    only: Option<HeaderValue>,
    _registry: Registry,
}

impl Client {
    /// Uses the aliases of `config`, with its `dns` and `policy`. Listeners, `workers` and other settings of a
    /// process are ignored.
    ///
    /// Blocks for some milliseconds while trust stores are read. Background tasks for DNS run on the
    /// current runtime, whose timer and I/O must be enabled.
    pub fn new(config: &Config) -> Result<Self, ClientError> {
        Self::with_resolver(config, &Resolver::new(config.dns.clone()))
    }

    /// The same with another resolver, such as one with another resolv.conf. It replaces the
    /// configuration's `dns`.
    pub fn with_resolver(config: &Config, resolver: &Arc<Resolver>) -> Result<Self, ClientError> {
        Handle::try_current().map_err(|_| ClientError::NoRuntime)?;
        config.validate("the program")?;
        let policy = AddressPolicy::new(&config.policy, []);
        let policy = Arc::new(ArcSwap::from_pointee(policy));
        let mut registry = Registry::new(resolver.clone(), policy, 1);
        // A client sends HTTP requests. Aliases of other protocols cannot be reached through it.
        let aliases = config.aliases.iter().filter(|alias| alias.protocol == Protocol::Http);
        let aliases = aliases.cloned();
        let aliases = aliases.map(|alias| config::Alias { listen: vec![NOWHERE], ..alias });
        let dns = resolver.settings();
        let planned = registry.inventory().plan(&aliases.collect::<Vec<_>>(), &dns);
        let aliases = planned.map_err(|(alias, source)| ClientError::Tls { alias, source })?;
        let only = match aliases.as_slice() {
            [] => return Err(ClientError::NoAlias),
            // A name that passed validation is a valid Host.
            [only] => HeaderValue::from_str(&only.config().name).ok(),
            _ => None,
        };

        registry.commit(&aliases, &dns);
        let downstream = Downstream {
            listener: NOWHERE,
            client: Arc::new(Addresses { source: NOWHERE, destination: NOWHERE }),
            local: NOWHERE,
            scheme: "http",
            server_name: None,
            worker: 0,
            drain: Drain::default(),
            can_switch: false,
            connection: None,
        };
        let routes = Routes::new(&aliases);
        Ok(Self { shared: Arc::new(Shared { routes, downstream, only, _registry: registry }) })
    }

    /// Sends a request to the alias that its URI or `Host` names, and returns the response with a streaming
    /// body. If there is only one alias, the path is enough.
    ///
    /// Never fails: errors become responses as on a listener, with `Proxy-Status` and a
    /// problem document. A request with the version HTTP/2 may use it; all others are sent with HTTP/1.1.
    /// `Upgrade` is not supported. Dropping the future cancels the request.
    pub async fn send<B>(&self, request: Request<B>) -> Response<forward::Body>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError>,
    {
        self.exchange(request.map(RequestBody::boxed)).await
    }

    async fn exchange(&self, request: Request<RequestBody>) -> Response<forward::Body> {
        let (mut head, body) = request.into_parts();
        if let Some(only) = &self.shared.only
            && head.uri.authority().is_none()
            && !head.headers.contains_key(HOST)
        {
            head.headers.insert(HOST, only.clone());
        }
        forward::serve(&mut head, body, &self.shared.downstream, &self.shared.routes).await
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let aliases: Vec<_> = self.shared.routes.aliases().iter().collect();
        let names = aliases.iter().map(|alias| &alias.config().name);
        f.debug_list().entries(names).finish()
    }
}

impl<B> Service<Request<B>> for Client
where
    B: Body<Data = Bytes> + Send + 'static,
    B::Error: Into<BoxError>,
{
    type Response = Response<forward::Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    /// Always ready: `limits.requests` applies to each request, with an error response.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let client = self.clone();
        let request = request.map(RequestBody::boxed);
        Box::pin(async move { Ok(client.exchange(request).await) })
    }
}
