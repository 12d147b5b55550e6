use super::*;

#[track_caller]
fn assert_wrong(text: &str, expected: &[&str]) {
    assert_eq!(wrong(text).lines().collect::<Vec<_>>(), expected);
}

#[test]
fn every_problem_is_found_in_one_run() {
    assert_wrong(
        "\
version: 2
aliases:
  - lisen: [8080]
    port: \"443\"
  - name: b
    tls:
      mode: verfy
      ca: [x]
    drain: 5
    drain: 6s
dns:
  min_ttl: 2m
loging: {}
allow_non_loopback: yes
",
        &[
            "t.yaml:1:10: version: `2` is not a version of this format; write `version: 1`",
            "t.yaml:3:5: aliases[0]: the key `name` is missing: The name the application uses, such as `webscaler-manual`: lower-case, IDNA-encoded, no trailing dot.",
            "t.yaml:3:5: unknown key `lisen`; did you mean `listen`?",
            "t.yaml:4:11: aliases[0].port: expected a whole number from 1 to 65535 without quotes, found the text \"443\"",
            "t.yaml:7:13: aliases[1].tls.mode: `verfy` is not one of `verify`, `insecure_skip_verify` or `plaintext`; did you mean `verify`?",
            "t.yaml:8:11: aliases[1].tls.ca: expected a mapping of `system`, `webpki` or `files`, found a list",
            "t.yaml:9:12: aliases[1].drain: `5` has no unit; use a duration such as `250ms`, `5s` or `1h`",
            "t.yaml:10:5: duplicate key `drain`: it is already set on line 9; keep one",
            "t.yaml:12:12: dns.min_ttl: min_ttl (120s) is above max_ttl (60s)",
            "t.yaml:13:1: unknown key `loging`; did you mean `log`?",
            "t.yaml:14:21: allow_non_loopback: `yes` is not `true` or `false`",
        ],
    );
}

/// Regression: control characters in a value reached the terminal, and one problem took several lines.
#[test]
fn a_problem_is_one_line_whatever_the_value_holds() {
    let text = "version: 1\nadmin:\n  listen: \"a\\nt.yaml:9:9: b\\e[31m\\0ü\"\n";
    let problems = wrong(text);
    let start = "t.yaml:3:11: admin.listen: `a\\nt.yaml:9:9: b\\u{1b}[31m\\u{0}ü` is not ";
    assert!(problems.starts_with(start), "{problems}");
    assert_eq!(problems.lines().count(), 1);
}

#[test]
fn a_file_says_its_version() {
    assert_wrong(
        "aliases: []",
        &[
            "t.yaml:1:1: the key `version` is missing: The version of this format: write `version: 1`.",
        ],
    );
    assert!(wrong("").starts_with("t.yaml:1:1: the key `version` is missing"));
    assert!(wrong("version: \"1\"").contains("write `version: 1`"));
    assert!(wrong("- a").starts_with("t.yaml:1:1: expected a mapping of `version`, `aliases`"));
}

#[test]
fn an_unknown_key_with_no_neighbour_gets_the_list() {
    assert_wrong(
        "version: 1\nproxy: {upstream: x}",
        &[
            "t.yaml:2:9: unknown key `upstream`; expected one of `listen`, `passthrough` or `credentials`",
        ],
    );
}

#[test]
fn an_on_is_told_its_name_of_now_also_where_it_became_a_boolean() {
    for key in ["on", "true"] {
        assert_wrong(
            &format!("version: 1\naliases:\n  - name: a\n    retry:\n      {key}: [connect]\n"),
            &[&format!(
                "t.yaml:5:7: unknown key `{key}`; use `when`: YAML 1.1 tools read `on` as the boolean true"
            )],
        );
    }
}

#[test]
fn columns_count_characters() {
    assert_wrong(
        "version: 1\nlog: {level: info, \"é\": 1, lvel: warn}",
        &[
            "t.yaml:2:20: unknown key `é`; expected one of `format`, `level` or `access`",
            "t.yaml:2:28: unknown key `lvel`; did you mean `level`?",
        ],
    );
}

