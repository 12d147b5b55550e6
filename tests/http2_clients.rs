//! Clients of HTTP/2 as they are: those that end a stream by a reset, that read nothing or send nothing for
//! a while, that wait to be told to go on, or that leave.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use h2::{
    Reason, RecvStream, SendStream,
    client::{Builder, ResponseFuture, SendRequest},
    ext::Protocol,
};
use http::{Method, Request};
use nix::sys::signal::Signal;
use tokio::sync::{mpsc, watch};

use crate::{
    clients::Frames,
    support::{raw_origin::Arrival, scene::ALIAS, scripts, through::Through, within},
};

const IN_FLIGHT: &str = "truename_http_requests_in_flight{alias=\"webscaler-manual\"}";
const IMPATIENT: &str = "timeouts: {idle: 1s}";
const BLOCK: usize = 64 * 1024;

/// As one is that reads only when it asks for something.
#[tokio::test]
async fn a_client_that_does_not_reply_to_a_goaway_is_told_its_last_stream_and_let_go() {
    let through = Through::new("", scripts::respond).await;
    let mut frames = Frames::connect(through.address).await;
    let fields = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", ALIAS)];
    frames.get(1, &fields).await;
    loop {
        let (kind, ..) = frames.next().await.unwrap();
        if kind == Frames::DATA {
            break;
        }
    }
    through.proxy.signal(Signal::SIGTERM);
    let mut last = Vec::new();
    while let Some((kind, _, payload)) = frames.next().await {
        assert_eq!((kind, &payload[4..8]), (Frames::GOAWAY, &[0; 4][..]));
        last.push(u32::from_be_bytes(payload[..4].try_into().unwrap()));
    }
    assert_eq!(last, [i32::MAX as u32, 1]);
}

/// The reset, and not the data's end, is what the origin is told: the half would look whole.
#[tokio::test]
async fn an_upload_that_its_client_resets_is_never_a_whole_one() {
    for reason in [Reason::NO_ERROR, Reason::CANCEL] {
        let (came, mut coming) = watch::channel(Vec::new());
        let came = Arc::new(came);
        let through = Through::new("", move |arrival: Arrival| {
            let came = came.clone();
            async move {
                let mut conversation = arrival.open().await.unwrap();
                conversation.peer.head().await.unwrap();
                loop {
                    let bytes = conversation.peer.some().await;
                    if bytes.is_empty() {
                        return;
                    }
                    came.send_modify(|all| all.extend_from_slice(&bytes));
                }
            }
        })
        .await;
        let mut client = connect(&through, &Builder::new()).await;
        let (_response, mut upload) = upload(&mut client, "/").await;
        upload.send_data("half".into(), false).unwrap();
        within("the half", coming.wait_for(|all| all == b"4\r\nhalf\r\n")).await.unwrap();
        upload.send_reset(reason);
        through.origin.until(|seen| seen.ended == 1).await;
        assert_eq!(coming.borrow().as_slice(), b"4\r\nhalf\r\n", "{reason:?}");
        no_request_is_in_flight(&through).await;
    }
}

#[tokio::test]
async fn uploads_that_nobody_reads_stop_no_other_on_their_connection() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        let head = conversation.peer.head().await.unwrap();
        if head.starts_with("POST /stuck ") {
            return std::future::pending().await;
        }
        let length = head.split_once("content-length: ").unwrap().1;
        let length = length.split_once("\r\n").unwrap().0.parse().unwrap();
        conversation.peer.exactly(length).await;
        conversation.peer.send(scripts::ok("whole")).await;
        conversation.peer.hold().await;
    })
    .await;
    let mut client = connect(&through, &Builder::new()).await;
    let mut stuck = Vec::new();
    for _ in 0..16 {
        let (response, mut upload) = upload(&mut client, "/stuck").await;
        fill(&mut upload).await;
        stuck.push((response, upload));
    }
    const LENGTH: usize = 2 * 1024 * 1024;
    let request = Request::post(format!("http://{ALIAS}/")).header("content-length", LENGTH);
    let (response, mut upload) = send(&mut client, request.body(()).unwrap()).await;
    within("the upload", async {
        for _ in 0..LENGTH / BLOCK {
            send_all(&mut upload, Bytes::from(vec![b'x'; BLOCK])).await;
        }
    })
    .await;
    upload.send_data(Bytes::new(), true).unwrap();
    assert_eq!(within("a response", response).await.unwrap().status(), 200);
}

