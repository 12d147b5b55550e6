//! HTTP/2 on either side, gRPC's way of using it, and the bridges to HTTP/1.1.

use std::{net::SocketAddr, sync::Arc};

use crate::support::{
    client::{self, H2},
    curl::curl,
    proxy::Proxy,
    raw_origin::Arrival,
    scene::{ALIAS, Scene, TRUE_NAME},
    scripts,
    service_origin::{self, Body, ServiceOrigin, StreamSender},
    through::Through,
    trust, within,
};
use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version};
use http_body_util::BodyExt as _;
use hyper::{body::Incoming, client::conn::http2, ext::Protocol};
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    sync::{Barrier, watch},
};

#[tokio::test]
async fn http_2_stays_http_2_and_its_authority_becomes_the_true_name() {
    let pair = Pair::new("", async |_| Response::new(service_origin::whole("ok"))).await;
    let mut client = H2::connect(pair.address).await;
    let request = Request::post(format!("http://{ALIAS}//a%2Fb/./%61?x=%20&&"))
        .header("x-twice", "b")
        .header("x-twice", "a")
        .header("cookie", "a=1")
        .header("cookie", "b=2")
        .body(Bytes::from("body").into())
        .unwrap();
    let response = client.send(request).await.unwrap();
    assert_eq!((response.head.status, response.body), (StatusCode::OK, Bytes::from("ok")));
    let mut fields: Vec<_> = response.head.headers.keys().map(HeaderName::as_str).collect();
    fields.sort();
    assert_eq!(fields, ["content-length", "date"], "the date is the origin's own");

    let seen = pair.seen();
    assert_eq!(seen.version, Version::HTTP_2);
    assert_eq!(seen.uri, format!("https://{}//a%2Fb/./%61?x=%20&&", pair.true_host()));
    let values: Vec<_> = seen.headers.get_all("x-twice").iter().collect();
    assert_eq!(values, ["b", "a"]);
    let mut names: Vec<_> = seen.headers.keys().map(HeaderName::as_str).collect();
    names.sort();
    assert_eq!(names, ["content-length", "cookie", "x-twice"]);
}

#[tokio::test]
async fn http_2_becomes_http_1_1_where_the_origin_has_no_other() {
    let through = Through::new("", |arrival| {
        let response = "HTTP/1.1 200 OK\r\nConnection: keep-alive\r\nKeep-Alive: timeout=9\r\n\
                      X-Mixed: Case\r\nContent-Length: 2\r\n\r\nok";
        scripts::always(arrival, response)
    })
    .await;
    let mut client = H2::connect(through.address).await;
    let request = Request::get(format!("http://{ALIAS}/a?b"))
        .header("cookie", "a=1")
        .header("cookie", "b=2")
        .header("te", "trailers");
    let response = client.send(request.body(Bytes::new().into()).unwrap()).await.unwrap();
    assert_eq!((response.head.status, response.body), (StatusCode::OK, Bytes::from("ok")));
    assert_eq!(response.head.headers["x-mixed"], "Case");
    assert_eq!(response.head.headers.len(), 2, "{:?}", response.head.headers);
    let sent = through.last_request();
    assert_eq!(sent.start_line(), "GET /a?b HTTP/1.1");
    assert_eq!(sent.field("Host"), Some(through.true_host().as_str()));
    assert_eq!(sent.field("Cookie"), Some("a=1; b=2"), "one field, as RFC 9113 wants it");
    assert_eq!((sent.field("TE"), sent.field("Connection")), (Some("trailers"), Some("TE")));
    assert_eq!((sent.field("Content-Length"), sent.field("Transfer-Encoding")), (None, None));
}

#[tokio::test]
async fn a_post_of_nothing_over_http_2_says_so_in_http_1_1() {
    let through = Through::new("", scripts::respond).await;
    let mut client = H2::connect(through.address).await;
    let request = Request::post(format!("http://{ALIAS}/")).body(Bytes::new().into()).unwrap();
    assert_eq!(client.send(request).await.unwrap().head.status, 200);
    assert_eq!(through.last_request().field("Content-Length"), Some("0"));
}

