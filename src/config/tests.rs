mod names;
mod positions;
mod round_trip;
mod schema;
mod values;

use std::{fs, net::SocketAddr, time::Duration};

use super::*;

/// The documentation's example, in which every key has its default.
const DEFAULTS: &str = include_str!("tests/defaults.yaml");

fn parsed(text: &str) -> Config {
    Config::parse(text, "truename.yaml").unwrap_or_else(|problems| panic!("{problems}"))
}

/// The problems of `text`, one per line.
fn wrong(text: &str) -> String {
    match Config::parse(text, "t.yaml") {
        Ok(config) => panic!("no problem was found in {config:#?}"),
        Err(problems) => problems.to_string(),
    }
}

#[test]
fn the_documented_defaults_are_the_defaults() {
    let expected = Config { aliases: vec![Alias::named("webscaler-manual")], ..Config::default() };
    assert_eq!(parsed(DEFAULTS), expected);
}

#[test]
fn one_line_is_enough_for_an_alias() {
    let short = parsed("version: 1\naliases: [{name: webscaler-manual}]\n");
    assert_eq!(short, parsed(DEFAULTS));
}

#[test]
fn a_file_may_hold_settings_without_aliases() {
    let config = parsed("version: 1\ndns: {servers: [10.96.0.10]}\n");
    assert_eq!(config.dns.servers, ["10.96.0.10:53".parse().unwrap()]);
    assert_eq!(config.aliases, []);
}

#[test]
fn flow_style_is_read_as_block_style_is() {
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.pem");
    fs::write(&ca, "").unwrap();
    let config = parsed(&format!(
        r#"
version: 1
aliases:
  - name: webscaler-manual
    listen: ["127.0.0.1:18080"]
    protocol: http
    port: 8443
    host: "httpbin.org"
    tls: {{ca: {{system: false, webpki: false, files: ["{}"]}}}}
    http: {{version: "2"}}

dns: {{servers: ["127.0.0.1:15353"], cluster_domain: cluster.local, namespace: default}}
policy: {{allow_addresses: ["127.0.0.0/8"]}}
admin: {{listen: null}}
log: {{level: warn, access: false}}
workers: 2
"#,
        ca.display()
    ));
    let alias = &config.aliases[0];
    assert_eq!(alias.tls.ca, Trust { system: false, webpki: false, files: vec![ca] });
    assert_eq!(alias.host, HostHeader::Literal("httpbin.org".to_owned()));
    assert_eq!((alias.port, alias.http.version), (8443, HttpVersion::Http2));
    assert_eq!(config.admin.listen, None);
    assert_eq!(config.policy.allow_addresses, ["127.0.0.0/8".parse().unwrap()]);
    assert_eq!(config.dns.cluster_domain.as_deref(), Some("cluster.local"));
    assert_eq!((config.log.level, config.log.access, config.workers), (LogLevel::Warn, false, 2));
}

#[test]
fn anchors_and_merges_carry_settings_from_alias_to_alias() {
    let config = parsed(
        "
version: 1
aliases:
  - &base
    name: one
    timeouts: {connect: 1s}
    drain: 7s
  - <<: *base
    name: two
    drain: 8s
",
    );
    let seconds = |alias: &Alias| (alias.timeouts.connect.as_secs(), alias.drain.as_secs());
    assert_eq!(config.aliases.iter().map(seconds).collect::<Vec<_>>(), [(1, 7), (1, 8)]);
    assert_eq!(config.aliases[1].name, "two");
}

#[test]
fn an_empty_heading_is_a_section_of_defaults() {
    let config =
        parsed("version: 1\ndns:\n  # min_ttl: 1s\naliases:\n  - name: webscaler-manual\n");
    assert_eq!(config, parsed(DEFAULTS));
}

#[test]
fn files_lie_beside_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("ca.pem"), "").unwrap();
    let path = folder.path().join("truename.yaml");
    fs::write(&path, "version: 1\naliases: [{name: a, tls: {ca: {files: [ca.pem]}}}]").unwrap();
    let config = Config::load(&path).unwrap();
    assert_eq!(config.aliases[0].tls.ca.files, [folder.path().join("ca.pem")]);
}

