//! The library face: aliases called from a Rust program, without any listener.
//!
//! What a listener's requests meet, a [`Client`]'s meet too: the same routes, retries, balancer,
//! pools and errors. It is a [`tower::Service`], so that tower's layers go around it; inside,
//! the path is plain functions.
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
    resolve::Resolver,
    route::Routes,
    tls::TlsConfigErrors,
    upstream::Registry,
};

/// Stands for the listener that there is none of.
const NOWHERE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);

/// Why a configuration cannot be put to work in a program.
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
        /// Whose.
        alias: String,
        /// Why.
        source: TlsConfigErrors,
    },
    /// There is no runtime for what goes on in the background.
    #[error("a client needs a tokio runtime: make it inside of `Runtime::block_on` or a task")]
    NoRuntime,
}

/// Calls aliases. Clones share everything; the last one to go takes the background tasks along.
#[derive(Clone)]
pub struct Client {
    shared: Arc<Shared>,
}

struct Shared {
    routes: Routes,
    downstream: Downstream,
    /// The Host of requests that name none, where one alias alone can be meant.
    only: Option<HeaderValue>,
    _registry: Registry,
}

impl Client {
    /// Puts the aliases of `config` to work, with its `dns` and `policy`; listeners, `workers` and
    /// all that concerns a process stay unused.
    ///
    /// Blocking for some milliseconds, where trust stores are read. DNS is followed on the
    /// caller's runtime, which needs its timer and its I/O.
    pub fn new(config: &Config) -> Result<Self, ClientError> {
        Self::with_resolver(config, &Resolver::new(config.dns.clone()))
    }

    /// The same with a resolver of the caller's own, such as one of another resolv.conf; it stands
    /// in place of the configuration's `dns`.
    pub fn with_resolver(config: &Config, resolver: &Arc<Resolver>) -> Result<Self, ClientError> {
        Handle::try_current().map_err(|_| ClientError::NoRuntime)?;
        config.validate("the program")?;
        let policy = AddressPolicy::new(&config.policy, []);
        let policy = Arc::new(ArcSwap::from_pointee(policy));
        let mut registry = Registry::new(resolver.clone(), policy, 1);
        // A client sends requests: there is no way through it to aliases of other protocols.
        let aliases = config.aliases.iter().filter(|alias| alias.protocol == Protocol::Http);
        let aliases = aliases.cloned();
        let aliases = aliases.map(|alias| config::Alias { listen: vec![NOWHERE], ..alias });
        let dns = resolver.settings();
        let planned = registry.inventory().plan(&aliases.collect::<Vec<_>>(), &dns);
        let aliases = planned.map_err(|(alias, source)| ClientError::Tls { alias, source })?;
        let only = match aliases.as_slice() {
            [] => return Err(ClientError::NoAlias),
            // A name that passed validation is a Host.
            [only] => HeaderValue::from_str(&only.config().name).ok(),
            _ => None,
        };

        registry.commit(&aliases, &dns);
        let downstream = Downstream {
            listener: NOWHERE,
            peer: NOWHERE,
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

    /// Sends a request to the alias that its URI or `Host` names, and gives the answer, whose body
    /// streams. A client of one alias takes a bare path, too.
    ///
    /// Never fails: what goes wrong is answered as a listener would, with `Proxy-Status` and a
    /// problem document. A request that says HTTP/2 may use it, others go out by HTTP/1.1; an
    /// `Upgrade` is not asked for. Dropping the future gives the request up.
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

    /// Always ready: `limits.requests` is held, and answered, request by request.
    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let client = self.clone();
        let request = request.map(RequestBody::boxed);
        Box::pin(async move { Ok(client.exchange(request).await) })
    }
}
