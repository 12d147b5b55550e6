//! Instructions of the hot path's parts, counted by callgrind: `bench/instructions` runs this and
//! compares with `benches/instructions.txt`.
//!
//! Each part is done [`ROUNDS`] times; the script divides. What a part needs is made beforehand
//! and let go after, neither of which counts.

// Its worlds are made as tests make theirs.
#![allow(clippy::unwrap_used)]
// The macros of gungraun make items that nobody reads the documentation of.
#![allow(missing_docs)]

use std::{
    hint::black_box,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use gungraun::prelude::*;
use http::{
    HeaderMap, HeaderValue, Request, Response, Version,
    header::{HOST, LOCATION, SET_COOKIE},
    request,
    uri::Authority,
};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::{Builder, Runtime},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use truename::{
    balance::Balancer,
    config::{self, Forwarded, TlsMode},
    connect::{AddressPolicy, Facts, Session, TargetStream, Wire},
    forward::headers::{self, ClientView, TargetView},
    pool::{Connection, EndpointConnections, Pool, PoolKey, Room},
    resolve::{
        Resolver, TrueName,
        chain::{Chain, MAX_STEPS, Record, Rule, Walked},
    },
    route::Routes,
    tls::Negotiated,
    upstream::Registry,
};

/// How often a part is done in one run. `bench/instructions` divides by the same number.
const ROUNDS: usize = 100;

const ALIAS: &str = "webscaler-manual";
const TRUE_NAME: &str = "httpbin.org";
const LISTENER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 8080);

/// A listener with eight aliases, and requests to one of them.
struct Routing {
    _runtime: Runtime,
    routes: Routes,
    heads: Vec<request::Parts>,
}

fn routing() -> Routing {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let entered = runtime.enter();
    let dns = config::Dns {
        // Told outright, so that the machine's own resolv.conf does not count.
        servers: vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 9)).into()],
        cluster_domain: Some("cluster.local".to_owned()),
        namespace: Some("default".to_owned()),
        ..config::Dns::default()
    };
    let resolver = Resolver::new(dns);
    let policy = AddressPolicy::new(&config::Policy::default(), []);
    let policy = Arc::new(ArcSwap::from_pointee(policy));
    let names = [ALIAS, "orders", "users", "stock", "search", "mail", "maps", "pay"];
    let aliases = names.map(|name| {
        let mut alias = config::Alias::named(name);
        alias.listen = vec![LISTENER];
        // No trust store is read for it.
        alias.tls.mode = TlsMode::Plaintext;
        alias
    });
    let mut registry = Registry::new(resolver.clone(), policy, 1);
    let dns = resolver.settings();
    let aliases = registry.inventory().plan(&aliases, &dns).unwrap();
    registry.commit(&aliases, &dns);
    drop(entered);
    let routes = Routes::new(&aliases);
    Routing { _runtime: runtime, routes, heads: heads() }
}

// From the request's head to its alias.
#[library_benchmark]
#[bench::host_to_alias(setup = routing)]
fn route(world: Routing) -> Routing {
    for head in &world.heads {
        let authority = headers::authority(black_box(head)).unwrap().unwrap();
        let found = world.routes.find(LISTENER.ip(), Some(authority.host()));
        black_box(found.unwrap());
    }
    world
}

/// Requests as an HTTP library sends them.
fn heads() -> Vec<request::Parts> {
    let head = || {
        let request = Request::get("/anything/orders?page=2&size=50")
            .header(HOST, ALIAS)
            .header("user-agent", "python-requests/2.32.3")
            .header("accept", "application/json")
            .header("accept-encoding", "gzip, deflate, br")
            .header("connection", "keep-alive")
            .header("authorization", "Bearer eyJhbGciOiJIUzI1NiJ9.e30.ZRrHA1JJJW8opsbCGfG_HACGp")
            .header("content-type", "application/json")
            .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01");
        request.body(()).unwrap().into_parts().0
    };
    (0..ROUNDS).map(|_| head()).collect()
}

/// Both sides' names, as a request through an alias has them.
struct Rewriting {
    client: ClientView,
    target: Authority,
    host: HeaderValue,
}

impl Rewriting {
    fn new() -> Self {
        let authority = Authority::from_static(ALIAS);
        Self {
            client: ClientView { scheme: "http", authority, origin: None },
            target: Authority::from_static(TRUE_NAME),
            host: HeaderValue::from_static(TRUE_NAME),
        }
    }

