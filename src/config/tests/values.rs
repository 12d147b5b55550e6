use super::*;

/// The first problem of an alias with `key: value`, without its place.
fn refused(key: &str, value: &str) -> String {
    let problems = wrong(&format!("version: 1\naliases:\n  - name: a\n    {key}: {value}\n"));
    problems.lines().next().unwrap().splitn(4, ':').nth(3).unwrap().trim().to_owned()
}

fn alias(keys: &str) -> Alias {
    parsed(&format!("version: 1\naliases:\n  - name: a\n    {keys}\n")).aliases.remove(0)
}

#[test]
fn durations_have_units() {
    for (text, millis) in
        [("250ms", 250), ("5s", 5000), ("1h30m", 5_400_000), ("\"2m\"", 120_000), ("0s", 0)]
    {
        assert_eq!(alias(&format!("drain: {text}")).drain, Duration::from_millis(millis), "{text}");
    }
    for (text, why) in [
        ("5", "has no unit"),
        ("1.5s", "has a fraction"),
        ("5 s", "has no unit"),
        ("5x", "unknown unit"),
        ("-5s", "not a whole number"),
        ("9999999999h", "longer than 366d"),
        ("367d", "longer than 366d"),
        ("\"\"", "is not a duration"),
    ] {
        let problem = refused("drain", text);
        assert!(problem.contains(why) && problem.contains("such as `250ms`"), "{text}: {problem}");
    }
    assert!(refused("timeouts", "{connect: 0s}").contains("longer than zero"));
}

#[test]
fn a_response_may_take_any_time_by_any_spelling_of_off() {
    for off in ["off", "\"off\"", "false"] {
        assert_eq!(alias(&format!("timeouts: {{response: {off}}}")).timeouts.response, None);
    }
    let timeouts = alias("timeouts: {response: 5s}").timeouts;
    assert_eq!(timeouts.response, Some(Duration::from_secs(5)));
    assert!(refused("timeouts", "{response: 5}").ends_with("or `off`"));
}

#[test]
fn a_bare_port_listens_on_loopback() {
    let addresses = alias("listen: [8080, \"8081\", \"[::1]:8082\"]").listen;
    let expected = ["127.0.0.1:8080", "127.0.0.1:8081", "[::1]:8082"];
    assert_eq!(addresses, expected.map(|text| text.parse::<SocketAddr>().unwrap()));
    for (text, advice) in [
        (":8080", "`0.0.0.0:8080` for every interface"),
        ("127.0.0.1", "has no port"),
        ("65536", "not a port from 0 to 65535"),
        ("localhost:80", "use an IP with a port"),
    ] {
        let problem = refused("listen", &format!("[\"{text}\"]"));
        assert!(problem.contains(advice), "{text}: {problem}");
    }
}

#[test]
fn budgets_are_shares_and_sizes_are_bytes() {
    assert_eq!(alias("retry: {budget: 20%}").retry.budget, 0.2);
    assert_eq!(alias("retry: {budget: 0.5%}").retry.budget, 0.005);
    assert_eq!(alias("retry: {budget: 100%}").retry.budget, 1.0);
    for text in ["0.2", "101%", "%", "-1%", "1e1%", "1.2.3%"] {
        assert!(
            refused("retry", &format!("{{budget: \"{text}\"}}")).contains("from `0%` to `100%`")
        );
    }
    for (text, bytes) in [("64KiB", 65536), ("4096", 4096), ("1MiB", 1 << 20), ("16kB", 16000)] {
        let config = parsed(&format!("version: 1\nlistener: {{max_header_size: {text}}}"));
        assert_eq!(config.listener.max_header_size, bytes);
    }
    for text in ["64KB!", "1KiBs", "10", "99999999999999999999GiB", "1GiB"] {
        let problems = wrong(&format!("version: 1\nlistener: {{max_header_size: {text}}}"));
        assert!(problems.contains("64KiB") || problems.contains("between"), "{problems}");
    }
}

#[test]
fn reasons_to_retry_are_words_and_statuses() {
    let when = alias("retry: {when: [connect, reset, 502, 503, \"504\"]}").retry.when;
    let statuses = [502, 503, 504].map(RetryOn::Status);
    assert_eq!(when[..2], [RetryOn::Connect, RetryOn::Reset]);
    assert_eq!(when[2..], statuses);
    assert!(refused("retry", "{when: [500]}").contains("`500` is not one of `connect`"));
}

#[test]
fn words_and_versions_need_no_quotes() {
    assert_eq!(alias("http: {version: 1.1}").http.version, HttpVersion::Http1);
    assert_eq!(alias("http: {version: 2}").http.version, HttpVersion::Http2);
    assert_eq!(alias("tls: {min_version: 1.3}").tls.min_version, TlsVersion::V1_3);
    assert_eq!(alias("forwarded: rfc7239").forwarded, Forwarded::Rfc7239);
    let send = |text: &str| alias(&format!("proxy_protocol: {{send: {text}}}")).proxy_protocol.send;
    assert_eq!(["off", "false", "\"off\""].map(send), [None; 3]);
    assert_eq!(["v1", "v2"].map(send), [ProxyVersion::V1, ProxyVersion::V2].map(Some));
    assert!(refused("proxy_protocol", "{send: v3}").contains("`v3` is not `off`, `v1` or `v2`"));
    let problem = refused("balance", "round-robin");
    assert!(problem.ends_with("did you mean `round_robin`?"), "{problem}");
}

