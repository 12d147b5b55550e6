//! Header fields on the wire: what passes, what belongs to one connection only, what is translated
//! between the alias and its true name, and what is added where it is asked for.

use crate::support::{
    curl::curl,
    message::Message,
    raw_origin::Arrival,
    scene::{ALIAS, TRUE_NAME},
    scripts,
    through::Through,
};

#[tokio::test]
async fn a_request_goes_out_as_it_came_but_for_its_host() {
    let through = Through::new("", scripts::respond).await;
    let request = "GET / HTTP/1.1\r\nX-fIRST: 1\r\nhOSt: webscaler-manual\r\nx-twice: b\r\nX-TWICE: a\r\n\
                   User-Agent: odd/1\r\nX-Empty:\r\nx-Twice: c\r\naccept: */*\r\n\r\n";
    let sent = through.sent(request).await;

    let mut expected = vec![
        ("X-fIRST", "1"),
        ("hOSt", ""),
        ("x-twice", "b"),
        ("X-TWICE", "a"),
        ("x-Twice", "c"),
        ("User-Agent", "odd/1"),
        ("X-Empty", ""),
        ("accept", "*/*"),
    ];
    let host = through.true_host();
    expected[1].1 = &host;
    let mut fields = sent.fields();
    // Fields of different names have no order; those of one name do.
    expected.sort_by_key(|(name, _)| name.to_ascii_lowercase());
    fields.sort_by_key(|(name, _)| name.to_ascii_lowercase());
    assert_eq!(fields, expected);
}

#[tokio::test]
async fn a_response_comes_back_as_it_went_out() {
    let response = "HTTP/1.1 299 Odd But Fine\r\nx-LOWER: 1\r\nSet-Cookie: b=1\r\nset-cookie: a=2\r\n\
                  Content-Length: 2\r\nSet-Cookie: c=3\r\nvia: 1.1 origin\r\n\r\nok";
    let through = Through::new("", move |arrival| scripts::always(arrival, response)).await;
    let response = through.exchange(&get("/")).await;

    assert_eq!(response.start_line(), "HTTP/1.1 299 Odd But Fine");
    assert_eq!(response.text(), "ok");
    let mut fields = response.fields();
    fields.sort_by_key(|(name, _)| name.to_ascii_lowercase());
    let cookies = [("Set-Cookie", "b=1"), ("set-cookie", "a=2"), ("Set-Cookie", "c=3")];
    assert_eq!(fields[0], ("Content-Length", "2"));
    assert_eq!(fields[1..4], cookies);
    assert_eq!(fields[4..], [("via", "1.1 origin"), ("x-LOWER", "1")]);
}

#[tokio::test]
async fn what_concerns_the_applications_connection_ends_there() {
    let through = Through::new("", scripts::respond).await;
    let sent = through
        .sent(
            "GET / HTTP/1.1\r\nHost: webscaler-manual\r\nConnection: close, X-Mine\r\n\
             Connection: x-also, host, te\r\nX-Mine: 1\r\nX-Also: 2\r\nX-Kept: 3\r\nKeep-Alive: timeout=5\r\n\
             Proxy-Connection: keep-alive\r\nProxy-Authorization: Basic eA==\r\n\
             Proxy-Authenticate: Basic\r\nTE: gzip, trailers\r\nUpgrade: websocket\r\n\r\n",
        )
        .await;

    let mut names: Vec<_> = sent.fields().iter().map(|(name, _)| name.to_lowercase()).collect();
    names.sort();
    assert_eq!(names, ["connection", "host", "te", "x-kept"]);
    assert_eq!(sent.field("TE"), Some("trailers"));
    assert_eq!(sent.field("Connection"), Some("TE"));
    assert_eq!(sent.field("Host"), Some(through.true_host().as_str()));
}