#[test]
fn what_is_no_yaml_says_where_it_stops_being() {
    for (text, place) in [
        ("version: 1\naliases: [\n", "t.yaml:2:10: not valid YAML: unclosed bracket"),
        ("version: 1\n  aliases: []\n", "t.yaml:2:10: not valid YAML: "),
        ("version: 1\nlog:\n\tlevel: info\n", "t.yaml:3:"),
        (
            "version: 1\nlog: *base\n",
            "t.yaml:2:6: `*base` refers to an anchor `&base` that is not defined",
        ),
        ("version: 1\nlog: &a {level: *a}\n", "t.yaml:2:17: this anchor contains itself"),
        ("version: 1\n---\nversion: 1\n", "t.yaml:3:1: a second document begins here"),
        ("version: 1\nlog: !env {}\n", "t.yaml:2:"),
        ("version: 1\n? [a]\n: b\n", "t.yaml:2:3: a list cannot be a key"),
    ] {
        assert!(wrong(text).starts_with(place), "{}", wrong(text));
    }
}

#[test]
fn a_bomb_of_anchors_does_not_go_off() {
    let mut text = "version: 1\na0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..10 {
        let inner = vec![format!("*a{}", level - 1); 10].join(", ");
        text.push_str(&format!("a{level}: &a{level} [{inner}]\n"));
    }
    let problems = wrong(&text);
    assert!(problems.contains("anchors expand to more than 300000 values"), "{problems}");
    assert!(wrong(&"[".repeat(5000)).starts_with("t.yaml:1:"));
}

#[test]
fn a_name_belongs_to_one_alias() {
    assert_wrong(
        "version: 1\naliases:\n  - name: a\n  - name: A.\n    listen: [8081]\n",
        &[
            "t.yaml:4:11: aliases[1].name: duplicate alias `a`: aliases[0] (`a`, line 3) has the same name",
        ],
    );
}

#[test]
fn a_host_belongs_to_one_alias_of_a_listener() {
    let two = |one: &str, two: &str, rest: &str| {
        format!("version: 1\naliases:\n  - {{name: a, {one}}}\n  - {{name: b, {two}}}\n{rest}")
    };
    assert_wrong(
        &two("hosts: [x.example]", "hosts: [y.example, X.example]", ""),
        &[
            "t.yaml:4:34: aliases[1].hosts[1]: the Host `x.example` already belongs to aliases[0] (`a`, line 3) on the same listener; give one of them its own `listen`",
        ],
    );
    assert!(wrong(&two("hosts: [\"*\"]", "hosts: [\"*\"]", "")).contains("the Host `*`"));
    // With a namespace, the forms of a name are known.
    let forms = two("hosts: [b.prod.svc]", "drain: 1s", "dns: {namespace: prod}\n");
    assert!(wrong(&forms).contains("aliases[1].name: the Host `b.prod.svc`"), "{}", wrong(&forms));
    parsed(&forms.replace("prod}", "default}"));
    let domain = "dns: {cluster_domain: k8s.example}\n";
    for (one, other) in [("b.ns.svc.k8s.example", "b.ns"), ("b.ns", "b.ns.svc")] {
        let forms = two("drain: 1s", "drain: 1s", domain)
            .replace("name: a", &format!("name: {one}"))
            .replace("name: b,", &format!("name: {other},"));
        assert!(wrong(&forms).contains("aliases[1].name: the Host `b.ns"), "{}", wrong(&forms));
    }
    parsed(&two("hosts: [x.example]", "hosts: [x.example], listen: [8081]", ""));
    parsed(&two("hosts: [\"*\"]", "hosts: [x.example]", ""));
}