/// Such as an echo, or a conversion on the fly, for a client that reads once it has sent all.
#[tokio::test]
async fn an_upload_goes_on_though_its_client_reads_nothing_of_the_response_yet() {
    const UPLOAD: usize = 16 * 1024 * 1024;
    const RESPONSE: usize = 1024 * 1024;
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {RESPONSE}\r\n\r\n");
        conversation.peer.send(head).await;
        conversation.peer.send(vec![b'x'; RESPONSE]).await;
        let mut left = UPLOAD;
        while left > 0 {
            left -= conversation.peer.some().await.len();
        }
        conversation.peer.hold().await;
    })
    .await;
    let mut client = connect(&through, &Builder::new()).await;
    let request = Request::post(format!("http://{ALIAS}/")).header("content-length", UPLOAD);
    let (response, mut upload) = send(&mut client, request.body(()).unwrap()).await;
    let mut body = within("a head", response).await.unwrap().into_body();
    within("the upload", async {
        for _ in 0..UPLOAD / BLOCK {
            send_all(&mut upload, Bytes::from(vec![b'x'; BLOCK])).await;
        }
    })
    .await;
    upload.send_data(Bytes::new(), true).unwrap();
    assert_eq!(within("the response", read(&mut body)).await.unwrap(), RESPONSE);
}

#[tokio::test]
async fn a_client_that_reads_nothing_of_its_stream_is_given_up_and_its_connection_serves_on() {
    let through = Through::new(IMPATIENT, |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        let head = conversation.peer.head().await.unwrap();
        if head.starts_with("GET /short ") {
            conversation.peer.send("HTTP/1.1 204 No Content\r\n\r\n").await;
            return conversation.peer.hold().await;
        }
        conversation.peer.send("HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n").await;
        while conversation.peer.try_send(vec![b'x'; BLOCK]).await.is_ok() {}
    })
    .await;
    let mut client = connect(&through, Builder::new().initial_window_size(1000)).await;
    let mut body = get(&mut client, "/").await.into_body();
    through.origin.until(|seen| seen.ended == 1).await;
    no_request_is_in_flight(&through).await;
    let error = within("the reset", read(&mut body)).await.unwrap_err();
    assert_eq!((error.is_reset(), error.reason()), (true, Some(Reason::CANCEL)));
    assert_eq!(get(&mut client, "/short").await.status(), 204);
}

/// In the midst of its upload, under a response that has begun.
#[tokio::test]
async fn a_client_that_sends_nothing_more_of_its_upload_is_given_up() {
    let through = Through::new(IMPATIENT, |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        conversation.peer.send("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n").await;
        conversation.peer.hold().await;
    })
    .await;
    let mut client = connect(&through, &Builder::new()).await;
    let (response, _upload) = upload(&mut client, "/").await;
    let mut body = within("a head", response).await.unwrap().into_body();
    within("the reset", read(&mut body)).await.unwrap_err();
    through.origin.until(|seen| seen.ended == 1).await;
    no_request_is_in_flight(&through).await;
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_held_up_upload_along() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        conversation.peer.until_broken().await;
    })
    .await;
    let mut client = connect(&through, &Builder::new()).await;
    let (_response, mut first) = upload(&mut client, "/").await;
    fill(&mut first).await;
    first.send_reset(Reason::CANCEL);
    through.origin.until(|seen| seen.ended == 1).await;
    let (response, mut second) = upload(&mut client, "/").await;
    fill(&mut second).await;
    drop((response, second, client));
    through.origin.until(|seen| seen.ended == 2).await;
    no_request_is_in_flight(&through).await;
}

