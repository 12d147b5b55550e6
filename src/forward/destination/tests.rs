use http::Request;
use proptest::prelude::*;

use super::*;

fn of(method: &str, target: &str) -> Option<Result<Destination, DestinationError>> {
    // What is no URI at all, the HTTP server refuses before us.
    let request = Request::builder().method(method).uri(target).body(()).ok()?;
    Some(Destination::of(&request.into_parts().0))
}

fn connect(target: &str) -> Result<Destination, DestinationError> {
    of("CONNECT", target).unwrap()
}

fn named(destination: &Destination) -> (&str, Option<IpAddr>, u16) {
    (destination.host(), destination.ip(), destination.port())
}

#[test]
fn connect_names_a_host_and_a_port() {
    assert_eq!(named(&connect("Webscaler-Manual.:443").unwrap()), ("webscaler-manual", None, 443));
    let v4 = "169.254.169.254".parse().unwrap();
    assert_eq!(named(&connect("169.254.169.254:80").unwrap()), ("169.254.169.254", Some(v4), 80));
    let v6 = "::1".parse().unwrap();
    assert_eq!(named(&connect("[::1]:8080").unwrap()), ("::1", Some(v6), 8080));
    assert_eq!(connect("[::1]:8080").unwrap().to_string(), "[::1]:8080");
}

#[test]
fn connect_to_anything_else_is_refused() {
    for target in [
        "webscaler-manual",
        "webscaler-manual:",
        "webscaler-manual:0",
        "webscaler-manual:65536",
        "webscaler-manual:+443",
        "webscaler-manual:http",
        "user@webscaler-manual:443",
        "user:secret@webscaler-manual:443",
        "http://webscaler-manual:443/",
        "/",
        "*",
        "[::1",
        "[fe80::1%25eth0]:80",
        "[127.0.0.1]:80",
        "127.1:80",
        "2130706433.0:80",
        "a..b:80",
        "-a:80",
        ":443",
    ] {
        if let Some(result) = of("CONNECT", target) {
            assert!(result.is_err(), "{target}: {result:?}");
        }
    }
}

#[test]
fn an_absolute_url_has_the_port_of_http_unless_it_says_another() {
    let get = |target| of("GET", target).unwrap();
    assert_eq!(get("http://a.example").unwrap().to_string(), "a.example:80");
    assert_eq!(get("http://a.example:/x").unwrap().to_string(), "a.example:80");
    assert_eq!(get("http://a.example:8080/x").unwrap().http_host(), "a.example:8080");
    assert_eq!(get("http://A.example:80/x?y").unwrap().http_host(), "a.example");
    assert_eq!(get("http://[::1]/").unwrap().http_host(), "[::1]");
    assert_eq!(get("http://u:p@a.example/"), Err(DestinationError::UserInfo));
    assert!(get("http://a.example:99999/").is_err());
    assert_eq!(get("https://a.example/"), Err(DestinationError::Scheme("https".into())));
    assert_eq!(get("ftp://a.example/"), Err(DestinationError::Scheme("ftp".into())));
    assert_eq!(get("/x"), Err(DestinationError::NotForProxy));
    assert_eq!(of("OPTIONS", "*").unwrap(), Err(DestinationError::NotForProxy));
    assert!(get("a.example:443").is_err(), "an authority is for CONNECT");
}

proptest! {
    /// What is taken is one clear host and port, and means the same when it is said again.
    #[test]
    fn what_is_taken_means_the_same_when_said_again(target in "[a-zA-Z0-9.:@%_\\[\\]+-]{1,40}") {
        if let Some(Ok(destination)) = of("CONNECT", &target) {
            prop_assert!(destination.port() != 0);
            prop_assert!(!destination.host().contains(['@', '[', ']', '%', '/', '+']));
            prop_assert_eq!(destination.host().contains(':'), matches!(destination.ip(), Some(IpAddr::V6(_))));
            prop_assert_eq!(connect(&destination.to_string()).unwrap(), destination);
        }
    }

    /// Names, ports and addresses survive in both forms.
    #[test]
    fn a_name_and_a_port_are_found_in_both_forms(
        name in "[a-z]([a-z0-9-]{0,10}[a-z0-9])?(\\.[a-z]([a-z0-9]{0,5})?){0,3}",
        port in 1..=u16::MAX,
        path in "(/[a-z0-9@:]{0,8}){0,3}",
    ) {
        let expected = Destination { host: name.clone(), ip: None, port };
        prop_assert_eq!(connect(&format!("{name}:{port}")).unwrap(), expected.clone());
        let absolute = of("GET", &format!("http://{name}:{port}{path}")).unwrap();
        prop_assert_eq!(absolute.unwrap(), expected);
    }
}
