//! The PROXY protocol: headers that listeners accept, and those that targets get.

use std::net::{IpAddr, SocketAddr};

use crate::support::{
    client,
    curl::curl,
    daemon::Daemon,
    loopback,
    message::Message,
    peer::Peer,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, Scene, TRUE_NAME},
    scripts,
    through::Through,
    within,
};
use http::Request;
use tokio::{io::AsyncReadExt as _, net::TcpSocket, sync::mpsc};
use truename::{Client, config::Config};

const ERRORS: &str = "truename_proxy_header_errors_total";

/// An alias whose origin is told who the client is, and that believes connections from 127.0.0.1.
const ACCEPTING: &str = "forwarded: x-forwarded\nproxy_protocol: {accept: [127.0.0.1]}";

#[tokio::test]
async fn the_client_that_haproxy_names_is_the_client() {
    let through = Through::new(ACCEPTING, scripts::respond).await;
    for send in ["send-proxy", "send-proxy-v2", "send-proxy-v2 proxy-v2-options crc32c,unique-id"] {
        let haproxy = Daemon::haproxy(&format!(
            "listen in\n mode tcp\n bind $ADDRESS\n unique-id-format %[uuid()]\n server truename {} {send}\n",
            through.address
        ))
        .await;
        let ip = loopback::address();
        let mut peer = from(ip, haproxy.address).await;
        peer.send(GET).await;
        assert_eq!(peer.response().await.status(), 200, "{send}");
        assert_eq!(told(&through.last_request()), ip.to_string(), "{send}");

        let tcp = tcp_from(ip, haproxy.address).await;
        let roots = through.proxy.roots();
        let mut peer = client::handshake(tcp, ALIAS, roots, &["http/1.1"]).await.unwrap();
        peer.send(GET).await;
        assert_eq!(peer.response().await.status(), 200, "{send}");
        assert_eq!(told(&through.last_request()), ip.to_string(), "over TLS, {send}");
    }
    // It has checked whether the alias listens.
    assert_eq!(through.proxy.metric(ERRORS).await, Some(0.0));
}

#[tokio::test]
async fn curl_can_speak_for_its_client() {
    let through = Through::new(ACCEPTING, scripts::respond).await;
    let response = curl(&["--haproxy-protocol", &format!("http://{}/", through.address)]).await;
    assert_eq!((response.code, response.stdout.as_str()), (0, "ok"), "{}", response.stderr);
    assert_eq!(told(&through.last_request()), "127.0.0.1");
    let response = curl(&[&format!("http://{}/", through.address)]).await;
    assert_ne!(response.code, 0, "without a header: {response:?}");
}

#[tokio::test]
async fn a_header_is_required_from_the_configured_networks_and_believed_of_nobody_else() {
    let through = Through::new(ACCEPTING, scripts::respond).await;
    let stranger = loopback::address();
    let mut peer = from(stranger, through.address).await;
    peer.send(GET).await;
    assert_eq!(peer.response().await.status(), 200);
    assert_eq!(told(&through.last_request()), stranger.to_string());

    let mut peer = from(stranger, through.address).await;
    peer.send(format!("PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n{GET}")).await;
    assert_eq!(peer.response().await.status(), 400, "these are the client's own bytes");
    assert_eq!(through.origin.seen().requests.len(), 1);

    let mut peer = through.connect().await;
    peer.send(GET).await;
    assert!(peer.try_exactly(1).await.is_none());
    let line = through.proxy.logged("does not begin with a PROXY protocol header").await;
    assert!(line.contains("proxy_protocol.accept"), "{line}");
    assert_eq!(through.proxy.metric(ERRORS).await, Some(1.0));
}

#[tokio::test]
async fn a_header_may_come_in_pieces_or_along_with_the_request() {
    let through = Through::new(ACCEPTING, scripts::respond).await;
    let v1 = b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n".to_vec();
    let v6 = b"PROXY TCP6 2001:db8::1 2001:db8::2 1 2\r\n".to_vec();
    let v2 = [SIGNATURE, b"\x21\x11\0\x0c\xc0\0\x02\x01\xc0\0\x02\x02\0\x01\0\x02"].concat();
    let local = [SIGNATURE, b"\x20\0\0\0"].concat();
    let unknown = b"PROXY UNKNOWN\r\n".to_vec();
    for (header, client) in [
        (v1, "192.0.2.1"),
        (v6, "2001:db8::1"),
        (v2, "192.0.2.1"),
        (local, "127.0.0.1"),
        (unknown, "127.0.0.1"),
    ] {
        let whole = [&header[..], GET.as_bytes()].concat();
        let mut peer = through.connect().await;
        peer.send(&whole).await;
        assert_eq!(peer.response().await.status(), 200, "{header:?}");
        assert_eq!(told(&through.last_request()), client);
        // It counts for all requests of the connection.
        peer.send(GET).await;
        assert_eq!(peer.response().await.status(), 200);
        assert_eq!(told(&through.last_request()), client);

        let mut peer = through.connect().await;
        for byte in &whole {
            peer.send([*byte]).await;
            tokio::task::yield_now().await;
        }
        assert_eq!(peer.response().await.status(), 200, "{header:?}");
        assert_eq!(told(&through.last_request()), client);
    }
}

