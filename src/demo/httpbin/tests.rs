use http::Request;
use serde_json::json;

use super::*;

const PEER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(127, 0, 0, 1));

#[test]
fn anything_shows_the_whole_request_in_httpbins_shape() {
    let request = Request::post("/anything/a%2Fb?test=value&twice=1&twice=2&space=a+b%21")
        .header("host", "httpbin.org")
        .header("x-two-words", "one")
        .header("x-two-words", "two")
        .header("content-type", "application/json");
    let text = whole(ask(request, br#"{"b":1}"#));

    let expected = r#"{
  "args": {
    "space": "a b!",
    "test": "value",
    "twice": [
      "1",
      "2"
    ]
  },
  "data": "{\"b\":1}",
  "files": {},
  "form": {},
  "headers": {
    "Content-Type": "application/json",
    "Host": "httpbin.org",
    "X-Two-Words": "one,two"
  },
  "json": {
    "b": 1
  },
  "method": "POST",
  "origin": "127.0.0.1",
  "url": "https://httpbin.org/anything/a%2Fb?test=value&twice=1&twice=2&space=a+b%21"
}
"#;
    assert_eq!(text, expected);
}

#[test]
fn a_form_is_taken_apart_and_is_no_data() {
    let request = Request::put("/anything")
        .header("host", "httpbin.org")
        .header("content-type", "application/x-www-form-urlencoded; charset=utf-8");
    let shown = parsed(ask(request, b"a=1&a=2&b=%C3%A9"));

    assert_eq!(shown["form"], json!({"a": ["1", "2"], "b": "é"}));
    assert_eq!(shown["data"], json!(""));
    assert_eq!(shown["json"], Value::Null);
}

#[test]
fn bytes_that_are_no_text_are_shown_as_base64() {
    let shown = parsed(ask(Request::post("/anything").header("host", "h"), b"\xff\x00"));
    assert_eq!(shown["data"], json!("data:application/octet-stream;base64,/wA="));
}

#[test]
fn http2s_authority_stands_for_the_host() {
    let shown = parsed(ask(Request::get("https://httpbin.org/get?a=1"), b""));
    assert_eq!(
        shown,
        json!({
            "args": {"a": "1"},
            "headers": {"Host": "httpbin.org"},
            "origin": "127.0.0.1",
            "url": "https://httpbin.org/get?a=1",
        })
    );
}

#[test]
fn a_status_is_what_was_asked_for() {
    assert_eq!(ask(Request::get("/status/503"), b"").status, 503);
    let unauthorised = ask(Request::delete("/status/401"), b"");
    assert_eq!(unauthorised.headers[header::WWW_AUTHENTICATE], "Basic realm=\"Fake Realm\"");
    for nonsense in ["/status/100", "/status/abc", "/status/"] {
        assert_eq!(ask(Request::get(nonsense), b"").status, 400, "{nonsense}");
    }
}

#[test]
fn redirects_lead_where_they_were_told() {
    let there = "/redirect-to?url=https%3A%2F%2Fhttpbin.org%2Fget&status_code=307";
    let response = ask(Request::get(there), b"");
    assert_eq!(response.status, 307);
    assert_eq!(response.headers[header::LOCATION], "https://httpbin.org/get");

    assert_eq!(ask(Request::get("/redirect-to?url=/x&status_code=200"), b"").status, 302);
    assert_eq!(ask(Request::get("/redirect-to"), b"").status, 400);
}

#[test]
fn cookies_are_set_without_a_domain_and_shown_when_they_come_back() {
    let response = ask(Request::get("/cookies/set?name=value&other=2"), b"");
    assert_eq!(response.status, 302);
    assert_eq!(response.headers[header::LOCATION], "/cookies");
    let cookies: Vec<_> = response.headers.get_all(header::SET_COOKIE).iter().collect();
    assert_eq!(cookies, ["name=value; Secure; Path=/", "other=2; Secure; Path=/"]);

    let back = ask(Request::get("/cookies").header("cookie", "name=value; other=2"), b"");
    assert_eq!(parsed(back), json!({"cookies": {"name": "value", "other": "2"}}));
}

#[test]
fn what_is_asked_for_by_number_is_bounded() {
    assert_eq!(ask(Request::get("/delay/1e300"), b"").status, 400);
    assert_eq!(ask(Request::get("/delay/-1"), b"").status, 400);
    assert_eq!(ask(Request::get("/delay/3600"), b"").delay, MAX_DELAY);
    assert_eq!(ask(Request::get("/delay/0.25"), b"").delay, Duration::from_millis(250));

    let HttpbinBody::Whole(bytes) = ask(Request::get("/bytes/999999999"), b"").body else {
        panic!("bytes have a length")
    };
    assert_eq!(bytes.len(), MAX_BYTES);
    let HttpbinBody::Streamed(lines) = ask(Request::get("/stream/999"), b"").body else {
        panic!("a stream has none")
    };
    assert_eq!(lines.len(), MAX_LINES);
    let last: Value = serde_json::from_slice(&lines[MAX_LINES - 1]).unwrap();
    assert_eq!(last["id"], json!(99));
}

#[test]
fn only_known_paths_and_methods_get_a_response() {
    assert_eq!(ask(Request::post("/get"), b"").status, 405);
    assert_eq!(ask(Request::get("/"), b"").status, 404);
    assert_eq!(ask(Request::get("/get/more"), b"").status, 404);
    assert_eq!(ask(Request::options("*"), b"").status, 404);
    assert_eq!(ask(Request::connect("httpbin.org:443"), b"").status, 404);
}

#[test]
fn any_page_may_read_a_response() {
    let response = ask(Request::get("/get").header("origin", "https://httpbin.org"), b"");
    assert_eq!(response.headers[header::ACCESS_CONTROL_ALLOW_ORIGIN], "https://httpbin.org");
}

fn ask(request: http::request::Builder, body: &[u8]) -> HttpbinResponse {
    let (head, ()) = request.body(()).unwrap().into_parts();
    respond(&head, body, PEER)
}

fn whole(response: HttpbinResponse) -> String {
    let HttpbinBody::Whole(body) = response.body else { panic!("no stream was expected") };
    String::from_utf8(body.to_vec()).unwrap()
}

fn parsed(response: HttpbinResponse) -> Value {
    serde_json::from_str(&whole(response)).unwrap()
}