#[tokio::test]
async fn a_websocket_that_its_client_resets_is_reset_at_its_origin() {
    let (ends, mut ended) = mpsc::unbounded_channel();
    let through = Through::new("", move |arrival: Arrival| {
        let ends = ends.clone();
        async move {
            let mut conversation = arrival.open().await.unwrap();
            conversation.request().await.unwrap();
            let switch = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\
                          Upgrade: websocket\r\n\r\n";
            conversation.peer.send(switch).await;
            assert_eq!(conversation.peer.exactly(5).await, b"hello");
            conversation.peer.send("world").await;
            ends.send(conversation.peer.rest().await.map(|rest| rest.len())).unwrap();
        }
    })
    .await;
    for polite in [true, false] {
        let mut client =
            connect(&through, Builder::new().initial_connection_window_size(1 << 20)).await;
        let mut request = Request::builder()
            .method(Method::CONNECT)
            .uri(format!("http://{ALIAS}/chat"))
            .header("sec-websocket-version", "13")
            .body(())
            .unwrap();
        request.extensions_mut().insert(Protocol::from_static("websocket"));
        let (response, mut tunnel) = send(&mut client, request).await;
        let mut back = within("a tunnel", response).await.unwrap().into_body();
        tunnel.send_data("hello".into(), false).unwrap();
        assert_eq!(within("bytes", back.data()).await.unwrap().unwrap(), "world");
        if polite {
            tunnel.send_data(Bytes::new(), true).unwrap();
        } else {
            tunnel.send_reset(Reason::CANCEL);
        }
        let end = within("the end", ended.recv()).await.unwrap();
        assert_eq!(end.is_ok(), polite, "{end:?}");
        no_request_is_in_flight(&through).await;
    }
}

/// Nothing more is read of a side that has ended, and an origin that has nothing to say writes nothing.
#[tokio::test]
async fn a_websocket_whose_client_has_ended_its_side_and_leaves_is_reset_at_its_origin() {
    let (ends, mut ended) = mpsc::unbounded_channel();
    let through = Through::new("", move |arrival: Arrival| {
        let ends = ends.clone();
        async move {
            let mut conversation = arrival.open().await.unwrap();
            conversation.request().await.unwrap();
            let switch = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\
                          Upgrade: websocket\r\n\r\n";
            conversation.peer.send(switch).await;
            ends.send(conversation.peer.rest().await.unwrap()).unwrap();
            conversation.peer.until_broken().await;
            ends.send(Vec::new()).unwrap();
        }
    })
    .await;
    let mut client = connect(&through, &Builder::new()).await;
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri(format!("http://{ALIAS}/chat"))
        .body(())
        .unwrap();
    request.extensions_mut().insert(Protocol::from_static("websocket"));
    let (response, mut tunnel) = send(&mut client, request).await;
    let back = within("a tunnel", response).await.unwrap().into_body();
    tunnel.send_data("bye".into(), true).unwrap();
    assert_eq!(within("the end of its side", ended.recv()).await.unwrap(), b"bye");
    drop((client, tunnel, back));
    within("a reset", ended.recv()).await.unwrap();
    no_request_is_in_flight(&through).await;
}

/// And one whose origin breaks off is told that, not that it is over.
#[tokio::test]
async fn a_websocket_that_its_origin_breaks_off_is_reset_at_its_client() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.request().await.unwrap();
        let switch = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\n\
                      Upgrade: websocket\r\n\r\nlast words";
        conversation.peer.send(switch).await;
        conversation.peer.finish_tcp();
        conversation.peer.hold().await;
    })
    .await;
    let mut client = connect(&through, &Builder::new()).await;
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri(format!("http://{ALIAS}/chat"))
        .body(())
        .unwrap();
    request.extensions_mut().insert(Protocol::from_static("websocket"));
    let (response, _tunnel) = send(&mut client, request).await;
    let mut back = within("a tunnel", response).await.unwrap().into_body();
    assert_eq!(within("bytes", back.data()).await.unwrap().unwrap(), "last words");
    let error = within("the end", back.data()).await.unwrap().unwrap_err();
    assert!(error.is_reset(), "{error}");
}