#[tokio::test]
async fn what_is_no_header_closes_the_connection() {
    let mut scene = Scene::new(1).await;
    let origin = scene.script(scripts::echo).remove(0);
    for protocol in ["http", "tcp"] {
        let keys = format!("protocol: {protocol}\nproxy_protocol: {{accept: [127.0.0.0/8]}}");
        let yaml = format!("listener: {{header_timeout: 1s}}\n{}", scene.yaml(&keys));
        let proxy = Proxy::start(&yaml).await;
        let address = proxy.address(ALIAS).await;
        // A port check is no error, even if it ends with a reset.
        client::connect(address).await.finish().await;
        client::connect(address).await.reset();
        let broken = [SIGNATURE, b"\x21\x11\0\x0b"].concat();
        for (count, (bytes, why)) in [
            (&b"GET / HTTP/1.1\r\n\r\n"[..], "does not begin with a PROXY protocol header"),
            (b"PROXY TCP4 192.0.2.1 1 2\r\n", "is neither UNKNOWN, nor TCP4 or TCP6"),
            (b"PROXY TCP4 192.0.2.1", "no PROXY protocol header within `listener.header_timeout`"),
            (&[&broken[..], &[0; 11]].concat(), "shorter than its addresses"),
        ]
        .into_iter()
        .enumerate()
        {
            let mut peer = client::connect(address).await;
            peer.send(bytes).await;
            assert!(peer.try_exactly(1).await.is_none(), "{why}");
            proxy.logged(why).await;
            assert_eq!(proxy.metric(ERRORS).await, Some(count as f64 + 1.0), "{why}");
        }
    }
    assert_eq!(origin.seen().connections, 0);
}

#[tokio::test]
async fn the_inside_of_a_tunnel_has_no_header() {
    let mut scene = Scene::new(1).await;
    let _origins = scene.script(scripts::respond);
    let proxy = Proxy::start(&(scene.yaml(ACCEPTING) + "proxy: {listen: \"127.0.0.1:0\"}\n")).await;
    let mut peer = client::connect(proxy.forward_proxy().await).await;
    peer.send(format!("CONNECT {ALIAS}:80 HTTP/1.1\r\nHost: {ALIAS}:80\r\n\r\n")).await;
    assert_eq!(peer.response_to("CONNECT").await.status(), 200);
    peer.send(GET).await;
    assert_eq!(peer.response().await.status(), 200);
}

#[tokio::test]
async fn haproxy_and_nginx_learn_who_the_client_is() {
    let haproxy = Daemon::haproxy(
        "frontend in\n mode http\n bind $ADDRESS accept-proxy ssl crt $FOLDER/server.pem\n \
         http-request return status 200 content-type text/plain lf-string \"%[src]:%[src_port]\"\n",
    )
    .await;
    let nginx = Daemon::nginx(
        "server { listen $ADDRESS ssl proxy_protocol; ssl_certificate $FOLDER/server.pem; \
         ssl_certificate_key $FOLDER/server.pem; set_real_ip_from 127.0.0.0/8; \
         real_ip_header proxy_protocol; return 200 \"$remote_addr:$proxy_protocol_port\"; }",
    )
    .await;
    let scene = Scene::new(1).await;
    for daemon in [haproxy, nginx] {
        for version in ["v1", "v2"] {
            for protocol in ["http", "tcp"] {
                let keys = format!(
                    "protocol: {protocol}\ntarget: \"{}\"\nproxy_protocol: {{send: {version}}}\n\
                     tls: {{server_name: {TRUE_NAME}, ca: {{system: false, webpki: false, files: \
                     [\"$FOLDER/root.pem\"]}}}}",
                    daemon.address
                );
                let proxy = Proxy::start(&scene.yaml(&keys)).await;
                let tcp = tcp_from(loopback::address(), proxy.address(ALIAS).await).await;
                let source = tcp.local_addr().unwrap().to_string();
                let mut peer = Peer::plain(tcp);
                peer.send(GET).await;
                assert_eq!(peer.response().await.text(), source, "{version} {protocol}");
            }
        }
    }
}