#[tokio::test]
async fn what_concerns_the_origins_connection_ends_there() {
    let response = "HTTP/1.1 200 OK\r\nConnection: keep-alive, X-Mine\r\nX-Mine: 1\r\nX-Kept: 2\r\n\
                  Keep-Alive: timeout=30\r\nProxy-Connection: keep-alive\r\nUpgrade: h2\r\n\
                  Proxy-Authenticate: Basic\r\nContent-Length: 0\r\n\r\n";
    let through = Through::new("", move |arrival| scripts::always(arrival, response)).await;
    let response = through.exchange(&get("/")).await;

    let mut fields = response.fields();
    fields.sort();
    assert_eq!(fields, [("Content-Length", "0"), ("X-Kept", "2")]);
}

#[tokio::test]
async fn nothing_is_said_of_the_application_unless_asked_for() {
    let through = Through::new("", scripts::respond).await;
    let sent =
        through.sent(&get_with("/", "X-Forwarded-For: 192.0.2.1\r\nForwarded: for=x\r\n")).await;
    // What the application says itself is its own affair.
    let mut fields = sent.fields();
    fields.sort();
    let host = through.true_host();
    let expected =
        [("Forwarded", "for=x"), ("Host", host.as_str()), ("X-Forwarded-For", "192.0.2.1")];
    assert_eq!(fields, expected);
}

#[tokio::test]
async fn x_forwarded_appends_who_asked_for_what() {
    let through = Through::new("forwarded: x-forwarded", scripts::respond).await;
    let sent = through.sent(&get_with("/", "X-Forwarded-For: 192.0.2.1\r\n")).await;
    assert_eq!(sent.field("X-Forwarded-For"), Some("192.0.2.1, 127.0.0.1"));
    assert_eq!(sent.field("X-Forwarded-Host"), Some(ALIAS));
    assert_eq!(sent.field("X-Forwarded-Proto"), Some("http"));
    assert_eq!(sent.field("Forwarded"), None);
}

#[tokio::test]
async fn forwarded_appends_who_asked_for_what() {
    let through = Through::new("forwarded: rfc7239", scripts::respond).await;
    let sent = through.sent(&get_with("/", "Forwarded: for=192.0.2.1\r\n")).await;
    let expected = "for=192.0.2.1, for=127.0.0.1;host=\"webscaler-manual\";proto=http";
    assert_eq!(sent.field("Forwarded"), Some(expected));
    assert_eq!(sent.field("X-Forwarded-For"), None);
}

#[tokio::test]
async fn locations_at_the_target_come_back_in_the_alias_name() {
    let through = Through::new("", respond_as_asked).await;
    let true_host = through.true_host();
    let host = format!("{ALIAS}:{}", through.address.port());
    for (location, expected) in [
        (format!("https://{true_host}/a?b#c"), format!("http://{host}/a?b#c")),
        (format!("HTTPS://{}", true_host.to_uppercase()), format!("http://{host}")),
        (format!("//{true_host}/a"), format!("//{host}/a")),
        ("/a?b=https://httpbin.org/".to_owned(), "/a?b=https://httpbin.org/".to_owned()),
        ("a/../b".to_owned(), "a/../b".to_owned()),
        // What a target says that does not know of the TLS before it.
        (format!("http://{true_host}/a"), format!("http://{host}/a")),
        (format!("http://{TRUE_NAME}/a"), format!("http://{host}/a")),
        (format!("http://{TRUE_NAME}:80"), format!("http://{host}")),
        (
            format!("https://{true_host}/caf\u{e9}?\u{fc}=%FC"),
            format!("http://{host}/caf\u{e9}?\u{fc}=%FC"),
        ),
        // Another port or host is another origin.
        (format!("http://{TRUE_NAME}:81/"), format!("http://{TRUE_NAME}:81/")),
        (format!("https://{TRUE_NAME}/"), format!("https://{TRUE_NAME}/")),
        (format!("https://www.{true_host}/"), format!("https://www.{true_host}/")),
        (format!("https://{true_host}.evil/"), format!("https://{true_host}.evil/")),
        (format!("https://{true_host}@evil/"), format!("https://{true_host}@evil/")),
    ] {
        let response = through.exchange(&ask(&host, &format!("Location: {location}"))).await;
        assert_eq!(response.field("Location"), Some(expected.as_str()), "{location}");
    }
}

