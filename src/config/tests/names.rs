use super::*;

#[test]
fn names_have_one_form() {
    for (typed, normal) in [
        ("httpbin.org", "httpbin.org"),
        ("HttpBin.ORG.", "httpbin.org"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("_dns.example", "_dns.example"),
        ("webscaler-manual", "webscaler-manual"),
    ] {
        assert_eq!(normal_name(typed).as_deref(), Ok(normal));
    }
}

#[test]
fn what_is_no_name_is_refused_with_its_reason() {
    for (typed, why) in [
        ("", "it is empty"),
        (".", "it is empty"),
        ("a..b", "a label is empty"),
        ("https://httpbin.org", "it has a scheme"),
        ("a b", "only letters"),
        ("-a.example", "begins or ends with `-`"),
        ("10.0.0.256", "its last label is a number"),
        ("*.example.com", "a pattern is not allowed here"),
        (&"a".repeat(64), "a label is longer than 63 bytes"),
        (&["a"; 200].join("."), "it is longer than 253 bytes"),
    ] {
        let error = normal_name(typed).unwrap_err().to_string();
        assert!(error.contains(why), "{typed}: {error}");
    }
}

#[test]
fn a_star_stands_for_one_or_more_labels() {
    let pattern = NamePattern::new("*.Example.COM.").unwrap();
    for name in ["a.example.com", "A.EXAMPLE.COM", "a.b.example.com", "a.example.com."] {
        assert!(pattern.matches(name), "{name}");
    }
    for name in ["example.com", ".example.com", "notexample.com", "a.example.org", "com", ""] {
        assert!(!pattern.matches(name), "{name}");
    }
    // Slicing within a character would panic.
    assert!(!pattern.matches("ü.xample.com"));
}

#[test]
fn a_name_matches_itself_alone() {
    let pattern = NamePattern::new("httpbin.org").unwrap();
    assert!(pattern.matches("HTTPBIN.org."));
    assert!(!pattern.matches("a.httpbin.org"));
    assert!(!pattern.matches("httpbin.organic"));
}

#[test]
fn a_star_elsewhere_is_no_pattern() {
    for text in ["*", "a.*.com", "*a.com", "*.", "*.*.com"] {
        assert!(NamePattern::new(text).is_err(), "{text}");
    }
}

#[test]
fn targets_print_as_they_are_read() {
    for text in
        ["httpbin.org", "httpbin.org:8443", "10.0.0.7", "10.0.0.7:1", "[::1]", "[2001:db8::7]:443"]
    {
        assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
    }
}

#[test]
fn an_argument_names_an_alias_and_maybe_its_target() {
    let alias = Alias::from_arg("webscaler-manual").unwrap();
    assert_eq!(alias, Alias::named("webscaler-manual"));

    let alias = Alias::from_arg("WebScaler-Manual.=HTTPbin.org:8443").unwrap();
    assert_eq!(alias.name, "webscaler-manual");
    let host = TargetHost::Name("httpbin.org".to_owned());
    assert_eq!(alias.target, Some(Target { host, port: Some(8443) }));

    let alias = Alias::from_arg("db=[2001:db8::7]:5433").unwrap();
    let host = TargetHost::Ip("2001:db8::7".parse().unwrap());
    assert_eq!(alias.target, Some(Target { host, port: Some(5433) }));
}

#[test]
fn an_argument_may_name_its_protocol() {
    assert_eq!(Alias::from_arg("http://web"), Alias::from_arg("web"));
    let target = |text: &str| Some(text.parse::<Target>().unwrap());
    for (argument, name, named, port) in [
        ("postgres://webscaler-db", "webscaler-db", None, 5432),
        ("postgres://db:6432", "db", None, 6432),
        ("postgres://db=db.example", "db", target("db.example"), 5432),
        ("tcp://broker=mqtt.example:8883", "broker", target("mqtt.example:8883"), 8883),
        ("tcp://broker=[::1]:8883", "broker", target("[::1]:8883"), 8883),
        ("tcp://broker:8883", "broker", None, 8883),
    ] {
        let alias = Alias::from_arg(argument).unwrap();
        assert_eq!((alias.name.as_str(), &alias.target, alias.port), (name, &named, port));
        let yaml = format!(
            "version: 1\naliases: [{{name: {name}, protocol: tcp, port: {port}, target: {}}}]",
            named.map_or("null".to_owned(), |named| format!("\"{named}\"")),
        );
        let mut from_file = parsed(&yaml).aliases.remove(0);
        from_file.protocol = alias.protocol;
        assert_eq!(alias, from_file, "{argument}");
    }
}

#[test]
fn a_bad_argument_says_what_to_write() {
    for (argument, advice) in [
        ("", "`webscaler-manual=httpbin.org:8443`"),
        ("=httpbin.org", "has no alias"),
        ("a=", "write `a=httpbin.org`, or `a` to use DNS"),
        ("a:8443", "write `a=TARGET:8443`"),
        ("a=b:0", "`0` is not a port from 1 to 65535"),
        ("a=b:https", "`https` is not a port"),
        ("a=b:+1", "`+1` is not a port"),
        ("tcp://", "has no alias"),
        ("tcp://a", "write `tcp://a:8883`, or `tcp://a=TARGET:8883`"),
        ("tcp://a=b", "`tcp://a=b` has no port"),
        ("tcp://a:x", "`x` is not a port from 1 to 65535"),
        ("tcp://a:99999", "`99999` is not a port from 1 to 65535"),
        ("tcp://a:0", "`0` is not a port from 1 to 65535"),
        ("http://a:8443", "write `a=TARGET:8443`"),
        ("tpc://a:1", "did you mean `tcp://`?"),
        ("postgres:/a", "`postgres:/a` is not a name"),
        ("kafka://a:1", "write `http`, `tcp`"),
        ("https://a/", "write `a`; "),
        ("a=::1", "in brackets, `[::1]`"),
        ("a=[::1", "the bracket is not closed"),
        ("a=[::1]443", "found `443`"),
        ("a=https://httpbin.org", "no scheme and no path"),
        ("a=httpbin.org/get", "no scheme and no path"),
        ("a b=c", "in `a b=c`, the alias: `a b` is not a name"),
    ] {
        let error = Alias::from_arg(argument).unwrap_err().to_string();
        assert!(error.contains(advice), "{argument}: {error}");
    }
}
