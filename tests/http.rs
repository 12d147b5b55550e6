//! HTTP/1.1 through the proxy: whom a request reaches, what of it does, and how bodies flow.

use std::net::Ipv6Addr;

use crate::support::{
    client, loopback,
    proxy::Proxy,
    raw_origin::{Arrival, RawOrigin},
    scene::{ALIAS, ALIAS_IN_DNS, Scene, TRUE_NAME},
    scripts,
    through::Through,
    trust,
};
use truename::demo::{authority::LeafOptions, dns::DnsResponse};

#[tokio::test]
async fn server_name_certificate_and_host_are_the_true_name() {
    // The origin's certificate is for the true name alone: a response at all is its verification.
    let through = Through::new("", scripts::respond).await;
    let sent = through.sent(&get("/")).await;
    assert_eq!(sent.field("Host"), Some(through.true_host().as_str()));
    assert_eq!(through.origin.seen().server_names, [Some(TRUE_NAME.to_owned())]);
}

#[tokio::test]
async fn a_target_of_digits_is_verified_by_them_and_sent_no_server_name() {
    let mut targets = vec![loopback::address()];
    targets.push(Ipv6Addr::LOCALHOST.into());
    for address in targets {
        let listener = loopback::listen(&[address]).remove(0);
        let endpoint = listener.local_addr().unwrap();
        let leaf = trust::authority().issue(&[], &[address], LeafOptions::default()).unwrap();
        let tls = leaf.server_config(&["http/1.1"]).unwrap();
        let origin = RawOrigin::start(listener, Some(tls), scripts::respond);
        let scene = Scene::new(1).await;
        let yaml = scene.yaml(&format!("target: \"{endpoint}\""));
        let yaml = yaml.replace("\"127.0.0.0/8\"", "\"127.0.0.0/8\", \"::1/128\"");
        let proxy = Proxy::start(&yaml).await;

        let response = client::get(proxy.address(ALIAS).await, ALIAS, "/").await;
        assert_eq!(response.status(), 200, "{}", response.text());
        let seen = origin.seen();
        assert_eq!(seen.server_names, [None]);
        assert_eq!(seen.requests[0].field("Host"), Some(endpoint.to_string().as_str()));
    }
}

#[tokio::test]
async fn a_request_by_the_true_name_waits_for_dns_to_say_that_name() {
    let mut scene = Scene::new(1).await;
    let origin = scene.script(scripts::respond).remove(0);
    scene.dns.respond(ALIAS_IN_DNS, DnsResponse::Silence);
    let proxy = Proxy::start(&scene.yaml("")).await;
    let mut peer = client::connect(proxy.address(ALIAS).await).await;
    peer.send(format!("GET / HTTP/1.1\r\nHost: {TRUE_NAME}\r\n\r\n")).await;
    scene.dns.restore(ALIAS_IN_DNS);
    assert_eq!(peer.response().await.status(), 200);
    assert_eq!(origin.seen().requests.len(), 1);
}