#[tokio::test]
async fn every_field_that_leads_to_the_target_leads_to_the_alias() {
    let through = Through::new("", respond_as_asked).await;
    let own = format!("https://{}", through.true_host());
    let alias = format!("http://{ALIAS}");
    let style = "</style.css>; rel=preload";
    for (field, expected) in [
        (format!("Content-Location: {own}/a"), format!("{alias}/a")),
        ("Content-Location: /a".to_owned(), "/a".to_owned()),
        (format!("Refresh: 5; url={own}/a"), format!("5; url={alias}/a")),
        (format!("Refresh: 0;URL='{own}/a'"), format!("0;URL='{alias}/a'")),
        (format!("Refresh: 5, {own}/a"), format!("5, {alias}/a")),
        ("Refresh: 5".to_owned(), "5".to_owned()),
        (
            format!("Link: <{own}/2>; rel=next, {style}, <{own}/3>; rel=\"last\""),
            format!("<{alias}/2>; rel=next, {style}, <{alias}/3>; rel=\"last\""),
        ),
        (
            format!("Link: <https://cdn.example/a>; title=\"<{own}/>\""),
            format!("<https://cdn.example/a>; title=\"<{own}/>\""),
        ),
    ] {
        let response = through.exchange(&ask(ALIAS, &field)).await;
        let name = field.split(':').next().unwrap();
        assert_eq!(response.field(name), Some(expected.as_str()), "{field}");
    }
}

#[tokio::test]
async fn a_target_that_insists_on_tls_does_not_do_so_in_the_alias_name() {
    let through = Through::new("", respond_as_asked).await;
    let hsts = "Strict-Transport-Security: max-age=31536000; includeSubDomains";
    let response = through.exchange(&ask(ALIAS, hsts)).await;
    assert_eq!(response.field("Strict-Transport-Security"), None);
}

#[tokio::test]
async fn cookies_for_the_target_become_cookies_for_the_alias() {
    let through = Through::new("", respond_as_asked).await;
    for (cookie, expected) in [
        ("a=1; Domain=httpbin.org; Path=/; Secure", "a=1; Path=/; Secure"),
        ("a=1; domain=.HTTPBIN.org", "a=1"),
        ("a=1; Domain=org; HttpOnly", "a=1; HttpOnly"),
        ("a=1;Domain=httpbin.org;Path=/", "a=1;Path=/"),
        ("a=1; Domain=other.org; Path=/", "a=1; Domain=other.org; Path=/"),
        ("a=1; Domain=bin.org", "a=1; Domain=bin.org"),
        ("Domain=httpbin.org; Path=/", "Domain=httpbin.org; Path=/"),
        ("a=1", "a=1"),
    ] {
        let response = through.exchange(&ask(ALIAS, &format!("Set-Cookie: {cookie}"))).await;
        assert_eq!(response.field("Set-Cookie"), Some(expected), "{cookie}");
    }
}

#[tokio::test]
async fn an_allowed_origin_comes_back_as_the_page_knows_it() {
    let through = Through::new("", respond_as_asked).await;
    let own = format!("https://{}", through.true_host());
    let ask_for = |origin: &str, allowed: &str| {
        format!(
            "GET / HTTP/1.1\r\nHost: {ALIAS}:8080\r\nOrigin: {origin}\r\n\
             X-Response: Access-Control-Allow-Origin: {allowed}\r\n\r\n"
        )
    };
    let alias = format!("http://{ALIAS}:8080");
    let short = format!("http://{ALIAS}");
    for (origin, allowed, expected) in [
        (&*alias, &*own, &*alias),
        // The page was loaded from another port of the alias: that is the origin to allow.
        (&*short, &*own, &*short),
        ("https://page.example", "https://page.example", "https://page.example"),
        ("https://page.example", "*", "*"),
        ("null", "null", "null"),
    ] {
        let response = through.exchange(&ask_for(origin, allowed)).await;
        assert_eq!(response.field("Access-Control-Allow-Origin"), Some(expected), "{origin}");
    }
}