#[test]
fn aliases_on_one_listener_agree_on_who_sends_proxy_headers() {
    let two = |one: &str, two: &str| {
        format!("version: 1\naliases:\n  - {{name: a, {one}}}\n  - {{name: b, {two}}}\n")
    };
    let accept = |networks: &str| format!("proxy_protocol: {{accept: [{networks}]}}");
    assert_wrong(
        &two("port: 443", &accept("10.0.0.0/8")),
        &[
            "t.yaml:4:40: aliases[1].proxy_protocol.accept: this differs from `proxy_protocol.accept` of aliases[0] (`a`, line 3), which listens on 127.0.0.1:8080 too: a PROXY header comes before the Host, so give both the same networks, or one of them its own `listen`",
        ],
    );
    let first = wrong(&two(&accept("10.0.0.0/8"), "port: 443"));
    assert!(first.contains("aliases[0].proxy_protocol.accept: this differs"), "{first}");
    let both = (accept("10.0.0.1, 10.2.3.4/16"), accept("10.2.0.0/16, 10.0.0.1/32"));
    parsed(&two(&both.0, &both.1));
    parsed(&two("listen: [8081]", &both.1));
}

#[test]
fn an_address_has_one_listener() {
    let two = |one: &str, two: &str| {
        format!("version: 1\naliases:\n  - {{name: a, {one}}}\n  - {{name: b, {two}}}\n")
    };
    let taken = |one: &str, other: &str, part: &str| {
        let problems = wrong(&two(one, other));
        assert!(problems.lines().any(|line| line.starts_with(part)), "{problems}");
    };
    taken(
        "listen: [9000]",
        "listen: [9000], protocol: tcp, port: 1",
        "t.yaml:4:24: aliases[1].listen[0]: 127.0.0.1:9000 conflicts with 127.0.0.1:9000 of aliases[0] (`a`, line 3): an alias of `protocol: tcp` needs its own address, such as 127.0.1.1:9000",
    );
    taken(
        "protocol: tcp, port: 8080",
        "listen: [8080]",
        "t.yaml:4:24: aliases[1].listen[0]: 127.0.0.1:8080 conflicts with 127.0.0.1:8080 of aliases[0] (`a`, line 3): an alias of `protocol: tcp` needs its own address, such as 127.0.1.1:8080",
    );
    // One that is free.
    taken(
        "protocol: tcp, listen: [\"127.0.1.1:9000\", 9000], port: 1",
        "protocol: tcp, port: 9000",
        "t.yaml:3:57: aliases[0].listen[1]: 127.0.0.1:9000 conflicts with 127.0.0.1:9000 of aliases[1] (`b`, line 4): an alias of `protocol: tcp` needs its own address, such as 127.0.1.2:9000",
    );
    taken(
        "listen: [0]",
        "listen: [0], protocol: tcp, port: 1",
        "t.yaml:4:24: aliases[1].listen[0]: 127.0.0.1:0 conflicts with 127.0.0.1:0 of aliases[0] (`a`, line 3): an alias of `protocol: tcp`",
    );
    taken(
        "listen: [9000, 9000]",
        "drain: 1s",
        "t.yaml:3:30: aliases[0].listen[1]: 127.0.0.1:9000 is already covered by 127.0.0.1:9000 of this",
    );
    taken(
        "listen: [\"0.0.0.0:9000\"]",
        "listen: [9000]",
        "t.yaml:4:24: aliases[1].listen[0]: 127.0.0.1:9000 conflicts with 0.0.0.0:9000 of",
    );
    taken(
        "listen: [\"[::ffff:127.0.0.1]:9000\"]",
        "listen: [9000]",
        "t.yaml:4:24: aliases[1].listen[0]: 127.0.0.1:9000 conflicts with [::ffff:127.0.0.1]:9000 of",
    );
    taken(
        "listen: [9990]",
        "drain: 1s",
        "t.yaml:3:24: aliases[0].listen[0]: 127.0.0.1:9990 conflicts with 127.0.0.1:9990 of admin.listen: ",
    );
    taken(
        "listen: [8080], protocol: tcp, port: 1",
        "drain: 1s",
        "t.yaml:3:24: aliases[0].listen[0]: 127.0.0.1:8080 conflicts with 127.0.0.1:8080 of aliases[1] (`b`, line 4): an alias of `protocol: tcp`",
    );
    parsed(&two("listen: [9000]", "listen: [9000]"));
    parsed(&two("listen: [0]", "listen: [0]"));
}