#[tokio::test]
async fn http_1_1_becomes_http_2_where_the_alias_says_so() {
    let pair = Pair::new("http: {version: \"2\"}", async |request: Request<Incoming>| {
        let body = request.into_body().collect().await.unwrap().to_bytes();
        Response::builder().header("X-Response", "1").body(service_origin::whole(body)).unwrap()
    })
    .await;
    let mut peer = client::connect(pair.address).await;
    let request = format!(
        "POST /a?b HTTP/1.1\r\nHost: {ALIAS}\r\nConnection: keep-alive\r\nKeep-Alive: 3\r\n\
         X-Mixed: Case\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"
    );
    for _ in 0..2 {
        peer.send(&request).await;
        let response = peer.response().await;
        assert_eq!((response.start_line(), response.text()), ("HTTP/1.1 200 OK", "body"));
        assert_eq!(response.field("x-response"), Some("1"));
    }
    let seen = pair.seen();
    assert_eq!(seen.version, Version::HTTP_2);
    assert_eq!(seen.uri, format!("https://{}/a?b", pair.true_host()));
    assert_eq!(seen.headers.keys().collect::<Vec<_>>(), ["x-mixed"]);
    assert_eq!(pair.connections().await, 1.0, "shared by both requests");
}

#[tokio::test]
async fn http_1_1_stays_http_1_1_where_the_origin_has_both() {
    for (keys, version) in [("", Version::HTTP_11), ("http: {version: \"1.1\"}", Version::HTTP_11)]
    {
        let pair = Pair::new(keys, async |_| Response::new(service_origin::whole("ok"))).await;
        assert_eq!(client::get(pair.address, ALIAS, "/").await.status(), 200);
        assert_eq!(pair.seen().version, version);
    }
    let pair =
        Pair::new("http: {version: \"1.1\"}", async |_| Response::new(service_origin::whole("ok")))
            .await;
    let mut client = H2::connect(pair.address).await;
    assert_eq!(client.get(&format!("http://{ALIAS}/")).await.unwrap().head.status, 200);
    assert_eq!(pair.seen().version, Version::HTTP_11);
}

/// Found when a benchmark asked by HTTP/1.1 first: gRPC would have lost its trailers.
#[tokio::test]
async fn http_2_stays_http_2_where_a_connection_of_http_1_1_is_idle() {
    let mut scene = Scene::new(1).await;
    let origin = scene.serve().remove(0);
    let proxy = Proxy::start(&format!("{}workers: 1\n", scene.yaml(""))).await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(client::get(address, ALIAS, "/get").await.status(), 200);
    let response = H2::connect(address).await.get(&format!("http://{ALIAS}/get")).await.unwrap();
    assert_eq!(response.head.status, 200);

    let versions: Vec<Version> = origin.visits().iter().map(|visit| visit.version).collect();
    assert_eq!(versions, [Version::HTTP_11, Version::HTTP_2]);
}

#[tokio::test]
async fn an_authority_and_a_host_that_differ_are_refused() {
    let through = Through::new("", scripts::respond).await;
    let mut client = H2::connect(through.address).await;
    let request = Request::get(format!("http://{ALIAS}/")).header("host", "httpbin.org");
    let response = client.send(request.body(Bytes::new().into()).unwrap()).await.unwrap();
    assert_eq!(response.head.status, 400);
    assert_eq!(response.head.headers["content-type"], "application/problem+json");
    let response = client.get("http://evil.example/").await.unwrap();
    assert_eq!(response.head.status, 404);
    assert_eq!(through.origin.seen().connections, 0);
}