#[tokio::test]
async fn a_preserved_host_is_sent_as_it_came() {
    let through = Through::new("host: preserve", scripts::respond).await;
    for host in ["webscaler-manual", "WebScaler-Manual.default:8080"] {
        let sent = through.sent(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
        assert_eq!(sent.field("Host"), Some(host));
    }
    let names = through.origin.seen().server_names;
    assert!(names.iter().all(|name| name.as_deref() == Some(TRUE_NAME)), "{names:?}");
}

#[tokio::test]
async fn a_host_told_outright_is_sent_as_told() {
    let through = Through::new("host: \"vendor.example:8443\"", scripts::respond).await;
    let sent = through.sent(&get("/")).await;
    assert_eq!(sent.field("Host"), Some("vendor.example:8443"));
    assert_eq!(through.origin.seen().server_names, [Some(TRUE_NAME.to_owned())]);
}

#[tokio::test]
async fn an_alias_answers_to_all_its_names() {
    let through = Through::new("hosts: [\"api.example\"]", scripts::respond).await;
    let own = through.address.to_string();
    for host in [
        "webscaler-manual",
        "WEBSCALER-Manual",
        "webscaler-manual.",
        "webscaler-manual:1",
        "webscaler-manual.default",
        "webscaler-manual.default.svc",
        "webscaler-manual.DEFAULT.svc.cluster.local",
        "webscaler-manual.default.svc.cluster.local.:8080",
        "httpbin.org",
        "HTTPBIN.org.:443",
        "api.example",
        "localhost:8080",
        "127.0.0.1",
        &own,
    ] {
        let sent = through.sent(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
        assert_eq!(sent.field("Host"), Some(through.true_host().as_str()), "{host}");
    }
}

#[tokio::test]
async fn any_other_name_is_refused_and_the_names_served_are_told() {
    let through = Through::new("", scripts::respond).await;
    for host in [
        "evil.example",
        "webscaler-manual.other",
        "webscaler-manual.default.svc.cluster.locale",
        "xwebscaler-manual",
        "api.httpbin.org",
        "127.0.0.2",
        "[::1]",
        "*",
    ] {
        let response = through.exchange(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
        assert_eq!(response.status(), 404, "{host}");
        assert_eq!(response.field("Content-Type"), Some("application/problem+json"));
        let status = response.field("Proxy-Status").unwrap();
        assert!(status.starts_with("truename; error=destination_not_found;"), "{status}");
        let problem = response.json();
        assert_eq!((&problem["status"], &problem["stage"]), (&404.into(), &"route".into()));
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains(host) && detail.contains(ALIAS), "{detail}");
        assert!(problem["fix"].as_str().unwrap().contains("`hosts`"), "{problem}");
    }
    assert_eq!(through.origin.seen().connections, 0);
}

#[tokio::test]
async fn a_star_answers_to_any_name() {
    let through = Through::new("hosts: [\"*\"]", scripts::respond).await;
    for host in ["evil.example", "192.0.2.1:80", "webscaler-manual"] {
        let sent = through.sent(&format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n")).await;
        assert_eq!(sent.field("Host"), Some(through.true_host().as_str()), "{host}");
    }
}

#[tokio::test]
async fn aliases_that_share_a_listener_are_told_apart_by_host_alone() {
    let mut scene = Scene::new(1).await;
    let origin = scene.script(scripts::respond).remove(0);
    let yaml = scene.yaml("");
    let second = format!("  - name: second\n{}", yaml.split_once(&format!("{ALIAS}\n")).unwrap().1)
        .replacen("    listen", "    target: second.example\n    listen", 1);
    // One port for both: that of a listener which is let go.
    let listener = loopback::listen_anywhere();
    let shared = listener.local_addr().unwrap();
    drop(listener);
    let yaml = format!("{yaml}{second}")
        .replace("127.0.0.1:0\"]\n    port", &format!("{shared}\"]\n    port"));
    let proxy = Proxy::start(&yaml).await;
    let address = proxy.address(ALIAS).await;
    assert_eq!(address, shared);

    assert_eq!(client::get(address, ALIAS, "/").await.status(), 200);
    assert_eq!(client::get(address, "httpbin.org", "/").await.status(), 200);
    // It leads to a name that nobody knows.
    let response = client::get(address, "second", "/").await;
    assert_eq!((response.status(), &response.json()["alias"]), (503, &"second".into()));
    for host in ["localhost", &shared.to_string(), "other"] {
        let response = client::get(address, host, "/").await;
        assert_eq!(response.status(), 404, "{host}");
        let problem = response.json();
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains(ALIAS) && detail.contains("second"), "{detail}");
    }
    assert_eq!(origin.seen().requests.len(), 2);
}

#[tokio::test]
async fn a_request_with_no_host_or_two_is_refused() {
    let through = Through::new("hosts: [\"*\"]", scripts::respond).await;
    for fields in [
        "",
        "Host:\r\n",
        "Host: a\r\nHost: a\r\n",
        "Host: a b\r\n",
        "Host: u@a\r\n",
        "Host: :80\r\n",
    ] {
        let response = through.exchange(&format!("GET / HTTP/1.1\r\n{fields}\r\n")).await;
        assert_eq!(response.status(), 400, "{fields:?}");
        assert_eq!(response.field("Content-Type"), Some("application/problem+json"));
        let status = response.field("Proxy-Status").unwrap();
        assert!(status.starts_with("truename; error=http_request_error;"), "{status}");
        assert_eq!(response.json()["stage"], "request");
    }
    assert_eq!(through.origin.seen().connections, 0);
}

#[tokio::test]
async fn http_1_0_needs_no_host() {
    let through = Through::new("", scripts::respond).await;
    let mut peer = through.connect().await;
    peer.send("GET /old HTTP/1.0\r\n\r\n").await;
    let response = peer.response().await;
    assert_eq!((response.start_line(), response.text()), ("HTTP/1.0 200 OK", "ok"));
    peer.closed().await;
    let sent = through.last_request();
    assert_eq!(sent.start_line(), "GET /old HTTP/1.1");
    assert_eq!(sent.field("Host"), Some(through.true_host().as_str()));
}

#[tokio::test]
async fn http_1_0_is_spared_chunks() {
    let through = Through::new("", respond_by_path).await;
    let mut peer = through.connect().await;
    peer.send(format!("GET /chunked HTTP/1.0\r\nHost: {ALIAS}\r\n\r\n")).await;
    let response = peer.response().await;
    assert_eq!((response.start_line(), response.text()), ("HTTP/1.0 200 OK", "abcde"));
    assert_eq!(response.field("Transfer-Encoding"), None);
}

#[tokio::test]
async fn requests_sent_at_once_get_their_responses_in_order() {
    let through = Through::new("", |arrival: Arrival| async move {
        let Some(mut conversation) = arrival.open().await else { return };
        while let Some(request) = conversation.request().await {
            let target = request.start_line().split(' ').nth(1).unwrap().to_owned();
            conversation.peer.send(scripts::ok(&target)).await;
        }
    })
    .await;
    let mut peer = through.connect().await;
    peer.send(["/1", "/2", "/3"].map(get).concat()).await;
    for target in ["/1", "/2", "/3"] {
        assert_eq!(peer.response().await.text(), target);
    }
}

#[tokio::test]
async fn a_listener_on_ipv6_answers_to_its_address() {
    let mut scene = Scene::new(1).await;
    let _origin = scene.script(scripts::respond).remove(0);
    let proxy =
        Proxy::start(&scene.yaml("").replace("127.0.0.1:0\"]\n    port", "[::1]:0\"]\n    port"))
            .await;
    let address = proxy.address(ALIAS).await;
    assert!(address.is_ipv6());
    for host in ["[::1]", "[0:0::1]", &address.to_string(), "localhost"] {
        assert_eq!(client::get(address, host, "/").await.status(), 200, "{host}");
    }
    assert_eq!(client::get(address, "[::2]", "/").await.status(), 404);
}

#[tokio::test]
async fn connect_is_for_a_forward_proxy() {
    let through = Through::new("", scripts::respond).await;
    let response = through
        .exchange("CONNECT webscaler-manual:443 HTTP/1.1\r\nHost: webscaler-manual:443\r\n\r\n")
        .await;
    assert_eq!(response.status(), 405);
    assert!(response.json()["detail"].as_str().unwrap().contains("forward proxy"));
    assert_eq!(through.origin.seen().connections, 0);
}

/// Whoever speaks it does not read HTTP. A preface of HTTP/2 is its own parser's to refuse, even one that is
/// cut.
#[tokio::test]
async fn a_request_line_of_another_protocol_or_a_wrong_preface_is_refused_without_a_response() {
    let through = Through::new("", scripts::respond).await;
    for bytes in [
        "OPTIONS rtsp://webscaler-manual/ RTSP/1.0\r\nCSeq: 1\r\n\r\n",
        "INVALID CONNECTION PREFACE\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\n",
    ] {
        let mut peer = through.connect().await;
        peer.send(bytes).await;
        peer.finish().await;
        let response = peer.rest().await.unwrap_or_default();
        assert!(!response.starts_with(b"HTTP/"), "{bytes:?}");
    }
    assert_eq!(through.origin.seen().connections, 0);
}

#[tokio::test]
async fn bytes_that_are_no_http_get_400_and_the_end() {
    let through = Through::new("", scripts::respond).await;
    for garbage in [
        "GET / HTTP/3.7\r\n\r\n",
        "hello\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: webscaler-manual\r\nno colon\r\n\r\n",
        "GET / HTTP/1.1\r\nHost: webscaler-manual\r\nX : space\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: webscaler-manual\r\nContent-Length: x\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: webscaler-manual\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        "POST / HTTP/1.1\r\nHost: webscaler-manual\r\nTransfer-Encoding: gzip\r\n\r\n",
    ] {
        let mut peer = through.connect().await;
        peer.send(garbage).await;
        let response = peer.response().await;
        assert_eq!(response.status(), 400, "{garbage:?}");
        peer.closed().await;
    }
    assert_eq!(through.origin.seen().connections, 0);
}

#[tokio::test]
async fn a_head_beyond_the_limit_gets_431() {
    let through = Through::new("", scripts::respond).await;
    let most = "x".repeat(60 * 1024);
    let sent = through.sent(&get_with("/", &format!("X-Most: {most}\r\n"))).await;
    assert_eq!(sent.field("X-Most"), Some(most.as_str()));
    let too_much = "x".repeat(70 * 1024);
    let mut peer = through.connect().await;
    peer.try_send(get_with("/", &format!("X-Most: {too_much}\r\n"))).await.ok();
    assert_eq!(peer.response().await.status(), 431);
}

#[tokio::test]
async fn path_and_query_keep_their_bytes() {
    let through = Through::new("", scripts::respond).await;
    for target in [
        "//a%2Fb/./%61?x=%20&&",
        "/../a/..;b/%2e%2E/",
        "/?",
        "/a?",
        "/?a=b?c/d//",
        "/a+b%20c",
        "/\u{e4}\u{1f980}?\u{f6}=\u{fc}",
        "/%C3%28%00%ff",
        "/a|b^c{d}\"e\\f~",
        "/a?b|c^d`e{f}'g\\h",
        "/:80@x,;=!$&'()*",
    ] {
        let sent = through.sent(&get(target)).await;
        assert_eq!(sent.start_line(), format!("GET {target} HTTP/1.1"));
    }
}

#[tokio::test]
async fn an_absolute_target_rules_over_the_host_and_is_sent_as_a_path() {
    let through = Through::new("", scripts::respond).await;
    for (target, path) in [
        ("http://webscaler-manual/a?b=%20", "/a?b=%20"),
        ("http://webscaler-manual:8080", "/"),
        ("http://httpbin.org?a", "/?a"),
        ("HTTP://webscaler-manual//x", "//x"),
    ] {
        let request = format!("GET {target} HTTP/1.1\r\nHost: evil.example\r\n\r\n");
        let sent = through.sent(&request).await;
        assert_eq!(sent.start_line(), format!("GET {path} HTTP/1.1"), "{target}");
        assert_eq!(sent.field("Host"), Some(through.true_host().as_str()));
    }
    let request = "GET http://evil.example/ HTTP/1.1\r\nHost: webscaler-manual\r\n\r\n";
    assert_eq!(through.exchange(request).await.status(), 404);
}

#[tokio::test]
async fn any_method_passes() {
    let through = Through::new("", scripts::respond).await;
    for method in ["DELETE", "PATCH", "PROPFIND", "M-SEARCH", "TRACE", "get", "X"] {
        let sent = through.sent(&format!("{method} / HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
        assert_eq!(sent.start_line(), format!("{method} / HTTP/1.1"));
        assert_eq!(sent.field("Content-Length"), None);
    }
    // RFC 9112, section 3.2.4: a URL without a path means the server as a whole, and "/" does not.
    for (target, path) in [
        ("*", "*"),
        ("http://webscaler-manual", "*"),
        ("http://webscaler-manual:80", "*"),
        ("http://webscaler-manual/", "/"),
        ("http://webscaler-manual?a", "/?a"),
        ("/", "/"),
    ] {
        let request = format!("OPTIONS {target} HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n");
        let sent = through.sent(&request).await;
        assert_eq!(sent.start_line(), format!("OPTIONS {path} HTTP/1.1"), "{target}");
    }
}

/// `http::Uri` drops a fragment unseen, so that the origin would be asked for something else.
#[tokio::test]
async fn a_fragment_in_a_target_is_refused_and_not_cut() {
    let through = Through::new("", scripts::respond).await;
    for target in
        ["/a#b", "/#", "/a?b#c", "http://webscaler-manual/a#b", "http://webscaler-manual#"]
    {
        let response = through.exchange(&get(target)).await;
        assert_eq!(response.status(), 400, "{target}");
        assert!(response.json()["detail"].as_str().unwrap().contains("`#`"), "{}", response.text());
        assert!(response.json()["fix"].as_str().unwrap().contains("%23"), "{}", response.text());
    }
    assert_eq!(through.origin.seen().connections, 0);
    assert_eq!(through.sent(&get("/a%23b")).await.start_line(), "GET /a%23b HTTP/1.1");
}

#[tokio::test]
async fn requests_keep_their_framing() {
    let through = Through::new("", scripts::respond).await;
    let empty = through.sent(&post("Content-Length: 0\r\n", "")).await;
    assert_eq!(
        (empty.field("Content-Length"), empty.field("Transfer-Encoding")),
        (Some("0"), None)
    );

    let sized = through.sent(&post("Content-Length: 3\r\n", "abc")).await;
    assert_eq!((sized.field("Content-Length"), sized.text()), (Some("3"), "abc"));

    let chunked = post("Transfer-Encoding: chunked\r\n", "3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n");
    for request in [chunked.clone(), chunked.replace("POST", "GET")] {
        let sent = through.sent(&request).await;
        assert_eq!((sent.field("Transfer-Encoding"), sent.text()), (Some("chunked"), "abcde"));
        assert_eq!(sent.field("Content-Length"), None);
    }
    let nothing = through.sent(&post("Transfer-Encoding: chunked\r\n", "0\r\n\r\n")).await;
    assert_eq!(nothing.text(), "");
    let unsaid = through.sent(&post("", "")).await;
    assert_eq!((unsaid.field("Content-Length"), unsaid.field("Transfer-Encoding")), (None, None));
}

/// RFC 9112, section 6.1: served by the coding, and nothing more is read from who sends such things.
#[tokio::test]
async fn a_request_with_length_and_coding_is_the_last_on_its_connection() {
    let through = Through::new("", scripts::respond).await;
    let mut peer = through.connect().await;
    let fields = "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n";
    let request = post(fields, "3\r\nabc\r\n0\r\n\r\n");
    peer.send(format!("{request}{}", get("/smuggled"))).await;
    let response = peer.response().await;
    assert_eq!((response.status(), response.field("Connection")), (200, Some("close")));
    peer.finish().await;
    assert_eq!(peer.rest().await.unwrap_or_default(), b"");
    let [sent] = &through.origin.seen().requests[..] else { panic!("more than one request") };
    assert_eq!((sent.field("Transfer-Encoding"), sent.text()), (Some("chunked"), "abc"));
    assert_eq!(sent.field("Content-Length"), None);
}

#[tokio::test]
async fn responses_keep_their_framing() {
    let through = Through::new("", respond_by_path).await;
    let response = through.exchange(&format!("HEAD /ok HTTP/1.1\r\nHost: {ALIAS}\r\n\r\n")).await;
    assert_eq!((response.status(), response.field("Content-Length")), (200, Some("2")));

    let mut peer = through.connect().await;
    for (path, status, length, body) in [
        ("/204", 204, None, ""),
        // The length of what there would be, were it sent.
        ("/304", 304, Some("5"), ""),
        ("/304-bare", 304, None, ""),
        ("/205", 205, Some("0"), ""),
        ("/chunked", 200, None, "abcde"),
        ("/empty", 200, Some("0"), ""),
        ("/1.0", 200, None, "until the end"),
        ("/both", 200, None, "abc"),
        ("/ok", 200, Some("2"), "ok"),
    ] {
        // One after another on one connection: each ends where it should.
        peer.send(get(path)).await;
        let response = peer.response().await;
        assert_eq!((response.status(), response.text()), (status, body), "{path}");
        assert_eq!(response.field("Content-Length"), length, "{path}");
        assert_eq!(response.field("Date").or(response.field("Server")), None);
    }
}

#[tokio::test]
async fn a_response_with_two_lengths_is_the_last_on_its_connection() {
    let through = Through::new("", respond_by_path).await;
    let mut peer = through.connect().await;
    for path in ["/ok", "/both", "/ok", "/ok"] {
        peer.send(get(path)).await;
        assert_eq!(peer.response().await.status(), 200);
    }
    assert_eq!(through.origin.seen().connections, 2);
}

#[tokio::test]
async fn a_switch_of_protocols_that_nobody_asked_for_is_the_origins_error() {
    let switch = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n";
    let through = Through::new("", move |arrival| scripts::always(arrival, switch)).await;
    let response = through.exchange(&get("/")).await;
    assert_eq!(response.status(), 502);
    let status = response.field("Proxy-Status").unwrap();
    assert!(status.starts_with("truename; error=http_upgrade_failed;"), "{status}");
}

/// Responds by the request's path, with what the framing of responses has to offer.
async fn respond_by_path(arrival: Arrival) {
    let Some(mut conversation) = arrival.open().await else { return };
    while let Some(request) = conversation.request().await {
        let (head, body) = match request.start_line().split(' ').nth(1).unwrap() {
            "/204" => ("204 No Content", ""),
            "/304" => ("304 Not Modified\r\nContent-Length: 5", ""),
            "/304-bare" => ("304 Not Modified", ""),
            "/205" => ("205 Reset Content\r\nContent-Length: 0", ""),
            "/chunked" => {
                ("200 OK\r\nTransfer-Encoding: chunked", "3\r\nabc\r\n2;x\r\nde\r\n0\r\n\r\n")
            }
            "/empty" => ("200 OK\r\nContent-Length: 0", ""),
            "/1.0" => {
                conversation.peer.send("HTTP/1.0 200 OK\r\n\r\nuntil the end").await;
                return conversation.peer.finish().await;
            }
            "/both" => (
                "200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 9",
                "3\r\nabc\r\n0\r\n\r\n",
            ),
            _ if request.start_line().starts_with("HEAD") => ("200 OK\r\nContent-Length: 2", ""),
            _ => ("200 OK\r\nContent-Length: 2", "ok"),
        };
        conversation.peer.send(format!("HTTP/1.1 {head}\r\n\r\n{body}")).await;
    }
}

fn get(target: &str) -> String {
    get_with(target, "")
}

fn get_with(target: &str, fields: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: {ALIAS}\r\n{fields}\r\n")
}

fn post(fields: &str, body: &str) -> String {
    format!("POST / HTTP/1.1\r\nHost: {ALIAS}\r\n{fields}\r\n{body}")
}