#[test]
fn a_listener_outside_loopback_is_said_out_loud() {
    let text = "version: 1\naliases: [{name: a, listen: [\"0.0.0.0:80\", \"[::1]:80\"]}]\n";
    assert_wrong(
        text,
        &[
            "t.yaml:2:30: aliases[0].listen[0]: 0.0.0.0:80 can be reached from outside this machine: listen on 127.0.0.1, or set `allow_non_loopback: true` at the top of the file",
        ],
    );
    parsed(&format!("{text}allow_non_loopback: true\n"));
    assert!(wrong("version: 1\nadmin: {listen: \"[::]:9990\"}").starts_with("t.yaml:2:17: admin."));
    let proxy = "version: 1\nproxy: {listen: \"10.0.0.1:3128\"}";
    assert!(wrong(proxy).starts_with("t.yaml:2:17: proxy.listen: 10.0.0.1:3128 can be reached"));
}

#[test]
fn a_proxy_does_not_lead_to_itself() {
    for (listen, target) in [
        ("127.0.0.1:9000", "127.0.0.1:9000"),
        ("127.0.0.1:9000", "localhost:9000"),
        ("127.0.0.1:443", "127.0.0.1"),
        ("[::1]:9000", "'[::1]:9000'"),
        ("127.0.0.1:9000", "127.0.0.1:9990"),
        ("0.0.0.0:9000", "127.0.0.1:9000"),
        ("127.0.0.1:9000", "0.0.0.0:9000"),
    ] {
        let text = format!(
            "version: 1\nallow_non_loopback: true\naliases:\n  - name: a\n    listen: [\"{listen}\"]\n"
        );
        let problems = wrong(&format!("{text}    target: {target}\n"));
        assert!(problems.starts_with("t.yaml:6:13: aliases[0].target: "), "{problems}");
        assert!(problems.contains("this proxy's own"), "{problems}");
        let problems = wrong(&format!("{text}    failover: [b.example, {target}]\n"));
        assert!(problems.starts_with("t.yaml:6:27: aliases[0].failover[1]: "), "{problems}");
    }
    parsed("version: 1\naliases: [{name: a, target: \"127.0.0.1:8081\"}]");
    // Another process may listen on `::1`.
    parsed(
        "version: 1\nallow_non_loopback: true\naliases: [{name: a, listen: [\"0.0.0.0:8081\"], target: \"[::1]:8081\"}]",
    );
}

#[test]
fn what_the_file_tells_must_be_what_it_allows() {
    let text = "version: 1\naliases:\n  - {name: a, allow: [\"*.b.c\"], target: ";
    assert_wrong(
        &format!("{text}b.c}}\n"),
        &["t.yaml:3:41: aliases[0].target: `b.c` is not in `allow`; add it there"],
    );
    parsed(&format!("{text}a.b.c}}\n"));
    parsed(&format!("{text}b.c, tls: {{server_name: a.b.c}}}}\n"));
    assert_wrong(
        &format!("{text}a.b.c, failover: [d.b.c, \"b.c:8443\", 192.0.2.7]}}\n"),
        &[
            "t.yaml:3:66: aliases[0].failover[1]: `b.c` is not in `allow`; add it there",
            "t.yaml:3:78: aliases[0].failover[2]: `192.0.2.7` is an address, and `allow` has names only: set `tls.server_name` to the name that its certificate is valid for, or leave `allow` empty",
        ],
    );
    // `server_name` is the true name of all targets.
    parsed(&format!("{text}b.c, failover: [192.0.2.7], tls: {{server_name: a.b.c}}}}\n"));
    let wrong_name = wrong(&format!("{text}a.b.c, tls: {{server_name: b.c}}}}\n"));
    assert!(wrong_name.contains("aliases[0].tls.server_name: `b.c` is not in"), "{wrong_name}");
    // A later name of the target's chain may be the one that is allowed.
    for (chosen, possible) in [
        ("*.b.c", true),
        ("x.b.c", true),
        ("*.x.b.c", true),
        ("*.c", false),
        ("b.c", false),
        ("*.d", false),
        ("x.d", false),
    ] {
        let text = format!("{text}b.c, tls: {{chain_match: [\"{chosen}\"]}}}}\n");
        match Config::parse(&text, "t.yaml") {
            Ok(_) => assert!(possible, "{chosen}"),
            Err(problems) => assert!(!possible, "{chosen}: {problems}"),
        }
    }
}