#[tokio::test]
async fn truenames_own_response_to_head_has_no_content() {
    let through = Through::new("", scripts::respond).await;
    let mut client = H2::connect(through.address).await;
    let get = client.get("http://evil.example/").await.unwrap();
    let head = Request::head("http://evil.example/").body(Bytes::new().into()).unwrap();
    // h2, like curl, takes content for an error of the stream.
    let head = client.send(head).await.unwrap();
    assert_eq!((head.head.status, head.body.len()), (StatusCode::NOT_FOUND, 0));
    for name in ["content-type", "content-length", "proxy-status"] {
        assert_eq!(head.head.headers[name], get.head.headers[name], "{name}");
    }
    let url = format!("http://{}/", through.address);
    let args = ["--http2-prior-knowledge", "-I", "-H", "Host: evil.example", url.as_str()];
    let said = curl(&args).await;
    assert_eq!(said.code, 0, "{}", said.stderr);
    assert!(said.stdout.starts_with("HTTP/2 404"), "{}", said.stdout);
}

#[tokio::test]
async fn grpc_streams_both_ways_and_ends_with_its_status() {
    let pair = Pair::new("", async |request: Request<Incoming>| {
        assert_eq!(request.headers()["te"], "trailers");
        let (sender, body) = service_origin::streamed();
        tokio::spawn(echo(request.into_body(), sender));
        Response::builder().header("content-type", "application/grpc").body(body).unwrap()
    })
    .await;
    let mut client = Streams::connect(pair.address).await;
    let (upload, body) = service_origin::streamed();
    let response = client.send(grpc(body)).await;
    assert_eq!(response.headers()["content-type"], "application/grpc");
    let mut body = response.into_body();
    for message in ["one", "two", "three"] {
        // The next goes only after this has come back: neither side may wait for more.
        assert!(upload.data(message).await);
        assert_eq!(frame(&mut body).await.into_data().unwrap(), message);
    }
    drop(upload);
    let trailers = frame(&mut body).await.into_trailers().unwrap();
    assert_eq!(trailers["grpc-status"], "0");
    assert_eq!(trailers["grpc-message"], "3 messages");
    assert!(within("the end", body.frame()).await.is_none());
}

#[tokio::test]
async fn a_grpc_error_may_be_trailers_only() {
    let pair = Pair::new("", async |_| {
        Response::builder()
            .header("content-type", "application/grpc")
            .header("grpc-status", "16")
            .body(service_origin::whole(""))
            .unwrap()
    })
    .await;
    let mut client = Streams::connect(pair.address).await;
    let (_upload, body) = service_origin::streamed();
    let response = client.send(grpc(body)).await;
    assert_eq!(response.headers()["grpc-status"], "16");
    assert_eq!(response.headers().get("content-length"), None);
    let whole = within("the body", response.into_body().collect()).await.unwrap();
    assert!(whole.to_bytes().is_empty());
}

#[tokio::test]
async fn a_clients_trailers_reach_the_origin() {
    let pair = Pair::new("", async |request: Request<Incoming>| {
        let body = request.into_body().collect().await.unwrap();
        let sum = body.trailers().unwrap()["x-sum"].to_str().unwrap().to_owned();
        Response::new(service_origin::whole(sum))
    })
    .await;
    let mut client = Streams::connect(pair.address).await;
    let (upload, body) = service_origin::streamed();
    let request = Request::post(format!("http://{ALIAS}/")).body(body).unwrap();
    let (response, ()) = tokio::join!(client.send(request), async {
        upload.data("body").await;
        upload.trailers(trailers([("x-sum", "42")])).await;
    });
    let whole = within("the body", response.into_body().collect()).await.unwrap();
    assert_eq!(whole.to_bytes(), "42");
}

#[tokio::test]
async fn trailers_of_http_1_1_arrive_over_http_2() {
    let response =
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-Sum: 42\r\n\r\n";
    let through = Through::new("", move |arrival| scripts::always(arrival, response)).await;
    let mut client = H2::connect(through.address).await;
    let response = client.get(&format!("http://{ALIAS}/")).await.unwrap();
    assert_eq!(response.body, "ok");
    assert_eq!(response.trailers.unwrap()["x-sum"], "42");
}