#[tokio::test]
async fn the_origin_sees_origin_and_referer_in_its_own_name() {
    let through = Through::new("", scripts::respond).await;
    let own = format!("https://{}", through.true_host());
    for alias in ["webscaler-manual", "webscaler-manual:8080", "WebScaler-Manual.default.svc"] {
        let fields = format!("Origin: http://{alias}\r\nReferer: http://{alias}/page?a=b\r\n");
        let sent = through.sent(&get_with("/", &fields)).await;
        assert_eq!(sent.field("Origin"), Some(own.as_str()), "{alias}");
        assert_eq!(sent.field("Referer"), Some(&*format!("{own}/page?a=b")), "{alias}");
    }
    for other in ["https://page.example", "http://xwebscaler-manual", "null"] {
        let fields = format!("Origin: {other}\r\nReferer: {other}\r\n");
        let sent = through.sent(&get_with("/", &fields)).await;
        assert_eq!((sent.field("Origin"), sent.field("Referer")), (Some(other), Some(other)));
    }
}

#[tokio::test]
async fn alternative_services_are_not_the_applications_to_use() {
    let through = Through::new("", respond_as_asked).await;
    let response = through.exchange(&ask(ALIAS, "Alt-Svc: h3=\":443\"")).await;
    assert_eq!(response.field("Alt-Svc"), None);
}

#[tokio::test]
async fn nothing_is_translated_where_repair_is_off() {
    let through = Through::new("repair: false", respond_as_asked).await;
    let own = format!("https://{}", through.true_host());
    for field in [
        format!("Location: {own}/a"),
        "Set-Cookie: a=1; Domain=httpbin.org".to_owned(),
        format!("Access-Control-Allow-Origin: {own}"),
        "Alt-Svc: h3=\":443\"".to_owned(),
        "Strict-Transport-Security: max-age=1".to_owned(),
        format!("Refresh: 0; url={own}/a"),
        format!("Link: <{own}/a>; rel=next"),
        format!("Content-Location: {own}/a"),
    ] {
        let (name, value) = field.split_once(": ").unwrap();
        let response = through.exchange(&ask(ALIAS, &field)).await;
        assert_eq!(response.field(name), Some(value));
    }
    let alias = format!("http://{ALIAS}");
    let fields = format!("Origin: {alias}\r\nReferer: {alias}\r\n");
    let sent = through.sent(&get_with("/", &fields)).await;
    assert_eq!((sent.field("Origin"), sent.field("Referer")), (Some(&*alias), Some(&*alias)));
}

#[tokio::test]
async fn a_host_told_outright_is_the_name_that_repair_translates() {
    let through = Through::new("host: vendor.example", respond_as_asked).await;
    let request = format!(
        "GET / HTTP/1.1\r\nHost: {ALIAS}\r\nOrigin: http://{ALIAS}\r\n\
         X-Response: Location: https://vendor.example/a\r\n\r\n"
    );
    let response = through.exchange(&request).await;
    assert_eq!(response.field("Location"), Some(&*format!("http://{ALIAS}/a")));
    let sent = through.last_request();
    assert_eq!(sent.field("Host"), Some("vendor.example"));
    assert_eq!(sent.field("Origin"), Some("https://vendor.example"));
    let response = through.exchange(&ask(ALIAS, "Set-Cookie: a=1; Domain=vendor.example")).await;
    assert_eq!(response.field("Set-Cookie"), Some("a=1"));
}