/// A ConfigMap has up to a megabyte, and nobody reads a thousand problems.
#[test]
fn what_anchors_repeat_is_bounded_in_number_length_and_complaints() {
    // Each anchor contains the one before it, and all of them contain the list.
    let list = "x, ".repeat(2_000);
    let nested: String = (0..28).map(|n| format!("&a{n} [")).collect();
    let problems = wrong(&format!("version: 1\nlog: {nested}{list}{}\n", "]".repeat(28)));
    assert!(problems.contains("expected a mapping"), "{problems}");

    let long = "x".repeat(20_000);
    let uses = "*a, ".repeat(10_000);
    let text =
        format!("version: 1\nlog: {{level: &a {long}}}\naliases: [{{name: a, hosts: [{uses}]}}]");
    let problems = wrong(&text);
    assert!(problems.contains("bytes of text"), "{problems}");

    let uses = "*a, ".repeat(10_000);
    let text = format!(
        "version: 1\nlog: {{level: &a {}}}\naliases: [{{name: a, hosts: [{uses}]}}]",
        "x".repeat(999)
    );
    let problems = wrong(&text);
    assert!(problems.len() < 1_000_000, "{} bytes", problems.len());
    assert!(problems.contains("further problems are not shown"));
    assert!(wrong("version: 1\nlog: {level: [x], format: 0}").lines().count() == 2);
}

#[test]
fn a_file_holds_up_to_ten_thousand_aliases() {
    let aliases = |count: usize| -> String {
        let one =
            |n| format!("- {{name: a{n}, listen: [\"127.1.{}.{}:8080\"]}}\n", n / 250, n % 250 + 1);
        format!("version: 1\naliases:\n{}", (0..count).map(one).collect::<String>())
    };
    assert_eq!(parsed(&aliases(3_000)).aliases.len(), 3_000);
    let problems = wrong(&aliases(10_001));
    assert_eq!(problems, "t.yaml:3:3: a configuration has at most 10000 aliases");
}