    fn target(&self) -> TargetView<'_> {
        TargetView { scheme: "https", authority: &self.target }
    }
}

fn requests() -> (Rewriting, Vec<request::Parts>) {
    (Rewriting::new(), heads())
}

// Everything that `forward` asks of a request's head and does to it.
#[library_benchmark]
#[bench::rewrite(setup = requests)]
fn request_headers(world: (Rewriting, Vec<request::Parts>)) -> (Rewriting, Vec<request::Parts>) {
    let (rewriting, mut heads) = world;
    let peer = LISTENER.ip();
    for head in &mut heads {
        black_box(headers::trace_id(&head.headers));
        black_box(headers::signs_host(head));
        let upgrades = headers::upgrade(head).is_some();
        headers::strip_request(&mut head.headers, upgrades);
        headers::add_forwarded(&mut head.headers, Forwarded::Off, peer, &rewriting.client);
        black_box(headers::expects_continue(&head.headers));
        let is_alias = |host: &str| host.eq_ignore_ascii_case(ALIAS);
        black_box(headers::repair_request(&mut head.headers, is_alias, rewriting.target()));
        headers::address(head, "https", &rewriting.host, false, false).unwrap();
    }
    (rewriting, heads)
}

fn responses() -> (Rewriting, Vec<HeaderMap>) {
    let fields = || {
        let response = Response::builder()
            .header("date", "Mon, 02 Jun 2025 08:00:00 GMT")
            .header("content-type", "application/json")
            .header("content-length", "1024")
            .header("connection", "keep-alive")
            .header("server", "nginx")
            .header("alt-svc", "h3=\":443\"; ma=86400")
            .header("vary", "accept-encoding")
            .header(LOCATION, "https://httpbin.org/anything/orders/17")
            .header(SET_COOKIE, "session=1f8e; Domain=httpbin.org; Path=/; Secure; HttpOnly");
        response.body(()).unwrap().into_parts().0.headers
    };
    (Rewriting::new(), (0..ROUNDS).map(|_| fields()).collect())
}

// Everything that `forward` asks of a response's head and does to it; each has something to repair.
#[library_benchmark]
#[bench::rewrite(setup = responses)]
fn response_headers(world: (Rewriting, Vec<HeaderMap>)) -> (Rewriting, Vec<HeaderMap>) {
    let (rewriting, mut responses) = world;
    for fields in &mut responses {
        black_box(headers::keep_alive(Version::HTTP_11, fields));
        headers::strip_response(fields, false);
        headers::repair_response(fields, &rewriting.client, rewriting.target());
    }
    (rewriting, responses)
}

/// Endpoints of which each has a latency.
struct Balancing {
    balancer: Balancer,
    now: Instant,
    rng: fastrand::Rng,
}

fn balancing(endpoints: u8) -> Balancing {
    let balancer = Balancer::new(config::Balance::P2c, config::Health::default().passive);
    let now = Instant::now();
    let addresses: Vec<SocketAddr> =
        (1..=endpoints).map(|last| SocketAddr::from(([10, 0, 0, last], 443))).collect();
    balancer.update(&addresses, now);
    for (nth, endpoint) in (0..).zip(balancer.endpoints()) {
        endpoint.begin(now).responded(now + Duration::from_millis(5 + nth));
    }
    let mut world = Balancing { balancer, now, rng: fastrand::Rng::with_seed(7) };
    // What is lazily made on a thread is made.
    world.balancer.pick(now, &mut world.rng, &[]).unwrap();
    world
}

// An endpoint for the request, its answer, and its end.
#[library_benchmark]
#[bench::of_4(args = (4), setup = balancing)]
#[bench::of_60(args = (60), setup = balancing)]
fn pick_and_release(world: Balancing) -> Balancing {
    let Balancing { balancer, now, mut rng } = world;
    for _ in 0..ROUNDS {
        let mut in_flight = balancer.pick(now, &mut rng, black_box(&[])).unwrap().begin(now);
        in_flight.responded(now + Duration::from_millis(6));
        drop(in_flight);
    }
    Balancing { balancer, now, rng }
}

/// A pool with one idle connection, for the key.
struct Pooling {
    pool: Pool,
    key: PoolKey,
    now: Instant,
    _origin: TcpStream,
    _runtime: Runtime,
}