#[tokio::test]
async fn many_streams_are_served_at_once() {
    const STREAMS: usize = 150;
    // There is no response before all requests are there.
    let barrier = Arc::new(Barrier::new(STREAMS));
    let pair = Pair::new("", move |request: Request<Incoming>| {
        let barrier = barrier.clone();
        async move {
            barrier.wait().await;
            Response::new(service_origin::whole(request.uri().path().to_owned()))
        }
    })
    .await;
    // One connection may have a hundred.
    let clients = [H2::connect(pair.address).await, H2::connect(pair.address).await];
    let mut responses = tokio::task::JoinSet::new();
    for number in 0..STREAMS {
        let mut client = clients[number % clients.len()].clone();
        responses.spawn(async move {
            let path = format!("/{number}");
            let response = client.get(&format!("http://{ALIAS}{path}")).await.unwrap();
            assert_eq!((response.head.status, response.body), (StatusCode::OK, path.into()));
        });
    }
    for response in responses.join_all().await {
        response
    }
}

#[tokio::test]
async fn a_stream_given_up_ends_at_the_origin_and_leaves_its_siblings() {
    let (gone, mut left) = watch::channel(false);
    let pair = Pair::new("", move |request: Request<Incoming>| {
        let gone = gone.clone();
        async move {
            if request.uri().path() == "/quick" {
                return Response::new(service_origin::whole("quick"));
            }
            let (sender, body) = service_origin::streamed();
            tokio::spawn(async move {
                sender.data("first").await;
                sender.closed().await;
                gone.send_replace(true);
            });
            Response::new(body)
        }
    })
    .await;
    let mut client = Streams::connect(pair.address).await;
    let request = |path: &str| {
        Request::get(format!("http://{ALIAS}{path}")).body(service_origin::whole("")).unwrap()
    };
    let mut body = client.send(request("/slow")).await.into_body();
    assert_eq!(frame(&mut body).await.into_data().unwrap(), "first");
    drop(body);
    within("the origin to notice", left.wait_for(|left| *left)).await.unwrap();
    let response = client.send(request("/quick")).await.into_body();
    assert_eq!(within("a sibling", response.collect()).await.unwrap().to_bytes(), "quick");
    assert_eq!(pair.connections().await, 1.0);
}

#[tokio::test]
async fn a_websocket_over_http_2_becomes_an_upgrade() {
    let through = Through::new("", scripts::upgrade_and_echo).await;
    let mut client = Streams::connect(through.address).await;
    let mut response = client.send(extended_connect()).await;
    assert_eq!(response.status(), 200);
    let hop: Vec<_> = ["upgrade", "connection", "sec-websocket-accept"]
        .into_iter()
        .filter(|name| response.headers().contains_key(*name))
        .collect();
    assert_eq!(hop, [""; 0]);
    let tunnel = within("a tunnel", hyper::upgrade::on(&mut response)).await.unwrap();
    let mut tunnel = TokioIo::new(tunnel);
    tunnel.write_all(b"hello").await.unwrap();
    let mut back = [0; 5];
    within("an echo", tunnel.read_exact(&mut back)).await.unwrap();
    assert_eq!(&back, b"hello");
    tunnel.shutdown().await.unwrap();
    assert_eq!(within("the end", tunnel.read(&mut back)).await.unwrap(), 0);

    let sent = through.last_request();
    assert_eq!(sent.start_line(), "GET /chat HTTP/1.1");
    assert_eq!(sent.field("Host"), Some(through.true_host().as_str()));
    assert_eq!(
        (sent.field("Upgrade"), sent.field("Connection")),
        (Some("websocket"), Some("Upgrade"))
    );
    assert_eq!(sent.field("Sec-WebSocket-Version"), Some("13"));
    assert_eq!(sent.field("Sec-WebSocket-Key").map(str::len), Some(24));
}