#[test]
fn files_exist() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path().display();
    let problems = wrong(&format!(
        "\
version: 1
aliases:
  - name: a
    tls:
      ca: {{files: [\"{folder}/missing\"]}}
      crls: [\"{folder}\"]
      client_certificate: {{cert: Cargo.toml, key: no/key}}
  - name: b
    tls: {{client_certificate: {{cert: Cargo.toml}}}}
"
    ));
    let expected = [
        &format!(
            "t.yaml:5:20: aliases[0].tls.ca.files[0]: cannot read the file `{folder}/missing`: "
        ),
        &format!(
            "t.yaml:6:14: aliases[0].tls.crls[0]: cannot read the file `{folder}`: it is a directory, not a regular file"
        ),
        "t.yaml:7:51: aliases[0].tls.client_certificate.key: cannot read the file `no/key`: ",
        "t.yaml:9:31: aliases[1].tls.client_certificate: the key `key` is missing: PEM file of",
    ];
    assert_eq!(problems.lines().count(), expected.len(), "{problems}");
    for (line, expected) in problems.lines().zip(expected) {
        assert!(line.starts_with(expected), "{line}\n{expected}");
    }
}

#[test]
fn a_certificate_has_a_key_and_a_target_has_trust() {
    let problems = wrong("version: 1\nlistener: {tls: {certificate: Cargo.toml}}");
    assert!(
        problems.contains("t.yaml:2:31: listener.tls.certificate: `certificate` requires `key`"),
        "{problems}"
    );
    let trust = "version: 1\naliases: [{name: a, tls: {ca: {system: false, webpki: false}}}]";
    assert!(wrong(trust).starts_with("t.yaml:2:31: aliases[0].tls.ca: no certificate could be"));
    parsed(&trust.replace("{ca", "{mode: plaintext, ca"));
}

#[test]
fn what_does_not_exist_yet_is_refused_at_its_key() {
    assert_wrong(
        "\
version: 1
aliases:
  - name: a
    health: {active: {path: /healthz}}
    limits: {queue: 1}
kubernetes: {watch: true}
",
        &[
            "t.yaml:4:22: aliases[0].health.active: `health.active` is not available in this version; leave it out",
            "t.yaml:5:21: aliases[0].limits.queue: `limits.queue` is not available in this version; leave it out",
            "t.yaml:6:21: kubernetes.watch: `kubernetes.watch` is not available in this version; leave it out",
        ],
    );
}

#[test]
fn a_key_of_another_protocol_is_refused_at_its_place() {
    assert_wrong(
        "\
version: 1
aliases:
  - name: a
    protocol: tcp
    host: preserve
    repair: false
    http: {version: \"2\"}
    pool: {max_connections: 1, max_idle: 1}
    timeouts: {response: 1s, idle: 1h}
    retry: {when: [connect, 503]}
    tls: {mode: plaintext}
    tcp: {alpn: [mqtt]}
  - {name: b, tcp: {alpn: [mqtt]}}
  - {name: c, tls_in: true}
",
        &[
            "t.yaml:4:15: aliases[0].protocol: `protocol: tcp` requires `port`, the port of the target, such as `port: 8883`",
            "t.yaml:5:11: aliases[0].host: `host` is for `protocol: http` only, and this alias is `tcp`; leave it out",
            "t.yaml:6:13: aliases[0].repair: `repair` is for `protocol: http` only, and this alias is `tcp`; leave it out",
            "t.yaml:7:11: aliases[0].http: `http` is for `protocol: http` only, and this alias is `tcp`; leave it out",
            "t.yaml:8:42: aliases[0].pool.max_idle: `pool.max_idle` is for `protocol: http` only, and this alias is `tcp`; leave it out",
            "t.yaml:9:26: aliases[0].timeouts.response: `timeouts.response` is for `protocol: http` only, and this alias is `tcp`; leave it out",
            "t.yaml:10:29: aliases[0].retry.when[1]: a `tcp` alias retries on `connect` only: what has been sent cannot be sent again",
            "t.yaml:12:17: aliases[0].tcp.alpn: `alpn` is part of TLS, and `tls.mode` is `plaintext`; leave one of them out",
            "t.yaml:13:20: aliases[1].tcp: `tcp` is for `protocol: tcp` only; leave it out",
            "t.yaml:14:23: aliases[2].tls_in: `tls_in` is not available for `protocol: http` in this version; leave it out",
        ],
    );
}

#[test]
fn an_unreadable_value_is_complained_about_once() {
    // The default that replaces the invalid address would conflict with the other alias.
    assert_wrong(
        "version: 1\naliases:\n  - {name: a, protocol: http, listen: 8080}\n  - {name: b, listen: [x]}\n",
        &[
            "t.yaml:3:39: aliases[0].listen: expected a list, such as `[a, b]` or one `- item` per line, found `8080`",
            "t.yaml:4:24: aliases[1].listen[0]: `x` is not an address to listen on; use an IP with a port, such as `127.0.0.1:8080`, `[::1]:8080`, or `8080` for port 8080 of 127.0.0.1",
        ],
    );
}

#[test]
fn a_word_for_the_host_in_other_letters_is_no_literal_host() {
    assert_wrong(
        "version: 1\naliases:\n  - {name: a, host: pReserve}\n  - {name: b, host: rewrite.}\n",
        &[
            "t.yaml:3:21: aliases[0].host: `pReserve` is not a literal Host: write `preserve`",
            "t.yaml:4:21: aliases[1].host: `rewrite.` is not a literal Host: write `rewrite`",
        ],
    );
}
