use std::net::{Ipv4Addr, Ipv6Addr};

use proptest::{
    collection::vec,
    option,
    prelude::*,
    sample::{select, subsequence},
};

use super::*;

fn name() -> impl Strategy<Value = String> {
    "[a-z]([a-z0-9-]{0,10}[a-z0-9])?(\\.[a-z]([a-z0-9]{0,5}))?".prop_filter("IDNA", |name| {
        // Labels such as `xn--` must decode, which random letters do not.
        !name.contains("--")
    })
}

fn time() -> impl Strategy<Value = Duration> {
    prop_oneof![
        (1..100_000u64).prop_map(Duration::from_secs),
        (1..100_000u64).prop_map(Duration::from_millis),
        (1..u64::from(u32::MAX)).prop_map(Duration::from_nanos),
    ]
}

fn target() -> impl Strategy<Value = Target> {
    let host = prop_oneof![
        name().prop_map(TargetHost::Name),
        // 192.0.0.0/8 and 2001::/16: no addresses of this machine.
        any::<[u8; 3]>().prop_map(|[b, c, d]| TargetHost::Ip(Ipv4Addr::new(192, b, c, d).into())),
        any::<u64>()
            .prop_map(|low| TargetHost::Ip(Ipv6Addr::from(0x2001 << 112 | u128::from(low)).into())),
    ];
    (host, option::of(1..=u16::MAX)).prop_map(|(host, port)| Target { host, port })
}

fn patterns() -> impl Strategy<Value = Vec<NamePattern>> {
    let pattern = (any::<bool>(), name())
        .prop_map(|(star, name)| NamePattern(if star { format!("*.{name}") } else { name }));
    vec(pattern, 0..3)
}

fn tls() -> impl Strategy<Value = Tls> {
    let words = (
        select(vec![TlsMode::Verify, TlsMode::InsecureSkipVerify, TlsMode::Plaintext]),
        select(vec![TlsVersion::V1_2, TlsVersion::V1_3]),
        any::<bool>(),
    );
    (words, patterns()).prop_map(|((mode, min_version, post_quantum), chain_match)| Tls {
        mode,
        min_version,
        post_quantum,
        chain_match,
        pins: vec![format!("sha256/{}=", "A".repeat(43))],
        client_certificate: Some(ClientCertificate {
            cert: "Cargo.toml".into(),
            key: "Cargo.lock".into(),
        }),
        ..Tls::default()
    })
}

prop_compose! {
    fn alias(index: usize)(
        listen in vec(10_000..60_000u16, 0..3),
        hosts in vec(name(), 0..3),
        target in option::of(target()),
        failover in vec(target(), 0..3),
        port in 1..=u16::MAX,
        host in prop_oneof![
            Just(HostHeader::Rewrite),
            Just(HostHeader::Preserve),
            target().prop_map(|target| HostHeader::Literal(target.to_string())),
        ],
        forwarded in select(vec![Forwarded::Off, Forwarded::XForwarded, Forwarded::Rfc7239]),
        send in select(vec![None, Some(ProxyVersion::V1), Some(ProxyVersion::V2)]),
        on_change in select(vec![OnChange::Drain, OnChange::Close, OnChange::Keep]),
        tls in tls(),
        version in select(vec![HttpVersion::Auto, HttpVersion::Http1, HttpVersion::Http2]),
        times in [time(), time(), time()],
        response in option::of(time()),
        budget in 0..=1_000_000u32,
        when in subsequence(vec![
            RetryOn::Connect, RetryOn::Reset, RetryOn::Status(502), RetryOn::Status(503), RetryOn::Status(504),
        ], 0..=5),
        numbers in [0..1000usize, 0..1000usize, 0..1000usize],
    ) -> Alias {
        let mut alias = Alias::named(format!("alias-{index}"));
        // Each alias has its own addresses, so that no two have the same name on one listener.
        let own = Ipv4Addr::new(127, 0, 1, u8::try_from(index).unwrap());
        let mut ports = listen;
        ports.sort_unstable();
        ports.dedup();
        alias.listen = ports.into_iter().map(|port| (own, port).into()).collect();
        alias.hosts = hosts;
        alias.target = target;
        alias.failover = failover;
        alias.port = port;
        alias.host = host;
        alias.forwarded = forwarded;
        alias.proxy_protocol.send = send;
        alias.on_change = on_change;
        alias.tls = tls;
        alias.http.version = version;
        alias.drain = times[0];
        alias.timeouts.connect = times[1];
        alias.pool.idle_timeout = times[2];
        alias.timeouts.response = response;
        alias.retry.budget = f64::from(budget) / 1e6;
        alias.retry.when = when;
        alias.pool.max_connections = numbers[0];
        alias.pool.max_idle = numbers[1];
        alias.limits.requests = numbers[2];
        alias
    }
}

fn config() -> impl Strategy<Value = Config> {
    let process = (
        vec(any::<[u8; 4]>(), 0..3),
        option::of(name()),
        (time(), time()),
        vec((any::<u32>(), 0..=32u8), 0..3),
        1024..8_388_608usize,
        any::<bool>(),
        0..1024usize,
    );
    ((alias(1), alias(2), 0..=2usize), process).prop_map(|((one, two, aliases), process)| {
        let (servers, cluster_domain, (a, b), networks, max_header_size, access, workers) = process;
        let mut config = Config { aliases: vec![one, two], workers, ..Config::default() };
        config.aliases.truncate(aliases);
        config.dns.servers =
            servers.into_iter().map(|ip| SocketAddr::from((ip, 53)).into()).collect();
        config.dns.cluster_domain = cluster_domain;
        (config.dns.min_ttl, config.dns.max_ttl) = (a.min(b), a.max(b));
        let network =
            |(ip, bits)| ipnet::Ipv4Net::new(Ipv4Addr::from_bits(ip), bits).unwrap().into();
        config.policy.allow_addresses = networks.into_iter().map(network).collect();
        config.listener.max_header_size = max_header_size;
        config.log.access = access;
        config
    })
}

proptest! {
    #[test]
    fn what_is_printed_is_read_as_what_it_was(config in config()) {
        for text in [config.to_yaml(), config.to_json().to_string()] {
            let read = Config::parse(&text, "t.yaml");
            prop_assert!(read.is_ok(), "{}\n{}", text, read.unwrap_err());
            let read = read.unwrap();
            prop_assert_eq!(&read, &config, "{}", text);
            prop_assert_eq!(read.to_yaml(), config.to_yaml());
        }
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in "[a-z:{}\\[\\], \n\"'&*!|>%#-]{0,200}") {
        let _ = Config::parse(&text, "t.yaml");
    }

    #[test]
    fn no_damage_to_a_file_makes_the_reader_panic(
        at in 0..DEFAULTS.len(),
        length in 0..40usize,
        junk in "[\\PC\n]{0,8}",
    ) {
        let mut text: Vec<char> = DEFAULTS.chars().collect();
        let start = at.min(text.len());
        let end = (start + length).min(text.len());
        text.splice(start..end, junk.chars());
        if let Err(problems) = Config::parse(&text.into_iter().collect::<String>(), "t.yaml") {
            prop_assert!(!problems.list.is_empty());
            prop_assert!(problems.list.iter().all(|problem| problem.position.is_some()), "{problems}");
        }
    }
}