#[tokio::test]
async fn a_client_that_a_header_names_is_named_to_the_target() {
    for protocol in ["http", "tcp"] {
        let keys =
            format!("protocol: {protocol}\nproxy_protocol: {{accept: [127.0.0.0/8], send: v1}}");
        let (through, mut headers) = noting(&keys).await;
        let mut peer = through.connect().await;
        let header = "PROXY TCP6 2001:db8::1 2001:db8::2 1 2\r\n";
        peer.send(format!("{header}{GET}")).await;
        assert_eq!(peer.response().await.status(), 200, "{protocol}");
        assert_eq!(headers.recv().await.unwrap(), header, "{protocol}");
    }
}

#[tokio::test]
async fn a_connection_to_the_target_serves_the_client_that_its_header_names_and_is_closed_with_it()
{
    let (through, mut headers) = noting("proxy_protocol: {send: v1}").await;
    let mut one = through.connect().await;
    let mut other = from(loopback::address(), through.address).await;
    let header = |peer: &Peer| {
        let (source, to) = (peer.address(), through.address);
        format!("PROXY TCP4 {} {} {} {}\r\n", source.ip(), to.ip(), source.port(), to.port())
    };
    let (header_of_one, header_of_other) = (header(&one), header(&other));
    for _ in 0..3 {
        for peer in [&mut one, &mut other] {
            peer.send(GET).await;
            assert_eq!(peer.response().await.status(), 200);
        }
    }
    assert_eq!(headers.recv().await.unwrap(), header_of_one);
    assert_eq!(headers.recv().await.unwrap(), header_of_other);
    assert_eq!(through.origin.seen().connections, 2);
    drop(one);
    through.origin.until(|seen| seen.ended == 1).await;
    other.send(GET).await;
    assert_eq!(other.response().await.status(), 200);
    assert_eq!(through.origin.seen().connections, 2);
}

#[tokio::test]
async fn a_call_by_the_library_names_no_client() {
    let mut scene = Scene::new(1).await;
    let (note, mut headers) = mpsc::unbounded_channel();
    let script = move |arrival| respond_and_note(arrival, note.clone());
    let _origin = RawOrigin::start(scene.take_listeners().remove(0), None, script);
    let yaml = scene.yaml("tls: {mode: plaintext}\nproxy_protocol: {send: v1}");
    let client = Client::new(&Config::parse(&yaml, "truename.yaml").unwrap()).unwrap();
    let request = Request::get(format!("http://{ALIAS}/")).body(String::new()).unwrap();
    let response = within("a response", client.send(request)).await;
    assert_eq!(response.status(), 200);
    assert_eq!(headers.recv().await.unwrap(), "PROXY UNKNOWN\r\n");
}

const GET: &str = "GET / HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n";

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// A proxy before an origin that responds to requests, and the headers that come to the origin.
async fn noting(keys: &str) -> (Through, mpsc::UnboundedReceiver<String>) {
    let (note, headers) = mpsc::unbounded_channel();
    let script = move |arrival| respond_and_note(arrival, note.clone());
    (Through::new(keys, script).await, headers)
}

async fn respond_and_note(mut arrival: Arrival, note: mpsc::UnboundedSender<String>) {
    let mut header = String::new();
    while !header.ends_with('\n') {
        let Ok(byte) = arrival.tcp().read_u8().await else { return };
        header.push(byte.into());
    }
    note.send(header).unwrap();
    scripts::respond(arrival).await;
}

async fn tcp_from(ip: IpAddr, address: SocketAddr) -> tokio::net::TcpStream {
    let socket = TcpSocket::new_v4().unwrap();
    socket.bind(SocketAddr::new(ip, 0)).unwrap();
    within("a connection", socket.connect(address)).await.unwrap()
}

async fn from(ip: IpAddr, address: SocketAddr) -> Peer {
    Peer::plain(tcp_from(ip, address).await)
}

/// Who the client is, as the origin was told.
fn told(request: &Message) -> &str {
    request.field("X-Forwarded-For").expect("an X-Forwarded-For")
}