#[test]
fn a_proxy_is_a_url_or_a_url_with_credentials() {
    let via = |text: &str| alias(&format!("via: {text}")).via.unwrap();
    assert_eq!(via("\"http://Proxy.Corp:3128/\"").url.to_string(), "http://proxy.corp:3128");
    assert_eq!(via("\"http://[::1]:3128\"").url.to_string(), "http://[::1]:3128");
    assert_eq!(via("{url: \"http://10.0.0.7:80\"}").credentials, None);
    assert_eq!(alias("via: null").via, None);
    for (url, why) in [
        ("http://proxy.corp", "it has no port"),
        ("proxy.corp:3128", "it has no `http://`"),
        ("https://proxy.corp:3128", "TLS to the proxy is not supported"),
        ("socks5://proxy.corp:1080", "it is not the URL of an HTTP proxy"),
        ("http://proxy.corp:3128/path", "no path"),
        ("http://a b:3128", "letters, digits"),
    ] {
        let problem = refused("via", &format!("\"{url}\""));
        assert!(problem.contains(why) && problem.contains("an example is"), "{problem}");
    }
    let problem = refused("via", "\"http://ann:secret@proxy.corp:3128\"");
    assert!(problem.contains("name that in `credentials`"), "{problem}");
    assert!(!problem.contains("secret"), "{problem}");
    let problem = refused("via", "{url: \"http://proxy:1\", credentials: /nonexistent}");
    assert!(problem.contains("cannot use the file `/nonexistent`"), "{problem}");
    let problem = refused("via", "{credentials: /nonexistent}");
    assert!(problem.contains("url"), "{problem}");
}

#[test]
fn hosts_and_server_names_are_names_or_addresses() {
    let hosts = alias("hosts: [\"*\", API.Example.com., 10.0.0.7, \"::1\", \"[::2]\"]").hosts;
    assert_eq!(hosts, ["*", "api.example.com", "10.0.0.7", "[::1]", "[::2]"]);
    assert!(refused("hosts", "[\"a:80\"]").contains("ports in a Host are ignored"));
    assert!(refused("hosts", "[\"*.a\"]").contains("neither a name nor `*`"));

    let server_name = |text: &str| alias(&format!("tls: {{server_name: {text}}}")).tls.server_name;
    assert_eq!(server_name("HTTPBIN.org.").as_deref(), Some("httpbin.org"));
    assert_eq!(server_name("\"[2001:DB8::1]\"").as_deref(), Some("2001:db8::1"));
    assert!(refused("tls", "{server_name: \"a b\"}").contains("`a b` is not a name"));
    assert!(refused("allow", "[\"*\"]").contains("leave the list empty"));
    assert!(refused("tls", "{chain_match: [\"a.*\"]}").contains("must be the whole first label"));
}

#[test]
fn dns_servers_are_addresses() {
    let config = parsed("version: 1\ndns: {servers: [10.96.0.10, 127.0.0.1:5353, \"[::1]\"]}");
    let expected = ["10.96.0.10:53", "127.0.0.1:5353", "[::1]:53"];
    let expected = expected.map(|text| text.parse::<SocketAddr>().unwrap().into());
    assert_eq!(config.dns.servers, expected);
    for (text, why) in [
        ("dns.google", "is not an IP or IP:port;"),
        ("fd00::a", "`[fd00::a]`"),
        ("fe80::1%eth0", "`[fe80::1%eth0]`"),
        ("1.1.1.1:0", "not an IP or"),
        ("[fe80::1%]", "`` is not an interface"),
        ("[fe80::1%eth0", "is not an IP or IP:port;"),
        ("[fe80::1%eth0]:0", "is not an IP or IP:port;"),
        ("[fd00::a%eth0]", "`fd00::a` is not link-local"),
        ("10.96.0.10%eth0", "`10.96.0.10` is not link-local"),
    ] {
        let problems = wrong(&format!("version: 1\ndns: {{servers: [\"{text}\"]}}"));
        assert!(problems.contains(why), "{problems}");
    }
    assert!(wrong("version: 1\ndns: {namespace: a.b}").contains("`a.b` has dots"));
}

#[test]
fn a_link_local_dns_server_has_an_interface_that_this_machine_need_not_have() {
    let config =
        parsed("version: 1\ndns: {servers: [\"[fe80::1%none-such]\", \"[FE80::2%7]:5353\"]}");
    let said: Vec<_> = config.dns.servers.iter().map(ToString::to_string).collect();
    assert_eq!(said, ["[fe80::1%none-such]:53", "[fe80::2%7]:5353"]);
    assert_eq!(Config::parse(&config.to_yaml(), "t.yaml").unwrap(), config);
}

#[test]
fn a_pin_is_the_digest_of_a_key() {
    let pin = format!("sha256/{}=", "A".repeat(43));
    assert_eq!(alias(&format!("tls: {{pins: [\"{pin}\"]}}")).tls.pins, [pin]);
    for text in ["sha256/AAAA", "AAAA", "sha1/AAAA"] {
        assert!(refused("tls", &format!("{{pins: [{text}]}}")).contains("BASE64 of 32 bytes"));
    }
}

#[test]
fn networks_may_be_single_addresses() {
    let config = parsed("version: 1\npolicy: {allow_addresses: [10.0.0.0/8, \"::1\"]}");
    let expected = ["10.0.0.0/8", "::1/128"];
    assert_eq!(config.policy.allow_addresses, expected.map(|text| text.parse().unwrap()));
    assert!(
        wrong("version: 1\npolicy: {allow_addresses: [10/8]}").contains("`10/8` is not a network")
    );
}