#[tokio::test]
async fn a_client_of_http_2_is_told_to_go_on_and_of_other_things_ahead_of_the_response() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        let head = conversation.peer.head().await.unwrap();
        assert!(head.contains("expect: 100-continue\r\n"), "{head}");
        let hints = "HTTP/1.1 103 Early Hints\r\nLink: </a.css>; rel=preload\r\n\r\n";
        conversation.peer.send(hints).await;
        conversation.peer.send("HTTP/1.1 100 Continue\r\n\r\n").await;
        assert_eq!(conversation.peer.exactly(5).await, b"hello");
        conversation.peer.send(scripts::ok("thanks")).await;
        conversation.peer.hold().await;
    })
    .await;
    let mut client = connect(&through, &Builder::new()).await;
    let (mut response, mut upload) = expecting(&mut client).await;
    let hints = informational(&mut response).await;
    assert_eq!(
        (hints.status().as_u16(), &hints.headers()["link"]),
        (103, &"</a.css>; rel=preload".parse().unwrap())
    );
    assert_eq!(informational(&mut response).await.status(), 100);
    upload.send_data("hello".into(), true).unwrap();
    assert_eq!(within("a response", response).await.unwrap().status(), 200);
}

/// It would otherwise wait for a body of which its client waits to be told that it is wanted.
#[tokio::test]
async fn a_client_of_http_2_is_told_to_go_on_though_its_origin_says_nothing() {
    let through = Through::new("", scripts::respond).await;
    let mut client = connect(&through, &Builder::new()).await;
    let (mut response, mut upload) = expecting(&mut client).await;
    assert_eq!(informational(&mut response).await.status(), 100);
    upload.send_data("hello".into(), true).unwrap();
    assert_eq!(within("a response", response).await.unwrap().status(), 200);
    assert_eq!(through.last_request().text(), "hello");
}

#[tokio::test]
async fn a_client_of_http_2_that_is_refused_is_not_told_to_go_on() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        conversation.peer.send("HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n").await;
        // No byte of the body is due, and none may come.
        assert_eq!(conversation.peer.some().await, b"");
    })
    .await;
    let mut client = connect(&through, &Builder::new()).await;
    let (mut response, _upload) = expecting(&mut client).await;
    let first = std::future::poll_fn(|cx| response.poll_informational(cx));
    assert!(within("no 1xx", first).await.is_none());
    assert_eq!(within("a response", response).await.unwrap().status(), 413);
    through.origin.until(|seen| seen.ended == 1).await;
}

/// A `1xx` after the response's head is an error of the protocol: its client would lose the response, or all its
/// streams.
#[tokio::test]
async fn a_client_of_http_2_is_not_told_to_go_on_once_its_response_has_begun() {
    let through = Through::new("", |arrival: Arrival| async move {
        let mut conversation = arrival.open().await.unwrap();
        conversation.peer.head().await.unwrap();
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfirst\r\n";
        conversation.peer.send(head).await;
        assert_eq!(conversation.peer.exactly(5).await, b"hello");
        conversation.peer.send("6\r\nsecond\r\n0\r\n\r\n").await;
        conversation.peer.hold().await;
    })
    .await;
    let mut client = connect(&through, &Builder::new()).await;
    let (response, mut upload) = expecting(&mut client).await;
    let mut body = within("a response", response).await.unwrap().into_body();
    assert_eq!(within("the first part", body.data()).await.unwrap().unwrap(), "first");
    // Its body is read by then: an origin is not waited for any longer.
    let more = tokio::time::timeout(Duration::from_millis(1500), body.data()).await;
    assert!(more.is_err(), "{more:?}");
    upload.send_data("hello".into(), true).unwrap();
    assert_eq!(within("the second part", body.data()).await.unwrap().unwrap(), "second");
}