#[test]
fn a_postgres_alias_has_the_port_of_postgres() {
    // The protocol is not available yet, so only the problems show the rule.
    let problems = wrong(
        "version: 1\naliases:\n  - {name: a, protocol: postgres, listen: [127.0.1.1:5432], target: 127.0.1.1}\n",
    );
    assert!(problems.contains("aliases[0].target: `127.0.1.1` is this proxy's own"), "{problems}");
}

#[test]
fn an_alias_of_mail_or_ldap_has_the_port_where_tls_begins_with_starttls() {
    for (protocol, port) in [("smtp", 587), ("imap", 143), ("pop3", 110), ("ldap", 389)] {
        let text = format!("version: 1\naliases: [{{name: a, protocol: {protocol}}}]\n");
        let config = parsed(&text);
        let alias = &config.aliases[0];
        assert_eq!(alias.port, port, "{protocol}");
        assert_eq!(alias.listen, [SocketAddr::from(([127, 0, 0, 1], port))], "{protocol}");
        assert_eq!(alias.timeouts.idle, NEVER);
        assert_eq!(parsed(&config.to_yaml()), config);
        let problems = wrong(&text.replace("}]", ", tcp: {alpn: [x]}, host: preserve}]"));
        assert!(problems.contains("`tcp` is for `protocol: tcp` only"), "{problems}");
        assert!(problems.contains(&format!("this alias is `{protocol}`")), "{problems}");
    }
}

#[test]
fn a_tcp_alias_listens_at_its_targets_port_and_is_never_idle_for_too_long() {
    let text = "version: 1\naliases: [{name: a, protocol: tcp, KEYS}]\n";
    let alias = |keys: &str| parsed(&text.replace("KEYS", keys)).aliases.remove(0);
    for (keys, port) in [
        ("port: 8883", 8883),
        ("target: \"b.example:6380\"", 6380),
        ("target: \"b.example:6380\", port: 6379", 6379),
    ] {
        let alias = alias(keys);
        assert_eq!(alias.port, port, "{keys}");
        assert_eq!(alias.listen, [SocketAddr::from(([127, 0, 0, 1], port))], "{keys}");
        assert_eq!(alias.timeouts.idle, NEVER);
    }
    let alias = alias("port: 8883, listen: [1883], timeouts: {idle: 1h}, tls_in: false");
    assert_eq!(alias.listen, ["127.0.0.1:1883".parse::<SocketAddr>().unwrap()]);
    assert_eq!((alias.timeouts.idle.as_secs(), alias.tls_in), (3600, TlsIn::Never));
    // Printed and read again it is the same.
    let config = parsed(&text.replace("KEYS", "port: 8883"));
    assert_eq!(parsed(&config.to_yaml()), config);
}

#[test]
fn what_was_built_by_hand_is_checked_too() {
    let mut config = Config { aliases: vec![Alias::named("a")], ..Config::default() };
    assert_eq!(config.validate("command line"), Ok(()));
    config.aliases[0].listen = vec!["0.0.0.0:8080".parse().unwrap()];
    let problems = config.validate("command line").unwrap_err().to_string();
    assert!(
        problems.starts_with("command line: aliases[0].listen[0]: 0.0.0.0:8080 can be reached"),
        "{problems}"
    );
    config.allow_non_loopback = true;
    assert_eq!(config.validate("command line"), Ok(()));
}

#[test]
fn lines_may_end_as_on_windows() {
    let config = parsed(&format!("\u{feff}{}", DEFAULTS.replace('\n', "\r\n")));
    assert_eq!(config, parsed(DEFAULTS));
    let problems = wrong("version: 1\r\nlog:\r\n  levl: info\r\n");
    assert_eq!(problems, "t.yaml:3:3: unknown key `levl`; did you mean `level`?");
}

#[test]
fn a_lifetime_of_certificates_is_refused_with_the_reason() {
    let problems = wrong("version: 1\nca: {leaf_lifetime: 24h}\n");
    assert!(
        problems.starts_with("t.yaml:2:6: unknown key `leaf_lifetime`; it was removed: "),
        "{problems}"
    );
}