#[tokio::test]
async fn curl_follows_redirects_and_keeps_cookies_at_the_alias() {
    let through = Through::new("", |arrival: Arrival| async move {
        let Some(mut conversation) = arrival.open().await else { return };
        while let Some(request) = conversation.request().await {
            let host = request.field("Host").unwrap();
            let response = match request.start_line().split(' ').nth(1).unwrap() {
                "/login" => format!(
                    "302 Found\r\nLocation: https://{host}/home\r\n\
                     Set-Cookie: session=1; Domain={TRUE_NAME}; Path=/\r\nContent-Length: 0\r\n\r\n"
                ),
                path => {
                    let said = format!("{path} with {}", request.field("Cookie").unwrap_or("none"));
                    format!("200 OK\r\nContent-Length: {}\r\n\r\n{said}", said.len())
                }
            };
            conversation.peer.send(format!("HTTP/1.1 {response}")).await;
        }
    })
    .await;
    let port = through.address.port();
    let url = format!("http://{ALIAS}:{port}/login");
    let resolve = format!("{ALIAS}:{port}:127.0.0.1");
    // An empty name turns the cookie engine on without a file.
    let said = curl(&["-L", "-b", "", "--resolve", &resolve, &url]).await;
    assert_eq!((said.code, said.stdout.as_str()), (0, "/home with session=1"), "{}", said.stderr);
    assert_eq!(through.origin.seen().requests.len(), 2);
}

const SIGNATURE: &str = "Authorization: AWS4-HMAC-SHA256 \
    Credential=AKID/20130524/us-east-1/s3/aws4_request, \
    SignedHeaders=host;range;x-amz-date, Signature=f0e8\r\n";
const SIGNED_QUERY: &str = "/o?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-SignedHeaders=date%3Bhost";

#[tokio::test]
async fn a_signature_over_the_alias_host_is_refused_and_explained() {
    let through = Through::new("", scripts::respond).await;
    for request in [get_with("/o", SIGNATURE), get(SIGNED_QUERY)] {
        let response = through.exchange(&request).await;
        assert_eq!(response.status(), 502);
        assert_eq!(response.field("Content-Type"), Some("application/problem+json"));
        let problem = response.json();
        let detail = problem["detail"].as_str().unwrap();
        assert!(detail.contains("Signature") && detail.contains(&through.true_host()), "{detail}");
        assert!(problem["fix"].as_str().unwrap().contains("host: preserve"), "{problem}");
        let status = response.field("Proxy-Status").unwrap();
        assert!(status.starts_with("truename; error=http_request_denied;"), "{status}");
    }
    assert_eq!(through.origin.seen().requests, []);
}

#[tokio::test]
async fn a_signature_that_stays_good_passes() {
    let through = Through::new("", scripts::respond).await;
    let host = through.true_host();
    let other = SIGNATURE.replace("host;", "");
    for request in [
        // Signed over the true name, as an SDK with an endpoint override can.
        format!("GET /o HTTP/1.1\r\nHost: {host}\r\n{SIGNATURE}\r\n"),
        get_with("/o", &other),
        get_with("/o", "Authorization: Bearer SignedHeaders=host\r\n"),
    ] {
        assert_eq!(through.sent(&request).await.field("Host"), Some(&*host));
    }
    let through = Through::new("host: preserve", scripts::respond).await;
    for request in [get_with("/o", SIGNATURE), get(SIGNED_QUERY)] {
        assert_eq!(through.sent(&request).await.field("Host"), Some(ALIAS));
    }
}

/// Responds with the field that the request asks for.
async fn respond_as_asked(arrival: Arrival) {
    let Some(mut conversation) = arrival.open().await else { return };
    while let Some(request) = conversation.request().await {
        let field = field_asked(&request);
        let response = format!("HTTP/1.1 200 OK\r\n{field}Content-Length: 0\r\n\r\n");
        conversation.peer.send(response).await;
    }
}

fn field_asked(request: &Message) -> String {
    request.field("X-Response").map(|field| format!("{field}\r\n")).unwrap_or_default()
}

fn ask(host: &str, field: &str) -> String {
    format!("GET / HTTP/1.1\r\nHost: {host}\r\nX-Response: {field}\r\n\r\n")
}

fn get(target: &str) -> String {
    get_with(target, "")
}

fn get_with(target: &str, fields: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: {ALIAS}\r\n{fields}\r\n")
}