/// What came before it breaks off is passed on, and then no end that looks like one.
#[tokio::test]
async fn a_response_that_breaks_off_is_reset() {
    for script in [
        "HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    ] {
        let through = Through::new("", move |arrival: Arrival| async move {
            let mut conversation = arrival.open().await.unwrap();
            conversation.request().await.unwrap();
            conversation.peer.send(script).await;
            conversation.peer.finish().await;
        })
        .await;
        let mut client = connect(&through, &Builder::new()).await;
        let mut body = get(&mut client, "/").await.into_body();
        assert_eq!(within("the half", body.data()).await.unwrap().unwrap(), "half");
        let error = within("the reset", body.data()).await.unwrap().unwrap_err();
        assert_eq!((error.is_reset(), error.reason()), (true, Some(Reason::INTERNAL_ERROR)));
    }
}

async fn connect(through: &Through, settings: &Builder) -> SendRequest<Bytes> {
    let io = through.connect().await.into_wire();
    let (client, connection) = settings.handshake(io).await.unwrap();
    tokio::spawn(connection);
    let mut client = within("a stream", client.ready()).await.unwrap();
    // The first response shows that the proxy's settings have come.
    let hello = Request::get("http://nobody/").body(()).unwrap();
    within("settings", client.send_request(hello, true).unwrap().0).await.unwrap();
    client
}

async fn send(
    client: &mut SendRequest<Bytes>,
    request: Request<()>,
) -> (ResponseFuture, SendStream<Bytes>) {
    let ready = within("a stream", client.clone().ready()).await.unwrap();
    *client = ready;
    client.send_request(request, false).unwrap()
}

async fn upload(
    client: &mut SendRequest<Bytes>,
    path: &str,
) -> (ResponseFuture, SendStream<Bytes>) {
    send(client, Request::post(format!("http://{ALIAS}{path}")).body(()).unwrap()).await
}

async fn expecting(client: &mut SendRequest<Bytes>) -> (ResponseFuture, SendStream<Bytes>) {
    let request = Request::post(format!("http://{ALIAS}/"))
        .header("expect", "100-continue")
        .header("content-length", "5");
    send(client, request.body(()).unwrap()).await
}

async fn get(client: &mut SendRequest<Bytes>, path: &str) -> http::Response<RecvStream> {
    *client = within("a stream", client.clone().ready()).await.unwrap();
    let request = Request::get(format!("http://{ALIAS}{path}")).body(()).unwrap();
    within("a response", client.send_request(request, true).unwrap().0).await.unwrap()
}

async fn informational(response: &mut ResponseFuture) -> http::Response<()> {
    let informational = std::future::poll_fn(|cx| response.poll_informational(cx));
    within("a 1xx", informational).await.expect("a 1xx").unwrap()
}

/// Sends all of it as fast as the peer's window allows.
async fn send_all(upload: &mut SendStream<Bytes>, mut data: Bytes) {
    while !data.is_empty() {
        upload.reserve_capacity(data.len());
        if upload.capacity() == 0 {
            std::future::poll_fn(|cx| upload.poll_capacity(cx)).await.unwrap().unwrap();
        }
        let piece = data.split_to(data.len().min(upload.capacity()));
        upload.send_data(piece, false).unwrap();
    }
}

/// Uploads until all on the way is full.
async fn fill(upload: &mut SendStream<Bytes>) {
    let block = Bytes::from(vec![b'x'; BLOCK]);
    let full = async {
        loop {
            let piece =
                tokio::time::timeout(Duration::from_millis(500), send_all(upload, block.clone()));
            if piece.await.is_err() {
                return;
            }
        }
    };
    within("all to be full", full).await;
}

/// How much comes.
async fn read(body: &mut RecvStream) -> Result<usize, h2::Error> {
    let mut length = 0;
    while let Some(data) = body.data().await {
        let data = data?;
        body.flow_control().release_capacity(data.len())?;
        length += data.len();
    }
    Ok(length)
}

async fn no_request_is_in_flight(through: &Through) {
    within("no request in flight", async {
        while through.proxy.metric(IN_FLIGHT).await != Some(0.0) {}
    })
    .await;
}