fn pooling() -> Pooling {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let (pool, key, now, origin) = runtime.block_on(async {
        // A pair on loopback: nothing is sent on it. The proof of what was lost asks a real socket.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let endpoint = listener.local_addr().unwrap();
        let stream = TcpStream::connect(endpoint).await.unwrap();
        let (origin, _) = listener.accept().await.unwrap();

        let (stream, wire) = Wire::new(stream);
        let stream = TargetStream::Plain(stream);
        let facts = Facts {
            alpn: Negotiated::None,
            tls_version: None,
            resumed: false,
            not_after: None,
            tcp_time: Duration::ZERO,
            tls_time: Duration::ZERO,
        };
        let pool = Pool::new(&config::Pool::default(), 0, 1);
        let connections = Arc::new(EndpointConnections::new(Arc::default(), 0, 1));
        let Room::Free(permit) = pool.room(&connections, || None::<()>, || {}).await else {
            unreachable!("there is no limit")
        };
        let counted = permit.opened();
        let now = Instant::now();
        let connection = Connection::start(
            Session { stream, wire, facts, early: bytes::Bytes::new(), is_tunnel: false },
            false,
            now + Duration::from_secs(3600),
            counted,
            CancellationToken::new(),
        );
        let Connection::Http1(connection) = connection.await.unwrap() else { unreachable!() };
        let key = PoolKey {
            endpoint,
            true_name: true_name(),
            protocol: Negotiated::Http1,
            trust: 1,
            destination: None,
            client: None,
        };
        pool.give(key.clone(), connection, None);
        (pool, key, now, origin)
    });
    Pooling { pool, key, now, _origin: origin, _runtime: runtime }
}

fn true_name() -> TrueName {
    let rule = Rule {
        cluster_domain: "cluster.local",
        server_name: Some(TRUE_NAME),
        chain_match: &[],
        is_configured: false,
        plaintext: false,
    };
    rule.true_name(&[]).unwrap()
}

// The idle connection, out of the pool and into it again.
#[library_benchmark]
#[bench::idle_http1(setup = pooling)]
fn take_and_give(world: Pooling) -> Pooling {
    for _ in 0..ROUNDS {
        let Some(Connection::Http1(connection)) = world.pool.take(&world.key, world.now) else {
            unreachable!("the connection is idle")
        };
        world.pool.give(world.key.clone(), connection, None);
    }
    world
}

/// An answer whose CNAMEs make so many links, with four addresses at its end, in no order.
fn chains(links: usize) -> (Vec<Chain>, Vec<Record>) {
    assert!(links <= MAX_STEPS);
    let name = |nth: usize| match nth {
        0 => format!("{ALIAS}.default.svc.cluster.local"),
        nth => format!("edge-{nth}.cdn.example"),
    };
    let mut records: Vec<Record> =
        (0..links).map(|nth| Record::cname(&name(nth), 30, &name(nth + 1))).collect();
    let end = name(links);
    records.extend((1..=4).map(|last| Record::address(&end, 30, [192, 0, 2, last].into())));
    fastrand::Rng::with_seed(7).shuffle(&mut records);
    ((0..ROUNDS).map(|_| Chain::new(&name(0))).collect(), records)
}

#[library_benchmark]
#[bench::of_3_links(args = (3), setup = chains)]
#[bench::of_16_links(args = (16), setup = chains)]
fn chain_walk(world: (Vec<Chain>, Vec<Record>)) -> Vec<Record> {
    let (chains, records) = world;
    for chain in chains {
        let walked = chain.walk(black_box(&records)).unwrap();
        assert!(matches!(black_box(walked), Walked::Complete(_)));
    }
    records
}

/// The library that takes the chance out of hash tables, where `bench/instructions` names it.
fn steady() -> Vec<(String, String)> {
    std::env::var("TRUENAME_STEADY")
        .map(|path| ("LD_PRELOAD".to_owned(), path))
        .into_iter()
        .collect()
}

library_benchmark_group!(
    name = hot_path,
    benchmarks =
        [route, request_headers, response_headers, pick_and_release, take_and_give, chain_walk]
);
main!(
    config = LibraryBenchmarkConfig::default().envs(steady()),
    library_benchmark_groups = hot_path
);