#[tokio::test]
async fn a_websocket_over_http_2_that_the_origin_refuses_is_no_tunnel() {
    for (status, expected) in [("403 Forbidden", 403), ("200 OK", 502)] {
        let through = Through::new("", move |arrival: Arrival| {
            scripts::always(arrival, format!("HTTP/1.1 {status}\r\nContent-Length: 2\r\n\r\nno"))
        })
        .await;
        let mut client = Streams::connect(through.address).await;
        let response = client.send(extended_connect()).await;
        assert_eq!(response.status(), expected);
        if expected == 502 {
            let status = response.headers()["proxy-status"].to_str().unwrap();
            assert!(status.starts_with("truename; error=http_upgrade_failed;"), "{status}");
        }
    }
}

#[tokio::test]
async fn responses_without_a_body_stay_so_between_versions() {
    let response = async |request: Request<Incoming>| {
        let response = Response::builder();
        let response = match request.uri().path() {
            "/204" => response.status(204),
            "/304" => response.status(304).header("etag", "\"1\""),
            _ => response.header("content-length", "5"),
        };
        response.body(service_origin::whole("")).unwrap()
    };
    for keys in ["", "http: {version: \"2\"}", "http: {version: \"1.1\"}"] {
        let pair = Pair::new(keys, response).await;
        let mut old = client::connect(pair.address).await;
        let mut new = H2::connect(pair.address).await;
        for (method, path, status, length) in
            [("HEAD", "/", 200, Some("5")), ("GET", "/204", 204, None), ("GET", "/304", 304, None)]
        {
            old.send(format!("{method} {path} HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
            let response = old.response_to(method).await;
            assert_eq!((response.status(), response.field("Content-Length")), (status, length));

            let request = Request::builder().method(method).uri(format!("http://{ALIAS}{path}"));
            let response = new.send(request.body(Bytes::new().into()).unwrap()).await.unwrap();
            let said =
                response.head.headers.get("content-length").map(|said| said.to_str().unwrap());
            assert_eq!((response.head.status.as_u16(), said), (status, length), "{keys} {path}");
            assert!(response.body.is_empty());
        }
    }
}

#[tokio::test]
async fn a_question_to_the_server_as_a_whole_passes_to_http_2() {
    let pair =
        Pair::new("http: {version: \"2\"}", async |_| Response::new(service_origin::whole("ok")))
            .await;
    let mut peer = client::connect(pair.address).await;
    peer.send(format!("OPTIONS * HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    let response = peer.response().await;
    assert_eq!(response.status(), 200, "{}", response.text());
    assert!(pair.seen().uri.ends_with('*'), "{}", pair.seen().uri);
}

#[tokio::test]
async fn curl_speaks_http_2_through_the_proxy() {
    let pair = Pair::new("", async |request: Request<Incoming>| {
        let body = request.into_body().collect().await.unwrap().to_bytes();
        Response::new(service_origin::whole(body))
    })
    .await;
    let url = format!("http://{ALIAS}:{}/a?b", pair.address.port());
    let connect = format!("{ALIAS}:{}:127.0.0.1", pair.address.port());
    let arguments = ["--resolve", &connect, "-d", "posted", "-w", " %{http_version}", &url];
    for (flag, said, version) in [
        ("--http2-prior-knowledge", "posted 2", Version::HTTP_2),
        // Its offer to upgrade is for this hop alone, and declined.
        ("--http2", "posted 1.1", Version::HTTP_11),
        ("--http1.1", "posted 1.1", Version::HTTP_11),
    ] {
        let output = curl(&[&[flag], &arguments[..]].concat()).await;
        assert_eq!((output.code, output.stdout.as_str()), (0, said), "{flag}: {}", output.stderr);
        assert_eq!(pair.seen().version, version, "{flag}");
    }
}

/// An origin that notes what it is asked, with a proxy before it.
struct Pair {
    proxy: Proxy,
    address: SocketAddr,
    scene: Scene,
    seen: Arc<Mutex<Vec<Seen>>>,
    origin: ServiceOrigin,
}

/// The head of a request.
#[derive(Clone, Debug)]
struct Seen {
    version: Version,
    uri: String,
    headers: HeaderMap,
}

impl Pair {
    async fn new<Handle, Run>(keys: &str, handle: Handle) -> Self
    where
        Handle: Fn(Request<Incoming>) -> Run + Clone + Send + Sync + 'static,
        Run: Future<Output = Response<Body>> + Send + 'static,
    {
        let mut scene = Scene::new(1).await;
        let seen = Arc::new(Mutex::new(Vec::new()));
        let notes = seen.clone();
        let tls = trust::server(&[TRUE_NAME]);
        let origin = ServiceOrigin::start(scene.take_listeners().remove(0), tls, move |request| {
            notes.lock().push(Seen {
                version: request.version(),
                uri: request.uri().to_string(),
                headers: request.headers().clone(),
            });
            handle(request)
        });
        let proxy = Proxy::start(&scene.yaml(keys)).await;
        let address = proxy.address(ALIAS).await;
        Self { proxy, address, scene, seen, origin }
    }

    fn seen(&self) -> Seen {
        self.seen.lock().last().unwrap().clone()
    }

    fn true_host(&self) -> String {
        format!("{TRUE_NAME}:{}", self.scene.port)
    }

    /// Connections to the origin so far.
    async fn connections(&self) -> f64 {
        let endpoint = self.origin.address;
        let series = format!(
            "truename_upstream_connections_total{{alias=\"{ALIAS}\",endpoint=\"{endpoint}\"}}"
        );
        self.proxy.metric(&series).await.unwrap()
    }
}

/// An HTTP/2 client whose bodies are streams.
struct Streams(http2::SendRequest<Body>);

impl Streams {
    async fn connect(address: SocketAddr) -> Self {
        let io = TokioIo::new(client::connect(address).await.into_wire());
        let (mut sender, connection) = http2::handshake(TokioExecutor::new(), io).await.unwrap();
        tokio::spawn(connection);
        // The first response shows that the proxy's settings have come.
        let hello = Request::get("http://nobody/").body(service_origin::whole("")).unwrap();
        within("settings", sender.send_request(hello)).await.unwrap();
        Self(sender)
    }

    async fn send(&mut self, request: Request<Body>) -> Response<Incoming> {
        within("a response", self.0.send_request(request)).await.unwrap()
    }
}

fn grpc(body: Body) -> Request<Body> {
    Request::post(format!("http://{ALIAS}/package.Service/Method"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(body)
        .unwrap()
}

fn extended_connect() -> Request<Body> {
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri(format!("http://{ALIAS}/chat"))
        .header("sec-websocket-version", "13")
        .body(service_origin::whole(""))
        .unwrap();
    request.extensions_mut().insert(Protocol::from_static("websocket"));
    request
}

/// Gives every message back, and then the status with how many there were.
async fn echo(mut body: Incoming, sender: StreamSender) {
    let mut messages = 0;
    while let Some(Ok(frame)) = body.frame().await {
        // The frame that only says that this is the end is empty.
        if let Ok(data) = frame.into_data()
            && !data.is_empty()
        {
            messages += 1;
            sender.data(data).await;
        }
    }
    let message = format!("{messages} messages");
    sender.trailers(trailers([("grpc-status", "0"), ("grpc-message", &message)])).await;
}

async fn frame(body: &mut Incoming) -> http_body::Frame<Bytes> {
    within("a frame", body.frame()).await.unwrap().unwrap()
}

fn trailers<const N: usize>(fields: [(&'static str, &str); N]) -> HeaderMap {
    let field =
        |(name, value)| (HeaderName::from_static(name), HeaderValue::from_str(value).unwrap());
    fields.map(field).into_iter().collect()
}
